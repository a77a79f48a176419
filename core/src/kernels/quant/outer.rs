//! Sums of outer products in 8 bits, and weights that are packed again and again because they go on changing.

use std::ops::Range;

use super::{features, Block, CodeLine, PackedQ8, QuantPath, ScaleLine, Tile};
use super::{BLOCK, MAGIC, MAX_PANELS, MAX_ROWS, PANEL};
use crate::kernels::lanes::{on_lanes, Lanes, OnLanes, LANES};
use crate::kernels::pool::{Pool, SharedMut};
use half::f16;

/// Scales of the right side are stored multiplied by this, so that channels far smaller than the largest keep theirs in `f16`.
const LIFT: f32 = 16_384.0;

/// Rows v (n, d) and z (n, f), n up to a limit, as two packed operands: what `w += scale · vᵀ z` needs of them, at a quarter of
/// the memory and at the speed of bytes.
///
/// Both sides are quantised in blocks of [`BLOCK`] rows, each channel with a scale of its own. Blocks are filled one by one as rows
/// come; those not yet filled count as zeros. On normally distributed rows the relative RMS error of the sum is below 1 %. A row that
/// holds a NaN or an infinity makes its channels NaN.
#[derive(Clone)]
pub struct OuterQ8 {
    d: usize,
    /// vᵀ: (d, blocks)
    left: Vec<Block>,
    /// zᵀ (f, rows), as the right side of a product.
    right: PackedQ8,
}

impl OuterQ8 {
    /// Room for `rows` rows of d and f numbers.
    pub fn new((d, f): (usize, usize), rows: usize) -> Self {
        let right = PackedQ8::blank(f, rows, 1.0 / LIFT);
        Self {
            d,
            left: vec![Block::ZERO; d * right.blocks],
            right,
        }
    }

    /// Blocks of rows it has room for.
    pub fn blocks(&self) -> usize {
        self.right.blocks
    }

    /// Bytes of memory.
    pub fn bytes(&self) -> usize {
        self.right.bytes() + std::mem::size_of_val(&self.left[..])
    }

    /// Quantises rows into the blocks from `first` on, the last of which may stay partly empty: v (n, d), z (n, f).
    ///
    /// # Panics
    /// If there are not as many blocks, or the lengths do not fit.
    pub fn fill(&mut self, pool: Option<&Pool>, first: usize, v: &[f32], z: &[f32]) {
        let (d, f) = (self.d, self.right.n);
        let n = v.len() / d;
        assert_eq!((v.len(), z.len()), (n * d, n * f), "(n, d) and (n, f)");
        let count = n.div_ceil(BLOCK);
        assert!(first + count <= self.blocks(), "rows without room");
        let blocks = self.blocks();
        let stride = self.right.scales_a_panel();
        let left = SharedMut::new(&mut self.left);
        let codes = SharedMut::new(&mut self.right.codes);
        let scales = SharedMut::new(halves(&mut self.right.scales));
        let fill = |i: usize| {
            let rows = i * BLOCK..n.min((i + 1) * BLOCK);
            let (v, z) = (
                &v[rows.start * d..rows.end * d],
                &z[rows.start * f..rows.end * f],
            );
            let b = first + i;
            let (unit, inverse) = unit(z);
            for panel in 0..f.div_ceil(PANEL) {
                let four = channels(z, f, panel, inverse);
                // SAFETY: the lines and scales of a block belong to one part.
                let (lines, scales) = unsafe {
                    let at = (panel * blocks + b) * PackedQ8::LINES;
                    (
                        codes.slice(at, PackedQ8::LINES),
                        scales.slice(panel * stride + b * PANEL, PANEL),
                    )
                };
                for (line, words) in lines.iter_mut().zip(&four.codes) {
                    for (to, word) in line.0.as_chunks_mut::<4>().0.iter_mut().zip(words) {
                        // The right side's codes are unsigned.
                        *to = (word ^ 0x8080_8080).to_le_bytes();
                    }
                }
                for (to, largest) in scales.iter_mut().zip(four.largest) {
                    *to = f16::from_f32(scale(largest) * LIFT);
                }
            }
            for panel in 0..d.div_ceil(PANEL) {
                let four = channels(v, d, panel, 1.0);
                for c in 0..PANEL.min(d - panel * PANEL) {
                    let codes: [[i8; 4]; BLOCK / 4] =
                        std::array::from_fn(|g| four.codes[g][c].to_le_bytes().map(|b| b as i8));
                    let sum: i32 = codes.as_flattened().iter().map(|c| i32::from(*c)).sum();
                    // SAFETY: as above.
                    let to = unsafe { left.slice((panel * PANEL + c) * blocks + b, 1) };
                    to[0] = Block {
                        codes,
                        scale: scale(four.largest[c]) * unit,
                        sum: sum as f32,
                        start: MAGIC.to_bits() as i32 - 128 * sum,
                    };
                }
            }
        };
        match pool {
            Some(pool) if count > 1 => pool.run(count, fill),
            _ => (0..count).for_each(fill),
        }
    }

    /// `w += scale · vᵀ z` for the rows `rows` of w, which alone are given: w (rows, f). On the calling thread. A row's numbers do not
    /// depend on which rows it is computed with.
    ///
    /// # Panics
    /// If there are no such rows, or w has another length.
    pub fn add_to(&self, rows: Range<usize>, scale: f32, w: &mut [f32]) {
        Self::add_all_to([self], rows, scale, w);
    }

    /// [`Self::add_to`] of each in turn, to the same bits, in one pass over w. All are of one shape but for their rows.
    ///
    /// # Panics
    /// As [`Self::add_to`], and for other shapes.
    pub fn add_all_to<const N: usize>(
        all: [&Self; N],
        rows: Range<usize>,
        scale: f32,
        w: &mut [f32],
    ) {
        Self::add_on(QuantPath::best(), all, rows, scale, w)
    }

    pub(super) fn add_on<const N: usize>(
        path: QuantPath,
        all: [&Self; N],
        rows: Range<usize>,
        scale: f32,
        w: &mut [f32],
    ) {
        let Some(shape) = all.first() else { return };
        let (d, f) = (shape.d, shape.right.n);
        let alike = |one: &&Self| (one.d, one.right.n) == (d, f);
        assert!(all.iter().all(alike), "terms of one shape");
        assert!(rows.end <= d, "rows {rows:?} of {d}");
        assert_eq!(w.len(), rows.len() * f, "(rows, f)");
        if rows.is_empty() {
            return;
        }
        assert!(
            QuantPath::available().any(|there| there == path),
            "this processor has no {path:?}"
        );
        let t = rows.len();
        let (kernel, max_rows, max_panels) = path.kernel::<8>(t);
        let tiles = t.div_ceil(max_rows);
        let mut tile: Tile = [[0.0; MAX_PANELS * PANEL]; MAX_ROWS];
        let panels = shape.right.panels();
        for panel in (0..panels).step_by(max_panels) {
            let count = max_panels.min(panels - panel);
            let col = panel * PANEL;
            let cols = (count * PANEL).min(f - col);
            for i in 0..tiles {
                let (row, end) = (t * i / tiles, t * (i + 1) / tiles);
                for one in all.iter().filter(|one| one.blocks() > 0) {
                    // SAFETY: the processor has the path, asserted above; `end - row <= max_rows` by the choice of `tiles`; `left`
                    // holds `d` rows of `blocks` blocks; the panels exist.
                    unsafe {
                        kernel(
                            &one.right,
                            panel,
                            count,
                            &one.left,
                            rows.start + row,
                            end - row,
                            &mut tile,
                        )
                    };
                    on_lanes(AddTile {
                        tile: &tile[..end - row],
                        cols,
                        scale: scale * one.right.unit,
                        to: &mut w[row * f + col..],
                        stride: f,
                    });
                }
            }
        }
    }
}

/// Adds the first columns of a tile, scaled, to rows that are `stride` apart.
struct AddTile<'a> {
    tile: &'a [[f32; MAX_PANELS * PANEL]],
    cols: usize,
    scale: f32,
    to: &'a mut [f32],
    stride: usize,
}

impl OnLanes for AddTile<'_> {
    type Out = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let scale = L::splat(self.scale);
        for (r, from) in self.tile.iter().enumerate() {
            let to = &mut self.to[r * self.stride..][..self.cols];
            for (from, to) in from.chunks_exact(LANES).zip(to.chunks_mut(LANES)) {
                if to.len() == LANES {
                    // SAFETY: sixteen numbers stand in both.
                    unsafe {
                        let sum = scale.mul_add(L::load(from.as_ptr()), L::load(to.as_ptr()));
                        sum.store(to.as_mut_ptr());
                    }
                } else {
                    for (to, from) in to.iter_mut().zip(from) {
                        *to += self.scale * from;
                    }
                }
            }
        }
    }
}

/// Sixteen channels of a block of rows: signed codes, four rows a word, and the largest size in each channel.
#[derive(Debug, PartialEq)]
pub(super) struct Channels {
    pub codes: [[u32; PANEL]; BLOCK / 4],
    pub largest: [f32; PANEL],
}

/// Scale of a channel whose largest size is this: not finite for one that is not, 0 for one that counts as zero.
fn scale(largest: f32) -> f32 {
    match largest {
        x if !x.is_finite() => f32::NAN,
        x if x < SMALLEST => 0.0,
        x => x / 127.0,
    }
}

/// As for rows of `x`: 127 over the largest must be finite.
pub(super) const SMALLEST: f32 = 1e-30;

/// A power of two near the largest finite size of these numbers, and one over it: exact, whatever is multiplied by it.
fn unit(z: &[f32]) -> (f32, f32) {
    let largest = f32::from_bits(largest_finite(z));
    if largest < SMALLEST {
        return (1.0, 1.0);
    }
    let exponent = ((largest.to_bits() >> 23) as i32 - 127).clamp(-100, 100);
    (f32::powi(2.0, exponent), f32::powi(2.0, -exponent))
}

/// [`largest_bits`], compiled with wider registers where there are some.
fn largest_finite(z: &[f32]) -> u32 {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2")]
        fn wide(z: &[f32]) -> u32 {
            largest_bits(z)
        }
        if features().avx2_fma {
            // SAFETY: the feature was detected.
            return unsafe { wide(z) };
        }
    }
    largest_bits(z)
}

/// Bits of the largest finite size. Without their signs floats are ordered as their bits are.
#[inline(always)]
fn largest_bits(z: &[f32]) -> u32 {
    let size = |z: &f32| match z.to_bits() & !(1 << 31) {
        bits if bits < f32::INFINITY.to_bits() => bits,
        _ => 0,
    };
    let (sixteens, rest) = z.as_chunks::<LANES>();
    let mut top = [0; LANES];
    for z in sixteens {
        for (top, z) in top.iter_mut().zip(z) {
            *top = size(z).max(*top);
        }
    }
    rest.iter().map(size).chain(top).max().unwrap_or(0)
}

/// Quantises channels `16 panel..` of rows x (n <= 32, width), multiplied by `factor`. No operation in it rounds differently in wider
/// registers.
fn channels(x: &[f32], width: usize, panel: usize, factor: f32) -> Channels {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2")]
        fn wide(x: &[f32], width: usize, panel: usize, factor: f32) -> Channels {
            quantise_channels(x, width, panel, factor)
        }
        if features().avx512 {
            // SAFETY: the feature was detected.
            return unsafe { super::avx512::channels(x, width, panel, factor) };
        }
        if features().avx2_fma {
            // SAFETY: the feature was detected.
            return unsafe { wide(x, width, panel, factor) };
        }
    }
    quantise_channels(x, width, panel, factor)
}

#[inline(always)]
fn quantise_channels(x: &[f32], width: usize, panel: usize, factor: f32) -> Channels {
    let from = panel * PANEL;
    let there = PANEL.min(width - from);
    let mut rows = [[0f32; PANEL]; BLOCK];
    for (to, row) in rows.iter_mut().zip(x.chunks_exact(width)) {
        match row[from..].first_chunk::<PANEL>() {
            Some(row) => *to = *row,
            None => to[..there].copy_from_slice(&row[from..]),
        }
        for to in to {
            *to *= factor;
        }
    }
    // Infinities and NaN come out at the top.
    let mut top = [0u32; PANEL];
    for row in &rows {
        for (top, x) in top.iter_mut().zip(row) {
            *top = (*top).max(x.to_bits() & !(1 << 31));
        }
    }
    let largest = top.map(f32::from_bits);
    let inverse = largest.map(|l| match l.is_finite() && l >= SMALLEST {
        true => 127.0 / l,
        false => 0.0,
    });
    let mut codes = [[0u32; PANEL]; BLOCK / 4];
    for (words, rows) in codes.iter_mut().zip(rows.as_chunks::<4>().0) {
        for (i, row) in rows.iter().enumerate() {
            for ((word, x), inverse) in words.iter_mut().zip(row).zip(&inverse) {
                // Adding MAGIC rounds to nearest and leaves the integer in the low bits.
                *word |= ((x * inverse + MAGIC).to_bits() & 255) << (8 * i);
            }
        }
    }
    Channels { codes, largest }
}

fn halves(scales: &mut [ScaleLine]) -> &mut [f16] {
    // SAFETY: a line is 32 `f16` and nothing else.
    unsafe { std::slice::from_raw_parts_mut(scales.as_mut_ptr().cast(), 32 * scales.len()) }
}

impl PackedQ8 {
    /// A weight (n, k) of zeros with room for numbers of up to some 2^22 of these units, exact to 2^-8 of one; a power of two.
    pub fn blank(n: usize, k: usize, unit: f32) -> Self {
        let mut packed = Self {
            n,
            k,
            blocks: k.div_ceil(BLOCK),
            unit,
            codes: Vec::new(),
            scales: Vec::new(),
        };
        packed.make_room();
        packed
    }

    /// Packs `w` (n, k) again after a change, panel by panel: `change` is given the rows of a panel and where they stand, and may write to
    /// them; they are then packed while they are in the cache. Returns the sum of what it returned, added up in the panels' order.
    ///
    /// The range of the scales stays that of the first numbers: those of 2^8 of its size and more come out as NaN.
    ///
    /// # Panics
    /// If `w` has not `n · k` elements.
    pub fn refill(
        &mut self,
        pool: Option<&Pool>,
        w: &mut [f32],
        change: impl Fn(Range<usize>, &mut [f32]) -> f64 + Sync,
    ) -> f64 {
        let (n, k, blocks, panels) = (self.n, self.k, self.blocks, self.panels());
        assert_eq!(w.len(), n * k, "weight of ({n}, {k})");
        let inverse = 1.0 / self.unit;
        let stride = self.scales_a_panel();
        let mut sums = vec![0f64; panels];
        let w = SharedMut::new(w);
        let results = SharedMut::new(&mut sums);
        let codes = SharedMut::new(&mut self.codes);
        let scales = SharedMut::new(halves(&mut self.scales));
        let run = |panel: usize| {
            let rows = panel * PANEL..n.min((panel + 1) * PANEL);
            // SAFETY: a panel's rows, codes and scales belong to one part.
            let (w, result, codes, scales) = unsafe {
                (
                    w.slice(rows.start * k, rows.len() * k),
                    results.slice(panel, 1),
                    codes.slice(panel * blocks * Self::LINES, blocks * Self::LINES),
                    scales.slice(panel * stride, stride),
                )
            };
            result[0] = change(rows, w);
            pack_panel(w, k, inverse, codes, scales);
        };
        match pool {
            Some(pool) if panels > 1 => pool.run(panels, run),
            _ => (0..panels).for_each(run),
        }
        sums.iter().sum()
    }
}

/// Packs the rows of a panel, w (at most 16, k) times `factor`.
fn pack_panel(w: &[f32], k: usize, factor: f32, codes: &mut [CodeLine], scales: &mut [f16]) {
    #[cfg(target_arch = "x86_64")]
    if features().avx512 && w.len() == PANEL * k && k.is_multiple_of(BLOCK) {
        // SAFETY: the feature was detected.
        return unsafe { super::avx512::pack_panel(w, k, factor, codes, scales) };
    }
    pack_rows(w, k, factor, codes, scales);
}

/// [`pack_panel`], block by block.
fn pack_rows(w: &[f32], k: usize, factor: f32, codes: &mut [CodeLine], scales: &mut [f16]) {
    let mut block = [0f32; BLOCK];
    for (c, row) in w.chunks_exact(k.max(1)).enumerate() {
        for (b, w) in row.chunks(BLOCK).enumerate() {
            for (to, from) in block.iter_mut().zip(w) {
                *to = from * factor;
            }
            block[w.len()..].fill(w[0] * factor);
            let (four, scale) = super::pack::quantise_whole(&block);
            let lines = &mut codes[b * PackedQ8::LINES..(b + 1) * PackedQ8::LINES];
            for (line, four) in lines.iter_mut().zip(four.as_chunks::<4>().0) {
                line.0[4 * c..4 * c + 4].copy_from_slice(four);
            }
            scales[b * PANEL + c] = scale;
        }
    }
}

/// Rows of a panel: what [`PackedQ8::refill`] hands out at a time.
pub const PANEL_ROWS: usize = PANEL;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Random;

    fn normal(len: usize, seed: u64, size: f32) -> Vec<f32> {
        let mut random = Random::new(seed);
        (0..len).map(|_| random.normal() as f32 * size).collect()
    }

    /// vᵀ z in `f64`.
    fn exact(v: &[f32], z: &[f32], d: usize, f: usize) -> Vec<f64> {
        let mut out = vec![0.0; d * f];
        for (v, z) in v.chunks_exact(d).zip(z.chunks_exact(f)) {
            for (out, v) in out.chunks_exact_mut(f).zip(v) {
                for (out, z) in out.iter_mut().zip(z) {
                    *out += f64::from(*v) * f64::from(*z);
                }
            }
        }
        out
    }

    fn relative(got: &[f32], want: &[f64]) -> f64 {
        let error: f64 = got
            .iter()
            .zip(want)
            .map(|(g, w)| (f64::from(*g) - w).powi(2))
            .sum();
        (error / want.iter().map(|w| w * w).sum::<f64>().max(1e-300)).sqrt()
    }

    #[test]
    fn outer_products_in_8_bits_are_within_one_percent_of_those_in_f64_on_every_path() {
        let pool = Pool::new(3, 0);
        for (n, d, f, v_size, z_size) in [
            (32, 16, 16, 1.0, 1.0),
            (224, 48, 80, 1e-3, 50.0),
            (7, 5, 33, 1.0, 1e-6),
            (100, 70, 19, 1e4, 1e4),
        ] {
            let (v, z) = (normal(n * d, 1, v_size), normal(n * f, 2, z_size));
            let want: Vec<f64> = exact(&v, &z, d, f).iter().map(|w| 0.5 * w).collect();
            let mut outer = OuterQ8::new((d, f), n);
            outer.fill(Some(&pool), 0, &v, &z);
            for path in QuantPath::available() {
                let mut got = vec![0.0; d * f];
                OuterQ8::add_on(path, [&outer], 0..d, 0.5, &mut got);
                let error = relative(&got, &want);
                assert!(error < 0.01, "{path:?} {n} {d} {f}: {error}");
                // What is there already stays there.
                let mut twice = got.clone();
                OuterQ8::add_on(path, [&outer], 0..d, 0.5, &mut twice);
                for (twice, once) in twice.iter().zip(&got) {
                    assert!((twice - 2.0 * once).abs() <= 1e-6 * once.abs());
                }
            }
        }
    }

    #[test]
    fn rows_that_come_block_by_block_and_weights_changed_panel_by_panel_give_the_same_bits() {
        let (n, d, f) = (96, 40, 50);
        let (v, z) = (normal(n * d, 1, 0.1), normal(n * f, 2, 1.0));
        let mut whole = OuterQ8::new((d, f), n);
        whole.fill(None, 0, &v, &z);
        let mut parts = OuterQ8::new((d, f), n);
        for b in [2, 0, 1] {
            let rows = b * BLOCK..(b + 1) * BLOCK;
            parts.fill(
                None,
                b,
                &v[rows.start * d..rows.end * d],
                &z[rows.start * f..rows.end * f],
            );
        }
        let w = normal(d * f, 3, 0.2);
        let (mut a, mut b) = (w.clone(), w.clone());
        whole.add_to(0..d, 0.3, &mut a);
        for row in 0..d {
            parts.add_to(row..row + 1, 0.3, &mut b[row * f..(row + 1) * f]);
        }
        assert_eq!(a, b);
        // Several in one pass are each in its turn.
        let mut once = w.clone();
        OuterQ8::add_all_to([&whole, &parts], 0..d, 0.3, &mut once);
        whole.add_to(0..d, 0.3, &mut b);
        assert_eq!(once, b);
        let mut packed = PackedQ8::blank(d, f, PackedQ8::unit_of(&w));
        let mut c = w.clone();
        let sum = packed.refill(Some(&Pool::new(2, 0)), &mut c, |rows, w| {
            whole.add_to(rows.clone(), 0.3, w);
            rows.len() as f64
        });
        assert_eq!((c, sum), (a.clone(), d as f64));
        // Packing at once counts scales in a unit of its own, a power of two.
        let at_once = PackedQ8::new(&a, d, f);
        assert_eq!(packed.unpack(), at_once.unpack());
        // And again, over what is there.
        packed.refill(None, &mut a, |_, w| {
            w.iter_mut().for_each(|w| *w *= -0.5);
            0.0
        });
        assert_eq!(packed.unpack(), PackedQ8::new(&a, d, f).unpack());
    }

    #[test]
    fn a_panel_packed_in_wide_registers_has_the_bits_of_one_packed_block_by_block() {
        let k = 5 * BLOCK;
        for (seed, size, bad) in [
            (1, 1.0, 1.0),
            (2, 1e-9, 0.0),
            (3, 3e4, f32::NAN),
            (4, 1e3, f32::NEG_INFINITY),
        ] {
            let mut w = normal(PANEL * k, seed, size);
            w[3 * k..3 * k + BLOCK].fill(0.0);
            w[5 * k + 40] = bad;
            w[7 * k + 1] = 1e7;
            let pack = |by: fn(&[f32], usize, f32, &mut [CodeLine], &mut [f16])| {
                let mut codes = vec![CodeLine([7; 64]); k / 4];
                let mut scales = vec![f16::ONE; PANEL * k / BLOCK];
                by(&w, k, 0.5, &mut codes, &mut scales);
                let codes: Vec<[u8; 64]> = codes.iter().map(|line| line.0).collect();
                (codes, scales)
            };
            let ((wide, wide_scales), (rows, scales)) = (pack(pack_panel), pack(pack_rows));
            for (i, (a, b)) in wide_scales.iter().zip(&scales).enumerate() {
                let none = a.is_nan() && b.is_nan();
                assert!(none || a.to_bits() == b.to_bits(), "scale {i}: {a} {b}");
                // Codes whose scale is no number mean nothing.
                if none {
                    continue;
                }
                let (block, c) = (i / PANEL, i % PANEL);
                for line in block * 8..block * 8 + 8 {
                    assert_eq!(wide[line][4 * c..4 * c + 4], rows[line][4 * c..4 * c + 4]);
                }
            }
        }
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn channels_quantised_in_wide_registers_have_the_bits_of_those_quantised_one_by_one() {
        if !features().avx512 {
            return;
        }
        for (n, width, size, bad) in [
            (32, 48, 1.0, 1.0),
            (32, 37, 1e-35, 0.0),
            (7, 16, 3e4, f32::NAN),
            (31, 5, 1e-9, f32::NEG_INFINITY),
        ] {
            let mut x = normal(n * width, 5, size);
            x[width + 3] = bad;
            for row in x.chunks_mut(width) {
                row[1] = 0.0;
            }
            for panel in 0..width.div_ceil(PANEL) {
                let plain = quantise_channels(&x, width, panel, 0.25);
                // SAFETY: the feature was detected.
                let wide = unsafe { super::super::avx512::channels(&x, width, panel, 0.25) };
                assert_eq!(plain.codes, wide.codes, "{n} {width} {panel}");
                let bits = |c: &Channels| c.largest.map(f32::to_bits);
                assert_eq!(bits(&plain), bits(&wide), "{n} {width} {panel}");
            }
        }
    }

    #[test]
    fn a_number_that_is_none_makes_its_channels_none_and_no_others() {
        let (n, d, f) = (40, 20, 36);
        for bad in [f32::NAN, f32::INFINITY] {
            let (mut v, mut z) = (normal(n * d, 1, 1.0), normal(n * f, 2, 1.0));
            v[35 * d + 3] = bad;
            z[2 * f + 30] = bad;
            let mut outer = OuterQ8::new((d, f), n);
            outer.fill(None, 0, &v, &z);
            let mut got = vec![0.0; d * f];
            outer.add_to(0..d, 1.0, &mut got);
            for (i, x) in got.iter().enumerate() {
                assert_eq!(x.is_nan(), i / f == 3 || i % f == 30, "{i}: {x}");
            }
        }
        let outer = OuterQ8::new((d, f), n);
        let mut got = vec![1.0; d * f];
        outer.add_to(0..d, 1.0, &mut got);
        assert!(got.iter().all(|x| *x == 1.0), "nothing was filled in");
    }
}
