//! Episodes in other people's clothes: chat messages in and out, and files of recorded runs.
//!
//! A file is imported whole: every run becomes one episode, successes and failures as they are, and
//! a bad line costs that line only. What a format cannot hold is named in a loss report.

mod files;
mod intercode;
mod messages;
mod openai;
mod redact;
mod tau_bench;
#[cfg(test)]
mod tests;

pub use files::{import, import_into, ImportCounts, Skip, Taken, FORMATS};
pub use intercode::turn_history;
pub use messages::{
    attach, messages_from_steps, outline, outline_of, piece_from_message, steps_from_messages,
    tools_from_json, tools_to_json, Piece, RESERVED,
};
pub use openai::{export_openai, Exported, Loss, LossReport};
pub use redact::{redact_episode, redact_record, RedactHook};

use std::path::PathBuf;

/// Why something could not be read as an episode, or a file not at all.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The host or a file gave a chat message that cannot be recorded.
    #[error("message {index}: {problem}")]
    Message { index: usize, problem: String },
    /// The list of tools is not a list of OpenAI function specifications.
    #[error("tool {index}: {problem}")]
    Tool { index: usize, problem: String },
    /// The element of the file is JSON but not a run of its format.
    #[error("{problem}")]
    Run { problem: String },
    /// The file cannot be opened or read.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },
    /// The file is larger than an import takes.
    #[error("{} has {bytes} bytes; an import takes at most {limit}", path.display())]
    TooLarge {
        path: PathBuf,
        bytes: u64,
        limit: u64,
    },
    /// Neither the content nor the caller says which format it is.
    #[error("{}: not a format that can be imported ({problem}); known are openai-chat (JSONL), tau-bench and intercode", path.display())]
    Unrecognised { path: PathBuf, problem: String },
    /// The caller named a format that does not exist.
    #[error("no format is called {name:?}; known are openai-chat, tau-bench and intercode")]
    NoSuchFormat { name: String },
    /// The receiver of the episodes failed; the import stopped there.
    #[error("the import stopped: {problem}")]
    Sink { problem: String },
}
