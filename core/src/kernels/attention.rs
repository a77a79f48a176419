//! Causal grouped-query attention over packed sequences, forward. Keys and values are read where they lie; scores
//! exist for one block of queries of one head at a time.

use std::cell::RefCell;

use super::matmul::{matmul, Mat, MatMut};
use super::pool::{Pool, SharedMut};
use super::simd;

/// Heads of an attention layer: `h` query heads share `g` key/value heads of `e` numbers each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
}

impl AttentionShape {
    pub(super) fn group(&self) -> usize {
        self.num_attention_heads / self.num_key_value_heads
    }
}

/// One sequence of a packed batch: queries in rows `row..row + len`, standing at positions `pos..pos + len`;
/// `k`, `v` (pos + len, g, e) hold its keys and values from position 0 on.
#[derive(Clone, Copy)]
pub struct Span<'a> {
    pub row: usize,
    pub len: usize,
    pub pos: usize,
    pub k: &'a [f32],
    pub v: &'a [f32],
}

/// Queries of one head whose scores are in memory at a time.
pub(super) const QUERY_BLOCK: usize = 64;

thread_local! {
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

pub(super) fn with_scratch<R>(len: usize, body: impl FnOnce(&mut [f32]) -> R) -> R {
    SCRATCH.with_borrow_mut(|buffer| {
        if buffer.len() < len {
            buffer.resize(len, 0.0);
        }
        body(&mut buffer[..len])
    })
}

/// `out = softmax(q kᵀ / √e + causal mask) v` for each span and head. Shapes: q, out (t, h, e), t the rows of all spans together.
///
/// # Panics
/// If a span reaches outside its buffers.
pub fn attention(
    pool: Option<&Pool>,
    shape: AttentionShape,
    q: &[f32],
    spans: &[Span],
    out: &mut [f32],
) {
    let (h, g, e) = (
        shape.num_attention_heads,
        shape.num_key_value_heads,
        shape.head_dim,
    );
    for span in spans {
        let s = span.pos + span.len;
        assert!(
            span.k.len() >= s * g * e
                && span.v.len() >= s * g * e
                && q.len() >= (span.row + span.len) * h * e
        );
    }
    assert!(out.len() >= q.len());
    let items: Vec<(usize, usize, usize)> = spans
        .iter()
        .enumerate()
        .flat_map(|(i, span)| {
            (0..h).flat_map(move |head| {
                (0..span.len)
                    .step_by(QUERY_BLOCK)
                    .map(move |q0| (i, head, q0))
            })
        })
        .collect();
    let shared = SharedMut::new(out);
    let scale = 1.0 / (e as f32).sqrt();
    let run = |item: usize| {
        let (i, head, q0) = items[item];
        let span = &spans[i];
        let n = QUERY_BLOCK.min(span.len - q0);
        let kv_head = head / shape.group();
        // Keys that the last query of the block may see.
        let s = span.pos + q0 + n;
        let first = (span.row + q0) * h * e + head * e;
        with_scratch(n * s, |scores| {
            if n <= 4 {
                for r in 0..n {
                    let query = &q[first + r * h * e..][..e];
                    let visible = span.pos + q0 + r + 1;
                    let row = &mut scores[r * s..][..visible];
                    for (j, score) in row.iter_mut().enumerate() {
                        *score = scale * simd::dot(query, &span.k[(j * g + kv_head) * e..][..e]);
                    }
                    softmax(row);
                    // SAFETY: this row and head belong to this item alone.
                    let out = unsafe { shared.slice(first + r * h * e, e) };
                    out.fill(0.0);
                    for (j, p) in row.iter().enumerate() {
                        simd::axpy(*p, &span.v[(j * g + kv_head) * e..][..e], out);
                    }
                }
                return;
            }
            let queries = Mat::strided(&q[first..], n, e, h * e);
            let keys = Mat::strided(&span.k[kv_head * e..], s, e, g * e);
            let values = Mat::strided(&span.v[kv_head * e..], s, e, g * e);
            matmul(
                None,
                queries,
                keys.t(),
                scale,
                false,
                MatMut::new(scores, n, s),
            );
            for r in 0..n {
                let visible = span.pos + q0 + r + 1;
                let row = &mut scores[r * s..(r + 1) * s];
                softmax(&mut row[..visible]);
                row[visible..].fill(0.0);
            }
            for r in 0..n {
                // SAFETY: as above.
                unsafe { shared.slice(first + r * h * e, e) }.fill(0.0);
            }
            with_output(&shared, first, n, e, h * e, |out| {
                matmul(None, Mat::new(scores, n, s), values, 1.0, false, out)
            });
        })
    };
    match pool {
        Some(pool) if items.len() > 1 => pool.run(items.len(), run),
        _ => (0..items.len()).for_each(run),
    }
}

/// Writes a strided block of (n, e) through a dense buffer, because two heads' rows interleave in memory.
pub(super) fn with_output(
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

/// `x = exp(x - max x) / Σ exp(x - max x)`.
pub(super) fn softmax(x: &mut [f32]) {
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for x in x.iter_mut() {
        *x = (*x - max).exp();
        sum += *x;
    }
    let inv = 1.0 / sum;
    x.iter_mut().for_each(|x| *x *= inv);
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn numbers(n: usize, seed: usize) -> Vec<f32> {
        (0..n)
            .map(|i| (((i + seed) * 7919 % 1009) as f32 - 504.0) / 504.0)
            .collect()
    }

    /// The definition, one query and one key at a time, in f64.
    pub fn slow(shape: AttentionShape, q: &[f32], span: &Span) -> Vec<f32> {
        let (h, g, e) = (
            shape.num_attention_heads,
            shape.num_key_value_heads,
            shape.head_dim,
        );
        let mut out = vec![0.0; span.len * h * e];
        for r in 0..span.len {
            for head in 0..h {
                let kv = head / (h / g);
                let score = |j: usize| -> f64 {
                    (0..e)
                        .map(|c| {
                            q[((span.row + r) * h + head) * e + c] as f64
                                * span.k[(j * g + kv) * e + c] as f64
                        })
                        .sum::<f64>()
                        / (e as f64).sqrt()
                };
                let weights: Vec<f64> = (0..=span.pos + r).map(|j| score(j).exp()).collect();
                let sum: f64 = weights.iter().sum();
                for c in 0..e {
                    out[(r * h + head) * e + c] = weights
                        .iter()
                        .enumerate()
                        .map(|(j, w)| w / sum * span.v[(j * g + kv) * e + c] as f64)
                        .sum::<f64>() as f32;
                }
            }
        }
        out
    }

    pub const SHAPE: AttentionShape = AttentionShape {
        num_attention_heads: 6,
        num_key_value_heads: 2,
        head_dim: 8,
    };

    #[test]
    fn attention_agrees_with_the_definition_for_prefill_decode_and_mixed_batches() {
        let pool = Pool::new(2, 0);
        let (g, e) = (2, 8);
        let lens = [(70, 0), (1, 33), (3, 0), (130, 5), (1, 0)];
        let t: usize = lens.iter().map(|l| l.0).sum();
        let q = numbers(t * 6 * e, 3);
        let caches: Vec<_> = lens
            .iter()
            .enumerate()
            .map(|(i, (len, pos))| {
                (
                    numbers((len + pos) * g * e, 10 + i),
                    numbers((len + pos) * g * e, 50 + i),
                )
            })
            .collect();
        let mut row = 0;
        let spans: Vec<Span> = lens
            .iter()
            .zip(&caches)
            .map(|(&(len, pos), (k, v))| {
                row += len;
                Span {
                    row: row - len,
                    len,
                    pos,
                    k,
                    v,
                }
            })
            .collect();
        let mut out = vec![9.0; q.len()];
        attention(Some(&pool), SHAPE, &q, &spans, &mut out);
        for span in &spans {
            let want = slow(SHAPE, &q, span);
            let got = &out[span.row * 6 * e..][..span.len * 6 * e];
            assert!(
                got.iter().zip(&want).all(|(g, w)| (g - w).abs() < 1e-5),
                "span at {}",
                span.row
            );
        }
    }
}
