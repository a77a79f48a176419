//! What the keeper asks and tells the policy beside the steps: which episodes stay, what has happened, which hooks are off.

use std::sync::atomic::Ordering;
use std::time::Duration;

use serde::Serialize;
use serde_json::json;

use super::{now_ms, Error, EventKind, Forget, Inner, Locum};
use crate::episode::EpisodeId;
use crate::policy::{episode_info, EventInfo, Retain, RetainInfo};
use crate::store::{JsonTable, Query};

/// How often `retain` is asked about every episode.
const DAY_MS: u64 = 24 * 3600 * 1000;
/// Id of the document that says when it was.
const RETAINED: &str = "retained";
/// Episodes looked at in one go.
const CHUNK: usize = 200;
/// Longest wait for the store to be written anew.
const PATIENCE: Duration = Duration::from_secs(600);

/// What a look at every episode came to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Retained {
    pub asked: u64,
    pub dropped: u64,
    pub anonymised: u64,
}

impl Locum {
    /// Asks the policy about every episode that has ended, and does what it says. The keeper does this once a day where the policy
    /// has a `retain`.
    ///
    /// # Errors
    /// As [`Locum::forget`].
    pub fn apply_retention(&self) -> Result<Retained, Error> {
        let inner = &self.inner;
        inner.check_open()?;
        let policy = inner.loaded().policy.clone();
        let (drop, anonymise, asked) = inner.ask_retention(policy.as_ref())?;
        let retained = Retained {
            asked,
            dropped: drop.len() as u64,
            anonymised: anonymise.len() as u64,
        };
        if !anonymise.is_empty() {
            inner.store.anonymise(&anonymise, PATIENCE)?;
        }
        if !drop.is_empty() {
            self.forget(&Forget::Episodes(drop), false)?;
        }
        let done = json!({ "unix_ms": now_ms() });
        inner.store.put_json(JsonTable::Student, RETAINED, &done)?;
        Ok(retained)
    }
}

impl Inner {
    fn ask_retention(
        &self,
        policy: &dyn crate::policy::Policy,
    ) -> Result<(Vec<EpisodeId>, Vec<EpisodeId>, u64), Error> {
        let learned: std::collections::BTreeSet<String> = self
            .registry
            .list()?
            .into_iter()
            .flat_map(|m| m.episodes)
            .collect();
        let closed = Query {
            closed_only: true,
            ..Query::default()
        };
        let ids: Vec<EpisodeId> = self.store.episodes(&closed)?.iter().map(|e| e.id).collect();
        let (mut drop, mut anonymise) = (Vec::new(), Vec::new());
        let now = now_ms();
        for chunk in ids.chunks(CHUNK) {
            // A close must not wait for the rest.
            if self.closed.load(Ordering::SeqCst) {
                return Err(Error::Closed);
            }
            let query = Query {
                ids: chunk.to_vec(),
                ..Query::default()
            };
            for episode in self.store.load(&query)? {
                let info = episode_info(&episode, episode.outcome.as_ref(), &[]);
                let came = episode.provenance.imported_at_ms;
                let came = came.unwrap_or(episode.started_at_ms);
                let printed = serde_json::to_string(&episode).map_or(0, |text| text.len());
                let verdict = policy.retain(&RetainInfo {
                    learned: learned.contains(&info.id),
                    id: info.id,
                    task: info.task,
                    domain: info.domain,
                    scope: episode.scope.clone(),
                    source_format: info.source_format,
                    status: info.status,
                    tags: info.tags,
                    age_days: now.saturating_sub(came) as f64 / DAY_MS as f64,
                    steps: episode.steps.len() as u32,
                    bytes: printed as u64,
                    incomplete: episode.incomplete,
                });
                match verdict {
                    Retain::Keep => {}
                    Retain::Drop => drop.push(episode.episode_id),
                    Retain::Anonymise => anonymise.push(episode.episode_id),
                }
            }
        }
        Ok((drop, anonymise, ids.len() as u64))
    }

    /// Once a day, where the policy has a say in it and nothing is being learned.
    pub(super) fn maybe_retain(self: &std::sync::Arc<Self>) {
        if self.no_learning || !self.loaded().policy.rules_retention() {
            return;
        }
        let last = self.store.get_json(JsonTable::Student, RETAINED);
        let last = last.ok().flatten().and_then(|v| v["unix_ms"].as_u64());
        if last.is_some_and(|at| now_ms().saturating_sub(at) < DAY_MS) {
            return;
        }
        let _starting = self.starting.lock().unwrap_or_else(|e| e.into_inner());
        let jobs = self.jobs.lock().unwrap_or_else(|e| e.into_inner());
        // The learner's lock keeps two processes from doing it at once, and from doing it under a job.
        if jobs.running.is_some() || !self.store.try_lead().unwrap_or(false) {
            return;
        }
        drop(jobs);
        let locum = Locum {
            inner: self.clone(),
        };
        if let Err(error) = locum.apply_retention() {
            tracing::warn!(%error, "episodes could not be looked through");
        }
        self.store.stop_leading();
    }

    /// Tells the policy what has happened since, and the host which hooks are off.
    pub(super) fn tell_policy(&self) {
        let loaded = self.loaded();
        let mut told = loaded.told_off.lock().unwrap_or_else(|e| e.into_inner());
        for hook in loaded.policy.switched_off() {
            if !told.contains(&hook) {
                told.push(hook);
                let detail = json!({ "hook": hook, "policy": loaded.id.name });
                self.events.push(EventKind::HookOff, 0, 0, detail);
            }
        }
        drop(told);
        for event in self.events.untold() {
            let kind = serde_json::to_value(event.kind).unwrap_or_default();
            loaded.policy.on_event(&EventInfo {
                kind: kind.as_str().unwrap_or_default().into(),
                subject: event.subject,
                number: event.number,
                detail: event.detail,
            });
        }
    }
}
