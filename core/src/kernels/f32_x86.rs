//! The two inner loops of an `f32` product with AVX-512: packing, and multiplying a tile.

use std::arch::x86_64::*;

use super::product_x86::{
    low_bits, transpose, write_tile, Multiply, MultiplyRows, Numbers, Packing, Tile, MR, NR,
};

/// One `f32` a word.
pub(super) struct F32;

impl Numbers for F32 {
    const PER_WORD: usize = 1;
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
    const MULTIPLY_ROWS: Option<[MultiplyRows; MR]> = Some([
        multiply_rows::<1>,
        multiply_rows::<2>,
        multiply_rows::<3>,
        multiply_rows::<4>,
        multiply_rows::<5>,
        multiply_rows::<6>,
        multiply_rows::<7>,
        multiply_rows::<8>,
        multiply_rows::<9>,
        multiply_rows::<10>,
        multiply_rows::<11>,
        multiply_rows::<12>,
        multiply_rows::<13>,
        multiply_rows::<14>,
    ]);

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
}

/// Numbers contiguous along k: squares of 16 lanes by 16 numbers are transposed.
#[target_feature(enable = "avx512f")]
unsafe fn pack_along(job: &Packing) {
    let store = low_bits(job.group());
    for g in 0..job.groups() {
        let lane = g * job.group();
        let lanes = job.lanes_of(g);
        for i in (0..job.k).step_by(16) {
            let load = low_bits(job.k - i);
            let mut rows = [_mm512_setzero_si512(); 16];
            // SAFETY: only lanes below `job.lanes` and numbers below `job.k` are loaded (the mask), only numbers below `job.k` of one
            // group of a panel are stored, all of which the caller declared accessible.
            unsafe {
                for (l, row) in rows.iter_mut().enumerate() {
                    if l < lanes {
                        let at = job.src.add((lane + l) * job.lane_stride + i);
                        *row = _mm512_maskz_loadu_epi32(load, at.cast());
                    }
                }
                transpose(&mut rows);
                let dst = job.dst_of(g).add(i * job.width);
                for (j, row) in rows.iter().enumerate() {
                    if j < job.k - i {
                        _mm512_mask_storeu_epi32(dst.add(j * job.width).cast(), store, *row);
                    }
                }
            }
        }
    }
}

/// Numbers contiguous along the lanes: they are copied.
#[target_feature(enable = "avx512f")]
unsafe fn pack_across(job: &Packing) {
    let store = low_bits(job.group());
    for i in 0..job.k {
        for g in 0..job.groups() {
            let load = low_bits(job.lanes_of(g));
            // SAFETY: only lanes below `job.lanes` of rows below `job.k` are loaded (the mask), only this row of one group of a panel
            // is stored, all of which the caller declared accessible. A prefetch may point anywhere.
            unsafe {
                let at = job.src.wrapping_add(i * job.k_stride + g * job.group());
                _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(PREFETCH_ROWS * job.k_stride).cast());
                let row = _mm512_maskz_loadu_epi32(load, at.cast());
                _mm512_mask_storeu_epi32(job.dst_of(g).add(i * job.width).cast(), store, row);
            }
        }
    }
}

/// Rows far apart defeat the hardware's prefetcher, which stays within a page.
const PREFETCH_ROWS: usize = 16;

/// # Safety
/// The processor has AVX512F; `a` has `k` x `R` numbers, `b` has `k` x [`NR`]; the tile's rows and columns, at most `R` and [`NR`], are
/// writable and nobody else's.
#[target_feature(enable = "avx512f")]
unsafe fn multiply<const R: usize>(k: usize, a: *const u32, b: *const u32, tile: &Tile) {
    let (a, b): (*const f32, *const f32) = (a.cast(), b.cast());
    let mut sums = [[_mm512_setzero_ps(); 2]; R];
    for i in 0..k {
        // SAFETY: i < k, and the caller gave the sizes of `a` and `b`. A prefetch may point anywhere.
        unsafe {
            let ahead = b.wrapping_add((i + PREFETCH_STEPS) * NR);
            _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
            _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(16).cast());
            let b0 = _mm512_loadu_ps(b.add(i * NR));
            let b1 = _mm512_loadu_ps(b.add(i * NR + 16));
            for (r, sums) in sums.iter_mut().enumerate() {
                let a = _mm512_set1_ps(*a.add(i * R + r));
                sums[0] = _mm512_fmadd_ps(a, b0, sums[0]);
                sums[1] = _mm512_fmadd_ps(a, b1, sums[1]);
            }
        }
    }
    // SAFETY: the caller's tile.
    unsafe { write_tile(&sums, tile) }
}

/// # Safety
/// As [`multiply`]; row `r < R` of the left operand has `k` numbers from `a.0 + r * a.1` on.
#[target_feature(enable = "avx512f")]
unsafe fn multiply_rows<const R: usize>(
    k: usize,
    (a, stride): (*const f32, usize),
    b: *const u32,
    tile: &Tile,
) {
    let b: *const f32 = b.cast();
    let mut sums = [[_mm512_setzero_ps(); 2]; R];
    // Three rows share a pointer, for an address can hold one or two strides beside it: so all of them stay in registers.
    let mut rows: [*const f32; 5] = std::array::from_fn(|i| a.wrapping_add(3 * i * stride));
    for i in 0..k {
        // SAFETY: i < k, and the caller gave the sizes of `a` and `b`. A prefetch may point anywhere.
        unsafe {
            let ahead = b.wrapping_add((i + PREFETCH_STEPS) * NR);
            _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
            _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(16).cast());
            let b0 = _mm512_loadu_ps(b.add(i * NR));
            let b1 = _mm512_loadu_ps(b.add(i * NR + 16));
            // Compilers load all rows' numbers first and then have no registers left for the sums; assembly stays where it stands.
            macro_rules! add {
                ($r:literal: $row:literal, $at:literal $(, $name:ident = $stride:expr)?) => {
                    if R > $r {
                        std::arch::asm!(
                            concat!("vbroadcastss {a}, dword ptr [{row}", $at, "]"),
                            "vfmadd231ps {low}, {a}, {b0}",
                            "vfmadd231ps {high}, {a}, {b1}",
                            a = out(zmm_reg) _,
                            row = in(reg) rows[$row],
                            $($name = in(reg) $stride,)?
                            low = inout(zmm_reg) sums[$r][0],
                            high = inout(zmm_reg) sums[$r][1],
                            b0 = in(zmm_reg) b0,
                            b1 = in(zmm_reg) b1,
                            options(nostack, preserves_flags, readonly),
                        );
                    }
                };
            }
            // A stride is so many numbers of four bytes: the second and the third row are four and eight times that away.
            add!(0: 0, "");
            add!(1: 0, " + {by}*4", by = stride);
            add!(2: 0, " + {by}*8", by = stride);
            add!(3: 1, "");
            add!(4: 1, " + {by}*4", by = stride);
            add!(5: 1, " + {by}*8", by = stride);
            add!(6: 2, "");
            add!(7: 2, " + {by}*4", by = stride);
            add!(8: 2, " + {by}*8", by = stride);
            add!(9: 3, "");
            add!(10: 3, " + {by}*4", by = stride);
            add!(11: 3, " + {by}*8", by = stride);
            add!(12: 4, "");
            add!(13: 4, " + {by}*4", by = stride);
            for row in &mut rows {
                *row = row.wrapping_add(1);
            }
        }
    }
    // SAFETY: the caller's tile.
    unsafe { write_tile(&sums, tile) }
}

/// Right panels come from the second-level cache, some 15 cycles away; a step of 14 rows takes 14.
const PREFETCH_STEPS: usize = 4;

#[cfg(test)]
mod tests {
    use super::super::matmul::{Mat, MatMut};
    use super::super::pool::Pool;
    use super::super::product_x86::{product, Right};
    use super::super::simd;
    use super::*;

    fn numbers(n: usize, seed: usize) -> Vec<f32> {
        (0..n)
            .map(|i| (((i + 1) * (seed * 2 + 7919) % 1009) as f32 - 504.3) / 504.0)
            .collect()
    }

    /// Checks `out` (m, n) inside rows of `n + gap` against the obvious loop in f64, first written, then added to with a scale.
    fn check(pool: Option<&Pool>, a: Mat, b: Mat, gap: usize) {
        let (m, k, n) = (a.rows, a.cols, b.cols);
        let stride = n + gap;
        let mut got = vec![7.0; m * stride];
        let want: Vec<f64> = (0..m * n)
            .map(|at| {
                let (r, c) = (at / n, at % n);
                let terms = (0..k).map(|i| {
                    let x = a.data[r * a.row_stride + i * a.col_stride];
                    x as f64 * b.data[i * b.row_stride + c * b.col_stride] as f64
                });
                terms.sum()
            })
            .collect();
        for (scale, accumulate, total) in [(1.0, false, 1.0), (-2.5, true, -1.5)] {
            let out = MatMut::strided(&mut got, m, n, stride);
            // SAFETY: the caller has seen the feature; the shapes fit.
            unsafe { product::<F32>(pool, a, Right::Strided(b), scale, accumulate, out) };
            for r in 0..m {
                for c in 0..n {
                    let (g, w) = (got[r * stride + c] as f64, total * want[r * n + c]);
                    assert!(
                        (g - w).abs() <= 2e-6 * k as f64,
                        "{m} {k} {n} at {r} {c}: {g} {w}"
                    );
                }
                let between = &got[r * stride + n..(r + 1) * stride];
                assert!(between.iter().all(|x| *x == 7.0), "wrote between the rows");
            }
        }
    }

    /// All layouts of the operands, dense and inside wider buffers.
    fn check_layouts(pool: Option<&Pool>, m: usize, k: usize, n: usize) {
        for gap in [0, 3] {
            let (a, b) = (
                numbers((m + gap) * (k + gap), 1),
                numbers((k + gap) * (n + gap), 2),
            );
            for a in [
                Mat::strided(&a, m, k, k + gap),
                Mat::strided(&a, k, m, m + gap).t(),
            ] {
                for b in [
                    Mat::strided(&b, k, n, n + gap),
                    Mat::strided(&b, n, k, k + gap).t(),
                ] {
                    check(pool, a, b, gap);
                }
            }
        }
    }

    #[test]
    fn products_agree_with_the_obvious_loop_over_all_layouts() {
        if !simd::features().avx512 {
            return;
        }
        let pool = Pool::new(3, 0);
        let sizes = [1, 2, 3, 15, 17, 31, 33, 63, 65, 100, 130];
        for (i, &m) in sizes.iter().enumerate() {
            for (j, &k) in sizes.iter().enumerate() {
                check_layouts(Some(&pool), m, k, sizes[(i + j) % sizes.len()]);
            }
        }
    }

    #[test]
    fn products_agree_where_an_axis_takes_several_passes() {
        if !simd::features().avx512 {
            return;
        }
        let pool = Pool::new(2, 0);
        for pool in [None, Some(&pool)] {
            check_layouts(pool, 9, 1301, 33);
            check_layouts(pool, 29, 70, 290);
            check_layouts(pool, 8200, 5, 7);
            // The left operand is cut along k, then along its rows.
            check_layouts(pool, 30, 140_001, 2);
            check_layouts(pool, 33_000, 130, 2);
        }
    }
}
