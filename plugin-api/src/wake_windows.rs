//! The thread that calls the host, on Windows.

use super::*;
use crate::guard::in_callback;
use crate::status::E_MEMORY;
use std::os::windows::io::{AsRawHandle, FromRawHandle, OwnedHandle, RawHandle};
use std::ptr::null;
use std::thread::JoinHandle;

use windows_sys::Win32::Foundation::WAIT_OBJECT_0;
use windows_sys::Win32::System::Threading::{
    CreateEventW, SetEvent, WaitForMultipleObjects, INFINITE,
};

/// A thread that calls the host's function when the edge event is signalled, which the wait resets: each signal counts once,
/// whether or not the host has taken the events of the one before.
pub struct Wake {
    stop: OwnedHandle,
    thread: Option<JoinHandle<()>>,
}

/// An event of the system, which any thread may wait for.
struct Shared(RawHandle);

// SAFETY: a number that the system looks up; waiting for an event is for any thread.
unsafe impl Send for Shared {}

impl Wake {
    /// `events` stays open until this is dropped: locum_close drops it first.
    pub fn start(
        events: i64,
        call: WakeFn,
        user_data: *mut c_void,
        done: Option<DoneFn>,
    ) -> Result<Self, Failure> {
        if events < 0 {
            return Err(Failure::new(
                E_UNSUPPORTED,
                "the system gave no event object",
            ));
        }
        // SAFETY: no attributes, no name; the handle is checked and owned at once.
        let stop = unsafe {
            let handle = CreateEventW(null(), 1, 0, null());
            if handle.is_null() {
                return Err(os_failure(std::io::Error::last_os_error()));
            }
            OwnedHandle::from_raw_handle(handle)
        };
        let watched = [Shared(stop.as_raw_handle()), Shared(events as RawHandle)];
        // The finaliser must not run if no thread can be started, so it joins the hook inside the thread.
        let parts = Hook {
            call,
            user_data,
            done: None,
        };
        let thread = std::thread::Builder::new()
            .name("locum-wake".into())
            .spawn(move || {
                let mut hook = parts;
                hook.done = done;
                watch(watched, &hook);
            })
            .map_err(os_failure)?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Wake {
    fn drop(&mut self) {
        // SAFETY: the event is open.
        unsafe { SetEvent(self.stop.as_raw_handle()) };
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn watch([stop, events]: [Shared; 2], hook: &Hook<WakeFn>) {
    let handles = [stop.0, events.0];
    // SAFETY: both events are open until this thread was joined. The first that is signalled is told, so a stop comes first.
    while unsafe { WaitForMultipleObjects(2, handles.as_ptr(), 0, INFINITE) } == WAIT_OBJECT_0 + 1 {
        // SAFETY: the host promises a function of this type that may be called from any thread (locum.h, callbacks).
        in_callback(|| unsafe { (hook.call)(hook.user_data) });
    }
}

fn os_failure(e: std::io::Error) -> Failure {
    Failure {
        status: E_MEMORY,
        message: format!("the wake thread could not be started: {e}"),
        os_code: e.raw_os_error().unwrap_or(0),
    }
}
