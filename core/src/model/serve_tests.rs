//! Serving against itself, however a text is cut and whoever is read beside it, and against the values of the TTT authors' code.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{
    write_tiny, FileDtype, Grads, LayerParam, Model, PackedRows, ParamId, Sequence, Tape, TrainId,
    WeightFormat,
};
use crate::kernels::{Pool, Random};
use crate::ttt::tests::decoder::{tensors, Tensors};
use crate::ttt::{Forgetting, TttConfig, TttStart, TttTarget};

/// Hidden states of each part of a text, read one after another.
fn alone(model: &Model, pool: &Pool, text: &[u32], parts: &[usize]) -> Vec<f32> {
    let mut sequence = Sequence::new(&model.config, 4);
    let mut out = Vec::new();
    let mut at = 0;
    for len in parts {
        let new = &text[at..at + len];
        out.extend(model.step(pool, &mut [(&mut sequence, new)]).unwrap());
        at += len;
    }
    out
}

#[test]
fn what_a_sequence_reads_does_not_depend_on_its_company_nor_on_how_it_is_cut() {
    let dir = tempfile::tempdir().unwrap();
    write_tiny(dir.path(), 3).unwrap();
    let plain = Model::load(dir.path()).unwrap();
    let pool = Pool::new(3, 0);
    let texts: Vec<Vec<u32>> = [5, 130, 1, 40, 77]
        .iter()
        .map(|len| (0..*len).map(|i| 3 + (i * 7 + len) % 50).collect())
        .collect();
    // Plain weights go through `gemm`, which sums in another order for another number of rows.
    for format in [WeightFormat::Bf16, WeightFormat::Q8, WeightFormat::Q4] {
        let model = plain.clone().packed(format);
        let want: Vec<Vec<f32>> = texts
            .iter()
            .map(|text| alone(&model, &pool, text, &[text.len()]))
            .collect();
        let cut = alone(&model, &pool, &texts[1], &[1, 30, 2, 64, 33]);
        assert_eq!(cut, want[1], "{format:?}");
        let mut sequences: Vec<Sequence> = texts
            .iter()
            .map(|_| Sequence::new(&model.config, 4))
            .collect();
        // A first step that leaves each with a past of another length, then all that is left in one batch.
        let past = [2, 17, 0, 39, 50];
        for ((sequence, text), past) in sequences.iter_mut().zip(&texts).zip(past) {
            if past > 0 {
                model.step(&pool, &mut [(sequence, &text[..past])]).unwrap();
            }
        }
        let mut batch: Vec<(&mut Sequence, &[u32])> = sequences
            .iter_mut()
            .zip(&texts)
            .zip(past)
            .map(|((sequence, text), past)| (sequence, &text[past..]))
            .collect();
        let got = model.step(&pool, &mut batch).unwrap();
        let d = model.config.hidden_size;
        let want: Vec<f32> = want
            .iter()
            .zip(past)
            .flat_map(|(want, past)| want[past * d..].to_vec())
            .collect();
        assert_eq!(got, want, "{format:?}");
    }
}

/// A tiny model whose layers learn enough to be seen, with noise for filters and projections.
pub(super) fn learner(chunk_len: usize, target: TttTarget) -> Model {
    let dir = tempfile::tempdir().unwrap();
    write_tiny(dir.path(), 3).unwrap();
    let ttt = TttConfig {
        layers: vec![0, 1],
        chunk_len,
        max_drift: None,
        target,
        ..TttConfig::default()
    };
    let mut random = Random::new(5);
    let mut model = Model::load(dir.path())
        .unwrap()
        .with_ttt(ttt.clone(), TttStart::Published, &mut random)
        .unwrap();
    for layer in ttt.layers {
        for (which, size) in [(LayerParam::TttConv, 0.5), (LayerParam::TttProj, 0.1)] {
            let id = ParamId::Layer(layer, which);
            let n: usize = id.shape(&model.config).iter().product();
            let noise = (0..n).map(|_| (size * random.normal()) as f32).collect();
            model.weights.params.insert(id, Arc::new(noise));
        }
    }
    model
}

#[test]
fn a_quantised_student_learns_the_same_bits_however_its_text_is_cut() {
    let pool = Pool::new(3, 0);
    let mut random = Random::new(4);
    // 80 tokens are two blocks ahead of the edge and a half at it, of 70 are 6 at it; 32 are one, and 7 a part of one.
    let nothing = Forgetting::Nothing;
    for (chunk, format, forgets) in [
        (80, WeightFormat::Q8, nothing),
        (80, WeightFormat::Q8, Forgetting::Decay(0.8)),
        (80, WeightFormat::Q8, Forgetting::Delta(1.0)),
        (80, WeightFormat::Q4, nothing),
        (32, WeightFormat::Q8, nothing),
        (7, WeightFormat::Q8, nothing),
        (7, WeightFormat::Q8, Forgetting::Delta(1.0)),
        (70, WeightFormat::Q8, Forgetting::Delta(1.0)),
    ] {
        let mut model = learner(chunk, TttTarget::HiddenStates).packed(format);
        model.config.ttt.as_mut().unwrap().forgets = forgets;
        let ids: Vec<u32> = (0..300).map(|_| 3 + random.below(200) as u32).collect();
        let read = |calls: &[usize]| {
            let mut sequence = model.sequence(8, true);
            let (mut out, mut at) = (Vec::new(), 0);
            for len in calls {
                let new = &ids[at..at + len];
                out.extend(model.step(&pool, &mut [(&mut sequence, new)]).unwrap());
                at += len;
            }
            assert_eq!(at, ids.len());
            (out, sequence)
        };
        let (want, whole) = read(&[300]);
        let off = model
            .step(&pool, &mut [(&mut model.sequence(8, false), &ids)])
            .unwrap();
        assert_ne!(off, want, "nothing was learned");
        let first = chunk * model.config.hidden_size;
        assert_eq!(off[..first], want[..first]);
        for calls in [
            vec![1; 300],
            [vec![90], vec![1; 200], vec![10]].concat(),
            vec![33, 31, 100, 1, 1, 70, 64],
        ] {
            let (got, sequence) = read(&calls);
            assert!(
                got == want,
                "chunks of {chunk}, {format:?}, {forgets:?}, calls of {calls:?}"
            );
            for (layer, fast) in &whole.fast.layers {
                let other = &sequence.fast.layers[layer];
                assert!(fast.weight() == other.weight());
                assert_eq!(fast.drift(), other.drift());
            }
        }
    }
}

#[test]
fn a_quantised_student_that_has_learned_is_off_by_the_rounding_of_its_format() {
    let pool = Pool::new(2, 0);
    let ids: Vec<u32> = (0..300).map(|i| 3 + i * 7 % 50 + i % 3).collect();
    let mut plain = learner(32, TttTarget::HiddenStates);
    // A drift of some percent, as the cap allows.
    plain.config.ttt.as_mut().unwrap().lr = 0.001;
    // Logits of the tokens behind the first chunk.
    let logits = |model: &Model, learning: bool| {
        let mut sequence = model.sequence(8, learning);
        let hidden = model.step(&pool, &mut [(&mut sequence, &ids)]).unwrap();
        let rows: Vec<usize> = (32..ids.len()).collect();
        (model.logits(&pool, &hidden, &rows), sequence.fast.drift())
    };
    for (format, most, forgets) in [
        (WeightFormat::Q8, 0.03, Forgetting::Nothing),
        (WeightFormat::Q4, 0.06, Forgetting::Nothing),
        (WeightFormat::Q8, 0.03, Forgetting::Decay(0.9)),
        (WeightFormat::Q8, 0.03, Forgetting::Delta(1.0)),
    ] {
        plain.config.ttt.as_mut().unwrap().forgets = forgets;
        let packed = plain.clone().packed(format);
        let mut exact = packed.unpacked();
        // What is learned is added to the trained numbers, not to their rounding.
        for layer in [0, 1] {
            let id = ParamId::Layer(layer, LayerParam::Down);
            let trained = plain.weights.params[&id].clone();
            exact.weights.params.insert(id, trained);
        }
        let error = |learning: bool| {
            let ((got, _), (want, drift)) = (logits(&packed, learning), logits(&exact, learning));
            assert_eq!(drift > 0.02 && drift < 0.2, learning, "{drift}");
            let off: f32 = got.iter().zip(&want).map(|(a, b)| (a - b).powi(2)).sum();
            let size: f32 = want.iter().map(|x| x * x).sum();
            (off / size).sqrt()
        };
        let (without, with) = (error(false), error(true));
        // Relative RMS of a logit: 8-bit rows alone cost the first, the weight packed anew at each edge and 8-bit outer products the rest.
        assert!(
            with <= most,
            "{format:?}, {forgets:?}: {with}, {without} without learning"
        );
        assert!(
            with <= 2.0 * without,
            "{format:?}, {forgets:?}: {with}, {without} without learning"
        );
    }
}

/// Largest error of a logit: these are of size 1 to 3, at most 16.
const LOGITS: f32 = 1e-4;
const VALUES: f32 = 5e-5;

struct Case {
    name: String,
    model: Model,
    vectors: Tensors,
    grads: Tensors,
}

/// Cases of values made by the authors' code, as `core/src/ttt/tests/reference.rs` reads them.
fn cases() -> Vec<Case> {
    let folder = match std::env::var_os("LOCUM_TTT_CASES") {
        Some(folder) => PathBuf::from(folder),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/reference/ttt"),
    };
    let entries = std::fs::read_dir(&folder).unwrap();
    let mut paths: Vec<PathBuf> = entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("config.json").is_file())
        .collect();
    paths.sort();
    assert!(!paths.is_empty(), "no case in {}", folder.display());
    paths.iter().map(|path| case(path)).collect()
}

fn case(path: &Path) -> Case {
    let dir = tempfile::tempdir().unwrap();
    for (from, to) in [
        ("config.json", "config.json"),
        ("weights.safetensors", "model.safetensors"),
    ] {
        std::fs::copy(path.join(from), dir.path().join(to)).unwrap();
    }
    let mut model = Model::load(dir.path()).unwrap();
    // Their code has no cap.
    model.config.ttt.as_mut().unwrap().max_drift = None;
    Case {
        name: path.file_name().unwrap().to_string_lossy().into_owned(),
        model,
        vectors: tensors(&path.join("vectors.safetensors")),
        grads: tensors(&path.join("grads_len37.safetensors")),
    }
}

impl Case {
    fn ids(&self, name: &str) -> Vec<u32> {
        self.vectors[name].iter().map(|x| *x as u32).collect()
    }

    /// Logits of every token, read in calls of these lengths, and the sequence afterwards.
    fn read(&self, pool: &Pool, ids: &[u32], calls: &[usize]) -> (Vec<f32>, Sequence) {
        let mut sequence = self.model.sequence(8, true);
        let (mut logits, mut at) = (Vec::new(), 0);
        for len in calls {
            let new = &ids[at..at + len];
            let hidden = self.model.step(pool, &mut [(&mut sequence, new)]).unwrap();
            let rows: Vec<usize> = (0..*len).collect();
            logits.extend(self.model.logits(pool, &hidden, &rows));
            at += len;
        }
        assert_eq!(at, ids.len());
        (logits, sequence)
    }

    #[track_caller]
    fn close(&self, what: &str, got: &[f32], want: &[f32], tolerance: f32) {
        assert_eq!(got.len(), want.len(), "{} {what}", self.name);
        for (i, (got, want)) in got.iter().zip(want).enumerate() {
            // Written so that NaN fails.
            let near = (got - want).abs() <= tolerance;
            assert!(near, "{} {what}[{i}]: {got} instead of {want}", self.name);
        }
    }

    fn check_fast(&self, run: &str, sequence: &Sequence) {
        for (layer, fast) in &sequence.fast.layers {
            let name = format!("{run}.layer{layer}.w_after");
            if let Some(want) = self.vectors.get(&name) {
                self.close(&name, fast.weight(), want, VALUES);
            }
        }
    }
}

#[test]
fn ttt_reference_served_in_one_call_token_by_token_and_in_uneven_calls() {
    for case in cases() {
        // With one thread more than there are cores a tile's order changes from run to run.
        for threads in [1, 3] {
            let pool = Pool::new(threads, 0);
            for run in ["len37", "decode"] {
                let name = |what: &str| format!("{run}.{what}");
                let ids = case.ids(&name("input_ids"));
                let want = &case.vectors[&name("logits_infer")];
                let mut splits = vec![vec![ids.len()], vec![1; ids.len()]];
                if run == "decode" {
                    splits.push([vec![40], vec![1; 30]].concat());
                    let uneven = &case.vectors["stream.splits"];
                    splits.push(uneven.iter().map(|n| *n as usize).collect());
                }
                for calls in splits {
                    let (got, sequence) = case.read(&pool, &ids, &calls);
                    case.close(&format!("{run} in calls of {calls:?}"), &got, want, LOGITS);
                    case.check_fast(run, &sequence);
                }
            }
        }
    }
}

#[test]
fn ttt_switched_off_untrained_or_in_its_first_chunk_is_the_plain_model_bit_for_bit() {
    let pool = Pool::new(2, 0);
    for case in cases() {
        for format in [WeightFormat::Bf16, WeightFormat::Q8, WeightFormat::Q4] {
            let model = case.model.clone().packed(format);
            let ids = case.ids("decode.input_ids");
            let read = |mut sequence: Sequence, ids: &[u32]| {
                model.step(&pool, &mut [(&mut sequence, ids)]).unwrap()
            };
            let plain = read(Sequence::new(&model.config, 8), &ids);
            assert_eq!(read(model.sequence(8, false), &ids), plain);
            let learned = read(model.sequence(8, true), &ids);
            let first = model.config.ttt.as_ref().unwrap().chunk_len * model.config.hidden_size;
            assert_eq!(learned[..first], plain[..first], "{} {format:?}", case.name);
            let untrained = case.name.contains("untrained");
            assert_eq!(learned == plain, untrained, "{} {format:?}", case.name);
        }
    }
}

#[test]
fn sequences_that_learn_stay_apart_in_one_batch_and_can_be_cut_back_to_an_edge() {
    let pool = Pool::new(2, 0);
    let case = &cases()[cases().len() - 1];
    let model = case.model.clone().packed(WeightFormat::Bf16);
    let chunk = model.config.ttt.as_ref().unwrap().chunk_len;
    let d = model.config.hidden_size;
    let ids = case.ids("decode.input_ids");
    let other: Vec<u32> = ids.iter().rev().copied().collect();
    let alone = |ids: &[u32], learning: bool| {
        let mut sequence = model.sequence(8, learning);
        model.step(&pool, &mut [(&mut sequence, ids)]).unwrap()
    };
    // One that learns, one that does not, one that learns something else.
    let mut sequences = [true, false, true].map(|learning| model.sequence(8, learning));
    let texts = [&ids[..], &ids[..], &other[..]];
    let mut batch: Vec<(&mut Sequence, &[u32])> = sequences.iter_mut().zip(texts).collect();
    let got = model.step(&pool, &mut batch).unwrap();
    let want = [alone(&ids, true), alone(&ids, false), alone(&other, true)].concat();
    let far = got
        .iter()
        .zip(&want)
        .fold(0f32, |m, (a, b)| m.max((a - b).abs()));
    assert!(far < 1e-5, "{far}");

    // Back into the open chunk: as if the rest had never been read. Back past its edge: refused, and nothing changed.
    let [first, ..] = &mut sequences;
    let edge = ids.len() - ids.len() % chunk;
    assert!(edge > chunk && edge < ids.len());
    assert!(!first.truncate(edge - 1) && first.ids.len() == ids.len());
    assert!(first.prefix(edge - 1, 0).is_none());
    let mut copy = first.prefix(edge, 0).unwrap();
    assert!(first.truncate(edge));
    for sequence in [first, &mut copy] {
        let again = model.step(&pool, &mut [(sequence, &ids[edge..])]).unwrap();
        let want = &want[edge * d..ids.len() * d];
        let far = again
            .iter()
            .zip(want)
            .fold(0f32, |m, (a, b)| m.max((a - b).abs()));
        assert!(far < 1e-5, "{far}");
    }
}

#[test]
fn ttt_reference_trained_forward_and_backward() {
    let pool = Pool::new(2, 0);
    let mut checked = 0;
    for case in cases() {
        let config = case.model.config.ttt.as_ref().unwrap();
        if config.target != TttTarget::HiddenStates {
            // Training from embeddings is refused; see `TrainPlan`.
            continue;
        }
        let model = &case.model;
        let ids = case.ids("len37.input_ids");
        let rows = PackedRows::new(&[ids.len()]);
        let layers = (0, model.config.num_hidden_layers);
        let sizes = ParamId::all(&model.config)
            .into_iter()
            .map(|id| (TrainId::Full(id), id.shape(&model.config).iter().product()));
        let mut grads = Grads::new(sizes);
        // With every block on the tape, and with their inputs alone.
        for inputs_only in [0, layers.1] {
            grads.zero();
            let mut tape = Tape {
                inputs_only,
                ..Tape::default()
            };
            let mut x = model.embed(&ids).unwrap();
            model.blocks(&pool, layers, &rows, None, &mut x, Some(&mut tape));
            let all: Vec<usize> = (0..ids.len()).collect();
            let logits = model.logits(&pool, &x, &all);
            let want = &case.vectors["len37.logits_train"];
            case.close("logits in training", &logits, want, LOGITS);
            // The reference's loss: the mean over the next tokens.
            let n = ids.len() - 1;
            let mut dx = vec![0.0; x.len()];
            let weights = vec![1.0; n];
            let scale = 1.0 / n as f32;
            let asked = (&all[..n], &ids[1..], &weights[..]);
            model.head_loss(&pool, &x, asked, Some((scale, &mut dx, &mut grads)));
            model.blocks_backward(&pool, &rows, None, &mut tape, &mut dx, &mut grads);
            model.embed_backward(&ids, &dx, &mut grads);
            for (name, want) in &case.grads {
                let of = |id: &&TrainId| *name == format!("grad.{}", id.name());
                let Some(id) = grads.map.keys().find(of) else {
                    continue;
                };
                let size = want.iter().fold(0f32, |m, x| m.max(x.abs()));
                case.close(name, &grads.map[id], want, 1e-3 * size);
                checked += 1;
            }
        }
    }
    assert!(checked > 20, "{checked} gradients");
}

#[test]
fn layers_that_learn_are_added_without_changing_the_model_and_survive_a_file() {
    let (dir, again) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write_tiny(dir.path(), 3).unwrap();
    let plain = Model::load(dir.path()).unwrap();
    let pool = Pool::new(2, 0);
    let ids: Vec<u32> = (0..70).map(|i| 3 + i * 7 % 50).collect();
    let read = |model: &Model| {
        let mut sequence = model.sequence(8, true);
        model.step(&pool, &mut [(&mut sequence, &ids)]).unwrap()
    };
    for start in [TttStart::Published, TttStart::NextToken] {
        let ttt = TttConfig {
            layers: vec![1],
            chunk_len: 16,
            ..TttConfig::default()
        };
        let mut random = Random::new(5);
        let model = plain
            .clone()
            .with_ttt(ttt.clone(), start, &mut random)
            .unwrap();
        assert_eq!(read(&model), read(&plain), "{start:?}");
        let twice = model.clone().with_ttt(ttt, start, &mut random);
        assert!(twice.is_err());
        model.save(again.path(), FileDtype::F32).unwrap();
        let loaded = Model::load(again.path()).unwrap();
        assert_eq!(loaded.config.ttt, model.config.ttt);
        assert_eq!(loaded.weights.params, model.weights.params);
    }
}

#[test]
fn what_is_saved_is_what_was_changed_since_it_was_read() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = learner(16, TttTarget::HiddenStates);
    for (lr, forgets) in [
        (0.15, Forgetting::Decay(0.9)),
        (0.075, Forgetting::Delta(1.0)),
        (0.3, Forgetting::Nothing),
    ] {
        let ttt = model.config.ttt.as_mut().unwrap();
        (ttt.lr, ttt.forgets) = (lr, forgets);
        model.save(dir.path(), FileDtype::F32).unwrap();
        model = Model::load(dir.path()).unwrap();
        let read = model.config.ttt.as_ref().unwrap();
        assert_eq!((read.lr, read.forgets), (lr, forgets));
    }
}

#[test]
fn layers_that_are_added_take_nothing_over_from_a_config_that_had_none() {
    let dir = tempfile::tempdir().unwrap();
    write_tiny(dir.path(), 3).unwrap();
    let file = dir.path().join("config.json");
    let mut raw: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    raw["ttt_layers"] = serde_json::json!([]);
    raw["ttt_decay"] = serde_json::json!(0.5);
    std::fs::write(&file, raw.to_string()).unwrap();
    for forgets in [Forgetting::Nothing, Forgetting::Delta(1.0)] {
        let ttt = TttConfig {
            layers: vec![0],
            forgets,
            ..TttConfig::default()
        };
        let model = Model::load(dir.path()).unwrap();
        let model = model.with_ttt(ttt, TttStart::Published, &mut Random::new(5));
        assert_eq!(model.unwrap().config.ttt.unwrap().forgets, forgets);
    }
}

/// A decoder written out: one token at a time, keys and values in lists that nothing leaves, a loop for every sum.
mod slow {
    use super::*;
    use crate::model::LayerParam::*;

    fn norm(x: &[f32], w: &[f32], eps: f64) -> Vec<f32> {
        let square: f64 = x.iter().map(|x| f64::from(*x).powi(2)).sum();
        let scale = 1.0 / (square / x.len() as f64 + eps).sqrt();
        x.iter()
            .zip(w)
            .map(|(x, w)| (f64::from(*x) * scale) as f32 * w)
            .collect()
    }

    fn product(w: &[f32], x: &[f32]) -> Vec<f32> {
        let rows = w.chunks(x.len());
        rows.map(|row| row.iter().zip(x).map(|(a, b)| a * b).sum())
            .collect()
    }

    fn turn(x: &mut [f32], e: usize, position: usize, inv: &[f32]) {
        for head in x.chunks_mut(e) {
            for i in 0..e / 2 {
                let (sin, cos) = (position as f32 * inv[i]).sin_cos();
                let (a, b) = (head[i], head[i + e / 2]);
                (head[i], head[i + e / 2]) = (a * cos - b * sin, b * cos + a * sin);
            }
        }
    }

    /// Hidden states (t, d); the tokens `from..to` of a piece see keys from `first` on, and the first `sink`.
    pub fn read(
        model: &Model,
        ids: &[u32],
        pieces: &[(usize, usize, usize)],
        sink: usize,
    ) -> Vec<f32> {
        let c = &model.config;
        let (e, heads, groups) = (c.head_dim, c.num_attention_heads, c.num_key_value_heads);
        let inv: Vec<f32> = c.inv_freq().iter().map(|f| *f as f32).collect();
        let p = |layer: usize, which| model.param(ParamId::Layer(layer as u16, which));
        let mut keys = vec![Vec::<Vec<f32>>::new(); c.num_hidden_layers];
        let mut values = keys.clone();
        let mut out = Vec::new();
        for &(from, to, first) in pieces {
            for position in from..to {
                let mut x = model.embed(&ids[position..position + 1]).unwrap();
                for layer in 0..c.num_hidden_layers {
                    let normed = norm(&x, p(layer, InputNorm), c.rms_norm_eps.into());
                    let mut q = product(p(layer, Q), &normed);
                    let mut k = product(p(layer, K), &normed);
                    turn(&mut q, e, position, &inv);
                    turn(&mut k, e, position, &inv);
                    keys[layer].push(k);
                    values[layer].push(product(p(layer, V), &normed));
                    let mut mixed = vec![0.0; heads * e];
                    for head in 0..heads {
                        let g = head / (heads / groups);
                        let part = |row: &[f32]| row[g * e..(g + 1) * e].to_vec();
                        let q = &q[head * e..(head + 1) * e];
                        let score = |k: &Vec<f32>| {
                            let dot: f32 = part(k).iter().zip(q).map(|(a, b)| a * b).sum();
                            (dot / (e as f32).sqrt()).exp()
                        };
                        let seen: Vec<usize> = (0..sink.min(first))
                            .chain(first..keys[layer].len())
                            .collect();
                        let scores: Vec<f32> =
                            seen.iter().map(|at| score(&keys[layer][*at])).collect();
                        let total: f32 = scores.iter().sum();
                        for (score, v) in
                            scores.iter().zip(seen.iter().map(|at| &values[layer][*at]))
                        {
                            for (to, v) in mixed[head * e..].iter_mut().zip(part(v)) {
                                *to += score / total * v;
                            }
                        }
                    }
                    for (x, o) in x.iter_mut().zip(product(p(layer, O), &mixed)) {
                        *x += o;
                    }
                    let normed = norm(&x, p(layer, PostNorm), c.rms_norm_eps.into());
                    let gate = product(p(layer, Gate), &normed);
                    let up = product(p(layer, Up), &normed);
                    let z: Vec<f32> = (gate.iter().zip(&up))
                        .map(|(g, u)| g / (1.0 + (-g).exp()) * u)
                        .collect();
                    for (x, down) in x.iter_mut().zip(product(p(layer, Down), &z)) {
                        *x += down;
                    }
                }
                out.extend(x);
            }
        }
        out
    }
}

#[test]
fn what_was_forgotten_is_as_if_masked_out_and_positions_stay() {
    let dir = tempfile::tempdir().unwrap();
    write_tiny(dir.path(), 3).unwrap();
    let model = Model::load(dir.path()).unwrap();
    let pool = Pool::new(2, 0);
    let ids: Vec<u32> = (0..200).map(|i| 3 + (i * i * 7 + i) % 90).collect();
    let cases: [(usize, usize, usize); 6] = [
        (32, 48, 0),
        (50, 33, 0),
        (7, 20, 0),
        (200, 16, 0),
        (32, 48, 16),
        (7, 20, 20),
    ];
    for (piece, window, keep) in cases {
        let pieces = (0..ids.len()).step_by(piece).map(|from| {
            let first = from.saturating_sub(window).next_multiple_of(16).min(from);
            (from, ids.len().min(from + piece), first / 16 * 16)
        });
        let sink = keep.next_multiple_of(16);
        let want = slow::read(&model, &ids, &pieces.collect::<Vec<_>>(), sink);
        let mut sequence = Sequence::new(&model.config, 4);
        let mut got = Vec::new();
        for new in ids.chunks(piece) {
            got.extend(model.step(&pool, &mut [(&mut sequence, new)]).unwrap());
            let read = sequence.ids.len();
            let first = read.saturating_sub(window).next_multiple_of(16).min(read);
            // Down to whole blocks, which only the last piece may end beside.
            let kept_from = sequence.forget(first, keep);
            assert_eq!(kept_from, first / 16 * 16);
            let gone = sequence.kv.len() - sequence.kv.held();
            assert_eq!(gone, kept_from.saturating_sub(sink));
        }
        let far = got
            .iter()
            .zip(&want)
            .fold(0f32, |m, (a, b)| m.max((a - b).abs()));
        assert!(far < 1e-4, "pieces of {piece}, a window of {window}: {far}");
        let whole = alone(&model, &pool, &ids, &[ids.len()]);
        let same = got == whole;
        assert_eq!(
            same,
            piece == 200,
            "a window of {window} changes what is read"
        );
        // What is gone cannot be gone back to.
        let gone = sequence.kv.len() - sequence.kv.held();
        let first = if gone > 0 { gone + sink } else { 0 };
        if first > 0 {
            assert!(!sequence.truncate(first - 1) && sequence.prefix(first - 1, 0).is_none());
        }
        let copy = sequence.prefix(196, 0).unwrap();
        assert!(sequence.truncate(196));
        for mut sequence in [sequence, copy] {
            assert_eq!((sequence.kv.len(), sequence.ids.len()), (196, 196));
            let one = model
                .step(&pool, &mut [(&mut sequence, &ids[196..])])
                .unwrap();
            let d = model.config.hidden_size;
            assert_eq!(one.len(), 4 * d);
            assert!(one.iter().all(|x| x.is_finite()));
        }
    }
}

#[test]
fn a_text_to_learn_from_may_not_begin_with_padding() {
    let dir = tempfile::tempdir().unwrap();
    let ttt = TttConfig {
        layers: vec![1],
        ..TttConfig::default()
    };
    super::write_tiny_learner(dir.path(), 3, &ttt).unwrap();
    let mut model = Model::load(dir.path()).unwrap();
    let pool = Pool::new(1, 0);
    model.config.raw["pad_token_id"] = 2.into();
    let read = |model: &Model, learning: bool, ids: &[u32]| {
        let mut sequence = model.sequence(8, learning);
        model
            .step(&pool, &mut [(&mut sequence, ids)])
            .map(|_| sequence.ids.len())
    };
    let padded = read(&model, true, &[2, 2, 9]);
    assert!(matches!(
        padded,
        Err(super::ModelError::Padded { token: 2 })
    ));
    assert_eq!(
        read(&model, true, &[9, 2]).unwrap(),
        2,
        "behind the text it is harmless"
    );
    assert_eq!(read(&model, false, &[2, 9]).unwrap(), 2, "nothing learns");
    // Where texts begin with the same token, it says nothing.
    model.config.raw["bos_token_id"] = 2.into();
    assert_eq!(read(&model, true, &[2, 9]).unwrap(), 2);
}
