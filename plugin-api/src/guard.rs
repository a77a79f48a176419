//! What every export runs inside: no panic gets out, no export runs inside a host's callback that must not, and a panic
//! switches the instance it happened in to teacher-only for good.

use std::cell::{Cell, RefCell};
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Once};

use crate::output::{new_error, LocumError};
use crate::status::{Failure, E_INTERNAL};

thread_local! {
    /// Exports running on this thread.
    static DEPTH: Cell<u32> = const { Cell::new(0) };
    /// True while a callback of the host runs on this thread.
    static IN_CALLBACK: Cell<bool> = const { Cell::new(false) };
}

/// Set by the first panic inside an instance. From then on it answers "teacher" and nothing clears it: after a panic
/// nobody knows what state is half changed, and the teacher is always right.
#[derive(Debug, Default)]
pub struct Breaker(AtomicBool);

impl Breaker {
    pub fn is_broken(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    fn trip(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What the export found out so far about where it runs.
#[derive(Default)]
pub struct Frame {
    breaker: RefCell<Option<Arc<Breaker>>>,
}

impl Frame {
    /// From here on a panic of this export breaks that instance.
    pub fn runs_in(&self, breaker: &Arc<Breaker>) {
        *self.breaker.borrow_mut() = Some(breaker.clone());
    }
}

/// Runs the body of an export that has a status.
///
/// # Safety
/// `error` is null or writable for one pointer (locum.h, ERRORS).
pub unsafe fn guard(
    export: &'static str,
    error: *mut *mut LocumError,
    body: impl FnOnce(&Frame) -> Result<i32, Failure>,
) -> i32 {
    let result = if IN_CALLBACK.get() {
        Err(Failure::misuse(format!(
            "{export} must not be called inside a callback"
        )))
    } else {
        run(export, body)
    };
    let (status, object) = match result {
        Ok(status) => (status, std::ptr::null_mut()),
        // Building the message may not unwind either; without memory for it the status alone is told.
        Err(failure) => (
            failure.status,
            // A positive status is no error (locum.h, ERRORS).
            if error.is_null() || failure.status >= 0 {
                std::ptr::null_mut()
            } else {
                panic::catch_unwind(|| new_error(failure)).unwrap_or(std::ptr::null_mut())
            },
        ),
    };
    if !error.is_null() {
        // SAFETY: not null; the caller passes on the promise of locum.h, ERRORS.
        unsafe { error.write_unaligned(object) };
    }
    status
}

/// [`guard_status`] for the few exports that are marked [callback].
pub fn guard_anywhere(
    export: &'static str,
    body: impl FnOnce(&Frame) -> Result<i32, Failure>,
) -> i32 {
    run(export, body).unwrap_or_else(|failure| failure.status)
}

/// [`guard`] for exports that have a status and no error argument.
pub fn guard_status(
    export: &'static str,
    body: impl FnOnce(&Frame) -> Result<i32, Failure>,
) -> i32 {
    // SAFETY: a null error is allowed.
    unsafe { guard(export, std::ptr::null_mut(), body) }
}

/// Runs the body of an export without a status; it may be called inside callbacks.
pub fn guard_plain<R>(fallback: R, body: impl FnOnce() -> R) -> R {
    let _depth = Depth::enter();
    panic::catch_unwind(AssertUnwindSafe(body)).unwrap_or(fallback)
}

/// Runs a callback of the host: exports that are not marked [callback] refuse until it returns.
pub fn in_callback<R>(callback: impl FnOnce() -> R) -> R {
    let before = IN_CALLBACK.replace(true);
    let result = callback();
    IN_CALLBACK.set(before);
    result
}

fn run(
    export: &'static str,
    body: impl FnOnce(&Frame) -> Result<i32, Failure>,
) -> Result<i32, Failure> {
    let frame = Frame::default();
    let _depth = Depth::enter();
    panic::catch_unwind(AssertUnwindSafe(|| body(&frame))).unwrap_or_else(|payload| {
        // A payload may have a destructor that panics.
        let _ = panic::catch_unwind(AssertUnwindSafe(|| drop(payload)));
        if let Ok(Some(breaker)) = frame.breaker.try_borrow().as_deref() {
            breaker.trip();
        }
        Err(Failure::new(
            E_INTERNAL,
            format!(
                "an internal error in {export}; from now on this locum always chooses the teacher"
            ),
        ))
    })
}

struct Depth;

impl Depth {
    fn enter() -> Self {
        DEPTH.set(DEPTH.get() + 1);
        Depth
    }
}

impl Drop for Depth {
    fn drop(&mut self) {
        DEPTH.set(DEPTH.get() - 1);
    }
}

/// Keeps panics of ours off stderr: those inside an export and on our own threads become a log line with the place, without
/// the message (it could hold data). Others go where they went before, which matters where we are linked into a Rust host.
pub fn quiet_panics() {
    static QUIET: Once = Once::new();
    QUIET.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if DEPTH.get() > 0
                || std::thread::current()
                    .name()
                    .is_some_and(|name| name.starts_with("locum"))
            {
                let (file, line) = info
                    .location()
                    .map_or(("?", 0), |place| (place.file(), place.line()));
                tracing::error!(target: "locum", file, line, "caught a panic");
            } else {
                before(info);
            }
        }));
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::{locum_error_free, locum_error_message, locum_error_status};
    use crate::status::{E_MISUSE, OK};

    #[test]
    fn a_panic_becomes_internal_and_breaks_the_instance_for_good() {
        quiet_panics();
        let breaker = Arc::new(Breaker::default());
        let mut error = std::ptr::null_mut();
        // SAFETY: `error` is a live local.
        let status = unsafe {
            guard("locum_test", &mut error, |frame| {
                frame.runs_in(&breaker);
                panic!("canary: user data")
            })
        };
        assert_eq!(status, E_INTERNAL);
        assert!(breaker.is_broken());
        assert_eq!(locum_error_status(error), E_INTERNAL);
        // SAFETY: NUL-terminated and not freed yet.
        let message = unsafe { std::ffi::CStr::from_ptr(locum_error_message(error)) }
            .to_str()
            .unwrap();
        assert!(
            message.contains("locum_test") && !message.contains("canary"),
            "{message}"
        );
        locum_error_free(error);
        assert_eq!(guard_status("locum_test", |_| Ok(OK)), OK);
        assert!(breaker.is_broken(), "nothing clears it");
        assert_eq!(DEPTH.get(), 0);
    }

    #[test]
    fn a_panic_before_the_instance_is_known_breaks_none() {
        quiet_panics();
        assert_eq!(guard_status("locum_test", |_| panic!("early")), E_INTERNAL);
        assert_eq!(guard_plain(5, || panic!("plain")), 5);
    }

    #[test]
    fn a_payload_that_panics_when_dropped_does_not_get_out_either() {
        struct Bomb;
        impl Drop for Bomb {
            fn drop(&mut self) {
                panic!("second");
            }
        }
        quiet_panics();
        assert_eq!(
            guard_status("locum_test", |_| panic::panic_any(Bomb)),
            E_INTERNAL
        );
    }

    #[test]
    fn success_clears_the_error_argument_and_a_null_one_is_fine() {
        let mut error = std::ptr::dangling_mut();
        // SAFETY: `error` is a live local.
        assert_eq!(unsafe { guard("locum_test", &mut error, |_| Ok(1)) }, 1);
        assert!(error.is_null());
        assert_eq!(
            guard_status("locum_test", |_| Err(Failure::argument("no"))),
            crate::status::E_ARGUMENT
        );
    }

    #[test]
    fn exports_refuse_inside_a_callback_unless_marked() {
        in_callback(|| {
            assert_eq!(guard_status("locum_test", |_| Ok(OK)), E_MISUSE);
            assert_eq!(guard_plain(1, || 2), 2);
        });
        assert_eq!(guard_status("locum_test", |_| Ok(OK)), OK);
    }
}
