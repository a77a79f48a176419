//! Fast weights of an episode: how the policy and the host rule them, and what happens when they drift too far.

use std::sync::Arc;

use serde_json::json;

use super::{EpisodeHandle, Error, EventKind, Inner, Locum};
use crate::episode::{EpisodeId, Task};
use crate::generate::{FastError, FastOp, FastOrder, FastReport, FastRule, FastSeen, Student};
use crate::policy::FastInfo;

impl Locum {
    /// What the student has learned in this episode while it read: drift and bytes, layer by layer. All zero before its first step.
    /// This and the calls below may wait for the step of the model that is under way.
    ///
    /// # Errors
    /// [`Error::NotFound`] for an episode that has ended, [`Error::NoModel`].
    pub fn fast_weights(&self, episode: &EpisodeHandle) -> Result<FastReport, Error> {
        let learns = self.inner.may_learn(episode.0)?;
        let report = self.fast(episode, FastOp::Inspect)?;
        Ok(FastReport {
            on: report.on && learns,
            ..report
        })
    }

    /// Switches learning off or on for the rest of this episode, from its next step on. Off, its students play as they were trained,
    /// to the bit. Switched on again, they read the history anew.
    ///
    /// # Errors
    /// As [`Self::fast_weights`].
    pub fn switch_fast_weights(&self, episode: &EpisodeHandle, on: bool) -> Result<(), Error> {
        self.inner.check_open()?;
        let mut episodes = self.inner.episodes.lock();
        let episodes = episodes.as_deref_mut().map_err(|_| Error::Closed)?;
        let open = episodes
            .get_mut(&episode.0)
            .ok_or_else(|| ended(episode.0))?;
        open.learns = on;
        Ok(())
    }

    /// Undoes what was learned in this episode so far, and goes on learning. What has to be read again later (because the view has
    /// moved, or room was needed) is learned again.
    ///
    /// # Errors
    /// As [`Self::fast_weights`]; [`Error::NotFound`] too if nothing was read.
    pub fn reset_fast_weights(&self, episode: &EpisodeHandle) -> Result<(), Error> {
        self.fast(episode, FastOp::Reset).map(|_| ())
    }

    /// Keeps a copy of the episode's state in memory (fast weights, what waits for the edge, keys and values) and gives its number.
    /// It is forgotten with the episode, when another student comes into service, or by [`Self::forget_fast_weights`].
    ///
    /// # Errors
    /// As [`Self::reset_fast_weights`]; [`Error::Limit`] where there are too many or no room is left.
    pub fn snapshot_fast_weights(&self, episode: &EpisodeHandle) -> Result<u64, Error> {
        Ok(self.fast(episode, FastOp::Snapshot)?.snapshot)
    }

    /// Puts a copy back: the next step goes on from there, as far as its prompt begins alike. The copy can be put back again.
    ///
    /// # Errors
    /// [`Error::NotFound`] if it is not this episode's or is forgotten; [`Error::Busy`] while an answer of the episode is computed.
    pub fn restore_fast_weights(
        &self,
        episode: &EpisodeHandle,
        snapshot: u64,
    ) -> Result<(), Error> {
        self.fast(episode, FastOp::Restore(snapshot)).map(|_| ())
    }

    /// Forgets a copy, or with 0 all of the episode's.
    ///
    /// # Errors
    /// [`Error::NotFound`] if it is not this episode's.
    pub fn forget_fast_weights(&self, episode: &EpisodeHandle, snapshot: u64) -> Result<(), Error> {
        self.fast(episode, FastOp::Forget(snapshot)).map(|_| ())
    }

    fn fast(&self, episode: &EpisodeHandle, op: FastOp) -> Result<FastReport, Error> {
        self.inner.check_open()?;
        self.inner.may_learn(episode.0)?;
        let engine = self.inner.engine.as_ref().ok_or(Error::NoModel)?;
        let done = engine.fast_weights(key(episode.0), op);
        done.map_err(|error| match error {
            FastError::Nothing | FastError::NoSnapshot(_) => Error::NotFound {
                what: error.to_string(),
            },
            FastError::NoRoom {
                needed,
                free: limit,
                ..
            } => Error::Limit {
                what: "bytes of a snapshot",
                found: needed,
                limit,
            },
            FastError::TooMany => Error::Limit {
                what: "snapshots of an episode",
                found: crate::limits::MAX_FAST_SNAPSHOTS + 1,
                limit: crate::limits::MAX_FAST_SNAPSHOTS,
            },
            FastError::Busy | FastError::NoAnswer => Error::Busy(error.to_string()),
        })
    }
}

impl Inner {
    /// Whether this student learns while it reads this episode: it was judged to be better for it, and nobody has switched it off.
    pub(super) fn learns(&self, episode: EpisodeId, student: &Student) -> bool {
        student.learns && self.may_learn(episode).unwrap_or(false)
    }

    /// Whether students may learn while they read this episode.
    fn may_learn(&self, episode: EpisodeId) -> Result<bool, Error> {
        let episodes = self.episodes.lock().unwrap_or_else(|e| e.into_inner());
        let open = episodes.get(&episode).ok_or_else(|| ended(episode))?;
        Ok(open.learns)
    }

    /// The policy's word on how they do, where it wants to have one.
    pub(super) fn fast_rule(&self, student: &Student, task: &Task) -> Option<FastRule> {
        let config = student.model.config.ttt.as_ref()?;
        let policy = self.loaded().policy.clone();
        if !policy.rules_fast_weights() {
            return None;
        }
        let known = FastInfo {
            task: task.id.clone(),
            domain: task.domain.clone(),
            student: student.id.clone(),
            version: student.version,
            chunk: config.chunk_len as u64,
            max_drift: config.max_drift,
            ..FastInfo::default()
        };
        Some(Arc::new(move |seen: &FastSeen| {
            let verdict = policy.fast_weights(&FastInfo {
                stage: if seen.behind_chunk {
                    "chunk"
                } else {
                    "episode"
                }
                .into(),
                position: seen.position as u64,
                drift: seen.drift,
                loss: seen.loss,
                loss_before: seen.loss_before,
                ..known.clone()
            });
            FastOrder {
                on: verdict.on,
                step: verdict.step,
                reset: verdict.reset,
            }
        }))
    }

    /// What was learned in this episode had to be undone: its students play the rest of it as they were trained.
    pub(super) fn drifted(&self, episode: EpisodeId, student: &Student, layer: u16, drift: f32) {
        let mut episodes = self.episodes.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(open) = episodes.get_mut(&episode) {
            open.learns = false;
        }
        drop(episodes);
        // JSON has no word for what is no number.
        let drift = drift.is_finite().then_some(drift);
        let detail = json!({ "episode": episode.to_string(), "layer": layer, "drift": drift });
        self.events.push(
            EventKind::FastWeights,
            student.version,
            i64::from(layer),
            detail,
        );
    }

    /// Forgets the copies of an episode that is over.
    pub(super) fn forget_snapshots(&self, episode: EpisodeId) {
        if let Some(engine) = &self.engine {
            engine.forget_snapshots(key(episode));
        }
    }
}

/// The engine's name for an episode.
pub(super) fn key(episode: EpisodeId) -> u128 {
    u128::from_be_bytes(episode.0)
}

fn ended(episode: EpisodeId) -> Error {
    Error::NotFound {
        what: format!("open episode {episode}"),
    }
}
