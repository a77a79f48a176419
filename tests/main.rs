//! The tests that go through the doors: one binary, a room each.

mod cli;
mod reference;
