//! The student's engine: answers of one or several students, computed on one thread, many at once.
//!
//! Jobs join and leave between two tokens, so a short answer never waits for a long one to end. An answer keeps the student
//! that it began with, however often the student in service changes meanwhile.

mod fast;
mod prefix;
mod sampler;
mod scheduler;
mod seat;
mod worker;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::chat::{Chat, Grammar};
use crate::device::Device;
use crate::kernels::{Gate, Hold};
use crate::model::Model;
use crate::threads::spawn_quiet;
use crate::view::View;

pub use fast::{FastError, FastLayer, FastOp, FastOrder, FastReport, FastRule, FastSeen};

/// A student ready to serve. Immutable; shared by the jobs that run on it.
pub struct Student {
    /// Hash of its content.
    pub id: String,
    /// 1, 2, ... in order of creation.
    pub version: u64,
    pub model: Arc<Model>,
    pub chat: Arc<Chat>,
    /// The view it learned under.
    pub view: View,
    /// Tools that it has seen in training.
    pub tool_names: BTreeSet<String>,
    /// The scope whose episodes it learned from and may answer in; empty for those without one.
    pub scope: String,
    /// Share of held-out steps that it got exactly right.
    pub held_out_exact: Option<f64>,
    /// Whether its TTT layers learn while it serves: they were seen to help on held-out episodes.
    pub learns: bool,
}

/// How an engine is sized.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Threads that compute, the engine's own included; 0 counts as 1.
    pub threads: usize,
    /// Most sequences of one step of the model.
    pub max_batch: usize,
    /// Bytes of keys and values kept of answers that ended.
    pub cache_bytes: usize,
    /// What computes beside the processor, if anything does.
    pub device: Arc<Device>,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            threads: 1,
            max_batch: 16,
            cache_bytes: crate::limits::MAX_PREFIX_CACHE_BYTES,
            device: Device::off(),
        }
    }
}

/// Why there is no engine.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    #[error("the engine's thread cannot be started: {0}")]
    Thread(#[source] std::io::Error),
}

/// One answer to compute.
pub struct Job {
    pub student: Arc<Student>,
    /// The episode: its sequence is kept for the next prompt with the same key.
    pub key: u128,
    pub prompt_ids: Vec<u32>,
    /// A fresh one, of this student's [`Chat`].
    pub grammar: Option<Grammar>,
    /// A reply that is not given: where the student is about to, its next likeliest one is, if the grammar has another. Such a
    /// reply is not streamed.
    pub avoid: Option<String>,
    /// Most tokens of the reply; those that the grammar forces count.
    pub max_tokens: usize,
    pub deadline: Instant,
    /// 0 takes the likeliest token.
    pub temperature: f32,
    pub seed: u64,
    /// Whether the student's TTT layers, where it has some, learn while they read this episode.
    pub fast_weights: bool,
    /// Asked how they shall learn; without one they do as they were trained to.
    pub fast_rule: Option<FastRule>,
    /// Runs only while no other job is there, and ends without a word to `on_done`: whoever submitted it looks at its ticket.
    pub background: bool,
}

/// Why a reply ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The student ended it, or the grammar left nothing to add.
    Stop,
    /// No more tokens were allowed, or the model has no more positions.
    Length,
}

/// A reply.
#[derive(Clone, Debug, PartialEq)]
pub struct Generated {
    /// Without the token that ended it.
    pub reply_ids: Vec<u32>,
    pub text: String,
    pub finish: Finish,
    /// Product of the probabilities of the free tokens, each among those that the grammar allowed; 1 if none was free.
    pub confidence: f32,
    /// Mean natural logarithm of these probabilities; 0 if none was free.
    pub mean_logprob: f32,
    /// The smallest of them.
    pub min_prob: f32,
    /// Tokens chosen where another one could have been, the one that ended the reply included.
    pub free_tokens: usize,
    /// Tokens of the prompt that did not have to be read.
    pub cached_tokens: usize,
    /// From [`Engine::submit`] to the first step of the model.
    pub queue_ms: f32,
    /// From there to the first chosen token.
    pub prefill_ms: f32,
    /// From there to the end.
    pub decode_ms: f32,
}

/// Why there is no reply.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum GenerateError {
    #[error("the answer was cancelled")]
    Cancelled,
    #[error("the answer was not complete at its deadline, after {waited_ms} ms")]
    Late { waited_ms: u64 },
    #[error("the prompt has {tokens} tokens, {limit} at most are possible")]
    PromptTooLong { tokens: usize, limit: usize },
    #[error("the model cannot answer: {0}")]
    Model(String),
    #[error("the answer cannot go on under its grammar: {0}")]
    Grammar(String),
    /// What a layer learned while reading moved it past the cap, or to no number; it has begun again from its trained weight.
    #[error(
        "what was learned while reading moved layer {layer} by {drift} of its size, and was undone"
    )]
    Drifted { layer: u16, drift: f32 },
    /// A defect of the engine; it answers nothing more.
    #[error("the engine failed: {0}")]
    Fault(String),
    #[error("the engine was closed")]
    Closed,
}

/// Counts since the engine began, and where it stands.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct EngineCounters {
    /// Jobs of which the model has begun to read or write.
    pub running: u64,
    /// Jobs of which it has not.
    pub waiting: u64,
    /// Jobs that ended with a reply.
    pub finished: u64,
    pub cancelled: u64,
    pub late: u64,
    /// Tokens of prompts, read or found in the cache.
    pub prompt_tokens: u64,
    /// Those found.
    pub cached_tokens: u64,
    /// Tokens of replies that ended.
    pub reply_tokens: u64,
    /// Bytes of kept keys and values.
    pub cache_bytes: u64,
    /// Updates of fast weights, those that were taken back because the weight had drifted too far, and the largest drift that stayed.
    pub fast_updates: u64,
    pub fast_trips: u64,
    pub fast_drift: f64,
    /// Tokens a second while reading prompts, over all time.
    pub prefill_tok_s: f64,
    /// Tokens a second while writing replies, of all sequences together, over all time.
    pub decode_tok_s: f64,
}

/// Computes answers on a thread of its own (`locum-engine`). Dropping it ends all jobs with [`GenerateError::Closed`].
pub struct Engine {
    shared: Arc<Shared>,
    device: Arc<Device>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    /// Held closed by every job in the foreground.
    gate: Arc<Gate>,
    inbox: Mutex<Inbox>,
    wake: Condvar,
    counters: Mutex<EngineCounters>,
    numbers: AtomicU64,
}

#[derive(Default)]
struct Inbox {
    jobs: Vec<(Job, Ticket, Option<Hold>)>,
    fast: Vec<fast::Request>,
    keep_only: Option<Vec<u64>>,
    forget: Vec<u128>,
    stop: bool,
}

impl Engine {
    /// Starts the engine's thread. `on_done` gets the number of each job that is not in the background once its outcome
    /// is there; it runs on the engine's thread and holds up all answers while it does.
    ///
    /// # Errors
    /// [`EngineError::Thread`] if the system gives no thread.
    pub fn new(
        options: EngineOptions,
        on_done: Box<dyn Fn(u64) + Send + Sync>,
    ) -> Result<Engine, EngineError> {
        let shared = Arc::new(Shared {
            gate: Arc::default(),
            inbox: Mutex::default(),
            wake: Condvar::new(),
            counters: Mutex::default(),
            numbers: AtomicU64::new(1),
        });
        let (theirs, device) = (shared.clone(), options.device.clone());
        let thread = spawn_quiet("locum-engine", move || {
            worker::run(theirs, options, on_done)
        })
        .map_err(EngineError::Thread)?;
        Ok(Engine {
            shared,
            device,
            thread: Some(thread),
        })
    }

    /// Hands in a job and returns at once. Every job gets an outcome.
    pub fn submit(&self, job: Job) -> Ticket {
        let ticket = Ticket(Arc::new(TicketState {
            number: self.shared.numbers.fetch_add(1, Ordering::Relaxed),
            submitted: Instant::now(),
            cancelled: AtomicBool::new(false),
            progress: Mutex::default(),
            done: Condvar::new(),
        }));
        let hold = (!job.background).then(|| self.shared.gate.hold());
        {
            let mut inbox = locked(&self.shared.inbox);
            if inbox.stop {
                // The engine's thread is gone.
                ticket.end(Err(GenerateError::Closed));
                return ticket;
            }
            inbox.jobs.push((job, ticket.clone(), hold));
        }
        locked(&self.shared.counters).waiting += 1;
        self.shared.wake.notify_one();
        ticket
    }

    /// Closed while there are jobs in the foreground: for background work, which shall leave them the cores.
    pub fn gate(&self) -> Arc<Gate> {
        self.shared.gate.clone()
    }

    /// What computes beside the processor, for trainings too.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Forgets what is kept of these episodes: sequences with their keys and values, and snapshots. One that is being answered is not
    /// kept afterwards. Done by the engine's thread, between two steps; the counters tell when.
    pub fn forget(&self, keys: &[u128]) {
        locked(&self.shared.inbox).forget.extend_from_slice(keys);
        self.shared.wake.notify_one();
    }

    /// The counters as of the last step.
    pub fn stats(&self) -> EngineCounters {
        locked(&self.shared.counters).clone()
    }

    /// Forgets what is kept of answers of other students than these, and does not keep those of theirs that are running.
    /// Done by the engine's thread, between two steps.
    pub fn keep_only(&self, versions: &[u64]) {
        locked(&self.shared.inbox).keep_only = Some(versions.to_vec());
        self.shared.wake.notify_one();
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        locked(&self.shared.inbox).stop = true;
        self.shared.wake.notify_one();
        if let Some(thread) = self.thread.take() {
            // Dropped by `on_done`, it ends by itself after returning from it.
            if thread.thread().id() != std::thread::current().id() {
                let _ = thread.join();
            }
        }
    }
}

/// A job's place in the engine. Clones are the same place; dropping all of them does not end the job.
#[derive(Clone)]
pub struct Ticket(Arc<TicketState>);

struct TicketState {
    number: u64,
    submitted: Instant,
    cancelled: AtomicBool,
    progress: Mutex<Progress>,
    done: Condvar,
}

#[derive(Default)]
struct Progress {
    /// Text that has not been polled yet.
    text: String,
    outcome: Option<Result<Generated, GenerateError>>,
}

impl Ticket {
    /// The number that `on_done` gets: 1, 2, ... in order of submission.
    pub fn number(&self) -> u64 {
        self.0.number
    }

    /// The reply's text since the last poll, whole characters only, and whether the job has ended. Never blocks.
    pub fn poll(&self) -> (String, bool) {
        let mut progress = locked(&self.0.progress);
        (
            std::mem::take(&mut progress.text),
            progress.outcome.is_some(),
        )
    }

    /// Waits for the end of the job; false if it has not ended within `timeout`.
    pub fn wait(&self, timeout: Duration) -> bool {
        let progress = locked(&self.0.progress);
        let ended = self
            .0
            .done
            .wait_timeout_while(progress, timeout, |p| p.outcome.is_none());
        ended
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .0
            .outcome
            .is_some()
    }

    /// Asks for the end of the job: it comes after the step of the model that is under way.
    pub fn cancel(&self) {
        self.0.cancelled.store(true, Ordering::Relaxed);
    }

    /// What came of the job, once it has ended.
    pub fn outcome(&self) -> Option<Result<Generated, GenerateError>> {
        locked(&self.0.progress).outcome.clone()
    }

    fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::Relaxed)
    }

    fn say(&self, text: &str) {
        locked(&self.0.progress).text.push_str(text);
    }

    fn end(&self, outcome: Result<Generated, GenerateError>) {
        locked(&self.0.progress).outcome.get_or_insert(outcome);
        self.0.done.notify_all();
    }
}

/// A lock whose holders leave nothing half done, so that a panic elsewhere does not matter.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[cfg(test)]
mod fast_tests;
#[cfg(test)]
mod tests;
