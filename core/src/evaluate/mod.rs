//! How good a student is on steps it never saw: its own words under the grammar against the teacher's calls, and its loss.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::calls::{same_calls, CallFormat, GrammarOptions};
use crate::dataset::Sample;
use crate::gate::OfflineReport;
use crate::generate::{Engine, Job, Student, Ticket};
use crate::kernels::Pool;
use crate::train::{self, TrainError};

/// Replies in flight at a time, so that live steps find room in the engine.
const IN_FLIGHT: usize = 8;
/// Longest a reply may take before the step counts as unanswered.
const REPLY_SECONDS: u64 = 120;

/// A held-out step with the tools it was played with.
pub struct Question<'a> {
    pub sample: &'a Sample,
    pub calls: Arc<CallFormat>,
}

/// Asks the student every question greedily, in the background of live serving, and compares. `held_out_share` is reported as given.
/// `go_on` is asked between replies; `None` comes back when it says no.
///
/// # Errors
/// [`TrainError`] if the loss cannot be computed.
pub fn evaluate(
    pool: &Pool,
    engine: &Engine,
    student: &Arc<Student>,
    questions: &[Question],
    held_out_share: f64,
    go_on: &mut dyn FnMut(usize) -> bool,
) -> Result<Option<OfflineReport>, TrainError> {
    let mut report = OfflineReport {
        steps: questions.len() as u64,
        held_out_share,
        ..OfflineReport::default()
    };
    let mut episodes: Vec<_> = questions.iter().map(|q| q.sample.episode).collect();
    episodes.sort();
    episodes.dedup();
    report.episodes = episodes.len() as u64;
    let mut flying: std::collections::VecDeque<(usize, Option<Ticket>)> = Default::default();
    let mut next = 0;
    let mut done = 0;
    while done < questions.len() {
        while next < questions.len() && flying.len() < IN_FLIGHT {
            flying.push_back((next, ask(engine, student, &questions[next], next)));
            next += 1;
        }
        let (at, ticket) = flying.pop_front().expect("questions are left");
        if !go_on(done) {
            return Ok(None);
        }
        let question = &questions[at];
        let reply = ticket.and_then(|t| {
            t.wait(Duration::from_secs(REPLY_SECONDS));
            t.outcome()?.ok()
        });
        let said = reply.and_then(|r| question.calls.parse_reply(&r.text).ok());
        let valid = said
            .as_ref()
            .is_some_and(|r| r.calls.iter().all(|c| question.calls.validate(c).is_ok()));
        let exact = valid && said.is_some_and(|r| same_calls(&r.calls, &question.sample.calls));
        report.invalid += !valid as u64;
        report.exact += exact as u64;
        let slice = report
            .domains
            .entry(question.sample.domain.clone())
            .or_default();
        slice.steps += 1;
        slice.exact += exact as u64;
        done += 1;
    }
    let samples: Vec<train::Sample> = questions.iter().map(|q| as_train(q.sample)).collect();
    if !samples.is_empty() {
        report.loss = train::evaluate_loss(pool, &student.model, &samples)?.0;
    }
    Ok(Some(report))
}

/// The part of a sample that training needs.
pub fn as_train(sample: &Sample) -> train::Sample {
    train::Sample {
        ids: sample.ids.clone(),
        target_start: sample.target_start,
        weight: sample.weight,
    }
}

fn ask(engine: &Engine, student: &Arc<Student>, question: &Question, at: usize) -> Option<Ticket> {
    let sample = question.sample;
    // What the teacher did decides whether text is a possible answer.
    let options = GrammarOptions {
        allow_text: sample.calls.is_empty(),
        max_calls: sample.calls.len().max(1),
        require_call: !sample.calls.is_empty(),
    };
    let lark = question.calls.lark(options).ok()?;
    let grammar = student.chat.grammar(&lark).ok()?;
    Some(engine.submit(Job {
        student: student.clone(),
        key: at as u128,
        prompt_ids: sample.ids[..sample.target_start].to_vec(),
        avoid: None,
        grammar: Some(grammar),
        max_tokens:
            (sample.ids.len() - sample.target_start + 64).min(crate::limits::DEFAULT_REPLY_TOKENS),
        deadline: Instant::now() + Duration::from_secs(REPLY_SECONDS),
        temperature: 0.0,
        seed: 0,
        fast_weights: true,
        fast_rule: None,
        background: true,
    }))
}
