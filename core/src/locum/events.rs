//! What happened, for a host that asks: a bounded queue, and a bell that rings while it is not empty.

use std::collections::VecDeque;
use std::sync::Mutex;

use serde_json::Value;

use super::bell::Bell;
use super::types::{Event, EventKind};

/// Events kept for a host that does not drain them; the oldest are dropped and counted.
const MAX_EVENTS: usize = 4096;

/// Events kept for the policy's `on_event`, which the keeper asks about once a second.
const MAX_TOLD: usize = 256;

pub(super) struct Events {
    queue: Mutex<(VecDeque<Event>, u64)>,
    /// What the policy has not been told yet.
    untold: Mutex<VecDeque<Event>>,
    pub(super) bell: Bell,
}

impl Events {
    pub(super) fn new() -> Self {
        Self {
            queue: Mutex::default(),
            untold: Mutex::default(),
            bell: Bell::new(),
        }
    }

    pub(super) fn push(&self, kind: EventKind, subject: u64, number: i64, detail: Value) {
        if !matches!(kind, EventKind::CallDone | EventKind::JobProgress) {
            let mut untold = self.untold.lock().unwrap_or_else(|e| e.into_inner());
            if untold.len() >= MAX_TOLD {
                untold.pop_front();
            }
            let detail = detail.clone();
            untold.push_back(Event {
                kind,
                subject,
                number,
                detail,
            });
        }
        let mut queue = self.queue.lock().unwrap_or_else(|e| e.into_inner());
        if queue.0.len() >= MAX_EVENTS {
            queue.0.pop_front();
            queue.1 += 1;
        }
        queue.0.push_back(Event {
            kind,
            subject,
            number,
            detail,
        });
        self.bell.ring();
    }

    /// The oldest event. The bell is silent once none is left.
    pub(super) fn pop(&self) -> Option<Event> {
        let mut queue = self.queue.lock().unwrap_or_else(|e| e.into_inner());
        let event = queue.0.pop_front();
        if queue.0.is_empty() {
            self.bell.silence();
        }
        event
    }

    /// What the policy has not been told yet, oldest first.
    pub(super) fn untold(&self) -> VecDeque<Event> {
        std::mem::take(&mut *self.untold.lock().unwrap_or_else(|e| e.into_inner()))
    }

    pub(super) fn dropped(&self) -> u64 {
        self.queue.lock().unwrap_or_else(|e| e.into_inner()).1
    }
}
