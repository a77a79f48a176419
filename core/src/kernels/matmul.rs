//! Matrix products: blocks in AVX-512 where there is that, the `gemm` crate elsewhere and for what is small, dot products for few
//! rows, all split over the pool.

#[cfg(target_arch = "x86_64")]
use super::f32_x86::F32;
use super::pool::{Pool, SharedMut};
#[cfg(target_arch = "x86_64")]
use super::product_x86::{product, Right};
use super::simd;

/// A strided matrix to read: element (r, c) stands at `data[r * row_stride + c * col_stride]`.
#[derive(Clone, Copy)]
pub struct Mat<'a> {
    pub(super) data: &'a [f32],
    pub rows: usize,
    pub cols: usize,
    pub(super) row_stride: usize,
    pub(super) col_stride: usize,
}

impl<'a> Mat<'a> {
    /// Row-major (rows, cols).
    ///
    /// # Panics
    /// If `data` holds fewer elements.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// Row-major (rows, cols) inside a wider buffer: consecutive rows are `stride` apart.
    ///
    /// # Panics
    /// If `data` ends before the last row does.
    pub fn strided(data: &'a [f32], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(
            rows == 0 || cols == 0 || (rows - 1) * stride + cols <= data.len(),
            "matrix outside its buffer"
        );
        Self {
            data,
            rows,
            cols,
            row_stride: stride,
            col_stride: 1,
        }
    }

    /// The transpose; no data moves.
    pub fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }
}

/// A row-major matrix to write, possibly inside a wider buffer.
pub struct MatMut<'a> {
    pub(super) data: &'a mut [f32],
    pub rows: usize,
    pub cols: usize,
    pub(super) stride: usize,
}

impl<'a> MatMut<'a> {
    /// Row-major (rows, cols).
    ///
    /// # Panics
    /// If `data` holds fewer elements.
    pub fn new(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// Consecutive rows are `stride` apart.
    ///
    /// # Panics
    /// If `data` ends before the last row does.
    pub fn strided(data: &'a mut [f32], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(
            rows == 0 || cols == 0 || (rows - 1) * stride + cols <= data.len(),
            "matrix outside its buffer"
        );
        Self {
            data,
            rows,
            cols,
            stride,
        }
    }
}

/// `out = scale · a b`, or `out += scale · a b` if `accumulate`. Shapes: a (m, k), b (k, n), out (m, n).
///
/// Work is cut along the longer side of `out`, one piece a thread of `pool`; `None` runs on the calling thread.
///
/// # Panics
/// If the shapes do not fit.
pub fn matmul(pool: Option<&Pool>, a: Mat, b: Mat, scale: f32, accumulate: bool, out: MatMut) {
    let (m, k, n) = (a.rows, a.cols, b.cols);
    assert!(
        b.rows == k && out.rows == m && out.cols == n,
        "({m}, {k}) x ({}, {n}) -> ({}, {})",
        b.rows,
        out.rows,
        out.cols
    );
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        if !accumulate {
            for row in out.data.chunks_mut(out.stride).take(m) {
                row[..n].fill(0.0);
            }
        }
        return;
    }
    #[cfg(target_arch = "x86_64")]
    if simd::features().avx512 && worth_packing(&a, &b) {
        // SAFETY: the feature was detected, and the shapes fit.
        return unsafe { product::<F32>(pool, a, Right::Strided(b), scale, accumulate, out) };
    }
    let by_rows = m >= n;
    let threads = match pool {
        // Below this a second thread costs more than it brings.
        Some(pool) if m * n * k >= 1 << 17 => pool.threads(),
        _ => 1,
    };
    let side = if by_rows { m } else { n };
    let piece = side.div_ceil(threads).next_multiple_of(16);
    let parts = side.div_ceil(piece);
    let stride = out.stride;
    let shared = SharedMut::new(out.data);
    let run = |part: usize| {
        let start = part * piece;
        let len = piece.min(side - start);
        let (r0, rows, c0, cols) = if by_rows {
            (start, len, 0, n)
        } else {
            (0, m, start, len)
        };
        // SAFETY: the constructors checked that each matrix lies inside its buffer; parts write to disjoint rows or columns.
        unsafe {
            gemm::gemm(
                rows,
                cols,
                k,
                shared.as_ptr().add(r0 * stride + c0),
                1,
                stride as isize,
                accumulate,
                a.data.as_ptr().add(r0 * a.row_stride),
                a.col_stride as isize,
                a.row_stride as isize,
                b.data.as_ptr().add(c0 * b.col_stride),
                b.col_stride as isize,
                b.row_stride as isize,
                1.0f32,
                scale,
                false,
                false,
                false,
                gemm::Parallelism::None,
            )
        }
    };
    match pool {
        Some(pool) if parts > 1 => pool.run(parts, run),
        _ => (0..parts).for_each(run),
    }
}

/// Few rows or columns do not pay for packing the other operand.
#[cfg(target_arch = "x86_64")]
fn worth_packing(a: &Mat, b: &Mat) -> bool {
    let unit = |m: &Mat| m.row_stride == 1 || m.col_stride == 1;
    a.rows >= 16 && b.cols >= 16 && a.cols >= 16 && unit(a) && unit(b)
}

/// `out = x wᵀ` for a few rows: x (m, k), w (n, k), out (m, n), all dense. One pass over `w`, so it runs at the speed of memory.
///
/// # Panics
/// If the shapes do not fit.
pub fn matmul_nt_small(
    pool: Option<&Pool>,
    x: &[f32],
    w: &[f32],
    m: usize,
    k: usize,
    n: usize,
    out: &mut [f32],
) {
    assert!(x.len() >= m * k && w.len() >= n * k && out.len() >= m * n);
    let threads = match pool {
        Some(pool) if n * k >= 1 << 15 => pool.threads(),
        _ => 1,
    };
    // A few pieces a thread, so that a thread the host has taken away does not hold up the others.
    let piece = n
        .div_ceil(threads * if threads > 1 { 4 } else { 1 })
        .next_multiple_of(8);
    let parts = n.div_ceil(piece);
    let shared = SharedMut::new(out);
    let run = |part: usize| {
        let start = part * piece;
        let end = (start + piece).min(n);
        for j in start..end {
            let row = &w[j * k..(j + 1) * k];
            for i in 0..m {
                // SAFETY: column j of out belongs to this part alone.
                unsafe { shared.slice(i * n + j, 1)[0] = simd::dot(&x[i * k..(i + 1) * k], row) };
            }
        }
    };
    match pool {
        Some(pool) if parts > 1 => pool.run(parts, run),
        _ => (0..parts).for_each(run),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize, seed: usize) -> Vec<f32> {
        (0..n)
            .map(|i| (((i + 1) * (seed * 2 + 7919) % 1009) as f32 - 504.0) / 504.0)
            .collect()
    }

    fn slow(a: Mat, b: Mat) -> Vec<f32> {
        let mut out = vec![0.0; a.rows * b.cols];
        for r in 0..a.rows {
            for c in 0..b.cols {
                out[r * b.cols + c] = (0..a.cols)
                    .map(|i| {
                        a.data[r * a.row_stride + i * a.col_stride]
                            * b.data[i * b.row_stride + c * b.col_stride]
                    })
                    .sum();
            }
        }
        out
    }

    /// All transposes, with and without what is there already, against the obvious loop.
    fn check(pool: &Pool, m: usize, k: usize, n: usize) {
        let (a, b) = (numbers(m * k, 1), numbers(k * n, 2));
        for (ma, mb) in [
            (Mat::new(&a, m, k), Mat::new(&b, k, n)),
            (Mat::new(&a, m, k), Mat::new(&b, n, k).t()),
            (Mat::new(&a, k, m).t(), Mat::new(&b, k, n)),
        ] {
            let want = slow(ma, mb);
            let mut got = vec![1.0; m * n];
            matmul(Some(pool), ma, mb, 1.0, false, MatMut::new(&mut got, m, n));
            for (g, w) in got.iter().zip(&want) {
                assert!((g - w).abs() < 1e-3, "{m} {k} {n}: {g} {w}");
            }
            matmul(Some(pool), ma, mb, 2.0, true, MatMut::new(&mut got, m, n));
            for (g, w) in got.iter().zip(&want) {
                assert!((g - 3.0 * w).abs() < 3e-3, "{m} {k} {n}: {g} {w}");
            }
        }
        let want = slow(Mat::new(&a, m, k), Mat::new(&b, n, k).t());
        let mut got = vec![0.0; m * n];
        matmul_nt_small(Some(pool), &a, &b, m, k, n, &mut got);
        assert!(got.iter().zip(&want).all(|(g, w)| (g - w).abs() < 1e-3));
    }

    #[test]
    fn products_agree_with_the_obvious_loop_over_odd_shapes_and_transposes() {
        let pool = Pool::new(2, 0);
        for (m, k, n) in [
            (1, 1, 1),
            (3, 5, 7),
            (17, 33, 9),
            (64, 64, 64),
            (130, 65, 31),
            (31, 65, 200),
            (256, 100, 90),
        ] {
            check(&pool, m, k, n);
        }
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(100))]
        #[test]
        fn products_agree_with_the_obvious_loop_for_any_shape(m in 1usize..150, k in 1usize..150, n in 1usize..150) {
            check(&Pool::new(2, 0), m, k, n);
        }
    }
}
