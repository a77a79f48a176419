//! Group 4 of `locum.h`: recording.

use std::sync::Arc;

use locum_core::episode::{
    Actor, Agent, Criterion, Integrity, Judge, Outcome as CoreOutcome, Status, Task, ToolSpec,
};
use locum_core::formats;
use locum_core::limits::{MAX_STEP_BYTES, MAX_TOOLS};
use locum_core::locum::{EpisodeStart, StepMeta};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::forget::episode_id;
use crate::guard::{guard, guard_anywhere, guard_status};
use crate::input::{bad_json, json, name, read_struct, text, LocumStr};
use crate::instances::{objects, too_many, Episode};
use crate::life::wait;
use crate::output::{put, LocumError};
use crate::status::{Failure, E_LIMIT, OK};
use crate::structs::{Outcome, Step, OUTCOME_HAS_SCORE, STEP_IS_ERROR};

/// Longest reason of an outcome, in bytes.
const MAX_REASON_BYTES: usize = 4096;

/// `meta_json` of `locum_episode_begin`.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Meta {
    domain: String,
    group_key: Option<String>,
    instruction: String,
    session_id: Option<String>,
    agent: Agent,
    tools: Value,
    scope: String,
    extra: Map<String, Value>,
}

/// `details_json` of `locum_outcome`.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Details {
    criteria: Vec<Criterion>,
    integrity: Integrity,
    judge: Judge,
    tags: Vec<String>,
    #[serde(flatten)]
    extra: Map<String, Value>,
}

/// # Safety
/// The pointers are as locum.h describes them.
#[no_mangle]
pub unsafe extern "C" fn locum_episode_begin(
    handle: u64,
    task: *const u8,
    task_len: usize,
    meta_json: *const u8,
    meta_json_len: usize,
    out: *mut u64,
    error: *mut *mut LocumError,
) -> i32 {
    // SAFETY: the pointers are as locum.h says.
    unsafe {
        guard("locum_episode_begin", error, |frame| {
            put("out", out, 0)?;
            let instance = frame.instance(handle)?;
            instance.may_change()?;
            let task = name("task", task, task_len)?;
            let meta = json(
                "meta_json",
                LocumStr {
                    ptr: meta_json,
                    len: meta_json_len,
                },
                MAX_STEP_BYTES,
            )?;
            let meta: Meta = match meta {
                Some(value) => Meta::deserialize(value).map_err(|e| bad_json("meta_json", &e))?,
                None => Meta::default(),
            };
            let tools = tools("tools of meta_json", meta.tools)?;
            let start = EpisodeStart {
                task: Task {
                    id: task.into(),
                    domain: meta.domain,
                    group_key: meta.group_key,
                    instruction: meta.instruction,
                    split: None,
                },
                agent: meta.agent,
                tools: tools.clone(),
                session_id: meta.session_id,
                extra: meta.extra,
                scope: meta.scope,
            };
            let core = instance.locum.begin(start)?;
            let episode = Arc::new(Episode::new(instance, core, tools));
            let id = objects()
                .episodes
                .insert(episode)
                .ok_or_else(|| too_many("episodes"))?;
            put("out", out, id)?;
            Ok(OK)
        })
    }
}

/// # Safety
/// The pointers are as locum.h describes them.
#[no_mangle]
pub unsafe extern "C" fn locum_episode_step(
    episode: u64,
    step: *const Step,
    error: *mut *mut LocumError,
) -> i32 {
    // SAFETY: the pointers are as locum.h says.
    unsafe {
        guard("locum_episode_step", error, |frame| {
            let episode = frame.episode(episode)?;
            let mut history = episode.turn()?;
            let step = read_struct(step)?;
            let (message, meta) = message(&step)?;
            episode
                .instance
                .locum
                .message(&episode.handle, &message, meta)?;
            history.push(message);
            Ok(OK)
        })
    }
}

/// # Safety
/// The pointers are as locum.h describes them.
#[no_mangle]
pub unsafe extern "C" fn locum_episode_end(
    handle: u64,
    outcome: *const Outcome,
    error: *mut *mut LocumError,
) -> i32 {
    // SAFETY: the pointers are as locum.h says.
    unsafe {
        guard("locum_episode_end", error, |frame| {
            let episode = frame.episode(handle)?;
            let _turn = episode.turn()?;
            let outcome = core_outcome(outcome)?;
            episode.instance.locum.end(&episode.handle, outcome)?;
            // Gone already if another thread closed the store meanwhile.
            let _ = objects().episodes.remove(handle);
            Ok(OK)
        })
    }
}

#[no_mangle]
pub extern "C" fn locum_episode_drop(handle: u64) -> i32 {
    guard_status("locum_episode_drop", |frame| {
        if handle == 0 {
            return Ok(OK);
        }
        let episode = frame.episode(handle)?;
        let _turn = episode.turn()?;
        episode.instance.locum.drop_episode(&episode.handle)?;
        let _ = objects().episodes.remove(handle);
        Ok(OK)
    })
}

/// # Safety
/// `out_id` is null or writable for 16 bytes.
#[no_mangle]
pub unsafe extern "C" fn locum_episode_id(episode: u64, out_id: *mut [u8; 16]) -> i32 {
    guard_anywhere("locum_episode_id", |frame| {
        let episode = frame.episode(episode)?;
        // SAFETY: as locum.h says.
        unsafe { put("out_id", out_id, episode.handle.0 .0) }?;
        Ok(OK)
    })
}

/// # Safety
/// The pointers are as locum.h describes them.
#[no_mangle]
pub unsafe extern "C" fn locum_outcome_later(
    handle: u64,
    id: *const [u8; 16],
    outcome: *const Outcome,
    error: *mut *mut LocumError,
) -> i32 {
    // SAFETY: the pointers are as locum.h says.
    unsafe {
        guard("locum_outcome_later", error, |frame| {
            let instance = frame.instance(handle)?;
            let id = episode_id(id)?;
            instance.may_change()?;
            instance.locum.outcome_later(id, core_outcome(outcome)?)?;
            Ok(OK)
        })
    }
}

/// # Safety
/// `error` is as locum.h describes it.
#[no_mangle]
pub unsafe extern "C" fn locum_flush(
    handle: u64,
    timeout_ms: u32,
    error: *mut *mut LocumError,
) -> i32 {
    // SAFETY: `error` is as locum.h says.
    unsafe {
        guard("locum_flush", error, |frame| {
            frame.instance(handle)?.locum.flush(wait(timeout_ms))?;
            Ok(OK)
        })
    }
}

/// OpenAI tools as specifications; nothing and `null` are none.
pub fn tools(what: &str, value: Value) -> Result<Vec<ToolSpec>, Failure> {
    if value.is_null() {
        return Ok(Vec::new());
    }
    let tools =
        formats::tools_from_json(&value).map_err(|e| Failure::argument(format!("{what}: {e}")))?;
    if tools.len() > MAX_TOOLS {
        return Err(Failure::new(
            E_LIMIT,
            format!("{what}: {} tools; the limit is {MAX_TOOLS}", tools.len()),
        ));
    }
    Ok(tools)
}

/// # Safety
/// The strings of `step` are readable.
unsafe fn message(step: &Step) -> Result<(Value, StepMeta), Failure> {
    // SAFETY: passed on from the caller.
    let (content, model) = unsafe {
        (
            json("locum_step.content_json", step.content_json, MAX_STEP_BYTES)?,
            name("locum_step.model", step.model.ptr, step.model.len)?,
        )
    };
    let Some(Value::Object(mut message)) = content else {
        return Err(Failure::argument(
            "locum_step.content_json is not a JSON object",
        ));
    };
    let role = match step.role {
        0 => None,
        1 => Some("system"),
        2 => Some("user"),
        3 => Some("assistant"),
        4 => Some("tool"),
        other => {
            return Err(Failure::argument(format!(
                "locum_step.role is {other}, which is none of LOCUM_ROLE_*"
            )))
        }
    };
    if let Some(role) = role {
        match message.get("role") {
            None => {
                message.insert("role".into(), role.into());
            }
            Some(said) if said == role => {}
            Some(_) => {
                return Err(Failure::argument(format!(
                    "locum_step.role says {role} and \"role\" in content_json says something else"
                )))
            }
        }
    }
    let actor = match step.actor {
        0 => Actor::Unknown,
        1 => Actor::Teacher,
        2 => Actor::Student,
        3 => Actor::Human,
        4 => Actor::Script,
        other => {
            return Err(Failure::argument(format!(
                "locum_step.actor is {other}, which is none of LOCUM_ACTOR_*"
            )))
        }
    };
    if step.flags & !STEP_IS_ERROR != 0 {
        return Err(Failure::argument(format!(
            "locum_step.flags has unknown bits {:#x}",
            step.flags & !STEP_IS_ERROR
        )));
    }
    if !step.cost_usd.is_finite() || step.cost_usd < 0.0 {
        return Err(Failure::argument(
            "locum_step.cost_usd is negative or not a number",
        ));
    }
    let meta = StepMeta {
        actor,
        model: (!model.is_empty()).then(|| model.to_string()),
        cost_usd: (step.cost_usd > 0.0).then_some(step.cost_usd),
        latency_ms: (step.latency_ms > 0).then_some(step.latency_ms),
        unix_ms: (step.unix_ms > 0).then_some(step.unix_ms),
        is_error: step.flags & STEP_IS_ERROR != 0,
    };
    Ok((Value::Object(message), meta))
}

/// # Safety
/// `outcome` is null or as locum.h describes it.
unsafe fn core_outcome(outcome: *const Outcome) -> Result<CoreOutcome, Failure> {
    if outcome.is_null() {
        return Ok(CoreOutcome::default());
    }
    // SAFETY: passed on from the caller.
    let (outcome, reason, details) = unsafe {
        let outcome = read_struct(outcome)?;
        (
            outcome,
            text("locum_outcome.reason", outcome.reason, MAX_REASON_BYTES)?,
            json(
                "locum_outcome.details_json",
                outcome.details_json,
                MAX_STEP_BYTES,
            )?,
        )
    };
    let status = match outcome.status {
        0 => Status::Unknown,
        1 => Status::Success,
        2 => Status::Failure,
        3 => Status::Partial,
        4 => Status::Aborted,
        other => {
            return Err(Failure::argument(format!(
                "locum_outcome.status is {other}, which is none of LOCUM_OUTCOME_*"
            )))
        }
    };
    if outcome.flags & !OUTCOME_HAS_SCORE != 0 {
        return Err(Failure::argument(format!(
            "locum_outcome.flags has unknown bits {:#x}",
            outcome.flags & !OUTCOME_HAS_SCORE
        )));
    }
    let has_score = outcome.flags & OUTCOME_HAS_SCORE != 0 || outcome.score != 0.0;
    if has_score && !outcome.score.is_finite() {
        return Err(Failure::argument(
            "locum_outcome.score is not a finite number",
        ));
    }
    let details: Details = match details {
        Some(value) => {
            Details::deserialize(value).map_err(|e| bad_json("locum_outcome.details_json", &e))?
        }
        None => Details::default(),
    };
    Ok(CoreOutcome {
        status,
        score: has_score.then_some(outcome.score),
        criteria: details.criteria,
        integrity: details.integrity,
        judge: details.judge,
        tags: details.tags,
        reason: (!reason.is_empty()).then(|| reason.into_owned()),
        extra: details.extra,
    })
}
