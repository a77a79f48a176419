//! What is recorded: episodes, steps, tool calls, observations, outcomes. Plain values with public fields, shared by every room.
//!
//! The shape is that of ATIF (Agent Trajectory Interchange Format) with what training needs added:
//! who acted, with which weights, why, and how it ended.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Version tag of [`Episode`] in files.
pub const SCHEMA: &str = "locum/1";

/// 128-bit id of an episode: 48 bits of milliseconds since 1970, then random bits, so ids sort by time.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct EpisodeId(pub [u8; 16]);

impl EpisodeId {
    /// Builds an id from a time and 80 random bits (the low 80 bits of `random` are used).
    pub fn new(unix_ms: u64, random: u128) -> Self {
        let value = ((unix_ms as u128) << 80) | (random & ((1u128 << 80) - 1));
        Self(value.to_be_bytes())
    }
}

impl fmt::Display for EpisodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl fmt::Debug for EpisodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text is not 32 hexadecimal digits.
#[derive(Debug, thiserror::Error)]
#[error("not an episode id: {0:?} (32 hexadecimal digits are expected)")]
pub struct BadEpisodeId(pub String);

impl FromStr for EpisodeId {
    type Err = BadEpisodeId;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.len() != 32 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(BadEpisodeId(text.chars().take(64).collect()));
        }
        let value = u128::from_str_radix(text, 16).map_err(|_| BadEpisodeId(text.into()))?;
        Ok(Self(value.to_be_bytes()))
    }
}

impl Serialize for EpisodeId {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for EpisodeId {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// One task from first message to outcome.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Episode {
    pub schema: String,
    pub episode_id: EpisodeId,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent_id: Option<EpisodeId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub continued_from: Option<EpisodeId>,
    pub task: Task,
    #[serde(default)]
    pub agent: Agent,
    #[serde(default)]
    pub tools: Vec<ToolSpec>,
    #[serde(default)]
    pub steps: Vec<Step>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<Outcome>,
    /// False while the host has not ended the episode. Only closed episodes can train.
    #[serde(default)]
    pub closed: bool,
    /// True if a step was lost to redaction, a full queue or a crash: such an episode never trains.
    #[serde(default)]
    pub incomplete: bool,
    #[serde(default)]
    pub started_at_ms: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at_ms: Option<u64>,
    #[serde(default)]
    pub provenance: Provenance,
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub extra: Map<String, Value>,
    /// Whom it belongs to (a tenant, a project); empty where the host keeps nobody apart. Datasets and students never leave a scope.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub scope: String,
}

/// What was to be done. `group_key` is what the held-out split is made by: episodes of one group never stand on both sides.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// Identifies the task itself (level and seed, ticket number). Empty if the host gives none.
    #[serde(default)]
    pub id: String,
    /// Family of tasks, used for slices in reports.
    #[serde(default)]
    pub domain: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group_key: Option<String>,
    #[serde(default)]
    pub instruction: String,
    /// Set by an import whose source has a split of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub split: Option<Split>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    Train,
    HeldOut,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Agent {
    #[serde(default)]
    pub name: String,
    #[serde(default)]
    pub version: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Provenance {
    /// `live`, `openai-chat`, `tau-bench`, `intercode`, ...
    #[serde(default)]
    pub source_format: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub imported_at_ms: Option<u64>,
    /// Names of the redactions that changed something.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub redactions: Vec<String>,
}

/// An OpenAI-style function specification.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ToolSpec {
    pub name: String,
    #[serde(default)]
    pub description: String,
    /// JSON schema of the arguments object.
    #[serde(default)]
    pub parameters: Value,
    /// Fields of the original that have no place above (`strict`, ...).
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub extra: Map<String, Value>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    System,
    #[default]
    User,
    Agent,
}

/// Who produced a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Actor {
    #[default]
    Unknown,
    Teacher,
    Student,
    Human,
    Script,
}

/// One turn. An agent's step carries its tool calls and what came back for them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// Counted from 1 within the episode, without gaps.
    pub index: u32,
    pub source: Source,
    #[serde(default)]
    pub actor: Actor,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Id of the student that spoke.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weights_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<Content>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub observations: Vec<Observation>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
    /// SHA-256 (hex) of the prompt tokens that the student answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_digest: Option<String>,
    /// Exact tokens of a student's prompt and reply.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<TokenIds>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decision: Option<DecisionRecord>,
    /// What the one who did not act would have done: a shadow student, or the teacher after a deferral.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub counterfactual: Option<Counterfactual>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<Label>,
    /// Context repeated from another episode: never trained on.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub copied_context: bool,
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub extra: Map<String, Value>,
}

/// Text, or OpenAI-style content parts kept as they came.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Content {
    Text(String),
    Parts(Vec<Value>),
}

impl Content {
    /// The text of the content; the text parts joined by a new line where there are parts.
    pub fn text(&self) -> String {
        match self {
            Content::Text(text) => text.clone(),
            Content::Parts(parts) => parts
                .iter()
                .filter_map(|part| {
                    part.get("text")
                        .and_then(Value::as_str)
                        .or_else(|| part.as_str())
                })
                .collect::<Vec<_>>()
                .join("\n"),
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ToolCall {
    pub id: String,
    pub name: String,
    /// Arguments as a JSON object; `Null` if they could not be parsed.
    #[serde(default)]
    pub arguments: Value,
    /// The arguments as they came, kept if parsing and printing them again would not give the same bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arguments_raw: Option<String>,
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub extra: Map<String, Value>,
}

impl ToolCall {
    /// True if the arguments were not a JSON object: such a step is never trained on.
    pub fn is_unparseable(&self) -> bool {
        !self.arguments.is_object()
    }
}

/// What came back for a tool call.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Observation {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub call_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<Content>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_error: bool,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub truncated: bool,
    /// `name` and other fields of the original tool message.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub extra: Map<String, Value>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Usage {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_tokens: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completion_tokens: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cost_usd: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency_ms: Option<u32>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenIds {
    pub prompt: Vec<u32>,
    pub reply: Vec<u32>,
}

/// Who was asked to play a step, and why.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DecisionRecord {
    /// Who answered in the end.
    pub served: Actor,
    /// True if the student was asked and its answer was not used.
    #[serde(default)]
    pub deferred: bool,
    pub reason: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub student: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub confidence: Option<f32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Counterfactual {
    pub actor: Actor,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub student: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// Whether it equals what was done, by canonical tool call.
    #[serde(default)]
    pub agrees: bool,
}

/// Whether a step may be a training target, set from outside (an import's `weight`, a reviewer).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Label {
    pub train: bool,
    #[serde(default = "one")]
    pub weight: f32,
    #[serde(default)]
    pub reason: String,
}

fn one() -> f32 {
    1.0
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    Success,
    Partial,
    Failure,
    Aborted,
    /// Unknown is not failure, and unknown is never trained on.
    #[default]
    Unknown,
}

/// How an episode ended, and who says so.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    pub status: Status,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub score: Option<f64>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub criteria: Vec<Criterion>,
    #[serde(default)]
    pub integrity: Integrity,
    #[serde(default)]
    pub judge: Judge,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<String>,
    /// Why it ended, in the host's words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub extra: Map<String, Value>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Criterion {
    pub id: String,
    pub weight: f64,
    pub passed: bool,
    #[serde(default)]
    pub evidence: String,
}

/// Whether the success was honest. Separate from success itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Integrity {
    pub ok: bool,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub flags: Vec<String>,
}

impl Default for Integrity {
    fn default() -> Self {
        Self {
            ok: true,
            flags: Vec::new(),
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Judge {
    pub kind: JudgeKind,
    #[serde(default)]
    pub name: String,
    #[serde(default)]
    pub version: String,
    /// The judge knew things the agent did not.
    #[serde(default)]
    pub privileged: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JudgeKind {
    #[default]
    Host,
    Program,
    Checklist,
    Model,
    Human,
    Policy,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_episode_id_survives_being_printed_and_read() {
        let id = EpisodeId::new(1_700_000_000_000, 0x1234_5678_9abc);
        assert_eq!(id.to_string().parse::<EpisodeId>().unwrap(), id);
        assert!("xyz".parse::<EpisodeId>().is_err());
    }

    #[test]
    fn ids_sort_by_time() {
        assert!(EpisodeId::new(1, u128::MAX) < EpisodeId::new(2, 0));
    }
}
