//! Training: losses, gradients and AdamW's steps.

use std::path::Path;
use std::sync::Arc;

use super::super::{CardTraining, Device, DeviceError, DeviceOptions, Numbers, TrainRates};
use super::{
    apart, assert_close, card, fixtures, learner, moving, reference, tokens, value, wide, OBJECT,
};
use crate::kernels::Pool;
use crate::model::{AdapterConfig, Compute, Grads, Lora, Model, ParamId, Tape, TrainId, LINEARS};
use crate::train::{
    fit_on, Flow, Method, Progress, Sample, TrainError, TrainPlan, Trained, TttPlan,
};
use crate::ttt::{Forgetting, TttConfig, TttStart, TttTarget};

/// A batch: sequences, and rows with labels and weights.
struct Batch {
    texts: Vec<Vec<u32>>,
    rows: Vec<usize>,
    labels: Vec<u32>,
    weights: Vec<f32>,
}

fn batch(model: &Model) -> Batch {
    let texts: Vec<Vec<u32>> = [33, 5, 70]
        .iter()
        .enumerate()
        .map(|(i, n)| tokens(model, *n, 40 + i as u64))
        .collect();
    let (mut rows, mut labels, mut weights, mut row) = (Vec::new(), Vec::new(), Vec::new(), 0);
    for ids in &texts {
        for i in (1..ids.len()).filter(|i| i % 3 != 0) {
            rows.push(row + i - 1);
            labels.push(ids[i]);
            weights.push(0.5 + (i % 4) as f32);
        }
        row += ids.len();
    }
    Batch {
        texts,
        rows,
        labels,
        weights,
    }
}

/// The processor's loss and gradients.
fn by_processor(
    model: &Model,
    lora: Option<&Lora>,
    batch: &Batch,
    moves: &[(TrainId, usize)],
    first: usize,
) -> (f64, Vec<bool>, Grads) {
    let pool = Pool::new(1, 0);
    let texts: Vec<&[u32]> = batch.texts.iter().map(|ids| &ids[..]).collect();
    let rows = model.packed_rows(&texts, false);
    let mut x = model.embed(&texts.concat()).unwrap();
    let mut grads = Grads::new(moves.iter().copied());
    let mut tape = Tape::default();
    let layers = model.config.num_hidden_layers;
    model.blocks(&pool, (0, first), &rows, None, &mut x, None);
    model.blocks(&pool, (first, layers), &rows, lora, &mut x, Some(&mut tape));
    let mut dx = vec![0.0; x.len()];
    let asked = (&batch.rows[..], &batch.labels[..], &batch.weights[..]);
    let loss = model.head_loss(&pool, &x, asked, Some((0.01, &mut dx, &mut grads)));
    model.blocks_backward(&pool, &rows, lora, &mut tape, &mut dx, &mut grads);
    if first == 0 {
        model.embed_backward(&texts.concat(), &dx, &mut grads);
    }
    (loss.loss, loss.hits, grads)
}

fn check(what: &str, model: &Model, lora: Option<&Lora>, first: usize, tolerance: f32) {
    let Some(card) = card() else { return };
    let batch = batch(model);
    let of_first = |id: &TrainId| match id {
        TrainId::Full(ParamId::Embed) => first == 0,
        TrainId::Full(ParamId::Layer(layer, _)) => usize::from(*layer) >= first,
        _ => true,
    };
    let moves: Vec<(TrainId, usize)> = moving(model, lora)
        .into_iter()
        .filter(|(id, _)| of_first(id))
        .collect();
    let (loss, hits, grads) = by_processor(model, lora, &batch, &moves, first);
    let mut training = CardTraining::begin(&card, model, lora, &moves, first).unwrap();
    for (id, _) in &moves {
        training
            .put(*id, Numbers::Value, &value(model, lora, *id))
            .unwrap();
    }
    let texts: Vec<&[u32]> = batch.texts.iter().map(|ids| &ids[..]).collect();
    let lr = model.config.ttt.as_ref().map_or(0.0, |ttt| ttt.lr);
    training.forward(&texts, lr, true).unwrap();
    let asked = (&batch.rows[..], &batch.labels[..], &batch.weights[..]);
    let plain = training.head(asked, None).unwrap();
    let seen = training.head(asked, Some(0.01)).unwrap();
    assert_eq!(plain, seen, "{what}: looking at the loss changes nothing");
    assert!(
        (seen.loss - loss).abs() <= f64::from(tolerance) * loss,
        "{what}: loss {} for {loss}",
        seen.loss
    );
    if tolerance < 1e-3 {
        assert_eq!(seen.hits, hits, "{what}: hits");
    }
    training.backward().unwrap();
    let norms = training.squared_norms().unwrap();
    let mut worst = (0.0, String::new());
    for ((id, len), norm) in moves.iter().zip(norms) {
        let mut got = vec![0.0; *len];
        training.get(*id, Numbers::Gradient, &mut got).unwrap();
        let want = &grads.map[id];
        let gap = apart(want, &got);
        assert!(
            gap <= tolerance,
            "{what}: gradient of {} {gap:e} apart",
            id.name()
        );
        let sum: f64 = got.iter().map(|x| f64::from(*x).powi(2)).sum();
        assert!(
            (sum - norm).abs() <= 1e-9 * sum.max(1e-12),
            "{what}: norm of {}",
            id.name()
        );
        if gap > worst.0 {
            worst = (gap, id.name());
        }
    }
    println!(
        "{what}: gradients at most {:.2e} apart ({}), {tolerance:.0e} allowed",
        worst.0, worst.1
    );
}

fn adapter(model: &Model) -> Lora {
    let config = AdapterConfig {
        rank: 4,
        alpha: 8.0,
        seed: 3,
    };
    let mut lora = Lora::new(&model.config, config, &LINEARS);
    let mut random = crate::kernels::Random::new(5);
    for (_, b) in lora.pairs.values_mut() {
        // B begins at zero, which would hide A.
        b.iter_mut()
            .for_each(|x| *x = 0.05 * random.normal() as f32);
    }
    lora
}

#[test]
fn gradients_of_all_tensors_are_those_of_the_processor() {
    for name in ["llama", "qwen3"] {
        let mut model = reference(name);
        check(&format!("{name}, full"), &model, None, 0, 1e-4);
        check(&format!("{name}, from block 1 on"), &model, None, 1, 1e-4);
        model.compute = Compute::Bf16;
        check(&format!("{name}, full, bf16"), &model, None, 0, 0.15);
    }
}

#[test]
fn gradients_of_adapters_are_those_of_the_processor() {
    for name in ["llama", "qwen3"] {
        let mut model = reference(name);
        let lora = adapter(&model);
        check(&format!("{name}, lora"), &model, Some(&lora), 0, 1e-4);
        model.compute = Compute::Bf16;
        check(&format!("{name}, lora, bf16"), &model, Some(&lora), 0, 0.15);
    }
}

/// Models of tests/reference/ttt whose layers learn from their own inputs: untrained filters, trained ones, and none behind a projection.
fn learners() -> Vec<(&'static str, Model)> {
    let names = [
        "llama_untrained",
        "qwen3_hidden_lr3",
        "qwen3_embed_noproj_lr0p3",
    ];
    names
        .map(|name| (name, learner(name)))
        .map(own_inputs)
        .into()
}

/// What is made from embeddings is served and not trained.
fn own_inputs((name, mut model): (&'static str, Model)) -> (&'static str, Model) {
    model.config.ttt.as_mut().unwrap().target = TttTarget::HiddenStates;
    (name, model)
}

#[test]
fn gradients_through_layers_that_learn_are_those_of_the_processor() {
    for (name, mut model) in learners() {
        let lora = adapter(&model);
        check(&format!("{name}, full"), &model, None, 0, 1e-4);
        check(&format!("{name}, from block 1 on"), &model, None, 1, 1e-4);
        check(&format!("{name}, lora"), &model, Some(&lora), 0, 1e-4);
        model.compute = Compute::Bf16;
        // A step size of 3 makes of the rounding of one chunk a hundredth of the next ones.
        model.config.ttt.as_mut().unwrap().lr = 0.3;
        check(&format!("{name}, full, bf16"), &model, None, 0, 0.15);
        check(&format!("{name}, lora, bf16"), &model, Some(&lora), 0, 0.15);
    }
}

#[test]
fn gradients_through_layers_that_forget_are_those_of_the_processor() {
    for (name, mut model) in learners() {
        for forgets in [Forgetting::Decay(0.7), Forgetting::Delta(0.8)] {
            let ttt = model.config.ttt.as_mut().unwrap();
            (ttt.forgets, ttt.lr) = (forgets, ttt.lr.min(0.3));
            let lora = adapter(&model);
            check(&format!("{name}, {forgets:?}, full"), &model, None, 0, 1e-4);
            check(
                &format!("{name}, {forgets:?}, lora"),
                &model,
                Some(&lora),
                0,
                1e-4,
            );
        }
        model.compute = Compute::Bf16;
        check(&format!("{name}, delta rule, bf16"), &model, None, 0, 0.15);
    }
}

#[test]
fn a_student_that_learns_by_gradients_is_trained_as_a_plain_one() {
    let mut model = reference("llama");
    let layers = model.config.num_hidden_layers;
    model.config.ttt = Some(TttConfig::gradient(layers, 8, 0.1));
    check("llama, by gradients", &model, None, 0, 1e-4);
}

#[test]
fn gradients_through_layers_that_learn_are_those_of_the_authors_code() {
    let Some(card) = card() else { return };
    for name in ["llama_untrained", "qwen3_hidden_lr3"] {
        let model = learner(name);
        let file = |file: &str| {
            let path = fixtures().join("ttt").join(name).join(file);
            std::fs::read(path).unwrap()
        };
        let (vectors, bytes) = (file("vectors.safetensors"), file("grads_len37.safetensors"));
        let vectors = safetensors::SafeTensors::deserialize(&vectors).unwrap();
        let wanted = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let ids: Vec<u32> = vectors
            .tensor("len37.input_ids")
            .unwrap()
            .data()
            .chunks_exact(8)
            .map(|b| i64::from_le_bytes(b.try_into().unwrap()) as u32)
            .collect();
        let numbers = |name: &str| -> Option<Vec<f32>> {
            let numbers = wanted.tensor(name).ok()?.data().chunks_exact(4);
            let read = |b: &[u8]| f32::from_le_bytes(b.try_into().unwrap());
            Some(numbers.map(read).collect())
        };
        let moves = moving(&model, None);
        let mut training = CardTraining::begin(&card, &model, None, &moves, 0).unwrap();
        for (id, _) in &moves {
            training
                .put(*id, Numbers::Value, &value(&model, None, *id))
                .unwrap();
        }
        let lr = model.config.ttt.as_ref().unwrap().lr;
        training.forward(&[&ids], lr, true).unwrap();
        let rows: Vec<usize> = (0..ids.len() - 1).collect();
        let weights = vec![1.0; rows.len()];
        let scale = 1.0 / rows.len() as f32;
        let seen = training
            .head((&rows, &ids[1..], &weights), Some(scale))
            .unwrap();
        let loss = [(seen.loss / seen.weight) as f32];
        assert_close(
            &format!("{name}, loss"),
            &numbers("loss").unwrap(),
            &loss,
            1e-5,
        );
        training.backward().unwrap();
        let mut compared = 0;
        for (id, len) in &moves {
            let Some(want) = numbers(&format!("grad.{}", id.name())) else {
                continue;
            };
            let mut got = vec![0.0; *len];
            training.get(*id, Numbers::Gradient, &mut got).unwrap();
            assert_close(&format!("{name}, {}", id.name()), &want, &got, 1e-3);
            compared += usize::from(id.name().contains("ttt_"));
        }
        assert!(
            compared >= 4,
            "{name}: filters and projections were compared"
        );
    }
}

#[test]
fn what_learns_from_embeddings_is_refused() {
    let Some(card) = card() else { return };
    let model = learner("qwen3_embed_noproj_lr0p3");
    match CardTraining::begin(&card, &model, None, &moving(&model, None), 0) {
        Err(DeviceError::Refused(why)) => assert!(why.contains("input_embed"), "{why}"),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("it was begun"),
    }
}

#[test]
fn gradients_through_attention_in_tiles_are_those_of_the_processor() {
    let mut model = wide(64);
    model.compute = Compute::Bf16;
    check("heads of 64, bf16", &model, None, 0, 0.15);
}

#[test]
fn a_step_of_adamw_is_that_of_the_formula() {
    let Some(card) = card() else { return };
    let model = reference("llama");
    let moves = moving(&model, None);
    let mut training = CardTraining::begin(&card, &model, None, &moves, 0).unwrap();
    let (id, len) = moves[3];
    let w = value(&model, None, id);
    for (id, _) in &moves {
        training
            .put(*id, Numbers::Value, &value(&model, None, *id))
            .unwrap();
    }
    let number = |i: usize| ((i * 7 % 11) as f32 - 5.0) * 0.01;
    let grad: Vec<f32> = (0..len).map(number).collect();
    let (m, v) = (vec![0.02f32; len], vec![0.0009f32; len]);
    training.put(id, Numbers::Gradient, &grad).unwrap();
    training.put(id, Numbers::FirstMoment, &m).unwrap();
    training.put(id, Numbers::SecondMoment, &v).unwrap();
    let rates = TrainRates {
        tensors: vec![(2e-3, 0.999); moves.len()],
        scale: 0.5,
        root: 0.7,
    };
    training.apply(&rates).unwrap();
    let mut got = vec![0.0; len];
    training.get(id, Numbers::Value, &mut got).unwrap();
    for i in 0..len {
        let g = 0.5 * f64::from(grad[i]);
        let m = 0.9 * 0.02 + 0.1 * g;
        let v = 0.95 * 0.0009 + 0.05 * g * g;
        let want = f64::from(w[i]) * 0.999 - 2e-3 * m / (v.sqrt() / 0.7 + 1e-8);
        assert!(
            (f64::from(got[i]) - want).abs() < 1e-6,
            "{i}: {} for {want}",
            got[i]
        );
    }
    training.get(id, Numbers::Gradient, &mut got).unwrap();
    assert!(got.iter().all(|g| *g == 0.0), "the sums begin again");
}

/// Samples whose every token is to be said, some of which begin alike.
fn samples(model: &Model) -> Vec<Sample> {
    (0..12)
        .map(|i| {
            let mut ids = tokens(model, 8, 70);
            ids.extend(tokens(model, 3 + i % 7, 80 + i as u64));
            Sample {
                target_start: 8,
                weight: 1.0 + (i % 2) as f32,
                ids,
                ..Sample::default()
            }
        })
        .collect()
}

fn plan(method: Method) -> TrainPlan {
    TrainPlan {
        method,
        tokens: 240,
        batch_tokens: 60,
        lr: 2e-3,
        warmup_steps: 2,
        evaluations: 2,
        patience: 2,
        seed: 5,
        compute: Compute::F32,
        ..TrainPlan::default()
    }
}

/// A student whose layers are to learn while it reads: its filters write nothing yet, so that the step size comes up.
fn student() -> Model {
    let ttt = TttConfig {
        layers: vec![0, 2],
        chunk_len: 4,
        lr: 2.0,
        ..TttConfig::default()
    };
    let start = TttStart::Published;
    reference("llama")
        .with_ttt(ttt, start, &mut crate::kernels::Random::new(4))
        .unwrap()
}

/// How such a student is trained: for a while as a plain one.
fn student_plan(method: Method) -> TrainPlan {
    let ttt = TttPlan {
        start: TttStart::Published,
        every: 2,
        chunk_len: 4,
        lr: 2.0,
        rate: 2e-2,
        from: 0.2,
        decay: None,
        delta: None,
    };
    TrainPlan {
        ttt: Some(ttt),
        tokens: 480,
        ..plan(method)
    }
}

/// A training of a model, as far as it gets.
fn trained(
    device: &Device,
    model: Model,
    plan: &TrainPlan,
    dir: Option<&Path>,
    stop: Option<u64>,
) -> Result<Trained, TrainError> {
    let all = samples(&model);
    let (train, held_out) = all.split_at(9);
    let mut control = |progress: &Progress| match stop == Some(progress.step) {
        true => Flow::Stop,
        false => Flow::Go,
    };
    fit_on(
        &Pool::new(1, 0),
        device,
        model,
        train,
        held_out,
        "data",
        plan,
        dir,
        &mut control,
    )
}

fn losses(trained: &Trained) -> Vec<f32> {
    let points = trained.curve.iter();
    points
        .flat_map(|p| [p.loss as f32, p.held_out_loss.unwrap_or(0.0) as f32])
        .collect()
}

fn weights(trained: &Trained) -> Vec<f32> {
    trained
        .model
        .weights
        .params
        .values()
        .flat_map(|w| w.iter().copied())
        .collect()
}

fn device() -> Option<Arc<Device>> {
    let library = std::env::var_os(OBJECT)?;
    Some(Device::new(DeviceOptions {
        library: Some(library.into()),
        ..DeviceOptions::default()
    }))
}

#[test]
fn a_whole_training_has_the_losses_of_the_processor() {
    if card().is_none() {
        return;
    }
    let device = device().unwrap();
    let lora = Method::Lora {
        rank: 4,
        alpha: 8.0,
    };
    for method in [lora, Method::Full, Method::Upper { layers: 1 }] {
        let plan = plan(method);
        let want = trained(&Device::off(), reference("llama"), &plan, None, None).unwrap();
        let got = trained(&device, reference("llama"), &plan, None, None).unwrap();
        println!("{:?}: on {}", plan.method, device.words());
        assert_eq!((want.steps, want.tokens), (got.steps, got.tokens));
        // The upper blocks' inputs are rounded to bf16 on the processor, which keeps them.
        let tolerance = if let Method::Upper { .. } = plan.method {
            3e-2
        } else {
            2e-3
        };
        assert_close("losses", &losses(&want), &losses(&got), tolerance);
        assert_close("weights", &weights(&want), &weights(&got), tolerance);
    }
}

#[test]
fn a_whole_training_of_a_student_that_learns_has_the_losses_of_the_processor() {
    if card().is_none() {
        return;
    }
    let lora = Method::Lora {
        rank: 4,
        alpha: 8.0,
    };
    for method in [lora, Method::Full, Method::Upper { layers: 1 }] {
        let (device, plan) = (device().unwrap(), student_plan(method));
        let want = trained(&Device::off(), student(), &plan, None, None).unwrap();
        let got = trained(&device, student(), &plan, None, None).unwrap();
        let peak = device.card().unwrap().info().peak_bytes;
        assert!(peak > 0, "{:?} was not trained on the card", plan.method);
        println!("{:?}: on {}", plan.method, device.words());
        assert_eq!((want.steps, want.tokens), (got.steps, got.tokens));
        // The first for the same reason as above.
        let tolerance = if let Method::Upper { .. } = plan.method {
            3e-2
        } else {
            5e-4
        };
        assert_close("losses", &losses(&want), &losses(&got), tolerance);
        for (id, data) in &want.model.weights.params {
            let name = id.name();
            let moved = **data != *student().weights.params[id];
            let frozen = matches!(plan.method, Method::Upper { .. } | Method::Lora { .. });
            assert!(moved || frozen, "{name} moves");
            let got = &got.model.weights.params[id];
            if name.contains("ttt_") || name.contains("down_proj") {
                assert_close(&name, data, got, 10.0 * tolerance);
            }
        }
        assert_close("weights", &weights(&want), &weights(&got), tolerance);
    }
}

#[test]
fn a_training_that_was_killed_goes_on_to_the_same_losses() {
    if card().is_none() {
        return;
    }
    let plain = (reference("llama"), plan(Method::Full));
    for (model, plan) in [plain, (student(), student_plan(Method::Full))] {
        let device = device().unwrap();
        let run =
            |on: &Device, dir: Option<&Path>, stop| trained(on, model.clone(), &plan, dir, stop);
        let whole = run(&device, None, None).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let killed = run(&device, Some(dir.path()), Some(4));
        assert!(matches!(killed, Err(TrainError::Cancelled)));
        let resumed = run(&device, Some(dir.path()), None).unwrap();
        assert_eq!(losses(&whole), losses(&resumed));
        assert_eq!(weights(&whole), weights(&resumed));
        // What was begun on a card goes on on a processor, and the other way round.
        for (first, then) in [(&*device, &*Device::off()), (&*Device::off(), &*device)] {
            let dir = tempfile::tempdir().unwrap();
            let killed = run(first, Some(dir.path()), Some(4));
            assert!(matches!(killed, Err(TrainError::Cancelled)));
            let resumed = run(then, Some(dir.path()), None).unwrap();
            assert_close("losses", &losses(&whole), &losses(&resumed), 2e-3);
        }
    }
}

/// Run by the test below with orders that the stand-in obeys.
#[test]
#[ignore = "a part of another test, in a process of its own"]
fn train_until_it_fails() {
    let device = device().unwrap();
    let plan = plan(Method::Full);
    let want = trained(&Device::off(), reference("llama"), &plan, None, None).unwrap();
    let got = trained(&device, reference("llama"), &plan, None, None).unwrap();
    assert_close("losses", &losses(&want), &losses(&got), 2e-3);
    println!("then {}", device.words());
}
