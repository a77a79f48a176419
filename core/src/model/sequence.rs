//! What belongs to one sequence: its keys and values, and its fast weights. Saved, cut back and dropped together.

use std::collections::BTreeMap;

use super::Config;
use crate::kernels::KeyLayout;

/// Keys and values of one sequence, `len` positions of them filled: per layer keys as [`KeyLayout`] has them and values
/// (capacity, g, e).
#[derive(Clone)]
pub struct KvCache {
    len: usize,
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
            capacity,
            width,
            keys,
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
        let len = len.min(self.len);
        let capacity = self.keys.whole_blocks(capacity.max(len));
        let copy = |from: &[f32], positions: usize| {
            let mut to = vec![0.0; capacity * self.width];
            to[..positions * self.width].copy_from_slice(&from[..positions * self.width]);
            to
        };
        let layers = self
            .layers
            .iter()
            .map(|(k, v)| (copy(k, self.keys.whole_blocks(len)), copy(v, len)))
            .collect();
        Self {
            len,
            capacity,
            width: self.width,
            keys: self.keys,
            layers,
        }
    }

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

    /// Keys and values of each layer, to write behind `len`; `advance` makes that count.
    pub(super) fn layers_mut(&mut self) -> impl Iterator<Item = (&mut [f32], &mut [f32])> {
        self.layers
            .iter_mut()
            .map(|(k, v)| (&mut k[..], &mut v[..]))
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
