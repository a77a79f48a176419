//! The umbrella error over the rooms' own: what the facade returns.

use crate::chat::ChatError;
use crate::formats::FormatError;
use crate::generate::EngineError;
use crate::model::ModelError;
use crate::registry::RegistryError;
use crate::store::StoreError;
use crate::train::TrainError;

/// Any failure of a call to [`crate::locum::Locum`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Chat(#[from] ChatError),
    #[error(transparent)]
    Registry(#[from] RegistryError),
    #[error(transparent)]
    Format(#[from] FormatError),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Train(#[from] TrainError),
    /// The caller named something that is not there.
    #[error("{what} is not known")]
    NotFound { what: String },
    /// The caller gave something that cannot be used.
    #[error("{0}")]
    Argument(String),
    /// A limit of `limits.rs` was passed.
    #[error("{what}: {found} is more than the limit of {limit}")]
    Limit {
        what: &'static str,
        found: usize,
        limit: usize,
    },
    #[error("no base model is there: import one with `locum model import`, or name its folder when opening")]
    NoModel,
    /// No student can answer this step; the host asks its teacher.
    #[error("ask the teacher: {reason}")]
    Teacher { reason: String },
    #[error("{0}")]
    Busy(String),
    #[error("this Locum is closed")]
    Closed,
    #[error("cancelled")]
    Cancelled,
}
