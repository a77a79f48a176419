//! Tokens to learn from: one [`Sample`] for each target of a curated episode, rendered by the very functions that serving uses.

use std::collections::HashMap;
use std::ops::Range;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::calls::CallFormat;
use crate::chat::{render_sample, Chat, Memo};
use crate::curate::{Curated, Kept};
use crate::episode::{EpisodeId, Split, Step, Task, ToolCall, ToolSpec};
use crate::limits::{MAX_PROMPT_TOKENS, MAX_REPLY_TOKENS};
use crate::view::View;

/// A prompt and the reply to be learned.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Prompt, then reply with its end-of-turn token.
    pub ids: Vec<u32>,
    /// First token of the reply: loss is on `ids[target_start..]` only.
    pub target_start: usize,
    pub weight: f32,
    /// The zero id for a replay sample.
    pub episode: EpisodeId,
    /// [`Step::index`]; 0 for a replay sample.
    pub step: u32,
    pub task: String,
    pub domain: String,
    /// What the teacher called, for exact comparison.
    pub calls: Vec<ToolCall>,
}

/// A target that became no sample.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    pub episode: EpisodeId,
    pub step: u32,
    pub reason: String,
}

/// All samples of a curation under one view and one chat format.
#[derive(Clone, Debug, Default)]
pub struct Dataset {
    /// In the order of episodes and steps; replay samples last.
    pub samples: Vec<Sample>,
    /// Positions in `samples` to train on, replay included.
    pub train: Vec<usize>,
    /// Positions in `samples` that training never sees.
    pub held_out: Vec<usize>,
    pub skipped: Vec<Skipped>,
    /// SHA-256 (hex) over view, chat format, and each sample's ids, target, weight and side.
    pub hash: String,
    pub view_digest: String,
    pub chat_digest: String,
}

impl Dataset {
    /// Tokens of all training rows, prompts included.
    pub fn train_tokens(&self) -> usize {
        let rows = self.rows(&self.train).into_iter();
        rows.filter_map(|row| Some(self.samples[*row.last()?].ids.len()))
            .sum()
    }

    /// Positions `side` in rows: samples of an episode, each of which begins with the whole of the one before it, share one.
    pub fn rows(&self, side: &[usize]) -> Vec<Vec<usize>> {
        let samples: Vec<&Sample> = side.iter().map(|&i| &self.samples[i]).collect();
        let rows = rows(&samples).into_iter();
        rows.map(|row| side[row].to_vec()).collect()
    }

    /// Tokens of all training samples that carry loss.
    pub fn target_tokens(&self) -> usize {
        self.train
            .iter()
            .map(|&i| self.samples[i].ids.len() - self.samples[i].target_start)
            .sum()
    }
}

/// Runs of samples that one text holds: of one episode and one weight, each beginning with the whole of the one before it, as under a
/// view that shows turns. Under another view each sample is a run.
pub fn rows(samples: &[&Sample]) -> Vec<Range<usize>> {
    let goes_on = |a: &Sample, b: &Sample| {
        a.episode != EpisodeId::default()
            && (a.episode, a.weight) == (b.episode, b.weight)
            && b.ids[..b.target_start].starts_with(&a.ids)
    };
    let mut rows: Vec<Range<usize>> = Vec::new();
    for (i, sample) in samples.iter().enumerate() {
        match rows.last_mut() {
            Some(row) if goes_on(samples[i - 1], sample) => row.end = i + 1,
            _ => rows.push(i..i + 1),
        }
    }
    rows
}

/// Limits, and what is mixed in.
#[derive(Clone, Debug)]
pub struct BuildOptions {
    /// Tokens of prompt and reply above which a sample is left out. Cutting it would train on a prompt that serving never
    /// makes.
    pub max_tokens: usize,
    /// General chats (OpenAI messages) whose last assistant turn is learned too, against forgetting.
    pub replay: Vec<Vec<Value>>,
    pub replay_weight: f32,
}

impl Default for BuildOptions {
    fn default() -> Self {
        Self {
            max_tokens: MAX_PROMPT_TOKENS + MAX_REPLY_TOKENS,
            replay: Vec::new(),
            replay_weight: 1.0,
        }
    }
}

/// [`build_with`] default options.
pub fn build(curated: &Curated, chat: &Chat, view: &View) -> Dataset {
    build_with(curated, chat, view, &BuildOptions::default())
}

/// Samples of kept episodes alone, without hash: for evaluations.
pub fn of_kept(kept: &[Kept], chat: &Chat, view: &View) -> Dataset {
    let render = |calls: &CallFormat, task: &Task, before: &[Step], step: &Step, memo: &Memo| {
        render_sample(chat, view, calls, task, before, Some(step), memo)
            .map_err(|error| error.to_string())
    };
    from_targets(kept, BuildOptions::default().max_tokens, &render)
}

/// Renders every target of every kept episode. A target that cannot be rendered (a tool that the call notation cannot
/// express, a prompt that the view cannot make short enough) is named in `skipped`; the others are not touched by it. The
/// same curation gives the same samples in the same order.
pub fn build_with(curated: &Curated, chat: &Chat, view: &View, options: &BuildOptions) -> Dataset {
    let render = |calls: &CallFormat, task: &Task, before: &[Step], step: &Step, memo: &Memo| {
        render_sample(chat, view, calls, task, before, Some(step), memo)
            .map_err(|error| error.to_string())
    };
    let mut dataset = from_targets(&curated.kept, options.max_tokens, &render);
    for (n, messages) in options.replay.iter().enumerate() {
        let sample = chat
            .spans(messages)
            .map_err(|error| error.to_string())
            .and_then(|(ids, mask)| replay_sample(ids, &mask, options));
        match sample {
            Ok(sample) => {
                dataset.train.push(dataset.samples.len());
                dataset.samples.push(sample);
            }
            Err(reason) => {
                let reason = format!("replay chat {n}: {reason}");
                dataset.skipped.push(Skipped {
                    episode: EpisodeId::default(),
                    step: 0,
                    reason,
                });
            }
        }
    }
    dataset.view_digest = view.digest();
    dataset.chat_digest = chat.digest();
    dataset.hash = hash(&dataset);
    dataset
}

type Render<'a> =
    dyn Fn(&CallFormat, &Task, &[Step], &Step, &Memo) -> Result<(Vec<u32>, Vec<u32>), String> + 'a;

fn from_targets(kept: &[Kept], max_tokens: usize, render: &Render<'_>) -> Dataset {
    let mut dataset = Dataset::default();
    let mut formats = Formats::default();
    for kept in kept {
        let (episode, memo) = (&kept.episode, Memo::default());
        for position in kept.targets() {
            let step = &episode.steps[position];
            let sample = formats
                .of(&episode.tools)
                .and_then(|calls| {
                    let before = &episode.steps[..position];
                    render(calls, &episode.task, before, step, &memo)
                })
                .and_then(|(prompt, reply)| {
                    let total = prompt.len() + reply.len();
                    if total > max_tokens {
                        return Err(format!(
                            "{total} tokens where at most {max_tokens} are allowed"
                        ));
                    }
                    if reply.is_empty() {
                        return Err("its reply has no token".into());
                    }
                    let target_start = prompt.len();
                    let mut ids = prompt;
                    ids.extend(reply);
                    Ok((ids, target_start))
                });
            match sample {
                Ok((ids, target_start)) => {
                    let side = match kept.split {
                        Split::Train => &mut dataset.train,
                        Split::HeldOut => &mut dataset.held_out,
                    };
                    side.push(dataset.samples.len());
                    dataset.samples.push(Sample {
                        ids,
                        target_start,
                        weight: kept.weight * step.label.as_ref().map_or(1.0, |label| label.weight),
                        episode: episode.episode_id,
                        step: step.index,
                        task: episode.task.id.clone(),
                        domain: episode.task.domain.clone(),
                        calls: step.tool_calls.clone(),
                    });
                }
                Err(reason) => {
                    dataset.skipped.push(Skipped {
                        episode: episode.episode_id,
                        step: step.index,
                        reason,
                    });
                }
            }
        }
    }
    dataset
}

/// Call formats by tool set: most episodes share one, and making one compiles schemas.
#[derive(Default)]
struct Formats {
    made: HashMap<String, Result<CallFormat, String>>,
}

impl Formats {
    fn of(&mut self, tools: &[ToolSpec]) -> Result<&CallFormat, String> {
        let key = serde_json::to_string(tools).expect("tool specs are plain data with string keys");
        let made = self
            .made
            .entry(key)
            .or_insert_with(|| CallFormat::new(tools).map_err(|error| error.to_string()));
        made.as_ref().map_err(Clone::clone)
    }
}

/// The chat up to its last assistant turn as prompt, that turn as target.
fn replay_sample(
    mut ids: Vec<u32>,
    mask: &[bool],
    options: &BuildOptions,
) -> Result<Sample, String> {
    let Some(last) = mask.iter().rposition(|m| *m) else {
        return Err("it has no assistant turn".into());
    };
    let target_start = mask[..=last]
        .iter()
        .rposition(|m| !*m)
        .map_or(0, |before| before + 1);
    ids.truncate(last + 1);
    if ids.len() > options.max_tokens {
        return Err(format!(
            "{} tokens where at most {} are allowed",
            ids.len(),
            options.max_tokens
        ));
    }
    if target_start == 0 {
        return Err("nothing comes before its assistant turn".into());
    }
    Ok(Sample {
        ids,
        target_start,
        weight: options.replay_weight,
        episode: EpisodeId::default(),
        step: 0,
        task: String::new(),
        domain: "replay".into(),
        calls: Vec::new(),
    })
}

fn hash(dataset: &Dataset) -> String {
    let mut sides = vec![0u8; dataset.samples.len()];
    dataset.held_out.iter().for_each(|&i| sides[i] = 1);
    let mut hash = Sha256::new();
    hash.update(dataset.view_digest.as_bytes());
    hash.update(dataset.chat_digest.as_bytes());
    for (sample, side) in dataset.samples.iter().zip(sides) {
        hash.update((sample.ids.len() as u64).to_le_bytes());
        for id in &sample.ids {
            hash.update(id.to_le_bytes());
        }
        hash.update((sample.target_start as u64).to_le_bytes());
        hash.update(sample.weight.to_le_bytes());
        hash.update([side]);
    }
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::curate::fixtures::{line, wanderers, KeepAll};
    use crate::curate::{curate, MaskReason};
    use crate::episode::{Label, Source};
    use crate::policy::CurateSettings;

    /// The prompt is one token for each step before, the reply its bytes.
    fn bytes(
        calls: &CallFormat,
        _: &Task,
        before: &[Step],
        step: &Step,
        _: &Memo,
    ) -> Result<(Vec<u32>, Vec<u32>), String> {
        let reply = calls.print_reply(step).map_err(|e| e.to_string())?;
        Ok((
            vec![1000; before.len()],
            reply.bytes().map(u32::from).collect(),
        ))
    }

    fn curated() -> Curated {
        let settings = CurateSettings {
            held_out: 0.3,
            ..CurateSettings::default()
        };
        curate(wanderers(200), &KeepAll, &settings)
    }

    #[test]
    fn there_is_one_sample_for_each_target_and_none_for_a_masked_step() {
        let curated = curated();
        let dataset = from_targets(&curated.kept, 1000, &bytes);
        assert_eq!(dataset.samples.len(), curated.manifest.counts.targets);
        assert!(curated.manifest.counts.masked.values().sum::<usize>() > 0);
        assert_eq!(
            dataset.train.len() + dataset.held_out.len(),
            dataset.samples.len()
        );
        for kept in &curated.kept {
            for (step, mask) in kept.episode.steps.iter().zip(&kept.masks) {
                let sample = dataset
                    .samples
                    .iter()
                    .position(|s| s.episode == kept.episode.episode_id && s.step == step.index);
                assert_eq!(sample.is_some(), mask.is_none());
                if let Some(at) = sample {
                    assert_eq!(step.source, Source::Agent);
                    let sample = &dataset.samples[at];
                    // A masked step stays in the context of those that follow it.
                    assert_eq!(sample.target_start, step.index as usize - 1);
                    let reply: Vec<u8> = sample.ids[sample.target_start..]
                        .iter()
                        .map(|id| *id as u8)
                        .collect();
                    assert_eq!(reply, b"act(right)");
                    let side = if kept.split == Split::Train {
                        &dataset.train
                    } else {
                        &dataset.held_out
                    };
                    assert!(side.contains(&at));
                }
            }
        }
        assert!(curated
            .kept
            .iter()
            .any(|k| k.masks.contains(&Some(MaskReason::Loop))));
    }

    #[test]
    fn a_sample_that_is_too_long_or_cannot_be_written_is_named() {
        let mut episodes = vec![line(1, 0, &["right"; 8]), line(2, 5, &["right"; 3])];
        // A call that the tool's schema does not know.
        episodes[1].steps[2].tool_calls[0].name = "fly".into();
        let curated = curate(episodes, &KeepAll, &CurateSettings::default());
        let dataset = from_targets(&curated.kept, 13, &bytes);
        let reasons: Vec<(u32, bool)> = dataset
            .skipped
            .iter()
            .map(|s| (s.step, s.reason.contains("at most 13")))
            .collect();
        // Ten bytes of reply leave room for three steps before it.
        assert_eq!(
            reasons,
            [
                (5, true),
                (6, true),
                (7, true),
                (8, true),
                (9, true),
                (3, false)
            ]
        );
        assert_eq!(dataset.samples.len(), 3 + 2);
    }

    #[test]
    fn the_hash_follows_ids_weights_and_sides_and_nothing_else() {
        let curated = curated();
        let hash_of = |curated: &Curated| hash(&from_targets(&curated.kept, 1000, &bytes));
        let first = hash_of(&curated);
        assert_eq!(first, hash_of(&curated));
        let target = |c: &Curated| c.kept[0].targets().next().unwrap();

        let mut weighted = curated.clone();
        weighted.kept[0].weight = 0.5;
        assert_ne!(hash_of(&weighted), first);
        let mut labelled = curated.clone();
        let at = target(&labelled);
        labelled.kept[0].episode.steps[at].label = Some(Label {
            train: true,
            weight: 0.5,
            reason: String::new(),
        });
        assert_ne!(hash_of(&labelled), first);
        let mut moved = curated.clone();
        moved.kept[0].split = if moved.kept[0].split == Split::Train {
            Split::HeldOut
        } else {
            Split::Train
        };
        assert_ne!(hash_of(&moved), first);
        let mut renamed = curated.clone();
        renamed.kept[0].episode.task.id = "another name".into();
        assert_eq!(hash_of(&renamed), first);
    }

    #[test]
    fn samples_that_one_text_holds_are_a_row_and_count_once() {
        let sample = |episode: u64, ids: &[u32], weight: f32| Sample {
            ids: ids.to_vec(),
            target_start: ids.len() - 1,
            weight,
            episode: match episode {
                0 => EpisodeId::default(),
                n => EpisodeId::new(n, 1),
            },
            step: 1,
            task: String::new(),
            domain: String::new(),
            calls: Vec::new(),
        };
        let samples = vec![
            sample(1, &[1, 2], 1.0),
            sample(1, &[1, 2, 3, 4], 1.0),
            sample(1, &[1, 2, 3, 4, 5, 6], 0.5),
            sample(1, &[1, 2, 3, 4, 5, 6, 7], 0.5),
            // Another episode, another beginning, a target inside the row before.
            sample(2, &[1, 2, 3, 4, 5, 6, 7, 8], 0.5),
            sample(2, &[9, 2], 0.5),
            sample(2, &[9, 2], 0.5),
            sample(0, &[1, 2], 1.0),
            sample(0, &[1, 2, 3, 4], 1.0),
        ];
        let dataset = Dataset {
            train: vec![0, 1, 3, 4, 5, 6, 7, 8],
            held_out: vec![2],
            samples,
            ..Dataset::default()
        };
        let rows = [
            vec![0, 1],
            vec![3],
            vec![4],
            vec![5],
            vec![6],
            vec![7],
            vec![8],
        ];
        assert_eq!(dataset.rows(&dataset.train), rows);
        assert_eq!(dataset.train_tokens(), 4 + 7 + 8 + 2 + 2 + 2 + 4);
        assert_eq!(dataset.target_tokens(), 8);
    }

    #[test]
    fn of_a_replay_chat_the_last_assistant_turn_is_learned() {
        let options = BuildOptions {
            max_tokens: 8,
            replay_weight: 0.25,
            ..BuildOptions::default()
        };
        let mask = [false, false, true, true, false, true, true, false];
        let sample = replay_sample((0..8).collect(), &mask, &options).unwrap();
        assert_eq!(
            (sample.ids.as_slice(), sample.target_start),
            (&[0u32, 1, 2, 3, 4, 5, 6][..], 5)
        );
        assert_eq!(sample.weight, 0.25);
        assert!(replay_sample(vec![1, 2], &[false, false], &options).is_err());
        assert!(replay_sample(
            (0..20).collect(),
            &[[false; 10], [true; 10]].concat(),
            &options
        )
        .is_err());
    }
}
