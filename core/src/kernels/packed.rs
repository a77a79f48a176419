//! A weight kept in bf16 in the order in which products read it: half the memory of `f32`, and so twice the speed of decoding.

use super::bf16::{bf16_bits, Line};
#[cfg(target_arch = "x86_64")]
use super::bf16_x86::PREFETCH_WORDS;
use super::lanes::{on_lanes, widest_lanes, Lanes, OnLanes, LANES};
#[cfg(target_arch = "x86_64")]
use super::matmul::{Mat, MatMut};
use super::panels::share_out;
use super::pool::{Pool, SharedMut};
use super::simd;

/// Rows of the weight, that is columns of the product, in a panel.
const NR: usize = 32;
/// Most rows of x that share one widening of a panel.
const MAX_ROWS: usize = 12;
/// Below this a second thread costs more than it brings: bytes of weights to read, and four multiplications count as one.
const MIN_SHARED_WORK: usize = 1 << 17;

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
    /// The weight widened to `f32` in registers, sixteen numbers at a time.
    Widened,
}

impl Path {
    fn best() -> Self {
        match simd::features().avx512_bf16_full_rate {
            true => Path::Bf16,
            false => Path::Widened,
        }
    }
}

impl PackedBf16 {
    /// The path that products take on this processor, as reports call it.
    pub fn path() -> String {
        match Path::best() {
            Path::Bf16 => "VDPBF16PS".into(),
            Path::Widened => format!("widened, {}", widest_lanes()),
        }
    }

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
        Self::products(&[self], pool, x, t, &mut [y])
    }

    /// [`Self::product`] of the same rows by several weights of the same k, their columns shared out together.
    ///
    /// # Panics
    /// If the weights differ in k, there are not as many outputs, or one is too short.
    pub fn products(
        weights: &[&Self],
        pool: Option<&Pool>,
        x: &[f32],
        t: usize,
        ys: &mut [&mut [f32]],
    ) {
        // SAFETY: the path was chosen by the features that were detected.
        unsafe { Self::products_by(Path::best(), weights, pool, x, t, ys) }
    }

    /// # Safety
    /// The processor has what the path needs.
    unsafe fn products_by(
        path: Path,
        weights: &[&Self],
        pool: Option<&Pool>,
        x: &[f32],
        t: usize,
        ys: &mut [&mut [f32]],
    ) {
        assert_eq!(weights.len(), ys.len(), "weights and outputs");
        match path {
            #[cfg(target_arch = "x86_64")]
            Path::Bf16 => {
                for (w, y) in weights.iter().zip(ys) {
                    use super::bf16_x86::Bf16;
                    use super::product_x86::{product, Right};
                    let (x, y) = (Mat::new(x, t, w.k), MatMut::new(y, t, w.n));
                    // SAFETY: the caller's promise; the shapes fit by the constructors.
                    unsafe { product::<Bf16>(pool, x, Right::Packed(w.words()), 1.0, false, y) }
                }
            }
            _ => Self::widened(weights, pool, x, t, ys),
        }
    }

    /// Panel after panel, each read from memory once and widened in registers.
    fn widened(weights: &[&Self], pool: Option<&Pool>, x: &[f32], t: usize, ys: &mut [&mut [f32]]) {
        for (w, y) in weights.iter().zip(ys.iter()) {
            assert!(
                x.len() >= t * w.k && y.len() >= t * w.n && w.k == weights[0].k,
                "x of {} and y of {} for ({t}, {}) x ({}, {})ᵀ",
                x.len(),
                y.len(),
                w.k,
                w.n,
                w.k
            );
        }
        let work: usize = weights.iter().map(|w| w.bytes() + t * w.n * w.k / 4).sum();
        let pool = pool.filter(|_| work >= MIN_SHARED_WORK);
        let outs: Vec<SharedMut<f32>> = ys.iter_mut().map(|y| SharedMut::new(y)).collect();
        let counts = weights.iter().map(|w| w.n.div_ceil(NR));
        share_out(pool, counts, 1, |part| {
            let (w, out) = (weights[part.weight], &outs[part.weight]);
            let words = w.k.div_ceil(2) * NR;
            let mut sums = [[0.0; NR]; MAX_ROWS];
            for panel in part.panels {
                let weight = &w.words()[panel * words..(panel + 1) * words];
                let cols = NR.min(w.n - panel * NR);
                let mut row = 0;
                while row < t {
                    let x = &x[row * w.k..t * w.k];
                    let rows = on_lanes(PanelProduct {
                        weight,
                        x,
                        k: w.k,
                        sums: &mut sums,
                    });
                    for (r, sums) in sums[..rows].iter().enumerate() {
                        // SAFETY: these columns belong to this part alone.
                        let y = unsafe { out.slice((row + r) * w.n + panel * NR, cols) };
                        y.copy_from_slice(&sums[..cols]);
                    }
                    row += rows;
                }
            }
        });
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

/// One panel times as many rows of x as registers allow, into the first rows of `sums`; says how many.
struct PanelProduct<'a> {
    weight: &'a [u32],
    /// (rows, k), at least one row
    x: &'a [f32],
    k: usize,
    sums: &'a mut [[f32; NR]; MAX_ROWS],
}

impl OnLanes for PanelProduct<'_> {
    type Out = usize;

    #[inline(always)]
    fn run<L: Lanes>(mut self) -> usize {
        let left = match self.k {
            0 => MAX_ROWS,
            k => self.x.len() / k,
        };
        // SAFETY: so many rows are left.
        unsafe {
            if L::SUMS >= 24 {
                match left {
                    12.. => self.tile::<L, 12, 2>(),
                    6.. => self.tile::<L, 6, 2>(),
                    4.. => self.tile::<L, 4, 2>(),
                    2.. => self.tile::<L, 2, 2>(),
                    _ => self.tile::<L, 1, 2>(),
                }
            } else {
                match left {
                    4.. if L::SUMS >= 4 => self.tile::<L, 4, 1>(),
                    2.. => self.tile::<L, 2, 1>(),
                    _ => self.tile::<L, 1, 1>(),
                }
            }
        }
    }
}

impl PanelProduct<'_> {
    /// `R` rows, `H` halves of the panel at a time; every row's sum is taken in the same order whatever `R` is.
    ///
    /// # Safety
    /// `x` has `R` rows.
    #[inline(always)]
    unsafe fn tile<L: Lanes, const R: usize, const H: usize>(&mut self) -> usize {
        let (k, x, words) = (self.k, self.x.as_ptr(), self.weight.as_ptr());
        debug_assert!(self.x.len() >= R * k && self.weight.len() == k.div_ceil(2) * NR);
        for first in (0..NR / LANES).step_by(H) {
            let mut sums = [[L::splat(0.0); H]; R];
            for p in 0..k / 2 {
                for h in 0..H {
                    // SAFETY: pair p of this panel has 32 words; row r of x has k > 2 p + 1 numbers.
                    unsafe {
                        let at = words.add(p * NR + (first + h) * LANES);
                        #[cfg(target_arch = "x86_64")]
                        {
                            use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
                            _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(PREFETCH_WORDS).cast());
                        }
                        let (low, high) = L::widen(at);
                        for (r, sums) in sums.iter_mut().enumerate() {
                            let x = x.add(r * k + 2 * p);
                            sums[h] = L::splat(*x).mul_add(low, sums[h]);
                            sums[h] = L::splat(*x.add(1)).mul_add(high, sums[h]);
                        }
                    }
                }
            }
            // An odd k ends with half a pair.
            if k % 2 == 1 {
                for h in 0..H {
                    // SAFETY: as above, for the last pair and number k - 1.
                    unsafe {
                        let at = words.add(k / 2 * NR + (first + h) * LANES);
                        let (low, _) = L::widen(at);
                        for (r, sums) in sums.iter_mut().enumerate() {
                            sums[h] = L::splat(*x.add(r * k + k - 1)).mul_add(low, sums[h]);
                        }
                    }
                }
            }
            for (sums, out) in sums.iter().zip(self.sums.iter_mut()) {
                for (h, sum) in sums.iter().enumerate() {
                    // SAFETY: a row of sums has NR numbers.
                    unsafe { sum.store(out.as_mut_ptr().add((first + h) * LANES)) };
                }
            }
        }
        R
    }
}

#[cfg(test)]
mod tests {
    use super::super::bf16::round_bf16;
    use super::super::bf16::tests::numbers;
    use super::super::lanes::on_each_kind_of_lanes;
    use super::*;

    fn paths() -> Vec<Path> {
        let mut paths = vec![Path::Widened];
        paths.extend(simd::features().avx512_bf16.then_some(Path::Bf16));
        paths
    }

    /// Every path on every kind of lanes, with and without a pool, against the obvious loop in `f64`.
    fn check(pool: &Pool, t: usize, n: usize, k: usize) {
        let w = numbers(n * k, 1);
        let packed = PackedBf16::new(&w, n, k);
        let x = numbers(t * k, 2);
        let mut all = Vec::new();
        for path in paths() {
            // What is forced on this thread holds for it alone, so there the pool is left out.
            for pool in [Some(pool), None] {
                on_each_kind_of_lanes(|| {
                    let mut y = vec![7.0; t * n];
                    // SAFETY: only paths that the processor has.
                    unsafe {
                        let ys = &mut [&mut y[..]];
                        PackedBf16::products_by(path, &[&packed], pool, &x, t, ys)
                    };
                    all.push((path, y));
                });
            }
        }
        for (path, y) in all {
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
            for t in [0, 1, 2, 3, 7, 8, 15, 31, 65] {
                check(&pool, t, n, k);
            }
        }
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(60))]
        #[test]
        fn every_path_agrees_with_the_obvious_loop_for_any_shape(t in 1usize..40, n in 1usize..140, k in 1usize..200) {
            check(&Pool::new(2, 0), t, n, k);
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
