//! A weight kept in bf16 in the order in which products read it: half the memory of `f32`, and so twice the speed of decoding.

use super::bf16::{bf16_bits, Line};
#[cfg(target_arch = "x86_64")]
use super::bf16_x86::PREFETCH_WORDS;
use super::matmul::{matmul, Mat, MatMut};
use super::pool::{Pool, SharedMut};
use super::simd;

/// Rows of the weight, that is columns of the product, in a panel.
const NR: usize = 32;
/// Most rows of x for which a product without AVX512_BF16 widens the weight in registers, once for each [`Path::rows_at_once`] of them.
/// From about 100 rows on, widening it once for `gemm` is faster (measured on 576 x 576, AVX-512).
const FEW_ROWS: usize = 64;
/// Most rows of x that share one widening.
const ROWS_AT_ONCE: usize = 4;
/// Panels that are widened to `f32` at a time for more rows: 512 columns.
const WIDE_PANELS: usize = 16;
/// Below this many bytes of weight a second thread costs more than it brings to a few rows.
const THREADS_FROM_BYTES: usize = 1 << 17;
/// Parts a thread, so that one which the host has taken away does not hold up the others for long.
const PARTS_PER_THREAD: usize = 4;

/// A weight (n, k) rounded to bf16, as `[n / 32][k / 2][32][2]`: panels of 32 rows, in each the pairs along k of all rows side by side.
///
/// The last panel is filled up with zero rows, an odd k with a zero.
#[derive(PartialEq)]
pub struct PackedBf16 {
    lines: Vec<Line>,
    n: usize,
    k: usize,
}

/// How a product is computed; [`Path::best`] chooses.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Path {
    /// VDPBF16PS on x rounded to bf16.
    Bf16,
    /// The weight widened to `f32`, with AVX-512.
    Avx512,
    /// The weight widened to `f32`, with AVX2 and FMA.
    Avx2,
    /// The weight widened to `f32`, with what every processor has.
    Plain,
}

impl Path {
    fn best() -> Self {
        let features = simd::features();
        match () {
            _ if features.avx512_bf16_full_rate => Path::Bf16,
            _ if features.avx512 => Path::Avx512,
            _ if features.avx2_fma => Path::Avx2,
            _ => Path::Plain,
        }
    }

    /// Rows of x whose sums fit the registers: twice as many and they spill, at half the speed.
    fn rows_at_once(self) -> usize {
        match self {
            Path::Bf16 | Path::Avx512 => ROWS_AT_ONCE,
            Path::Avx2 => 2,
            Path::Plain => 1,
        }
    }
}

impl PackedBf16 {
    /// Rounds (nearest even) and packs `w` (n, k), row-major.
    ///
    /// # Panics
    /// If `w` holds fewer than n · k numbers.
    pub fn new(w: &[f32], n: usize, k: usize) -> Self {
        let w = &w[..n * k];
        let words = n.div_ceil(NR) * k.div_ceil(2) * NR;
        let mut packed = Self {
            lines: vec![Line::ZERO; words / 16],
            n,
            k,
        };
        for i in 0..n {
            let base = packed.place(i);
            for (p, pair) in w[i * k..(i + 1) * k].chunks(2).enumerate() {
                let high = pair.get(1).map_or(0, |x| bf16_bits(*x));
                let word = u32::from(bf16_bits(pair[0])) | u32::from(high) << 16;
                packed.words_mut()[base + p * NR] = word;
            }
        }
        packed
    }

    /// Rows n and columns k of the weight.
    pub fn shape(&self) -> (usize, usize) {
        (self.n, self.k)
    }

    /// Bytes of memory that the packed numbers take.
    pub fn bytes(&self) -> usize {
        std::mem::size_of_val(&self.lines[..])
    }

    /// Row `i` of the weight, k numbers.
    ///
    /// # Panics
    /// If there is no such row, or `out` is not k long.
    pub fn row(&self, i: usize, out: &mut [f32]) {
        assert!(i < self.n, "row {i} of {}", self.n);
        assert_eq!(out.len(), self.k);
        let words = &self.words()[self.place(i)..];
        for (pair, word) in out.chunks_mut(2).zip(words.iter().step_by(NR)) {
            let (low, high) = widen(*word);
            pair[0] = low;
            if let Some(second) = pair.get_mut(1) {
                *second = high;
            }
        }
    }

    /// The weight (n, k), row-major.
    pub fn unpack(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.n * self.k];
        for i in 0..self.n {
            self.row(i, &mut out[i * self.k..(i + 1) * self.k]);
        }
        out
    }

    /// `y = x wᵀ`. Shapes: x (t, k), y (t, n), both row-major.
    ///
    /// For few rows this is one pass over the weight, which runs at the speed of memory. Where the processor runs AVX512_BF16 at full rate
    /// x is rounded to bf16 too; elsewhere only the weight is.
    ///
    /// # Panics
    /// If x or y is shorter than its shape.
    pub fn product(&self, pool: Option<&Pool>, x: &[f32], t: usize, y: &mut [f32]) {
        // SAFETY: the path was chosen by the features that were detected.
        unsafe { self.product_by(Path::best(), pool, x, t, y) }
    }

    /// # Safety
    /// The processor has what the path needs.
    unsafe fn product_by(
        &self,
        path: Path,
        pool: Option<&Pool>,
        x: &[f32],
        t: usize,
        y: &mut [f32],
    ) {
        let (x, y) = (&x[..t * self.k], &mut y[..t * self.n]);
        match path {
            #[cfg(target_arch = "x86_64")]
            Path::Bf16 => {
                use super::bf16_x86::Bf16;
                use super::product_x86::{product, Right};
                let (x, y) = (Mat::new(x, t, self.k), MatMut::new(y, t, self.n));
                // SAFETY: the caller's promise; the shapes fit by the slices above and by the constructor.
                unsafe { product::<Bf16>(pool, x, Right::Packed(self.words()), 1.0, false, y) }
            }
            // SAFETY: the caller's promise.
            _ if t <= FEW_ROWS => unsafe { self.few_rows(path, pool, x, t, y) },
            _ => self.many_rows(pool, x, t, y),
        }
    }

    /// Panel after panel, each read from memory once and widened in registers.
    ///
    /// # Safety
    /// As [`Self::product_by`].
    unsafe fn few_rows(&self, path: Path, pool: Option<&Pool>, x: &[f32], t: usize, y: &mut [f32]) {
        let panels = self.n.div_ceil(NR);
        let words = self.k.div_ceil(2) * NR;
        let threads = match pool {
            Some(pool) if self.bytes() >= THREADS_FROM_BYTES => pool.threads(),
            _ => 1,
        };
        let parts = if threads > 1 {
            threads * PARTS_PER_THREAD
        } else {
            1
        };
        let piece = panels.div_ceil(parts).max(1);
        let y = SharedMut::new(y);
        let run = |part: usize| {
            for panel in part * piece..((part + 1) * piece).min(panels) {
                let weights = &self.words()[panel * words..(panel + 1) * words];
                let cols = NR.min(self.n - panel * NR);
                let mut row = 0;
                while row < t {
                    let rows = match (t - row).min(path.rows_at_once()) {
                        4.. => 4,
                        2.. => 2,
                        _ => 1,
                    };
                    let x = &x[row * self.k..(row + rows) * self.k];
                    let mut sums = [[0.0; NR]; ROWS_AT_ONCE];
                    match path {
                        // SAFETY: the caller's promise.
                        #[cfg(target_arch = "x86_64")]
                        Path::Avx512 => unsafe { sums_avx512(weights, x, rows, &mut sums) },
                        // SAFETY: the caller's promise.
                        #[cfg(target_arch = "x86_64")]
                        Path::Avx2 => unsafe { sums_avx2(weights, x, rows, &mut sums) },
                        _ => sums_of::<false>(weights, x, rows, &mut sums),
                    }
                    for (r, sums) in sums[..rows].iter().enumerate() {
                        // SAFETY: these columns belong to this part alone.
                        let y = unsafe { y.slice((row + r) * self.n + panel * NR, cols) };
                        y.copy_from_slice(&sums[..cols]);
                    }
                    row += rows;
                }
            }
        };
        match pool {
            Some(pool) if threads > 1 => pool.run(parts, run),
            _ => (0..parts).for_each(run),
        }
    }

    /// Some panels at a time are widened to `f32`, transposed to (k, columns) as `gemm` likes to read them, and multiplied.
    fn many_rows(&self, pool: Option<&Pool>, x: &[f32], t: usize, y: &mut [f32]) {
        let words = self.k.div_ceil(2) * NR;
        let width = NR * WIDE_PANELS.min(self.n.div_ceil(NR));
        // An odd k leaves a row of zeros at the end.
        let mut wide = vec![0.0; self.k.next_multiple_of(2) * width];
        for first in (0..self.n).step_by(width) {
            let cols = width.min(self.n - first);
            let panels = cols.div_ceil(NR);
            let shared = SharedMut::new(&mut wide);
            let widen_panel = |panel: usize| {
                let start = (first / NR + panel) * words;
                let pairs = self.words()[start..start + words].chunks_exact(NR);
                for (p, pair) in pairs.enumerate() {
                    let at = 2 * p * width + panel * NR;
                    // SAFETY: these columns belong to this panel alone, and the two rows do not overlap.
                    let (low, high) =
                        unsafe { (shared.slice(at, NR), shared.slice(at + width, NR)) };
                    for ((word, low), high) in pair.iter().zip(low).zip(high) {
                        (*low, *high) = widen(*word);
                    }
                }
            };
            match pool {
                Some(pool) => pool.run(panels, widen_panel),
                None => (0..panels).for_each(widen_panel),
            }
            let w = Mat::strided(&wide, self.k, cols, width);
            let y = MatMut::strided(&mut y[first..], t, cols, self.n);
            matmul(pool, Mat::new(x, t, self.k), w, 1.0, false, y);
        }
    }

    /// Index of the first word of row `i`; the next ones follow [`NR`] words apart.
    fn place(&self, i: usize) -> usize {
        i / NR * self.k.div_ceil(2) * NR + i % NR
    }

    fn words(&self) -> &[u32] {
        Line::words(&self.lines)
    }

    fn words_mut(&mut self) -> &mut [u32] {
        Line::words_mut(&mut self.lines)
    }
}

/// The two numbers of a pair.
#[inline(always)]
fn widen(word: u32) -> (f32, f32) {
    (
        f32::from_bits(word << 16),
        f32::from_bits(word & 0xffff_0000),
    )
}

/// Sums of one panel for `rows` rows of x (1, 2 or 4), into the first rows of `sums`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,fma")]
fn sums_avx512(panel: &[u32], x: &[f32], rows: usize, sums: &mut [[f32; NR]; ROWS_AT_ONCE]) {
    sums_of::<true>(panel, x, rows, sums)
}

/// As [`sums_avx512`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn sums_avx2(panel: &[u32], x: &[f32], rows: usize, sums: &mut [[f32; NR]; ROWS_AT_ONCE]) {
    sums_of::<true>(panel, x, rows, sums)
}

/// The obvious loop, compiled for whatever the caller enables. `FMA` says whether that has fused multiplication: without, `mul_add`
/// would call a function for each number.
#[inline(always)]
fn sums_of<const FMA: bool>(
    panel: &[u32],
    x: &[f32],
    rows: usize,
    sums: &mut [[f32; NR]; ROWS_AT_ONCE],
) {
    match rows {
        1 => sums_of_rows::<1, FMA>(panel, x, sums),
        2 => sums_of_rows::<2, FMA>(panel, x, sums),
        4 => sums_of_rows::<4, FMA>(panel, x, sums),
        _ => unreachable!("{rows} rows at a time"),
    }
}

#[inline(always)]
fn sums_of_rows<const R: usize, const FMA: bool>(
    panel: &[u32],
    x: &[f32],
    sums: &mut [[f32; NR]; ROWS_AT_ONCE],
) {
    let add = |sum: f32, a: f32, b: f32| if FMA { a.mul_add(b, sum) } else { a * b + sum };
    let k = x.len() / R;
    let rows: [&[f32]; R] = std::array::from_fn(|r| &x[r * k..(r + 1) * k]);
    let mut mine = [[0.0f32; NR]; R];
    let (pairs, rest) = panel.split_at(k / 2 * NR);
    for (p, pair) in pairs.chunks_exact(NR).enumerate() {
        #[cfg(target_arch = "x86_64")]
        for half in [0, 16] {
            use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
            let ahead = pair.as_ptr().wrapping_add(PREFETCH_WORDS + half);
            // SAFETY: a prefetch may point anywhere.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(ahead.cast()) }
        }
        for (row, mine) in rows.iter().zip(&mut mine) {
            let (x0, x1) = (row[2 * p], row[2 * p + 1]);
            for (word, sum) in pair.iter().zip(mine) {
                let (low, high) = widen(*word);
                *sum = add(add(*sum, x0, low), x1, high);
            }
        }
    }
    // An odd k ends with half a pair.
    for (row, mine) in rows.iter().zip(&mut mine) {
        for (word, sum) in rest.iter().zip(mine) {
            *sum = add(*sum, row[k - 1], widen(*word).0);
        }
    }
    sums[..R].copy_from_slice(&mine);
}

#[cfg(test)]
mod tests {
    use super::super::bf16::round_bf16;
    use super::super::bf16::tests::numbers;
    use super::*;

    fn paths() -> Vec<Path> {
        let features = simd::features();
        let mut paths = vec![Path::Plain];
        let more = [
            (features.avx2_fma, Path::Avx2),
            (features.avx512, Path::Avx512),
            (features.avx512_bf16, Path::Bf16),
        ];
        paths.extend(more.iter().filter(|m| m.0).map(|m| m.1));
        paths
    }

    #[test]
    fn every_path_agrees_with_the_obvious_loop_on_the_rounded_weight() {
        let pool = Pool::new(3, 0);
        for (n, k) in [
            (1, 1),
            (31, 2),
            (33, 63),
            (65, 100),
            (130, 17),
            (700, 33),
            (64, 1301),
        ] {
            let w = numbers(n * k, 1);
            let packed = PackedBf16::new(&w, n, k);
            for t in [0, 1, 2, 3, 7, 8, 15, 31, 65] {
                let x = numbers(t * k, 2);
                for path in paths() {
                    let mut y = vec![7.0; t * n];
                    // SAFETY: only paths that the processor has.
                    unsafe { packed.product_by(path, Some(&pool), &x, t, &mut y) };
                    for (i, got) in y.iter().enumerate() {
                        let (x, w) = (&x[i / n * k..][..k], &w[i % n * k..][..k]);
                        let (mut sum, mut size) = (0.0, 0.0);
                        for (x, w) in x.iter().zip(w) {
                            let x = if path == Path::Bf16 {
                                round_bf16(*x)
                            } else {
                                *x
                            };
                            let term = x as f64 * round_bf16(*w) as f64;
                            sum += term;
                            size += term.abs();
                        }
                        assert!(
                            (*got as f64 - sum).abs() <= 1e-5 * size + 1e-30,
                            "{path:?} t {t} n {n} k {k} at {i}: {got} instead of {sum}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn rows_come_back_rounded_and_nothing_else() {
        for (n, k) in [(1, 1), (33, 7), (64, 10)] {
            let w = numbers(n * k, 3);
            let packed = PackedBf16::new(&w, n, k);
            let want: Vec<f32> = w.iter().map(|x| round_bf16(*x)).collect();
            assert_eq!(packed.unpack(), want);
            let mut row = vec![0.0; k];
            packed.row(n - 1, &mut row);
            assert_eq!(row, want[(n - 1) * k..]);
            assert_eq!(packed.shape(), (n, k));
            assert_eq!(packed.bytes(), n.div_ceil(32) * 32 * k.div_ceil(2) * 4);
        }
    }
}
