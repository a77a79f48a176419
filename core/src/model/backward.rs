//! The backward pass, by hand: gradients for the parameters that train and for nothing else.

use std::collections::BTreeMap;

use super::config::Architecture;
use super::forward::{whole_sequences, BlockTape, Kept, Tape};
use super::params::LayerParam::{self, *};
use super::{Lora, Model, PackedRows, ParamId};
use crate::kernels::{
    add, attention_backward, cross_entropy, matmul, rms_norm, rms_norm_backward, rope_backward,
    swiglu_backward, AttentionGrad, AttentionShape, Mat, MatMut, Pool, RowLoss, SharedMut,
    SpanRows,
};
use crate::ttt::{self, TttConfig, TttGrad, TttLayer};

/// A tensor that training moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TrainId {
    Full(ParamId),
    LoraA(u16, LayerParam),
    LoraB(u16, LayerParam),
}

impl TrainId {
    /// Hugging Face or PEFT name.
    pub fn name(self) -> String {
        match self {
            Self::Full(id) => id.name(),
            Self::LoraA(layer, p) => format!(
                "base_model.model.model.layers.{layer}.{}.lora_A.weight",
                p.module()
            ),
            Self::LoraB(layer, p) => format!(
                "base_model.model.model.layers.{layer}.{}.lora_B.weight",
                p.module()
            ),
        }
    }
}

/// Sums of gradients, one buffer for each tensor that trains. A tensor that is absent gets none computed.
#[derive(Default)]
pub struct Grads {
    pub map: BTreeMap<TrainId, Vec<f32>>,
}

impl Grads {
    /// Zeroed buffers for these tensors.
    pub fn new(sizes: impl IntoIterator<Item = (TrainId, usize)>) -> Self {
        Self {
            map: sizes
                .into_iter()
                .map(|(id, n)| (id, vec![0.0; n]))
                .collect(),
        }
    }

    /// Sets all sums to zero.
    pub fn zero(&mut self) {
        self.map.values_mut().for_each(|g| g.fill(0.0));
    }

    fn full(&mut self, layer: usize, p: LayerParam) -> Option<&mut [f32]> {
        self.map
            .get_mut(&TrainId::Full(ParamId::Layer(layer as u16, p)))
            .map(|g| g.as_mut_slice())
    }
}

/// Sums over the rows that carry loss.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HeadLoss {
    /// Σ weight · −log p(label), in nats.
    pub loss: f64,
    /// Σ weight.
    pub weight: f64,
    /// −log p(label) of each row, unweighted, in the order given.
    pub nll: Vec<f32>,
    /// Whether the most likely token of each row is its label.
    pub hits: Vec<bool>,
}

/// Rows of logits in memory at a time: 192 of 49,152 numbers are 38 MB. With fewer, the head's weights, 113 MB, would be read more
/// often than they can be.
pub const HEAD_ROWS: usize = 192;

impl Model {
    /// Final norm, head and cross-entropy on chosen rows, in pieces; forward only if `grad` is `None`.
    ///
    /// `rows` are rows of `hidden` (t, d), the last block's output; `labels` and `weights` belong to them. With `grad`, adds
    /// `scale · d(Σ weight · nll)/d hidden` to `dhidden` (t, d) and to the final norm's and the head's sums if they train.
    pub fn head_loss(
        &self,
        pool: &Pool,
        hidden: &[f32],
        (rows, labels, weights): (&[usize], &[u32], &[f32]),
        mut grad: Option<(f32, &mut [f32], &mut Grads)>,
    ) -> HeadLoss {
        let (d, v) = (self.config.hidden_size, self.config.vocab_size);
        let norm = self.param(ParamId::FinalNorm);
        let head_id = self.head_id();
        let mut total = HeadLoss::default();
        for from in (0..rows.len()).step_by(HEAD_ROWS) {
            let n = HEAD_ROWS.min(rows.len() - from);
            let mut x = Vec::with_capacity(n * d);
            for &row in &rows[from..from + n] {
                x.extend_from_slice(&hidden[row * d..(row + 1) * d]);
            }
            let mut normed = pool.buffer(n * d);
            rms_norm(Some(pool), &x, norm, self.config.rms_norm_eps, &mut normed);
            let mut logits = pool.buffer(n * v);
            self.multiply(Some(pool), head_id, &normed, n, &mut logits);
            let mut seen = vec![RowLoss::default(); n];
            {
                let (logits, seen) = (SharedMut::new(&mut logits), SharedMut::new(&mut seen));
                let scale = grad.as_ref().map(|g| g.0);
                pool.run(n, |r| {
                    // SAFETY: row r belongs to this part alone.
                    let (row, seen) = unsafe { (logits.slice(r * v, v), seen.slice(r, 1)) };
                    let weight = scale.map(|s| s * weights[from + r]);
                    seen[0] = cross_entropy(row, labels[from + r] as usize, weight);
                });
            }
            for (seen, weight) in seen.iter().zip(&weights[from..]) {
                let w = *weight as f64;
                total.loss += w * seen.nll as f64;
                total.weight += w;
                total.hits.push(seen.hit);
                total.nll.push(seen.nll);
            }
            let Some((_, dhidden, grads)) = grad.as_mut() else {
                continue;
            };
            let dlogits = Mat::new(&logits, n, v);
            let mut dnormed = pool.buffer(n * d);
            self.matmul(
                pool,
                dlogits,
                Mat::new(self.param(head_id), v, d),
                false,
                MatMut::new(&mut dnormed, n, d),
            );
            if let Some(dhead) = grads.map.get_mut(&TrainId::Full(head_id)) {
                self.matmul(
                    pool,
                    dlogits.t(),
                    Mat::new(&normed, n, d),
                    true,
                    MatMut::new(dhead, v, d),
                );
            }
            let mut dx = vec![0.0; n * d];
            let dnorm = grads
                .map
                .get_mut(&TrainId::Full(ParamId::FinalNorm))
                .map(|g| g.as_mut_slice());
            rms_norm_backward(
                Some(pool),
                &x,
                norm,
                self.config.rms_norm_eps,
                &dnormed,
                &mut dx,
                dnorm,
            );
            for (r, &row) in rows[from..from + n].iter().enumerate() {
                for (to, from) in dhidden[row * d..(row + 1) * d]
                    .iter_mut()
                    .zip(&dx[r * d..(r + 1) * d])
                {
                    *to += from;
                }
            }
        }
        total
    }

    /// Backward through the blocks on the tape, last first: `dx` (t, d) comes in as the gradient of the last block's output and
    /// leaves as the gradient of the first taped block's input. Adds to the sums in `grads`. What is on the tape is used up.
    pub fn blocks_backward(
        &self,
        pool: &Pool,
        rows: &PackedRows,
        lora: Option<&Lora>,
        tape: &mut Tape,
        dx: &mut [f32],
        grads: &mut Grads,
    ) {
        while let Some(kept) = tape.blocks.pop() {
            let layer = tape.first + tape.blocks.len();
            let block = match kept {
                Kept::Whole(block) => block,
                Kept::Input(input) => self.block_again(pool, layer, rows, lora, input),
            };
            self.block_backward(pool, layer, rows, lora, block, dx, grads);
        }
    }

    /// Backward through a down-projection that learns: adds to `dact` (t, f) and `du` (t, d), and to the sums of its filter and
    /// projection if they train.
    #[allow(clippy::too_many_arguments)]
    fn learning_backward(
        &self,
        linear: &LinearBackward,
        rows: &PackedRows,
        (config, trained): (&TttConfig, TttLayer),
        tape: &BlockTape,
        dy: &[f32],
        dact: &mut [f32],
        du: &mut [f32],
        grads: &mut Grads,
    ) {
        let (d, f) = (self.config.hidden_size, self.config.intermediate_size);
        let id = |which| ParamId::Layer(linear.layer as u16, which);
        let merged = linear
            .lora
            .and_then(|l| l.merged(linear.pool, self, id(Down)));
        let w = merged.as_deref().unwrap_or(self.param(id(Down)));
        let [conv, proj] = [TttConv, TttProj].map(|which| TrainId::Full(id(which)));
        let mut sums = [conv, proj].map(|key| grads.map.remove(&key));
        let [dconv, dproj] = &mut sums;
        for &SpanRows { row, len, .. } in whole_sequences(rows) {
            let (z, u) = (row * f..(row + len) * f, row * d..(row + len) * d);
            let grad = TttGrad {
                dz: &mut dact[z.clone()],
                du: Some(&mut du[u.clone()]),
                dw: None,
                dconv: dconv.as_deref_mut(),
                dproj: dproj.as_deref_mut(),
            };
            let seen = (&tape.act[z], &tape.n2[u.clone()], &dy[u]);
            ttt::backward(Some(linear.pool), config, trained, w, seen, grad);
        }
        for (key, sum) in [conv, proj].into_iter().zip(sums) {
            grads.map.extend(sum.map(|sum| (key, sum)));
        }
    }

    /// Adds the gradient of the embedding's rows, if the embedding trains: dx (t, d) for tokens `ids` (t).
    pub fn embed_backward(&self, ids: &[u32], dx: &[f32], grads: &mut Grads) {
        let d = self.config.hidden_size;
        if let Some(sum) = grads.map.get_mut(&TrainId::Full(ParamId::Embed)) {
            for (row, &id) in ids.iter().enumerate() {
                let at = id as usize * d;
                for (to, from) in sum[at..at + d].iter_mut().zip(&dx[row * d..(row + 1) * d]) {
                    *to += from;
                }
            }
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn block_backward(
        &self,
        pool: &Pool,
        layer: usize,
        rows: &PackedRows,
        lora: Option<&Lora>,
        tape: BlockTape,
        dx: &mut [f32],
        grads: &mut Grads,
    ) {
        let c = &self.config;
        let (t, d, f) = (rows.len(), c.hidden_size, c.intermediate_size);
        let (qd, kd) = (c.q_size(), c.kv_size());
        let eps = c.rms_norm_eps;
        let linear = LinearBackward {
            model: self,
            pool,
            layer,
            lora,
            t,
        };
        let norm = |which: LayerParam| self.param(ParamId::Layer(layer as u16, which));

        // x_out = x2 + down(act)
        let mut dact = pool.buffer(t * f);
        linear.run(Down, &tape.act, dx, (f, d), &mut dact, false, grads);
        let du = self.learning_layer(layer).map(|trained| {
            // The weight that a sequence begins with has the gradient that `linear` has just added; the activations reach further.
            dact.fill(0.0);
            let mut du = pool.buffer(t * d);
            du.fill(0.0);
            self.learning_backward(&linear, rows, trained, &tape, dx, &mut dact, &mut du, grads);
            du
        });
        drop(tape.act);
        let (mut dgate, mut dup) = (pool.buffer(t * f), pool.buffer(t * f));
        swiglu_backward(
            Some(pool),
            (&tape.gate, &tape.up, &dact),
            f,
            &mut dgate,
            &mut dup,
        );
        drop((dact, tape.gate, tape.up));
        let mut dn = pool.buffer(t * d);
        linear.run(Gate, &tape.n2, &dgate, (d, f), &mut dn, false, grads);
        linear.run(Up, &tape.n2, &dup, (d, f), &mut dn, true, grads);
        if let Some(du) = du {
            add(pool, &du, &mut dn);
        }
        rms_norm_backward(
            Some(pool),
            &tape.x2,
            norm(PostNorm),
            eps,
            &dn,
            dx,
            grads.full(layer, PostNorm),
        );

        // x2 = x + o(attention)
        let mut dmixed = pool.buffer(t * qd);
        linear.run(O, &tape.mixed, dx, (qd, d), &mut dmixed, false, grads);
        let (mut dq, mut dk, mut dv) = (
            pool.buffer(t * qd),
            pool.buffer(tape.k.len()),
            pool.buffer(tape.v.len()),
        );
        let shape = AttentionShape {
            num_attention_heads: c.num_attention_heads,
            num_key_value_heads: c.num_key_value_heads,
            head_dim: c.head_dim,
        };
        let grad = AttentionGrad {
            dq: &mut dq,
            dk: &mut dk,
            dv: &mut dv,
        };
        attention_backward(
            Some(pool),
            shape,
            (&tape.q, &tape.k, &tape.v, &dmixed),
            &rows.spans,
            grad,
        );
        rope_backward(
            Some(pool),
            &self.rope,
            &mut dq,
            c.num_attention_heads,
            &rows.positions,
        );
        // What was read before is constant: its keys and values pass nothing on.
        let own = t * kd;
        rope_backward(
            Some(pool),
            &self.rope,
            &mut dk[..own],
            c.num_key_value_heads,
            &rows.positions,
        );
        if c.architecture == Architecture::Qwen3 {
            let mut before = pool.buffer(dq.len());
            before.fill(0.0);
            rms_norm_backward(
                Some(pool),
                &tape.q_raw,
                norm(QNorm),
                eps,
                &dq,
                &mut before,
                grads.full(layer, QNorm),
            );
            dq = before;
            let mut before = pool.buffer(own);
            before.fill(0.0);
            rms_norm_backward(
                Some(pool),
                &tape.k_raw,
                norm(KNorm),
                eps,
                &dk[..own],
                &mut before,
                grads.full(layer, KNorm),
            );
            dk = before;
        }
        linear.run(Q, &tape.n1, &dq, (d, qd), &mut dn, false, grads);
        linear.run(K, &tape.n1, &dk[..own], (d, kd), &mut dn, true, grads);
        linear.run(V, &tape.n1, &dv[..own], (d, kd), &mut dn, true, grads);
        rms_norm_backward(
            Some(pool),
            &tape.x,
            norm(InputNorm),
            eps,
            &dn,
            dx,
            grads.full(layer, InputNorm),
        );
    }
}

/// Backward of one matrix of a block, with its adapter if it has one.
struct LinearBackward<'a> {
    model: &'a Model,
    pool: &'a Pool,
    layer: usize,
    lora: Option<&'a Lora>,
    t: usize,
}

impl LinearBackward<'_> {
    /// `dx (+)= dy W`, `dW += dyᵀ x`; with an adapter `dx (+)= dy (W + s B A)`, `dB += s dyᵀ (x Aᵀ)`, `dA += s (dy B)ᵀ x`.
    #[allow(clippy::too_many_arguments)]
    fn run(
        &self,
        which: LayerParam,
        x: &[f32],
        dy: &[f32],
        (width, out): (usize, usize),
        dx: &mut [f32],
        accumulate: bool,
        grads: &mut Grads,
    ) {
        let (t, pool) = (self.t, Some(self.pool));
        let id = ParamId::Layer(self.layer as u16, which);
        let merged = self.lora.and_then(|l| l.merged(self.pool, self.model, id));
        let w = merged.as_deref().unwrap_or(self.model.param(id));
        let (x_mat, dy_mat) = (Mat::new(x, t, width), Mat::new(dy, t, out));
        self.model.matmul(
            self.pool,
            dy_mat,
            Mat::new(w, out, width),
            accumulate,
            MatMut::new(dx, t, width),
        );
        if let Some(dw) = grads.full(self.layer, which) {
            self.model.matmul(
                self.pool,
                dy_mat.t(),
                x_mat,
                true,
                MatMut::new(dw, out, width),
            );
        }
        let key = (self.layer as u16, which);
        let Some((lora, (a, b))) = self.lora.and_then(|l| Some((l, l.pairs.get(&key)?))) else {
            return;
        };
        let (r, s) = (lora.config.rank, lora.scale());
        let (a_mat, b_mat) = (Mat::new(a, r, width), Mat::new(b, out, r));
        let mut low = self.pool.buffer(t * r);
        if let Some(db) = grads.map.get_mut(&TrainId::LoraB(key.0, which)) {
            matmul(
                pool,
                x_mat,
                a_mat.t(),
                1.0,
                false,
                MatMut::new(&mut low, t, r),
            );
            matmul(
                pool,
                dy_mat.t(),
                Mat::new(&low, t, r),
                s,
                true,
                MatMut::new(db, out, r),
            );
        }
        if let Some(da) = grads.map.get_mut(&TrainId::LoraA(key.0, which)) {
            matmul(pool, dy_mat, b_mat, s, false, MatMut::new(&mut low, t, r));
            matmul(
                pool,
                Mat::new(&low, t, r).t(),
                x_mat,
                1.0,
                true,
                MatMut::new(da, r, width),
            );
        }
    }
}
