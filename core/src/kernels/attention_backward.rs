//! The backward pass of causal grouped-query attention, for packed sequences that are there from their beginning.

use super::attention::{with_scratch, AttentionShape};
use super::matmul::{matmul, Mat, MatMut};
use super::pool::{Pool, SharedMut};
use super::simd;
use super::softmax::softmax;

/// Queries of one head whose scores are in memory at a time.
const QUERY_BLOCK: usize = 64;

/// Where [`attention_backward`] puts its gradients; all are overwritten. dq (t, h, e); dk, dv (t, g, e).
pub struct AttentionGrad<'a> {
    pub dq: &'a mut [f32],
    pub dk: &'a mut [f32],
    pub dv: &'a mut [f32],
}

/// Backward of [`attention`](super::attention()) for spans that start at position 0 (training): probabilities are computed again, not stored.
/// Shapes: q, dout (t, h, e); k, v (t, g, e) packed like q; `rows` lists (first row, length) of each sequence.
///
/// dV = Pᵀ dO, dS = P ∘ (dO Vᵀ − rowsum(dO Vᵀ ∘ P)), dQ = dS K / √e, dK = dSᵀ Q / √e (FlashAttention-2, arXiv:2307.08691, eq. 11).
pub fn attention_backward(
    pool: Option<&Pool>,
    shape: AttentionShape,
    (q, k, v, dout): (&[f32], &[f32], &[f32], &[f32]),
    rows: &[(usize, usize)],
    grad: AttentionGrad,
) {
    let (h, g, e) = (
        shape.num_attention_heads,
        shape.num_key_value_heads,
        shape.head_dim,
    );
    let scale = 1.0 / (e as f32).sqrt();
    let (dq, dk, dv) = (
        SharedMut::new(grad.dq),
        SharedMut::new(grad.dk),
        SharedMut::new(grad.dv),
    );
    // One item owns a key/value head of a sequence, so that the heads of its group add up without a race.
    let items: Vec<(usize, usize)> = (0..rows.len())
        .flat_map(|i| (0..g).map(move |kv| (i, kv)))
        .collect();
    let run = |item: usize| {
        let (i, kv_head) = items[item];
        let (row, n) = rows[i];
        let block = QUERY_BLOCK.min(n);
        let mut dk_sum = vec![0f32; n * e];
        let mut dv_sum = vec![0f32; n * e];
        with_scratch(2 * block * n, |scratch| {
            let (probs, dscores) = scratch.split_at_mut(block * n);
            for head in kv_head * shape.group()..(kv_head + 1) * shape.group() {
                for q0 in (0..n).step_by(block) {
                    let m = block.min(n - q0);
                    let s = q0 + m;
                    let first = (row + q0) * h * e + head * e;
                    let queries = Mat::strided(&q[first..], m, e, h * e);
                    let douts = Mat::strided(&dout[first..], m, e, h * e);
                    let keys = Mat::strided(&k[(row * g + kv_head) * e..], s, e, g * e);
                    let seen = Mat::strided(&v[(row * g + kv_head) * e..], s, e, g * e);
                    matmul(
                        None,
                        queries,
                        keys.t(),
                        scale,
                        false,
                        MatMut::new(&mut probs[..m * s], m, s),
                    );
                    matmul(
                        None,
                        douts,
                        seen.t(),
                        1.0,
                        false,
                        MatMut::new(&mut dscores[..m * s], m, s),
                    );
                    for r in 0..m {
                        let visible = q0 + r + 1;
                        let p = &mut probs[r * s..(r + 1) * s];
                        softmax(&mut p[..visible]);
                        p[visible..].fill(0.0);
                        let ds = &mut dscores[r * s..(r + 1) * s];
                        let mean = simd::dot(&p[..visible], &ds[..visible]);
                        for (ds, p) in ds.iter_mut().zip(p.iter()) {
                            *ds = *p * (*ds - mean) * scale;
                        }
                    }
                    let (p, ds) = (
                        Mat::new(&probs[..m * s], m, s),
                        Mat::new(&dscores[..m * s], m, s),
                    );
                    matmul(
                        None,
                        p.t(),
                        douts,
                        1.0,
                        true,
                        MatMut::new(&mut dv_sum[..s * e], s, e),
                    );
                    matmul(
                        None,
                        ds.t(),
                        queries,
                        1.0,
                        true,
                        MatMut::new(&mut dk_sum[..s * e], s, e),
                    );
                    with_output(&dq, first, m, e, h * e, |out| {
                        matmul(None, ds, keys, 1.0, false, out)
                    });
                }
            }
        });
        for r in 0..n {
            let at = ((row + r) * g + kv_head) * e;
            // SAFETY: this key/value head of this sequence belongs to this item alone.
            unsafe {
                dk.slice(at, e).copy_from_slice(&dk_sum[r * e..(r + 1) * e]);
                dv.slice(at, e).copy_from_slice(&dv_sum[r * e..(r + 1) * e]);
            }
        }
    };
    match pool {
        Some(pool) if items.len() > 1 => pool.run(items.len(), run),
        _ => (0..items.len()).for_each(run),
    }
}

/// Writes a strided block of (n, e) through a dense buffer, because two heads' rows interleave in memory.
fn with_output(
    shared: &SharedMut<f32>,
    first: usize,
    n: usize,
    e: usize,
    stride: usize,
    fill: impl FnOnce(MatMut),
) {
    let mut dense = [0f32; QUERY_BLOCK * 256];
    let mut big;
    let dense: &mut [f32] = if n * e <= dense.len() {
        &mut dense[..n * e]
    } else {
        big = vec![0.0; n * e];
        &mut big
    };
    fill(MatMut::new(dense, n, e));
    for r in 0..n {
        // SAFETY: the callers' items own these rows of this head.
        unsafe { shared.slice(first + r * stride, e) }.copy_from_slice(&dense[r * e..(r + 1) * e]);
    }
}

#[cfg(test)]
mod tests {
    use super::super::attention::tests::{numbers, slow, SHAPE};
    use super::super::attention::Span;
    use super::*;

    #[test]
    fn the_backward_pass_agrees_with_finite_differences() {
        let (g, e, h) = (2, 8, 6);
        let rows = [(0, 5), (5, 70)];
        let t = 75;
        let (q, k, v) = (
            numbers(t * h * e, 1),
            numbers(t * g * e, 2),
            numbers(t * g * e, 3),
        );
        let dout = numbers(t * h * e, 4);
        let loss = |q: &[f32], k: &[f32], v: &[f32]| -> f64 {
            rows.iter()
                .map(|&(row, len)| {
                    let span = Span {
                        row,
                        len,
                        pos: 0,
                        k: &k[row * g * e..],
                        v: &v[row * g * e..],
                    };
                    let out = slow(SHAPE, q, &span);
                    out.iter()
                        .zip(&dout[row * h * e..])
                        .map(|(o, d)| *o as f64 * *d as f64)
                        .sum::<f64>()
                })
                .sum()
        };
        let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
        let grad = AttentionGrad {
            dq: &mut dq,
            dk: &mut dk,
            dv: &mut dv,
        };
        attention_backward(
            Some(&Pool::new(2, 0)),
            SHAPE,
            (&q, &k, &v, &dout),
            &rows,
            grad,
        );
        let check = |which: usize, at: usize, got: f32| {
            let eps = 1e-2;
            let moved = |by: f32| {
                let (mut q, mut k, mut v) = (q.clone(), k.clone(), v.clone());
                [&mut q, &mut k, &mut v][which][at] += by;
                loss(&q, &k, &v)
            };
            let want = ((moved(eps) - moved(-eps)) / (2.0 * eps as f64)) as f32;
            assert!(
                (got - want).abs() < 2e-3 + 1e-2 * want.abs(),
                "{which} {at}: {got} {want}"
            );
        };
        for at in (0..q.len()).step_by(401) {
            check(0, at, dq[at]);
        }
        for at in (0..k.len()).step_by(97) {
            check(1, at, dk[at]);
            check(2, at, dv[at]);
        }
    }
}
