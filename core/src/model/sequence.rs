//! What belongs to one sequence: its keys and values, and its fast weights. Saved, cut back and dropped together.

use std::collections::BTreeMap;

use super::Config;

/// Keys and values of one sequence, per layer (capacity, g, e), `len` positions of them filled.
#[derive(Clone)]
pub struct KvCache {
    len: usize,
    capacity: usize,
    width: usize,
    layers: Vec<(Vec<f32>, Vec<f32>)>,
}

impl KvCache {
    /// Room for `capacity` positions; grows by itself if that is not enough.
    pub fn new(config: &Config, capacity: usize) -> Self {
        let width = config.kv_size();
        let layers = (0..config.num_hidden_layers)
            .map(|_| (vec![0.0; capacity * width], vec![0.0; capacity * width]))
            .collect();
        Self {
            len: 0,
            capacity,
            width,
            layers,
        }
    }

    /// Filled positions.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True before the first token.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.layers.len() * 2 * self.capacity * self.width * 4
    }

    /// Forgets all positions from `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// A copy of the first `len` positions, with room for `capacity`.
    fn prefix(&self, len: usize, capacity: usize) -> Self {
        let (len, capacity) = (len.min(self.len), capacity.max(len));
        let copy = |from: &[f32]| {
            let mut to = vec![0.0; capacity * self.width];
            to[..len * self.width].copy_from_slice(&from[..len * self.width]);
            to
        };
        let layers = self
            .layers
            .iter()
            .map(|(k, v)| (copy(k), copy(v)))
            .collect();
        Self {
            len,
            capacity,
            width: self.width,
            layers,
        }
    }

    pub(super) fn reserve(&mut self, positions: usize) {
        if positions <= self.capacity {
            return;
        }
        self.capacity = positions.max(self.capacity * 3 / 2);
        for (k, v) in &mut self.layers {
            k.resize(self.capacity * self.width, 0.0);
            v.resize(self.capacity * self.width, 0.0);
        }
    }

    /// Writes rows of one layer at position `pos`; `advance` makes them count.
    pub(super) fn write(&mut self, layer: usize, pos: usize, k: &[f32], v: &[f32]) {
        let at = pos * self.width;
        self.layers[layer].0[at..at + k.len()].copy_from_slice(k);
        self.layers[layer].1[at..at + v.len()].copy_from_slice(v);
    }

    pub(super) fn read(&self, layer: usize) -> (&[f32], &[f32]) {
        (&self.layers[layer].0, &self.layers[layer].1)
    }

    pub(super) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }
}

/// Down-projections of this sequence alone (d, f), by layer. A layer that is absent uses the model's own.
///
/// The down-projection of every layer is a state of the sequence from the start: this is where chunk-wise updates live.
#[derive(Clone, Default)]
pub struct FastWeights {
    pub down: BTreeMap<u16, Vec<f32>>,
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
    /// An empty sequence with room for `capacity` tokens.
    pub fn new(config: &Config, capacity: usize) -> Self {
        Self {
            ids: Vec::new(),
            kv: KvCache::new(config, capacity),
            fast: FastWeights::default(),
        }
    }

    /// A sequence that begins with this one's first `len` tokens, with room for `capacity`; nothing beyond them is copied.
    ///
    /// # Panics
    /// If the sequence has fast weights, which belong to all of it.
    pub fn prefix(&self, len: usize, capacity: usize) -> Self {
        assert!(
            self.fast.down.is_empty(),
            "a sequence with fast weights cannot be cut back"
        );
        let len = len.min(self.ids.len());
        Self {
            ids: self.ids[..len].to_vec(),
            kv: self.kv.prefix(len, capacity),
            fast: FastWeights::default(),
        }
    }

    /// Cuts the sequence back to its first `len` tokens. Only allowed while no fast weights have been written,
    /// for an update cannot be taken back.
    ///
    /// # Panics
    /// If the sequence has fast weights.
    pub fn truncate(&mut self, len: usize) {
        assert!(
            self.fast.down.is_empty(),
            "a sequence with fast weights cannot be cut back"
        );
        self.ids.truncate(len);
        self.kv.truncate(len);
    }
}
