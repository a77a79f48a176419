//! How fast the card is with a model of the default base's shape and random numbers: `core/cuda/check.sh` runs it and keeps its lines.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::Instant;

use serde_json::json;

use super::super::{Card, CardModel, CardSequence, CardTraining, Numbers, TrainRates};
use super::{card, moving, tokens, value};
use crate::kernels::Random;
use crate::model::{
    AdapterConfig, Compute, Config, Lora, Model, ParamId, WeightFormat, Weights, LINEARS,
};
use crate::ttt::{TttConfig, TttStart};

/// Peak of dense bf16 products of an H100 SXM, in operations a second; the share of it is told for other cards too.
const PEAK: f64 = 989e12;

/// How much is measured.
pub(super) struct Size {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    pub layers: usize,
    heads: (usize, usize),
    at_once: &'static [usize],
    steps: usize,
    lengths: &'static [usize],
    chunk: usize,
    /// Rows of a training step, and their tokens.
    rows: (usize, usize),
    tokens: usize,
    /// Of a whole job: episodes, and tokens that it trains.
    pub episodes: u64,
    pub trained_tokens: u64,
}

/// SmolLM2-135M, and the demo's job.
pub(super) const WHOLE: Size = Size {
    vocab_size: 49152,
    hidden_size: 576,
    intermediate_size: 1536,
    layers: 30,
    heads: (9, 3),
    at_once: &[1, 8, 64],
    steps: 64,
    lengths: &[2048, 8192, 32768],
    chunk: 256,
    rows: (32, 512),
    tokens: 400,
    episodes: 245,
    trained_tokens: 100_000,
};

/// The same on a model that the stand-in can run, so that the measurement is known to work before there is a card to measure.
pub(super) const SMALL: Size = Size {
    vocab_size: 320,
    hidden_size: 64,
    intermediate_size: 96,
    layers: 2,
    heads: (2, 1),
    at_once: &[1, 3],
    steps: 2,
    lengths: &[40],
    chunk: 16,
    rows: (2, 16),
    tokens: 4,
    episodes: 12,
    trained_tokens: 1_000,
};

pub(super) fn base(size: &Size) -> Model {
    let raw = json!({
        "model_type": "llama", "vocab_size": size.vocab_size, "hidden_size": size.hidden_size,
        "intermediate_size": size.intermediate_size, "num_hidden_layers": size.layers, "num_attention_heads": size.heads.0,
        "num_key_value_heads": size.heads.1, "head_dim": 64, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0, "tie_word_embeddings": true, "bos_token_id": 0, "eos_token_id": 2,
    });
    let config = Config::from_json(&raw).unwrap();
    let (mut random, mut weights) = (Random::new(1), Weights::default());
    for id in ParamId::all(&config) {
        let shape = id.shape(&config);
        let matrix = shape.len() > 1;
        let mut number = || match matrix {
            true => 0.12 * (random.unit() as f32 - 0.5),
            false => 1.0,
        };
        let numbers = (0..shape.iter().product()).map(|_| number());
        weights.params.insert(id, Arc::new(numbers.collect()));
    }
    let mut model = Model::new(config, weights).unwrap().with_positions(33000);
    model.compute = Compute::Bf16;
    model
}

pub(super) fn say(what: &str, mut values: Vec<f64>, unit: &str) {
    values.sort_by(f64::total_cmp);
    let (median, least, most) = (
        values[values.len() / 2],
        values[0],
        values[values.len() - 1],
    );
    let line = json!({ "engine": "locum", "what": what, "median": median, "least": least, "most": most, "unit": unit, "runs": values.len() });
    println!("speed {line}");
}

/// Tokens a second of `n` steps of one token each for all sequences.
fn decode(on: &Arc<CardModel>, sequences: &mut [CardSequence], n: usize) -> f64 {
    let rows: Vec<usize> = (0..sequences.len()).collect();
    let began = Instant::now();
    for i in 0..n {
        let token = [100 + i as u32];
        let mut batch: Vec<(&mut CardSequence, &[u32])> =
            sequences.iter_mut().map(|s| (s, &token[..])).collect();
        on.step(&mut batch, &rows).unwrap();
    }
    (n * sequences.len()) as f64 / began.elapsed().as_secs_f64()
}

fn begun(on: &Arc<CardModel>, model: &Model, n: usize) -> Vec<CardSequence> {
    (0..n)
        .map(|i| {
            let mut sequence = on.sequence(1024, false).unwrap();
            on.step(&mut [(&mut sequence, &tokens(model, 64, i as u64))], &[63])
                .unwrap();
            sequence
        })
        .collect()
}

fn decoding(card: &Arc<Card>, model: &Model, size: &Size) {
    let on = card
        .load(&model.clone().packed(WeightFormat::Bf16))
        .unwrap();
    for &n in size.at_once {
        let mut sequences = begun(&on, model, n);
        decode(&on, &mut sequences, size.steps);
        let runs = (0..5)
            .map(|_| decode(&on, &mut sequences, size.steps))
            .collect();
        say(&format!("decode, {n} at once"), runs, "tok/s");
    }
}

fn prefill(card: &Arc<Card>, model: &Model, size: &Size) {
    let ttt = TttConfig {
        layers: (0..size.layers as u16)
            .filter(|l| l % 6 == 5 || size.layers < 6)
            .collect(),
        chunk_len: size.chunk,
        lr: 1e-6,
        max_drift: None,
        ..TttConfig::default()
    };
    let mut learner = model
        .clone()
        .with_ttt(ttt, TttStart::NextToken, &mut Random::new(2))
        .unwrap();
    let mut random = Random::new(3);
    for (id, param) in &mut learner.weights.params {
        if matches!(id, ParamId::Layer(_, crate::model::LayerParam::TttProj)) {
            Arc::make_mut(param)
                .iter_mut()
                .for_each(|x| *x = 0.02 * random.normal() as f32);
        }
    }
    let positions = model.max_positions();
    let on = card
        .load(&learner.with_positions(positions).packed(WeightFormat::Bf16))
        .unwrap();
    for &length in size.lengths {
        for learning in [false, true] {
            let read = || {
                let ids = tokens(model, length, 9);
                let mut sequence = on.sequence(length, learning).unwrap();
                let began = Instant::now();
                for part in ids.chunks(4096) {
                    on.step(&mut [(&mut sequence, part)], &[part.len() - 1])
                        .unwrap();
                }
                length as f64 / began.elapsed().as_secs_f64()
            };
            read();
            let how = if learning { "learning" } else { "not learning" };
            say(
                &format!("prefill {length}, {how}"),
                (0..5).map(|_| read()).collect(),
                "tok/s",
            );
        }
    }
}

/// A training of 32 rows of 512 tokens, all with loss.
struct Job {
    training: CardTraining,
    rates: TrainRates,
    texts: Vec<Vec<u32>>,
}

impl Job {
    fn new(card: &Arc<Card>, model: &Model, size: &Size, lora: Option<&Lora>) -> Self {
        let moves = moving(model, lora);
        let mut training = CardTraining::begin(card, model, lora, &moves, 0).unwrap();
        for (id, _) in &moves {
            training
                .put(*id, Numbers::Value, &value(model, lora, *id))
                .unwrap();
        }
        Self {
            training,
            rates: TrainRates {
                tensors: vec![(1e-5, 1.0); moves.len()],
                scale: 1.0,
                root: 1.0,
            },
            texts: (0..size.rows.0)
                .map(|i| tokens(model, size.rows.1, 60 + i as u64))
                .collect(),
        }
    }

    /// Seconds of a step.
    fn step(&mut self) -> f64 {
        let texts: Vec<&[u32]> = self.texts.iter().map(|ids| &ids[..]).collect();
        let all: Vec<u32> = texts.concat();
        let rows: Vec<usize> = (0..all.len())
            .filter(|row| (row + 1) % self.texts[0].len() != 0)
            .collect();
        let labels: Vec<u32> = rows.iter().map(|row| all[row + 1]).collect();
        let weights = vec![1.0; rows.len()];
        let began = Instant::now();
        self.training.forward(&texts, 0.0, true).unwrap();
        self.training
            .head((&rows, &labels, &weights), Some(1.0 / rows.len() as f32))
            .unwrap();
        self.training.backward().unwrap();
        self.training.squared_norms().unwrap();
        self.training.apply(&self.rates).unwrap();
        began.elapsed().as_secs_f64()
    }
}

fn training(card: &Arc<Card>, model: &Model, size: &Size) {
    let config = AdapterConfig {
        rank: 16,
        alpha: 32.0,
        seed: 1,
    };
    let lora = Lora::new(&model.config, config, &LINEARS);
    let n: usize = model.weights.params.values().map(|w| w.len()).sum();
    for (what, lora, factor) in [("lora", Some(&lora), 4.0), ("full", None, 6.0)] {
        let mut job = Job::new(card, model, size, lora);
        job.step();
        let seconds: Vec<f64> = (0..5).map(|_| job.step()).collect();
        let tokens = (size.rows.0 * size.rows.1) as f64;
        let shares = |times: f64| {
            seconds
                .iter()
                .map(|s| 100.0 * times * n as f64 * tokens / s / PEAK)
                .collect()
        };
        say(
            &format!("{what} step, 32 x 512"),
            seconds.iter().map(|s| tokens / s).collect(),
            "tok/s",
        );
        say(
            &format!("{what} step, share of an H100's peak by {factor} N"),
            shares(factor),
            "%",
        );
    }
    println!(
        "speed {}",
        json!({ "engine": "locum", "what": "memory, most", "median": card.info().peak_bytes as f64 / 1e9, "unit": "GB" })
    );
}

/// A token's time while nothing else runs, and beside a training.
fn beside(card: &Arc<Card>, model: &Model, size: &Size) {
    let on = card
        .load(&model.clone().packed(WeightFormat::Bf16))
        .unwrap();
    let one = |what: &str| {
        let mut sequences = begun(&on, model, 1);
        let mut times: Vec<f64> = (0..size.tokens)
            .map(|_| 1e3 / decode(&on, &mut sequences, 1))
            .collect();
        times.sort_by(f64::total_cmp);
        say(
            &format!("a token, median, {what}"),
            vec![times[size.tokens / 2]],
            "ms",
        );
        say(
            &format!("a token, p99, {what}"),
            vec![times[size.tokens * 99 / 100]],
            "ms",
        );
    };
    one("alone");
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let config = AdapterConfig {
                rank: 16,
                alpha: 32.0,
                seed: 1,
            };
            let lora = Lora::new(&model.config, config, &LINEARS);
            let mut job = Job::new(card, model, size, Some(&lora));
            while !stop.load(Ordering::Relaxed) {
                job.step();
            }
        });
        std::thread::sleep(std::time::Duration::from_millis(if size.layers < 6 {
            10
        } else {
            3000
        }));
        one("beside a training");
        stop.store(true, Ordering::Relaxed);
    });
}

fn measure(size: &Size) {
    let Some(card) = card() else { return };
    let model = base(size);
    decoding(&card, &model, size);
    prefill(&card, &model, size);
    training(&card, &model, size);
    beside(&card, &model, size);
}

#[test]
#[ignore = "a measurement, of which the stand-in knows nothing"]
fn measure_the_card() {
    measure(&WHOLE);
}

#[test]
fn the_measurement_runs() {
    measure(&SMALL);
}
