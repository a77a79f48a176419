//! Exponentials of rows: softmax, the logarithm of their sum, cross-entropy.

use super::lanes::{on_lanes, Lanes, OnLanes, LANES};

/// Lines whose sum is taken in `f32`: a thousand numbers, so that a long row's sum does not lose its small ones to rounding.
const STRETCH: usize = 64;

/// `x = exp(x - max x) / Σ exp(x - max x)`.
pub(super) fn softmax(x: &mut [f32]) {
    let (_, total) = on_lanes(Exponentials(x));
    let inverse = (1.0 / total) as f32;
    scale(x, inverse);
}

/// What a row of logits says about its label.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RowLoss {
    /// −log p(label), in nats.
    pub nll: f32,
    /// Whether no other token is likelier.
    pub hit: bool,
}

/// Cross-entropy of one row of logits (v). With `weight`, the logits become `weight · d nll/d logits`, else rubbish.
///
/// # Panics
/// If there is no such label.
pub fn cross_entropy(logits: &mut [f32], label: usize, weight: Option<f32>) -> RowLoss {
    let at_label = logits[label];
    let before = logits[..label]
        .iter()
        .copied()
        .fold(f32::NEG_INFINITY, f32::max);
    let (max, total) = on_lanes(Exponentials(logits));
    if let Some(weight) = weight {
        scale(logits, (weight as f64 / total) as f32);
        logits[label] -= weight;
    }
    RowLoss {
        nll: total.ln() as f32 + max - at_label,
        // Of several equally likely tokens the first is the one that would be said.
        hit: at_label >= max && before < max,
    }
}

/// `ln Σ exp(x)` of finite numbers, and minus infinity of none; numbers far below the largest count as nothing.
pub fn log_sum_exp(x: &[f32]) -> f64 {
    on_lanes(LogSumExp(x))
}

struct LogSumExp<'a>(&'a [f32]);

impl OnLanes for LogSumExp<'_> {
    type Out = f64;

    #[inline(always)]
    fn run<L: Lanes>(self) -> f64 {
        let (whole, rest) = self.0.as_chunks::<LANES>();
        let mut top = L::splat(f32::NEG_INFINITY);
        for line in whole {
            // SAFETY: a chunk has sixteen numbers.
            top = unsafe { L::load(line.as_ptr()) }.max(top);
        }
        let max = rest.iter().copied().fold(top.largest(), f32::max);
        let largest = L::splat(max);
        let mut total = 0.0;
        for part in whole.chunks(STRETCH) {
            let mut sum = L::splat(0.0);
            for line in part {
                // SAFETY: as above.
                sum = sum.add(unsafe { L::load(line.as_ptr()) }.sub(largest).exp());
            }
            total += f64::from(sum.sum());
        }
        total += rest.iter().map(|x| f64::from(x - max).exp()).sum::<f64>();
        f64::from(max) + total.ln()
    }
}

/// `x = exp(x - max x)`; gives the largest and the sum.
struct Exponentials<'a>(&'a mut [f32]);

impl OnLanes for Exponentials<'_> {
    type Out = (f32, f64);

    #[inline(always)]
    fn run<L: Lanes>(self) -> (f32, f64) {
        let (whole, rest) = self.0.as_chunks_mut::<LANES>();
        let mut top = L::splat(f32::NEG_INFINITY);
        for line in whole.iter() {
            // SAFETY: a chunk has sixteen numbers.
            top = unsafe { L::load(line.as_ptr()) }.max(top);
        }
        let max = rest.iter().copied().fold(top.largest(), f32::max);
        let largest = L::splat(max);
        let mut total = 0.0;
        for part in whole.chunks_mut(STRETCH) {
            let mut sum = L::splat(0.0);
            for line in part {
                // SAFETY: as above.
                unsafe {
                    let p = L::load(line.as_ptr()).sub(largest).exp();
                    p.store(line.as_mut_ptr());
                    sum = sum.add(p);
                }
            }
            total += f64::from(sum.sum());
        }
        for x in rest.iter_mut() {
            *x = (*x - max).exp();
            total += f64::from(*x);
        }
        (max, total)
    }
}

fn scale(x: &mut [f32], by: f32) {
    on_lanes(Scale { x, by })
}

struct Scale<'a> {
    x: &'a mut [f32],
    by: f32,
}

impl OnLanes for Scale<'_> {
    type Out = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        // Simple enough for the compiler to find the registers by itself.
        self.x.iter_mut().for_each(|x| *x *= self.by);
    }
}

#[cfg(test)]
mod tests {
    use super::super::lanes::on_each_kind_of_lanes;
    use super::*;

    fn numbers(n: usize, seed: usize) -> Vec<f32> {
        (0..n)
            .map(|i| (((i + seed) * 7919 % 1009) as f32 - 504.0) / 50.0)
            .collect()
    }

    #[test]
    fn softmax_and_cross_entropy_agree_with_their_definitions() {
        on_each_kind_of_lanes(|| {
            for n in [1, 2, 15, 16, 17, 100, 9001] {
                let logits = numbers(n, n);
                let mut got = logits.clone();
                softmax(&mut got);
                let sum: f64 = logits.iter().map(|x| (*x as f64).exp()).sum();
                let p = |i: usize| (logits[i] as f64).exp() / sum;
                assert!((0..n).all(|i| (got[i] as f64 - p(i)).abs() < 1e-6), "{n}");
                let best = (0..n)
                    .rev()
                    .max_by(|a, b| logits[*a].total_cmp(&logits[*b]));
                for label in [0, n / 2, n - 1, best.unwrap()] {
                    let mut row = logits.clone();
                    let loss = cross_entropy(&mut row, label, Some(0.5));
                    assert!(
                        (loss.nll as f64 + p(label).ln()).abs() < 1e-4,
                        "{n} {label}"
                    );
                    assert_eq!(loss.hit, Some(label) == best, "{n} {label}");
                    for (i, got) in row.iter().enumerate() {
                        let want = 0.5 * (p(i) - f64::from(i == label));
                        assert!((*got as f64 - want).abs() < 1e-6, "{n} {label} {i}");
                    }
                    let seen = cross_entropy(&mut logits.clone(), label, None);
                    assert_eq!(seen, loss);
                }
            }
        });
    }

    #[test]
    fn the_logarithm_of_a_sum_of_exponentials_agrees_with_the_slow_one() {
        for n in [1, 15, 16, 17, 5_000] {
            let x: Vec<f32> = (0..n)
                .map(|i| (i * 7919 % 1009) as f32 / 40.0 - 30.0)
                .collect();
            let want = x.iter().map(|x| f64::from(*x).exp()).sum::<f64>().ln();
            on_each_kind_of_lanes(|| {
                let got = log_sum_exp(&x);
                assert!((got - want).abs() < 1e-6, "{n}: {got}, not {want}");
            });
        }
        assert_eq!(log_sum_exp(&[]), f64::NEG_INFINITY);
    }
}
