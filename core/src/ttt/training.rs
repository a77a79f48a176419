//! Whole sequences, forward and backward: one weight walks along the chunks, so memory does not grow with their number.

use super::rule::{
    add_outer, add_scaled, change, correct, decay, down, filter, filter_backward, is_zero, kappa,
    target,
};
use super::{Forgetting, TttConfig, TttLayer};
use crate::kernels::{axpy, dot, matmul, Mat, MatMut, Pool};

/// Sums that [`backward`] adds to; those that do not train are absent.
pub struct TttGrad<'a> {
    /// (t, f)
    pub dz: &'a mut [f32],
    /// (t, d), of what the target is made from: add it to the gradient of the MLP's input, or of the embeddings.
    pub du: Option<&'a mut [f32]>,
    /// (d, f), of the weight the sequence begins with.
    pub dw: Option<&'a mut [f32]>,
    /// (d, 1, k)
    pub dconv: Option<&'a mut [f32]>,
    /// (d, d)
    pub dproj: Option<&'a mut [f32]>,
}

/// A sequence from its first token to its last, without a cap: what [`FastWeight`](super::FastWeight) computes call by call. Shapes: w (d, f) at
/// the start, z (t, f), u (t, d), y (t, d). Holds one more (d, f) if there is more than one chunk, and with a delta rule two.
///
/// # Panics
/// If the lengths do not fit.
pub fn forward(
    pool: Option<&Pool>,
    config: &TttConfig,
    layer: TttLayer,
    w: &[f32],
    (z, u): (&[f32], &[f32]),
    y: &mut [f32],
) {
    let whole = Whole::new(config, layer, w, z, u);
    let (d, f) = whole.shape;
    assert_eq!(y.len(), u.len(), "(t, d)");
    whole.walk(pool, config, layer, w, |from, to, w| {
        let z = &z[from * f..to * f];
        down(pool, z, w, (d, f), &mut y[from * d..to * d]);
    });
}

/// Backward of [`forward`], for dy (t, d); adds to the sums in `grad`.
///
/// With `Gᵢ` the gradient of the weight that chunk i meets, zero behind the last chunk, and the filter's own backward pass at the end:
///
/// ```text
/// dzᵢ = dyᵢ Wᵢ + η vᵢ Gᵢ₊₁        dvᵢ = η zᵢ Gᵢ₊₁ᵀ        Gᵢ = Gᵢ₊₁ + dyᵢᵀ zᵢ        dW₀ = G₀
/// ```
///
/// Where the rule forgets ([`Forgetting`]), with `Dᵢ = Wᵢ − W₀`, `qₙ = zₙ/‖zₙ‖` and a row n of chunk i:
///
/// ```text
/// decay γ   Gᵢ₊₁ in all four is multiplied by γ first, and dW₀ = Σ dyᵢᵀ zᵢ
/// delta β   vᵢ is the corrected target; with rₙ = −β/c · Gᵢ₊₁ qₙ/‖zₙ‖ and sₙ = rₙᵀ Dᵢ zₙ
///           dzₙ += Dᵢᵀ rₙ − 2 sₙ qₙ/‖zₙ‖        Gᵢ += rᵢᵀ zᵢ        dW₀ = Σ dyᵢᵀ zᵢ
/// ```
///
/// Walks forward once for the `Wᵢ` and backward once for the `Gᵢ`: two (d, f) and the targets (t, d) at a time; three with a delta rule,
/// which finds each `Wᵢ` again by taking back what its chunk added. `dW₀` is that of a plain down-projection; everything else reaches
/// only as far as a later chunk reads, so a sequence of one chunk moves neither filter nor projection.
///
/// # Panics
/// If the lengths do not fit.
pub fn backward(
    pool: Option<&Pool>,
    config: &TttConfig,
    layer: TttLayer,
    w: &[f32],
    (z, u, dy): (&[f32], &[f32], &[f32]),
    grad: TttGrad,
) {
    let whole = Whole::new(config, layer, w, z, u);
    let (d, f) = whole.shape;
    assert_eq!(
        (dy.len(), grad.dz.len()),
        (u.len(), z.len()),
        "(t, d), (t, f)"
    );
    let TttGrad {
        dz,
        mut du,
        mut dw,
        mut dconv,
        mut dproj,
    } = grad;
    let (targets, last) = whole.walk(pool, config, layer, w, |from, to, w| {
        let (dy, w) = (
            Mat::new(&dy[from * d..to * d], to - from, d),
            Mat::new(w, d, f),
        );
        let dz = MatMut::new(&mut dz[from * f..to * f], to - from, f);
        matmul(pool, dy, w, 1.0, true, dz);
    });
    let forgets = config.forgets != Forgetting::Nothing;
    // Targets of zeros are corrected too once they move, so their gradients meet the correction before there is anything to correct.
    let rate = config.delta_rate();
    let mut delta = rate.map(|rate| (rate, last.unwrap_or_else(|| w.to_vec())));
    let mut g = vec![0.0; d * f];
    for (from, to) in whole.chunks().rev() {
        let n = to - from;
        let (z, u) = (&z[from * f..to * f], &u[from * d..to * d]);
        let dy = &dy[from * d..to * d];
        let mut answered = None;
        if to < whole.len && config.lr != 0.0 {
            if let Forgetting::Decay(kept) = config.forgets {
                g.iter_mut().for_each(|g| *g *= kept);
            }
            let v = &targets[from * d..to * d];
            let dz = &mut dz[from * f..to * f];
            let (product, to_dz) = (Mat::new(&g, d, f), MatMut::new(dz, n, f));
            matmul(pool, Mat::new(v, n, d), product, config.lr, true, to_dz);
            let mut dv = vec![0.0; n * d];
            let to_dv = MatMut::new(&mut dv, n, d);
            matmul(
                pool,
                Mat::new(z, n, f),
                product.t(),
                config.lr,
                false,
                to_dv,
            );
            // The first chunk met the trained weight, which answers nothing of its own.
            if let (Some((rate, now)), true) = (&mut delta, from > 0) {
                add_outer(pool, (v, z), -config.lr, (d, f), now);
                let change = change(pool, now, w);
                answered = Some(correct_backward(pool, &change, *rate, (z, &dv), (d, f), dz));
            }
            if let Some(proj) = layer.proj {
                if let Some(dproj) = dproj.as_deref_mut() {
                    let filtered = filter(pool, layer.conv, u, 0..n, d);
                    let filtered = Mat::new(&filtered, n, d).t();
                    let dproj = MatMut::new(dproj, d, d);
                    matmul(pool, filtered, Mat::new(&dv, n, d), 1.0, true, dproj);
                }
                let mut before = vec![0.0; n * d];
                let to_filtered = MatMut::new(&mut before, n, d);
                let proj = Mat::new(proj, d, d);
                matmul(pool, Mat::new(&dv, n, d), proj.t(), 1.0, false, to_filtered);
                dv = before;
            }
            let du = du.as_deref_mut().map(|du| &mut du[from * d..to * d]);
            filter_backward(layer.conv, u, &dv, du, dconv.as_deref_mut(), d);
        }
        if let Some(r) = answered {
            add_outer(pool, (&r, z), 1.0, (d, f), &mut g);
        }
        add_outer(pool, (dy, z), 1.0, (d, f), &mut g);
        if let (Some(dw), true) = (dw.as_deref_mut(), forgets) {
            add_outer(pool, (dy, z), 1.0, (d, f), dw);
        }
    }
    if let (Some(dw), false) = (dw, forgets) {
        add_scaled(pool, &g, 1.0, dw);
    }
}

/// Backward of [`correct`](super::rule::correct), for dv (n, d): adds to dz (n, f), and returns the gradient r (n, d) of what the change
/// D answered, whose product `rᵀz` is that of D.
fn correct_backward(
    pool: Option<&Pool>,
    change: &[f32],
    rate: f32,
    (z, dv): (&[f32], &[f32]),
    (d, f): (usize, usize),
    dz: &mut [f32],
) -> Vec<f32> {
    let n = dv.len() / d;
    let mut answered = vec![0.0; dv.len()];
    down(pool, z, change, (d, f), &mut answered);
    let mut r = vec![0.0; dv.len()];
    let rows = z.chunks_exact(f).zip(dz.chunks_exact_mut(f));
    let answers = answered.chunks_exact(d).zip(dv.chunks_exact(d));
    for (((z, dz), (answered, dv)), r) in rows.zip(answers).zip(r.chunks_exact_mut(d)) {
        let kappa = kappa(rate, z);
        if kappa != 0.0 {
            axpy(-kappa, dv, r);
            axpy(-2.0 * dot(r, answered) / dot(z, z), z, dz);
        }
    }
    let (change, dz) = (Mat::new(change, d, f), MatMut::new(dz, n, f));
    matmul(pool, Mat::new(&r, n, d), change, 1.0, true, dz);
    r
}

/// A sequence and its chunks.
struct Whole<'a> {
    z: &'a [f32],
    u: &'a [f32],
    /// (d, f)
    shape: (usize, usize),
    len: usize,
    chunk_len: usize,
}

impl<'a> Whole<'a> {
    fn new(config: &TttConfig, layer: TttLayer, w: &[f32], z: &'a [f32], u: &'a [f32]) -> Self {
        let d = layer.conv.len() / config.kernel_size;
        let (f, len) = (w.len() / d, u.len() / d);
        assert_eq!(
            (w.len(), u.len(), z.len()),
            (d * f, len * d, len * f),
            "(d, f), (t, d), (t, f)"
        );
        Self {
            z,
            u,
            shape: (d, f),
            len,
            chunk_len: config.chunk_len,
        }
    }

    /// First token and the one behind the last, of each chunk; the last may be shorter.
    fn chunks(&self) -> impl DoubleEndedIterator<Item = (usize, usize)> {
        let (len, c) = (self.len, self.chunk_len);
        (0..len.div_ceil(c)).map(move |i| (i * c, len.min((i + 1) * c)))
    }

    /// Calls `each` with every chunk and the weight that it meets; returns the targets of all chunks but the last, which nothing reads, as
    /// they were added, and the weight that the last one met, if it was another than the first.
    fn walk(
        &self,
        pool: Option<&Pool>,
        config: &TttConfig,
        layer: TttLayer,
        start: &[f32],
        mut each: impl FnMut(usize, usize, &[f32]),
    ) -> (Vec<f32>, Option<Vec<f32>>) {
        let (d, f) = self.shape;
        let mut targets = Vec::new();
        let mut own: Option<Vec<f32>> = None;
        for (from, to) in self.chunks() {
            each(from, to, own.as_deref().unwrap_or(start));
            if to == self.len {
                break;
            }
            if config.lr == 0.0 {
                continue;
            }
            let mut v = target(pool, layer, &self.u[from * d..to * d], 0..to - from, d);
            let z = &self.z[from * f..to * f];
            if let (Some(rate), Some(w)) = (config.delta_rate(), &own) {
                let change = change(pool, w, start);
                correct(pool, &change, rate, z, (d, f), &mut v);
            }
            if !is_zero(&v) {
                let w = own.get_or_insert_with(|| start.to_vec());
                add_outer(pool, (&v, z), config.lr, (d, f), w);
            }
            if let (Forgetting::Decay(kept), Some(w)) = (config.forgets, &mut own) {
                decay(pool, start, kept, w);
            }
            targets.extend_from_slice(&v);
        }
        (targets, own)
    }
}
