//! Keeps episodes: one SQLite file in one private folder, written by one thread, read by any.
//!
//! [`Store::record`] hands a record to the writer thread and returns; the writer commits whatever is
//! queued together, each commit forced to the disk. Reads see what is committed: call
//! [`Store::flush`] first to read one's own latest records. The schema is in `schema.sql`, what a
//! crash leaves in `docs/formats.md`.
//!
//! Several processes, and several stores of one process, may open one folder. Within a process only
//! this library may open the file: two copies of SQLite break each other's locks.

mod check;
mod database;
mod doze;
pub mod json;
mod forking;
mod read;
mod repair;
mod redaction;
mod rows;
mod sessions;
mod size;
mod statements;
#[cfg(test)]
mod tests;
mod writer;

/// What `doze` synchronises with; `tests/loom.rs` has another.
mod sync {
    pub use std::sync::atomic::{fence, AtomicBool, Ordering};
}

pub use check::{check, prompt_digest, Checked, Finding, Severity};
pub use database::{DATABASE, SCHEMA_VERSION};
pub use forking::{after_fork, before_fork};
pub use read::{Counts, EpisodeSummary, Query};
pub use redaction::Redact;
pub use repair::repair;
pub use writer::Health;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::Thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use rusqlite::Connection;
use serde_json::Value;

use crate::episode::{Counterfactual, Episode, EpisodeId, Observation, Outcome, Step};
use crate::limits::{MAX_EPISODE_BYTES, MAX_QUEUED_BYTES, MAX_QUEUED_RECORDS, MAX_STEP_BYTES};
use crate::secrets::Detect;
use crate::threads::spawn_quiet;
use statements::Statements;
use writer::{Command, Load, Writer};

/// Longest wait for a document to become durable.
const PUT_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest wait for the writer when a store is dropped without being closed.
const DROP_TIMEOUT: Duration = Duration::from_secs(5);
/// Reading connections kept open.
const MAX_IDLE_READERS: usize = 4;

/// How a store is opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreOptions {
    /// Only read: no writer thread, no session, and the file must be there.
    pub read_only: bool,
    /// Largest size of the database file; 0 sets none. Its log adds an eighth of that, or 32 MiB if that is less.
    /// At the limit recording is held up as by a full disk, unless the oldest may go.
    pub max_disk_bytes: u64,
    /// At that limit the episodes that ended and came first are dropped, as many as are needed to go on.
    pub drop_oldest: bool,
    /// How long a commit waits for another process's commit.
    pub busy_timeout_ms: u64,
    /// Records waiting for the writer before `record` answers [`StoreError::Busy`].
    pub max_queued_records: usize,
    /// Bytes waiting for the writer before `record` answers [`StoreError::Busy`].
    pub max_queued_bytes: usize,
    /// What is looked for in records, and replaced by a mark before it is written.
    pub detect: Detect,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            max_disk_bytes: 0,
            drop_oldest: false,
            // Commits take milliseconds; five seconds is another process that hangs.
            busy_timeout_ms: 5000,
            max_queued_records: MAX_QUEUED_RECORDS,
            max_queued_bytes: MAX_QUEUED_BYTES,
            detect: Detect::ALL,
        }
    }
}

/// One thing to be recorded. Records of one thread are applied in the order they were given.
#[derive(Clone, Debug, PartialEq)]
pub enum Record {
    /// A new episode, with the steps and the outcome that it has already (an import gives a whole one).
    Begin(Box<Episode>),
    /// The next step of an open episode.
    Step { episode: EpisodeId, step: Box<Step> },
    /// What came back for a call of step `step`.
    Observation {
        episode: EpisodeId,
        step: u32,
        observation: Observation,
    },
    /// What the one who did not act would have done at step `step`; replaces an earlier one.
    Counterfactual {
        episode: EpisodeId,
        step: u32,
        value: Counterfactual,
    },
    /// How the episode ended; supersedes an earlier outcome and may come after the end.
    Outcome {
        episode: EpisodeId,
        outcome: Box<Outcome>,
        close: bool,
    },
    /// Something of the episode was lost.
    Incomplete { episode: EpisodeId, reason: String },
    /// Forget the episode.
    Drop { episode: EpisodeId },
}

impl Record {
    /// The episode it belongs to.
    pub fn episode(&self) -> EpisodeId {
        match self {
            Record::Begin(episode) => episode.episode_id,
            Record::Step { episode, .. }
            | Record::Observation { episode, .. }
            | Record::Counterfactual { episode, .. }
            | Record::Outcome { episode, .. }
            | Record::Incomplete { episode, .. }
            | Record::Drop { episode } => *episode,
        }
    }

    fn kind(&self) -> &'static str {
        match self {
            Record::Begin(_) => "begin",
            Record::Step { .. } => "step",
            Record::Observation { .. } => "observation",
            Record::Counterfactual { .. } => "counterfactual",
            Record::Outcome { .. } => "outcome",
            Record::Incomplete { .. } => "incomplete mark",
            Record::Drop { .. } => "drop",
        }
    }

    fn loses_a_step(&self) -> bool {
        matches!(self, Record::Step { .. } | Record::Observation { .. })
    }
}

/// The kinds of small documents that other rooms keep here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum JsonTable {
    Job,
    Trial,
    Event,
    Student,
}

impl JsonTable {
    const ALL: [JsonTable; 4] = [Self::Job, Self::Trial, Self::Event, Self::Student];

    fn name(self) -> &'static str {
        match self {
            JsonTable::Job => "job",
            JsonTable::Trial => "trial",
            JsonTable::Event => "event",
            JsonTable::Student => "student",
        }
    }
}

/// Why the store refused or failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The folder or a file in it cannot be made, opened or locked.
    #[error("cannot use {}: {source}", path.display())]
    Folder {
        path: PathBuf,
        source: std::io::Error,
    },
    /// Any user of the machine could put files into the store.
    #[error("{} is writable by every user (mode {mode:o}); a store needs a private folder: chmod 700 it or choose another", path.display())]
    WorldWritable { path: PathBuf, mode: u32 },
    /// There is no database to read.
    #[error("there is no store at {}", path.display())]
    Missing { path: PathBuf },
    /// The database belongs to another program.
    #[error("{} is an SQLite database, but not a Locum store", path.display())]
    NotAStore { path: PathBuf },
    /// The file was written by a newer release.
    #[error("{} has schema version {found}; this build knows up to {known}: use a newer release", path.display())]
    Newer {
        path: PathBuf,
        found: u32,
        known: u32,
    },
    /// The file system cannot share memory between processes, which the write-ahead log needs.
    #[error("{} cannot use a write-ahead log here (SQLite stays in {mode:?} mode); put the store on a local disk", path.display())]
    NoWal { path: PathBuf, mode: String },
    /// The file is damaged or no database at all.
    #[error("{} is damaged or not a database ({detail}); move it away, or restore a copy", path.display())]
    Corrupt { path: PathBuf, detail: String },
    /// The disk, or the limit set on the store, is full. What was accepted is kept in memory and tried again.
    #[error("no room to write {}: the disk or the store's size limit is full", path.display())]
    Full { path: PathBuf },
    /// Another process held the database for too long. What was accepted is kept in memory and tried again.
    #[error("{} is held by another process", path.display())]
    Locked { path: PathBuf },
    /// Any other failure of SQLite or the disk under it.
    #[error("{}: {source}", path.display())]
    Sqlite {
        path: PathBuf,
        source: rusqlite::Error,
    },
    /// A write failed; the same failure was or will be told to others.
    #[error("{}: {detail}", path.display())]
    Write { path: PathBuf, detail: String },
    /// More is waiting for the writer than its limits allow. The record was not taken.
    #[error("the recording queue is full ({records} records, {bytes} bytes wait)")]
    Busy { records: usize, bytes: usize },
    /// The record was not taken: it is larger than a record may be.
    #[error("episode {episode}: a record of {bytes} bytes; at most {limit} are taken")]
    TooLarge {
        episode: EpisodeId,
        bytes: usize,
        limit: usize,
    },
    /// The store was opened for reading.
    #[error("the store is open for reading only")]
    ReadOnly,
    /// The store was closed, or its writer is gone.
    #[error("the store is closed")]
    Closed,
    /// The writer did not get there in time; it goes on.
    #[error("not durable within {waited_ms} ms; writing goes on")]
    Timeout { waited_ms: u64 },
    /// The store had to close while records could not be written.
    #[error("{records} records were lost when the store closed: {cause}")]
    Lost { records: usize, cause: String },
    /// A document in the store is not the JSON that was put there.
    #[error("{kind} {id}: {detail}")]
    Document {
        kind: &'static str,
        id: String,
        detail: String,
    },
}

impl StoreError {
    /// The same failure for a second listener.
    fn again(&self, path: &Path) -> StoreError {
        let path = path.to_path_buf();
        match self {
            StoreError::Full { .. } => StoreError::Full { path },
            StoreError::Locked { .. } => StoreError::Locked { path },
            StoreError::Corrupt { detail, .. } => StoreError::Corrupt {
                path,
                detail: detail.clone(),
            },
            StoreError::Sqlite { source, .. } => StoreError::Write {
                path,
                detail: source.to_string(),
            },
            other => StoreError::Write {
                path,
                detail: other.to_string(),
            },
        }
    }
}

/// An open store. May be used from any thread at once; share it in an `Arc`.
///
/// ```
/// use locum_core::episode::{Episode, EpisodeId};
/// use locum_core::store::{Record, Store, StoreOptions};
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let folder = tempfile::tempdir()?;
/// let store = Store::open(&folder.path().join("store"), StoreOptions::default())?;
/// let id = EpisodeId::new(1, 2);
/// store.record(Record::Begin(Box::new(Episode { episode_id: id, ..Episode::default() })))?;
/// store.flush(std::time::Duration::from_secs(5))?;
/// assert!(store.episode(id)?.is_some());
/// # Ok(())
/// # }
/// ```
pub struct Store {
    dir: PathBuf,
    options: StoreOptions,
    /// `None` if the store only reads.
    door: Option<Door>,
    load: Arc<Load>,
    health: Arc<Mutex<Health>>,
    closed: AtomicBool,
    readers: Mutex<Vec<Connection>>,
    leading: Mutex<Option<std::fs::File>>,
}

impl Store {
    /// Opens the store in `dir`, making both where needed, and closes the episodes that dead processes left open.
    ///
    /// A new folder gets mode 0700 and every file in it 0600.
    ///
    /// # Errors
    /// A folder that every user may write to, a damaged, foreign or newer database, a disk that refuses.
    pub fn open(dir: &Path, options: StoreOptions) -> Result<Store, StoreError> {
        let dir = database::prepare_folder(dir, options.read_only)?;
        let load = Arc::new(Load::default());
        let health = Arc::new(Mutex::new(Health::default()));
        let writing = match options.read_only {
            true => None,
            false => {
                let mut db = database::open_writer(&dir, &options)?;
                let session = sessions::Session::begin(&mut db, &dir, now_ms())?;
                Some((db, session))
            }
        };
        let readers = Mutex::new(vec![database::open_reader(&dir, &options)?]);
        let door = match writing {
            None => None,
            Some((db, session)) => {
                // Unbounded, because the bounds are counted in `load`: they must hold for records that
                // wait in the writer's own hands too, and never hold up a flush.
                let (sender, receiver) = crossbeam_channel::unbounded();
                let path = dir.join(DATABASE);
                let (load, health) = (load.clone(), health.clone());
                let writer = Writer {
                    db,
                    path,
                    max_pages: match options.drop_oldest {
                        true => options.max_disk_bytes / database::PAGE_BYTES,
                        false => 0,
                    },
                    session,
                    receiver,
                    load,
                    health,
                    detect: options.detect,
                };
                let thread =
                    spawn_quiet("locum-store", move || writer.run()).map_err(|source| {
                        StoreError::Folder {
                            path: dir.clone(),
                            source,
                        }
                    })?;
                Some(Door {
                    sender: Some(sender),
                    writer: thread.thread().clone(),
                })
            }
        };
        let (closed, leading) = (AtomicBool::new(false), Mutex::new(None));
        Ok(Store {
            dir,
            options,
            door,
            load,
            health,
            closed,
            readers,
            leading,
        })
    }

    /// What is looked for in records.
    pub fn detect(&self) -> Detect {
        self.options.detect
    }

    /// The store's folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Gives a record to the writer thread. Never waits, does no I/O; while records come at least every 100 ms it makes no system
    /// call either, but for what the allocator may ask for.
    ///
    /// `Ok` means accepted: it is written in order, and kept in memory while the disk refuses. It is
    /// durable after the next [`flush`](Store::flush). A record that does not fit what is stored (a
    /// step index twice, an unknown or closed episode) is left out later, counted in
    /// [`health`](Store::health), and marks its episode incomplete.
    ///
    /// # Errors
    /// [`StoreError::Busy`] or [`StoreError::TooLarge`]: not taken. [`StoreError::ReadOnly`], [`StoreError::Closed`].
    pub fn record(&self, record: Record) -> Result<(), StoreError> {
        self.record_through(record, None)
    }

    /// [`Store::record`] through a hook that the writer thread runs behind the detectors, before it keeps anything of the
    /// record. A record for which the hook fails is left out and marks its episode incomplete.
    pub fn record_through(&self, record: Record, redact: Option<Redact>) -> Result<(), StoreError> {
        let door = self.door()?;
        let bytes = size::of_record(&record);
        let limit = match &record {
            Record::Begin(_) => MAX_EPISODE_BYTES,
            _ => MAX_STEP_BYTES,
        };
        if bytes > limit {
            return Err(StoreError::TooLarge {
                episode: record.episode(),
                bytes,
                limit,
            });
        }
        let bytes = bytes + size::OVERHEAD;
        let records = self.load.records.fetch_add(1, Ordering::Relaxed);
        let waiting = self.load.bytes.fetch_add(bytes, Ordering::Relaxed);
        // A record larger than the whole limit is taken when nothing else waits: it would never be otherwise.
        let fits = records < self.options.max_queued_records
            && (waiting + bytes <= self.options.max_queued_bytes || waiting == 0);
        let result = match fits {
            false => Err(StoreError::Busy {
                records,
                bytes: waiting,
            }),
            true => door.give(Command::Record {
                record,
                bytes,
                redact,
            }),
        };
        if result.is_err() {
            self.load.records.fetch_sub(1, Ordering::Relaxed);
            self.load.bytes.fetch_sub(bytes, Ordering::Relaxed);
            return result;
        }
        let filling = 2 * records > self.options.max_queued_records
            || 2 * waiting > self.options.max_queued_bytes;
        if self.load.doze.must_be_woken() || filling {
            door.writer.unpark();
        }
        Ok(())
    }

    /// Waits until everything that was accepted before is durable.
    ///
    /// # Errors
    /// What keeps the writer from writing now ([`StoreError::Full`], ...; the records stay accepted and
    /// are tried again), or [`StoreError::Timeout`].
    pub fn flush(&self, timeout: Duration) -> Result<(), StoreError> {
        let (reply, answer) = crossbeam_channel::bounded(1);
        self.door()?.ask(Command::Flush(reply))?;
        wait(&answer, timeout)
    }

    /// How the writer is doing. Never waits for the disk.
    pub fn health(&self) -> Health {
        lock(&self.health).clone()
    }

    /// Records and bytes that were accepted and are not yet durable.
    pub fn waiting(&self) -> (usize, usize) {
        (
            self.load.records.load(Ordering::Relaxed),
            self.load.bytes.load(Ordering::Relaxed),
        )
    }

    /// Writes a document; durable on return, and so is everything that was accepted before.
    ///
    /// # Errors
    /// As [`flush`](Store::flush); on an error other than a timeout the document was not written and will not be.
    pub fn put_json(&self, table: JsonTable, id: &str, value: &Value) -> Result<(), StoreError> {
        self.put(table, id, Some(json::print(value)))
    }

    /// Removes a document; durable on return. No error if there is none.
    pub fn delete_json(&self, table: JsonTable, id: &str) -> Result<(), StoreError> {
        self.put(table, id, None)
    }

    fn put(&self, table: JsonTable, id: &str, value: Option<String>) -> Result<(), StoreError> {
        let (reply, answer) = crossbeam_channel::bounded(1);
        let command = Command::Put {
            table,
            id: id.into(),
            value,
            reply,
        };
        self.door()?.ask(command)?;
        wait(&answer, PUT_TIMEOUT)
    }

    /// Erases episodes, so that their bytes are in no file of the store any more: the rows are overwritten, the database is written
    /// anew without them and its log is cut to nothing. Takes about as long as copying the store, and as much room for that time.
    /// Episodes that are not there are no error; asking again finishes an erasure that was cut off.
    ///
    /// # Errors
    /// As [`flush`](Store::flush); [`StoreError::Locked`] if a reader held on to the old state for seconds: the episodes are gone for
    /// every new reader then, and their bytes go with the next attempt.
    pub fn erase(&self, episodes: &[EpisodeId], timeout: Duration) -> Result<(), StoreError> {
        self.rewrite(episodes, &[], timeout)
    }

    /// Erases from episodes what ties them to somebody beside what was said: session, source, extra fields, tokens, the host's words on
    /// the outcome. Otherwise as [`erase`](Store::erase).
    pub fn anonymise(&self, episodes: &[EpisodeId], timeout: Duration) -> Result<(), StoreError> {
        self.rewrite(&[], episodes, timeout)
    }

    fn rewrite(
        &self,
        erase: &[EpisodeId],
        anonymise: &[EpisodeId],
        timeout: Duration,
    ) -> Result<(), StoreError> {
        let (reply, answer) = crossbeam_channel::bounded(1);
        let command = Command::Erase {
            episodes: erase.to_vec(),
            anonymise: anonymise.to_vec(),
            reply,
        };
        self.door()?.ask(command)?;
        // An idle reader may stand on a statement's page.
        lock(&self.readers).clear();
        wait(&answer, timeout)
    }

    /// Tries to become the one process that learns from this store. True if this store now is, or already was.
    ///
    /// Held until the store is closed or dropped, or the process dies.
    pub fn try_lead(&self) -> Result<bool, StoreError> {
        if self.options.read_only {
            return Err(StoreError::ReadOnly);
        }
        let mut leading = lock(&self.leading);
        if leading.is_none() {
            *leading = sessions::try_lock(&self.dir.join("learner.lock"))?;
        }
        Ok(leading.is_some())
    }

    /// Lets another store learn.
    pub fn stop_leading(&self) {
        if let Some(file) = lock(&self.leading).take() {
            // Unlocked by name, because a forked child may hold another copy of the descriptor.
            let _ = file.unlock();
        }
    }

    /// Writes what waits, closes the episodes left open as aborted, stops the writer. Later calls that write fail.
    ///
    /// # Errors
    /// [`StoreError::Lost`] if the disk still refused, [`StoreError::Timeout`] if the writer was not done.
    pub fn close(&self, timeout: Duration) -> Result<(), StoreError> {
        let Some(door) = &self.door else {
            return Ok(());
        };
        if self.closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        self.stop_leading();
        // Readers first, so that the writer's connection is the last and folds the log into the database.
        lock(&self.readers).clear();
        let (reply, answer) = crossbeam_channel::bounded(1);
        door.ask(Command::Stop(reply))?;
        wait(&answer, timeout)
    }

    fn door(&self) -> Result<&Door, StoreError> {
        match &self.door {
            None => Err(StoreError::ReadOnly),
            Some(_) if self.closed.load(Ordering::Acquire) => Err(StoreError::Closed),
            Some(door) => Ok(door),
        }
    }

    /// Runs a read on a connection of its own, so that readers do not wait for each other.
    fn reading<T>(
        &self,
        read: impl FnOnce(&Statements) -> rusqlite::Result<T>,
    ) -> Result<T, StoreError> {
        let kept = lock(&self.readers).pop();
        let mut connection = match kept {
            Some(connection) => connection,
            None => database::open_reader(&self.dir, &self.options)?,
        };
        // One transaction, so that all statements of a read see the same commit.
        let result = connection
            .transaction()
            .and_then(|tx| read(&Statements::new(&tx)));
        let mut readers = lock(&self.readers);
        if readers.len() < MAX_IDLE_READERS && !self.closed.load(Ordering::Acquire) {
            readers.push(connection);
        }
        result.map_err(|error| database::explain(&self.dir.join(DATABASE), error))
    }
}

/// The way to the writer. It sleeps by itself and not in the queue, so that a record wakes it only where it must.
struct Door {
    sender: Option<Sender<Command>>,
    writer: Thread,
}

impl Door {
    /// Puts a command into the queue.
    fn give(&self, command: Command) -> Result<(), StoreError> {
        let sender = self.sender.as_ref().expect("taken by drop only");
        sender.send(command).map_err(|_| StoreError::Closed)
    }

    /// Puts a command into the queue that somebody waits for.
    fn ask(&self, command: Command) -> Result<(), StoreError> {
        self.give(command)?;
        self.writer.unpark();
        Ok(())
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.sender = None;
        self.writer.unpark();
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        if let Err(error) = self.close(DROP_TIMEOUT) {
            tracing::warn!(%error, "a store was dropped before everything was written");
        }
    }
}

fn wait(answer: &Receiver<Result<(), StoreError>>, timeout: Duration) -> Result<(), StoreError> {
    match answer.recv_timeout(timeout) {
        Ok(result) => result,
        Err(RecvTimeoutError::Timeout) => Err(StoreError::Timeout {
            waited_ms: timeout.as_millis() as u64,
        }),
        Err(RecvTimeoutError::Disconnected) => Err(StoreError::Closed),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is guarded is replaced whole, so a panic elsewhere leaves it sound.
    mutex
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as u64)
}
