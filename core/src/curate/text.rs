//! What an agent saw before it acted, as comparable text.

use serde_json::Value;

use crate::episode::{Content, Episode, Source, Step, ToolCall};

/// What the agent was shown before the step at `position`: the results of its last calls, or the message that came since.
pub fn seen(steps: &[Step], position: usize) -> String {
    match steps[..position]
        .iter()
        .rev()
        .find(|s| s.source != Source::System)
    {
        None => String::new(),
        Some(step) if step.source == Source::User => {
            let text = step.message.as_ref().map(Content::text).unwrap_or_default();
            normal(goal_and_rest(&text).1)
        }
        Some(step) => after(step),
    }
}

/// What came back for a step's calls.
pub fn after(step: &Step) -> String {
    let texts: Vec<String> = step
        .observations
        .iter()
        .filter_map(|o| o.content.as_ref())
        .map(Content::text)
        .collect();
    normal(&texts.join("\n"))
}

/// The goal that is in force before `position`: the task's instruction, else the goal line of the last user message that
/// has one, else the first user message.
pub fn goal(episode: &Episode, position: usize) -> String {
    if !episode.task.instruction.is_empty() {
        return normal(&episode.task.instruction);
    }
    let users: Vec<String> = episode.steps[..position]
        .iter()
        .filter(|s| s.source == Source::User)
        .filter_map(|s| s.message.as_ref())
        .map(Content::text)
        .collect();
    let with_line = users
        .iter()
        .rev()
        .find_map(|text| goal_and_rest(text).0.map(str::to_owned));
    normal(
        &with_line
            .or_else(|| users.first().cloned())
            .unwrap_or_default(),
    )
}

/// Splits off a first line that begins with `Goal:` or `Task:`.
fn goal_and_rest(text: &str) -> (Option<&str>, &str) {
    let text = text.trim_start();
    let (first, rest) = text.split_once('\n').unwrap_or((text, ""));
    match first
        .strip_prefix("Goal:")
        .or_else(|| first.strip_prefix("Task:"))
    {
        Some(goal) => (Some(goal.trim()), rest),
        None => (None, text),
    }
}

/// Words separated by single spaces, without empty lines.
pub fn normal(text: &str) -> String {
    let lines = text
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "));
    lines
        .filter(|line| !line.is_empty())
        .collect::<Vec<_>>()
        .join("\n")
}

/// What the agent did, with the order of object keys made irrelevant. Plain text counts as an action of its own.
pub fn action(step: &Step) -> String {
    if step.tool_calls.is_empty() {
        return format!(
            "text:{}",
            normal(&step.message.as_ref().map(Content::text).unwrap_or_default())
        );
    }
    step.tool_calls
        .iter()
        .map(call)
        .collect::<Vec<_>>()
        .join("\n")
}

/// One call as canonical text.
pub fn call(call: &ToolCall) -> String {
    let mut out = call.name.clone();
    match &call.arguments_raw {
        Some(raw) if call.is_unparseable() => out.push_str(raw),
        _ => canonical(&call.arguments, &mut out),
    }
    out
}

fn canonical(value: &Value, out: &mut String) {
    match value {
        Value::Object(map) => {
            let mut keys: Vec<_> = map.keys().collect();
            keys.sort();
            out.push('{');
            for (i, key) in keys.into_iter().enumerate() {
                if i > 0 {
                    out.push(',');
                }
                out.push_str(&Value::String(key.clone()).to_string());
                out.push(':');
                canonical(&map[key], out);
            }
            out.push('}');
        }
        Value::Array(items) => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                if i > 0 {
                    out.push(',');
                }
                canonical(item, out);
            }
            out.push(']');
        }
        // `serde_json` is built with `preserve_order`; only objects need care.
        other => out.push_str(&other.to_string()),
    }
}

/// Words in lower case.
pub fn words(text: &str) -> impl Iterator<Item = String> + '_ {
    text.split(|c: char| !c.is_alphanumeric() && c != '_')
        .filter(|w| !w.is_empty())
        .map(str::to_lowercase)
}

/// Cuts at new lines, semicolons, commas and at full stops that end a word, not at those inside a number.
pub fn clauses(text: &str) -> impl Iterator<Item = &str> {
    text.split(['\n', ';', ','])
        .flat_map(|part| part.split(". "))
        .map(|c| c.trim_matches(|c: char| c == '.' || c == ' '))
}
