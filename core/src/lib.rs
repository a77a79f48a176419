//! Everything in Locum that thinks: recording, curation, the student's engine and its training,
//! the gate and the background distillation.
//!
//! Rooms are declared in reading order and a room uses only the rooms declared above it; a test
//! (`tests/tidy.rs`) holds this list against the imports. `core` knows no C, no Lua, no socket and
//! no environment variable.

#![deny(unsafe_op_in_unsafe_fn)]

pub mod calls;
pub mod chat;
pub mod curate;
pub mod dataset;
pub mod distil;
pub mod episode;
pub mod error;
pub mod evaluate;
pub mod formats;
pub mod gate;
pub mod generate;
pub mod kernels;
pub mod limits;
pub mod locum;
pub mod model;
pub mod policy;
pub mod registry;
pub mod report;
pub mod store;
pub mod train;
pub mod view;
