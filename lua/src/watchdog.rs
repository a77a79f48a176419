//! The watchdog: a thread that stops a hook which is late, at no cost to one that is not.
//!
//! Luau asks an interrupt callback at every loop edge, call and return, and on every step of the pattern matcher. A callback
//! that is always set costs a factor of two to seven on tight loops, so here the field is empty until a hook has used up its
//! time; only then does the watchdog store a function into it that raises an error. As the field stays set until the hook is
//! left, a `pcall` that catches the error meets the next one at once.
//!
//! Time is counted as CPU time of the hook's thread, because on a machine whose cores are busy with training a hook may wait
//! for a core much longer than it runs. A cap in wall-clock time stands beside it for the host's sake.
//!
//! All `unsafe` of this crate is in this file.

use locum_core::threads::spawn_quiet;
use std::ffi::c_int;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

use mlua::{ffi, Lua};

/// How often the watchdog looks for hooks. A hook may run this much longer than its limit: until the watchdog first sees it, for its
/// CPU time counts from there. Then the watchdog comes back when the hook can be late at the earliest.
const TICK: Duration = Duration::from_millis(1);
/// Ticks without any call after which the watchdog sleeps until the next one; that one then pays for waking it.
const IDLE_TICKS: u32 = 100;

/// How long a hook may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimeLimit {
    /// CPU time of the calling thread.
    pub cpu: Duration,
    /// Time on the wall, whatever the thread did in it.
    pub wall: Duration,
}

impl TimeLimit {
    /// A limit on CPU time, with a wall-clock cap of ten times as much and 100 ms: on a machine with four busy threads for each
    /// core, 5 ms of CPU time have been seen to take 40 ms.
    pub const fn cpu_ms(ms: u64) -> Self {
        Self {
            cpu: Duration::from_millis(ms),
            wall: Duration::from_millis(ms * 10 + 100),
        }
    }
}

/// Which limit a stopped hook had met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stopped {
    Cpu(Duration),
    Wall(Duration),
}

/// Owns the thread; it ends with this value. Every [`Watch`] keeps what it needs alive, so the order of drops does not matter,
/// but a hook that runs after the watchdog's end is not watched: keep both in one owner.
pub struct Watchdog {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    /// Starts the thread.
    ///
    /// # Errors
    /// What the system said when it refused a thread.
    pub fn start() -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let theirs = shared.clone();
        let thread = spawn_quiet("locum-lua-watch", move || theirs.keep_watch())?;
        *lock(&shared.thread) = Some(thread.thread().clone());
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Puts a Lua state under watch.
    ///
    /// # Errors
    /// None in practice: mlua's for a state without memory for one stack frame.
    pub fn watch(&self, lua: &Lua) -> mlua::Result<Watch> {
        let mut callbacks = std::ptr::null_mut();
        // SAFETY: the closure only asks Luau for the address of the state's callback table; it leaves the stack alone.
        unsafe { lua.exec_raw::<()>((), |state| callbacks = ffi::lua_callbacks(state))? };
        let slot = Arc::new(Slot(Mutex::new(SlotState {
            interrupt: Interrupt(callbacks),
            running: None,
            stopped: None,
        })));
        lock(&self.shared.slots).push(slot.clone());
        Ok(Watch {
            shared: self.shared.clone(),
            slot,
            _lua: lua.clone(),
        })
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // It cannot panic: it only locks, reads clocks and stores a pointer.
            let _ = thread.join();
        }
    }
}

/// One Lua state under watch.
pub struct Watch {
    shared: Arc<Shared>,
    slot: Arc<Slot>,
    /// The callback table that `slot` points to lives in this state.
    _lua: Lua,
}

impl Watch {
    /// Runs `f`, which calls into the watched state on this thread, and has it stopped when it is late. When the second value
    /// is not `None`, what `f` returned is the stop's error (or, in a race, a result that came too late).
    pub fn run<R>(&self, limit: TimeLimit, f: impl FnOnce() -> R) -> (R, Option<Stopped>) {
        {
            let mut slot = lock(&self.slot.0);
            slot.stopped = None;
            slot.running = Some(Running {
                limit,
                since: Instant::now(),
                clock: ThreadClock::mine(),
                cpu_at_first_sight: None,
            });
        }
        self.shared.calls.fetch_add(1, Ordering::SeqCst);
        if self.shared.asleep.load(Ordering::SeqCst) {
            self.shared.wake();
        }
        let guard = Running::guard(&self.slot);
        let result = f();
        drop(guard);
        let stopped = lock(&self.slot.0).stopped;
        (result, stopped)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        lock(&self.shared.slots).retain(|slot| !Arc::ptr_eq(slot, &self.slot));
        // The watchdog may still hold a reference from a sweep under way; without a running call it never touches the pointer.
        lock(&self.slot.0).running = None;
    }
}

#[derive(Default)]
struct Shared {
    slots: Mutex<Vec<Arc<Slot>>>,
    /// Calls ever begun: tells a quiet tick from a busy one.
    calls: AtomicU64,
    asleep: AtomicBool,
    stop: AtomicBool,
    thread: Mutex<Option<Thread>>,
}

impl Shared {
    fn wake(&self) {
        if let Some(thread) = &*lock(&self.thread) {
            thread.unpark();
        }
    }

    fn keep_watch(&self) {
        let (mut calls_seen, mut quiet_ticks) = (0, 0);
        while !self.stop.load(Ordering::SeqCst) {
            let slots: Vec<Arc<Slot>> = lock(&self.slots).clone();
            let late_in = slots.iter().filter_map(|slot| lock(&slot.0).look()).min();
            let calls = self.calls.load(Ordering::SeqCst);
            quiet_ticks = if late_in.is_some() || calls != calls_seen {
                0
            } else {
                quiet_ticks + 1
            };
            calls_seen = calls;
            if quiet_ticks < IDLE_TICKS {
                // Not sooner than a tenth: a hook that waits for a core uses none of the time that it has left.
                std::thread::park_timeout(late_in.unwrap_or(TICK).clamp(TICK / 10, TICK));
                continue;
            }
            // A caller first counts its call and then reads `asleep`; here it is the other way round, so one of the two sees
            // the other (both orders are SeqCst) and a call cannot start unseen.
            self.asleep.store(true, Ordering::SeqCst);
            if self.calls.load(Ordering::SeqCst) == calls_seen && !self.stop.load(Ordering::SeqCst)
            {
                std::thread::park();
            }
            self.asleep.store(false, Ordering::SeqCst);
            quiet_ticks = 0;
        }
    }
}

struct Slot(Mutex<SlotState>);

struct SlotState {
    interrupt: Interrupt,
    running: Option<Running>,
    stopped: Option<Stopped>,
}

impl SlotState {
    /// One look at the state: how long the call in it cannot be late yet, if one is running that was not stopped.
    fn look(&mut self) -> Option<Duration> {
        let running = self.running.as_mut()?;
        if self.stopped.is_some() {
            return Some(TICK);
        }
        let limit = running.limit;
        let wall = running.since.elapsed();
        let cpu = running.cpu_since_first_sight();
        if wall >= limit.wall {
            self.stopped = Some(Stopped::Wall(limit.wall));
        } else if cpu.is_some_and(|cpu| cpu >= limit.cpu) {
            self.stopped = Some(Stopped::Cpu(limit.cpu));
        }
        if self.stopped.is_some() {
            self.interrupt.set(true);
            return Some(TICK);
        }
        // A thread uses no more CPU time than passes on the wall.
        Some(
            limit
                .cpu
                .saturating_sub(cpu.unwrap_or_default())
                .min(limit.wall - wall),
        )
    }
}

struct Running {
    limit: TimeLimit,
    since: Instant,
    clock: ThreadClock,
    cpu_at_first_sight: Option<Duration>,
}

impl Running {
    /// CPU time since the watchdog's first look at the call. Reading the clock there, and not when the call begins, keeps a
    /// system call off the hot path.
    fn cpu_since_first_sight(&mut self) -> Option<Duration> {
        let now = self.clock.read()?;
        let first = *self.cpu_at_first_sight.get_or_insert(now);
        Some(now.saturating_sub(first + ThreadClock::DOUBT))
    }

    /// Ends the call when dropped, also when `f` panics.
    fn guard(slot: &Slot) -> impl Drop + '_ {
        struct Guard<'a>(&'a Slot);
        impl Drop for Guard<'_> {
            fn drop(&mut self) {
                let mut slot = lock(&self.0 .0);
                slot.running = None;
                slot.interrupt.set(false);
            }
        }
        Guard(slot)
    }
}

/// Address of the callback table of one Lua state. Touched only through [`Interrupt::set`], under the slot's lock.
struct Interrupt(*mut ffi::lua_Callbacks);

// SAFETY: Luau's `lua.h` allows `interrupt`, alone of all fields, to be set from any thread at any time; this type touches no
// other field.
unsafe impl Send for Interrupt {}

impl Interrupt {
    fn set(&self, armed: bool) {
        let value: Option<unsafe extern "C-unwind" fn(*mut ffi::lua_State, c_int)> =
            armed.then_some(stop as _);
        // SAFETY: the table lives as long as its state. `set` is called from the guard of `Watch::run`, which borrows the
        // `Watch` and through it the state, and from the watchdog only while a call is running, which means inside the same
        // `Watch::run`; the slot's lock orders the two. The VM reads the field without a lock, which `lua.h` allows for.
        // A volatile store of an aligned pointer is one store on every target we build for.
        unsafe { std::ptr::addr_of_mut!((*self.0).interrupt).write_volatile(value) }
    }
}

/// What Luau calls at its next safepoint once a hook is late: it raises an error, and stays set. mlua adds the traceback.
unsafe extern "C-unwind" fn stop(state: *mut ffi::lua_State, gc: c_int) {
    // Inside the garbage collector (gc >= 0) an error would leave it half done.
    if gc >= 0 {
        return;
    }
    // SAFETY: called by the VM on the thread that runs `state`, at a safepoint where errors may be raised; upstream's own
    // command line does the same (reserve a slot, raise). This frame owns nothing that an unwind could leak.
    unsafe {
        ffi::lua_rawcheckstack(state, 1);
        ffi::lua_pushstring(state, c"stopped: out of time".as_ptr());
        ffi::lua_error(state);
    }
}

/// The CPU clock of one thread, readable from another. Where the system has none, only the wall-clock cap holds.
#[cfg(target_os = "linux")]
struct ThreadClock(libc::clockid_t);

#[cfg(target_os = "linux")]
impl ThreadClock {
    /// How much too high the difference of two readings may be.
    const DOUBT: Duration = Duration::ZERO;

    fn mine() -> Self {
        let mut clock = libc::CLOCK_MONOTONIC;
        // SAFETY: `clock` outlives the call, and the calling thread is alive. On failure `clock` stays the wall clock, which
        // counts at least as much.
        unsafe { libc::pthread_getcpuclockid(libc::pthread_self(), &mut clock) };
        Self(clock)
    }

    /// `None` if the clock cannot be read. The thread is alive: it is inside `Watch::run`, whose end waits for our lock.
    fn read(&self) -> Option<Duration> {
        let mut time = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: `time` outlives the call.
        let status = unsafe { libc::clock_gettime(self.0, &mut time) };
        (status == 0).then(|| Duration::new(time.tv_sec as u64, time.tv_nsec as u32))
    }
}

/// The CPU clock of a thread, by the thread's number.
///
/// Windows charges a thread for each of its timer's ticks that finds it running, also if it ran for a part of it, so a reading may be
/// a tick too high: one is taken off, that no hook is stopped early. One that is late is stopped up to two ticks later than on Linux.
#[cfg(windows)]
struct ThreadClock(u32);

#[cfg(windows)]
impl ThreadClock {
    /// The longest tick that Windows has: 64 a second.
    const DOUBT: Duration = Duration::from_micros(15_625);

    fn mine() -> Self {
        // SAFETY: asks for a number.
        Self(unsafe { windows_sys::Win32::System::Threading::GetCurrentThreadId() })
    }

    /// `None` if the clock cannot be read. The thread is alive: it is inside `Watch::run`, whose end waits for our lock.
    fn read(&self) -> Option<Duration> {
        use std::os::windows::io::{FromRawHandle, OwnedHandle};
        use windows_sys::Win32::Foundation::FILETIME;
        use windows_sys::Win32::System::Threading::{
            GetThreadTimes, OpenThread, THREAD_QUERY_LIMITED_INFORMATION,
        };
        let mut times = [FILETIME::default(); 4];
        let [made, ended, kernel, user] = &mut times;
        // SAFETY: the handle is owned at once and open during the call that fills the four local times.
        let said = unsafe {
            let thread = OpenThread(THREAD_QUERY_LIMITED_INFORMATION, 0, self.0);
            if thread.is_null() {
                return None;
            }
            let _owned = OwnedHandle::from_raw_handle(thread);
            GetThreadTimes(thread, made, ended, kernel, user)
        };
        let hundreds_of_ns =
            |t: &FILETIME| u64::from(t.dwHighDateTime) << 32 | u64::from(t.dwLowDateTime);
        let [_, _, kernel, user] = times;
        (said != 0)
            .then(|| Duration::from_nanos(100 * (hundreds_of_ns(&kernel) + hundreds_of_ns(&user))))
    }
}

/// Only the wall-clock cap holds.
#[cfg(not(any(target_os = "linux", windows)))]
struct ThreadClock;

#[cfg(not(any(target_os = "linux", windows)))]
impl ThreadClock {
    const DOUBT: Duration = Duration::ZERO;

    fn mine() -> Self {
        Self
    }

    fn read(&self) -> Option<Duration> {
        None
    }
}

/// A panic elsewhere leaves nothing half done under these locks, so poison is ignored.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(source: &str, limit: TimeLimit) -> (mlua::Result<()>, Option<Stopped>, Duration) {
        let dog = Watchdog::start().unwrap();
        let lua = Lua::new();
        let watch = dog.watch(&lua).unwrap();
        let begin = Instant::now();
        let (result, stopped) = watch.run(limit, || lua.load(source).exec());
        (result, stopped, begin.elapsed())
    }

    #[test]
    fn an_endless_loop_inside_pcall_is_stopped_by_cpu_time() {
        let limit = TimeLimit {
            cpu: Duration::from_millis(5),
            wall: Duration::from_secs(60),
        };
        let (result, stopped, took) = run(
            "while true do pcall(function() while true do end end) end",
            limit,
        );
        assert!(result
            .unwrap_err()
            .to_string()
            .contains("stopped: out of time"));
        assert_eq!(stopped, Some(Stopped::Cpu(Duration::from_millis(5))));
        println!("stopped after {took:?}");
    }

    #[test]
    fn the_wall_clock_cap_stops_a_hook_whose_cpu_limit_is_far_away() {
        let limit = TimeLimit {
            cpu: Duration::from_secs(3600),
            wall: Duration::from_millis(10),
        };
        let (result, stopped, _) = run("while true do end", limit);
        assert!(result.is_err());
        assert_eq!(stopped, Some(Stopped::Wall(Duration::from_millis(10))));
    }

    #[test]
    fn a_quick_call_is_left_alone_and_a_stop_does_not_reach_the_next_call() {
        let dog = Watchdog::start().unwrap();
        let lua = Lua::new();
        let watch = dog.watch(&lua).unwrap();
        for _ in 0..3 {
            let (late, stopped) = watch.run(TimeLimit::cpu_ms(2), || {
                lua.load("while true do end").exec()
            });
            assert!(late.is_err() && stopped.is_some());
            let (fine, stopped) = watch.run(TimeLimit::cpu_ms(1000), || {
                lua.load("local x = 0 for i = 1, 1e5 do x += i end").exec()
            });
            assert!(fine.is_ok() && stopped.is_none());
        }
    }

    #[test]
    fn a_sleeping_watchdog_wakes_for_a_call() {
        let dog = Watchdog::start().unwrap();
        let lua = Lua::new();
        let watch = dog.watch(&lua).unwrap();
        while !dog.shared.asleep.load(Ordering::SeqCst) {
            std::thread::sleep(TICK);
        }
        let (late, stopped) = watch.run(TimeLimit::cpu_ms(2), || {
            lua.load("while true do end").exec()
        });
        assert!(late.is_err() && stopped.is_some());
    }
}
