//! When the thread that takes from a queue may sleep, so that who puts something in needs a system call only where it does.

use super::sync::{fence, AtomicBool, Ordering};

/// Whether the taker sleeps. One thread takes, any number put in. Each says what it has to say before it looks at what the other says
/// (the two fences), so one of the two sees the other: `tests/loom` tries every order.
#[derive(Debug, Default)]
pub struct Doze {
    asleep: AtomicBool,
}

impl Doze {
    /// The taker's: sleeps by `sleep`, unless something waits. `sleep` must end at once if the thread was woken since its last sleep, as
    /// parking does; it may end without a reason.
    pub fn unless(&self, something_waits: impl Fn() -> bool, sleep: impl FnOnce()) {
        self.asleep.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if !something_waits() {
            sleep();
        }
        self.asleep.store(false, Ordering::Relaxed);
    }

    /// Asked behind putting something in: whether the taker has to be woken for it.
    pub fn must_be_woken(&self) -> bool {
        fence(Ordering::SeqCst);
        self.asleep.load(Ordering::Relaxed)
    }
}
