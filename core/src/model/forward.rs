//! The forward pass of training: whole sequences in packed rows, one operation over all rows after the other, with a tape of what the
//! backward pass needs. Serving makes the same block in `serve`.

use super::config::Architecture;
use super::params::LayerParam::{self, *};
use super::{Lora, Model, ModelError, PackedRows, ParamId};
use crate::kernels::{
    add, attention, matmul, matmul_nt_small, rms_norm, rope, swiglu, AttentionShape, Buffer, Mat,
    MatMut, Pool, Span, SpanRows,
};
use crate::ttt::{self, TttConfig, TttLayer, TttMode, TttTarget};

/// Rows up to which a product is memory-bound and read row by row.
const SMALL_ROWS: usize = 6;

/// Activations of one block that its backward pass reads.
#[derive(Default)]
pub(super) struct BlockTape {
    /// (t, d) input of the block.
    pub x: Buffer,
    /// (t, d) normalised input of attention.
    pub n1: Buffer,
    /// (t, h, e) and (t, g, e) before the per-head norm; empty for Llama.
    pub q_raw: Buffer,
    pub k_raw: Buffer,
    /// After rotation; k and v with what the rows' sequence has read before, if that is given.
    pub q: Buffer,
    pub k: Buffer,
    pub v: Buffer,
    /// (t, h, e) output of attention.
    pub mixed: Buffer,
    /// (t, d) input of the MLP's norm, and the norm's output.
    pub x2: Buffer,
    pub n2: Buffer,
    /// (t, f)
    pub gate: Buffer,
    pub up: Buffer,
    pub act: Buffer,
}

/// What is kept of a block until its backward pass.
// A step has one for each block, and most are whole.
#[allow(clippy::large_enum_variant)]
pub(super) enum Kept {
    Whole(BlockTape),
    /// The block's input (t, d) alone: the rest is computed again.
    Input(Buffer),
}

/// Activations of the blocks of one training pass, from block `first` on.
#[derive(Default)]
pub struct Tape {
    pub(super) first: usize,
    pub(super) blocks: Vec<Kept>,
    /// Blocks, counted from the first on the tape, of which only the input is kept.
    pub inputs_only: usize,
}

/// How far a block goes, and what of it is kept.
enum Extent<'a> {
    /// To its output.
    Whole(Option<&'a mut BlockTape>),
    /// As far as the backward pass needs it: without the last product, so without output.
    ForBackward(&'a mut BlockTape),
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
        let mut flowing = Buffer::from(std::mem::take(x));
        for layer in from..to {
            let kept = match tape.as_deref_mut() {
                Some(tape) if layer - from < tape.inputs_only => {
                    let mut input = pool.buffer(flowing.len());
                    input.copy_from_slice(&flowing);
                    Some(Kept::Input(input))
                }
                Some(_) => Some(Kept::Whole(BlockTape::default())),
                None => None,
            };
            let mut kept = kept;
            let whole = match &mut kept {
                Some(Kept::Whole(block)) => Some(block),
                _ => None,
            };
            self.block(pool, layer, &mut flowing, rows, lora, Extent::Whole(whole));
            if let (Some(tape), Some(kept)) = (tape.as_deref_mut(), kept) {
                tape.blocks.push(kept);
            }
        }
        *x = flowing.into_vec();
    }

    /// What the backward pass of a block reads, from its input (t, d): the same numbers as on a tape.
    pub(super) fn block_again(
        &self,
        pool: &Pool,
        layer: usize,
        rows: &PackedRows,
        lora: Option<&Lora>,
        mut input: Buffer,
    ) -> BlockTape {
        let mut tape = BlockTape::default();
        self.block(
            pool,
            layer,
            &mut input,
            rows,
            lora,
            Extent::ForBackward(&mut tape),
        );
        tape
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

    /// Settings and tensors of a layer whose down-projection learns while a sequence is read, in the forward pass of training too.
    /// That pass has no embeddings at hand, so targets made from them are for serving alone, and training refuses them.
    pub(super) fn learning_layer(&self, layer: usize) -> Option<(&TttConfig, TttLayer<'_>)> {
        let config = self.config.ttt.as_ref()?;
        let here = config.mode == TttMode::InPlace
            && config.target == TttTarget::HiddenStates
            && config.layers.contains(&(layer as u16));
        Some((config, self.ttt_layer(layer).filter(|_| here)?))
    }

    /// Packs a training batch: with `share`, what several sequences begin with stands there once, unless layers learn while they read,
    /// for what those have learned belongs to one sequence.
    pub fn packed_rows(&self, sequences: &[&[u32]], share: bool) -> PackedRows<'static> {
        let learning = (0..self.config.num_hidden_layers).any(|l| self.learning_layer(l).is_some());
        match share && !learning {
            true => PackedRows::sharing(sequences),
            false => PackedRows::new(&sequences.iter().map(|ids| ids.len()).collect::<Vec<_>>()),
        }
    }

    /// One block: `x += o(attention(norm(x)))`, then `x += down(silu(gate) ∘ up)` of the norm of that.
    #[allow(clippy::too_many_arguments)]
    fn block(
        &self,
        pool: &Pool,
        layer: usize,
        x: &mut Buffer,
        rows: &PackedRows,
        lora: Option<&Lora>,
        extent: Extent,
    ) {
        let c = &self.config;
        let positions = &rows.positions;
        let (t, d, f) = (positions.len(), c.hidden_size, c.intermediate_size);
        let (qd, kd) = (c.q_size(), c.kv_size());
        let p = |which: LayerParam| self.param(ParamId::Layer(layer as u16, which));
        let linear = |which: LayerParam, x: &[f32], width: usize, out: usize| {
            let mut y = pool.buffer(t * out);
            let id = ParamId::Layer(layer as u16, which);
            match lora.and_then(|l| l.merged(pool, self, id)) {
                Some(merged) => self.multiply_by(Some(pool), x, &merged, t, (width, out), &mut y),
                None => self.multiply(Some(pool), id, x, t, &mut y),
            }
            y
        };
        let mut n1 = pool.buffer(t * d);
        rms_norm(Some(pool), x, p(InputNorm), c.rms_norm_eps, &mut n1);
        let mut q = linear(Q, &n1, d, qd);
        let mut k = linear(K, &n1, d, kd);
        let v = linear(V, &n1, d, kd);
        let (mut q_raw, mut k_raw) = (Buffer::default(), Buffer::default());
        if c.architecture == Architecture::Qwen3 {
            q_raw = std::mem::replace(&mut q, pool.buffer(t * qd));
            k_raw = std::mem::replace(&mut k, pool.buffer(t * kd));
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

        let (k, v) = rows.with_past(pool, layer, (k, v));
        let mut mixed = pool.buffer(t * qd);
        let shape = c.attention_shape();
        let read: Vec<(Buffer, Buffer)> = (rows.spans.iter())
            .map(|span| keys_and_values(pool, shape, span, &k, &v))
            .collect();
        let spans: Vec<Span> = (rows.spans.iter().zip(&read))
            .map(|(span, (keys, values))| Span {
                row: span.row,
                len: span.len,
                pos: span.pos(),
                k: keys,
                v: match span.before.is_empty() {
                    true => &v[span.row * kd..],
                    false => values,
                },
            })
            .collect();
        attention(Some(pool), shape, &q, &spans, &mut mixed);
        drop(read);
        let mut x2 = linear(O, &mixed, qd, d);
        add(pool, x, &mut x2);

        let mut n2 = pool.buffer(t * d);
        rms_norm(Some(pool), &x2, p(PostNorm), c.rms_norm_eps, &mut n2);
        let gate = linear(Gate, &n2, d, f);
        let up = linear(Up, &n2, d, f);
        let mut act = pool.buffer(t * f);
        swiglu(Some(pool), &gate, &up, f, &mut act);
        let (input, tape) = match extent {
            Extent::Whole(tape) => {
                let mut y = match self.learning_layer(layer) {
                    None => linear(Down, &act, f, d),
                    Some(trained) => {
                        let id = ParamId::Layer(layer as u16, Down);
                        let merged = lora.and_then(|l| l.merged(pool, self, id));
                        let w = merged.as_deref().unwrap_or(self.param(id));
                        let mut y = pool.buffer(t * d);
                        for &SpanRows { row, len, .. } in whole_sequences(rows) {
                            let (z, u) = (row * f..(row + len) * f, row * d..(row + len) * d);
                            let seen = (&act[z], &n2[u.clone()]);
                            ttt::forward(Some(pool), trained.0, trained.1, w, seen, &mut y[u]);
                        }
                        y
                    }
                };
                add(pool, &x2, &mut y);
                (std::mem::replace(x, y), tape)
            }
            Extent::ForBackward(tape) => (std::mem::take(x), Some(tape)),
        };
        if let Some(tape) = tape {
            *tape = BlockTape {
                x: input,
                n1,
                q_raw,
                k_raw,
                q,
                k,
                v,
                mixed,
                x2,
                n2,
                gate,
                up,
                act,
            };
        }
    }
}

/// The keys that a span's queries read, in their layout, and the values where they do not stand side by side already.
fn keys_and_values(
    pool: &Pool,
    shape: AttentionShape,
    span: &SpanRows,
    k: &[f32],
    v: &[f32],
) -> (Buffer, Buffer) {
    let width = shape.num_key_value_heads * shape.head_dim;
    let n = span.pos() + span.len;
    let mut keys = pool.buffer(shape.keys().len(n));
    let mut values = match span.before.is_empty() {
        true => Buffer::default(),
        false => pool.buffer(n * width),
    };
    let mut at = 0;
    for rows in span.all() {
        let (n, rows) = (rows.len(), rows.start * width..rows.end * width);
        shape.keys().write(&mut keys, at, &k[rows.clone()]);
        if !values.is_empty() {
            values[at * width..(at + n) * width].copy_from_slice(&v[rows]);
        }
        at += n;
    }
    (keys, values)
}

/// The spans of sequences that share nothing, for layers whose state belongs to one sequence.
///
/// # Panics
/// If some rows are shared.
pub(super) fn whole_sequences<'a>(rows: &'a PackedRows) -> &'a [SpanRows] {
    assert!(
        rows.shared() == 0,
        "a layer that learns while it reads was given rows of several sequences at once"
    );
    &rows.spans
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
