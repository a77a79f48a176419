//! Testing by betting: wealth that can only grow by luck while the hypothesis holds.
//!
//! For observations `x_1, x_2, ...` and a hypothesis `E[x_t | past] ≤ m`, bet a fixed share on every next one being larger:
//!
//! ```text
//! K_t(λ) = Π_{i ≤ t} (1 + λ (x_i − m)),   0 ≤ λ < 1 / (m − min x),
//! ```
//!
//! a non-negative supermartingale that starts at 1, so by Ville's inequality P(sup_t K_t ≥ 1/α) ≤ α under the hypothesis
//! (I. Waudby-Smith, A. Ramdas, "Estimating means of bounded random variables by betting", JRSS B 86, 2024, sections 3-4;
//! S. Howard, A. Ramdas, J. McAuliffe, J. Sekhon, "Time-uniform, nonparametric, nonasymptotic confidence sequences", Ann.
//! Statist. 49, 2021). The mean of `K_t` over a fixed set of `λ` is again such a martingale and needs no tuning: its growth
//! lags that of the best `λ` by no more than log(number of them).

use serde::{Deserialize, Serialize};

/// Bets as shares of the largest allowed one, spaced so that small and large effects are each met by one of them.
pub const BETS: [f64; 10] = [0.01, 0.02, 0.04, 0.08, 0.16, 0.3, 0.45, 0.6, 0.8, 0.95];

/// The wealth of one hypothesis, averaged over [`BETS`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Wealth {
    /// Centre of the bets: the largest mean that the hypothesis allows.
    mean: f64,
    /// +1 to bet on larger values, -1 on smaller ones.
    sign: f64,
    /// Largest loss of one observation for a bet of 1.
    risk: f64,
    log: [f64; BETS.len()],
    /// Largest log-wealth so far.
    peak: f64,
}

impl Wealth {
    /// Bets against `E[x] ≤ mean` for values from `least` up.
    pub fn against_at_most(mean: f64, least: f64) -> Self {
        Self {
            mean,
            sign: 1.0,
            risk: mean - least,
            log: [0.0; BETS.len()],
            peak: 0.0,
        }
    }

    /// Bets against `E[x] ≥ mean` for values up to `most`.
    pub fn against_at_least(mean: f64, most: f64) -> Self {
        Self {
            mean,
            sign: -1.0,
            risk: most - mean,
            log: [0.0; BETS.len()],
            peak: 0.0,
        }
    }

    /// Takes in one observation. Values must lie in the range that the constructor was told of.
    pub fn push(&mut self, x: f64) {
        self.push_many(x, 1.0);
    }

    /// The same observation `times` over.
    pub fn push_many(&mut self, x: f64, times: f64) {
        if times > 0.0 {
            for (i, bet) in BETS.into_iter().enumerate() {
                self.log[i] += times * self.factor(bet, x).ln();
            }
            self.peak = self.peak.max(self.log_e());
        }
    }

    fn factor(&self, bet: f64, x: f64) -> f64 {
        // With nothing to lose any bet is allowed; one of at most 1 keeps the wealth finite.
        let lambda = if self.risk > 1e-9 {
            bet / self.risk
        } else {
            bet
        };
        (1.0 + lambda * self.sign * (x - self.mean)).max(1e-12)
    }

    /// Logarithm of the present wealth.
    pub fn log_e(&self) -> f64 {
        log_mean_exp(&self.log)
    }

    /// Logarithm of the largest wealth so far.
    pub fn log_peak(&self) -> f64 {
        self.peak
    }

    /// True once the wealth has reached `1/alpha`: the hypothesis is refuted at level `alpha`, whenever that was asked.
    pub fn refuted(&self, alpha: f64) -> bool {
        self.peak >= -alpha.ln()
    }
}

/// log(mean(exp(x))) without overflow.
pub(super) fn log_mean_exp(logs: &[f64]) -> f64 {
    let most = logs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if most == f64::NEG_INFINITY {
        return most;
    }
    most + (logs.iter().map(|l| (l - most).exp()).sum::<f64>() / logs.len() as f64).ln()
}
