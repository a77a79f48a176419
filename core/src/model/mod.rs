//! A decoder: configuration, weights, one forward pass for training and serving, and its backward pass.
//!
//! Shape letters: `b` batch, `t` tokens in this call, `s` tokens in the cache, `d` hidden, `h` query heads, `g` key/value heads,
//! `e` head_dim, `f` MLP width, `v` vocabulary, `r` LoRA rank, `c` chunk.
//! Sequences of a batch are packed: their tokens stand one after another in `t` rows, without padding.

mod backward;
mod config;
mod descend;
#[cfg(test)]
mod descend_tests;
mod forward;
mod gguf;
mod lora;
mod packed;
mod params;
mod rows;
mod sequence;
mod serve;
#[cfg(test)]
mod serve_tests;
mod split;
mod tiny;
mod weights;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use backward::{Grads, HeadLoss, TrainId, HEAD_ROWS};
pub use config::{Architecture, Config, Llama3Scaling};
pub use forward::Tape;
pub use gguf::{read_gguf, Gguf};
pub use lora::{AdapterConfig, Lora};
pub use packed::{Compute, WeightFormat};
pub use params::{LayerParam, ParamId, LINEARS};
pub use rows::PackedRows;
pub use sequence::{ChunkLosses, FastWeights, KvCache, Sequence};
#[cfg(test)]
pub(crate) use tiny::write_tiny_learner;
pub use tiny::{write_tiny, TINY_CHARS};
pub use weights::{
    decode, encode, read_config, write_atomically, write_safetensors, FileDtype, Param, Weights,
};

use crate::kernels::{Random, RopeTable};
use crate::ttt::{StartWeight, TttConfig, TttError, TttMode, TttStart};

/// What can be wrong with a model's files or with a call to it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    #[error("{path}: {source}")]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{path}: {why}")]
    File { path: PathBuf, why: String },
    #[error("this model cannot be run: {0}")]
    Unsupported(String),
    #[error("config.json: {field} is {found}, which is not possible")]
    Config { field: &'static str, found: String },
    #[error("tensor {name}: {why}")]
    Tensor { name: String, why: String },
    #[error("tensor {0} is missing")]
    MissingTensor(String),
    #[error("tensor {0} is not part of this architecture")]
    UnknownTensor(String),
    #[error("token {token} is outside the vocabulary of {vocab_size}")]
    Token { token: u32, vocab_size: usize },
    #[error("{asked} positions are more than the {limit} this model was made for")]
    TooLong { asked: usize, limit: usize },
    /// Padding is text like any other to layers that learn from what they read.
    #[error("the text begins with token {token}, which is padding: rows of any length go side by side without it")]
    Padded { token: u32 },
}

impl From<TttError> for ModelError {
    fn from(error: TttError) -> Self {
        match error {
            TttError::Config { field, found } => Self::Config { field, found },
            other => Self::Unsupported(other.to_string()),
        }
    }
}

impl ModelError {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io {
            path: path.into(),
            source,
        }
    }
}

/// A decoder ready to run. Cloning shares the weights; changing a weight of a clone copies that weight alone.
#[derive(Clone)]
pub struct Model {
    pub config: Config,
    pub weights: Weights,
    /// In which numbers products of many rows are computed, where the weights are not packed.
    pub compute: Compute,
    packed: Arc<BTreeMap<ParamId, Arc<packed::Packed>>>,
    /// What the layers that learn begin with, where the weights no longer change.
    starts: Arc<BTreeMap<u16, StartWeight>>,
    unpacked: Arc<packed::Unpacked>,
    rope: Arc<RopeTable>,
}

impl Model {
    /// Puts checked weights behind a config.
    ///
    /// # Errors
    /// [`ModelError::MissingTensor`] if a parameter of the architecture is not among the weights.
    pub fn new(config: Config, weights: Weights) -> Result<Self, ModelError> {
        for id in ParamId::all(&config) {
            let name = || id.name();
            let data = weights
                .params
                .get(&id)
                .ok_or_else(|| ModelError::MissingTensor(name()))?;
            let want: usize = id.shape(&config).iter().product();
            if data.len() != want {
                return Err(ModelError::Tensor {
                    name: name(),
                    why: format!("{} numbers, not {want}", data.len()),
                });
            }
        }
        let positions = config
            .max_position_embeddings
            .min(crate::limits::MAX_PROMPT_TOKENS + crate::limits::MAX_REPLY_TOKENS);
        let rope = Arc::new(RopeTable::new(&config.inv_freq(), positions));
        Ok(Self {
            config,
            weights,
            compute: Compute::default(),
            packed: Arc::default(),
            starts: Arc::default(),
            unpacked: Arc::default(),
            rope,
        })
    }

    /// Reads a Hugging Face folder.
    pub fn load(dir: &Path) -> Result<Self, ModelError> {
        let config = read_config(dir)?;
        let weights = Weights::load(dir, &config)?;
        Self::new(config, weights)
    }

    /// Writes `config.json` and `model.safetensors` into a folder that exists.
    ///
    /// # Errors
    /// [`ModelError::Io`] as it comes, [`ModelError::Unsupported`] for a model packed for serving.
    pub fn save(&self, dir: &Path, dtype: FileDtype) -> Result<(), ModelError> {
        self.check_plain()?;
        let mut raw = self.config.raw.clone();
        // A job may have changed the step.
        if let Some(ttt) = &self.config.ttt {
            ttt.write_to(&mut raw);
        }
        let name = match dtype {
            FileDtype::F32 => "float32",
            FileDtype::Bf16 => "bfloat16",
        };
        for key in ["torch_dtype", "dtype"] {
            if raw.get(key).is_some() {
                raw[key] = name.into();
            }
        }
        let text = serde_json::to_string_pretty(&raw).expect("a JSON value prints");
        write_atomically(&dir.join("config.json"), text.as_bytes())?;
        self.weights.save(dir, &self.config, dtype)
    }

    /// The model with room for longer sequences than it was made for, to time what they cost: what it says there means nothing.
    pub fn with_positions(mut self, positions: usize) -> Self {
        self.rope = Arc::new(RopeTable::new(&self.config.inv_freq(), positions));
        self
    }

    /// Positions a sequence can have.
    pub fn max_positions(&self) -> usize {
        self.rope.len()
    }

    /// Cosines and sines of the rotary angles, (positions, head_dim / 2) each.
    pub(crate) fn angles(&self) -> (&[f32], &[f32]) {
        self.rope.angles()
    }

    pub(crate) fn param(&self, id: ParamId) -> &[f32] {
        &self.weights.params[&id]
    }

    /// The head's matrix (v, d): the embedding itself where they are tied.
    pub(crate) fn head_id(&self) -> ParamId {
        if self.config.tie_word_embeddings {
            ParamId::Embed
        } else {
            ParamId::Head
        }
    }

    /// The model with layers that learn while it reads, untrained as yet, so that it still computes what it did.
    ///
    /// # Errors
    /// [`ModelError::Config`] for settings that are impossible, [`ModelError::Unsupported`] for a start that they have no room for, a
    /// model that has such layers already, or one packed for serving.
    pub fn with_ttt(
        mut self,
        ttt: TttConfig,
        start: TttStart,
        random: &mut Random,
    ) -> Result<Self, ModelError> {
        self.check_plain()?;
        if self.config.ttt.is_some() {
            let why = "it has layers that learn while it reads already";
            return Err(ModelError::Unsupported(why.into()));
        }
        let no_next_token = !ttt.proj || ttt.kernel_size < 3;
        if ttt.mode == TttMode::InPlace && start == TttStart::NextToken && no_next_token {
            let why = "the next token as a target needs a projection and a filter that looks ahead";
            return Err(ModelError::Unsupported(why.into()));
        }
        ttt.check()?;
        let mut raw = self.config.raw.clone();
        ttt.write_to(&mut raw);
        // As if read from the file, so that what is saved can be read again; the cap is not in the file.
        let mut config = Config::from_json(&raw)?;
        if let Some(read) = &mut config.ttt {
            read.max_drift = ttt.max_drift;
        }
        let in_place = ttt.mode == TttMode::InPlace;
        for &layer in ttt.layers.iter().filter(|_| in_place) {
            let (conv, proj) = match start {
                TttStart::Published => ttt.published_start(config.hidden_size, random),
                TttStart::NextToken => ttt.next_token_start(config.hidden_size),
            };
            let mut put = |which, data: Vec<f32>| {
                let id = ParamId::Layer(layer, which);
                self.weights.params.insert(id, Arc::new(data))
            };
            put(LayerParam::TttConv, conv);
            if let Some(proj) = proj {
                put(LayerParam::TttProj, proj);
            }
        }
        self.config = config;
        Ok(self)
    }

    /// Whether the layers that learn while it reads are untrained, so that whatever they read changes nothing.
    pub fn writes_nothing_yet(&self) -> bool {
        let zero = |layer: u16, which| {
            let tensor = self.weights.params.get(&ParamId::Layer(layer, which));
            tensor.is_some_and(|data| data.iter().all(|x| *x == 0.0))
        };
        let layers = self.config.ttt.iter().flat_map(|ttt| &ttt.layers);
        layers
            .copied()
            .all(|l| zero(l, LayerParam::TttConv) || zero(l, LayerParam::TttProj))
    }

    /// The same weights with nothing that learns while it reads.
    pub fn without_ttt(&self) -> Self {
        let mut plain = self.clone();
        plain.config.ttt = None;
        plain
    }

    /// Rounds every parameter to the nearest bf16, so that what is evaluated is what a bf16 file will hold.
    pub fn round_to_bf16(&mut self) {
        for param in self.weights.params.values_mut() {
            if param
                .iter()
                .all(|x| half::bf16::from_f32(*x).to_f32() == *x)
            {
                continue;
            }
            for x in Arc::make_mut(param) {
                *x = half::bf16::from_f32(*x).to_f32();
            }
        }
    }
}
