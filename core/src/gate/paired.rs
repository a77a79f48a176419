//! What one variant of a model gains over another on the same episodes, with an interval.

use serde::{Deserialize, Serialize};

use crate::kernels::Random;

/// Resamples of a bootstrap: the ends of an interval move by a few hundredths of its width from seed to seed.
const RESAMPLES: usize = 4000;

/// A mean over episodes and its interval.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MeanInterval {
    pub mean: f64,
    pub low: f64,
    pub high: f64,
    /// Episodes that it is a mean of.
    pub n: u64,
}

/// Mean of one number an episode, with a bootstrap interval over episodes at confidence `1 - alpha`; the same seed gives the same
/// interval. The percentiles' distances from the mean are stretched by √(n / (n − 1)), since resamples of few episodes vary too
/// little. One episode says nothing of others, so its interval has no ends; numbers that are not finite are refused likewise.
///
/// For a number of episodes fixed beforehand.
pub fn bootstrap_mean(values: &[f64], alpha: f64, seed: u64) -> MeanInterval {
    let n = values.len();
    let mean = values.iter().sum::<f64>() / n.max(1) as f64;
    if n < 2 || !mean.is_finite() {
        return MeanInterval {
            mean: if mean.is_finite() { mean } else { 0.0 },
            low: f64::MIN,
            high: f64::MAX,
            n: n as u64,
        };
    }
    let mut random = Random::new(seed);
    let mut means: Vec<f64> = (0..RESAMPLES)
        .map(|_| (0..n).map(|_| values[random.below(n)]).sum::<f64>() / n as f64)
        .collect();
    means.sort_by(f64::total_cmp);
    let at = |share: f64| means[((RESAMPLES - 1) as f64 * share).round() as usize];
    let stretch = (n as f64 / (n - 1) as f64).sqrt();
    let end = |quantile: f64| mean + (quantile - mean) * stretch;
    MeanInterval {
        mean,
        low: end(at(alpha / 2.0)),
        high: end(at(1.0 - alpha / 2.0)),
        n: n as u64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Normal numbers around `centre`.
    fn draw(n: usize, centre: f64, seed: u64) -> Vec<f64> {
        let mut random = Random::new(seed);
        (0..n).map(|_| centre + random.normal()).collect()
    }

    #[test]
    fn the_interval_holds_the_mean_it_was_drawn_around_about_as_often_as_it_says() {
        let trials = 400;
        for n in [8, 30] {
            let held = (0..trials)
                .filter(|&seed| {
                    let got = bootstrap_mean(&draw(n, 0.3, 1000 + seed), 0.1, 7);
                    got.low <= 0.3 && 0.3 <= got.high
                })
                .count();
            // 90 % is promised; resampling eight numbers cannot quite keep it.
            assert!(
                (0.83..0.96).contains(&(held as f64 / trials as f64)),
                "{held} at n = {n}"
            );
        }
    }

    #[test]
    fn it_is_as_wide_as_the_textbook_says_and_the_same_for_the_same_seed() {
        let values = draw(200, 0.0, 3);
        let got = bootstrap_mean(&values, 0.05, 11);
        let square: f64 = values.iter().map(|v| (v - got.mean).powi(2)).sum();
        let error = (square / 199.0 / 200.0).sqrt();
        assert!(
            ((got.high - got.low) / (2.0 * 1.96 * error) - 1.0).abs() < 0.06,
            "{got:?} {error}"
        );
        assert_eq!(got, bootstrap_mean(&values, 0.05, 11));
        assert_ne!(got, bootstrap_mean(&values, 0.05, 12));
    }

    #[test]
    fn one_episode_or_a_number_that_is_none_proves_nothing() {
        for values in [
            vec![],
            vec![3.0],
            vec![1.0, f64::NAN],
            vec![f64::INFINITY, 1.0],
        ] {
            let got = bootstrap_mean(&values, 0.05, 1);
            assert!(
                got.low < -1e300 && got.high > 1e300 && got.mean.is_finite(),
                "{values:?}"
            );
        }
        let same = bootstrap_mean(&[0.25; 9], 0.05, 1);
        assert_eq!((same.low, same.mean, same.high), (0.25, 0.25, 0.25));
    }
}
