//! The backward pass of causal grouped-query attention, for packed sequences, some of which may share their beginnings.

use super::attention::{with_scratch, AttentionShape, SpanRows};
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

/// Backward of [`attention`](super::attention()) for training: probabilities are computed again, not stored.
/// Shapes: q, dout (t, h, e); k, v (s, g, e), where q has the rows of the spans themselves and k and v also those before them.
/// A key that several spans read has the sum of their gradients, added up in the order of the spans.
///
/// dV = Pᵀ dO, dS = P ∘ (dO Vᵀ − rowsum(dO Vᵀ ∘ P)), dQ = dS K / √e, dK = dSᵀ Q / √e (FlashAttention-2, arXiv:2307.08691, eq. 11).
pub fn attention_backward(
    pool: Option<&Pool>,
    shape: AttentionShape,
    (q, k, v, dout): (&[f32], &[f32], &[f32], &[f32]),
    spans: &[SpanRows],
    grad: AttentionGrad,
) {
    let (h, g, e) = (
        shape.num_attention_heads,
        shape.num_key_value_heads,
        shape.head_dim,
    );
    let scale = 1.0 / (e as f32).sqrt();
    grad.dk.fill(0.0);
    grad.dv.fill(0.0);
    let dq = SharedMut::new(grad.dq);
    // One item owns a key/value head of a span, so that the heads of its group add up without a race.
    let items: Vec<(usize, usize)> = (0..spans.len())
        .filter(|i| spans[*i].len > 0)
        .flat_map(|i| (0..g).map(move |kv| (i, kv)))
        .collect();
    let mut sums: Vec<Vec<f32>> = vec![Vec::new(); items.len()];
    let to_sum = SharedMut::new(&mut sums);
    let run = |item: usize| {
        let (i, kv_head) = items[item];
        let span = &spans[i];
        let (row, pos, n) = (span.row, span.pos(), span.pos() + span.len);
        let block = QUERY_BLOCK.min(span.len);
        let mut sums = vec![0f32; 2 * n * e];
        let (dk_sum, dv_sum) = sums.split_at_mut(n * e);
        with_scratch(2 * n * (e + block), |scratch| {
            let (keys, rest) = scratch.split_at_mut(n * e);
            let (values, rest) = rest.split_at_mut(n * e);
            let (probs, dscores) = rest.split_at_mut(block * n);
            gather(shape, span, kv_head, (k, keys));
            gather(shape, span, kv_head, (v, values));
            for head in kv_head * shape.group()..(kv_head + 1) * shape.group() {
                for q0 in (0..span.len).step_by(block) {
                    let m = block.min(span.len - q0);
                    let s = pos + q0 + m;
                    let first = (row + q0) * h * e + head * e;
                    let queries = Mat::strided(&q[first..], m, e, h * e);
                    let douts = Mat::strided(&dout[first..], m, e, h * e);
                    let (keys, values) = (Mat::new(keys, s, e), Mat::new(values, s, e));
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
                        values.t(),
                        1.0,
                        false,
                        MatMut::new(&mut dscores[..m * s], m, s),
                    );
                    for r in 0..m {
                        let visible = pos + q0 + r + 1;
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
        // SAFETY: the place of this item's sums belongs to it alone.
        let place = unsafe { to_sum.slice(item, 1) };
        place[0] = sums;
    };
    match pool {
        Some(pool) if items.len() > 1 => pool.run(items.len(), run),
        _ => (0..items.len()).for_each(run),
    }
    for (&(i, kv_head), sums) in items.iter().zip(&sums) {
        let (dk_sum, dv_sum) = sums.split_at(sums.len() / 2);
        for (sums, grad) in [(dk_sum, &mut *grad.dk), (dv_sum, &mut *grad.dv)] {
            for (row, sum) in spans[i].all().flatten().zip(sums.chunks_exact(e)) {
                let to = &mut grad[(row * g + kv_head) * e..][..e];
                to.iter_mut().zip(sum).for_each(|(to, from)| *to += from);
            }
        }
    }
}

/// One key/value head of all rows of a span (s, g, e) as (n, e).
fn gather(
    shape: AttentionShape,
    span: &SpanRows,
    kv_head: usize,
    (from, to): (&[f32], &mut [f32]),
) {
    let (g, e) = (shape.num_key_value_heads, shape.head_dim);
    for (row, to) in span.all().flatten().zip(to.chunks_exact_mut(e)) {
        to.copy_from_slice(&from[(row * g + kv_head) * e..][..e]);
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
    use std::ops::Range;

    use super::super::attention::tests::{numbers, slow, SHAPE};
    use super::super::attention::Span;
    use super::*;

    #[test]
    fn the_backward_pass_agrees_with_finite_differences() {
        let (g, e, h) = (2, 8, 6);
        // Two sequences of 9 and 75 tokens that begin with the same 5, and one alone.
        let span = |row, len, before: Option<Range<usize>>| SpanRows {
            row,
            len,
            before: before.into_iter().collect(),
        };
        let spans = [
            span(0, 5, None),
            span(5, 4, Some(0..5)),
            span(9, 70, Some(0..5)),
            span(79, 11, None),
        ];
        let t = 90;
        let (q, k, v) = (
            numbers(t * h * e, 1),
            numbers(t * g * e, 2),
            numbers(t * g * e, 3),
        );
        let dout = numbers(t * h * e, 4);
        let loss = |q: &[f32], k: &[f32], v: &[f32]| -> f64 {
            let picked = |from: &[f32], span: &SpanRows| -> Vec<f32> {
                let row = |row: usize| from[row * g * e..(row + 1) * g * e].to_vec();
                span.all().flatten().flat_map(row).collect()
            };
            spans
                .iter()
                .map(|rows| {
                    let span = Span {
                        row: rows.row,
                        len: rows.len,
                        pos: rows.pos(),
                        k: &picked(k, rows),
                        v: &picked(v, rows),
                    };
                    let out = slow(SHAPE, q, &span);
                    out.iter()
                        .zip(&dout[rows.row * h * e..])
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
            &spans,
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
        for at in (0..k.len()).step_by(31) {
            check(1, at, dk[at]);
            check(2, at, dv[at]);
        }
    }
}
