//! The states of one policy, and the books kept about its hooks.

use locum_core::threads::spawn_quiet;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use locum_core::policy::HookStats;

use crate::hooks::{Failure, Hook, FAILURE_WINDOW, MAX_FAILURES};
use crate::sandbox::{Program, Sandbox};
use crate::watchdog::{Stopped, Watchdog};
use crate::PolicyError;

/// Calls after which a state is replaced.
const CALLS_PER_STATE: u32 = 10_000;
/// Durations kept for each hook's percentiles.
const SAMPLES: usize = 1024;

/// States ready for use. A taken state belongs to its taker until it is given back.
pub struct Pool {
    program: Program,
    watchdog: Watchdog,
    free: Mutex<Vec<Sandbox>>,
    /// States in `free` or in use.
    alive: AtomicUsize,
    size: usize,
    replaced: AtomicU64,
}

impl Pool {
    /// Builds `size` states.
    ///
    /// # Errors
    /// Those of [`Sandbox::new`].
    pub fn new(program: Program, watchdog: Watchdog, size: usize) -> Result<Self, PolicyError> {
        let free = (0..size)
            .map(|_| Sandbox::new(&program, &watchdog))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            program,
            watchdog,
            free: Mutex::new(free),
            alive: AtomicUsize::new(size),
            size,
            replaced: AtomicU64::new(0),
        })
    }

    /// A free state. `None` if there is none: a hook on the path of a step then takes its fail-safe at once; another one has
    /// up to as many states built for it again as the pool holds.
    pub fn take(&self, hook: Hook) -> Option<Sandbox> {
        if let Some(state) = lock(&self.free).pop() {
            return Some(state);
        }
        if hook.is_hot() {
            return None;
        }
        if self.alive.fetch_add(1, Ordering::Relaxed) < self.size * 2 {
            if let Ok(state) = Sandbox::new(&self.program, &self.watchdog) {
                return Some(state);
            }
        }
        self.alive.fetch_sub(1, Ordering::Relaxed);
        None
    }

    /// Gives a state back. A worn-out one is replaced on a thread of its own, so that no hook waits for that.
    pub fn give_back(self: &Arc<Self>, state: Sandbox) {
        if !state.is_stale(CALLS_PER_STATE) {
            let mut free = lock(&self.free);
            if free.len() < self.size {
                return free.push(state);
            }
            drop(free);
            self.alive.fetch_sub(1, Ordering::Relaxed);
            return;
        }
        let pool = self.clone();
        let replace = move || {
            drop(state);
            match Sandbox::new(&pool.program, &pool.watchdog) {
                Ok(fresh) => lock(&pool.free).push(fresh),
                // No memory for a state: the pool goes on with the others.
                Err(error) => {
                    pool.alive.fetch_sub(1, Ordering::Relaxed);
                    tracing::warn!(policy = pool.program.name, %error, "a Lua state could not be replaced");
                }
            }
            pool.replaced.fetch_add(1, Ordering::Relaxed);
        };
        if spawn_quiet("locum-lua-state", replace).is_err() {
            // The closure, and with it the state, is gone.
            self.alive.fetch_sub(1, Ordering::Relaxed);
        }
    }

    #[cfg(test)]
    pub fn replaced(&self) -> u64 {
        self.replaced.load(Ordering::Relaxed)
    }
}

/// Calls, failures and durations of one hook.
#[derive(Default)]
pub struct Meter {
    calls: AtomicU64,
    failures: AtomicU64,
    busy: AtomicU64,
    off: AtomicBool,
    recent: Mutex<Recent>,
}

#[derive(Default)]
struct Recent {
    failures: VecDeque<Instant>,
    /// Nanoseconds of the last [`SAMPLES`] calls, as a ring.
    durations: Vec<u32>,
}

impl Meter {
    pub fn is_off(&self) -> bool {
        self.off.load(Ordering::Relaxed)
    }

    /// Counts a finished call; true if this failure switched the hook off.
    pub fn count(&self, took: Duration, failure: Option<&Failure>) -> bool {
        let n = self.calls.fetch_add(1, Ordering::Relaxed) as usize;
        match failure {
            Some(Failure::Busy) => {
                self.busy.fetch_add(1, Ordering::Relaxed);
                false
            }
            Some(Failure::Off) => false,
            // A hook cannot wait for anything, so it was the machine that gave it no time: counted, but not held against it.
            Some(Failure::TooLong {
                stopped: Stopped::Wall(_),
                ..
            }) => {
                self.sample(n, took);
                self.failures.fetch_add(1, Ordering::Relaxed);
                false
            }
            Some(_) => {
                self.sample(n, took);
                self.failures.fetch_add(1, Ordering::Relaxed);
                let now = Instant::now();
                let mut recent = lock(&self.recent);
                recent.failures.push_back(now);
                while recent
                    .failures
                    .front()
                    .is_some_and(|first| now - *first > FAILURE_WINDOW)
                {
                    recent.failures.pop_front();
                }
                recent.failures.len() >= MAX_FAILURES && !self.off.swap(true, Ordering::Relaxed)
            }
            None => {
                self.sample(n, took);
                false
            }
        }
    }

    fn sample(&self, n: usize, took: Duration) {
        let nanos = took.as_nanos().min(u32::MAX as u128) as u32;
        let mut recent = lock(&self.recent);
        if recent.durations.len() < SAMPLES {
            recent.durations.push(nanos);
        } else {
            recent.durations[n % SAMPLES] = nanos;
        }
    }

    pub fn stats(&self, hook: Hook) -> HookStats {
        let mut durations = lock(&self.recent).durations.clone();
        durations.sort_unstable();
        let percentile = |p: f64| match durations.len() {
            0 => 0.0,
            n => durations[((n - 1) as f64 * p).round() as usize] as f64 / 1e3,
        };
        HookStats {
            hook: hook.name().into(),
            calls: self.calls.load(Ordering::Relaxed),
            failures: self.failures.load(Ordering::Relaxed),
            busy: self.busy.load(Ordering::Relaxed),
            switched_off: self.is_off(),
            p50_us: percentile(0.5),
            p99_us: percentile(0.99),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::Printer;

    fn pool(source: &str, size: usize) -> Arc<Pool> {
        let program =
            Program::compile(source, "test.lua", 16 << 20, Printer::List(Arc::default())).unwrap();
        Arc::new(Pool::new(program, Watchdog::start().unwrap(), size).unwrap())
    }

    #[test]
    fn an_empty_pool_has_nothing_for_a_step_and_a_fresh_state_for_the_background() {
        let pool = pool("return {}", 1);
        let first = pool.take(Hook::Decide).unwrap();
        assert!(pool.take(Hook::Decide).is_none());
        let second = pool.take(Hook::Curate).unwrap();
        assert!(
            pool.take(Hook::Curate).is_none(),
            "no more than twice the size"
        );
        pool.give_back(first);
        pool.give_back(second);
        assert!(pool.take(Hook::Decide).is_some());
        assert!(
            pool.take(Hook::Decide).is_none(),
            "the extra state is not kept"
        );
    }

    #[test]
    fn a_worn_out_state_is_replaced_by_a_fresh_one() {
        let pool = pool("local n = 0\nreturn { schedule = function() n += 1 return n == 1 and 'now' or 'wait' end }", 1);
        let answer = |state: &mut Sandbox| {
            let argument = state.lua().create_table().unwrap();
            state
                .call(Hook::Schedule, argument, 0)
                .unwrap()
                .front()
                .unwrap()
                .to_string()
                .unwrap()
        };
        let mut state = pool.take(Hook::Schedule).unwrap();
        assert_eq!(
            (answer(&mut state), answer(&mut state)),
            ("now".into(), "wait".into())
        );
        state.calls = CALLS_PER_STATE;
        pool.give_back(state);
        while pool.replaced() == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        let mut fresh = pool.take(Hook::Decide).unwrap();
        assert_eq!(answer(&mut fresh), "now");
        assert_eq!(fresh.calls, 1);
    }

    #[test]
    fn a_hook_that_the_machine_gave_no_time_is_not_switched_off() {
        let meter = Meter::default();
        let starved = Failure::TooLong {
            at: Default::default(),
            stopped: Stopped::Wall(Duration::from_millis(120)),
        };
        for _ in 0..20 {
            assert!(!meter.count(Duration::from_millis(120), Some(&starved)));
        }
        assert_eq!(
            (meter.is_off(), meter.stats(Hook::Decide).failures),
            (false, 20)
        );
    }

    #[test]
    fn the_fifth_failure_within_a_minute_switches_a_hook_off_once() {
        let meter = Meter::default();
        let failure = Failure::Returned("x".into());
        let switched: Vec<bool> = (0..7)
            .map(|_| meter.count(Duration::from_micros(3), Some(&failure)))
            .collect();
        assert_eq!(switched, [false, false, false, false, true, false, false]);
        assert!(meter.is_off());
    }

    #[test]
    fn a_busy_pool_is_counted_and_is_no_failure() {
        let meter = Meter::default();
        for _ in 0..20 {
            assert!(!meter.count(Duration::ZERO, Some(&Failure::Busy)));
        }
        let stats = meter.stats(Hook::Decide);
        assert_eq!(
            (stats.calls, stats.busy, stats.failures, stats.switched_off),
            (20, 20, 0, false)
        );
    }

    #[test]
    fn percentiles_come_from_the_last_calls() {
        let meter = Meter::default();
        for micros in 1..=100 {
            meter.count(Duration::from_micros(micros), None);
        }
        let stats = meter.stats(Hook::Gate);
        assert_eq!((stats.p50_us, stats.p99_us), (51.0, 99.0));
        for _ in 0..2 * SAMPLES {
            meter.count(Duration::from_micros(7), None);
        }
        assert_eq!(meter.stats(Hook::Gate).p99_us, 7.0);
    }
}
