//! The product in registers of 512 bits: sixteen columns each, four k an instruction.

use super::outer::{Channels, SMALLEST};
use super::{Block, CodeLine, Packed, Tile, BLOCK, MAGIC, PANEL};
use half::f16;
use std::arch::x86_64::*;

/// How many cache lines of codes before their use a few rows' weights are asked for. Without it decode ran at 75 to 85 % of the speed of
/// reading, with 16 to 64 lines at 95 % and more, best at 32.
const AHEAD: usize = 32;

/// See [`super::Kernel`]. Takes twelve rows by one panel or six by two: twelve registers of integer sums and twelve of float sums
/// leave eight of the thirty-two.
///
/// # Safety
/// The processor has AVX-512 F and VNNI; `x` holds rows `row..row + rows` of `w.blocks` blocks each; the panels exist.
pub(super) unsafe fn tile<const BITS: usize>(
    w: &Packed<BITS>,
    panel: usize,
    panels: usize,
    x: &[Block],
    row: usize,
    rows: usize,
    out: &mut Tile,
) {
    debug_assert!((row + rows) * w.blocks <= x.len() && panel + panels <= w.panels());
    // SAFETY: handed on as it was promised to us.
    unsafe {
        match (rows, panels) {
            (1, 1) => tile_of::<BITS, 1, 1>(w, panel, x, row, out),
            (2, 1) => tile_of::<BITS, 2, 1>(w, panel, x, row, out),
            (3, 1) => tile_of::<BITS, 3, 1>(w, panel, x, row, out),
            (4, 1) => tile_of::<BITS, 4, 1>(w, panel, x, row, out),
            (5, 1) => tile_of::<BITS, 5, 1>(w, panel, x, row, out),
            (6, 1) => tile_of::<BITS, 6, 1>(w, panel, x, row, out),
            (7, 1) => tile_of::<BITS, 7, 1>(w, panel, x, row, out),
            (8, 1) => tile_of::<BITS, 8, 1>(w, panel, x, row, out),
            (9, 1) => tile_of::<BITS, 9, 1>(w, panel, x, row, out),
            (10, 1) => tile_of::<BITS, 10, 1>(w, panel, x, row, out),
            (11, 1) => tile_of::<BITS, 11, 1>(w, panel, x, row, out),
            (12, 1) => tile_of::<BITS, 12, 1>(w, panel, x, row, out),
            (1, 2) => tile_of::<BITS, 1, 2>(w, panel, x, row, out),
            (2, 2) => tile_of::<BITS, 2, 2>(w, panel, x, row, out),
            (3, 2) => tile_of::<BITS, 3, 2>(w, panel, x, row, out),
            (4, 2) => tile_of::<BITS, 4, 2>(w, panel, x, row, out),
            (5, 2) => tile_of::<BITS, 5, 2>(w, panel, x, row, out),
            (6, 2) => tile_of::<BITS, 6, 2>(w, panel, x, row, out),
            _ => unreachable!("a tile of {rows} rows and {panels} panels"),
        }
    }
}

#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn tile_of<const BITS: usize, const R: usize, const P: usize>(
    w: &Packed<BITS>,
    panel: usize,
    x: &[Block],
    row: usize,
    out: &mut Tile,
) {
    let blocks = w.blocks;
    let lines = blocks * Packed::<BITS>::LINES;
    let scales = w.scales_a_panel();
    let magic = _mm512_set1_ps(MAGIC);
    let mut sums = [[_mm512_setzero_ps(); P]; R];
    // SAFETY: panel `panel + p` owns `lines` lines of codes and `scales` scales, `blocks` blocks each; row `row + r` owns `blocks`
    // blocks of `x`: the caller's promise. Every access below is at block b < blocks of one of them.
    unsafe {
        let x = x.as_ptr().add(row * blocks);
        let codes = w.codes.as_ptr().add(panel * lines);
        let halves = w.scales.as_ptr().cast::<u16>().add(panel * scales);
        for b in 0..blocks {
            let x = x.add(b);
            let mut ints = [[_mm512_castps_si512(magic); P]; R];
            if BITS == 8 {
                for (r, ints) in ints.iter_mut().enumerate() {
                    *ints = [_mm512_set1_epi32((*x.add(r * blocks)).start); P];
                }
            }
            for line in 0..Packed::<BITS>::LINES {
                let at = b * Packed::<BITS>::LINES + line;
                let mut bytes = [_mm512_setzero_si512(); P];
                if P == 1 {
                    // A hint may point anywhere, also behind the last panel.
                    _mm_prefetch::<_MM_HINT_T0>(codes.wrapping_add(at + AHEAD).cast());
                }
                for (p, bytes) in bytes.iter_mut().enumerate() {
                    *bytes = _mm512_load_si512(codes.add(p * lines + at).cast());
                }
                if BITS == 8 {
                    dot_group(&mut ints, &bytes, x, blocks, line);
                } else {
                    let low = _mm512_set1_epi8(15);
                    let even = bytes.map(|v| _mm512_and_si512(v, low));
                    dot_group(&mut ints, &even, x, blocks, 2 * line);
                    let odd = bytes.map(|v| _mm512_and_si512(_mm512_srli_epi32::<4>(v), low));
                    dot_group(&mut ints, &odd, x, blocks, 2 * line + 1);
                }
            }
            for p in 0..P {
                let halves = halves.add(p * scales + b * PANEL * Packed::<BITS>::SCALES);
                let scale = _mm512_cvtph_ps(_mm256_loadu_si256(halves.cast()));
                if P == 1 {
                    let blocks_ahead = AHEAD / Packed::<BITS>::LINES;
                    let ahead = halves.wrapping_add(blocks_ahead * PANEL * Packed::<BITS>::SCALES);
                    _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
                }
                let zero = _mm512_mul_ps(magic, scale);
                let min = match BITS {
                    8 => _mm512_setzero_ps(),
                    _ => _mm512_cvtph_ps(_mm256_loadu_si256(halves.add(PANEL).cast())),
                };
                for r in 0..R {
                    let x = x.add(r * blocks);
                    // (MAGIC + sum) · scale - MAGIC · scale: a scale has 11 bits, so the last product is exact, and the whole rounds once.
                    let mut dot = _mm512_fmsub_ps(_mm512_castsi512_ps(ints[r][p]), scale, zero);
                    if BITS == 4 {
                        dot = _mm512_fmadd_ps(min, _mm512_set1_ps((*x).sum), dot);
                    }
                    sums[r][p] = _mm512_fmadd_ps(dot, _mm512_set1_ps((*x).scale), sums[r][p]);
                }
            }
        }
        for (sums, out) in sums.iter().zip(out.iter_mut()) {
            for (sum, out) in sums.iter().zip(out.as_chunks_mut::<PANEL>().0) {
                _mm512_storeu_ps(out.as_mut_ptr(), *sum);
            }
        }
    }
}

/// Adds the products of group `group` (four k) of a block to the sums.
///
/// # Safety
/// `x` and the `R - 1` blocks at distances of `blocks` after it can be read; `group < 8`.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn dot_group<const R: usize, const P: usize>(
    ints: &mut [[__m512i; P]; R],
    bytes: &[__m512i; P],
    x: *const Block,
    blocks: usize,
    group: usize,
) {
    debug_assert!(group < BLOCK / 4);
    for (r, ints) in ints.iter_mut().enumerate() {
        // SAFETY: the caller's promise; a group is four bytes, as an i32 is.
        let four = unsafe {
            let codes = (&raw const (*x.add(r * blocks)).codes).cast::<i32>();
            _mm512_set1_epi32(codes.add(group).read_unaligned())
        };
        for (sum, bytes) in ints.iter_mut().zip(bytes) {
            *sum = _mm512_dpbusd_epi32(*sum, *bytes, four);
        }
    }
}

/// Quantises channels `16 panel..` of rows x (n <= 32, width), multiplied by `factor`: what [`super::outer`] makes of them one by one,
/// bit for bit.
///
/// # Safety
/// The processor has AVX-512 F.
///
/// # Panics
/// If there are more rows, or no such channels.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn channels(x: &[f32], width: usize, panel: usize, factor: f32) -> Channels {
    let (from, n) = (panel * PANEL, x.len() / width);
    assert!(
        n <= BLOCK && from < width,
        "a block of rows, and channels in them"
    );
    let there = ((1u32 << PANEL.min(width - from)) - 1) as u16;
    let factor = _mm512_set1_ps(factor);
    let mut rows = [_mm512_setzero_ps(); BLOCK];
    // Infinities and NaN come out at the top.
    let no_sign = _mm512_set1_epi32(i32::MAX);
    let mut top = _mm512_setzero_si512();
    for (i, row) in rows.iter_mut().enumerate().take(n) {
        // SAFETY: the channels that are there, of a row of `x`.
        let x = unsafe { _mm512_maskz_loadu_ps(there, x.as_ptr().add(i * width + from)) };
        *row = _mm512_mul_ps(x, factor);
        top = _mm512_max_epu32(top, _mm512_and_si512(_mm512_castps_si512(*row), no_sign));
    }
    let largest = _mm512_castsi512_ps(top);
    let infinity = _mm512_set1_epi32(f32::INFINITY.to_bits() as i32);
    let sound = _mm512_cmplt_epu32_mask(top, infinity)
        & _mm512_cmp_ps_mask::<_CMP_GE_OQ>(largest, _mm512_set1_ps(SMALLEST));
    let inverse = _mm512_maskz_div_ps(sound, _mm512_set1_ps(127.0), largest);
    let (magic, byte) = (_mm512_set1_ps(MAGIC), _mm512_set1_epi32(255));
    let code = |row: __m512| {
        // Not fused: the product is rounded first, as elsewhere.
        let sum = _mm512_add_ps(_mm512_mul_ps(row, inverse), magic);
        _mm512_and_si512(_mm512_castps_si512(sum), byte)
    };
    let mut out = Channels {
        codes: [[0; PANEL]; BLOCK / 4],
        largest: [0.0; PANEL],
    };
    for (words, rows) in out.codes.iter_mut().zip(rows.as_chunks::<4>().0) {
        let [a, b, c, d] = rows.map(code);
        let ab = _mm512_or_si512(a, _mm512_slli_epi32::<8>(b));
        let cd = _mm512_or_si512(_mm512_slli_epi32::<16>(c), _mm512_slli_epi32::<24>(d));
        // SAFETY: a row of words is sixteen.
        unsafe { _mm512_storeu_si512(words.as_mut_ptr().cast(), _mm512_or_si512(ab, cd)) };
    }
    // SAFETY: sixteen numbers.
    unsafe { _mm512_storeu_ps(out.largest.as_mut_ptr(), largest) };
    out
}

/// Packs the sixteen rows of a panel, w (16, k) times `factor`, to 8 bits: what [`super::pack`] makes of them block by block, bit for bit.
///
/// # Safety
/// The processor has AVX-512 F.
///
/// # Panics
/// If k is not whole blocks, or a length does not fit.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn pack_panel(
    w: &[f32],
    k: usize,
    factor: f32,
    codes: &mut [CodeLine],
    scales: &mut [f16],
) {
    let blocks = k / BLOCK;
    assert!(
        k.is_multiple_of(BLOCK) && w.len() == PANEL * k,
        "whole blocks of a whole panel"
    );
    assert!(codes.len() >= blocks * (BLOCK / 4) && scales.len() >= blocks * PANEL);
    let factor = _mm512_set1_ps(factor);
    let no_sign = _mm512_set1_epi32(i32::MAX);
    let (low, high) = (_mm512_set1_ps(-127.0), _mm512_set1_ps(127.0));
    let column = _mm512_setr_epi32(
        0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120,
    );
    for b in 0..blocks {
        // SAFETY: row c of block b is 32 numbers inside `w`, and the block's lines and scales are there, by the assertions above.
        unsafe {
            let row = |c: usize| {
                let at = w.as_ptr().add(c * k + b * BLOCK);
                [at, at.add(16)].map(|at| _mm512_mul_ps(_mm512_loadu_ps(at), factor))
            };
            let mut tops = [0i32; PANEL];
            for (c, top) in tops.iter_mut().enumerate() {
                // Without their signs floats are ordered as their bits are, infinities and NaN at the top.
                let [a, b] = row(c).map(|x| _mm512_and_si512(_mm512_castps_si512(x), no_sign));
                *top = _mm512_reduce_max_epi32(_mm512_max_epi32(a, b));
            }
            let tops = _mm512_loadu_si512(tops.as_ptr().cast());
            let infinity = _mm512_set1_epi32(f32::INFINITY.to_bits() as i32);
            let finite = _mm512_cmplt_epi32_mask(tops, infinity);
            let scale = _mm512_div_ps(_mm512_castsi512_ps(tops), high);
            let scale = _mm512_mask_blend_ps(finite, _mm512_set1_ps(f32::NAN), scale);
            let halves =
                _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(scale);
            _mm256_storeu_si256(scales.as_mut_ptr().add(b * PANEL).cast(), halves);
            let scale = _mm512_cvtph_ps(halves);
            let some = _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(scale, _mm512_setzero_ps());
            let inverses = _mm512_maskz_div_ps(some, _mm512_set1_ps(1.0), scale);
            let mut inverse = [0f32; PANEL];
            _mm512_storeu_ps(inverse.as_mut_ptr(), inverses);
            // (16 rows, 8 words)
            let mut words = [0u32; PANEL * BLOCK / 4];
            for (c, inverse) in inverse.iter().enumerate() {
                for (half, x) in row(c).into_iter().enumerate() {
                    let x = _mm512_mul_ps(x, _mm512_set1_ps(*inverse));
                    let x = _mm512_min_ps(_mm512_max_ps(x, low), high);
                    let x = _mm512_cvt_roundps_epi32::<
                        { _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC },
                    >(x);
                    let bytes = _mm_xor_si128(_mm512_cvtepi32_epi8(x), _mm_set1_epi8(-128));
                    _mm_storeu_si128(words.as_mut_ptr().add(8 * c + 4 * half).cast(), bytes);
                }
            }
            for g in 0..BLOCK / 4 {
                let at = words.as_ptr().add(g).cast();
                let line = _mm512_i32gather_epi32::<4>(column, at);
                _mm512_store_si512(codes.as_mut_ptr().add(b * (BLOCK / 4) + g).cast(), line);
            }
        }
    }
}
