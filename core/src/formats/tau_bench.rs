//! tau-bench result files: a JSON array of runs, each with `traj` (OpenAI chat messages) and a `reward`.
//! (sierra-research/tau-bench, `run.py`; format seen at commit 59a200c)

use serde_json::{Map, Value};

use super::messages::{kind, steps_from_messages};
use super::FormatError;
use crate::episode::{Actor, Episode, Judge, JudgeKind, Outcome, Source, Status, SCHEMA};

pub(super) const NAME: &str = "tau-bench";

/// One element of the array as an episode, without id and provenance.
///
/// A reward of 1 is success, any other number failure, no number unknown. Everything but `traj` is
/// kept in `extra`. The hidden instruction of the simulated customer stays there too: the agent was
/// never told it, so it must not become the episode's goal.
pub(super) fn episode(run: &Map<String, Value>) -> Result<Episode, FormatError> {
    let Some(Value::Array(messages)) = run.get("traj") else {
        return Err(FormatError::Run {
            problem: "`traj`, the list of messages, is missing".into(),
        });
    };
    let mut steps = steps_from_messages(messages)?;
    for step in steps.iter_mut().filter(|step| step.source == Source::Agent) {
        step.actor = Actor::Teacher;
        for observation in &mut step.observations {
            // The environment answers a bad call with a text of this form and no other sign (`envs/base.py`).
            let text = observation.content.as_ref().map(|content| content.text());
            observation.is_error = text.is_some_and(|text| text.starts_with("Error: "));
        }
    }
    let domain = steps
        .iter()
        .filter(|step| step.source == Source::System)
        .filter_map(|step| step.message.as_ref())
        .find_map(|content| {
            let heading = content
                .text()
                .lines()
                .next()
                .unwrap_or_default()
                .to_lowercase();
            ["airline", "retail"]
                .into_iter()
                .find(|domain| heading.contains(domain))
        });
    let mut episode = Episode {
        schema: SCHEMA.into(),
        steps,
        closed: true,
        ..Episode::default()
    };
    episode.task.domain = domain.unwrap_or(NAME).into();
    episode.task.id = match run.get("task_id") {
        Some(Value::Number(number)) => format!("{}/{number}", episode.task.domain),
        Some(Value::String(id)) => format!("{}/{id}", episode.task.domain),
        None | Some(Value::Null) => String::new(),
        Some(other) => {
            let problem = format!(
                "`task_id` must be a number or a string, found {}",
                kind(other)
            );
            return Err(FormatError::Run { problem });
        }
    };
    let reward = run.get("reward").and_then(Value::as_f64);
    episode.outcome = Some(Outcome {
        status: match reward {
            // The benchmark's own test for success (`run.py`, `display_metrics`).
            Some(reward) if (1.0 - 1e-6..=1.0 + 1e-6).contains(&reward) => Status::Success,
            Some(_) => Status::Failure,
            None => Status::Unknown,
        },
        score: reward.filter(|reward| (0.0..=1.0).contains(reward)),
        judge: Judge {
            kind: JudgeKind::Program,
            name: NAME.into(),
            privileged: true,
            ..Judge::default()
        },
        ..Outcome::default()
    });
    episode.extra = run
        .iter()
        .filter(|(key, _)| *key != "traj")
        .map(|(k, v)| (k.clone(), v.clone()))
        .collect();
    Ok(episode)
}
