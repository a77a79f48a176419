//! Did the promoted student get worse? An alarm whose false ones are bounded over the whole time of service.

use serde::{Deserialize, Serialize};

use super::betting::Wealth;

/// Every position up to this one starts a bet of its own; later ones do so ever more sparsely.
const DENSE_STARTS: u64 = 16;
/// From there on, a new start after this fraction of the episodes so far.
const START_SPACING: u64 = 8;

/// Anytime-valid test of "live success is at least the teacher's minus the margin".
///
/// Bets against that hypothesis are begun at many times, so that a student that did well for long and then fails is noticed
/// as soon as one that failed from the start: with weights `w_j = 1/(j (j + 1))` on the starts `t_j`,
///
/// ```text
/// E_t = Σ_j w_j K_{t_j..t},   K = 1 before its start,
/// ```
///
/// is a mixture of supermartingales, and under the hypothesis P(sup_t E_t ≥ 1/α) ≤ α for ever (Ville; mixtures over starts
/// as in J. Shin, A. Ramdas, A. Rinaldo, "E-detectors", NEJSDS 2, 2024). The teacher's success is taken as given.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RollbackTest {
    floor: f64,
    alpha: f64,
    episodes: u64,
    successes: u64,
    next_start: u64,
    starts: Vec<Wealth>,
    alarm: bool,
}

impl RollbackTest {
    /// `teacher_success`: the rate that the student was promoted against.
    pub fn new(teacher_success: f64, margin: f64, alpha: f64) -> Self {
        let floor = (teacher_success - margin).clamp(0.0, 1.0);
        Self {
            floor,
            alpha: alpha.clamp(1e-6, 0.5),
            episodes: 0,
            successes: 0,
            next_start: 0,
            starts: Vec::new(),
            alarm: false,
        }
    }

    /// Takes in the next live episode of the student's since its promotion. True once the alarm is raised; it stays.
    pub fn push(&mut self, success: bool) -> bool {
        if self.floor <= 0.0 {
            // Nothing is below a rate of 0.
            return false;
        }
        if self.episodes >= self.next_start {
            self.starts.push(Wealth::against_at_least(self.floor, 1.0));
            self.next_start = if self.episodes < DENSE_STARTS {
                self.episodes + 1
            } else {
                self.episodes + (self.episodes / START_SPACING).max(1)
            };
        }
        self.episodes += 1;
        self.successes += u64::from(success);
        for wealth in &mut self.starts {
            wealth.push(f64::from(u8::from(success)));
        }
        self.alarm |= self.evidence() >= 1.0 / self.alpha;
        self.alarm
    }

    /// True once the alarm was raised.
    pub fn alarmed(&self) -> bool {
        self.alarm
    }

    /// The present wealth; `1/alpha` raises the alarm.
    pub fn evidence(&self) -> f64 {
        let mut unstarted = 1.0;
        let mut sum = 0.0;
        for (j, wealth) in self.starts.iter().enumerate() {
            let weight = 1.0 / ((j + 1) as f64 * (j + 2) as f64);
            unstarted -= weight;
            sum += weight * wealth.log_e().exp();
        }
        sum + unstarted.max(0.0)
    }

    /// What was seen, in a sentence.
    pub fn sentence(&self) -> String {
        format!(
            "{} of {} live episodes since the promotion succeeded; {:.0} % are asked for; evidence of a fall {:.1} of {:.0}",
            self.successes,
            self.episodes,
            100.0 * self.floor,
            self.evidence(),
            1.0 / self.alpha
        )
    }
}
