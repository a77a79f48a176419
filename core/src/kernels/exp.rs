//! The exponential function by polynomial, in a form that compilers turn into vectors, and the loops of training that need many of it.

use super::attention;
use super::pointwise;
use super::pool::{Pool, SharedMut};
use super::simd::features;

/// `eˣ`, at most 2 units in the last place off for x in -87..88; outside it stays at what it is there.
///
/// x = n ln 2 + r with |r| ≤ ln 2 / 2; the polynomial for eʳ is Cephes' (`expf`), 2ⁿ is put together from bits.
#[inline(always)]
fn exp(x: f32) -> f32 {
    /// Adding it leaves the nearest integer in the low bits of the sum.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.0, 88.0);
    let rounded = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = rounded - ROUND;
    // ln 2 in two pieces, the first short enough that n times it is exact.
    let r = n.mul_add(-0.693_359_4, x);
    let r = n.mul_add(2.121_944_4e-4, r);
    let mut p = 1.987_569_1e-4f32;
    for c in [
        1.398_2e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        1.666_666_5e-1,
        0.5,
    ] {
        p = p.mul_add(r, c);
    }
    let p = p.mul_add(r * r, r) + 1.0;
    p * f32::from_bits(rounded.to_bits().wrapping_add(127) << 23)
}

/// Sums of as many lanes as a register has, so that the additions need not wait for each other.
const LANES: usize = 16;

#[inline(always)]
fn maximum(x: &[f32]) -> f32 {
    let mut best = [f32::NEG_INFINITY; LANES];
    let pieces = x.chunks_exact(LANES);
    let rest = pieces.remainder();
    for piece in pieces {
        for (best, x) in best.iter_mut().zip(piece) {
            *best = if *x > *best { *x } else { *best };
        }
    }
    best.into_iter()
        .chain(rest.iter().copied())
        .fold(f32::NEG_INFINITY, f32::max)
}

/// `x = exp(x - shift)`; returns the sum.
#[inline(always)]
fn exp_and_sum(x: &mut [f32], shift: f32) -> f64 {
    let mut total = 0f64;
    // Sums of f32 are taken over short stretches only, so that long rows lose no digits.
    for stretch in x.chunks_mut(256 * LANES) {
        let mut sums = [0f32; LANES];
        let mut pieces = stretch.chunks_exact_mut(LANES);
        for piece in &mut pieces {
            for (sum, x) in sums.iter_mut().zip(piece) {
                *x = exp(*x - shift);
                *sum += *x;
            }
        }
        for x in pieces.into_remainder() {
            *x = exp(*x - shift);
            total += *x as f64;
        }
        total += sums.iter().map(|s| *s as f64).sum::<f64>();
    }
    total
}

#[inline(always)]
fn softmax_row(x: &mut [f32]) {
    let max = maximum(x);
    let inv = (1.0 / exp_and_sum(x, max)) as f32;
    x.iter_mut().for_each(|x| *x *= inv);
}

/// `x = exp(x - max x) / Σ exp(x - max x)`.
pub(super) fn softmax(x: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,fma")]
        unsafe fn fast(x: &mut [f32]) {
            softmax_row(x)
        }
        if features().avx512 {
            // SAFETY: the feature was detected, and there is no AVX-512 without FMA.
            return unsafe { fast(x) };
        }
    }
    attention::softmax(x)
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
    #[inline(always)]
    fn row(logits: &mut [f32], label: usize, weight: Option<f32>) -> RowLoss {
        let at_label = logits[label];
        let max = maximum(logits);
        // Of several equally likely tokens the first is the one that would be said.
        let hit = at_label >= max && !logits[..label].contains(&max);
        let sum = exp_and_sum(logits, max);
        if let Some(weight) = weight {
            let k = (weight as f64 / sum) as f32;
            logits.iter_mut().for_each(|x| *x *= k);
            logits[label] -= weight;
        }
        RowLoss {
            nll: sum.ln() as f32 + max - at_label,
            hit,
        }
    }
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,fma")]
        unsafe fn avx512(logits: &mut [f32], label: usize, weight: Option<f32>) -> RowLoss {
            row(logits, label, weight)
        }
        #[target_feature(enable = "avx2,fma")]
        unsafe fn avx2(logits: &mut [f32], label: usize, weight: Option<f32>) -> RowLoss {
            row(logits, label, weight)
        }
        let f = features();
        if f.avx512 {
            // SAFETY: the features were detected.
            return unsafe { avx512(logits, label, weight) };
        }
        if f.avx2_fma {
            // SAFETY: as above.
            return unsafe { avx2(logits, label, weight) };
        }
    }
    row(logits, label, weight)
}

/// Backward of [`swiglu`](super::swiglu): from `dh` to `dgate`, `dup` (overwritten). Shapes: all (t, f).
pub fn swiglu_backward(
    pool: &Pool,
    (gate, up, dh): (&[f32], &[f32], &[f32]),
    width: usize,
    dgate: &mut [f32],
    dup: &mut [f32],
) {
    #[cfg(target_arch = "x86_64")]
    if features().avx512 {
        /// Numbers that a part takes: a quarter of a megabyte of each of five operands.
        const PIECE: usize = 1 << 16;
        #[target_feature(enable = "avx512f,fma")]
        unsafe fn piece(gate: &[f32], up: &[f32], dh: &[f32], dgate: &mut [f32], dup: &mut [f32]) {
            let inputs = gate.iter().zip(up).zip(dh);
            for (((g, u), dh), (dg, du)) in inputs.zip(dgate.iter_mut().zip(dup)) {
                let sigmoid = 1.0 / (1.0 + exp(-g));
                let silu = g * sigmoid;
                *du = dh * silu;
                *dg = dh * u * (sigmoid + silu * (1.0 - sigmoid));
            }
        }
        let n = gate.len();
        assert!(up.len() == n && dh.len() == n && dgate.len() == n && dup.len() == n);
        let (dgate, dup) = (SharedMut::new(dgate), SharedMut::new(dup));
        pool.run(n.div_ceil(PIECE), |part| {
            let (from, len) = (part * PIECE, PIECE.min(n - part * PIECE));
            let mine = from..from + len;
            let (gate, up, dh) = (&gate[mine.clone()], &up[mine.clone()], &dh[mine]);
            // SAFETY: pieces do not overlap; the features were detected.
            unsafe { piece(gate, up, dh, dgate.slice(from, len), dup.slice(from, len)) }
        });
        return;
    }
    pointwise::swiglu_backward(Some(pool), (gate, up, dh), width, dgate, dup)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize, seed: usize) -> Vec<f32> {
        (0..n)
            .map(|i| (((i + seed) * 7919 % 1009) as f32 - 504.0) / 50.0)
            .collect()
    }

    #[test]
    fn the_exponential_is_right_to_the_last_digits_and_stays_finite() {
        for i in -870_000..880_000 {
            let x = i as f32 * 1e-4;
            let want = (x as f64).exp();
            let error = (exp(x) as f64 - want).abs() / want;
            assert!(error < 2.5e-7, "{x}: {} {want}", exp(x));
        }
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NEG_INFINITY) < 1e-37 && exp(f32::INFINITY).is_finite());
    }

    #[test]
    fn softmax_and_cross_entropy_agree_with_their_definitions() {
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
    }

    #[test]
    fn the_gradient_of_swiglu_agrees_with_the_plain_loop() {
        let n = (1 << 16) + 40;
        let (gate, up, dh) = (numbers(n, 1), numbers(n, 2), numbers(n, 3));
        let (mut dg, mut du) = (vec![0.0; n], vec![0.0; n]);
        let (mut want_dg, mut want_du) = (dg.clone(), du.clone());
        swiglu_backward(&Pool::new(2, 0), (&gate, &up, &dh), 8, &mut dg, &mut du);
        let inputs = (&gate[..], &up[..], &dh[..]);
        pointwise::swiglu_backward(None, inputs, 8, &mut want_dg, &mut want_du);
        for (g, w) in dg.iter().zip(&want_dg).chain(du.iter().zip(&want_du)) {
            assert!((g - w).abs() <= 1e-5 * w.abs() + 1e-6, "{g} {w}");
        }
    }
}
