//! What goes out to the host and is the host's until it gives it back: bytes and errors (group 2 of `locum.h`).
//!
//! Both are looked up before they are freed, so that freeing twice, or freeing a copy, does nothing.

use std::collections::{HashMap, HashSet};
use std::ffi::{c_char, CString};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::Serialize;

use crate::fork::PerProcess;
use crate::guard::guard_plain;
use crate::status::{self, Failure};

/// `locum_bytes`: ours in memory, the host's to give back.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct LocumBytes {
    pub ptr: *mut u8,
    pub len: usize,
    pub owner: u64,
}

impl LocumBytes {
    pub const EMPTY: Self = Self {
        ptr: std::ptr::null_mut(),
        len: 0,
        owner: 0,
    };
}

/// `locum_error`.
pub struct LocumError {
    status: i32,
    os_code: i32,
    message: CString,
}

/// What the host has not given back yet.
struct Lent {
    /// By owner token, the blocks behind `locum_bytes`.
    bytes: Mutex<HashMap<u64, Box<[u8]>>>,
    /// Addresses of errors.
    errors: Mutex<HashSet<usize>>,
}

static LENT: PerProcess<Lent> = PerProcess::new(|| Lent {
    bytes: Mutex::default(),
    errors: Mutex::default(),
});
/// Counts on across a fork, so that a parent's token never names a block of the child.
static NEXT_OWNER: AtomicU64 = AtomicU64::new(1);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Hands a block to the host. An empty block has no owner and needs no freeing.
pub fn lend(bytes: Vec<u8>) -> LocumBytes {
    if bytes.is_empty() {
        return LocumBytes::EMPTY;
    }
    let mut block = bytes.into_boxed_slice();
    let owner = NEXT_OWNER.fetch_add(1, Ordering::Relaxed);
    let lent = LocumBytes {
        ptr: block.as_mut_ptr(),
        len: block.len(),
        owner,
    };
    lock(&LENT.get().bytes).insert(owner, block);
    lent
}

/// Hands a value to the host as JSON.
pub fn lend_json(value: &impl Serialize) -> Result<LocumBytes, Failure> {
    serde_json::to_vec(value).map(lend).map_err(|e| {
        Failure::new(
            status::E_INTERNAL,
            format!("a value of ours could not be written as JSON: {e}"),
        )
    })
}

/// Writes `value` where the host wants it.
///
/// # Safety
/// `out` is null or writable for one T (locum.h, at each function).
pub unsafe fn put<T>(what: &str, out: *mut T, value: T) -> Result<(), Failure> {
    if out.is_null() {
        return Err(Failure::misuse(format!("{what} is NULL")));
    }
    // SAFETY: not null, and the caller promises room for a T; unaligned since foreign hosts may pack their memory.
    unsafe { out.write_unaligned(value) };
    Ok(())
}

/// Turns a failure into an error of the host's.
pub fn new_error(failure: Failure) -> *mut LocumError {
    let message: String = failure
        .message
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    let error = Box::new(LocumError {
        status: failure.status,
        os_code: failure.os_code,
        message: CString::new(message).unwrap_or_default(),
    });
    let pointer = Box::into_raw(error);
    lock(&LENT.get().errors).insert(pointer as usize);
    pointer
}

fn with_error<R>(error: *const LocumError, or: R, f: impl FnOnce(&LocumError) -> R) -> R {
    if error.is_null() || !lock(&LENT.get().errors).contains(&(error as usize)) {
        return or;
    }
    // SAFETY: the address is one that new_error gave out and that was not freed; errors are never changed, and the host
    // must not free one while it reads it (locum.h, OWNERSHIP).
    f(unsafe { &*error })
}

#[no_mangle]
pub extern "C" fn locum_error_status(error: *const LocumError) -> i32 {
    guard_plain(status::E_INTERNAL, || {
        with_error(error, status::E_MISUSE, |e| e.status)
    })
}

#[no_mangle]
pub extern "C" fn locum_error_message(error: *const LocumError) -> *const c_char {
    guard_plain(c"".as_ptr(), || {
        with_error(error, c"".as_ptr(), |e| e.message.as_ptr())
    })
}

#[no_mangle]
pub extern "C" fn locum_error_os_code(error: *const LocumError) -> i32 {
    guard_plain(0, || with_error(error, 0, |e| e.os_code))
}

#[no_mangle]
pub extern "C" fn locum_error_free(error: *mut LocumError) {
    guard_plain((), || {
        if !error.is_null() && lock(&LENT.get().errors).remove(&(error as usize)) {
            // SAFETY: made by Box::into_raw in new_error, and just removed from the list of those not freed yet.
            drop(unsafe { Box::from_raw(error) });
        }
    })
}

/// # Safety
/// `bytes` is null or points to a readable and writable `locum_bytes`.
#[no_mangle]
pub unsafe extern "C" fn locum_bytes_free(bytes: *mut LocumBytes) {
    guard_plain((), || {
        if bytes.is_null() {
            return;
        }
        // SAFETY: not null; locum.h asks for a locum_bytes there.
        let lent = unsafe { bytes.read_unaligned() };
        if lent.owner != 0 {
            let block = lock(&LENT.get().bytes).remove(&lent.owner);
            drop(block);
        }
        // SAFETY: as above.
        unsafe { bytes.write_unaligned(LocumBytes::EMPTY) };
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outstanding(owner: u64) -> bool {
        lock(&LENT.get().bytes).contains_key(&owner)
    }

    #[test]
    fn bytes_are_freed_once_however_often_they_and_their_copies_are_freed() {
        let mut bytes = lend(b"hello".to_vec());
        let mut copy = bytes;
        let owner = bytes.owner;
        assert!(outstanding(owner));
        // SAFETY: both are live structs.
        unsafe {
            locum_bytes_free(&mut bytes);
            assert!(bytes.ptr.is_null() && bytes.len == 0 && bytes.owner == 0);
            assert!(!outstanding(owner));
            locum_bytes_free(&mut bytes);
            locum_bytes_free(&mut copy);
            locum_bytes_free(std::ptr::null_mut());
            let mut invented = LocumBytes {
                ptr: std::ptr::dangling_mut(),
                len: 9,
                owner: u64::MAX,
            };
            locum_bytes_free(&mut invented);
        }
    }

    #[test]
    fn an_error_tells_its_status_message_and_cause_until_it_is_freed() {
        let error = new_error(Failure {
            status: status::E_STORE,
            message: "disk\nfull".into(),
            os_code: 28,
        });
        assert_eq!(locum_error_status(error), status::E_STORE);
        assert_eq!(locum_error_os_code(error), 28);
        // SAFETY: NUL-terminated and alive until the error is freed.
        let message = unsafe { std::ffi::CStr::from_ptr(locum_error_message(error)) };
        assert_eq!(message.to_str().unwrap(), "disk full");
        locum_error_free(error);
        assert_eq!(locum_error_status(error), status::E_MISUSE);
        locum_error_free(error);
        locum_error_free(std::ptr::null_mut());
        assert_eq!(locum_error_status(std::ptr::null()), status::E_MISUSE);
    }
}
