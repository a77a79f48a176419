//! Why a command failed, and what the operator can do about it.

use std::path::PathBuf;

use locum_core::error::Error;
use locum_core::formats::FormatError;
use locum_core::model::ModelError;
use locum_core::registry::RegistryError;
use locum_core::store::StoreError;
use locum_lua::PolicyError;
use serde_json::Value;

/// A failed command. `Display` is one sentence; [`Fail::next`] says what to do, where that is not in the sentence.
#[derive(Debug, thiserror::Error)]
pub enum Fail {
    #[error("there is no store at {}", dir.display())]
    NoStore { dir: PathBuf },
    #[error("cannot read {}: {source}", path.display())]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("cannot write {}: {source}", path.display())]
    Write {
        path: PathBuf,
        source: std::io::Error,
    },
    /// An operator named something that is not there.
    #[error("{what}")]
    Missing { what: String, next: &'static str },
    /// The command would change who answers, and was not told to go ahead.
    #[error("{what}")]
    NotConfirmed { what: String },
    /// A job ended badly.
    #[error("job {job} {state}: {message}")]
    Job {
        job: u64,
        state: String,
        message: String,
    },
    /// The policy has errors, which were printed.
    #[error("{name} is not usable: {}", errors.join("; "))]
    Policy { name: String, errors: Vec<String> },
    /// A check found something that is not as it was written; it was printed.
    #[error("{} findings of damage in {}", n, dir.display())]
    Damaged {
        n: usize,
        dir: PathBuf,
        result: Box<Value>,
    },
    #[error(transparent)]
    Locum(#[from] Error),
    #[error(transparent)]
    Registry(#[from] RegistryError),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Format(#[from] FormatError),
    #[error(transparent)]
    Lua(#[from] PolicyError),
}

impl Fail {
    /// What the command had found before it failed, for `--json`.
    pub fn result(&self) -> Option<Value> {
        match self {
            Fail::Damaged { result, .. } => Some(Value::clone(result)),
            _ => None,
        }
    }

    pub fn next(&self) -> Option<&'static str> {
        match self {
            Fail::NoStore { .. } => Some(
                "Name one with --store or LOCUM_STORE; a host or `locum episodes import` makes it.",
            ),
            Fail::Missing { next, .. } => Some(next),
            Fail::Damaged { .. } => {
                Some("`locum store check --repair` puts right what needs no guess.")
            }
            Fail::NotConfirmed { .. } => Some("Say --yes to do it."),
            Fail::Lua(_) | Fail::Policy { .. } => {
                Some("`locum policy check FILE` shows all that is wrong with a policy.")
            }
            Fail::Format(FormatError::Unrecognised { .. }) => {
                Some("Name the format with --format.")
            }
            Fail::Store(StoreError::Full { .. }) => {
                Some("Free some space or name a store on another disk with --store.")
            }
            _ => None,
        }
    }
}
