//! Rows of `x` as signed bytes, a scale for each block.

use super::{QuantPath, BLOCK, MAGIC};
use crate::kernels::pool::{Pool, SharedMut};

/// 32 elements of a row: `x = scale · code`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(super) struct Block {
    /// Within -127..=127, four a group, so that the product of two never leaves 16 bits when added in pairs.
    pub codes: [[i8; 4]; BLOCK / 4],
    /// Largest size / 127; NaN if the block holds a NaN or an infinity.
    pub scale: f32,
    /// Sum of the codes.
    pub sum: f32,
    /// Bits of [`MAGIC`] less 128 times the sum: where a sum over `code + 128` starts so as to end as a sum over `code`.
    pub start: i32,
}

impl Block {
    /// A block of zeros.
    pub const ZERO: Self = Self {
        codes: [[0; 4]; BLOCK / 4],
        scale: 0.0,
        sum: 0.0,
        start: MAGIC.to_bits() as i32,
    };
}

/// A block whose largest element is smaller than this counts as zero: 127 over it must be finite.
const SMALLEST: f32 = 1e-30;
/// Elements below which quantising is not worth a second thread.
const MIN_SHARED: usize = 1 << 15;
/// Parts for each thread.
const PARTS_PER_THREAD: usize = 4;

/// Quantises x (t, k) into (t, k / 32 rounded up) blocks; `out` grows as needed and never shrinks.
pub(super) fn quantise(
    path: QuantPath,
    pool: Option<&Pool>,
    x: &[f32],
    t: usize,
    k: usize,
    out: &mut Vec<Block>,
) {
    let blocks = k.div_ceil(BLOCK);
    if out.len() < t * blocks {
        out.resize(t * blocks, Block::default());
    }
    if blocks == 0 {
        return;
    }
    let pool = pool.filter(|_| t > 1 && t * k >= MIN_SHARED);
    let piece = t.div_ceil(pool.map_or(1, |p| p.threads() * PARTS_PER_THREAD));
    let shared = SharedMut::new(&mut out[..t * blocks]);
    let run = |part: usize| {
        for row in part * piece..t.min((part + 1) * piece) {
            let from = &x[row * k..(row + 1) * k];
            // SAFETY: each row belongs to one part.
            let to = unsafe { shared.slice(row * blocks, blocks) };
            match path {
                QuantPath::Scalar => quantise_row(from, to),
                #[cfg(target_arch = "x86_64")]
                // SAFETY: every path but the scalar one requires AVX2.
                _ => unsafe { quantise_row_avx2(from, to) },
                #[cfg(not(target_arch = "x86_64"))]
                _ => quantise_row(from, to),
            }
        }
    };
    match pool {
        Some(pool) => pool.run(t.div_ceil(piece), run),
        None => (0..t.div_ceil(piece)).for_each(run),
    }
}

/// The same loop, compiled with wider registers: no operation in it rounds differently there.
///
/// # Safety
/// The processor has AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn quantise_row_avx2(x: &[f32], out: &mut [Block]) {
    quantise_row(x, out)
}

#[inline(always)]
fn quantise_row(x: &[f32], out: &mut [Block]) {
    let (full, rest) = x.as_chunks::<BLOCK>();
    for (x, out) in full.iter().zip(&mut *out) {
        quantise_block(x, out);
    }
    if !rest.is_empty() {
        let mut last = [0.0; BLOCK];
        last[..rest.len()].copy_from_slice(rest);
        quantise_block(&last, &mut out[full.len()]);
    }
}

#[inline(always)]
fn quantise_block(x: &[f32; BLOCK], out: &mut Block) {
    // Without their signs floats are ordered as their bits are, infinities and NaN at the top, where `f32::max` would lose them.
    let top = x.iter().fold(0, |top, v| top.max(v.to_bits() & !(1 << 31)));
    let largest = f32::from_bits(top);
    if !largest.is_finite() || largest < SMALLEST {
        *out = Block {
            scale: if largest.is_finite() { 0.0 } else { f32::NAN },
            ..Block::ZERO
        };
        return;
    }
    let inverse = 127.0 / largest;
    let mut codes = [0i8; BLOCK];
    let mut sum = 0i32;
    for (code, x) in codes.iter_mut().zip(x) {
        // Adding MAGIC rounds to nearest and leaves the integer in the low bits.
        *code = (x * inverse + MAGIC).to_bits() as i8;
        sum += *code as i32;
    }
    for (to, from) in out.codes.iter_mut().zip(codes.as_chunks::<4>().0) {
        *to = *from;
    }
    out.scale = largest / 127.0;
    out.sum = sum as f32;
    out.start = MAGIC.to_bits() as i32 - 128 * sum;
}
