//! Every file of tests/escape is one trick against the sandbox, with the refusal it must meet in its header:
//!
//! - `hook A | B`: `decide` fails, with a reason that contains A or B;
//! - `answer A`: `decide` answers "teacher" with a reason that begins with A;
//! - `load A | B`: the policy is not loaded, with an error that contains A or B;
//! - `builtin`: the policy loads without a `decide` of its own.
//!
//! A trick that works would answer "student".

use std::path::Path;
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

/// The name of the file, how it ended and how long that took; or what was wrong.
fn spring(path: &Path) -> Result<(String, Duration), String> {
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
            return Ok((error.to_string(), begin.elapsed()))
        }
        Err(error) => {
            return Err(format!(
                "expected `{expected}`, but it was not loaded: {error}"
            ))
        }
    };
    match kind {
        "builtin" if !policy.has_hook("decide") => return Ok(("no hook".into(), begin.elapsed())),
        "hook" | "answer" => {}
        _ => return Err(format!("expected `{expected}`, but it was loaded")),
    }
    let begin = Instant::now();
    let choice = policy.decide(&step());
    let took = begin.elapsed();
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
    Ok((choice.reason.chars().take(90).collect(), took))
}

#[test]
fn every_trick_of_the_escape_corpus_meets_its_refusal() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/escape");
    let mut paths: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    let only = std::env::var("TRICK").ok();
    let mut wrong = Vec::new();
    let (mut sprung, mut slowest) = (0, Vec::new());
    for path in paths.iter().filter(|p| {
        only.as_ref()
            .is_none_or(|only| p.to_string_lossy().contains(only))
    }) {
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        match spring(path) {
            Ok((reason, took)) => {
                println!("{name:<32} {:>9.2} ms  {reason}", took.as_secs_f64() * 1e3);
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
