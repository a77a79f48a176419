//! Matrix products on numbers rounded to bf16 and summed in `f32`: up to twice the speed of [`matmul`] where VDPBF16PS runs at full rate.

#[cfg(target_arch = "x86_64")]
use super::bf16_x86::Bf16;
use super::matmul::{matmul, Mat, MatMut};
use super::pool::Pool;
#[cfg(target_arch = "x86_64")]
use super::product_x86::{product, Right};

/// `x` rounded to the nearest bf16, ties to even. NaN stays NaN; what rounds beyond the largest bf16 becomes infinite.
pub fn round_bf16(x: f32) -> f32 {
    f32::from_bits((bf16_bits(x) as u32) << 16)
}

/// The upper 16 bits of `x` after rounding to the nearest bf16, ties to even.
pub(super) fn bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    if x.is_nan() {
        // Truncation could clear every bit of the fraction and so make an infinity.
        return (bits >> 16) as u16 | 0x40;
    }
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

/// Packed pairs, aligned to cache lines. A pair is the bf16 of an even k in the low half of a word, that of the next k in the high half.
#[derive(Clone, Copy, PartialEq)]
#[repr(C, align(64))]
pub(super) struct Line([u32; 16]);

impl Line {
    pub const ZERO: Self = Self([0; 16]);

    pub fn words(lines: &[Self]) -> &[u32] {
        // SAFETY: a line is 16 words and nothing else.
        unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), 16 * lines.len()) }
    }

    pub fn words_mut(lines: &mut [Self]) -> &mut [u32] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), 16 * lines.len()) }
    }
}

/// `out = scale · a b`, or `out += scale · a b` if `accumulate`, with a and b rounded to bf16 and products summed in `f32`.
/// Shapes: a (m, k), b (k, n), out (m, n).
///
/// Rounding is to nearest even; NaN stays NaN, and numbers below 2⁻¹²⁶ count as 0, as VDPBF16PS has it. Where the processor has no
/// AVX512_BF16 or runs it no faster ([`Features::avx512_bf16_full_rate`](super::Features)), and where the product is too small to pay
/// for packing, this is [`matmul`], which rounds nothing: more exact, not less.
/// A thread that calls it keeps a buffer of two bytes for each number of its largest `a`.
///
/// # Panics
/// If the shapes do not fit.
pub fn matmul_bf16(pool: Option<&Pool>, a: Mat, b: Mat, scale: f32, accumulate: bool, out: MatMut) {
    assert!(
        b.rows == a.cols && out.rows == a.rows && out.cols == b.cols,
        "({}, {}) x ({}, {}) -> ({}, {})",
        a.rows,
        a.cols,
        b.rows,
        b.cols,
        out.rows,
        out.cols
    );
    #[cfg(target_arch = "x86_64")]
    if super::simd::features().avx512_bf16_full_rate && worth_packing(&a, &b) {
        // SAFETY: the feature was detected, and the shapes fit.
        return unsafe { product::<Bf16>(pool, a, Right::Strided(b), scale, accumulate, out) };
    }
    matmul(pool, a, b, scale, accumulate, out)
}

/// Few rows or columns do not pay for packing the other operand, the less so when `gemm` reads `b` as it stands (contiguous along n);
/// with a short k, writing the result takes longer than computing it.
#[cfg(target_arch = "x86_64")]
fn worth_packing(a: &Mat, b: &Mat) -> bool {
    let rows_from = if b.col_stride == 1 { 24 } else { 8 };
    a.rows >= rows_from && b.cols >= 16 && a.cols >= 64
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn numbers(n: usize, seed: usize) -> Vec<f32> {
        (0..n)
            .map(|i| (((i + 1) * (seed * 2 + 7919) % 1009) as f32 - 504.3) / 504.0)
            .collect()
    }

    #[test]
    fn rounding_is_to_the_nearest_bf16_and_ties_go_to_even() {
        let one = 1.0f32.to_bits();
        for (bits, want) in [
            (one, one),
            (one + 0x7fff, one),
            (one + 0x8000, one),
            (one + 0x8001, one + 0x10000),
            (one + 0x18000, one + 0x20000),
            (f32::MAX.to_bits(), f32::INFINITY.to_bits()),
            (f32::INFINITY.to_bits(), f32::INFINITY.to_bits()),
            ((-0.0f32).to_bits(), (-0.0f32).to_bits()),
        ] {
            assert_eq!(
                round_bf16(f32::from_bits(bits)).to_bits(),
                want,
                "{bits:08x}"
            );
        }
        assert!(round_bf16(f32::NAN).is_nan());
        assert!(round_bf16(f32::from_bits(0x7f80_0001)).is_nan());
        assert!(round_bf16(f32::from_bits(0xffff_ffff)).is_nan());
    }

    #[cfg(target_arch = "x86_64")]
    mod x86 {
        use super::super::super::simd;
        use super::*;

        /// `(Σ a b, Σ |a b|)` of one element, on rounded numbers.
        fn slow(a: &Mat, b: &Mat, r: usize, c: usize) -> (f64, f64) {
            let terms = (0..a.cols).map(|i| {
                let x = a.data[r * a.row_stride + i * a.col_stride];
                let y = b.data[i * b.row_stride + c * b.col_stride];
                round_bf16(x) as f64 * round_bf16(y) as f64
            });
            terms.fold((0.0, 0.0), |(sum, size), x| (sum + x, size + x.abs()))
        }

        /// Checks `out` (m, n) inside rows of `n + gap`, first written, then added to with a scale.
        fn check(pool: Option<&Pool>, a: Mat, b: Mat, gap: usize) {
            let (m, k, n) = (a.rows, a.cols, b.cols);
            let stride = n + gap;
            let mut got = vec![7.0; m * stride];
            for (scale, accumulate, total) in [(1.0, false, 1.0), (-2.5, true, -1.5)] {
                let out = MatMut::strided(&mut got, m, n, stride);
                // SAFETY: the caller has seen the feature; the shapes fit.
                unsafe { product::<Bf16>(pool, a, Right::Strided(b), scale, accumulate, out) };
                for r in 0..m {
                    for c in 0..n {
                        let (sum, size) = slow(&a, &b, r, c);
                        let g = got[r * stride + c] as f64;
                        assert!(
                            (g - total * sum).abs() <= 1e-5 * size + 1e-30,
                            "{m} {k} {n} at {r} {c}: {g} instead of {}",
                            total * sum
                        );
                    }
                    assert!(
                        got[r * stride + n..(r + 1) * stride]
                            .iter()
                            .all(|x| *x == 7.0),
                        "wrote between the rows"
                    );
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
        fn products_agree_with_the_obvious_loop_on_rounded_numbers() {
            if !simd::features().avx512_bf16 {
                return;
            }
            let pool = Pool::new(3, 0);
            let sizes = [1, 2, 3, 15, 17, 31, 33, 63, 65, 100, 130];
            for (i, &m) in sizes.iter().enumerate() {
                for (j, &k) in sizes.iter().enumerate() {
                    // Every pair of sizes meets, for each two of the three axes.
                    check_layouts(Some(&pool), m, k, sizes[(i + j) % sizes.len()]);
                }
            }
        }

        #[test]
        fn products_agree_where_k_or_the_columns_or_the_rows_take_several_passes() {
            if !simd::features().avx512_bf16 {
                return;
            }
            let pool = Pool::new(2, 0);
            for pool in [None, Some(&pool)] {
                check_layouts(pool, 9, 1301, 33);
                check_layouts(pool, 29, 70, 290);
                check_layouts(pool, 8200, 5, 7);
                check_layouts(pool, 250, 64, 33);
            }
        }

        #[test]
        fn an_empty_sum_is_zero_and_nan_stays_nan() {
            if !simd::features().avx512_bf16 {
                return;
            }
            let mut out = vec![5.0; 12];
            let empty = || Right::Strided(Mat::new(&[], 0, 4));
            let a = Mat::new(&[], 3, 0);
            // SAFETY: the feature was seen above; the shapes fit.
            unsafe { product::<Bf16>(None, a, empty(), 1.0, true, MatMut::new(&mut out, 3, 4)) };
            assert!(out.iter().all(|x| *x == 5.0));
            // SAFETY: as above.
            unsafe { product::<Bf16>(None, a, empty(), 1.0, false, MatMut::new(&mut out, 3, 4)) };
            assert!(out.iter().all(|x| *x == 0.0));

            let (mut x, y) = (numbers(3 * 40, 1), numbers(40 * 4, 2));
            x[41] = f32::from_bits(0x7f80_0001);
            let (a, b) = (Mat::new(&x, 3, 40), Right::Strided(Mat::new(&y, 40, 4)));
            // SAFETY: as above.
            unsafe { product::<Bf16>(None, a, b, 1.0, false, MatMut::new(&mut out, 3, 4)) };
            let nan: Vec<bool> = out.iter().map(|x| x.is_nan()).collect();
            assert_eq!(nan, [[false; 4], [true; 4], [false; 4]].concat());
        }
    }

    #[test]
    fn the_door_agrees_with_the_exact_product_to_the_precision_of_bf16() {
        let pool = Pool::new(2, 0);
        for (m, k, n) in [(1, 3, 2), (9, 64, 40), (70, 130, 65)] {
            let (a, b) = (numbers(m * k, 1), numbers(k * n, 2));
            let (a, b) = (Mat::new(&a, m, k), Mat::new(&b, k, n));
            let (mut got, mut want) = (vec![0.0; m * n], vec![0.0; m * n]);
            matmul(None, a, b, 1.0, false, MatMut::new(&mut want, m, n));
            matmul_bf16(Some(&pool), a, b, 1.0, false, MatMut::new(&mut got, m, n));
            for (g, w) in got.iter().zip(&want) {
                assert!((g - w).abs() < 0.01 * k as f32, "{m} {k} {n}: {g} {w}");
            }
        }
    }
}
