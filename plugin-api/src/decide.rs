//! Group 5 of `locum.h`: who plays the next step, and the student's answer.

use std::sync::Arc;
use std::time::Duration;

use locum_core::limits::MAX_EPISODE_BYTES;
use locum_core::locum::{
    Answer, AnswerError, Decision as CoreDecision, ReasonCode, Request as CoreRequest,
};
use locum_core::policy::Who;
use serde_json::{json, Value};

use crate::episode::tools;
use crate::guard::{guard, guard_status};
use crate::input::{json as read_json, read_struct, write_struct};
use crate::instances::{objects, too_many, Episode, Generation};
use crate::output::{lend, lend_json, put, LocumBytes, LocumError};
use crate::status::{Failure, E_CANCELLED, E_INTERNAL, OK, PENDING, TEACHER};
use crate::structs::{
    fixed, Decision, Request, REQUEST_CALL_REQUIRED, REQUEST_GREEDY, WHO_STUDENT, WHO_TEACHER,
};
use locum_core::threads::SignalsBlocked;

/// Reason of an instance whose breaker has tripped.
const BROKEN: &str = "an internal error happened earlier; open the store again";

/// # Safety
/// The pointers are as locum.h describes them.
#[no_mangle]
pub unsafe extern "C" fn locum_decide(
    episode: u64,
    request: *const Request,
    out: *mut Decision,
    error: *mut *mut LocumError,
) -> i32 {
    // SAFETY: the pointers are as locum.h says.
    let status = unsafe {
        guard("locum_decide", error, |frame| {
            write_struct(
                out,
                &teacher(
                    ReasonCode::BadRequest,
                    "the request was refused; see the error",
                ),
            )?;
            let episode = frame.episode(episode)?;
            let history = episode.turn()?;
            let request = core_request(&episode, &history, &read_struct(request)?)?;
            let decision = if episode.instance.breaker.is_broken() {
                teacher(ReasonCode::Fault, BROKEN)
            } else {
                decision(&episode.instance.locum.decide(&episode.handle, &request))
            };
            write_struct(out, &decision)?;
            Ok(OK)
        })
    };
    if status == E_INTERNAL {
        // SAFETY: a null or sizeless `out` was answered E_MISUSE above, so it is writable here.
        let _ = unsafe { write_struct(out, &teacher(ReasonCode::Fault, BROKEN)) };
    }
    status
}

/// # Safety
/// The pointers are as locum.h describes them.
#[no_mangle]
pub unsafe extern "C" fn locum_generate(
    episode: u64,
    request: *const Request,
    out: *mut u64,
    error: *mut *mut LocumError,
) -> i32 {
    // SAFETY: the pointers are as locum.h says.
    unsafe {
        guard("locum_generate", error, |frame| {
            put("out", out, 0)?;
            let episode = frame.episode(episode)?;
            let history = episode.turn()?;
            let request = core_request(&episode, &history, &read_struct(request)?)?;
            if episode.instance.breaker.is_broken() {
                return Err(Failure::new(TEACHER, BROKEN));
            }
            let mut handles = episode.instance.call_handles();
            let call = {
                let _signals = SignalsBlocked::new();
                episode.instance.locum.generate(&episode.handle, &request)?
            };
            let number = call.number();
            let generation = Arc::new(Generation {
                instance: episode.instance.clone(),
                call,
            });
            let id = objects()
                .calls
                .insert(generation)
                .ok_or_else(|| too_many("calls"))?;
            handles.insert(number, id);
            put("out", out, id)?;
            Ok(OK)
        })
    }
}

/// # Safety
/// `new_text` is null or as locum.h describes it.
#[no_mangle]
pub unsafe extern "C" fn locum_call_poll(call: u64, new_text: *mut LocumBytes) -> i32 {
    guard_status("locum_call_poll", |frame| {
        if !new_text.is_null() {
            // SAFETY: as locum.h says.
            unsafe { put("new_text", new_text, LocumBytes::EMPTY) }?;
        }
        let generation = frame.call(call)?;
        let polled = generation.call.poll();
        if !new_text.is_null() {
            // SAFETY: as locum.h says.
            unsafe { put("new_text", new_text, lend(polled.new_text.into_bytes())) }?;
        }
        Ok(if polled.done { OK } else { PENDING })
    })
}

#[no_mangle]
pub extern "C" fn locum_call_wait(call: u64, timeout_ms: u32) -> i32 {
    guard_status("locum_call_wait", |frame| {
        let generation = frame.call(call)?;
        Ok(
            if generation
                .call
                .wait(Duration::from_millis(timeout_ms.into()))
            {
                OK
            } else {
                PENDING
            },
        )
    })
}

/// # Safety
/// The pointers are as locum.h describes them.
#[no_mangle]
pub unsafe extern "C" fn locum_call_result(
    call: u64,
    result_json: *mut LocumBytes,
    error: *mut *mut LocumError,
) -> i32 {
    // SAFETY: the pointers are as locum.h says.
    unsafe {
        guard("locum_call_result", error, |frame| {
            put("result_json", result_json, LocumBytes::EMPTY)?;
            let generation = frame.call(call)?;
            let (status, value) = match generation.call.result() {
                Ok(answer) => (OK, answer_json(&answer)),
                Err(AnswerError::Teacher { reason, code }) => {
                    let code = code as i32;
                    (
                        TEACHER,
                        json!({ "locum": { "who": "teacher", "reason": reason, "reason_code": code } }),
                    )
                }
                Err(AnswerError::Running) => return Ok(PENDING),
                Err(AnswerError::Cancelled) => {
                    return Err(Failure::new(E_CANCELLED, "the call was cancelled"))
                }
            };
            put("result_json", result_json, lend_json(&value)?)?;
            Ok(status)
        })
    }
}

#[no_mangle]
pub extern "C" fn locum_call_cancel(call: u64) -> i32 {
    guard_status("locum_call_cancel", |frame| {
        frame.call(call)?.call.cancel();
        Ok(OK)
    })
}

#[no_mangle]
pub extern "C" fn locum_call_free(call: u64) -> i32 {
    guard_status("locum_call_free", |frame| {
        if call == 0 {
            return Ok(OK);
        }
        let generation = frame.call(call)?;
        let _ = objects().calls.remove(call);
        generation
            .instance
            .call_handles()
            .remove(&generation.call.number());
        generation.call.cancel();
        Ok(OK)
    })
}

/// # Safety
/// The strings of `request` are readable.
unsafe fn core_request(
    episode: &Episode,
    history: &[Value],
    request: &Request,
) -> Result<CoreRequest, Failure> {
    let known = REQUEST_GREEDY | REQUEST_CALL_REQUIRED;
    if request.flags & !known != 0 {
        return Err(Failure::argument(format!(
            "locum_request.flags has unknown bits {:#x}",
            request.flags & !known
        )));
    }
    if !request.temperature.is_finite() || request.temperature < 0.0 {
        return Err(Failure::argument(
            "locum_request.temperature is negative or not a number",
        ));
    }
    // SAFETY: passed on from the caller.
    let (messages, tools_json) = unsafe {
        (
            read_json(
                "locum_request.messages_json",
                request.messages_json,
                MAX_EPISODE_BYTES,
            )?,
            read_json(
                "locum_request.tools_json",
                request.tools_json,
                MAX_EPISODE_BYTES,
            )?,
        )
    };
    let messages = match messages {
        None => history.to_vec(),
        Some(Value::Array(messages)) => messages,
        Some(_) => {
            return Err(Failure::argument(
                "locum_request.messages_json is not a JSON array",
            ))
        }
    };
    let tools = match tools_json {
        None => episode.tools.clone(),
        Some(value) => tools("locum_request.tools_json", value)?,
    };
    Ok(CoreRequest {
        messages,
        tools,
        allow_text: request.flags & REQUEST_CALL_REQUIRED == 0,
        max_tokens: request.max_tokens,
        deadline_ms: request.deadline_ms,
        temperature: if request.flags & REQUEST_GREEDY != 0 {
            0.0
        } else {
            request.temperature
        },
        seed: request.seed,
    })
}

/// The answer as `locum_call_result` documents it.
fn answer_json(answer: &Answer) -> Value {
    json!({
        "message": answer.message,
        "finish_reason": answer.finish_reason,
        "usage": {
            "prompt_tokens": answer.prompt_ids.len(),
            "completion_tokens": answer.reply_ids.len(),
            "cached_tokens": answer.cached_tokens,
        },
        "locum": {
            "student": answer.student,
            "version": answer.version,
            "confidence": answer.confidence,
            "mean_logprob": answer.mean_logprob,
            "prefill_ms": answer.prefill_ms,
            "decode_ms": answer.decode_ms,
            "queue_ms": answer.queue_ms,
        },
    })
}

fn decision(from: &CoreDecision) -> Decision {
    Decision {
        struct_size: 0,
        who: match from.who {
            Who::Teacher => WHO_TEACHER,
            Who::Student => WHO_STUDENT,
        },
        confidence: from.confidence,
        decided_ns: u32::try_from(from.decided_ns).unwrap_or(u32::MAX),
        student_version: from.version,
        reason_code: from.reason_code as i32,
        reason: fixed(&from.reason),
    }
}

fn teacher(reason_code: ReasonCode, reason: &str) -> Decision {
    Decision {
        struct_size: 0,
        who: WHO_TEACHER,
        confidence: 0.0,
        decided_ns: 0,
        student_version: 0,
        reason_code: reason_code as i32,
        reason: fixed(reason),
    }
}
