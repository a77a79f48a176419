//! Did it succeed? The host's outcome, then program judges, then the policy's label; anything but a clear yes is a no.

use crate::episode::{Episode, Judge, JudgeKind, Outcome, Source, Status};
use crate::policy::{episode_info, Policy};

use super::integrity;
use super::LeftOutReason;

/// A judge that is a function. `Ok(None)` abstains; an error counts against the episode.
pub struct ProgramJudge<'a> {
    pub name: String,
    pub version: String,
    #[allow(clippy::type_complexity)]
    pub judge: Box<dyn Fn(&Episode) -> Result<Option<Outcome>, JudgeError> + Send + Sync + 'a>,
}

/// A judge could not come to a verdict.
#[derive(Clone, Debug, thiserror::Error)]
#[error("judge {judge}: {message}")]
pub struct JudgeError {
    pub judge: String,
    pub message: String,
}

/// The chain's verdict on an episode, or why it is left out.
///
/// A later judge may take a success away and may give one where the host had no opinion (no outcome, unknown, partial).
/// It cannot turn the host's failure into a success: one wrong success costs more than many lost ones.
pub(super) fn admit(
    episode: &Episode,
    policy: &dyn Policy,
    judges: &[ProgramJudge<'_>],
    unfiltered: bool,
) -> Result<Outcome, (LeftOutReason, String)> {
    if !episode.closed {
        return Err((LeftOutReason::Open, "the host has not ended it".into()));
    }
    if episode.incomplete {
        return Err((LeftOutReason::Incomplete, "a step of it was lost".into()));
    }
    if !episode.steps.iter().any(|s| s.source == Source::Agent) {
        return Err((
            LeftOutReason::NoAgentStep,
            "it has no step of an agent".into(),
        ));
    }
    let flags = integrity::flags(episode);
    let mut outcome = match (verdict(episode, policy, judges), unfiltered) {
        (Ok(outcome), _) => outcome,
        (Err(_), true) => episode.outcome.clone().unwrap_or_default(),
        (Err(error), false) => return Err((LeftOutReason::JudgeFailed, error.to_string())),
    };
    for flag in flags {
        if !outcome.integrity.flags.contains(&flag) {
            outcome.integrity.flags.push(flag);
        }
    }
    if unfiltered {
        return Ok(outcome);
    }
    match outcome.status {
        Status::Success => {}
        Status::Unknown => {
            return Err((LeftOutReason::Unknown, "no judge says how it ended".into()))
        }
        Status::Partial => {
            return Err((LeftOutReason::NotSuccess, "judged a partial success".into()))
        }
        Status::Failure => return Err((LeftOutReason::NotSuccess, "judged a failure".into())),
        Status::Aborted => return Err((LeftOutReason::NotSuccess, "it was aborted".into())),
    }
    if !outcome.integrity.ok {
        let flags = outcome.integrity.flags.join(", ");
        return Err((
            LeftOutReason::Integrity,
            format!("the success was not honest: {flags}"),
        ));
    }
    if outcome
        .integrity
        .flags
        .iter()
        .any(|f| f == integrity::NO_TOOL_CALL)
    {
        return Err((
            LeftOutReason::Integrity,
            "success without a single tool call, though it had tools".into(),
        ));
    }
    Ok(outcome)
}

fn verdict(
    episode: &Episode,
    policy: &dyn Policy,
    judges: &[ProgramJudge<'_>],
) -> Result<Outcome, JudgeError> {
    let mut outcome = episode.outcome.clone().unwrap_or_default();
    let host_refused = matches!(outcome.status, Status::Failure | Status::Aborted);
    for judge in judges {
        if let Some(mut said) = (judge.judge)(episode)? {
            if said.judge.name.is_empty() {
                said.judge = Judge {
                    kind: JudgeKind::Program,
                    name: judge.name.clone(),
                    version: judge.version.clone(),
                    privileged: false,
                };
            }
            // Integrity once broken stays broken.
            said.integrity.ok &= outcome.integrity.ok;
            said.integrity
                .flags
                .splice(0..0, outcome.integrity.flags.iter().cloned());
            if !(host_refused && said.status == Status::Success) {
                outcome = said;
            }
        }
    }
    let info = episode_info(episode, Some(&outcome), &[]);
    if let Some(label) = policy.label(&info) {
        if let Some(status) = label.status.as_deref() {
            let status = match status {
                "success" => Status::Success,
                "partial" => Status::Partial,
                "failure" => Status::Failure,
                "aborted" => Status::Aborted,
                "unknown" => Status::Unknown,
                other => {
                    let message = format!("label gave status {other:?}; success, partial, failure, aborted or unknown is expected");
                    return Err(JudgeError {
                        judge: format!("policy {}", policy.id().name),
                        message,
                    });
                }
            };
            if status != outcome.status && !(host_refused && status == Status::Success) {
                outcome.status = status;
                let id = policy.id();
                outcome.judge = Judge {
                    kind: JudgeKind::Policy,
                    name: id.name,
                    version: id.digest,
                    privileged: false,
                };
            }
        }
        if label.score.is_some() {
            outcome.score = label.score;
        }
        for tag in label.tags {
            if !outcome.tags.contains(&tag) {
                outcome.tags.push(tag);
            }
        }
    }
    Ok(outcome)
}
