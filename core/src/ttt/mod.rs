//! In-Place Test-Time Training: a down-projection that goes on learning while its sequence is read, chunk by chunk.
//!
//! # The rule
//!
//! In-Place TTT (arXiv:2604.06169, sections 3.2 and 3.3; the authors' code where the paper leaves a choice open). In a TTT layer the
//! gated MLP is unchanged, except that its down-projection is a state `W` of the sequence that begins as the trained `W₀`:
//!
//! ```text
//! z = silu(x Wgateᵀ) ∘ (x Wupᵀ)        activation                                             (t, f)
//! y = z Wᵀ                             output, with W fixed for all tokens of a chunk         (t, d)
//! v = conv(u) P                        target, from u = x or u = the token embeddings         (t, d)
//! W ← W + η · vᵀ z                     once c rows have come: a sum over the chunk            (d, f)
//! ```
//!
//! - Apply, then update: chunk i is answered with `W₀ + η Σ_{j<i} vⱼᵀ zⱼ`, so no token sees what its own chunk wrote.
//! - The grid is absolute: edges are at positions 0, c, 2c, ... of the sequence, wherever its calls are cut. A chunk that is not full
//!   waits, and a sequence of at most c tokens behaves as the plain model.
//! - `conv(u)[j] = Σ_i K[:, i] ∘ u[j + i - k/2]`, a cross-correlation of k taps a channel without bias. It sees zeros outside of *its
//!   chunk*, before and behind. Taps behind the middle look ahead, which is where the next token in the target comes from; the model
//!   stays causal because a chunk's update is used from the next chunk on.
//! - `P` is used as stored, `conv(u) P`, although it is kept like the weight of a linear layer. Without `P` the target is `conv(u)`.
//! - The update is the gradient step of `−Σ ⟨y, v⟩`: no 1/c, no norm, no decay. It does not depend on `W`.
//!
//! The change of the weight since the start of the sequence, `drift = ‖W − W₀‖ / ‖W₀‖` (Frobenius), is measured after each update.
//! Past a cap, or when it is no number, the layer begins again from `W₀` and the [`Update`] says so.
//!
//! Beside the published rule a student may be trained, and is then served, with one that forgets ([`Forgetting`]): a decay of `W − W₀`
//! at each edge, or a delta rule, which takes from each target what the weight answers already.
//!
//! # What differs from the authors' code
//!
//! - Any number of sequences side by side, each with its own [`FastWeight`]; their incremental code is right for one row only.
//! - `W`, what waits and all sums are `f32` whatever the student's format; theirs are in the model's. A student of 8 or 4 bits applies
//!   its `W` in 8 bits, packed anew at each edge, and multiplies the operands of its updates in 8 bits ([`FastFormat::Q8`]).
//! - A chunk that waits keeps `z`, so that an edge needs no second pass through gate and up. Its outer products can be summed ahead
//!   of the edge ([`FastWeight::work_ahead`]), so that no token waits for all of them.
//! - Training walks the chunks with one `W` ([`forward`], [`backward`]) where theirs holds the weight of every chunk.
//! - The drift and its cap; the authors' public code has neither. Turn the cap off to compare with it.
//! - A second mode, [`TttMode::Gradient`]: chunk-wise dynamic evaluation with the same state, edges and cap. The caller,
//!   `model::descend`, computes the gradient of the loss; nothing here is trained.

mod config;
mod quantised;
mod rule;
mod state;
mod training;

pub use config::{
    Forgetting, TttConfig, TttLayer, TttMode, TttStart, TttTarget, MOST_DELTA, PROJ_DEVIATION,
};
pub use rule::down;
pub use state::{forward_rows, Chunk, FastFormat, FastWeight, StartWeight, Update};
pub use training::{backward, forward, TttGrad};

#[cfg(test)]
pub(crate) mod tests;

/// Why a layer cannot learn while it reads, or cannot be cut back.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum TttError {
    /// A field of `config.json` that is missing or impossible.
    #[error("config.json: {field} is {found}, which is not possible")]
    Config { field: &'static str, found: String },
    /// A trained tensor that does not fit the layer.
    #[error("{name} has {found} numbers, and the layer needs {expected}")]
    Tensor {
        name: &'static str,
        expected: usize,
        found: usize,
    },
    /// Tokens before the last chunk edge were to be forgotten, but their update cannot be taken back. Restore a clone from before.
    #[error("position {asked} lies before {edge}, the last edge at which the fast weight changed or could have")]
    BehindEdge { asked: usize, edge: usize },
}
