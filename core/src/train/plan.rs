//! The plan of a training: checked once, then passed as it is.

use serde::{Deserialize, Serialize};

use super::TrainError;
use crate::kernels::features;
use crate::model::{Compute, Config, LayerParam, ParamId, TrainId, LINEARS};
use crate::policy::RecipeKnobs;
use crate::ttt::{Forgetting, TttConfig, TttStart, MOST_DELTA};

/// Which tensors move.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// The last `layers` blocks and the final norm; the outputs of the frozen blocks below are computed once for each sample and kept.
    Upper { layers: usize },
    /// Low-rank adapters on all seven matrices of every block.
    Lora { rank: usize, alpha: f64 },
    /// Every parameter.
    Full,
}

/// Everything that decides how a training runs. The same plan, data and base give the same losses.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainPlan {
    pub method: Method,
    /// Peak learning rate.
    pub lr: f64,
    /// Tokens to read in all, prompts included, counting repeated samples again.
    pub tokens: u64,
    /// Stops after this many seconds even if tokens are left, with the learning rate brought down by then; 0 = no limit.
    /// Only without a limit is a run the same on every machine.
    pub max_seconds: f64,
    /// Tokens of one optimiser step, at most (a longer sample makes a step alone).
    pub batch_tokens: usize,
    pub warmup_steps: u64,
    pub weight_decay: f64,
    pub clip: f64,
    /// Once this share of the tokens is read, targets in which the student gives some token less than `trim_below` are left out:
    /// by then it is more often the teacher's slip than the student's ignorance (small-loss selection, arXiv:1804.06872).
    pub trim_after: f64,
    pub trim_below: f64,
    /// Looks at the held-out samples, spread evenly over the job; 0 = never.
    pub evaluations: usize,
    /// Evaluations in a row without a better held-out loss after which the job ends with the best weights; 0 = never.
    pub patience: usize,
    pub seed: u64,
    /// Bytes for the frozen blocks' outputs of `Upper`.
    pub cache_bytes: usize,
    /// Seconds between checkpoints.
    pub checkpoint_seconds: f64,
    /// In which numbers products are computed; weights, moments and sums are `f32` all the same.
    #[serde(default)]
    pub compute: Compute,
    /// Bytes that the training may take in all ([`Memory`](super::Memory)); 0 = [`DEFAULT_TRAIN_BYTES`](crate::limits::DEFAULT_TRAIN_BYTES).
    /// Where the activations of all blocks do not fit, some are computed again in the backward pass, to the same bits.
    #[serde(default)]
    pub memory_bytes: u64,
    /// Computes what several samples of a step begin with once ([`PackedRows::sharing`](crate::model::PackedRows::sharing)). Losses and
    /// gradients are the same up to the order of sums; the batches are the same. Without effect on layers that learn while they read.
    #[serde(default = "shares")]
    pub share_beginnings: bool,
    /// Layers that learn while the student reads, given to a model that has none.
    #[serde(default)]
    pub ttt: Option<TttPlan>,
}

/// How a model comes by layers that learn while it reads, and how fast those are trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TttPlan {
    pub start: TttStart,
    /// Every which layer learns, from the first on.
    pub every: usize,
    pub chunk_len: usize,
    /// The step size η of the updates; training comes up to it over a tenth of the job.
    pub lr: f64,
    /// Peak learning rate of filters and projections. They have no weight decay.
    pub rate: f64,
    /// Share of the job behind which the layers begin to learn; up to there it is that of a plain student.
    #[serde(default)]
    pub from: f64,
    /// [`Forgetting::Decay`] with this γ.
    #[serde(default)]
    pub decay: Option<f64>,
    /// [`Forgetting::Delta`] with this β, without a decay.
    #[serde(default)]
    pub delta: Option<f64>,
}

impl TttPlan {
    /// Settings of the layers in a model of so many.
    pub fn config(&self, num_hidden_layers: usize) -> TttConfig {
        TttConfig {
            layers: (0..num_hidden_layers as u16).step_by(self.every).collect(),
            chunk_len: self.chunk_len,
            lr: self.lr as f32,
            forgets: match (self.decay, self.delta) {
                (Some(decay), _) => Forgetting::Decay(decay as f32),
                (None, Some(delta)) => Forgetting::Delta(delta as f32),
                (None, None) => Forgetting::Nothing,
            },
            ..TttConfig::default()
        }
    }

    fn from_knobs(knobs: &RecipeKnobs) -> Result<Option<Self>, TrainError> {
        let start = match knobs.ttt.as_deref() {
            None | Some("off") => return Ok(None),
            Some("published") => TttStart::Published,
            Some("next_token") => TttStart::NextToken,
            Some(other) => {
                return Err(TrainError::Plan(format!(
                    "ttt {other:?} is none of published, next_token, off"
                )))
            }
        };
        if knobs.ttt_decay.is_some() && knobs.ttt_delta.is_some() {
            let why = "ttt_decay and ttt_delta: a layer forgets in one way";
            return Err(TrainError::Plan(why.into()));
        }
        Ok(Some(Self {
            start,
            every: knobs.ttt_every.unwrap_or(6).max(1),
            chunk_len: knobs.ttt_chunk.unwrap_or(256).clamp(8, 1 << 14),
            lr: knobs.ttt_lr.unwrap_or(0.3).clamp(0.0, 10.0),
            // A full matrix moves by its rate in every entry, so its norm grows with the model's width.
            rate: knobs
                .ttt_rate
                .unwrap_or(match start {
                    TttStart::Published => 3e-4,
                    TttStart::NextToken => 2e-5,
                })
                .clamp(1e-7, 1e-1),
            from: knobs.ttt_from.unwrap_or(0.0).clamp(0.0, 0.9),
            decay: knobs.ttt_decay.map(|kept| kept.clamp(0.0, 1.0)),
            delta: (knobs.ttt_delta).map(|strength| strength.clamp(0.0, MOST_DELTA.into())),
        }))
    }
}

impl Default for TrainPlan {
    fn default() -> Self {
        Self {
            method: Method::Upper { layers: 15 },
            lr: 3e-4,
            tokens: 200_000,
            max_seconds: 0.0,
            batch_tokens: 640,
            warmup_steps: 10,
            weight_decay: 0.0,
            clip: 1.0,
            trim_after: 1.0,
            trim_below: 0.05,
            evaluations: 10,
            patience: 0,
            seed: 0,
            cache_bytes: 2 << 30,
            checkpoint_seconds: 45.0,
            compute: Compute::F32,
            memory_bytes: 0,
            share_beginnings: shares(),
            ttt: None,
        }
    }
}

/// Also for plans of checkpoints from before there was a choice: they go on, to losses that differ by rounding.
fn shares() -> bool {
    true
}

impl TrainPlan {
    /// Whether a training that began under this plan may go on under another. In which numbers products are computed may change, as
    /// it does where a job is taken up on another machine: weights and moments are `f32` in either.
    pub(super) fn goes_on_as(&self, other: &Self) -> bool {
        let compute = other.compute;
        Self {
            compute,
            ..self.clone()
        } == *other
    }

    /// The built-in recipe with a policy's or a caller's knobs turned, each clamped to what cannot do harm.
    ///
    /// # Errors
    /// [`TrainError::Plan`] for an unknown method or numbers.
    pub fn from_knobs(
        config: &Config,
        dataset_tokens: usize,
        knobs: &RecipeKnobs,
    ) -> Result<Self, TrainError> {
        let mut plan = Self::default();
        let layers = config.num_hidden_layers;
        let upper = knobs
            .upper_layers
            .unwrap_or(layers.div_ceil(2))
            .clamp(1, layers);
        plan.method = match knobs.method.as_deref() {
            None | Some("upper") => Method::Upper { layers: upper },
            Some("lora") => {
                let rank = knobs.rank.unwrap_or(16).clamp(1, 256);
                Method::Lora {
                    rank,
                    alpha: knobs.alpha.unwrap_or(2.0 * rank as f64).clamp(0.1, 1024.0),
                }
            }
            Some("full") => Method::Full,
            Some(other) => {
                return Err(TrainError::Plan(format!(
                    "method {other:?} is none of upper, lora, full"
                )))
            }
        };
        let default_lr = match plan.method {
            Method::Upper { .. } => 3e-4,
            Method::Lora { .. } => 1e-3,
            Method::Full => 1e-4,
        };
        plan.lr = knobs.lr.unwrap_or(default_lr).clamp(1e-7, 1e-1);
        plan.tokens = match (knobs.tokens, knobs.epochs) {
            (Some(tokens), _) => tokens,
            (None, Some(epochs)) => (epochs.clamp(0.01, 1000.0) * dataset_tokens as f64) as u64,
            (None, None) => (4 * dataset_tokens as u64).clamp(20_000, 400_000),
        }
        .clamp(1, 1_000_000_000);
        plan.max_seconds = knobs.max_seconds.unwrap_or(0.0).max(0.0);
        plan.batch_tokens = knobs
            .batch_tokens
            .unwrap_or(plan.batch_tokens)
            .clamp(16, 1 << 16);
        plan.warmup_steps = knobs.warmup_steps.map_or(plan.warmup_steps, |n| n as u64);
        plan.weight_decay = knobs.weight_decay.unwrap_or(0.0).clamp(0.0, 1.0);
        plan.trim_after = knobs.trim_after.unwrap_or(1.0).clamp(0.0, 1.0);
        plan.trim_below = knobs.trim_below.unwrap_or(plan.trim_below).clamp(0.0, 0.9);
        plan.patience = knobs.patience.unwrap_or(0);
        plan.seed = knobs.seed.unwrap_or(0);
        plan.memory_bytes = (knobs.memory_mib.unwrap_or(0) as u64).saturating_mul(1 << 20);
        plan.ttt = TttPlan::from_knobs(knobs)?;
        plan.compute = match knobs.compute.as_deref() {
            None if features().avx512_bf16_full_rate => Compute::Bf16,
            None | Some("f32") => Compute::F32,
            Some("bf16") => Compute::Bf16,
            Some(other) => {
                return Err(TrainError::Plan(format!(
                    "compute {other:?} is neither bf16 nor f32"
                )))
            }
        };
        Ok(plan)
    }

    /// First block that trains; the blocks below it are frozen.
    pub fn first_block(&self, config: &Config) -> usize {
        match self.method {
            Method::Upper { layers } => {
                config.num_hidden_layers - layers.min(config.num_hidden_layers)
            }
            Method::Lora { .. } | Method::Full => 0,
        }
    }

    /// The tensors that move, with their sizes.
    pub fn trainable(&self, config: &Config) -> Vec<(TrainId, usize)> {
        let size = |id: ParamId| id.shape(config).iter().product::<usize>();
        let first = self.first_block(config) as u16;
        match self.method {
            Method::Full => ParamId::all(config)
                .into_iter()
                .map(|id| (TrainId::Full(id), size(id)))
                .collect(),
            Method::Upper { .. } => ParamId::all(config)
                .into_iter()
                .filter(|id| match id {
                    ParamId::Layer(layer, _) => *layer >= first,
                    ParamId::FinalNorm => true,
                    ParamId::Embed | ParamId::Head => false,
                })
                .map(|id| (TrainId::Full(id), size(id)))
                .collect(),
            Method::Lora { rank, .. } => (0..config.num_hidden_layers as u16)
                .flat_map(|layer| LINEARS.iter().map(move |p| (layer, *p)))
                .flat_map(|(layer, p): (u16, LayerParam)| {
                    let shape = p.shape(config);
                    [
                        (TrainId::LoraA(layer, p), rank * shape[1]),
                        (TrainId::LoraB(layer, p), shape[0] * rank),
                    ]
                })
                .chain(
                    ParamId::all(config)
                        .into_iter()
                        .filter(|id| id.is_of_learning_layer())
                        .map(|id| (TrainId::Full(id), size(id))),
                )
                .collect(),
        }
    }
}
