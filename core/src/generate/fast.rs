//! Fast weights of an episode, from outside: the rule that is asked behind each chunk, and what can be done between two steps.

use std::sync::mpsc::{sync_channel, SyncSender};
use std::sync::Arc;
use std::time::Duration;

use super::seat::Seat;
use super::{locked, Engine};
use crate::limits::MAX_FAST_SNAPSHOTS;

/// How long an operation may wait for the engine's thread, which looks between two steps of the model.
const LONGEST_STEP: Duration = Duration::from_secs(10);

/// Asked before a prompt is read and behind each chunk; runs on the engine's thread and holds up all answers while it does.
pub type FastRule = Arc<dyn Fn(&FastSeen) -> FastOrder + Send + Sync>;

/// What is known of an episode's fast weights when the rule is asked.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FastSeen {
    /// False before a prompt is read, true behind a chunk.
    pub behind_chunk: bool,
    /// Tokens read.
    pub position: usize,
    /// Largest drift of a layer.
    pub drift: f32,
    /// Mean negative log-likelihood of tokens of the chunk just read, and of those before it; `None` where there was none.
    pub loss: Option<f32>,
    pub loss_before: Option<f32>,
}

/// What the rule says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FastOrder {
    /// False: the trained weights play, and nothing is learned until it is true again.
    pub on: bool,
    /// Factor on the trained step size.
    pub step: f32,
    /// Back to the trained weights now.
    pub reset: bool,
}

impl Default for FastOrder {
    fn default() -> Self {
        Self {
            on: true,
            step: 1.0,
            reset: false,
        }
    }
}

/// What can be done with an episode's state between two steps of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FastOp {
    Inspect,
    /// Back to the trained weights. What is read anew later is learned anew.
    Reset,
    /// Keeps a copy of the whole state: fast weights, what waits, keys and values.
    Snapshot,
    /// Puts a copy back in the place of the state; the copy stays.
    Restore(u64),
    /// Forgets a copy; 0 all of the episode's.
    Forget(u64),
}

/// An episode's fast weights as they are.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct FastReport {
    /// Whether anything learns; false where the engine has no state of the episode, for one.
    pub on: bool,
    /// Tokens read.
    pub position: usize,
    /// Tokens of a chunk; 0 if nothing learns.
    pub chunk: usize,
    /// Bytes of fast weights and of what waits for the edge.
    pub bytes: usize,
    /// Largest drift of a layer, and each layer's: `‖W − W₀‖ / ‖W₀‖`.
    pub drift: f32,
    pub layers: Vec<FastLayer>,
    /// The snapshot just taken, or 0.
    pub snapshot: u64,
    /// Those that are kept.
    pub snapshots: Vec<u64>,
}

/// One layer that learns.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct FastLayer {
    pub layer: u16,
    pub drift: f32,
    /// Tokens that wait for the chunk's edge.
    pub waiting: usize,
}

/// Why an operation was not done.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FastError {
    #[error("the student has read nothing of this episode, or it is no longer kept")]
    Nothing,
    #[error("this episode has no snapshot {0}")]
    NoSnapshot(u64),
    #[error("an answer of this episode is being computed")]
    Busy,
    #[error("a snapshot needs {needed} bytes, and {free} of {limit} are free")]
    NoRoom {
        needed: usize,
        free: usize,
        limit: usize,
    },
    #[error("an episode keeps {MAX_FAST_SNAPSHOTS} snapshots at most")]
    TooMany,
    #[error("the engine does not answer")]
    NoAnswer,
}

/// An operation on its way to the engine's thread.
pub(super) struct Request {
    pub key: u128,
    pub op: FastOp,
    /// `None` if nobody waits.
    pub answer: Option<SyncSender<Result<FastReport, FastError>>>,
}

impl Engine {
    /// Looks at or changes an episode's fast weights between two steps of the model. May wait for the step that is under way.
    ///
    /// # Errors
    /// [`FastError`]; nothing was then changed.
    pub fn fast_weights(&self, key: u128, op: FastOp) -> Result<FastReport, FastError> {
        let (answer, report) = sync_channel(1);
        self.order(key, op, Some(answer));
        let report = report.recv_timeout(LONGEST_STEP);
        report.unwrap_or(Err(FastError::NoAnswer))
    }

    /// Has all snapshots of an episode forgotten, without waiting for it.
    pub fn forget_snapshots(&self, key: u128) {
        self.order(key, FastOp::Forget(0), None);
    }

    fn order(
        &self,
        key: u128,
        op: FastOp,
        answer: Option<SyncSender<Result<FastReport, FastError>>>,
    ) {
        {
            let mut inbox = locked(&self.shared.inbox);
            // After the end of the thread the sender is dropped here, and whoever waits knows.
            if inbox.stop {
                return;
            }
            inbox.fast.push(Request { key, op, answer });
        }
        self.shared.wake.notify_one();
    }
}

/// Copies of states, which their episodes may want back. Belongs to the engine's thread; never written to a disk.
pub(super) struct Snapshots {
    limit: usize,
    next: u64,
    kept: Vec<(u64, u128, Seat)>,
}

impl Snapshots {
    /// At most `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            next: 1,
            kept: Vec::new(),
        }
    }

    pub fn take(&mut self, key: u128, sequence: &Seat) -> Result<u64, FastError> {
        if self.of(key).len() >= MAX_FAST_SNAPSHOTS {
            return Err(FastError::TooMany);
        }
        let (needed, limit) = (sequence.bytes(), self.limit);
        let free = limit.saturating_sub(self.bytes());
        if needed > free {
            return Err(FastError::NoRoom {
                needed,
                free,
                limit,
            });
        }
        let copy = sequence.copy().ok_or(FastError::NoRoom {
            needed,
            free: 0,
            limit,
        })?;
        let number = self.next;
        self.next += 1;
        self.kept.push((number, key, copy));
        Ok(number)
    }

    /// Only the episode that it was taken of gets a snapshot.
    pub fn get(&self, key: u128, number: u64) -> Result<&Seat, FastError> {
        let found = self.kept.iter().find(|(n, k, _)| (*n, *k) == (number, key));
        let (.., sequence) = found.ok_or(FastError::NoSnapshot(number))?;
        Ok(sequence)
    }

    pub fn forget(&mut self, key: u128, number: u64) -> Result<(), FastError> {
        if number != 0 {
            self.get(key, number)?;
        }
        self.kept
            .retain(|(n, k, _)| *k != key || (number != 0 && *n != number));
        Ok(())
    }

    pub fn of(&self, key: u128) -> Vec<u64> {
        let own = self.kept.iter().filter(|(_, k, _)| *k == key);
        own.map(|(n, ..)| *n).collect()
    }

    /// Forgets all of them: after a swap they are another student's.
    pub fn clear(&mut self) {
        self.kept.clear();
    }

    /// Forgets those on a card that failed.
    pub fn forget_cards(&mut self) {
        self.kept.retain(|(.., sequence)| !sequence.is_on_card());
    }

    pub fn bytes(&self) -> usize {
        self.kept
            .iter()
            .map(|(.., sequence)| sequence.bytes())
            .sum()
    }
}

/// What is known of these fast weights, for the rule.
pub(super) fn seen(seat: &Seat, behind_chunk: bool) -> FastSeen {
    FastSeen {
        behind_chunk,
        position: seat.ids().len(),
        drift: seat.drift(),
        loss: seat.losses().last(),
        loss_before: seat.losses().before(),
    }
}
