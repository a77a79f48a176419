//! Who is recording, who may learn: locks that the operating system lets go when a process dies.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

use rusqlite::{params, Connection, TransactionBehavior};

use super::database::{explain, private_file, DATABASE};
use super::{rows, statements::Statements, StoreError};
use crate::episode::{Judge, JudgeKind, Outcome, Status};
use crate::files::faults;

/// Folder of the lock files of recording stores.
const SESSIONS: &str = "sessions";

/// One open, recording store. Its lock tells other processes that its open episodes are alive.
///
/// A process forked from this one inherits the lock and keeps it for as long as it lives, so its
/// parent's open episodes are then settled later, never too early.
pub struct Session {
    pub number: i64,
    path: PathBuf,
    lock: File,
}

impl Session {
    /// Registers a new session, then closes the episodes of sessions whose process is gone.
    pub fn begin(db: &mut Connection, dir: &Path, now_ms: u64) -> Result<Session, StoreError> {
        let folder = dir.join(SESSIONS);
        let failed = |source| StoreError::Folder {
            path: folder.clone(),
            source,
        };
        super::database::prepare_folder(&folder, false)?;
        let database = dir.join(DATABASE);
        let said = |error| explain(&database, error);
        let tx = db
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .map_err(said)?;
        tx.execute(
            "INSERT INTO sessions (pid, opened_at_ms) VALUES (?1, ?2)",
            params![std::process::id(), now_ms as i64],
        )
        .map_err(said)?;
        let number = tx.last_insert_rowid();
        let path = lock_path(dir, number);
        // Locked before the row can be seen: a row without a lock means a dead process.
        let lock = private_file(&path).map_err(failed)?;
        lock.lock().map_err(failed)?;
        faults::check("register", &database).map_err(failed)?;
        tx.commit().map_err(said)?;
        faults::check("registered", &database).map_err(failed)?;
        settle_dead(db, dir, number, now_ms)?;
        Ok(Session { number, path, lock })
    }

    /// Takes the session out of the list and lets the lock go. Its open episodes must be settled before.
    pub fn end(self) {
        let _ = faults::check("end of session", &self.path.with_file_name("lock"));
        // The file goes first: whoever opens a file of this name later makes a new one.
        let _ = std::fs::remove_file(&self.path);
        let _ = self.lock.unlock();
    }
}

pub fn lock_path(dir: &Path, session: i64) -> PathBuf {
    dir.join(SESSIONS).join(format!("{session}.lock"))
}

/// The lock files of a store with their sessions; none if it has no such folder.
pub fn locks(dir: &Path) -> Vec<(i64, PathBuf)> {
    let entries = std::fs::read_dir(dir.join(SESSIONS)).into_iter().flatten();
    let paths = entries.flatten().map(|entry| entry.path());
    let numbered = |path: PathBuf| {
        let name = path.file_name()?.to_str()?.strip_suffix(".lock")?;
        Some((name.parse().ok()?, path))
    };
    paths.filter_map(numbered).collect()
}

/// True if nobody holds the lock, or there is no such file. One that cannot be asked for is no proof of that.
pub fn is_free(path: &Path) -> bool {
    match File::open(path) {
        Ok(file) => file.try_lock().is_ok(),
        Err(error) => error.kind() == std::io::ErrorKind::NotFound,
    }
}

/// Closes the open episodes of every other session whose lock is free.
fn settle_dead(db: &mut Connection, dir: &Path, own: i64, now_ms: u64) -> Result<(), StoreError> {
    let database = dir.join(DATABASE);
    let said = |error| explain(&database, error);
    let others: Vec<i64> = {
        let mut select = db
            .prepare("SELECT session FROM sessions WHERE session<>?1")
            .map_err(said)?;
        let found = select.query_map([own], |row| row.get(0)).map_err(said)?;
        found.collect::<Result<_, _>>().map_err(said)?
    };
    for session in others {
        let path = lock_path(dir, session);
        let gone = match File::open(&path) {
            Ok(file) => match file.try_lock() {
                Ok(()) => Some(file),
                Err(TryLockError::WouldBlock) => continue,
                // A lock that cannot be asked for is no proof of death.
                Err(TryLockError::Error(_)) => continue,
            },
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(_) => continue,
        };
        let tx = db
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .map_err(said)?;
        let n = settle(
            &Statements::new(&tx),
            session,
            "the process that recorded it ended without closing it",
            now_ms,
        )
        .map_err(said)?;
        let failed = |e| said(super::writer::said_by_the_disk(e));
        faults::check("settle", &database).map_err(failed)?;
        tx.commit().map_err(said)?;
        faults::check("settled", &database).map_err(failed)?;
        if n > 0 {
            tracing::warn!(
                session,
                episodes = n,
                "episodes left open by a process that is gone were closed as aborted"
            );
        }
        let _ = std::fs::remove_file(&path);
        drop(gone);
    }
    Ok(())
}

/// Closes the open episodes of a session as aborted and incomplete, and forgets the session.
pub fn settle(db: &Statements, session: i64, why: &str, now_ms: u64) -> rusqlite::Result<usize> {
    let sql = "SELECT episode, status IS NULL FROM episodes WHERE recorder=?1";
    let open: Vec<(i64, bool)> = db.all(sql, [session], |row| Ok((row.get(0)?, row.get(1)?)))?;
    for &(episode, unjudged) in &open {
        // An outcome that the host gave without closing stands.
        if unjudged {
            let judge = Judge {
                kind: JudgeKind::Program,
                name: "store".into(),
                ..Judge::default()
            };
            let reason = Some(why.to_string());
            rows::insert_outcome(
                db,
                episode,
                &Outcome {
                    status: Status::Aborted,
                    judge,
                    reason,
                    ..Outcome::default()
                },
                now_ms,
            )?;
        }
        mark_incomplete(db, episode, why)?;
        close(db, episode, now_ms)?;
    }
    db.execute("DELETE FROM sessions WHERE session=?1", [session])?;
    Ok(open.len())
}

/// Closes an episode, at `now_ms` unless it has an end already.
pub fn close(db: &Statements, episode: i64, now_ms: u64) -> rusqlite::Result<()> {
    let sql = "UPDATE episodes SET closed=1, recorder=NULL, ended_at_ms=coalesce(ended_at_ms, ?2) WHERE episode=?1";
    db.execute(sql, params![episode, now_ms as i64])?;
    Ok(())
}

/// Marks that something of an episode was lost.
pub fn mark_incomplete(db: &Statements, episode: i64, why: &str) -> rusqlite::Result<()> {
    let sql = "UPDATE episodes SET incomplete=1, incomplete_why=concat_ws(char(10), incomplete_why, ?2) WHERE episode=?1";
    db.execute(sql, params![episode, why])?;
    Ok(())
}

/// Tries to take a lock file for as long as the returned file is open; `None` if another has it.
pub fn try_lock(path: &Path) -> Result<Option<File>, StoreError> {
    let failed = |source| StoreError::Folder {
        path: path.to_path_buf(),
        source,
    };
    let file = private_file(path).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(failed(error)),
    }
}
