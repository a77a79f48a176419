//! Steps of a good episode that carry no loss: they stay as context, because what follows answers to them.

use std::collections::{BTreeSet, HashMap};

use serde::{Deserialize, Serialize};

use crate::episode::{Actor, Episode, Source, Step};
use crate::policy::CurateSettings;

use super::{integrity, text};

/// Repeated calls of a tool that must have been seen before its results count as views of a changing state.
const MIN_REPEATS: usize = 10;
/// Share of repeated calls whose result must differ for that.
const MIN_CHANGING: f64 = 0.5;
/// Likeness of words from which one result is worded like another.
const ALIKE: f64 = 0.2;
/// Share of results that must be worded like the one before. Over 0.94 in grid worlds, under 0.46 in text adventures and in a
/// lab simulator whose results tell what was done.
const MIN_ALIKE: f64 = 0.7;
/// Characters from which an unchanged result of another call is a no-op, not an acknowledgement such as "ok".
const MIN_NOOP_CHARS: usize = 24;

/// Why a step is context only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MaskReason {
    /// A system or user step.
    NotAgent,
    /// Written by a student, a script or an unknown hand.
    NotTeacher,
    /// Repeated from another episode.
    Copied,
    /// Its label says so.
    Label,
    /// Neither call nor text.
    Empty,
    /// Arguments that are no JSON object.
    Unparseable,
    /// Its result is an error.
    Error,
    /// It answers a tool result that gives orders.
    Injected,
    /// The same action again on the same observation.
    Repeat,
    /// Nothing that the agent sees changed.
    NoOp,
    /// Part of a way that led back to where it began.
    Loop,
    /// Leads away from success where a better action is well known.
    Derail,
}

impl MaskReason {
    /// The name used in the manifest.
    pub fn name(self) -> &'static str {
        match self {
            MaskReason::NotAgent => "not_agent",
            MaskReason::NotTeacher => "not_teacher",
            MaskReason::Copied => "copied",
            MaskReason::Label => "label",
            MaskReason::Empty => "empty",
            MaskReason::Unparseable => "unparseable",
            MaskReason::Error => "error",
            MaskReason::Injected => "injected",
            MaskReason::Repeat => "repeat",
            MaskReason::NoOp => "no_op",
            MaskReason::Loop => "loop",
            MaskReason::Derail => "derail",
        }
    }
}

/// Tools whose results show the state of a world, learned from the episodes.
///
/// Where a result is such a view ("red ball 2 ahead"), seeing the same text again means being in the same place again, and
/// what lay between was for nothing. Where a result answers the call alone (a look-up), tells what was done ("you take the
/// knife") or says only "ok", the same text again means no such thing. Views differ from these in two ways that can be
/// counted: a repeated call gives something else each time, as a turn to the left does and a look-up does not; and each
/// result is worded like the one before.
#[derive(Debug, Default)]
pub struct StateViews {
    tools: HashMap<String, Habits>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Habits {
    /// Calls made before in the same episode, and how many of them had another result then.
    repeats: usize,
    changing: usize,
    /// Results that follow another result, and how many of them are worded like it.
    pairs: usize,
    alike: usize,
}

impl StateViews {
    /// Counts, within each episode, what repeated calls return and how results follow each other.
    pub fn learn<'a>(episodes: impl Iterator<Item = &'a Episode>) -> Self {
        let mut tools: HashMap<String, Habits> = HashMap::new();
        for episode in episodes {
            let calls: Vec<&Step> = episode
                .steps
                .iter()
                .filter(|s| s.tool_calls.len() == 1)
                .collect();
            let mut last: HashMap<String, String> = HashMap::new();
            let mut before: Option<String> = None;
            for (n, step) in calls.iter().enumerate() {
                let result = text::after(step);
                let habits = tools.entry(step.tool_calls[0].name.clone()).or_default();
                if let Some(earlier) = last.insert(text::action(step), result.clone()) {
                    habits.repeats += 1;
                    habits.changing += usize::from(earlier != result);
                }
                // The last result often says how it ended, not what there is to see.
                if let Some(before) = before.filter(|_| n + 1 < calls.len()) {
                    habits.pairs += 1;
                    habits.alike += usize::from(worded_alike(&before, &result));
                }
                before = Some(result);
            }
        }
        Self { tools }
    }

    /// True if all results of this step's calls are views of a state.
    pub fn shows_state(&self, step: &Step) -> bool {
        let is_view = |habits: &Habits| {
            habits.repeats >= MIN_REPEATS
                && habits.changing as f64 >= MIN_CHANGING * habits.repeats as f64
                && habits.alike as f64 >= MIN_ALIKE * habits.pairs as f64
        };
        !step.tool_calls.is_empty()
            && step
                .tool_calls
                .iter()
                .all(|call| self.tools.get(&call.name).is_some_and(is_view))
    }
}

/// Jaccard index of the sets of words, numbers left aside, of at least [`ALIKE`].
fn worded_alike(a: &str, b: &str) -> bool {
    let words = |text: &str| -> BTreeSet<String> {
        text.split(|c: char| !c.is_alphabetic())
            .filter(|w| !w.is_empty())
            .map(str::to_lowercase)
            .collect()
    };
    let (a, b) = (words(a), words(b));
    let both = a.intersection(&b).count() as f64;
    both >= ALIKE * (a.len() + b.len()) as f64 - ALIKE * both
}

/// The mask of each step, in order; `None` is a target. `flags` are the episode's integrity flags. Unfiltered, only what is
/// not the teacher's own readable words is masked.
pub fn step_masks(
    episode: &Episode,
    flags: &[String],
    views: &StateViews,
    settings: &CurateSettings,
    unfiltered: bool,
) -> Vec<Option<MaskReason>> {
    let mut masks: Vec<Option<MaskReason>> = episode.steps.iter().map(never_a_target).collect();
    if unfiltered {
        return masks;
    }
    let flagged = flags.iter().any(|f| f == integrity::INJECTION);
    let mut before: Option<(String, String)> = None;
    let mut last_step: Option<&Step> = None;
    for (i, step) in episode.steps.iter().enumerate() {
        if step.source != Source::Agent {
            continue;
        }
        let (seen, action) = (text::seen(&episode.steps, i), text::action(step));
        let result = text::after(step);
        let again = before.as_ref().is_some_and(|(_, a)| *a == action);
        let same_sight = before.as_ref().is_some_and(|(s, _)| *s == seen);
        let unchanged = !step.observations.is_empty() && result == seen;
        let found = if settings.mask_errors && is_error(step, &result) {
            Some(MaskReason::Error)
        } else if flagged && last_step.is_some_and(integrity::injected) {
            Some(MaskReason::Injected)
        } else if settings.mask_repeats && again && same_sight {
            Some(MaskReason::Repeat)
        } else if settings.mask_noops
            && unchanged
            && (again || views.shows_state(step) || result.len() >= MIN_NOOP_CHARS)
        {
            Some(MaskReason::NoOp)
        } else {
            None
        };
        masks[i] = masks[i].or(found);
        before = Some((seen, action));
        last_step = Some(step);
    }
    if settings.mask_loops {
        erase_loops(episode, views, &mut masks);
    }
    masks
}

/// Masks every step that the loop-erased path of the episode does not contain (G. F. Lawler, "A self-avoiding random walk",
/// Duke Math. J. 47, 1980): on seeing what was seen before, everything since then is dropped from the path.
fn erase_loops(episode: &Episode, views: &StateViews, masks: &mut [Option<MaskReason>]) {
    let mut path: Vec<(usize, String)> = Vec::new();
    for (i, step) in episode.steps.iter().enumerate() {
        match step.source {
            Source::System => {}
            // A new word of the user's is a new goal: what looked the same before it is no longer the same place.
            Source::User => path.clear(),
            Source::Agent => {
                let seen = text::seen(&episode.steps, i);
                if let Some(at) = path
                    .iter()
                    .position(|(_, s)| !seen.is_empty() && *s == seen)
                {
                    for (erased, _) in path.drain(at..) {
                        masks[erased] = masks[erased].or(Some(MaskReason::Loop));
                    }
                }
                if views.shows_state(step) {
                    path.push((i, seen));
                } else {
                    // It may have changed what no view shows.
                    path.clear();
                }
            }
        }
    }
}

fn never_a_target(step: &Step) -> Option<MaskReason> {
    if step.source != Source::Agent {
        Some(MaskReason::NotAgent)
    } else if !matches!(step.actor, Actor::Teacher | Actor::Human) {
        Some(MaskReason::NotTeacher)
    } else if step.copied_context {
        Some(MaskReason::Copied)
    } else if step
        .label
        .as_ref()
        .is_some_and(|l| !l.train || !l.weight.is_finite() || l.weight <= 0.0)
    {
        Some(MaskReason::Label)
    } else if step.tool_calls.iter().any(|c| c.is_unparseable()) {
        Some(MaskReason::Unparseable)
    } else if step.tool_calls.is_empty()
        && step
            .message
            .as_ref()
            .is_none_or(|m| m.text().trim().is_empty())
    {
        Some(MaskReason::Empty)
    } else {
        None
    }
}

/// The host's word, or a result that begins like the errors of common tools.
fn is_error(step: &Step, result: &str) -> bool {
    let start: String = result
        .chars()
        .take(16)
        .collect::<String>()
        .to_ascii_lowercase();
    step.observations.iter().any(|o| o.is_error)
        || ["error:", "error ", "traceback (most", "exception:"]
            .iter()
            .any(|p| start.starts_with(p))
}
