//! `locum bench split`: a long prompt read by several workers, beside the ordinary way of reading it with as many threads.

use std::hint::black_box;
use std::time::Instant;

use locum_core::kernels::Pool;
use locum_core::model::{Model, WeightFormat};
use locum_core::report::machine;
use locum_core::ttt::Forgetting;
use serde_json::{json, Value};

use super::learner::{must_have_learned, student};
use super::ttt::text;
use super::{median, path, peak_bytes, Args, Loaded};
use crate::fail::Fail;
use crate::out::{Out, Table};
use crate::Place;

/// Who reads.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    /// One worker of one thread.
    One,
    /// As many workers of one thread as there are threads.
    Split,
    /// [`Model::step`], whose threads share the rows of each operation.
    Whole,
}

pub fn run(args: &Args, place: &Place, out: &Out) -> Result<(), Fail> {
    let Loaded { model, name, .. } = args.load(place)?;
    let lens = match args.tokens.is_empty() {
        true => vec![8192],
        false => args.tokens.clone(),
    };
    let most = lens.iter().copied().max().unwrap_or(0);
    let format: WeightFormat = args
        .weights
        .first()
        .copied()
        .unwrap_or(super::Weights::Q8)
        .into();
    // Longer than the model was made for: what it says there means nothing, and takes as long.
    let model = student(model, Forgetting::Nothing)?.packed(format);
    let model = model.with_positions(most);
    let threads = args.threads();
    let alone = Pool::new(threads, 0);
    let pools: Vec<Pool> = (0..threads).map(|_| Pool::new(1, 0)).collect();
    let mut table = Table::new(&[
        "tokens",
        "learning",
        ">1 worker, s",
        ">split, s",
        ">ordinary, s",
        ">split / 1 worker",
        ">split / ordinary",
    ]);
    let mut rows = Vec::new();
    for &len in &lens {
        let ids = text(&model, len);
        for learning in [false, true] {
            let once = |way: Way| read(&model, way, &alone, &pools, &ids, learning);
            let mut seconds: [Vec<f64>; 3] = Default::default();
            for run in 0..args.runs.max(1) {
                let ways = [Way::One, Way::Split, Way::Whole];
                // Each goes first in turn. One worker takes longest and is measured once.
                for i in 0..3 {
                    let which = (run + i) % 3;
                    if ways[which] != Way::One || run == 0 {
                        seconds[which].push(once(ways[which])?);
                    }
                }
            }
            let [one, split, whole] = seconds.map(|mut all| {
                all.sort_by(f64::total_cmp);
                median(&all)
            });
            table.row([
                len.to_string(),
                if learning { "on" } else { "off" }.into(),
                format!("{one:.2}"),
                format!("{split:.2}"),
                format!("{whole:.2}"),
                format!("{:.2}", one / split),
                format!("{:.2}", whole / split),
            ]);
            rows.push(json!({
                "tokens": len, "learning": learning, "one_worker_s": one, "split_s": split, "ordinary_s": whole,
                "speed_up": one / split, "ordinary_over_split": whole / split,
            }));
        }
    }
    let machine = machine();
    out.table(&table);
    out.line(&format!(
        "{name}; weights in {}; {threads} workers of a thread each beside {threads} threads on {}; medians of {}, one worker once",
        format.name(),
        machine.processor,
        args.runs.max(1),
    ));
    let rows: Vec<Value> = rows;
    out.result(&json!({
        "rows": rows, "workers": threads, "weights": format.name(), "kernels": path(format), "runs": args.runs.max(1),
        "model": name, "peak_bytes": peak_bytes(), "machine": machine,
    }));
    Ok(())
}

fn read(
    model: &Model,
    way: Way,
    alone: &Pool,
    pools: &[Pool],
    ids: &[u32],
    learning: bool,
) -> Result<f64, Fail> {
    let mut sequence = model.sequence(ids.len(), learning);
    let began = Instant::now();
    let hidden = match way {
        Way::One => model.prefill_split(&pools[..1], &mut sequence, ids)?,
        Way::Split => model.prefill_split(pools, &mut sequence, ids)?,
        Way::Whole => model.step(alone, &mut [(&mut sequence, ids)])?,
    };
    black_box(model.logits(alone, &hidden, &[ids.len() - 1]));
    let seconds = began.elapsed().as_secs_f64();
    if learning {
        must_have_learned(&sequence, ids.len())?;
    }
    Ok(seconds)
}
