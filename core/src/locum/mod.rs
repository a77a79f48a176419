//! The facade: what every door (C ABI, command, Rust host) calls. It decides at the top and leaves computing to the rooms below.

mod types;

pub use types::*;
