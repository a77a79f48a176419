//! The loop under load: agents on several threads that record, ask and are answered, while a distillation runs.
//! Two seconds in an ordinary test run, `LOCUM_SOAK_SECONDS` of them with `make soak`.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use locum_core::episode::{Actor, Outcome, Status, Task, ToolSpec};
use locum_core::locum::{DistilOptions, EpisodeStart, Locum, Options, Pin, Request, StepMeta};
use locum_core::policy::Who;
use serde_json::{json, Value};

const AGENTS: usize = 4;
/// What the process may grow by after its first third, in bytes: caches have filled by then.
const MAX_GROWTH_BYTES: u64 = 256 << 20;

fn tool() -> ToolSpec {
    ToolSpec {
        name: "act".into(),
        description: "Take a step.".into(),
        parameters: json!({"type": "object", "properties": {"action": {"type": "string", "enum": ["left", "right", "forward"]}}, "required": ["action"]}),
        ..ToolSpec::default()
    }
}

/// Plays one episode of three steps. Gives how many of them the student answered.
fn play(locum: &Locum, agent: usize, n: u64) -> u64 {
    let goal = ["left", "right", "forward"][(n % 3) as usize];
    let start = EpisodeStart {
        task: Task {
            id: format!("soak-{agent}-{n}"),
            domain: "soak".into(),
            ..Task::default()
        },
        tools: vec![tool()],
        ..EpisodeStart::default()
    };
    let episode = locum.begin(start).expect("an episode begins");
    let mut messages: Vec<Value> =
        vec![json!({"role": "user", "content": format!("Goal: go {goal}.\nSee: a wall.")})];
    record(locum, &episode, &messages[0], Actor::Unknown);
    let mut by_student = 0;
    for step in 0..3 {
        let request = Request {
            messages: messages.clone(),
            tools: vec![tool()],
            allow_text: false,
            max_tokens: 24,
            ..Request::default()
        };
        // Every other episode is the teacher's, or there would be nothing to learn from.
        let reply = match locum.decide(&episode, &request).who {
            Who::Student if n.is_multiple_of(2) => None,
            Who::Student => locum.generate(&episode, &request).ok().and_then(|call| {
                assert!(
                    call.wait(Duration::from_secs(120)),
                    "agent {agent}: an answer took two minutes"
                );
                call.result().ok()
            }),
            Who::Teacher => None,
        };
        let (message, actor) = match reply {
            Some(answer) => {
                by_student += 1;
                // Decoding runs under the grammar: an invalid call is a bug, however little the student knows.
                let action = answer.calls[0].arguments["action"]
                    .as_str()
                    .expect("the action is a string")
                    .to_string();
                assert!(
                    ["left", "right", "forward"].contains(&action.as_str()),
                    "the student said {action:?}"
                );
                (answer.message, Actor::Student)
            }
            None => {
                let call = json!([{"id": format!("c{step}"), "type": "function", "function": {"name": "act", "arguments": json!({"action": goal}).to_string()}}]);
                (
                    json!({"role": "assistant", "content": null, "tool_calls": call}),
                    Actor::Teacher,
                )
            }
        };
        let id = message["tool_calls"][0]["id"].clone();
        record(locum, &episode, &message, actor);
        let result = json!({"role": "tool", "tool_call_id": id, "content": format!("See: door {step}, wall {n}.")});
        record(locum, &episode, &result, Actor::Unknown);
        messages.extend([message, result]);
    }
    let status = if n % 4 == 3 {
        Status::Failure
    } else {
        Status::Success
    };
    locum
        .end(
            &episode,
            Outcome {
                status,
                ..Outcome::default()
            },
        )
        .expect("an episode ends");
    by_student
}

fn record(
    locum: &Locum,
    episode: &locum_core::locum::EpisodeHandle,
    message: &Value,
    actor: Actor,
) {
    locum
        .message(
            episode,
            message,
            StepMeta {
                actor,
                ..StepMeta::default()
            },
        )
        .expect("a message is recorded");
}

/// Resident memory of this process in bytes; `None` where the system does not say.
fn resident() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/statm").ok()?;
    Some(text.split(' ').nth(1)?.parse::<u64>().ok()? * 4096)
}

#[test]
fn agents_are_served_while_a_student_is_made_and_nothing_is_lost() {
    let seconds: f64 = std::env::var("LOCUM_SOAK_SECONDS")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or(2.0);
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("tiny");
    locum_core::model::write_tiny(&base, 7).unwrap();
    let locum = Arc::new(
        Locum::open(Options {
            store_dir: folder.path().join("store"),
            base: Some(base),
            policy: Some(Arc::new(locum_lua::LuaPolicy::default_policy().unwrap())),
            ..Options::default()
        })
        .unwrap(),
    );
    locum.use_student(Pin::Base).unwrap();

    let stop = AtomicBool::new(false);
    let (played, answered) = (AtomicU64::new(0), AtomicU64::new(0));
    let began = Instant::now();
    let mut settled = None;
    std::thread::scope(|scope| {
        for agent in 0..AGENTS {
            let (locum, stop, played, answered) = (&locum, &stop, &played, &answered);
            scope.spawn(move || {
                for n in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    answered.fetch_add(play(locum, agent, n), Ordering::Relaxed);
                    played.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        while began.elapsed().as_secs_f64() < seconds {
            std::thread::sleep(Duration::from_millis(200));
            let running = locum.stats().job.is_some_and(|job| job.state.is_running());
            if !running && played.load(Ordering::Relaxed) >= 8 {
                // Too few episodes yet, or a trial under way, is a refusal with a reason and no failure.
                let _ = locum.distil_start(DistilOptions {
                    trial: Some(false),
                    ..DistilOptions::default()
                });
            }
            if settled.is_none() && began.elapsed().as_secs_f64() > seconds / 3.0 {
                settled = resident();
            }
        }
        stop.store(true, Ordering::Relaxed);
    });

    let (played, answered) = (played.into_inner(), answered.into_inner());
    let stats = locum.stats();
    eprintln!(
        "soak: {played} episodes, {answered} answers of the student, {} students made",
        locum.students().unwrap().len()
    );
    assert!(
        played > 0 && answered > 0,
        "{played} episodes, {answered} answers"
    );
    assert_eq!(
        stats.episodes, played,
        "every episode that was ended is in the store"
    );
    assert_eq!(stats.steps_by_student, answered);
    assert_eq!(stats.faulted, None);
    // In the short form other tests run beside it in this process, and some load a whole model.
    let alone = std::env::var_os("LOCUM_SOAK_SECONDS").is_some();
    assert!(
        !alone || !locum.students().unwrap().is_empty(),
        "no student was made in {seconds} s"
    );
    if let (true, Some(before), Some(after)) = (alone, settled, resident()) {
        assert!(
            after < before + MAX_GROWTH_BYTES,
            "the process grew from {before} to {after} bytes"
        );
    }
    locum.close(Duration::from_secs(30)).unwrap();
}
