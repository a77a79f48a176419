//! From the last label to the first token of the student that it taught: a whole job, while the base goes on answering.
//!
//! The base has random weights and tokens of one character, and the episodes are made up, as many and as long as those that the demo
//! keeps of GoToLocal (docs/LOG.md); how long a job takes does not depend on what the numbers are. The trial on live traffic is left
//! out, for it waits for episodes: a pin puts the student into service, as an operator's does.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{json, Value};

use super::super::DeviceOptions;
use super::speed::{base, say, Size, SMALL, WHOLE};
use super::{card, OBJECT};
use crate::episode::{Actor, Outcome, Status, Task, ToolSpec};
use crate::kernels::Random;
use crate::locum::{
    DistilOptions, EpisodeHandle, EpisodeStart, JobState, Locum, Options, Pin, Request, StepMeta,
};
use crate::model::{write_tiny, FileDtype};
use crate::policy::{fixtures::Eager, RecipeKnobs};
use crate::registry::import_base;
use crate::view::{Older, ToolsShown, View};

const SOON: Duration = Duration::from_secs(60);
/// Between two steps of the agent that is served meanwhile: a job gives way to each of them.
const REST: Duration = Duration::from_millis(250);
const ACTIONS: [&str; 7] = [
    "left", "right", "forward", "pickup", "drop", "toggle", "done",
];

/// The demo's policy, as far as it decides what is computed.
fn demo() -> Eager {
    Eager {
        view: View {
            tools: ToolsShown::None,
            steps_back: 3,
            older: Older::Values,
            full_steps: 0,
            max_tokens: 256,
            ..View::default()
        },
    }
}

fn tools() -> Vec<ToolSpec> {
    let tool = json!([{"type": "function", "function": {"name": "act", "description": "",
        "parameters": {"type": "object", "properties": {"action": {"enum": ACTIONS}}, "required": ["action"]}}}]);
    crate::formats::tools_from_json(&tool).unwrap()
}

/// What the robot sees: no two alike, so that every step is kept, and short, for a token is a character.
fn seen(random: &mut Random) -> String {
    format!("{:06}", (random.unit() * 1e6) as u32)
}

fn begin(locum: &Locum, name: &str) -> EpisodeHandle {
    let start = EpisodeStart {
        task: Task {
            id: name.into(),
            domain: "grid".into(),
            ..Task::default()
        },
        tools: tools(),
        ..EpisodeStart::default()
    };
    locum.begin(start).unwrap()
}

/// A teacher's episode, up to its label.
fn record(locum: &Locum, n: u64, random: &mut Random) -> EpisodeHandle {
    let handle = begin(locum, &format!("task {n}"));
    let message = |value: Value, actor| {
        let meta = StepMeta {
            actor,
            ..StepMeta::default()
        };
        locum.message(&handle, &value, meta).unwrap();
    };
    let goal = format!("to {n}\n{}", seen(random));
    message(json!({"role": "user", "content": goal}), Actor::Human);
    // 1,084 steps of 245 episodes are four or five.
    for step in 0..4 + u64::from(n % 5 < 2) {
        let id = format!("c{step}");
        let action = ACTIONS[(random.unit() * 3.0) as usize];
        let arguments = json!({ "action": action }).to_string();
        let call = json!([{"id": id, "type": "function", "function": {"name": "act", "arguments": arguments}}]);
        message(
            json!({"role": "assistant", "content": null, "tool_calls": call}),
            Actor::Teacher,
        );
        message(
            json!({"role": "tool", "tool_call_id": id, "content": seen(random)}),
            Actor::Unknown,
        );
    }
    handle
}

/// One step of an agent: who answered, and when the first token was there.
fn ask(locum: &Locum, handle: &EpisodeHandle) -> Option<(u64, Instant)> {
    let request = Request {
        messages: vec![json!({"role": "user", "content": "to 1\n234567"})],
        tools: tools(),
        allow_text: false,
        deadline_ms: SOON.as_millis() as u32,
        ..Request::default()
    };
    let call = locum.generate(handle, &request).unwrap();
    let first = loop {
        let polled = call.poll();
        if polled.done || !polled.new_text.is_empty() {
            break Instant::now();
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    assert!(call.wait(SOON));
    call.result().ok().map(|answer| (answer.version, first))
}

/// What a job made of the store's episodes: rows to train on, and their tokens.
fn dataset(store: &Path, job: u64) -> (f64, f64) {
    let text = std::fs::read(crate::distil::job_dir(store, job).join("dataset.json")).unwrap();
    let read: Value = serde_json::from_slice(&text).unwrap();
    let number = |name: &str| read[name].as_f64().unwrap();
    (number("train"), number("tokens"))
}

/// Sets it when it goes out of sight, by whatever way, so that nobody goes on for ever.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

fn measure(size: &Size) {
    if card().is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (store, from) = (dir.path().join("store"), dir.path().join("base"));
    write_tiny(&from, 1).unwrap();
    base(size).save(&from, FileDtype::Bf16).unwrap();
    let options = || Options {
        store_dir: store.clone(),
        policy: Some(Arc::new(demo())),
        device: DeviceOptions {
            library: std::env::var_os(OBJECT).map(Into::into),
            ..DeviceOptions::default()
        },
        ..Options::default()
    };
    let empty = Locum::open(Options {
        no_model: true,
        ..options()
    });
    empty.unwrap().close(SOON).unwrap();
    import_base(&store, &from, Some("base")).unwrap();
    let locum = Locum::open(options()).unwrap();
    locum.use_student_here(Pin::Base).unwrap();
    let success = || Outcome {
        status: Status::Success,
        ..Outcome::default()
    };
    let mut random = Random::new(8);
    for n in 1..size.episodes {
        let handle = record(&locum, n, &mut random);
        locum.end(&handle, success()).unwrap();
    }
    let last = record(&locum, 0, &mut random);
    let knobs = RecipeKnobs {
        method: Some("upper".into()),
        upper_layers: Some(size.layers / 2),
        tokens: Some(size.trained_tokens),
        lr: Some(3e-4),
        batch_tokens: Some(640),
        seed: Some(1),
        ..RecipeKnobs::default()
    };
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let served = scope.spawn(|| {
            let mut waits = Vec::new();
            let handle = begin(&locum, "served");
            while !ended.load(Ordering::SeqCst) {
                let began = Instant::now();
                assert!(ask(&locum, &handle).is_some(), "an answer was not given");
                waits.push(1e3 * began.elapsed().as_secs_f64());
                std::thread::sleep(REST);
            }
            waits
        });
        let ends = Ends(&ended);
        // The card is warm before the label comes.
        let handle = begin(&locum, "the new student's");
        ask(&locum, &handle).unwrap();
        let label = Instant::now();
        locum.end(&last, success()).unwrap();
        let job = locum.distil_start(DistilOptions {
            knobs,
            trial: Some(false),
            ..DistilOptions::default()
        });
        let job = job.unwrap();
        let (mut begun, mut trained) = (0.0, 0.0);
        let status = loop {
            let status = locum.distil_status(job).unwrap();
            // The last that was told of each: curating and training come before saving.
            let since = label.elapsed().as_secs_f64();
            match status.state {
                JobState::Queued | JobState::Curating => begun = since,
                JobState::Training => trained = since,
                _ => {}
            }
            if !status.state.is_running() {
                break status;
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let judged = label.elapsed().as_secs_f64();
        assert_eq!(status.state, JobState::Stored, "{}", status.message);
        locum
            .use_student_here(Pin::Student(status.version))
            .unwrap();
        let (version, first) = ask(&locum, &handle).unwrap();
        assert_eq!(version, status.version);
        let answered = (first - label).as_secs_f64();
        drop(ends);
        let mut waits = served.join().unwrap();
        let (rows, tokens) = dataset(&store, job);
        say("label to first token: rows", vec![rows], "");
        say(
            "label to first token: tokens a row",
            vec![tokens / rows],
            "",
        );
        say(
            "label to first token: tokens trained",
            vec![status.tokens_done as f64],
            "",
        );
        say("label to training", vec![begun], "s");
        say("label to trained student", vec![trained], "s");
        say("label to judged student", vec![judged], "s");
        say(
            "label to first token of the new student",
            vec![answered],
            "s",
        );
        waits.sort_by(f64::total_cmp);
        say(
            "answers of the base meanwhile, median",
            vec![waits[waits.len() / 2]],
            "ms",
        );
        say(
            "answers of the base meanwhile, longest",
            vec![waits[waits.len() - 1]],
            "ms",
        );
    });
    locum.close(SOON).unwrap();
}

#[test]
#[ignore = "a measurement, of which the stand-in knows nothing"]
fn measure_the_card() {
    measure(&WHOLE);
}

#[test]
fn the_measurement_runs() {
    measure(&SMALL);
}
