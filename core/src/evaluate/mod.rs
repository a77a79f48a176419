//! How good a student is on steps it never saw: its own words under the grammar against the teacher's calls, and its loss.

pub mod ttt;

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::calls::{same_calls, CallFormat, GrammarOptions};
use crate::dataset::{rows, Sample};
use crate::gate::OfflineReport;
use crate::generate::{Engine, GenerateError, Job, Student, Ticket};
use crate::kernels::Pool;
use crate::train::{self, TrainError};

/// Replies in flight at a time, so that live steps find room in the engine.
const IN_FLIGHT: usize = 8;
/// Longest a reply may take before the step counts as unanswered: long enough that no busy machine makes a student worse.
const REPLY_SECONDS: u64 = 3600;
/// Time between two looks whether to go on, while a reply is waited for.
const LOOK: Duration = Duration::from_millis(250);

/// A held-out step with the tools it was played with.
pub struct Question<'a> {
    pub sample: &'a Sample,
    pub calls: Arc<CallFormat>,
}

/// Asks the student every question greedily, in the background of live serving, and compares. `held_out_share` is reported as given.
/// Questions that follow one another in one text are asked one after another, so that each reads only what is new.
/// `go_on` is asked between replies and four times a second while one is waited for; `None` comes back when it says no.
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
    let samples: Vec<&Sample> = questions.iter().map(|q| q.sample).collect();
    let texts = rows(&samples);
    let text_of = |at: usize| texts.partition_point(|text| text.end <= at);
    let mut next = 0;
    let mut done = 0;
    while done < questions.len() {
        while next < questions.len() && flying.len() < IN_FLIGHT {
            let text = text_of(next);
            if flying.iter().any(|(at, _)| text_of(*at) == text) {
                break;
            }
            flying.push_back((next, ask(engine, student, &questions[next], text)));
            next += 1;
        }
        let (at, ticket) = flying.pop_front().expect("questions are left");
        if !go_on(done) {
            return Ok(None);
        }
        let question = &questions[at];
        if let Some(ticket) = &ticket {
            let due = Instant::now() + Duration::from_secs(REPLY_SECONDS);
            while !ticket.wait(LOOK) && Instant::now() < due {
                if !go_on(done) {
                    return Ok(None);
                }
            }
        }
        let reply = ticket.and_then(|t| t.outcome());
        let drifted = matches!(reply, Some(Err(GenerateError::Drifted { .. })));
        let said = match reply {
            Some(Ok(reply)) => question.calls.parse_reply(&reply.text).ok(),
            _ => None,
        };
        let valid = said
            .as_ref()
            .is_some_and(|r| r.calls.iter().all(|c| question.calls.validate(c).is_ok()));
        let exact = valid && said.is_some_and(|r| same_calls(&r.calls, &question.sample.calls));
        report.drifted += drifted as u64;
        report.invalid += (!valid && !drifted) as u64;
        report.exact += exact as u64;
        let slice = report
            .domains
            .entry(question.sample.domain.clone())
            .or_default();
        slice.steps += 1;
        slice.exact += exact as u64;
        done += 1;
    }
    let rows: Vec<train::Sample> = texts
        .into_iter()
        .map(|text| as_train(&samples[text]))
        .collect();
    if !rows.is_empty() {
        report.loss = match student.learns {
            true => train::evaluate_loss(pool, &student.model, &rows)?.0,
            false => train::evaluate_loss(pool, &student.model.without_ttt(), &rows)?.0,
        };
    }
    Ok(Some(report))
}

/// The part of samples that training needs: one row for samples that one text holds (see [`rows`]), which is that of the last.
///
/// # Panics
/// Without a sample.
pub fn as_train(samples: &[&Sample]) -> train::Sample {
    let (last, earlier) = samples.split_last().expect("a row holds a sample");
    train::Sample {
        ids: last.ids.clone(),
        earlier: earlier
            .iter()
            .map(|sample| sample.target_start..sample.ids.len())
            .collect(),
        target_start: last.target_start,
        weight: last.weight,
    }
}

fn ask(
    engine: &Engine,
    student: &Arc<Student>,
    question: &Question,
    text: usize,
) -> Option<Ticket> {
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
        key: text as u128,
        prompt_ids: sample.ids[..sample.target_start].to_vec(),
        avoid: None,
        grammar: Some(grammar),
        max_tokens:
            (sample.ids.len() - sample.target_start + 64).min(crate::limits::DEFAULT_REPLY_TOKENS),
        deadline: Instant::now() + Duration::from_secs(REPLY_SECONDS),
        temperature: 0.0,
        seed: 0,
        fast_weights: student.learns,
        fast_rule: None,
        background: true,
    }))
}
