//! From `f32` to codes, and back.

use super::{features, CodeLine, Packed, ScaleLine, BLOCK, MAGIC, PANEL};
use half::f16;

/// The largest weight is stored as 2^14 to 2^15 units, so that minimum and scale fit `f16` and small blocks keep their precision.
const UNIT_EXPONENT: i32 = 14;
/// Fewest steps between the smallest and the largest weight of a 4-bit block that are tried: a grid of fewer steps is also one of
/// twice as many.
const MIN_STEPS: i32 = 8;

impl<const BITS: usize> Packed<BITS> {
    /// Packs `w` (n, k), row-major. A block that holds a NaN or an infinity makes its column of every product NaN.
    ///
    /// # Panics
    /// If `w` has not `n · k` elements.
    pub fn new(w: &[f32], n: usize, k: usize) -> Self {
        const { assert!(BITS == 8 || BITS == 4, "there are kernels for 8 and 4 bits") };
        assert_eq!(w.len(), n * k, "weight of ({n}, {k})");
        let blocks = k.div_ceil(BLOCK);
        let unit = unit(w);
        // Exact: the unit is a power of two between 2^-126 and 2^113.
        let inverse = 1.0 / unit;
        let mut packed = Self {
            n,
            k,
            blocks,
            unit,
            codes: Vec::new(),
            scales: Vec::new(),
        };
        packed.make_room();
        let mut block = [0f32; BLOCK];
        for (row, w) in w.chunks_exact(k.max(1)).enumerate() {
            for (b, w) in w.chunks(BLOCK).enumerate() {
                for (to, from) in block.iter_mut().zip(w) {
                    *to = from * inverse;
                }
                // The last block is filled up with one of its own weights, which leaves smallest and largest alone.
                block[w.len()..].fill(w[0] * inverse);
                let (codes, scale, min) = quantise::<BITS>(&block);
                packed.put(row / PANEL, b, row % PANEL, &codes, scale, min);
            }
        }
        packed
    }

    /// Codes and scales of zeros. Rows that fill up the last panel keep their scale of 0, and so do blocks of zeros.
    pub(super) fn make_room(&mut self) {
        let codes = self.panels() * self.blocks * Self::LINES;
        self.codes = vec![CodeLine([0; 64]); codes];
        let scales = self.panels() * self.scales_a_panel() / 32;
        self.scales = vec![ScaleLine([f16::ZERO; 32]); scales];
    }

    /// The power of two in which scales of a weight like this are counted.
    pub fn unit_of(w: &[f32]) -> f32 {
        unit(w)
    }

    /// Rows of the weight, which are columns of the product.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Columns of the weight.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Row `i` (k) of the weight that the products compute with.
    ///
    /// # Panics
    /// If there is no such row or `out` is not `k` long.
    pub fn row(&self, i: usize, out: &mut [f32]) {
        assert!(i < self.n, "row {i} of {}", self.n);
        assert_eq!(out.len(), self.k);
        for (b, out) in out.chunks_mut(BLOCK).enumerate() {
            let (scale, min) = self.scale(i / PANEL, b, i % PANEL);
            let zero = if BITS == 8 { 128.0 } else { 0.0 };
            for (j, out) in out.iter_mut().enumerate() {
                let code = self.code(i / PANEL, b, i % PANEL, j) as f32 - zero;
                *out = (code * scale + min) * self.unit;
            }
        }
    }

    /// The whole weight (n, k) that the products compute with.
    pub fn unpack(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.n * self.k];
        for (i, row) in out.chunks_exact_mut(self.k.max(1)).enumerate() {
            self.row(i, row);
        }
        out
    }

    /// Memory that the codes and scales take.
    pub fn bytes(&self) -> usize {
        64 * (self.codes.len() + self.scales.len())
    }

    /// Cache lines of codes in a block of a panel.
    pub(super) const LINES: usize = BLOCK * PANEL * BITS / 8 / 64;
    /// Numbers beside each block: the scale, and the minimum of 4-bit weights.
    pub(super) const SCALES: usize = if BITS == 4 { 2 } else { 1 };

    pub(super) fn panels(&self) -> usize {
        self.n.div_ceil(PANEL)
    }

    /// Scales from one panel to the next: whole cache lines.
    pub(super) fn scales_a_panel(&self) -> usize {
        (self.blocks * PANEL * Self::SCALES).next_multiple_of(32)
    }

    /// The code of element `i` of block `b` of row `c` of a panel.
    pub(super) fn code(&self, panel: usize, b: usize, c: usize, i: usize) -> u8 {
        let (line, byte, shift) = Self::place(c, i);
        let line = (panel * self.blocks + b) * Self::LINES + line;
        match BITS {
            8 => self.codes[line].0[byte],
            _ => self.codes[line].0[byte] >> shift & 15,
        }
    }

    /// Scale and minimum of block `b` of row `c` of a panel, in units.
    pub(super) fn scale(&self, panel: usize, b: usize, c: usize) -> (f32, f32) {
        let at = panel * self.scales_a_panel() + b * PANEL * Self::SCALES + c;
        let get = |at: usize| self.scales[at / 32].0[at % 32].to_f32();
        match BITS {
            8 => (get(at), 0.0),
            _ => (get(at), get(at + PANEL)),
        }
    }

    fn put(&mut self, panel: usize, b: usize, c: usize, codes: &[u8; BLOCK], d: f16, m: f16) {
        for (i, code) in codes.iter().enumerate() {
            let (line, byte, shift) = Self::place(c, i);
            let line = (panel * self.blocks + b) * Self::LINES + line;
            self.codes[line].0[byte] |= code << shift;
        }
        let at = panel * self.scales_a_panel() + b * PANEL * Self::SCALES + c;
        self.scales[at / 32].0[at % 32] = d;
        if BITS == 4 {
            self.scales[(at + PANEL) / 32].0[(at + PANEL) % 32] = m;
        }
    }

    /// Line within the block, byte within the line and shift within the byte of element `i` of row `c`. A line of 4-bit codes holds
    /// two groups of four k: the even one in the low halves, the odd one in the high halves.
    fn place(c: usize, i: usize) -> (usize, usize, u32) {
        let (group, byte) = (i / 4, 4 * c + i % 4);
        match BITS {
            8 => (group, byte, 0),
            _ => (group / 2, byte, 4 * (group % 2) as u32),
        }
    }
}

/// The power of two in which scales are counted.
fn unit(w: &[f32]) -> f32 {
    let finite = w.iter().filter(|v| v.is_finite());
    let largest = finite.fold(0f32, |top, v| top.max(v.abs()));
    if largest == 0.0 {
        return 1.0;
    }
    let exponent = (largest.to_bits() >> 23) as i32 - 127;
    f32::powi(2.0, (exponent - UNIT_EXPONENT).max(-126))
}

/// Codes, scale and minimum of a block.
type Quantised = ([u8; BLOCK], f16, f16);

/// Codes and scale of a block of 8 bits.
pub(super) fn quantise_whole(w: &[f32; BLOCK]) -> ([u8; BLOCK], f16) {
    let (codes, scale, _) = quantise::<8>(w);
    (codes, scale)
}

/// [`quantise_4`] or [`quantise_8`], compiled with wider registers where there are some.
fn quantise<const BITS: usize>(w: &[f32; BLOCK]) -> Quantised {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2")]
        fn wide<const BITS: usize>(w: &[f32; BLOCK]) -> Quantised {
            match BITS {
                8 => quantise_8(w),
                _ => quantise_4(w),
            }
        }
        if features().avx2_fma {
            // SAFETY: the feature was detected.
            return unsafe { wide::<BITS>(w) };
        }
    }
    match BITS {
        8 => quantise_8(w),
        _ => quantise_4(w),
    }
}

/// Eight lanes that meet at the end: a fold in order would be one long chain of dependent operations.
#[inline(always)]
fn fold(w: &[f32; BLOCK], start: f32, f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [start; 8];
    for eight in w.as_chunks::<8>().0 {
        for (lane, v) in lanes.iter_mut().zip(eight) {
            *lane = f(*lane, *v);
        }
    }
    lanes.into_iter().fold(start, f)
}

/// The smallest and the largest, or `None` if not all are finite.
#[inline(always)]
fn range(w: &[f32; BLOCK]) -> Option<(f32, f32)> {
    let low = fold(w, f32::INFINITY, |a, b| if b < a { b } else { a });
    let high = fold(w, f32::NEG_INFINITY, |a, b| if b > a { b } else { a });
    // Zero times an infinity or a NaN is NaN, which the comparisons above would skip.
    let finite = fold(w, 0.0, |sum, v| sum + v * 0.0) == 0.0;
    finite.then_some((low, high))
}

#[inline(always)]
fn quantise_8(w: &[f32; BLOCK]) -> Quantised {
    let Some((low, high)) = range(w) else {
        return ([128; BLOCK], f16::NAN, f16::ZERO);
    };
    let scale = f16::from_f32(high.max(-low) / 127.0);
    let inverse = match scale.to_f32() {
        0.0 => 0.0,
        scale => 1.0 / scale,
    };
    // `MAGIC` rounds to nearest and leaves the integer in the low bits.
    let code = |v: f32| ((v * inverse).clamp(-127.0, 127.0) + (MAGIC + 128.0)).to_bits() as u8;
    (w.map(code), scale, f16::ZERO)
}

/// Scale and minimum that span the block in 15 steps or, if that fits better, in fewer: weights that come from a 4-bit grid need not
/// have used its two ends.
#[inline(always)]
fn quantise_4(w: &[f32; BLOCK]) -> Quantised {
    let Some((low, high)) = range(w) else {
        return ([0; BLOCK], f16::NAN, f16::ZERO);
    };
    let inverse = |scale: f16| match scale.to_f32() {
        0.0 => 0.0,
        d => 1.0 / d,
    };
    // `MAGIC` rounds to nearest and leaves the integer in the low bits.
    let code = |v: f32, m: f32, inverse: f32| ((v - m) * inverse).clamp(0.0, 15.0) + MAGIC;
    let error = |scale: f16, min: f16| {
        let (d, m, inverse) = (scale.to_f32(), min.to_f32(), inverse(scale));
        let mut errors = [0.0; BLOCK];
        for (error, v) in errors.iter_mut().zip(w) {
            *error = (code(*v, m, inverse) - MAGIC) * d + m - v;
        }
        fold(&errors, 0.0, |sum, e| sum + e * e)
    };
    // What the rounding of `f32` and `f16` leaves of weights that come from a grid; no other grid would fit better.
    let enough = BLOCK as f32 * (2e-4 * (high - low)).powi(2);
    let mut min = f16::from_f32(low);
    let mut scale = f16::from_f32((high - low) / 15.0);
    let mut least = error(scale, min);
    let mut unused = 0;
    for steps in (MIN_STEPS..15).rev() {
        if least <= enough {
            break;
        }
        let coarser = f16::from_f32((high - low) / steps as f32);
        let error = error(coarser, min);
        if error < least {
            (least, scale, unused) = (error, coarser, 15 - steps);
        }
    }
    // The grid may begin below the smallest weight, and its true beginning is the one that `f16` holds best.
    for below in 1..=unused {
        let lower = f16::from_f32(low - below as f32 * scale.to_f32());
        let error = error(scale, lower);
        if error < least {
            (least, min) = (error, lower);
        }
    }
    let (m, inverse) = (min.to_f32(), inverse(scale));
    (w.map(|v| code(v, m, inverse).to_bits() as u8), scale, min)
}
