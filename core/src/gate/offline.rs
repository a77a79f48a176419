//! The stages before any live episode is at stake: held-out steps, then live steps that the teacher played.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::policy::GateSettings;

use super::{wilson, GateDecision, Verdict};

/// Share by which a loss may exceed that of the incumbent: below this the difference is noise of a small held-out set.
const LOSS_TOLERANCE: f64 = 0.02;

/// How a model did on the held-out steps.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct OfflineReport {
    /// Held-out steps asked.
    pub steps: u64,
    /// Of these, answered with exactly the teacher's calls.
    pub exact: u64,
    /// Of these, answered with something that is no valid call although the grammar was on.
    pub invalid: u64,
    /// Of these, left to the teacher because what was learned while reading had drifted past its cap.
    #[serde(default)]
    pub drifted: u64,
    /// Mean loss on the targets, in nats a token.
    pub loss: f64,
    /// Held-out episodes that the steps are from.
    pub episodes: u64,
    /// Share of task groups that are held out.
    pub held_out_share: f64,
    /// By domain.
    #[serde(default)]
    pub domains: BTreeMap<String, SliceCount>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SliceCount {
    pub steps: u64,
    pub exact: u64,
}

impl OfflineReport {
    /// Share answered exactly; 0 without steps.
    pub fn exact_share(&self) -> f64 {
        self.exact as f64 / self.steps.max(1) as f64
    }
}

/// Judges a candidate on held-out steps against the untrained base and, if there is one, the student now in service.
///
/// Passes if there are enough steps, no reply was invalid, the exact share reaches `min_exact`, neither exact share nor loss
/// is worse than the base's, and the loss is not clearly worse than the incumbent's. With too few steps it says how many
/// more passing episodes of which domain would do.
pub fn offline(
    candidate: &OfflineReport,
    base: Option<&OfflineReport>,
    incumbent: Option<&OfflineReport>,
    settings: &GateSettings,
) -> Verdict {
    let (mut reasons, mut refusals) = (Vec::new(), Vec::new());
    let share = candidate.exact_share();
    let (low, high) = wilson(candidate.exact, candidate.steps, settings.alpha);
    reasons.push(format!(
        "{} of {} held-out steps answered exactly like the teacher ({:.0} %, {:.0} to {:.0} %), loss {:.3}",
        candidate.exact,
        candidate.steps,
        100.0 * share,
        100.0 * low,
        100.0 * high,
        candidate.loss
    ));
    if candidate.drifted > 0 {
        reasons.push(format!(
            "{} of them left to the teacher, for what was learned while reading had drifted past its cap",
            candidate.drifted
        ));
    }
    if candidate.invalid > 0 {
        refusals.push(format!(
            "{} replies were no valid calls, though the grammar allows no other",
            candidate.invalid
        ));
    }
    if !candidate.loss.is_finite() {
        refusals.push("the loss is not a number".into());
    }
    let missing = (settings.min_held_out_steps.max(1) as u64).saturating_sub(candidate.steps);
    if !refusals.is_empty() {
        reasons.extend(refusals);
        return Verdict::new(GateDecision::Reject, reasons, Vec::new());
    }
    if missing > 0 {
        let need = more_episodes(candidate, missing, settings.min_held_out_steps);
        return Verdict::new(GateDecision::Hold, reasons, vec![need]);
    }
    if share < settings.min_exact {
        refusals.push(format!(
            "below the {:.0} % that are asked for",
            100.0 * settings.min_exact
        ));
    }
    if let Some(base) = base.filter(|b| b.steps > 0) {
        if candidate.loss > base.loss {
            refusals.push(format!(
                "loss {:.3} is above the untrained model's {:.3}",
                candidate.loss, base.loss
            ));
        }
        if share < base.exact_share() {
            let other = 100.0 * base.exact_share();
            refusals.push(format!(
                "the untrained model answers more steps exactly ({other:.0} %)"
            ));
        }
    }
    if let Some(incumbent) = incumbent.filter(|i| i.steps > 0) {
        if candidate.loss > incumbent.loss * (1.0 + LOSS_TOLERANCE) {
            let other = incumbent.loss;
            refusals.push(format!(
                "loss {:.3} is above that of the student in service, {other:.3}",
                candidate.loss
            ));
        }
    }
    let decision = if refusals.is_empty() {
        GateDecision::Pass
    } else {
        GateDecision::Reject
    };
    reasons.extend(refusals);
    Verdict::new(decision, reasons, Vec::new())
}

fn more_episodes(report: &OfflineReport, missing: u64, asked: usize) -> String {
    // Without a held-out episode yet, one step an episode is the safe guess.
    let each = if report.episodes > 0 {
        (report.steps as f64 / report.episodes as f64).max(1.0)
    } else {
        1.0
    };
    let share = if report.held_out_share > 0.0 {
        report.held_out_share
    } else {
        0.1
    };
    let episodes = (missing as f64 / each / share).ceil() as u64;
    let kind = match report.domains.iter().min_by_key(|(_, count)| count.steps) {
        Some((domain, _)) if !domain.is_empty() => format!(" of {domain}"),
        _ => String::new(),
    };
    format!(
        "about {episodes} more passing episodes{kind}: {} held-out steps where {asked} are asked for, and {:.0} % of task groups are held out",
        report.steps,
        100.0 * share
    )
}

/// How a candidate did beside the teacher on live steps that the teacher played.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShadowReport {
    /// Steps on which the candidate was asked.
    pub steps: u64,
    /// Of these, without a valid answer in time.
    pub failures: u64,
    /// Of these, with an answer that was no valid call.
    pub invalid: u64,
    /// Of these, answered with the teacher's calls.
    pub agree: u64,
}

/// Judges a shadow run: enough answers, few failures, none invalid. Agreement is reported and never decides: of two good
/// ways the student may take the other.
pub fn shadow(report: &ShadowReport, settings: &GateSettings) -> Verdict {
    let asked = settings.shadow_steps as u64;
    let share = report.failures as f64 / report.steps.max(1) as f64;
    let mut reasons = vec![format!(
        "{} of {} shadowed steps without a valid answer in time; {} agreed with the teacher ({:.0} %)",
        report.failures,
        report.steps,
        report.agree,
        100.0 * report.agree as f64 / report.steps.max(1) as f64
    )];
    if report.invalid > 0 {
        reasons.push(format!("{} answers were no valid calls", report.invalid));
        return Verdict::new(GateDecision::Reject, reasons, Vec::new());
    }
    if report.steps.saturating_sub(report.failures) < asked && share <= settings.max_shadow_failures
    {
        let needs = vec![format!(
            "{} more shadowed steps",
            asked - (report.steps - report.failures)
        )];
        return Verdict::new(GateDecision::Wait, reasons, needs);
    }
    if share > settings.max_shadow_failures {
        // One early failure must not end a run of which it is a small part.
        if report.steps < asked {
            let needs = vec![format!("{} more shadowed steps", asked - report.steps)];
            return Verdict::new(GateDecision::Wait, reasons, needs);
        }
        reasons.push(format!(
            "more than {:.0} % failed",
            100.0 * settings.max_shadow_failures
        ));
        return Verdict::new(GateDecision::Reject, reasons, Vec::new());
    }
    Verdict::new(GateDecision::Pass, reasons, Vec::new())
}
