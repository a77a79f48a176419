//! Group 8 of `locum.h`, continued: what a student learns in an episode while it reads.

use crate::guard::guard;
use crate::output::{lend_json, put, LocumBytes, LocumError};
use crate::status::OK;

/// # Safety
/// The pointers are as locum.h describes them.
#[no_mangle]
pub unsafe extern "C" fn locum_fast_weights(
    episode: u64,
    report_json: *mut LocumBytes,
    error: *mut *mut LocumError,
) -> i32 {
    // SAFETY: the pointers are as locum.h says.
    unsafe {
        guard("locum_fast_weights", error, |frame| {
            put("json", report_json, LocumBytes::EMPTY)?;
            let episode = frame.episode(episode)?;
            let report = episode.instance.locum.fast_weights(&episode.handle)?;
            put("json", report_json, lend_json(&report)?)?;
            Ok(OK)
        })
    }
}

/// # Safety
/// `error` is as locum.h describes it.
#[no_mangle]
pub unsafe extern "C" fn locum_fast_weights_switch(
    episode: u64,
    on: i32,
    error: *mut *mut LocumError,
) -> i32 {
    // SAFETY: `error` is as locum.h says.
    unsafe {
        guard("locum_fast_weights_switch", error, |frame| {
            let episode = frame.episode(episode)?;
            let locum = &episode.instance.locum;
            locum.switch_fast_weights(&episode.handle, on != 0)?;
            Ok(OK)
        })
    }
}

/// # Safety
/// `error` is as locum.h describes it.
#[no_mangle]
pub unsafe extern "C" fn locum_fast_weights_reset(
    episode: u64,
    error: *mut *mut LocumError,
) -> i32 {
    // SAFETY: `error` is as locum.h says.
    unsafe {
        guard("locum_fast_weights_reset", error, |frame| {
            let episode = frame.episode(episode)?;
            episode.instance.locum.reset_fast_weights(&episode.handle)?;
            Ok(OK)
        })
    }
}

/// # Safety
/// The pointers are as locum.h describes them.
#[no_mangle]
pub unsafe extern "C" fn locum_fast_weights_snapshot(
    episode: u64,
    snapshot: *mut u64,
    error: *mut *mut LocumError,
) -> i32 {
    // SAFETY: the pointers are as locum.h says.
    unsafe {
        guard("locum_fast_weights_snapshot", error, |frame| {
            put("snapshot", snapshot, 0)?;
            let episode = frame.episode(episode)?;
            let locum = &episode.instance.locum;
            let number = locum.snapshot_fast_weights(&episode.handle)?;
            put("snapshot", snapshot, number)?;
            Ok(OK)
        })
    }
}

/// # Safety
/// `error` is as locum.h describes it.
#[no_mangle]
pub unsafe extern "C" fn locum_fast_weights_restore(
    episode: u64,
    snapshot: u64,
    error: *mut *mut LocumError,
) -> i32 {
    // SAFETY: `error` is as locum.h says.
    unsafe {
        guard("locum_fast_weights_restore", error, |frame| {
            let episode = frame.episode(episode)?;
            let locum = &episode.instance.locum;
            locum.restore_fast_weights(&episode.handle, snapshot)?;
            Ok(OK)
        })
    }
}

/// # Safety
/// `error` is as locum.h describes it.
#[no_mangle]
pub unsafe extern "C" fn locum_fast_weights_forget(
    episode: u64,
    snapshot: u64,
    error: *mut *mut LocumError,
) -> i32 {
    // SAFETY: `error` is as locum.h says.
    unsafe {
        guard("locum_fast_weights_forget", error, |frame| {
            let episode = frame.episode(episode)?;
            let locum = &episode.instance.locum;
            locum.forget_fast_weights(&episode.handle, snapshot)?;
            Ok(OK)
        })
    }
}
