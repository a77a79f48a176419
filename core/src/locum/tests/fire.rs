//! Swaps under fire: many threads decide, generate, cancel and record while students are promoted and taken back.

use std::collections::HashMap;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use serde_json::json;

use super::life::promote;
use super::{load, World};
use crate::episode::{Actor, Outcome, Status};
use crate::generate::Student;
use crate::locum::jobs::JobRecord;
use crate::locum::{
    AnswerError, EpisodeStart, Error, JobStatus, Locum, Options, Request, StepMeta,
};
use crate::model::write_tiny;
use crate::policy::fixtures::Eager;
use crate::policy::Who;
use crate::registry::Manifest;

/// Swaps in an ordinary test run; `LOCUM_SOAK_SWAPS` sets another number.
const SWAPS: u64 = 50;
const THREADS: usize = 32;
/// Questions asked; each student's answers to them are known beforehand.
const QUESTIONS: usize = 6;
/// Swaps after which memory is looked at first: by then every thread has its buffers.
const SETTLED: u64 = 20;
/// What the process may have grown by between then and the end, in bytes.
const MAX_GROWTH_BYTES: u64 = 24 << 20;
/// What a step may be deferred for while students come and go. Anything else is a failed call.
const REASONS: &[&str] = &[
    "the student was taken back",
    "no student is promoted",
    "the teacher keeps a share of the episodes",
];

#[test]
fn students_are_swapped_under_fire_without_a_failed_call_or_a_mixed_answer() {
    // A process of its own, or the other tests' memory would be counted.
    let output = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "locum::tests::fire::a_fire",
            "--ignored",
            "--nocapture",
            "--test-threads=1",
        ])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    // Behind what the test harness writes before it.
    let figures = text.find("swaps: ").map(|at| text[at..].lines().next());
    println!("{}", figures.flatten().expect("it says what was done"));
}

/// A host with three students of other weights, versions 1 to 3.
fn host() -> (World, Locum) {
    let world = World::new(0);
    for seed in 2..=4 {
        let dir = tempfile::tempdir().unwrap();
        write_tiny(dir.path(), seed).unwrap();
        let (model, chat) = load(dir.path());
        let manifest = Manifest {
            job: 1,
            ..Manifest::default()
        };
        world
            .registry()
            .save(&model, None, &chat, manifest)
            .unwrap();
    }
    let locum = Locum::open(Options {
        store_dir: world.store.clone(),
        no_learning: true,
        threads: 2,
        policy: Some(Arc::new(Eager::default())),
        ..Options::default()
    })
    .unwrap();
    let status = JobStatus {
        job: 1,
        ..JobStatus::default()
    };
    let job = JobRecord {
        status,
        ..JobRecord::default()
    };
    locum.inner.put_job(&job).unwrap();
    (world, locum)
}

fn request(question: usize) -> Request {
    let tool = json!([{"type": "function", "function": {"name": "say", "description": "",
        "parameters": {"type": "object", "properties": {"word": {"type": "string", "minLength": 4, "maxLength": 8}}, "required": ["word"]}}}]);
    Request {
        messages: vec![
            json!({"role": "user", "content": format!("Question {question}, {}?", "which way ".repeat(question + 1))}),
        ],
        tools: crate::formats::tools_from_json(&tool).unwrap(),
        allow_text: false,
        max_tokens: 32,
        // Untrained students all like the same letters best; drawn with a seed they say different words, and the same every time.
        temperature: 1.0,
        seed: 1 + question as u64,
        ..Request::default()
    }
}

/// The tokens that each student answers each question with, asked alone.
fn alone(locum: &Locum) -> HashMap<(String, usize), Vec<u32>> {
    let mut known = HashMap::new();
    for version in 1..=3 {
        promote(locum, version).unwrap();
        for question in 0..QUESTIONS {
            let answer = (0..100).find_map(|_| {
                let handle = locum.begin(EpisodeStart::default()).unwrap();
                let call = locum.generate(&handle, &request(question)).ok();
                let answer = call.map(|call| {
                    assert!(call.wait(Duration::from_secs(60)));
                    call.result().unwrap()
                });
                locum.drop_episode(&handle).unwrap();
                answer
            });
            let answer = answer.expect("the student plays most episodes");
            assert_eq!(answer.version, version);
            known.insert((answer.student, question), answer.reply_ids);
        }
    }
    let different: std::collections::HashSet<_> = known.values().collect();
    assert!(
        different.len() > QUESTIONS,
        "students answer differently: {known:?}"
    );
    known
}

#[derive(Default)]
struct Counts {
    asked: AtomicU64,
    answered: AtomicU64,
    cancelled: AtomicU64,
    deferred: AtomicU64,
    recorded: AtomicU64,
}

#[test]
#[ignore = "the process of the test above"]
fn a_fire() {
    let swaps = std::env::var("LOCUM_SOAK_SWAPS").ok();
    let swaps: u64 = swaps.map_or(SWAPS, |n| n.parse().unwrap());
    let (_world, locum) = host();
    let known = alone(&locum);
    let before = locum.inner.store.counts(None).unwrap().steps;
    let (stop, counts) = (AtomicBool::new(false), Counts::default());
    let mut served: Vec<Weak<Student>> = Vec::new();
    let mut settled = 0;
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (locum, known, stop, counts) = (&locum, &known, &stop, &counts);
            scope.spawn(move || {
                for n in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    step(locum, known, counts, thread, n);
                }
            });
        }
        for swap in 0..swaps {
            // 2, 3, back to 2, back to 1, and from the beginning: as many promotions as rollbacks.
            match swap % 4 {
                0 => promote(&locum, 2).unwrap(),
                1 => promote(&locum, 3).unwrap(),
                _ => locum.rollback().unwrap(),
            }
            let current = locum.inner.swap.serving().current.clone();
            let current = current.expect("somebody always serves");
            let expected = [2, 3, 2, 1][(swap % 4) as usize];
            assert_eq!(current.version, expected, "after swap {swap}");
            served.push(Arc::downgrade(&current));
            if swap == SETTLED.min(swaps / 2) {
                settled = resident();
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    let seconds = begun.elapsed().as_secs_f64();
    locum.flush(Duration::from_secs(30)).unwrap();
    let n = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let stats = locum.inner.store.counts(None).unwrap();
    assert_eq!(
        stats.steps - before,
        n(&counts.recorded),
        "every step is in the store"
    );
    assert_eq!((stats.open, stats.incomplete), (0, 0));
    assert_eq!(
        n(&counts.asked),
        n(&counts.answered) + n(&counts.cancelled) + n(&counts.deferred)
    );
    assert!(n(&counts.answered) > swaps && n(&counts.cancelled) > 0);

    // What the last answers kept for reuse is let go with the next swap; then no student is left but the one that serves.
    locum.rollback().unwrap();
    let gone = || served.iter().filter(|s| s.strong_count() > 0).count() <= 1;
    let patience = Instant::now();
    while !gone() && patience.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(gone(), "students that no longer serve are still in memory");
    let grown = resident().saturating_sub(settled);
    println!(
        "swaps: {swaps} in {seconds:.1} s, {} steps asked by {THREADS} threads, {} answered, {} cancelled, {} deferred, {} steps recorded; \
         {:.1} MiB more than after swap {SETTLED}",
        n(&counts.asked),
        n(&counts.answered),
        n(&counts.cancelled),
        n(&counts.deferred),
        n(&counts.recorded),
        grown as f64 / f64::from(1 << 20)
    );
    assert!(grown <= MAX_GROWTH_BYTES, "it grew by {grown} bytes");
    locum.close(Duration::from_secs(30)).unwrap();
}

/// One episode of one step.
fn step(
    locum: &Locum,
    known: &HashMap<(String, usize), Vec<u32>>,
    counts: &Counts,
    thread: usize,
    n: usize,
) {
    let one = |counter: &AtomicU64| counter.fetch_add(1, Ordering::Relaxed);
    let question = (thread + n) % QUESTIONS;
    let request = request(question);
    let handle = locum
        .begin(EpisodeStart::default())
        .expect("an episode begins");
    let say = |message: &serde_json::Value, actor| {
        let meta = StepMeta {
            actor,
            ..StepMeta::default()
        };
        locum
            .message(&handle, message, meta)
            .expect("a step is recorded");
        one(&counts.recorded);
    };
    say(&request.messages[0], Actor::Human);
    one(&counts.asked);
    let decision = locum.decide(&handle, &request);
    let call = match decision.who {
        Who::Teacher => Err(decision.reason),
        Who::Student => locum
            .generate(&handle, &request)
            .map_err(|error| match error {
                Error::Teacher { reason } => reason,
                other => panic!("a call failed: {other}"),
            }),
    };
    let reply = match call {
        Err(reason) => {
            assert!(REASONS.contains(&reason.as_str()), "deferred: {reason}");
            one(&counts.deferred);
            None
        }
        Ok(call) => {
            let cancel = n % 5 == 4;
            if cancel {
                std::thread::sleep(Duration::from_micros(300 * (n as u64 % 7)));
                call.cancel();
            }
            assert!(
                call.wait(Duration::from_secs(60)),
                "an answer took a minute"
            );
            match call.result() {
                Ok(answer) => {
                    let alone = &known[&(answer.student.clone(), question)];
                    assert_eq!(&answer.reply_ids, alone, "student {}", answer.version);
                    one(&counts.answered);
                    Some(answer.message)
                }
                Err(AnswerError::Cancelled) if cancel => {
                    one(&counts.cancelled);
                    None
                }
                Err(other) => panic!("a call failed: {other}"),
            }
        }
    };
    match reply {
        Some(message) => say(&message, Actor::Student),
        None => say(
            &json!({"role": "assistant", "content": "left"}),
            Actor::Teacher,
        ),
    }
    let outcome = Outcome {
        status: Status::Success,
        ..Outcome::default()
    };
    locum.end(&handle, outcome).expect("an episode ends");
}

/// Resident memory of this process in bytes, once the allocator has given back what nobody holds.
fn resident() -> u64 {
    #[cfg(target_env = "gnu")]
    // SAFETY: gives free memory back to the system; nothing that is held moves.
    unsafe {
        libc::malloc_trim(0);
    }
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}
