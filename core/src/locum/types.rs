//! The plain values that cross the facade: what a host gives and gets.

use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::device::DeviceOptions;
use crate::episode::{Actor, Agent, EpisodeId, Task, ToolCall, ToolSpec};
use crate::model::WeightFormat;
use crate::policy::{HookStats, Policy, Who};
use crate::secrets::Detect;

/// How to open a store. `Default` is what most hosts want.
#[derive(Clone, Default)]
pub struct Options {
    /// Folder of the store; created if absent.
    pub store_dir: PathBuf,
    /// Hugging Face folder of the base model; `None` takes the one imported into the store, if any.
    pub base: Option<PathBuf>,
    /// Threads that serve; 0 = all cores.
    pub threads: usize,
    /// Threads that train in the background; 0 = all cores, at low priority.
    pub train_threads: usize,
    /// `None` is [`crate::policy::TeacherFirst`].
    pub policy: Option<Arc<dyn Policy>>,
    /// Record, but never start a job.
    pub no_learning: bool,
    /// Load no model: recording and reading only.
    pub no_model: bool,
    /// Largest size of the database, models not counted; 0 = no limit. There recording stops with a clear error, unless the oldest
    /// may go.
    pub max_disk_bytes: u64,
    /// At that limit the oldest episodes that have ended are dropped, so that recording goes on.
    pub drop_oldest: bool,
    /// Bytes for KV caches kept for prefix reuse; 0 = the default limit.
    pub max_cache_bytes: usize,
    /// Numbers in which models in service keep their weights.
    pub weights: WeightFormat,
    /// Whether a graphics processor is used, where its object is, and how much of its memory.
    pub device: DeviceOptions,
    /// Which secrets are looked for in everything recorded, and replaced before it is written; all by default.
    pub detect: Detect,
}

/// What is known of an episode when it begins.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct EpisodeStart {
    pub task: Task,
    pub agent: Agent,
    pub tools: Vec<ToolSpec>,
    pub session_id: Option<String>,
    pub extra: Map<String, Value>,
    /// Whom the episode belongs to; empty where the host keeps nobody apart. Students learn from one scope and answer in it only.
    pub scope: String,
}

/// What a host knows of a message beside its content.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct StepMeta {
    /// Who wrote an assistant message. `Unknown` is never trained on.
    pub actor: Actor,
    pub model: Option<String>,
    pub cost_usd: Option<f64>,
    pub latency_ms: Option<u32>,
    pub unix_ms: Option<u64>,
    /// For tool results: the call failed.
    pub is_error: bool,
}

/// One step to be decided: the host's whole history and what the agent may do.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// OpenAI chat messages.
    pub messages: Vec<Value>,
    pub tools: Vec<ToolSpec>,
    /// A plain text answer is allowed beside tool calls (`tool_choice: auto`).
    pub allow_text: bool,
    /// 0 = default.
    pub max_tokens: u32,
    /// 0 = default.
    pub deadline_ms: u32,
    /// 0 = greedy.
    pub temperature: f32,
    pub seed: u64,
}

impl Default for Request {
    fn default() -> Self {
        Self {
            messages: Vec::new(),
            tools: Vec::new(),
            allow_text: true,
            max_tokens: 0,
            deadline_ms: 0,
            temperature: 0.0,
            seed: 0,
        }
    }
}

/// Why a decision fell as it did; stable numbers for hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(i32)]
pub enum ReasonCode {
    /// The policy or the gate's stage decided.
    Policy = 0,
    NoStudent = 1,
    Shadow = 2,
    CanaryTeacher = 3,
    CanaryStudent = 4,
    Promoted = 5,
    Pinned = 6,
    BadRequest = 7,
    ToolsInexpressible = 8,
    PromptTooLong = 9,
    ViewMismatch = 10,
    Late = 11,
    Refused = 12,
    Fault = 13,
    Closed = 14,
    /// What the student learned while it read moved a layer too far, and was undone.
    Drifted = 15,
}

/// Who plays a step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    pub who: Who,
    pub reason: String,
    pub reason_code: ReasonCode,
    pub student: Option<String>,
    /// 0 if no student is meant.
    pub version: u64,
    /// Share of held-out steps on which the student equalled the teacher; 0 if unknown.
    pub confidence: f32,
    pub decided_ns: u64,
}

/// A student's finished answer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Answer {
    /// OpenAI assistant message.
    pub message: Value,
    pub calls: Vec<ToolCall>,
    pub text: Option<String>,
    /// `tool_calls`, `stop` or `length`.
    pub finish_reason: String,
    pub student: String,
    pub version: u64,
    /// Product of the free tokens' probabilities under the grammar.
    pub confidence: f32,
    pub mean_logprob: f32,
    pub prompt_ids: Vec<u32>,
    pub reply_ids: Vec<u32>,
    pub cached_tokens: usize,
    pub queue_ms: f32,
    pub prefill_ms: f32,
    pub decode_ms: f32,
}

/// A generation that ended without an answer to use.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum AnswerError {
    /// The host asks its teacher. The reason is recorded.
    #[error("ask the teacher: {reason}")]
    Teacher { reason: String, code: ReasonCode },
    #[error("the call was cancelled")]
    Cancelled,
    #[error("the call is still running")]
    Running,
}

/// Text that came since the last poll.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Polled {
    pub new_text: String,
    pub done: bool,
}

/// Which student answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pin {
    /// What the gate promoted.
    #[default]
    Automatic,
    /// This version, whatever the gate said.
    Student(u64),
    /// The base model as imported.
    Base,
    /// Nobody but the teacher.
    Teacher,
}

/// Settings of one distillation. `None` and absent fields are the policy's recipe, then the built-in one.
///
/// As JSON the knobs stand beside the other fields, and `"promote": "never"` is another way to say `"trial": false`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Value")]
pub struct DistilOptions {
    #[serde(flatten)]
    pub knobs: crate::policy::RecipeKnobs,
    /// Train on everything that ended, success or not, with no step masked: a comparison, never promoted by itself.
    pub unfiltered: bool,
    /// Start from the promoted student instead of the base.
    pub continue_student: bool,
    /// Put the result before the gate and the live trial. `false` only stores it.
    pub trial: Option<bool>,
    /// Only episodes of this scope are learned from, and the student answers in it only; empty means those without one.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub scope: String,
}

impl TryFrom<Value> for DistilOptions {
    type Error = String;

    fn try_from(value: Value) -> Result<Self, String> {
        let Value::Object(mut map) = value else {
            return Err("the settings of a job are a JSON object".into());
        };
        let flag = |map: &mut Map<String, Value>, name: &str| match map.remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(b)),
            Some(other) => Err(format!("{name} is {other}, true or false is expected")),
        };
        let unfiltered = flag(&mut map, "unfiltered")?.unwrap_or(false);
        let continue_student = flag(&mut map, "continue_student")?.unwrap_or(false);
        let scope = match map.remove("scope") {
            None | Some(Value::Null) => String::new(),
            Some(Value::String(scope)) => scope,
            Some(other) => return Err(format!("scope is {other}, a string is expected")),
        };
        let mut trial = flag(&mut map, "trial")?;
        match map.remove("promote") {
            None | Some(Value::Null) => {}
            Some(Value::String(word)) if word == "auto" => trial = Some(true),
            Some(Value::String(word)) if word == "never" => trial = Some(false),
            Some(other) => {
                return Err(format!(
                    "promote is {other}, \"auto\" or \"never\" is expected"
                ))
            }
        }
        let knobs = serde_json::from_value(Value::Object(map)).map_err(|e| e.to_string())?;
        Ok(Self {
            knobs,
            unfiltered,
            continue_student,
            trial,
            scope,
        })
    }
}

/// Where a job or its candidate stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    #[default]
    Queued,
    Curating,
    Training,
    Saving,
    Evaluating,
    Shadow,
    Canary,
    Promoted,
    /// Refused or put aside; `message` says why and what is missing.
    Held,
    /// Stored without a trial, as asked.
    Stored,
    Cancelled,
    Failed,
}

impl JobState {
    /// True while the background thread works on the job.
    pub fn is_running(self) -> bool {
        matches!(
            self,
            Self::Queued | Self::Curating | Self::Training | Self::Saving | Self::Evaluating
        )
    }
    /// True while the job's candidate is tried on live episodes.
    pub fn is_trial(self) -> bool {
        matches!(self, Self::Shadow | Self::Canary)
    }
}

/// A distillation job as others see it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct JobStatus {
    pub job: u64,
    pub state: JobState,
    /// 0 to 1 within training and evaluation together.
    pub progress: f64,
    pub tokens_done: u64,
    pub tokens_total: u64,
    /// Seconds of training in which it waited, because a step was decided or because it was paused; not in `seconds`.
    pub held_seconds: f64,
    /// Of `tokens_done`, those that were not computed because another sample of their step begins with them too.
    pub tokens_shared: u64,
    pub loss: Option<f64>,
    pub held_out_loss: Option<f64>,
    pub seconds: f64,
    pub seconds_left: Option<f64>,
    pub tokens_per_second: Option<f64>,
    pub episodes_seen: u64,
    pub episodes_kept: u64,
    pub samples: u64,
    pub student: Option<String>,
    pub version: u64,
    pub message: String,
    pub shadow_steps: u64,
    pub canary_student: u64,
    pub canary_teacher: u64,
    pub created_at_ms: u64,
}

/// A student as lists show it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct StudentSummary {
    pub version: u64,
    pub id: String,
    pub parent: Option<String>,
    pub job: u64,
    pub method: String,
    /// `candidate`, `shadow`, `canary`, `promoted`, `held`, `stored`, `retired`.
    pub state: String,
    pub current: bool,
    pub pinned: bool,
    pub created_at_ms: u64,
    pub trained_tokens: u64,
    pub train_seconds: f64,
    pub episodes: u64,
    /// Episodes it learned from, or its ancestors did, that were erased since: it should be retrained without them.
    pub erased: u64,
    /// The scope that it learned from and answers in.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub scope: String,
    pub held_out_exact: Option<f64>,
    pub held_out_loss: Option<f64>,
    pub bytes: u64,
    pub verdict: String,
    /// Whether its fast weights are on when it serves, and why; empty without TTT layers.
    pub fast_weights: String,
}

/// Counters and states, for `stats`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Stats {
    pub episodes: u64,
    pub open_episodes: u64,
    pub successes: u64,
    pub failures: u64,
    pub unknown: u64,
    pub steps: u64,
    pub steps_by_teacher: u64,
    pub steps_by_student: u64,
    /// Times the student was asked and the teacher answered in the end.
    pub deferrals: u64,
    pub deferral_reasons: Map<String, Value>,
    pub busy: u64,
    pub queued: u64,
    pub store_errors: u64,
    /// Episodes dropped because the store was at its size limit, since it was opened here.
    pub dropped_episodes: u64,
    pub store_bytes: u64,
    pub base: Option<String>,
    pub current: Option<String>,
    pub current_version: u64,
    pub pin: Pin,
    pub candidate: Option<String>,
    pub candidate_version: u64,
    pub stage: String,
    pub job: Option<JobStatus>,
    pub engine: EngineStats,
    pub policy: String,
    pub hooks: Vec<HookStats>,
    pub faulted: Option<String>,
    pub events_dropped: u64,
}

/// Counters of the student's engine.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct EngineStats {
    pub running: u64,
    pub waiting: u64,
    pub finished: u64,
    pub cancelled: u64,
    pub late: u64,
    pub prompt_tokens: u64,
    pub cached_tokens: u64,
    pub reply_tokens: u64,
    pub cache_bytes: u64,
    /// Updates of the down-projections that learn while they read; those taken back for having drifted past their cap; and the
    /// largest drift that stayed.
    pub fast_updates: u64,
    pub fast_trips: u64,
    pub fast_drift: f64,
    pub prefill_tok_s: f64,
    pub decode_tok_s: f64,
    pub kernels: String,
    /// What computes: a card, or the processor and why.
    pub device: String,
}

/// Something that happened; drained by the host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    pub kind: EventKind,
    /// Job number, student version or call number, by kind.
    pub subject: u64,
    pub number: i64,
    pub detail: Value,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(i32)]
pub enum EventKind {
    CallDone = 1,
    JobProgress = 2,
    JobState = 3,
    StudentSwapped = 4,
    RolledBack = 5,
    StoreTrouble = 6,
    PolicyLoaded = 7,
    Fault = 8,
    /// What a student learned in an episode was undone; it plays the rest of it as it was trained.
    FastWeights = 9,
    /// Episodes were erased; `detail` names the students that had learned from them.
    Forgotten = 10,
    /// A hook of the policy failed too often and is off until the policy is loaded again.
    HookOff = 11,
}

/// Reference to an episode that has begun and not ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EpisodeHandle(pub EpisodeId);
