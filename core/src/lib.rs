//! Everything in Locum that thinks: recording, curation, the student's engine and its training,
//! the gate and the background distillation.
//!
//! Rooms are declared in reading order and a room uses only the rooms declared above it; a test
//! (`tests/tidy.rs`) holds this list against the imports. `core` knows no C, no Lua, no socket and
//! no environment variable.

#![deny(unsafe_op_in_unsafe_fn)]

pub mod limits;
pub mod threads;
pub mod files;
pub mod episode;
pub mod calls;
pub mod view;
pub mod policy;
pub mod secrets;
pub mod store;
pub mod formats;
pub mod chat;
pub mod curate;
pub mod dataset;
pub mod kernels;
pub mod ttt;
pub mod model;
pub mod device;
pub mod train;
pub mod generate;
pub mod gate;
pub mod registry;
pub mod evaluate;
pub mod replay;
pub mod report;
pub mod error;
pub mod distil;
pub mod locum;
