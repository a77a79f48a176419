//! Arithmetic on plain `f32` buffers: one small door per kernel, the fast path chosen at run time, the slow twin beside it in the tests.
//!
//! Everything is row-major. Shape letters as everywhere: `t` rows (tokens), `d` hidden, `h` query heads, `g` key/value heads,
//! `e` head_dim, `f` MLP width, `s` cached tokens, `v` vocabulary. Threads come from a [`Pool`] that the caller owns;
//! nothing here spawns, and no other pool is touched.

mod attention;
mod bf16;
#[cfg(target_arch = "x86_64")]
mod bf16_x86;
mod lanes;
mod matmul;
mod packed;
mod panels;
mod pointwise;
mod pool;
mod quant;
mod random;
mod simd;

pub use attention::{
    attention, attention_backward, attention_of_rows, AttentionGrad, AttentionShape, KeyLayout,
    Span,
};
pub use bf16::{matmul_bf16, round_bf16};
pub use lanes::{log_sum_exp, widest_lanes};
pub use matmul::{matmul, matmul_nt_small, Mat, MatMut};
pub use packed::PackedBf16;
pub use pointwise::{
    add_in_place, rms_norm, rms_norm_backward, rope, rope_backward, swiglu, swiglu_backward,
    swiglu_in_place, RopeTable,
};
pub use pool::{quiet_thread, Attention, Pool, SharedMut};
pub use quant::{PackedQ4, PackedQ8, QuantPath};
pub use random::Random;
pub use simd::{axpy, dot, features, limit_features, Features, Isa};
