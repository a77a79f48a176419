//! Finds the steps that led away from success, by what all episodes together know of where an action leads.
//!
//! A *situation* is what of the observation concerns the goal: the clauses that share content words with it, with the
//! goal's own words replaced by their number ("0 1 3 right" for "purple key 3 right" under "go to the purple key"), so that
//! episodes with other goals share it. Every recorded step, of failures too, is a transition between situations; value
//! iteration over the observed transitions,
//!
//! ```text
//! Q(s, a) = γ / (n(s, a) + ½) · Σ_s' n(s, a, s') V(s'),   V(s) = max_a Q(s, a),   V(success) = 1,
//! ```
//!
//! gives each action its discounted chance of success when followed by the best that was seen (Sutton and Barto,
//! "Reinforcement Learning", 2nd ed., section 4.4, with the model counted from data; the ½ is a visit that led nowhere, so
//! that one lucky passage proves little). It needs no majority of good steps: where an action leads is a fact, whoever took
//! it and why. A step is masked if its value lies clearly below that of an action that is well known in its situation and
//! was shown in a success. Steps are only ever taken away, and only where results show a state (see [`StateViews`]).
//!
//! A situation also says which actions are blocked in it, and which were at the step before (see [`Blocks`]): the way around
//! an obstacle leads away from the goal first, and without this every such step would look like a wrong one.

use std::collections::{BTreeSet, HashMap};

use crate::episode::{Episode, Source};
use crate::policy::CurateSettings;

use super::blocks::Blocks;
use super::masks::{MaskReason, StateViews};
use super::text;

const DISCOUNT: f64 = 0.9;
const SWEEPS: usize = 60;
/// Clauses of the observation that make up a situation.
const MAX_CLAUSES: usize = 3;
/// Content words a clause must share with the goal (fewer if the goal has fewer).
const MIN_OVERLAP: usize = 2;
/// Times the better action must have been played in successes.
const MIN_SHOWN: usize = 2;
/// If more than this share of a domain's targets would go, situations do not describe that domain, and nothing goes.
const MAX_SHARE: f64 = 0.35;
/// Words that say nothing about what a goal is about.
const FUNCTION_WORDS: [&str; 34] = [
    "a", "an", "the", "to", "of", "in", "on", "at", "by", "with", "for", "from", "and", "or",
    "then", "after", "before", "you", "your", "is", "are", "be", "it", "this", "that", "next",
    "please", "go", "put", "pick", "up", "get", "into", "i",
];

#[derive(Default)]
struct Action {
    /// Next situation and how often.
    next: HashMap<usize, usize>,
    visits: usize,
    shown: usize,
    value: f64,
}

/// What is known of each situation.
pub struct Consensus<'a> {
    views: &'a StateViews,
    blocks: Blocks,
    support: usize,
    tolerance: f64,
    index: HashMap<String, usize>,
    /// For each situation its actions, in order of first sight.
    situations: Vec<Vec<(String, Action)>>,
}

/// Targets of a domain, and which of them (episode, step) lead away from success.
#[derive(Default)]
struct InDomain {
    targets: usize,
    worse: Vec<(usize, usize)>,
}

/// The situation after a success.
const WON: usize = 0;

impl<'a> Consensus<'a> {
    /// `episodes`: judged ones with whether each succeeded.
    pub fn learn(
        episodes: &[(&Episode, bool)],
        views: &'a StateViews,
        settings: &CurateSettings,
    ) -> Self {
        let mut this = Self {
            views,
            blocks: Blocks::learn(episodes.iter().map(|(e, _)| *e), views),
            support: settings.derail_support.max(1),
            tolerance: settings.derail_tolerance.clamp(0.0, 1.0),
            index: HashMap::new(),
            situations: vec![Vec::new()],
        };
        for (episode, success) in episodes {
            let moves = this.moves(episode);
            for (n, step) in moves.iter().enumerate() {
                let last = n + 1 == moves.len();
                let next = match moves.get(n + 1) {
                    Some(next) => this.intern(&next.situation),
                    None if *success => WON,
                    // How a failure ended says nothing about where its last action leads.
                    None => continue,
                };
                if last && *success && step.position != last_agent(episode) {
                    continue;
                }
                let at = this.intern(&step.situation);
                let actions = &mut this.situations[at];
                let known = match actions.iter().position(|(a, _)| *a == step.action) {
                    Some(known) => known,
                    None => {
                        actions.push((step.action.clone(), Action::default()));
                        actions.len() - 1
                    }
                };
                let action = &mut actions[known].1;
                *action.next.entry(next).or_default() += 1;
                action.visits += 1;
                action.shown += usize::from(*success);
            }
        }
        this.sweep();
        this
    }

    /// Masks targets that are clearly worse than what is known, unless more of the targets of their situation do as they do
    /// than do better: values are rough where a situation does not tell all, and what most successes do there is seldom wrong.
    /// `masks` run beside the episodes' steps.
    pub fn mask<'e>(
        &self,
        episodes: impl Iterator<Item = &'e Episode>,
        masks: &mut [Vec<Option<MaskReason>>],
    ) {
        let mut targets: Vec<(&str, usize, Move)> = Vec::new();
        let mut played: HashMap<(String, String), usize> = HashMap::new();
        for (n, episode) in episodes.enumerate() {
            for step in self
                .moves(episode)
                .into_iter()
                .filter(|s| masks[n][s.position].is_none())
            {
                *played
                    .entry((step.situation.clone(), step.action.clone()))
                    .or_default() += 1;
                targets.push((&episode.task.domain, n, step));
            }
        }
        let mut worse: HashMap<&str, InDomain> = HashMap::new();
        for (domain, n, step) in &targets {
            let found = worse.entry(domain).or_default();
            found.targets += 1;
            if self.is_worse(step, &played) {
                found.worse.push((*n, step.position));
            }
        }
        for InDomain { targets, worse } in worse.into_values() {
            if worse.len() as f64 <= MAX_SHARE * targets as f64 {
                for (n, position) in worse {
                    masks[n][position] = Some(MaskReason::Derail);
                }
            }
        }
    }

    fn is_worse(&self, step: &Move, played: &HashMap<(String, String), usize>) -> bool {
        let Some(actions) = self
            .index
            .get(&step.situation)
            .map(|at| &self.situations[*at])
        else {
            return false;
        };
        let Some((_, own)) = actions.iter().find(|(a, _)| *a == step.action) else {
            return false;
        };
        let count = |action: &String| {
            played
                .get(&(step.situation.clone(), action.clone()))
                .copied()
                .unwrap_or(0)
        };
        let own_count = count(&step.action);
        let best = actions
            .iter()
            .filter(|(a, known)| {
                *a != step.action
                    && known.visits >= self.support
                    && known.shown >= MIN_SHOWN
                    && count(a) >= own_count
            })
            .map(|(_, known)| known.value)
            .fold(0.0, f64::max);
        own.value < best * (1.0 - self.tolerance)
    }

    fn moves(&self, episode: &Episode) -> Vec<Move> {
        let mut moves = Vec::new();
        let mut blocked_before = String::new();
        for (position, step) in episode.steps.iter().enumerate() {
            if step.source != Source::Agent || !self.views.shows_state(step) {
                continue;
            }
            let seen = text::seen(&episode.steps, position);
            let goal = Goal::new(&text::goal(episode, position));
            let blocked = self.blocks.in_view(&episode.task.domain, &seen);
            moves.push(Move {
                position,
                situation: format!(
                    "{}\n{}\n{}\n{blocked}\n{blocked_before}",
                    episode.task.domain,
                    goal.pattern,
                    goal.situation(&seen)
                ),
                action: goal.abstracted(&text::action(step)),
            });
            blocked_before = blocked;
        }
        moves
    }

    fn intern(&mut self, situation: &str) -> usize {
        if let Some(&at) = self.index.get(situation) {
            return at;
        }
        self.situations.push(Vec::new());
        self.index
            .insert(situation.to_owned(), self.situations.len() - 1);
        self.situations.len() - 1
    }

    fn sweep(&mut self) {
        let mut values = vec![0.0; self.situations.len()];
        values[WON] = 1.0;
        for _ in 0..SWEEPS {
            for actions in &mut self.situations {
                for (_, action) in actions {
                    // Summed in the order of situations: floating-point sums must not depend on a hash map's order.
                    let mut next: Vec<_> = action.next.iter().collect();
                    next.sort();
                    let sum: f64 = next
                        .into_iter()
                        .map(|(&at, &n)| n as f64 * values[at])
                        .sum();
                    action.value = DISCOUNT * sum / (action.visits as f64 + 0.5);
                }
            }
            for (value, actions) in values.iter_mut().zip(&self.situations).skip(1) {
                *value = actions.iter().map(|(_, a)| a.value).fold(0.0, f64::max);
            }
        }
    }
}

/// An agent's step between two views of a state.
struct Move {
    position: usize,
    situation: String,
    action: String,
}

fn last_agent(episode: &Episode) -> usize {
    episode
        .steps
        .iter()
        .rposition(|s| s.source == Source::Agent)
        .unwrap_or(usize::MAX)
}

/// A goal's content words, numbered in the order of their first use.
struct Goal {
    words: Vec<String>,
    /// The goal with its content words replaced by their numbers.
    pattern: String,
}

impl Goal {
    fn new(goal: &str) -> Self {
        let mut this = Self {
            words: Vec::new(),
            pattern: String::new(),
        };
        for word in text::words(goal) {
            if !FUNCTION_WORDS.contains(&word.as_str()) && !this.words.contains(&word) {
                this.words.push(word);
            }
        }
        let articles = ["a", "an", "the"];
        let kept = text::words(goal).filter(|w| !articles.contains(&w.as_str()));
        this.pattern = kept.map(|w| this.number(w)).collect::<Vec<_>>().join(" ");
        this
    }

    fn number(&self, word: String) -> String {
        match self.words.iter().position(|w| *w == word) {
            Some(n) => format!("#{n}"),
            None => word,
        }
    }

    fn abstracted(&self, text: &str) -> String {
        text::words(text)
            .map(|w| self.number(w))
            .collect::<Vec<_>>()
            .join(" ")
    }

    /// The clauses of an observation that share most words with the goal, one for each set of shared words: of two red balls
    /// the one that is named first.
    fn situation(&self, observation: &str) -> String {
        let needed = MIN_OVERLAP.min(self.words.len()).max(1);
        let mut sharing: Vec<(usize, String)> = Vec::new();
        let mut sets: BTreeSet<BTreeSet<usize>> = BTreeSet::new();
        for clause in text::clauses(observation) {
            let shared: BTreeSet<usize> = text::words(clause)
                .filter_map(|w| self.words.iter().position(|g| *g == w))
                .collect();
            if shared.len() >= needed && sets.insert(shared.clone()) {
                sharing.push((shared.len(), self.abstracted(clause)));
            }
        }
        sharing.sort_by_key(|(n, _)| std::cmp::Reverse(*n));
        sharing
            .into_iter()
            .take(MAX_CLAUSES)
            .map(|(_, text)| text)
            .collect::<Vec<_>>()
            .join("; ")
    }
}
