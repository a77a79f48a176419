//! The C interface of Locum. `include/locum.h` is its manual; the rooms here are grouped like the header and named after its
//! groups, on top of five small ones: `handles`, `fork`, `guard`, `input` and `output`.

#![deny(unsafe_op_in_unsafe_fn)]
#![warn(clippy::undocumented_unsafe_blocks)]

pub mod fork;
pub mod guard;
pub mod handles;
pub mod input;
pub mod log;
pub mod output;
pub mod status;
pub mod structs;
