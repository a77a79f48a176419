//! What belongs to one sequence: its keys and values, and its fast weights. Saved, cut back and dropped together.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::Config;
use crate::kernels::KeyLayout;
use crate::ttt::{FastWeight, TttConfig, TttMode, Update};

/// Keys and values of one sequence, those of the positions `0..sink` and `first..len`: per layer keys as [`KeyLayout`] has them and
/// values (capacity, g, e).
#[derive(Clone)]
pub struct KvCache {
    len: usize,
    /// The first position behind those forgotten, and those before them that stay; whole blocks of the layout.
    first: usize,
    sink: usize,
    /// A multiple of the layout's blocks.
    capacity: usize,
    width: usize,
    keys: KeyLayout,
    layers: Vec<(Vec<f32>, Vec<f32>)>,
}

impl KvCache {
    /// Room for `capacity` positions; grows by itself if that is not enough.
    pub fn new(config: &Config, capacity: usize) -> Self {
        let width = config.kv_size();
        let keys = config.attention_shape().keys();
        let capacity = keys.whole_blocks(capacity);
        let layers = (0..config.num_hidden_layers)
            .map(|_| (vec![0.0; capacity * width], vec![0.0; capacity * width]))
            .collect();
        Self {
            len: 0,
            first: 0,
            sink: 0,
            capacity,
            width,
            keys,
            layers,
        }
    }

    /// Positions read, those forgotten since included.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Positions whose keys and values are still there.
    pub fn held(&self) -> usize {
        self.sink + self.len - self.first
    }

    /// The first position that can be gone back to.
    fn begins(&self) -> usize {
        match self.first > self.sink {
            true => self.first,
            false => 0,
        }
    }

    /// True before the first token.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.layers.len() * 2 * self.capacity * self.width * 4
    }

    /// Forgets all positions from `len` on, which is not before the first that is still there.
    fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Forgets the positions before `position` but the first `keep`, in whole blocks; returns from which on they are still there.
    fn forget(&mut self, position: usize, keep: usize) -> usize {
        let block = self.keys.whole_blocks(1);
        let first = position.min(self.len) / block * block;
        if self.begins() == 0 {
            self.sink = self.keys.whole_blocks(keep).min(first);
            self.first = self.sink;
        }
        let gone = first.saturating_sub(self.first);
        if gone > 0 {
            let (to, held) = (self.sink * self.width, self.held());
            let from = to + gone * self.width;
            for (k, v) in &mut self.layers {
                k.copy_within(from..self.keys.len(held), to);
                v.copy_within(from..held * self.width, to);
            }
            self.first = first;
        }
        self.first
    }

    /// A copy of the positions up to `len`, with room for `capacity`.
    fn prefix(&self, len: usize, capacity: usize) -> Self {
        let len = len.min(self.len);
        let gone = self.first - self.sink;
        let held = len - gone;
        let capacity = self
            .keys
            .whole_blocks(capacity.saturating_sub(gone).max(held));
        let copy = |from: &[f32], positions: usize| {
            let mut to = vec![0.0; capacity * self.width];
            to[..positions * self.width].copy_from_slice(&from[..positions * self.width]);
            to
        };
        let layers = self
            .layers
            .iter()
            .map(|(k, v)| (copy(k, self.keys.whole_blocks(held)), copy(v, held)))
            .collect();
        Self {
            len,
            first: self.first,
            sink: self.sink,
            capacity,
            width: self.width,
            keys: self.keys,
            layers,
        }
    }

    /// Copies a layer's first keys and values, so many as fit into `k` and `v` (n, g, e).
    pub(super) fn read(&self, layer: usize, k: &mut [f32], v: &mut [f32]) {
        let (keys, values) = &self.layers[layer];
        self.keys.read(keys, k);
        v.copy_from_slice(&values[..v.len()]);
    }

    /// Makes room for so many positions, held and to come.
    pub(super) fn reserve(&mut self, positions: usize) {
        if positions <= self.capacity {
            return;
        }
        self.capacity = self.keys.whole_blocks(positions.max(self.capacity * 3 / 2));
        for (k, v) in &mut self.layers {
            k.resize(self.capacity * self.width, 0.0);
            v.resize(self.capacity * self.width, 0.0);
        }
    }

    /// Keys and values of each layer, to write behind those [`Self::held`]; `advance` makes that count.
    pub(super) fn layers_mut(&mut self) -> impl Iterator<Item = (&mut [f32], &mut [f32])> {
        self.layers
            .iter_mut()
            .map(|(k, v)| (&mut k[..], &mut v[..]))
    }

    pub(super) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }
}

/// What of the model belongs to this sequence alone: the down-projections that learn while it is read. Without any, the model stands as
/// it was trained.
#[derive(Clone, Default)]
pub struct FastWeights {
    pub layers: BTreeMap<u16, FastWeight>,
    /// What was learned since somebody last took these, with the layer it was learned in.
    pub updates: Vec<(u16, Update)>,
    /// How hard the tokens of each chunk were, for whoever judges whether learning helps.
    pub losses: ChunkLosses,
    pub(super) config: Option<Arc<TttConfig>>,
    /// In [`TttMode::Gradient`], of the tokens of the open chunk: what the first of the layers read (n, d).
    pub(super) inputs: Vec<f32>,
    /// While set, all layers make their updates at the edge itself, also while answering, for whoever looks at them there.
    pub at_once: bool,
    /// While set, the trained weights play and nothing is learned.
    pub(super) off: bool,
}

/// Mean loss of some tokens of each chunk, before the chunk was learned from.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ChunkLosses {
    /// Of the chunks behind; `None` for one of which no token was looked at.
    done: Vec<Option<f32>>,
    sum: f64,
    tokens: u32,
}

impl ChunkLosses {
    /// Counts a token of the open chunk.
    pub fn add(&mut self, loss: f64) {
        self.sum += loss;
        self.tokens += 1;
    }

    /// Ends the open chunk.
    pub fn close(&mut self) {
        let mean = (self.tokens > 0).then(|| (self.sum / f64::from(self.tokens)) as f32);
        self.done.push(mean);
        (self.sum, self.tokens) = (0.0, 0);
    }

    /// The last chunk's.
    pub fn last(&self) -> Option<f32> {
        self.done.last().copied().flatten()
    }

    /// The mean of all chunks before the last.
    pub fn before(&self) -> Option<f32> {
        let (_, before) = self.done.split_last()?;
        let known: Vec<f32> = before.iter().flatten().copied().collect();
        (!known.is_empty()).then(|| known.iter().sum::<f32>() / known.len() as f32)
    }

    /// Forgets the chunks from `chunks` on, and the open one.
    pub(crate) fn truncate(&mut self, chunks: usize) {
        self.done.truncate(chunks);
        (self.sum, self.tokens) = (0.0, 0);
    }
}

impl FastWeights {
    /// Whether anything learns.
    pub fn is_on(&self) -> bool {
        !self.layers.is_empty()
    }

    /// The largest drift of a layer now.
    pub fn drift(&self) -> f32 {
        self.layers
            .values()
            .fold(0.0, |most, fast| most.max(fast.drift()))
    }

    /// Tokens of a chunk, where anything learns.
    pub fn chunk_len(&self) -> Option<usize> {
        let config = self.config.as_ref().filter(|_| self.is_on())?;
        Some(config.chunk_len)
    }

    /// Back to the trained weights in all layers. What was read stays read; the rest of the open chunk is not learned from.
    pub fn reset(&mut self) {
        self.layers.values_mut().for_each(FastWeight::reset);
        self.inputs.clear();
    }

    /// Switched off, the trained weights play from the next token on and nothing is learned; switched on again, learning begins anew
    /// with the next whole chunk.
    pub fn switch(&mut self, on: bool) {
        if !on {
            self.reset();
        }
        self.off = !on;
    }

    /// Multiplies the step size of `trained` by `factor`, for the chunks from the open one on.
    pub fn scale_step(&mut self, trained: &TttConfig, factor: f32) {
        let lr = trained.lr * factor;
        if let Some(config) = self.config.as_mut().filter(|c| c.lr != lr) {
            Arc::make_mut(config).lr = lr;
            self.layers
                .values_mut()
                .for_each(FastWeight::begin_sum_anew);
        }
    }

    /// Bytes held for this sequence.
    pub fn bytes(&self) -> usize {
        let layers: usize = self.layers.values().map(FastWeight::bytes).sum();
        layers + 4 * self.inputs.capacity()
    }

    /// The settings, if a gradient is due at the edges.
    pub(super) fn gradient(&self) -> Option<&Arc<TttConfig>> {
        let config = self.config.as_ref();
        config.filter(|config| config.mode == TttMode::Gradient)
    }

    /// Tokens up to which a call can go before something changes for the whole model.
    pub(super) fn room(&self) -> usize {
        let layer = self.layers.values().next();
        match (self.gradient(), layer) {
            (Some(config), Some(layer)) => layer.room(config),
            _ => usize::MAX,
        }
    }

    /// Keeps what layer `layer` read of new tokens (n, d), if their gradient will begin there.
    pub(super) fn keep_inputs(&mut self, layer: usize, x: &[f32], hidden_size: usize) {
        let first = self.layers.keys().next();
        let Some(config) = self.gradient().filter(|_| first == Some(&(layer as u16))) else {
            return;
        };
        let whole = config.chunk_len * hidden_size;
        let (chunk, position) = (config.chunk_len, self.layers[&(layer as u16)].position());
        // A chunk of which the beginning was not read, or not learned from, has no gradient.
        if self.off || self.inputs.len() != position % chunk * hidden_size {
            self.inputs.clear();
            return;
        }
        self.inputs
            .reserve_exact(whole.saturating_sub(self.inputs.len()));
        self.inputs.extend_from_slice(x);
    }

    /// Forgets the tokens from `position` on; false, and nothing changed, if an update since then cannot be taken back.
    fn truncate(&mut self, position: usize) -> bool {
        let Some(config) = &self.config else {
            return true;
        };
        let Some(read) = self.layers.values().next().map(FastWeight::position) else {
            return true;
        };
        // All layers stand on the same grid, so either all can go back or none.
        let mut layers = self.layers.values_mut();
        if !layers.all(|fast| fast.truncate(config, position).is_ok()) {
            return false;
        }
        if position < read {
            let width = self.inputs.len() / (read % config.chunk_len);
            self.inputs.truncate(position % config.chunk_len * width);
        }
        self.losses.truncate(position / config.chunk_len);
        true
    }
}

/// A sequence in progress.
#[derive(Clone)]
pub struct Sequence {
    /// The tokens whose keys and values are in the cache.
    pub ids: Vec<u32>,
    pub kv: KvCache,
    pub fast: FastWeights,
}

impl Sequence {
    /// An empty sequence with room for `capacity` tokens, in which nothing learns.
    pub fn new(config: &Config, capacity: usize) -> Self {
        Self {
            ids: Vec::new(),
            kv: KvCache::new(config, capacity),
            fast: FastWeights::default(),
        }
    }

    /// Bytes of the keys and values of one token.
    pub fn bytes_per_token(config: &Config) -> usize {
        config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 4
    }

    /// Bytes of keys, values and fast weights.
    pub fn bytes(&self) -> usize {
        self.kv.bytes() + self.fast.bytes()
    }

    /// Lets attention reach no further back than `position`, to whole blocks of keys before it, and returns how far it does reach; and
    /// beyond to the first `keep` positions, which the first call settles. Many models rest their attention on their first tokens and
    /// break without them (StreamingLLM, arXiv:2309.17453). Fast weights keep what they learned from the tokens before; positions and
    /// chunks' edges stay where they are. This cannot be taken back.
    pub fn forget(&mut self, position: usize, keep: usize) -> usize {
        self.kv.forget(position, keep)
    }

    /// A sequence that begins with this one's first `len` tokens, with room for `capacity`; nothing beyond them is copied. `None` if
    /// what was learned from later tokens cannot be taken back, or the tokens before were forgotten.
    pub fn prefix(&self, len: usize, capacity: usize) -> Option<Self> {
        let len = len.min(self.ids.len());
        if len < self.kv.begins() {
            return None;
        }
        let mut fast = FastWeights {
            updates: Vec::new(),
            ..self.fast.clone()
        };
        fast.truncate(len).then(|| Self {
            ids: self.ids[..len].to_vec(),
            kv: self.kv.prefix(len, capacity),
            fast,
        })
    }

    /// Cuts the sequence back to its first `len` tokens; false, and nothing changed, if what was learned from later ones cannot be
    /// taken back, or the tokens before were forgotten.
    #[must_use]
    pub fn truncate(&mut self, len: usize) -> bool {
        if len < self.kv.begins() || !self.fast.truncate(len) {
            return false;
        }
        self.ids.truncate(len);
        self.kv.truncate(len);
        true
    }
}
