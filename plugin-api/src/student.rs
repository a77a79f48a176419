//! Group 8 of `locum.h`: distillation, students, counters; and the report, which is an extension.

use locum_core::limits::MAX_STEP_BYTES;
use locum_core::locum::{DistilOptions, Pin};
use serde::Deserialize;
use serde_json::Value;

use crate::guard::guard;
use crate::input::{bad_json, json, LocumStr};
use crate::output::{lend, lend_json, put, LocumBytes, LocumError};
use crate::status::{Failure, OK};
use locum_core::threads::SignalsBlocked;

/// `LOCUM_STUDENT_TEACHER`.
const PIN_TEACHER: u64 = u64::MAX;
/// `LOCUM_STUDENT_BASE`.
const PIN_BASE: u64 = u64::MAX - 1;

/// # Safety
/// The pointers are as locum.h describes them.
#[no_mangle]
pub unsafe extern "C" fn locum_distil_start(
    handle: u64,
    options_json: *const u8,
    options_json_len: usize,
    job: *mut u64,
    error: *mut *mut LocumError,
) -> i32 {
    // SAFETY: the pointers are as locum.h says.
    unsafe {
        guard("locum_distil_start", error, |frame| {
            put("job", job, 0)?;
            let instance = frame.instance(handle)?;
            let options = LocumStr {
                ptr: options_json,
                len: options_json_len,
            };
            let options = match json("options_json", options, MAX_STEP_BYTES)? {
                Some(value) => distil_options(value)?,
                None => DistilOptions::default(),
            };
            instance.may_change()?;
            let _signals = SignalsBlocked::new();
            put("job", job, instance.locum.distil_start(options)?)?;
            Ok(OK)
        })
    }
}

/// # Safety
/// The pointers are as locum.h describes them.
#[no_mangle]
pub unsafe extern "C" fn locum_distil_status(
    handle: u64,
    job: u64,
    status_json: *mut LocumBytes,
    error: *mut *mut LocumError,
) -> i32 {
    // SAFETY: the pointers are as locum.h says.
    unsafe {
        guard("locum_distil_status", error, |frame| {
            put("status_json", status_json, LocumBytes::EMPTY)?;
            let instance = frame.instance(handle)?;
            put(
                "status_json",
                status_json,
                lend_json(&instance.locum.distil_status(job)?)?,
            )?;
            Ok(OK)
        })
    }
}

/// # Safety
/// `error` is as locum.h describes it.
#[no_mangle]
pub unsafe extern "C" fn locum_distil_cancel(
    handle: u64,
    job: u64,
    error: *mut *mut LocumError,
) -> i32 {
    // SAFETY: `error` is as locum.h says.
    unsafe {
        guard("locum_distil_cancel", error, |frame| {
            let instance = frame.instance(handle)?;
            instance.may_change()?;
            instance.locum.distil_cancel(job)?;
            Ok(OK)
        })
    }
}

/// # Safety
/// `error` is as locum.h describes it.
#[no_mangle]
pub unsafe extern "C" fn locum_distil_pause(
    handle: u64,
    job: u64,
    error: *mut *mut LocumError,
) -> i32 {
    // SAFETY: `error` is as locum.h says.
    unsafe {
        guard("locum_distil_pause", error, |frame| {
            frame.instance(handle)?.locum.distil_pause(job)?;
            Ok(OK)
        })
    }
}

/// # Safety
/// `error` is as locum.h describes it.
#[no_mangle]
pub unsafe extern "C" fn locum_distil_resume(
    handle: u64,
    job: u64,
    error: *mut *mut LocumError,
) -> i32 {
    // SAFETY: `error` is as locum.h says.
    unsafe {
        guard("locum_distil_resume", error, |frame| {
            frame.instance(handle)?.locum.distil_resume(job)?;
            Ok(OK)
        })
    }
}

/// # Safety
/// The pointers are as locum.h describes them.
#[no_mangle]
pub unsafe extern "C" fn locum_student_list(
    handle: u64,
    list_json: *mut LocumBytes,
    error: *mut *mut LocumError,
) -> i32 {
    // SAFETY: the pointers are as locum.h says.
    unsafe {
        guard("locum_student_list", error, |frame| {
            put("json", list_json, LocumBytes::EMPTY)?;
            let instance = frame.instance(handle)?;
            put("json", list_json, lend_json(&instance.locum.students()?)?)?;
            Ok(OK)
        })
    }
}

/// # Safety
/// `error` is as locum.h describes it.
#[no_mangle]
pub unsafe extern "C" fn locum_student_use(
    handle: u64,
    version: u64,
    error: *mut *mut LocumError,
) -> i32 {
    // SAFETY: `error` is as locum.h says.
    unsafe {
        guard("locum_student_use", error, |frame| {
            let instance = frame.instance(handle)?;
            instance.may_change()?;
            let pin = match version {
                0 => Pin::Automatic,
                PIN_TEACHER => Pin::Teacher,
                PIN_BASE => Pin::Base,
                version => Pin::Student(version),
            };
            let _signals = SignalsBlocked::new();
            instance.locum.use_student(pin)?;
            Ok(OK)
        })
    }
}

/// # Safety
/// `error` is as locum.h describes it.
#[no_mangle]
pub unsafe extern "C" fn locum_student_rollback(handle: u64, error: *mut *mut LocumError) -> i32 {
    // SAFETY: `error` is as locum.h says.
    unsafe {
        guard("locum_student_rollback", error, |frame| {
            let instance = frame.instance(handle)?;
            instance.may_change()?;
            let _signals = SignalsBlocked::new();
            instance.locum.rollback()?;
            Ok(OK)
        })
    }
}

/// # Safety
/// The pointers are as locum.h describes them.
#[no_mangle]
pub unsafe extern "C" fn locum_stats(
    handle: u64,
    stats_json: *mut LocumBytes,
    error: *mut *mut LocumError,
) -> i32 {
    // SAFETY: the pointers are as locum.h says.
    unsafe {
        guard("locum_stats", error, |frame| {
            put("json", stats_json, LocumBytes::EMPTY)?;
            let instance = frame.instance(handle)?;
            put("json", stats_json, lend_json(&instance.locum.stats())?)?;
            Ok(OK)
        })
    }
}

/// `options_json` of `locum_distil_start`: the knobs of core, and `promote`, its word for "no trial".
fn distil_options(value: Value) -> Result<DistilOptions, Failure> {
    let Value::Object(mut fields) = value else {
        return Err(Failure::argument("options_json is not a JSON object"));
    };
    let trial = match fields.remove("promote") {
        None | Some(Value::Null) => None,
        Some(Value::String(word)) if word == "auto" => Some(true),
        Some(Value::String(word)) if word == "never" => Some(false),
        Some(_) => {
            return Err(Failure::argument(
                "\"promote\" in options_json is neither \"auto\" nor \"never\"",
            ))
        }
    };
    let mut options = DistilOptions::deserialize(Value::Object(fields))
        .map_err(|e| bad_json("options_json", &e))?;
    options.trial = trial.or(options.trial);
    Ok(options)
}

/// `locum_ext_report.html`.
///
/// # Safety
/// The pointers are as locum.h describes them.
pub unsafe extern "C" fn report_html(
    handle: u64,
    html: *mut LocumBytes,
    error: *mut *mut LocumError,
) -> i32 {
    // SAFETY: the pointers are as locum.h says.
    unsafe {
        guard("locum.report/1 html", error, |frame| {
            put("html", html, LocumBytes::EMPTY)?;
            let instance = frame.instance(handle)?;
            put(
                "html",
                html,
                lend(instance.locum.report_html()?.into_bytes()),
            )?;
            Ok(OK)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn every_knob_of_the_header_is_known_and_a_misspelt_one_is_refused() {
        let all = json!({
            "method": "lora", "tokens": 4000, "max_seconds": 30.0, "epochs": 1.5, "lr": 1e-3, "rank": 4, "alpha": 8.0,
            "upper_layers": 2, "batch_tokens": 512, "warmup_steps": 3, "weight_decay": 0.0, "patience": 2, "seed": 1,
            "compute": "f32", "memory_mib": 2048, "ttt": "published", "ttt_every": 6, "ttt_chunk": 256, "ttt_lr": 0.3, "ttt_rate": 3e-4, "ttt_from": 0.5, "ttt_decay": 0.9,
            "unfiltered": true, "continue_student": true, "promote": "never"
        });
        let options = distil_options(all).unwrap();
        assert_eq!(options.knobs.rank, Some(4));
        assert_eq!(
            (options.unfiltered, options.continue_student, options.trial),
            (true, true, Some(false))
        );
        assert_eq!(
            distil_options(json!({ "promote": "auto" })).unwrap().trial,
            Some(true)
        );
        assert_eq!(distil_options(json!({})).unwrap(), DistilOptions::default());
        for bad in [
            json!({ "tokenz": 1 }),
            json!({ "promote": true }),
            json!({ "method": 7 }),
            json!([]),
        ] {
            assert!(distil_options(bad.clone()).is_err(), "{bad}");
        }
    }
}
