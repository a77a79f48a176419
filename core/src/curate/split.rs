//! Which task groups are held out. Once given, a group's side never changes.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::episode::{Content, Episode, Source, Split};

/// With at least this many groups and none of them held out by its hash, the group with the smallest hash is.
const GROUPS_FOR_A_HELD_OUT_ONE: usize = 5;

/// The sides of all groups ever seen. Kept by the caller and given back at the next curation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SplitDocument {
    pub held_out: f64,
    pub groups: BTreeMap<String, Split>,
    /// SHA-256 (hex) of the groups and their sides.
    pub hash: String,
}

/// What an episode is split by: its group key, else its task id, else a hash of what it was told to do.
pub fn group_of(episode: &Episode) -> String {
    if let Some(key) = episode.task.group_key.as_deref().filter(|k| !k.is_empty()) {
        return key.to_owned();
    }
    if !episode.task.id.is_empty() {
        return episode.task.id.clone();
    }
    let told = if episode.task.instruction.is_empty() {
        let first = episode
            .steps
            .iter()
            .find(|s| s.source == Source::User)
            .and_then(|s| s.message.as_ref());
        first.map(Content::text).unwrap_or_default()
    } else {
        episode.task.instruction.clone()
    };
    format!(
        "instruction:{}",
        &hex(Sha256::digest(told.as_bytes()))[..32]
    )
}

/// Sides for the episodes, in their order, and the document that remembers them.
///
/// A new group takes the side its import gave it, else the side of its hash. Several episodes of one group whose imports
/// disagree are held out.
pub(super) fn assign<'a>(
    episodes: impl Iterator<Item = &'a Episode>,
    held_out: f64,
    frozen: Option<SplitDocument>,
) -> (SplitDocument, Vec<Split>) {
    let mut groups = frozen.map(|f| f.groups).unwrap_or_default();
    let mut imported: BTreeMap<String, Split> = BTreeMap::new();
    let mut of: Vec<String> = Vec::new();
    for episode in episodes {
        let group = group_of(episode);
        if let Some(side) = episode.task.split {
            let known = imported.entry(group.clone()).or_insert(side);
            if *known != side {
                *known = Split::HeldOut;
            }
        }
        of.push(group);
    }
    let mut smallest: Option<(f64, String)> = None;
    for group in &of {
        if groups.contains_key(group) {
            continue;
        }
        let place = place(group);
        let side = imported.get(group).copied().unwrap_or(if place < held_out {
            Split::HeldOut
        } else {
            Split::Train
        });
        if !imported.contains_key(group) && smallest.as_ref().is_none_or(|(p, _)| place < *p) {
            smallest = Some((place, group.clone()));
        }
        groups.insert(group.clone(), side);
    }
    let lacks_held_out = held_out > 0.0
        && groups.len() >= GROUPS_FOR_A_HELD_OUT_ONE
        && groups.values().all(|side| *side == Split::Train);
    if let (true, Some((_, group))) = (lacks_held_out, smallest) {
        groups.insert(group, Split::HeldOut);
    }
    let sides = of.iter().map(|group| groups[group]).collect();
    let mut hash = Sha256::new();
    for (group, side) in &groups {
        hash.update((group.len() as u64).to_le_bytes());
        hash.update(group.as_bytes());
        hash.update([u8::from(*side == Split::HeldOut)]);
    }
    let hash = hex(hash.finalize());
    (
        SplitDocument {
            held_out,
            groups,
            hash,
        },
        sides,
    )
}

/// A place in [0, 1) that depends on the group alone.
fn place(group: &str) -> f64 {
    let digest = Sha256::digest(format!("locum split 1\n{group}").as_bytes());
    let bits = u64::from_be_bytes(
        digest[..8]
            .try_into()
            .expect("a SHA-256 digest has 32 bytes"),
    );
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

pub(super) fn hex(bytes: impl AsRef<[u8]>) -> String {
    bytes.as_ref().iter().map(|b| format!("{b:02x}")).collect()
}
