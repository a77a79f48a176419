//! Whether what is in the database is what was recorded: the file itself, rows that fit each other, episodes that can be read.

use std::collections::BTreeSet;
use std::path::Path;

use rusqlite::Connection;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::sessions::{is_free, lock_path, locks};
use super::statements::Statements;
use super::{database, rows, JsonTable, StoreError, StoreOptions};
use crate::episode::Episode;

/// Rows shown of one kind of damage.
const SHOWN: usize = 20;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// A trace of something that was cut off. Nothing is lost, and the next open clears it away.
    Leftover,
    /// Something is not what was written.
    Damage,
}

/// Something that a sound store has not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    pub severity: Severity,
    /// Where: `locum.db`, `students/<id>`, ...
    pub place: String,
    pub what: String,
    /// What would put it right.
    pub repair: String,
}

impl Finding {
    pub fn damage(place: impl Into<String>, what: impl Into<String>, repair: &str) -> Self {
        Self {
            severity: Severity::Damage,
            place: place.into(),
            what: what.into(),
            repair: repair.into(),
        }
    }

    pub fn leftover(place: impl Into<String>, what: impl Into<String>, repair: &str) -> Self {
        Self {
            severity: Severity::Leftover,
            ..Self::damage(place, what, repair)
        }
    }
}

/// What was looked at in a database, and what was found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checked {
    pub episodes: u64,
    pub steps: u64,
    pub documents: u64,
    pub findings: Vec<Finding>,
}

/// Rows that fit nothing: what, and the statement that counts them. Each may be removed without losing an episode.
const STRAYS: &[(&str, &str)] = &[
    (
        "steps of no episode",
        "steps t WHERE NOT EXISTS (SELECT 1 FROM episodes e WHERE e.episode=t.episode)",
    ),
    (
        "tool calls of no step",
        "tool_calls t WHERE NOT EXISTS (SELECT 1 FROM steps s WHERE s.episode=t.episode AND s.step=t.step)",
    ),
    (
        "observations of no step",
        "observations t WHERE NOT EXISTS (SELECT 1 FROM steps s WHERE s.episode=t.episode AND s.step=t.step)",
    ),
    (
        "outcomes of no episode",
        "outcomes t WHERE NOT EXISTS (SELECT 1 FROM episodes e WHERE e.episode=t.episode)",
    ),
];

/// Episodes whose row says something else than their rows: what, the condition on `episodes e`, what puts it right.
const AT_ODDS: &[(&str, &str, &str)] = &[
    (
        "counts other steps than it has",
        "(n_steps, n_agent, n_teacher, n_student) IS NOT (SELECT count(*), coalesce(sum(source='agent'),0),
           coalesce(sum(source='agent' AND actor='teacher'),0), coalesce(sum(source='agent' AND actor='student'),0)
           FROM steps s WHERE s.episode=e.episode)",
        "count them again",
    ),
    (
        "has another status than its last outcome",
        "status IS NOT (SELECT status FROM outcomes o WHERE o.episode=e.episode ORDER BY n DESC LIMIT 1)",
        "take the status of the last outcome",
    ),
    (
        "has a gap in its steps and is not marked incomplete",
        "incomplete=0 AND source_format='live' AND
           n_steps IS NOT (SELECT coalesce(max(step), 0) FROM steps s WHERE s.episode=e.episode)",
        "mark it incomplete, so that it never trains",
    ),
    (
        "is open and nobody records it",
        "closed=0 AND (recorder IS NULL OR recorder NOT IN (SELECT session FROM sessions))",
        "close it as aborted and incomplete",
    ),
];

/// Looks through the database of a store. Only reads, and may be used beside processes that record.
///
/// # Errors
/// [`StoreError::Missing`] if there is none, [`StoreError::Newer`]; a damaged file is a finding and no error.
pub fn check(dir: &Path) -> Result<Checked, StoreError> {
    let mut found = Checked::default();
    let path = dir.join(database::DATABASE);
    let options = StoreOptions {
        read_only: true,
        ..StoreOptions::default()
    };
    let looked = database::open_reader(dir, &options).and_then(|mut db| {
        look(&mut db, dir, &mut found).map_err(|error| database::explain(&path, error))
    });
    match looked {
        Err(StoreError::Corrupt { detail, .. }) => found.findings.push(Finding::damage(
            database::DATABASE,
            detail,
            "none by itself: restore a copy, or save what `sqlite3 locum.db .recover` finds",
        )),
        other => other?,
    }
    Ok(found)
}

fn look(db: &mut Connection, dir: &Path, found: &mut Checked) -> rusqlite::Result<()> {
    let tx = db.transaction()?;
    let db = Statements::new(&tx);
    let said: Vec<String> = db.all("PRAGMA integrity_check(20)", [], |row| row.get(0))?;
    let broken = said.iter().filter(|line| *line != "ok");
    found.findings.extend(broken.map(|line| {
        Finding::damage(
            database::DATABASE,
            line,
            "none by itself: restore a copy, or save what `sqlite3 locum.db .recover` finds",
        )
    }));
    if !found.findings.is_empty() {
        return Ok(());
    }
    for (what, rows) in STRAYS {
        let n: i64 = tx.query_row(&format!("SELECT count(*) FROM {rows}"), [], |r| r.get(0))?;
        if n > 0 {
            let what = format!("{n} {what}");
            let finding = Finding::damage(database::DATABASE, what, "remove them");
            found.findings.push(finding);
        }
    }
    for (what, condition, repair) in AT_ODDS {
        let sql = format!("SELECT lower(hex(id)) FROM episodes e WHERE {condition} LIMIT {SHOWN}");
        let mut select = tx.prepare(&sql)?;
        let ids = select.query_map([], |row| row.get::<_, String>(0))?;
        for id in ids {
            let place = format!("episode {}", id?);
            found.findings.push(Finding::damage(place, *what, repair));
        }
    }
    look_at_episodes(&db, found)?;
    look_at_documents(&db, found)?;
    look_at_sessions(&db, dir, found)
}

fn look_at_episodes(db: &Statements, found: &mut Checked) -> rusqlite::Result<()> {
    let all: Vec<(i64, String)> = db.all(
        "SELECT episode, lower(hex(id)) FROM episodes ORDER BY episode",
        [],
        |row| Ok((row.get(0)?, row.get(1)?)),
    )?;
    for (number, id) in all {
        found.episodes += 1;
        let place = || format!("episode {id}");
        let repair = "drop the episode";
        match rows::load(db, number) {
            Ok(Some(episode)) => {
                found.steps += episode.steps.len() as u64;
                for what in wrong_digests(&episode) {
                    found.findings.push(Finding::damage(place(), what, repair));
                }
            }
            Ok(None) => {}
            // A column that is not what was written there; anything else is the disk.
            Err(error @ rusqlite::Error::FromSqlConversionFailure(..))
            | Err(error @ rusqlite::Error::InvalidColumnType(..)) => {
                let what = format!("cannot be read: {error}");
                found.findings.push(Finding::damage(place(), what, repair));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// What SQLite says of a file that is damaged; `None` if it is sound.
pub fn is_damaged(dir: &Path) -> Result<Option<String>, StoreError> {
    let db = database::open_reader(dir, &StoreOptions::default())?;
    let said = db.query_row("PRAGMA integrity_check(1)", [], |row| {
        row.get::<_, String>(0)
    });
    let said = said.map_err(|error| database::explain(&dir.join(database::DATABASE), error))?;
    Ok((said != "ok").then_some(said))
}

/// Steps whose prompt tokens are not those that the student answered.
fn wrong_digests(episode: &Episode) -> Vec<String> {
    let steps = episode.steps.iter();
    let wrong = steps.filter(|step| match (&step.prompt_digest, &step.token_ids) {
        (Some(digest), Some(ids)) => *digest != prompt_digest(&ids.prompt),
        _ => false,
    });
    let say = |index| format!("step {index}: the prompt's tokens are not those of its digest");
    wrong.map(|step| say(step.index)).collect()
}

/// SHA-256 (hex) of prompt tokens, as it stands in `prompt_digest`.
pub fn prompt_digest(ids: &[u32]) -> String {
    let mut digest = Sha256::new();
    for id in ids {
        digest.update(id.to_le_bytes());
    }
    let bytes = digest.finalize();
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn look_at_documents(db: &Statements, found: &mut Checked) -> rusqlite::Result<()> {
    let known: BTreeSet<&str> = JsonTable::ALL.iter().map(|table| table.name()).collect();
    let all: Vec<(String, String, String)> =
        db.all("SELECT kind, id, value FROM documents", [], |row| {
            Ok((row.get(0)?, row.get(1)?, row.get(2)?))
        })?;
    for (kind, id, value) in all {
        found.documents += 1;
        let what = match super::json::parse(value.as_bytes(), 512) {
            Ok(_) if known.contains(kind.as_str()) => continue,
            Ok(_) => "is of a kind that this release does not know".to_string(),
            Err(error) => format!("is not JSON: {error}"),
        };
        let place = format!("{kind} {id}");
        let finding = Finding::damage(place, what, "remove the document");
        found.findings.push(finding);
    }
    Ok(())
}

fn look_at_sessions(db: &Statements, dir: &Path, found: &mut Checked) -> rusqlite::Result<()> {
    let all: Vec<i64> = db.all("SELECT session FROM sessions", [], |row| row.get(0))?;
    for session in &all {
        if is_free(&lock_path(dir, *session)) {
            let sql = "SELECT count(*) FROM episodes WHERE recorder=?1";
            let open: i64 = db.first(sql, [session], |row| row.get(0))?.unwrap_or(0);
            let what = format!("its process is gone and left {open} episodes open");
            found.findings.push(Finding::leftover(
                format!("session {session}"),
                what,
                "open the store: they are closed as aborted and incomplete",
            ));
        }
    }
    for (session, path) in locks(dir) {
        // A session that begins has its lock before its row, so only a lock that nobody holds is left over.
        if !all.contains(&session) && is_free(&path) {
            found.findings.push(Finding::leftover(
                format!("sessions/{session}.lock"),
                "belongs to no session",
                "remove the file",
            ));
        }
    }
    Ok(())
}
