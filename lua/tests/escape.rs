//! Every file of tests/escape is one trick against the sandbox, with the refusal it must meet in its header:
//!
//! - `hook A | B`: `decide` fails, with a reason that contains A or B;
//! - `answer A`: `decide` answers "teacher" with a reason that begins with A;
//! - `load A | B`: the policy is not loaded, with an error that contains A or B;
//! - `builtin`: the policy loads without a `decide` of its own.
//!
//! A trick that works would answer "student".

use std::path::Path;

/// CPU time within which a hook is to be stopped: its budget of 2 ms and 2 ms more.
const STOPPED_MS: f64 = 4.0;
/// One call into the library is not interrupted; these make the largest that are allowed, or that fit into the memory limit.
const ONE_LARGE_CALL: [&str; 12] = [
    "error_huge",
    "huge_concat_loop",
    "large_class",
    "large_clone",
    "large_concat",
    "large_find",
    "large_garbage",
    "large_remove",
    "large_reverse",
    "large_utf8",
    "redis_stack_slots",
    "sort_long_strings",
];
const LARGE_CALL_MS: f64 = 40.0;
/// Times that a trick which was stopped late is tried again.
const TRIES: usize = 20;

/// CPU time of this thread in milliseconds.
fn cpu_ms() -> f64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the struct is ours and outlives the call.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    time.tv_sec as f64 * 1e3 + time.tv_nsec as f64 / 1e6
}

use std::time::{Duration, Instant};

use locum_core::policy::{Policy, StepInfo, StudentInfo, Who};
use locum_lua::{LuaPolicy, PolicyOptions};

/// Far above what any trick may take (its budget is 2 ms, 200 ms or 2 s), so that a slow machine does not fail the test.
const SLOW_MACHINE: Duration = Duration::from_secs(10);

fn step() -> StepInfo {
    StepInfo {
        task: "t".into(),
        tools: vec!["a".into(), "b".into()],
        student: Some(StudentInfo::default()),
        ..Default::default()
    }
}

/// How it ended, how long that took, and the CPU time if a hook was called; or what was wrong.
fn spring(path: &Path) -> Result<(String, Duration, Option<f64>), String> {
    let name = path.file_name().unwrap().to_string_lossy().into_owned();
    let source = std::fs::read_to_string(path).unwrap();
    let expected = source
        .lines()
        .find_map(|l| l.strip_prefix("-- expect: "))
        .ok_or("no `-- expect:` line")?;
    let (kind, texts) = expected.split_once(' ').unwrap_or((expected, ""));
    let matches = |found: &str| texts.split(" | ").any(|text| found.contains(text));
    let begin = Instant::now();
    let policy = match LuaPolicy::from_source(
        &source,
        &name,
        PolicyOptions {
            states: 1,
            ..Default::default()
        },
    ) {
        Ok(policy) => policy,
        Err(error) if kind == "load" && matches(&error.to_string()) => {
            return Ok((error.to_string(), begin.elapsed(), None))
        }
        Err(error) => {
            return Err(format!(
                "expected `{expected}`, but it was not loaded: {error}"
            ))
        }
    };
    match kind {
        "builtin" if !policy.has_hook("decide") => {
            return Ok(("no hook".into(), begin.elapsed(), None))
        }
        "hook" | "answer" => {}
        _ => return Err(format!("expected `{expected}`, but it was loaded")),
    }
    let begin = Instant::now();
    let cpu = cpu_ms();
    let choice = policy.decide(&step());
    let (took, cpu) = (begin.elapsed(), cpu_ms() - cpu);
    let failed = choice.reason.starts_with("policy hook decide: ");
    let good = choice.who == Who::Teacher
        && choice.reason.len() < 1000
        && match kind {
            "hook" => failed && matches(&choice.reason),
            _ => !failed && choice.reason.starts_with(texts),
        };
    if !good || took > SLOW_MACHINE {
        return Err(format!(
            "expected `{expected}`, found {choice:?} after {took:?}"
        ));
    }
    // What the trick left behind must not reach another state, nor keep this one from answering.
    let again = policy.decide(&step());
    if again.who != Who::Teacher {
        return Err(format!("the second call answered {again:?}"));
    }
    Ok((choice.reason.chars().take(90).collect(), took, Some(cpu)))
}

#[test]
fn every_trick_of_the_escape_corpus_meets_its_refusal() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/escape");
    let mut paths: Vec<_> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    let only = std::env::var("TRICK").ok();
    let mut wrong = Vec::new();
    let (mut sprung, mut slowest, mut hooks) = (0, Vec::new(), Vec::new());
    for path in paths.iter().filter(|p| {
        only.as_ref()
            .is_none_or(|only| p.to_string_lossy().contains(only))
    }) {
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        match spring(path) {
            Ok((reason, took, cpu)) => {
                let wall = took.as_secs_f64() * 1e3;
                println!(
                    "{name:<32} {wall:>9.2} ms  cpu {:>7.2} ms  {reason}",
                    cpu.unwrap_or(0.0)
                );
                if let Some(cpu) = cpu {
                    hooks.push((cpu, name.clone()));
                }
                sprung += 1;
                slowest.push((took, name));
            }
            Err(message) => wrong.push(format!("{name}: {message}")),
        }
    }
    slowest.sort();
    println!(
        "{sprung} tricks, slowest: {:?}",
        slowest.iter().rev().take(5).collect::<Vec<_>>()
    );
    hooks.sort_by(|a, b| a.0.total_cmp(&b.0));
    let late: Vec<_> = hooks.iter().filter(|(cpu, _)| *cpu > STOPPED_MS).collect();
    println!(
        "{} hooks called, {} within {STOPPED_MS} ms of CPU time at the first try; later: {late:.1?}",
        hooks.len(),
        hooks.len() - late.len()
    );
    // On a machine whose cores are all taken the watchdog itself comes late; a bound that holds is met when it comes in time.
    for (first, name) in &late {
        let file = folder.join(format!("{name}.lua"));
        let again = (0..TRIES).filter_map(|_| spring(&file).ok()?.2);
        let best = again.fold(*first, f64::min);
        let most = match ONE_LARGE_CALL.contains(&name.as_str()) {
            true => LARGE_CALL_MS,
            false => STOPPED_MS,
        };
        println!("{name}: {first:.1} ms at first, {best:.1} ms at best of {TRIES}");
        if best >= most {
            wrong.push(format!("{name}: stopped after {best:.1} ms at best"));
        }
    }
    assert!(
        wrong.is_empty(),
        "{} tricks were not refused as they should be:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
    assert!(
        only.is_some() || sprung >= 100,
        "the corpus has shrunk to {sprung}"
    );
}
