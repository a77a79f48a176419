//! Values made by `make_model.py`: transformers' Llama and Qwen3, PyTorch's gradients and AdamW, PEFT's LoRA.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use locum_core::kernels::Pool;
use locum_core::model::{
    AdapterConfig, Compute, Grads, LayerParam, Lora, Model, PackedRows, ParamId, Sequence, Tape,
    TrainId, LINEARS,
};
use locum_core::train::{self, Flow, Method, TrainPlan};
use safetensors::{Dtype, SafeTensors};

const CASES: [&str; 2] = ["llama", "qwen3"];

fn folder(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/reference")
        .join(case)
}

/// Tensors by name; integers come as f32 too.
fn values(case: &str) -> BTreeMap<String, Vec<f32>> {
    let bytes = std::fs::read(folder(case).join("values.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    file.tensors()
        .into_iter()
        .map(|(name, view)| {
            let data = match view.dtype() {
                Dtype::F32 => view
                    .data()
                    .chunks_exact(4)
                    .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
                    .collect(),
                Dtype::I64 => view
                    .data()
                    .chunks_exact(8)
                    .map(|b| i64::from_le_bytes(b.try_into().unwrap()) as f32)
                    .collect(),
                other => panic!("{name}: {other:?}"),
            };
            (name, data)
        })
        .collect()
}

fn ids(values: &BTreeMap<String, Vec<f32>>, name: &str) -> Vec<u32> {
    values[name].iter().map(|x| *x as u32).collect()
}

#[track_caller]
fn close(what: &str, got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len(), "{what}");
    let size = want.iter().fold(1e-3f32, |m, x| m.max(x.abs()));
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!(
            (g - w).abs() <= tolerance * size,
            "{what}[{i}]: {g} instead of {w}, largest {size}"
        );
    }
}

fn hidden(
    pool: &Pool,
    model: &Model,
    ids: &[u32],
    lora: Option<&Lora>,
    tape: Option<&mut Tape>,
) -> Vec<f32> {
    let mut x = model.embed(ids).unwrap();
    let layers = model.config.num_hidden_layers;
    model.blocks(
        pool,
        (0, layers),
        &PackedRows::new(&[ids.len()]),
        lora,
        &mut x,
        tape,
    );
    x
}

#[test]
fn logits_equal_transformers_for_llama_and_qwen3() {
    let pool = Pool::new(2, 0);
    for case in CASES {
        let (model, values) = (Model::load(&folder(case)).unwrap(), values(case));
        let ids = ids(&values, "ids");
        let x = hidden(&pool, &model, &ids, None, None);
        let logits = model.logits(&pool, &x, &(0..ids.len()).collect::<Vec<_>>());
        close(case, &logits, &values["logits"], 2e-5);
    }
}

#[test]
fn a_cache_fed_in_uneven_calls_beside_another_sequence_gives_the_logits_of_one_call() {
    let pool = Pool::new(2, 0);
    for case in CASES {
        let (model, values) = (Model::load(&folder(case)).unwrap(), values(case));
        let ids = ids(&values, "ids");
        let v = model.config.vocab_size;
        let (mut one, mut other) = (
            Sequence::new(&model.config, 4),
            Sequence::new(&model.config, 64),
        );
        let noise: Vec<u32> = (0..41).map(|i| (i * 5 + 1) % 96).collect();
        let (mut at, mut noise_at) = (0, 0);
        for (len, noise_len) in [(3, 7), (1, 1), (20, 0), (1, 20), (1, 1), (15, 1)] {
            let mut batch = vec![(&mut one, &ids[at..at + len])];
            if noise_len > 0 {
                batch.insert(0, (&mut other, &noise[noise_at..noise_at + noise_len]));
            }
            let x = model.step(&pool, &mut batch).unwrap();
            let rows: Vec<usize> = (noise_len..noise_len + len).collect();
            close(
                case,
                &model.logits(&pool, &x, &rows),
                &values["logits"][at * v..(at + len) * v],
                3e-5,
            );
            (at, noise_at) = (at + len, noise_at + noise_len);
        }
        // Cut back and read again: what was forgotten leaves no trace.
        assert!(one.truncate(10));
        let x = model.step(&pool, &mut [(&mut one, &ids[10..])]).unwrap();
        let rows: Vec<usize> = (0..31).collect();
        close(
            case,
            &model.logits(&pool, &x, &rows),
            &values["logits"][10 * v..],
            3e-5,
        );
    }
}

#[test]
fn greedy_text_equals_transformers() {
    let pool = Pool::new(1, 0);
    for case in CASES {
        let (model, values) = (Model::load(&folder(case)).unwrap(), values(case));
        let want = ids(&values, "greedy");
        let mut got = want[..9].to_vec();
        let mut sequence = Sequence::new(&model.config, 64);
        let mut new = got.clone();
        while got.len() < want.len() {
            let x = model.step(&pool, &mut [(&mut sequence, &new)]).unwrap();
            let logits = model.logits(&pool, &x, &[new.len() - 1]);
            let best = (0..logits.len())
                .max_by(|a, b| logits[*a].total_cmp(&logits[*b]))
                .unwrap() as u32;
            got.push(best);
            new = vec![best];
        }
        assert_eq!(got, want, "{case}");
    }
}

/// Loss on ids[30..] and its gradients, packed beside another sequence without loss, which must change nothing, also where the two
/// begin with the same `shared` tokens.
fn loss_and_gradients(
    model: &Model,
    lora: Option<&Lora>,
    ids: &[u32],
    trainable: Vec<(TrainId, usize)>,
    shared: usize,
) -> (f64, Grads) {
    let pool = Pool::new(2, 0);
    let mut noise: Vec<u32> = (0..13).map(|i| (i * 11 + 2) % 96).collect();
    noise.splice(..0, ids[..shared].iter().copied());
    let sequences = [&noise[..], ids];
    let rows = model.packed_rows(&sequences, true);
    assert_eq!(rows.shared(), shared);
    let packed = rows.ids(&sequences);
    let mut x = model.embed(&packed).unwrap();
    let mut tape = Tape::default();
    model.blocks(
        &pool,
        (0, model.config.num_hidden_layers),
        &rows,
        lora,
        &mut x,
        Some(&mut tape),
    );
    let n = ids.len() - 30;
    let at: Vec<usize> = rows.rows_of(1).skip(29).take(n).collect();
    let mut grads = Grads::new(trainable);
    let mut dx = vec![0.0; x.len()];
    let weights = vec![1.0; n];
    let loss = model.head_loss(
        &pool,
        &x,
        (&at, &ids[30..], &weights),
        Some((1.0 / n as f32, &mut dx, &mut grads)),
    );
    model.blocks_backward(&pool, &rows, lora, &mut tape, &mut dx, &mut grads);
    model.embed_backward(&packed, &dx, &mut grads);
    (loss.loss / loss.weight, grads)
}

#[test]
fn every_gradient_of_full_fine_tuning_equals_pytorch() {
    for case in CASES {
        let (model, values) = (Model::load(&folder(case)).unwrap(), values(case));
        let ids = ids(&values, "ids");
        let plan = TrainPlan {
            method: Method::Full,
            ..TrainPlan::default()
        };
        for shared in [0, 20, 35] {
            let trainable = plan.trainable(&model.config);
            let (loss, grads) = loss_and_gradients(&model, None, &ids, trainable, shared);
            assert!(
                (loss as f32 - values["loss"][0]).abs() < 1e-5,
                "{case}: {loss}"
            );
            assert_eq!(grads.map.len(), ParamId::all(&model.config).len());
            for (id, grad) in &grads.map {
                close(
                    &id.name(),
                    grad,
                    &values[&format!("grad.{}", id.name())],
                    2e-4,
                );
            }
        }
    }
}

/// SmolLM2's matrices are large enough for the bf16 kernels, the reference models' are not.
#[test]
fn gradients_computed_in_bf16_point_where_those_in_f32_do() {
    let Ok(path) = std::env::var("LOCUM_TEST_GGUF") else {
        println!("skipped: LOCUM_TEST_GGUF does not name SmolLM2's GGUF file");
        return;
    };
    let gguf = locum_core::model::read_gguf(Path::new(&path)).unwrap();
    let mut model = Model::new(gguf.config, gguf.weights).unwrap();
    let ids: Vec<u32> = (0..96).map(|i| (i * 7919 + 101) % 40_000).collect();
    let plan = TrainPlan {
        method: Method::Upper { layers: 3 },
        ..TrainPlan::default()
    };
    let trainable = plan.trainable(&model.config);
    let (exact_loss, exact) = loss_and_gradients(&model, None, &ids, trainable.clone(), 0);
    model.compute = Compute::Bf16;
    let (loss, grads) = loss_and_gradients(&model, None, &ids, trainable, 0);
    assert!(
        (loss / exact_loss - 1.0).abs() < 0.01,
        "{loss} {exact_loss}"
    );
    for (id, grad) in &grads.map {
        let dot = |a: &[f32], b: &[f32]| -> f64 {
            a.iter()
                .zip(b)
                .map(|(x, y)| f64::from(*x) * f64::from(*y))
                .sum()
        };
        let want = &exact.map[id];
        let cosine = dot(grad, want) / (dot(grad, grad) * dot(want, want)).sqrt();
        assert!(cosine > 0.98, "{}: {cosine}", id.name());
    }
}

#[test]
fn an_adapter_equals_peft_in_logits_and_gradients_and_merged_too() {
    let pool = Pool::new(2, 0);
    for case in CASES {
        let (model, values) = (Model::load(&folder(case)).unwrap(), values(case));
        let ids = ids(&values, "ids");
        let config = AdapterConfig {
            rank: 4,
            alpha: 8.0,
            seed: 1,
        };
        let mut lora = Lora::new(&model.config, config, &LINEARS);
        for ((layer, p), (a, b)) in lora.pairs.iter_mut() {
            *a = values[&format!("lora.{}", TrainId::LoraA(*layer, *p).name())].clone();
            *b = values[&format!("lora.{}", TrainId::LoraB(*layer, *p).name())].clone();
        }
        let rows: Vec<usize> = (0..ids.len()).collect();
        let x = hidden(&pool, &model, &ids, Some(&lora), None);
        close(
            case,
            &model.logits(&pool, &x, &rows),
            &values["lora_logits"],
            5e-5,
        );
        let merged = lora.merge(&pool, &model);
        let x = hidden(&pool, &merged, &ids, None, None);
        close(
            case,
            &merged.logits(&pool, &x, &rows),
            &values["lora_logits"],
            5e-5,
        );
        let plan = TrainPlan {
            method: Method::Lora {
                rank: 4,
                alpha: 8.0,
            },
            ..TrainPlan::default()
        };
        for shared in [0, 20] {
            let trainable = plan.trainable(&model.config);
            let (loss, grads) = loss_and_gradients(&model, Some(&lora), &ids, trainable, shared);
            assert!(
                (loss as f32 - values["lora_loss"][0]).abs() < 2e-5,
                "{case}: {loss}"
            );
            assert_eq!(grads.map.len(), 3 * 7 * 2);
            for (id, grad) in &grads.map {
                close(
                    &id.name(),
                    grad,
                    &values[&format!("grad.{}", id.name())],
                    5e-4,
                );
            }
        }
    }
}

fn one_sample(ids: &[u32]) -> Vec<train::Sample> {
    vec![train::Sample {
        ids: ids.to_vec(),
        target_start: 30,
        weight: 1.0,
        ..train::Sample::default()
    }]
}

#[test]
fn ten_steps_of_training_follow_pytorchs_loss_curve() {
    let pool = Pool::new(2, 0);
    for case in CASES {
        let (model, values) = (Model::load(&folder(case)).unwrap(), values(case));
        let ids = ids(&values, "ids");
        // PyTorch's run has no schedule; ten of so many tokens leave the cosine at its top.
        let plan = TrainPlan {
            method: Method::Full,
            lr: 1e-3,
            tokens: 41_000_000,
            warmup_steps: 0,
            evaluations: 0,
            ..TrainPlan::default()
        };
        let mut losses = Vec::new();
        let result = train::fit(
            &pool,
            model.clone(),
            &one_sample(&ids),
            &[],
            "x",
            &plan,
            None,
            &mut |p| {
                losses.push(p.loss as f32);
                if losses.len() == 10 {
                    Flow::Stop
                } else {
                    Flow::Go
                }
            },
        );
        assert!(matches!(result, Err(train::TrainError::Cancelled)));
        close(case, &losses, &values["full_curve"], 1e-4);
    }
}

/// Losses of the first steps of a full training.
fn first_losses(model: &Model, samples: &[train::Sample], batch_tokens: usize) -> Vec<f64> {
    let plan = TrainPlan {
        method: Method::Full,
        lr: 1e-3,
        tokens: 41_000_000,
        batch_tokens,
        warmup_steps: 0,
        evaluations: 0,
        ..TrainPlan::default()
    };
    let mut losses = Vec::new();
    let pool = Pool::new(2, 0);
    let stopped = train::fit(
        &pool,
        model.clone(),
        samples,
        &[],
        "x",
        &plan,
        None,
        &mut |p| {
            losses.push(p.loss);
            if losses.len() == 4 {
                Flow::Stop
            } else {
                Flow::Go
            }
        },
    );
    assert!(matches!(stopped, Err(train::TrainError::Cancelled)));
    losses
}

#[test]
fn a_row_of_several_targets_trains_like_a_row_for_each() {
    let (model, values) = (Model::load(&folder("llama")).unwrap(), values("llama"));
    let ids = ids(&values, "ids");
    let spans = [6..9, 14..15, 22..30];
    let apart: Vec<train::Sample> = spans
        .iter()
        .map(|span| train::Sample {
            ids: ids[..span.end].to_vec(),
            target_start: span.start,
            weight: 1.0,
            ..train::Sample::default()
        })
        .collect();
    let row = train::Sample {
        ids: ids[..30].to_vec(),
        earlier: spans[..2].to_vec(),
        target_start: 22,
        weight: 1.0,
    };
    let one_by_one = first_losses(&model, &apart, 1000);
    let together = first_losses(&model, std::slice::from_ref(&row), 1000);
    for (a, b) in one_by_one.iter().zip(&together) {
        assert!((a - b).abs() < 1e-4, "{one_by_one:?} {together:?}");
    }
    let pool = Pool::new(2, 0);
    let (loss, exact) = train::evaluate_loss(&pool, &model, &apart).unwrap();
    let (row_loss, row_exact) = train::evaluate_loss(&pool, &model, &[row]).unwrap();
    assert!((loss - row_loss).abs() < 1e-5);
    assert_eq!(exact, row_exact);
}

#[test]
fn a_training_that_was_stopped_and_resumed_ends_with_the_weights_of_an_unbroken_one() {
    let pool = Pool::new(2, 0);
    let (model, values) = (Model::load(&folder("llama")).unwrap(), values("llama"));
    let ids = ids(&values, "ids");
    let samples: Vec<train::Sample> = (0..12)
        .map(|i| train::Sample {
            ids: ids[i..i + 12 + i % 5].to_vec(),
            target_start: 8,
            weight: 1.0,
            ..train::Sample::default()
        })
        .collect();
    for method in [
        Method::Full,
        Method::Upper { layers: 2 },
        Method::Lora {
            rank: 2,
            alpha: 4.0,
        },
    ] {
        let plan = TrainPlan {
            method,
            lr: 1e-2,
            tokens: 1500,
            batch_tokens: 40,
            evaluations: 3,
            trim_after: 0.5,
            trim_below: 0.01,
            checkpoint_seconds: 0.0,
            ..TrainPlan::default()
        };
        let run = |dir: Option<&Path>, stop_at: u64| {
            train::fit(
                &pool,
                model.clone(),
                &samples[..10],
                &samples[10..],
                "hash",
                &plan,
                dir,
                &mut |p| {
                    if p.step == stop_at {
                        Flow::Stop
                    } else {
                        Flow::Go
                    }
                },
            )
        };
        let whole = run(None, u64::MAX).unwrap();
        let dir = tempfile::tempdir().unwrap();
        for stop_at in [3, 17, 18] {
            assert!(run(Some(dir.path()), stop_at).is_err());
        }
        let resumed = run(Some(dir.path()), u64::MAX).unwrap();
        assert_eq!(whole.steps, resumed.steps);
        assert_eq!(whole.curve, resumed.curve, "{method:?}");
        for (id, param) in &whole.model.weights.params {
            assert!(
                **param == *resumed.model.weights.params[id],
                "{method:?}: {}",
                id.name()
            );
        }
    }
}

#[test]
fn a_training_that_was_killed_goes_back_to_the_best_weights_it_had_seen_before() {
    let pool = Pool::new(2, 0);
    let (model, values) = (Model::load(&folder("llama")).unwrap(), values("llama"));
    let ids = ids(&values, "ids");
    let samples: Vec<train::Sample> = (0..12)
        .map(|i| train::Sample {
            ids: ids[i..i + 12 + i % 5].to_vec(),
            target_start: 8,
            weight: 1.0,
            ..train::Sample::default()
        })
        .collect();
    for method in [
        Method::Full,
        Method::Lora {
            rank: 2,
            alpha: 4.0,
        },
    ] {
        let plan = TrainPlan {
            method,
            lr: 1e-2,
            tokens: 6000,
            batch_tokens: 40,
            evaluations: 60,
            patience: 8,
            checkpoint_seconds: 0.0,
            ..TrainPlan::default()
        };
        let run = |dir: Option<&Path>, stop_at: u64| {
            train::fit(
                &pool,
                model.clone(),
                &samples[..4],
                &samples[9..],
                "hash",
                &plan,
                dir,
                &mut |p| {
                    if p.step == stop_at {
                        Flow::Stop
                    } else {
                        Flow::Go
                    }
                },
            )
        };
        let whole = run(None, u64::MAX).unwrap();
        assert_eq!(
            whole.stopped,
            train::StopReason::EarlyStop,
            "{:?}",
            whole.curve
        );
        let seen: Vec<_> = whole.curve.iter().filter_map(|p| p.held_out_loss).collect();
        let best = seen.iter().copied().fold(f64::INFINITY, f64::min);
        let before_last = seen[seen.len() - 2];
        assert!(before_last > best, "the best evaluation is the last one");
        assert_eq!(seen[seen.len() - 1], best, "the best weights came back");
        let dir = tempfile::tempdir().unwrap();
        // The last kill comes after the best evaluation, so that its weights are nowhere but on the disk.
        for stop_at in [2, whole.steps / 2, whole.steps - 1] {
            assert!(run(Some(dir.path()), stop_at).is_err());
        }
        let kept: Vec<_> = std::fs::read_dir(dir.path()).unwrap().flatten().collect();
        assert_eq!(
            kept.len(),
            2,
            "one state and one set of best weights: {kept:?}"
        );
        let resumed = run(Some(dir.path()), u64::MAX).unwrap();
        assert_eq!(resumed.stopped, whole.stopped);
        assert_eq!(whole.curve, resumed.curve, "{method:?}");
        for (id, param) in &whole.model.weights.params {
            assert!(
                **param == *resumed.model.weights.params[id],
                "{method:?}: {}",
                id.name()
            );
        }
        train::forget(dir.path());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}

#[test]
fn upper_layers_training_moves_what_it_names_and_nothing_else_and_learns() {
    let pool = Pool::new(2, 0);
    let (model, values) = (Model::load(&folder("llama")).unwrap(), values("llama"));
    let ids = ids(&values, "ids");
    let plan = TrainPlan {
        method: Method::Upper { layers: 2 },
        lr: 1e-2,
        tokens: 3000,
        evaluations: 0,
        ..TrainPlan::default()
    };
    let trained = train::fit(
        &pool,
        model.clone(),
        &one_sample(&ids),
        &[],
        "h",
        &plan,
        None,
        &mut |_| Flow::Go,
    )
    .unwrap();
    assert!(
        trained.curve.last().unwrap().loss < 0.5 * values["loss"][0] as f64,
        "{:?}",
        trained.curve
    );
    let moving: Vec<TrainId> = plan
        .trainable(&model.config)
        .into_iter()
        .map(|t| t.0)
        .collect();
    for (id, param) in &trained.model.weights.params {
        let moved = **param != *model.weights.params[id];
        assert_eq!(moved, moving.contains(&TrainId::Full(*id)), "{}", id.name());
    }
    assert!(!moving.contains(&TrainId::Full(ParamId::Layer(0, LayerParam::Q))));
}
