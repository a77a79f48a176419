//! Threads in somebody else's process: they never run the host's signal handlers, and give way to its work.

use std::io;
use std::thread::{Builder, JoinHandle};

/// Starts a named thread with every signal blocked, so that the host's handlers run on the host's threads.
///
/// # Errors
/// What the operating system says when it cannot start a thread.
pub fn spawn_quiet<T: Send + 'static>(
    name: &str,
    run: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    // A thread inherits the mask of the one that starts it; blocked only inside the new thread, a
    // signal could arrive before.
    let _blocked = SignalsBlocked::new();
    Builder::new().name(name.into()).spawn(run)
}

/// Gives the calling thread a lower priority than the host's, by `nice`; on Windows, which has two steps below the usual one, up to 5
/// is the first and more the second.
pub fn give_way(nice: i32) {
    #[cfg(target_os = "linux")]
    // SAFETY: plain system calls that concern this thread only and take numbers.
    unsafe {
        let tid = libc::syscall(libc::SYS_gettid) as libc::id_t;
        libc::setpriority(libc::PRIO_PROCESS, tid, nice);
    }
    #[cfg(windows)]
    // SAFETY: concerns this thread only and takes numbers; the handle is one that needs no closing.
    unsafe {
        use windows_sys::Win32::System::Threading::{
            GetCurrentThread, SetThreadPriority, THREAD_PRIORITY_BELOW_NORMAL,
            THREAD_PRIORITY_LOWEST,
        };
        let priority = match nice {
            ..=5 => THREAD_PRIORITY_BELOW_NORMAL,
            _ => THREAD_PRIORITY_LOWEST,
        };
        SetThreadPriority(GetCurrentThread(), priority);
    }
    let _ = nice;
}

/// While this lives, the calling thread blocks all signals, and threads started meanwhile inherit that: the host's handlers
/// run on the host's threads only. Windows has no such signals: its handlers run on a thread that the system starts.
pub struct SignalsBlocked {
    #[cfg(unix)]
    before: libc::sigset_t,
}

impl SignalsBlocked {
    #[cfg(unix)]
    #[allow(
        clippy::new_without_default,
        reason = "a guard is made to be held, not as a value"
    )]
    pub fn new() -> Self {
        // SAFETY: both sets are local and initialised by the calls that fill them; `pthread_sigmask`
        // changes only the mask of the calling thread and does not keep the pointers.
        unsafe {
            let mut all = std::mem::zeroed();
            let mut before = std::mem::zeroed();
            libc::sigfillset(&mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before);
            Self { before }
        }
    }

    #[cfg(not(unix))]
    #[allow(
        clippy::new_without_default,
        reason = "a guard is made to be held, not as a value"
    )]
    pub fn new() -> Self {
        Self {}
    }
}

impl Drop for SignalsBlocked {
    fn drop(&mut self) {
        // SAFETY: `before` was filled by `pthread_sigmask` and outlives the call.
        #[cfg(unix)]
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &self.before, std::ptr::null_mut());
        }
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    fn mask_has(signal: i32) -> bool {
        // SAFETY: reads this thread's mask into a local set.
        unsafe {
            let mut now = std::mem::zeroed();
            libc::pthread_sigmask(libc::SIG_SETMASK, std::ptr::null(), &mut now);
            libc::sigismember(&now, signal) == 1
        }
    }

    #[test]
    fn a_quiet_thread_blocks_signals_and_its_starter_does_not() {
        let inside = spawn_quiet("quiet", || {
            mask_has(libc::SIGTERM) && mask_has(libc::SIGINT)
        })
        .unwrap();
        assert!(inside.join().unwrap());
        assert!(!mask_has(libc::SIGTERM));
    }
}
