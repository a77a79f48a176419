//! Episodes that teach nothing that a kept one does not: copies, near copies, the fourth success of a task, the very long.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use sha2::{Digest, Sha256};

use crate::episode::{Episode, Outcome, Source};
use crate::policy::CurateSettings;

use super::{text, LeftOutReason};

struct Shape {
    actions: Vec<String>,
    trigrams: BTreeSet<String>,
    agent_steps: usize,
    /// Task id and goal; `None` where the host names no task.
    task: Option<(String, String)>,
}

/// Positions to leave out, with the reason. Shorter episodes are looked at first, then older ones.
pub fn refuse(
    passing: &[(Episode, Outcome)],
    settings: &CurateSettings,
) -> BTreeMap<usize, (LeftOutReason, String)> {
    let shapes: Vec<Shape> = passing.iter().map(|(episode, _)| shape(episode)).collect();
    let mut refused = BTreeMap::new();
    let mut order: Vec<usize> = (0..passing.len()).collect();
    order.sort_by_key(|&i| (shapes[i].agent_steps, passing[i].0.episode_id));

    let medians = median_lengths(passing, &shapes);
    let mut exact: HashMap<[u8; 32], usize> = HashMap::new();
    let mut copies: HashMap<[u8; 32], usize> = HashMap::new();
    let mut by_task: HashMap<&(String, String), Vec<usize>> = HashMap::new();
    let mut per_id: HashMap<&str, usize> = HashMap::new();
    for i in order {
        let (episode, shape) = (&passing[i].0, &shapes[i]);
        let median = medians[episode.task.domain.as_str()];
        if settings.max_length_ratio > 0.0
            && shape.agent_steps as f64 > settings.max_length_ratio * median
        {
            let detail = format!(
                "{} agent steps where the median success of its domain has {median}",
                shape.agent_steps
            );
            refused.insert(i, (LeftOutReason::TooLong, detail));
            continue;
        }
        if let Some(&first) = exact.get(&digest(episode, shape)) {
            let detail = format!("a copy of {}", passing[first].0.episode_id);
            refused.insert(i, (LeftOutReason::Duplicate, detail));
            continue;
        }
        exact.insert(digest(episode, shape), i);
        // What one source says again and again teaches by its number, whatever task it gives itself out for.
        let said = copies.entry(content(episode, shape)).or_default();
        if *said >= settings.max_copies.max(1) {
            let detail = format!("{said} episodes with the same words and actions are kept");
            refused.insert(i, (LeftOutReason::TaskCap, detail));
            continue;
        }
        *said += 1;
        if let Some(task) = &shape.task {
            let near = by_task.get(task).and_then(|same| {
                same.iter()
                    .map(|&j| (j, similarity(shape, &shapes[j])))
                    .find(|(_, s)| *s >= settings.near_duplicate)
            });
            if let Some((first, similar)) = near {
                let detail = format!(
                    "calls {:.0} % like those of {}",
                    100.0 * similar,
                    passing[first].0.episode_id
                );
                refused.insert(i, (LeftOutReason::NearDuplicate, detail));
                continue;
            }
            let count = per_id.entry(task.0.as_str()).or_default();
            if *count >= settings.max_per_task.max(1) {
                let detail = format!("{count} shorter successes of task {:?} are kept", task.0);
                refused.insert(i, (LeftOutReason::TaskCap, detail));
                continue;
            }
            *count += 1;
            by_task.entry(task).or_default().push(i);
        }
    }
    refused
}

fn shape(episode: &Episode) -> Shape {
    let agent: Vec<_> = episode
        .steps
        .iter()
        .filter(|s| s.source == Source::Agent)
        .collect();
    let actions: Vec<String> = agent.iter().map(|s| text::action(s)).collect();
    let trigrams = actions.windows(3).map(|w| w.join("\n\n")).collect();
    let task = (!episode.task.id.is_empty()).then(|| {
        (
            episode.task.id.clone(),
            text::goal(episode, episode.steps.len()),
        )
    });
    Shape {
        agent_steps: agent.len(),
        actions,
        trigrams,
        task,
    }
}

/// Jaccard index of the call trigrams; sequences too short to have any are alike only if equal.
fn similarity(a: &Shape, b: &Shape) -> f64 {
    if a.trigrams.is_empty() || b.trigrams.is_empty() {
        return if a.actions == b.actions { 1.0 } else { 0.0 };
    }
    let both = a.trigrams.intersection(&b.trigrams).count() as f64;
    both / ((a.trigrams.len() + b.trigrams.len()) as f64 - both)
}

/// Of an episode with its task.
fn digest(episode: &Episode, shape: &Shape) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update((episode.task.id.len() as u64).to_le_bytes());
    hash.update(episode.task.id.as_bytes());
    hash.update(content(episode, shape));
    hash.finalize().into()
}

/// Of what was said and done in an episode, whatever its task is called.
fn content(episode: &Episode, shape: &Shape) -> [u8; 32] {
    let mut hash = Sha256::new();
    let mut put = |text: &str| {
        // The length keeps two fields from running into each other.
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text.as_bytes());
    };
    put(&episode.task.instruction);
    for action in &shape.actions {
        put(action);
    }
    for position in 0..episode.steps.len() {
        if episode.steps[position].source == Source::Agent {
            put(&text::seen(&episode.steps, position));
            put(&text::after(&episode.steps[position]));
        } else if episode.steps[position].source == Source::User {
            put(&episode.steps[position]
                .message
                .as_ref()
                .map(|m| m.text())
                .unwrap_or_default());
        }
    }
    hash.finalize().into()
}

fn median_lengths<'a>(
    passing: &'a [(Episode, Outcome)],
    shapes: &[Shape],
) -> HashMap<&'a str, f64> {
    let mut lengths: HashMap<&str, Vec<usize>> = HashMap::new();
    for ((episode, _), shape) in passing.iter().zip(shapes) {
        lengths
            .entry(episode.task.domain.as_str())
            .or_default()
            .push(shape.agent_steps);
    }
    lengths
        .into_iter()
        .map(|(domain, mut lengths)| {
            lengths.sort_unstable();
            let middle = lengths.len() / 2;
            let median = if lengths.len() % 2 == 1 {
                lengths[middle] as f64
            } else {
                (lengths[middle - 1] + lengths[middle]) as f64 / 2.0
            };
            (domain, median)
        })
        .collect()
}
