//! What a policy would have said over recorded episodes, beside another policy or what was done.
//!
//! A recording does not hold everything that a hook is told: at each step a student is offered (the recorded one where there was one),
//! in the stage `promoted`, without live numbers, and what was not recorded is absent or zero. So the figures compare two policies
//! under the same assumption; they are no forecast.

use std::collections::BTreeMap;

use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::episode::{Actor, Content, Episode, Source, Status, Step};
use crate::limits::DEFAULT_DEADLINE_MS;
use crate::policy::{
    episode_info, Allow, HookStats, Policy, RedactInfo, StepInfo, StudentInfo, ToolInfo, Who,
};

/// Disagreements that are listed; further ones are counted.
const MAX_LISTED: usize = 50;

/// The result of [`replay`].
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Replay {
    pub policy: String,
    /// The policy it is held against; `None` for what was recorded.
    pub against: Option<String>,
    pub episodes: u64,
    /// Steps of the agent.
    pub steps: u64,
    pub hooks: Vec<ReplayedHook>,
    /// Share of steps left to the student, were one offered at each.
    pub student_share: f64,
    pub student_share_against: Option<f64>,
    /// What the teacher's steps cost as recorded, and would cost at their mean price with this share.
    pub cost_usd: f64,
    pub estimated_cost_usd: f64,
    pub estimated_cost_against_usd: Option<f64>,
    /// Episodes with a known outcome in which the policy decides every step as was done, and how many of them were successes.
    pub alike_episodes: u64,
    pub alike_successes: u64,
    /// The first of them, in the order of episodes and steps.
    pub disagreements: Vec<Disagreement>,
    /// Verdicts that another order of the episodes changed: such a policy remembers things between calls.
    pub state_dependent: u64,
    /// SHA-256 (hex) over all verdicts: two replays of one policy over the same episodes give the same.
    pub digest: String,
    /// Times of the hooks, which differ from run to run.
    pub times: Vec<HookStats>,
}

/// How often a hook was asked, and how often it said something else.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ReplayedHook {
    pub hook: String,
    pub asked: u64,
    pub changed: u64,
}

/// A verdict that is another one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Disagreement {
    pub hook: &'static str,
    pub episode: String,
    /// 0 for a verdict on the whole episode.
    pub step: u32,
    pub was: String,
    pub is: String,
}

/// One answer of a hook, and what was done as far as the recording says.
#[derive(Clone, Debug, PartialEq)]
struct Verdict {
    hook: &'static str,
    step: u32,
    said: String,
    done: Option<String>,
}

/// Asks the policy about every step and every episode, twice: in order, and backwards to see whether it remembers.
///
/// `decide`, `allow_tool` (for the student's calls), `redact`, `label` and `curate` are asked; the others need what is not recorded.
pub fn replay(episodes: &[Episode], policy: &dyn Policy, against: Option<&dyn Policy>) -> Replay {
    let mut out = Replay {
        policy: policy.id().name,
        against: against.map(|p| p.id().name),
        episodes: episodes.len() as u64,
        ..Replay::default()
    };
    let mut order: Vec<&Episode> = episodes.iter().collect();
    order.sort_by_key(|e| e.episode_id);
    let now: Vec<Vec<Verdict>> = order.iter().map(|e| verdicts(e, policy)).collect();
    let mut backwards: Vec<Vec<Verdict>> =
        order.iter().rev().map(|e| verdicts(e, policy)).collect();
    backwards.reverse();
    let before: Option<Vec<Vec<Verdict>>> =
        against.map(|p| order.iter().map(|e| verdicts(e, p)).collect());

    let mut hooks: BTreeMap<&str, ReplayedHook> = BTreeMap::new();
    let mut hash = Sha256::new();
    let (mut to_student, mut to_student_before) = (0u64, 0u64);
    let (mut cost, mut priced) = (0.0, 0u64);
    for (at, episode) in order.iter().enumerate() {
        let mut alike = true;
        for (n, verdict) in now[at].iter().enumerate() {
            let Verdict {
                hook, step, said, ..
            } = verdict;
            hash.update(format!("{}\0{step}\0{hook}\0{said}\0", episode.episode_id));
            let counted = hooks.entry(hook).or_insert_with(|| ReplayedHook {
                hook: (*hook).into(),
                ..ReplayedHook::default()
            });
            counted.asked += 1;
            out.state_dependent += u64::from(backwards[at][n].said != *said);
            let was = match &before {
                Some(before) => before[at].get(n).map(|v| v.said.clone()),
                None => verdict.done.clone(),
            };
            if let Some(was) = was.filter(|was| was != said) {
                counted.changed += 1;
                if out.disagreements.len() < MAX_LISTED {
                    out.disagreements.push(Disagreement {
                        hook,
                        episode: episode.episode_id.to_string(),
                        step: *step,
                        was,
                        is: said.clone(),
                    });
                }
            }
            if *hook == "decide" {
                out.steps += 1;
                to_student += u64::from(said.starts_with("student"));
                alike &= verdict.done.as_ref().is_none_or(|done| done == said);
                if let Some(before) = &before {
                    to_student_before += u64::from(before[at][n].said.starts_with("student"));
                }
            }
        }
        let status = episode
            .outcome
            .as_ref()
            .map_or(Status::Unknown, |o| o.status);
        if alike && status != Status::Unknown {
            out.alike_episodes += 1;
            out.alike_successes += u64::from(status == Status::Success);
        }
        let teacher = episode.steps.iter().filter(|s| s.actor == Actor::Teacher);
        for price in teacher.filter_map(|s| s.usage.as_ref()?.cost_usd) {
            cost += price;
            priced += 1;
        }
    }
    let share = |n: u64| n as f64 / out.steps.max(1) as f64;
    let mean = cost / priced.max(1) as f64;
    let estimate = |students: u64| mean * (out.steps - students) as f64;
    out.student_share = share(to_student);
    out.cost_usd = cost;
    out.estimated_cost_usd = estimate(to_student);
    if before.is_some() {
        out.student_share_against = Some(share(to_student_before));
        out.estimated_cost_against_usd = Some(estimate(to_student_before));
    }
    out.hooks = hooks.into_values().collect();
    out.digest = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
    out.times = policy.stats();
    out
}

fn verdicts(episode: &Episode, policy: &dyn Policy) -> Vec<Verdict> {
    let mut out = Vec::new();
    let (task, domain) = (&episode.task.id, &episode.task.domain);
    let (mut turn, mut bytes) = (0u32, 0usize);
    let mut put = |hook, step, said: String, done: Option<String>| {
        out.push(Verdict {
            hook,
            step,
            said,
            done,
        });
    };
    for step in &episode.steps {
        if step.source == Source::Agent {
            let decision = step.decision.as_ref();
            let offered = decision.and_then(|d| d.student.clone());
            // Who was asked to play it, whoever did in the end.
            let done = offered.as_ref().map(|_| "student".to_owned());
            let choice = policy.decide(&StepInfo {
                task: task.clone(),
                domain: domain.clone(),
                turn,
                tools: episode.tools.iter().map(|t| t.name.clone()).collect(),
                prompt_bytes: bytes,
                novelty: 0.0,
                deadline_ms: DEFAULT_DEADLINE_MS,
                student: Some(StudentInfo {
                    id: offered.unwrap_or_else(|| "replay".into()),
                    version: 1,
                    ..StudentInfo::default()
                }),
                stage: "promoted".into(),
            });
            let who = match choice.who {
                Who::Student => "student",
                Who::Teacher => "teacher",
            };
            let mut said = who.to_owned();
            if choice.temperature.is_some() || choice.max_tokens.is_some() {
                said += &format!(
                    " temperature {:?} max_tokens {:?}",
                    choice.temperature, choice.max_tokens
                );
            }
            put("decide", step.index, said, done);
            turn += 1;
            let own = (step.actor == Actor::Student).then_some(&step.tool_calls);
            let shadow = step.counterfactual.as_ref();
            let shadow = shadow
                .filter(|c| c.actor == Actor::Student)
                .map(|c| &c.tool_calls);
            for call in own.into_iter().chain(shadow).flatten() {
                let allow = policy.allow_tool(&ToolInfo {
                    task: task.clone(),
                    domain: domain.clone(),
                    name: call.name.clone(),
                    arguments: call.arguments.clone(),
                });
                let said = match allow {
                    Allow::Yes => "yes",
                    Allow::No(_) => "no",
                };
                let done = (step.actor == Actor::Student).then(|| "yes".to_owned());
                put("allow_tool", step.index, said.into(), done);
            }
        }
        for (role, tool, content) in texts(step) {
            bytes += content.len();
            let before = content.clone();
            let said = match policy.redact(&RedactInfo {
                role: role.into(),
                tool,
                content,
            }) {
                Ok(Some(after)) if after == before => "kept".to_owned(),
                Ok(Some(after)) => format!("changed to {} bytes", after.len()),
                Ok(None) => "dropped".to_owned(),
                Err(_) => "failed".to_owned(),
            };
            put("redact", step.index, said, Some("kept".into()));
        }
    }
    let info = episode_info(episode, episode.outcome.as_ref(), &[]);
    let label = policy
        .label(&info)
        .map_or("the host's".to_owned(), |label| {
            serde_json::to_string(&label).unwrap_or_default()
        });
    put("label", 0, label, None);
    let verdict = policy.curate(&info);
    let said = match verdict.use_it {
        true => format!("use {}", verdict.weight),
        false => "leave out".to_owned(),
    };
    put("curate", 0, said, None);
    out
}

/// The texts of a step that `redact` sees, without empty ones.
fn texts(step: &Step) -> Vec<(&'static str, Option<String>, String)> {
    let role = match step.source {
        Source::System => "system",
        Source::User => "user",
        Source::Agent => "assistant",
    };
    let mut out = Vec::new();
    let message = step.message.as_ref().map(Content::text);
    out.extend(message.map(|text| (role, None, text)));
    for call in &step.tool_calls {
        out.push((
            "arguments",
            Some(call.name.clone()),
            call.arguments.to_string(),
        ));
    }
    for observation in &step.observations {
        let text = observation.content.as_ref().map(Content::text);
        out.extend(text.map(|text| ("tool", None, text)));
    }
    out.retain(|(_, _, text)| !text.is_empty());
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::curate::fixtures::{wanderers, KeepAll};
    use crate::policy::TeacherFirst;

    #[test]
    fn a_replay_is_the_same_whatever_the_order_of_the_episodes() {
        let mut episodes = wanderers(40);
        let first = replay(&episodes, &KeepAll, None);
        episodes.reverse();
        assert_eq!(replay(&episodes, &KeepAll, None), first);
        assert_eq!((first.episodes, first.state_dependent), (40, 0));
        assert!(first.steps > 40 && first.student_share == 0.0, "{first:?}");
    }

    #[test]
    fn a_policy_is_held_against_another_one() {
        let episodes = wanderers(10);
        let found = replay(&episodes, &KeepAll, Some(&TeacherFirst));
        let changed = |hook: &str| found.hooks.iter().find(|h| h.hook == hook).unwrap().changed;
        assert_eq!((changed("decide"), changed("redact")), (0, 0));
        assert_eq!(changed("curate"), 10, "one keeps all, the other nothing");
        assert_eq!(found.disagreements.len(), 10);
        assert_eq!(found.student_share_against, Some(0.0));
    }
}
