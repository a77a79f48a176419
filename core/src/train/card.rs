//! A training whose tensors are on a card: what `fit` does with them there.

use std::collections::BTreeMap;

use super::fit::{ids_of, leave_out, pack, targets, Sample, StepOutcome, Trainee};
use super::optim::AdamW;
use super::TrainError;
use crate::device::{CardTraining, Device, DeviceError, Numbers};
use crate::model::{PackedRows, TrainId};

/// Rows of a held-out batch.
const HELD_OUT_ROWS: usize = 8192;

pub(super) struct OnCard {
    training: CardTraining,
    trainable: Vec<(TrainId, usize)>,
}

impl OnCard {
    /// Copies trainee and moments to the card, if there is one that takes them.
    pub fn begin(
        device: &Device,
        trainee: &mut Trainee,
        trainable: &[(TrainId, usize)],
        adam: &AdamW,
        first: usize,
    ) -> Option<Self> {
        let card = device.card()?;
        let mut copied = || -> Result<Self, DeviceError> {
            // AdamW's numbers of a step come in the order of its tensors.
            let trainable: BTreeMap<TrainId, usize> = trainable.iter().copied().collect();
            let trainable: Vec<(TrainId, usize)> = trainable.into_iter().collect();
            let lora = trainee.lora.clone();
            let model = &trainee.model;
            let mut training = CardTraining::begin(&card, model, lora.as_ref(), &trainable, first)?;
            for &(id, _) in &trainable {
                let mut put = Ok(());
                trainee.with(id, &mut |w| put = training.put(id, Numbers::Value, w));
                put?;
                let (m, v) = &adam.moments[&id];
                training.put(id, Numbers::FirstMoment, m)?;
                training.put(id, Numbers::SecondMoment, v)?;
            }
            Ok(Self {
                training,
                trainable,
            })
        };
        match copied() {
            Ok(on) => Some(on),
            Err(why) => {
                device.note(&why);
                None
            }
        }
    }

    /// Copies weights, and with `adam` moments, back to where the processor has them.
    pub fn bring_back(
        on: &Option<Self>,
        trainee: &mut Trainee,
        mut adam: Option<&mut AdamW>,
    ) -> Result<(), TrainError> {
        let Some(Self {
            training,
            trainable,
        }) = on
        else {
            return Ok(());
        };
        for &(id, _) in trainable {
            let mut got = Ok(());
            trainee.with(id, &mut |w| got = training.get(id, Numbers::Value, w));
            got?;
            if let Some(adam) = adam.as_deref_mut() {
                let (m, v) = adam.moments.get_mut(&id).expect("what moves has moments");
                training.get(id, Numbers::FirstMoment, m)?;
                training.get(id, Numbers::SecondMoment, v)?;
            }
        }
        Ok(())
    }

    /// As `fit::step_gradients`; after an error nothing has moved. `ttt_lr`: the step size of layers that learn while they read.
    pub fn step_gradients(
        &mut self,
        samples: &[Sample],
        batch: &[usize],
        trim: Option<f64>,
        ttt_lr: f32,
    ) -> Result<StepOutcome, DeviceError> {
        let rows = whole(samples, batch);
        self.training
            .forward(&ids_of(samples, batch), ttt_lr, true)?;
        let (at, labels, mut weights, owner) = targets(samples, batch, &rows);
        let mut outcome = StepOutcome {
            loss: 0.0,
            weight: 0.0,
            tokens: rows.len() as u64,
            shared: 0,
            trimmed: 0,
        };
        if let Some(below) = trim {
            let seen = self.training.head((&at, &labels, &weights), None)?;
            outcome.trimmed = leave_out(below, &seen.nll, &owner, &mut weights);
        }
        let weight: f32 = weights.iter().sum();
        if weight <= 0.0 {
            return Ok(outcome);
        }
        let asked = (&at[..], &labels[..], &weights[..]);
        let loss = self.training.head(asked, Some(1.0 / weight))?;
        self.training.backward()?;
        (outcome.loss, outcome.weight) = (loss.loss, loss.weight);
        Ok(outcome)
    }

    /// One step of AdamW by the gradients there.
    pub fn move_tensors(&mut self, adam: &mut AdamW, lr: f64, clip: f64) -> Result<(), TrainError> {
        let norms = self.training.squared_norms()?;
        let ids = self.trainable.iter().map(|(id, _)| *id);
        let (_, rates) = adam.rates(lr, clip, &ids.zip(norms).collect())?;
        Ok(self.training.apply(&rates)?)
    }

    /// As `fit::held_out_loss`.
    pub fn held_out_loss(
        &mut self,
        samples: &[Sample],
        ttt_lr: f32,
    ) -> Result<(f64, f64), TrainError> {
        let all: Vec<usize> = (0..samples.len())
            .filter(|&i| samples[i].is_usable())
            .collect();
        let (mut loss, mut weight, mut exact, mut asked) = (0.0, 0.0, 0usize, 0usize);
        for batch in pack(&all, samples, HELD_OUT_ROWS) {
            self.training
                .forward(&ids_of(samples, &batch), ttt_lr, false)?;
            let rows = whole(samples, &batch);
            let (at, labels, weights, owner) = targets(samples, &batch, &rows);
            let seen = self.training.head((&at, &labels, &weights), None)?;
            loss += seen.loss;
            weight += seen.weight;
            let mut right = vec![true; owner.last().map_or(0, |last| last + 1)];
            for (hit, &o) in seen.hits.iter().zip(&owner) {
                right[o] &= *hit;
            }
            exact += right.iter().filter(|r| **r).count();
            asked += right.len();
        }
        Ok((loss / weight.max(1e-9), exact as f64 / asked.max(1) as f64))
    }
}

/// Samples one after another: what several begin with is computed for each of them.
fn whole(samples: &[Sample], batch: &[usize]) -> PackedRows<'static> {
    let lengths: Vec<usize> = batch.iter().map(|&i| samples[i].ids.len()).collect();
    PackedRows::new(&lengths)
}
