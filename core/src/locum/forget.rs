//! Erasing: an episode, or everything of a scope, leaves the store's files, the lists of jobs, the caches and the trials; the
//! students that learned from it are marked, and one can be made again without it.

use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::{json, Value};

use super::fast::key;
use super::trial::TrialRecord;
use super::{DistilOptions, Error, EventKind, Inner, Locum};
use crate::curate::{self, SplitDocument};
use crate::distil::{job_dir, read_json, split_path, write_json};
use crate::episode::{Episode, EpisodeId};
use crate::store::{JsonTable, Query};
use crate::train;

/// Longest wait for a job to let go of its episodes.
const JOB_PATIENCE: Duration = Duration::from_secs(60);
/// Longest wait for the store to be written anew.
const ERASE_PATIENCE: Duration = Duration::from_secs(600);
/// Jobs whose lists are looked at.
const MAX_JOBS: u64 = 1_000_000;

/// What is to be erased.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Forget {
    Episode(EpisodeId),
    Episodes(Vec<EpisodeId>),
    /// Every episode of a scope.
    Scope(String),
}

/// What was erased, and who had learned from it.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Forgotten {
    /// Ids of the episodes.
    pub episodes: Vec<String>,
    /// Versions of the students that learned from one of them, themselves or by an ancestor, and are marked.
    pub students: Vec<u64>,
    /// One of them serves now.
    pub serving: bool,
    /// The unfinished job that was cancelled because it was learning from one of them.
    pub cancelled_job: Option<u64>,
    /// The job that makes the newest of them again without what was erased, where that was asked for.
    pub retraining: Option<u64>,
}

impl Locum {
    /// Erases episodes for good: when it returns, no file of the store holds a byte of their contents. What a job still learns from is
    /// cancelled first. Their ids stay in the manifests of the students that learned from them, which are marked (see
    /// [`super::StudentSummary::erased`]) and go on serving: take them back with [`Locum::rollback`], or let `retrain` make the newest
    /// anew from what is left, on trial like any other.
    ///
    /// Takes as long and as much room as a copy of the database. Caches of other processes are theirs, and are gone with them.
    ///
    /// # Errors
    /// [`Error::NotFound`] for an episode that is neither in the store nor in a student's lineage, and for a scope without episodes;
    /// [`Error::Busy`] if a job does not let go; [`Error::Store`] if the files could not be written: then the call may be repeated.
    pub fn forget(&self, what: &Forget, retrain: bool) -> Result<Forgotten, Error> {
        let inner = &self.inner;
        inner.check_open()?;
        inner.store.flush(JOB_PATIENCE)?;
        let query = match what {
            Forget::Episode(id) => Query {
                ids: vec![*id],
                ..Query::default()
            },
            Forget::Episodes(ids) => Query {
                ids: ids.clone(),
                ..Query::default()
            },
            Forget::Scope(scope) => Query {
                scope: Some(scope.clone()),
                ..Query::default()
            },
        };
        let mut ids: Vec<EpisodeId> = inner.store.episodes(&query)?.iter().map(|e| e.id).collect();
        if ids.is_empty() {
            // Asked again after an attempt that was cut off, or only known by a student's manifest.
            match what {
                Forget::Episode(id) if !self.students_of(*id)?.is_empty() => ids.push(*id),
                Forget::Episode(id) => {
                    return Err(Error::NotFound {
                        what: format!("episode {id}"),
                    })
                }
                Forget::Episodes(_) => return Ok(Forgotten::default()),
                Forget::Scope(scope) => {
                    return Err(Error::NotFound {
                        what: format!("an episode of scope {scope:?}"),
                    })
                }
            }
        }
        let cancelled_job = inner.let_go(self, &ids)?;
        inner.forget_in_memory(&ids);
        // What tells of them by other names than their id.
        let mut names: Vec<String> = Vec::new();
        for chunk in ids.chunks(200) {
            let query = Query {
                ids: chunk.to_vec(),
                ..Query::default()
            };
            for episode in inner.store.load(&query)? {
                note_names(&episode, &mut names);
            }
        }
        inner.store.erase(&ids, ERASE_PATIENCE)?;
        names.sort();
        names.dedup();
        let mut gone = Vec::new();
        for name in names {
            if !inner.store.names_task(&name)? {
                gone.push(name);
            }
        }
        inner.forget_in_files(&ids, &gone)?;
        inner.forget_in_trials(&gone)?;
        let printed: Vec<String> = ids.iter().map(EpisodeId::to_string).collect();
        for manifest in inner.registry.list()? {
            let own = printed.iter().filter(|id| manifest.episodes.contains(id));
            let own: Vec<String> = own.cloned().collect();
            if !own.is_empty() {
                inner.registry.mark_erased(manifest.version, &own)?;
            }
        }
        let mut forgotten = Forgotten {
            cancelled_job,
            ..Forgotten::default()
        };
        let current = inner.registry.current()?;
        for student in self.students()?.iter().filter(|s| s.erased > 0) {
            let lineage = self.lineage(student.version)?.episodes;
            if lineage.iter().any(|e| printed.contains(&e.id)) {
                forgotten.students.push(student.version);
                forgotten.serving |= current == Some(student.version);
            }
        }
        forgotten.episodes = printed;
        // Documents that were rewritten leave their old text in pages of the file; this is the second half of the same erasure.
        inner.store.erase(&[], ERASE_PATIENCE)?;
        let detail =
            json!({ "episodes": forgotten.episodes.len(), "students": forgotten.students });
        inner.events.push(
            EventKind::Forgotten,
            0,
            forgotten.episodes.len() as i64,
            detail,
        );
        if retrain {
            forgotten.retraining = inner.retrain(&forgotten.students, cancelled_job)?;
        }
        Ok(forgotten)
    }
}

impl Inner {
    /// Cancels the job that is learning from one of the episodes, and waits until it has let go of them.
    fn let_go(&self, locum: &Locum, ids: &[EpisodeId]) -> Result<Option<u64>, Error> {
        let running = self
            .job_records()?
            .into_iter()
            .find(|r| r.status.state.is_running());
        let Some(record) = running else {
            return Ok(None);
        };
        let job = record.status.job;
        let listed: Option<Vec<EpisodeId>> =
            read_json(&job_dir(self.store.dir(), job).join("episodes.json"));
        // A job that has not listed its episodes yet may be about to.
        if listed.is_some_and(|listed| !listed.iter().any(|id| ids.contains(id))) {
            return Ok(None);
        }
        locum.distil_cancel(job)?;
        let begun = Instant::now();
        while self.status_of(job)?.state.is_running() {
            if begun.elapsed() > JOB_PATIENCE {
                return Err(Error::Busy(format!(
                    "job {job} is learning from it and has not stopped yet; try again"
                )));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        train::forget(&job_dir(self.store.dir(), job));
        Ok(Some(job))
    }

    fn forget_in_memory(&self, ids: &[EpisodeId]) {
        let mut serving = self.swap.serving();
        for id in ids {
            if let Some(trial) = serving.trial.as_mut() {
                trial.forget(*id);
            }
            serving.waiting.remove(id);
        }
        serving
            .shadows
            .retain(|watched| !ids.contains(&watched.episode));
        drop(serving);
        let mut episodes = self.episodes.lock().unwrap_or_else(|e| e.into_inner());
        episodes.retain(|id, _| !ids.contains(id));
        drop(episodes);
        if let Some(engine) = &self.engine {
            let keys: Vec<u128> = ids.iter().map(|id| key(*id)).collect();
            engine.forget(&keys);
            keys.iter().for_each(|key| engine.forget_snapshots(*key));
        }
    }

    /// Takes the episodes out of what jobs have written: lists, accounts, checkpoints, and names in the split that nobody else has.
    fn forget_in_files(&self, ids: &[EpisodeId], gone: &[String]) -> Result<(), Error> {
        let dir = self.store.dir();
        let last = self.job_records()?.last().map_or(0, |r| r.status.job);
        for job in 1..=last.min(MAX_JOBS) {
            let dir = job_dir(dir, job);
            let list = dir.join("episodes.json");
            if let Some(listed) = read_json::<Vec<EpisodeId>>(&list) {
                let left: Vec<EpisodeId> = listed
                    .iter()
                    .filter(|id| !ids.contains(id))
                    .copied()
                    .collect();
                if left.len() < listed.len() {
                    write_json(&list, &left)?;
                }
            }
            let account = dir.join("manifest.json");
            if let Some(mut manifest) = read_json::<curate::Manifest>(&account) {
                let before = manifest.clone();
                for entry in &mut manifest.episodes {
                    if ids.contains(&entry.episode) {
                        entry.task.clear();
                        entry.domain.clear();
                        entry.group.clear();
                        // A digest of the contents would let somebody who guesses them be sure.
                        entry.content.clear();
                        entry.flags.clear();
                        entry.detail = "erased".into();
                    } else if gone.iter().any(|name| entry.detail.contains(name.as_str())) {
                        entry.detail.clear();
                    }
                }
                if manifest != before {
                    write_json(&account, &manifest)?;
                }
            }
            // Says why a step became no sample, by id and reason.
            let dataset = dir.join("dataset.json");
            if let Some(mut value) = read_json::<Value>(&dataset) {
                let erased = |item: &Value| {
                    let id = item.get("episode").and_then(Value::as_str);
                    id.and_then(|id| id.parse().ok())
                        .is_some_and(|id| ids.contains(&id))
                };
                let skipped = value.get_mut("skipped").and_then(Value::as_array_mut);
                if let Some(skipped) = skipped.filter(|s| s.iter().any(erased)) {
                    skipped.retain(|item| !erased(item));
                    write_json(&dataset, &value)?;
                }
            }
        }
        let path = split_path(dir);
        if let Some(mut split) = read_json::<SplitDocument>(&path) {
            let before = split.groups.len();
            split.groups.retain(|group, _| !gone.contains(group));
            if split.groups.len() < before {
                write_json(&path, &split)?;
            }
        }
        Ok(())
    }

    /// Takes task names that nobody else has out of the outcomes that trials keep.
    fn forget_in_trials(&self, gone: &[String]) -> Result<(), Error> {
        let mut serving = self.swap.serving();
        let blank = |record: &mut TrialRecord| {
            let named = record.outcomes.iter_mut();
            let named = named.filter(|outcome| gone.contains(&outcome.task));
            named.map(|outcome| outcome.task.clear()).count() > 0
        };
        if let Some(trial) = serving.trial.as_mut() {
            blank(&mut trial.record);
        }
        if let Some(watch) = serving.watch.as_mut() {
            blank(&mut watch.record);
        }
        drop(serving);
        for (id, value) in self.store.list_json(JsonTable::Trial)? {
            if let Ok(mut record) = serde_json::from_value::<TrialRecord>(value) {
                if blank(&mut record) {
                    self.store.put_json(JsonTable::Trial, &id, &json!(record))?;
                }
            }
        }
        Ok(())
    }

    /// Starts the job of the newest of these students again, or the one that was cancelled.
    fn retrain(
        self: &std::sync::Arc<Self>,
        students: &[u64],
        cancelled: Option<u64>,
    ) -> Result<Option<u64>, Error> {
        let newest = students.iter().max();
        let made = newest.and_then(|version| {
            let all = self.registry.list().ok()?;
            all.iter().find(|m| m.version == *version).map(|m| m.job)
        });
        let Some(job) = cancelled.or(made) else {
            return Ok(None);
        };
        let options = match self.job_record(job) {
            Ok(record) => record.options,
            Err(_) => DistilOptions::default(),
        };
        // From the base: a student that learned from it would hand it on.
        let options = DistilOptions {
            continue_student: false,
            ..options
        };
        self.start_job(options).map(Some)
    }
}

fn note_names(episode: &Episode, names: &mut Vec<String>) {
    let task = &episode.task;
    names.push(task.id.clone());
    names.extend(task.group_key.clone());
    names.push(curate::group_of(episode));
    names.retain(|name| !name.is_empty());
}
