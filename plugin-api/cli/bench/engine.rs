//! Prefill, decode and batched decode on the model itself, each format of weights in turn.

use std::hint::black_box;

use locum_core::kernels::Pool;
use locum_core::model::{Model, Sequence, WeightFormat};
use locum_core::report::machine;
use serde_json::{json, Value};

use super::{median, path, peak_bytes, timed, Args, Loaded, Weights, What};
use crate::fail::Fail;
use crate::out::{Out, Table};
use crate::Place;

/// Sequences that decode together in `batch`.
const SEQUENCES: usize = 8;
/// Tokens read before each of them writes.
const BATCH_PROMPT: usize = 128;

pub fn run(args: &Args, place: &Place, out: &Out) -> Result<(), Fail> {
    let Loaded { model, name, .. } = args.load(place)?;
    let pool = args.pool();
    let all = [What::Prefill, What::Decode, What::Batch];
    let whats = args.what.map_or(all.to_vec(), |w| vec![w]);
    let mut table = Table::new(&[
        "",
        "weights",
        ">tok/s",
        ">lowest",
        ">highest",
        ">MB",
        ">GB/s of weights",
        "kernels",
    ]);
    let mut rows = Vec::new();
    for format in args.formats(&[Weights::Bf16, Weights::Q8, Weights::Q4]) {
        let model = model.clone().packed(format);
        for &what in &whats {
            let row = measure(args, &model, format, what, &pool);
            table.row([
                row["what"].as_str().unwrap_or("").into(),
                format.name().into(),
                format!("{:.0}", row["tok_s"].as_f64().unwrap_or(0.0)),
                format!("{:.0}", row["lowest"].as_f64().unwrap_or(0.0)),
                format!("{:.0}", row["highest"].as_f64().unwrap_or(0.0)),
                format!("{:.0}", model.weight_bytes() as f64 / 1e6),
                row["weight_gb_s"]
                    .as_f64()
                    .map_or(String::new(), |s| format!("{s:.1}")),
                path(format).into(),
            ]);
            rows.push(row);
        }
    }
    let machine = machine();
    out.table(&table);
    out.line(&format!(
        "{name}; {} threads on {} ({} cores); medians of {}",
        pool.threads(),
        machine.processor,
        machine.cores,
        args.runs.max(1)
    ));
    let tok_s = rows.first().map(|r| r["tok_s"].clone());
    out.result(&json!({
        "tok_s": tok_s, "rows": rows, "threads": pool.threads(), "model": name,
        "peak_bytes": peak_bytes(), "machine": machine,
    }));
    Ok(())
}

fn measure(args: &Args, model: &Model, format: WeightFormat, what: What, pool: &Pool) -> Value {
    let vocab = model.config.vocab_size as u64;
    // Numbers that wander through the vocabulary; arithmetic does not depend on which.
    let token = |i: usize| ((i as u64 * 7919 + 101) % vocab) as u32;
    let room = model.max_positions();
    let (name, tokens, seconds, steps) = match what {
        What::Decode => {
            let tokens = args.tokens.unwrap_or(128).clamp(1, room - 32);
            let prompt: Vec<u32> = (0..32).map(token).collect();
            let seconds = timed_decode(args.runs, pool, model, &[prompt], tokens);
            (format!("decode {tokens}"), tokens, seconds, Some(tokens))
        }
        What::Batch => {
            let tokens = args.tokens.unwrap_or(64).clamp(1, room - BATCH_PROMPT);
            let prompts: Vec<Vec<u32>> = (0..SEQUENCES)
                .map(|s| (0..BATCH_PROMPT).map(|i| token(i + 1000 * s)).collect())
                .collect();
            let seconds = timed_decode(args.runs, pool, model, &prompts, tokens);
            (
                format!("decode {SEQUENCES} x {tokens}"),
                SEQUENCES * tokens,
                seconds,
                Some(tokens),
            )
        }
        _ => {
            let tokens = args.tokens.unwrap_or(512).clamp(1, room);
            let prompt: Vec<u32> = (0..tokens).map(token).collect();
            let seconds = timed(args.runs, || {
                let mut sequence = Sequence::new(&model.config, tokens);
                let hidden = model
                    .step(pool, &mut [(&mut sequence, &prompt)])
                    .expect("tokens of the vocabulary");
                black_box(model.logits(pool, &hidden, &[tokens - 1]));
            });
            (format!("prefill {tokens}"), tokens, seconds, None)
        }
    };
    let speed = |s: f64| tokens as f64 / s;
    // A step of decoding reads every weight once.
    let weight_gb_s =
        steps.map(|n| model.weight_bytes() as f64 * n as f64 / median(&seconds) / 1e9);
    json!({
        "what": name, "weights": format.name(), "tok_s": speed(median(&seconds)),
        "lowest": speed(seconds[seconds.len() - 1]), "highest": speed(seconds[0]),
        "weight_bytes": model.weight_bytes(), "weight_gb_s": weight_gb_s, "kernels": path(format),
    })
}

/// Seconds that sequences with these prompts take to write `tokens` each, greedily; reading the prompts is not counted.
fn timed_decode(
    runs: usize,
    pool: &Pool,
    model: &Model,
    prompts: &[Vec<u32>],
    tokens: usize,
) -> Vec<f64> {
    let room = prompts.iter().map(Vec::len).max().unwrap_or(0) + tokens + 1;
    let read: Vec<Sequence> = prompts
        .iter()
        .map(|prompt| {
            let mut sequence = Sequence::new(&model.config, room);
            model
                .step(pool, &mut [(&mut sequence, prompt)])
                .expect("tokens of the vocabulary");
            sequence
        })
        .collect();
    let rows: Vec<usize> = (0..prompts.len()).collect();
    let copies: Vec<Vec<Sequence>> = (0..=runs.max(1)).map(|_| read.clone()).collect();
    let mut copies = copies.into_iter();
    timed(runs, || {
        let mut sequences = copies.next().expect("one copy a run");
        let mut last = vec![1u32; sequences.len()];
        for _ in 0..tokens {
            let mut batch: Vec<(&mut Sequence, &[u32])> =
                sequences.iter_mut().zip(last.chunks(1)).collect();
            let hidden = model
                .step(pool, &mut batch)
                .expect("tokens of the vocabulary");
            let logits = model.logits(pool, &hidden, &rows);
            for (last, logits) in last.iter_mut().zip(logits.chunks(model.config.vocab_size)) {
                *last = likeliest(logits);
            }
        }
        black_box(last);
    })
}

fn likeliest(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (i, x) in logits.iter().enumerate() {
        if *x > logits[best] {
            best = i;
        }
    }
    best as u32
}
