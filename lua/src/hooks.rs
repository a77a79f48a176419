//! The hooks of a policy: their names, their time limits, and how one of them can fail.

use std::time::Duration;

use crate::watchdog::{Stopped, TimeLimit};

/// CPU time that running a policy file's top level may take.
pub const LOAD_LIMIT: TimeLimit = TimeLimit::cpu_ms(200);
/// CPU time that `selftest` may take.
pub const SELFTEST_LIMIT: TimeLimit = TimeLimit::cpu_ms(2000);
/// Failures within [`FAILURE_WINDOW`] after which a hook is switched off until the policy is loaded again.
pub const MAX_FAILURES: usize = 5;
pub const FAILURE_WINDOW: Duration = Duration::from_secs(60);
/// Extra CPU time of `redact` for each MiB of content, in milliseconds. The shipped `private.lua` took 0.35 s for its worst
/// text on a machine with six busy threads for each core.
const REDACT_MS_PER_MIB: u64 = 500;

/// Every hook, in the order of the trait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Hook {
    Decide,
    Accept,
    AllowTool,
    Redact,
    Label,
    Curate,
    Schedule,
    Recipe,
    Gate,
    Rollback,
    FastWeights,
    Retain,
    OnEvent,
}

impl Hook {
    pub const ALL: [Hook; 13] = [
        Hook::Decide,
        Hook::Accept,
        Hook::AllowTool,
        Hook::Redact,
        Hook::Label,
        Hook::Curate,
        Hook::Schedule,
        Hook::Recipe,
        Hook::Gate,
        Hook::Rollback,
        Hook::FastWeights,
        Hook::Retain,
        Hook::OnEvent,
    ];

    pub const fn name(self) -> &'static str {
        match self {
            Hook::Decide => "decide",
            Hook::Accept => "accept",
            Hook::AllowTool => "allow_tool",
            Hook::Redact => "redact",
            Hook::Label => "label",
            Hook::Curate => "curate",
            Hook::Schedule => "schedule",
            Hook::Recipe => "recipe",
            Hook::Gate => "gate",
            Hook::Rollback => "rollback",
            Hook::FastWeights => "fast_weights",
            Hook::Retain => "retain",
            Hook::OnEvent => "on_event",
        }
    }

    /// How long the hook may take for an argument with `bytes` of content.
    ///
    /// The hooks of a step are meant to take well under 1 ms; their hard stop is at 2 ms, because a tighter one would
    /// stop innocent hooks whose thread was interrupted by the system.
    pub const fn limit(self, bytes: usize) -> TimeLimit {
        match self {
            Hook::Decide | Hook::Accept | Hook::AllowTool | Hook::FastWeights | Hook::Rollback => {
                TimeLimit::cpu_ms(2)
            }
            Hook::Redact => TimeLimit::cpu_ms(20 + ((bytes as u64 * REDACT_MS_PER_MIB) >> 20)),
            Hook::Label | Hook::Curate => TimeLimit::cpu_ms(20),
            Hook::Schedule | Hook::Recipe | Hook::Gate | Hook::Retain | Hook::OnEvent => {
                TimeLimit::cpu_ms(5)
            }
        }
    }

    /// Hooks on the path of a step never wait for a state to be built.
    pub const fn is_hot(self) -> bool {
        matches!(
            self,
            Hook::Decide | Hook::Accept | Hook::AllowTool | Hook::FastWeights
        )
    }
}

/// Why a hook gave no usable answer. Its `Display` names file and line and never quotes data; see [`Failure::detail`].
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Failure {
    #[error("{at}raised an error")]
    Raised { at: At, text: String },
    #[error("{at}stopped after {} ms of {}", limit_of(.stopped).1, limit_of(.stopped).0)]
    TooLong { at: At, stopped: Stopped },
    #[error("{at}went over its memory limit")]
    Memory { at: At },
    #[error("returned a wrong value: {0}")]
    Returned(String),
    #[error("its argument could not be built: {0}")]
    Argument(String),
    #[error("no Lua state was free")]
    Busy,
    #[error("switched off after {MAX_FAILURES} failures within {} s", FAILURE_WINDOW.as_secs())]
    Off,
}

impl Failure {
    /// The policy's own words, for `policy check`, where arguments are made up. Not for logs: they may quote data.
    pub fn detail(&self) -> String {
        match self {
            Failure::Raised { text, .. } => text
                .lines()
                .next()
                .unwrap_or_default()
                .chars()
                .take(500)
                .collect(),
            other => other.to_string(),
        }
    }
}

/// `name:line: `, or nothing where the error names no line of the policy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct At(pub Option<(String, u32)>);

impl std::fmt::Display for At {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.0 {
            Some((name, line)) => write!(f, "{name}:{line}: "),
            None => Ok(()),
        }
    }
}

impl At {
    /// The first `name:line` in an error's text with its traceback.
    pub fn find(name: &str, text: &str) -> Self {
        let mut rest = text;
        while let Some(start) = rest.find(name) {
            rest = &rest[start + name.len()..];
            let digits: &str = rest.strip_prefix(':').map_or("", |r| {
                &r[..r.bytes().take_while(u8::is_ascii_digit).count()]
            });
            if let Ok(line) = digits.parse() {
                return At(Some((name.into(), line)));
            }
        }
        At(None)
    }
}

fn limit_of(stopped: &Stopped) -> (&'static str, u128) {
    match stopped {
        Stopped::Cpu(limit) => ("CPU time", limit.as_millis()),
        Stopped::Wall(limit) => ("waiting", limit.as_millis()),
    }
}
