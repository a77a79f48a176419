//! Arithmetic on plain `f32` buffers: one small door per kernel, the fast path chosen at run time, the slow twin beside it in the tests.
//!
//! Everything is row-major. Shape letters as everywhere: `t` rows (tokens), `d` hidden, `h` query heads, `g` key/value heads,
//! `e` head_dim, `f` MLP width, `s` cached tokens, `v` vocabulary. Threads come from a [`Pool`] that the caller owns;
//! nothing here spawns, and no other pool is touched.

mod attention;
mod attention_backward;
mod bf16;
#[cfg(target_arch = "x86_64")]
mod bf16_x86;
mod buffer;
#[cfg(target_arch = "x86_64")]
mod f32_x86;
mod gate;
mod lanes;
mod matmul;
mod packed;
mod panels;
mod pointwise;
mod pool;
#[cfg(target_arch = "x86_64")]
mod product_x86;
mod quant;
mod random;
mod simd;
mod softmax;
mod speed;
mod vector;

pub use attention::{attention, attention_of_rows, AttentionShape, KeyLayout, Span, SpanRows};
pub use attention_backward::{attention_backward, AttentionGrad};
pub use bf16::{matmul_bf16, round_bf16};
pub use buffer::Buffer;
pub use gate::{Gate, Hold};
pub use lanes::widest_lanes;
pub use matmul::{matmul, matmul_nt_small, Mat, MatMut};
pub use packed::PackedBf16;
pub use pointwise::{
    add_in_place, rms_norm, rms_norm_backward, rope, rope_backward, swiglu, swiglu_backward,
    swiglu_in_place, RopeTable,
};
pub use pool::{Attention, Keeping, Pool, SharedMut};
pub use quant::{OuterQ8, PackedQ4, PackedQ8, QuantPath, PANEL_ROWS};
pub use random::Random;
pub use simd::{axpy, dot, features, limit_features, Features, Isa};
pub use softmax::{cross_entropy, log_sum_exp, RowLoss};
pub use speed::f32_limit;
pub use vector::{add, add_product, squared_distance};
