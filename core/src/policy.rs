//! The one trait: who plays a step, what is kept, when to distil. With [`TeacherFirst`], the fallback that every failure ends in.
//!
//! A hook gets a plain value and returns a plain value. It never fails: an implementation that can fail (the Lua layer)
//! catches its own errors, counts them, and returns the fail-safe that each method names.

use serde::{Deserialize, Serialize};

use crate::episode::{Episode, Outcome, ToolCall};
use crate::view::View;

/// Decisions that belong to the operator. All methods may be called from any thread, several at once.
pub trait Policy: Send + Sync {
    /// Name and digest of the policy, stored with each decision.
    fn id(&self) -> PolicyId;
    /// How the student sees an episode. Asked once when the policy is loaded.
    fn view(&self) -> View {
        View::default()
    }
    /// Fixed settings that a policy declares as data. Asked once when the policy is loaded.
    fn settings(&self) -> Settings {
        Settings::default()
    }
    /// Who plays this step? Fail-safe: the teacher.
    fn decide(&self, step: &StepInfo) -> Choice;
    /// Keep the student's finished reply? Fail-safe: the teacher.
    fn accept(&self, reply: &ReplyInfo) -> Choice;
    /// May this tool call of the student's leave us? Fail-safe: no, so the teacher is asked.
    fn allow_tool(&self, call: &ToolInfo) -> Allow;
    /// Changes or drops text before it is written. `Ok(None)` drops the content; `Err` means the hook failed:
    /// the step is then not recorded and the episode is marked incomplete.
    fn redact(&self, step: &RedactInfo) -> Result<Option<String>, HookFailed>;
    /// Judges an episode at its end and again when a late outcome arrives. `None` keeps what the host said.
    fn label(&self, episode: &EpisodeInfo) -> Option<LabelVerdict>;
    /// May the episode enter a dataset? Fail-safe: no.
    fn curate(&self, episode: &EpisodeInfo) -> CurateVerdict;
    /// Is it time to distil? Fail-safe: wait.
    fn schedule(&self, world: &WorldInfo) -> ScheduleVerdict;
    /// Knobs of a job. `None` is the built-in recipe; values are clamped to hard bounds either way.
    fn recipe(&self, dataset: &DatasetInfo) -> Option<RecipeKnobs>;
    /// A word on a judged candidate. It can only make the built-in verdict stricter. Fail-safe: hold.
    fn gate(&self, report: &GateInfo) -> GateVote;
    /// Take the promoted student back? `None` leaves it to the built-in thresholds.
    fn rollback(&self, live: &LiveInfo) -> Option<(bool, String)>;
    /// How do the layers of a student that learn while it reads go on? Fail-safe: not at all.
    fn fast_weights(&self, _: &FastInfo) -> FastVerdict {
        FastVerdict::as_trained()
    }
    /// Whether `fast_weights` is to be asked, which costs a little of each chunk: its loss is then looked at.
    fn rules_fast_weights(&self) -> bool {
        false
    }
    /// What becomes of a stored episode, asked once a day of each that has ended? Fail-safe: it is kept.
    fn retain(&self, _: &RetainInfo) -> Retain {
        Retain::Keep
    }
    /// Whether `retain` is to be asked, which reads every episode.
    fn rules_retention(&self) -> bool {
        false
    }
    /// Told what has happened, after the fact and on a thread of Locum's. May note it, and change nothing.
    fn on_event(&self, _: &EventInfo) {}
    /// Hooks that have failed too often and are off until the policy is loaded again.
    fn switched_off(&self) -> Vec<&'static str> {
        Vec::new()
    }
    /// Counters of the hooks, for `stats`.
    fn stats(&self) -> Vec<HookStats> {
        Vec::new()
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyId {
    pub name: String,
    /// SHA-256 (hex) of the source.
    pub digest: String,
}

/// A hook raised an error, ran too long or returned nonsense.
#[derive(Clone, Debug, thiserror::Error)]
#[error("policy hook {hook}: {message}")]
pub struct HookFailed {
    pub hook: &'static str,
    /// File and line, never data.
    pub message: String,
}

/// What a policy declares as data beside its hooks. Zero or absent means the default.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    pub curate: CurateSettings,
    pub gate: GateSettings,
    pub serve: ServeSettings,
}

/// How a student plays.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ServeSettings {
    /// A call after which the agent saw what it had seen before is not made a second time in a row: the student's next likeliest
    /// call is. What curation does not teach (`mask_noops`, `mask_repeats`) is then not played either. Not for tools that are
    /// called again until something happens.
    pub avoid_repeats: bool,
}

/// Rules of curation that need no code.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CurateSettings {
    /// Most kept episodes of one task id.
    pub max_per_task: usize,
    /// Most kept episodes with the same words and actions, whatever their tasks are called: what one source says again and again
    /// teaches by its number, not by its share.
    pub max_copies: usize,
    /// Share of task groups held out, by a hash of the group.
    pub held_out: f64,
    /// Episodes whose action sequences are this similar (Jaccard index of call trigrams with their task) are near-duplicates.
    pub near_duplicate: f64,
    /// Steps that lead back to an observation seen before in the episode carry no loss (the loop is erased).
    pub mask_loops: bool,
    /// An action repeated on an unchanged observation carries no loss.
    pub mask_repeats: bool,
    /// A call whose result is an error carries no loss.
    pub mask_errors: bool,
    /// A call after which the agent sees what it saw before carries no loss.
    pub mask_noops: bool,
    /// Steps that lead away from success, judged by all episodes together, carry no loss (see `curate`).
    pub mask_derails: bool,
    /// Times an action must have been seen in a situation before it can outvote another one there.
    pub derail_support: usize,
    /// Share by which a step's value may lie below that of the best known action of its situation.
    pub derail_tolerance: f64,
    /// A success longer than this multiple of the median success of its domain is left out; 0 switches it off.
    pub max_length_ratio: f64,
}

impl Default for CurateSettings {
    fn default() -> Self {
        Self {
            max_per_task: 3,
            max_copies: 50,
            held_out: 0.1,
            near_duplicate: 0.95,
            mask_loops: true,
            mask_repeats: true,
            mask_errors: true,
            mask_noops: true,
            mask_derails: true,
            derail_support: 5,
            derail_tolerance: 0.05,
            max_length_ratio: 0.0,
        }
    }
}

/// Numbers of the gate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GateSettings {
    /// Non-inferiority margin on live success, as a share (0.05 = five points).
    pub margin: f64,
    /// Rate of wrong promotions that the live test allows, at the margin.
    pub alpha: f64,
    /// Smallest share of held-out steps whose tool call must equal the teacher's.
    pub min_exact: f64,
    /// Fewest held-out steps for an offline verdict.
    pub min_held_out_steps: usize,
    /// Shadowed steps that must have been answered by the candidate before a canary starts.
    pub shadow_steps: usize,
    /// Largest share of shadowed steps in which the candidate gave no valid answer in time.
    pub max_shadow_failures: f64,
    /// Share of live episodes that the candidate plays in the canary.
    pub canary_share: f64,
    /// Fewest canary episodes with an outcome before a promotion.
    pub min_canary: usize,
    /// Canary episodes with an outcome after which an undecided candidate is put aside.
    pub max_canary: usize,
    /// Fewest canary episodes of a domain before that domain's slice can refuse.
    pub min_slice: usize,
    /// Share of live episodes that the teacher goes on playing after a promotion, to watch for decay.
    pub keep_teacher: f64,
}

impl Default for GateSettings {
    fn default() -> Self {
        Self {
            margin: 0.05,
            alpha: 0.05,
            min_exact: 0.4,
            min_held_out_steps: 20,
            shadow_steps: 20,
            max_shadow_failures: 0.02,
            canary_share: 0.5,
            min_canary: 10,
            max_canary: 400,
            min_slice: 20,
            keep_teacher: 0.0,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Who {
    Teacher,
    Student,
}

/// A verdict on a step, with its reason and what the policy may set for the generation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Choice {
    pub who: Who,
    pub reason: String,
    #[serde(default)]
    pub temperature: Option<f32>,
    #[serde(default)]
    pub max_tokens: Option<u32>,
}

impl Choice {
    pub fn teacher(reason: impl Into<String>) -> Self {
        Self {
            who: Who::Teacher,
            reason: reason.into(),
            temperature: None,
            max_tokens: None,
        }
    }
    pub fn student(reason: impl Into<String>) -> Self {
        Self {
            who: Who::Student,
            reason: reason.into(),
            temperature: None,
            max_tokens: None,
        }
    }
}

/// Argument of `decide`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepInfo {
    pub task: String,
    pub domain: String,
    /// Agent turns already played in this episode.
    pub turn: u32,
    pub tools: Vec<String>,
    /// Bytes of the request's messages.
    pub prompt_bytes: usize,
    /// 0 where every tool of the request was in the student's training set, 1 where none was.
    pub novelty: f32,
    pub deadline_ms: u32,
    pub student: Option<StudentInfo>,
    /// `shadow`, `canary`, `promoted` or `pinned`: on what ground the student is offered.
    pub stage: String,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StudentInfo {
    pub id: String,
    pub version: u64,
    /// Success of live episodes it played; `None` before the first outcome.
    pub live_success: Option<f64>,
    pub live_episodes: u64,
    /// Share of held-out steps it answered exactly like the teacher.
    pub held_out_exact: Option<f64>,
}

/// Argument of `accept`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ReplyInfo {
    pub task: String,
    pub domain: String,
    pub text: String,
    pub tool_calls: Vec<ToolCall>,
    /// Mean log-probability of the reply's free tokens under the grammar.
    pub mean_logprob: f32,
    /// Probability of the least likely free token.
    pub min_prob: f32,
    pub tokens: u32,
    pub latency_ms: u32,
}

/// Argument of `allow_tool`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ToolInfo {
    pub task: String,
    pub domain: String,
    pub name: String,
    pub arguments: serde_json::Value,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Allow {
    Yes,
    /// The call is dropped and the teacher is asked.
    No(String),
}

/// Argument of `redact`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RedactInfo {
    /// `system`, `user`, `assistant`, `tool` or `arguments`.
    pub role: String,
    pub tool: Option<String>,
    pub content: String,
}

/// Argument of `label` and `curate`: an episode in numbers and a line a step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EpisodeInfo {
    pub id: String,
    pub task: String,
    pub domain: String,
    pub source_format: String,
    pub teacher: bool,
    pub steps: Vec<StepLine>,
    pub agent_steps: u32,
    pub error_results: u32,
    pub repeated_calls: u32,
    pub masked_steps: u32,
    /// `success`, `partial`, `failure`, `aborted` or `unknown`.
    pub status: String,
    pub score: Option<f64>,
    pub integrity_flags: Vec<String>,
    pub tags: Vec<String>,
    pub cost_usd: f64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepLine {
    pub index: u32,
    /// `system`, `user` or `agent`.
    pub source: String,
    pub call: Option<String>,
    pub is_error: bool,
    pub masked: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LabelVerdict {
    /// `success`, `partial`, `failure`, `aborted` or `unknown`.
    pub status: Option<String>,
    pub score: Option<f64>,
    #[serde(default)]
    pub tags: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CurateVerdict {
    #[serde(rename = "use")]
    pub use_it: bool,
    #[serde(default = "CurateVerdict::full_weight")]
    pub weight: f32,
    #[serde(default)]
    pub reason: String,
}

impl CurateVerdict {
    fn full_weight() -> f32 {
        1.0
    }
}

/// Argument of `schedule`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WorldInfo {
    pub episodes: u64,
    pub successes: u64,
    /// Closed successes since the last job began (all of them before the first).
    pub new_successes: u64,
    pub new_episodes: u64,
    /// Hours since the last job ended; `None` before the first.
    pub hours_since_job: Option<f64>,
    pub job_running: bool,
    /// A candidate is in shadow or canary.
    pub trial_running: bool,
    pub has_base: bool,
    pub promoted: bool,
    pub free_memory_mb: u64,
    pub load: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScheduleVerdict {
    pub now: bool,
    pub reason: String,
}

/// Argument of `recipe`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DatasetInfo {
    pub episodes: usize,
    pub samples: usize,
    pub tokens: usize,
    pub target_tokens: usize,
    pub tasks: usize,
    pub num_hidden_layers: usize,
    pub threads: usize,
}

/// Knobs of a distillation that a policy or a caller may turn. `None` = built-in default.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RecipeKnobs {
    /// `upper`, `lora` or `full`.
    pub method: Option<String>,
    pub tokens: Option<u64>,
    pub max_seconds: Option<f64>,
    pub epochs: Option<f64>,
    pub lr: Option<f64>,
    pub rank: Option<usize>,
    pub alpha: Option<f64>,
    /// Layers trained by `upper`.
    pub upper_layers: Option<usize>,
    pub batch_tokens: Option<usize>,
    pub warmup_steps: Option<usize>,
    pub weight_decay: Option<f64>,
    /// After this share of the job, targets that the student itself finds unlikely are left out (see `train`).
    pub trim_after: Option<f64>,
    /// Targets whose mean probability is below this are left out once trimming is on.
    pub trim_below: Option<f64>,
    pub patience: Option<usize>,
    pub seed: Option<u64>,
    /// `bf16` or `f32`: in which numbers products are computed; weights and moments are `f32` all the same. Absent: `bf16` where the
    /// processor is faster at it.
    pub compute: Option<String>,
    /// Memory that a training may take, in MiB; with less, more is computed twice (see `train`).
    pub memory_mib: Option<usize>,
    /// Gives the student layers that learn while it reads, and trains them: `published` or `next_token` says with which values they
    /// begin, `off` (or absence) leaves a base without them as it is.
    pub ttt: Option<String>,
    /// Every which layer learns, from the first on.
    pub ttt_every: Option<usize>,
    /// Tokens of a chunk.
    pub ttt_chunk: Option<usize>,
    /// Step size of the updates, once warmed up.
    pub ttt_lr: Option<f64>,
    /// Peak learning rate of the filters and projections, which have no weight decay.
    pub ttt_rate: Option<f64>,
    /// Share of the training before these layers begin to learn.
    pub ttt_from: Option<f64>,
    /// What an edge keeps of all that was written up to it, 0 to 1; see [`Forgetting`](crate::ttt::Forgetting).
    pub ttt_decay: Option<f64>,
    /// Strength of a delta rule, in place of a decay.
    pub ttt_delta: Option<f64>,
}

/// Argument of `gate`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GateInfo {
    /// `offline`, `shadow` or `canary`: the stage just finished.
    pub stage: String,
    pub candidate: String,
    pub held_out_exact: f64,
    pub held_out_loss: f64,
    pub base_exact: f64,
    pub shadow_agreement: Option<f64>,
    pub teacher_success: Option<f64>,
    pub teacher_episodes: u64,
    pub student_success: Option<f64>,
    pub student_episodes: u64,
    /// What the built-in rules say.
    pub verdict: String,
    pub reasons: Vec<String>,
}

/// A policy's word on a candidate. `Promote` cannot lift a built-in refusal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum GateVote {
    Promote(String),
    Hold(String),
    Reject(String),
}

/// Argument of `rollback`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LiveInfo {
    pub student: String,
    pub episodes: u64,
    pub success: f64,
    /// The teacher's success in the canary, which the student was promoted against.
    pub teacher_success: f64,
    pub deferrals: u64,
    pub steps: u64,
    /// What the built-in test says.
    pub built_in: bool,
}

/// Argument of `fast_weights`: asked before a student reads a step's prompt and behind each chunk that it reads.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FastInfo {
    pub task: String,
    pub domain: String,
    /// `episode` before a prompt is read, `chunk` behind a chunk.
    pub stage: String,
    pub student: String,
    pub version: u64,
    /// Tokens read.
    pub position: u64,
    /// Tokens of a chunk.
    pub chunk: u64,
    /// Largest relative change of a layer's weight since the start of the episode.
    pub drift: f32,
    /// The drift at which a layer begins again and the teacher is asked.
    pub max_drift: Option<f32>,
    /// Mean negative log-likelihood of some tokens of the chunk just read; `None` before the first.
    pub loss: Option<f32>,
    /// The same of all chunks before that one.
    pub loss_before: Option<f32>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FastVerdict {
    /// False: the trained weights play, and nothing is learned until this is true again.
    pub on: bool,
    /// Factor on the trained step size, 0 to 10; with 0 what was learned stays and nothing is added.
    pub step: f32,
    /// Back to the trained weights now.
    pub reset: bool,
    pub reason: String,
}

impl FastVerdict {
    /// Learning goes on as it was trained to.
    pub fn as_trained() -> Self {
        Self {
            on: true,
            step: 1.0,
            reset: false,
            reason: String::new(),
        }
    }

    /// The trained weights play.
    pub fn off(reason: impl Into<String>) -> Self {
        Self {
            on: false,
            reason: reason.into(),
            ..Self::as_trained()
        }
    }
}

/// Argument of `retain`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RetainInfo {
    pub id: String,
    pub task: String,
    pub domain: String,
    pub scope: String,
    pub source_format: String,
    /// `success`, `partial`, `failure`, `aborted` or `unknown`.
    pub status: String,
    pub tags: Vec<String>,
    /// Since it began, or was imported.
    pub age_days: f64,
    pub steps: u32,
    /// Of the episode as JSON.
    pub bytes: u64,
    pub incomplete: bool,
    /// A student learned from it.
    pub learned: bool,
}

/// What becomes of an episode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Retain {
    Keep,
    /// It is erased, as by a call of the host's.
    Drop,
    /// Session, source, extra fields, tokens and the words of its outcome are erased; what was said and done stays.
    Anonymise,
}

/// Argument of `on_event`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EventInfo {
    /// `job_state`, `student_swapped`, `rolled_back`, `store_trouble`, `policy_loaded`, `fault`, `fast_weights`, `forgotten` or `hook_off`.
    pub kind: String,
    /// Job number or student version, by kind.
    pub subject: u64,
    pub number: i64,
    pub detail: serde_json::Value,
}

/// How often a hook ran and failed, and how long it took.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HookStats {
    pub hook: String,
    pub calls: u64,
    pub failures: u64,
    /// Calls that met no free state and took the fail-safe at once.
    #[serde(default)]
    pub busy: u64,
    pub switched_off: bool,
    pub p50_us: f64,
    pub p99_us: f64,
}

/// The policy of a host that gave none, and what every failure falls back to: the teacher plays, nothing is promoted.
#[derive(Clone, Debug, Default)]
pub struct TeacherFirst;

impl Policy for TeacherFirst {
    fn id(&self) -> PolicyId {
        PolicyId {
            name: "teacher-first".into(),
            digest: String::new(),
        }
    }
    fn decide(&self, _: &StepInfo) -> Choice {
        Choice::teacher("no policy")
    }
    fn accept(&self, _: &ReplyInfo) -> Choice {
        Choice::teacher("no policy")
    }
    fn allow_tool(&self, _: &ToolInfo) -> Allow {
        Allow::No("no policy".into())
    }
    fn redact(&self, step: &RedactInfo) -> Result<Option<String>, HookFailed> {
        Ok(Some(step.content.clone()))
    }
    fn label(&self, _: &EpisodeInfo) -> Option<LabelVerdict> {
        None
    }
    fn curate(&self, _: &EpisodeInfo) -> CurateVerdict {
        CurateVerdict {
            use_it: false,
            weight: 0.0,
            reason: "no policy".into(),
        }
    }
    fn schedule(&self, _: &WorldInfo) -> ScheduleVerdict {
        ScheduleVerdict {
            now: false,
            reason: "no policy".into(),
        }
    }
    fn recipe(&self, _: &DatasetInfo) -> Option<RecipeKnobs> {
        None
    }
    fn gate(&self, _: &GateInfo) -> GateVote {
        GateVote::Hold("no policy".into())
    }
    fn rollback(&self, _: &LiveInfo) -> Option<(bool, String)> {
        None
    }
    fn fast_weights(&self, _: &FastInfo) -> FastVerdict {
        FastVerdict::off("no policy")
    }
}

/// The numbers and lines of an episode that `label` and `curate` see.
pub fn episode_info(episode: &Episode, outcome: Option<&Outcome>, masked: &[bool]) -> EpisodeInfo {
    use crate::episode::{Actor, Source, Status};
    let agent_steps: Vec<_> = episode
        .steps
        .iter()
        .filter(|s| s.source == Source::Agent)
        .collect();
    let call_text = |call: &ToolCall| format!("{}{}", call.name, call.arguments);
    let repeated_calls = agent_steps
        .windows(2)
        .filter(|pair| {
            !pair[0].tool_calls.is_empty()
                && pair[0]
                    .tool_calls
                    .iter()
                    .map(call_text)
                    .eq(pair[1].tool_calls.iter().map(call_text))
        })
        .count() as u32;
    let status = match outcome.map(|o| o.status).unwrap_or_default() {
        Status::Success => "success",
        Status::Partial => "partial",
        Status::Failure => "failure",
        Status::Aborted => "aborted",
        Status::Unknown => "unknown",
    };
    EpisodeInfo {
        id: episode.episode_id.to_string(),
        task: episode.task.id.clone(),
        domain: episode.task.domain.clone(),
        source_format: episode.provenance.source_format.clone(),
        teacher: agent_steps.iter().any(|s| s.actor == Actor::Teacher),
        steps: episode
            .steps
            .iter()
            .enumerate()
            .map(|(i, s)| StepLine {
                index: s.index,
                source: match s.source {
                    Source::System => "system",
                    Source::User => "user",
                    Source::Agent => "agent",
                }
                .into(),
                call: s.tool_calls.first().map(call_text),
                is_error: s.observations.iter().any(|o| o.is_error),
                masked: masked.get(i).copied().unwrap_or(false),
            })
            .collect(),
        agent_steps: agent_steps.len() as u32,
        error_results: agent_steps
            .iter()
            .filter(|s| s.observations.iter().any(|o| o.is_error))
            .count() as u32,
        repeated_calls,
        masked_steps: masked.iter().filter(|m| **m).count() as u32,
        status: status.into(),
        score: outcome.and_then(|o| o.score),
        integrity_flags: outcome
            .map(|o| o.integrity.flags.clone())
            .unwrap_or_default(),
        tags: outcome.map(|o| o.tags.clone()).unwrap_or_default(),
        cost_usd: episode
            .steps
            .iter()
            .filter_map(|s| s.usage.as_ref()?.cost_usd)
            .sum(),
    }
}

#[cfg(test)]
pub mod fixtures {
    use super::*;

    /// Whoever is offered answers, every episode teaches, and fast weights are left as they are.
    #[derive(Default)]
    pub struct Eager {
        pub view: View,
    }

    impl Policy for Eager {
        fn id(&self) -> PolicyId {
            TeacherFirst.id()
        }
        fn view(&self) -> View {
            self.view.clone()
        }
        fn decide(&self, _: &StepInfo) -> Choice {
            Choice::student("it is tried")
        }
        fn accept(&self, _: &ReplyInfo) -> Choice {
            Choice::student("kept")
        }
        fn allow_tool(&self, _: &ToolInfo) -> Allow {
            Allow::Yes
        }
        fn redact(&self, step: &RedactInfo) -> Result<Option<String>, HookFailed> {
            TeacherFirst.redact(step)
        }
        fn label(&self, episode: &EpisodeInfo) -> Option<LabelVerdict> {
            TeacherFirst.label(episode)
        }
        fn curate(&self, _: &EpisodeInfo) -> CurateVerdict {
            CurateVerdict {
                use_it: true,
                weight: 1.0,
                reason: "it went well".into(),
            }
        }
        fn schedule(&self, world: &WorldInfo) -> ScheduleVerdict {
            TeacherFirst.schedule(world)
        }
        fn recipe(&self, dataset: &DatasetInfo) -> Option<RecipeKnobs> {
            TeacherFirst.recipe(dataset)
        }
        fn gate(&self, report: &GateInfo) -> GateVote {
            TeacherFirst.gate(report)
        }
        fn rollback(&self, live: &LiveInfo) -> Option<(bool, String)> {
            TeacherFirst.rollback(live)
        }
    }
}
