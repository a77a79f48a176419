//! The C interface of Locum. `include/locum.h` is its manual; the rooms here are grouped like the header and named after its
//! groups, on top of five small ones: `handles`, `fork`, `guard`, `input` and `output`.
//!
//! The bodies are thin: they check what came in, call [`locum_core::locum::Locum`], and hand out what came back. All
//! `unsafe` of the project stands here, in one file of `core`, and nowhere else.

#![deny(unsafe_op_in_unsafe_fn)]
#![warn(clippy::undocumented_unsafe_blocks)]

mod fork;
mod guard;
mod handles;
mod input;
mod instances;
mod output;
mod status;
mod structs;

mod decide;
mod episode;
mod event;
mod fast;
mod forget;
mod library;
mod life;
mod log;
mod policy;
mod refusals;
mod student;

/// What the handle table synchronises with; `tests/loom` has another.
mod sync {
    pub use std::sync::{Arc, RwLock};
}
