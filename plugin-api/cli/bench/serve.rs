//! `locum bench serve-while-training`: what a step waits for a distillation in the same process.

use std::time::{Duration, Instant};

use locum_core::locum::{DistilOptions, JobState};
use locum_core::model::WeightFormat;
use locum_core::policy::RecipeKnobs;
use locum_core::report::machine;
use serde_json::json;

use super::desk::Desk;
use super::{path, peak_bytes};
use crate::fail::Fail;
use crate::out::{Out, Table};
use crate::Place;

/// Steps of each phase where `--tokens` does not say.
const STEPS: usize = 200;
/// Steps of one episode.
const TURNS: usize = 10;
/// Tokens of one answer at most.
const REPLY: u32 = 32;
/// Recorded episodes that the job trains on.
const EPISODES: usize = 60;
/// What the host does between two steps. A training waits while a step is decided, so a host that asked without a break would be
/// compared with an idle machine twice.
const HOST_PAUSE: Duration = Duration::from_millis(100);
/// Longest wait for the job's first step.
const START: Duration = Duration::from_secs(300);

pub fn run(args: &super::Args, place: &Place, out: &Out) -> Result<(), Fail> {
    let steps = args.tokens().unwrap_or(STEPS).max(1);
    let desk = Desk::open(args, place, REPLY)?;
    for customer in 0..EPISODES {
        desk.teach(customer)?;
    }
    serve(&desk, 10_000, TURNS, &|| Ok(()))?;
    let idle = serve(&desk, 20_000, steps, &|| Ok(()))?;
    let job = desk.locum.distil_start(DistilOptions {
        knobs: RecipeKnobs {
            method: Some(args.method.name().into()),
            compute: args.compute.clone(),
            // More than it can reach: it is cancelled when the steps are done.
            tokens: Some(1_000_000_000),
            ..RecipeKnobs::default()
        },
        trial: Some(false),
        ..DistilOptions::default()
    })?;
    let training = || -> Result<bool, Fail> {
        let status = desk.locum.distil_status(job)?;
        match status.state {
            JobState::Training => Ok(status.tokens_done > 0),
            JobState::Queued | JobState::Curating => Ok(false),
            state => Err(Fail::Job {
                job,
                state: format!("{state:?}"),
                message: status.message,
            }),
        }
    };
    let began = Instant::now();
    while !training()? {
        if began.elapsed() > START {
            return Err(Fail::Missing {
                what: format!("the job trained nothing within {} s", START.as_secs()),
                next: "Try a smaller model.",
            });
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let before = desk.locum.distil_status(job)?;
    let began = Instant::now();
    let busy = serve(&desk, 30_000, steps, &|| training().map(|_| ()))?;
    let seconds = began.elapsed().as_secs_f64();
    let after = desk.locum.distil_status(job)?;
    let trained = after.tokens_done.saturating_sub(before.tokens_done) as f64 / seconds;
    desk.locum.distil_cancel(job)?;
    if trained == 0.0 {
        return Err(Fail::Missing {
            what: "the job trained nothing while steps were asked, so there is nothing to compare"
                .into(),
            next: "Ask for more steps with --tokens.",
        });
    }
    let mut table = Table::new(&["", ">p50 ms", ">p99 ms", ">highest"]);
    let at = |ms: &[f64], share: f64| ms[((ms.len() - 1) as f64 * share).round() as usize];
    for (name, ms) in [("idle", &idle), ("while training", &busy)] {
        table.row([
            name.into(),
            format!("{:.1}", at(ms, 0.5)),
            format!("{:.1}", at(ms, 0.99)),
            format!("{:.1}", at(ms, 1.0)),
        ]);
    }
    let ratio = at(&busy, 0.99) / at(&idle, 0.99);
    let machine = machine();
    let format: WeightFormat = args.weights.first().copied().unwrap_or_default().into();
    out.table(&table);
    out.line(&format!(
        "p99 while training is {ratio:.2} of idle; {steps} steps each, {trained:.0} tok/s trained ({}) meanwhile, weights in {}; {}",
        args.method.name(),
        format.name(),
        machine.processor
    ));
    out.result(&json!({
        "idle_p50_ms": at(&idle, 0.5), "idle_p99_ms": at(&idle, 0.99), "idle_highest_ms": at(&idle, 1.0),
        "training_p50_ms": at(&busy, 0.5), "training_p99_ms": at(&busy, 0.99), "training_highest_ms": at(&busy, 1.0),
        "ratio": ratio, "steps": steps, "trained_tok_s": trained, "method": args.method.name(),
        "weights": format.name(), "kernels": path(format), "peak_bytes": peak_bytes(), "machine": machine,
    }));
    Ok(())
}

/// Milliseconds of this many steps, in ascending order; `check` is asked after each.
fn serve(
    desk: &Desk,
    customer: usize,
    steps: usize,
    check: &dyn Fn() -> Result<(), Fail>,
) -> Result<Vec<f64>, Fail> {
    let mut all = Vec::with_capacity(steps);
    for episode in 0..steps.div_ceil(TURNS) {
        let mut visit = desk.visit(customer + episode)?;
        for _ in 0..TURNS.min(steps - all.len()) {
            all.push(desk.step(&mut visit)?.ms);
            check()?;
            std::thread::sleep(HOST_PAUSE);
        }
        desk.leave(visit)?;
    }
    all.sort_by(f64::total_cmp);
    Ok(all)
}
