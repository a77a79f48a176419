//! Chunk-wise dynamic evaluation against PyTorch, against finite differences, and against the plain model.

use std::path::{Path, PathBuf};

use super::{write_tiny, FileDtype, Model, ModelError, PackedRows, Sequence, WeightFormat};
use crate::kernels::{log_sum_exp, Pool, Random};
use crate::ttt::tests::decoder::{tensors, Tensors};
use crate::ttt::{TttConfig, TttMode, TttStart};

/// Largest error of a logit and of a weight: logits are of size 1 to 10.
const LOGITS: f32 = 2e-4;
const VALUES: f32 = 5e-5;

/// Values made by `tests/reference/make_gradient.py`.
struct Case {
    name: &'static str,
    model: Model,
    config: TttConfig,
    ids: Vec<u32>,
    values: Tensors,
}

fn cases() -> Vec<Case> {
    ["llama", "qwen3"].map(case).into()
}

fn case(name: &'static str) -> Case {
    let folder: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/reference")
        .join(name);
    let model = Model::load(&folder).unwrap();
    let values = tensors(&folder.join("gradient.safetensors"));
    let config = TttConfig {
        layers: values["layers"].iter().map(|layer| *layer as u16).collect(),
        max_drift: None,
        ..TttConfig::gradient(3, values["chunk"][0] as usize, values["lr"][0])
    };
    Case {
        name,
        model,
        config,
        ids: values["ids"].iter().map(|id| *id as u32).collect(),
        values,
    }
}

#[track_caller]
fn close(what: &str, got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        // Written so that NaN fails.
        let near = (got - want).abs() <= tolerance;
        assert!(near, "{what}[{i}]: {got} instead of {want}");
    }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// Hidden states of new tokens, read in calls of these lengths.
fn read(model: &Model, sequence: &mut Sequence, ids: &[u32], calls: &[usize]) -> Vec<f32> {
    let pool = Pool::new(2, 0);
    let (mut out, mut at) = (Vec::new(), 0);
    for len in calls {
        let new = &ids[at..at + len];
        out.extend(model.step(&pool, &mut [(&mut *sequence, new)]).unwrap());
        at += len;
    }
    assert_eq!(at, ids.len());
    out
}

fn logits(model: &Model, hidden: &[f32]) -> Vec<f32> {
    let rows: Vec<usize> = (0..hidden.len() / model.config.hidden_size).collect();
    model.logits(&Pool::new(2, 0), hidden, &rows)
}

fn ids(len: usize, seed: u32) -> Vec<u32> {
    (0..len as u32)
        .map(|i| 3 + (i * i * 7 + i * 3 + seed) % 50)
        .collect()
}

fn tiny() -> Model {
    let dir = tempfile::tempdir().unwrap();
    write_tiny(dir.path(), 3).unwrap();
    let mut model = Model::load(dir.path()).unwrap();
    model.round_to_bf16();
    model
}

/// Both layers of the tiny model, so that a gradient passes through a block and its attention.
fn both(chunk_len: usize, lr: f32) -> TttConfig {
    TttConfig {
        layers: vec![0, 1],
        max_drift: None,
        ..TttConfig::gradient(2, chunk_len, lr)
    }
}

#[test]
fn ttt_reference_gradient_logits_and_weights_equal_pytorch_however_the_calls_are_cut() {
    for Case {
        name,
        model,
        config,
        ids,
        values,
    } in cases()
    {
        let n = ids.len();
        let c = config.chunk_len;
        let far = values["logits"].iter().zip(&values["logits_plain"]);
        let far = far.fold(0f32, |most, (a, b)| most.max((a - b).abs()));
        assert!(
            far > 0.05,
            "{name}: what is learned changes a logit by {far}"
        );
        for calls in [
            vec![n],
            vec![1; n],
            vec![5, 1, 19, 0, n - 25],
            vec![c, c, c, n - 3 * c],
        ] {
            let mut sequence = model.sequence_with(8, &config).unwrap();
            let hidden = read(&model, &mut sequence, &ids, &calls);
            close(name, &logits(&model, &hidden), &values["logits"], LOGITS);
            for (layer, weight) in &sequence.fast.layers {
                let want = &values[&format!("down.{layer}")];
                close(name, weight.weight(), want, VALUES);
            }
            let updates = &sequence.fast.updates;
            assert_eq!(updates.len(), n / c * config.layers.len());
            assert!(updates.iter().all(|(_, u)| u.drift > 0.0 && !u.tripped));
        }
        // The first step, as a gradient.
        let mut sequence = model.sequence_with(8, &config).unwrap();
        let start: Vec<Vec<f32>> = sequence
            .fast
            .layers
            .values()
            .map(|w| w.weight().to_vec())
            .collect();
        read(&model, &mut sequence, &ids[..c], &[c]);
        for ((layer, weight), start) in sequence.fast.layers.iter().zip(start) {
            let moved = start.iter().zip(weight.weight());
            let got: Vec<f32> = moved.map(|(a, b)| (a - b) / config.lr).collect();
            close(name, &got, &values[&format!("grad.{layer}")], VALUES);
        }
    }
}

/// Mean loss over the pairs inside a chunk, of hidden states that were served.
fn chunk_loss(model: &Model, hidden: &[f32], ids: &[u32]) -> f64 {
    let logits = logits(model, hidden);
    let rows = logits.chunks_exact(model.config.vocab_size);
    let nll = |(row, id): (&[f32], &u32)| log_sum_exp(row) - f64::from(row[*id as usize]);
    rows.zip(&ids[1..]).map(nll).sum::<f64>() / (ids.len() - 1) as f64
}

#[test]
fn the_step_at_an_edge_agrees_with_finite_differences_of_the_served_loss() {
    let c = 12;
    for name in ["llama", "qwen3"] {
        let Case {
            model,
            mut config,
            ids,
            ..
        } = case(name);
        config.chunk_len = c;
        let mut before = model.sequence_with(8, &config).unwrap();
        read(&model, &mut before, &ids[..c], &[c]);
        let mut after = before.clone();
        read(&model, &mut after, &ids[c..2 * c], &[c]);
        let chunk = &ids[c..2 * c];
        for &layer in &config.layers {
            let (old, new) = (
                before.fast.layers[&layer].weight(),
                after.fast.layers[&layer].weight(),
            );
            for at in (0..old.len()).step_by(137) {
                let got = (old[at] - new[at]) / config.lr;
                let eps = 0.02;
                let moved = |by: f32| {
                    let mut sequence = before.clone();
                    let mut unit = vec![0.0; old.len()];
                    unit[at] = 1.0;
                    let step = TttConfig {
                        lr: -by,
                        ..config.clone()
                    };
                    let weight = sequence.fast.layers.get_mut(&layer).unwrap();
                    weight.descend(None, &step, &unit);
                    let hidden = read(&model, &mut sequence, chunk, &[c]);
                    chunk_loss(&model, &hidden, chunk)
                };
                let want = ((moved(eps) - moved(-eps)) / (2.0 * f64::from(eps))) as f32;
                assert!(
                    (got - want).abs() < 2e-4 + 0.02 * want.abs(),
                    "{name} layer {layer} {at}: {got}, not {want}"
                );
            }
        }
    }
}

#[test]
fn the_first_chunk_and_a_step_size_of_zero_equal_the_plain_model_bit_for_bit() {
    let (c, text) = (16, ids(70, 1));
    for format in WeightFormat::ALL {
        let model = tiny().packed(format);
        // Plain weights sum in another order for another number of rows, so the plain model is cut alike.
        for calls in [vec![c, c, c, c, 6], vec![1; 70]] {
            let mut plain = Sequence::new(&model.config, 8);
            let plain = read(&model, &mut plain, &text, &calls);
            let mut still = model.sequence_with(8, &both(c, 0.0)).unwrap();
            let got = read(&model, &mut still, &text, &calls);
            assert_eq!(bits(&got), bits(&plain), "{format:?}");
            assert_eq!(still.fast.updates.len(), 2 * 4);
            let mut learning = model.sequence_with(8, &both(c, 2.0)).unwrap();
            let got = read(&model, &mut learning, &text, &calls);
            let first = c * model.config.hidden_size;
            assert_eq!(bits(&got[..first]), bits(&plain[..first]), "{format:?}");
            assert_ne!(bits(&got[first..]), bits(&plain[first..]), "{format:?}");
        }
    }
}

#[test]
fn a_packed_model_learns_from_the_numbers_that_it_serves() {
    let (c, text) = (16, ids(40, 2));
    for format in [WeightFormat::Bf16, WeightFormat::Q8, WeightFormat::Q4] {
        let model = tiny().packed(format);
        let bytes = model.weight_bytes();
        let learned = |model: &Model| {
            let mut sequence = model.sequence_with(8, &both(c, 1.0)).unwrap();
            read(model, &mut sequence, &text, &[40]);
            sequence
        };
        let (got, want) = (learned(&model), learned(&model.unpacked()));
        for (got, want) in got.fast.layers.values().zip(want.fast.layers.values()) {
            let size = want.drift();
            assert!(size > 0.0);
            assert!(
                (got.drift() - size).abs() < 0.05 * size,
                "{format:?}: {} {size}",
                got.drift()
            );
        }
        // What it unpacked is counted, and unpacked once for all sequences.
        let unpacked = model.weight_bytes();
        assert!(unpacked > bytes, "{format:?}");
        learned(&model.clone());
        assert_eq!(model.weight_bytes(), unpacked);
    }
}

#[test]
fn past_the_cap_a_layer_begins_again_from_the_served_weight() {
    let (c, text, model) = (16, ids(40, 3), tiny());
    let config = TttConfig {
        max_drift: Some(1e-6),
        ..both(c, 1.0)
    };
    let mut capped = model.sequence_with(8, &config).unwrap();
    let calls = [c, c, 8];
    let got = read(&model, &mut capped, &text, &calls);
    assert_eq!(capped.fast.updates.len(), 4);
    assert!(capped
        .fast
        .updates
        .iter()
        .all(|(_, u)| u.tripped && u.drift > 1e-6));
    assert!(capped
        .fast
        .layers
        .values()
        .all(|w| w.is_start() && w.drift() == 0.0));
    let plain = read(&model, &mut Sequence::new(&model.config, 8), &text, &calls);
    assert_eq!(bits(&got), bits(&plain));
}

#[test]
fn sequences_with_edges_of_their_own_read_in_one_batch_what_they_read_alone() {
    let pool = Pool::new(3, 0);
    let model = tiny().packed(WeightFormat::Bf16);
    let texts = [ids(70, 1), ids(33, 5), ids(50, 9), ids(1, 11)];
    let make = |i: usize| match i {
        0 => model.sequence_with(8, &both(16, 1.0)).unwrap(),
        2 => model.sequence_with(8, &both(10, 0.5)).unwrap(),
        _ => Sequence::new(&model.config, 8),
    };
    let past = [7, 0, 10, 0];
    let alone = |i: usize| {
        let mut sequence = make(i);
        let calls = [past[i], texts[i].len() - past[i]];
        (read(&model, &mut sequence, &texts[i], &calls), sequence)
    };
    let mut sequences: Vec<Sequence> = (0..4).map(make).collect();
    for i in [0, 2] {
        read(&model, &mut sequences[i], &texts[i][..past[i]], &[past[i]]);
    }
    let mut batch: Vec<(&mut Sequence, &[u32])> = (sequences.iter_mut().zip(&texts).zip(past))
        .map(|((sequence, text), past)| (sequence, &text[past..]))
        .collect();
    let got = model.step(&pool, &mut batch).unwrap();
    let d = model.config.hidden_size;
    let mut from = 0;
    for (i, sequence) in sequences.iter().enumerate() {
        let (want, twin) = alone(i);
        let want = &want[past[i] * d..];
        close("together", &got[from..from + want.len()], want, 1e-4);
        from += want.len();
        assert_eq!(sequence.ids, texts[i]);
        for (layer, weight) in &sequence.fast.layers {
            close(
                "weights",
                weight.weight(),
                twin.fast.layers[layer].weight(),
                1e-5,
            );
        }
    }
    assert_eq!(from, got.len());
}

#[test]
fn a_sequence_is_cut_back_within_its_chunk_copied_and_counted_with_what_waits() {
    let (c, text, model) = (16, ids(60, 4), tiny());
    let d = model.config.hidden_size;
    let mut whole = model.sequence_with(64, &both(c, 1.0)).unwrap();
    let want = read(&model, &mut whole, &text, &[40, 20]);
    let mut sequence = model.sequence_with(64, &both(c, 1.0)).unwrap();
    let empty = sequence.bytes();
    read(&model, &mut sequence, &text[..40], &[40]);
    let waiting = 4 * c * d;
    let weights: usize = sequence.fast.layers.values().map(|w| w.bytes()).sum();
    assert_eq!(sequence.bytes(), empty + weights + waiting);
    let copy = sequence.clone();
    // Other tokens, forgotten again within the chunk that the edge at 32 begins.
    read(&model, &mut sequence, &[9, 9, 9], &[3]);
    assert!(sequence.truncate(36));
    read(&model, &mut sequence, &text[36..40], &[4]);
    for mut sequence in [sequence, copy.clone(), copy.prefix(40, 64).unwrap()] {
        let got = read(&model, &mut sequence, &text[40..], &[20]);
        close("after the cut", &got, &want[40 * d..], 1e-4);
        for (layer, weight) in &sequence.fast.layers {
            close(
                "weights",
                weight.weight(),
                whole.fast.layers[layer].weight(),
                1e-5,
            );
        }
        // The update at 48 cannot be taken back.
        assert!(!sequence.truncate(47));
        assert_eq!(sequence.ids.len(), 60);
        assert!(sequence.truncate(48));
        assert_eq!(sequence.fast.room(), c);
    }
    assert!(copy.prefix(31, 64).is_none());
    let edge = copy.prefix(32, 64).unwrap();
    assert!(edge.fast.inputs.is_empty());
}

#[test]
fn a_file_that_asks_for_gradients_is_read_that_way_and_nothing_trained_is_missed() {
    let dir = tempfile::tempdir().unwrap();
    let plain = tiny();
    let config = TttConfig::gradient(2, 16, 0.5);
    assert_eq!(config.layers, [1]);
    assert_eq!(
        TttConfig::gradient(30, 256, 0.1).layers,
        (22..30).collect::<Vec<u16>>()
    );
    let model = plain
        .clone()
        .with_ttt(config.clone(), TttStart::Published, &mut Random::new(1))
        .unwrap();
    assert_eq!(model.weights.params.len(), plain.weights.params.len());
    model.save(dir.path(), FileDtype::F32).unwrap();
    let loaded = Model::load(dir.path()).unwrap();
    assert_eq!(loaded.config.ttt, Some(config.clone()));
    let text = ids(50, 6);
    let mut by_file = loaded.sequence(8, true);
    let got = read(&loaded, &mut by_file, &text, &[50]);
    let mut by_hand = plain.sequence_with(8, &config).unwrap();
    assert_eq!(got, read(&plain, &mut by_hand, &text, &[50]));
    assert_eq!(by_file.fast.updates.len(), 3);
    let mut off = loaded.sequence(8, false);
    read(&loaded, &mut off, &text, &[50]);
    assert!(!off.fast.is_on() && off.fast.updates.is_empty());
}

#[test]
fn impossible_settings_and_tokens_are_refused_and_change_nothing() {
    let model = tiny();
    let refused = |config: TttConfig, field: &str| match model.sequence_with(8, &config) {
        Err(ModelError::Config { field: found, .. }) => assert_eq!(found, field),
        _ => panic!("{field} was not refused"),
    };
    let good = both(16, 1.0);
    refused(
        TttConfig {
            mode: TttMode::InPlace,
            ..good.clone()
        },
        "ttt_mode",
    );
    refused(
        TttConfig {
            layers: vec![2],
            ..good.clone()
        },
        "ttt_layers",
    );
    refused(
        TttConfig {
            layers: vec![],
            ..good.clone()
        },
        "ttt_layers",
    );
    refused(
        TttConfig {
            chunk_len: 1,
            ..good.clone()
        },
        "ttt_chunk",
    );
    refused(
        TttConfig {
            lr: f32::NAN,
            ..good.clone()
        },
        "ttt_lr",
    );
    let mut sequence = model.sequence_with(8, &good).unwrap();
    let pool = Pool::new(1, 0);
    let mut text = ids(40, 1);
    // In the third chunk of the call.
    text[35] = 1 << 20;
    let step = model.step(&pool, &mut [(&mut sequence, &text)]);
    assert!(matches!(step, Err(ModelError::Token { .. })));
    let long = vec![5; model.max_positions() + 1];
    let step = model.step(&pool, &mut [(&mut sequence, &long)]);
    assert!(matches!(step, Err(ModelError::TooLong { .. })));
    assert!(sequence.ids.is_empty() && sequence.kv.is_empty() && sequence.fast.updates.is_empty());
}

#[test]
fn rows_behind_a_cache_compute_what_they_compute_with_all_rows_before_them() {
    let pool = Pool::new(2, 0);
    for Case {
        name, model, ids, ..
    } in cases()
    {
        let layers = (0, model.config.num_hidden_layers);
        let mut sequence = Sequence::new(&model.config, 64);
        read(&model, &mut sequence, &ids[..20], &[20]);
        let mut whole = model.embed(&ids).unwrap();
        model.blocks(
            &pool,
            layers,
            &PackedRows::new(&[ids.len()]),
            None,
            &mut whole,
            None,
        );
        let rows = PackedRows::after(&sequence.kv, 20, ids.len() - 20);
        let mut x = model.embed(&ids[20..]).unwrap();
        model.blocks(&pool, layers, &rows, None, &mut x, None);
        close(name, &x, &whole[20 * model.config.hidden_size..], 1e-4);
    }
}
