//! Where a sequence is read: on the processor, or on a card. A card that has no room or fails costs time and no answer: what was read
//! is known, and is read again on the processor.

use std::sync::{Arc, Weak};

use super::fast::{FastLayer, FastOrder, FastReport};
use crate::device::{CardModel, CardSequence, Device, DeviceError};
use crate::kernels::Pool;
use crate::model::{ChunkLosses, Model, ModelError, Sequence};
use crate::ttt::{TttConfig, TttMode, Update};

/// A sequence in progress.
pub(super) enum Seat {
    Host(Sequence),
    Card(CardSequence),
}

impl Seat {
    pub fn is_on_card(&self) -> bool {
        matches!(self, Self::Card(_))
    }

    /// The tokens that were read.
    pub fn ids(&self) -> &[u32] {
        match self {
            Self::Host(sequence) => &sequence.ids,
            Self::Card(sequence) => &sequence.ids,
        }
    }

    pub fn is_learning(&self) -> bool {
        match self {
            Self::Host(sequence) => sequence.fast.is_on(),
            Self::Card(sequence) => sequence.is_learning(),
        }
    }

    /// Tokens of a chunk, where anything learns.
    pub fn chunk_len(&self) -> Option<usize> {
        match self {
            Self::Host(sequence) => sequence.fast.chunk_len(),
            Self::Card(sequence) => sequence.chunk_len(),
        }
    }

    /// As [`Sequence::truncate`].
    #[must_use]
    pub fn truncate(&mut self, len: usize) -> bool {
        match self {
            Self::Host(sequence) => sequence.truncate(len),
            Self::Card(sequence) => sequence.truncate(len),
        }
    }

    /// As [`Sequence::prefix`]; on a card also `None` where it has no memory left.
    pub fn prefix(&self, len: usize, capacity: usize) -> Option<Self> {
        match self {
            Self::Host(sequence) => sequence.prefix(len, capacity).map(Self::Host),
            Self::Card(sequence) => sequence.prefix(len, capacity).map(Self::Card),
        }
    }

    /// A copy, if there is memory for one.
    pub fn copy(&self) -> Option<Self> {
        match self {
            Self::Host(sequence) => Some(Self::Host(sequence.clone())),
            Self::Card(sequence) => {
                let all = sequence.ids.len();
                sequence.prefix(all, all).map(Self::Card)
            }
        }
    }

    pub fn bytes(&self) -> usize {
        match self {
            Self::Host(sequence) => sequence.bytes(),
            Self::Card(sequence) => sequence.bytes(),
        }
    }

    /// The largest drift of a layer now.
    pub fn drift(&self) -> f32 {
        match self {
            Self::Host(sequence) => sequence.fast.drift(),
            Self::Card(sequence) => sequence.drifts().values().copied().fold(0.0, f32::max),
        }
    }

    /// What was learned since this was last asked.
    pub fn take_updates(&mut self) -> Vec<(u16, Update)> {
        match self {
            Self::Host(sequence) => std::mem::take(&mut sequence.fast.updates),
            Self::Card(sequence) => std::mem::take(&mut sequence.updates),
        }
    }

    pub fn losses(&self) -> &ChunkLosses {
        match self {
            Self::Host(sequence) => &sequence.fast.losses,
            Self::Card(sequence) => &sequence.losses,
        }
    }

    pub fn losses_mut(&mut self) -> &mut ChunkLosses {
        match self {
            Self::Host(sequence) => &mut sequence.fast.losses,
            Self::Card(sequence) => &mut sequence.losses,
        }
    }

    /// Back to the trained weights.
    pub fn reset(&mut self) {
        match self {
            Self::Host(sequence) => sequence.fast.reset(),
            Self::Card(sequence) => sequence.reset(),
        }
    }

    /// Does what a rule, or the absence of one, says; `ruled`: whether there is one, which looks at every edge.
    pub fn obey(&mut self, order: FastOrder, ruled: bool, trained: &TttConfig) {
        if order.reset {
            self.reset();
        }
        match self {
            Self::Host(sequence) => {
                sequence.fast.at_once = ruled;
                sequence.fast.switch(order.on);
                sequence.fast.scale_step(trained, order.step);
            }
            Self::Card(sequence) => {
                sequence.switch(order.on);
                sequence.scale_step(order.step);
            }
        }
    }

    pub fn report(&self) -> FastReport {
        let (bytes, layers) = match self {
            Self::Host(sequence) => {
                let layers = sequence.fast.layers.iter();
                let layers = layers.map(|(layer, weight)| FastLayer {
                    layer: *layer,
                    drift: weight.drift(),
                    waiting: weight.waiting(),
                });
                (sequence.fast.bytes(), layers.collect())
            }
            Self::Card(sequence) => {
                let layers = sequence.drifts().iter();
                let layers = layers.map(|(layer, drift)| FastLayer {
                    layer: *layer,
                    drift: *drift,
                    waiting: sequence.waiting(),
                });
                (sequence.fast_bytes(), layers.collect())
            }
        };
        FastReport {
            on: self.is_learning(),
            position: self.ids().len(),
            chunk: self.chunk_len().unwrap_or(0),
            bytes,
            drift: self.drift(),
            layers,
            ..FastReport::default()
        }
    }
}

/// Why tokens were not read.
pub(super) enum Unread {
    Model(ModelError),
    Card(DeviceError),
}

/// Reads new tokens of sequences of one model that are all in one place, and returns the logits (n, v) of rows, counted through all.
///
/// # Panics
/// If they are in two places.
pub(super) fn read(
    pool: &Pool,
    model: &Model,
    parts: &mut [(&mut Seat, &[u32])],
    rows: &[usize],
) -> Result<Vec<f32>, Unread> {
    let on = parts.first().and_then(|(seat, _)| match seat {
        Seat::Card(sequence) => Some(sequence.model().clone()),
        Seat::Host(_) => None,
    });
    match on {
        Some(on) => {
            let mut batch: Vec<(&mut CardSequence, &[u32])> = parts
                .iter_mut()
                .map(|(seat, new)| match seat {
                    Seat::Card(sequence) => (sequence, *new),
                    Seat::Host(_) => unreachable!("a step is made in one place"),
                })
                .collect();
            on.step(&mut batch, rows).map_err(Unread::Card)
        }
        None => {
            let mut batch: Vec<(&mut Sequence, &[u32])> = parts
                .iter_mut()
                .map(|(seat, new)| match seat {
                    Seat::Host(sequence) => (sequence, *new),
                    Seat::Card(_) => unreachable!("a step is made in one place"),
                })
                .collect();
            let hidden = model.step(pool, &mut batch).map_err(Unread::Model)?;
            Ok(match rows.is_empty() {
                true => Vec::new(),
                false => model.logits(pool, &hidden, rows),
            })
        }
    }
}

/// The models that are on the card, each put there by its first job.
pub(super) struct Cards {
    device: Arc<Device>,
    /// `None` for a model that the card did not take.
    models: Vec<(Weak<Model>, Option<Arc<CardModel>>)>,
}

impl Cards {
    pub fn new(device: Arc<Device>) -> Self {
        Self {
            device,
            models: Vec::new(),
        }
    }

    /// Whether any model is on a card.
    pub fn serve(&self) -> bool {
        self.models.iter().any(|(_, on)| on.is_some())
    }

    /// An empty sequence, on the card if it takes the model.
    pub fn sequence(&mut self, model: &Arc<Model>, capacity: usize, learning: bool) -> Seat {
        let by_gradients = |ttt: &TttConfig| ttt.mode == TttMode::Gradient;
        let able = !(learning && model.config.ttt.as_ref().is_some_and(by_gradients));
        if let Some(on) = able.then(|| self.model(model)).flatten() {
            match on.sequence(capacity, learning) {
                Ok(sequence) => return Seat::Card(sequence),
                Err(why) => self.failed(&why),
            }
        }
        Seat::Host(model.sequence(capacity, learning))
    }

    fn model(&mut self, model: &Arc<Model>) -> Option<Arc<CardModel>> {
        self.models.retain(|(known, _)| known.strong_count() > 0);
        let same =
            |(known, _): &&(Weak<Model>, _)| std::ptr::eq(known.as_ptr(), Arc::as_ptr(model));
        if let Some((_, on)) = self.models.iter().find(same) {
            return on.clone();
        }
        let card = self.device.card()?;
        let on = match card.load(model) {
            Ok(on) => Some(on),
            Err(why) => {
                self.failed(&why);
                None
            }
        };
        self.models.push((Arc::downgrade(model), on.clone()));
        on
    }

    /// Notes a failure; a lost card has no models any more.
    pub fn failed(&mut self, why: &DeviceError) {
        self.device.note(why);
        if let DeviceError::Lost(_) = why {
            self.models.clear();
        }
    }
}
