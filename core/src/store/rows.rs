//! Episodes as rows and back: what is loaded is what was recorded.

use rusqlite::types::{Type, Value as Cell};
use rusqlite::{params, Row};
use serde::de::DeserializeOwned;
use serde::Serialize;
use serde_json::{Map, Value};

use super::{json, statements::Statements};
use crate::episode::{
    Actor, Agent, Content, Counterfactual, Criterion, Episode, EpisodeId, Observation, Outcome,
    Provenance, Source, Split, Status, Step, Task, TokenIds, ToolCall,
};

/// Nesting that a JSON column may have. Far above what enters at the doors, so that no recorded value is unreadable.
const COLUMN_DEPTH: usize = 512;

/// Who played the steps of an episode, added to its row once per commit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub steps: i64,
    pub agent: i64,
    pub teacher: i64,
    pub student: i64,
}

impl Tally {
    /// Counts one more step.
    pub fn add(&mut self, step: &Step) {
        let agent = step.source == Source::Agent;
        self.steps += 1;
        self.agent += i64::from(agent);
        self.teacher += i64::from(agent && step.actor == Actor::Teacher);
        self.student += i64::from(agent && step.actor == Actor::Student);
    }
}

/// Writes an episode's own row, without steps and outcome, and returns its number; `None` if the id is there already.
pub fn insert_episode(
    db: &Statements,
    episode: &Episode,
    recorder: Option<i64>,
) -> rusqlite::Result<Option<i64>> {
    let task = &episode.task;
    let from = &episode.provenance;
    let sql = "INSERT INTO episodes (id, schema, session_id, parent_id, continued_from, task_id, domain, group_key,
           instruction, split, agent_name, agent_version, tools, closed, incomplete, started_at_ms, ended_at_ms,
           arrived_at_ms, source_format, source_id, imported_at_ms, redactions, extra, recorder, scope)
         VALUES (?1,?2,?3,?4,?5,?6,?7,?8,?9,?10,?11,?12,?13,?14,?15,?16,?17,?18,?19,?20,?21,?22,?23,?24,?25)
         ON CONFLICT (id) DO NOTHING";
    let made = db.execute(
        sql,
        params![
            episode.episode_id.0,
            episode.schema,
            episode.session_id,
            episode.parent_id.map(|id| id.0),
            episode.continued_from.map(|id| id.0),
            task.id,
            task.domain,
            task.group_key,
            task.instruction,
            task.split.map(split_name),
            episode.agent.name,
            episode.agent.version,
            list(&episode.tools)?,
            episode.closed,
            episode.incomplete,
            episode.started_at_ms as i64,
            episode.ended_at_ms.map(|ms| ms as i64),
            from.imported_at_ms.unwrap_or(episode.started_at_ms) as i64,
            from.source_format,
            from.source_id,
            from.imported_at_ms.map(|ms| ms as i64),
            list(&from.redactions)?,
            object(&episode.extra),
            if episode.closed { None } else { recorder },
            episode.scope,
        ],
    )?;
    Ok((made == 1).then(|| db.db().last_insert_rowid()))
}

/// Writes a step with its calls and observations.
pub fn insert_step(db: &Statements, episode: i64, step: &Step) -> rusqlite::Result<()> {
    let (text, parts) = content(&step.message);
    let mut label = step.label.clone();
    if let Some(label) = label.as_mut().filter(|label| !label.weight.is_finite()) {
        label.weight = 0.0;
    }
    let sql = "INSERT INTO steps (episode, step, source, actor, model, weights_id, message, message_parts, reasoning,
           started_at_ms, ended_at_ms, usage, prompt_digest, token_ids, decision, counterfactual, label,
           copied_context, extra)
         VALUES (?1,?2,?3,?4,?5,?6,?7,?8,?9,?10,?11,?12,?13,?14,?15,?16,?17,?18,?19)";
    db.execute(
        sql,
        params![
            episode,
            step.index,
            source_name(step.source),
            actor_name(step.actor),
            step.model,
            step.weights_id,
            text,
            parts,
            step.reasoning,
            step.started_at_ms.map(|ms| ms as i64),
            step.ended_at_ms.map(|ms| ms as i64),
            step.usage.as_ref().map(document).transpose()?,
            step.prompt_digest,
            step.token_ids.as_ref().map(token_bytes),
            step.decision.as_ref().map(document).transpose()?,
            step.counterfactual.as_ref().map(document).transpose()?,
            label.as_ref().map(document).transpose()?,
            step.copied_context,
            object(&step.extra),
        ],
    )?;
    for (n, call) in step.tool_calls.iter().enumerate() {
        db.execute(
            "INSERT INTO tool_calls VALUES (?1,?2,?3,?4,?5,?6,?7,?8)",
            params![
                episode,
                step.index,
                n as i64,
                call.id,
                call.name,
                json::print(&call.arguments),
                call.arguments_raw,
                object(&call.extra)
            ],
        )?;
    }
    for (n, observation) in step.observations.iter().enumerate() {
        insert_observation(db, episode, step.index, n as i64, observation)?;
    }
    Ok(())
}

/// Adds an observation to a step that is there; false if it is not.
pub fn append_observation(
    db: &Statements,
    episode: i64,
    step: u32,
    o: &Observation,
) -> rusqlite::Result<bool> {
    let there = "SELECT 1 FROM steps WHERE episode=?1 AND step=?2";
    if db
        .first(there, params![episode, step], |_| Ok(()))?
        .is_none()
    {
        return Ok(false);
    }
    let sql = "SELECT coalesce(max(n)+1, 0) FROM observations WHERE episode=?1 AND step=?2";
    let n = db
        .first(sql, params![episode, step], |row| row.get(0))?
        .unwrap_or(0);
    insert_observation(db, episode, step, n, o)?;
    Ok(true)
}

fn insert_observation(
    db: &Statements,
    episode: i64,
    step: u32,
    n: i64,
    o: &Observation,
) -> rusqlite::Result<()> {
    let (text, parts) = content(&o.content);
    let sql = "INSERT INTO observations VALUES (?1,?2,?3,?4,?5,?6,?7,?8,?9)";
    db.execute(
        sql,
        params![
            episode,
            step,
            n,
            o.call_id,
            text,
            parts,
            o.is_error,
            o.truncated,
            object(&o.extra)
        ],
    )?;
    Ok(())
}

/// Sets what the one who did not act would have done; false if there is no such step.
pub fn set_counterfactual(
    db: &Statements,
    episode: i64,
    step: u32,
    value: &Counterfactual,
) -> rusqlite::Result<bool> {
    let sql = "UPDATE steps SET counterfactual=?3 WHERE episode=?1 AND step=?2";
    Ok(db.execute(sql, params![episode, step, document(value)?])? == 1)
}

/// Adds an outcome, which supersedes the earlier ones.
pub fn insert_outcome(
    db: &Statements,
    episode: i64,
    outcome: &Outcome,
    now_ms: u64,
) -> rusqlite::Result<()> {
    let mut criteria: Vec<Criterion> = outcome.criteria.clone();
    for criterion in criteria
        .iter_mut()
        .filter(|criterion| !criterion.weight.is_finite())
    {
        criterion.weight = 0.0;
    }
    let sql =
        "INSERT INTO outcomes SELECT ?1, coalesce(max(n)+1, 0), ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10
         FROM outcomes WHERE episode=?1";
    db.execute(
        sql,
        params![
            episode,
            now_ms as i64,
            status_name(outcome.status),
            outcome.score,
            outcome.reason,
            list(&criteria)?,
            document(&outcome.integrity)?,
            document(&outcome.judge)?,
            list(&outcome.tags)?,
            object(&outcome.extra),
        ],
    )?;
    db.execute(
        "UPDATE episodes SET status=?2 WHERE episode=?1",
        params![episode, status_name(outcome.status)],
    )?;
    Ok(())
}

/// Adds to the counts in an episode's row.
pub fn add_tally(db: &Statements, episode: i64, tally: &Tally) -> rusqlite::Result<()> {
    let sql = "UPDATE episodes SET n_steps=n_steps+?2, n_agent=n_agent+?3, n_teacher=n_teacher+?4, n_student=n_student+?5
         WHERE episode=?1";
    db.execute(
        sql,
        params![
            episode,
            tally.steps,
            tally.agent,
            tally.teacher,
            tally.student
        ],
    )?;
    Ok(())
}

/// Removes an episode with everything that belongs to it.
pub fn delete_episode(db: &Statements, episode: i64) -> rusqlite::Result<()> {
    for sql in [
        "DELETE FROM steps WHERE episode=?1",
        "DELETE FROM tool_calls WHERE episode=?1",
        "DELETE FROM observations WHERE episode=?1",
        "DELETE FROM outcomes WHERE episode=?1",
        "DELETE FROM episodes WHERE episode=?1",
    ] {
        db.execute(sql, [episode])?;
    }
    Ok(())
}

/// Takes away what ties an episode to somebody beside what was said and done.
pub fn anonymise(db: &Statements, episode: i64) -> rusqlite::Result<()> {
    for sql in [
        "UPDATE episodes SET session_id=NULL, source_id=NULL, extra=NULL WHERE episode=?1",
        "UPDATE steps SET token_ids=NULL, prompt_digest=NULL, extra=NULL WHERE episode=?1",
        "UPDATE tool_calls SET extra=NULL WHERE episode=?1",
        "UPDATE observations SET extra=NULL WHERE episode=?1",
        "UPDATE outcomes SET reason=NULL, extra=NULL WHERE episode=?1",
    ] {
        db.execute(sql, [episode])?;
    }
    Ok(())
}

/// Adds to the redactions that changed something in an episode.
pub fn note_redactions(db: &Statements, episode: i64, names: &[String]) -> rusqlite::Result<()> {
    let sql = "SELECT redactions FROM episodes WHERE episode=?1";
    let known: Vec<String> = db
        .first(sql, [episode], |row| read(row, "redactions"))?
        .flatten()
        .unwrap_or_default();
    let new = names.iter().filter(|name| !known.contains(name));
    let all: Vec<String> = known.iter().chain(new).cloned().collect();
    if all.len() > known.len() {
        let sql = "UPDATE episodes SET redactions=?2 WHERE episode=?1";
        db.execute(sql, params![episode, list(&all)?])?;
    }
    Ok(())
}

/// True if something was taken out of an episode that is being recorded (what an import brings whole is as its file says).
pub fn is_redacted(db: &Statements, episode: i64) -> rusqlite::Result<bool> {
    let sql = "SELECT 1 FROM episodes WHERE episode=?1 AND source_format='live' AND redactions IS NOT NULL";
    Ok(db.first(sql, [episode], |_| Ok(()))?.is_some())
}

/// The number of the episode with this id.
pub fn find(db: &Statements, id: EpisodeId) -> rusqlite::Result<Option<i64>> {
    db.first("SELECT episode FROM episodes WHERE id=?1", [id.0], |row| {
        row.get(0)
    })
}

/// Rebuilds a whole episode.
pub fn load(db: &Statements, episode: i64) -> rusqlite::Result<Option<Episode>> {
    let select = "SELECT * FROM episodes WHERE episode=?1";
    let Some(mut value) = db.first(select, [episode], episode_from)? else {
        return Ok(None);
    };
    value.steps = db.all(
        "SELECT * FROM steps WHERE episode=?1 ORDER BY step",
        [episode],
        step_from,
    )?;
    // Calls and observations come in the order of the steps, so one walk gives each its step.
    let select = "SELECT * FROM tool_calls WHERE episode=?1 ORDER BY step, n";
    let calls = db.all(select, [episode], |row| {
        Ok((row.get::<_, u32>("step")?, call_from(row)?))
    })?;
    let mut at = 0;
    for (step, call) in calls {
        if seek(&value.steps, &mut at, step) {
            value.steps[at].tool_calls.push(call);
        }
    }
    let select = "SELECT * FROM observations WHERE episode=?1 ORDER BY step, n";
    let seen = db.all(select, [episode], |row| {
        Ok((row.get::<_, u32>("step")?, observation_from(row)?))
    })?;
    let mut at = 0;
    for (step, observation) in seen {
        if seek(&value.steps, &mut at, step) {
            value.steps[at].observations.push(observation);
        }
    }
    value.outcome = outcomes(db, episode)?.pop();
    Ok(Some(value))
}

fn seek(steps: &[Step], at: &mut usize, index: u32) -> bool {
    while steps.get(*at).is_some_and(|step| step.index < index) {
        *at += 1;
    }
    steps.get(*at).is_some_and(|step| step.index == index)
}

/// Every outcome of an episode, oldest first.
pub fn outcomes(db: &Statements, episode: i64) -> rusqlite::Result<Vec<Outcome>> {
    db.all(
        "SELECT * FROM outcomes WHERE episode=?1 ORDER BY n",
        [episode],
        outcome_from,
    )
}

fn episode_from(row: &Row) -> rusqlite::Result<Episode> {
    Ok(Episode {
        schema: row.get("schema")?,
        episode_id: EpisodeId(row.get("id")?),
        session_id: row.get("session_id")?,
        parent_id: row.get::<_, Option<[u8; 16]>>("parent_id")?.map(EpisodeId),
        continued_from: row
            .get::<_, Option<[u8; 16]>>("continued_from")?
            .map(EpisodeId),
        task: Task {
            id: row.get("task_id")?,
            domain: row.get("domain")?,
            group_key: row.get("group_key")?,
            instruction: row.get("instruction")?,
            split: match row.get::<_, Option<String>>("split")?.as_deref() {
                Some("train") => Some(Split::Train),
                Some("held_out") => Some(Split::HeldOut),
                _ => None,
            },
        },
        agent: Agent {
            name: row.get("agent_name")?,
            version: row.get("agent_version")?,
        },
        tools: read(row, "tools")?.unwrap_or_default(),
        steps: Vec::new(),
        outcome: None,
        closed: row.get("closed")?,
        incomplete: row.get("incomplete")?,
        started_at_ms: row.get::<_, i64>("started_at_ms")? as u64,
        ended_at_ms: row
            .get::<_, Option<i64>>("ended_at_ms")?
            .map(|ms| ms as u64),
        provenance: Provenance {
            source_format: row.get("source_format")?,
            source_id: row.get("source_id")?,
            imported_at_ms: row
                .get::<_, Option<i64>>("imported_at_ms")?
                .map(|ms| ms as u64),
            redactions: read(row, "redactions")?.unwrap_or_default(),
        },
        extra: read(row, "extra")?.unwrap_or_default(),
        // A file of version 1 that is only read has no such column.
        scope: row.get("scope").unwrap_or_default(),
    })
}

fn step_from(row: &Row) -> rusqlite::Result<Step> {
    let source: String = row.get("source")?;
    Ok(Step {
        index: row.get("step")?,
        source: match source.as_str() {
            "system" => Source::System,
            "agent" => Source::Agent,
            _ => Source::User,
        },
        actor: actor_from(&row.get::<_, String>("actor")?),
        model: row.get("model")?,
        weights_id: row.get("weights_id")?,
        message: read_content(row, "message", "message_parts")?,
        reasoning: row.get("reasoning")?,
        tool_calls: Vec::new(),
        observations: Vec::new(),
        started_at_ms: row
            .get::<_, Option<i64>>("started_at_ms")?
            .map(|ms| ms as u64),
        ended_at_ms: row
            .get::<_, Option<i64>>("ended_at_ms")?
            .map(|ms| ms as u64),
        usage: read(row, "usage")?,
        prompt_digest: row.get("prompt_digest")?,
        token_ids: row
            .get::<_, Option<Vec<u8>>>("token_ids")?
            .map(|bytes| tokens(&bytes)),
        decision: read(row, "decision")?,
        counterfactual: read(row, "counterfactual")?,
        label: read(row, "label")?,
        copied_context: row.get("copied_context")?,
        extra: read(row, "extra")?.unwrap_or_default(),
    })
}

fn call_from(row: &Row) -> rusqlite::Result<ToolCall> {
    Ok(ToolCall {
        id: row.get("call_id")?,
        name: row.get("name")?,
        arguments: read(row, "arguments")?.unwrap_or_default(),
        arguments_raw: row.get("arguments_raw")?,
        extra: read(row, "extra")?.unwrap_or_default(),
    })
}

fn observation_from(row: &Row) -> rusqlite::Result<Observation> {
    Ok(Observation {
        call_id: row.get("call_id")?,
        content: read_content(row, "content", "content_parts")?,
        is_error: row.get("is_error")?,
        truncated: row.get("truncated")?,
        extra: read(row, "extra")?.unwrap_or_default(),
    })
}

fn outcome_from(row: &Row) -> rusqlite::Result<Outcome> {
    Ok(Outcome {
        status: status_from(&row.get::<_, String>("status")?),
        score: row.get("score")?,
        criteria: read(row, "criteria")?.unwrap_or_default(),
        integrity: read(row, "integrity")?.unwrap_or_default(),
        judge: read(row, "judge")?.unwrap_or_default(),
        tags: read(row, "tags")?.unwrap_or_default(),
        reason: row.get("reason")?,
        extra: read(row, "extra")?.unwrap_or_default(),
    })
}

/// Text and parts columns of a content.
fn content(content: &Option<Content>) -> (Option<&str>, Option<String>) {
    match content {
        None => (None, None),
        Some(Content::Text(text)) => (Some(text), None),
        Some(Content::Parts(parts)) => (None, Some(json::print(&Value::Array(parts.clone())))),
    }
}

fn read_content(row: &Row, text: &str, parts: &str) -> rusqlite::Result<Option<Content>> {
    if let Some(text) = row.get(text)? {
        return Ok(Some(Content::Text(text)));
    }
    Ok(read::<Vec<Value>>(row, parts)?.map(Content::Parts))
}

fn object(map: &Map<String, Value>) -> Option<String> {
    (!map.is_empty())
        .then(|| serde_json::to_string(map).expect("a map with string keys always prints"))
}

fn list<T: Serialize>(items: &[T]) -> rusqlite::Result<Option<String>> {
    if items.is_empty() {
        return Ok(None);
    }
    document(&items).map(Some)
}

/// A value as JSON text, by way of `Value` so that 32-bit floats are printed as the number they are.
fn document<T: Serialize>(value: &T) -> rusqlite::Result<String> {
    let value = serde_json::to_value(value)
        .map_err(|e| rusqlite::Error::ToSqlConversionFailure(Box::new(e)))?;
    Ok(json::print(&value))
}

fn read<T: DeserializeOwned>(row: &Row, column: &str) -> rusqlite::Result<Option<T>> {
    let Some(text) = row.get::<_, Option<String>>(column)? else {
        return Ok(None);
    };
    let wrong = |error: Box<dyn std::error::Error + Send + Sync>| {
        let at = row.as_ref().column_index(column).unwrap_or(0);
        rusqlite::Error::FromSqlConversionFailure(at, Type::Text, error)
    };
    let value = json::parse(text.as_bytes(), COLUMN_DEPTH).map_err(|error| wrong(error.into()))?;
    serde_json::from_value(value)
        .map(Some)
        .map_err(|error| wrong(error.into()))
}

fn token_bytes(ids: &TokenIds) -> Cell {
    let all = [ids.prompt.len() as u32]
        .into_iter()
        .chain(ids.prompt.iter().copied())
        .chain(ids.reply.iter().copied());
    Cell::Blob(all.flat_map(u32::to_le_bytes).collect())
}

fn tokens(bytes: &[u8]) -> TokenIds {
    let mut ids = bytes
        .chunks_exact(4)
        .map(|four| u32::from_le_bytes([four[0], four[1], four[2], four[3]]));
    let n_prompt = ids.next().unwrap_or(0) as usize;
    let mut prompt: Vec<u32> = ids.collect();
    let reply = prompt.split_off(n_prompt.min(prompt.len()));
    TokenIds { prompt, reply }
}

fn split_name(split: Split) -> &'static str {
    match split {
        Split::Train => "train",
        Split::HeldOut => "held_out",
    }
}

fn source_name(source: Source) -> &'static str {
    match source {
        Source::System => "system",
        Source::User => "user",
        Source::Agent => "agent",
    }
}

fn actor_name(actor: Actor) -> &'static str {
    match actor {
        Actor::Unknown => "unknown",
        Actor::Teacher => "teacher",
        Actor::Student => "student",
        Actor::Human => "human",
        Actor::Script => "script",
    }
}

fn actor_from(name: &str) -> Actor {
    match name {
        "teacher" => Actor::Teacher,
        "student" => Actor::Student,
        "human" => Actor::Human,
        "script" => Actor::Script,
        _ => Actor::Unknown,
    }
}

/// The word for a status in the database.
pub fn status_name(status: Status) -> &'static str {
    match status {
        Status::Success => "success",
        Status::Partial => "partial",
        Status::Failure => "failure",
        Status::Aborted => "aborted",
        Status::Unknown => "unknown",
    }
}

/// The status for a word in the database.
pub fn status_from(name: &str) -> Status {
    match name {
        "success" => Status::Success,
        "partial" => Status::Partial,
        "failure" => Status::Failure,
        "aborted" => Status::Aborted,
        _ => Status::Unknown,
    }
}
