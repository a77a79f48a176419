//! The view: what of an episode the student sees, declared as data, the same in training and in serving.

mod focus;
mod render;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::limits::{MAX_POLICY_BYTES, MAX_PROMPT_TOKENS};

pub use focus::focus;

/// How an episode's steps become the student's prompt. Its digest is part of a student's manifest: a student refuses to be
/// served under another view than the one it learned under.
///
/// All counts are upper limits; 0 means none.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct View {
    /// Text of the system turn. Empty means no system turn at all, also where a template would put in one of its own.
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
    /// Turns among `steps_back`, nearest first, that are shown whole (call and what came back) as well. The last turn does
    /// not count: what came back for it is the observation, which is shown anyway.
    pub full_steps: usize,
    /// Characters of the last observation or user message; the end is kept.
    pub observation_chars: usize,
    /// Whether the history stands as turns of the chat, each as it was, instead of in one user turn. A prompt then begins with the
    /// one before it, so that a step reads what is new alone, and a training row holds a whole episode. `older`, `full_steps` do
    /// nothing then, and a goal that stands last follows every observation.
    #[serde(skip_serializing_if = "is_false")]
    pub turns: bool,
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
            turns: false,
            observation_chars: 2000,
            focus: 3,
            focus_overlap: 2,
            max_tokens: 1024,
        }
    }
}

/// What the student is given to read: the texts of a system turn (none if empty), of earlier turns, and of the user turn to answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prompt {
    pub system: String,
    /// What the user said and what was replied, oldest first; none unless the view shows turns.
    pub earlier: Vec<(String, String)>,
    pub user: String,
}

/// Why a view cannot be used, or a step not be shown under it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ViewError {
    /// A field of the view is outside its range.
    #[error("view.{field} is {found}, {expected} is expected")]
    OutOfRange {
        field: &'static str,
        found: usize,
        expected: String,
    },
    /// What may not be shed (system turn, tools, goal) is alone too long.
    #[error("system, tools and goal alone take {found} tokens, the view allows {limit}")]
    TooLong { found: usize, limit: usize },
}

/// Changes whenever the code renders the same view differently.
const VERSION: &str = "locum-view/1";
/// Most turns that a view may look back.
const MAX_STEPS_BACK: usize = 256;
/// Most focus clauses.
const MAX_FOCUS: usize = 32;

// Left out where it is false, or the digests of all older students would change.
fn is_false(flag: &bool) -> bool {
    !flag
}

impl View {
    /// SHA-256 (hex) of what decides the rendering. Fields that have no effect next to the others (`focus_overlap` where
    /// `focus` is 0, say) do not change it.
    pub fn digest(&self) -> String {
        let mut effective = self.clone();
        let default = View::default();
        effective.full_steps = self.full_steps.min(self.steps_back.saturating_sub(1));
        effective.focus_overlap = self.focus_overlap.max(1);
        if self.focus == 0 {
            effective.focus_overlap = default.focus_overlap;
        }
        if self.turns {
            effective.full_steps = default.full_steps;
        }
        if self.steps_back == 0 || self.turns {
            effective.older = default.older;
        }
        let json = serde_json::to_string(&effective).expect("a view is plain data");
        Sha256::digest(format!("{VERSION}\n{json}"))
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect()
    }

    /// This view of whole episodes: all that fits a prompt, as turns.
    pub fn whole(&self) -> View {
        View {
            turns: true,
            steps_back: MAX_STEPS_BACK,
            max_tokens: MAX_PROMPT_TOKENS,
            ..self.clone()
        }
    }

    /// Whether every field is in its range.
    ///
    /// # Errors
    /// Names the first field that is not.
    pub fn check(&self) -> Result<(), ViewError> {
        let ranges = [
            ("system", self.system.len(), 0, MAX_POLICY_BYTES),
            ("steps_back", self.steps_back, 0, MAX_STEPS_BACK),
            ("full_steps", self.full_steps, 0, MAX_STEPS_BACK),
            ("focus", self.focus, 0, MAX_FOCUS),
            ("max_tokens", self.max_tokens, 1, MAX_PROMPT_TOKENS),
        ];
        for (field, found, least, most) in ranges {
            if !(least..=most).contains(&found) {
                return Err(ViewError::OutOfRange {
                    field,
                    found,
                    expected: format!("{least} to {most}"),
                });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
