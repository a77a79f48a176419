//! Who is in service and who is on trial: shadow, canary, promotion, rollback. The evidence is stored, so a restart continues it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::record::{Open, Plays, Shadow};
use super::{now_ms, unit_hash, Error, EventKind, Inner, JobState, Locum, Pin};
use crate::calls::same_calls;
use crate::episode::{Actor, Counterfactual, EpisodeId, Status, ToolCall};
use crate::gate::{
    self, Arm, CanaryTest, GateDecision, LiveOutcome, RollbackTest, ShadowReport, Verdict,
};
use crate::generate::Student;
use crate::policy::{GateInfo, GateSettings, LiveInfo};
use crate::store::{JsonTable, Record};

/// Students in memory.
#[derive(Default)]
pub(super) struct Serving {
    pub pin: Pin,
    pub pinned: Option<Arc<Student>>,
    pub current: Option<Arc<Student>>,
    /// Why the current student of the registry is not in memory.
    pub trouble: Option<String>,
    pub trial: Option<Trial>,
    pub watch: Option<Watch>,
    /// Arms of ended episodes whose outcome is not known yet.
    pub waiting: HashMap<EpisodeId, (Plays, String, String, u32)>,
    pub shadows: Vec<Watched>,
}

/// What the store said when it was last looked at. Another process may have changed it since.
#[derive(Default)]
pub(super) struct Seen {
    pin: Pin,
    current: Option<u64>,
}

/// A candidate on live episodes.
pub(super) struct Trial {
    pub record: TrialRecord,
    pub student: Arc<Student>,
    pub canary: CanaryTest,
    /// Canary episodes that have begun and are not counted yet, in the order they began. Outcomes are counted in this order:
    /// successes end sooner than failures, so in the order of their ends the first outcomes would flatter whoever plays.
    pub order: BTreeMap<EpisodeId, Slot>,
    /// Canary episodes that were waited for long enough: their outcomes count whenever they come.
    pub late: BTreeSet<EpisodeId>,
}

/// A canary episode on its way.
pub(super) struct Slot {
    since: Instant,
    outcome: Option<LiveOutcome>,
}

impl Trial {
    /// Remembers that an episode of the canary has begun.
    pub(super) fn begin(&mut self, id: EpisodeId) {
        if self.record.stage == "canary" {
            let slot = || Slot {
                since: Instant::now(),
                outcome: None,
            };
            self.order.entry(id).or_insert_with(slot);
        }
    }

    /// Counts outcomes in the order of their episodes' begin, as far as that is known. True if something was counted.
    pub(super) fn drain(&mut self, now: Instant) -> bool {
        let before = self.record.outcomes.len();
        while let Some(slot) = self.order.first_entry() {
            if slot.get().outcome.is_none()
                && now.saturating_duration_since(slot.get().since) < EPISODE_PATIENCE
            {
                break;
            }
            let (id, slot) = slot.remove_entry();
            match slot.outcome {
                Some(outcome) => self.push(outcome),
                None => {
                    self.late.insert(id);
                }
            }
        }
        self.record.outcomes.len() > before
    }

    /// Takes an outcome in. One of an episode that began before the canary is no evidence.
    pub(super) fn take(&mut self, id: EpisodeId, outcome: LiveOutcome) {
        match self.order.get_mut(&id) {
            Some(slot) => slot.outcome = Some(outcome),
            None if self.late.remove(&id) => self.push(outcome),
            None => {}
        }
    }

    fn push(&mut self, outcome: LiveOutcome) {
        self.canary.push(&outcome);
        self.record.outcomes.push(outcome);
    }

    /// Forgets an episode that the host dropped.
    pub(super) fn forget(&mut self, id: EpisodeId) {
        self.order.remove(&id);
        self.late.remove(&id);
    }
}

/// What is stored of a trial.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct TrialRecord {
    pub job: u64,
    pub version: u64,
    /// `shadow`, `canary`, `promoted`, `held`, `rolled_back`.
    pub stage: String,
    pub offline: Option<Verdict>,
    pub shadow: Option<ShadowReport>,
    pub shadow_verdict: Option<Verdict>,
    pub outcomes: Vec<LiveOutcome>,
    pub canary_verdict: Option<Verdict>,
    /// Success of the teacher in the canary, which a promoted student must keep up with.
    pub teacher_success: f64,
    /// Outcomes of episodes the promoted student played: (success, time).
    pub live: Vec<(bool, u64)>,
    pub ended_at_ms: Option<u64>,
    pub settings: Option<GateSettings>,
}

/// The promoted student under observation.
pub(super) struct Watch {
    pub record: TrialRecord,
    pub test: RollbackTest,
    pub deferrals: u64,
    pub steps: u64,
}

/// A shadow reply on its way.
pub(super) struct Watched {
    pub episode: EpisodeId,
    pub step: u32,
    pub calls: Vec<ToolCall>,
    pub shadow: Shadow,
    pub since: Instant,
}

/// Longest that the outcomes of later episodes wait for an earlier one of the canary to end.
pub(super) const EPISODE_PATIENCE: Duration = Duration::from_secs(600);
/// Longest a shadow reply is waited for.
const SHADOW_PATIENCE: Duration = Duration::from_secs(60);

/// Id of the stored pin among the documents of [`JsonTable::Student`].
const PIN: &str = "pin";

impl Inner {
    /// Takes up what the registry and the store say: pin, current student, trial, watch. Without a model only the pin.
    pub(super) fn restore(&self) -> Result<(), Error> {
        let stored = |seen: &mut Seen| {
            *seen = self.look()?;
            self.pin_stored(seen.pin);
            match self.base {
                Some(_) => self.restore_students(seen.current),
                None => Ok(()),
            }
        };
        self.swap.change(stored, |_, ()| ())
    }

    fn restore_students(&self, current: Option<u64>) -> Result<(), Error> {
        let mut serving = self.swap.serving();
        let settings = self.loaded().settings.gate.clone();
        let records: Vec<TrialRecord> = self
            .store
            .list_json(JsonTable::Trial)?
            .into_iter()
            .filter_map(|(_, value)| serde_json::from_value(value).ok())
            .collect();
        if let Some(version) = current {
            match self.load_student(version) {
                Ok(student) => serving.current = Some(student),
                Err(error) => {
                    serving.trouble = Some(format!("student {version} is not in service: {error}"))
                }
            }
            if let Some(record) = records
                .iter()
                .find(|r| r.version == version && r.stage == "promoted")
            {
                let mut test =
                    RollbackTest::new(record.teacher_success, settings.margin, settings.alpha);
                record.live.iter().for_each(|(success, _)| {
                    test.push(*success);
                });
                serving.watch = Some(Watch {
                    record: record.clone(),
                    test,
                    deferrals: 0,
                    steps: 0,
                });
            }
        }
        if let Some(record) = records
            .into_iter()
            .rev()
            .find(|r| r.stage == "shadow" || r.stage == "canary")
        {
            match self.load_student(record.version) {
                Ok(student) => {
                    let canary = CanaryTest::rebuild(
                        record.settings.as_ref().unwrap_or(&settings),
                        &record.outcomes,
                    );
                    serving.trial = Some(Trial {
                        record,
                        student,
                        canary,
                        order: BTreeMap::new(),
                        late: BTreeSet::new(),
                    });
                }
                Err(error) => {
                    serving.trouble = Some(format!(
                        "candidate {} is not on trial: {error}",
                        record.version
                    ))
                }
            }
        }
        Ok(())
    }

    /// What the store says now of pin and current student.
    fn look(&self) -> Result<Seen, Error> {
        let pin = self.store.get_json(JsonTable::Student, PIN)?;
        Ok(Seen {
            pin: pin.map_or(Pin::Automatic, |pin| {
                serde_json::from_value(pin).unwrap_or_default()
            }),
            current: self.registry.current()?,
        })
    }

    /// Puts a pin found in the store into service. A student that cannot be loaded is no error: the teacher plays.
    fn pin_stored(&self, pin: Pin) {
        let loaded = match self.base {
            Some(_) => self.of_pin(pin),
            None => Ok(None),
        };
        let mut serving = self.swap.serving();
        serving.pin = pin;
        match loaded {
            Ok(student) => serving.pinned = student,
            Err(error) => {
                serving.pinned = None;
                serving.trouble = Some(format!("what is pinned is not in service: {error}"));
            }
        }
    }

    /// Takes up what another process changed: a pin, or the student in service. Called by the keeper.
    pub(super) fn follow_store(&self) {
        let take_up = |seen: &Seen, now: &Seen| {
            if now.pin != seen.pin {
                self.pin_stored(now.pin);
            }
            if now.current != seen.current {
                self.serve_stored(now.current);
            }
        };
        self.swap.follow(|| self.look().ok(), take_up);
    }

    /// Puts the student that the registry calls current into service, unless it serves already.
    fn serve_stored(&self, version: Option<u64>) {
        let serves = || {
            let serving = self.swap.serving();
            serving.current.as_ref().map(|s| s.version) == version
        };
        if self.base.is_none() || serves() {
            return;
        }
        let loaded = version.map(|v| self.load_student(v)).transpose();
        if let Some(engine) = &self.engine {
            let serving = self.swap.serving();
            let pinned = serving.pinned.as_ref().map_or(0, |s| s.version);
            let trial = serving.trial.as_ref().map_or(0, |t| t.record.version);
            engine.keep_only(&[version.unwrap_or(0), pinned, trial, 0]);
        }
        let mut serving = self.swap.serving();
        // The evidence on another student says nothing of this one.
        serving.watch = None;
        match loaded {
            Ok(student) => serving.current = student,
            Err(error) => {
                serving.current = None;
                serving.trouble = Some(format!(
                    "student {} is not in service: {error}",
                    version.unwrap_or(0)
                ));
            }
        }
    }

    /// The student that a pin names, loaded; `None` where the pin names nobody.
    fn of_pin(&self, pin: Pin) -> Result<Option<Arc<Student>>, Error> {
        Ok(match pin {
            Pin::Automatic | Pin::Teacher => None,
            Pin::Base => Some(self.base.as_ref().ok_or(Error::NoModel)?.student.clone()),
            Pin::Student(version) => Some(self.load_student(version)?),
        })
    }

    /// Loads a student from the registry, sharing with the base whatever did not change.
    pub(super) fn load_student(&self, version: u64) -> Result<Arc<Student>, Error> {
        if !self.registry.list()?.iter().any(|m| m.version == version) {
            return Err(Error::NotFound {
                what: format!("student {version}"),
            });
        }
        let base = self.base.as_ref().ok_or(Error::NoModel)?;
        let (manifest, model, chat) = self.registry.load(version)?;
        let model = model.packed_beside(self.weights, &base.student.model);
        let exact = manifest
            .evaluation
            .pointer("/candidate")
            .and_then(|r| Some(r.get("exact")?.as_f64()? / r.get("steps")?.as_f64()?.max(1.0)));
        Ok(Arc::new(Student {
            id: manifest.id,
            version,
            model: Arc::new(model),
            chat: Arc::new(chat),
            view: manifest.view,
            tool_names: manifest.tool_names,
            scope: manifest.scope,
            held_out_exact: exact,
            learns: crate::evaluate::ttt::helped(&manifest.evaluation),
        }))
    }

    /// Puts a candidate that passed offline on trial.
    pub(super) fn start_trial(
        &self,
        job: u64,
        student: Arc<Student>,
        offline: Verdict,
    ) -> Result<(), Error> {
        let settings = self.loaded().settings.gate.clone();
        let record = TrialRecord {
            job,
            version: student.version,
            stage: if settings.shadow_steps == 0 {
                "canary"
            } else {
                "shadow"
            }
            .into(),
            offline: Some(offline),
            shadow: Some(ShadowReport::default()),
            settings: Some(settings.clone()),
            ..TrialRecord::default()
        };
        self.save_trial(&record)?;
        let trial = Trial {
            record,
            student,
            canary: CanaryTest::new(&settings),
            order: BTreeMap::new(),
            late: BTreeSet::new(),
        };
        self.swap.serving().trial = Some(trial);
        Ok(())
    }

    pub(super) fn save_trial(&self, record: &TrialRecord) -> Result<(), Error> {
        let value = serde_json::to_value(record).expect("a trial prints");
        Ok(self
            .store
            .put_json(JsonTable::Trial, &format!("{:08}", record.version), &value)?)
    }

    /// Who plays an episode, settled at its first decision: by a hash of its id, so that a rerun of the same id decides alike.
    pub(super) fn plays(&self, id: EpisodeId, scope: &str, serving: &Serving) -> Plays {
        let draw = unit_hash(&id.0);
        let settings = &self.loaded().settings.gate;
        if let Some(trial) = serving
            .trial
            .as_ref()
            .filter(|t| t.record.stage == "canary" && t.student.scope == scope)
        {
            if draw < settings.canary_share {
                return Plays::Candidate(trial.record.version);
            }
            return Plays::Teacher;
        }
        match &serving.current {
            Some(student) if student.scope == scope && draw >= settings.keep_teacher => {
                Plays::Current(student.version)
            }
            _ => Plays::Teacher,
        }
    }

    /// Remembers a shadow reply, to be compared with what the teacher did.
    pub(super) fn watch_shadow(
        &self,
        episode: EpisodeId,
        step: u32,
        calls: Vec<ToolCall>,
        shadow: Shadow,
    ) {
        let watched = Watched {
            episode,
            step,
            calls,
            shadow,
            since: Instant::now(),
        };
        self.swap.serving().shadows.push(watched);
        self.nudge();
    }

    /// Counts shadow replies that have come in. Called by the keeper. True if some are still on their way.
    pub(super) fn settle_shadows(&self) -> bool {
        let mut done = Vec::new();
        let left;
        {
            let mut serving = self.swap.serving();
            let mut i = 0;
            while i < serving.shadows.len() {
                let watched = &serving.shadows[i];
                if watched.shadow.ticket.outcome().is_some()
                    || watched.since.elapsed() > SHADOW_PATIENCE
                {
                    done.push(serving.shadows.swap_remove(i));
                } else {
                    i += 1;
                }
            }
            left = !serving.shadows.is_empty();
        }
        for watched in done {
            let Watched {
                episode,
                step,
                calls,
                shadow,
                ..
            } = watched;
            shadow.ticket.cancel();
            let answer = shadow.ticket.outcome().and_then(Result::ok);
            let reply = answer
                .as_ref()
                .and_then(|a| shadow.format.parse_reply(&a.text).ok());
            let valid = reply
                .as_ref()
                .is_some_and(|r| r.calls.iter().all(|c| shadow.format.validate(c).is_ok()));
            let said = reply.map(|r| r.calls).unwrap_or_default();
            let agrees = valid && same_calls(&said, &calls);
            let mut stored = None;
            {
                let mut serving = self.swap.serving();
                if let Some(trial) = serving
                    .trial
                    .as_mut()
                    .filter(|t| t.record.version == shadow.version && t.record.stage == "shadow")
                {
                    let report = trial.record.shadow.get_or_insert_default();
                    report.steps += 1;
                    report.failures += answer.is_none() as u64;
                    report.invalid += (answer.is_some() && !valid) as u64;
                    report.agree += agrees as u64;
                    stored = Some(trial.student.id.clone());
                }
            }
            let Some(student) = stored else { continue };
            let value = Counterfactual {
                actor: Actor::Student,
                student: Some(student),
                tool_calls: said,
                message: None,
                agrees,
            };
            // Lost if the queue is full: the count above stands, and only the record of this one step is poorer.
            let _ = self.put(Record::Counterfactual {
                episode,
                step,
                value,
            });
        }
        left
    }

    /// Counts the outcome of an ended episode for the trial or for the watch over the promoted student.
    pub(super) fn account(&self, id: EpisodeId, open: &Open, status: Status, honest: bool) {
        let Some(plays) = open.plays.clone() else {
            return;
        };
        let entry = (
            plays,
            open.task.id.clone(),
            open.task.domain.clone(),
            open.invalid_calls,
        );
        if status == Status::Unknown {
            self.swap.serving().waiting.insert(id, entry);
            return;
        }
        self.count(id, entry, status, honest);
    }

    pub(super) fn account_later(&self, id: EpisodeId, status: Status, honest: bool) {
        let entry = self.swap.serving().waiting.remove(&id);
        if let Some(entry) = entry {
            self.account_entry(id, entry, status, honest);
        }
    }

    fn account_entry(
        &self,
        id: EpisodeId,
        entry: (Plays, String, String, u32),
        status: Status,
        honest: bool,
    ) {
        if status == Status::Unknown {
            self.swap.serving().waiting.insert(id, entry);
        } else {
            self.count(id, entry, status, honest);
        }
    }

    fn count(
        &self,
        id: EpisodeId,
        (plays, task, domain, invalid_calls): (Plays, String, String, u32),
        status: Status,
        honest: bool,
    ) {
        let success = status == Status::Success && honest;
        let mut serving = self.swap.serving();
        if let Some(trial) = serving
            .trial
            .as_mut()
            .filter(|t| t.record.stage == "canary")
        {
            let arm = match plays {
                Plays::Teacher => Some(Arm::Teacher),
                Plays::Candidate(version) if version == trial.record.version => Some(Arm::Student),
                _ => None,
            };
            if let Some(arm) = arm {
                let outcome = LiveOutcome {
                    arm,
                    task,
                    domain,
                    success,
                    at_ms: now_ms(),
                    integrity_ok: honest,
                    invalid_calls,
                };
                trial.take(id, outcome);
                if trial.drain(Instant::now()) {
                    let record = trial.record.clone();
                    drop(serving);
                    let _ = self.save_trial(&record);
                }
            }
        } else if let Some(watch) = serving.watch.as_mut() {
            if plays == Plays::Current(watch.record.version) {
                watch.test.push(success);
                watch.record.live.push((success, now_ms()));
                let record = watch.record.clone();
                drop(serving);
                let _ = self.save_trial(&record);
            }
        }
    }

    /// Moves the trial on if its evidence is in, and looks after the promoted student. Called by the keeper.
    pub(super) fn judge_trial(&self) {
        let loaded = self.loaded();
        let ready = {
            let mut serving = self.swap.serving();
            match serving.trial.as_mut() {
                None => None,
                Some(trial) => {
                    trial.drain(Instant::now());
                    let settings = trial.record.settings.clone().unwrap_or_default();
                    let verdict = match trial.record.stage.as_str() {
                        "shadow" => {
                            let report = trial.record.shadow.unwrap_or_default();
                            let verdict = gate::shadow(&report, &settings);
                            trial.record.shadow_verdict = Some(verdict.clone());
                            verdict
                        }
                        _ => {
                            let verdict = if trial.canary.ruling().decision == GateDecision::Wait {
                                trial.canary.ruling()
                            } else {
                                trial.canary.verdict()
                            };
                            trial.record.canary_verdict = Some(verdict.clone());
                            verdict
                        }
                    };
                    (verdict.decision != GateDecision::Wait).then(|| {
                        (
                            trial.record.clone(),
                            trial.student.clone(),
                            trial.canary.summary(),
                            verdict,
                        )
                    })
                }
            }
        };
        if let Some((record, student, summary, verdict)) = ready {
            let rate = |successes: u64, n: u64| (n > 0).then(|| successes as f64 / n as f64);
            let shadow = record.shadow.unwrap_or_default();
            let vote = loaded.policy.gate(&GateInfo {
                stage: record.stage.clone(),
                candidate: student.version.to_string(),
                held_out_exact: student.held_out_exact.unwrap_or(0.0),
                shadow_agreement: rate(shadow.agree, shadow.steps),
                teacher_success: rate(summary.teacher_successes, summary.teacher_episodes),
                teacher_episodes: summary.teacher_episodes,
                student_success: rate(summary.student_successes, summary.student_episodes),
                student_episodes: summary.student_episodes,
                verdict: if verdict.pass { "promote" } else { "hold" }.into(),
                reasons: verdict.reasons.clone(),
                ..GateInfo::default()
            });
            let verdict = verdict.with_vote(&vote);
            let teacher_success =
                rate(summary.teacher_successes, summary.teacher_episodes).unwrap_or(0.0);
            let result = match (record.stage.as_str(), verdict.pass) {
                ("shadow", true) => self.advance_to_canary(verdict),
                (_, true) => self.promote(record, student, teacher_success, verdict),
                (_, false) => self.hold(record, verdict),
            };
            if let Err(error) = result {
                self.events.push(
                    EventKind::StoreTrouble,
                    0,
                    0,
                    json!({ "what": error.to_string() }),
                );
            }
        }
        self.watch_current(&loaded);
    }

    fn advance_to_canary(&self, verdict: Verdict) -> Result<(), Error> {
        let mut serving = self.swap.serving();
        let Some(trial) = serving.trial.as_mut() else {
            return Ok(());
        };
        trial.record.stage = "canary".into();
        trial.record.shadow_verdict = Some(verdict);
        let record = trial.record.clone();
        drop(serving);
        self.save_trial(&record)?;
        self.update_job(record.job, |status| {
            status.state = JobState::Canary;
            status.message = "on trial: it plays a share of the live episodes".into();
        })
    }

    pub(super) fn promote(
        &self,
        mut record: TrialRecord,
        student: Arc<Student>,
        teacher_success: f64,
        verdict: Verdict,
    ) -> Result<(), Error> {
        record.stage = "promoted".into();
        record.teacher_success = teacher_success;
        record.ended_at_ms = Some(now_ms());
        record.canary_verdict = Some(verdict.clone());
        let settings = record.settings.clone().unwrap_or_default();
        let (job, version) = (record.job, record.version);
        // The pointer first, then the trial's end: after a crash between the two the trial is still on and is judged again.
        let store = |seen: &mut Seen| {
            self.registry.set_current(Some(version))?;
            seen.current = Some(version);
            self.save_trial(&record)?;
            Ok::<_, Error>(record)
        };
        self.swap.change(store, |serving, record| {
            serving.trial = None;
            serving.current = Some(student.clone());
            serving.trouble = None;
            serving.watch = Some(Watch {
                test: RollbackTest::new(teacher_success, settings.margin, settings.alpha),
                record,
                deferrals: 0,
                steps: 0,
            });
        })?;
        if let Some(engine) = &self.engine {
            engine.keep_only(&[version, 0]);
        }
        self.update_job(job, |status| {
            status.state = JobState::Promoted;
            status.message = verdict.sentence();
        })?;
        self.note("promoted", version, &verdict.sentence());
        self.events.push(
            EventKind::StudentSwapped,
            version,
            0,
            json!({ "student": student.id, "why": verdict.sentence() }),
        );
        Ok(())
    }

    fn hold(&self, mut record: TrialRecord, verdict: Verdict) -> Result<(), Error> {
        let job = record.job;
        record.ended_at_ms = Some(now_ms());
        match record.stage.as_str() {
            "shadow" => record.shadow_verdict = Some(verdict.clone()),
            _ => record.canary_verdict = Some(verdict.clone()),
        }
        record.stage = "held".into();
        self.save_trial(&record)?;
        self.swap.serving().trial = None;
        self.note("held", record.version, &verdict.sentence());
        self.update_job(job, |status| {
            status.state = JobState::Held;
            status.message = verdict.sentence();
        })
    }

    fn watch_current(&self, loaded: &super::Loaded) {
        let alarm = {
            let serving = self.swap.serving();
            let Some(watch) = serving.watch.as_ref().filter(|w| !w.record.live.is_empty()) else {
                return;
            };
            let version = watch.record.version;
            let n = watch.record.live.len() as u64;
            let wins = watch.record.live.iter().filter(|l| l.0).count() as f64;
            let built_in = watch.test.alarmed();
            let info = LiveInfo {
                student: version.to_string(),
                episodes: n,
                success: wins / n as f64,
                teacher_success: watch.record.teacher_success,
                deferrals: watch.deferrals,
                steps: watch.steps,
                built_in,
            };
            let sentence = watch.test.sentence();
            drop(serving);
            match loaded.policy.rollback(&info) {
                // A floor that no policy can vote down: the built-in alarm always counts.
                Some((false, _)) | None => built_in.then_some((version, sentence)),
                Some((true, why)) => Some((version, why)),
            }
        };
        if let Some((version, why)) = alarm {
            let _ = self.take_back(version, &why);
        }
    }

    /// Takes a promoted student out of service; the one before it, or the teacher, plays on. One that is not in service any more is
    /// left: what was said against it says nothing of its successor.
    pub(super) fn take_back(&self, version: u64, why: &str) -> Result<(), Error> {
        let store = |seen: &mut Seen| {
            if self.registry.current()? != Some(version) {
                return Ok(None);
            }
            let before = self.registry.previous()?;
            let previous = before.and_then(|v| self.load_student(v).ok());
            // Where no model is loaded, the one before is taken on trust: whoever opens the store with a model loads it or says why not.
            let next = match &self.base {
                Some(_) => previous.as_ref().map(|s| s.version),
                None => before,
            };
            let mut trials = self.trials()?.into_iter();
            let stored = trials.find(|t| t.version == version && t.stage == "promoted");
            self.registry.set_current(next)?;
            seen.current = next;
            if let Some(engine) = &self.engine {
                engine.keep_only(&[next.unwrap_or(0), 0]);
            }
            Ok::<_, Error>(Some((previous, stored)))
        };
        let taken = self.swap.change(store, |serving, stored| {
            let (previous, stored) = stored?;
            serving.current = previous;
            Some(serving.watch.take().map(|w| w.record).or(stored))
        })?;
        let Some(record) = taken else { return Ok(()) };
        if let Some(mut record) = record {
            record.stage = "rolled_back".into();
            record.ended_at_ms = Some(now_ms());
            self.save_trial(&record)?;
        }
        self.note("rolled back", version, why);
        self.events
            .push(EventKind::RolledBack, version, 0, json!({ "why": why }));
        Ok(())
    }

    /// A line of the store's history, for the report.
    pub(super) fn note(&self, what: &str, version: u64, why: &str) {
        let now = now_ms();
        let value = json!({ "unix_ms": now, "what": what, "version": version, "why": why });
        let _ = self
            .store
            .put_json(JsonTable::Event, &format!("{now:016}-{what}"), &value);
    }
}

impl Locum {
    /// Which student answers. [`Pin::Student`] is the operator's override of the gate. The pin is kept in the store:
    /// it holds here at once, and in other processes that have the store open within about a second.
    ///
    /// # Errors
    /// [`Error::NotFound`] for a version that is not in the registry, [`Error::NoModel`] where there is no base,
    /// [`Error::Store`] if the pin cannot be kept; then nothing changed.
    pub fn use_student(&self, pin: Pin) -> Result<(), Error> {
        self.inner.check_open()?;
        let pinned = self.inner.of_pin(pin)?;
        self.keep_pin(pin, pinned)
    }

    /// Like [`Locum::use_student`] for this open instance only: a measurement that is killed leaves no pin behind.
    pub fn use_student_here(&self, pin: Pin) -> Result<(), Error> {
        self.inner.check_open()?;
        let pinned = self.inner.of_pin(pin)?;
        let mut serving = self.inner.swap.serving();
        serving.pin = pin;
        serving.pinned = pinned;
        Ok(())
    }

    fn keep_pin(&self, pin: Pin, pinned: Option<Arc<Student>>) -> Result<(), Error> {
        let store = |seen: &mut Seen| {
            let store = &self.inner.store;
            store.put_json(JsonTable::Student, PIN, &json!(pin))?;
            seen.pin = pin;
            Ok(())
        };
        self.inner.swap.change(store, |serving, ()| {
            serving.pin = pin;
            serving.pinned = pinned;
        })
    }

    /// Takes back the promoted student, and a pin with it: the student before it plays again, or the teacher.
    ///
    /// # Errors
    /// [`Error::NotFound`] if no student is promoted and nothing is pinned.
    pub fn rollback(&self) -> Result<(), Error> {
        self.inner.check_open()?;
        let unpinned = {
            let serving = self.inner.swap.serving();
            serving.pin != Pin::Automatic
        };
        if unpinned {
            self.keep_pin(Pin::Automatic, None)?;
        }
        if let Some(version) = self.inner.registry.current()? {
            return self.inner.take_back(version, "the operator said so");
        }
        if unpinned {
            return Ok(());
        }
        Err(Error::NotFound {
            what: "a student to take back".into(),
        })
    }
}
