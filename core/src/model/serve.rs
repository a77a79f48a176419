//! The forward pass of serving: new tokens of any number of sequences, keys and values into their caches.
//!
//! Many rows are cut into tiles that fit a core's second-level cache, and a thread takes a tile through all of a block: from its
//! attention to the next block's queries, keys and values, so that threads meet once a block. Few rows stay together, and
//! the columns of each product are shared out instead. A row's numbers do not depend on which.

use std::cell::RefCell;
use std::ops::Range;

use super::config::Architecture;
use super::forward::product;
use super::params::LayerParam::{self, *};
use super::{Model, ModelError, ParamId, Sequence};
use crate::kernels::{
    add_in_place, attention, attention_of_rows, rms_norm, rope, swiglu_in_place, Pool, SharedMut,
    Span,
};

/// Rows from which on a batch is cut into tiles: below, a tile would stream the weights for too few rows.
const MIN_TILED_ROWS: usize = 25;
/// Most rows of a tile: with activations of 1 to 2 MB for models of this size.
const TILE_ROWS: usize = 64;

thread_local! {
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// New rows of one sequence in the batch.
struct Reading<'a> {
    row: usize,
    len: usize,
    /// Tokens before them.
    pos: usize,
    /// Keys and values of each layer.
    layers: Vec<(SharedMut<'a, f32>, SharedMut<'a, f32>)>,
    /// Down-projections of this sequence alone, by layer.
    down: &'a std::collections::BTreeMap<u16, Vec<f32>>,
}

impl Reading<'_> {
    /// The part of `rows` that is this sequence's.
    fn within(&self, rows: &Range<usize>) -> Range<usize> {
        let (start, end) = (rows.start.max(self.row), rows.end.min(self.row + self.len));
        match start < end {
            true => start..end,
            false => rows.start..rows.start,
        }
    }
}

/// One step of the model: everything that its tiles share.
struct Step<'a> {
    model: &'a Model,
    positions: Vec<u32>,
    readings: Vec<Reading<'a>>,
    /// (t, d)
    x: SharedMut<'a, f32>,
    /// (t, h, e)
    q: SharedMut<'a, f32>,
}

impl Model {
    /// Reads new tokens of several sequences at once and returns the last block's output for every row, packed in order: (t, d).
    /// Afterwards each sequence's cache and ids hold the new tokens. A prefill and any number of decoding sequences may share a call.
    ///
    /// # Errors
    /// A token outside the vocabulary or a sequence longer than the model's positions; nothing has then been changed.
    pub fn step(
        &self,
        pool: &Pool,
        batch: &mut [(&mut Sequence, &[u32])],
    ) -> Result<Vec<f32>, ModelError> {
        let _attention = pool.attentive();
        let mut ids = Vec::new();
        let mut positions = Vec::new();
        for (sequence, new) in batch.iter() {
            let (from, to) = (sequence.kv.len(), sequence.kv.len() + new.len());
            if to > self.max_positions() {
                return Err(ModelError::TooLong {
                    asked: to,
                    limit: self.max_positions(),
                });
            }
            ids.extend_from_slice(new);
            positions.extend(from as u32..to as u32);
        }
        let mut x = self.embed(&ids)?;
        let t = ids.len();
        let mut q = vec![0.0; t * self.config.q_size()];
        let mut row = 0;
        let mut readings = Vec::with_capacity(batch.len());
        for (sequence, new) in batch.iter_mut() {
            let (pos, len) = (sequence.kv.len(), new.len());
            sequence.kv.reserve(pos + len);
            let layers = sequence.kv.layers_mut();
            readings.push(Reading {
                row,
                len,
                pos,
                layers: layers
                    .map(|(k, v)| (SharedMut::new(k), SharedMut::new(v)))
                    .collect(),
                down: &sequence.fast.down,
            });
            row += len;
        }
        let step = Step {
            model: self,
            positions,
            readings,
            x: SharedMut::new(&mut x),
            q: SharedMut::new(&mut q),
        };
        step.run(pool);
        for (sequence, new) in batch.iter_mut() {
            sequence.kv.advance(new.len());
            sequence.ids.extend_from_slice(new);
        }
        Ok(x)
    }
}

impl Step<'_> {
    fn run(&self, pool: &Pool) {
        let t = self.positions.len();
        let layers = self.model.config.num_hidden_layers;
        if t < MIN_TILED_ROWS {
            for layer in 0..layers {
                // SAFETY: one call at a time, with all rows.
                unsafe {
                    self.before_attention(Some(pool), layer, 0..t);
                    self.after_attention(Some(pool), layer, 0..t);
                }
            }
            return;
        }
        let tiles = t.div_ceil(TILE_ROWS).next_multiple_of(pool.threads());
        for layer in 0..=layers {
            pool.run(tiles, |tile| {
                let rows = t * tile / tiles..t * (tile + 1) / tiles;
                // SAFETY: tiles share no rows. What the attention of layer - 1 reads of other tiles' keys and values was written in
                // the loop before; this loop writes those of `layer`.
                unsafe {
                    if layer > 0 {
                        self.after_attention(None, layer - 1, rows.clone());
                    }
                    if layer < layers {
                        self.before_attention(None, layer, rows);
                    }
                }
            });
        }
    }

    /// Queries, keys and values of these rows.
    ///
    /// # Safety
    /// No other thread works on these rows, or reads their keys and values of this layer.
    unsafe fn before_attention(&self, pool: Option<&Pool>, layer: usize, rows: Range<usize>) {
        let c = &self.model.config;
        let (n, d, qd, kd) = (rows.len(), c.hidden_size, c.q_size(), c.kv_size());
        // SAFETY: the caller's promise.
        let (x, q) = unsafe {
            (
                self.x.read(rows.start * d, n * d),
                self.q.slice(rows.start * qd, n * qd),
            )
        };
        let positions = &self.positions[rows.clone()];
        with_scratch([n * d, n * kd, n * kd], |[normed, k, v]| {
            let p = |which| self.model.param(ParamId::Layer(layer as u16, which));
            rms_norm(None, x, p(InputNorm), c.rms_norm_eps, normed);
            self.multiply(pool, layer, [Q, K, V], normed, n, [&mut *q, k, v]);
            if c.architecture == Architecture::Qwen3 {
                for (x, which) in [(&mut *q, QNorm), (&mut *k, KNorm)] {
                    let raw = x.to_vec();
                    rms_norm(None, &raw, p(which), c.rms_norm_eps, x);
                }
            }
            let table = &self.model.rope;
            rope(None, table, q, c.num_attention_heads, positions);
            rope(None, table, k, c.num_key_value_heads, positions);
            for reading in &self.readings {
                let own = reading.within(&rows);
                if own.is_empty() {
                    continue;
                }
                let (keys, values) = &reading.layers[layer];
                let part = (own.start - rows.start) * kd..(own.end - rows.start) * kd;
                let pos = reading.pos + (own.start - reading.row);
                // SAFETY: the caller's promise.
                unsafe {
                    let layout = c.attention_shape().keys();
                    layout.write_shared(keys, pos, &k[part.clone()]);
                    let to = values.slice(pos * kd, part.len());
                    to.copy_from_slice(&v[part]);
                }
            }
        });
    }

    /// `x += o(attention)`, then `x += down(silu(gate) ∘ up)` of the norm of that.
    ///
    /// # Safety
    /// No other thread works on these rows, and keys and values of this layer are written up to them.
    unsafe fn after_attention(&self, pool: Option<&Pool>, layer: usize, rows: Range<usize>) {
        let c = &self.model.config;
        let (n, d, f, qd) = (rows.len(), c.hidden_size, c.intermediate_size, c.q_size());
        // SAFETY: the caller's promise.
        let (x, q) = unsafe {
            (
                self.x.slice(rows.start * d, n * d),
                self.q.read(rows.start * qd, n * qd),
            )
        };
        let spans: Vec<Span> = self
            .readings
            .iter()
            .map(|reading| {
                let (k, v) = &reading.layers[layer];
                let Reading { row, len, pos, .. } = *reading;
                // SAFETY: the caller's promise.
                let (k, v) = unsafe { (k.read(0, k.len()), v.read(0, v.len())) };
                Span {
                    row,
                    len,
                    pos,
                    k,
                    v,
                }
            })
            .collect();
        with_scratch([n * qd.max(d), n * d, n * f, n * f], |[a, b, gate, up]| {
            let mixed = &mut a[..n * qd];
            match pool {
                Some(_) => attention(pool, c.attention_shape(), q, &spans, mixed),
                None => attention_of_rows(c.attention_shape(), q, &spans, rows.clone(), mixed),
            }
            self.multiply(pool, layer, [O], mixed, n, [&mut *b]);
            add_in_place(x, b);
            let normed = &mut a[..n * d];
            let weight = self.model.param(ParamId::Layer(layer as u16, PostNorm));
            rms_norm(None, x, weight, c.rms_norm_eps, normed);
            self.multiply(pool, layer, [Gate, Up], normed, n, [&mut *gate, &mut *up]);
            swiglu_in_place(gate, up);
            self.down(pool, layer, &rows, gate, b);
            add_in_place(x, b);
        });
    }

    /// The down-projection of `act` (n, f), by the sequence's own weights where it has some.
    fn down(
        &self,
        pool: Option<&Pool>,
        layer: usize,
        rows: &Range<usize>,
        act: &[f32],
        y: &mut [f32],
    ) {
        let c = &self.model.config;
        let (d, f) = (c.hidden_size, c.intermediate_size);
        let own = |reading: &Reading| reading.down.contains_key(&(layer as u16));
        if !self.readings.iter().any(own) {
            return self.multiply(pool, layer, [Down], act, rows.len(), [y]);
        }
        for reading in &self.readings {
            let part = reading.within(rows);
            if part.is_empty() {
                continue;
            }
            let (from, n) = (part.start - rows.start, part.len());
            let act = &act[from * f..(from + n) * f];
            let y = &mut y[from * d..(from + n) * d];
            match reading.down.get(&(layer as u16)) {
                Some(own) => product(pool, act, own, n, f, d, y),
                None => self.multiply(pool, layer, [Down], act, n, [y]),
            }
        }
    }

    fn multiply<const N: usize>(
        &self,
        pool: Option<&Pool>,
        layer: usize,
        which: [LayerParam; N],
        x: &[f32],
        t: usize,
        ys: [&mut [f32]; N],
    ) {
        let ids = which.map(|which| ParamId::Layer(layer as u16, which));
        self.model.multiply_all(pool, ids, x, t, ys);
    }
}

/// Buffers of this thread, as long as asked for and full of old numbers.
fn with_scratch<const N: usize>(lens: [usize; N], body: impl FnOnce([&mut [f32]; N])) {
    let mut buffer = SCRATCH.take();
    let all = lens.iter().sum();
    if buffer.len() < all {
        buffer.resize(all, 0.0);
    }
    let mut rest = &mut buffer[..];
    let parts = lens.map(|len| {
        let (part, after) = std::mem::take(&mut rest).split_at_mut(len);
        rest = after;
        part
    });
    body(parts);
    SCRATCH.replace(buffer);
}

#[cfg(test)]
mod tests {
    use super::super::{write_tiny, WeightFormat};
    use super::*;

    /// Hidden states of each part of a text, read one after another.
    fn alone(model: &Model, pool: &Pool, text: &[u32], parts: &[usize]) -> Vec<f32> {
        let mut sequence = Sequence::new(&model.config, 4);
        let mut out = Vec::new();
        let mut at = 0;
        for len in parts {
            let new = &text[at..at + len];
            out.extend(model.step(pool, &mut [(&mut sequence, new)]).unwrap());
            at += len;
        }
        out
    }

    #[test]
    fn what_a_sequence_reads_does_not_depend_on_its_company_nor_on_how_it_is_cut() {
        let dir = tempfile::tempdir().unwrap();
        write_tiny(dir.path(), 3).unwrap();
        let plain = Model::load(dir.path()).unwrap();
        let pool = Pool::new(3, 0);
        let texts: Vec<Vec<u32>> = [5, 130, 1, 40, 77]
            .iter()
            .map(|len| (0..*len).map(|i| 3 + (i * 7 + len) % 50).collect())
            .collect();
        // Plain weights go through `gemm`, which sums in another order for another number of rows.
        for format in [WeightFormat::Bf16, WeightFormat::Q8, WeightFormat::Q4] {
            let model = plain.clone().packed(format);
            let want: Vec<Vec<f32>> = texts
                .iter()
                .map(|text| alone(&model, &pool, text, &[text.len()]))
                .collect();
            let cut = alone(&model, &pool, &texts[1], &[1, 30, 2, 64, 33]);
            assert_eq!(cut, want[1], "{format:?}");
            let mut sequences: Vec<Sequence> = texts
                .iter()
                .map(|_| Sequence::new(&model.config, 4))
                .collect();
            // A first step that leaves each with a past of another length, then all that is left in one batch.
            let past = [2, 17, 0, 39, 50];
            for ((sequence, text), past) in sequences.iter_mut().zip(&texts).zip(past) {
                if past > 0 {
                    model.step(&pool, &mut [(sequence, &text[..past])]).unwrap();
                }
            }
            let mut batch: Vec<(&mut Sequence, &[u32])> = sequences
                .iter_mut()
                .zip(&texts)
                .zip(past)
                .map(|((sequence, text), past)| (sequence, &text[past..]))
                .collect();
            let got = model.step(&pool, &mut batch).unwrap();
            let d = model.config.hidden_size;
            let want: Vec<f32> = want
                .iter()
                .zip(past)
                .flat_map(|(want, past)| want[past * d..].to_vec())
                .collect();
            assert_eq!(got, want, "{format:?}");
        }
    }
}
