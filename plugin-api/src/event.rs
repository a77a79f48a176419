//! Group 6 of `locum.h`: events, for hosts that wait on an object of the system and for those that want to be called.

use std::ffi::c_void;

use locum_core::locum::EventKind;
use serde_json::Value;

use crate::guard::{guard_plain, guard_status};
use crate::input::write_struct;
use crate::instances::objects;
use crate::log::{DoneFn, Hook};
use crate::output::{lend_json, LocumBytes};
use crate::status::{Failure, EMPTY, E_UNSUPPORTED, OK};
use crate::structs::Event;

pub type WakeFn = unsafe extern "C" fn(*mut c_void);

#[no_mangle]
pub extern "C" fn locum_event_handle(handle: u64) -> i64 {
    guard_plain(-1, || {
        objects()
            .instances
            .get(handle)
            .map_or(-1, |instance| instance.locum.event_handle())
    })
}

/// # Safety
/// `out` is null or as locum.h describes it.
#[no_mangle]
pub unsafe extern "C" fn locum_next_event(handle: u64, out: *mut Event) -> i32 {
    guard_status("locum_next_event", |frame| {
        let instance = frame.instance(handle)?;
        let empty = Event {
            struct_size: 0,
            kind: 0,
            subject: 0,
            number: 0,
            detail: LocumBytes::EMPTY,
        };
        // First, so that an `out` that cannot be filled does not cost an event.
        // SAFETY: `out` is as locum.h says.
        unsafe { write_struct(out, &empty) }?;
        let Some(event) = instance.locum.next_event() else {
            return Ok(EMPTY);
        };
        let mut detail = match event.detail {
            Value::Object(fields) => fields,
            Value::Null => serde_json::Map::new(),
            other => serde_json::Map::from_iter([("value".to_string(), other)]),
        };
        detail.insert(
            "name".into(),
            serde_json::to_value(event.kind).unwrap_or_default(),
        );
        // SAFETY: write_struct has found `out` and its size good above.
        let room = unsafe { out.cast::<u32>().read_unaligned() } as usize;
        // A host with a shorter struct has no place for the whole detail and so could never free it.
        let detail = if room < size_of::<Event>() {
            LocumBytes::EMPTY
        } else {
            lend_json(&detail)?
        };
        let subject = match event.kind {
            // A call that was freed meanwhile is none.
            EventKind::CallDone => instance.call_handles().remove(&event.subject).unwrap_or(0),
            _ => event.subject,
        };
        let filled = Event {
            kind: event.kind as i32,
            subject,
            number: event.number,
            detail,
            ..empty
        };
        // SAFETY: as above.
        unsafe { write_struct(out, &filled) }?;
        Ok(OK)
    })
}

/// # Safety
/// `wake` and `done` are functions as locum.h describes them, and `user_data` may be given to them from any thread.
#[no_mangle]
pub unsafe extern "C" fn locum_set_wake(
    handle: u64,
    wake: Option<WakeFn>,
    user_data: *mut c_void,
    done: Option<DoneFn>,
) -> i32 {
    guard_status("locum_set_wake", |frame| {
        let instance = frame.instance(handle)?;
        let fresh = match wake {
            Some(call) => Some(Wake::start(
                instance.locum.event_edge(),
                call,
                user_data,
                done,
            )?),
            None => None,
        };
        let off = fresh.is_none();
        let old = std::mem::replace(
            &mut *instance.wake.lock().unwrap_or_else(|e| e.into_inner()),
            fresh,
        );
        // Waits until the old function is not running any more, and finalises it.
        drop(old);
        if off {
            drop(Hook {
                call: (),
                user_data,
                done,
            });
        }
        Ok(OK)
    })
}

#[cfg_attr(target_os = "linux", path = "wake_linux.rs")]
#[cfg_attr(windows, path = "wake_windows.rs")]
#[cfg_attr(not(any(target_os = "linux", windows)), path = "wake_none.rs")]
mod wake;

pub use wake::Wake;
