//! `locum bench answer`: how fast the base model reads and answers, through the same door as a host.

use std::time::Duration;

use locum_core::episode::{Task, ToolSpec};
use locum_core::locum::{EpisodeStart, Locum, Options, Pin, Request};
use locum_core::report::machine;
use serde_json::json;

use crate::fail::Fail;
use crate::out::{Out, Table};
use crate::{load_policy, Place};

/// Longest wait for one answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(120);

/// One timed answer.
struct Timed {
    prompt: usize,
    reply: usize,
    prefill_ms: f64,
    decode_ms: f64,
}

pub fn run(args: &super::Args, place: &Place, out: &Out) -> Result<(), Fail> {
    place.must_exist()?;
    let locum = Locum::open(Options {
        store_dir: place.dir.clone(),
        base: args.model.clone(),
        threads: args.threads,
        policy: Some(load_policy(None)?),
        no_learning: true,
        weights: args.weights.first().copied().unwrap_or_default().into(),
        ..Options::default()
    })?;
    if locum.stats().base.is_none() {
        return Err(Fail::Missing {
            what: "there is no base model to time".into(),
            next: "Import one with `locum model import FILE_OR_DIR`.",
        });
    }
    locum.use_student_here(Pin::Base)?;
    let timed = (0..=args.runs)
        .map(|run| answer(&locum, run, args.reply_tokens()))
        .collect::<Result<Vec<_>, _>>();
    // The first answer warms caches and clocks.
    let timed = &timed?[1..];
    let speed = |tokens: &dyn Fn(&Timed) -> usize, ms: &dyn Fn(&Timed) -> f64| {
        let mut all: Vec<f64> = timed
            .iter()
            .map(|t| tokens(t) as f64 / ms(t).max(1e-6) * 1000.0)
            .collect();
        all.sort_by(f64::total_cmp);
        [all.first(), all.get(all.len() / 2), all.last()].map(|x| x.copied().unwrap_or(0.0))
    };
    let prefill = speed(&|t| t.prompt, &|t| t.prefill_ms);
    // The first token of a reply comes out of the prefill.
    let decode = speed(&|t| t.reply.saturating_sub(1), &|t| t.decode_ms);
    let machine = machine();
    let mut table = Table::new(&["", ">median tok/s", ">lowest", ">highest"]);
    for (name, s) in [("prefill", prefill), ("decode", decode)] {
        table.row([
            name.into(),
            format!("{:.0}", s[1]),
            format!("{:.0}", s[0]),
            format!("{:.0}", s[2]),
        ]);
    }
    out.table(&table);
    let tokens =
        |pick: &dyn Fn(&Timed) -> usize| timed.iter().map(pick).sum::<usize>() / timed.len().max(1);
    let (prompt, reply) = (tokens(&|t| t.prompt), tokens(&|t| t.reply));
    out.line(&format!(
        "{} answers of {prompt} prompt and {reply} reply tokens on the mean, one at a time; {}",
        timed.len(),
        machine.processor
    ));
    out.line(&format!("{} cores, {}", machine.cores, machine.kernels));
    out.result(&json!({
        "prefill_tok_s": { "median": prefill[1], "lowest": prefill[0], "highest": prefill[2] },
        "decode_tok_s": { "median": decode[1], "lowest": decode[0], "highest": decode[2] },
        "runs": timed.len(), "prompt_tokens": prompt, "reply_tokens": reply, "machine": machine,
    }));
    locum.close(Duration::from_secs(10))?;
    Ok(())
}

fn answer(locum: &Locum, run: usize, reply_tokens: u32) -> Result<Timed, Fail> {
    let tool = ToolSpec {
        name: "note".into(),
        description: "Write a note.".into(),
        parameters: json!({ "type": "object", "properties": { "text": { "type": "string" } }, "required": ["text"] }),
        ..ToolSpec::default()
    };
    // Different from the first word on, so that nothing is taken from a cache of an earlier prompt.
    // About 300 tokens, 700 where a byte is a token: the view of the shipped policy allows 1024.
    let page: String = (0..24)
        .map(|i| {
            format!(
                "item {} is worth {} coins. ",
                run * 1000 + i * 7,
                (i * 31 + run * 17) % 97
            )
        })
        .collect();
    let messages = vec![
        json!({ "role": "user", "content": format!("{run} {page}\nTell what the items have in common.") }),
    ];
    let episode = locum.begin(EpisodeStart {
        task: Task {
            id: format!("bench-{run}"),
            ..Task::default()
        },
        tools: vec![tool.clone()],
        ..EpisodeStart::default()
    })?;
    let request = Request {
        messages,
        tools: vec![tool],
        allow_text: true,
        max_tokens: reply_tokens,
        ..Request::default()
    };
    let failed = |what: String| Fail::Missing {
        what,
        next: "A bench needs a base model that can answer.",
    };
    let call = locum.generate(&episode, &request)?;
    if !call.wait(ANSWER_TIMEOUT) {
        return Err(failed(format!(
            "no answer within {} s",
            ANSWER_TIMEOUT.as_secs()
        )));
    }
    let answer = call.result().map_err(|e| failed(e.to_string()))?;
    locum.drop_episode(&episode)?;
    Ok(Timed {
        prompt: answer.prompt_ids.len() - answer.cached_tokens,
        reply: answer.reply_ids.len(),
        prefill_ms: f64::from(answer.prefill_ms),
        decode_ms: f64::from(answer.decode_ms),
    })
}
