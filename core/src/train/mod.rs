//! Supervised fine-tuning in the background: one loop for the upper layers, LoRA and full fine-tuning alike. What differs is a list of tensors.

mod card;
mod checkpoint;
mod fit;
mod memory;
mod optim;
mod plan;
#[cfg(test)]
mod tests;

pub use checkpoint::forget;
pub use fit::{
    evaluate_loss, fit, fit_on, CurvePoint, Flow, Progress, Sample, StopReason, Trained,
};
pub use memory::Memory;
pub use optim::{AdamW, Schedule};
pub use plan::{Method, TrainPlan, TttPlan};

use crate::device::DeviceError;
use crate::model::ModelError;

/// Why a training could not be done. The base model is never touched.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error("there is nothing to train on: no sample carries loss")]
    Empty,
    #[error("the training plan is not possible: {0}")]
    Plan(String),
    #[error("tensor {0} got no gradient in the first two steps")]
    NoGradient(String),
    #[error("the loss is no longer a finite number at step {step}")]
    Diverged { step: u64 },
    /// The recipe's rates are too high for this model.
    #[error(
        "the held-out loss has gone from {before:.2} to {loss:.2} nats a token by step {step}: a lower lr, or ttt_rate and ttt_lr, may hold"
    )]
    RunAway { step: u64, before: f64, loss: f64 },
    /// Even with every block computed again in its backward pass. What helps is in the message.
    #[error(
        "the training needs {} MiB and may use {}: raise memory_mib, lower batch_tokens, or train with lora, or fewer upper_layers",
        needed.div_ceil(1 << 20), limit >> 20
    )]
    Memory { needed: u64, limit: u64 },
    #[error("checkpoint {path}: {why}")]
    Checkpoint { path: String, why: String },
    /// The card failed: what was computed there since the last checkpoint is gone.
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error("the job was cancelled")]
    Cancelled,
}
