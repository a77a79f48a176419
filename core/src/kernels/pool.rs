//! The one thread pool: sized by an argument, silent when idle, a good guest in another program's process.

use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::buffer::{Buffer, Shelf};
use super::gate::Gate;
use crate::threads::{give_way, spawn_quiet};

/// A set of worker threads that run one loop at a time on behalf of the thread that owns the pool.
///
/// The owner works too, so `Pool::new(1)` starts no thread. Workers sleep on a condition variable when there is no work. Waking
/// one takes longer than many a product of a decoding step, so inside a stretch that the owner declares ([`Pool::attentive`])
/// they look for the next loop for a moment before they sleep, giving way to any other thread that wants the core.
/// All signals are blocked in them, so a host's handlers run where the host expects them.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    threads: usize,
    shelf: Arc<Shelf>,
}

struct Shared {
    gate: Option<Arc<Gate>>,
    state: Mutex<State>,
    work: Condvar,
    done: Condvar,
    next: AtomicUsize,
    /// `State::epoch` and `State::running`, to look at without the lock.
    posted: AtomicU64,
    active: AtomicUsize,
    /// Stretches declared and not over.
    attention: AtomicUsize,
}

/// How long a thread looks for work, or for the end of others' work, before it sleeps: about two wake-ups' worth.
const LOOK: Duration = Duration::from_micros(60);

impl Shared {
    fn pass_gate(&self) {
        if let Some(gate) = &self.gate {
            gate.pass();
        }
    }

    /// Looks until `done`, at most for [`LOOK`], and not at all outside a declared stretch.
    fn look(&self, done: impl Fn() -> bool) {
        if self.attention.load(Ordering::Relaxed) == 0 {
            return;
        }
        let began = Instant::now();
        while !done() && began.elapsed() < LOOK {
            for _ in 0..32 {
                std::hint::spin_loop();
            }
            std::thread::yield_now();
        }
    }
}

/// See [`Pool::attentive`].
pub struct Attention<'a>(&'a Shared);

impl Drop for Attention<'_> {
    fn drop(&mut self) {
        self.0.attention.fetch_sub(1, Ordering::Relaxed);
    }
}

/// See [`Pool::keeping`].
pub struct Keeping(Arc<Shelf>);

impl Drop for Keeping {
    fn drop(&mut self) {
        self.0.keep(false);
    }
}

#[derive(Default)]
struct State {
    /// Counts loops; a worker that sees a new number joins that loop.
    epoch: u64,
    job: Option<Job>,
    parts: usize,
    running: usize,
    /// Workers inside `work.wait`.
    asleep: usize,
    panicked: bool,
    stop: bool,
}

#[derive(Clone, Copy)]
struct Job {
    call: unsafe fn(*const (), usize),
    data: *const (),
}

// SAFETY: the pointer is only used between the start and the end of `Pool::run`, which keeps the closure alive and requires it to be `Sync`.
unsafe impl Send for Job {}

impl Pool {
    /// A pool of `threads` threads, the caller's included; 0 counts as 1. `nice` is added to the workers' niceness (Linux), so
    /// that a background job gives way to the host and to serving.
    pub fn new(threads: usize, nice: i32) -> Self {
        Self::build(threads, nice, None)
    }

    /// The same, but before each part of a loop a thread waits until `gate` is open.
    pub fn gated(threads: usize, nice: i32, gate: Arc<Gate>) -> Self {
        Self::build(threads, nice, Some(gate))
    }

    /// For how long the pool's gate has been closed, all in all; zero without one.
    pub fn held_for(&self) -> Duration {
        let gate = self.shared.gate.as_ref();
        gate.map_or(Duration::ZERO, |gate| gate.closed_for())
    }

    fn build(threads: usize, nice: i32, gate: Option<Arc<Gate>>) -> Self {
        let threads = threads.max(1);
        let shared = Arc::new(Shared {
            gate,
            state: Mutex::new(State::default()),
            work: Condvar::new(),
            done: Condvar::new(),
            next: AtomicUsize::new(0),
            posted: AtomicU64::new(0),
            active: AtomicUsize::new(0),
            attention: AtomicUsize::new(0),
        });
        let workers = (1..threads)
            .filter_map(|i| {
                let shared = shared.clone();
                spawn_quiet(&format!("locum-pool-{i}"), move || {
                    if nice != 0 {
                        give_way(nice);
                    }
                    worker(&shared)
                })
                .ok()
            })
            .collect();
        Self {
            shared,
            workers,
            threads,
            shelf: Arc::default(),
        }
    }

    /// A buffer of `n` numbers that are left over from anything. Inside a stretch declared by [`Pool::keeping`] it is likely one that
    /// was dropped before.
    pub fn buffer(&self, n: usize) -> Buffer {
        self.shelf.take(n)
    }

    /// Declares that buffers of the same sizes will be asked for again, until the guard is dropped.
    pub fn keeping(&self) -> Keeping {
        self.shelf.keep(true);
        Keeping(self.shelf.clone())
    }

    /// Threads that take part in a loop, the caller's included.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Declares a stretch of many short loops, such as one step of a model, until the guard is dropped.
    pub fn attentive(&self) -> Attention<'_> {
        self.shared.attention.fetch_add(1, Ordering::Relaxed);
        Attention(&self.shared)
    }

    /// Runs `body(0), ..., body(parts - 1)`, in any order, on all threads, and returns when all are done.
    /// Must be called by one thread at a time. A panic in a part is raised again here after the others have finished.
    pub fn run<F: Fn(usize) + Sync>(&self, parts: usize, body: F) {
        if parts <= 1 || self.workers.is_empty() {
            for part in 0..parts {
                self.shared.pass_gate();
                body(part);
            }
            return;
        }
        unsafe fn call<F: Fn(usize) + Sync>(data: *const (), part: usize) {
            // SAFETY: `data` is the `&F` that `run` holds until every part has been run.
            unsafe { (*(data as *const F))(part) }
        }
        self.shared.next.store(0, Ordering::Relaxed);
        let asleep;
        {
            let mut state = self.shared.state.lock().unwrap_or_else(|e| e.into_inner());
            state.epoch += 1;
            state.parts = parts;
            state.job = Some(Job {
                call: call::<F>,
                data: &body as *const F as *const (),
            });
            state.panicked = false;
            self.shared.posted.store(state.epoch, Ordering::Release);
            asleep = state.asleep;
        }
        if asleep > 0 && parts == 2 {
            self.shared.work.notify_one();
        } else if asleep > 0 {
            self.shared.work.notify_all();
        }
        let mine = catch_unwind(AssertUnwindSafe(|| loop {
            let part = self.shared.next.fetch_add(1, Ordering::Relaxed);
            if part >= parts {
                break;
            }
            self.shared.pass_gate();
            body(part);
        }));
        // Parts that nobody has begun must not be begun after a panic of ours.
        self.shared.next.store(usize::MAX / 2, Ordering::Relaxed);
        self.shared
            .look(|| self.shared.active.load(Ordering::Acquire) == 0);
        let mut state = self.shared.state.lock().unwrap_or_else(|e| e.into_inner());
        state.job = None;
        while state.running > 0 {
            state = self
                .shared
                .done
                .wait(state)
                .unwrap_or_else(|e| e.into_inner());
        }
        let theirs = state.panicked;
        drop(state);
        if let Err(panic) = mine {
            resume_unwind(panic);
        }
        assert!(!theirs, "a pool thread panicked inside a kernel");
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared
            .state
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .stop = true;
        self.shared.work.notify_all();
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

fn worker(shared: &Shared) {
    let mut seen = 0;
    loop {
        shared.look(|| shared.posted.load(Ordering::Acquire) != seen);
        let (job, parts) = {
            let mut state = shared.state.lock().unwrap_or_else(|e| e.into_inner());
            loop {
                if state.stop {
                    return;
                }
                if state.epoch != seen {
                    seen = state.epoch;
                    // The owner may already have finished the whole loop by itself.
                    if let Some(job) = state.job {
                        state.running += 1;
                        shared.active.store(state.running, Ordering::Release);
                        break (job, state.parts);
                    }
                }
                state.asleep += 1;
                state = shared.work.wait(state).unwrap_or_else(|e| e.into_inner());
                state.asleep -= 1;
            }
        };
        let result = catch_unwind(AssertUnwindSafe(|| loop {
            let part = shared.next.fetch_add(1, Ordering::Relaxed);
            if part >= parts {
                break;
            }
            shared.pass_gate();
            // SAFETY: the owner is still inside `run`: it waits for `running` to fall to 0, and this thread counted itself in
            // under the lock while the job was still posted.
            unsafe { (job.call)(job.data, part) };
        }));
        let mut state = shared.state.lock().unwrap_or_else(|e| e.into_inner());
        state.running -= 1;
        shared.active.store(state.running, Ordering::Release);
        state.panicked |= result.is_err();
        if state.running == 0 {
            shared.done.notify_one();
        }
    }
}

/// A mutable slice that several parts of one [`Pool::run`] write to in places that do not overlap.
pub struct SharedMut<'a, T> {
    ptr: *mut T,
    len: usize,
    _life: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: access goes through `slice`, whose caller promises that ranges do not overlap between threads.
unsafe impl<T: Send> Send for SharedMut<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedMut<'_, T> {}

impl<'a, T> SharedMut<'a, T> {
    pub fn new(slice: &'a mut [T]) -> Self {
        Self {
            ptr: slice.as_mut_ptr(),
            len: slice.len(),
            _life: std::marker::PhantomData,
        }
    }

    /// The elements `start..start + len`.
    ///
    /// # Safety
    /// No two live slices obtained from this value may overlap.
    ///
    /// # Panics
    /// If the range is outside the slice.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn slice(&self, start: usize, len: usize) -> &mut [T] {
        assert!(
            start <= self.len && len <= self.len - start,
            "range {start}+{len} outside {}",
            self.len
        );
        // SAFETY: in range by the line above; not aliased by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(start), len) }
    }

    /// The elements `start..start + len`, to read.
    ///
    /// # Safety
    /// Nobody writes to them while the slice lives.
    ///
    /// # Panics
    /// If the range is outside the slice.
    pub unsafe fn read(&self, start: usize, len: usize) -> &[T] {
        assert!(
            start <= self.len && len <= self.len - start,
            "range {start}+{len} outside {}",
            self.len
        );
        // SAFETY: in range by the line above; not written to by the caller's promise.
        unsafe { std::slice::from_raw_parts(self.ptr.add(start), len) }
    }

    /// Elements in all.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True without elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Pointer to the first element, for kernels that address a strided matrix.
    pub fn as_ptr(&self) -> *mut T {
        self.ptr
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_runs_exactly_once() {
        let pool = Pool::new(4, 0);
        for parts in [0, 1, 2, 3, 17, 1000] {
            let mut counts = vec![0u32; parts];
            let shared = SharedMut::new(&mut counts);
            // SAFETY: each part has a number of its own.
            pool.run(parts, |i| unsafe { shared.slice(i, 1)[0] += 1 });
            assert!(counts.iter().all(|&c| c == 1), "{parts} parts");
        }
    }

    #[test]
    fn loops_of_an_attentive_stretch_and_of_none_follow_each_other_without_loss() {
        let pool = Pool::new(3, 0);
        let total = AtomicUsize::new(0);
        for round in 0..300 {
            let _attention = (round % 3 == 0).then(|| pool.attentive());
            for parts in [2, 5, 1] {
                pool.run(parts, |i| {
                    total.fetch_add(i + 1, Ordering::Relaxed);
                });
            }
            if round % 50 == 0 {
                std::thread::sleep(2 * LOOK);
            }
        }
        assert_eq!(total.into_inner(), 300 * (3 + 15 + 1));
    }

    #[test]
    fn a_panic_in_a_part_reaches_the_caller_and_leaves_the_pool_usable() {
        let pool = Pool::new(3, 0);
        let result = catch_unwind(AssertUnwindSafe(|| {
            pool.run(50, |i| assert!(i != 20, "part 20"))
        }));
        assert!(result.is_err());
        let total = AtomicUsize::new(0);
        pool.run(50, |i| {
            total.fetch_add(i, Ordering::Relaxed);
        });
        assert_eq!(total.into_inner(), 49 * 50 / 2);
    }
}
