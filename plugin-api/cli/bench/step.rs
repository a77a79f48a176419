//! `locum bench step`: what a step costs late in an episode whose host sends the whole history every turn.

use locum_core::model::WeightFormat;
use locum_core::report::machine;
use serde_json::json;

use super::desk::{Desk, Step};
use super::{median, path, peak_bytes};
use crate::fail::Fail;
use crate::out::{Out, Table};
use crate::Place;

/// Turns of an episode. The first one reads the tools and is no step like the others, so the second is what the last is held against.
const TURNS: usize = 20;

pub fn run(args: &super::Args, place: &Place, out: &Out) -> Result<(), Fail> {
    let desk = Desk::open(args, place, args.tokens().unwrap_or(32).min(4096) as u32)?;
    let mut episodes = Vec::new();
    for run in 0..=args.runs.max(1) {
        let mut visit = desk.visit(run)?;
        let steps = (0..TURNS)
            .map(|_| desk.step(&mut visit))
            .collect::<Result<Vec<Step>, Fail>>()?;
        desk.leave(visit)?;
        episodes.push(steps);
    }
    // The first episode warms caches and clocks.
    episodes.remove(0);
    let mut table = Table::new(&[
        "turn",
        ">median ms",
        ">lowest",
        ">highest",
        ">read, tokens",
        ">cached",
        ">written",
    ]);
    let mut rows = Vec::new();
    for turn in [2, TURNS] {
        let steps: Vec<&Step> = episodes.iter().map(|e| &e[turn - 1]).collect();
        let mut ms: Vec<f64> = steps.iter().map(|s| s.ms).collect();
        ms.sort_by(f64::total_cmp);
        let middle = |count: &dyn Fn(&Step) -> usize| {
            let mut counts: Vec<usize> = steps.iter().map(|s| count(s)).collect();
            counts.sort_unstable();
            counts[counts.len() / 2]
        };
        let cached = middle(&|s| s.answer.cached_tokens);
        let read = middle(&|s| s.answer.prompt_ids.len() - s.answer.cached_tokens);
        let written = middle(&|s| s.answer.reply_ids.len());
        table.row([
            turn.to_string(),
            format!("{:.1}", median(&ms)),
            format!("{:.1}", ms[0]),
            format!("{:.1}", ms[ms.len() - 1]),
            read.to_string(),
            cached.to_string(),
            written.to_string(),
        ]);
        rows.push(json!({
            "turn": turn, "ms": median(&ms), "lowest_ms": ms[0], "highest_ms": ms[ms.len() - 1],
            "read_tokens": read, "cached_tokens": cached, "written_tokens": written,
        }));
    }
    let ms = |row: usize| rows[row]["ms"].as_f64().unwrap_or(0.0);
    let ratio = ms(1) / ms(0);
    let machine = machine();
    let format: WeightFormat = args.weights.first().copied().unwrap_or_default().into();
    out.table(&table);
    out.line(&format!(
        "turn {TURNS} takes {ratio:.2} of turn 2; {} episodes, {}, weights in {}; {}",
        episodes.len(),
        if args.turns {
            "the history as turns"
        } else {
            "the default view"
        },
        format.name(),
        machine.processor
    ));
    out.result(&json!({
        "turn_2_ms": ms(0), "turn_20_ms": ms(1), "ratio": ratio, "rows": rows, "episodes": episodes.len(), "turns": args.turns,
        "weights": format.name(), "kernels": path(format), "peak_bytes": peak_bytes(), "machine": machine,
    }));
    Ok(())
}
