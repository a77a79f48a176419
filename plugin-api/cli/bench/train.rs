//! `locum bench train`: steps of a distillation on synthetic rows, loss on every token.

use std::time::Instant;

use clap::ValueEnum;
use locum_core::policy::RecipeKnobs;
use locum_core::report::machine;
use locum_core::train::{fit, Flow, Sample, TrainError, TrainPlan};
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
        .tokens
        .unwrap_or(TOKENS)
        .clamp(2, model.max_positions());
    let vocab = model.config.vocab_size as u64;
    let samples: Vec<Sample> = (0..2 * ROWS)
        .map(|row| Sample {
            ids: (0..tokens)
                .map(|i| (((row * tokens + i) as u64 * 7919 + 101) % vocab) as u32)
                .collect(),
            target_start: 1,
            weight: 1.0,
        })
        .collect();
    let method = args.method.name();
    let knobs = RecipeKnobs {
        method: Some(method.into()),
        batch_tokens: Some(ROWS * tokens),
        tokens: Some(1_000_000_000),
        compute: args.compute.clone(),
        ..RecipeKnobs::default()
    };
    let mut plan = TrainPlan::from_knobs(&model.config, tokens, &knobs)
        .map_err(locum_core::error::Error::from)?;
    plan.evaluations = 0;
    // The first epoch fills the cache of the frozen layers' outputs and is left out.
    let warm = 2;
    let mut seconds = Vec::new();
    let mut last = Instant::now();
    let mut losses = Vec::new();
    let ended = fit(
        &pool,
        &model,
        &samples,
        &[],
        "bench",
        &plan,
        None,
        &mut |progress| {
            seconds.push(last.elapsed().as_secs_f64());
            losses.push(progress.loss);
            last = Instant::now();
            match seconds.len() < warm + args.runs.max(1) {
                true => Flow::Go,
                false => Flow::Stop,
            }
        },
    );
    match ended {
        Ok(_) | Err(TrainError::Cancelled) => {}
        Err(error) => return Err(locum_core::error::Error::from(error).into()),
    }
    let mut steady = seconds.split_off(warm.min(seconds.len()));
    steady.sort_by(f64::total_cmp);
    let per_step = (ROWS * tokens) as f64;
    let tok_s = per_step / median(&steady);
    let machine = machine();
    out.line(&format!(
        "{method}, {ROWS} x {tokens} tokens a step, products in {:?}: {tok_s:.0} tok/s ({:.0} to {:.0}), at most {:.2} GiB in memory",
        plan.compute,
        per_step / steady[steady.len() - 1],
        per_step / steady[0],
        peak_bytes() as f64 / (1u64 << 30) as f64,
    ));
    out.line(&format!(
        "{name}; {} threads on {}",
        pool.threads(),
        machine.processor
    ));
    out.result(&json!({
        "tok_s": tok_s, "lowest": per_step / steady[steady.len() - 1], "highest": per_step / steady[0],
        "method": method, "rows": ROWS, "tokens": tokens, "compute": plan.compute, "losses": losses,
        "threads": pool.threads(), "peak_bytes": peak_bytes(), "model": name, "machine": machine,
    }));
    Ok(())
}
