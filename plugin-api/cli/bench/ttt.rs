//! `locum bench ttt`: what learning while reading costs, in prefill, per token, and at the edges of chunks.

use std::hint::black_box;
use std::time::Instant;

use locum_core::kernels::Pool;
use locum_core::model::{Model, Sequence};
use locum_core::report::machine;
use locum_core::ttt::Forgetting;
use serde_json::{json, Value};

use super::learner::{must_have_learned, student};
use super::{median, path, peak_bytes, Args, Loaded, Weights};
use crate::fail::Fail;
use crate::out::{Out, Table};
use crate::Place;

/// Lengths of the prompts that are read.
const PROMPTS: [usize; 2] = [512, 2048];
/// Tokens written where `--tokens` does not say: past four edges.
const TOKENS: usize = 1024;
/// Tokens read before: past an edge, so that the weight that is read is one that learned.
const BEFORE: usize = 384;

pub fn run(args: &Args, place: &Place, out: &Out) -> Result<(), Fail> {
    let Loaded { model, name, .. } = args.load(place)?;
    let forgets = match (args.decay, args.delta) {
        (Some(kept), _) => Forgetting::Decay(kept),
        (None, Some(strength)) => Forgetting::Delta(strength),
        (None, None) => Forgetting::Nothing,
    };
    let model = student(model, forgets)?;
    let chunk = model.config.ttt.as_ref().map_or(1, |ttt| ttt.chunk_len);
    // Half a chunk past the last edge, for some updates are made a token late.
    let tokens = args.tokens().unwrap_or(TOKENS) / chunk * chunk;
    let longest = PROMPTS[1].max(BEFORE + tokens).max(model.max_positions());
    let model = model.with_positions(longest);
    let pool = args.pool();
    if tokens < 3 * chunk {
        return Err(Fail::Missing {
            what: format!("{tokens} tokens do not go past three edges of chunks of {chunk}"),
            next: "Ask for more with --tokens.",
        });
    }
    let mut table = Table::new(&["weights", "", ">off", ">on", ">on / off"]);
    let mut rows = Vec::new();
    for format in args.formats(&[Weights::Q8]) {
        let model = model.clone().packed(format);
        let mut prefills = Vec::new();
        for prompt in PROMPTS {
            let [off, on, pairs] = prefill(args.runs, &pool, &model, prompt)?;
            table.row([
                format.name().into(),
                format!("prefill {prompt}, ms"),
                format!("{:.1}", 1e3 * off),
                format!("{:.1}", 1e3 * on),
                format!("{pairs:.3}"),
            ]);
            prefills.push(json!({
                "tokens": prompt, "off_ms": 1e3 * off, "on_ms": 1e3 * on,
                "ratio": on / off, "ratio_of_pairs": pairs,
            }));
        }
        let decode = decode(args.runs, &pool, &model, tokens, chunk)?;
        let number = |key: &str| decode[key].as_f64().unwrap_or(0.0);
        for (what, off, on, ratio) in [
            ("token, mean ms", "off_mean_ms", "on_mean_ms", "mean_ratio"),
            ("token, p50 ms", "off_p50_ms", "on_p50_ms", "p50_ratio"),
            ("token, p99 ms", "off_p99_ms", "on_p99_ms", "p99_ratio"),
            ("at an edge, ms", "on_p50_ms", "edge_ms", "edge_ratio"),
            (
                "longest edge, ms",
                "on_p50_ms",
                "longest_edge_ms",
                "longest_edge_ratio",
            ),
        ] {
            table.row([
                format.name().into(),
                what.into(),
                format!("{:.3}", number(off)),
                format!("{:.3}", number(on)),
                format!("{:.3}", number(ratio)),
            ]);
        }
        rows.push(json!({
            "weights": format.name(), "kernels": path(format), "prefill": prefills, "decode": decode,
        }));
    }
    let machine = machine();
    out.table(&table);
    out.line(&format!(
        "{name}; {} of {} layers learn, chunks of {chunk}{}; {} threads on {}; on and off in turn, medians of {}",
        model.config.ttt.as_ref().map_or(0, |ttt| ttt.layers.len()),
        model.config.num_hidden_layers,
        match forgets {
            Forgetting::Nothing => String::new(),
            Forgetting::Decay(kept) => format!(", a decay of {kept}"),
            Forgetting::Delta(strength) => format!(", a delta rule of {strength}"),
        },
        pool.threads(),
        machine.processor,
        args.runs.max(1),
    ));
    out.result(&json!({
        "rows": rows, "threads": pool.threads(), "runs": args.runs.max(1), "chunk": chunk, "model": name,
        "peak_bytes": peak_bytes(), "machine": machine,
    }));
    Ok(())
}

/// Tokens that wander through the vocabulary.
pub fn text(model: &Model, len: usize) -> Vec<u32> {
    let vocab = model.config.vocab_size as u64;
    (0..len as u64)
        .map(|i| ((i * 7919 + 101) % vocab) as u32)
        .collect()
}

/// Seconds to read a prompt without and with learning, and the median ratio of runs that followed each other.
fn prefill(runs: usize, pool: &Pool, model: &Model, len: usize) -> Result<[f64; 3], Fail> {
    let ids = text(model, len);
    let once = |learning: bool| -> Result<f64, Fail> {
        let began = Instant::now();
        let mut sequence = model.sequence(len, learning);
        let hidden = model.step(pool, &mut [(&mut sequence, &ids)])?;
        black_box(model.logits(pool, &hidden, &[len - 1]));
        let seconds = began.elapsed().as_secs_f64();
        if learning {
            must_have_learned(&sequence, len)?;
        }
        Ok(seconds)
    };
    let (mut off, mut on, mut ratios) = (vec![], vec![], vec![]);
    for run in 0..=runs.max(1) {
        // Which goes first changes, so that neither always follows the other's heat.
        let pair = match run % 2 {
            0 => [once(false)?, once(true)?],
            _ => {
                let second = once(true)?;
                [once(false)?, second]
            }
        };
        // The first pair warms caches and clocks.
        if run > 0 {
            off.push(pair[0]);
            on.push(pair[1]);
            ratios.push(pair[1] / pair[0]);
        }
    }
    Ok([off, on, ratios].map(middle))
}

fn middle(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    median(&all)
}

/// Two sequences of the same tokens write one token each in turn, one of them learning.
fn decode(
    runs: usize,
    pool: &Pool,
    model: &Model,
    tokens: usize,
    chunk: usize,
) -> Result<Value, Fail> {
    let ids = text(model, BEFORE + tokens);
    let mut ratios = Vec::new();
    let mut all = [vec![], vec![]];
    let (mut edges, mut bytes): (Vec<Vec<f64>>, usize) = (vec![], 0);
    for run in 0..=runs.max(1) {
        let mut pair = [false, true].map(|learning| model.sequence(ids.len(), learning));
        for sequence in &mut pair {
            model.step(pool, &mut [(sequence, &ids[..BEFORE])])?;
        }
        let mut times = [vec![], vec![]];
        let mut at_edges = Vec::new();
        for (at, &id) in ids.iter().enumerate().skip(BEFORE) {
            for (which, sequence) in pair.iter_mut().enumerate() {
                let seconds = token(pool, model, sequence, id)?;
                times[which].push(seconds);
                // The token that fills a chunk waits for the update, and the next one for what it left undone.
                if which == 1 && [0, chunk - 1].contains(&(at % chunk)) {
                    at_edges.push(seconds);
                }
            }
        }
        must_have_learned(&pair[1], ids.len())?;
        if run == 0 {
            continue;
        }
        bytes = pair[1].fast.bytes();
        let sum = |times: &[f64]| times.iter().sum::<f64>();
        ratios.push(sum(&times[1]) / sum(&times[0]));
        let ordinary = middle(times[1].clone());
        edges.resize(at_edges.len(), vec![]);
        for (times, seconds) in edges.iter_mut().zip(at_edges) {
            times.push(seconds / ordinary);
        }
        for (all, times) in all.iter_mut().zip(times) {
            all.extend(times);
        }
    }
    for times in &mut all {
        times.sort_by(f64::total_cmp);
    }
    // Of each of the two tokens at each edge the median of the runs: others on the machine make any single token long.
    let mut edges: Vec<f64> = edges.into_iter().map(middle).collect();
    edges.sort_by(f64::total_cmp);
    let ms = |which: usize, share: f64| {
        let times: &Vec<f64> = &all[which];
        1e3 * times[((times.len() - 1) as f64 * share).round() as usize]
    };
    let mean = |which: usize| 1e3 * all[which].iter().sum::<f64>() / all[which].len() as f64;
    let (edge, longest) = (median(&edges), edges[edges.len() - 1]);
    Ok(json!({
        "tokens": tokens, "mean_ratio": middle(ratios),
        "off_mean_ms": mean(0), "on_mean_ms": mean(1),
        "off_p50_ms": ms(0, 0.5), "on_p50_ms": ms(1, 0.5), "p50_ratio": ms(1, 0.5) / ms(0, 0.5),
        "off_p90_ms": ms(0, 0.9), "on_p90_ms": ms(1, 0.9),
        "off_p99_ms": ms(0, 0.99), "on_p99_ms": ms(1, 0.99), "p99_ratio": ms(1, 0.99) / ms(0, 0.99),
        "off_longest_ms": ms(0, 1.0), "on_longest_ms": ms(1, 1.0),
        "edges": edges.len() / 2, "edge_ms": edge * ms(1, 0.5), "edge_ratio": edge,
        "longest_edge_ms": longest * ms(1, 0.5), "longest_edge_ratio": longest, "fast_bytes": bytes,
    }))
}

/// Seconds of one token.
fn token(pool: &Pool, model: &Model, sequence: &mut Sequence, id: u32) -> Result<f64, Fail> {
    let began = Instant::now();
    let hidden = model.step(pool, &mut [(sequence, &[id])])?;
    black_box(model.logits(pool, &hidden, &[0]));
    Ok(began.elapsed().as_secs_f64())
}
