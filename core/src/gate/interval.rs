//! Intervals for shares of successes, and for differences of them.

use super::betting::{log_mean_exp, Wealth};

/// Halvings in the search for a bound: an error below 1e-7.
const SEARCH_STEPS: usize = 24;

/// Wilson's score interval for `successes` of `n` at confidence `1 - alpha` (E. B. Wilson, JASA 22, 1927). For a number of
/// observations that was fixed beforehand. `(0, 1)` for no observations.
pub fn wilson(successes: u64, n: u64, alpha: f64) -> (f64, f64) {
    if n == 0 {
        return (0.0, 1.0);
    }
    let (n, p) = (n as f64, successes as f64 / n as f64);
    let z = normal_quantile(1.0 - alpha / 2.0);
    let scale = 1.0 + z * z / n;
    let middle = (p + z * z / (2.0 * n)) / scale;
    let half = z / scale * (p * (1.0 - p) / n + z * z / (4.0 * n * n)).sqrt();
    let low = if successes == 0 { 0.0 } else { middle - half };
    let high = if p == 1.0 { 1.0 } else { middle + half };
    (low.clamp(0.0, 1.0), high.clamp(0.0, 1.0))
}

/// Interval for a success rate that holds at all times at once at confidence `1 - alpha`: it may be looked at after every
/// episode. All means that betting (see [`super::betting`]) against them in both directions, with half the wealth each, does
/// not refute. Wider than [`wilson`].
pub fn anytime_interval(successes: u64, n: u64, alpha: f64) -> (f64, f64) {
    let counts = [
        (1.0, successes as f64),
        (0.0, n.saturating_sub(successes) as f64),
    ];
    bounds(&counts, 0.0, 1.0, alpha)
}

/// [`anytime_interval`] for the mean of paired differences, each in [-1, 1].
pub fn anytime_difference(differences: &[f64], alpha: f64) -> (f64, f64) {
    // Few values occur, often; the wealth depends only on how often.
    let mut sorted: Vec<f64> = differences.iter().map(|d| d.clamp(-1.0, 1.0)).collect();
    sorted.sort_by(f64::total_cmp);
    let counts: Vec<(f64, f64)> = sorted
        .chunk_by(|a, b| a == b)
        .map(|c| (c[0], c.len() as f64))
        .collect();
    bounds(&counts, -1.0, 1.0, alpha)
}

/// The means between `least` and `most` that are not refuted form an interval around the sample mean: bisection on each side.
fn bounds(counts: &[(f64, f64)], least: f64, most: f64, alpha: f64) -> (f64, f64) {
    let n: f64 = counts.iter().map(|c| c.1).sum();
    if n == 0.0 {
        return (least, most);
    }
    let mean = counts.iter().map(|(x, times)| x * times).sum::<f64>() / n;
    let refuted = |m: f64| {
        let mut up = Wealth::against_at_most(m, least);
        let mut down = Wealth::against_at_least(m, most);
        for &(x, times) in counts {
            up.push_many(x, times);
            down.push_many(x, times);
        }
        log_mean_exp(&[up.log_e(), down.log_e()]) >= -alpha.ln()
    };
    let search = |mut inside: f64, mut outside: f64| {
        if !refuted(outside) {
            return outside;
        }
        for _ in 0..SEARCH_STEPS {
            let middle = 0.5 * (inside + outside);
            if refuted(middle) {
                outside = middle;
            } else {
                inside = middle;
            }
        }
        outside
    };
    // The very ends need no bet to be excluded: a single success rules out a rate of 0.
    let edge = 1e-6 * (most - least);
    let low = if mean - least < edge {
        least
    } else {
        search(mean, least + edge)
    };
    let high = if most - mean < edge {
        most
    } else {
        search(mean, most - edge)
    };
    (low, high)
}

/// Quantile of the standard normal distribution, by bisection on its distribution function; error below 1e-6.
fn normal_quantile(p: f64) -> f64 {
    let (mut low, mut high) = (-9.0, 9.0);
    for _ in 0..60 {
        let middle = 0.5 * (low + high);
        if normal_cdf(middle) < p {
            low = middle;
        } else {
            high = middle;
        }
    }
    0.5 * (low + high)
}

/// Φ(x) by the series x + x³/3 + x⁵/(3·5) + ..., exact to rounding for the |x| < 9 used here (G. Marsaglia, J. Stat. Softw.
/// 11, 2004).
fn normal_cdf(x: f64) -> f64 {
    let (mut sum, mut term, mut i) = (x, x, 1.0);
    while f64::abs(term) > 1e-17 * f64::abs(sum) && i < 400.0 {
        i += 2.0;
        term *= x * x / i;
        sum += term;
    }
    0.5 + sum * (-0.5 * x * x - 0.918_938_533_204_672_7).exp()
}
