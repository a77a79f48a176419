//! What in an observation tells that an action would change nothing there, counted from all episodes.
//!
//! An agent that walks into a box sees the same again. Over many episodes the end of one clause ("1 ahead" of "blue box
//! 1 ahead") goes with that; neither the environment nor its words need be known.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use crate::episode::{Episode, Source};

use super::masks::StateViews;
use super::text;

/// Sights in which the action must have been tried.
const MIN_TRIED: usize = 8;
/// Share of them in which nothing changed.
const MIN_UNCHANGED: f64 = 0.9;
/// Words of a clause's end that are looked at.
const MAX_WORDS: usize = 3;

/// Ends of clauses that tell that an action is blocked, by domain and action.
#[derive(Debug, Default)]
pub struct Blocks {
    signs: BTreeMap<String, BTreeMap<String, HashSet<String>>>,
}

impl Blocks {
    /// Counts each sight of an episode once for each action: an agent that pushes a box twenty times has shown one thing.
    pub fn learn<'a>(episodes: impl Iterator<Item = &'a Episode>, views: &StateViews) -> Self {
        let mut tried: BTreeMap<(String, String), BTreeMap<String, (usize, usize)>> =
            BTreeMap::new();
        for episode in episodes {
            let steps = &episode.steps;
            // The last result often says how it ended, not what there is to see.
            let last = steps.iter().rposition(|s| s.source == Source::Agent);
            let mut known = HashSet::new();
            for (position, step) in steps.iter().enumerate() {
                if Some(position) == last
                    || step.source != Source::Agent
                    || !views.shows_state(step)
                {
                    continue;
                }
                let (seen, action) = (text::seen(steps, position), text::action(step));
                if !known.insert((seen.clone(), action.clone())) {
                    continue;
                }
                let unchanged = text::after(step) == seen;
                let ends = tried
                    .entry((episode.task.domain.clone(), action))
                    .or_default();
                for end in ends_of(&seen) {
                    let count = ends.entry(end).or_default();
                    count.0 += 1;
                    count.1 += usize::from(unchanged);
                }
            }
        }
        let mut signs: BTreeMap<String, BTreeMap<String, HashSet<String>>> = BTreeMap::new();
        for ((domain, action), ends) in tried {
            let telling: HashSet<String> = ends
                .into_iter()
                .filter(|(_, (n, unchanged))| {
                    *n >= MIN_TRIED && *unchanged as f64 >= MIN_UNCHANGED * *n as f64
                })
                .map(|(end, _)| end)
                .collect();
            if !telling.is_empty() {
                signs.entry(domain).or_default().insert(action, telling);
            }
        }
        Self { signs }
    }

    /// The actions of `domain` that are blocked in what is seen, as comparable text.
    pub fn in_view(&self, domain: &str, seen: &str) -> String {
        let Some(actions) = self.signs.get(domain) else {
            return String::new();
        };
        let ends = ends_of(seen);
        actions
            .iter()
            .filter(|(_, signs)| ends.iter().any(|end| signs.contains(end)))
            .map(|(action, _)| action.as_str())
            .collect::<Vec<_>>()
            .join("|")
    }
}

/// The last one to [`MAX_WORDS`] words of every clause.
fn ends_of(seen: &str) -> BTreeSet<String> {
    text::clauses(seen)
        .flat_map(|clause| {
            let words: Vec<String> = text::words(clause).collect();
            (1..=MAX_WORDS.min(words.len()))
                .map(|n| words[words.len() - n..].join(" "))
                .collect::<Vec<_>>()
        })
        .collect()
}
