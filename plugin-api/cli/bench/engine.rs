//! Prefill, decode and batched decode on the model itself, each format of weights in turn, beside the machine's own limits.

use std::hint::black_box;
use std::time::Instant;

use locum_core::kernels::Pool;
use locum_core::model::{Config, Model, ParamId, Sequence, WeightFormat, LINEARS};
use locum_core::report::machine;
use serde_json::{json, Value};

use super::limits::Limits;
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
        ">of the limit",
        "kernels",
    ]);
    let mut rows = Vec::new();
    for format in args.formats(&[Weights::Bf16, Weights::Q8, Weights::Q4]) {
        let model = model.clone().packed(format);
        for &what in &whats {
            rows.push((format, measure(args, &model, format, what, &pool)));
        }
    }
    let peak_bytes = peak_bytes();
    let limits = Limits::measure(pool.threads());
    for (format, row) in &mut rows {
        let number = |key: &str| row[key].as_f64();
        let limit = match row["gop_s"].is_null() {
            true => Some(limits.read_gb_s),
            false => limits.arithmetic(*format),
        };
        let share = number("gop_s")
            .or(number("weight_gb_s"))
            .zip(limit)
            .map(|(rate, limit)| rate / limit);
        let percent = |share: f64| format!("{:.0} %", 100.0 * share);
        table.row([
            row["what"].as_str().unwrap_or("").into(),
            format.name().into(),
            format!("{:.0}", number("tok_s").unwrap_or(0.0)),
            format!("{:.0}", number("lowest").unwrap_or(0.0)),
            format!("{:.0}", number("highest").unwrap_or(0.0)),
            format!("{:.0}", number("weight_bytes").unwrap_or(0.0) / 1e6),
            number("weight_gb_s").map_or(String::new(), |s| format!("{s:.1}")),
            share.map_or(String::new(), percent),
            row["kernels"].as_str().unwrap_or("").into(),
        ]);
        row["limit_share"] = json!(share);
    }
    let rows: Vec<Value> = rows.into_iter().map(|(_, row)| row).collect();
    let machine = machine();
    out.table(&table);
    out.line(&format!(
        "{name}; {} threads on {} ({} cores); medians of {}",
        pool.threads(),
        machine.processor,
        machine.cores,
        args.runs.max(1)
    ));
    let gops = |x: Option<f64>| x.map_or("-".into(), |x| format!("{x:.0}"));
    out.line(&format!(
        "limits measured here: {:.1} GB/s read; 10^9 operations a second: f32 {}, bf16 {}, int8 {}",
        limits.read_gb_s,
        gops(limits.f32_gflop_s),
        gops(limits.bf16_gflop_s),
        gops(limits.int8_gop_s)
    ));
    let tok_s = rows.first().map(|r| r["tok_s"].clone());
    out.result(&json!({
        "tok_s": tok_s, "rows": rows, "threads": pool.threads(), "model": name,
        "peak_bytes": peak_bytes, "limits": limits, "machine": machine,
    }));
    Ok(())
}

fn measure(args: &Args, model: &Model, format: WeightFormat, what: What, pool: &Pool) -> Value {
    let vocab = model.config.vocab_size as u64;
    // Numbers that wander through the vocabulary; arithmetic does not depend on which.
    let token = |i: usize| ((i as u64 * 7919 + 101) % vocab) as u32;
    let room = model.max_positions();
    let mut extra = json!({});
    let (name, tokens, seconds, steps) = match what {
        What::Decode => {
            let tokens = args.tokens().unwrap_or(128).clamp(1, room - 32);
            let prompt: Vec<u32> = (0..32).map(token).collect();
            let timed = timed_decode(args.runs, pool, model, &[prompt], tokens);
            let seconds = sorted(timed.iter().map(|t| t.write));
            (format!("decode {tokens}"), tokens, seconds, Some(tokens))
        }
        What::Batch => {
            let tokens = args.tokens().unwrap_or(64).clamp(1, room - BATCH_PROMPT);
            let prompts: Vec<Vec<u32>> = (0..SEQUENCES)
                .map(|s| (0..BATCH_PROMPT).map(|i| token(i + 1000 * s)).collect())
                .collect();
            let timed = timed_decode(args.runs, pool, model, &prompts, tokens);
            let seconds = sorted(timed.iter().map(|t| t.write));
            let whole = sorted(timed.iter().map(|t| t.read + t.write));
            let written = SEQUENCES * tokens;
            extra = json!({ "with_prefill_tok_s": written as f64 / median(&whole) });
            (
                format!("decode {SEQUENCES} x {tokens}"),
                written,
                seconds,
                Some(tokens),
            )
        }
        _ => {
            let tokens = args.tokens().unwrap_or(512).clamp(1, room);
            let prompt: Vec<u32> = (0..tokens).map(token).collect();
            let seconds = timed(args.runs, || {
                let mut sequence = Sequence::new(&model.config, tokens);
                let hidden = model
                    .step(pool, &mut [(&mut sequence, &prompt)])
                    .expect("tokens of the vocabulary");
                black_box(model.logits(pool, &hidden, &[tokens - 1]));
            });
            extra = json!({ "gop_s": prefill_ops(&model.config, tokens) / median(&seconds) / 1e9 });
            (format!("prefill {tokens}"), tokens, seconds, None)
        }
    };
    let speed = |s: f64| tokens as f64 / s;
    // A step of decoding reads every weight once.
    let weight_gb_s =
        steps.map(|n| model.weight_bytes() as f64 * n as f64 / median(&seconds) / 1e9);
    let mut row = json!({
        "what": name, "weights": format.name(), "tok_s": speed(median(&seconds)),
        "lowest": speed(seconds[seconds.len() - 1]), "highest": speed(seconds[0]),
        "weight_bytes": model.weight_bytes(), "weight_gb_s": weight_gb_s, "kernels": path(format),
    });
    if let (Some(row), Some(extra)) = (row.as_object_mut(), extra.as_object()) {
        row.extend(extra.clone());
    }
    row
}

/// Multiplications and additions of a prompt: the matrices of the blocks for every token, causal attention, the head for one token.
fn prefill_ops(config: &Config, tokens: usize) -> f64 {
    let ids = ParamId::all(config).into_iter();
    let size = |id: ParamId| id.shape(config).iter().product::<usize>();
    let blocks: usize = ids
        .filter(|id| matches!(id, ParamId::Layer(_, p) if LINEARS.contains(p)))
        .map(size)
        .sum();
    let attention = config.num_hidden_layers * tokens * tokens * config.q_size();
    let head = config.vocab_size * config.hidden_size;
    2.0 * (tokens * blocks + attention + head) as f64
}

/// Seconds in which sequences read their prompts together, and write.
struct Answered {
    read: f64,
    write: f64,
}

fn sorted(seconds: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut seconds: Vec<f64> = seconds.collect();
    seconds.sort_by(f64::total_cmp);
    seconds
}

/// Sequences with these prompts write `tokens` each, greedily, one a step in one batch; a run that warms caches and clocks is left out.
fn timed_decode(
    runs: usize,
    pool: &Pool,
    model: &Model,
    prompts: &[Vec<u32>],
    tokens: usize,
) -> Vec<Answered> {
    let room = prompts.iter().map(Vec::len).max().unwrap_or(0) + tokens + 1;
    let ends: Vec<usize> = prompts
        .iter()
        .scan(0, |end, prompt| {
            *end += prompt.len();
            Some(*end - 1)
        })
        .collect();
    let rows: Vec<usize> = (0..prompts.len()).collect();
    let vocab = model.config.vocab_size;
    let once = || {
        let mut sequences: Vec<Sequence> = prompts
            .iter()
            .map(|_| Sequence::new(&model.config, room))
            .collect();
        let began = Instant::now();
        let mut batch: Vec<(&mut Sequence, &[u32])> = sequences
            .iter_mut()
            .zip(prompts)
            .map(|(s, p)| (s, p.as_slice()))
            .collect();
        let hidden = model
            .step(pool, &mut batch)
            .expect("tokens of the vocabulary");
        let logits = model.logits(pool, &hidden, &ends);
        let mut last: Vec<u32> = logits.chunks(vocab).map(likeliest).collect();
        let read = began.elapsed().as_secs_f64();
        let began = Instant::now();
        for _ in 0..tokens {
            let mut batch: Vec<(&mut Sequence, &[u32])> =
                sequences.iter_mut().zip(last.chunks(1)).collect();
            let hidden = model
                .step(pool, &mut batch)
                .expect("tokens of the vocabulary");
            let logits = model.logits(pool, &hidden, &rows);
            last = logits.chunks(vocab).map(likeliest).collect();
        }
        black_box(last);
        Answered {
            read,
            write: began.elapsed().as_secs_f64(),
        }
    };
    once();
    (0..runs.max(1)).map(|_| once()).collect()
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
