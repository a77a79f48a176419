//! What happened, for a host that asks, and for the policy's `on_event`.

use std::collections::VecDeque;

use serde_json::Value;

use super::bell::Bell;
use super::queue::{self, Queue};
use super::types::{Event, EventKind};

/// Events kept for a host that does not drain them; the oldest are dropped and counted.
const MAX_EVENTS: usize = 4096;

/// Events kept for the policy's `on_event`, which the keeper asks about once a second.
const MAX_TOLD: usize = 256;

pub(super) struct Events {
    queue: Queue<Event, Bell>,
    /// What the policy has not been told yet.
    untold: Queue<Event, ()>,
}

impl queue::Bell for Bell {
    fn ring(&self) {
        Bell::ring(self);
    }

    fn silence(&self) {
        Bell::silence(self);
    }
}

impl Events {
    pub(super) fn new() -> Self {
        Self {
            queue: Queue::new(MAX_EVENTS, Bell::new()),
            untold: Queue::new(MAX_TOLD, ()),
        }
    }

    pub(super) fn push(&self, kind: EventKind, subject: u64, number: i64, detail: Value) {
        let event = |detail| Event {
            kind,
            subject,
            number,
            detail,
        };
        if !matches!(kind, EventKind::CallDone | EventKind::JobProgress) {
            self.untold.push(event(detail.clone()));
        }
        self.queue.push(event(detail));
    }

    /// The oldest event. The bell is silent once none is left.
    pub(super) fn pop(&self) -> Option<Event> {
        self.queue.pop()
    }

    /// What the policy has not been told yet, oldest first.
    pub(super) fn untold(&self) -> VecDeque<Event> {
        self.untold.take()
    }

    pub(super) fn dropped(&self) -> u64 {
        self.queue.dropped()
    }

    pub(super) fn bell(&self) -> &Bell {
        &self.queue.bell
    }
}
