//! The forward pass of serving: new tokens of any number of sequences, keys and values into their caches.
//!
//! Many rows are cut into tiles that fit a core's second-level cache, and a thread takes a tile through all of a block: from its
//! attention to the next block's queries, keys and values, so that threads meet once a block. Few rows stay together, and
//! the columns of each product are shared out instead. A row's numbers do not depend on which.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

use super::config::Architecture;
use super::params::LayerParam::{self, *};
use super::split::Link;
use super::{FastWeights, KvCache, Model, ModelError, ParamId, Sequence};
use crate::kernels::{
    add, add_in_place, attention, attention_of_rows, rms_norm, rope, swiglu_in_place, Pool,
    SharedMut, Span,
};
use crate::ttt::{Chunk, FastWeight, StartWeight, TttConfig, TttLayer, TttMode, TttTarget};

/// Rows from which on a batch is cut into tiles: below, a tile would stream the weights for too few rows.
const MIN_TILED_ROWS: usize = 25;
/// Most rows of a tile: with activations of 1 to 2 MB for models of this size.
const TILE_ROWS: usize = 64;
/// Tokens between two turns at the sum of a chunk's edge.
const AHEAD_ROWS: usize = 16;

thread_local! {
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// New rows of one sequence in the batch.
struct Reading<'a> {
    row: usize,
    len: usize,
    /// Tokens before them whose keys are there.
    pos: usize,
    /// Keys and values of each layer.
    layers: &'a [Cache<'a>],
}

/// Keys and values of a layer.
type Cache<'a> = (SharedMut<'a, f32>, SharedMut<'a, f32>);

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
    /// To the other workers, where this is one's part of a prompt.
    link: Option<Link<'a>>,
}

/// A part of one sequence's new tokens, from `pos` on: their embeddings, to become the last block's output (t, d), and the caches.
pub(super) struct Stretch<'a> {
    pub pos: usize,
    pub x: &'a mut [f32],
    pub layers: &'a [Cache<'a>],
}

/// What a layer that learns reads of all rows: activations (t, f), and what its targets are made from (t, d).
struct Seen<'a> {
    z: SharedMut<'a, f32>,
    u: SharedMut<'a, f32>,
}

impl Model {
    /// An empty sequence with room for `capacity` tokens. With `learning`, the model's TTT layers learn while it is read, each from
    /// its trained weight on.
    pub fn sequence(&self, capacity: usize, learning: bool) -> Sequence {
        let mut sequence = Sequence::new(&self.config, capacity);
        if let Some(config) = self.config.ttt.as_ref().filter(|_| learning) {
            self.let_learn(&mut sequence, config);
        }
        sequence
    }

    /// An empty sequence of any model, trained for it or not, that learns by gradients ([`TttMode::Gradient`]) with these settings.
    ///
    /// At each edge the call waits for a forward and a backward pass of the chunk through the layers from the first that learns on and
    /// through the head. A packed model keeps those in `f32` too from then on, 4 bytes a parameter.
    ///
    /// # Errors
    /// [`ModelError::Config`] for settings that are impossible, layers that are not there, or [`TttMode::InPlace`], whose layers are
    /// those that were trained for it.
    pub fn sequence_with(
        &self,
        capacity: usize,
        config: &TttConfig,
    ) -> Result<Sequence, ModelError> {
        let wrong = |field, found| ModelError::Config { field, found };
        config.check()?;
        if config.mode != TttMode::Gradient {
            return Err(wrong("ttt_mode", format!("{:?}", config.mode)));
        }
        let there = |layer: &u16| usize::from(*layer) < self.config.num_hidden_layers;
        if config.layers.is_empty() || !config.layers.iter().all(there) {
            return Err(wrong("ttt_layers", format!("{:?}", config.layers)));
        }
        let mut sequence = Sequence::new(&self.config, capacity);
        self.let_learn(&mut sequence, config);
        Ok(sequence)
    }

    fn let_learn(&self, sequence: &mut Sequence, config: &TttConfig) {
        for &layer in &config.layers {
            let start = match config.mode {
                TttMode::InPlace => self.starts.get(&layer).cloned(),
                TttMode::Gradient => {
                    let w = self.plain_param(ParamId::Layer(layer, Down));
                    Some(StartWeight::new(w, self.config.hidden_size))
                }
            };
            let start = start.unwrap_or_else(|| self.start_weight(layer));
            sequence.fast.layers.insert(layer, FastWeight::new(&start));
        }
        sequence.fast.config = Some(Arc::new(config.clone()));
    }

    /// What a layer that learns begins with.
    pub(super) fn start_weight(&self, layer: u16) -> StartWeight {
        let w = self.weights.params[&ParamId::Layer(layer, Down)].clone();
        let start = StartWeight::new(w, self.config.hidden_size);
        start.in_format(self.fast_format(layer))
    }

    /// What was trained for a layer that learns.
    pub fn ttt_layer(&self, layer: usize) -> Option<TttLayer<'_>> {
        let config = self.config.ttt.as_ref()?;
        let tensor = |which| {
            self.weights
                .params
                .get(&ParamId::Layer(layer as u16, which))
        };
        let conv = tensor(TttConv)?;
        let proj = tensor(TttProj).map(|p| &p[..]);
        let layer = TttLayer {
            packed_proj: self.packed_projection(layer),
            ..TttLayer::new(config, self.config.hidden_size, conv, proj).ok()?
        };
        Some(layer)
    }

    /// Reads new tokens of several sequences at once and returns the last block's output for every row, packed in order: (t, d).
    /// Afterwards each sequence's cache and ids hold the new tokens. A prefill and any number of decoding sequences may share a call.
    ///
    /// # Errors
    /// A token outside the vocabulary, a sequence longer than the model's positions, or one that learns and begins with padding;
    /// nothing has then been changed.
    pub fn step(
        &self,
        pool: &Pool,
        batch: &mut [(&mut Sequence, &[u32])],
    ) -> Result<Vec<f32>, ModelError> {
        let _attention = pool.attentive();
        self.check_step(batch)?;
        match batch.iter().any(|(s, _)| s.fast.gradient().is_some()) {
            true => self.step_by_chunks(pool, batch),
            false => self.step_within_chunks(pool, batch),
        }
    }

    fn check_step(&self, batch: &[(&mut Sequence, &[u32])]) -> Result<(), ModelError> {
        let vocab_size = self.config.vocab_size;
        let padding = self.config.padding();
        for (sequence, new) in batch {
            let begins = sequence.kv.is_empty() && sequence.fast.is_on();
            if let Some(token) = new.first().filter(|t| begins && Some(**t) == padding) {
                return Err(ModelError::Padded { token: *token });
            }
            self.check_room(sequence.kv.len() + new.len())?;
            if let Some(&token) = new.iter().find(|id| **id as usize >= vocab_size) {
                return Err(ModelError::Token { token, vocab_size });
            }
        }
        Ok(())
    }

    /// [`Self::step`] in parts, none of which goes past an edge at which the weights of many layers change.
    fn step_by_chunks(
        &self,
        pool: &Pool,
        batch: &mut [(&mut Sequence, &[u32])],
    ) -> Result<Vec<f32>, ModelError> {
        let d = self.config.hidden_size;
        let mut out = vec![0.0; batch.iter().map(|(_, new)| new.len() * d).sum()];
        let mut read = vec![0; batch.len()];
        loop {
            let (mut part, mut rows) = (Vec::with_capacity(batch.len()), Vec::new());
            let mut row = 0;
            for ((sequence, new), read) in batch.iter_mut().zip(&mut read) {
                let n = (new.len() - *read).min(sequence.fast.room());
                if n > 0 {
                    part.push((&mut **sequence, &new[*read..*read + n]));
                    rows.push(row + *read..row + *read + n);
                }
                row += new.len();
                *read += n;
            }
            if part.is_empty() {
                return Ok(out);
            }
            let x = self.step_within_chunks(pool, &mut part)?;
            let mut x = &x[..];
            for rows in rows {
                let (own, rest) = x.split_at(rows.len() * d);
                out[rows.start * d..rows.end * d].copy_from_slice(own);
                x = rest;
            }
            for (sequence, _) in part {
                self.descend_at_edge(pool, sequence);
            }
        }
    }

    /// [`Self::step`] for tokens that were checked and that no edge with a gradient stands between.
    fn step_within_chunks(
        &self,
        pool: &Pool,
        batch: &mut [(&mut Sequence, &[u32])],
    ) -> Result<Vec<f32>, ModelError> {
        let mut ids = Vec::new();
        let mut positions = Vec::new();
        for (sequence, new) in batch.iter() {
            let from = sequence.kv.len();
            ids.extend_from_slice(new);
            positions.extend(from as u32..(from + new.len()) as u32);
        }
        let mut x = self.embed(&ids)?;
        let t = ids.len();
        let mut q = vec![0.0; t * self.config.q_size()];
        let mut row = 0;
        let mut readings = Vec::with_capacity(batch.len());
        let mut fasts = Vec::with_capacity(batch.len());
        let embedded = self.embedded_targets(&x);
        let mut caches = Vec::with_capacity(batch.len());
        let mut spans = Vec::with_capacity(batch.len());
        for (sequence, new) in batch.iter_mut() {
            let (pos, len) = (sequence.kv.held(), new.len());
            sequence.kv.reserve(pos + len);
            fasts.push(&mut sequence.fast);
            spans.push((pos, len));
            caches.push(shared(&mut sequence.kv));
        }
        for ((pos, len), layers) in spans.into_iter().zip(&caches) {
            readings.push(Reading {
                row,
                len,
                pos,
                layers,
            });
            row += len;
        }
        let step = Step {
            model: self,
            positions,
            readings,
            x: SharedMut::new(&mut x),
            q: SharedMut::new(&mut q),
            link: None,
        };
        step.run(pool, &mut fasts, &embedded);
        drop(step);
        for (sequence, new) in batch.iter_mut() {
            sequence.kv.advance(new.len());
            sequence.ids.extend_from_slice(new);
        }
        Ok(x)
    }

    /// One worker's part of a prompt that several read. Its fast weights come as they were at the first token of all of them, and are
    /// brought to this one's by `link`.
    pub(super) fn step_stretch(
        &self,
        pool: &Pool,
        stretch: Stretch,
        fast: &mut FastWeights,
        link: Link,
    ) {
        let _attention = pool.attentive();
        let Stretch { pos, x, layers } = stretch;
        let len = x.len() / self.config.hidden_size;
        let embedded = self.embedded_targets(x);
        let mut q = vec![0.0; len * self.config.q_size()];
        let step = Step {
            model: self,
            positions: (pos as u32..(pos + len) as u32).collect(),
            readings: vec![Reading {
                row: 0,
                len,
                pos,
                layers,
            }],
            x: SharedMut::new(x),
            q: SharedMut::new(&mut q),
            link: Some(link),
        };
        step.run(pool, &mut [fast], &embedded);
    }

    /// # Errors
    /// [`ModelError::TooLong`] for more positions than there are.
    pub(super) fn check_room(&self, asked: usize) -> Result<(), ModelError> {
        let limit = self.max_positions();
        match asked <= limit {
            true => Ok(()),
            false => Err(ModelError::TooLong { asked, limit }),
        }
    }

    /// What targets are made from where they are the embeddings `x`; nothing elsewhere.
    fn embedded_targets(&self, x: &[f32]) -> Vec<f32> {
        match self.config.ttt.as_ref().map(|t| t.target) {
            Some(TttTarget::InputEmbed) => x.to_vec(),
            _ => Vec::new(),
        }
    }
}

/// The keys and values of all layers, for threads that write to different positions.
pub(super) fn shared(kv: &mut KvCache) -> Vec<Cache<'_>> {
    kv.layers_mut()
        .map(|(k, v)| (SharedMut::new(k), SharedMut::new(v)))
        .collect()
}

impl Step<'_> {
    fn run(&self, pool: &Pool, fasts: &mut [&mut FastWeights], embedded: &[f32]) {
        let t = self.positions.len();
        let (d, f) = (
            self.model.config.hidden_size,
            self.model.config.intermediate_size,
        );
        let layers = self.model.config.num_hidden_layers;
        let learns = |layer: usize| {
            let of = |fast: &&mut FastWeights| fast.layers.contains_key(&(layer as u16));
            fasts.iter().any(of)
        };
        let learning: Vec<bool> = (0..layers).map(learns).collect();
        let room = if learning.contains(&true) { t } else { 0 };
        let (mut z, mut u) = (vec![0.0; room * f], vec![0.0; room * d]);
        let few = t < MIN_TILED_ROWS;
        let tiles = match few {
            true => 1,
            false => t.div_ceil(TILE_ROWS).next_multiple_of(pool.threads()),
        };
        let inner = few.then_some(pool);
        for layer in 0..=layers {
            let learned = layer > 0 && learning[layer - 1];
            if let (Some(link), 1..) = (&self.link, layer) {
                link.await_keys(layer - 1);
            }
            if learned {
                let seen = Seen {
                    z: SharedMut::new(&mut z),
                    u: SharedMut::new(&mut u),
                };
                pool.run(tiles, |tile| {
                    let rows = t * tile / tiles..t * (tile + 1) / tiles;
                    // SAFETY: tiles share no rows, and keys and values of that layer were written in the loop before.
                    unsafe { self.after_attention(inner, layer - 1, rows, Some(&seen)) }
                });
                let u = if embedded.is_empty() { &u } else { embedded };
                self.learn(pool, layer - 1, (&z, u), fasts);
            }
            pool.run(tiles, |tile| {
                let rows = t * tile / tiles..t * (tile + 1) / tiles;
                // SAFETY: tiles share no rows. What the attention of layer - 1 reads of other tiles' keys and values was written in
                // the loop before; this loop writes those of `layer`.
                unsafe {
                    if layer > 0 && !learned {
                        self.after_attention(inner, layer - 1, rows.clone(), None);
                    }
                    if layer < layers {
                        self.before_attention(inner, layer, rows);
                    }
                }
            });
            if let (Some(link), true) = (&self.link, layer < layers) {
                link.send_keys(layer);
            }
            // Of a layer to come, its input; behind the last there is none.
            for (reading, fast) in self.readings.iter().zip(&mut *fasts) {
                // SAFETY: no tile runs while this does.
                let x = unsafe { self.x.read(reading.row * d, reading.len * d) };
                fast.keep_inputs(layer, x, d);
            }
        }
    }

    /// `x += down(z)` in a layer that learns, for all rows, each sequence by its own weight and up to each chunk's edge, where it then
    /// learns. Sequences that have not learned anything yet share the model's own product.
    fn learn(
        &self,
        pool: &Pool,
        layer: usize,
        (z, u): (&[f32], &[f32]),
        fasts: &mut [&mut FastWeights],
    ) {
        let (d, f) = (
            self.model.config.hidden_size,
            self.model.config.intermediate_size,
        );
        // While answering, every second layer makes its update at the token after the edge: neither token then waits for all of them.
        let of_model = self.model.config.ttt.iter().flat_map(|ttt| &ttt.layers);
        let earlier = of_model.filter(|l| usize::from(**l) < layer);
        let puts_off = earlier.count() % 2 == 1;
        let mut y = vec![0.0; self.positions.len() * d];
        let mut plain = 0..0;
        let mut own_product = |rows: Range<usize>, y: &mut [f32]| {
            if plain.end != rows.start {
                let done = std::mem::replace(&mut plain, rows.clone());
                self.plain_down(pool, layer, done, z, y);
            }
            plain.end = rows.end;
        };
        for (reading, fast) in self.readings.iter().zip(fasts) {
            let end = reading.row + reading.len;
            let FastWeights {
                layers,
                updates,
                config,
                off,
                at_once,
                ..
            } = &mut **fast;
            let (Some(weight), Some(config)) = (layers.get_mut(&(layer as u16)), config) else {
                own_product(reading.row..end, &mut y);
                continue;
            };
            if *off {
                own_product(reading.row..end, &mut y);
                weight.skip(reading.len);
                continue;
            }
            let trained = match config.mode {
                TttMode::InPlace => self.model.ttt_layer(layer),
                TttMode::Gradient => Some(TttLayer::UNTRAINED),
            };
            let Some(trained) = trained else {
                unreachable!("layer {layer} learns without having been trained to");
            };
            let note = |update| (layer as u16, update);
            updates.extend(weight.settle(Some(pool), config, trained).map(note));
            if let Some(link) = &self.link {
                let (z, u) = (&z[reading.row * f..end * f], &u[reading.row * d..end * d]);
                link.hand_on(pool, (config, trained), layer, reading.pos, weight, (z, u));
            }
            let mut row = reading.row;
            while row < end {
                let to = end.min(row + weight.room(config));
                let (z, u) = (&z[row * f..to * f], &u[row * d..to * d]);
                match weight.is_start() {
                    true => own_product(row..to, &mut y),
                    false => weight.apply(Some(pool), z, &mut y[row * d..to * d]),
                }
                let chunk = match puts_off && reading.len == 1 && !*at_once {
                    true => weight.take_in(Some(pool), config, trained, z, u),
                    false => weight.absorb(Some(pool), config, trained, z, u),
                };
                // A gradient comes once all layers have read the chunk.
                if let Chunk::Learned(update) = chunk {
                    updates.push(note(update));
                }
                row = to;
            }
            // While answering token by token, the sum of the coming edge is made bit by bit, each layer at a token of its own.
            if reading.len == 1 {
                if (weight.position() + 3 * layer).is_multiple_of(AHEAD_ROWS) {
                    weight.work_ahead(Some(pool), config, trained, 2 * AHEAD_ROWS);
                }
                weight.sum_ahead(Some(pool), config);
            }
        }
        let rest = plain;
        self.plain_down(pool, layer, rest, z, &mut y);
        // SAFETY: no tile runs while this does.
        let x = unsafe { self.x.slice(0, y.len()) };
        add(pool, &y, x);
    }

    fn plain_down(&self, pool: &Pool, layer: usize, rows: Range<usize>, z: &[f32], y: &mut [f32]) {
        let c = &self.model.config;
        let (d, f) = (c.hidden_size, c.intermediate_size);
        let (z, y) = (
            &z[rows.start * f..rows.end * f],
            &mut y[rows.start * d..rows.end * d],
        );
        self.multiply(Some(pool), layer, [Down], z, rows.len(), [y]);
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

    /// `x += o(attention)`, then `x += down(silu(gate) ∘ up)` of the norm of that; or, in a layer that learns, that norm and
    /// `silu(gate) ∘ up` to `seen`.
    ///
    /// # Safety
    /// No other thread works on these rows, and keys and values of this layer are written up to them.
    unsafe fn after_attention(
        &self,
        pool: Option<&Pool>,
        layer: usize,
        rows: Range<usize>,
        seen: Option<&Seen>,
    ) {
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
                let (keys, values) = (c.attention_shape().keys().len(pos + len), pos + len);
                // SAFETY: the caller's promise. What stands behind is perhaps being written by another worker.
                let (k, v) = unsafe { (k.read(0, keys), v.read(0, values * c.kv_size())) };
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
            if let Some(seen) = seen {
                // SAFETY: the caller's promise.
                let (z, u) = unsafe {
                    (
                        seen.z.slice(rows.start * f, n * f),
                        seen.u.slice(rows.start * d, n * d),
                    )
                };
                z.copy_from_slice(gate);
                u.copy_from_slice(normed);
                return;
            }
            self.multiply(pool, layer, [Down], gate, n, [&mut *b]);
            add_in_place(x, b);
        });
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
