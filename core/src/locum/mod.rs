//! The facade: what every door (C ABI, command, Rust host) calls. It decides at the top and leaves computing to the rooms below.

mod check;
mod bell;
mod events;
mod fast;
mod forget;
mod jobs;
mod judge;
mod lineage;
mod queue;
mod record;
mod retain;
mod serve;
mod show;
mod swap;
#[cfg(test)]
mod tests;
mod trial;
mod types;

/// What the queue of events and the swap of students synchronise with; `tests/loom.rs` has another.
mod sync {
    pub use std::sync::{Mutex, MutexGuard};
}

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::json;

pub use crate::error::Error;
pub use check::{check_store, repair_store, StoreCheck};
pub use forget::{Forget, Forgotten};
pub use judge::TttOptions;
pub use lineage::{Ancestor, Learned, Lineage, LineageEpisode};
pub use retain::Retained;
pub use serve::Call;
pub use types::*;

use crate::calls::CallFormat;
use crate::device::Device;
use crate::episode::EpisodeId;
use crate::formats::redact_record;
use crate::generate::{Engine, EngineOptions, Student};
use crate::limits;
use crate::model::{Config, Sequence, WeightFormat};
use crate::policy::{Policy, PolicyId, Settings, TeacherFirst};
use crate::registry::Registry;
use crate::store::{Record, Redact, Store, StoreOptions};
use crate::threads::spawn_quiet;
use crate::view::View;

use events::Events;
use record::Open;
use swap::Swap;
use trial::{Seen, Serving};

/// An open store with its policy and students. Cloning shares it; all methods may be called from any thread.
#[derive(Clone)]
pub struct Locum {
    inner: Arc<Inner>,
}

/// A policy with what it declares as data, taken together so that a step never sees half of a reload.
struct Loaded {
    policy: Arc<dyn Policy>,
    id: PolicyId,
    view: View,
    settings: Settings,
    /// The policy's `redact` over a record, for the writer thread. A record keeps the one it was given with, also over a reload.
    redact: Redact,
    /// Hooks of this load whose switching off was told.
    told_off: Mutex<Vec<&'static str>>,
}

impl Loaded {
    fn new(policy: Arc<dyn Policy>) -> Result<Self, Error> {
        let view = policy.view();
        view.check().map_err(|e| Error::Argument(e.to_string()))?;
        let hook = policy.clone();
        let redact: Redact = Arc::new(move |record: &mut Record| {
            redact_record(record, &mut |info| hook.redact(&info)).map_err(|why| why.to_string())
        });
        Ok(Self {
            id: policy.id(),
            redact,
            told_off: Mutex::default(),
            view,
            settings: policy.settings(),
            policy,
        })
    }
}

struct Base {
    student: Arc<Student>,
    dir: PathBuf,
    digest: String,
    name: String,
}

struct Inner {
    store: Store,
    registry: Registry,
    base: Option<Base>,
    engine: Option<Arc<Engine>>,
    policy: RwLock<Arc<Loaded>>,
    swap: Swap<Seen, Serving>,
    episodes: Mutex<HashMap<EpisodeId, Open>>,
    /// By tools; the error says why they have none.
    formats: Mutex<HashMap<String, Result<Arc<CallFormat>, String>>>,
    events: Arc<Events>,
    jobs: Mutex<jobs::Jobs>,
    /// Held from the look whether a job may start until it runs.
    starting: Mutex<()>,
    train_threads: usize,
    weights: WeightFormat,
    device: Arc<Device>,
    no_learning: bool,
    closed: AtomicBool,
    busy: AtomicU64,
    deferrals: Mutex<HashMap<&'static str, u64>>,
    wake: (Mutex<bool>, Condvar),
    keeper: Mutex<Option<JoinHandle<()>>>,
}

impl Locum {
    /// Opens a store, loads the base model and the current student, resumes a job that was cut off.
    ///
    /// # Errors
    /// A store that cannot be opened or a base folder that cannot be loaded. A *student* that cannot be loaded is no error:
    /// the teacher plays, and `stats` says why.
    pub fn open(options: Options) -> Result<Self, Error> {
        let store = Store::open(
            &options.store_dir,
            StoreOptions {
                max_disk_bytes: options.max_disk_bytes,
                detect: options.detect,
                drop_oldest: options.drop_oldest,
                ..StoreOptions::default()
            },
        )?;
        let registry = Registry::open(&options.store_dir)?;
        let policy: Arc<dyn Policy> = options
            .policy
            .clone()
            .unwrap_or_else(|| Arc::new(TeacherFirst));
        let loaded = Arc::new(Loaded::new(policy)?);
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let count = |n: usize| if n == 0 { cores } else { n.min(256) };
        let events = Arc::new(Events::new());
        let device = Device::new(options.device.clone());
        let (mut base, mut engine) = (None, None);
        if !options.no_model {
            let dir: Option<PathBuf> = match &options.base {
                Some(dir) => Some(dir.clone()),
                None => registry.base_dir(None)?,
            };
            if let Some(dir) = dir {
                let (model, chat, digest) = registry.load_base(&dir)?;
                let name = dir
                    .file_name()
                    .map_or_else(String::new, |n| n.to_string_lossy().into_owned());
                let student = Arc::new(Student {
                    id: format!("base-{}", &digest[..digest.len().min(12)]),
                    version: 0,
                    model: Arc::new(model.packed(options.weights)),
                    chat: Arc::new(chat),
                    view: loaded.view.clone(),
                    tool_names: Default::default(),
                    scope: String::new(),
                    held_out_exact: None,
                    learns: false,
                });
                base = Some(Base {
                    student,
                    dir,
                    digest,
                    name,
                });
                let done = events.clone();
                let config = &base.as_ref().expect("made above").student.model.config;
                engine = Some(Arc::new(Engine::new(
                    EngineOptions {
                        threads: count(options.threads),
                        max_batch: 16,
                        cache_bytes: match options.max_cache_bytes {
                            0 => cache_bytes(config, &loaded.view),
                            bytes => bytes,
                        },
                        device: device.clone(),
                    },
                    Box::new(move |number| done.push(EventKind::CallDone, number, 0, json!({}))),
                )?));
            }
        }
        let inner = Arc::new(Inner {
            store,
            registry,
            base,
            engine,
            policy: RwLock::new(loaded),
            swap: Swap::new(Seen::default(), Serving::default()),
            episodes: Mutex::default(),
            formats: Mutex::default(),
            events,
            jobs: Mutex::default(),
            starting: Mutex::default(),
            train_threads: count(options.train_threads),
            weights: options.weights,
            device,
            no_learning: options.no_learning,
            closed: AtomicBool::new(false),
            busy: AtomicU64::new(0),
            deferrals: Mutex::default(),
            wake: Default::default(),
            keeper: Mutex::new(None),
        });
        inner.restore()?;
        let weak = Arc::downgrade(&inner);
        let keeper = spawn_quiet("locum-keeper", move || jobs::keep(weak))
            .map_err(|e| Error::Argument(format!("no thread could be started: {e}")))?;
        *inner.keeper.lock().unwrap_or_else(|e| e.into_inner()) = Some(keeper);
        Ok(Self { inner })
    }

    /// Stops the job (it resumes at the next open), waits until everything recorded is durable, and refuses work from then on.
    /// Closing twice is fine.
    pub fn close(&self, drain: Duration) -> Result<(), Error> {
        if self.inner.closed.swap(true, Ordering::SeqCst) {
            return Ok(());
        }
        self.inner.stop_job();
        self.inner.nudge();
        let keeper = self
            .inner
            .keeper
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .take();
        if let Some(keeper) = keeper.filter(|k| k.thread().id() != std::thread::current().id()) {
            let _ = keeper.join();
        }
        self.inner.join_job();
        self.inner.store.close(drain)?;
        Ok(())
    }

    /// Replaces the policy. Calls in flight end with the old one; a view that a student did not learn under takes it out of service.
    pub fn set_policy(&self, policy: Arc<dyn Policy>) -> Result<(), Error> {
        self.inner.check_open()?;
        let loaded = Arc::new(Loaded::new(policy)?);
        let name = loaded.id.name.clone();
        *self.inner.policy.write().unwrap_or_else(|e| e.into_inner()) = loaded;
        self.inner
            .events
            .push(EventKind::PolicyLoaded, 0, 0, json!({ "policy": name }));
        self.inner.nudge();
        Ok(())
    }

    /// Waits until everything recorded so far is on disk.
    pub fn flush(&self, timeout: Duration) -> Result<(), Error> {
        self.inner.check_open()?;
        Ok(self.inner.store.flush(timeout)?)
    }

    /// The oldest event that was not drained yet.
    pub fn next_event(&self) -> Option<Event> {
        self.inner.events.pop()
    }

    /// What is signalled while events wait: on Linux a descriptor that is readable, on Windows an event object; else -1. It stays ours.
    pub fn event_handle(&self) -> i64 {
        self.inner.events.bell().handle()
    }

    /// The same for one thread that wants to be told once of each event: on Linux the same descriptor, to be watched for edges, on
    /// Windows an event object that a wait resets; else -1. It stays ours.
    pub fn event_edge(&self) -> i64 {
        self.inner.events.bell().edge()
    }
}

impl Inner {
    fn check_open(&self) -> Result<(), Error> {
        if self.closed.load(Ordering::SeqCst) {
            return Err(Error::Closed);
        }
        Ok(())
    }

    fn loaded(&self) -> Arc<Loaded> {
        self.policy
            .read()
            .unwrap_or_else(|e| e.into_inner())
            .clone()
    }

    /// Wakes the keeper.
    fn nudge(&self) {
        *self.wake.0.lock().unwrap_or_else(|e| e.into_inner()) = true;
        self.wake.1.notify_all();
    }

    fn count_deferral(&self, why: &'static str) {
        *self
            .deferrals
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .entry(why)
            .or_default() += 1;
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.closed.store(true, Ordering::SeqCst);
        self.stop_job();
        self.join_job();
    }
}

/// Bytes for prefix reuse where the host sets no limit: enough for two prompts as long as the view makes them. With less than one,
/// each step of a long episode would be read from its beginning.
fn cache_bytes(config: &Config, view: &View) -> usize {
    let tokens = view.max_tokens.min(config.max_position_embeddings) + limits::DEFAULT_REPLY_TOKENS;
    limits::MAX_PREFIX_CACHE_BYTES.max(2 * tokens * Sequence::bytes_per_token(config))
}

/// Milliseconds since 1970.
fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_millis() as u64)
}

/// 128 bits for ids, from the operating system's seed of std's hasher.
fn random_bits() -> u128 {
    use std::hash::{BuildHasher, Hasher};
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let half = || {
        let mut hasher = std::collections::hash_map::RandomState::new().build_hasher();
        hasher.write_u64(COUNT.fetch_add(1, Ordering::Relaxed));
        hasher.finish()
    };
    ((half() as u128) << 64) | half() as u128
}

/// A number in [0, 1) that depends on the bytes alone.
fn unit_hash(bytes: &[u8]) -> f64 {
    use sha2::{Digest, Sha256};
    let digest = Sha256::digest(bytes);
    let number = u64::from_be_bytes(digest[..8].try_into().expect("a digest has 32 bytes"));
    (number >> 11) as f64 / (1u64 << 53) as f64
}
