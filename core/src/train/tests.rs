//! What the samples of a step begin with, computed once, against each sample computed whole.

use std::path::Path;

use super::fit::{step_gradients, LowerCache, StepOutcome, Trainee};
use super::plan::TttPlan;
use super::*;
use crate::kernels::{Pool, Random};
use crate::model::{write_tiny, AdapterConfig, Compute, Grads, Lora, Model, Tape, LINEARS};
use crate::ttt::{TttConfig, TttStart};

const METHODS: [Method; 3] = [
    Method::Full,
    Method::Upper { layers: 2 },
    Method::Lora {
        rank: 2,
        alpha: 4.0,
    },
];

/// The models that PyTorch's values are for: three layers.
fn model(name: &str) -> Model {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/reference");
    Model::load(&folder.join(name)).unwrap()
}

/// `common` tokens of family `family`, then `own` of nobody else's; loss on the last `targets`.
fn sample(family: u32, common: usize, own: usize, targets: usize) -> Sample {
    let seed = 31 * family as usize + 7 * common + own;
    let ids: Vec<u32> = (0..common)
        .map(|i| (i as u32 * (5 + 2 * family) + family) % 96)
        .chain((0..own).map(|i| ((seed + i * 11) % 89) as u32))
        .collect();
    Sample {
        target_start: ids.len() - targets,
        ids,
        earlier: Vec::new(),
        weight: 1.0 + 0.5 * own as f32 / 10.0,
    }
}

/// A step's samples by what they share, and the tokens that need no row of their own.
fn cases() -> Vec<(&'static str, Vec<Sample>, u64)> {
    let whole = sample(1, 40, 8, 5);
    let mut longer = whole.clone();
    longer.ids.extend([3, 1, 4]);
    let mut all_but_one = whole.clone();
    *all_but_one.ids.last_mut().unwrap() += 1;
    vec![
        ("one sample", vec![whole.clone()], 0),
        ("nothing", vec![sample(1, 40, 8, 5), sample(2, 30, 9, 4)], 0),
        ("two", vec![sample(1, 40, 8, 5), sample(1, 40, 12, 3)], 40),
        (
            "three, with loss on what they share",
            vec![
                sample(1, 70, 8, 30),
                sample(1, 70, 12, 20),
                sample(1, 70, 3, 9),
            ],
            140,
        ),
        (
            "families, one within another",
            vec![
                sample(2, 33, 4, 2),
                sample(1, 20, 6, 4),
                sample(2, 33, 9, 8),
                sample(1, 64, 5, 3),
                sample(3, 21, 2, 1),
                sample(1, 64, 7, 5),
            ],
            33 + 20 + 64,
        ),
        (
            "all but the last token",
            vec![whole.clone(), all_but_one],
            47,
        ),
        ("one of them whole", vec![whole.clone(), longer], 48),
        (
            "everything",
            vec![whole.clone(), whole.clone(), whole.clone()],
            96,
        ),
    ]
}

struct Step {
    outcome: StepOutcome,
    grads: Grads,
}

/// Loss and gradients of a step, its blocks on the tape or computed again.
fn step(
    model: &Model,
    method: Method,
    samples: &[Sample],
    share: bool,
    inputs_only: usize,
    trim: Option<f64>,
) -> Step {
    let pool = Pool::new(2, 0);
    let plan = TrainPlan {
        method,
        ..TrainPlan::default()
    };
    let lora = match method {
        Method::Lora { rank, alpha } => {
            let config = AdapterConfig {
                rank,
                alpha,
                seed: 5,
            };
            let mut lora = Lora::new(&model.config, config, &LINEARS);
            let mut random = Random::new(6);
            // With a B of zeros, A would have no gradient.
            for (_, b) in lora.pairs.values_mut() {
                b.fill_with(|| 0.2 * random.normal() as f32);
            }
            Some(lora)
        }
        _ => None,
    };
    let trainee = Trainee {
        model: model.clone(),
        lora,
        share,
    };
    let first = plan.first_block(&model.config);
    let mut lower = LowerCache::new(first, samples.len(), 1 << 20);
    let mut tape = Tape::default();
    tape.inputs_only = inputs_only;
    let mut grads = Grads::new(plan.trainable(&model.config));
    let batch: Vec<usize> = (0..samples.len()).collect();
    let mut outcome = None;
    // The second time finds the frozen blocks' outputs, of all samples or of some.
    for batch in [&batch[..batch.len() / 2], &batch[..]] {
        grads.zero();
        outcome = Some(
            step_gradients(
                &pool, &trainee, samples, batch, first, &mut lower, trim, &mut tape, &mut grads,
            )
            .unwrap(),
        );
    }
    Step {
        outcome: outcome.unwrap(),
        grads,
    }
}

#[track_caller]
fn assert_same(what: &str, got: &Step, want: &Step) {
    let (a, b) = (&got.outcome, &want.outcome);
    assert!(
        (a.loss / b.loss - 1.0).abs() < 1e-6,
        "{what}: {} {}",
        a.loss,
        b.loss
    );
    assert_eq!(
        (a.weight, a.tokens, a.trimmed),
        (b.weight, b.tokens, b.trimmed),
        "{what}"
    );
    assert_eq!(b.shared, 0, "{what}");
    for (id, want) in &want.grads.map {
        let size = want.iter().fold(0f32, |m, x| m.max(x.abs()));
        assert!(size > 0.0, "{what}: {} has no gradient", id.name());
        for (i, (got, want)) in got.grads.map[id].iter().zip(want).enumerate() {
            let near = (got - want).abs() <= 2e-5 * size;
            assert!(
                near,
                "{what}: {}[{i}]: {got}, not {want}, of {size}",
                id.name()
            );
        }
    }
}

#[test]
fn a_step_that_computes_shared_beginnings_once_has_the_loss_and_gradients_of_one_that_does_not() {
    for name in ["llama", "qwen3"] {
        let model = model(name);
        for method in METHODS {
            for (case, samples, shared) in cases() {
                let whole = step(&model, method, &samples, false, 0, None);
                for inputs_only in [0, 3] {
                    let what = format!("{name} {method:?} {case} {inputs_only}");
                    let once = step(&model, method, &samples, true, inputs_only, None);
                    assert_eq!(once.outcome.shared, shared, "{what}");
                    assert_same(&what, &once, &whole);
                }
            }
        }
    }
}

#[test]
fn trimming_leaves_out_the_same_samples_of_a_family() {
    let model = model("llama");
    let mut some = 0;
    for (case, samples, _) in cases() {
        for below in [1e-2, 1e-3, 1e-4, 1e-5] {
            let whole = step(&model, Method::Full, &samples, false, 0, Some(below));
            let once = step(&model, Method::Full, &samples, true, 0, Some(below));
            let trimmed = whole.outcome.trimmed as usize;
            match trimmed == samples.len() {
                true => assert_eq!(
                    (once.outcome.weight, once.outcome.trimmed),
                    (0.0, whole.outcome.trimmed)
                ),
                false => assert_same(case, &once, &whole),
            }
            some += usize::from(trimmed > 0 && trimmed < samples.len());
        }
    }
    assert!(some > 0, "no case left some out and kept others");
}

#[test]
fn a_training_makes_the_same_steps_with_and_without_and_says_what_it_saved() {
    let pool = Pool::new(2, 0);
    let model = model("llama");
    let samples: Vec<Sample> = (0..12)
        .map(|i| sample(i % 2, 32, 5 + i as usize, 4))
        .collect();
    for method in METHODS {
        let run = |share_beginnings: bool| {
            let plan = TrainPlan {
                method,
                tokens: 3000,
                batch_tokens: 160,
                lr: 1e-3,
                evaluations: 4,
                share_beginnings,
                ..TrainPlan::default()
            };
            let (train, held_out) = samples.split_at(9);
            fit(
                &pool,
                model.clone(),
                train,
                held_out,
                "x",
                &plan,
                None,
                &mut |_| Flow::Go,
            )
            .unwrap()
        };
        let (once, whole) = (run(true), run(false));
        assert_eq!((once.tokens, once.steps), (whole.tokens, whole.steps));
        assert_eq!(whole.tokens_shared, 0);
        assert!(
            once.tokens_shared > once.tokens / 5,
            "{}",
            once.tokens_shared
        );
        assert_eq!(once.curve.len(), whole.curve.len());
        for (a, b) in once.curve.iter().zip(&whole.curve) {
            let near = |a: f64, b: f64| (a - b).abs() < 2e-3 * b.abs();
            assert!(near(a.loss, b.loss), "{method:?}: {a:?} {b:?}");
            assert!(
                near(a.held_out_loss.unwrap(), b.held_out_loss.unwrap()),
                "{a:?} {b:?}"
            );
        }
    }
}

#[test]
fn layers_that_learn_while_they_read_are_given_each_sample_whole() {
    let dir = tempfile::tempdir().unwrap();
    write_tiny(dir.path(), 3).unwrap();
    let plain = Model::load(dir.path()).unwrap();
    let ttt = TttConfig {
        layers: vec![1],
        chunk_len: 16,
        ..TttConfig::default()
    };
    let learning = plain
        .clone()
        .with_ttt(ttt, TttStart::NextToken, &mut Random::new(5))
        .unwrap();
    let (_, samples, shared) = cases().swap_remove(2);
    let ids: Vec<&[u32]> = samples.iter().map(|s| &s.ids[..]).collect();
    assert_eq!(plain.packed_rows(&ids, true).shared() as u64, shared);
    assert_eq!(learning.packed_rows(&ids, true).shared(), 0);
    let step = step(
        &learning,
        Method::Upper { layers: 1 },
        &samples,
        true,
        0,
        None,
    );
    assert_eq!(step.outcome.shared, 0);
}

#[test]
fn until_layers_begin_to_learn_a_training_is_that_of_a_plain_student() {
    let pool = Pool::new(2, 0);
    let samples: Vec<Sample> = (0..12).map(|i| sample(i % 2, 48, 5, 20)).collect();
    let (train, held_out) = samples.split_at(9);
    let plain = || {
        let dir = tempfile::tempdir().unwrap();
        write_tiny(dir.path(), 3).unwrap();
        Model::load(dir.path()).unwrap()
    };
    let run = |from: Option<f64>| {
        let ttt = from.map(|from| TttPlan {
            start: TttStart::NextToken,
            every: 1,
            chunk_len: 16,
            lr: 1.0,
            rate: 1e-2,
            from,
            decay: None,
            delta: None,
        });
        let model = match &ttt {
            None => plain(),
            Some(ttt) => {
                let layers = ttt.config(plain().config.num_hidden_layers);
                let mut random = Random::new(5);
                plain().with_ttt(layers, ttt.start, &mut random).unwrap()
            }
        };
        let plan = TrainPlan {
            method: Method::Full,
            tokens: 4000,
            batch_tokens: 160,
            lr: 1e-3,
            evaluations: 4,
            share_beginnings: false,
            ttt,
            ..TrainPlan::default()
        };
        let go = &mut |_: &Progress| Flow::Go;
        fit(&pool, model, train, held_out, "x", &plan, None, go).unwrap()
    };
    let (without, late, early) = (run(None), run(Some(0.5)), run(Some(0.0)));
    let apart = |a: &Trained, b: &Trained, point: usize| {
        let (a, b) = (&a.curve[point], &b.curve[point]);
        assert_eq!(a.step, b.step);
        (a.held_out_loss.unwrap() - b.held_out_loss.unwrap()).abs() > 1e-5
    };
    let half = late.curve.len() / 2;
    for point in 0..=half {
        assert!(!apart(&late, &without, point), "{point}");
    }
    assert!((1..=half).all(|point| apart(&early, &without, point)));
    let last = late.curve.len() - 1;
    assert!(apart(&late, &without, last));
    assert!(!late.model.writes_nothing_yet());
}

#[test]
fn a_training_that_runs_away_ends_at_its_next_look_with_both_losses() {
    let pool = Pool::new(2, 0);
    let samples: Vec<Sample> = (0..12)
        .map(|i| sample(i % 2, 32, 5 + i as usize, 4))
        .collect();
    let (train, held_out) = samples.split_at(9);
    let run = |lr: f64| {
        let plan = TrainPlan {
            method: Method::Full,
            tokens: 3000,
            batch_tokens: 160,
            warmup_steps: 0,
            lr,
            evaluations: 4,
            ..TrainPlan::default()
        };
        let go = &mut |_: &Progress| Flow::Go;
        fit(&pool, model("llama"), train, held_out, "x", &plan, None, go)
    };
    assert!(run(1e-3).is_ok());
    match run(3.0) {
        Err(TrainError::RunAway { step, before, loss }) => {
            assert!(step > 0 && loss > 3.0 * before, "{step} {before} {loss}");
        }
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("a rate of 3 is too high for any model"),
    }
}

#[test]
fn a_training_goes_on_in_other_numbers_and_under_another_rate_begins_anew() {
    let pool = Pool::new(2, 0);
    let samples: Vec<Sample> = (0..12)
        .map(|i| sample(i % 2, 32, 5 + i as usize, 4))
        .collect();
    let (train, held_out) = samples.split_at(9);
    // Steps of a run that is stopped behind its third one, and of the run that comes after it.
    let runs = |compute: Compute, lr: f64| {
        let dir = tempfile::tempdir().unwrap();
        let run = |compute: Compute, lr: f64, most: usize| {
            let plan = TrainPlan {
                method: Method::Full,
                tokens: 2000,
                batch_tokens: 160,
                lr,
                compute,
                ..TrainPlan::default()
            };
            let mut steps = Vec::new();
            let go = &mut |progress: &Progress| {
                steps.push(progress.step);
                match steps.len() < most {
                    true => Flow::Go,
                    false => Flow::Stop,
                }
            };
            let base = model("llama");
            let at = Some(dir.path());
            let ended = fit(&pool, base, train, held_out, "x", &plan, at, go);
            (steps, ended.is_ok())
        };
        let (before, ended) = run(Compute::F32, 1e-3, 3);
        assert_eq!((before, ended), (vec![1, 2, 3], false));
        let (after, ended) = run(compute, lr, usize::MAX);
        assert!(ended);
        after[0]
    };
    assert_eq!(runs(Compute::F32, 1e-3), 4);
    assert_eq!(runs(Compute::Bf16, 1e-3), 4);
    assert_eq!(runs(Compute::F32, 2e-3), 1);
}

#[test]
fn a_training_killed_behind_its_last_step_makes_no_other() {
    let pool = Pool::new(2, 0);
    let samples: Vec<Sample> = (0..12)
        .map(|i| sample(i % 2, 32, 5 + i as usize, 4))
        .collect();
    let (train, held_out) = samples.split_at(9);
    let plan = TrainPlan {
        method: Method::Full,
        tokens: 1000,
        batch_tokens: 160,
        lr: 1e-3,
        checkpoint_seconds: 0.0,
        ..TrainPlan::default()
    };
    let dir = tempfile::tempdir().unwrap();
    let run = || {
        let (model, go) = (model("llama"), &mut |_: &Progress| Flow::Go);
        fit(
            &pool,
            model,
            train,
            held_out,
            "x",
            &plan,
            Some(dir.path()),
            go,
        )
        .unwrap()
    };
    let (once, again) = (run(), run());
    assert!(once.tokens >= plan.tokens);
    assert_eq!((once.steps, once.tokens), (again.steps, again.tokens));
    let loss = |trained: &Trained| evaluate_loss(&pool, &trained.model, held_out).unwrap();
    assert_eq!(loss(&once), loss(&again));
}
