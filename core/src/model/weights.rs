//! Weight files of Hugging Face: safetensors in and out.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::{bf16, f16};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use super::config::Config;
use super::params::ParamId;
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
        let mut found: BTreeMap<String, (Vec<usize>, Param)> = BTreeMap::new();
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
                found.insert(name, (view.shape().to_vec(), Arc::new(data)));
            }
        }
        let mut params = BTreeMap::new();
        for id in ParamId::all(config) {
            let name = id.name();
            let (shape, data) = found
                .remove(&name)
                .ok_or_else(|| ModelError::MissingTensor(name.clone()))?;
            check_shape(&name, &shape, &id.shape(config))?;
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
        let mut new = fs::OpenOptions::new();
        new.write(true).create(true).truncate(true);
        // Weights and lists of a store are its user's alone.
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut new, 0o600);
        let mut file = new.open(&temporary)?;
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
    check_finite(name, &data)?;
    Ok(data)
}

/// Another shape of as many numbers would be another matrix.
pub(super) fn check_shape(name: &str, found: &[usize], want: &[usize]) -> Result<(), ModelError> {
    match found == want {
        true => Ok(()),
        false => Err(ModelError::Tensor {
            name: name.into(),
            why: format!("shape {found:?}, the config calls for {want:?}"),
        }),
    }
}

/// A number that is not finite would spread to every token.
pub(super) fn check_finite(name: &str, data: &[f32]) -> Result<(), ModelError> {
    match data.iter().position(|x| !x.is_finite()) {
        None => Ok(()),
        Some(at) => Err(ModelError::Tensor {
            name: name.into(),
            why: format!("element {at} is not a finite number"),
        }),
    }
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
