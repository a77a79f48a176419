//! Group 8 of `locum.h`, continued: erasing what was recorded, and who learned from what.

use locum_core::episode::EpisodeId;
use locum_core::locum::Forget;
use locum_core::threads::SignalsBlocked;

use crate::guard::guard;
use crate::input::name;
use crate::instances::Instance;
use crate::output::{lend_json, put, LocumBytes, LocumError};
use crate::status::{Failure, OK};

/// # Safety
/// The pointers are as locum.h describes them.
#[no_mangle]
pub unsafe extern "C" fn locum_forget_episode(
    handle: u64,
    id: *const [u8; 16],
    retrain: i32,
    forgotten_json: *mut LocumBytes,
    error: *mut *mut LocumError,
) -> i32 {
    // SAFETY: the pointers are as locum.h says.
    unsafe {
        guard("locum_forget_episode", error, |frame| {
            put("json", forgotten_json, LocumBytes::EMPTY)?;
            let instance = frame.instance(handle)?;
            let what = Forget::Episode(episode_id(id)?);
            put(
                "json",
                forgotten_json,
                forget(&instance, &what, retrain != 0)?,
            )?;
            Ok(OK)
        })
    }
}

/// # Safety
/// The pointers are as locum.h describes them.
#[no_mangle]
pub unsafe extern "C" fn locum_forget_scope(
    handle: u64,
    scope: *const u8,
    scope_len: usize,
    retrain: i32,
    forgotten_json: *mut LocumBytes,
    error: *mut *mut LocumError,
) -> i32 {
    // SAFETY: the pointers are as locum.h says.
    unsafe {
        guard("locum_forget_scope", error, |frame| {
            put("json", forgotten_json, LocumBytes::EMPTY)?;
            let instance = frame.instance(handle)?;
            let scope = name("scope", scope, scope_len)?;
            if scope.is_empty() {
                return Err(Failure::argument(
                    "scope is empty; episodes without a scope are erased one by one",
                ));
            }
            let what = Forget::Scope(scope.into());
            put(
                "json",
                forgotten_json,
                forget(&instance, &what, retrain != 0)?,
            )?;
            Ok(OK)
        })
    }
}

/// # Safety
/// The pointers are as locum.h describes them.
#[no_mangle]
pub unsafe extern "C" fn locum_student_lineage(
    handle: u64,
    version: u64,
    lineage_json: *mut LocumBytes,
    error: *mut *mut LocumError,
) -> i32 {
    // SAFETY: the pointers are as locum.h says.
    unsafe {
        guard("locum_student_lineage", error, |frame| {
            put("json", lineage_json, LocumBytes::EMPTY)?;
            let instance = frame.instance(handle)?;
            let lineage = instance.locum.lineage(version)?;
            put("json", lineage_json, lend_json(&lineage)?)?;
            Ok(OK)
        })
    }
}

/// # Safety
/// The pointers are as locum.h describes them.
#[no_mangle]
pub unsafe extern "C" fn locum_episode_students(
    handle: u64,
    id: *const [u8; 16],
    students_json: *mut LocumBytes,
    error: *mut *mut LocumError,
) -> i32 {
    // SAFETY: the pointers are as locum.h says.
    unsafe {
        guard("locum_episode_students", error, |frame| {
            put("json", students_json, LocumBytes::EMPTY)?;
            let instance = frame.instance(handle)?;
            let students = instance.locum.students_of(episode_id(id)?)?;
            put("json", students_json, lend_json(&students)?)?;
            Ok(OK)
        })
    }
}

fn forget(instance: &Instance, what: &Forget, retrain: bool) -> Result<LocumBytes, Failure> {
    instance.may_change()?;
    let _signals = SignalsBlocked::new();
    lend_json(&instance.locum.forget(what, retrain)?)
}

/// The 16 bytes that name an episode.
///
/// # Safety
/// `id` is null or points to 16 readable bytes.
pub unsafe fn episode_id(id: *const [u8; 16]) -> Result<EpisodeId, Failure> {
    if id.is_null() {
        return Err(Failure::misuse("id is NULL"));
    }
    // SAFETY: not null, and the caller promises 16 bytes; they need no alignment.
    Ok(EpisodeId(unsafe { id.read_unaligned() }))
}
