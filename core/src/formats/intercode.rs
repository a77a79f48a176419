//! InterCode result files: a JSON object of runs, each with `query` and a `turn_history` of actions,
//! observations, rewards and whether each action was valid.
//! (princeton-nlp/intercode, `experiments/`; format seen at commit c3e46d8)

use serde_json::{json, Map, Value};

use super::messages::kind;
use super::FormatError;
use crate::episode::{
    Actor, Content, Episode, Judge, JudgeKind, Observation, Outcome, Source, Status, Step,
    ToolCall, ToolSpec, SCHEMA,
};

pub(super) const NAME: &str = "intercode";
/// Key of a step's `extra` that holds the reward and validity of its action. Not printed in messages.
const TURN: &str = "@intercode";

/// One run as an episode, without id and provenance.
///
/// The query becomes a user message, each action a call of the one tool `bash` or `sql` with a string
/// `command`, each observation its result; an action that was not valid makes it an error. A maximal
/// reward of 1 is success, anything less failure with the reward as score. All but the turns is kept in `extra`.
pub(super) fn episode(run: &Map<String, Value>) -> Result<Episode, FormatError> {
    let wrong = |problem: String| FormatError::Run { problem };
    let Some(Value::Object(history)) = run.get("turn_history") else {
        return Err(wrong("`turn_history` is missing".into()));
    };
    let column = |name: &str| match history.get(name) {
        Some(Value::Array(list)) => Ok(list),
        Some(other) => Err(wrong(format!(
            "`turn_history.{name}` must be a list, found {}",
            kind(other)
        ))),
        None => Err(wrong(format!("`turn_history.{name}` is missing"))),
    };
    let (actions, observations) = (column("actions")?, column("observations")?);
    let (rewards, valid) = (column("rewards")?, column("valid_action")?);
    if [observations.len(), rewards.len(), valid.len()] != [actions.len(); 3] {
        return Err(wrong(format!(
            "`turn_history` has {} actions, {} observations, {} rewards and {} validities; equal numbers are expected",
            actions.len(),
            observations.len(),
            rewards.len(),
            valid.len()
        )));
    }
    if let Some(name) = history
        .keys()
        .find(|key| !["actions", "observations", "rewards", "valid_action"].contains(&key.as_str()))
    {
        return Err(wrong(format!(
            "`turn_history` has an unknown column {:?}",
            name.chars().take(32).collect::<String>()
        )));
    }
    let query = match run.get("query") {
        Some(Value::String(query)) => query.clone(),
        _ => return Err(wrong("`query` is missing".into())),
    };
    let environment = run
        .get("environment")
        .and_then(Value::as_str)
        .unwrap_or(NAME);
    let tool = match environment.contains("sql") {
        true => tool("sql", "Run one SQL statement."),
        false => tool("bash", "Run one Bash command."),
    };

    let mut steps = Vec::with_capacity(actions.len() + 1);
    let message = Some(Content::Text(query.clone()));
    steps.push(Step {
        index: 1,
        source: Source::User,
        message,
        ..Step::default()
    });
    for (turn, action) in actions.iter().enumerate() {
        let Value::String(command) = action else {
            return Err(wrong(format!(
                "action {turn} must be a string, found {}",
                kind(action)
            )));
        };
        let Value::Bool(valid) = valid[turn] else {
            return Err(wrong(format!(
                "the validity of action {turn} must be a boolean, found {}",
                kind(&valid[turn])
            )));
        };
        let content = match &observations[turn] {
            Value::String(text) => Content::Text(text.clone()),
            Value::Array(parts) => Content::Parts(parts.clone()),
            other => {
                return Err(wrong(format!(
                    "observation {turn} must be text, found {}",
                    kind(other)
                )))
            }
        };
        let id = format!("call_{turn}");
        let call = ToolCall {
            id: id.clone(),
            name: tool.name.clone(),
            arguments: json!({"command": command}),
            ..ToolCall::default()
        };
        let seen = Observation {
            call_id: Some(id),
            content: Some(content),
            is_error: !valid,
            ..Observation::default()
        };
        let mut step = Step {
            index: turn as u32 + 2,
            source: Source::Agent,
            actor: Actor::Teacher,
            tool_calls: vec![call],
            observations: vec![seen],
            ..Step::default()
        };
        step.extra.insert(
            TURN.into(),
            json!({"reward": rewards[turn], "valid_action": valid}),
        );
        steps.push(step);
    }

    let mut episode = Episode {
        schema: SCHEMA.into(),
        steps,
        tools: vec![tool],
        closed: true,
        ..Episode::default()
    };
    let dataset = run
        .get("dataset")
        .and_then(Value::as_str)
        .unwrap_or_default();
    let dataset = dataset
        .rsplit('/')
        .next()
        .unwrap_or_default()
        .trim_end_matches(".json");
    episode.task.domain = environment.into();
    episode.task.instruction = query;
    episode.task.id = match run.get("task_id") {
        Some(id @ (Value::Number(_) | Value::String(_))) => {
            format!(
                "{environment}/{dataset}/{}",
                id.as_str().map_or_else(|| id.to_string(), String::from)
            )
        }
        _ => String::new(),
    };
    let best = run
        .get("summary")
        .and_then(|summary| summary.get("max_reward"))
        .and_then(Value::as_f64);
    episode.outcome = Some(Outcome {
        status: match best {
            Some(best) if best >= 1.0 => Status::Success,
            Some(_) => Status::Failure,
            None => Status::Unknown,
        },
        score: best.filter(|best| (0.0..=1.0).contains(best)),
        judge: Judge {
            kind: JudgeKind::Program,
            name: NAME.into(),
            privileged: true,
            ..Judge::default()
        },
        ..Outcome::default()
    });
    episode.extra = run
        .iter()
        .filter(|(key, _)| *key != "turn_history")
        .map(|(k, v)| (k.clone(), v.clone()))
        .collect();
    Ok(episode)
}

/// The `turn_history` that an InterCode episode was made from; `None` for an episode of another origin.
pub fn turn_history(episode: &Episode) -> Option<Value> {
    let (mut actions, mut observations, mut rewards, mut valid) = (vec![], vec![], vec![], vec![]);
    for step in episode
        .steps
        .iter()
        .filter(|step| step.source == Source::Agent)
    {
        let turn = step.extra.get(TURN)?;
        actions.push(step.tool_calls.first()?.arguments.get("command")?.clone());
        observations.push(match step.observations.first()?.content.as_ref()? {
            Content::Text(text) => json!(text),
            Content::Parts(parts) => json!(parts),
        });
        rewards.push(turn.get("reward")?.clone());
        valid.push(turn.get("valid_action")?.clone());
    }
    let known = episode.provenance.source_format == NAME || !actions.is_empty();
    known.then(|| json!({"actions": actions, "observations": observations, "rewards": rewards, "valid_action": valid}))
}

fn tool(name: &str, description: &str) -> ToolSpec {
    ToolSpec {
        name: name.into(),
        description: description.into(),
        parameters: json!({"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}),
        ..ToolSpec::default()
    }
}
