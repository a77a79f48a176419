use super::*;
use crate::curate::{LeftOutReason, Manifest, ManifestEntry, MaskReason, MaskedStep};
use crate::episode::{Actor, DecisionRecord, Episode, EpisodeId, Outcome, Source, Status, Step};

/// A store in the middle of its life, with every field filled.
fn sample() -> ReportData {
    serde_json::from_str(include_str!("sample.json")).expect("sample.json is a ReportData")
}

/// Names of the tags in order. A string that broke out of its place would add one.
fn tags(html: &str) -> Vec<String> {
    html.match_indices('<')
        .map(|(at, _)| {
            html[at + 1..]
                .chars()
                .take_while(|c| c.is_ascii_alphanumeric() || *c == '/' || *c == '!')
                .collect()
        })
        .collect()
}

#[test]
fn the_page_answers_the_questions_in_words() {
    let html = render(&sample());
    for text in [
        "Student 1 stands in for the teacher",
        "the teacher did in 27",
        "the outcome is a failure",
        "repeats an action that changed nothing",
        "lower end of the anytime-valid difference is +0.11.",
        "58 % equal what was done",
        "student 1 promoted",
        "AVX-512",
        "2026-11-22",
    ] {
        assert!(html.contains(text), "the page does not say {text:?}");
    }
}

#[test]
fn the_page_loads_nothing_and_runs_nothing() {
    let html = render(&sample());
    for forbidden in [
        "<script",
        "http://",
        "https://",
        "src=",
        "@import",
        "url(",
        "<link",
        "javascript:",
    ] {
        assert!(!html.contains(forbidden), "the page holds {forbidden:?}");
    }
    assert!(html.contains("default-src 'none'"));
}

#[test]
fn hostile_strings_add_no_tag_and_no_attribute() {
    let hostile =
        "\"><script>alert(1)</script><img src=x onerror='alert(2)'>\u{202e}</style></svg>&lt;";
    let benign = "plain words";
    let mut rendered = Vec::new();
    for text in [hostile, benign] {
        let mut value = serde_json::to_value(sample()).unwrap();
        replace_strings(&mut value, text, &|v| {
            serde_json::from_value::<ReportData>(v.clone()).is_ok()
        });
        rendered.push(render(&serde_json::from_value(value).unwrap()));
    }
    assert!(
        rendered[0].contains("&lt;script&gt;"),
        "the hostile text was not shown at all"
    );
    assert!(!rendered[0].contains("onerror='") && !rendered[0].contains('\u{202e}'));
    assert_eq!(tags(&rendered[0]), tags(&rendered[1]));
    assert_eq!(
        rendered[0].matches('"').count(),
        rendered[1].matches('"').count()
    );
}

/// Puts `text` in the place of every string that is free text (an enum's name is put back).
fn replace_strings(
    root: &mut serde_json::Value,
    text: &str,
    valid: &dyn Fn(&serde_json::Value) -> bool,
) {
    fn paths(value: &serde_json::Value, at: String, out: &mut Vec<String>) {
        match value {
            serde_json::Value::String(_) => out.push(at),
            serde_json::Value::Array(items) => items
                .iter()
                .enumerate()
                .for_each(|(i, v)| paths(v, format!("{at}/{i}"), out)),
            serde_json::Value::Object(map) => map
                .iter()
                .for_each(|(k, v)| paths(v, format!("{at}/{k}"), out)),
            _ => {}
        }
    }
    let mut all = Vec::new();
    paths(root, String::new(), &mut all);
    for path in all {
        let old = std::mem::replace(root.pointer_mut(&path).unwrap(), text.into());
        if !valid(root) {
            *root.pointer_mut(&path).unwrap() = old;
        }
    }
}

#[test]
fn an_empty_store_gets_a_page_that_says_so() {
    let html = render(&ReportData::default());
    assert!(html.contains("Nothing has been recorded yet"));
    assert!(html.contains("No candidate has come to the gate."));
    assert!(!html.contains("NaN"));
}

#[test]
fn a_refused_student_is_reported_with_the_reason() {
    let mut data = sample();
    data.serving = None;
    data.gates.remove(0);
    let html = render(&data);
    assert!(html.contains("The teacher answers"));
    assert!(html.contains("Student 2 was not let through the gate (held). Only 6 canary episodes have an outcome; 10 are needed."));
}

#[test]
fn numbers_that_are_not_numbers_leave_the_page_whole() {
    let mut data = sample();
    data.curves[0].train[3].1 = f64::NAN;
    data.curves[0].held_out[1] = (f64::INFINITY, 1.0);
    data.success[0].wilson = [f64::NAN, 7.0];
    data.success[1].anytime = Some([0.9, -1.0]);
    data.students[0].held_out_loss = Some(f64::NAN);
    let html = render(&data);
    assert!(!html.contains("NaN") && !html.contains("inf\""));
}

#[test]
fn long_curves_are_thinned_and_keep_their_ends() {
    let mut data = sample();
    data.curves[0].train = (0..100_000).map(|i| (i as f64, 2.0)).collect();
    assert!(render(&data).len() < 100_000);
}

#[test]
fn the_timeline_counts_every_step_once_in_few_buckets() {
    let answers: Vec<_> = (0..5000u64)
        .map(|i| {
            (
                1_000_000 + (i * 7919) % 3_600_000,
                if i % 3 == 0 {
                    Answered::Student
                } else {
                    Answered::Teacher
                },
            )
        })
        .collect();
    let buckets = timeline(&answers);
    assert!(buckets.len() <= MAX_BUCKETS);
    assert_eq!(
        buckets.iter().map(|b| b.student + b.teacher).sum::<u64>(),
        5000
    );
    assert_eq!(buckets.iter().map(|b| b.student).sum::<u64>(), 1667);
    assert_eq!(timeline(&[(5, Answered::Deferred)]).len(), 1);
    assert!(timeline(&[]).is_empty());
}

fn played(actor: Actor, weights: Option<&str>, deferred: bool) -> Episode {
    let step = Step {
        source: Source::Agent,
        actor,
        weights_id: weights.map(str::to_string),
        ended_at_ms: Some(7_000),
        decision: Some(DecisionRecord {
            deferred,
            ..DecisionRecord::default()
        }),
        ..Step::default()
    };
    Episode {
        steps: vec![step.clone(), step],
        closed: true,
        outcome: Some(Outcome {
            status: Status::Success,
            ..Outcome::default()
        }),
        ..Episode::default()
    }
}

#[test]
fn an_episode_counts_for_the_one_who_played_all_of_it() {
    let teacher = played(Actor::Teacher, None, false);
    assert_eq!(player(&teacher), Some((Player::Teacher, None)));
    let student = played(Actor::Student, Some("abc"), false);
    assert_eq!(player(&student), Some((Player::Student, Some("abc"))));
    let mut mixed = student.clone();
    mixed.steps[1].actor = Actor::Teacher;
    assert_eq!(player(&mixed), None);
    let mut two_students = student.clone();
    two_students.steps[1].weights_id = Some("def".into());
    assert_eq!(player(&two_students), None);
    let mut imported = teacher.clone();
    imported.provenance.imported_at_ms = Some(1);
    assert_eq!((player(&imported), answers(&imported)), (None, vec![]));
    assert_eq!(succeeded(&teacher), Some(true));
    assert_eq!(
        succeeded(&Episode {
            closed: false,
            ..teacher
        }),
        None
    );
}

#[test]
fn a_step_whose_student_was_not_used_counts_as_deferred() {
    let episode = played(Actor::Teacher, None, true);
    assert_eq!(answers(&episode), vec![(7_000, Answered::Deferred); 2]);
}

#[test]
fn a_manifest_becomes_rows_in_words_with_examples() {
    let entry =
        |n: u8, kept: bool, reason: Option<LeftOutReason>, masked: Vec<MaskedStep>| ManifestEntry {
            episode: EpisodeId([n; 16]),
            task: format!("task-{n}"),
            domain: String::new(),
            group: String::new(),
            content: String::new(),
            kept,
            split: None,
            reason,
            detail: String::new(),
            weight: 1.0,
            agent_steps: 2,
            targets: 1,
            flags: Vec::new(),
            masked,
        };
    let masked = vec![MaskedStep {
        step: 1,
        reason: MaskReason::Loop,
    }];
    let mut manifest = Manifest {
        episodes: (0..9)
            .map(|n| entry(n, false, Some(LeftOutReason::NotSuccess), Vec::new()))
            .collect(),
        ..Manifest::default()
    };
    manifest.episodes.push(entry(9, true, None, masked));
    manifest
        .episodes
        .push(entry(10, false, Some(LeftOutReason::Unknown), Vec::new()));
    manifest.counts.episodes = 11;
    manifest.counts.kept = 1;
    let summary = DatasetSummary::new(&manifest, (1, 0), 100, 5);
    assert_eq!(summary.left_out[0].reason, "it did not succeed");
    assert_eq!(
        (
            summary.left_out[0].episodes,
            summary.left_out[0].examples.len()
        ),
        (9, 5)
    );
    assert_eq!(summary.left_out[1].episodes, 1);
    assert_eq!(summary.masked[0].steps, 1);
    assert_eq!((summary.episodes_seen, summary.episodes_kept), (11, 1));
}

#[test]
fn a_row_of_success_carries_both_intervals_and_the_patient_one_is_wider() {
    let row = SuccessRow::new(Player::Student, "Student 1", 30, 40);
    let anytime = row.anytime.unwrap();
    assert!(row.wilson[0] < 0.75 && 0.75 < row.wilson[1]);
    assert!(anytime[0] < row.wilson[0] && row.wilson[1] < anytime[1]);
}
