//! The loop: batches in a fixed order, forward, backward, AdamW, a look at the held-out samples now and then.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use half::bf16;
use serde::{Deserialize, Serialize};

use super::card::OnCard;
use super::checkpoint;
use super::memory::Memory;
use super::optim::{AdamW, Schedule};
use super::plan::{Method, TrainPlan};
use super::TrainError;
use crate::device::{Device, DeviceError};
use crate::kernels::{Pool, Random};
use crate::model::{
    AdapterConfig, Grads, Lora, Model, PackedRows, ParamId, Tape, TrainId, LINEARS,
};
use crate::ttt::{TttMode, TttTarget};

/// A prompt and what should be said to it: loss on `ids[target_start..]`, and on what was to be said earlier in the same text.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sample {
    pub ids: Vec<u32>,
    /// Targets before the last one, in order, where a row holds several steps of an episode. None begins at 0.
    pub earlier: Vec<Range<usize>>,
    pub target_start: usize,
    pub weight: f32,
}

impl Sample {
    /// Where its targets stand; the last may be empty.
    fn spans(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        let last = self.target_start..self.ids.len().max(self.target_start);
        self.earlier.iter().cloned().chain([last])
    }

    pub(super) fn is_usable(&self) -> bool {
        let targets: usize = self.spans().map(|span| span.len()).sum();
        targets > 0 && self.spans().all(|span| span.start > 0)
    }
}

/// A point of the loss curves.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CurvePoint {
    pub step: u64,
    pub tokens: u64,
    /// Mean weighted loss per target token since the last point, in nats.
    pub loss: f64,
    pub held_out_loss: Option<f64>,
    /// Share of held-out targets whose every token is the most likely one.
    pub held_out_exact: Option<f64>,
    pub lr: f64,
    /// Targets left out by trimming since the last point.
    pub trimmed: u64,
}

/// Where a running training stands.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    pub step: u64,
    pub tokens: u64,
    pub tokens_total: u64,
    /// Tokens of those that were not computed, because another sample of their step begins with them too.
    pub tokens_shared: u64,
    /// Those in which it could compute.
    pub seconds: f64,
    /// Those in which it waited because a step was decided, or because somebody paused it.
    pub held_seconds: f64,
    pub loss: f64,
    pub held_out_loss: Option<f64>,
    /// Estimate from the speed of the last quarter of the steps so far.
    pub seconds_left: f64,
}

/// A held-out loss of so many times the first one and a nat has left the model behind.
const RUN_AWAY: f64 = 3.0;

/// What the caller wants after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    Go,
    /// Write a checkpoint and return [`TrainError::Cancelled`].
    Stop,
}

/// Why a training ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StopReason {
    Tokens,
    Seconds,
    /// The held-out loss no longer fell; the weights are those of its best evaluation.
    EarlyStop,
}

/// A finished training.
pub struct Trained {
    /// The student's weights; an adapter is merged in.
    pub model: Model,
    pub lora: Option<Lora>,
    pub curve: Vec<CurvePoint>,
    pub tokens: u64,
    /// As in [`Progress`].
    pub tokens_shared: u64,
    pub steps: u64,
    /// Seconds of all runs together, resumed ones included.
    pub seconds: f64,
    pub stopped: StopReason,
}

/// What a checkpoint holds beside the tensors.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct State {
    pub plan: Option<TrainPlan>,
    pub data: String,
    pub step: u64,
    pub tokens: u64,
    #[serde(default)]
    pub tokens_shared: u64,
    pub epoch: u64,
    /// Batches of the epoch already done.
    pub batch: usize,
    pub seconds: f64,
    #[serde(default)]
    pub held_seconds: f64,
    pub curve: Vec<CurvePoint>,
    pub since: Since,
    pub best: Option<f64>,
    pub bad_evaluations: usize,
    pub next_evaluation: usize,
    /// Steps before the best evaluation, whose weights an early stop goes back to; `None` without patience.
    #[serde(default)]
    pub best_step: Option<u64>,
}

/// Share of a job over which the step size of layers that learn while they read comes up.
const TTT_WARMUP: f64 = 0.1;

/// Copies of the trained tensors.
pub(super) type Snapshot = Vec<(TrainId, Vec<f32>)>;

/// Sums since the last point of the curve.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Since {
    loss: f64,
    weight: f64,
    trimmed: u64,
}

/// What moves: a private copy of the trained tensors, everything else shared with the base.
pub(super) struct Trainee {
    pub model: Model,
    pub lora: Option<Lora>,
    /// Whether what the samples of a batch begin with is computed once.
    pub share: bool,
}

impl Trainee {
    fn rows(&self, samples: &[Sample], batch: &[usize]) -> PackedRows<'static> {
        self.model.packed_rows(&ids_of(samples, batch), self.share)
    }

    /// Step size of layers that learn while they read, as it is now.
    fn ttt_lr(&self) -> f32 {
        self.model.config.ttt.as_ref().map_or(0.0, |ttt| ttt.lr)
    }

    pub(super) fn with(&mut self, id: TrainId, change: &mut dyn FnMut(&mut [f32])) {
        match id {
            TrainId::Full(id) => {
                let shared = self
                    .model
                    .weights
                    .params
                    .get_mut(&id)
                    .expect("trained tensors exist");
                let own: &mut Vec<f32> = Arc::make_mut(shared);
                change(own)
            }
            TrainId::LoraA(layer, p) => change(&mut self.pair(layer, p).0),
            TrainId::LoraB(layer, p) => change(&mut self.pair(layer, p).1),
        }
    }

    fn pair(&mut self, layer: u16, p: crate::model::LayerParam) -> &mut (Vec<f32>, Vec<f32>) {
        let lora = self
            .lora
            .as_mut()
            .expect("adapter tensors belong to an adapter");
        lora.pairs
            .get_mut(&(layer, p))
            .expect("trained pairs exist")
    }
}

/// Samples whose order is shuffled within a window of this many, then sorted by length: batches of like lengths, still mixed.
const SORT_WINDOW: usize = 256;

/// Trains `base` on `train` by `plan`. Tensors that move are moved where they are if the caller keeps no copy of `base`.
///
/// With a `checkpoint` folder the state is written there every `checkpoint_seconds`, and a state found there for the same
/// plan and the same `data_hash` is resumed: the losses that follow are those of an unbroken run.
/// `control` is asked after every step.
///
/// # Errors
/// [`TrainError::Memory`] before anything is done if the plan's limit is too low; [`TrainError::Cancelled`] when `control` said stop, after a checkpoint; the others as documented there.
#[allow(clippy::too_many_arguments)]
pub fn fit(
    pool: &Pool,
    base: Model,
    train: &[Sample],
    held_out: &[Sample],
    data_hash: &str,
    plan: &TrainPlan,
    checkpoint_dir: Option<&Path>,
    control: &mut dyn FnMut(&Progress) -> Flow,
) -> Result<Trained, TrainError> {
    let off = Device::off();
    let dir = checkpoint_dir;
    fit_on(
        pool, &off, base, train, held_out, data_hash, plan, dir, control,
    )
}

/// [`fit`] on a card, if `device` has one that takes the training; else, and where the card has no memory left on the way, on the
/// processor. Where the card fails in the middle, the last checkpoint goes on there.
///
/// # Errors
/// As [`fit`].
#[allow(clippy::too_many_arguments)]
pub fn fit_on(
    pool: &Pool,
    device: &Device,
    base: Model,
    train: &[Sample],
    held_out: &[Sample],
    data_hash: &str,
    plan: &TrainPlan,
    checkpoint_dir: Option<&Path>,
    control: &mut dyn FnMut(&Progress) -> Flow,
) -> Result<Trained, TrainError> {
    let (data, dir) = (data_hash, checkpoint_dir);
    // What the card moves it moves in copies of its own, so that the beginning is still there.
    let again = device.card().map(|_| base.clone());
    let done = fit_there(
        pool, device, base, train, held_out, data, plan, dir, control,
    );
    match (done, again) {
        (Err(TrainError::Device(why)), Some(base)) => {
            device.note(&why);
            let off = Device::off();
            fit_there(pool, &off, base, train, held_out, data, plan, dir, control)
        }
        (done, _) => done,
    }
}

#[allow(clippy::too_many_arguments)]
fn fit_there(
    pool: &Pool,
    device: &Device,
    base: Model,
    train: &[Sample],
    held_out: &[Sample],
    data_hash: &str,
    plan: &TrainPlan,
    checkpoint_dir: Option<&Path>,
    control: &mut dyn FnMut(&Progress) -> Flow,
) -> Result<Trained, TrainError> {
    let usable: Vec<usize> = (0..train.len())
        .filter(|&i| train[i].is_usable() && train[i].weight > 0.0)
        .collect();
    if usable.is_empty() {
        return Err(TrainError::Empty);
    }
    let config = base.config.clone();
    let config = &config;
    let compute = base.compute;
    let longest = usable.iter().map(|&i| train[i].ids.len()).max();
    let longest = longest.expect("some sample is usable");
    let mut trainable = plan.trainable(config);
    if let Some(ttt) = &config.ttt {
        if ttt.target == TttTarget::InputEmbed {
            return Err(TrainError::Plan(
                "ttt_target input_embed can be served, not trained: hidden_states can".into(),
            ));
        }
        if ttt.mode == TttMode::InPlace && longest <= ttt.chunk_len {
            tracing::warn!(
                longest,
                chunk = ttt.chunk_len,
                "no sample is longer than a chunk: the layers that learn while they read stay as they are"
            );
            trainable
                .retain(|(id, _)| !matches!(id, TrainId::Full(id) if id.is_of_learning_layer()));
        }
    }
    let lora = match plan.method {
        Method::Lora { rank, alpha } => Some(Lora::new(
            config,
            AdapterConfig {
                rank,
                alpha,
                seed: plan.seed,
            },
            &LINEARS,
        )),
        _ => None,
    };
    let mut trainee = Trainee {
        model: base,
        lora,
        share: plan.share_beginnings,
    };
    trainee.model.compute = plan.compute;
    let _buffers = pool.keeping();
    let all = train.iter().chain(held_out).map(|s| s.ids.len()).sum();
    let memory = Memory::of(plan, config, plan.batch_tokens.max(longest), longest, all);
    let mut tape = Tape::default();
    tape.inputs_only = memory.inputs_only(plan.memory_bytes)?;
    let mut adam = AdamW::new(&trainable, plan.weight_decay);
    if let Some(ttt) = &plan.ttt {
        adam.learning_layers = ttt.rate / plan.lr;
    }
    // Frozen blocks' outputs are kept, so what they learn while reading must not change: only layers that write nothing yet warm up.
    let step_size = (trainee.model.config.ttt.as_ref())
        .filter(|_| trainee.model.writes_nothing_yet())
        .map(|ttt| ttt.lr);
    let ttt_from = plan.ttt.as_ref().map_or(0.0, |ttt| ttt.from);
    let mut state = State {
        plan: Some(plan.clone()),
        data: data_hash.into(),
        ..State::default()
    };
    let mut best_weights: Option<Snapshot> = None;
    if let Some(dir) = checkpoint_dir {
        if let Some(found) = checkpoint::load(dir, plan, data_hash, &mut trainee, &mut adam)? {
            state = found.state;
            best_weights = found.best;
        }
    }
    let first = plan.first_block(config);
    let mut card = OnCard::begin(device, &mut trainee, &trainable, &adam, first);
    let mut lower = LowerCache::new(first, train.len(), plan.cache_bytes);
    let mut lower_held = LowerCache::new(first, held_out.len(), plan.cache_bytes / 4);
    let mut grads = Grads::new(trainable.iter().copied());
    let schedule = Schedule {
        peak: plan.lr,
        warmup_steps: plan.warmup_steps,
        floor: 0.05,
    };
    let (started, held) = (Instant::now(), pool.held_for());
    let (before, held_before) = (state.seconds, state.held_seconds);
    let mut last_checkpoint = Instant::now();
    let mut speed = Speed::default();
    // Whoever was killed behind the last step has no other to make.
    let mut stopped = (state.tokens >= plan.tokens).then_some(StopReason::Tokens);

    'epochs: while stopped.is_none() {
        let batches = batches(&usable, train, plan, state.epoch);
        while state.batch < batches.len() {
            let done = share_done(plan, &state);
            // Evaluations stand at fixed shares of the tokens, the first before any step.
            while plan.evaluations > 0
                && !held_out.is_empty()
                && done >= state.next_evaluation as f64 / plan.evaluations as f64
            {
                state.next_evaluation += 1;
                let (loss, exact) = match &mut card {
                    Some(card) => card.held_out_loss(held_out, trainee.ttt_lr())?,
                    None => held_out_loss(pool, &trainee, held_out, first, &mut lower_held)?,
                };
                let lr = schedule.lr(state.step, done);
                push_point(&mut state, lr, Some((loss, exact)));
                let before = state.curve.iter().find_map(|p| p.held_out_loss);
                // Trained away from everything the model knew: more of the same brings nothing back.
                if let Some(before) = before.filter(|before| loss > RUN_AWAY * (before + 1.0)) {
                    let step = state.step;
                    return Err(TrainError::RunAway { step, before, loss });
                }
                if state.best.is_none_or(|best| loss < best) {
                    state.best = Some(loss);
                    state.bad_evaluations = 0;
                    if plan.patience > 0 {
                        OnCard::bring_back(&card, &mut trainee, None)?;
                        best_weights = Some(snapshot(&trainable, &mut trainee));
                        state.best_step = Some(state.step);
                    }
                } else {
                    state.bad_evaluations += 1;
                    if plan.patience > 0 && state.bad_evaluations >= plan.patience {
                        stopped = Some(StopReason::EarlyStop);
                        break 'epochs;
                    }
                }
            }
            if speed.points.is_empty() {
                let held = (pool.held_for() - held).as_secs_f64();
                let since = (started.elapsed().as_secs_f64() - held).max(0.0);
                speed.push(before + since, state.tokens);
            }
            let batch = &batches[state.batch];
            let lr = schedule.lr(state.step, done);
            let trim = (done >= plan.trim_after).then_some(plan.trim_below);
            grads.zero();
            let attention = pool.attentive();
            if let (Some(ttt), Some(lr)) = (&mut trainee.model.config.ttt, step_size) {
                // What untrained filters write at full step size can throw the student off before they have learned what to write.
                ttt.lr = match done - ttt_from {
                    early if early < 0.0 => 0.0,
                    since => lr * (since / TTT_WARMUP).clamp(0.003, 1.0) as f32,
                };
            }
            let outcome = match &mut card {
                Some(on) => match on.step_gradients(train, batch, trim, trainee.ttt_lr()) {
                    // Nothing has moved in this step yet, so the processor can make it.
                    Err(DeviceError::Memory(why)) => {
                        device.note(&DeviceError::Memory(why));
                        OnCard::bring_back(&card, &mut trainee, Some(&mut adam))?;
                        card = None;
                        continue;
                    }
                    outcome => outcome?,
                },
                None => step_gradients(
                    pool, &trainee, train, batch, first, &mut lower, trim, &mut tape, &mut grads,
                )?,
            };
            if outcome.weight > 0.0 {
                if !outcome.loss.is_finite() {
                    return Err(TrainError::Diverged { step: state.step });
                }
                if let Some(card) = &mut card {
                    card.move_tensors(&mut adam, lr, plan.clip)?;
                } else {
                    adam.step(pool, lr, plan.clip, &grads, |id, change| {
                        trainee.with(id, change)
                    })?;
                }
            }
            drop(attention);
            state.since.loss += outcome.loss;
            state.since.weight += outcome.weight;
            state.since.trimmed += outcome.trimmed;
            state.step += 1;
            state.batch += 1;
            state.tokens += outcome.tokens;
            state.tokens_shared += outcome.shared;
            // Time in which it was not let compute is no time of its own: neither its speed nor its limit knows of it.
            let held = (pool.held_for() - held).as_secs_f64();
            state.held_seconds = held_before + held;
            state.seconds = before + (started.elapsed().as_secs_f64() - held).max(0.0);
            speed.push(state.seconds, state.tokens);
            let progress = Progress {
                step: state.step,
                tokens: state.tokens,
                tokens_total: plan.tokens,
                tokens_shared: state.tokens_shared,
                seconds: state.seconds,
                held_seconds: state.held_seconds,
                loss: outcome.loss / outcome.weight.max(1e-9),
                held_out_loss: state.curve.last().and_then(|p| p.held_out_loss),
                seconds_left: {
                    let by_tokens = speed.seconds_for(plan.tokens.saturating_sub(state.tokens));
                    match plan.max_seconds > 0.0 {
                        true => by_tokens.min((plan.max_seconds - state.seconds).max(0.0)),
                        false => by_tokens,
                    }
                },
            };
            let flow = control(&progress);
            let due = last_checkpoint.elapsed().as_secs_f64() >= plan.checkpoint_seconds;
            if let (Some(dir), true) = (checkpoint_dir, due || flow == Flow::Stop) {
                let best = best_weights.as_ref();
                OnCard::bring_back(&card, &mut trainee, Some(&mut adam))?;
                checkpoint::save(dir, &state, &trainable, &mut trainee, &adam, best)?;
                last_checkpoint = Instant::now();
            }
            if flow == Flow::Stop {
                return Err(TrainError::Cancelled);
            }
            if state.tokens >= plan.tokens {
                stopped = Some(StopReason::Tokens);
                break 'epochs;
            }
            if plan.max_seconds > 0.0 && state.seconds >= plan.max_seconds {
                stopped = Some(StopReason::Seconds);
                break 'epochs;
            }
        }
        state.epoch += 1;
        state.batch = 0;
    }
    let stopped = stopped.unwrap_or(StopReason::Tokens);
    if let (Some(ttt), Some(lr)) = (&mut trainee.model.config.ttt, step_size) {
        ttt.lr = lr;
    }
    OnCard::bring_back(&card, &mut trainee, None)?;
    drop(card);
    if let (StopReason::EarlyStop, Some(best)) = (stopped, best_weights) {
        for (id, data) in best {
            trainee.with(id, &mut |w| w.copy_from_slice(&data));
        }
    }
    let mut model = match &trainee.lora {
        Some(lora) => lora.merge(pool, &trainee.model),
        None => trainee.model.clone(),
    };
    model.compute = compute;
    let lr = schedule.lr(state.step, 1.0);
    let last = match held_out.is_empty() {
        true => None,
        false => Some(held_out_loss(
            pool,
            &trainee,
            held_out,
            first,
            &mut lower_held,
        )?),
    };
    push_point(&mut state, lr, last);
    Ok(Trained {
        model,
        lora: trainee.lora,
        curve: state.curve,
        tokens: state.tokens,
        tokens_shared: state.tokens_shared,
        steps: state.step,
        seconds: state.seconds,
        stopped,
    })
}

/// Mean loss per target token, in nats, and the share of targets whose every token is the most likely one.
pub fn evaluate_loss(
    pool: &Pool,
    model: &Model,
    samples: &[Sample],
) -> Result<(f64, f64), TrainError> {
    let trainee = Trainee {
        model: model.clone(),
        lora: None,
        share: true,
    };
    held_out_loss(
        pool,
        &trainee,
        samples,
        0,
        &mut LowerCache::new(0, samples.len(), 0),
    )
}

/// How far the job is, 0 to 1: by tokens, or by seconds where a time limit will end it first. With a time limit the schedule
/// depends on the machine's speed, so that the rate has come down when the time is up.
fn share_done(plan: &TrainPlan, state: &State) -> f64 {
    let tokens = state.tokens as f64 / plan.tokens as f64;
    match plan.max_seconds > 0.0 {
        true => tokens.max(state.seconds / plan.max_seconds),
        false => tokens,
    }
}

/// Which targets of a batch are left out because a token of theirs is less likely than `below` already, by the weights of their rows
/// set to 0; how many these are.
pub(super) fn leave_out(below: f64, nll: &[f32], owner: &[usize], weights: &mut [f32]) -> u64 {
    let mut worst = vec![0f32; owner.last().map_or(0, |last| last + 1)];
    for (nll, &o) in nll.iter().zip(owner) {
        worst[o] = worst[o].max(*nll);
    }
    let limit = -(below.max(1e-12).ln()) as f32;
    for (w, &o) in weights.iter_mut().zip(owner) {
        if worst[o] > limit {
            *w = 0.0;
        }
    }
    worst.iter().filter(|w| **w > limit).count() as u64
}

pub(super) struct StepOutcome {
    pub loss: f64,
    pub weight: f64,
    pub tokens: u64,
    pub shared: u64,
    pub trimmed: u64,
}

#[allow(clippy::too_many_arguments)]
pub(super) fn step_gradients(
    pool: &Pool,
    trainee: &Trainee,
    samples: &[Sample],
    batch: &[usize],
    first: usize,
    lower: &mut LowerCache,
    trim: Option<f64>,
    tape: &mut Tape,
    grads: &mut Grads,
) -> Result<StepOutcome, TrainError> {
    let model = &trainee.model;
    let lora = trainee.lora.as_ref();
    let rows = trainee.rows(samples, batch);
    let mut x = lower.outputs(pool, trainee, samples, batch, &rows)?;
    model.blocks(
        pool,
        (first, model.config.num_hidden_layers),
        &rows,
        lora,
        &mut x,
        Some(tape),
    );
    let (at, labels, mut weights, owner) = targets(samples, batch, &rows);
    let mut trimmed = 0;
    if let Some(below) = trim {
        let seen = model.head_loss(pool, &x, (&at, &labels, &weights), None);
        trimmed = leave_out(below, &seen.nll, &owner, &mut weights);
    }
    let weight: f32 = weights.iter().sum();
    let shared = rows.shared() as u64;
    let tokens = rows.len() as u64 + shared;
    if weight <= 0.0 {
        return Ok(StepOutcome {
            loss: 0.0,
            weight: 0.0,
            tokens,
            shared,
            trimmed,
        });
    }
    let mut dx = vec![0.0; x.len()];
    let loss = model.head_loss(
        pool,
        &x,
        (&at, &labels, &weights),
        Some((1.0 / weight, &mut dx, grads)),
    );
    model.blocks_backward(pool, &rows, lora, tape, &mut dx, grads);
    if grads.map.contains_key(&TrainId::Full(ParamId::Embed)) {
        let ids = rows.ids(&ids_of(samples, batch));
        model.embed_backward(&ids, &dx, grads);
    }
    Ok(StepOutcome {
        loss: loss.loss,
        weight: loss.weight,
        tokens,
        shared,
        trimmed,
    })
}

pub(super) fn ids_of<'a>(samples: &'a [Sample], batch: &[usize]) -> Vec<&'a [u32]> {
    batch.iter().map(|&i| &samples[i].ids[..]).collect()
}

/// Rows that predict a target, with label, weight and the number of the target they belong to. A shared row is there once for
/// each entry that learns from it, so that the weights of its labels add up.
pub(super) fn targets(
    samples: &[Sample],
    batch: &[usize],
    rows: &PackedRows,
) -> (Vec<usize>, Vec<u32>, Vec<f32>, Vec<usize>) {
    let (mut at, mut labels, mut weights, mut owner) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut target = 0;
    for (entry, &i) in batch.iter().enumerate() {
        let sample = &samples[i];
        let own: Vec<usize> = rows.rows_of(entry).collect();
        for span in sample.spans().filter(|span| !span.is_empty()) {
            for position in span {
                at.push(own[position - 1]);
                labels.push(sample.ids[position]);
                weights.push(sample.weight);
                owner.push(target);
            }
            target += 1;
        }
    }
    (at, labels, weights, owner)
}

fn held_out_loss(
    pool: &Pool,
    trainee: &Trainee,
    samples: &[Sample],
    first: usize,
    lower: &mut LowerCache,
) -> Result<(f64, f64), TrainError> {
    let model = &trainee.model;
    let all: Vec<usize> = (0..samples.len())
        .filter(|&i| samples[i].is_usable())
        .collect();
    let (mut loss, mut weight, mut exact, mut asked) = (0.0, 0.0, 0usize, 0usize);
    for batch in pack(&all, samples, 640) {
        let rows = trainee.rows(samples, &batch);
        let mut x = lower.outputs(pool, trainee, samples, &batch, &rows)?;
        model.blocks(
            pool,
            (first, model.config.num_hidden_layers),
            &rows,
            trainee.lora.as_ref(),
            &mut x,
            None,
        );
        let (at, labels, weights, owner) = targets(samples, &batch, &rows);
        let seen = model.head_loss(pool, &x, (&at, &labels, &weights), None);
        loss += seen.loss;
        weight += seen.weight;
        let mut right = vec![true; owner.last().map_or(0, |last| last + 1)];
        for (hit, &o) in seen.hits.iter().zip(&owner) {
            right[o] &= *hit;
        }
        exact += right.iter().filter(|r| **r).count();
        asked += right.len();
    }
    Ok((loss / weight.max(1e-9), exact as f64 / asked.max(1) as f64))
}

fn push_point(state: &mut State, lr: f64, held_out: Option<(f64, f64)>) {
    let since = std::mem::take(&mut state.since);
    let loss = if since.weight > 0.0 {
        since.loss / since.weight
    } else {
        state.curve.last().map_or(0.0, |p| p.loss)
    };
    state.curve.push(CurvePoint {
        step: state.step,
        tokens: state.tokens,
        loss: if state.step == 0 {
            held_out.map_or(0.0, |h| h.0)
        } else {
            loss
        },
        held_out_loss: held_out.map(|h| h.0),
        held_out_exact: held_out.map(|h| h.1),
        lr,
        trimmed: since.trimmed,
    });
}

fn snapshot(trainable: &[(TrainId, usize)], trainee: &mut Trainee) -> Snapshot {
    trainable
        .iter()
        .map(|&(id, _)| {
            let mut copy = Vec::new();
            trainee.with(id, &mut |w| copy = w.to_vec());
            (id, copy)
        })
        .collect()
}

/// The batches of an epoch, a pure function of seed and epoch.
fn batches(usable: &[usize], samples: &[Sample], plan: &TrainPlan, epoch: u64) -> Vec<Vec<usize>> {
    let mut random = Random::new(plan.seed ^ (epoch + 1).wrapping_mul(0x9e37_79b9));
    let mut order = usable.to_vec();
    random.shuffle(&mut order);
    let mut batches = Vec::new();
    for window in order.chunks_mut(SORT_WINDOW) {
        window.sort_by_key(|&i| samples[i].ids.len());
        batches.extend(pack(window, samples, plan.batch_tokens));
    }
    random.shuffle(&mut batches);
    batches
}

pub(super) fn pack(order: &[usize], samples: &[Sample], batch_tokens: usize) -> Vec<Vec<usize>> {
    let mut batches: Vec<Vec<usize>> = Vec::new();
    let mut room = 0;
    for &i in order {
        let n = samples[i].ids.len();
        if n > room || batches.is_empty() {
            batches.push(Vec::new());
            room = batch_tokens;
        }
        batches.last_mut().expect("just pushed").push(i);
        room = room.saturating_sub(n);
    }
    batches
}

/// Outputs of the frozen blocks below `first`, one (t, d) in bf16 a sample, kept after the first use while they fit.
///
/// They are rounded to bf16 at the first use too, so that a resumed job sees the same numbers as an unbroken one.
pub(super) struct LowerCache {
    first: usize,
    kept: Vec<Option<Vec<bf16>>>,
    room: usize,
}

impl LowerCache {
    pub fn new(first: usize, samples: usize, bytes: usize) -> Self {
        Self {
            first,
            kept: vec![None; samples],
            room: bytes,
        }
    }

    /// The input (t, d) of block `first` for a batch that stands in `rows`.
    fn outputs(
        &mut self,
        pool: &Pool,
        trainee: &Trainee,
        samples: &[Sample],
        batch: &[usize],
        rows: &PackedRows,
    ) -> Result<Vec<f32>, TrainError> {
        let model = &trainee.model;
        if self.first == 0 {
            return Ok(model.embed(&rows.ids(&ids_of(samples, batch)))?);
        }
        let d = model.config.hidden_size;
        let missing: Vec<usize> = batch
            .iter()
            .copied()
            .filter(|&i| self.kept[i].is_none())
            .collect();
        let mut fresh = std::collections::BTreeMap::new();
        if !missing.is_empty() {
            let rows = trainee.rows(samples, &missing);
            let mut x = model.embed(&rows.ids(&ids_of(samples, &missing)))?;
            model.blocks(pool, (0, self.first), &rows, None, &mut x, None);
            for (entry, &i) in missing.iter().enumerate() {
                let rounded: Vec<bf16> = rows.sequences[entry]
                    .iter()
                    .flat_map(|rows| &x[rows.start * d..rows.end * d])
                    .map(|x| bf16::from_f32(*x))
                    .collect();
                fresh.insert(i, rounded);
            }
        }
        let mut out = vec![0.0; rows.len() * d];
        for (entry, i) in batch.iter().enumerate() {
            let kept = self.kept[*i].as_ref().or_else(|| fresh.get(i));
            let mut rounded = kept.expect("kept or just computed").iter();
            for rows in &rows.sequences[entry] {
                let to = out[rows.start * d..rows.end * d].iter_mut();
                to.zip(&mut rounded).for_each(|(to, x)| *to = x.to_f32());
            }
        }
        for (i, rounded) in fresh {
            let bytes = 2 * rounded.len();
            if bytes <= self.room {
                self.room -= bytes;
                self.kept[i] = Some(rounded);
            }
        }
        Ok(out)
    }
}

/// Tokens a second over the recent past.
#[derive(Default)]
struct Speed {
    points: std::collections::VecDeque<(f64, u64)>,
}

impl Speed {
    fn push(&mut self, seconds: f64, tokens: u64) {
        self.points.push_back((seconds, tokens));
        if self.points.len() > 64 {
            self.points.pop_front();
        }
    }

    fn seconds_for(&self, tokens: u64) -> f64 {
        match (self.points.front(), self.points.back()) {
            (Some(a), Some(b)) if b.1 > a.1 => tokens as f64 * (b.0 - a.0) / (b.1 - a.1) as f64,
            _ => 0.0,
        }
    }
}
