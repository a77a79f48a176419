//! What is fixed for a student: the settings of its TTT layers, and the tensors trained for them.

use serde_json::Value;

use super::TttError;
use crate::kernels::{PackedQ8, Random};

/// Deviation of the published initial `ttt_proj`: the usual `initializer_range`.
pub const PROJ_DEVIATION: f64 = 0.02;

/// Largest strength of a delta rule: far beyond what any text was seen to bear.
pub const MOST_DELTA: f32 = 16.0;

/// Settings of all TTT layers of a student.
#[derive(Clone, Debug, PartialEq)]
pub struct TttConfig {
    /// `ttt_layers`: layers whose down-projection learns.
    pub layers: Vec<u16>,
    /// `ttt_chunk`, the c of the equations.
    pub chunk_len: usize,
    /// `ttt_lr`, the step size η.
    pub lr: f32,
    /// Taps of the filter, an odd number. Not in the configs of the authors, whose code has 5.
    pub kernel_size: usize,
    /// `ttt_proj`: whether there is a projection behind the filter.
    pub proj: bool,
    /// `ttt_target`.
    pub target: TttTarget,
    pub mode: TttMode,
    /// `ttt_decay` or `ttt_delta`. Not in the authors' configs.
    pub forgets: Forgetting,
    /// Largest drift before a layer begins again; `None` only to compare with code that has no cap. Not in the authors' configs.
    pub max_drift: Option<f32>,
}

/// From what the target is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TttTarget {
    /// `hidden_states`: the normalised input of the same layer's MLP. Published for continued training.
    HiddenStates,
    /// `input_embed`: the embeddings of the tokens. Published for training from scratch.
    InputEmbed,
}

/// How a full chunk changes the fast weight.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TttMode {
    /// `W ← W + η vᵀz` from what waits.
    #[default]
    InPlace,
    /// `W ← W − η ∂loss/∂W`, whose gradient the caller brings at the edge ([`FastWeight::descend`](super::FastWeight::descend)):
    /// chunk-wise dynamic evaluation, with `config.json` saying `"ttt_mode": "gradient"`.
    Gradient,
}

/// How a fast weight loses what it wrote earlier in the sequence, with `D = W − W₀`. The published rule takes nothing from `D` again.
/// Where the step η is 0, nothing is written and nothing is lost; a smaller step writes less and loses as much.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Forgetting {
    #[default]
    Nothing,
    /// γ, from 0 to 1: `D ← γ (D + η vᵀz)`, so that what was written n edges ago counts γⁿ. With a gradient, `D ← γ (D − η ∂loss/∂W)`.
    Decay(f32),
    /// β, the strength of a delta rule: `D ← D + Σ (η v − β/c · D z / ‖z‖²) zᵀ` over the chunk's tokens, `D` being the chunk's own on the
    /// right. What is read again is written over instead of added to: the chunk's mean of `zzᵀ/‖z‖²` has a trace of 1, so up to β = 1
    /// no direction is more than forgotten. More than that is not safe by itself; the cap on drift holds.
    Delta(f32),
}

/// Values with which the filter and the projection of a layer begin; with either the student is exactly its base.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TttStart {
    /// The authors': [`TttConfig::published_start`].
    #[default]
    Published,
    /// The next position as the target: [`TttConfig::next_token_start`].
    NextToken,
}

impl Default for TttConfig {
    /// No layers. c = 256, because episodes have 2k to 8k tokens and the cost does not depend on c; η as in the authors' code;
    /// a cap of 0.1, up to which frozen models were seen to stand random changes.
    fn default() -> Self {
        Self {
            layers: Vec::new(),
            chunk_len: 256,
            lr: 0.3,
            kernel_size: 5,
            proj: true,
            target: TttTarget::HiddenStates,
            mode: TttMode::InPlace,
            forgets: Forgetting::Nothing,
            max_drift: Some(0.1),
        }
    }
}

impl TttConfig {
    /// Chunk-wise dynamic evaluation ([`TttMode::Gradient`]) of the last quarter of a model's layers, rounded up. It needs no trained
    /// tensors, so that any model can be read with it.
    pub fn gradient(num_hidden_layers: usize, chunk_len: usize, lr: f32) -> Self {
        let all = num_hidden_layers as u16;
        Self {
            layers: (all - all.div_ceil(4)..all).collect(),
            chunk_len,
            lr,
            proj: false,
            mode: TttMode::Gradient,
            ..Self::default()
        }
    }

    /// Reads the `ttt_*` fields of a `config.json`; `None` if it has none, lists no layer, or says `ttt_mode: false`.
    /// With `ttt_mode: "gradient"` the list may be absent: the layers are then those of [`Self::gradient`].
    ///
    /// Layers that the model does not have are left out, for the authors' configs list one such.
    ///
    /// # Errors
    /// [`TttError::Config`] names the field: a chunk of zero, a step size that is not finite, an unknown target, a list in which no
    /// layer exists, or two ways to forget.
    pub fn from_json(raw: &Value, num_hidden_layers: usize) -> Result<Option<Self>, TttError> {
        let wrong = |field, found: &Value| TttError::Config {
            field,
            found: found.to_string(),
        };
        let flag = |field: &'static str, default: bool| match raw.get(field) {
            None | Some(Value::Null) => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| wrong(field, value)),
        };
        let gradient = raw.get("ttt_mode").and_then(Value::as_str) == Some("gradient");
        let last_quarter = Self::gradient(num_hidden_layers, 256, Self::default().lr);
        let quarter = Value::from(last_quarter.layers.clone());
        let listed = match raw.get("ttt_layers") {
            None | Some(Value::Null) if gradient => &quarter,
            None | Some(Value::Null) => return Ok(None),
            Some(value) => value,
        };
        let indexes = listed
            .as_array()
            .and_then(|all| all.iter().map(Value::as_u64).collect::<Option<Vec<u64>>>());
        let indexes = indexes.ok_or_else(|| wrong("ttt_layers", listed))?;
        if indexes.is_empty() || !(gradient || flag("ttt_mode", true)?) {
            return Ok(None);
        }
        let mut layers: Vec<u16> = indexes
            .iter()
            .filter(|at| **at < num_hidden_layers as u64)
            .filter_map(|at| u16::try_from(*at).ok())
            .collect();
        layers.sort_unstable();
        layers.dedup();
        if layers.is_empty() {
            return Err(wrong("ttt_layers", listed));
        }
        let mut config = match gradient {
            true => Self {
                layers,
                ..last_quarter
            },
            false => Self {
                layers,
                proj: flag("ttt_proj", true)?,
                ..Self::default()
            },
        };
        if let Some(value) = raw.get("ttt_chunk").filter(|v| !v.is_null()) {
            let chunk_len = value.as_u64().and_then(|c| usize::try_from(c).ok());
            config.chunk_len = chunk_len.ok_or_else(|| wrong("ttt_chunk", value))?;
        }
        if let Some(value) = raw.get("ttt_lr").filter(|v| !v.is_null()) {
            config.lr = value.as_f64().ok_or_else(|| wrong("ttt_lr", value))? as f32;
        }
        let number = |field: &'static str| match raw.get(field).filter(|v| !v.is_null()) {
            None => Ok(None),
            Some(value) => value.as_f64().map(Some).ok_or_else(|| wrong(field, value)),
        };
        config.forgets = match (number("ttt_decay")?, number("ttt_delta")?) {
            (None, None) => Forgetting::Nothing,
            (Some(decay), None) => Forgetting::Decay(decay as f32),
            (None, Some(delta)) => Forgetting::Delta(delta as f32),
            (Some(_), Some(_)) => {
                return Err(wrong("ttt_delta beside ttt_decay", &raw["ttt_delta"]))
            }
        };
        if let Some(value) = raw.get("ttt_target").filter(|v| !v.is_null()) {
            config.target = match value.as_str() {
                Some("hidden_states") => TttTarget::HiddenStates,
                Some("input_embed") => TttTarget::InputEmbed,
                _ => return Err(wrong("ttt_target", value)),
            };
        }
        config.check()?;
        Ok(Some(config))
    }

    /// Checks what the types allow and the rule does not.
    ///
    /// # Errors
    /// [`TttError::Config`] names the field.
    pub fn check(&self) -> Result<(), TttError> {
        let wrong = |field, found: String| Err(TttError::Config { field, found });
        // A loss over the pairs inside a chunk needs one.
        let least = match self.mode {
            TttMode::InPlace => 1,
            TttMode::Gradient => 2,
        };
        if self.chunk_len < least {
            return wrong("ttt_chunk", self.chunk_len.to_string());
        }
        if !self.lr.is_finite() {
            return wrong("ttt_lr", self.lr.to_string());
        }
        if self.kernel_size.is_multiple_of(2) {
            return wrong("the number of taps", self.kernel_size.to_string());
        }
        match self.forgets {
            Forgetting::Decay(kept) if !(0.0..=1.0).contains(&kept) => {
                return wrong("ttt_decay", kept.to_string());
            }
            // A gradient has no targets to correct.
            Forgetting::Delta(strength)
                if !(0.0..=MOST_DELTA).contains(&strength) || self.mode == TttMode::Gradient =>
            {
                return wrong("ttt_delta", strength.to_string());
            }
            _ => {}
        }
        match self.max_drift {
            Some(cap) if cap.is_nan() || cap <= 0.0 => wrong("the cap on drift", cap.to_string()),
            _ => Ok(()),
        }
    }

    /// `β/(η c)`, of the delta rule if that is the rule and there is a step: what a target loses of what is answered already, before division by `‖z‖²`.
    pub(super) fn delta_rate(&self) -> Option<f32> {
        match self.forgets {
            Forgetting::Delta(strength) if self.lr != 0.0 => {
                Some(strength / (self.lr * self.chunk_len as f32))
            }
            _ => None,
        }
    }

    /// Puts the fields into a `config.json` in the place of all that it says of learning while reading.
    pub(crate) fn write_to(&self, config: &mut Value) {
        if let Some(fields) = config.as_object_mut() {
            for optional in ["ttt_decay", "ttt_delta"] {
                fields.remove(optional);
            }
            fields.extend(self.to_json());
        }
    }

    /// The fields under their names in a `config.json`.
    pub fn to_json(&self) -> serde_json::Map<String, Value> {
        let target = match self.target {
            TttTarget::HiddenStates => "hidden_states",
            TttTarget::InputEmbed => "input_embed",
        };
        let mode = match self.mode {
            TttMode::InPlace => Value::from(true),
            TttMode::Gradient => "gradient".into(),
        };
        // By way of its shortest text: 0.3 is not to become 0.30000001192092896.
        let number = |x: f32| -> f64 { x.to_string().parse().expect("a float prints as one") };
        let forgets = match self.forgets {
            Forgetting::Nothing => None,
            Forgetting::Decay(kept) => Some(("ttt_decay", number(kept).into())),
            Forgetting::Delta(strength) => Some(("ttt_delta", number(strength).into())),
        };
        [
            ("ttt_mode", mode),
            ("ttt_layers", self.layers.clone().into()),
            ("ttt_proj", self.proj.into()),
            ("ttt_lr", number(self.lr).into()),
            ("ttt_chunk", self.chunk_len.into()),
            ("ttt_target", target.into()),
        ]
        .into_iter()
        .chain(forgets)
        .map(|(field, value): (&str, Value)| (field.to_string(), value))
        .collect()
    }

    /// The published initial values, (d, 1, k) and (d, d): a filter of zeros and a diagonal of small normal numbers. The student is
    /// exactly its base; the filter moves first, for the projection's gradient is 0 until it has.
    pub fn published_start(
        &self,
        hidden_size: usize,
        random: &mut Random,
    ) -> (Vec<f32>, Option<Vec<f32>>) {
        let d = hidden_size;
        let proj = self.proj.then(|| {
            let mut proj = vec![0.0; d * d];
            for i in 0..d {
                proj[i * d + i] = (PROJ_DEVIATION * random.normal()) as f32;
            }
            proj
        });
        (vec![0.0; d * self.kernel_size], proj)
    }

    /// Initial values whose target is the next position from the start, as TTT-NTP builds in (arXiv:2606.21803): one tap at 1, and a
    /// projection of zeros, so that the student is exactly its base and the projection moves first.
    ///
    /// # Panics
    /// Without a projection, or with a single tap: the student would not be its base, or have no next position.
    pub fn next_token_start(&self, hidden_size: usize) -> (Vec<f32>, Option<Vec<f32>>) {
        assert!(
            self.proj && self.kernel_size > 1,
            "the next token as a target needs a projection and a filter that looks ahead"
        );
        let (d, k) = (hidden_size, self.kernel_size);
        let mut conv = vec![0.0; d * k];
        for taps in conv.chunks_exact_mut(k) {
            taps[k / 2 + 1] = 1.0;
        }
        (conv, Some(vec![0.0; d * d]))
    }
}

/// Tensors of one TTT layer, as checkpoints store them. They are slow weights: only training moves them.
#[derive(Clone, Copy)]
pub struct TttLayer<'a> {
    /// `mlp.ttt_conv.weight` (d, 1, k)
    pub conv: &'a [f32],
    /// `mlp.ttt_proj.weight` (d, d), used as `conv(u) P`.
    pub proj: Option<&'a [f32]>,
    /// Its transpose in 8 bits, for students that are served so; it is then used in place of `proj`.
    pub packed_proj: Option<&'a PackedQ8>,
}

impl<'a> TttLayer<'a> {
    /// Of a layer in [`TttMode::Gradient`], for which nothing was trained.
    pub const UNTRAINED: TttLayer<'static> = TttLayer {
        conv: &[],
        proj: None,
        packed_proj: None,
    };

    /// Checks the tensors of a layer of this width against the settings.
    ///
    /// # Errors
    /// [`TttError::Tensor`] for another number of elements, also for a projection that is there and should not be.
    pub fn new(
        config: &TttConfig,
        hidden_size: usize,
        conv: &'a [f32],
        proj: Option<&'a [f32]>,
    ) -> Result<Self, TttError> {
        let has_proj = usize::from(config.proj);
        for (name, expected, found) in [
            (
                "mlp.ttt_conv.weight",
                hidden_size * config.kernel_size,
                conv.len(),
            ),
            (
                "mlp.ttt_proj.weight",
                hidden_size * hidden_size * has_proj,
                proj.map_or(0, <[f32]>::len),
            ),
        ] {
            if expected != found {
                return Err(TttError::Tensor {
                    name,
                    expected,
                    found,
                });
            }
        }
        Ok(Self {
            conv,
            proj,
            packed_proj: None,
        })
    }
}
