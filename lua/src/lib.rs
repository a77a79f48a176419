//! Policies written in Lua (Luau): the only crate that knows Lua, and the only door from a script to [`Policy`].
//!
//! A policy is a file that returns one table: `view`, `settings`, hooks and a `selftest`, all optional (docs/policy.md).
//! It runs in frozen states that offer an allow-list of pure functions, under a limit on memory and one on time that neither
//! `pcall` nor a catastrophic pattern can swallow. Whatever goes wrong in a hook ends in the fail-safe that the trait names:
//! on the path of a step, "ask the teacher".
//!
//! ```
//! use locum_core::policy::{Policy, StepInfo};
//! let policy = locum_lua::LuaPolicy::from_source(
//!     r#"return { decide = function(step) return "teacher", `never for {step.task}` end }"#,
//!     "never.lua",
//!     Default::default(),
//! )?;
//! let choice = policy.decide(&StepInfo { task: "refund".into(), ..Default::default() });
//! assert_eq!(choice.reason, "never for refund");
//! # Ok::<(), locum_lua::PolicyError>(())
//! ```

#![deny(unsafe_op_in_unsafe_fn)]

pub mod check;
mod convert;
pub mod hooks;
mod pool;
mod sandbox;
pub mod surface;
mod watchdog;

use std::sync::Arc;
use std::time::{Duration, Instant};

use locum_core::limits;
use locum_core::policy::{
    Allow, Choice, CurateVerdict, DatasetInfo, EpisodeInfo, EventInfo, FastInfo, FastVerdict,
    GateInfo, GateVote, HookFailed, HookStats, LabelVerdict, LiveInfo, Policy, PolicyId,
    RecipeKnobs, RedactInfo, ReplyInfo, Retain, RetainInfo, ScheduleVerdict, Settings, StepInfo,
    ToolInfo, WorldInfo,
};
use locum_core::view::View;
use mlua::Table;
use serde::Serialize;
use sha2::{Digest, Sha256};

pub use check::{check, Report};
use convert::Returned;
use hooks::{Failure, Hook, SELFTEST_LIMIT};
use pool::{Meter, Pool};
use sandbox::{PrintRate, Printer, Program, Sandbox};
use watchdog::Watchdog;

/// New successes after which the built-in `schedule` says "now".
pub const DEFAULT_NEW_SUCCESSES: u64 = 50;

/// Why a policy was not loaded. Each is a sentence for the operator, with file and line where there is one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PolicyError {
    #[error(
        "{name} has {bytes} bytes, the limit for a policy is {}",
        limits::MAX_POLICY_BYTES
    )]
    TooLarge { name: String, bytes: usize },
    #[error("{name} is not source text: compiled chunks are not accepted")]
    Binary { name: String },
    #[error("{message}")]
    Syntax { message: String },
    #[error("{name} took longer than {seconds} s to compile")]
    CompileTime { name: String, seconds: u64 },
    /// The file's top level raised an error, ran too long or needed too much memory.
    #[error("{message}")]
    Load { message: String },
    /// The file ran, but what it returned is no policy.
    #[error("{message}")]
    Shape { message: String },
    #[error("{name}: selftest failed: {message}")]
    SelfTest { name: String, message: String },
    /// No memory or no thread.
    #[error("{name}: no Lua state could be made: {message}")]
    State { name: String, message: String },
}

/// How a policy is hosted.
#[derive(Clone, Debug)]
pub struct PolicyOptions {
    /// States made in advance, which is how many hooks can run at once; about 0.5 MB each. 0 = twice the number of cores,
    /// between 4 and 16.
    pub states: usize,
    /// Memory of one state.
    pub memory_bytes: usize,
    /// Whether `selftest` is run before the policy is accepted.
    pub selftest: bool,
}

impl Default for PolicyOptions {
    fn default() -> Self {
        Self {
            states: 0,
            memory_bytes: 16 << 20,
            selftest: true,
        }
    }
}

/// A loaded policy. Hooks may be called from any thread, several at once; each call has a state of its own.
pub struct LuaPolicy {
    id: PolicyId,
    view: View,
    settings: Settings,
    has: [bool; Hook::ALL.len()],
    meters: [Meter; Hook::ALL.len()],
    pool: Arc<Pool>,
}

impl LuaPolicy {
    /// Compiles, runs and checks a policy's source text; `name` is its file name, used in messages.
    ///
    /// Takes some milliseconds, more if the policy's `selftest` does; not for the path of a step.
    ///
    /// # Errors
    /// See [`PolicyError`]. A policy that fails here changes nothing: keep the old one.
    pub fn from_source(
        source: &str,
        name: &str,
        options: PolicyOptions,
    ) -> Result<Self, PolicyError> {
        let program = Program::compile(
            source,
            name,
            options.memory_bytes,
            Printer::Log(Arc::new(PrintRate::default())),
        )?;
        let watchdog = start_watchdog(&program.name)?;
        // The first state is thrown away: its selftest may have left things behind in upvalues.
        let first = Sandbox::new(&program, &watchdog)?;
        let (view, settings) = convert::declared(&program.name, &first.policy)?;
        if options.selftest {
            selftest(&first, &program.name)?;
        }
        let has = Hook::ALL.map(|hook| first.has(hook));
        drop(first);
        let digest = Sha256::digest(source.as_bytes())
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let id = PolicyId {
            name: program.name.clone(),
            digest,
        };
        let states = match options.states {
            0 => (std::thread::available_parallelism().map_or(2, |n| n.get()) * 2).clamp(4, 16),
            n => n,
        };
        let pool = Arc::new(Pool::new(program, watchdog, states)?);
        Ok(Self {
            id,
            view,
            settings,
            has,
            meters: Default::default(),
            pool,
        })
    }

    /// The policy of a host that brings none: `policies/default.lua`.
    pub fn default_policy() -> Result<Self, PolicyError> {
        Self::from_source(
            include_str!("../policies/default.lua"),
            "default.lua",
            PolicyOptions::default(),
        )
    }

    /// Whether the policy's file has this hook; otherwise the built-in default of docs/policy.md applies.
    pub fn has_hook(&self, name: &str) -> bool {
        Hook::ALL
            .iter()
            .any(|hook| hook.name() == name && self.has[*hook as usize])
    }

    /// Runs a hook. `None` if the policy has none; an error after counting it.
    fn ask<A: Serialize, T>(
        &self,
        hook: Hook,
        argument: &A,
        bytes: usize,
        read: impl FnOnce(Returned) -> Result<T, Failure>,
    ) -> Option<Result<T, Failure>> {
        let make = |state: &mut Sandbox| convert::argument(state.lua(), argument);
        self.ask_with(hook, make, bytes, read)
    }

    fn ask_with<T>(
        &self,
        hook: Hook,
        make: impl FnOnce(&mut Sandbox) -> Result<Table, Failure>,
        bytes: usize,
        read: impl FnOnce(Returned) -> Result<T, Failure>,
    ) -> Option<Result<T, Failure>> {
        if !self.has[hook as usize] {
            return None;
        }
        let begin = Instant::now();
        let meter = &self.meters[hook as usize];
        let result = if meter.is_off() {
            Err(Failure::Off)
        } else {
            self.run(hook, make, bytes, read)
        };
        self.book(hook, begin.elapsed(), result.as_ref().err());
        Some(result)
    }

    fn run<T>(
        &self,
        hook: Hook,
        make: impl FnOnce(&mut Sandbox) -> Result<Table, Failure>,
        bytes: usize,
        read: impl FnOnce(Returned) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let mut state = self.pool.take(hook).ok_or(Failure::Busy)?;
        let result = make(&mut state)
            .and_then(|table| state.call(hook, table, bytes))
            .and_then(|values| read(Returned::from(values)));
        if !hook.is_hot() {
            state.rest();
        }
        self.pool.give_back(state);
        result
    }

    fn book(&self, hook: Hook, took: Duration, failure: Option<&Failure>) {
        let switched_off = self.meters[hook as usize].count(took, failure);
        match failure {
            Some(Failure::Busy | Failure::Off) | None => {}
            Some(failure) => tracing::warn!(policy = self.id.name, hook = hook.name(), "{failure}"),
        }
        if switched_off {
            tracing::error!(
                policy = self.id.name,
                hook = hook.name(),
                "{}",
                Failure::Off
            );
        }
    }
}

fn failed(hook: Hook, failure: &Failure) -> String {
    format!("policy hook {}: {failure}", hook.name())
}

fn start_watchdog(name: &str) -> Result<Watchdog, PolicyError> {
    Watchdog::start().map_err(|e| PolicyError::State {
        name: name.into(),
        message: e.to_string(),
    })
}

/// Runs the policy's own test, if it has one; `true` if it had.
fn selftest(state: &Sandbox, name: &str) -> Result<bool, PolicyError> {
    let failed = |message: String| PolicyError::SelfTest {
        name: name.into(),
        message,
    };
    let function = match state.policy.raw_get::<mlua::Value>("selftest") {
        Ok(mlua::Value::Function(function)) => function,
        _ => return Ok(false),
    };
    let values = state
        .run(&function, (), SELFTEST_LIMIT)
        .map_err(|e| failed(e.detail()))?;
    match values.front() {
        Some(mlua::Value::Boolean(false)) => Err(failed("it returned false".into())),
        _ => Ok(true),
    }
}

impl Policy for LuaPolicy {
    fn id(&self) -> PolicyId {
        self.id.clone()
    }

    fn view(&self) -> View {
        self.view.clone()
    }

    fn settings(&self) -> Settings {
        self.settings.clone()
    }

    fn decide(&self, step: &StepInfo) -> Choice {
        let make = |state: &mut Sandbox| state.step(step);
        match self.ask_with(Hook::Decide, make, 0, |values| values.choice("student")) {
            Some(Ok(choice)) => choice,
            Some(Err(failure)) => Choice::teacher(failed(Hook::Decide, &failure)),
            None if step.student.is_some() => Choice::student("a student is offered"),
            None => Choice::teacher("no student is offered"),
        }
    }

    fn accept(&self, reply: &ReplyInfo) -> Choice {
        match self.ask(Hook::Accept, reply, 0, |values| values.choice("keep")) {
            Some(Ok(choice)) => choice,
            Some(Err(failure)) => Choice::teacher(failed(Hook::Accept, &failure)),
            None => Choice::student("kept"),
        }
    }

    fn allow_tool(&self, call: &ToolInfo) -> Allow {
        match self.ask(Hook::AllowTool, call, 0, |values| values.allow()) {
            Some(Ok(allow)) => allow,
            Some(Err(failure)) => Allow::No(failed(Hook::AllowTool, &failure)),
            None => Allow::Yes,
        }
    }

    fn redact(&self, step: &RedactInfo) -> Result<Option<String>, HookFailed> {
        match self.ask(Hook::Redact, step, step.content.len(), |values| {
            values.redacted()
        }) {
            Some(Ok(content)) => Ok(content),
            Some(Err(failure)) => Err(HookFailed {
                hook: Hook::Redact.name(),
                message: failure.to_string(),
            }),
            None => Ok(Some(step.content.clone())),
        }
    }

    fn label(&self, episode: &EpisodeInfo) -> Option<LabelVerdict> {
        self.ask(Hook::Label, episode, 0, |values| values.label())?
            .ok()?
    }

    fn curate(&self, episode: &EpisodeInfo) -> CurateVerdict {
        match self.ask(Hook::Curate, episode, 0, |values| values.curate()) {
            Some(Ok(verdict)) => verdict,
            Some(Err(failure)) => CurateVerdict {
                use_it: false,
                weight: 0.0,
                reason: failed(Hook::Curate, &failure),
            },
            None => default_curate(episode),
        }
    }

    fn schedule(&self, world: &WorldInfo) -> ScheduleVerdict {
        match self.ask(Hook::Schedule, world, 0, |values| values.schedule()) {
            Some(Ok(verdict)) => verdict,
            Some(Err(failure)) => ScheduleVerdict {
                now: false,
                reason: failed(Hook::Schedule, &failure),
            },
            None => default_schedule(world),
        }
    }

    fn recipe(&self, dataset: &DatasetInfo) -> Option<RecipeKnobs> {
        self.ask(Hook::Recipe, dataset, 0, |values| values.recipe())?
            .ok()?
    }

    fn gate(&self, report: &GateInfo) -> GateVote {
        match self.ask(Hook::Gate, report, 0, |values| values.gate()) {
            Some(Ok(vote)) => vote,
            Some(Err(failure)) => GateVote::Hold(failed(Hook::Gate, &failure)),
            None => default_gate(report),
        }
    }

    fn rollback(&self, live: &LiveInfo) -> Option<(bool, String)> {
        self.ask(Hook::Rollback, live, 0, |values| values.rollback())?
            .ok()?
    }

    fn fast_weights(&self, fast: &FastInfo) -> FastVerdict {
        match self.ask(Hook::FastWeights, fast, 0, |values| values.fast_weights()) {
            Some(Ok(verdict)) => verdict,
            Some(Err(failure)) => FastVerdict::off(failed(Hook::FastWeights, &failure)),
            None => FastVerdict::as_trained(),
        }
    }

    fn rules_fast_weights(&self) -> bool {
        self.has[Hook::FastWeights as usize]
    }

    fn retain(&self, episode: &RetainInfo) -> Retain {
        match self.ask(Hook::Retain, episode, 0, |values| values.retain()) {
            Some(Ok(verdict)) => verdict,
            Some(Err(_)) | None => Retain::Keep,
        }
    }

    fn rules_retention(&self) -> bool {
        self.has[Hook::Retain as usize]
    }

    fn on_event(&self, event: &EventInfo) {
        let _ = self.ask(Hook::OnEvent, event, 0, |_| Ok(()));
    }

    fn switched_off(&self) -> Vec<&'static str> {
        let off = Hook::ALL
            .iter()
            .filter(|hook| self.meters[**hook as usize].is_off());
        off.map(|hook| hook.name()).collect()
    }

    fn stats(&self) -> Vec<HookStats> {
        Hook::ALL
            .iter()
            .filter(|hook| self.has[**hook as usize])
            .map(|hook| self.meters[*hook as usize].stats(*hook))
            .collect()
    }
}

/// A success that a teacher had a hand in, with nothing odd about its outcome.
fn default_curate(episode: &EpisodeInfo) -> CurateVerdict {
    let reason = if episode.status != "success" {
        "not a success"
    } else if !episode.integrity_flags.is_empty() {
        "the outcome carries integrity flags"
    } else if !episode.teacher {
        "no teacher played in it"
    } else {
        return CurateVerdict {
            use_it: true,
            weight: 1.0,
            reason: "a teacher's success".into(),
        };
    };
    CurateVerdict {
        use_it: false,
        weight: 0.0,
        reason: reason.into(),
    }
}

fn default_schedule(world: &WorldInfo) -> ScheduleVerdict {
    let wait = |reason: String| ScheduleVerdict { now: false, reason };
    if world.job_running {
        wait("a job is running".into())
    } else if world.trial_running {
        wait("a candidate is on trial".into())
    } else if world.new_successes < DEFAULT_NEW_SUCCESSES {
        wait(format!(
            "{} of {DEFAULT_NEW_SUCCESSES} new successes",
            world.new_successes
        ))
    } else {
        ScheduleVerdict {
            now: true,
            reason: format!("{} new successes", world.new_successes),
        }
    }
}

/// A vote can only make the built-in verdict stricter, so "promote" is plain agreement.
fn default_gate(report: &GateInfo) -> GateVote {
    let reason = "the built-in verdict".to_owned();
    match report.verdict.as_str() {
        "reject" => GateVote::Reject(reason),
        "hold" => GateVote::Hold(reason),
        _ => GateVote::Promote(reason),
    }
}
