//! Questions that the store answers, each in one read transaction.

use rusqlite::types::Value as Cell;
use rusqlite::{params_from_iter, Row};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::statements::Statements;
use super::{json, rows, JsonTable, Store, StoreError};
use crate::episode::{Episode, EpisodeId, Outcome, Status};

/// Which episodes are asked for. The default asks for all, oldest arrival first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Query {
    /// Only these; empty means any.
    pub ids: Vec<EpisodeId>,
    /// Only with one of these statuses; empty means any. An episode without an outcome counts as unknown.
    pub statuses: Vec<Status>,
    /// Only of this family of tasks.
    pub domain: Option<String>,
    /// Only of this task.
    pub task_id: Option<String>,
    /// Only of this scope; empty asks for those without one.
    pub scope: Option<String>,
    /// Only those that have ended.
    pub closed_only: bool,
    /// Only those that began, or were imported, at this time or later.
    pub since_ms: Option<u64>,
    /// Only those in which this text occurs: in the task, a message, a result or the outcome's reason. ASCII case is ignored.
    pub text: Option<String>,
    /// The newest first.
    pub newest_first: bool,
    /// At most this many.
    pub limit: Option<u32>,
    /// Leaves out this many first.
    pub offset: u32,
}

/// One line about an episode.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EpisodeSummary {
    pub id: EpisodeId,
    pub task_id: String,
    pub domain: String,
    pub instruction: String,
    pub status: Status,
    pub score: Option<f64>,
    pub closed: bool,
    pub incomplete: bool,
    /// Why it is incomplete, one sentence a line.
    pub incomplete_why: Option<String>,
    pub steps: u32,
    pub agent_steps: u32,
    /// Agent steps by the teacher.
    pub teacher_steps: u32,
    /// Agent steps by a student.
    pub student_steps: u32,
    pub started_at_ms: u64,
    pub ended_at_ms: Option<u64>,
    pub source_format: String,
    pub source_id: Option<String>,
}

/// How much there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    pub episodes: u64,
    /// Not ended yet.
    pub open: u64,
    pub closed: u64,
    pub incomplete: u64,
    pub successes: u64,
    pub partial: u64,
    pub failures: u64,
    pub aborted: u64,
    /// Closed without an outcome, or with the outcome "unknown".
    pub unknown: u64,
    pub steps: u64,
    pub agent_steps: u64,
    pub teacher_steps: u64,
    pub student_steps: u64,
}

impl Store {
    /// The whole episode, exactly as recorded; `None` if there is none.
    pub fn episode(&self, id: EpisodeId) -> Result<Option<Episode>, StoreError> {
        self.reading(|db| match rows::find(db, id)? {
            Some(number) => rows::load(db, number),
            None => Ok(None),
        })
    }

    /// True if there is an episode with this id.
    pub fn has(&self, id: EpisodeId) -> Result<bool, StoreError> {
        self.reading(|db| Ok(rows::find(db, id)?.is_some()))
    }

    /// Every outcome an episode was given, oldest first; the last is in force.
    pub fn outcomes(&self, id: EpisodeId) -> Result<Vec<Outcome>, StoreError> {
        self.reading(|db| match rows::find(db, id)? {
            Some(number) => rows::outcomes(db, number),
            None => Ok(Vec::new()),
        })
    }

    /// One line for each episode asked for.
    pub fn episodes(&self, query: &Query) -> Result<Vec<EpisodeSummary>, StoreError> {
        self.reading(|db| {
            let (sql, cells) = select(
                query,
                "id, task_id, domain, instruction, status, closed, incomplete, incomplete_why, n_steps, n_agent,
                 n_teacher, n_student, started_at_ms, ended_at_ms, source_format, source_id,
                 (SELECT score FROM outcomes o WHERE o.episode=e.episode ORDER BY n DESC LIMIT 1)",
            );
            let mut statement = db.db().prepare(&sql)?;
            let found = statement.query_map(params_from_iter(cells), summary_from)?.collect();
            found
        })
    }

    /// The whole episodes asked for. Mind the memory: a thousand episodes of twenty 2-KiB steps are 40 MiB.
    pub fn load(&self, query: &Query) -> Result<Vec<Episode>, StoreError> {
        self.reading(|db| {
            let (sql, cells) = select(query, "e.episode");
            let mut statement = db.db().prepare(&sql)?;
            let numbers: Vec<i64> = statement
                .query_map(params_from_iter(cells), |row| row.get(0))?
                .collect::<Result<_, _>>()?;
            numbers
                .into_iter()
                .filter_map(|number| rows::load(db, number).transpose())
                .collect()
        })
    }

    /// How much there is, of all episodes or of those that began or were imported since `since_ms`.
    pub fn counts(&self, since_ms: Option<u64>) -> Result<Counts, StoreError> {
        self.reading(|db| counts(db, since_ms, None))
    }

    /// How much there is of one scope.
    pub fn counts_of_scope(
        &self,
        scope: &str,
        since_ms: Option<u64>,
    ) -> Result<Counts, StoreError> {
        self.reading(|db| counts(db, since_ms, Some(scope)))
    }

    /// The scope with the most successes that began or were imported since `since_ms`; `None` where there is no success.
    pub fn busiest_scope(&self, since_ms: Option<u64>) -> Result<Option<String>, StoreError> {
        let since = since_ms.map(|ms| ms.min(i64::MAX as u64) as i64);
        self.reading(|db| {
            let sql = "SELECT scope FROM episodes WHERE status='success' AND (?1 IS NULL OR arrived_at_ms>=?1)
                GROUP BY scope ORDER BY count(*) DESC, scope LIMIT 1";
            db.first(sql, [since], |row| row.get(0))
        })
    }

    /// True if an episode that is there has this task or belongs to this group.
    pub fn names_task(&self, task_or_group: &str) -> Result<bool, StoreError> {
        self.reading(|db| {
            let sql = "SELECT 1 FROM episodes WHERE task_id=?1 OR group_key=?1 LIMIT 1";
            Ok(db.first(sql, [task_or_group], |_| Ok(()))?.is_some())
        })
    }

    /// A document; `None` if there is none.
    ///
    /// # Errors
    /// [`StoreError::Document`] if somebody has changed it to something that is not JSON.
    pub fn get_json(&self, table: JsonTable, id: &str) -> Result<Option<Value>, StoreError> {
        let text: Option<String> = self.reading(|db| {
            let sql = "SELECT value FROM documents WHERE kind=?1 AND id=?2";
            db.first(sql, (table.name(), id), |row| row.get(0))
        })?;
        text.map(|text| document(table, id, &text)).transpose()
    }

    /// The documents of a kind with their ids, in the order in which they were first put.
    pub fn list_json(&self, table: JsonTable) -> Result<Vec<(String, Value)>, StoreError> {
        let all: Vec<(String, String)> = self.reading(|db| {
            let sql = "SELECT id, value FROM documents WHERE kind=?1 ORDER BY n";
            db.all(sql, [table.name()], |row| Ok((row.get(0)?, row.get(1)?)))
        })?;
        all.into_iter()
            .map(|(id, text)| {
                let value = document(table, &id, &text)?;
                Ok((id, value))
            })
            .collect()
    }
}

fn document(table: JsonTable, id: &str, text: &str) -> Result<Value, StoreError> {
    json::parse(text.as_bytes(), 512).map_err(|error| StoreError::Document {
        kind: table.name(),
        id: id.into(),
        detail: error.to_string(),
    })
}

/// The statement for a query and the values for its places.
fn select(query: &Query, columns: &str) -> (String, Vec<Cell>) {
    let mut sql = format!("SELECT {columns} FROM episodes e WHERE 1");
    let mut cells: Vec<Cell> = Vec::new();
    if !query.ids.is_empty() {
        // One JSON list instead of a place for each, because SQLite has at most 32766 places.
        sql += " AND id IN (SELECT unhex(value) FROM json_each(?))";
        let ids: Vec<Value> = query
            .ids
            .iter()
            .map(|id| Value::String(id.to_string()))
            .collect();
        cells.push(Cell::Text(json::print(&Value::Array(ids))));
    }
    if !query.statuses.is_empty() {
        let places = vec!["?"; query.statuses.len()].join(",");
        sql += &format!(" AND coalesce(status, 'unknown') IN ({places})");
        cells.extend(
            query
                .statuses
                .iter()
                .map(|status| Cell::Text(rows::status_name(*status).into())),
        );
    }
    if let Some(domain) = &query.domain {
        sql += " AND domain=?";
        cells.push(Cell::Text(domain.clone()));
    }
    if let Some(task) = &query.task_id {
        sql += " AND task_id=?";
        cells.push(Cell::Text(task.clone()));
    }
    if let Some(scope) = &query.scope {
        sql += " AND scope=?";
        cells.push(Cell::Text(scope.clone()));
    }
    if query.closed_only {
        sql += " AND closed=1";
    }
    if let Some(since) = query.since_ms {
        sql += " AND arrived_at_ms>=?";
        cells.push(Cell::Integer(since.min(i64::MAX as u64) as i64));
    }
    if let Some(text) = &query.text {
        sql += " AND (task_id LIKE ? ESCAPE '\\' OR instruction LIKE ? ESCAPE '\\'
            OR EXISTS (SELECT 1 FROM steps s WHERE s.episode=e.episode AND (message LIKE ? ESCAPE '\\' OR message_parts LIKE ? ESCAPE '\\'))
            OR EXISTS (SELECT 1 FROM observations o WHERE o.episode=e.episode AND (content LIKE ? ESCAPE '\\' OR content_parts LIKE ? ESCAPE '\\'))
            OR EXISTS (SELECT 1 FROM outcomes r WHERE r.episode=e.episode AND reason LIKE ? ESCAPE '\\'))";
        let pattern = text
            .replace('\\', "\\\\")
            .replace('%', "\\%")
            .replace('_', "\\_");
        cells.extend(std::iter::repeat_n(Cell::Text(format!("%{pattern}%")), 7));
    }
    sql += if query.newest_first {
        " ORDER BY e.episode DESC"
    } else {
        " ORDER BY e.episode"
    };
    sql += " LIMIT ? OFFSET ?";
    cells.push(Cell::Integer(query.limit.map_or(-1, i64::from)));
    cells.push(Cell::Integer(i64::from(query.offset)));
    (sql, cells)
}

fn summary_from(row: &Row) -> rusqlite::Result<EpisodeSummary> {
    Ok(EpisodeSummary {
        id: EpisodeId(row.get(0)?),
        task_id: row.get(1)?,
        domain: row.get(2)?,
        instruction: row.get(3)?,
        status: row
            .get::<_, Option<String>>(4)?
            .map_or(Status::Unknown, |name| rows::status_from(&name)),
        closed: row.get(5)?,
        incomplete: row.get(6)?,
        incomplete_why: row.get(7)?,
        steps: row.get(8)?,
        agent_steps: row.get(9)?,
        teacher_steps: row.get(10)?,
        student_steps: row.get(11)?,
        started_at_ms: row.get::<_, i64>(12)? as u64,
        ended_at_ms: row.get::<_, Option<i64>>(13)?.map(|ms| ms as u64),
        source_format: row.get(14)?,
        source_id: row.get(15)?,
        score: row.get(16)?,
    })
}

fn counts(db: &Statements, since_ms: Option<u64>, scope: Option<&str>) -> rusqlite::Result<Counts> {
    let since = since_ms.map(|ms| ms.min(i64::MAX as u64) as i64);
    let sql = "SELECT count(*), sum(closed=0), sum(closed), sum(incomplete),
           sum(status='success'), sum(status='partial'), sum(status='failure'), sum(status='aborted'),
           sum(closed AND coalesce(status, 'unknown')='unknown'),
           sum(n_steps), sum(n_agent), sum(n_teacher), sum(n_student)
         FROM episodes WHERE (?1 IS NULL OR arrived_at_ms>=?1) AND (?2 IS NULL OR scope=?2)";
    let counts = db.first(sql, (since, scope), |row| {
        let n = |at: usize| row.get::<_, Option<i64>>(at).map(|n| n.unwrap_or(0) as u64);
        Ok(Counts {
            episodes: n(0)?,
            open: n(1)?,
            closed: n(2)?,
            incomplete: n(3)?,
            successes: n(4)?,
            partial: n(5)?,
            failures: n(6)?,
            aborted: n(7)?,
            unknown: n(8)?,
            steps: n(9)?,
            agent_steps: n(10)?,
            teacher_steps: n(11)?,
            student_steps: n(12)?,
        })
    })?;
    Ok(counts.unwrap_or_default())
}
