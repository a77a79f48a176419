//! The forward pass of training: whole sequences in packed rows, one operation over all rows after the other, with a tape of what the
//! backward pass needs. Serving makes the same block in `serve`.

use super::config::Architecture;
use super::params::LayerParam::{self, *};
use super::{Lora, Model, ModelError, ParamId};
use crate::kernels::{
    add_in_place, attention, matmul, matmul_nt_small, rms_norm, rope, swiglu, Mat, MatMut, Pool,
    Span,
};

/// Rows up to which a product is memory-bound and read row by row.
const SMALL_ROWS: usize = 6;

/// Where sequences stand in a packed batch, for training: (first row, length) each, all from position 0.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PackedRows {
    pub spans: Vec<(usize, usize)>,
    pub positions: Vec<u32>,
}

impl PackedRows {
    /// Packs sequences of these lengths.
    pub fn new(lengths: &[usize]) -> Self {
        let mut rows = Self::default();
        for &len in lengths {
            rows.spans.push((rows.positions.len(), len));
            rows.positions.extend(0..len as u32);
        }
        rows
    }

    /// Rows in all.
    pub fn len(&self) -> usize {
        self.positions.len()
    }

    /// True if no sequence was packed.
    pub fn is_empty(&self) -> bool {
        self.positions.is_empty()
    }
}

/// Activations of one block that its backward pass reads.
#[derive(Default)]
pub(super) struct BlockTape {
    /// (t, d) input of the block.
    pub x: Vec<f32>,
    /// (t, d) normalised input of attention.
    pub n1: Vec<f32>,
    /// (t, h, e) and (t, g, e) before the per-head norm; empty for Llama.
    pub q_raw: Vec<f32>,
    pub k_raw: Vec<f32>,
    /// After rotation.
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
    /// (t, h, e) output of attention.
    pub mixed: Vec<f32>,
    /// (t, d) input of the MLP's norm, and the norm's output.
    pub x2: Vec<f32>,
    pub n2: Vec<f32>,
    /// (t, f)
    pub gate: Vec<f32>,
    pub up: Vec<f32>,
    pub act: Vec<f32>,
}

/// Activations of the blocks of one training pass, from block `first` on.
#[derive(Default)]
pub struct Tape {
    pub(super) first: usize,
    pub(super) blocks: Vec<BlockTape>,
}

impl Model {
    /// Embeds tokens: (t) → (t, d).
    ///
    /// # Errors
    /// [`ModelError::Token`] for an id outside the vocabulary.
    pub fn embed(&self, ids: &[u32]) -> Result<Vec<f32>, ModelError> {
        let (d, vocab_size) = (self.config.hidden_size, self.config.vocab_size);
        let mut x = vec![0.0; ids.len() * d];
        for (&token, row) in ids.iter().zip(x.chunks_exact_mut(d)) {
            let at = token as usize;
            if at >= vocab_size {
                return Err(ModelError::Token { token, vocab_size });
            }
            match self.packed.get(&ParamId::Embed) {
                Some(packed) => packed.row(at, row),
                None => row.copy_from_slice(&self.param(ParamId::Embed)[at * d..(at + 1) * d]),
            }
        }
        Ok(x)
    }

    /// Blocks `from..to` over packed sequences, in place on x (t, d). With a tape, what the backward pass needs is kept.
    pub fn blocks(
        &self,
        pool: &Pool,
        (from, to): (usize, usize),
        rows: &PackedRows,
        lora: Option<&Lora>,
        x: &mut Vec<f32>,
        mut tape: Option<&mut Tape>,
    ) {
        if let Some(tape) = tape.as_deref_mut() {
            tape.first = from;
            tape.blocks.clear();
        }
        for layer in from..to {
            let mut block = tape.as_ref().map(|_| BlockTape::default());
            self.block(pool, layer, x, rows, lora, block.as_mut());
            if let (Some(tape), Some(block)) = (tape.as_deref_mut(), block) {
                tape.blocks.push(block);
            }
        }
    }

    /// Logits of chosen rows of `hidden` (t, d), the last block's output: (n, v).
    pub fn logits(&self, pool: &Pool, hidden: &[f32], rows: &[usize]) -> Vec<f32> {
        let _attention = pool.attentive();
        let (d, v) = (self.config.hidden_size, self.config.vocab_size);
        let mut picked = Vec::with_capacity(rows.len() * d);
        for &row in rows {
            picked.extend_from_slice(&hidden[row * d..(row + 1) * d]);
        }
        let mut normed = vec![0.0; picked.len()];
        rms_norm(
            Some(pool),
            &picked,
            self.param(ParamId::FinalNorm),
            self.config.rms_norm_eps,
            &mut normed,
        );
        let mut logits = vec![0.0; rows.len() * v];
        self.multiply(Some(pool), self.head_id(), &normed, rows.len(), &mut logits);
        logits
    }

    /// One block: `x += o(attention(norm(x)))`, then `x += down(silu(gate) ∘ up)` of the norm of that.
    #[allow(clippy::too_many_arguments)]
    fn block(
        &self,
        pool: &Pool,
        layer: usize,
        x: &mut Vec<f32>,
        rows: &PackedRows,
        lora: Option<&Lora>,
        tape: Option<&mut BlockTape>,
    ) {
        let c = &self.config;
        let positions = &rows.positions;
        let (t, d, f) = (positions.len(), c.hidden_size, c.intermediate_size);
        let (qd, kd) = (c.q_size(), c.kv_size());
        let p = |which: LayerParam| self.param(ParamId::Layer(layer as u16, which));
        let linear = |which: LayerParam, x: &[f32], width: usize, out: usize| {
            let mut y = vec![0.0; t * out];
            let id = ParamId::Layer(layer as u16, which);
            self.multiply(Some(pool), id, x, t, &mut y);
            if let Some((lora, (a, b))) =
                lora.and_then(|l| Some((l, l.pairs.get(&(layer as u16, which))?)))
            {
                add_low_rank(pool, lora, a, b, x, t, width, out, &mut y);
            }
            y
        };
        let mut n1 = vec![0.0; t * d];
        rms_norm(Some(pool), x, p(InputNorm), c.rms_norm_eps, &mut n1);
        let mut q = linear(Q, &n1, d, qd);
        let mut k = linear(K, &n1, d, kd);
        let v = linear(V, &n1, d, kd);
        let (mut q_raw, mut k_raw) = (Vec::new(), Vec::new());
        if c.architecture == Architecture::Qwen3 {
            q_raw = q.clone();
            k_raw = k.clone();
            rms_norm(Some(pool), &q_raw, p(QNorm), c.rms_norm_eps, &mut q);
            rms_norm(Some(pool), &k_raw, p(KNorm), c.rms_norm_eps, &mut k);
        }
        rope(
            Some(pool),
            &self.rope,
            &mut q,
            c.num_attention_heads,
            positions,
        );
        rope(
            Some(pool),
            &self.rope,
            &mut k,
            c.num_key_value_heads,
            positions,
        );

        let mut mixed = vec![0.0; t * qd];
        let shape = c.attention_shape();
        let keys: Vec<Vec<f32>> = rows
            .spans
            .iter()
            .map(|&(row, len)| {
                let mut keys = vec![0.0; shape.keys().len(len)];
                shape
                    .keys()
                    .write(&mut keys, 0, &k[row * kd..(row + len) * kd]);
                keys
            })
            .collect();
        let spans: Vec<Span> = rows
            .spans
            .iter()
            .zip(&keys)
            .map(|(&(row, len), k)| Span {
                row,
                len,
                pos: 0,
                k,
                v: &v[row * kd..],
            })
            .collect();
        attention(Some(pool), shape, &q, &spans, &mut mixed);
        let o = linear(O, &mixed, qd, d);
        let mut x2 = std::mem::take(x);
        let saved_x = tape.is_some().then(|| x2.clone());
        add_in_place(&mut x2, &o);

        let mut n2 = vec![0.0; t * d];
        rms_norm(Some(pool), &x2, p(PostNorm), c.rms_norm_eps, &mut n2);
        let gate = linear(Gate, &n2, d, f);
        let up = linear(Up, &n2, d, f);
        let mut act = vec![0.0; t * f];
        swiglu(Some(pool), &gate, &up, f, &mut act);
        let y = linear(Down, &act, f, d);
        let saved_x2 = tape.is_some().then(|| x2.clone());
        add_in_place(&mut x2, &y);
        *x = x2;
        if let Some(tape) = tape {
            *tape = BlockTape {
                x: saved_x.unwrap_or_default(),
                n1,
                q_raw,
                k_raw,
                q,
                k,
                v,
                mixed,
                x2: saved_x2.unwrap_or_default(),
                n2,
                gate,
                up,
                act,
            };
        }
    }
}

/// `y = x wᵀ`: x (t, width), w (out, width), y (t, out).
pub(super) fn product(
    pool: Option<&Pool>,
    x: &[f32],
    w: &[f32],
    t: usize,
    width: usize,
    out: usize,
    y: &mut [f32],
) {
    if t <= SMALL_ROWS {
        matmul_nt_small(pool, x, w, t, width, out, y);
    } else {
        matmul(
            pool,
            Mat::new(x, t, width),
            Mat::new(w, out, width).t(),
            1.0,
            false,
            MatMut::new(y, t, out),
        );
    }
}

/// `y += scale · (x aᵀ) bᵀ`.
#[allow(clippy::too_many_arguments)]
fn add_low_rank(
    pool: &Pool,
    lora: &Lora,
    a: &[f32],
    b: &[f32],
    x: &[f32],
    t: usize,
    width: usize,
    out: usize,
    y: &mut [f32],
) {
    let r = lora.config.rank;
    let mut low = vec![0.0; t * r];
    matmul(
        Some(pool),
        Mat::new(x, t, width),
        Mat::new(a, r, width).t(),
        1.0,
        false,
        MatMut::new(&mut low, t, r),
    );
    matmul(
        Some(pool),
        Mat::new(&low, t, r),
        Mat::new(b, out, r).t(),
        lora.scale(),
        true,
        MatMut::new(y, t, out),
    );
}
