//! Low-rank adapters: what is trained, how it is merged, and PEFT's files.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::weights::{encode, write_atomically, write_safetensors, FileDtype};
use super::{Config, LayerParam, Model, ModelError, ParamId};
use crate::kernels::{matmul, Buffer, Mat, MatMut, Pool};

/// Rank, scale and targets of an adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdapterConfig {
    pub rank: usize,
    pub alpha: f64,
    pub seed: u64,
}

/// `y = x Wᵀ + (alpha / rank) · (x Aᵀ) Bᵀ` (LoRA, arXiv:2106.09685, eq. 3) for the seven matrices of each block.
///
/// A (r, in) starts uniform in ±√(3 / in) · 1/√3 (PEFT's Kaiming initialisation with a = √5), B (out, r) at zero.
#[derive(Clone)]
pub struct Lora {
    pub config: AdapterConfig,
    /// (A, B) by layer and matrix.
    pub pairs: BTreeMap<(u16, LayerParam), (Vec<f32>, Vec<f32>)>,
}

impl Lora {
    /// A fresh adapter on `targets` of every block; B is zero, so it changes nothing yet.
    pub fn new(model: &Config, config: AdapterConfig, targets: &[LayerParam]) -> Self {
        let mut random = crate::kernels::Random::new(config.seed);
        let mut pairs = BTreeMap::new();
        for layer in 0..model.num_hidden_layers as u16 {
            for &target in targets {
                let shape = target.shape(model);
                let (rows, cols) = (shape[0], shape[1]);
                let bound = 1.0 / (cols as f32).sqrt();
                let a = (0..config.rank * cols)
                    .map(|_| bound * (2.0 * random.unit() as f32 - 1.0))
                    .collect();
                pairs.insert((layer, target), (a, vec![0.0; rows * config.rank]));
            }
        }
        Self { config, pairs }
    }

    /// `alpha / rank`.
    pub fn scale(&self) -> f32 {
        (self.config.alpha / self.config.rank as f64) as f32
    }

    /// The matrix `id` (out, in) with its adapter added, `W + scale · B A`, if it has one.
    ///
    /// A product by it costs what the one by W does; with the adapter apart, two narrow products go over all of its input and output
    /// again, which from some 100 rows on takes longer than adding up.
    pub(super) fn merged(&self, pool: &Pool, model: &Model, id: ParamId) -> Option<Buffer> {
        let ParamId::Layer(layer, which) = id else {
            return None;
        };
        let (a, b) = self.pairs.get(&(layer, which))?;
        let shape = id.shape(&model.config);
        let (rows, cols, r) = (shape[0], shape[1], self.config.rank);
        let mut w = pool.buffer(rows * cols);
        w.copy_from_slice(model.param(id));
        matmul(
            Some(pool),
            Mat::new(b, rows, r),
            Mat::new(a, r, cols),
            self.scale(),
            true,
            MatMut::new(&mut w, rows, cols),
        );
        Some(w)
    }

    /// The model with the adapter added into its matrices.
    pub fn merge(&self, pool: &Pool, model: &Model) -> Model {
        let mut merged = model.clone();
        for ((layer, target), (a, b)) in &self.pairs {
            let id = ParamId::Layer(*layer, *target);
            let shape = id.shape(&model.config);
            let (rows, cols, r) = (shape[0], shape[1], self.config.rank);
            let w = Arc::make_mut(
                merged
                    .weights
                    .params
                    .get_mut(&id)
                    .expect("adapted matrices exist"),
            );
            matmul(
                Some(pool),
                Mat::new(b, rows, r),
                Mat::new(a, r, cols),
                self.scale(),
                true,
                MatMut::new(w, rows, cols),
            );
        }
        merged
    }

    /// Writes `adapter_config.json` and `adapter_model.safetensors` as PEFT reads them.
    pub fn save(&self, dir: &Path, model: &Config, base_name: &str) -> Result<(), ModelError> {
        let mut targets: Vec<&str> = self
            .pairs
            .keys()
            .map(|(_, t)| t.module().rsplit('.').next().expect("a module has a name"))
            .collect();
        targets.sort_unstable();
        targets.dedup();
        let config = json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_name,
            "r": self.config.rank,
            "lora_alpha": self.config.alpha,
            "lora_dropout": 0.0,
            "target_modules": targets,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
        });
        let text = serde_json::to_string_pretty(&config).expect("a JSON value prints");
        write_atomically(&dir.join("adapter_config.json"), text.as_bytes())?;
        let mut tensors = Vec::new();
        for ((layer, target), (a, b)) in &self.pairs {
            let shape = target.shape(model);
            let name = format!("base_model.model.model.layers.{layer}.{}", target.module());
            let r = self.config.rank;
            tensors.push((
                format!("{name}.lora_A.weight"),
                vec![r, shape[1]],
                encode(a, FileDtype::F32),
            ));
            tensors.push((
                format!("{name}.lora_B.weight"),
                vec![shape[0], r],
                encode(b, FileDtype::F32),
            ));
        }
        write_safetensors(
            &dir.join("adapter_model.safetensors"),
            &tensors,
            FileDtype::F32,
        )
    }
}
