//! The tests that go through the doors: one binary, a room each.

mod abi;
mod cli;
mod interop;
mod reference;
mod soak;
mod tidy;
