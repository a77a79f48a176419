//! What can be seen from outside: students, counters, the report.

use serde_json::{json, Map};

use super::lineage;
use super::trial::TrialRecord;
use super::{now_ms, EngineStats, Error, Inner, Locum, Pin, Stats, StudentSummary};
use crate::curate::Manifest as CurationManifest;
use crate::distil::{self, job_dir, read_json};
use crate::gate::Verdict;
use crate::report::{
    self, Curve, DatasetSummary, GateRecord, JobRow, Mark, Player, PolicyRow, ReportData, Stage,
    StudentRow, SuccessRow, Totals,
};
use crate::store::{JsonTable, Query};

/// Episodes that the report's charts are drawn from, newest first.
const REPORT_EPISODES: u32 = 5000;

impl Locum {
    /// All students on disk, oldest first.
    pub fn students(&self) -> Result<Vec<StudentSummary>, Error> {
        let inner = &self.inner;
        let trials = inner.trials()?;
        let current = inner.registry.current()?;
        let pin = inner.swap.serving().pin;
        let mut out = Vec::new();
        let manifests = inner.registry.list()?;
        for manifest in &manifests {
            let record = trials.iter().find(|t| t.version == manifest.version);
            let state = match record {
                Some(record) => record.stage.clone(),
                None if manifest.evaluation.pointer("/verdict/pass") == Some(&json!(false)) => {
                    "held".into()
                }
                None => "stored".into(),
            };
            let verdict: Option<Verdict> = record
                .and_then(|r| r.canary_verdict.clone().or(r.shadow_verdict.clone()))
                .or_else(|| {
                    serde_json::from_value(manifest.evaluation.get("verdict")?.clone()).ok()
                });
            let number = |path: &str| manifest.evaluation.pointer(path).and_then(|v| v.as_f64());
            out.push(StudentSummary {
                version: manifest.version,
                id: manifest.id.clone(),
                parent: manifest.parent.clone(),
                job: manifest.job,
                method: manifest.method.clone(),
                state,
                current: current == Some(manifest.version),
                pinned: pin == Pin::Student(manifest.version),
                created_at_ms: manifest.created_at_ms,
                trained_tokens: manifest.trained_tokens,
                train_seconds: manifest.train_seconds,
                episodes: manifest.episodes.len() as u64,
                erased: lineage::erased(&manifests, manifest).len() as u64,
                scope: manifest.scope.clone(),
                held_out_exact: number("/candidate/exact")
                    .zip(number("/candidate/steps"))
                    .map(|(e, s)| e / s.max(1.0)),
                held_out_loss: number("/candidate/loss"),
                bytes: inner.registry.bytes(manifest.version),
                verdict: verdict.map(|v| v.sentence()).unwrap_or_default(),
                fast_weights: manifest
                    .evaluation
                    .pointer("/ttt/reason")
                    .and_then(|v| v.as_str())
                    .unwrap_or_default()
                    .into(),
            });
        }
        Ok(out)
    }

    /// Counters and states. Reads the store, so not for the path of a step.
    pub fn stats(&self) -> Stats {
        let inner = &self.inner;
        let counts = inner.store.counts(None).unwrap_or_default();
        let health = inner.store.health();
        let loaded = inner.loaded();
        let mut stats = Stats {
            episodes: counts.episodes,
            open_episodes: counts.open,
            successes: counts.successes,
            failures: counts.failures,
            unknown: counts.unknown,
            steps: counts.steps,
            steps_by_teacher: counts.teacher_steps,
            steps_by_student: counts.student_steps,
            busy: inner.busy.load(std::sync::atomic::Ordering::Relaxed),
            queued: inner.store.waiting().0 as u64,
            store_errors: health.failed_commits,
            dropped_episodes: health.dropped,
            store_bytes: folder_bytes(inner.store.dir()),
            base: inner.base.as_ref().map(|b| b.name.clone()).or_else(|| {
                let dir = inner.registry.base_dir(None).ok()??;
                Some(dir.file_name()?.to_string_lossy().into_owned())
            }),
            policy: loaded.id.name.clone(),
            hooks: loaded.policy.stats(),
            events_dropped: inner.events.dropped(),
            job: self.distil_status(0).ok(),
            ..Stats::default()
        };
        let mut reasons = Map::new();
        for (why, n) in inner
            .deferrals
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .iter()
        {
            stats.deferrals += n;
            reasons.insert((*why).into(), json!(n));
        }
        stats.deferral_reasons = reasons;
        {
            let serving = inner.swap.serving();
            stats.pin = serving.pin;
            stats.current = serving.current.as_ref().map(|s| s.id.clone());
            stats.current_version = serving.current.as_ref().map_or(0, |s| s.version);
            stats.candidate = serving.trial.as_ref().map(|t| t.student.id.clone());
            stats.candidate_version = serving.trial.as_ref().map_or(0, |t| t.student.version);
            stats.stage = match (&serving.trial, &serving.current) {
                (Some(trial), _) => trial.record.stage.clone(),
                (None, Some(_)) => "promoted".into(),
                (None, None) => "teacher".into(),
            };
            stats.faulted = serving.trouble.clone();
        }
        if let Some(engine) = &inner.engine {
            let counters = engine.stats();
            stats.engine = serde_json::to_value(&counters)
                .ok()
                .and_then(|v| serde_json::from_value::<EngineStats>(v).ok())
                .unwrap_or_default();
            stats.engine.kernels = report::machine().kernels;
            stats.engine.device = inner.device.words();
        }
        stats
    }

    /// The store's life as one HTML page.
    pub fn report_html(&self) -> Result<String, Error> {
        Ok(report::render(&self.inner.report_data()?))
    }
}

impl Inner {
    pub(super) fn trials(&self) -> Result<Vec<TrialRecord>, Error> {
        let stored = self.store.list_json(JsonTable::Trial)?;
        let mut trials: Vec<TrialRecord> = stored
            .into_iter()
            .filter_map(|(_, value)| serde_json::from_value(value).ok())
            .collect();
        let serving = self.swap.serving();
        if let Some(live) = &serving.trial {
            // What is in memory is newer: verdicts are formed often and stored when they change something.
            if let Some(old) = trials.iter_mut().find(|t| t.version == live.record.version) {
                *old = live.record.clone();
            }
        }
        Ok(trials)
    }

    fn report_data(&self) -> Result<ReportData, Error> {
        let counts = self.store.counts(None)?;
        let loaded = self.loaded();
        let trials = self.trials()?;
        let manifests = self.registry.list()?;
        let jobs = self.job_records()?;
        let episodes = self.store.load(&Query {
            newest_first: true,
            limit: Some(REPORT_EPISODES),
            ..Query::default()
        })?;
        let mut answers: Vec<_> = episodes.iter().flat_map(report::answers).collect();
        answers.sort_by_key(|a| a.0);
        let deferred = answers
            .iter()
            .filter(|a| a.1 == report::Answered::Deferred)
            .count() as u64;
        let mut success: Vec<(Player, String, u64, u64)> = Vec::new();
        for episode in &episodes {
            let (Some((player, who)), Some(won)) =
                (report::player(episode), report::succeeded(episode))
            else {
                continue;
            };
            let label = match player {
                Player::Teacher => "teacher".to_string(),
                Player::Base => "base, untrained".to_string(),
                Player::Student => {
                    let version = manifests
                        .iter()
                        .find(|m| Some(m.id.as_str()) == who)
                        .map(|m| m.version);
                    version.map_or_else(|| "student".into(), |v| format!("student {v}"))
                }
            };
            match success.iter_mut().find(|row| row.1 == label) {
                Some(row) => {
                    row.2 += won as u64;
                    row.3 += 1;
                }
                None => success.push((player, label, won as u64, 1)),
            }
        }
        let events: Vec<Mark> = self
            .store
            .list_json(JsonTable::Event)?
            .into_iter()
            .map(|(_, e)| Mark {
                unix_ms: e["unix_ms"].as_u64().unwrap_or(0),
                label: match e["version"].as_u64() {
                    Some(version) if version > 0 => {
                        format!("{} {version}", e["what"].as_str().unwrap_or(""))
                    }
                    _ => e["what"].as_str().unwrap_or("").into(),
                },
            })
            .collect();
        let dataset = jobs.iter().rev().find_map(|record| {
            let dir = job_dir(self.store.dir(), record.status.job);
            let manifest: CurationManifest = read_json(&dir.join("manifest.json"))?;
            let sizes: serde_json::Value = read_json(&dir.join("dataset.json"))?;
            let n = |key: &str| sizes[key].as_u64().unwrap_or(0);
            Some(DatasetSummary::new(
                &manifest,
                (n("train"), n("held_out")),
                n("tokens"),
                n("target_tokens"),
            ))
        });
        let (serving_version, trial_version) = {
            let serving = self.swap.serving();
            (
                serving
                    .current
                    .as_ref()
                    .map(|s| s.version)
                    .or(self.registry.current()?),
                serving.trial.as_ref().map(|t| t.student.version),
            )
        };
        let gates = manifests
            .iter()
            .map(|manifest| {
                let record = trials.iter().find(|t| t.version == manifest.version);
                let offline: Option<Verdict> =
                    record.and_then(|r| r.offline.clone()).or_else(|| {
                        serde_json::from_value(manifest.evaluation.get("verdict")?.clone()).ok()
                    });
                let mut stages: Vec<Stage> =
                    offline.iter().map(|v| Stage::new("offline", v)).collect();
                let mut last = offline;
                if let Some(record) = record {
                    for (name, verdict) in [
                        ("shadow", &record.shadow_verdict),
                        ("canary", &record.canary_verdict),
                    ] {
                        if let Some(verdict) = verdict {
                            stages.push(Stage::new(name, verdict));
                            last = Some(verdict.clone());
                        }
                    }
                }
                GateRecord {
                    version: manifest.version,
                    student: manifest.id.clone(),
                    verdict: record.map_or_else(|| "stored".into(), |r| r.stage.replace('_', " ")),
                    reasons: last.map(|v| v.reasons).unwrap_or_default(),
                    stages,
                }
            })
            .collect();
        Ok(ReportData {
            version: env!("CARGO_PKG_VERSION").into(),
            generated_at_ms: now_ms(),
            store: self
                .store
                .dir()
                .file_name()
                .map_or_else(String::new, |n| n.to_string_lossy().into_owned()),
            totals: Totals {
                episodes: counts.episodes,
                steps: counts.steps,
                successes: counts.successes,
                failures: counts.failures,
                unknown: counts.unknown,
                open: counts.open,
                teacher_steps: counts.teacher_steps,
                student_steps: counts.student_steps,
                deferred_steps: deferred,
            },
            serving: serving_version,
            on_trial: trial_version,
            timeline: report::timeline(&answers),
            events,
            success: success
                .into_iter()
                .map(|(player, label, won, n)| SuccessRow::new(player, label, won, n))
                .collect(),
            curves: jobs
                .iter()
                .filter_map(|record| {
                    let points = distil::curve(self.store.dir(), record.status.job);
                    let version = (record.status.version > 0).then_some(record.status.version);
                    (!points.is_empty())
                        .then(|| Curve::new(record.status.job, version, &points, None))
                })
                .collect(),
            gates,
            dataset,
            students: manifests
                .iter()
                .map(|m| StudentRow {
                    version: m.version,
                    id: m.id.clone(),
                    parent: m.parent.clone().unwrap_or_else(|| m.base_name.clone()),
                    parent_version: manifests
                        .iter()
                        .find(|p| Some(&p.id) == m.parent.as_ref())
                        .map(|p| p.version),
                    method: m.method.clone(),
                    state: trials
                        .iter()
                        .find(|t| t.version == m.version)
                        .map_or_else(|| "stored".into(), |t| t.stage.clone()),
                    created_at_ms: m.created_at_ms,
                    held_out_exact: m.evaluation.pointer("/candidate").and_then(|r| {
                        Some(r.get("exact")?.as_f64()? / r.get("steps")?.as_f64()?.max(1.0))
                    }),
                    held_out_loss: m
                        .evaluation
                        .pointer("/candidate/loss")
                        .and_then(|v| v.as_f64()),
                    trained_tokens: m.trained_tokens,
                    dataset: m.dataset_hash.clone(),
                })
                .collect(),
            jobs: jobs
                .iter()
                .map(|record| JobRow {
                    job: record.status.job,
                    state: serde_json::to_value(record.status.state)
                        .ok()
                        .and_then(|v| v.as_str().map(str::to_owned))
                        .unwrap_or_default(),
                    started_at_ms: record.status.created_at_ms,
                    seconds: (record.status.seconds > 0.0).then_some(record.status.seconds),
                    tokens: record.status.tokens_done,
                    message: record.status.message.clone(),
                })
                .collect(),
            policy: PolicyRow {
                name: loaded.id.name.clone(),
                digest: loaded.id.digest.clone(),
                hooks: loaded.policy.stats(),
            },
            machine: report::machine().facts(),
        })
    }
}

/// Bytes of the files in a folder, its own level only: the database and its log, not the students.
fn folder_bytes(dir: &std::path::Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return 0;
    };
    entries
        .filter_map(|e| e.ok()?.metadata().ok())
        .filter(|m| m.is_file())
        .map(|m| m.len())
        .sum()
}
