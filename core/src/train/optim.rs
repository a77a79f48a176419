//! AdamW with clipping, and the learning rate's schedule.

use std::collections::BTreeMap;

use super::TrainError;
use crate::device::TrainRates;
use crate::kernels::{Pool, SharedMut};
use crate::model::{Grads, TrainId};

/// Decoupled weight decay Adam (arXiv:1711.05101, algorithm 2), betas 0.9 and 0.95, epsilon 1e-8.
#[derive(Default)]
pub struct AdamW {
    pub weight_decay: f64,
    /// Learning rate of the tensors of layers that learn while they read, over that of the others; they have no weight decay.
    pub learning_layers: f64,
    pub steps: u64,
    /// First and second moment by tensor.
    pub moments: BTreeMap<TrainId, (Vec<f32>, Vec<f32>)>,
}

const BETA1: f64 = 0.9;
const BETA2: f64 = 0.95;
const EPSILON: f32 = 1e-8;
/// Numbers a thread updates at a time.
const PIECE: usize = 1 << 16;

impl AdamW {
    /// Zero moments for these tensors.
    pub fn new(sizes: &[(TrainId, usize)], weight_decay: f64) -> Self {
        let moments = sizes
            .iter()
            .map(|&(id, n)| (id, (vec![0.0; n], vec![0.0; n])))
            .collect();
        Self {
            weight_decay,
            learning_layers: 1.0,
            steps: 0,
            moments,
        }
    }

    /// Moves every tensor one step against its gradient, after scaling the gradients so that their norm together is at most `clip`.
    /// Returns the norm before clipping. `with` lends the tensor to change to the function it is given.
    ///
    /// # Errors
    /// [`TrainError::NoGradient`] names a tensor whose gradient is zero throughout in the second step: something above it stopped
    /// the gradient. (In the first step LoRA's B is zero and hides A.) [`TrainError::Diverged`] if a gradient is not finite.
    pub fn step(
        &mut self,
        pool: &Pool,
        lr: f64,
        clip: f64,
        grads: &Grads,
        mut with: impl FnMut(TrainId, &mut dyn FnMut(&mut [f32])),
    ) -> Result<f64, TrainError> {
        let mut norms = BTreeMap::new();
        for (id, grad) in &grads.map {
            norms.insert(*id, squared_norm(pool, grad));
        }
        let (norm, rates) = self.rates(lr, clip, &norms)?;
        let (scale, root_c2) = (rates.scale, rates.root);
        for ((id, grad), (rate, decay)) in grads.map.iter().zip(rates.tensors) {
            let (m, v) = self
                .moments
                .get_mut(id)
                .expect("every trained tensor has moments");
            with(*id, &mut |w| {
                assert_eq!(w.len(), grad.len(), "{}", id.name());
                let n = grad.len();
                let (w, m, v) = (SharedMut::new(w), SharedMut::new(m), SharedMut::new(v));
                pool.run(n.div_ceil(PIECE), |part| {
                    let from = part * PIECE;
                    let len = PIECE.min(n - from);
                    // SAFETY: pieces do not overlap.
                    let (w, m, v) =
                        unsafe { (w.slice(from, len), m.slice(from, len), v.slice(from, len)) };
                    for (((w, m), v), g) in w.iter_mut().zip(m).zip(v).zip(&grad[from..from + len])
                    {
                        let g = g * scale;
                        *m = BETA1 as f32 * *m + (1.0 - BETA1) as f32 * g;
                        *v = BETA2 as f32 * *v + (1.0 - BETA2) as f32 * g * g;
                        *w = *w * decay - rate * *m / (v.sqrt() / root_c2 + EPSILON);
                    }
                });
            });
        }
        Ok(norm)
    }
}

impl AdamW {
    /// Counts a step, and says the norm of all gradients before clipping and the numbers of the step, by tensor in the order of
    /// `squared_norms`.
    ///
    /// # Errors
    /// As [`Self::step`].
    pub fn rates(
        &mut self,
        lr: f64,
        clip: f64,
        squared_norms: &BTreeMap<TrainId, f64>,
    ) -> Result<(f64, TrainRates), TrainError> {
        let norm = squared_norms.values().sum::<f64>().sqrt();
        if !norm.is_finite() {
            return Err(TrainError::Diverged { step: self.steps });
        }
        self.steps += 1;
        if self.steps == 2 {
            let stopped = |(id, norm): &(&TrainId, &f64)| {
                let short = matches!(id, TrainId::Full(id) if id.is_of_learning_layer());
                **norm == 0.0 && !short
            };
            if let Some((id, _)) = squared_norms.iter().find(stopped) {
                return Err(TrainError::NoGradient(id.name()));
            }
        }
        // Bias correction divides by 1 - beta^step, so the first step must be 1, not 0.
        let c1 = 1.0 - BETA1.powi(self.steps.min(1 << 20) as i32);
        let c2 = 1.0 - BETA2.powi(self.steps.min(1 << 20) as i32);
        let tensor = |id: &TrainId| {
            let (lr, decay) = match id {
                TrainId::Full(id) if id.is_of_learning_layer() => (lr * self.learning_layers, 0.0),
                _ => (lr, self.weight_decay),
            };
            ((lr / c1) as f32, 1.0 - (lr * decay) as f32)
        };
        let rates = TrainRates {
            tensors: squared_norms.keys().map(tensor).collect(),
            scale: match clip > 0.0 && norm > clip {
                true => (clip / norm) as f32,
                false => 1.0,
            },
            root: c2.sqrt() as f32,
        };
        Ok((norm, rates))
    }
}

fn squared_norm(pool: &Pool, x: &[f32]) -> f64 {
    let parts = x.len().div_ceil(PIECE);
    let mut sums = vec![0f64; parts];
    let shared = SharedMut::new(&mut sums);
    pool.run(parts, |part| {
        let piece = &x[part * PIECE..((part + 1) * PIECE).min(x.len())];
        // SAFETY: one number a part.
        unsafe { shared.slice(part, 1)[0] = crate::kernels::dot(piece, piece) as f64 };
    });
    sums.iter().sum()
}

/// Linear warm-up, then a cosine down to `floor` times the peak at the end of the tokens.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    pub peak: f64,
    pub warmup_steps: u64,
    pub floor: f64,
}

impl Schedule {
    /// Learning rate of a step (from 0), with `done` the share of tokens read before it.
    pub fn lr(&self, step: u64, done: f64) -> f64 {
        let warm = if self.warmup_steps == 0 {
            1.0
        } else {
            ((step + 1) as f64 / self.warmup_steps as f64).min(1.0)
        };
        let cosine = 0.5 * (1.0 + (std::f64::consts::PI * done.clamp(0.0, 1.0)).cos());
        self.peak * warm * (self.floor + (1.0 - self.floor) * cosine)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ParamId;

    #[test]
    fn adamw_follows_the_formula_of_the_paper() {
        let pool = Pool::new(1, 0);
        let id = TrainId::Full(ParamId::FinalNorm);
        let mut w = vec![1.0f32, -2.0];
        let mut adam = AdamW::new(&[(id, 2)], 0.1);
        let (mut m, mut v, mut want) = ([0f64; 2], [0f64; 2], [1.0f64, -2.0]);
        for step in 1..=5 {
            let g = [0.3 * step as f32, -0.1];
            let grads = Grads {
                map: [(id, g.to_vec())].into_iter().collect(),
            };
            adam.step(&pool, 1e-2, 0.0, &grads, |_, change| change(&mut w))
                .unwrap();
            for i in 0..2 {
                let g = g[i] as f64;
                m[i] = 0.9 * m[i] + 0.1 * g;
                v[i] = 0.95 * v[i] + 0.05 * g * g;
                let (mh, vh) = (
                    m[i] / (1.0 - 0.9f64.powi(step)),
                    v[i] / (1.0 - 0.95f64.powi(step)),
                );
                want[i] = want[i] * (1.0 - 1e-2 * 0.1) - 1e-2 * mh / (vh.sqrt() + 1e-8);
                assert!(
                    (w[i] as f64 - want[i]).abs() < 1e-5,
                    "step {step}: {} {}",
                    w[i],
                    want[i]
                );
            }
        }
    }
}
