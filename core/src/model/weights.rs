//! Weight files: Hugging Face safetensors in and out, GGUF in. Quantised blocks are expanded by candle.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::quantized::gguf_file;
use candle_core::{DType, Device};
use half::{bf16, f16};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{json, Value};

use super::config::{Architecture, Config};
use super::params::{LayerParam, ParamId};
use super::ModelError;
use crate::limits;

/// One parameter in memory, always `f32`, shared between the students that have it in common.
pub type Param = Arc<Vec<f32>>;

/// All parameters of a model.
#[derive(Clone, Default)]
pub struct Weights {
    pub params: BTreeMap<ParamId, Param>,
}

/// How numbers are written to a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileDtype {
    F32,
    Bf16,
}

/// Reads `config.json` of a Hugging Face folder.
///
/// # Errors
/// [`ModelError::Io`] and [`ModelError::Config`] name the file.
pub fn read_config(dir: &Path) -> Result<Config, ModelError> {
    let path = dir.join("config.json");
    let size = fs::metadata(&path)
        .map_err(|e| ModelError::io(&path, e))?
        .len();
    if size > limits::MAX_CONFIG_BYTES {
        return Err(ModelError::File {
            path,
            why: format!("{size} bytes is more than a config can have"),
        });
    }
    let text = fs::read_to_string(&path).map_err(|e| ModelError::io(&path, e))?;
    let raw: Value = serde_json::from_str(&text).map_err(|e| ModelError::File {
        path: path.clone(),
        why: e.to_string(),
    })?;
    Config::from_json(&raw)
}

impl Weights {
    /// Reads `model.safetensors` (or the shards of its index) of a Hugging Face folder. F32, F16 and BF16 are taken.
    ///
    /// # Errors
    /// A missing tensor, another shape or dtype, or a number that is not finite: each names the tensor. Tensors that the
    /// config does not call for are refused too, for a part of the model would be missing from the computation.
    pub fn load(dir: &Path, config: &Config) -> Result<Self, ModelError> {
        let mut found: BTreeMap<String, Param> = BTreeMap::new();
        for path in weight_files(dir)? {
            // Read, not mapped: another process that shortens a mapped file would bring the host down with SIGBUS.
            let bytes = fs::read(&path).map_err(|e| ModelError::io(&path, e))?;
            let file = SafeTensors::deserialize(&bytes).map_err(|e| ModelError::File {
                path: path.clone(),
                why: e.to_string(),
            })?;
            for (name, view) in file.tensors() {
                // Some exporters leave the tied head in.
                if name == "lm_head.weight" && config.tie_word_embeddings
                    || name.ends_with("rotary_emb.inv_freq")
                {
                    continue;
                }
                let data = decode(&name, &view)?;
                found.insert(name, Arc::new(data));
            }
        }
        let mut params = BTreeMap::new();
        for id in ParamId::all(config) {
            let name = id.name();
            let data = found
                .remove(&name)
                .ok_or_else(|| ModelError::MissingTensor(name.clone()))?;
            check(&name, &data, &id.shape(config))?;
            params.insert(id, data);
        }
        match found.into_keys().next() {
            Some(name) => Err(ModelError::UnknownTensor(name)),
            None => Ok(Self { params }),
        }
    }

    /// Writes `model.safetensors` with Hugging Face names (temporary sibling, sync, rename).
    pub fn save(&self, dir: &Path, config: &Config, dtype: FileDtype) -> Result<(), ModelError> {
        let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = self
            .params
            .iter()
            .map(|(id, data)| (id.name(), id.shape(config), encode(data, dtype)))
            .collect();
        write_safetensors(&dir.join("model.safetensors"), &tensors, dtype)
    }
}

/// Writes a safetensors file with `format = pt` in its header, which transformers asks for.
pub fn write_safetensors(
    path: &Path,
    tensors: &[(String, Vec<usize>, Vec<u8>)],
    dtype: FileDtype,
) -> Result<(), ModelError> {
    let dtype = match dtype {
        FileDtype::F32 => Dtype::F32,
        FileDtype::Bf16 => Dtype::BF16,
    };
    let views: Vec<(&str, TensorView)> = tensors
        .iter()
        .map(|(name, shape, bytes)| {
            let view = TensorView::new(dtype, shape.clone(), bytes)
                .expect("bytes match the shape they were made from");
            (name.as_str(), view)
        })
        .collect();
    let metadata = Some(
        [("format".to_string(), "pt".to_string())]
            .into_iter()
            .collect(),
    );
    let bytes = safetensors::serialize(views, metadata).map_err(|e| ModelError::File {
        path: path.into(),
        why: e.to_string(),
    })?;
    write_atomically(path, &bytes)
}

/// Writes a file so that it is whole or absent after a crash: temporary sibling, sync, rename, sync of the folder.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), ModelError> {
    let temporary = path.with_extension("tmp");
    let write = || -> std::io::Result<()> {
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        if let Some(parent) = path.parent() {
            File::open(parent)?.sync_all()?;
        }
        Ok(())
    };
    write().map_err(|e| {
        let _ = fs::remove_file(&temporary);
        ModelError::io(path, e)
    })
}

/// Numbers as file bytes.
pub fn encode(data: &[f32], dtype: FileDtype) -> Vec<u8> {
    match dtype {
        FileDtype::F32 => data.iter().flat_map(|x| x.to_le_bytes()).collect(),
        FileDtype::Bf16 => data
            .iter()
            .flat_map(|x| bf16::from_f32(*x).to_le_bytes())
            .collect(),
    }
}

/// File bytes as numbers.
///
/// # Errors
/// Another dtype than F32, F16, BF16, or a number that is not finite; the error names the tensor.
pub fn decode(name: &str, view: &TensorView) -> Result<Vec<f32>, ModelError> {
    let bytes = view.data();
    let data: Vec<f32> = match view.dtype() {
        Dtype::F32 => bytes
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect(),
        Dtype::F16 => bytes
            .chunks_exact(2)
            .map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32())
            .collect(),
        Dtype::BF16 => bytes
            .chunks_exact(2)
            .map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32())
            .collect(),
        other => {
            return Err(ModelError::Tensor {
                name: name.into(),
                why: format!("dtype {other:?} is not supported"),
            })
        }
    };
    match data.iter().position(|x| !x.is_finite()) {
        Some(at) => Err(ModelError::Tensor {
            name: name.into(),
            why: format!("element {at} is not a finite number"),
        }),
        None => Ok(data),
    }
}

fn check(name: &str, data: &[f32], shape: &[usize]) -> Result<(), ModelError> {
    let want: usize = shape.iter().product();
    if data.len() != want {
        let why = format!(
            "{} numbers, the config calls for {want} {shape:?}",
            data.len()
        );
        return Err(ModelError::Tensor {
            name: name.into(),
            why,
        });
    }
    Ok(())
}

fn weight_files(dir: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let single = dir.join("model.safetensors");
    if single.is_file() {
        return Ok(vec![single]);
    }
    let index = dir.join("model.safetensors.index.json");
    let text = fs::read_to_string(&index).map_err(|_| ModelError::File {
        path: dir.into(),
        why: "neither model.safetensors nor model.safetensors.index.json is there".into(),
    })?;
    let bad = |why: &str| ModelError::File {
        path: index.clone(),
        why: why.into(),
    };
    let value: Value = serde_json::from_str(&text).map_err(|e| bad(&e.to_string()))?;
    let map = value
        .get("weight_map")
        .and_then(Value::as_object)
        .ok_or_else(|| bad("no weight_map"))?;
    let mut names: Vec<&str> = map.values().filter_map(Value::as_str).collect();
    names.sort_unstable();
    names.dedup();
    if names
        .iter()
        .any(|n| n.contains(['/', '\\']) || n.starts_with('.'))
    {
        return Err(bad("a shard's name leaves the folder"));
    }
    Ok(names.into_iter().map(|n| dir.join(n)).collect())
}

/// What a GGUF file holds: the model, and the metadata from which the tokenizer is made.
pub struct Gguf {
    pub config: Config,
    pub weights: Weights,
    pub metadata: std::collections::HashMap<String, gguf_file::Value>,
}

/// Reads a Llama- or Qwen3-type GGUF file and expands its weights to `f32`.
///
/// llama.cpp stores the query and key rows of a Llama in interleaved-rotary order; they are brought back to half-split order.
///
/// # Errors
/// A file that is cut short, another architecture, a missing tensor or a wrong shape; each names the tensor or the key.
pub fn read_gguf(path: &Path) -> Result<Gguf, ModelError> {
    let bad = |why: String| ModelError::File {
        path: path.into(),
        why,
    };
    let mut file = std::io::BufReader::new(File::open(path).map_err(|e| ModelError::io(path, e))?);
    let content = gguf_file::Content::read(&mut file)
        .map_err(|e| bad(format!("not a readable GGUF file: {e}")))?;
    let get = |key: &str| content.metadata.get(key);
    let text = |key: &str| get(key).and_then(|v| v.to_string().ok()).cloned();
    let arch = text("general.architecture")
        .ok_or_else(|| bad("general.architecture is missing".into()))?;
    let architecture = match arch.as_str() {
        "llama" => Architecture::Llama,
        "qwen3" => Architecture::Qwen3,
        other => {
            return Err(ModelError::Unsupported(format!(
                "GGUF architecture {other:?}: Locum runs Llama- and Qwen3-type decoders"
            )))
        }
    };
    let number = |key: &str| -> Result<usize, ModelError> {
        let key = format!("{arch}.{key}");
        get(&key)
            .and_then(|v| v.to_u32().map(u64::from).or_else(|_| v.to_u64()).ok())
            .map(|n| n as usize)
            .ok_or_else(|| bad(format!("{key} is missing or no number")))
    };
    let float = |key: &str, default: f64| {
        get(&format!("{arch}.{key}"))
            .and_then(|v| v.to_f32().ok())
            .map_or(default, shortest)
    };
    let (d, heads) = (number("embedding_length")?, number("attention.head_count")?);
    let embed_shape = content
        .tensor_infos
        .get("token_embd.weight")
        .map(|info| info.shape.dims().to_vec())
        .ok_or_else(|| ModelError::MissingTensor("token_embd.weight".into()))?;
    if embed_shape.len() != 2 {
        return Err(ModelError::Tensor {
            name: "token_embd.weight".into(),
            why: format!("shape {embed_shape:?}"),
        });
    }
    let tied = !content.tensor_infos.contains_key("output.weight");
    let mut raw = Config::llama_json(
        embed_shape[0],
        d,
        number("feed_forward_length")?,
        number("block_count")?,
        heads,
        number("attention.head_count_kv").unwrap_or(heads),
        number("context_length")?,
        float("attention.layer_norm_rms_epsilon", 1e-5),
        float("rope.freq_base", 10_000.0),
        tied,
    );
    if let Ok(head_dim) = number("attention.key_length") {
        raw["head_dim"] = json!(head_dim);
    }
    if architecture == Architecture::Qwen3 {
        raw["model_type"] = json!("qwen3");
        raw["architectures"] = json!(["Qwen3ForCausalLM"]);
    }
    for (name, key) in [
        ("bos_token_id", "tokenizer.ggml.bos_token_id"),
        ("eos_token_id", "tokenizer.ggml.eos_token_id"),
    ] {
        if let Some(id) = get(key).and_then(|v| v.to_u32().ok()) {
            raw[name] = json!(id);
        }
    }
    let config = Config::from_json(&raw)?;
    let mut params = BTreeMap::new();
    for id in ParamId::all(&config) {
        let name = gguf_name(id);
        let tensor = content
            .tensor(&mut file, &name, &Device::Cpu)
            .and_then(|t| t.dequantize(&Device::Cpu))
            .and_then(|t| t.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>())
            .map_err(|e| ModelError::Tensor {
                name: name.clone(),
                why: e.to_string(),
            })?;
        check(&name, &tensor, &id.shape(&config))?;
        if let Some(at) = tensor.iter().position(|x| !x.is_finite()) {
            return Err(ModelError::Tensor {
                name,
                why: format!("element {at} is not a finite number"),
            });
        }
        let tensor = match (architecture, id) {
            (Architecture::Llama, ParamId::Layer(_, LayerParam::Q)) => {
                half_split(&tensor, config.num_attention_heads, config.hidden_size)
            }
            (Architecture::Llama, ParamId::Layer(_, LayerParam::K)) => {
                half_split(&tensor, config.num_key_value_heads, config.hidden_size)
            }
            _ => tensor,
        };
        params.insert(id, Arc::new(tensor));
    }
    Ok(Gguf {
        config,
        weights: Weights { params },
        metadata: content.metadata,
    })
}

/// The shortest decimal that reads back as this `f32`: 1e-5 stored as f32 is 1e-5 again, and not 9.99999974e-6.
fn shortest(x: f32) -> f64 {
    x.to_string().parse().expect("a printed f32 is a number")
}

/// Rows of each head from interleaved (0, e/2, 1, e/2 + 1, ... of the original) back to half-split order.
fn half_split(rows: &[f32], heads: usize, width: usize) -> Vec<f32> {
    let e = rows.len() / width / heads;
    let mut out = vec![0.0; rows.len()];
    for head in 0..heads {
        for i in 0..e {
            let from = (head * e + 2 * (i % (e / 2)) + i / (e / 2)) * width;
            let to = (head * e + i) * width;
            out[to..to + width].copy_from_slice(&rows[from..from + width]);
        }
    }
    out
}

fn gguf_name(id: ParamId) -> String {
    match id {
        ParamId::Embed => "token_embd.weight".into(),
        ParamId::FinalNorm => "output_norm.weight".into(),
        ParamId::Head => "output.weight".into(),
        ParamId::Layer(i, p) => {
            let part = match p {
                LayerParam::InputNorm => "attn_norm",
                LayerParam::Q => "attn_q",
                LayerParam::K => "attn_k",
                LayerParam::V => "attn_v",
                LayerParam::O => "attn_output",
                LayerParam::QNorm => "attn_q_norm",
                LayerParam::KNorm => "attn_k_norm",
                LayerParam::PostNorm => "ffn_norm",
                LayerParam::Gate => "ffn_gate",
                LayerParam::Up => "ffn_up",
                LayerParam::Down => "ffn_down",
            };
            format!("blk.{i}.{part}.weight")
        }
    }
}
