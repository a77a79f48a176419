//! The one thread that writes: takes whatever is queued, commits it together, and keeps what cannot be
//! written yet until it can.

use std::collections::hash_map::Entry;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{park, park_timeout};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TryRecvError};
use rusqlite::{params, Connection, ErrorCode};

use super::database::{explain, PAGE_BYTES};
use super::doze::Doze;
use super::redaction::{self, Cleaned, Redact};
use super::rows::{self, Tally};
use super::sessions::{self, Session};
use super::statements::Statements;
use super::{now_ms, JsonTable, Record, StoreError};
use crate::episode::{EpisodeId, Step};
use crate::files::faults;
use crate::secrets::Detect;

/// Most records of one commit: large enough to share the disk's wait, small enough that it stays short.
const GROUP: usize = 256;
/// Time without work after which the write-ahead log is moved into the database.
const IDLE: Duration = Duration::from_millis(100);
/// Time between attempts while the disk refuses.
const RETRY: Duration = Duration::from_millis(200);
/// Time after a record in which the writer looks for the next by itself: to wake it would cost the host a system call.
const LIVELY: Duration = Duration::from_millis(100);
/// Time between two such looks. A flush does not wait for it.
const NAP: Duration = Duration::from_millis(2);

/// How long an erasure waits for readers that hold on to the old state.
const ERASE_PATIENCE: Duration = Duration::from_secs(10);

/// What the writer is asked for.
pub enum Command {
    Record {
        record: Record,
        bytes: usize,
        /// Run over it before anything is kept.
        redact: Option<Redact>,
    },
    /// Answered once everything before it is durable, or cannot be made so now.
    Flush(Sender<Result<(), StoreError>>),
    /// Writes (or, without a value, removes) a document; answered like a flush.
    Put {
        table: JsonTable,
        id: String,
        value: Option<String>,
        reply: Sender<Result<(), StoreError>>,
    },
    /// Removes episodes and every byte of them; answered when that is done.
    Erase {
        episodes: Vec<EpisodeId>,
        /// Only what ties these to somebody.
        anonymise: Vec<EpisodeId>,
        reply: Sender<Result<(), StoreError>>,
    },
    Stop(Sender<Result<(), StoreError>>),
}

/// What waits for the writer; shared with the threads that record.
#[derive(Default)]
pub struct Load {
    pub records: AtomicUsize,
    pub bytes: AtomicUsize,
    /// The writer's.
    pub doze: Doze,
}

/// How the writer is doing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Health {
    /// Records made durable since the store was opened.
    pub written: u64,
    /// Commits that the disk or the database refused.
    pub failed_commits: u64,
    /// Records that do not fit what is stored (a step twice, an unknown episode); their episodes are marked incomplete.
    pub refused: u64,
    /// Episodes dropped because the store was at its size limit.
    pub dropped: u64,
    /// Sentence of the last refusal.
    pub last_refusal: Option<String>,
    /// Sentence of the failure that holds the queue up now; `None` while writing works.
    pub failing: Option<String>,
}

/// What the writer thread is given.
pub struct Writer {
    pub db: Connection,
    pub path: PathBuf,
    /// Pages of the database at which the oldest episodes go; 0 = never.
    pub max_pages: u64,
    pub session: Session,
    pub receiver: Receiver<Command>,
    pub load: Arc<Load>,
    pub health: Arc<Mutex<Health>>,
    pub detect: Detect,
}

impl Writer {
    /// Works until told to stop, or until every sender is gone.
    pub fn run(self) {
        let Self {
            db,
            path,
            max_pages,
            session,
            receiver,
            load,
            health,
            detect,
        } = self;
        let mut work = Work {
            statements: Statements::new(&db),
            path: &path,
            max_pages,
            session: session.number,
            receiver: &receiver,
            load: &load,
            health: &health,
            detect,
            known: HashMap::new(),
            pending: Vec::new(),
            tried: None,
            unchecked: false,
            heard: Instant::now(),
        };
        let reply = work.run();
        let finished = work.finish();
        drop(work);
        // Closing the last connection checkpoints and removes the log. The session's lock goes after
        // it; if its episodes could not be settled, the next open does it.
        drop(db);
        if finished.is_ok() {
            session.end();
        }
        if let Some(reply) = reply {
            let _ = reply.send(finished);
        }
    }
}

/// The writer at work.
struct Work<'c> {
    statements: Statements<'c>,
    path: &'c Path,
    max_pages: u64,
    session: i64,
    receiver: &'c Receiver<Command>,
    load: &'c Load,
    health: &'c Mutex<Health>,
    detect: Detect,
    /// Numbers of the episodes being recorded.
    known: HashMap<EpisodeId, i64>,
    /// Accepted and not yet durable, oldest first.
    pending: Vec<Cleaned>,
    /// When the disk last refused.
    tried: Option<Instant>,
    /// Something was written since the last checkpoint.
    unchecked: bool,
    /// When the last command came.
    heard: Instant,
}

impl Work<'_> {
    /// Returns who asked for the end, if anybody did.
    fn run(&mut self) -> Option<Sender<Result<(), StoreError>>> {
        loop {
            let patience = match (self.pending.is_empty(), self.unchecked) {
                (false, _) => Some(RETRY),
                (true, true) => Some(IDLE),
                (true, false) => None,
            };
            match self.next(patience) {
                Ok(command) => {
                    if let Some(reply) = self.work(command) {
                        return Some(reply);
                    }
                }
                Err(RecvTimeoutError::Timeout) if !self.pending.is_empty() => {
                    let _ = self.write();
                }
                Err(RecvTimeoutError::Timeout) => self.checkpoint(),
                Err(RecvTimeoutError::Disconnected) => return None,
            }
        }
    }

    /// Waits for a command. Naps while records come, so that nobody has to wake it; sleeps otherwise.
    fn next(&mut self, patience: Option<Duration>) -> Result<Command, RecvTimeoutError> {
        let began = Instant::now();
        loop {
            match self.receiver.try_recv() {
                Ok(command) => {
                    self.heard = Instant::now();
                    return Ok(command);
                }
                Err(TryRecvError::Disconnected) => return Err(RecvTimeoutError::Disconnected),
                Err(TryRecvError::Empty) => {}
            }
            let left = patience.map(|patience| patience.saturating_sub(began.elapsed()));
            if left == Some(Duration::ZERO) {
                return Err(RecvTimeoutError::Timeout);
            }
            if self.heard.elapsed() < LIVELY {
                park_timeout(left.map_or(NAP, |left| left.min(NAP)));
                continue;
            }
            let sleep = || match left {
                Some(left) => park_timeout(left),
                None => park(),
            };
            self.load.doze.unless(|| !self.receiver.is_empty(), sleep);
        }
    }

    /// Takes what is queued behind `first` too, writes it, answers; returns who asked for the end.
    fn work(&mut self, first: Command) -> Option<Sender<Result<(), StoreError>>> {
        let mut waiting: Vec<Sender<Result<(), StoreError>>> = Vec::new();
        let mut next = Some(first);
        let mut stop = None;
        let mut put = None;
        let mut erase = None;
        while let Some(command) = next {
            match command {
                Command::Record {
                    record,
                    bytes,
                    redact,
                } => self
                    .pending
                    .push(redaction::clean(record, bytes, self.detect, redact)),
                Command::Flush(reply) => waiting.push(reply),
                Command::Put {
                    table,
                    id,
                    value,
                    reply,
                } => {
                    put = Some((table, id, value, reply));
                    break;
                }
                Command::Erase {
                    episodes,
                    anonymise,
                    reply,
                } => {
                    erase = Some((episodes, anonymise, reply));
                    break;
                }
                Command::Stop(reply) => {
                    stop = Some(reply);
                    break;
                }
            }
            next = if self.pending.len() < GROUP {
                self.receiver.try_recv().ok()
            } else {
                None
            };
        }
        let asked = !waiting.is_empty() || put.is_some() || erase.is_some();
        // While the disk refuses, a new record alone is no reason to ask it again at once.
        let rest = self.tried.is_some_and(|at| at.elapsed() < RETRY);
        let result = if rest && !asked { Ok(()) } else { self.write() };
        for reply in waiting {
            let _ = reply.send(self.answer(&result));
        }
        if let Some((table, id, value, reply)) = put {
            let _ = reply.send(result.and_then(|()| self.put(table, &id, value.as_deref())));
        } else if let Some((episodes, anonymise, reply)) = erase {
            let _ = reply.send(result.and_then(|()| self.erase(&episodes, &anonymise)));
        }
        stop
    }

    fn answer(&self, result: &Result<(), StoreError>) -> Result<(), StoreError> {
        match result {
            Ok(()) => Ok(()),
            Err(error) => Err(error.again(self.path)),
        }
    }

    /// Makes everything pending durable, or leaves all that is not durable where it is.
    fn write(&mut self) -> Result<(), StoreError> {
        while !self.pending.is_empty() {
            let n = self.pending.len().min(GROUP);
            let mut done = self.commit(n);
            let bytes: usize = self.pending[..n].iter().map(|cleaned| cleaned.bytes).sum();
            while done.as_ref().is_err_and(is_full) && self.make_room(bytes) {
                done = self.commit(n);
            }
            match done {
                Ok(refusals) => {
                    let bytes = self.pending.drain(..n).map(|cleaned| cleaned.bytes).sum();
                    self.load.records.fetch_sub(n, Ordering::Relaxed);
                    self.load.bytes.fetch_sub(bytes, Ordering::Relaxed);
                    self.tried = None;
                    self.unchecked = true;
                    let mut health = self.health();
                    health.written += (n - refusals.len()) as u64;
                    health.refused += refusals.len() as u64;
                    health.failing = None;
                    for refusal in refusals {
                        tracing::warn!(%refusal, "a record was refused");
                        health.last_refusal = Some(refusal);
                    }
                }
                Err(error) => {
                    self.known.clear();
                    self.tried = Some(Instant::now());
                    let error = explain(self.path, error);
                    let mut health = self.health();
                    health.failed_commits += 1;
                    let sentence = error.to_string();
                    if health.failing.as_ref() != Some(&sentence) {
                        tracing::error!(error = %sentence, waiting = self.pending.len(), "recording is held up");
                    }
                    health.failing = Some(sentence);
                    drop(health);
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    fn health(&self) -> MutexGuard<'_, Health> {
        // The values are plain, so they are sound even if a holder panicked.
        self.health
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Writes the first `n` pending records in one transaction. Returns the sentences of those refused.
    fn commit(&mut self, n: usize) -> rusqlite::Result<Vec<String>> {
        self.fault("begin")?;
        self.statements.execute("BEGIN IMMEDIATE", [])?;
        let written = self.apply_all(n).and_then(|refusals| {
            self.fault("commit")?;
            self.statements.execute("COMMIT", [])?;
            Ok(refusals)
        });
        if written.is_ok() {
            // What is on the disk cannot fail any more; only the process can be gone.
            let _ = faults::check("after commit", self.path);
        }
        // A full disk may have ended the transaction already.
        if written.is_err() && !self.statements.db().is_autocommit() {
            self.statements.execute("ROLLBACK", [])?;
        }
        written
    }

    /// Drops a part of the oldest episodes that have ended, if so many bytes more would bring the store to its own limit. True if
    /// that was so and some went.
    fn make_room(&self, bytes: usize) -> bool {
        let count = |sql| {
            let count = self.statements.first(sql, [], |row| row.get::<_, i64>(0));
            count.ok().flatten().unwrap_or(0) as u64
        };
        let used = count("PRAGMA page_count").saturating_sub(count("PRAGMA freelist_count"));
        // Rows fill their pages by half at the worst, and a tenth more is for the trees above them.
        let wanted = 2 * bytes as u64 / PAGE_BYTES + self.max_pages / 10;
        // A disk that others have filled is no reason to forget anything.
        if self.max_pages == 0 || used + wanted < self.max_pages {
            return false;
        }
        match self.drop_oldest(count("SELECT count(*) FROM episodes WHERE closed=1").div_ceil(16)) {
            Ok(dropped) => {
                tracing::warn!(
                    dropped,
                    "the oldest episodes went: the store is at its size limit"
                );
                self.health().dropped += dropped;
                dropped > 0
            }
            Err(error) => {
                tracing::warn!(%error, "no room could be made");
                false
            }
        }
    }

    fn drop_oldest(&self, n: u64) -> rusqlite::Result<u64> {
        let db = &self.statements;
        db.execute("BEGIN IMMEDIATE", [])?;
        let sql = "SELECT episode FROM episodes WHERE closed=1 ORDER BY episode LIMIT ?1";
        let dropped = db
            .all(sql, [n as i64], |row| row.get(0))
            .and_then(|oldest: Vec<i64>| {
                for episode in &oldest {
                    rows::delete_episode(db, *episode)?;
                }
                db.execute("COMMIT", [])?;
                Ok(oldest.len() as u64)
            });
        if dropped.is_err() && !db.db().is_autocommit() {
            db.execute("ROLLBACK", [])?;
        }
        dropped
    }

    /// Where tests make the database fail.
    fn fault(&self, operation: &'static str) -> rusqlite::Result<()> {
        faults::check(operation, self.path).map_err(said_by_the_disk)
    }

    fn apply_all(&mut self, n: usize) -> rusqlite::Result<Vec<String>> {
        let db = &self.statements;
        let mut refusals = Vec::new();
        let mut tallies: HashMap<i64, Tally> = HashMap::new();
        for cleaned in &self.pending[..n] {
            let record = &cleaned.record;
            faults::check("row", self.path).map_err(said_by_the_disk)?;
            db.execute("SAVEPOINT one", [])?;
            let refusal = match apply(db, &mut self.known, &mut tallies, record, self.session) {
                Ok(refusal) => refusal,
                Err(error) if is_own_fault(&error) => Some(format!(
                    "{} of episode {}: {error}",
                    record.kind(),
                    record.episode()
                )),
                Err(error) => return Err(error),
            };
            if refusal.is_none() {
                note(db, &self.known, cleaned)?;
            }
            if let Some(refusal) = refusal {
                db.execute("ROLLBACK TO one", [])?;
                if record.loses_a_step() {
                    if let Some(episode) = rows::find(db, record.episode())? {
                        sessions::mark_incomplete(db, episode, &refusal)?;
                    }
                }
                refusals.push(refusal);
            }
            db.execute("RELEASE one", [])?;
        }
        for (episode, tally) in &tallies {
            rows::add_tally(db, *episode, tally)?;
        }
        Ok(refusals)
    }

    fn put(&mut self, table: JsonTable, id: &str, value: Option<&str>) -> Result<(), StoreError> {
        let insert = "INSERT INTO documents (kind, id, value, updated_at_ms) VALUES (?1, ?2, ?3, ?4)
             ON CONFLICT (kind, id) DO UPDATE SET value=excluded.value, updated_at_ms=excluded.updated_at_ms";
        let delete = "DELETE FROM documents WHERE kind=?1 AND id=?2";
        let write = || {
            self.fault("put")?;
            match value {
                Some(value) => {
                    let values = params![table.name(), id, value, now_ms() as i64];
                    self.statements.execute(insert, values)
                }
                None => self.statements.execute(delete, params![table.name(), id]),
            }
        };
        let mut done = write();
        while done.as_ref().is_err_and(is_full) && self.make_room(value.map_or(0, str::len)) {
            done = write();
        }
        let _ = faults::check("after put", self.path);
        let done = done.map(|_| ()).map_err(|error| explain(self.path, error));
        match &done {
            Ok(()) => self.unchecked = true,
            Err(error) => {
                tracing::error!(error = %error, kind = table.name(), "a document was not written");
                self.health().failed_commits += 1;
            }
        }
        done
    }

    /// Removes episodes, writes the database anew without them, and cuts the log to nothing.
    fn erase(&mut self, episodes: &[EpisodeId], anonymise: &[EpisodeId]) -> Result<(), StoreError> {
        let said = |error| explain(self.path, error);
        let db = &self.statements;
        let remove = || {
            for id in episodes {
                if let Some(number) = rows::find(db, *id)? {
                    rows::delete_episode(db, number)?;
                }
            }
            for id in anonymise {
                if let Some(number) = rows::find(db, *id)? {
                    rows::anonymise(db, number)?;
                }
            }
            db.execute("COMMIT", [])
        };
        db.execute("BEGIN IMMEDIATE", []).map_err(said)?;
        if let Err(error) = remove() {
            let _ = db.execute("ROLLBACK", []);
            return Err(said(error));
        }
        self.known.retain(|id, _| !episodes.contains(id));
        // Overwriting deleted rows leaves copies that were made when pages were split; a new file has none.
        db.db()
            .execute_batch("PRAGMA temp_store=MEMORY; VACUUM; PRAGMA temp_store=DEFAULT")
            .map_err(said)?;
        let begun = Instant::now();
        loop {
            let busy = db
                .first("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| {
                    row.get::<_, i64>(0)
                })
                .map_err(said)?;
            if busy != Some(1) {
                self.unchecked = false;
                return Ok(());
            }
            if begun.elapsed() > ERASE_PATIENCE {
                let path = self.path.to_path_buf();
                return Err(StoreError::Locked { path });
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Moves the write-ahead log into the database while nobody waits. A reader may hold it up; the next idle time tries again.
    fn checkpoint(&mut self) {
        self.unchecked = false;
        let moved = self.fault("checkpoint").and_then(|()| {
            self.statements
                .first("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(()))
        });
        let _ = faults::check("after checkpoint", self.path);
        if let Err(error) = moved {
            tracing::debug!(%error, "checkpoint put off");
        }
    }

    /// Writes what is left and settles the episodes left open.
    fn finish(&mut self) -> Result<(), StoreError> {
        if let Err(error) = self.write() {
            return Err(StoreError::Lost {
                records: self.pending.len(),
                cause: error.to_string(),
            });
        }
        let db = &self.statements;
        let why = "the store was closed before the episode ended";
        let settled = db.execute("BEGIN IMMEDIATE", []).and_then(|_| {
            sessions::settle(db, self.session, why, now_ms())?;
            self.fault("settle own")?;
            db.execute("COMMIT", [])
        });
        if settled.is_err() && !db.db().is_autocommit() {
            let _ = db.execute("ROLLBACK", []);
        }
        settled
            .map(|_| ())
            .map_err(|error| explain(self.path, error))
    }
}

fn is_full(error: &rusqlite::Error) -> bool {
    error.sqlite_error_code() == Some(ErrorCode::DiskFull)
}

/// An error of a fault point, as SQLite would have told it.
pub fn said_by_the_disk(error: std::io::Error) -> rusqlite::Error {
    let code = match error.kind() {
        std::io::ErrorKind::StorageFull => rusqlite::ffi::SQLITE_FULL,
        _ => rusqlite::ffi::SQLITE_IOERR,
    };
    rusqlite::Error::SqliteFailure(rusqlite::ffi::Error::new(code), Some(error.to_string()))
}

/// Notes in the episode's row what was taken out of a record that was written.
fn note(
    db: &Statements,
    known: &HashMap<EpisodeId, i64>,
    cleaned: &Cleaned,
) -> rusqlite::Result<()> {
    if cleaned.redacted.is_empty() && cleaned.lost.is_none() {
        return Ok(());
    }
    let id = cleaned.record.episode();
    let number = match known.get(&id) {
        Some(number) => Some(*number),
        None => rows::find(db, id)?,
    };
    if let Some(number) = number {
        rows::note_redactions(db, number, &cleaned.redacted)?;
        if let Some(why) = &cleaned.lost {
            sessions::mark_incomplete(db, number, why)?;
        }
    }
    Ok(())
}

/// True for errors that the record itself causes and that would come again on every attempt.
fn is_own_fault(error: &rusqlite::Error) -> bool {
    match error {
        rusqlite::Error::SqliteFailure(failure, _) => matches!(
            failure.code,
            ErrorCode::ConstraintViolation
                | ErrorCode::TooBig
                | ErrorCode::TypeMismatch
                | ErrorCode::ParameterOutOfRange
        ),
        rusqlite::Error::ToSqlConversionFailure(_) => true,
        _ => false,
    }
}

/// Writes one record; `Some` is the sentence why it does not fit what is stored.
fn apply(
    db: &Statements,
    known: &mut HashMap<EpisodeId, i64>,
    tallies: &mut HashMap<i64, Tally>,
    record: &Record,
    session: i64,
) -> rusqlite::Result<Option<String>> {
    let id = record.episode();
    if let Record::Begin(episode) = record {
        let Some(number) = rows::insert_episode(db, episode, Some(session))? else {
            return Ok(Some(format!("episode {id} was begun twice")));
        };
        let mut tally = Tally::default();
        for step in &episode.steps {
            rows::insert_step(db, number, step)?;
            tally.add(step);
        }
        if let Some(outcome) = &episode.outcome {
            rows::insert_outcome(db, number, outcome, now_ms())?;
        }
        if tally.steps > 0 {
            tallies.insert(number, tally);
        }
        if !episode.closed {
            known.insert(id, number);
        }
        return Ok(None);
    }
    let number = match known.get(&id) {
        Some(number) => *number,
        None => match rows::find(db, id)? {
            Some(number) => number,
            None => {
                return Ok(Some(format!(
                    "{} of episode {id}, which was never begun or was dropped",
                    record.kind()
                )))
            }
        },
    };
    match record {
        Record::Begin(_) => unreachable!("handled above"),
        Record::Step { step, .. } => {
            // Open episodes are known, so this asks the database only about those that are not.
            if let Entry::Vacant(unknown) = known.entry(id) {
                let sql = "SELECT closed FROM episodes WHERE episode=?1";
                if db.first(sql, [number], |row| row.get(0))? == Some(true) {
                    return Ok(Some(format!(
                        "step {} of episode {id}, which is closed",
                        step.index
                    )));
                }
                unknown.insert(number);
            }
            // Tokens spell out what a redaction has taken out of the texts before.
            let plain: Step;
            let step = if step.token_ids.is_some() && rows::is_redacted(db, number)? {
                plain = Step {
                    token_ids: None,
                    ..(**step).clone()
                };
                &plain
            } else {
                &**step
            };
            rows::insert_step(db, number, step)?;
            tallies.entry(number).or_default().add(step);
        }
        Record::Observation {
            step, observation, ..
        } => {
            if !rows::append_observation(db, number, *step, observation)? {
                return Ok(Some(format!(
                    "an observation of step {step} of episode {id}, which has no such step"
                )));
            }
        }
        Record::Counterfactual { step, value, .. } => {
            if !rows::set_counterfactual(db, number, *step, value)? {
                return Ok(Some(format!(
                    "a counterfactual of step {step} of episode {id}, which has no such step"
                )));
            }
        }
        Record::Outcome { outcome, close, .. } => {
            rows::insert_outcome(db, number, outcome, now_ms())?;
            if *close {
                sessions::close(db, number, now_ms())?;
                known.remove(&id);
            }
        }
        Record::Incomplete { reason, .. } => sessions::mark_incomplete(db, number, reason)?,
        Record::Drop { .. } => {
            rows::delete_episode(db, number)?;
            tallies.remove(&number);
            known.remove(&id);
        }
    }
    Ok(None)
}
