//! How many bytes a record carries, counted without copying it.

use serde_json::{Map, Value};

use super::Record;
use crate::episode::{Content, Counterfactual, Observation, Outcome, Step, ToolCall};

/// What a record takes besides its content.
pub const OVERHEAD: usize = 512;

/// Bytes of the texts and numbers of a record, near enough for a limit.
pub fn of_record(record: &Record) -> usize {
    match record {
        Record::Begin(episode) => {
            let task = &episode.task;
            let tools = episode.tools.iter();
            let tools = tools
                .map(|t| t.name.len() + t.description.len() + value(&t.parameters) + map(&t.extra));
            task.id.len()
                + task.domain.len()
                + task.instruction.len()
                + tools.sum::<usize>()
                + episode.steps.iter().map(step).sum::<usize>()
                + episode.outcome.as_ref().map_or(0, outcome)
                + map(&episode.extra)
        }
        Record::Step { step: value, .. } => step(value),
        Record::Observation {
            observation: value, ..
        } => observation(value),
        Record::Counterfactual { value, .. } => counterfactual(value),
        Record::Outcome { outcome: value, .. } => outcome(value),
        Record::Incomplete { reason, .. } => reason.len(),
        Record::Drop { .. } => 0,
    }
}

fn step(step: &Step) -> usize {
    let tokens = step
        .token_ids
        .as_ref()
        .map_or(0, |ids| 4 * (ids.prompt.len() + ids.reply.len()));
    content(&step.message)
        + step.reasoning.as_ref().map_or(0, String::len)
        + step.tool_calls.iter().map(call).sum::<usize>()
        + step.observations.iter().map(observation).sum::<usize>()
        + step.counterfactual.as_ref().map_or(0, counterfactual)
        + tokens
        + map(&step.extra)
}

fn call(call: &ToolCall) -> usize {
    let raw = call.arguments_raw.as_ref().map_or(0, String::len);
    call.id.len() + call.name.len() + value(&call.arguments) + raw + map(&call.extra)
}

fn observation(observation: &Observation) -> usize {
    content(&observation.content) + map(&observation.extra)
}

fn counterfactual(value: &Counterfactual) -> usize {
    value.tool_calls.iter().map(call).sum::<usize>() + value.message.as_ref().map_or(0, String::len)
}

fn outcome(outcome: &Outcome) -> usize {
    let criteria = outcome
        .criteria
        .iter()
        .map(|c| c.id.len() + c.evidence.len());
    criteria.sum::<usize>() + outcome.reason.as_ref().map_or(0, String::len) + map(&outcome.extra)
}

fn content(content: &Option<Content>) -> usize {
    match content {
        None => 0,
        Some(Content::Text(text)) => text.len(),
        Some(Content::Parts(parts)) => parts.iter().map(value).sum(),
    }
}

fn map(map: &Map<String, Value>) -> usize {
    map.iter().map(|(key, item)| key.len() + value(item)).sum()
}

fn value(item: &Value) -> usize {
    match item {
        Value::String(text) => text.len(),
        Value::Array(items) => items.iter().map(value).sum(),
        Value::Object(fields) => map(fields),
        _ => 8,
    }
}
