//! The keeper thread and the one background job: when to distil, how far it is, what becomes of its student.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{now_ms, DistilOptions, Error, EventKind, Inner, JobState, JobStatus, Locum};
use crate::distil::{self, Context, Order, Stage};
use crate::kernels::Hold;
use crate::policy::WorldInfo;
use crate::store::JsonTable;
use crate::threads::{give_way, spawn_quiet};
use crate::train::Flow;

/// How often the policy's `schedule` is asked when nothing wakes the keeper.
const SCHEDULE_TICK: Duration = Duration::from_secs(5);
/// How often the keeper looks whether another process promoted a student, pinned one or took one back: twice a second, so that
/// it serves here within one.
const TICK: Duration = Duration::from_millis(500);
/// Shortest time between two questions to `schedule`, however often the keeper is woken.
const NUDGED_REST: Duration = Duration::from_millis(500);
/// How often the keeper looks while shadow replies are on their way.
const SHADOW_TICK: Duration = Duration::from_millis(100);
/// How often a job's progress is written down and told.
const PROGRESS: Duration = Duration::from_millis(500);

/// The running job's thread and flag.
#[derive(Default)]
pub(super) struct Jobs {
    pub running: Option<Running>,
    /// Newest status of the running job, ahead of what is stored.
    status: Option<JobStatus>,
    /// There while the caller has paused the running job.
    paused: Option<Hold>,
    /// Set once a job interrupted in an earlier process was looked for.
    resumed: bool,
}

pub(super) struct Running {
    job: u64,
    stop: Arc<AtomicBool>,
    /// Set when the caller wants the job gone, not merely paused by a close.
    cancelled: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    /// The order of a job that an earlier process left, until the same is given here: that is then this job.
    left: Option<DistilOptions>,
}

/// What is stored of a job.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct JobRecord {
    pub status: JobStatus,
    pub options: DistilOptions,
    /// Set from any process; the one that runs the job sees it at its next look.
    pub cancel: bool,
}

/// Body of the keeper thread: ends when the Locum is closed or dropped.
pub(super) fn keep(inner: Weak<Inner>) {
    let mut last_schedule: Option<Instant> = None;
    let mut nudged = true;
    loop {
        let Some(inner) = inner.upgrade() else { return };
        if inner.closed.load(Ordering::SeqCst) {
            return;
        }
        inner.follow_store();
        let waiting = inner.settle_shadows();
        inner.judge_trial();
        inner.reap_job();
        inner.tell_policy();
        let rest = if nudged { NUDGED_REST } else { SCHEDULE_TICK };
        if last_schedule.is_none_or(|at| at.elapsed() >= rest) {
            last_schedule = Some(Instant::now());
            nudged = false;
            inner.maybe_retain();
            inner.maybe_start();
        }
        let lock = inner.wake.0.lock().unwrap_or_else(|e| e.into_inner());
        let tick = if waiting { SHADOW_TICK } else { TICK };
        let (mut woken, _) = inner
            .wake
            .1
            .wait_timeout_while(lock, tick, |woken| !*woken)
            .unwrap_or_else(|e| e.into_inner());
        nudged |= std::mem::take(&mut *woken);
        drop(woken);
        // The last owner may have let go meanwhile; then this drop closes everything, on this thread.
    }
}

impl Locum {
    /// Starts a distillation in the background.
    ///
    /// # Errors
    /// [`Error::NoModel`] without a base, [`Error::Busy`] while another job runs (here or in another process).
    pub fn distil_start(&self, options: DistilOptions) -> Result<u64, Error> {
        self.inner.check_open()?;
        self.inner.start_job(options)
    }

    /// Where a job stands; 0 is the newest.
    ///
    /// # Errors
    /// [`Error::NotFound`] for a number that no job has.
    pub fn distil_status(&self, job: u64) -> Result<JobStatus, Error> {
        self.inner.status_of(job)
    }

    /// Cancels a job that runs, in whichever process. One that has ended stays as it is.
    pub fn distil_cancel(&self, job: u64) -> Result<(), Error> {
        self.inner.check_open()?;
        let status = self.inner.status_of(job)?;
        if !status.state.is_running() {
            return Ok(());
        }
        {
            let mut jobs = self.inner.jobs.lock().unwrap_or_else(|e| e.into_inner());
            if let Some(running) = jobs.running.as_ref().filter(|r| r.job == status.job) {
                running.cancelled.store(true, Ordering::SeqCst);
                running.stop.store(true, Ordering::SeqCst);
                // Or it would never come to its end.
                jobs.paused = None;
                return Ok(());
            }
        }
        let mut record = self.inner.job_record(status.job)?;
        record.cancel = true;
        // Nobody holds the learner's lock: the job's process is gone, so it is cancelled here.
        if self.inner.store.try_lead()? {
            record.status.state = JobState::Cancelled;
            record.status.message = "cancelled".into();
            self.inner.store.stop_leading();
        }
        self.inner.put_job(&record)
    }
}

impl Locum {
    /// Pauses the computing of a job that runs in this process, within milliseconds and until [`Locum::distil_resume`]; 0 is the
    /// newest. It keeps its memory. While a step is being decided, a job pauses by itself.
    ///
    /// # Errors
    /// [`Error::NotFound`] if it does not run here.
    pub fn distil_pause(&self, job: u64) -> Result<(), Error> {
        let mut jobs = self.running_here(job)?;
        if jobs.paused.is_none() {
            jobs.paused = self.inner.engine.as_ref().map(|e| e.gate().hold());
        }
        Ok(())
    }

    /// Lets a paused job go on.
    ///
    /// # Errors
    /// [`Error::NotFound`] if it does not run here.
    pub fn distil_resume(&self, job: u64) -> Result<(), Error> {
        self.running_here(job)?.paused = None;
        Ok(())
    }

    fn running_here(&self, job: u64) -> Result<std::sync::MutexGuard<'_, Jobs>, Error> {
        self.inner.check_open()?;
        let jobs = self.inner.jobs.lock().unwrap_or_else(|e| e.into_inner());
        match &jobs.running {
            Some(running) if job == 0 || job == running.job => Ok(jobs),
            _ => Err(Error::NotFound {
                what: format!("job {job}, running in this process"),
            }),
        }
    }
}

impl Inner {
    pub(super) fn put_job(&self, record: &JobRecord) -> Result<(), Error> {
        let value = serde_json::to_value(record).expect("a job prints");
        Ok(self
            .store
            .put_json(JsonTable::Job, &format!("{:08}", record.status.job), &value)?)
    }

    pub(super) fn job_records(&self) -> Result<Vec<JobRecord>, Error> {
        let mut records: Vec<JobRecord> = self
            .store
            .list_json(JsonTable::Job)?
            .into_iter()
            .filter_map(|(_, value)| serde_json::from_value(value).ok())
            .collect();
        records.sort_by_key(|r| r.status.job);
        Ok(records)
    }

    pub(super) fn job_record(&self, job: u64) -> Result<JobRecord, Error> {
        let mut records = self.job_records()?;
        let at = if job == 0 {
            records.len().checked_sub(1)
        } else {
            records.iter().position(|r| r.status.job == job)
        };
        at.map(|at| records.swap_remove(at))
            .ok_or_else(|| Error::NotFound {
                what: if job == 0 {
                    "a job".into()
                } else {
                    format!("job {job}")
                },
            })
    }

    pub(super) fn status_of(&self, job: u64) -> Result<JobStatus, Error> {
        {
            let jobs = self.jobs.lock().unwrap_or_else(|e| e.into_inner());
            if let (Some(running), Some(status)) = (&jobs.running, &jobs.status) {
                if job == 0 || job == running.job {
                    let mut status = status.clone();
                    if jobs.paused.is_some() {
                        status.message = "paused".into();
                    }
                    return Ok(self.with_trial(status));
                }
            }
        }
        Ok(self.with_trial(self.job_record(job)?.status))
    }

    /// Adds the trial's counts, which change without the job.
    fn with_trial(&self, mut status: JobStatus) -> JobStatus {
        let serving = self.swap.serving();
        if let Some(trial) = serving
            .trial
            .as_ref()
            .filter(|t| t.record.job == status.job)
        {
            status.shadow_steps = trial.record.shadow.as_ref().map_or(0, |s| s.steps);
            let summary = trial.canary.summary();
            status.canary_student = summary.student_episodes;
            status.canary_teacher = summary.teacher_episodes;
        }
        status
    }

    /// Changes the stored status of a job.
    pub(super) fn update_job(
        &self,
        job: u64,
        change: impl FnOnce(&mut JobStatus),
    ) -> Result<(), Error> {
        let mut record = self.job_record(job)?;
        change(&mut record.status);
        self.put_job(&record)?;
        self.events
            .push(EventKind::JobState, job, 0, json!(record.status));
        Ok(())
    }

    /// Stops the running job at its next step; its checkpoint is written.
    pub(super) fn stop_job(&self) {
        let mut jobs = self.jobs.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(running) = &jobs.running {
            running.stop.store(true, Ordering::SeqCst);
        }
        jobs.paused = None;
    }

    pub(super) fn join_job(&self) {
        let thread = self
            .jobs
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .running
            .as_mut()
            .and_then(|r| r.thread.take());
        if let Some(thread) = thread.filter(|t| t.thread().id() != std::thread::current().id()) {
            let _ = thread.join();
        }
    }

    fn reap_job(&self) {
        let mut jobs = self.jobs.lock().unwrap_or_else(|e| e.into_inner());
        if jobs
            .running
            .as_ref()
            .is_some_and(|r| r.thread.as_ref().is_none_or(|t| t.is_finished()))
        {
            jobs.running = None;
            jobs.paused = None;
            jobs.status = None;
            self.store.stop_leading();
        }
    }

    /// Resumes a job that a process left unfinished, or asks the policy whether it is time for a new one.
    fn maybe_start(self: &Arc<Self>) {
        if self.no_learning || self.base.is_none() {
            return;
        }
        let _starting = self.starting.lock().unwrap_or_else(|e| e.into_inner());
        if self
            .jobs
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .running
            .is_some()
        {
            return;
        }
        let Ok(records) = self.job_records() else {
            return;
        };
        let resumed = std::mem::replace(
            &mut self.jobs.lock().unwrap_or_else(|e| e.into_inner()).resumed,
            true,
        );
        if let Some(record) = records
            .iter()
            .find(|r| r.status.state.is_running() && !r.cancel)
        {
            if !resumed || self.store.try_lead().unwrap_or(false) {
                let _ = self.launch(record.clone(), Some(record.options.clone()));
            }
            return;
        }
        let (trial_running, promoted) = {
            let serving = self.swap.serving();
            (serving.trial.is_some(), serving.current.is_some())
        };
        let last = records.last();
        let since = |r: &JobRecord| r.status.created_at_ms;
        // A job learns from one scope: the one in which most went well since the last job.
        let busiest = |since| self.store.busiest_scope(since).ok().flatten();
        let scope = busiest(last.map(since)).or_else(|| busiest(None));
        let scope = scope.unwrap_or_default();
        let before = records.iter().rev().find(|r| r.options.scope == scope);
        let (Ok(all), Ok(new)) = (
            self.store.counts_of_scope(&scope, None),
            self.store.counts_of_scope(&scope, before.map(since)),
        ) else {
            return;
        };
        let machine = crate::report::machine();
        let verdict = self.loaded().policy.schedule(&WorldInfo {
            episodes: all.episodes,
            successes: all.successes,
            new_successes: new.successes,
            new_episodes: new.episodes,
            hours_since_job: last
                .map(|r| now_ms().saturating_sub(r.status.created_at_ms) as f64 / 3.6e6),
            job_running: false,
            trial_running,
            has_base: true,
            promoted,
            free_memory_mb: machine.memory_free_bytes >> 20,
            load: load_average(),
        });
        if verdict.now {
            let _ = self.start_alone(DistilOptions {
                scope,
                ..DistilOptions::default()
            });
        }
    }

    pub(super) fn start_job(self: &Arc<Self>, options: DistilOptions) -> Result<u64, Error> {
        // Or the keeper would take the job, once its row is written, for one that was left unfinished.
        let _starting = self.starting.lock().unwrap_or_else(|e| e.into_inner());
        self.start_alone(options)
    }

    /// [`Inner::start_job`] for who holds `starting`.
    fn start_alone(self: &Arc<Self>, options: DistilOptions) -> Result<u64, Error> {
        if self.base.is_none() {
            return Err(Error::NoModel);
        }
        // A job that has told its end, and whose thread has not come to it yet, is over.
        let over = {
            let jobs = self.jobs.lock().unwrap_or_else(|e| e.into_inner());
            let told = jobs.status.as_ref();
            jobs.running.is_some() && told.is_some_and(|s| !s.state.is_running())
        };
        if over {
            self.join_job();
        }
        self.reap_job();
        {
            let mut jobs = self.jobs.lock().unwrap_or_else(|e| e.into_inner());
            if let Some(running) = &mut jobs.running {
                // The keeper was quicker to take up what this order is to go on with.
                if running.left.take_if(|left| *left == options).is_some() {
                    return Ok(running.job);
                }
                return Err(Error::Busy("a distillation is running already".into()));
            }
        }
        let records = self.job_records()?;
        let job = records.last().map_or(0, |r| r.status.job) + 1;
        let status = JobStatus {
            job,
            created_at_ms: now_ms(),
            message: "queued".into(),
            ..JobStatus::default()
        };
        let record = JobRecord {
            status,
            options,
            cancel: false,
        };
        if !self.store.try_lead()? {
            return Err(Error::Busy(
                "another process is distilling from this store".into(),
            ));
        }
        // The same order again, whose process is gone: that job goes on.
        let left = records
            .into_iter()
            .rev()
            .find(|r| r.status.state.is_running() && !r.cancel && r.options == record.options);
        if let Some(left) = left {
            let job = left.status.job;
            self.launch(left, None)?;
            return Ok(job);
        }
        self.put_job(&record)?;
        self.launch(record, None)?;
        Ok(job)
    }

    fn launch(
        self: &Arc<Self>,
        record: JobRecord,
        left: Option<DistilOptions>,
    ) -> Result<(), Error> {
        if !self.store.try_lead()? {
            return Err(Error::Busy(
                "another process is distilling from this store".into(),
            ));
        }
        let job = record.status.job;
        let (stop, cancelled) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicBool::new(false)),
        );
        let inner = Arc::downgrade(self);
        let mut jobs = self.jobs.lock().unwrap_or_else(|e| e.into_inner());
        if jobs.running.is_some() {
            return Err(Error::Busy("a distillation is running already".into()));
        }
        jobs.status = Some(record.status.clone());
        let flags = (stop.clone(), cancelled.clone());
        let thread = spawn_quiet("locum-distil", move || {
            give_way(10);
            if let Some(inner) = inner.upgrade() {
                inner.work(record, &flags.0, &flags.1);
                inner.nudge();
            }
        })
        .map_err(|e| Error::Argument(format!("no thread could be started: {e}")))?;
        jobs.running = Some(Running {
            job,
            stop,
            cancelled,
            thread: Some(thread),
            left,
        });
        Ok(())
    }

    /// Body of the job thread.
    fn work(&self, mut record: JobRecord, stop: &AtomicBool, cancelled: &AtomicBool) {
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            self.distil(&mut record, stop)
        }));
        let status = &mut record.status;
        status.seconds_left = None;
        match result {
            Ok(Ok(())) => {}
            Ok(Err(Error::Cancelled)) if !cancelled.load(Ordering::SeqCst) && !record.cancel => {
                // Closed in mid-work: the state stays, and the next open resumes.
                let _ = self.put_job(&record);
                return;
            }
            Ok(Err(Error::Cancelled)) => {
                status.state = JobState::Cancelled;
                status.message = "cancelled".into();
            }
            Ok(Err(error)) => {
                status.state = JobState::Failed;
                status.message = error.to_string();
            }
            Err(_) => {
                status.state = JobState::Failed;
                status.message = "an internal fault ended the job; the store and the current student are as they were".into();
            }
        }
        let status = record.status.clone();
        if let Err(error) = self.put_job(&record) {
            self.events.push(
                EventKind::StoreTrouble,
                status.job,
                0,
                json!({ "what": error.to_string() }),
            );
        }
        self.jobs.lock().unwrap_or_else(|e| e.into_inner()).status = Some(status.clone());
        self.note(
            &format!("job {:?}", status.state).to_lowercase(),
            status.version,
            &status.message,
        );
        self.events
            .push(EventKind::JobState, status.job, 0, json!(status));
    }

    fn distil(&self, record: &mut JobRecord, stop: &AtomicBool) -> Result<(), Error> {
        let base = self.base.as_ref().ok_or(Error::NoModel)?;
        let engine = self.engine.as_ref().ok_or(Error::NoModel)?;
        let loaded = self.loaded();
        let incumbent = self.swap.serving().current.clone();
        let context = Context {
            store: &self.store,
            registry: &self.registry,
            engine,
            policy: loaded.policy.as_ref(),
            settings: &loaded.settings,
            view: &loaded.view,
            base: &base.student,
            base_dir: &base.dir,
            weights: self.weights,
            base_digest: &base.digest,
            base_name: &base.name,
            incumbent: incumbent.as_ref(),
            threads: self.train_threads,
            job: record.status.job,
            now_ms: now_ms(),
        };
        let order = Order {
            knobs: record.options.knobs.clone(),
            unfiltered: record.options.unfiltered,
            continue_student: record.options.continue_student,
            scope: record.options.scope.clone(),
        };
        let mut told = Instant::now();
        let mut looked = Instant::now();
        let mut cancelled_elsewhere = false;
        let before = record.status.state;
        let job = record.status.job;
        let finished = distil::run(&context, &order, &mut |stage| {
            let state = show(&mut record.status, stage);
            let changed = state != before && record.status.state != state;
            record.status.state = state;
            if changed || told.elapsed() >= PROGRESS {
                told = Instant::now();
                self.jobs.lock().unwrap_or_else(|e| e.into_inner()).status =
                    Some(record.status.clone());
                self.events.push(
                    EventKind::JobProgress,
                    job,
                    (record.status.progress * 1000.0) as i64,
                    json!(record.status),
                );
            }
            // Another process may have asked for the end, and readers elsewhere want to see how far it is.
            if looked.elapsed() >= Duration::from_secs(5) {
                looked = Instant::now();
                cancelled_elsewhere = self.job_record(job).is_ok_and(|r| r.cancel);
                let mut stored = record.clone();
                stored.cancel = cancelled_elsewhere;
                let _ = self.put_job(&stored);
            }
            if stop.load(Ordering::Relaxed) || cancelled_elsewhere {
                Flow::Stop
            } else {
                Flow::Go
            }
        });
        record.cancel |= cancelled_elsewhere;
        let finished = finished?;
        let status = &mut record.status;
        status.progress = 1.0;
        status.episodes_seen = finished.episodes_seen;
        status.episodes_kept = finished.episodes_kept;
        status.samples = finished.samples;
        status.tokens_done = finished.tokens;
        status.seconds = finished.seconds;
        status.held_out_loss = finished.held_out_loss;
        status.student = Some(finished.manifest.id.clone());
        status.version = finished.manifest.version;
        let wanted = record.options.trial.unwrap_or(!record.options.unfiltered);
        if !wanted {
            status.state = JobState::Stored;
            status.message = format!("stored without a trial: {}", finished.verdict.sentence());
        } else if finished.verdict.pass {
            status.state = JobState::Shadow;
            status.message = finished.verdict.sentence();
            self.put_job(record)?;
            self.start_trial(job, finished.student, finished.verdict)?;
        } else {
            status.state = JobState::Held;
            status.message = finished.verdict.sentence();
        }
        Ok(())
    }
}

/// Writes a stage into a status and returns the state that belongs to it.
fn show(status: &mut JobStatus, stage: &Stage) -> JobState {
    match stage {
        Stage::Curating => {
            status.message = "choosing episodes".into();
            JobState::Curating
        }
        Stage::Training {
            progress,
            kept,
            seen,
            samples,
        } => {
            status.episodes_kept = *kept;
            status.episodes_seen = *seen;
            status.samples = *samples;
            status.tokens_done = progress.tokens;
            status.tokens_total = progress.tokens_total;
            status.tokens_shared = progress.tokens_shared;
            status.held_seconds = progress.held_seconds;
            // Evaluation is the last tenth.
            let by_time = progress.seconds / (progress.seconds + progress.seconds_left).max(1e-9);
            status.progress = 0.9 * by_time.min(1.0);
            status.loss = Some(progress.loss);
            status.held_out_loss = progress.held_out_loss;
            status.seconds = progress.seconds;
            status.seconds_left = Some(progress.seconds_left);
            status.tokens_per_second =
                (progress.seconds > 0.0).then(|| progress.tokens as f64 / progress.seconds);
            status.message = "training".into();
            JobState::Training
        }
        Stage::Saving => {
            status.message = "rounding the student".into();
            JobState::Saving
        }
        Stage::Evaluating { done, of } => {
            status.progress = 0.9 + 0.1 * *done as f64 / (*of).max(1) as f64;
            status.message = format!("asking held-out steps: {done} of {of}");
            JobState::Evaluating
        }
    }
}

/// Load of the last minute; 0 where the system does not say.
fn load_average() -> f64 {
    let mut loads = [0f64; 3];
    // SAFETY: the array has room for the three numbers asked for.
    #[cfg(unix)]
    let n = unsafe { libc::getloadavg(loads.as_mut_ptr(), 3) };
    #[cfg(not(unix))]
    let n = 0;
    if n < 1 {
        loads[0] = 0.0;
    }
    loads[0]
}
