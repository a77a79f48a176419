//! What happened, for a host that asks: a bounded queue and one descriptor that is readable while the queue is not empty.

use std::collections::VecDeque;
use std::sync::Mutex;

use serde_json::Value;

use super::types::{Event, EventKind};

/// Events kept for a host that does not drain them; the oldest are dropped and counted.
const MAX_EVENTS: usize = 4096;

/// Events kept for the policy's `on_event`, which the keeper asks about once a second.
const MAX_TOLD: usize = 256;

pub(super) struct Events {
    queue: Mutex<(VecDeque<Event>, u64)>,
    /// What the policy has not been told yet.
    untold: Mutex<VecDeque<Event>>,
    fd: i32,
}

impl Events {
    pub(super) fn new() -> Self {
        // SAFETY: a plain system call; a failure gives -1, which every use below tolerates.
        #[cfg(target_os = "linux")]
        let fd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
        #[cfg(not(target_os = "linux"))]
        let fd = -1;
        Self {
            queue: Mutex::default(),
            untold: Mutex::default(),
            fd,
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
        self.signal(true);
    }

    /// The oldest event; `None` resets the descriptor.
    pub(super) fn pop(&self) -> Option<Event> {
        let mut queue = self.queue.lock().unwrap_or_else(|e| e.into_inner());
        let event = queue.0.pop_front();
        if queue.0.is_empty() {
            self.signal(false);
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

    pub(super) fn fd(&self) -> i64 {
        self.fd as i64
    }

    fn signal(&self, on: bool) {
        if self.fd < 0 {
            return;
        }
        let mut number = 1u64;
        // SAFETY: eight bytes of a local value; the descriptor is ours until drop and does not block.
        unsafe {
            let at = (&raw mut number).cast::<libc::c_void>();
            if on {
                libc::write(self.fd, at, 8);
            } else {
                libc::read(self.fd, at, 8);
            }
        }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        if self.fd >= 0 {
            // SAFETY: the descriptor was opened by `new` and is closed nowhere else.
            unsafe { libc::close(self.fd) };
        }
    }
}
