//! A gate in the way of background work: closed while something more urgent wants the cores.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Open unless somebody holds it closed. A [`Pool`](super::Pool) made with one waits at it before each part of a loop.
#[derive(Default)]
pub struct Gate {
    holds: AtomicUsize,
    closed: Mutex<Closed>,
    opened: Condvar,
}

/// How long it has been closed.
#[derive(Default)]
struct Closed {
    since: Option<Instant>,
    before: Duration,
}

impl Gate {
    /// Closes the gate until the hold, and every other one, is dropped.
    pub fn hold(self: &Arc<Self>) -> Hold {
        if self.holds.fetch_add(1, Ordering::SeqCst) == 0 {
            self.lock().since.get_or_insert_with(Instant::now);
        }
        Hold(self.clone())
    }

    /// True while somebody holds it.
    pub fn is_closed(&self) -> bool {
        self.holds.load(Ordering::SeqCst) > 0
    }

    /// Returns at once if the gate is open, else when it opens.
    #[inline]
    pub fn pass(&self) {
        if self.holds.load(Ordering::Relaxed) > 0 {
            self.wait();
        }
    }

    #[cold]
    fn wait(&self) {
        let mut closed = self.lock();
        while self.is_closed() {
            closed = self.opened.wait(closed).unwrap_or_else(|e| e.into_inner());
        }
    }

    /// For how long it has been closed, all in all.
    pub fn closed_for(&self) -> Duration {
        let closed = self.lock();
        closed.before + closed.since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    fn lock(&self) -> MutexGuard<'_, Closed> {
        self.closed.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// Keeps a [`Gate`] closed. Dropped with its owner, also where that one panics, so that nobody waits for ever.
pub struct Hold(Arc<Gate>);

impl Drop for Hold {
    fn drop(&mut self) {
        if self.0.holds.fetch_sub(1, Ordering::SeqCst) == 1 {
            // Under the lock, or a thread that has just seen the gate closed would sleep through this.
            let mut closed = self.0.lock();
            // Another hold may have come meanwhile; then it has never been open.
            if !self.0.is_closed() {
                let since = closed.since.take();
                closed.before += since.map_or(Duration::ZERO, |since| since.elapsed());
            }
            self.0.opened.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Pool;
    use super::*;

    #[test]
    fn a_gated_pool_stops_between_parts_and_goes_on_when_the_last_hold_is_gone() {
        let gate = Arc::new(Gate::default());
        let pool = Pool::gated(2, 0, gate.clone());
        let done = Arc::new(AtomicUsize::new(0));
        let first = gate.hold();
        let counted = done.clone();
        let work = std::thread::spawn(move || {
            // One part alone waits too.
            pool.run(1, |_| ());
            pool.run(200, |_| {
                counted.fetch_add(1, Ordering::SeqCst);
                std::thread::sleep(Duration::from_millis(1));
            });
        });
        let second = gate.hold();
        drop(first);
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(done.load(Ordering::SeqCst), 0);
        drop(second);
        while done.load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
        let hold = gate.hold();
        std::thread::sleep(Duration::from_millis(50));
        let stood = done.load(Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(20));
        assert!(stood < 200, "{stood}");
        assert_eq!(done.load(Ordering::SeqCst), stood);
        drop(hold);
        work.join().unwrap();
        assert_eq!(done.load(Ordering::SeqCst), 200);
        let closed = gate.closed_for();
        assert!(closed >= Duration::from_millis(90), "{closed:?}");
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(gate.closed_for(), closed, "open, it counts nothing");
    }

    #[test]
    fn a_hold_ends_with_a_thread_that_panics() {
        let gate = Arc::new(Gate::default());
        let theirs = gate.clone();
        let thread = std::thread::spawn(move || {
            let _hold = theirs.hold();
            panic!("the holder dies");
        });
        assert!(thread.join().is_err());
        gate.pass();
        assert!(!gate.is_closed());
    }
}
