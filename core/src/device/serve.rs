//! A student on the card, and the sequences it reads: handles, with what the engine's thread wants to know of them.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::Arc;

use super::table::{self, Learned, Part, Shape, Tensor};
use super::{called, Card, DeviceError};
use crate::model::{Architecture, ChunkLosses, LayerParam, Model, ParamId};
use crate::ttt::{Forgetting, TttMode, TttTarget, Update};

/// A model's weights on a card.
pub struct CardModel {
    card: Arc<Card>,
    at: *mut c_void,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    /// Layers that learn, and the tokens of their chunks.
    learning: Vec<u16>,
    chunk_len: usize,
    lr: f32,
}

// SAFETY: the engine's thread alone calls through it, and whoever drops it last does so once.
unsafe impl Send for CardModel {}
// SAFETY: as above.
unsafe impl Sync for CardModel {}

/// A model as the table wants it, with what its pointers point into.
pub(super) struct Packed {
    pub shape: Shape,
    pub tensors: Vec<Tensor>,
    _numbers: Vec<Arc<Vec<f32>>>,
}

impl Packed {
    /// `exact`: matrices stay `f32`. Layers that learn by gradients are taken for plain ones.
    pub fn new(model: &Model, exact: bool) -> Self {
        let c = &model.config;
        let ttt = c.ttt.as_ref().filter(|ttt| ttt.mode == TttMode::InPlace);
        let (cos, sin) = model.angles();
        let n = |x: usize| x as u32;
        let (decay, delta) = match ttt.map_or(Forgetting::Nothing, |ttt| ttt.forgets) {
            Forgetting::Nothing => (1.0, 0.0),
            Forgetting::Decay(kept) => (kept, 0.0),
            Forgetting::Delta(strength) => (1.0, strength),
        };
        let shape = Shape {
            vocab_size: n(c.vocab_size),
            hidden_size: n(c.hidden_size),
            intermediate_size: n(c.intermediate_size),
            num_hidden_layers: n(c.num_hidden_layers),
            num_attention_heads: n(c.num_attention_heads),
            num_key_value_heads: n(c.num_key_value_heads),
            head_dim: n(c.head_dim),
            head_norms: (c.architecture == Architecture::Qwen3).into(),
            tied: c.tie_word_embeddings.into(),
            rms_norm_eps: c.rms_norm_eps,
            exact: exact.into(),
            chunk_len: n(ttt.map_or(0, |t| t.chunk_len)),
            kernel_size: n(ttt.map_or(0, |t| t.kernel_size)),
            embedded_targets: ttt
                .is_some_and(|t| t.target == TttTarget::InputEmbed)
                .into(),
            max_drift: ttt.and_then(|t| t.max_drift).unwrap_or(f32::INFINITY),
            decay,
            delta,
            positions: n(model.max_positions()),
            cos: cos.as_ptr(),
            sin: sin.as_ptr(),
        };
        let (mut tensors, mut numbers) = (Vec::new(), Vec::new());
        for id in ParamId::all(c) {
            let data = model.numbers(id);
            let (layer, which) = place(id);
            tensors.push(Tensor {
                layer,
                which,
                data: data.as_ptr(),
                len: data.len() as u64,
            });
            numbers.push(data);
        }
        Self {
            shape,
            tensors,
            _numbers: numbers,
        }
    }
}

/// A parameter's layer and kind in the table.
pub(super) fn place(id: ParamId) -> (u32, u32) {
    match id {
        ParamId::Embed => (0, table::EMBED),
        ParamId::FinalNorm => (0, table::FINAL_NORM),
        ParamId::Head => (0, table::HEAD),
        ParamId::Layer(layer, which) => (layer.into(), kind(which)),
    }
}

pub(super) fn kind(which: LayerParam) -> u32 {
    match which {
        LayerParam::InputNorm => table::INPUT_NORM,
        LayerParam::Q => table::Q,
        LayerParam::K => table::K,
        LayerParam::V => table::V,
        LayerParam::O => table::O,
        LayerParam::QNorm => table::Q_NORM,
        LayerParam::KNorm => table::K_NORM,
        LayerParam::PostNorm => table::POST_NORM,
        LayerParam::Gate => table::GATE,
        LayerParam::Up => table::UP,
        LayerParam::Down => table::DOWN,
        LayerParam::TttConv => table::TTT_CONV,
        LayerParam::TttProj => table::TTT_PROJ,
    }
}

impl Card {
    /// Copies a model to the card: in bf16 if its matrices are packed in whatever format, in `f32` if they are not.
    ///
    /// # Errors
    /// [`DeviceError::Memory`], or [`DeviceError::Refused`] for a shape that the kernels are not made for.
    pub fn load(self: &Arc<Self>, model: &Model) -> Result<Arc<CardModel>, DeviceError> {
        let packed = Packed::new(model, !model.is_packed());
        let (tensors, n) = (packed.tensors.as_ptr(), packed.tensors.len());
        let mut at = std::ptr::null_mut();
        // SAFETY: the tensors point into `packed`, which lives through the call.
        called(|trouble| unsafe {
            (self.table.model_load)(self.engine, &packed.shape, tensors, n, &mut at, trouble)
        })?;
        let ttt = model
            .config
            .ttt
            .as_ref()
            .filter(|ttt| ttt.mode == TttMode::InPlace);
        Ok(Arc::new(CardModel {
            card: self.clone(),
            at,
            vocab_size: model.config.vocab_size,
            hidden_size: model.config.hidden_size,
            intermediate_size: model.config.intermediate_size,
            learning: ttt.map_or(Vec::new(), |ttt| ttt.layers.clone()),
            chunk_len: ttt.map_or(0, |ttt| ttt.chunk_len),
            lr: ttt.map_or(0.0, |ttt| ttt.lr),
        }))
    }
}

impl Drop for CardModel {
    fn drop(&mut self) {
        // SAFETY: handed out once, freed once; sequences keep the model.
        unsafe { (self.card.table.model_free)(self.at) }
    }
}

impl CardModel {
    /// An empty sequence with room for `capacity` tokens; with `learning`, the model's layers that learn do while it is read.
    ///
    /// # Errors
    /// [`DeviceError::Memory`].
    pub fn sequence(
        self: &Arc<Self>,
        capacity: usize,
        learning: bool,
    ) -> Result<CardSequence, DeviceError> {
        let learning = learning && !self.learning.is_empty();
        let mut at = std::ptr::null_mut();
        // SAFETY: the model is loaded.
        called(|trouble| unsafe {
            (self.card.table.sequence_new)(self.at, capacity, learning.into(), &mut at, trouble)
        })?;
        let layers = self.learning.iter().filter(|_| learning);
        Ok(CardSequence {
            model: self.clone(),
            at,
            ids: Vec::new(),
            losses: ChunkLosses::default(),
            updates: Vec::new(),
            drifts: layers.map(|layer| (*layer, 0.0)).collect(),
            waiting: 0,
            off: false,
            lr: self.lr,
        })
    }

    /// Reads new tokens of sequences of this model, and returns the logits (n, v) of rows, counted through all of them in order.
    ///
    /// # Errors
    /// [`DeviceError::Memory`], [`DeviceError::Lost`], [`DeviceError::Refused`] for tokens that are not the model's. The sequences are
    /// then to be dropped: some layers may have read the tokens, others not.
    pub fn step(
        &self,
        batch: &mut [(&mut CardSequence, &[u32])],
        rows: &[usize],
    ) -> Result<Vec<f32>, DeviceError> {
        let edges = |(sequence, new): &(&mut CardSequence, &[u32])| match sequence.chunk_len() {
            Some(c) => (sequence.ids.len() + new.len()) / c - sequence.ids.len() / c,
            None => 0,
        };
        let room = batch.iter().map(edges).sum::<usize>() * self.learning.len();
        let mut learned = vec![Learned::default(); room];
        let parts: Vec<Part> = batch
            .iter()
            .map(|(sequence, new)| Part {
                sequence: sequence.at,
                tokens: new.as_ptr(),
                n: new.len() as u32,
                off: sequence.off.into(),
                lr: sequence.lr,
                reserved: 0,
            })
            .collect();
        let rows: Vec<u32> = rows.iter().map(|row| *row as u32).collect();
        let mut logits = vec![0.0; rows.len() * self.vocab_size];
        let mut made = 0;
        // SAFETY: each sequence is borrowed alone; lengths are those of the slices; there is room for every edge of every layer.
        called(|trouble| unsafe {
            (self.card.table.step)(
                self.at,
                parts.as_ptr(),
                parts.len(),
                rows.as_ptr(),
                rows.len(),
                logits.as_mut_ptr(),
                learned.as_mut_ptr(),
                learned.len(),
                &mut made,
                trouble,
            )
        })?;
        for update in &learned[..made] {
            let sequence = &mut *batch[update.part as usize].0;
            let tripped = update.tripped != 0;
            let (layer, drift) = (update.layer as u16, update.drift);
            sequence
                .drifts
                .insert(layer, if tripped { 0.0 } else { drift });
            let position = update.position as usize;
            sequence.updates.push((
                layer,
                Update {
                    position,
                    drift,
                    tripped,
                },
            ));
        }
        for (sequence, new) in batch {
            sequence.read(new);
        }
        Ok(logits)
    }
}

/// A sequence in progress on a card. Dropping it frees its memory there.
pub struct CardSequence {
    model: Arc<CardModel>,
    at: *mut c_void,
    /// The tokens whose keys and values are on the card.
    pub ids: Vec<u32>,
    pub losses: ChunkLosses,
    /// What was learned since somebody last took these, with the layer it was learned in.
    pub updates: Vec<(u16, Update)>,
    drifts: BTreeMap<u16, f32>,
    waiting: usize,
    off: bool,
    lr: f32,
}

// SAFETY: used by the thread that has it.
unsafe impl Send for CardSequence {}

impl Drop for CardSequence {
    fn drop(&mut self) {
        // SAFETY: handed out once, freed once.
        unsafe { (self.model.card.table.sequence_free)(self.at) }
    }
}

impl CardSequence {
    pub fn model(&self) -> &Arc<CardModel> {
        &self.model
    }

    /// Whether anything learns.
    pub fn is_learning(&self) -> bool {
        !self.drifts.is_empty()
    }

    /// Tokens of a chunk, where anything learns.
    pub fn chunk_len(&self) -> Option<usize> {
        self.is_learning().then_some(self.model.chunk_len)
    }

    /// Layers that learn, with their drift.
    pub fn drifts(&self) -> &BTreeMap<u16, f32> {
        &self.drifts
    }

    /// Tokens that wait for the edge.
    pub fn waiting(&self) -> usize {
        self.waiting
    }

    fn read(&mut self, new: &[u32]) {
        if let Some(c) = self.chunk_len() {
            let (mut position, mut left) = (self.ids.len(), new.len());
            while left > 0 {
                let n = left.min(c - position % c);
                let reading = self.waiting == position % c && !self.off;
                position += n;
                left -= n;
                self.waiting = match reading && !position.is_multiple_of(c) {
                    true => self.waiting + n,
                    false => 0,
                };
            }
        }
        self.ids.extend_from_slice(new);
    }

    /// Back to the trained weights; the rest of the open chunk is not learned from.
    pub fn reset(&mut self) {
        // SAFETY: nobody else has the sequence.
        unsafe { (self.model.card.table.sequence_reset)(self.at) }
        self.drifts.values_mut().for_each(|drift| *drift = 0.0);
        self.waiting = 0;
    }

    /// Switched off, the trained weights play and nothing is learned; switched on again, learning begins with the next whole chunk.
    pub fn switch(&mut self, on: bool) {
        if !on {
            self.reset();
        }
        self.off = !on;
    }

    /// Multiplies the trained step size by `factor`.
    pub fn scale_step(&mut self, factor: f32) {
        self.lr = self.model.lr * factor;
    }

    /// Bytes of keys, values and fast weights on the card.
    pub fn bytes(&self) -> usize {
        // SAFETY: asks for a number.
        unsafe { (self.model.card.table.sequence_bytes)(self.at) as usize }
    }

    /// Bytes of fast weights and of what waits, as far as this side knows: a layer that has learned has a weight of its own.
    pub fn fast_bytes(&self) -> usize {
        let (d, f) = (self.model.hidden_size, self.model.intermediate_size);
        let own = self.drifts.values().filter(|drift| **drift > 0.0).count() * d * f;
        let waiting = match self.waiting {
            0 => 0,
            _ => self.drifts.len() * self.model.chunk_len * (d + f),
        };
        4 * (own + waiting)
    }

    /// Cuts it back to its first `len` tokens; false, and nothing changed, if what was learned from later ones cannot be taken back.
    #[must_use]
    pub fn truncate(&mut self, len: usize) -> bool {
        // SAFETY: nobody else has the sequence.
        let cut = called(|trouble| unsafe {
            (self.model.card.table.sequence_cut)(self.at, len, trouble)
        });
        if cut.is_ok() {
            self.cut_back(len);
        }
        cut.is_ok()
    }

    fn cut_back(&mut self, len: usize) {
        if len >= self.ids.len() {
            return;
        }
        if let Some(c) = self.chunk_len() {
            self.waiting = self.waiting.min(len % c);
            self.losses.truncate(len / c);
        }
        self.ids.truncate(len);
    }

    /// A sequence that begins with this one's first `len` tokens, with room for `capacity`. `None` where the card has no memory for
    /// it, or what was learned from later tokens cannot be taken back.
    pub fn prefix(&self, len: usize, capacity: usize) -> Option<Self> {
        let mut at = std::ptr::null_mut();
        // SAFETY: reads the sequence.
        let copied = called(|trouble| unsafe {
            (self.model.card.table.sequence_copy)(self.at, len, capacity, &mut at, trouble)
        });
        copied.ok()?;
        let mut copy = Self {
            model: self.model.clone(),
            at,
            ids: self.ids.clone(),
            losses: self.losses.clone(),
            updates: Vec::new(),
            drifts: self.drifts.clone(),
            waiting: self.waiting,
            off: self.off,
            lr: self.lr,
        };
        copy.cut_back(len);
        Some(copy)
    }
}
