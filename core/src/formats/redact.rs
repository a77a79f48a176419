//! What a policy's `redact` makes of steps and episodes, before they are written.

use serde_json::Value;

use crate::episode::{Content, Episode, Observation, Source, Step, ToolCall};
use crate::policy::{HookFailed, RedactInfo};
use crate::store::Record;

/// The policy's hook: `Ok(None)` drops the text.
pub type RedactHook<'a> = dyn FnMut(RedactInfo) -> Result<Option<String>, HookFailed> + 'a;

/// Sends the texts of a record through the hook, and names the roles in which something changed. Text that the hook drops becomes
/// empty. Outcomes are the host's own words and are not asked about.
///
/// # Errors
/// The hook failed; the record is then half done and must not be written.
pub fn redact_record(
    record: &mut Record,
    hook: &mut RedactHook,
) -> Result<Vec<String>, HookFailed> {
    let mut changed: Vec<String> = Vec::new();
    let mut noted = |info: RedactInfo| {
        let (role, before) = (info.role.clone(), info.content.clone());
        let after = hook(info)?;
        if after.as_ref() != Some(&before) && !changed.contains(&role) {
            changed.push(role);
        }
        Ok(after)
    };
    match record {
        Record::Begin(episode) => {
            redact_text(&mut episode.task.instruction, "user", &mut noted)?;
            for step in &mut episode.steps {
                redact_step(step, &mut noted)?;
            }
        }
        Record::Step { step, .. } => redact_step(step, &mut noted)?,
        Record::Observation { observation, .. } => redact_observation(observation, &mut noted)?,
        Record::Counterfactual { value, .. } => {
            if let Some(message) = value.message.as_mut() {
                redact_text(message, "assistant", &mut noted)?;
            }
            redact_calls(&mut value.tool_calls, &mut noted)?;
        }
        Record::Outcome { .. } | Record::Incomplete { .. } | Record::Drop { .. } => {}
    }
    if let (Record::Step { step, .. }, false) = (record, changed.is_empty()) {
        // They spell out what was taken away.
        step.token_ids = None;
    }
    Ok(changed)
}

/// Sends the task's instruction and every text of the steps through the hook, as a recording does one by one, and notes in the
/// provenance the roles in which something changed. Other fields of a file (`extra`) are not text for a model and stay.
///
/// # Errors
/// The hook failed; the episode is then half done and must not be written.
pub fn redact_episode(episode: &mut Episode, hook: &mut RedactHook) -> Result<(), HookFailed> {
    let mut changed: Vec<String> = Vec::new();
    let mut noted = |info: RedactInfo| {
        let (role, before) = (info.role.clone(), info.content.clone());
        let after = hook(info)?;
        if after.as_ref() != Some(&before) && !changed.contains(&role) {
            changed.push(role);
        }
        Ok(after)
    };
    redact_text(&mut episode.task.instruction, "user", &mut noted)?;
    for step in &mut episode.steps {
        redact_step(step, &mut noted)?;
    }
    for role in changed {
        if !episode.provenance.redactions.contains(&role) {
            episode.provenance.redactions.push(role);
        }
    }
    Ok(())
}

/// Sends one text through the hook, unless it is empty.
pub fn redact_text(text: &mut String, role: &str, hook: &mut RedactHook) -> Result<(), HookFailed> {
    if !text.is_empty() {
        let info = RedactInfo {
            role: role.into(),
            tool: None,
            content: std::mem::take(text),
        };
        *text = hook(info)?.unwrap_or_default();
    }
    Ok(())
}

fn redact_step(step: &mut Step, hook: &mut RedactHook) -> Result<(), HookFailed> {
    let role = match step.source {
        Source::System => "system",
        Source::User => "user",
        Source::Agent => "assistant",
    };
    redact_content(&mut step.message, role, hook)?;
    if let Some(reasoning) = step.reasoning.as_mut() {
        redact_text(reasoning, role, hook)?;
    }
    redact_calls(&mut step.tool_calls, hook)?;
    for observation in &mut step.observations {
        redact_observation(observation, hook)?;
    }
    Ok(())
}

fn redact_calls(calls: &mut [ToolCall], hook: &mut RedactHook) -> Result<(), HookFailed> {
    for call in calls {
        let before = call
            .arguments_raw
            .clone()
            .unwrap_or_else(|| call.arguments.to_string());
        let info = RedactInfo {
            role: "arguments".into(),
            tool: Some(call.name.clone()),
            content: before.clone(),
        };
        let after = hook(info)?.unwrap_or_else(|| "{}".into());
        if after != before {
            call.arguments = serde_json::from_str(&after).unwrap_or(Value::Null);
            call.arguments_raw = call.arguments.is_null().then_some(after);
        }
    }
    Ok(())
}

fn redact_observation(
    observation: &mut Observation,
    hook: &mut RedactHook,
) -> Result<(), HookFailed> {
    redact_content(&mut observation.content, "tool", hook)
}

fn redact_content(
    content: &mut Option<Content>,
    role: &str,
    hook: &mut RedactHook,
) -> Result<(), HookFailed> {
    match content {
        None => Ok(()),
        Some(Content::Text(text)) => redact_text(text, role, hook),
        Some(Content::Parts(parts)) => {
            for part in parts {
                if let Some(Value::String(text)) = part.get_mut("text") {
                    redact_text(text, role, hook)?;
                }
            }
            Ok(())
        }
    }
}
