//! The thread that calls the host, on Linux.

use super::*;
use crate::guard::in_callback;
use crate::status::E_MEMORY;
use locum_core::threads::SignalsBlocked;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::thread::JoinHandle;

/// A thread that calls the host's function when the event descriptor is signalled. It watches edges: each signal counts
/// once, whether or not the host has taken the events of the one before.
pub struct Wake {
    stop: File,
    thread: Option<JoinHandle<()>>,
}

impl Wake {
    pub fn start(
        events: i64,
        call: WakeFn,
        user_data: *mut c_void,
        done: Option<DoneFn>,
    ) -> Result<Self, Failure> {
        let events = RawFd::try_from(events)
            .ok()
            .filter(|fd| *fd >= 0)
            .ok_or_else(|| {
                Failure::new(E_UNSUPPORTED, "there is no event handle on this platform")
            })?;
        // SAFETY: the results are checked and owned at once.
        let (stop, epoll) = unsafe {
            (
                owned(libc::eventfd(0, libc::EFD_CLOEXEC))?,
                owned(libc::epoll_create1(libc::EPOLL_CLOEXEC))?,
            )
        };
        add(&epoll, stop.as_raw_fd(), libc::EPOLLIN, 0)?;
        add(&epoll, events, libc::EPOLLIN | libc::EPOLLET, 1)?;
        // The finaliser must not run if no thread can be started, so it joins the hook inside the thread.
        let parts = Hook {
            call,
            user_data,
            done: None,
        };
        let _signals = SignalsBlocked::new();
        let thread = std::thread::Builder::new()
            .name("locum-wake".into())
            .spawn(move || {
                let mut hook = parts;
                hook.done = done;
                watch(&epoll, &hook);
            })
            .map_err(os_failure)?;
        Ok(Self {
            stop: File::from(stop),
            thread: Some(thread),
        })
    }
}

impl Drop for Wake {
    fn drop(&mut self) {
        // Cannot fail: the counter is 0 and takes 1.
        let _ = self.stop.write_all(&1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn watch(epoll: &OwnedFd, hook: &Hook<WakeFn>) {
    loop {
        let mut ready = [libc::epoll_event { events: 0, u64: 0 }; 2];
        // SAFETY: the array has room for the two descriptors that are watched.
        let n = unsafe { libc::epoll_wait(epoll.as_raw_fd(), ready.as_mut_ptr(), 2, -1) };
        if n < 0 && std::io::Error::last_os_error().kind() == std::io::ErrorKind::Interrupted {
            continue;
        }
        let seen: Vec<u64> = ready[..n.max(0) as usize].iter().map(|e| e.u64).collect();
        if n < 0 || seen.contains(&0) {
            return;
        }
        // SAFETY: the host promises a function of this type that may be called from any thread (locum.h, callbacks).
        in_callback(|| unsafe { (hook.call)(hook.user_data) });
    }
}

fn add(epoll: &OwnedFd, fd: RawFd, events: libc::c_int, token: u64) -> Result<(), Failure> {
    let mut event = libc::epoll_event {
        events: events as u32,
        u64: token,
    };
    // SAFETY: both descriptors are open and `event` lives for the call.
    match unsafe { libc::epoll_ctl(epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, fd, &mut event) } {
        0 => Ok(()),
        _ => Err(os_failure(std::io::Error::last_os_error())),
    }
}

/// # Safety
/// `fd` is -1 or a descriptor that nobody else owns.
unsafe fn owned(fd: RawFd) -> Result<OwnedFd, Failure> {
    if fd < 0 {
        return Err(os_failure(std::io::Error::last_os_error()));
    }
    // SAFETY: passed on from the caller.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn os_failure(e: std::io::Error) -> Failure {
    Failure {
        status: E_MEMORY,
        message: format!("the wake thread could not be started: {e}"),
        os_code: e.raw_os_error().unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::{Duration, Instant};

    #[derive(Default)]
    struct Seen {
        wakes: AtomicU32,
        done: AtomicU32,
    }
    unsafe extern "C" fn wake(data: *mut c_void) {
        // SAFETY: the test passes a Seen that outlives the thread.
        unsafe { &*data.cast::<Seen>() }
            .wakes
            .fetch_add(1, Ordering::SeqCst);
    }
    unsafe extern "C" fn done(data: *mut c_void) {
        // SAFETY: as above.
        unsafe { &*data.cast::<Seen>() }
            .done
            .fetch_add(1, Ordering::SeqCst);
    }

    #[test]
    fn every_signal_wakes_the_host_even_if_it_took_no_events_and_the_finaliser_runs_once() {
        let seen = Seen::default();
        // SAFETY: a new descriptor, owned here.
        let fd =
            unsafe { owned(libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)) }.unwrap();
        let mut file = File::from(fd);
        let data = (&raw const seen).cast_mut().cast();
        let thread = Wake::start(file.as_raw_fd().into(), wake, data, Some(done)).unwrap();
        for n in 1..=3 {
            file.write_all(&1u64.to_ne_bytes()).unwrap();
            let start = Instant::now();
            while seen.wakes.load(Ordering::SeqCst) < n {
                assert!(
                    start.elapsed() < Duration::from_secs(5),
                    "wake {n} is missing"
                );
                std::thread::yield_now();
            }
        }
        drop(thread);
        assert_eq!(seen.done.load(Ordering::SeqCst), 1);
        assert_eq!(seen.wakes.load(Ordering::SeqCst), 3);
    }

    #[test]
    fn without_an_event_handle_the_finaliser_does_not_run() {
        let seen = Seen::default();
        let data = (&raw const seen).cast_mut().cast();
        let refused = Wake::start(-1, wake, data, Some(done)).err().unwrap();
        assert_eq!(refused.status, E_UNSUPPORTED);
        assert_eq!(seen.done.load(Ordering::SeqCst), 0);
    }
}
