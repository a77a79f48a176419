//! `locum bench quality`: what fewer bits change in the answers to recorded steps, against the same weights in `f32`.

use locum_core::curate::curate;
use locum_core::dataset;
use locum_core::episode::Episode;
use locum_core::model::{Model, Sequence, WeightFormat};
use locum_core::store::Query;
use serde_json::json;

use super::{path, Args, Loaded, Weights};
use crate::fail::Fail;
use crate::out::{Out, Table};
use crate::{load_policy, Place};

/// Steps asked where `--tokens` does not say.
const STEPS: usize = 100;
/// Episodes that are read for them.
const MAX_EPISODES: u32 = 5_000;

pub fn run(args: &Args, place: &Place, out: &Out) -> Result<(), Fail> {
    let Loaded {
        model,
        chat,
        name,
        view,
        base,
    } = args.load(place)?;
    let store = place.read()?;
    let policy = load_policy(None)?;
    let settings = policy.settings();
    let query = Query {
        limit: Some(MAX_EPISODES),
        ..Query::default()
    };
    let episodes: Vec<Episode> = store.load(&query)?;
    let curated = curate(episodes, policy.as_ref(), &settings.curate);
    let data = dataset::build(&curated, &chat, &view.unwrap_or_else(|| policy.view()));
    let steps = args.tokens().unwrap_or(STEPS);
    let picked: Vec<&dataset::Sample> = data
        .held_out
        .iter()
        .chain(&data.train)
        .take(steps)
        .map(|&i| &data.samples[i])
        .collect();
    if picked.is_empty() {
        return Err(Fail::Missing {
            what: "the store holds no successful step to ask about".into(),
            next: "Record episodes, or import some with `locum episodes import FILE`.",
        });
    }
    let pool = args.pool();
    let exact = answers(&model, &pool, &picked);
    let mut table = Table::new(&[
        "weights",
        ">MB",
        ">KL to f32",
        ">same tokens",
        ">same steps",
        ">as the teacher",
        "kernels",
    ]);
    let mut rows = Vec::new();
    for format in args.formats(&[Weights::F32, Weights::Bf16, Weights::Q8, Weights::Q4]) {
        let packed = match base.clone() {
            Some(base) => model.clone().packed_beside(format, &base.packed(format)),
            None => model.clone().packed(format),
        };
        let got = answers(&packed, &pool, &picked);
        let row = compare(&exact, &got, &picked);
        table.row([
            format.name().into(),
            format!("{:.0}", packed.weight_bytes() as f64 / 1e6),
            format!("{:.5}", row.kl),
            format!("{:.2} %", 100.0 * row.same_tokens),
            format!("{:.1} %", 100.0 * row.same_steps),
            format!("{:.1} %", 100.0 * row.as_teacher),
            path(format),
        ]);
        rows.push(json!({
            "weights": format.name(), "weight_bytes": packed.weight_bytes(), "kl_nats": row.kl, "same_tokens": row.same_tokens,
            "same_steps": row.same_steps, "as_teacher": row.as_teacher, "kernels": path(format),
        }));
    }
    out.table(&table);
    out.line(&format!(
        "{name}; {} recorded steps, their {} tokens predicted with the teacher's words before them",
        picked.len(),
        exact.iter().map(Vec::len).sum::<usize>()
    ));
    let f32_name = WeightFormat::F32.name();
    out.result(&json!({ "steps": picked.len(), "against": f32_name, "rows": rows, "model": name }));
    Ok(())
}

/// Log-probabilities of every target token's distribution, by sample.
fn answers(
    model: &Model,
    pool: &locum_core::kernels::Pool,
    samples: &[&dataset::Sample],
) -> Vec<Vec<Vec<f32>>> {
    samples
        .iter()
        .map(|sample| {
            let mut sequence = Sequence::new(&model.config, sample.ids.len());
            let hidden = model
                .step(pool, &mut [(&mut sequence, &sample.ids)])
                .expect("a sample was rendered with the model's own tokenizer and limits");
            let rows: Vec<usize> = (sample.target_start - 1..sample.ids.len() - 1).collect();
            let logits = model.logits(pool, &hidden, &rows);
            logits
                .chunks(model.config.vocab_size)
                .map(log_softmax)
                .collect()
        })
        .collect()
}

fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|x| f64::from(x - max).exp()).sum();
    let base = max + sum.ln() as f32;
    logits.iter().map(|x| x - base).collect()
}

struct Row {
    /// Mean of Σ p log(p / q) over target tokens, in nats.
    kl: f64,
    /// Share of tokens, and of steps with all their tokens, for which the likeliest is the same.
    same_tokens: f64,
    same_steps: f64,
    /// Share of steps whose every likeliest token is the teacher's.
    as_teacher: f64,
}

fn compare(exact: &[Vec<Vec<f32>>], got: &[Vec<Vec<f32>>], samples: &[&dataset::Sample]) -> Row {
    let best = |p: &[f32]| {
        p.iter()
            .enumerate()
            .fold(0, |b, (i, x)| if *x > p[b] { i } else { b })
    };
    let (mut kl, mut tokens, mut same, mut same_steps, mut as_teacher) =
        (0.0, 0usize, 0usize, 0usize, 0usize);
    for ((p, q), sample) in exact.iter().zip(got).zip(samples) {
        let targets = &sample.ids[sample.target_start..];
        let mut all_same = true;
        let mut all_teacher = true;
        for ((p, q), label) in p.iter().zip(q).zip(targets) {
            kl += p
                .iter()
                .zip(q)
                .map(|(a, b)| f64::from(a.exp()) * f64::from(a - b))
                .sum::<f64>();
            tokens += 1;
            let (a, b) = (best(p), best(q));
            same += usize::from(a == b);
            all_same &= a == b;
            all_teacher &= b == *label as usize;
        }
        same_steps += usize::from(all_same);
        as_teacher += usize::from(all_teacher);
    }
    let share = |n: usize, of: usize| n as f64 / of.max(1) as f64;
    Row {
        kl: kl / tokens.max(1) as f64,
        same_tokens: share(same, tokens),
        same_steps: share(same_steps, samples.len()),
        as_teacher: share(as_teacher, samples.len()),
    }
}
