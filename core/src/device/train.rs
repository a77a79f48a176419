//! A training's tensors and passes on the card; its loop is in [`crate::train`].

use std::ffi::c_void;
use std::sync::Arc;

use super::serve::{kind, place, Packed};
use super::table::{self, Moves, Rate};
use super::{called, Card, DeviceError};
use crate::model::{Compute, HeadLoss, Lora, Model, TrainId};
use crate::ttt::TttTarget;

/// Weights, moments and activations of one training on a card. Its calls wait until the card has done them.
pub struct CardTraining {
    card: Arc<Card>,
    at: *mut c_void,
    moves: Vec<(TrainId, usize)>,
}

// SAFETY: used by the thread that has it.
unsafe impl Send for CardTraining {}

/// AdamW's numbers for one step: `w = w · decay − rate · m / (√v / root + ε)` by tensor, with gradients times `scale`.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainRates {
    /// (rate, decay) of each tensor, in the order in which they were given.
    pub tensors: Vec<(f32, f32)>,
    pub scale: f32,
    pub root: f32,
}

/// Which of a tensor's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numbers {
    Value,
    FirstMoment,
    SecondMoment,
    Gradient,
}

impl Numbers {
    fn code(self) -> u32 {
        match self {
            Self::Value => table::VALUE,
            Self::FirstMoment => table::FIRST_MOMENT,
            Self::SecondMoment => table::SECOND_MOMENT,
            Self::Gradient => table::GRADIENT,
        }
    }
}

impl CardTraining {
    /// Copies a model to the card, to move these tensors from block `first` on. Their values are set by [`Self::put`]; moments and
    /// gradients are zero.
    ///
    /// # Errors
    /// [`DeviceError::Memory`]; [`DeviceError::Refused`] for layers that learn from the tokens' embeddings, which nobody trains.
    pub fn begin(
        card: &Arc<Card>,
        model: &Model,
        lora: Option<&Lora>,
        moves: &[(TrainId, usize)],
        first: usize,
    ) -> Result<Self, DeviceError> {
        let target = model.config.ttt.as_ref().map(|ttt| ttt.target);
        if target == Some(TttTarget::InputEmbed) {
            let why = "ttt_target input_embed can be served, not trained";
            return Err(DeviceError::Refused(why.into()));
        }
        let packed = Packed::new(model, model.compute == Compute::F32);
        let list: Vec<Moves> = moves
            .iter()
            .map(|(id, len)| {
                let (kind, (layer, which)) = match *id {
                    TrainId::Full(id) => (table::FULL, place(id)),
                    TrainId::LoraA(layer, which) => (table::LORA_A, (layer.into(), kind(which))),
                    TrainId::LoraB(layer, which) => (table::LORA_B, (layer.into(), kind(which))),
                };
                Moves {
                    kind,
                    which,
                    layer,
                    reserved: 0,
                    len: *len as u64,
                }
            })
            .collect();
        let (rank, scale) = lora.map_or((0, 0.0), |lora| (lora.config.rank as u32, lora.scale()));
        let mut at = std::ptr::null_mut();
        // SAFETY: the tensors point into `packed`, which lives through the call.
        called(|trouble| unsafe {
            (card.table.train_open)(
                card.engine,
                &packed.shape,
                packed.tensors.as_ptr(),
                packed.tensors.len(),
                list.as_ptr(),
                list.len(),
                rank,
                scale,
                first as u32,
                &mut at,
                trouble,
            )
        })?;
        Ok(Self {
            card: card.clone(),
            at,
            moves: moves.to_vec(),
        })
    }

    fn index(&self, id: TrainId) -> usize {
        let at = self.moves.iter().position(|(known, _)| *known == id);
        at.expect("only tensors that move are asked for")
    }

    /// Sets a tensor's numbers.
    ///
    /// # Panics
    /// If the tensor does not move.
    pub fn put(&mut self, id: TrainId, which: Numbers, data: &[f32]) -> Result<(), DeviceError> {
        let (at, len) = (self.index(id), data.len() as u64);
        // SAFETY: as many numbers as said.
        called(|trouble| unsafe {
            (self.card.table.train_put)(self.at, at, which.code(), data.as_ptr(), len, trouble)
        })
    }

    /// Reads a tensor's numbers.
    ///
    /// # Panics
    /// As [`Self::put`].
    pub fn get(&self, id: TrainId, which: Numbers, data: &mut [f32]) -> Result<(), DeviceError> {
        let (at, len) = (self.index(id), data.len() as u64);
        // SAFETY: as many numbers as said.
        called(|trouble| unsafe {
            (self.card.table.train_get)(self.at, at, which.code(), data.as_mut_ptr(), len, trouble)
        })
    }

    /// Sequences through all blocks, each whole; with `keep`, [`Self::backward`] may follow. `lr`: the step size η of layers that learn
    /// while they read, whatever it was when the model was copied.
    pub fn forward(
        &mut self,
        sequences: &[&[u32]],
        lr: f32,
        keep: bool,
    ) -> Result<(), DeviceError> {
        let ids = sequences.concat();
        let lens: Vec<u32> = sequences.iter().map(|ids| ids.len() as u32).collect();
        // SAFETY: lengths are those of the vectors.
        called(|trouble| unsafe {
            (self.card.table.train_forward)(
                self.at,
                ids.as_ptr(),
                ids.len(),
                lens.as_ptr(),
                lens.len(),
                lr,
                keep.into(),
                trouble,
            )
        })
    }

    /// Losses of rows of the last forward pass, as [`Model::head_loss`] has them. With a scale, the backward pass will begin with
    /// `scale · d(Σ weight · nll)`; rows must then be different ones.
    pub fn head(
        &mut self,
        (rows, labels, weights): (&[usize], &[u32], &[f32]),
        scale: Option<f32>,
    ) -> Result<HeadLoss, DeviceError> {
        let rows: Vec<u32> = rows.iter().map(|row| *row as u32).collect();
        let (mut nll, mut hits) = (vec![0f32; rows.len()], vec![0u32; rows.len()]);
        // SAFETY: all are as long as `rows`.
        called(|trouble| unsafe {
            (self.card.table.train_head)(
                self.at,
                rows.as_ptr(),
                labels.as_ptr(),
                weights.as_ptr(),
                rows.len(),
                scale.unwrap_or(0.0),
                nll.as_mut_ptr(),
                hits.as_mut_ptr(),
                trouble,
            )
        })?;
        let weighted = nll.iter().zip(weights);
        Ok(HeadLoss {
            loss: weighted
                .map(|(nll, w)| f64::from(*w) * f64::from(*nll))
                .sum(),
            weight: weights.iter().map(|w| f64::from(*w)).sum(),
            nll,
            hits: hits.into_iter().map(|hit| hit != 0).collect(),
        })
    }

    /// Adds to the gradients' sums what the last head began.
    pub fn backward(&mut self) -> Result<(), DeviceError> {
        // SAFETY: a handle of the table's.
        called(|trouble| unsafe { (self.card.table.train_backward)(self.at, trouble) })
    }

    /// The squared norm of each tensor's gradient, in their order.
    pub fn squared_norms(&self) -> Result<Vec<f64>, DeviceError> {
        let mut norms = vec![0.0; self.moves.len()];
        // SAFETY: one number a tensor.
        called(|trouble| unsafe {
            (self.card.table.train_norms)(self.at, norms.as_mut_ptr(), trouble)
        })?;
        Ok(norms)
    }

    /// One step of AdamW; the gradients' sums are zero afterwards.
    ///
    /// # Panics
    /// If there are not as many rates as tensors.
    pub fn apply(&mut self, rates: &TrainRates) -> Result<(), DeviceError> {
        assert_eq!(
            rates.tensors.len(),
            self.moves.len(),
            "a rate for each tensor"
        );
        let list = rates.tensors.iter();
        let list: Vec<Rate> = list.map(|&(rate, decay)| Rate { rate, decay }).collect();
        // SAFETY: one rate a tensor.
        called(|trouble| unsafe {
            (self.card.table.train_apply)(self.at, list.as_ptr(), rates.scale, rates.root, trouble)
        })
    }
}

impl Drop for CardTraining {
    fn drop(&mut self) {
        // SAFETY: handed out once, freed once.
        unsafe { (self.card.table.train_close)(self.at) }
    }
}
