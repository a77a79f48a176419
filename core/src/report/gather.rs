//! From the values of other rooms to rows of the page: counting and wording, nothing that reads a store.

use std::collections::BTreeMap;

use super::{
    Answered, Bucket, Curve, DatasetSummary, LeftOutRow, MaskedRow, Player, Stage, StageState,
    SuccessRow, MAX_BUCKETS,
};
use crate::curate::{LeftOutReason, Manifest, MaskReason};
use crate::episode::{Actor, Episode, Source, Status};
use crate::gate::{anytime_interval, wilson, GateDecision, Verdict};
use crate::train::CurvePoint;

/// The intervals' error rate: they hold at 95 %.
const ALPHA: f64 = 0.05;
/// Examples named for each reason.
const MAX_EXAMPLES: usize = 5;

/// Counts answered steps into at most [`MAX_BUCKETS`] buckets of equal length, from the first step to the last.
/// Gives nothing for no steps; the order of `answers` does not matter.
pub fn timeline(answers: &[(u64, Answered)]) -> Vec<Bucket> {
    let (Some(first), Some(last)) = (
        answers.iter().map(|a| a.0).min(),
        answers.iter().map(|a| a.0).max(),
    ) else {
        return Vec::new();
    };
    let width = ((last - first) / MAX_BUCKETS as u64 + 1).max(1000);
    let count = (last - first) / width + 1;
    let mut buckets: Vec<Bucket> = (0..count)
        .map(|i| Bucket {
            start_ms: first + i * width,
            end_ms: first + (i + 1) * width,
            ..Bucket::default()
        })
        .collect();
    for (at, who) in answers {
        let bucket = &mut buckets[((at - first) / width) as usize];
        match who {
            Answered::Teacher => bucket.teacher += 1,
            Answered::Student => bucket.student += 1,
            Answered::Deferred => bucket.deferred += 1,
        }
    }
    buckets
}

/// When each live agent step of an episode happened, and who answered it. Imported episodes give nothing: they were
/// answered elsewhere. A step without a time of its own counts at its episode's beginning.
pub fn answers(episode: &Episode) -> Vec<(u64, Answered)> {
    if episode.provenance.imported_at_ms.is_some() {
        return Vec::new();
    }
    let agent_steps = episode.steps.iter().filter(|s| s.source == Source::Agent);
    agent_steps
        .filter_map(|step| {
            let deferred = step.decision.as_ref().is_some_and(|d| d.deferred);
            let who = match step.actor {
                Actor::Student => Answered::Student,
                Actor::Teacher if deferred => Answered::Deferred,
                Actor::Teacher => Answered::Teacher,
                _ => return None,
            };
            let at = step.ended_at_ms.or(step.started_at_ms);
            Some((at.unwrap_or(episode.started_at_ms), who))
        })
        .collect()
}

/// Who played a whole live episode: the teacher alone, or this student alone. `None` for mixed and imported ones, which
/// say nothing about either.
pub fn player(episode: &Episode) -> Option<(Player, Option<&str>)> {
    if episode.provenance.imported_at_ms.is_some() {
        return None;
    }
    let mut agent_steps = episode.steps.iter().filter(|s| s.source == Source::Agent);
    let first = agent_steps.next()?;
    let who = |actor| match actor {
        Actor::Teacher => Some(Player::Teacher),
        Actor::Student => Some(Player::Student),
        _ => None,
    };
    let player = who(first.actor)?;
    agent_steps
        .all(|s| who(s.actor) == Some(player) && s.weights_id == first.weights_id)
        .then_some((player, first.weights_id.as_deref()))
}

/// True or false for an episode that counts towards a success rate; `None` for an open or unjudged one.
pub fn succeeded(episode: &Episode) -> Option<bool> {
    match episode.outcome.as_ref().filter(|_| episode.closed)?.status {
        Status::Success => Some(true),
        Status::Failure | Status::Partial | Status::Aborted => Some(false),
        Status::Unknown => None,
    }
}

impl SuccessRow {
    /// A row with both intervals at 95 %.
    pub fn new(player: Player, label: impl Into<String>, successes: u64, episodes: u64) -> Self {
        let (low, high) = wilson(successes, episodes, ALPHA);
        let (anytime_low, anytime_high) = anytime_interval(successes, episodes, ALPHA);
        Self {
            player,
            label: label.into(),
            successes,
            episodes,
            wilson: [low, high],
            anytime: Some([anytime_low, anytime_high]),
        }
    }
}

impl Curve {
    /// The curves of a training.
    pub fn new(
        job: u64,
        version: Option<u64>,
        points: &[CurvePoint],
        kept_at: Option<u64>,
    ) -> Self {
        let at = |p: &CurvePoint| p.tokens as f64;
        Self {
            job,
            version,
            train: points.iter().map(|p| (at(p), p.loss)).collect(),
            held_out: points
                .iter()
                .filter_map(|p| Some((at(p), p.held_out_loss?)))
                .collect(),
            kept_at: kept_at.map(|tokens| tokens as f64),
        }
    }
}

impl Stage {
    /// A stage of the gate as its verdict left it.
    pub fn new(name: impl Into<String>, verdict: &Verdict) -> Self {
        let state = match verdict.decision {
            GateDecision::Pass => StageState::Passed,
            GateDecision::Wait => StageState::Running,
            GateDecision::Hold | GateDecision::Reject => StageState::Refused,
        };
        let mut sentences = verdict.reasons.iter();
        let sentence = sentences.next().cloned().unwrap_or_default();
        let needs = verdict.needs.iter().map(|n| format!("needs {n}"));
        Self {
            name: name.into(),
            state,
            sentence,
            reasons: sentences.cloned().chain(needs).collect(),
            facts: Vec::new(),
        }
    }
}

impl DatasetSummary {
    /// The account of a curation, largest groups first. `tokens` and `target_tokens` are counted by the dataset, and so
    /// are `samples` as (train, held out).
    pub fn new(manifest: &Manifest, samples: (u64, u64), tokens: u64, target_tokens: u64) -> Self {
        let mut left_out: BTreeMap<LeftOutReason, LeftOutRow> = BTreeMap::new();
        let mut masked: BTreeMap<MaskReason, u64> = BTreeMap::new();
        for entry in &manifest.episodes {
            if let Some(reason) = entry.reason.filter(|_| !entry.kept) {
                let row = left_out.entry(reason).or_default();
                row.episodes += 1;
                if row.examples.len() < MAX_EXAMPLES {
                    let id: String = entry.episode.to_string().chars().take(12).collect();
                    let detail = if entry.detail.is_empty() {
                        String::new()
                    } else {
                        format!(": {}", entry.detail)
                    };
                    row.examples.push(format!("{id}… {}{detail}", entry.task));
                }
            }
            for step in entry.masked.iter().filter(|_| entry.kept) {
                *masked.entry(step.reason).or_default() += 1;
            }
        }
        let mut left_out: Vec<LeftOutRow> = left_out
            .into_iter()
            .map(|(reason, row)| LeftOutRow {
                reason: left_out_words(reason).into(),
                ..row
            })
            .collect();
        left_out.sort_by_key(|row| std::cmp::Reverse(row.episodes));
        let mut masked: Vec<MaskedRow> = masked
            .into_iter()
            .map(|(reason, steps)| MaskedRow {
                reason: mask_words(reason).into(),
                steps,
            })
            .collect();
        masked.sort_by_key(|row| std::cmp::Reverse(row.steps));
        Self {
            hash: manifest.hash.clone(),
            episodes_seen: manifest.counts.episodes as u64,
            episodes_kept: manifest.counts.kept as u64,
            samples_train: samples.0,
            samples_held_out: samples.1,
            tokens,
            target_tokens,
            left_out,
            masked,
        }
    }
}

fn left_out_words(reason: LeftOutReason) -> &'static str {
    match reason {
        LeftOutReason::Open => "it has not ended",
        LeftOutReason::Incomplete => "a step of it was lost",
        LeftOutReason::NoAgentStep => "no agent acted in it",
        LeftOutReason::Unknown => "nobody knows how it ended",
        LeftOutReason::NotSuccess => "it did not succeed",
        LeftOutReason::JudgeFailed => "a judge failed on it",
        LeftOutReason::Integrity => "its success is not above suspicion",
        LeftOutReason::Duplicate => "it equals a kept episode",
        LeftOutReason::NearDuplicate => "it nearly equals a kept episode",
        LeftOutReason::TaskCap => "enough successes of its task are kept",
        LeftOutReason::TooLong => "it took much longer than others of its kind",
        LeftOutReason::Policy => "the policy said no",
        LeftOutReason::NoTarget => "no step of it is left to learn from",
    }
}

fn mask_words(reason: MaskReason) -> &'static str {
    match reason {
        MaskReason::NotAgent => "not the agent's turn",
        MaskReason::NotTeacher => "not the teacher's words",
        MaskReason::Copied => "repeated from another episode",
        MaskReason::Label => "labelled not to be learned",
        MaskReason::Empty => "says nothing",
        MaskReason::Unparseable => "its arguments are no JSON object",
        MaskReason::Error => "the call ended in an error",
        MaskReason::Injected => "answers a tool result that gives orders",
        MaskReason::Repeat => "the same action again on the same observation",
        MaskReason::NoOp => "changed nothing that the agent sees",
        MaskReason::Loop => "part of a way that led back to where it began",
        MaskReason::Derail => "leads away from success where a better action is known",
    }
}
