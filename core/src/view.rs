//! The view: what of an episode the student sees, declared as data, the same in training and in serving.

use serde::{Deserialize, Serialize};

/// How an episode's steps become the student's prompt. Its digest is part of a student's manifest: a student refuses to be
/// served under another view than the one it learned under.
///
/// All counts are upper limits; 0 means none.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct View {
    /// Text of the system turn. Empty keeps an empty system turn (a template may otherwise put in one of its own).
    pub system: String,
    /// Whether the host's own system prompt follows `system`.
    pub host_system: bool,
    /// What of the tool specifications is shown.
    pub tools: ToolsShown,
    /// Where the goal (the first user turn, or the task's instruction) stands.
    pub goal: GoalPlace,
    /// Agent turns before the current one of which something is shown.
    pub steps_back: usize,
    /// What a turn among `steps_back` shrinks to.
    pub older: Older,
    /// Turns among `steps_back`, nearest first, that are shown whole (call and observation) instead.
    pub full_steps: usize,
    /// Characters of the last observation or user message; the end is kept.
    pub observation_chars: usize,
    /// Clauses of the last observation that share content words with the goal; 0 leaves the line out.
    pub focus: usize,
    /// Content words a clause must share with the goal.
    pub focus_overlap: usize,
    /// Tokens of the whole prompt. A longer one sheds its oldest turns first, then the beginning of the observation.
    pub max_tokens: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToolsShown {
    None,
    /// `act(action)`, a line a tool.
    Signatures,
    /// Signature and the first sentence of the description.
    Described,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GoalPlace {
    First,
    Last,
    Both,
    None,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Older {
    /// The call in compact form: `act(left)`.
    Call,
    /// The values of the call's arguments alone where the request has one tool, else the call.
    Values,
    /// The call and the first line of its observation.
    CallAndLine,
}

impl Default for View {
    /// Suits tool-calling chat agents: tool signatures, the goal after the observation, six earlier calls, one whole step.
    fn default() -> Self {
        Self {
            system: String::new(),
            host_system: false,
            tools: ToolsShown::Signatures,
            goal: GoalPlace::Last,
            steps_back: 6,
            older: Older::Call,
            full_steps: 1,
            observation_chars: 2000,
            focus: 3,
            focus_overlap: 2,
            max_tokens: 1024,
        }
    }
}
