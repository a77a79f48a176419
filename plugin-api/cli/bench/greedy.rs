//! `locum bench greedy`: is a fast answer the right one? Tokens written by the kernels that serve, judged one by one by the plain
//! forward pass of training on the same weights, unpacked to `f32`.

use locum_core::kernels::{Pool, Random};
use locum_core::model::{Model, PackedRows, Sequence};
use serde_json::json;

use super::{path, Args, Loaded, Weights};
use crate::fail::Fail;
use crate::out::{Out, Table};
use crate::Place;

/// Tokens compared where `--tokens` does not say.
const TOKENS: usize = 10_000;
/// Sequences that are written at once, and the tokens of each: a prompt of arbitrary ids, then what the model makes of it.
const SEQUENCES: usize = 8;
const PROMPT: usize = 16;
const REPLY: usize = 125;

pub fn run(args: &Args, place: &Place, out: &Out) -> Result<(), Fail> {
    let Loaded { model, name, .. } = args.load(place)?;
    let pool = args.pool();
    let tokens = args.tokens().unwrap_or(TOKENS);
    let mut table = Table::new(&[
        "weights",
        ">tokens",
        ">other choice",
        ">widest gap",
        ">logits off by (RMS)",
        "kernels",
    ]);
    let mut rows = Vec::new();
    let all = [Weights::F32, Weights::Bf16, Weights::Q8, Weights::Q4];
    for format in args.formats(&all) {
        let fast = model.clone().packed(format);
        let row = compare(&fast, &fast.unpacked(), &pool, tokens);
        table.row([
            format.name().into(),
            row.tokens.to_string(),
            row.other.to_string(),
            format!("{:.4}", row.gap),
            format!("{:.5}", row.rms),
            path(format),
        ]);
        rows.push(json!({
            "weights": format.name(), "tokens": row.tokens, "other_choice": row.other, "widest_gap": row.gap,
            "logits_rms_error": row.rms, "kernels": path(format),
        }));
    }
    out.table(&table);
    out.line(&format!(
        "{name}; gap: by how much the plain pass prefers its own choice, in logits"
    ));
    out.result(&json!({ "rows": rows, "model": name }));
    Ok(())
}

struct Row {
    tokens: usize,
    /// Tokens that the plain pass would not have chosen.
    other: usize,
    /// The largest preference of the plain pass for another token.
    gap: f32,
    /// Of the chosen token's logit.
    rms: f64,
}

fn compare(fast: &Model, plain: &Model, pool: &Pool, tokens: usize) -> Row {
    let mut random = Random::new(7);
    let (mut other, mut gap, mut squares, mut done) = (0, 0f32, 0f64, 0);
    while done < tokens {
        let prompts: Vec<Vec<u32>> = (0..SEQUENCES)
            .map(|_| {
                let vocab = fast.config.vocab_size as f64;
                (0..PROMPT)
                    .map(|_| (random.unit() * vocab) as u32)
                    .collect()
            })
            .collect();
        for (ids, said) in write(fast, pool, prompts) {
            let rows = PackedRows::new(&[ids.len()]);
            let mut x = plain.embed(&ids).expect("the model's own tokens");
            let layers = (0, plain.config.num_hidden_layers);
            plain.blocks(pool, layers, &rows, None, &mut x, None);
            let asked: Vec<usize> = (PROMPT - 1..ids.len() - 1).collect();
            let logits = plain.logits(pool, &x, &asked);
            let logits = logits.chunks_exact(plain.config.vocab_size);
            for ((logits, token), said) in logits.zip(&ids[PROMPT..]).zip(said) {
                let own = logits[*token as usize];
                let ahead = logits[best(logits)] - own;
                other += usize::from(ahead > 0.0);
                gap = gap.max(ahead);
                squares += f64::from(own - said).powi(2);
                done += 1;
            }
        }
    }
    Row {
        tokens: done,
        other,
        gap,
        rms: (squares / done as f64).sqrt(),
    }
}

/// The likeliest tokens after some prompts, all written in one batch: prompt and reply, and the logit of each token of the reply.
fn write(model: &Model, pool: &Pool, prompts: Vec<Vec<u32>>) -> Vec<(Vec<u32>, Vec<f32>)> {
    let room = PROMPT + REPLY;
    let mut sequences: Vec<Sequence> = prompts
        .iter()
        .map(|_| Sequence::new(&model.config, room))
        .collect();
    let mut texts: Vec<(Vec<u32>, Vec<f32>)> = prompts.into_iter().map(|p| (p, vec![])).collect();
    for _ in 0..REPLY {
        let mut batch: Vec<(&mut Sequence, &[u32])> = sequences
            .iter_mut()
            .zip(&texts)
            .map(|(sequence, (ids, _))| {
                let read = sequence.ids.len();
                (sequence, &ids[read..])
            })
            .collect();
        let mut end = 0;
        let rows: Vec<usize> = batch
            .iter()
            .map(|(_, new)| {
                end += new.len();
                end - 1
            })
            .collect();
        let hidden = model.step(pool, &mut batch).expect("short sequences");
        let logits = model.logits(pool, &hidden, &rows);
        for ((ids, said), logits) in texts
            .iter_mut()
            .zip(logits.chunks_exact(model.config.vocab_size))
        {
            let token = best(logits);
            ids.push(token as u32);
            said.push(logits[token]);
        }
    }
    texts
}

fn best(logits: &[f32]) -> usize {
    (0..logits.len()).fold(0, |b, i| if logits[i] > logits[b] { i } else { b })
}
