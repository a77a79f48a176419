//! From a row of logits to a token.

use crate::kernels::log_sum_exp;

/// A chosen token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Choice {
    pub token: u32,
    /// Natural logarithm of the token's probability among the allowed ones, at temperature 1 whatever it was drawn with.
    pub logprob: f64,
    /// Whether another token could have been chosen.
    pub free: bool,
}

/// Chooses a token of `logits` (v). `allowed` holds a bit for each token that may be chosen (bit `t % 32` of word `t / 32`);
/// a token beyond its words, or beyond `vocab`, may then not be. Temperature 0 takes the largest (the first of equals);
/// above it, `draw` in `0..1` decides. `None` if nothing is allowed that has a finite logit.
pub(super) fn choose(
    logits: &[f32],
    allowed: Option<(&[u32], usize)>,
    temperature: f32,
    draw: f64,
) -> Option<Choice> {
    let mut best: Option<(u32, f32)> = None;
    let mut count = 0usize;
    visit(logits, allowed, |token, logit| {
        count += 1;
        if best.is_none_or(|(_, most)| logit > most) {
            best = Some((token, logit));
        }
    });
    let (mut token, max) = best?;
    let mut chosen = max;
    let sum = |scale: f64| {
        let mut sum = 0.0;
        visit(logits, allowed, |_, logit| {
            sum += (f64::from(logit - max) * scale).exp()
        });
        sum
    };
    if temperature > 0.0 && count > 1 {
        let scale = 1.0 / f64::from(temperature);
        let mut left = draw * sum(scale);
        let mut found = false;
        visit(logits, allowed, |candidate, logit| {
            let weight = (f64::from(logit - max) * scale).exp();
            if !found && weight > 0.0 {
                // Rounding may leave a little over after the last one, which then is the choice.
                (token, chosen) = (candidate, logit);
                found = left < weight;
                left -= weight;
            }
        });
    }
    let logprob = match allowed {
        // All of a vocabulary is many. A logit that is not finite has no share, so it must not be there.
        None if count == logits.len() => f64::from(chosen) - log_sum_exp(logits),
        _ => f64::from(chosen - max) - sum(1.0).ln(),
    };
    Some(Choice {
        token,
        logprob,
        free: count > 1,
    })
}

fn visit(logits: &[f32], allowed: Option<(&[u32], usize)>, mut each: impl FnMut(u32, f32)) {
    let mut offer = |at: usize| {
        if logits[at].is_finite() {
            each(at as u32, logits[at]);
        }
    };
    let Some((words, vocab)) = allowed else {
        return (0..logits.len()).for_each(offer);
    };
    let end = logits.len().min(vocab);
    for (at, word) in words.iter().enumerate() {
        let mut word = *word;
        while word != 0 {
            let token = at * 32 + word.trailing_zeros() as usize;
            if token < end {
                offer(token);
            }
            word &= word - 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mask_decides_what_can_be_chosen_and_what_a_probability_is_of() {
        let logits = [9.0, 1.0, 1.0, 5.0];
        let all = choose(&logits, None, 0.0, 0.0).unwrap();
        assert_eq!((all.token, all.free), (0, true));
        let two = choose(&logits, Some((&[0b0110], 4)), 0.0, 0.0).unwrap();
        assert_eq!((two.token, two.free), (1, true));
        assert!((two.logprob.exp() - 0.5).abs() < 1e-9);
        let one = choose(&logits, Some((&[0b1100], 3)), 0.0, 0.0).unwrap();
        assert_eq!(
            one,
            Choice {
                token: 2,
                logprob: 0.0,
                free: false
            }
        );
        assert_eq!(choose(&logits, Some((&[0b1000], 3)), 0.0, 0.0), None);
        assert_eq!(choose(&[f32::NAN], None, 1.0, 0.5), None);
    }

    #[test]
    fn draws_fall_on_tokens_in_proportion_to_their_weight_at_the_temperature() {
        // Odds of 1 to 3 at temperature 1; of 1 to 9 at temperature 0.5.
        let logits = [0.0, 3f32.ln()];
        let share = |temperature| {
            let hits = (0..1000)
                .filter(|i| {
                    choose(&logits, None, temperature, (f64::from(*i) + 0.5) / 1000.0)
                        .unwrap()
                        .token
                        == 1
                })
                .count();
            hits as f64 / 1000.0
        };
        assert!((share(1.0) - 0.75).abs() < 0.002);
        assert!((share(0.5) - 0.9).abs() < 0.002);
        let low = choose(&logits, None, 0.5, 0.0).unwrap();
        assert!((low.logprob.exp() - 0.25).abs() < 1e-6);
    }
}
