//! The product in registers of 256 bits, two to a panel, with VPDPBUSD (AVX-VNNI) or without.

use super::{Block, Packed, Tile, MAGIC, PANEL};
use std::arch::x86_64::*;

/// Rows of `x` in a tile without VPDPBUSD, whose replacement needs registers of its own.
pub(super) const ROWS: usize = 2;
/// Rows of `x` in a tile with VPDPBUSD: six registers of integer sums, six of float sums, four left.
pub(super) const ROWS_VNNI: usize = 3;

/// See [`super::Kernel`].
///
/// # Safety
/// The processor has AVX2, FMA and F16C; `x` holds rows `row..row + rows` of `w.blocks` blocks each; the panels exist.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn tile<const BITS: usize>(
    w: &Packed<BITS>,
    panel: usize,
    panels: usize,
    x: &[Block],
    row: usize,
    rows: usize,
    out: &mut Tile,
) {
    for p in 0..panels {
        // SAFETY: handed on as it was promised to us.
        unsafe {
            match rows {
                1 => tile_of::<BITS, 1, false>(w, panel + p, x, row, out, p),
                2 => tile_of::<BITS, 2, false>(w, panel + p, x, row, out, p),
                _ => unreachable!("a tile of {rows} rows"),
            }
        }
    }
}

/// See [`super::Kernel`].
///
/// # Safety
/// As for [`tile`], and the processor has AVX-VNNI.
#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
pub(super) unsafe fn tile_vnni<const BITS: usize>(
    w: &Packed<BITS>,
    panel: usize,
    panels: usize,
    x: &[Block],
    row: usize,
    rows: usize,
    out: &mut Tile,
) {
    for p in 0..panels {
        // SAFETY: handed on as it was promised to us.
        unsafe {
            match rows {
                1 => tile_of::<BITS, 1, true>(w, panel + p, x, row, out, p),
                2 => tile_of::<BITS, 2, true>(w, panel + p, x, row, out, p),
                3 => tile_of::<BITS, 3, true>(w, panel + p, x, row, out, p),
                _ => unreachable!("a tile of {rows} rows"),
            }
        }
    }
}

/// Multiplies `R` rows by one panel into columns `16 p..16 (p + 1)` of `out`.
///
/// # Safety
/// As for [`tile`], and for [`tile_vnni`] if `VNNI`. Must be inlined into one of them, to be compiled with their features.
#[inline(always)]
unsafe fn tile_of<const BITS: usize, const R: usize, const VNNI: bool>(
    w: &Packed<BITS>,
    panel: usize,
    x: &[Block],
    row: usize,
    out: &mut Tile,
    p: usize,
) {
    debug_assert!((row + R) * w.blocks <= x.len() && panel < w.panels());
    let blocks = w.blocks;
    // SAFETY: the panel owns `LINES` lines of codes and its scales for each block, each row `blocks` blocks of `x`: the caller's
    // promise, as are the features. Every access is at block b < blocks of one of them.
    unsafe {
        let magic = _mm256_set1_ps(MAGIC);
        let mut sums = [[_mm256_setzero_ps(); 2]; R];
        let x = x.as_ptr().add(row * blocks);
        let codes = w.codes.as_ptr().add(panel * blocks * Packed::<BITS>::LINES);
        let halves = w.scales.as_ptr().cast::<u16>();
        let halves = halves.add(panel * w.scales_a_panel());
        for b in 0..blocks {
            let x = x.add(b);
            let mut ints = [[_mm256_castps_si256(magic); 2]; R];
            if BITS == 8 && VNNI {
                for (r, ints) in ints.iter_mut().enumerate() {
                    *ints = [_mm256_set1_epi32((*x.add(r * blocks)).start); 2];
                }
            }
            for line in 0..Packed::<BITS>::LINES {
                let at = codes
                    .add(b * Packed::<BITS>::LINES + line)
                    .cast::<__m256i>();
                let bytes = [_mm256_load_si256(at), _mm256_load_si256(at.add(1))];
                if BITS == 8 {
                    dot_group::<BITS, R, VNNI>(&mut ints, bytes, x, blocks, line);
                } else {
                    let low = _mm256_set1_epi8(15);
                    let even = bytes.map(|v| _mm256_and_si256(v, low));
                    dot_group::<BITS, R, VNNI>(&mut ints, even, x, blocks, 2 * line);
                    let odd = bytes.map(|v| _mm256_and_si256(_mm256_srli_epi32::<4>(v), low));
                    dot_group::<BITS, R, VNNI>(&mut ints, odd, x, blocks, 2 * line + 1);
                }
            }
            for side in 0..2 {
                let halves = halves.add(b * PANEL * Packed::<BITS>::SCALES + 8 * side);
                let scale = _mm256_cvtph_ps(_mm_loadu_si128(halves.cast()));
                let zero = _mm256_mul_ps(magic, scale);
                let min = match BITS {
                    8 => _mm256_setzero_ps(),
                    _ => _mm256_cvtph_ps(_mm_loadu_si128(halves.add(PANEL).cast())),
                };
                for r in 0..R {
                    let x = x.add(r * blocks);
                    // As in `avx512`: the product MAGIC · scale is exact.
                    let int = _mm256_castsi256_ps(ints[r][side]);
                    let mut dot = _mm256_fmsub_ps(int, scale, zero);
                    if BITS == 4 {
                        dot = _mm256_fmadd_ps(min, _mm256_set1_ps((*x).sum), dot);
                    }
                    sums[r][side] = _mm256_fmadd_ps(dot, _mm256_set1_ps((*x).scale), sums[r][side]);
                }
            }
        }
        for (sums, out) in sums.iter().zip(out.iter_mut()) {
            let to = out[p * PANEL..(p + 1) * PANEL].as_mut_ptr();
            _mm256_storeu_ps(to, sums[0]);
            _mm256_storeu_ps(to.add(8), sums[1]);
        }
    }
}

/// Adds the products of group `group` (four k) of a block to the sums.
///
/// VPMADDUBSW adds pairs of products in 16 bits and saturates. 4-bit codes stay far below that: 2 · 15 · 127. Bytes would not, so
/// they become signed, and their products are taken as `|x| · (w with the sign of x)`: 2 · 127 · 127 = 32,258 fits.
///
/// # Safety
/// As for [`tile_of`]; `x` and the `R - 1` blocks at distances of `blocks` after it can be read; `group < 8`.
#[inline(always)]
unsafe fn dot_group<const BITS: usize, const R: usize, const VNNI: bool>(
    ints: &mut [[__m256i; 2]; R],
    mut bytes: [__m256i; 2],
    x: *const Block,
    blocks: usize,
    group: usize,
) {
    // SAFETY: the caller's promise; a group is four bytes, as an i32 is.
    unsafe {
        let ones = _mm256_set1_epi16(1);
        if BITS == 8 && !VNNI {
            bytes = bytes.map(|v| _mm256_xor_si256(v, _mm256_set1_epi8(-128)));
        }
        for (r, ints) in ints.iter_mut().enumerate() {
            let codes = (&raw const (*x.add(r * blocks)).codes).cast::<i32>();
            let four = _mm256_set1_epi32(codes.add(group).read_unaligned());
            for (sum, bytes) in ints.iter_mut().zip(bytes) {
                if VNNI {
                    *sum = _mm256_dpbusd_avx_epi32(*sum, bytes, four);
                } else {
                    let pairs = match BITS {
                        8 => _mm256_maddubs_epi16(
                            _mm256_abs_epi8(four),
                            _mm256_sign_epi8(bytes, four),
                        ),
                        _ => _mm256_maddubs_epi16(bytes, four),
                    };
                    *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, ones));
                }
            }
        }
    }
}
