//! The live test: is the student at most `margin` worse than the teacher?

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use crate::policy::GateSettings;

use super::betting::Wealth;
use super::{anytime_difference, anytime_interval, GateDecision, Verdict};

/// Waiting episodes of one arm that are averaged into one difference.
const MAX_AVERAGED: usize = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Arm {
    Teacher,
    Student,
}

/// One live episode that ended while the canary ran.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LiveOutcome {
    pub arm: Arm,
    /// Task id; empty if the host gives none.
    pub task: String,
    pub domain: String,
    pub success: bool,
    pub at_ms: u64,
    /// False if the success was not honest.
    #[serde(default = "yes")]
    pub integrity_ok: bool,
    /// Calls of the student that were not valid against their tool's schema.
    #[serde(default)]
    pub invalid_calls: u32,
}

fn yes() -> bool {
    true
}

/// Anytime-valid test of non-inferiority on differences student − teacher, each in [-1, 1].
///
/// A student's episode is set against the teacher's of the same task where both played it; otherwise against the teacher's
/// waiting episodes of the same domain, in order of arrival (their mean, if several wait). Which are set against each other
/// never depends on how they ended, so if the student's success is at most the teacher's minus the margin, the mean
/// difference is at most -margin and the wealth bet against that ever reaches `1/alpha` with chance at most `alpha`
/// (see [`super::betting`]). With fixed success rates this holds however often one looks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CanaryTest {
    settings: GateSettings,
    all: Tally,
    /// By domain.
    slices: BTreeMap<String, Tally>,
    waiting: BTreeMap<String, Waiting>,
    invalid_calls: u64,
    integrity_failures: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Tally {
    student: (u64, u64),
    teacher: (u64, u64),
    differences: Vec<f64>,
    /// Against "the student is at least a margin worse": grows as it proves itself.
    good: Wealth,
    /// Against "the student is at most a margin worse": grows as it fails.
    bad: Wealth,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Waiting {
    /// (task, success), oldest first.
    student: VecDeque<(String, f64)>,
    teacher: VecDeque<(String, f64)>,
}

/// The numbers behind a canary's verdict.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CanarySummary {
    pub student_episodes: u64,
    pub student_successes: u64,
    pub student_interval: (f64, f64),
    pub teacher_episodes: u64,
    pub teacher_successes: u64,
    pub teacher_interval: (f64, f64),
    /// Differences formed so far, their mean, and its anytime-valid interval.
    pub pairs: u64,
    pub difference: f64,
    pub difference_interval: (f64, f64),
    /// Largest evidence so far that the student is less than a margin worse; `evidence_needed` promotes.
    pub evidence: f64,
    pub evidence_needed: f64,
    pub slices: Vec<SliceSummary>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SliceSummary {
    pub domain: String,
    pub student_episodes: u64,
    pub student_successes: u64,
    pub teacher_episodes: u64,
    pub teacher_successes: u64,
}

impl Tally {
    fn new(margin: f64) -> Self {
        Self {
            student: (0, 0),
            teacher: (0, 0),
            differences: Vec::new(),
            good: Wealth::against_at_most(-margin, -1.0),
            bad: Wealth::against_at_least(-margin, 1.0),
        }
    }

    fn count(&mut self, outcome: &LiveOutcome) {
        let arm = if outcome.arm == Arm::Student {
            &mut self.student
        } else {
            &mut self.teacher
        };
        arm.0 += u64::from(outcome.success);
        arm.1 += 1;
    }

    fn add(&mut self, difference: f64) {
        self.differences.push(difference);
        self.good.push(difference);
        self.bad.push(difference);
    }

    fn mean(&self) -> f64 {
        self.differences.iter().sum::<f64>() / self.differences.len().max(1) as f64
    }
}

impl CanaryTest {
    /// A test without evidence. `settings.alpha` and `settings.margin` are clamped to what a test can use.
    pub fn new(settings: &GateSettings) -> Self {
        let settings = GateSettings {
            alpha: settings.alpha.clamp(1e-6, 0.5),
            margin: settings.margin.clamp(0.0, 0.9),
            ..settings.clone()
        };
        let all = Tally::new(settings.margin);
        Self {
            settings,
            all,
            slices: BTreeMap::new(),
            waiting: BTreeMap::new(),
            invalid_calls: 0,
            integrity_failures: 0,
        }
    }

    /// The state after these outcomes, taken in order of their time.
    pub fn rebuild(settings: &GateSettings, outcomes: &[LiveOutcome]) -> Self {
        let mut ordered: Vec<&LiveOutcome> = outcomes.iter().collect();
        ordered.sort_by_key(|o| o.at_ms);
        let mut test = Self::new(settings);
        for outcome in ordered {
            test.push(outcome);
        }
        test
    }

    /// Takes in one episode. Episodes of a student after `max_canary` are counted but bet on no more.
    pub fn push(&mut self, outcome: &LiveOutcome) {
        let full = self.all.student.1 >= self.settings.max_canary as u64;
        let margin = self.settings.margin;
        self.all.count(outcome);
        let slice = self
            .slices
            .entry(outcome.domain.clone())
            .or_insert_with(|| Tally::new(margin));
        slice.count(outcome);
        if outcome.arm == Arm::Student {
            self.invalid_calls += u64::from(outcome.invalid_calls);
            self.integrity_failures += u64::from(!outcome.integrity_ok);
        }
        if full {
            return;
        }
        // A dishonest success is no success.
        let value = f64::from(u8::from(outcome.success && outcome.integrity_ok));
        let waiting = self.waiting.entry(outcome.domain.clone()).or_default();
        let student = outcome.arm == Arm::Student;
        let (own, other) = if student {
            (&mut waiting.student, &mut waiting.teacher)
        } else {
            (&mut waiting.teacher, &mut waiting.student)
        };
        let same_task = other
            .iter()
            .position(|(task, _)| !task.is_empty() && *task == outcome.task);
        let against = match same_task {
            Some(at) => other.remove(at).map(|(_, v)| v),
            None if other.is_empty() => None,
            None => {
                let n = other.len().min(MAX_AVERAGED);
                Some(other.drain(..n).map(|(_, v)| v).sum::<f64>() / n as f64)
            }
        };
        match against {
            Some(against) => {
                let difference = if student {
                    value - against
                } else {
                    against - value
                };
                self.all.add(difference);
                slice.add(difference);
            }
            None => own.push_back((outcome.task.clone(), value)),
        }
    }

    /// Promote, wait for more, put aside, or reject.
    ///
    /// Rules that no evidence outweighs: an invalid call or a broken integrity of the student's rejects; a student without a
    /// single success, or whose mean difference from the teacher is below minus the margin, is never passed,
    /// nor one that a domain of at least `min_slice` of its episodes speaks against.
    pub fn verdict(&self) -> Verdict {
        let summary = self.summary();
        let numbers = format!(
            "student {} of {} live episodes, teacher {} of {}; difference {:+.2} ({:+.2} to {:+.2}) over {} pairs; evidence {:.1} of {:.0}",
            summary.student_successes,
            summary.student_episodes,
            summary.teacher_successes,
            summary.teacher_episodes,
            summary.difference,
            summary.difference_interval.0,
            summary.difference_interval.1,
            summary.pairs,
            summary.evidence,
            summary.evidence_needed,
        );
        let mut verdict = self.ruling();
        verdict.reasons.insert(0, numbers);
        verdict
    }

    /// [`CanaryTest::verdict`] without the intervals, which cost most of its time: for asking after every episode.
    pub fn ruling(&self) -> Verdict {
        let s = &self.settings;
        let margin = 100.0 * s.margin;
        let reject = |reason| Verdict::new(GateDecision::Reject, vec![reason], Vec::new());
        if self.invalid_calls > 0 {
            return reject(format!(
                "{} calls of the student's were invalid",
                self.invalid_calls
            ));
        }
        if self.integrity_failures > 0 {
            return reject(format!(
                "{} of the student's episodes were not honest",
                self.integrity_failures
            ));
        }
        if self.all.bad.refuted(s.alpha) {
            return reject(format!(
                "the student is more than {margin:.0} points worse than the teacher"
            ));
        }
        let mut against: Vec<String> = self
            .slices
            .iter()
            .filter_map(|(domain, slice)| self.slice_refuses(domain, slice))
            .collect();
        let played = self.all.student.1;
        let missing = (s.min_canary as u64).saturating_sub(played);
        let not_worse = self.all.mean() >= -s.margin && self.all.student.0 > 0;
        if self.all.good.refuted(s.alpha) && missing == 0 && not_worse && against.is_empty() {
            let alpha = s.alpha;
            let reason = format!("not more than {margin:.0} points worse than the teacher; such a promotion is wrong in at most {alpha} of cases");
            return Verdict::new(GateDecision::Pass, vec![reason], Vec::new());
        }
        if played >= s.max_canary as u64 {
            if against.is_empty() {
                against.push(format!(
                    "undecided after {played} episodes of the student's"
                ));
            }
            return Verdict::new(GateDecision::Hold, against, Vec::new());
        }
        let need = if missing > 0 {
            format!("{missing} more live episodes played by the student")
        } else if self.all.teacher.1 == 0 {
            "live episodes played by the teacher to compare with".into()
        } else {
            format!(
                "more live episodes of both; at most {} more of the student's",
                s.max_canary as u64 - played
            )
        };
        Verdict::new(GateDecision::Wait, against, vec![need])
    }

    /// The numbers behind the verdict.
    pub fn summary(&self) -> CanarySummary {
        let alpha = self.settings.alpha;
        let Tally {
            student,
            teacher,
            differences,
            good,
            ..
        } = &self.all;
        CanarySummary {
            student_episodes: student.1,
            student_successes: student.0,
            student_interval: anytime_interval(student.0, student.1, alpha),
            teacher_episodes: teacher.1,
            teacher_successes: teacher.0,
            teacher_interval: anytime_interval(teacher.0, teacher.1, alpha),
            pairs: differences.len() as u64,
            difference: self.all.mean(),
            difference_interval: anytime_difference(differences, alpha),
            evidence: good.log_peak().exp(),
            evidence_needed: 1.0 / alpha,
            slices: self
                .slices
                .iter()
                .map(|(domain, t)| SliceSummary {
                    domain: domain.clone(),
                    student_episodes: t.student.1,
                    student_successes: t.student.0,
                    teacher_episodes: t.teacher.1,
                    teacher_successes: t.teacher.0,
                })
                .collect(),
        }
    }

    /// A domain speaks against the student once its own bets show it more than a margin worse there, or if it succeeded
    /// nowhere where the teacher did.
    fn slice_refuses(&self, domain: &str, slice: &Tally) -> Option<String> {
        if slice.student.1 < self.settings.min_slice as u64 {
            return None;
        }
        let nothing = slice.student.0 == 0 && slice.teacher.0 > 0;
        (slice.bad.refuted(self.settings.alpha) || nothing).then(|| {
            format!(
                "in domain {domain:?} the student succeeded in {} of {}, the teacher in {} of {}",
                slice.student.0, slice.student.1, slice.teacher.0, slice.teacher.1
            )
        })
    }
}
