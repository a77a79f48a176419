//! The two inner loops of a bf16 product on processors with AVX512_BF16: packing `f32` numbers into pairs, and multiplying a tile.
//!
//! A pair is one `u32`: the bf16 of `k = 2p` in the low half, of `k = 2p + 1` in the high half, as VDPBF16PS wants it.
//! A lane is a row of the left operand or a column of the right one. Packed operands hold, for each pair index `p`, the pairs of
//! neighbouring lanes side by side: `MR` or fewer rows on the left, [`NR`] columns on the right.

use std::arch::x86_64::*;

use super::product_x86::{
    low_bits, transpose, write_tile, Multiply, MultiplyRows, Numbers, Packing, Tile, MR, NR,
};

/// Two bf16 a word.
pub(super) struct Bf16;

impl Numbers for Bf16 {
    const PER_WORD: usize = 2;
    const MULTIPLY: [Multiply; MR] = MULTIPLY;
    /// They are rounded first.
    const MULTIPLY_ROWS: Option<[MultiplyRows; MR]> = None;

    unsafe fn pack(job: &Packing) {
        // SAFETY: the caller's promises, handed on.
        unsafe { pack(job) }
    }
}

/// Rounds to bf16 (nearest even, NaN stays NaN, numbers below 2⁻¹²⁶ become 0) and packs.
///
/// # Safety
/// The processor has AVX512F, AVX512BW and AVX512_BF16; every address that [`Packing`] describes can be read or written.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn pack(job: &Packing) {
    assert!(job.width <= 16 || job.width == NR);
    assert!(job.lane_stride == 1 || job.k_stride == 1);
    // SAFETY: the caller's promises, handed on.
    unsafe {
        if job.k_stride == 1 {
            pack_along(job)
        } else {
            pack_across(job)
        }
    }
}

/// Numbers contiguous along k: 16 lanes by 32 numbers become 16 by 16 pairs, which are then transposed.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn pack_along(job: &Packing) {
    let pairs = job.words();
    let store = low_bits(job.group());
    for g in 0..job.groups() {
        let lane = g * job.group();
        let lanes = job.lanes_of(g);
        for p in (0..pairs).step_by(16) {
            let left = job.k - 2 * p;
            let (low, high) = (low_bits(left), low_bits(left.saturating_sub(16)));
            let mut rows = [_mm512_setzero_si512(); 16];
            // SAFETY: only lanes below `job.lanes` and numbers below `job.k` are loaded (the masks), only pairs below `pairs` of one
            // group of a panel are stored, all of which the caller declared accessible.
            unsafe {
                for (l, row) in rows.iter_mut().enumerate() {
                    if l < lanes {
                        let at = job.src.add((lane + l) * job.lane_stride + 2 * p);
                        let first = _mm512_maskz_loadu_ps(low, at);
                        let second = _mm512_maskz_loadu_ps(high, at.wrapping_add(16));
                        *row = bits(_mm512_cvtne2ps_pbh(second, first));
                    }
                }
                transpose(&mut rows);
                let dst = job.dst_of(g).add(p * job.width);
                for (j, row) in rows.iter().enumerate() {
                    if j < pairs - p {
                        _mm512_mask_storeu_epi32(dst.add(j * job.width).cast(), store, *row);
                    }
                }
            }
        }
    }
}

/// Numbers contiguous along the lanes: two rows are rounded together and their halves interleaved.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn pack_across(job: &Packing) {
    // Word 2i takes number i of the first row, word 2i + 1 that of the second.
    let interleave: [u16; 32] = std::array::from_fn(|i| (i / 2 + i % 2 * 16) as u16);
    // SAFETY: 64 bytes of a local array.
    let interleave = unsafe { _mm512_loadu_si512(interleave.as_ptr().cast()) };
    let store = low_bits(job.group());
    for p in 0..job.k.div_ceil(2) {
        for g in 0..job.groups() {
            let load = low_bits(job.lanes_of(g));
            // An odd k has no second row at its end.
            let load_second = if 2 * p + 1 < job.k { load } else { 0 };
            // SAFETY: only lanes below `job.lanes` of rows below `job.k` are loaded (the masks), only this pair of one group of a
            // panel is stored, all of which the caller declared accessible. A prefetch may point anywhere.
            unsafe {
                let at = job.src.wrapping_add(2 * p * job.k_stride + g * job.group());
                let next = at.wrapping_add(job.k_stride);
                let ahead = PREFETCH_ROWS * job.k_stride;
                _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(ahead).cast());
                _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(ahead).cast());
                let first = _mm512_maskz_loadu_ps(load, at);
                let second = _mm512_maskz_loadu_ps(load_second, next);
                let both = bits(_mm512_cvtne2ps_pbh(second, first));
                _mm512_mask_storeu_epi32(
                    job.dst_of(g).add(p * job.width).cast(),
                    store,
                    _mm512_permutexvar_epi16(interleave, both),
                );
            }
        }
    }
}

/// Rows far apart defeat the hardware's prefetcher, which stays within a page.
const PREFETCH_ROWS: usize = 16;

fn bits(x: __m512bh) -> __m512i {
    // SAFETY: both types are 64 bytes of plain numbers.
    unsafe { std::mem::transmute(x) }
}

fn pairs(x: __m512i) -> __m512bh {
    // SAFETY: as above.
    unsafe { std::mem::transmute(x) }
}

/// `MULTIPLY[r - 1]` is for left panels of `r` lanes.
const MULTIPLY: [Multiply; MR] = [
    multiply::<1>,
    multiply::<2>,
    multiply::<3>,
    multiply::<4>,
    multiply::<5>,
    multiply::<6>,
    multiply::<7>,
    multiply::<8>,
    multiply::<9>,
    multiply::<10>,
    multiply::<11>,
    multiply::<12>,
    multiply::<13>,
    multiply::<14>,
];

/// Up to this many rows the right panels come from memory faster than they are multiplied only if they are asked for ahead of time.
const STREAMED_ROWS: usize = 8;
/// How far ahead: 3 KiB. Panels lie one after the other, so this reaches into the next one.
pub(super) const PREFETCH_WORDS: usize = 768;

/// # Safety
/// The processor has AVX512F, AVX512BW and AVX512_BF16; `a` has `n_pairs` x `R` words, `b` has `n_pairs` x [`NR`]; the tile's rows and
/// columns, at most `R` and [`NR`], are writable and nobody else's.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn multiply<const R: usize>(n_pairs: usize, a: *const u32, b: *const u32, tile: &Tile) {
    let mut sums = [[_mm512_setzero_ps(); 2]; R];
    for p in 0..n_pairs {
        // SAFETY: p < n_pairs, and the caller gave the sizes of `a` and `b`. A prefetch may point anywhere.
        unsafe {
            if R <= STREAMED_ROWS {
                let ahead = b.wrapping_add(p * NR + PREFETCH_WORDS);
                _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
                _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(16).cast());
            }
            let b0 = pairs(_mm512_loadu_si512(b.add(p * NR).cast()));
            let b1 = pairs(_mm512_loadu_si512(b.add(p * NR + 16).cast()));
            for (r, sums) in sums.iter_mut().enumerate() {
                let a = pairs(_mm512_set1_epi32(*a.add(p * R + r) as i32));
                sums[0] = _mm512_dpbf16_ps(sums[0], a, b0);
                sums[1] = _mm512_dpbf16_ps(sums[1], a, b1);
            }
        }
    }
    // SAFETY: the caller's tile.
    unsafe { write_tile(&sums, tile) }
}
