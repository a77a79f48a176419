//! The equations of one chunk, as pure functions: filter, target, update, and their backward passes.

use std::ops::Range;

use super::quantised::BLOCK_ROWS;
use super::TttLayer;
use crate::kernels::{
    add_product, axpy, dot, matmul, matmul_nt_small, Mat, MatMut, Pool, SharedMut,
};

/// Rows up to which a product is memory-bound and read row by row, as in the model's own products.
const SMALL_ROWS: usize = 6;
/// Rows that one part filters: some 10 µs.
const FILTERED_ROWS: usize = 32;

/// The down-projection `y = z wᵀ`: z (t, f), w (d, f), y (t, d). The model's own product, so a weight that is still the trained one gives
/// the plain model's numbers.
///
/// # Panics
/// If the lengths do not fit.
pub fn down(pool: Option<&Pool>, z: &[f32], w: &[f32], (d, f): (usize, usize), y: &mut [f32]) {
    let t = z.len() / f;
    if t <= SMALL_ROWS {
        matmul_nt_small(pool, z, w, t, f, d, y);
    } else {
        let (z, w) = (Mat::new(z, t, f), Mat::new(w, d, f));
        matmul(pool, z, w.t(), 1.0, false, MatMut::new(y, t, d));
    }
}

/// `conv(u)` of rows `rows` of a chunk, (rows, d), from those of its rows that are there: u (n, d). Rows behind `n` count as zeros,
/// so `rows` may reach the last k/2 of them only where the chunk ends.
pub(super) fn filter(
    pool: Option<&Pool>,
    conv: &[f32],
    u: &[f32],
    rows: Range<usize>,
    d: usize,
) -> Vec<f32> {
    let taps = Taps::new(conv, d);
    let n = u.len() / d;
    let mut out = vec![0.0; rows.len() * d];
    let shared = SharedMut::new(&mut out);
    let piece = match pool {
        Some(_) => FILTERED_ROWS,
        None => rows.len().max(1),
    };
    run(pool, rows.len().div_ceil(piece), |part| {
        let rows = rows.start + part * piece..rows.end.min(rows.start + (part + 1) * piece);
        // SAFETY: each part has rows of its own.
        let out = unsafe { shared.slice(part * piece * d, rows.len() * d) };
        for (j, out) in rows.zip(out.chunks_exact_mut(d)) {
            for (tap, from) in taps.around(j, n) {
                add_product(tap, &u[from * d..(from + 1) * d], out);
            }
        }
    });
    out
}

/// Backward of [`filter`] over a whole chunk: adds to `du` (n, d), and to `dconv` (d, 1, k) where given.
pub(super) fn filter_backward(
    conv: &[f32],
    u: &[f32],
    dout: &[f32],
    du: Option<&mut [f32]>,
    dconv: Option<&mut [f32]>,
    d: usize,
) {
    let taps = Taps::new(conv, d);
    let n = u.len() / d;
    if let Some(du) = du {
        for (j, dout) in dout.chunks_exact(d).enumerate() {
            for (tap, from) in taps.around(j, n) {
                let du = &mut du[from * d..(from + 1) * d];
                for ((du, tap), dout) in du.iter_mut().zip(tap).zip(dout) {
                    *du += tap * dout;
                }
            }
        }
    }
    if let Some(dconv) = dconv {
        let k = conv.len() / d;
        let mut sums = vec![0.0; k * d];
        for (i, sum) in sums.chunks_exact_mut(d).enumerate() {
            for (j, dout) in dout.chunks_exact(d).enumerate() {
                let Some(from) = (j + i).checked_sub(k / 2).filter(|from| *from < n) else {
                    continue;
                };
                let u = &u[from * d..(from + 1) * d];
                for ((sum, dout), u) in sum.iter_mut().zip(dout).zip(u) {
                    *sum += dout * u;
                }
            }
        }
        for (channel, taps) in dconv.chunks_exact_mut(k).enumerate() {
            for (i, tap) in taps.iter_mut().enumerate() {
                *tap += sums[i * d + channel];
            }
        }
    }
}

/// The filter with its channels side by side (k, d), so that a tap is one pass along a row.
struct Taps {
    by_tap: Vec<f32>,
    d: usize,
}

impl Taps {
    fn new(conv: &[f32], d: usize) -> Self {
        let k = conv.len() / d;
        let mut by_tap = vec![0.0; k * d];
        for (channel, taps) in conv.chunks_exact(k).enumerate() {
            for (i, tap) in taps.iter().enumerate() {
                by_tap[i * d + channel] = *tap;
            }
        }
        Self { by_tap, d }
    }

    /// Taps that row `j` of a chunk with `n` rows has something under, and the row under each.
    fn around(&self, j: usize, n: usize) -> impl Iterator<Item = (&[f32], usize)> {
        let half = self.by_tap.len() / self.d / 2;
        let taps = self.by_tap.chunks_exact(self.d).enumerate();
        taps.filter_map(move |(i, tap)| {
            Some((tap, (j + i).checked_sub(half).filter(|at| *at < n)?))
        })
    }
}

/// `v = conv(u) P` of rows `rows` of a chunk, (rows, d); see [`filter`].
pub(super) fn target(
    pool: Option<&Pool>,
    layer: TttLayer,
    u: &[f32],
    rows: Range<usize>,
    d: usize,
) -> Vec<f32> {
    let n = rows.len();
    let filtered = filter(pool, layer.conv, u, rows, d);
    let Some(proj) = layer.proj else {
        return filtered;
    };
    // A filter of zeros has a target of zeros.
    if is_zero(&filtered) {
        return filtered;
    }
    let mut v = vec![0.0; n * d];
    if let Some(packed) = layer.packed_proj {
        packed.product(pool, &filtered, n, &mut v);
        return v;
    }
    let (filtered, proj) = (Mat::new(&filtered, n, d), Mat::new(proj, d, d));
    matmul(pool, filtered, proj, 1.0, false, MatMut::new(&mut v, n, d));
    v
}

/// Whether every number is 0, of either sign.
pub(super) fn is_zero(x: &[f32]) -> bool {
    // In pieces, so that the common answer comes early and each piece is one pass without branches.
    x.chunks(256)
        .all(|part| part.iter().fold(0, |bits, x| bits | (x.to_bits() << 1)) == 0)
}

/// `w += lr · vᵀ z`: v (n, d), z (n, f), w (d, f).
pub(super) fn add_outer(
    pool: Option<&Pool>,
    (v, z): (&[f32], &[f32]),
    lr: f32,
    (d, f): (usize, usize),
    w: &mut [f32],
) {
    let n = v.len() / d;
    let (v, z) = (Mat::new(v, n, d), Mat::new(z, n, f));
    matmul(pool, v.t(), z, lr, true, MatMut::new(w, d, f));
}

/// `w += scale · step`.
pub(super) fn add_scaled(pool: Option<&Pool>, step: &[f32], scale: f32, w: &mut [f32]) {
    assert_eq!(step.len(), w.len());
    let piece = pieces(pool, w.len());
    let shared = SharedMut::new(w);
    run(pool, shared.len().div_ceil(piece), |part| {
        let from = part * piece;
        let n = piece.min(shared.len() - from);
        // SAFETY: each part has numbers of its own.
        let w = unsafe { shared.slice(from, n) };
        axpy(scale, &step[from..from + n], w);
    });
}

/// `w − start`, of matrices of one shape.
pub(super) fn change(pool: Option<&Pool>, w: &[f32], start: &[f32]) -> Vec<f32> {
    let mut change = w.to_vec();
    add_scaled(pool, start, -1.0, &mut change);
    change
}

/// The delta rule's part of the targets of some rows ([`Forgetting::Delta`](super::Forgetting::Delta)): `v −= κ D z` with
/// `κ = rate / ‖z‖²` and `rate = β / (η c)`. Shapes: change D (d, f), z (n, f), v (n, d). A row of zeros has no direction to correct.
///
/// In blocks, so that rows taken block by block have the numbers, to the bit, of all at once: which product is used, and with it the
/// order of its sums, depends on the number of rows.
pub(super) fn correct(
    pool: Option<&Pool>,
    change: &[f32],
    rate: f32,
    z: &[f32],
    (d, f): (usize, usize),
    v: &mut [f32],
) {
    let mut answered = vec![0.0; v.len().min(BLOCK_ROWS * d)];
    for (z, v) in z.chunks(BLOCK_ROWS * f).zip(v.chunks_mut(BLOCK_ROWS * d)) {
        let answered = &mut answered[..v.len()];
        down(pool, z, change, (d, f), answered);
        let rows = v.chunks_exact_mut(d).zip(answered.chunks_exact(d));
        for ((v, answered), z) in rows.zip(z.chunks_exact(f)) {
            axpy(-kappa(rate, z), answered, v);
        }
    }
}

/// `rate / ‖z‖²`; 0 for a row of zeros, and for one so small, or a step η so small, that this is no number.
pub(super) fn kappa(rate: f32, z: &[f32]) -> f32 {
    let kappa = rate / dot(z, z);
    if kappa.is_finite() {
        kappa
    } else {
        0.0
    }
}

/// `w ← start + kept · (w − start)`.
pub(super) fn decay(pool: Option<&Pool>, start: &[f32], kept: f32, w: &mut [f32]) {
    assert_eq!(start.len(), w.len());
    let piece = pieces(pool, w.len());
    let shared = SharedMut::new(w);
    run(pool, shared.len().div_ceil(piece), |part| {
        let from = part * piece;
        let n = piece.min(shared.len() - from);
        // SAFETY: each part has numbers of its own.
        decay_part(&start[from..from + n], kept, unsafe {
            shared.slice(from, n)
        });
    });
}

/// [`decay`] of a part of a matrix, on one thread.
pub(super) fn decay_part(start: &[f32], kept: f32, w: &mut [f32]) {
    for (w, start) in w.iter_mut().zip(start) {
        *w = start + kept * (*w - start);
    }
}

/// `‖w − start‖`, Frobenius.
pub(super) fn distance(pool: Option<&Pool>, w: &[f32], start: &[f32]) -> f64 {
    assert_eq!(w.len(), start.len());
    let piece = pieces(pool, w.len());
    let mut sums = vec![0f64; w.len().div_ceil(piece)];
    let shared = SharedMut::new(&mut sums);
    run(pool, shared.len(), |part| {
        let from = part * piece;
        let to = (from + piece).min(w.len());
        let mut sum = 0.0;
        // Short sums in f32, long ones in f64: the error stays that of a short sum.
        for (w, start) in w[from..to].chunks(1024).zip(start[from..to].chunks(1024)) {
            sum += f64::from(squared_distance(w, start));
        }
        // SAFETY: each part has a number of its own.
        unsafe { shared.slice(part, 1)[0] = sum };
    });
    sums.iter().sum::<f64>().sqrt()
}

/// Sixteen sums side by side, which the compiler keeps in registers.
fn squared_distance(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0f32; 16];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<16>(), b.as_chunks::<16>());
    for (a, b) in a.iter().zip(b) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += (a - b) * (a - b);
        }
    }
    let rest = a_rest.iter().zip(b_rest).map(|(a, b)| (a - b) * (a - b));
    sums.iter().sum::<f32>() + rest.sum::<f32>()
}

/// Numbers of a pass over a matrix that one part takes.
fn pieces(pool: Option<&Pool>, len: usize) -> usize {
    match pool {
        Some(pool) if len >= 1 << 16 => len.div_ceil(4 * pool.threads()).next_multiple_of(1024),
        _ => len.max(1),
    }
}

fn run(pool: Option<&Pool>, parts: usize, body: impl Fn(usize) + Sync) {
    match pool {
        Some(pool) if parts > 1 => pool.run(parts, body),
        _ => (0..parts).for_each(body),
    }
}
