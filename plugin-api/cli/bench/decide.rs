//! `locum bench decide`: how long the host waits for "who plays this step?", with the policy's hook, idle and while a student is made.

use std::time::{Duration, Instant};

use locum_core::locum::{DistilOptions, JobState};
use locum_core::policy::RecipeKnobs;
use locum_core::report::machine;
use serde_json::json;

use super::desk::Desk;
use crate::fail::Fail;
use crate::out::{Out, Table};
use crate::Place;

/// Decisions of each phase where `--tokens` does not say.
const DECISIONS: usize = 10_000;
/// Between two decisions: a host that asked without a break would measure warm caches only.
const HOST_PAUSE: Duration = Duration::from_micros(500);
const EPISODES: usize = 60;
/// Longest wait for the job's first step.
const START: Duration = Duration::from_secs(300);

pub fn run(args: &super::Args, place: &Place, out: &Out) -> Result<(), Fail> {
    let decisions = args.tokens().unwrap_or(DECISIONS).max(100);
    let desk = Desk::open(args, place, 8)?;
    for customer in 0..EPISODES {
        desk.teach(customer)?;
    }
    ask(&desk, 1000)?;
    let idle = ask(&desk, decisions)?;
    let job = desk.locum.distil_start(DistilOptions {
        knobs: RecipeKnobs {
            method: Some(args.method.name().into()),
            // More than it can reach: it is cancelled when the decisions are made.
            tokens: Some(1_000_000_000),
            ..RecipeKnobs::default()
        },
        trial: Some(false),
        ..DistilOptions::default()
    })?;
    let began = Instant::now();
    loop {
        let status = desk.locum.distil_status(job)?;
        if status.state == JobState::Training && status.tokens_done > 0 {
            break;
        }
        if !status.state.is_running() || began.elapsed() > START {
            return Err(Fail::Job {
                job,
                state: format!("{:?}", status.state),
                message: status.message,
            });
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let before = desk.locum.distil_status(job)?.tokens_done;
    let mut busy = ask(&desk, decisions)?;
    // A job tells how far it is twice a second; few decisions are over before that.
    let began = Instant::now();
    while desk.locum.distil_status(job)?.tokens_done == before && began.elapsed() < START {
        busy.extend(ask(&desk, decisions)?);
    }
    busy.sort_by(f64::total_cmp);
    let trained = desk
        .locum
        .distil_status(job)?
        .tokens_done
        .saturating_sub(before);
    desk.locum.distil_cancel(job)?;
    if trained == 0 {
        return Err(Fail::Missing {
            what: "the job trained nothing while decisions were asked".into(),
            next: "Ask for more decisions with --tokens.",
        });
    }
    let at = |us: &[f64], share: f64| us[((us.len() - 1) as f64 * share).round() as usize];
    let mut table = Table::new(&["", ">p50 µs", ">p99 µs", ">p99.9 µs", ">highest"]);
    for (name, us) in [("idle", &idle), ("while training", &busy)] {
        table.row([
            name.into(),
            format!("{:.1}", at(us, 0.5)),
            format!("{:.1}", at(us, 0.99)),
            format!("{:.1}", at(us, 0.999)),
            format!("{:.1}", at(us, 1.0)),
        ]);
    }
    let stats = desk.locum.stats();
    let hook = stats.hooks.iter().find(|h| h.hook == "decide");
    let machine = machine();
    out.table(&table);
    if let Some(hook) = hook {
        out.line(&format!(
            "the hook alone: {} calls, p50 {:.1} µs, p99 {:.1} µs, {} failures, {} busy",
            hook.calls, hook.p50_us, hook.p99_us, hook.failures, hook.busy
        ));
    }
    out.line(&format!(
        "{} decisions idle, {} beside a job, {trained} tokens trained meanwhile, policy {}; {}",
        idle.len(),
        busy.len(),
        stats.policy,
        machine.processor
    ));
    out.result(&json!({
        "idle_p50_us": at(&idle, 0.5), "idle_p99_us": at(&idle, 0.99), "idle_highest_us": at(&idle, 1.0),
        "training_p50_us": at(&busy, 0.5), "training_p99_us": at(&busy, 0.99), "training_highest_us": at(&busy, 1.0),
        "decisions": decisions, "trained_tokens": trained, "hook": hook, "machine": machine,
    }));
    Ok(())
}

/// Microseconds of so many decisions, in ascending order.
fn ask(desk: &Desk, decisions: usize) -> Result<Vec<f64>, Fail> {
    let visit = desk.visit(50_000)?;
    let request = desk.request(&visit);
    let mut all = Vec::with_capacity(decisions);
    for _ in 0..decisions {
        let began = Instant::now();
        desk.decide(&visit, &request)?;
        all.push(began.elapsed().as_secs_f64() * 1e6);
        std::thread::sleep(HOST_PAUSE);
    }
    desk.leave(visit)?;
    all.sort_by(f64::total_cmp);
    Ok(all)
}
