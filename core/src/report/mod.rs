//! The report: plain numbers in, one self-contained HTML page out. [`render`] reads no store and no clock.
//!
//! The page opens without a server, runs no script, loads nothing, follows the reader's light or dark setting, and escapes
//! every string it is given: task names, reasons and policy names may come from a hostile episode.

mod chart;
mod drift;
mod gain;
mod gather;
mod html;
mod machine;
mod page;

use serde::{Deserialize, Serialize};

pub use drift::drift_svg;
pub use gain::{gain_markdown, gain_svg, reach, signed};
pub use gather::{answers, player, succeeded, timeline};
pub use html::utc;
pub use machine::{disk_free_bytes, machine, Machine};

/// Most bars of the chart "who answered".
pub const MAX_BUCKETS: usize = 48;
/// Most points of a loss curve that are drawn; longer curves are thinned evenly.
pub const MAX_CURVE_POINTS: usize = 400;
/// Longest text shown in one place, in characters; the rest is cut with an ellipsis.
pub const MAX_TEXT_CHARS: usize = 400;

/// Everything the page shows. All fields may be left at their defaults; a section without data says so or is left out.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ReportData {
    /// Version of the library that wrote the page.
    pub version: String,
    pub generated_at_ms: u64,
    /// What the reader calls this store; the name of its folder is a good choice.
    pub store: String,
    pub totals: Totals,
    /// Version of the promoted student; `None` while the teacher (or the untrained base) answers.
    pub serving: Option<u64>,
    /// Version of the candidate in shadow or canary.
    pub on_trial: Option<u64>,
    pub timeline: Vec<Bucket>,
    /// Promotions, rollbacks and the like, drawn over the timeline.
    pub events: Vec<Mark>,
    /// One row for each who played whole episodes: teacher, untrained base, each student.
    pub success: Vec<SuccessRow>,
    pub curves: Vec<Curve>,
    /// Newest first.
    pub gates: Vec<GateRecord>,
    pub dataset: Option<DatasetSummary>,
    /// Newest first.
    pub students: Vec<StudentRow>,
    /// Newest first.
    pub jobs: Vec<JobRow>,
    pub policy: PolicyRow,
    pub machine: Vec<Fact>,
}

/// Counts over the whole store.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Totals {
    pub episodes: u64,
    pub steps: u64,
    pub successes: u64,
    pub failures: u64,
    pub unknown: u64,
    pub open: u64,
    pub teacher_steps: u64,
    /// Steps whose answer came from the student: each is a call to the teacher that was not made.
    pub student_steps: u64,
    /// Steps in which the student was asked and the teacher answered.
    pub deferred_steps: u64,
}

/// Who answered a step, as the timeline counts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answered {
    Teacher,
    Student,
    /// The student was asked; the teacher answered.
    Deferred,
}

/// Steps answered between two moments.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Bucket {
    pub start_ms: u64,
    pub end_ms: u64,
    pub teacher: u64,
    pub student: u64,
    pub deferred: u64,
}

/// A moment worth a line in the timeline.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Mark {
    pub unix_ms: u64,
    /// Two or three words: `student 2 promoted`.
    pub label: String,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Player {
    #[default]
    Teacher,
    Base,
    Student,
}

/// Success on whole live episodes with a known outcome.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SuccessRow {
    pub player: Player,
    /// `Teacher`, `Student 2`, `Untrained student`.
    pub label: String,
    pub successes: u64,
    pub episodes: u64,
    /// 95 % Wilson interval: right if looked at once.
    pub wilson: [f64; 2],
    /// Anytime-valid interval: right however often it is looked at. `None` where none was computed.
    pub anytime: Option<[f64; 2]>,
}

/// Loss of one job over the tokens it trained on, in nats a token.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Curve {
    pub job: u64,
    pub version: Option<u64>,
    /// `(tokens, loss)`.
    pub train: Vec<(f64, f64)>,
    pub held_out: Vec<(f64, f64)>,
    /// Tokens at the checkpoint that was kept.
    pub kept_at: Option<f64>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StageState {
    Passed,
    Refused,
    Running,
    /// Not reached yet, or never will be.
    #[default]
    Waiting,
}

/// How one student went through the gate.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct GateRecord {
    pub version: u64,
    pub student: String,
    /// The verdict in words: `promoted`, `held`, `rejected`, `on trial`, `rolled back`.
    pub verdict: String,
    /// Why, and what is missing: a sentence each.
    pub reasons: Vec<String>,
    /// In order: offline, shadow, canary, promotion.
    pub stages: Vec<Stage>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Stage {
    pub name: String,
    pub state: StageState,
    /// What was found, in one sentence.
    pub sentence: String,
    pub reasons: Vec<String>,
    pub facts: Vec<Fact>,
}

/// A name with a value, both as the reader should see them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Fact {
    pub name: String,
    pub value: String,
}

impl Fact {
    pub fn new(name: impl Into<String>, value: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            value: value.into(),
        }
    }
}

/// The newest dataset: what went in, what stayed out, and why.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DatasetSummary {
    pub hash: String,
    pub episodes_seen: u64,
    pub episodes_kept: u64,
    pub samples_train: u64,
    pub samples_held_out: u64,
    pub tokens: u64,
    /// Tokens that carry loss: the teacher's own words.
    pub target_tokens: u64,
    pub left_out: Vec<LeftOutRow>,
    pub masked: Vec<MaskedRow>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LeftOutRow {
    /// A phrase that completes "left out because ...".
    pub reason: String,
    pub episodes: u64,
    /// A few of them: id and task.
    pub examples: Vec<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MaskedRow {
    pub reason: String,
    pub steps: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct StudentRow {
    pub version: u64,
    pub id: String,
    /// Id or name of what it was trained from.
    pub parent: String,
    /// Version of the parent, if that is a student.
    pub parent_version: Option<u64>,
    /// `lora`, `upper`, `full`.
    pub method: String,
    /// `promoted`, `candidate`, `held`, `retired`, ...
    pub state: String,
    pub created_at_ms: u64,
    pub held_out_exact: Option<f64>,
    pub held_out_loss: Option<f64>,
    pub trained_tokens: u64,
    pub dataset: String,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct JobRow {
    pub job: u64,
    pub state: String,
    pub started_at_ms: u64,
    pub seconds: Option<f64>,
    pub tokens: u64,
    pub message: String,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PolicyRow {
    pub name: String,
    pub digest: String,
    pub hooks: Vec<crate::policy::HookStats>,
}

/// The page as one string of HTML. Pure: the same data gives the same bytes.
pub fn render(data: &ReportData) -> String {
    page::page(data)
}

#[cfg(test)]
mod tests;
