//! The account of a curation: every episode, every reason, every masked step.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::episode::{EpisodeId, Source, Split};
use crate::policy::{CurateSettings, PolicyId};

use super::split::{group_of, hex, SplitDocument};
use super::{Kept, LeftOut, LeftOutReason, MaskReason};

/// Version tag of [`Manifest`] in files.
pub const MANIFEST_SCHEMA: &str = "locum-manifest/1";

/// Written beside a student: what it learned from and what was withheld.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    pub schema: String,
    /// SHA-256 (hex) of what is kept: episode contents, targets, weights and sides.
    pub hash: String,
    pub split_hash: String,
    pub policy: PolicyId,
    pub settings: CurateSettings,
    pub unfiltered: bool,
    pub counts: Counts,
    /// All episodes, in the order of their ids.
    pub episodes: Vec<ManifestEntry>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Counts {
    pub episodes: usize,
    pub kept: usize,
    pub held_out: usize,
    pub left_out: BTreeMap<String, usize>,
    /// Agent steps of kept episodes.
    pub agent_steps: usize,
    pub targets: usize,
    pub masked: BTreeMap<String, usize>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ManifestEntry {
    pub episode: EpisodeId,
    pub task: String,
    pub domain: String,
    pub group: String,
    /// SHA-256 (hex) of the episode.
    pub content: String,
    pub kept: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub split: Option<Split>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<LeftOutReason>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub detail: String,
    #[serde(default)]
    pub weight: f32,
    pub agent_steps: usize,
    pub targets: usize,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub flags: Vec<String>,
    /// Agent steps that are context only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub masked: Vec<MaskedStep>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MaskedStep {
    /// [`crate::episode::Step::index`].
    pub step: u32,
    pub reason: MaskReason,
}

impl Manifest {
    pub(super) fn new(
        kept: &[Kept],
        left_out: &[LeftOut],
        settings: &CurateSettings,
        policy: PolicyId,
        split: &SplitDocument,
        unfiltered: bool,
    ) -> Self {
        let mut counts = Counts {
            episodes: kept.len() + left_out.len(),
            kept: kept.len(),
            ..Counts::default()
        };
        let mut hash = Sha256::new();
        let mut episodes = Vec::with_capacity(counts.episodes);
        for kept in kept {
            let agent = || {
                kept.episode
                    .steps
                    .iter()
                    .zip(&kept.masks)
                    .filter(|(s, _)| s.source == Source::Agent)
            };
            let masked: Vec<MaskedStep> = agent()
                .filter_map(|(s, mask)| {
                    Some(MaskedStep {
                        step: s.index,
                        reason: (*mask)?,
                    })
                })
                .collect();
            let entry = ManifestEntry {
                episode: kept.episode.episode_id,
                task: kept.episode.task.id.clone(),
                domain: kept.episode.task.domain.clone(),
                group: group_of(&kept.episode),
                content: content(&kept.episode),
                kept: true,
                split: Some(kept.split),
                reason: None,
                detail: String::new(),
                weight: kept.weight,
                agent_steps: agent().count(),
                targets: kept.targets().count(),
                flags: kept.outcome.integrity.flags.clone(),
                masked,
            };
            counts.held_out += usize::from(kept.split == Split::HeldOut);
            counts.agent_steps += entry.agent_steps;
            counts.targets += entry.targets;
            for step in &entry.masked {
                *counts.masked.entry(step.reason.name().into()).or_default() += 1;
            }
            hash.update(entry.content.as_bytes());
            hash.update([u8::from(kept.split == Split::HeldOut)]);
            hash.update(kept.weight.to_le_bytes());
            for position in kept.targets() {
                hash.update((position as u64).to_le_bytes());
                let weight = kept.episode.steps[position]
                    .label
                    .as_ref()
                    .map_or(1.0, |l| l.weight);
                hash.update(weight.to_le_bytes());
            }
            hash.update(u64::MAX.to_le_bytes());
            episodes.push(entry);
        }
        for out in left_out {
            let name = serde_json::to_value(out.reason)
                .ok()
                .and_then(|v| v.as_str().map(str::to_owned))
                .unwrap_or_default();
            *counts.left_out.entry(name).or_default() += 1;
            episodes.push(ManifestEntry {
                episode: out.episode.episode_id,
                task: out.episode.task.id.clone(),
                domain: out.episode.task.domain.clone(),
                group: group_of(&out.episode),
                content: content(&out.episode),
                kept: false,
                split: None,
                reason: Some(out.reason),
                detail: out.detail.clone(),
                weight: 0.0,
                agent_steps: out
                    .episode
                    .steps
                    .iter()
                    .filter(|s| s.source == Source::Agent)
                    .count(),
                targets: 0,
                flags: out
                    .episode
                    .outcome
                    .as_ref()
                    .map(|o| o.integrity.flags.clone())
                    .unwrap_or_default(),
                masked: Vec::new(),
            });
        }
        episodes.sort_by_key(|e| e.episode);
        Self {
            schema: MANIFEST_SCHEMA.into(),
            hash: hex(hash.finalize()),
            split_hash: split.hash.clone(),
            policy,
            settings: settings.clone(),
            unfiltered,
            counts,
            episodes,
        }
    }
}

fn content(episode: &crate::episode::Episode) -> String {
    let bytes = serde_json::to_vec(episode).expect("an episode is plain data with string keys");
    hex(Sha256::digest(bytes))
}
