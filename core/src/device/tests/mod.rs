//! The card against the processor. The tests of `parity` are the same wherever they run: on a machine with a card by `make cuda-check`, and
//! here, in a process of their own, on a stand-in for the driver that runs the card's kernels on the processor (core/cuda/emulate).

mod engine;
mod faults;
mod graph;
mod label;
mod object;
mod parity;
mod speed;
mod stand_in;
mod tiles;
mod training;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Card, DeviceOptions};
use crate::kernels::Random;
use crate::model::{LayerParam, Lora, Model, ParamId, TrainId};

/// Names the object whose card the tests of `parity` and `training` are to be run on.
const OBJECT: &str = "LOCUM_TEST_CUDA";

/// The card to test, if there is one. Who is asked to test one and finds none has failed.
fn card() -> Option<Arc<Card>> {
    let Some(library) = std::env::var_os(OBJECT) else {
        println!("skipped: no CUDA device (run `make cuda-check` on a machine with one)");
        return None;
    };
    let options = DeviceOptions {
        library: Some(library.into()),
        ..DeviceOptions::default()
    };
    match Card::open(&options) {
        Ok(card) => {
            println!("on {}", card.info().words());
            Some(card)
        }
        Err(why) => panic!("{why}"),
    }
}

/// tests/reference, wherever this binary was carried.
fn fixtures() -> PathBuf {
    match std::env::var_os("LOCUM_TEST_FIXTURES") {
        Some(folder) => folder.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/reference"),
    }
}

/// A model of tests/reference: `llama`, `qwen3`.
fn reference(name: &str) -> Model {
    Model::load(&fixtures().join(name)).unwrap()
}

/// A model of tests/reference/ttt, whose file has another name.
fn learner(name: &str) -> Model {
    let (from, dir) = (
        fixtures().join("ttt").join(name),
        tempfile::tempdir().unwrap(),
    );
    std::fs::copy(from.join("config.json"), dir.path().join("config.json")).unwrap();
    let weights = dir.path().join("model.safetensors");
    std::fs::copy(from.join("weights.safetensors"), weights).unwrap();
    let mut model = Model::load(dir.path()).unwrap();
    // The vectors were made without a cap, and drift far beyond it on purpose.
    model.config.ttt.as_mut().unwrap().max_drift = None;
    model
}

/// A decoder with heads of a width that attention in tiles knows, and room for long sequences.
fn wide(head_dim: usize) -> Model {
    random(64, 2, head_dim)
}

/// A decoder of many small blocks.
fn layered(layers: usize) -> Model {
    random(32, layers, 16)
}

fn random(hidden_size: usize, layers: usize, head_dim: usize) -> Model {
    let raw = serde_json::json!({
        "model_type": "llama", "vocab_size": 160, "hidden_size": hidden_size, "intermediate_size": 96, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": head_dim, "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true,
    });
    let config = crate::model::Config::from_json(&raw).unwrap();
    let mut random = Random::new(7);
    let mut weights = crate::model::Weights::default();
    for id in ParamId::all(&config) {
        let n = id.shape(&config).iter().product();
        let norm = matches!(
            id,
            ParamId::FinalNorm | ParamId::Layer(_, LayerParam::InputNorm | LayerParam::PostNorm)
        );
        let mut number = || (if norm { 1.0 } else { 0.0 }) + 0.12 * random.normal() as f32;
        weights
            .params
            .insert(id, Arc::new((0..n).map(|_| number()).collect()));
    }
    Model::new(config, weights).unwrap()
}

fn tokens(model: &Model, n: usize, seed: u64) -> Vec<u32> {
    let mut random = Random::new(seed);
    let v = model.config.vocab_size as f64;
    // 0 is padding in some fixtures, and no sequence that learns begins with it.
    (0..n)
        .map(|_| 1 + (random.unit() * (v - 1.0)) as u32)
        .collect()
}

/// The largest distance of two lists, over the largest number of the first.
fn apart(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let most = a.iter().fold(1e-20f32, |most, x| most.max(x.abs()));
    a.iter().zip(b).fold(0f32, |worst, (a, b)| {
        let gap = (a - b).abs() / most;
        if gap.is_nan() {
            f32::INFINITY
        } else {
            worst.max(gap)
        }
    })
}

#[track_caller]
fn assert_close(what: &str, want: &[f32], got: &[f32], tolerance: f32) {
    let gap = apart(want, got);
    println!("{what}: {gap:.2e} apart, {tolerance:.0e} allowed");
    assert!(
        gap <= tolerance,
        "{what}: {gap:e} apart, {tolerance:e} allowed"
    );
}

/// All tensors of a model; or an adapter's, and with them those of layers that learn.
fn moving(model: &Model, lora: Option<&Lora>) -> Vec<(TrainId, usize)> {
    match lora {
        None => ParamId::all(&model.config)
            .into_iter()
            .map(|id| (TrainId::Full(id), id.shape(&model.config).iter().product()))
            .collect(),
        Some(lora) => lora
            .pairs
            .iter()
            .flat_map(|((layer, p), (a, b))| {
                [
                    (TrainId::LoraA(*layer, *p), a.len()),
                    (TrainId::LoraB(*layer, *p), b.len()),
                ]
            })
            .chain(
                moving(model, None)
                    .into_iter()
                    .filter(|(id, _)| matches!(id, TrainId::Full(id) if id.is_of_learning_layer())),
            )
            .collect(),
    }
}

fn value(model: &Model, lora: Option<&Lora>, id: TrainId) -> Vec<f32> {
    match id {
        TrainId::Full(id) => model.weights.params[&id].to_vec(),
        TrainId::LoraA(layer, p) => lora.unwrap().pairs[&(layer, p)].0.clone(),
        TrainId::LoraB(layer, p) => lora.unwrap().pairs[&(layer, p)].1.clone(),
    }
}
