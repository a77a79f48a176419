//! What a host waits on while no event is there: one object of the system, signalled while the queue is not empty.
//!
//! Beside it, `edge` tells of each event once, for a thread that calls the host and must not be called again by an event that was not
//! taken yet. On Linux one eventfd is both, for epoll can watch it either way; on Windows they are two event objects.

#[cfg(target_os = "linux")]
pub use linux::Bell;
#[cfg(not(any(target_os = "linux", windows)))]
pub use none::Bell;
#[cfg(windows)]
pub use windows::Bell;

#[cfg(target_os = "linux")]
mod linux {
    /// An eventfd, or -1 if the system had none to give.
    pub struct Bell {
        fd: i32,
    }

    impl Bell {
        pub fn new() -> Self {
            // SAFETY: a plain system call; a failure gives -1, which every use below tolerates.
            let fd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
            Self { fd }
        }

        /// Readable while it rings; -1 if there is none.
        pub fn handle(&self) -> i64 {
            self.fd.into()
        }

        /// The same descriptor, to be watched by epoll for edges.
        pub fn edge(&self) -> i64 {
            self.fd.into()
        }

        pub fn ring(&self) {
            let number = 1u64;
            if self.fd >= 0 {
                // SAFETY: eight bytes of a local value; the descriptor is ours until drop and does not block.
                unsafe { libc::write(self.fd, (&raw const number).cast(), 8) };
            }
        }

        pub fn silence(&self) {
            let mut number = 0u64;
            if self.fd >= 0 {
                // SAFETY: as above.
                unsafe { libc::read(self.fd, (&raw mut number).cast(), 8) };
            }
        }
    }

    impl Drop for Bell {
        fn drop(&mut self) {
            if self.fd >= 0 {
                // SAFETY: the descriptor was opened by `new` and is closed nowhere else.
                unsafe { libc::close(self.fd) };
            }
        }
    }
}

#[cfg(windows)]
mod windows {
    use std::os::windows::io::{AsRawHandle, FromRawHandle, OwnedHandle};
    use std::ptr::null;

    use windows_sys::Win32::System::Threading::{CreateEventW, ResetEvent, SetEvent};

    /// Two event objects, or none if the system had none to give.
    pub struct Bell {
        /// Stays signalled until the queue is empty.
        level: Option<OwnedHandle>,
        /// Signalled by each event, until one wait has ended by it.
        edge: Option<OwnedHandle>,
    }

    impl Bell {
        pub fn new() -> Self {
            let event = |manual: bool| {
                // SAFETY: no attributes, no name; the handle is owned at once.
                unsafe {
                    let handle = CreateEventW(null(), manual.into(), 0, null());
                    (!handle.is_null()).then(|| OwnedHandle::from_raw_handle(handle))
                }
            };
            Self {
                level: event(true),
                edge: event(false),
            }
        }

        /// Signalled while it rings; -1 if there is none.
        pub fn handle(&self) -> i64 {
            number(&self.level)
        }

        /// Signalled once for each ring, or for several of which nobody was told yet; -1 if there is none.
        pub fn edge(&self) -> i64 {
            number(&self.edge)
        }

        pub fn ring(&self) {
            for event in [&self.level, &self.edge].into_iter().flatten() {
                // SAFETY: the event is open until drop.
                unsafe { SetEvent(event.as_raw_handle()) };
            }
        }

        pub fn silence(&self) {
            if let Some(level) = &self.level {
                // SAFETY: as above.
                unsafe { ResetEvent(level.as_raw_handle()) };
            }
        }
    }

    fn number(event: &Option<OwnedHandle>) -> i64 {
        event.as_ref().map_or(-1, |e| e.as_raw_handle() as i64)
    }
}

#[cfg(not(any(target_os = "linux", windows)))]
mod none {
    /// Nothing to wait on: hosts ask for events instead.
    pub struct Bell;

    impl Bell {
        pub fn new() -> Self {
            Self
        }

        pub fn handle(&self) -> i64 {
            -1
        }

        pub fn edge(&self) -> i64 {
            -1
        }

        pub fn ring(&self) {}

        pub fn silence(&self) {}
    }
}
