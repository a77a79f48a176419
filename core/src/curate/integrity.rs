//! Signs that a success is not what it seems.

use crate::episode::{Actor, Content, Episode, Source, Step};

/// Success claimed without a single tool call, though the episode had tools: the episode is left out.
pub const NO_TOOL_CALL: &str = "no_tool_call";
/// A student wrote some of the steps: they are context, never targets.
pub const STUDENT_STEPS: &str = "student_steps";
/// A tool result speaks to the agent as a user would: the step that answers it is never a target.
pub const INJECTION: &str = "injected_instructions";

/// Phrases by which text inside a tool result tries to give orders. Lower case. They only flag, so that a false alarm costs
/// one step.
const INJECTED: [&str; 8] = [
    "ignore previous instructions",
    "ignore all previous",
    "ignore the above",
    "disregard previous",
    "disregard all prior",
    "you are now a",
    "new system prompt",
    "<|im_start|>",
];

/// The flags of an episode, in a fixed order.
pub fn flags(episode: &Episode) -> Vec<String> {
    let mut flags = Vec::new();
    let agent = || episode.steps.iter().filter(|s| s.source == Source::Agent);
    if !episode.tools.is_empty() && agent().all(|s| s.tool_calls.is_empty()) {
        flags.push(NO_TOOL_CALL.to_string());
    }
    if agent().any(|s| s.actor == Actor::Student) {
        flags.push(STUDENT_STEPS.to_string());
    }
    if agent().any(injected) {
        flags.push(INJECTION.to_string());
    }
    flags
}

/// True if a result of this step gives orders.
pub fn injected(step: &Step) -> bool {
    step.observations
        .iter()
        .filter_map(|o| o.content.as_ref())
        .map(Content::text)
        .any(|text| {
            let text = text.to_lowercase();
            INJECTED.iter().any(|phrase| text.contains(phrase))
        })
}
