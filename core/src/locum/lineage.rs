//! Which episodes made a student, and which students learned from an episode.

use std::collections::BTreeSet;

use serde::Serialize;

use super::{Error, Locum};
use crate::episode::EpisodeId;
use crate::registry::Manifest;

/// What a student is made of.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Lineage {
    pub version: u64,
    pub id: String,
    pub scope: String,
    pub base: String,
    pub job: u64,
    pub dataset_hash: String,
    /// The students it was trained on from, nearest first; none if it began with the base.
    pub ancestors: Vec<Ancestor>,
    /// Every episode that it or an ancestor learned from or was judged on, each once.
    pub episodes: Vec<LineageEpisode>,
}

/// A student that another one was trained on from.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Ancestor {
    pub version: u64,
    pub id: String,
}

/// An episode in a student's lineage.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct LineageEpisode {
    pub id: String,
    /// The student through which it came in: this one or an ancestor.
    pub version: u64,
    /// It was erased since; what was learned from it is still in the weights.
    pub erased: bool,
}

/// A student that learned from an episode.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Learned {
    pub version: u64,
    pub id: String,
    /// False where only an ancestor learned from it.
    pub directly: bool,
    /// It serves now.
    pub current: bool,
}

impl Locum {
    /// Which episodes made this student.
    ///
    /// # Errors
    /// [`Error::NotFound`] for a version that no student has.
    pub fn lineage(&self, version: u64) -> Result<Lineage, Error> {
        let all = self.inner.registry.list()?;
        let own = all.iter().find(|m| m.version == version);
        let own = own.ok_or_else(|| Error::NotFound {
            what: format!("student {version}"),
        })?;
        let line = line_of(&all, own);
        let mut seen = BTreeSet::new();
        let mut episodes = Vec::new();
        for manifest in &line {
            for id in &manifest.episodes {
                if seen.insert(id) {
                    episodes.push(LineageEpisode {
                        id: id.clone(),
                        version: manifest.version,
                        erased: manifest.erased.contains(id),
                    });
                }
            }
        }
        Ok(Lineage {
            version,
            id: own.id.clone(),
            scope: own.scope.clone(),
            base: own.base_name.clone(),
            job: own.job,
            dataset_hash: own.dataset_hash.clone(),
            ancestors: line[1..]
                .iter()
                .map(|m| Ancestor {
                    version: m.version,
                    id: m.id.clone(),
                })
                .collect(),
            episodes,
        })
    }

    /// Which students learned from this episode, also one that was erased since. Empty if none did.
    ///
    /// # Errors
    /// Those of reading the registry.
    pub fn students_of(&self, episode: EpisodeId) -> Result<Vec<Learned>, Error> {
        let all = self.inner.registry.list()?;
        let current = self.inner.registry.current()?;
        let id = episode.to_string();
        let learned = all.iter().filter_map(|manifest| {
            let line = line_of(&all, manifest);
            let through = line.iter().find(|m| m.episodes.contains(&id))?;
            Some(Learned {
                version: manifest.version,
                id: manifest.id.clone(),
                directly: through.version == manifest.version,
                current: current == Some(manifest.version),
            })
        });
        Ok(learned.collect())
    }
}

/// The student and those it was trained on from, as far as they are still there.
fn line_of<'a>(all: &'a [Manifest], own: &'a Manifest) -> Vec<&'a Manifest> {
    let mut line = vec![own];
    while let Some(parent) = line.last().and_then(|m| m.parent.as_ref()) {
        match all.iter().find(|m| m.id == *parent) {
            // A manifest that somebody has changed must not make a circle.
            Some(parent) if line.iter().all(|m| m.id != parent.id) => line.push(parent),
            _ => break,
        }
    }
    line
}

/// Ids of erased episodes that a student or an ancestor learned from.
pub(super) fn erased(all: &[Manifest], own: &Manifest) -> BTreeSet<String> {
    let line = line_of(all, own);
    line.iter().flat_map(|m| m.erased.iter().cloned()).collect()
}
