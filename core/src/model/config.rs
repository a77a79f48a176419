//! `config.json`, read and checked once: the dimensions of a Llama- or Qwen3-type decoder.

use serde_json::{json, Value};

use super::ModelError;
use crate::kernels::AttentionShape;
use crate::ttt::TttConfig;

/// Dimensions and constants of a decoder, named as in Hugging Face configs.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub architecture: Architecture,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f32,
    pub rope_theta: f64,
    pub rope_scaling: Option<Llama3Scaling>,
    pub tie_word_embeddings: bool,
    /// The layers that learn while they read, where there are some.
    pub ttt: Option<TttConfig>,
    /// The file as it came, so that it can be written again with nothing lost.
    pub raw: Value,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    Llama,
    /// Llama with an RMSNorm on each head's query and key.
    Qwen3,
}

/// `rope_scaling` of type `llama3`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Llama3Scaling {
    pub factor: f64,
    pub low_freq_factor: f64,
    pub high_freq_factor: f64,
    pub original_max_position_embeddings: f64,
}

impl Config {
    /// Reads a Hugging Face `config.json`.
    ///
    /// # Errors
    /// [`ModelError::Unsupported`] for another architecture, activation, bias or rope type, and [`ModelError::Config`] for a
    /// missing or impossible number; both name the field.
    pub fn from_json(raw: &Value) -> Result<Self, ModelError> {
        let model_type = raw.get("model_type").and_then(Value::as_str).unwrap_or("");
        let architecture = match model_type {
            "llama" => Architecture::Llama,
            "qwen3" => Architecture::Qwen3,
            other => {
                return Err(ModelError::Unsupported(format!(
                    "architecture {other:?}: Locum runs Llama- and Qwen3-type decoders"
                )))
            }
        };
        let number =
            |name: &'static str, low: u64, high: u64| -> Result<Option<usize>, ModelError> {
                match raw.get(name) {
                    None | Some(Value::Null) => Ok(None),
                    Some(value) => match value.as_u64() {
                        Some(n) if (low..=high).contains(&n) => Ok(Some(n as usize)),
                        _ => Err(ModelError::Config {
                            field: name,
                            found: value.to_string(),
                        }),
                    },
                }
            };
        let need = |name: &'static str, low: u64, high: u64| {
            number(name, low, high)?.ok_or(ModelError::Config {
                field: name,
                found: "nothing".into(),
            })
        };
        let float = |name: &'static str, default: Option<f64>| match raw.get(name) {
            None | Some(Value::Null) => default.ok_or(ModelError::Config {
                field: name,
                found: "nothing".into(),
            }),
            Some(value) => match value.as_f64() {
                Some(x) if x.is_finite() && x > 0.0 => Ok(x),
                _ => Err(ModelError::Config {
                    field: name,
                    found: value.to_string(),
                }),
            },
        };
        for (name, supported) in [
            ("attention_bias", false),
            ("mlp_bias", false),
            ("use_sliding_window", false),
        ] {
            if raw.get(name).and_then(Value::as_bool).unwrap_or(false) != supported {
                return Err(ModelError::Unsupported(format!("{name} = true")));
            }
        }
        match raw.get("hidden_act").and_then(Value::as_str) {
            None | Some("silu") => {}
            Some(other) => return Err(ModelError::Unsupported(format!("hidden_act {other:?}"))),
        }
        let hidden_size = need("hidden_size", 1, 1 << 16)?;
        let num_attention_heads = need("num_attention_heads", 1, 1 << 10)?;
        let num_key_value_heads =
            number("num_key_value_heads", 1, 1 << 10)?.unwrap_or(num_attention_heads);
        let head_dim = number("head_dim", 2, 1 << 10)?.unwrap_or(hidden_size / num_attention_heads);
        if num_attention_heads % num_key_value_heads != 0 {
            return Err(ModelError::Config {
                field: "num_key_value_heads",
                found: num_key_value_heads.to_string(),
            });
        }
        // Also where it was computed: a hidden size below the number of heads gives 0.
        if head_dim < 2 || head_dim % 2 != 0 {
            return Err(ModelError::Config {
                field: "head_dim",
                found: head_dim.to_string(),
            });
        }
        // transformers 5 writes `rope_parameters` {rope_theta, rope_type, ...}; earlier versions `rope_theta` and `rope_scaling`.
        let parameters = raw.get("rope_parameters").filter(|v| v.is_object());
        let rope_theta = match parameters
            .and_then(|p| p.get("rope_theta"))
            .and_then(Value::as_f64)
        {
            Some(theta) => theta,
            None => float("rope_theta", Some(10_000.0))?,
        };
        let rope_scaling =
            rope_scaling(parameters.or_else(|| raw.get("rope_scaling").filter(|v| v.is_object())))?;
        let num_hidden_layers = need("num_hidden_layers", 1, 512)?;
        let ttt = TttConfig::from_json(raw, num_hidden_layers)?;
        Ok(Self {
            architecture,
            vocab_size: need("vocab_size", 1, 1 << 20)?,
            hidden_size,
            intermediate_size: need("intermediate_size", 1, 1 << 18)?,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            max_position_embeddings: need("max_position_embeddings", 1, 1 << 22)?,
            rms_norm_eps: float("rms_norm_eps", Some(1e-6))? as f32,
            rope_theta,
            rope_scaling,
            tie_word_embeddings: raw
                .get("tie_word_embeddings")
                .and_then(Value::as_bool)
                .unwrap_or(false),
            ttt,
            raw: raw.clone(),
        })
    }

    /// A Llama `config.json` made from numbers alone, for imports from GGUF and for tiny models.
    #[allow(clippy::too_many_arguments)]
    pub fn llama_json(
        vocab_size: usize,
        hidden_size: usize,
        intermediate_size: usize,
        num_hidden_layers: usize,
        num_attention_heads: usize,
        num_key_value_heads: usize,
        max_position_embeddings: usize,
        rms_norm_eps: f64,
        rope_theta: f64,
        tie_word_embeddings: bool,
    ) -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": num_attention_heads,
            "num_key_value_heads": num_key_value_heads,
            "head_dim": hidden_size.checked_div(num_attention_heads),
            "max_position_embeddings": max_position_embeddings,
            "rms_norm_eps": rms_norm_eps,
            "rope_theta": rope_theta,
            "rope_scaling": null,
            "hidden_act": "silu",
            "attention_bias": false,
            "mlp_bias": false,
            "tie_word_embeddings": tie_word_embeddings,
            "torch_dtype": "bfloat16",
        })
    }

    /// The token with which others fill short rows up, where it is not the one that a text begins with.
    pub fn padding(&self) -> Option<u32> {
        let id = |field: &str| self.raw.get(field)?.as_u64();
        let pad = id("pad_token_id").filter(|pad| id("bos_token_id") != Some(*pad))?;
        u32::try_from(pad).ok()
    }

    /// Width of all query heads together.
    pub fn q_size(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Width of all key (or value) heads together.
    pub fn kv_size(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// Heads of an attention layer.
    pub fn attention_shape(&self) -> AttentionShape {
        AttentionShape {
            num_attention_heads: self.num_attention_heads,
            num_key_value_heads: self.num_key_value_heads,
            head_dim: self.head_dim,
        }
    }

    /// Radians a position for each half of a head (e / 2).
    pub fn inv_freq(&self) -> Vec<f64> {
        let plain = (0..self.head_dim / 2)
            .map(|i| 1.0 / self.rope_theta.powf(2.0 * i as f64 / self.head_dim as f64));
        let Some(scaling) = self.rope_scaling else {
            return plain.collect();
        };
        let long = scaling.original_max_position_embeddings / scaling.low_freq_factor;
        let short = scaling.original_max_position_embeddings / scaling.high_freq_factor;
        plain
            .map(|f| {
                let wavelength = 2.0 * std::f64::consts::PI / f;
                if wavelength > long {
                    f / scaling.factor
                } else if wavelength < short {
                    f
                } else {
                    let smooth = (scaling.original_max_position_embeddings / wavelength
                        - scaling.low_freq_factor)
                        / (scaling.high_freq_factor - scaling.low_freq_factor);
                    (1.0 - smooth) * f / scaling.factor + smooth * f
                }
            })
            .collect()
    }
}

fn rope_scaling(value: Option<&Value>) -> Result<Option<Llama3Scaling>, ModelError> {
    let Some(value) = value else { return Ok(None) };
    let kind = value
        .get("rope_type")
        .or_else(|| value.get("type"))
        .and_then(Value::as_str)
        .unwrap_or("default");
    match kind {
        "default" => Ok(None),
        "llama3" => {
            let get = |name: &'static str| {
                value
                    .get(name)
                    .and_then(Value::as_f64)
                    .filter(|x| x.is_finite() && *x > 0.0)
                    .ok_or(ModelError::Config {
                        field: "rope_scaling",
                        found: format!("{name} missing or not positive"),
                    })
            };
            Ok(Some(Llama3Scaling {
                factor: get("factor")?,
                low_freq_factor: get("low_freq_factor")?,
                high_freq_factor: get("high_freq_factor")?,
                original_max_position_embeddings: get("original_max_position_embeddings")?,
            }))
        }
        other => Err(ModelError::Unsupported(format!(
            "rope_scaling of type {other:?}"
        ))),
    }
}
