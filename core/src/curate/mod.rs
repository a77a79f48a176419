//! Which episodes, and which steps of them, a student may learn from. [`curate`] is a pure function from episodes to
//! [`Curated`]; every refusal is written in its [`Manifest`].
//!
//! Two sieves follow each other. The first is for episodes and fails closed: only a closed, complete episode that the
//! judge chain calls a success, whose integrity is unbroken and which is no duplicate may stay. The second is for steps:
//! a success is not made of good steps alone (of the successes of a teacher that succeeds on a quarter of its episodes,
//! about a quarter of the steps lead nowhere), so a bad step keeps its place in the context and loses its loss.

mod blocks;
mod consensus;
mod duplicates;
mod integrity;
mod judge;
mod manifest;
mod masks;
mod split;
mod text;

use std::collections::BTreeMap;

use crate::episode::{Actor, Episode, Outcome, Source, Split, Status, Step};
use crate::policy::{episode_info, CurateSettings, Policy};

pub use judge::{JudgeError, ProgramJudge};
pub use manifest::{Counts, Manifest, ManifestEntry, MaskedStep};
pub use masks::MaskReason;
pub use split::{group_of, SplitDocument};

/// What a curation may be given beside the episodes.
#[derive(Default)]
pub struct Extras<'a> {
    /// Judges asked in this order, after the host's outcome and before the policy.
    pub judges: Vec<ProgramJudge<'a>>,
    /// The split of an earlier curation: its groups keep their side.
    pub frozen: Option<SplitDocument>,
    /// Keeps failures too, and masks nothing but what is not the teacher's own words: the comparison that shows what
    /// curation is worth. Episodes that are open, incomplete or without an agent's step stay out all the same.
    pub unfiltered: bool,
}

/// What is left, what is not, and why.
#[derive(Clone, Debug, Default)]
pub struct Curated {
    /// In the order of their ids, which is the order of time.
    pub kept: Vec<Kept>,
    pub left_out: Vec<LeftOut>,
    pub split: SplitDocument,
    pub manifest: Manifest,
}

/// An episode that stays.
#[derive(Clone, Debug)]
pub struct Kept {
    pub episode: Episode,
    /// The judge chain's last word, with the integrity flags found.
    pub outcome: Outcome,
    pub split: Split,
    pub weight: f32,
    /// One for each step of the episode, in order: `None` is a target, any reason keeps the step as context only.
    pub masks: Vec<Option<MaskReason>>,
}

impl Kept {
    /// Positions in `episode.steps` of the steps that carry loss.
    pub fn targets(&self) -> impl Iterator<Item = usize> + '_ {
        self.masks
            .iter()
            .enumerate()
            .filter(|(_, mask)| mask.is_none())
            .map(|(i, _)| i)
    }
}

/// An episode that does not stay.
#[derive(Clone, Debug)]
pub struct LeftOut {
    pub episode: Episode,
    pub reason: LeftOutReason,
    /// A sentence with the particulars.
    pub detail: String,
}

#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum LeftOutReason {
    /// The host has not ended it.
    Open,
    /// A step was lost.
    Incomplete,
    /// No step of an agent.
    NoAgentStep,
    /// No judge gave an outcome, or it is `unknown`.
    Unknown,
    /// Judged partial, failed or aborted.
    NotSuccess,
    /// A judge returned an error.
    JudgeFailed,
    /// Success was claimed dishonestly, or without a single tool call where tools exist.
    Integrity,
    /// The same task, actions and observations as a kept episode.
    Duplicate,
    /// Nearly the same actions as a kept episode of the same task.
    NearDuplicate,
    /// Enough shorter successes of the task are kept, or enough episodes with the same words and actions under other tasks.
    TaskCap,
    /// Much longer than the successes of its domain.
    TooLong,
    /// The policy said no.
    Policy,
    /// Every step is masked.
    NoTarget,
}

/// Sorts episodes into kept and left out, with the built-in rules, `policy.label` and `policy.curate`.
pub fn curate(episodes: Vec<Episode>, policy: &dyn Policy, settings: &CurateSettings) -> Curated {
    curate_with(episodes, policy, settings, Extras::default())
}

/// [`curate`] with program judges, a frozen split, or no filter.
///
/// Order: completeness, judge chain, integrity, duplicates, length, step masks, cap per task, split, `policy.curate`. The
/// policy comes last and can only leave out more. Pure: the same episodes in any order give the same result, as long as
/// judges and policy are pure.
pub fn curate_with(
    mut episodes: Vec<Episode>,
    policy: &dyn Policy,
    settings: &CurateSettings,
    extras: Extras<'_>,
) -> Curated {
    episodes.sort_by_key(|e| e.episode_id);
    let mut left_out: Vec<LeftOut> = Vec::new();
    let mut passing: Vec<(Episode, Outcome)> = Vec::new();
    let unfiltered = extras.unfiltered;

    for episode in episodes {
        match judge::admit(&episode, policy, &extras.judges, unfiltered) {
            Ok(outcome) => passing.push((episode, outcome)),
            Err((reason, detail)) => left_out.push(LeftOut {
                episode,
                reason,
                detail,
            }),
        }
    }
    // Failures say as much as successes about where an action leads; they are read here and never trained on.
    let evidence: Vec<(&Episode, bool)> = left_out
        .iter()
        .filter(|l| l.reason == LeftOutReason::NotSuccess)
        .map(|l| (&l.episode, false))
        .chain(
            passing
                .iter()
                .map(|(e, o)| (e, o.status == Status::Success)),
        )
        .collect();
    let views = masks::StateViews::learn(evidence.iter().map(|(e, _)| *e));
    let consensus = (!unfiltered && settings.mask_derails)
        .then(|| consensus::Consensus::learn(&evidence, &views, settings));

    let mut masks: Vec<Vec<Option<MaskReason>>> = passing
        .iter()
        .map(|(episode, outcome)| {
            masks::step_masks(
                episode,
                &outcome.integrity.flags,
                &views,
                settings,
                unfiltered,
            )
        })
        .collect();
    if let Some(consensus) = &consensus {
        consensus.mask(passing.iter().map(|(e, _)| e), &mut masks);
    }

    let refusals = if unfiltered {
        BTreeMap::new()
    } else {
        duplicates::refuse(&passing, settings)
    };
    let (split, sides) = split::assign(
        passing.iter().map(|(e, _)| e),
        settings.held_out,
        extras.frozen,
    );

    let mut kept: Vec<Kept> = Vec::new();
    for (i, ((episode, outcome), masks)) in passing.into_iter().zip(masks).enumerate() {
        if let Some((reason, detail)) = refusals.get(&i) {
            left_out.push(LeftOut {
                episode,
                reason: *reason,
                detail: detail.clone(),
            });
            continue;
        }
        if masks.iter().all(Option::is_some) {
            let detail = no_target(&episode, &masks);
            left_out.push(LeftOut {
                episode,
                reason: LeftOutReason::NoTarget,
                detail,
            });
            continue;
        }
        let mut weight = 1.0;
        if !unfiltered {
            let masked: Vec<bool> = masks
                .iter()
                .zip(&episode.steps)
                .map(|(mask, step)| step.source == Source::Agent && mask.is_some())
                .collect();
            let verdict = policy.curate(&episode_info(&episode, Some(&outcome), &masked));
            if !verdict.use_it || !verdict.weight.is_finite() || verdict.weight <= 0.0 {
                let detail = if verdict.use_it {
                    format!("the policy gave weight {}", verdict.weight)
                } else {
                    format!("the policy said no: {}", verdict.reason)
                };
                left_out.push(LeftOut {
                    episode,
                    reason: LeftOutReason::Policy,
                    detail,
                });
                continue;
            }
            weight = verdict.weight;
        }
        kept.push(Kept {
            split: sides[i],
            episode,
            outcome,
            weight,
            masks,
        });
    }
    left_out.sort_by_key(|l| l.episode.episode_id);
    let manifest = Manifest::new(&kept, &left_out, settings, policy.id(), &split, unfiltered);
    Curated {
        kept,
        left_out,
        split,
        manifest,
    }
}

/// The agent's last step, if it was a call after which it saw what it had seen before, and nobody has spoken since.
pub fn without_effect(steps: &[Step]) -> Option<&Step> {
    let (last, step) = steps.iter().enumerate().next_back()?;
    let is_call = step.source == Source::Agent && !step.tool_calls.is_empty();
    let after = text::after(step);
    (is_call && !after.is_empty() && after == text::seen(steps, last)).then_some(step)
}

fn no_target(episode: &Episode, masks: &[Option<MaskReason>]) -> String {
    let agent: Vec<_> = episode
        .steps
        .iter()
        .zip(masks)
        .filter(|(s, _)| s.source == Source::Agent)
        .collect();
    let students = agent
        .iter()
        .filter(|(s, _)| s.actor == Actor::Student)
        .count();
    format!(
        "none of its {} agent steps may be learned from ({students} are a student's)",
        agent.len()
    )
}

#[cfg(test)]
pub(crate) mod fixtures;
#[cfg(test)]
mod tests;
