//! The database file: opened safely, brought to the newest schema, refused with a sentence otherwise.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension, TransactionBehavior};

use super::{StoreError, StoreOptions};
use crate::files::{faults, owner_only, private_folder, unfollowed};

/// Name of the database inside the store's folder.
pub const DATABASE: &str = "locum.db";
/// `PRAGMA application_id` of a store: "LOCU".
const APPLICATION_ID: i64 = 0x4C4F_4355;
/// Bytes of a database page; `max_disk_bytes` is counted in these.
pub const PAGE_BYTES: u64 = 4096;
/// Pages in the write-ahead log after which a commit checkpoints by itself; before that it is done when idle.
const CHECKPOINT_PAGES: u64 = 8192;

/// Numbered migrations; the schema of a file is the number of the last one applied.
const MIGRATIONS: &[&str] = &[include_str!("schema.sql"), include_str!("schema_2.sql")];
/// The newest schema version this build writes.
pub const SCHEMA_VERSION: u32 = MIGRATIONS.len() as u32;

/// Makes the store's folder (its user's alone) or checks the one that is there, and returns its real path.
pub fn prepare_folder(dir: &Path, read_only: bool) -> Result<PathBuf, StoreError> {
    let failed = |source| StoreError::Folder {
        path: dir.to_path_buf(),
        source,
    };
    if !read_only && !dir.exists() {
        let made = private_folder().recursive(true).create(dir);
        made.map_err(failed)?;
    }
    let real = dir.canonicalize().map_err(failed)?;
    let facts = real.metadata().map_err(failed)?;
    if !facts.is_dir() {
        return Err(failed(std::io::Error::other("not a folder")));
    }
    #[cfg(unix)]
    {
        let mode = std::os::unix::fs::MetadataExt::mode(&facts);
        if mode & 0o002 != 0 {
            return Err(StoreError::WorldWritable {
                path: real,
                mode: mode & 0o7777,
            });
        }
    }
    Ok(real)
}

/// Opens a private file beside the database for locking, never through a symbolic link.
pub fn private_file(path: &Path) -> std::io::Result<std::fs::File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    unfollowed(owner_only(&mut options)).open(path)
}

/// Opens the connection that writes, creating the file and its schema where needed.
pub fn open_writer(dir: &Path, options: &StoreOptions) -> Result<Connection, StoreError> {
    let path = dir.join(DATABASE);
    // The file is made here so that it never is anybody else's to read. An existing one must not be
    // opened by us: closing it would drop the locks of another connection of this process (SQLite,
    // "How To Corrupt An SQLite Database File", 2.2).
    let mut new = OpenOptions::new();
    owner_only(new.write(true).create_new(true));
    let made = faults::check("make", &path).and_then(|()| new.open(&path));
    match made {
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(source) => return Err(StoreError::Folder { path, source }),
    }
    let mut connection = connect(&path, OpenFlags::SQLITE_OPEN_READ_WRITE, options)?;
    migrate(&mut connection, &path)?;
    let prepare = |sql: &str| connection.execute_batch(sql).map_err(|e| explain(&path, e));
    let checkpoint_pages = match options.max_disk_bytes / PAGE_BYTES / 8 {
        0 if options.max_disk_bytes == 0 => CHECKPOINT_PAGES,
        share => share.clamp(16, CHECKPOINT_PAGES),
    };
    // What a log once grew to is given back, or it would count against the limit for ever.
    prepare(&format!(
        "PRAGMA synchronous=FULL; PRAGMA wal_autocheckpoint={checkpoint_pages}; PRAGMA secure_delete=ON;
         PRAGMA journal_size_limit={};",
        checkpoint_pages * PAGE_BYTES
    ))?;
    if options.max_disk_bytes > 0 {
        prepare(&format!(
            "PRAGMA max_page_count={}",
            (options.max_disk_bytes / PAGE_BYTES).max(1)
        ))?;
    }
    Ok(connection)
}

/// Opens a connection that only reads.
pub fn open_reader(dir: &Path, options: &StoreOptions) -> Result<Connection, StoreError> {
    let path = dir.join(DATABASE);
    if !path.exists() {
        return Err(StoreError::Missing { path });
    }
    // A write-ahead log can only be read where its index can be written, so reading alone is the fallback.
    let connection = connect(&path, OpenFlags::SQLITE_OPEN_READ_WRITE, options)
        .or_else(|_| connect(&path, OpenFlags::SQLITE_OPEN_READ_ONLY, options))?;
    connection
        .execute_batch("PRAGMA query_only=1")
        .map_err(|e| explain(&path, e))?;
    let found = version(&connection).map_err(|e| explain(&path, e))?;
    match found {
        None => return Err(StoreError::NotAStore { path }),
        Some(found) if found > SCHEMA_VERSION => {
            return Err(StoreError::Newer {
                path,
                found,
                known: SCHEMA_VERSION,
            });
        }
        Some(_) => {}
    }
    Ok(connection)
}

fn connect(
    path: &Path,
    access: OpenFlags,
    options: &StoreOptions,
) -> Result<Connection, StoreError> {
    let flags = access | OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_NOFOLLOW;
    let connection = Connection::open_with_flags(path, flags).map_err(|e| explain(path, e))?;
    connection
        .busy_timeout(Duration::from_millis(options.busy_timeout_ms))
        .map_err(|e| explain(path, e))?;
    Ok(connection)
}

/// The schema version of a file; `None` if it has no Locum schema.
fn version(connection: &Connection) -> rusqlite::Result<Option<u32>> {
    let there = "SELECT 1 FROM sqlite_schema WHERE type='table' AND name='schema_version'";
    if connection
        .query_row(there, [], |_| Ok(()))
        .optional()?
        .is_none()
    {
        return Ok(None);
    }
    connection.query_row("SELECT max(version) FROM schema_version", [], |row| {
        row.get(0)
    })
}

fn migrate(connection: &mut Connection, path: &Path) -> Result<(), StoreError> {
    let said = |e| explain(path, e);
    if version(connection).map_err(said)? == Some(SCHEMA_VERSION) {
        return Ok(());
    }
    // Two processes may come here at once; SQLite's own wait does not cover the change of the journal mode.
    let mode: String =
        retry_busy(|| connection.query_row("PRAGMA journal_mode=WAL", [], |row| row.get(0)))
            .map_err(said)?;
    if !mode.eq_ignore_ascii_case("wal") {
        return Err(StoreError::NoWal {
            path: path.to_path_buf(),
            mode,
        });
    }
    let transaction = connection
        .transaction_with_behavior(TransactionBehavior::Immediate)
        .map_err(said)?;
    let found = version(&transaction).map_err(said)?;
    if found.is_none() {
        let tables: u32 = transaction
            .query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))
            .map_err(said)?;
        if tables > 0 {
            return Err(StoreError::NotAStore {
                path: path.to_path_buf(),
            });
        }
        let first = format!(
            "PRAGMA application_id={APPLICATION_ID};
             -- Which migrations this file has had.
             CREATE TABLE schema_version (
               version       INTEGER PRIMARY KEY, -- number of the migration
               applied_at_ms INTEGER NOT NULL     -- when it was applied
             );"
        );
        transaction.execute_batch(&first).map_err(said)?;
    }
    let found = found.unwrap_or(0);
    if found > SCHEMA_VERSION {
        return Err(StoreError::Newer {
            path: path.to_path_buf(),
            found,
            known: SCHEMA_VERSION,
        });
    }
    for number in found + 1..=SCHEMA_VERSION {
        transaction
            .execute_batch(MIGRATIONS[number as usize - 1])
            .map_err(said)?;
        transaction
            .execute(
                "INSERT INTO schema_version VALUES (?1, ?2)",
                (number, super::now_ms() as i64),
            )
            .map_err(said)?;
    }
    let failed = |e| said(super::writer::said_by_the_disk(e));
    faults::check("migrate", path).map_err(failed)?;
    transaction.commit().map_err(said)?;
    faults::check("migrated", path).map_err(failed)
}

fn retry_busy<T>(mut attempt: impl FnMut() -> rusqlite::Result<T>) -> rusqlite::Result<T> {
    for _ in 0..200 {
        match attempt() {
            Err(error) if error.sqlite_error_code() == Some(ErrorCode::DatabaseBusy) => {
                std::thread::sleep(Duration::from_millis(10));
            }
            result => return result,
        }
    }
    attempt()
}

/// Turns an error of SQLite into one that says what it means for the store at `path`.
pub fn explain(path: &Path, error: rusqlite::Error) -> StoreError {
    let path = path.to_path_buf();
    match error.sqlite_error_code() {
        Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => StoreError::Corrupt {
            path,
            detail: error.to_string(),
        },
        Some(ErrorCode::DiskFull) => StoreError::Full { path },
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => StoreError::Locked { path },
        _ => StoreError::Sqlite {
            path,
            source: error,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_column_of_the_schema_has_a_comment() {
        let mut inside = false;
        for line in MIGRATIONS.iter().flat_map(|sql| sql.lines()) {
            inside = (inside || line.starts_with("CREATE TABLE")) && !line.starts_with(')');
            let column =
                inside && line.starts_with("  ") && !line.trim_start().starts_with("UNIQUE");
            assert!(!column || line.contains("-- "), "no comment: {line}");
        }
    }
}
