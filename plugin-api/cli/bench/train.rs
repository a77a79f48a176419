//! `locum bench train`: steps of a distillation on synthetic rows, loss on every token.

use std::time::Instant;

use clap::ValueEnum;
use locum_core::kernels::{f32_limit, features, Pool};
use locum_core::model::{Compute, Config, Model, LINEARS};
use locum_core::policy::RecipeKnobs;
use locum_core::report::machine;
use locum_core::train::{self, fit, Flow, Memory, Sample, TrainError, TrainPlan};
use serde_json::json;

use super::{median, peak_bytes, Args, Loaded};
use crate::fail::Fail;
use crate::out::Out;
use crate::Place;

#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub enum Method {
    Lora,
    Upper,
    Full,
}

impl Method {
    pub fn name(self) -> &'static str {
        match self {
            Method::Lora => "lora",
            Method::Upper => "upper",
            Method::Full => "full",
        }
    }
}

/// Rows of one step, and tokens of one row where `--tokens` does not say.
const ROWS: usize = 4;
const TOKENS: usize = 512;

pub fn run(args: &Args, place: &Place, out: &Out) -> Result<(), Fail> {
    let Loaded { model, name, .. } = args.load(place)?;
    let pool = args.pool();
    let tokens = args
        .tokens()
        .unwrap_or(TOKENS)
        .clamp(2, model.max_positions());
    let vocab = model.config.vocab_size as u64;
    // All rows begin with so many tokens, and their loss stands behind them.
    let shared = tokens * usize::from(args.shared) / 100;
    let token = |row: usize, i: usize| {
        let row = if i < shared { 0 } else { row };
        (((row * tokens + i) as u64 * 7919 + 101) % vocab) as u32
    };
    let samples: Vec<Sample> = (0..2 * ROWS)
        .map(|row| Sample {
            ids: (0..tokens).map(|i| token(row, i)).collect(),
            target_start: shared.max(1),
            weight: 1.0,
            ..Sample::default()
        })
        .collect();
    let method = args.method.name();
    let knobs = RecipeKnobs {
        method: Some(method.into()),
        batch_tokens: Some(ROWS * tokens),
        tokens: Some(1_000_000_000),
        compute: args.compute.clone(),
        memory_mib: args.memory_mib,
        ..RecipeKnobs::default()
    };
    let config = model.config.clone();
    let mut plan = TrainPlan::from_knobs(&model.config, tokens, &knobs)
        .map_err(locum_core::error::Error::from)?;
    plan.evaluations = 0;
    let runs = args.runs.max(1);
    let whole = match shared {
        0 => None,
        _ => {
            plan.share_beginnings = false;
            Some(steps(&pool, model.clone(), &samples, &plan, runs)?.seconds)
        }
    };
    plan.share_beginnings = true;
    let Steps {
        seconds: steady,
        losses,
        saved,
    } = steps(&pool, model, &samples, &plan, runs)?;
    let per_step = (ROWS * tokens) as f64;
    let tok_s = per_step / median(&steady);
    let gflop_s = flop(&config, &plan, tokens, shared) * tok_s / per_step / 1e9;
    let memory = Memory::of(&plan, &config, ROWS * tokens, tokens, 2 * ROWS * tokens);
    let again = memory
        .inputs_only(plan.memory_bytes)
        .map_err(locum_core::error::Error::from)?;
    let peak = peak_bytes();
    let limit = f32_limit(&pool) / 1e9;
    let path = match (plan.compute, features()) {
        (Compute::Bf16, f) if f.avx512_bf16_full_rate => "bf16, VDPBF16PS",
        (_, f) if f.avx512 => "f32, AVX-512",
        (_, f) if f.avx2_fma => "f32, AVX2",
        _ => "f32, scalar",
    };
    let machine = machine();
    out.line(&format!(
        "{method}, {ROWS} x {tokens} tokens a step, {path}: {tok_s:.0} tok/s ({:.0} to {:.0})",
        per_step / steady[steady.len() - 1],
        per_step / steady[0],
    ));
    let faster = whole.map(|whole| median(&whole) / median(&steady));
    if let Some(faster) = faster {
        out.line(&format!(
            "{saved:.0} tokens a step were computed for another row already: {faster:.2} times as fast as each row whole"
        ));
    }
    out.line(&format!(
        "{gflop_s:.0} GFLOP/s of needed arithmetic, {:.0} % of the {limit:.0} GFLOP/s that this machine reaches in f32 registers",
        100.0 * gflop_s / limit
    ));
    out.line(&format!(
        "at most {:.0} MiB in memory; {again} of {} blocks computed again in the backward pass",
        peak as f64 / (1u64 << 20) as f64,
        memory.blocks
    ));
    out.line(&format!(
        "{name}; {} threads on {}",
        pool.threads(),
        machine.processor
    ));
    out.result(&json!({
        "tok_s": tok_s, "lowest": per_step / steady[steady.len() - 1], "highest": per_step / steady[0],
        "method": method, "rows": ROWS, "tokens": tokens, "compute": plan.compute, "losses": losses,
        "shared": shared, "tokens_saved": saved, "times_as_fast": faster,
        "threads": pool.threads(), "peak_bytes": peak, "path": path, "gflop_s": gflop_s,
        "f32_limit_gflop_s": limit, "share_of_limit": gflop_s / limit, "blocks_again": again, "estimate": {
            "least_bytes": memory.least(), "most_bytes": memory.most(),
        }, "model": name, "machine": machine,
    }));
    Ok(())
}

/// Steps of a training that was stopped after so many.
struct Steps {
    /// Sorted, without the first ones: those fill the cache of the frozen layers' outputs.
    seconds: Vec<f64>,
    losses: Vec<f64>,
    /// Tokens a step that were not computed.
    saved: f64,
}

fn steps(
    pool: &Pool,
    model: Model,
    samples: &[Sample],
    plan: &TrainPlan,
    runs: usize,
) -> Result<Steps, Fail> {
    // An epoch has two.
    let warm = 2;
    let (mut seconds, mut losses, mut saved) = (Vec::new(), Vec::new(), 0);
    let mut last = Instant::now();
    let ended = fit(
        pool,
        model,
        samples,
        &[],
        "bench",
        plan,
        None,
        &mut |progress| {
            seconds.push(last.elapsed().as_secs_f64());
            losses.push(progress.loss);
            saved = progress.tokens_shared;
            last = Instant::now();
            match seconds.len() < warm + runs {
                true => Flow::Go,
                false => Flow::Stop,
            }
        },
    );
    match ended {
        Ok(_) | Err(TrainError::Cancelled) => {}
        Err(error) => return Err(locum_core::error::Error::from(error).into()),
    }
    let saved = saved as f64 / seconds.len() as f64;
    let mut seconds = seconds.split_off(warm.min(seconds.len()));
    seconds.sort_by(f64::total_cmp);
    Ok(Steps {
        seconds,
        losses,
        saved,
    })
}

/// Floating-point operations that a step cannot do without, a multiplication and an addition counted as two. What a training computes
/// a second time to save memory does not count; what its rows begin with counts once.
fn flop(config: &Config, plan: &TrainPlan, tokens: usize, shared: usize) -> f64 {
    let c = config;
    let rows = (ROWS * tokens - (ROWS - 1) * shared) as f64;
    let blocks = (c.num_hidden_layers - plan.first_block(c)) as f64;
    let matrices: f64 = LINEARS
        .iter()
        .map(|p| p.shape(c).iter().product::<usize>() as f64)
        .sum();
    // A product forward and one for the gradient of its input, and one for the gradient of its weights where they train.
    let (of_matrices, of_head) = match plan.method {
        train::Method::Full => (3.0, 3.0),
        train::Method::Upper { .. } => (3.0, 2.0),
        train::Method::Lora { .. } => (2.0, 2.0),
    };
    let narrow = match plan.method {
        // Two products forward and four backward.
        train::Method::Lora { rank, .. } => LINEARS
            .iter()
            .map(|p| p.shape(c).iter().sum::<usize>() as f64 * rank as f64 * 6.0)
            .sum(),
        _ => 0.0,
    };
    // Two products over the lower triangle forward, five backward.
    let pairs = (ROWS * tokens.pow(2) - (ROWS - 1) * shared.pow(2)) as f64;
    let attention = 7.0 * c.q_size() as f64 * pairs;
    let labels = (ROWS * (tokens - shared)) as f64;
    let head = of_head * 2.0 * (c.hidden_size * c.vocab_size) as f64 * labels;
    blocks * (of_matrices * 2.0 * matrices * rows + narrow * rows + attention) + head
}
