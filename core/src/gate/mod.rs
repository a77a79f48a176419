//! May a student take over? Pure functions and small states from evidence to a [`Verdict`]; nothing here acts.
//!
//! Three stages, each a refusal until its evidence is in: [`offline`] on held-out steps, [`shadow`] on live steps that the
//! teacher played, [`CanaryTest`] on live episodes of both. After a promotion [`RollbackTest`] watches. Live tests are
//! *anytime-valid*: they may be looked at after every episode, and the chance that an inferior student is ever promoted
//! stays below `alpha` all the same (see [`betting`]).

pub mod betting;
mod canary;
mod interval;
mod offline;
mod paired;
mod rollback;

use serde::{Deserialize, Serialize};

use crate::policy::GateVote;

pub use canary::{Arm, CanarySummary, CanaryTest, LiveOutcome, SliceSummary};
pub use interval::{anytime_difference, anytime_interval, wilson};
pub use offline::{offline, shadow, OfflineReport, ShadowReport, SliceCount};
pub use paired::{bootstrap_mean, MeanInterval};
pub use rollback::RollbackTest;

/// What a stage says of a candidate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    pub decision: GateDecision,
    /// True only for [`GateDecision::Pass`].
    pub pass: bool,
    /// Sentences: what speaks for and against, with numbers.
    pub reasons: Vec<String>,
    /// Sentences: what evidence is missing.
    pub needs: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GateDecision {
    /// The stage is passed.
    Pass,
    /// More evidence is needed, and may come.
    Wait,
    /// Undecided when the evidence ran out, or held by the policy: put aside.
    Hold,
    /// Refused for good.
    Reject,
}

impl Verdict {
    fn new(decision: GateDecision, reasons: Vec<String>, needs: Vec<String>) -> Self {
        Self {
            decision,
            pass: decision == GateDecision::Pass,
            reasons,
            needs,
        }
    }

    /// The verdict with the policy's word added, which can only make it stricter: what a built-in rule refuses, no vote
    /// promotes.
    pub fn with_vote(mut self, vote: &GateVote) -> Self {
        match (vote, self.decision) {
            (GateVote::Promote(reason), GateDecision::Pass) => {
                self.reasons.push(said("agrees", reason))
            }
            (GateVote::Promote(_), _) => {
                self.reasons
                    .push("the policy would promote; the built-in rules do not".into());
            }
            (GateVote::Reject(reason), _) => {
                self.reasons.push(said("rejects", reason));
                self.decision = GateDecision::Reject;
            }
            (GateVote::Hold(reason), GateDecision::Pass) => {
                self.reasons.push(said("holds", reason));
                self.decision = GateDecision::Hold;
            }
            (GateVote::Hold(reason), _) => self.reasons.push(said("holds", reason)),
        }
        self.pass = self.decision == GateDecision::Pass;
        self
    }

    /// All sentences as one text.
    pub fn sentence(&self) -> String {
        let mut parts = self.reasons.clone();
        parts.extend(self.needs.iter().map(|n| format!("needs {n}")));
        parts.join("; ")
    }
}

fn said(verb: &str, reason: &str) -> String {
    if reason.is_empty() {
        format!("the policy {verb}")
    } else {
        format!("the policy {verb}: {reason}")
    }
}

#[cfg(test)]
mod tests;
