//! OpenAI chat JSONL with tools: one episode a line, as hosts, fine-tuning sets and our own export write it.
//!
//! Read are `messages` (needed), `tools`, `outcome`, `task`, `env`, `seed`, `teacher` or `model`, and
//! `metadata`; other fields are kept and written again. Our export adds `metadata.locum`, in which what
//! the format has no place for stands beside the chat.

use serde::{Deserialize, Serialize};
use serde_json::{json, Map, Value};

use super::messages::{
    kind, messages_from_steps, steps_from_messages, tools_from_json, tools_to_json,
};
use super::FormatError;
use crate::episode::{
    Actor, Agent, Content, Episode, EpisodeId, Observation, Outcome, Source, Status, Step, Task,
    SCHEMA,
};

pub(super) const NAME: &str = "openai-chat";
/// Fields that [`episode`] turns into something else, so that the export writes them from there.
const OWN_FIELDS: [&str; 4] = ["messages", "tools", "outcome", "metadata"];

/// What `metadata.locum` holds: an episode without what `messages` and `tools` say already.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct Sidecar {
    schema: String,
    episode_id: Option<EpisodeId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    session_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    parent_id: Option<EpisodeId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    continued_from: Option<EpisodeId>,
    task: Task,
    agent: Agent,
    #[serde(skip_serializing_if = "Option::is_none")]
    outcome: Option<Outcome>,
    incomplete: bool,
    started_at_ms: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    ended_at_ms: Option<u64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    redactions: Vec<String>,
    steps: Vec<Step>,
    /// Names of the step fields that begin with `@`, by step; they are not printed in messages.
    #[serde(skip_serializing_if = "Map::is_empty")]
    extra: Map<String, Value>,
}

/// One line as an episode, without provenance; the id is the exported one, or zero.
pub(super) fn episode(line: &Map<String, Value>) -> Result<Episode, FormatError> {
    let wrong = |problem: String| FormatError::Run { problem };
    if ["functions", "function_call"]
        .iter()
        .any(|name| line.get(*name).is_some_and(|value| !value.is_null()))
    {
        return Err(wrong(
            "`functions` is the legacy form of tools; write them as `tools`".into(),
        ));
    }
    let messages = match line.get("messages") {
        Some(Value::Array(messages)) if !messages.is_empty() => messages,
        Some(Value::Array(_)) => return Err(wrong("`messages` is empty".into())),
        Some(other) => {
            return Err(wrong(format!(
                "`messages` must be a list, found {}",
                kind(other)
            )))
        }
        None => return Err(wrong("`messages` is missing".into())),
    };
    let mut episode = Episode {
        schema: SCHEMA.into(),
        closed: true,
        ..Episode::default()
    };
    episode.steps = steps_from_messages(messages)?;
    let model = ["model", "teacher"]
        .into_iter()
        .find_map(|name| line.get(name)?.as_str())
        .map(String::from);
    for step in episode
        .steps
        .iter_mut()
        .filter(|step| step.source == Source::Agent)
    {
        step.actor = Actor::Teacher;
        step.model = model.clone();
    }
    if let Some(tools) = line.get("tools") {
        episode.tools = tools_from_json(tools)?;
    }
    episode.task = task(line)?;
    episode.outcome = line.get("outcome").map(outcome).transpose()?.flatten();
    episode.extra = line
        .iter()
        .filter(|(key, _)| !OWN_FIELDS.contains(&key.as_str()))
        .map(|(k, v)| (k.clone(), v.clone()))
        .collect();
    match line.get("metadata") {
        Some(Value::Object(metadata)) => {
            let mut rest = metadata.clone();
            if let Some(sidecar) = rest.remove("locum") {
                let sidecar = serde_json::from_value(sidecar)
                    .map_err(|e| wrong(format!("`metadata.locum`: {e}")))?;
                add_sidecar(&mut episode, sidecar)?;
                if !rest.is_empty() {
                    episode.extra.insert("metadata".into(), Value::Object(rest));
                }
            } else {
                episode.extra.insert("metadata".into(), Value::Object(rest));
            }
        }
        Some(other) => {
            episode.extra.insert("metadata".into(), other.clone());
        }
        None => {}
    }
    if line.get("tools").is_some() && episode.tools.is_empty() {
        episode.extra.insert("@tools".into(), line["tools"].clone());
    }
    Ok(episode)
}

fn task(line: &Map<String, Value>) -> Result<Task, FormatError> {
    let mut task = match line.get("task") {
        None | Some(Value::Null) => Task::default(),
        Some(Value::String(name)) => {
            // The same level with another seed is another task: the held-out split must not mix them.
            let seed = line
                .get("seed")
                .filter(|seed| seed.is_number() || seed.is_string());
            let seed =
                seed.map(|seed| seed.as_str().map_or_else(|| seed.to_string(), String::from));
            Task {
                id: seed.map_or_else(|| name.clone(), |seed| format!("{name}/{seed}")),
                ..Task::default()
            }
        }
        Some(value @ Value::Object(_)) => {
            serde_json::from_value(value.clone()).map_err(|error| FormatError::Run {
                problem: format!("`task`: {error}"),
            })?
        }
        Some(other) => {
            return Err(FormatError::Run {
                problem: format!(
                    "`task` must be a string or an object, found {}",
                    kind(other)
                ),
            });
        }
    };
    if task.domain.is_empty() {
        task.domain = line
            .get("env")
            .and_then(Value::as_str)
            .unwrap_or_default()
            .into();
    }
    Ok(task)
}

/// Reads `outcome`: an object with `success` or `status`, or a boolean. Without either the outcome is unknown.
fn outcome(value: &Value) -> Result<Option<Outcome>, FormatError> {
    let from_success = |success: bool| {
        if success {
            Status::Success
        } else {
            Status::Failure
        }
    };
    let fields = match value {
        Value::Null => return Ok(None),
        Value::Bool(success) => {
            let extra = Map::from_iter([("success".to_string(), json!(success))]);
            return Ok(Some(Outcome {
                status: from_success(*success),
                extra,
                ..Outcome::default()
            }));
        }
        Value::Object(fields) => fields,
        other => {
            return Err(FormatError::Run {
                problem: format!("`outcome` must be an object, found {}", kind(other)),
            });
        }
    };
    let named = fields
        .get("status")
        .and_then(|status| serde_json::from_value::<Status>(status.clone()).ok());
    let success = fields
        .get("success")
        .and_then(Value::as_bool)
        .map(from_success);
    let score = ["score", "reward"]
        .into_iter()
        .find_map(|name| fields.get(name)?.as_f64());
    let reason = ["reason", "end"]
        .into_iter()
        .find_map(|name| fields.get(name)?.as_str());
    Ok(Some(Outcome {
        status: named.or(success).unwrap_or(Status::Unknown),
        score: score.filter(|score| (0.0..=1.0).contains(score)),
        reason: reason.map(String::from),
        extra: fields.clone(),
        ..Outcome::default()
    }))
}

fn add_sidecar(episode: &mut Episode, sidecar: Sidecar) -> Result<(), FormatError> {
    if sidecar.steps.len() != episode.steps.len() {
        let (said, found) = (sidecar.steps.len(), episode.steps.len());
        let problem =
            format!("`metadata.locum` describes {said} steps, but the messages make {found}");
        return Err(FormatError::Run { problem });
    }
    for (step, mut side) in episode.steps.iter_mut().zip(sidecar.steps) {
        side.index = step.index;
        side.source = step.source;
        side.message = step.message.take();
        side.reasoning = step.reasoning.take();
        side.tool_calls = std::mem::take(&mut step.tool_calls);
        let flags = std::mem::replace(
            &mut side.observations,
            std::mem::take(&mut step.observations),
        );
        for (observation, flags) in side.observations.iter_mut().zip(flags) {
            observation.is_error = flags.is_error;
            observation.truncated = flags.truncated;
        }
        side.label = side.label.or(step.label.take());
        let mut extra = std::mem::take(&mut step.extra);
        extra.extend(std::mem::take(&mut side.extra));
        side.extra = extra;
        *step = side;
    }
    episode.episode_id = sidecar.episode_id.unwrap_or_default();
    episode.session_id = sidecar.session_id;
    episode.parent_id = sidecar.parent_id;
    episode.continued_from = sidecar.continued_from;
    episode.task = sidecar.task;
    episode.agent = sidecar.agent;
    episode.outcome = sidecar.outcome;
    episode.incomplete = sidecar.incomplete;
    episode.started_at_ms = sidecar.started_at_ms;
    episode.ended_at_ms = sidecar.ended_at_ms;
    episode.provenance.redactions = sidecar.redactions;
    episode.extra.extend(sidecar.extra);
    Ok(())
}

/// An exported episode: the line, and what a reader of the format will not find in it.
#[derive(Clone, Debug, PartialEq)]
pub struct Exported {
    /// One JSON object; print it on one line.
    pub line: Value,
    pub losses: LossReport,
}

/// What a format has no place for, field by field. Serializes as `{"losses":[{field,count,kept,why}]}`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LossReport {
    pub losses: Vec<Loss>,
}

/// One field that the format has no place for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loss {
    /// Path in the episode, as `steps[].decision`.
    pub field: String,
    /// How many values.
    pub count: u64,
    /// True if the value stands in `metadata.locum`, which our import reads and others ignore; false if it is gone.
    pub kept: bool,
    pub why: String,
}

impl LossReport {
    /// Adds another episode's report.
    pub fn add(&mut self, other: &LossReport) {
        for loss in &other.losses {
            match self
                .losses
                .iter_mut()
                .find(|mine| mine.field == loss.field && mine.kept == loss.kept)
            {
                Some(mine) => mine.count += loss.count,
                None => self.losses.push(loss.clone()),
            }
        }
    }

    fn note(&mut self, field: &str, count: usize, kept: bool, why: &str) {
        if count > 0 {
            self.losses.push(Loss {
                field: field.into(),
                count: count as u64,
                kept,
                why: why.into(),
            });
        }
    }
}

/// Writes an episode as one object of OpenAI chat JSONL.
///
/// `messages` and `tools` are equal as JSON to those the episode was made from. With `sidecar`, what
/// the format cannot hold is put into `metadata.locum`, so that our import gives the same episode again
/// (token ids and where it was imported from excepted); without, it is left out. The report says which either way.
pub fn export_openai(episode: &Episode, sidecar: bool) -> Exported {
    let mut line = Map::new();
    line.insert(
        "messages".into(),
        Value::Array(messages_from_steps(&episode.steps)),
    );
    if !episode.tools.is_empty() {
        line.insert("tools".into(), tools_to_json(&episode.tools));
    } else if let Some(tools) = episode.extra.get("@tools") {
        line.insert("tools".into(), tools.clone());
    }
    for (key, value) in &episode.extra {
        if !key.starts_with('@') && !OWN_FIELDS.contains(&key.as_str()) {
            line.insert(key.clone(), value.clone());
        }
    }
    if let Some(outcome) = &episode.outcome {
        line.insert("outcome".into(), outcome_to_json(outcome));
    }
    let mut metadata = match episode.extra.get("metadata") {
        Some(Value::Object(fields)) => fields.clone(),
        Some(other) => Map::from_iter([("source".to_string(), other.clone())]),
        None => Map::new(),
    };
    if sidecar {
        let side = serde_json::to_value(sidecar_of(episode)).expect("an episode always prints");
        metadata.insert("locum".into(), side);
    }
    if !metadata.is_empty() {
        line.insert("metadata".into(), Value::Object(metadata));
    }
    Exported {
        line: Value::Object(line),
        losses: losses(episode, sidecar),
    }
}

fn outcome_to_json(outcome: &Outcome) -> Value {
    let mut fields = outcome.extra.clone();
    let mut put = |key: &str, value: Value| {
        fields.entry(key).or_insert(value);
    };
    match outcome.status {
        Status::Success => put("success", json!(true)),
        Status::Failure | Status::Partial | Status::Aborted => put("success", json!(false)),
        Status::Unknown => {}
    }
    put(
        "status",
        serde_json::to_value(outcome.status).expect("a word"),
    );
    if let Some(score) = outcome.score {
        put("score", json!(score));
    }
    if let Some(reason) = &outcome.reason {
        put("reason", json!(reason));
    }
    Value::Object(fields)
}

fn sidecar_of(episode: &Episode) -> Sidecar {
    let private = |extra: &Map<String, Value>| -> Map<String, Value> {
        // What the messages say already is read from them again.
        let ours = |key: &str| key.starts_with('@') && key != super::RESERVED && key != "@tools";
        extra
            .iter()
            .filter(|(key, _)| ours(key))
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect()
    };
    let steps = episode.steps.iter().map(|step| Step {
        message: None,
        reasoning: None,
        tool_calls: Vec::new(),
        observations: match step.observations.iter().any(|o| o.is_error || o.truncated) {
            true => step.observations.iter().map(flags).collect(),
            false => Vec::new(),
        },
        token_ids: None,
        extra: private(&step.extra),
        ..step.clone()
    });
    Sidecar {
        schema: SCHEMA.into(),
        episode_id: Some(episode.episode_id),
        session_id: episode.session_id.clone(),
        parent_id: episode.parent_id,
        continued_from: episode.continued_from,
        task: episode.task.clone(),
        agent: episode.agent.clone(),
        outcome: episode.outcome.clone(),
        incomplete: episode.incomplete,
        started_at_ms: episode.started_at_ms,
        ended_at_ms: episode.ended_at_ms,
        redactions: episode.provenance.redactions.clone(),
        steps: steps.collect(),
        extra: private(&episode.extra),
    }
}

fn flags(observation: &Observation) -> Observation {
    Observation {
        is_error: observation.is_error,
        truncated: observation.truncated,
        ..Observation::default()
    }
}

fn losses(episode: &Episode, kept: bool) -> LossReport {
    let mut report = LossReport::default();
    let steps = |has: fn(&Step) -> bool| episode.steps.iter().filter(|step| has(step)).count();
    let seen = |has: fn(&Observation) -> bool| {
        episode
            .steps
            .iter()
            .flat_map(|step| &step.observations)
            .filter(|observation| has(observation))
            .count()
    };
    let no_place = "the format has no such field";
    for (field, count) in [
        ("steps[].actor", steps(|s| s.actor != Actor::Unknown)),
        ("steps[].model", steps(|s| s.model.is_some())),
        ("steps[].weights_id", steps(|s| s.weights_id.is_some())),
        (
            "steps[].started_at_ms",
            steps(|s| s.started_at_ms.is_some()),
        ),
        ("steps[].ended_at_ms", steps(|s| s.ended_at_ms.is_some())),
        ("steps[].usage", steps(|s| s.usage.is_some())),
        (
            "steps[].prompt_digest",
            steps(|s| s.prompt_digest.is_some()),
        ),
        ("steps[].decision", steps(|s| s.decision.is_some())),
        (
            "steps[].counterfactual",
            steps(|s| s.counterfactual.is_some()),
        ),
        (
            "steps[].label.reason",
            steps(|s| {
                s.label
                    .as_ref()
                    .is_some_and(|label| !label.reason.is_empty())
            }),
        ),
        ("steps[].copied_context", steps(|s| s.copied_context)),
        ("observations[].is_error", seen(|o| o.is_error)),
        ("observations[].truncated", seen(|o| o.truncated)),
        ("agent", usize::from(episode.agent != Agent::default())),
        ("session_id", usize::from(episode.session_id.is_some())),
        ("parent_id", usize::from(episode.parent_id.is_some())),
        (
            "continued_from",
            usize::from(episode.continued_from.is_some()),
        ),
        ("incomplete", usize::from(episode.incomplete)),
        ("started_at_ms", usize::from(episode.started_at_ms != 0)),
        ("ended_at_ms", usize::from(episode.ended_at_ms.is_some())),
        ("task", usize::from(episode.task != Task::default())),
        (
            "outcome.criteria",
            episode.outcome.as_ref().map_or(0, |o| o.criteria.len()),
        ),
        (
            "outcome.integrity",
            episode.outcome.as_ref().map_or(0, |o| {
                usize::from(!o.integrity.ok || !o.integrity.flags.is_empty())
            }),
        ),
        ("outcome.judge", usize::from(episode.outcome.is_some())),
        ("provenance.redactions", episode.provenance.redactions.len()),
    ] {
        report.note(field, count, kept, no_place);
    }
    let private = |extra: &Map<String, Value>| {
        extra
            .keys()
            .any(|key| key.starts_with('@') && key != super::RESERVED && key != "@tools")
    };
    report.note(
        "steps[].extra",
        episode.steps.iter().filter(|s| private(&s.extra)).count(),
        kept,
        no_place,
    );
    report.note(
        "extra",
        usize::from(private(&episode.extra)),
        kept,
        no_place,
    );
    let ids = steps(|s| s.token_ids.is_some());
    report.note(
        "steps[].token_ids",
        ids,
        false,
        "token ids mean nothing without the student's tokenizer",
    );
    let from = &episode.provenance;
    let origin =
        from.source_id.is_some() || from.imported_at_ms.is_some() || !from.source_format.is_empty();
    report.note(
        "provenance",
        usize::from(origin),
        false,
        "an import writes its own",
    );
    let images = episode.steps.iter().filter(
        |s| matches!(&s.message, Some(Content::Parts(parts)) if parts.iter().any(not_text)),
    );
    report.note(
        "steps[].message parts other than text",
        images.count(),
        true,
        "kept as they are; many readers of the format refuse them",
    );
    report
}

fn not_text(part: &Value) -> bool {
    part.get("type")
        .and_then(Value::as_str)
        .is_some_and(|kind| kind != "text")
}
