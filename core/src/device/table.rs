//! The private table between liblocum and liblocum_cuda: this file is compiled into both, and both must have been made from the same one.
//!
//! Calls are coarse: load a model, read tokens of a batch, train a step. Values that cross are plain data, never Rust types. Nothing
//! here is stable, and nobody else should call it.

// Each side uses its part of it.
#![allow(dead_code)]

use std::ffi::c_void;

/// The name under which the object exports its [`Head`].
pub const SYMBOL: &[u8] = b"LOCUM_CUDA_TABLE\0";
/// First bytes of a [`Head`].
pub const MAGIC: u64 = u64::from_le_bytes(*b"LocumGPU");
/// Hash of this file and of the version: different for objects that do not belong together.
pub const BUILD: u64 = hash(
    hash(0xcbf2_9ce4_8422_2325, include_bytes!("table.rs")),
    env!("CARGO_PKG_VERSION").as_bytes(),
);

/// FNV-1a.
const fn hash(mut state: u64, bytes: &[u8]) -> u64 {
    let mut i = 0;
    while i < bytes.len() {
        state = (state ^ bytes[i] as u64).wrapping_mul(0x0100_0000_01b3);
        i += 1;
    }
    state
}

/// What the object exports. The first two fields are read before anything of it is called.
#[repr(C)]
pub struct Head {
    pub magic: u64,
    pub build: u64,
    pub table: Table,
}

/// What a call came to. Everything but `OK` has a sentence in [`Trouble`].
pub type Status = u32;
pub const OK: Status = 0;
/// No memory left under the limit: this call did nothing, others may go on.
pub const OUT_OF_MEMORY: Status = 1;
/// The device failed: nothing on it can be used any more.
pub const LOST: Status = 2;
/// The device, its driver or its libraries are not there, or cannot do this.
pub const REFUSED: Status = 3;
/// A sequence cannot be cut back so far.
pub const BEHIND: Status = 4;

/// A sentence in UTF-8, written by the object: the first `len` bytes of `text`.
#[repr(C)]
pub struct Trouble {
    pub len: u32,
    pub text: [u8; 400],
}

/// How much of which device to take.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Limits {
    pub device: i32,
    pub reserved: u32,
    /// 0: three quarters of what is free at opening.
    pub memory_bytes: u64,
}

/// A device, as its driver describes it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Info {
    /// UTF-8, ended by a zero.
    pub name: [u8; 128],
    pub major: u32,
    pub minor: u32,
    /// 13000 is 13.0.
    pub driver: u32,
    pub blas: u32,
    pub multiprocessors: u32,
    /// Graphs that steps are replayed from.
    pub graphs: u32,
    pub memory_bytes: u64,
    pub free_bytes: u64,
    /// Of ours: the limit, what is used, and the most that was.
    pub limit_bytes: u64,
    pub used_bytes: u64,
    pub peak_bytes: u64,
    /// Why steps are queued kernel by kernel; UTF-8, ended by a zero, empty where they are not.
    pub single: [u8; 256],
}

/// A decoder's dimensions, named as in Hugging Face configs.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Shape {
    pub vocab_size: u32,
    pub hidden_size: u32,
    pub intermediate_size: u32,
    pub num_hidden_layers: u32,
    pub num_attention_heads: u32,
    pub num_key_value_heads: u32,
    pub head_dim: u32,
    /// RMSNorm on each head's query and key.
    pub head_norms: u32,
    pub tied: u32,
    pub rms_norm_eps: f32,
    /// Matrices and activations in `f32` instead of bf16.
    pub exact: u32,
    /// Layers that learn while they read: tokens of a chunk (0: there are none), taps of the filter, whether targets are made from
    /// the embeddings, and the largest drift (infinite: no cap).
    pub chunk_len: u32,
    pub kernel_size: u32,
    pub embedded_targets: u32,
    pub max_drift: f32,
    /// How they forget (`ttt::Forgetting`): γ of a decay (1: none) and β of a delta rule (0: none).
    pub decay: f32,
    pub delta: f32,
    /// Positions in the tables of rotary angles.
    pub positions: u32,
    /// (positions, head_dim / 2) each.
    pub cos: *const f32,
    pub sin: *const f32,
}

pub const EMBED: u32 = 0;
pub const FINAL_NORM: u32 = 1;
pub const HEAD: u32 = 2;
pub const INPUT_NORM: u32 = 3;
pub const Q: u32 = 4;
pub const K: u32 = 5;
pub const V: u32 = 6;
pub const O: u32 = 7;
pub const Q_NORM: u32 = 8;
pub const K_NORM: u32 = 9;
pub const POST_NORM: u32 = 10;
pub const GATE: u32 = 11;
pub const UP: u32 = 12;
pub const DOWN: u32 = 13;
pub const TTT_CONV: u32 = 14;
pub const TTT_PROJ: u32 = 15;

/// A parameter of the model: `f32`, row-major, read during the call.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Tensor {
    pub layer: u32,
    pub which: u32,
    pub data: *const f32,
    pub len: u64,
}

/// New tokens of one sequence.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Part {
    pub sequence: *mut c_void,
    pub tokens: *const u32,
    pub n: u32,
    /// Whether the trained weights play and nothing is learned.
    pub off: u32,
    /// Step size of the layers that learn.
    pub lr: f32,
    pub reserved: u32,
}

/// An update that a layer of a sequence made.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Learned {
    pub part: u32,
    pub layer: u32,
    pub position: u64,
    pub drift: f32,
    /// The drift was past the cap or no number, and the layer began again.
    pub tripped: u32,
}

pub const FULL: u32 = 0;
pub const LORA_A: u32 = 1;
pub const LORA_B: u32 = 2;

/// A tensor that a training moves.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Moves {
    pub kind: u32,
    pub which: u32,
    pub layer: u32,
    pub reserved: u32,
    pub len: u64,
}

/// Which of a moving tensor's numbers: itself, AdamW's moments, the gradient's sums.
pub const VALUE: u32 = 0;
pub const FIRST_MOMENT: u32 = 1;
pub const SECOND_MOMENT: u32 = 2;
pub const GRADIENT: u32 = 3;

/// AdamW's numbers for one tensor in one step: `w = w * decay - rate * m / (sqrt(v) / root + epsilon)`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Rate {
    pub rate: f32,
    pub decay: f32,
}

/// Calls may come from any thread; those on one engine, model, sequence or training are not made at once, but a training runs beside
/// serving, and `info` may be asked at any time. Pointers are read and written during the call only. What `open`, `model_load`, `sequence_new`, `sequence_copy` and
/// `train_open` hand out is freed by the function named beside; models, sequences and trainings keep what they were made from alive.
#[repr(C)]
pub struct Table {
    /// Looks at the device without keeping anything of it.
    pub probe: unsafe extern "C" fn(*const Limits, *mut Info, *mut Trouble) -> Status,
    pub open: unsafe extern "C" fn(*const Limits, *mut *mut c_void, *mut Trouble) -> Status,
    pub close: unsafe extern "C" fn(*mut c_void),
    pub info: unsafe extern "C" fn(*mut c_void, *mut Info, *mut Trouble) -> Status,

    pub model_load: unsafe extern "C" fn(
        *mut c_void,
        *const Shape,
        *const Tensor,
        usize,
        *mut *mut c_void,
        *mut Trouble,
    ) -> Status,
    pub model_free: unsafe extern "C" fn(*mut c_void),

    /// Model, room for so many tokens, whether its layers learn while it is read.
    pub sequence_new:
        unsafe extern "C" fn(*mut c_void, usize, u32, *mut *mut c_void, *mut Trouble) -> Status,
    /// A sequence's first tokens (`len`), with room for `capacity`.
    pub sequence_copy:
        unsafe extern "C" fn(*mut c_void, usize, usize, *mut *mut c_void, *mut Trouble) -> Status,
    pub sequence_cut: unsafe extern "C" fn(*mut c_void, usize, *mut Trouble) -> Status,
    /// Back to the trained weights; the rest of the open chunk is not learned from.
    pub sequence_reset: unsafe extern "C" fn(*mut c_void),
    pub sequence_bytes: unsafe extern "C" fn(*mut c_void) -> u64,
    pub sequence_free: unsafe extern "C" fn(*mut c_void),

    /// Reads new tokens of several sequences of a model: parts; rows (counted through all parts) whose logits (rows, v) are wanted;
    /// updates made, as many as there is room for, and their number.
    #[allow(clippy::type_complexity)]
    pub step: unsafe extern "C" fn(
        *mut c_void,
        *const Part,
        usize,
        *const u32,
        usize,
        *mut f32,
        *mut Learned,
        usize,
        *mut usize,
        *mut Trouble,
    ) -> Status,

    /// Engine, shape, parameters, tensors that move, the adapter's rank and scale, the first block that has a gradient.
    #[allow(clippy::type_complexity)]
    pub train_open: unsafe extern "C" fn(
        *mut c_void,
        *const Shape,
        *const Tensor,
        usize,
        *const Moves,
        usize,
        u32,
        f32,
        u32,
        *mut *mut c_void,
        *mut Trouble,
    ) -> Status,
    pub train_close: unsafe extern "C" fn(*mut c_void),
    pub train_put:
        unsafe extern "C" fn(*mut c_void, usize, u32, *const f32, u64, *mut Trouble) -> Status,
    pub train_get:
        unsafe extern "C" fn(*mut c_void, usize, u32, *mut f32, u64, *mut Trouble) -> Status,
    /// Tokens, lengths of the sequences that they are, the step size of layers that learn, and whether a backward pass follows.
    pub train_forward: unsafe extern "C" fn(
        *mut c_void,
        *const u32,
        usize,
        *const u32,
        usize,
        f32,
        u32,
        *mut Trouble,
    ) -> Status,
    /// Rows of the last forward pass with labels and weights (n each) -> nll and hits (n each). With a scale that is not 0, what
    /// `train_backward` begins with is `scale * weight * d nll`.
    #[allow(clippy::type_complexity)]
    pub train_head: unsafe extern "C" fn(
        *mut c_void,
        *const u32,
        *const u32,
        *const f32,
        usize,
        f32,
        *mut f32,
        *mut u32,
        *mut Trouble,
    ) -> Status,
    pub train_backward: unsafe extern "C" fn(*mut c_void, *mut Trouble) -> Status,
    /// The squared norm of each tensor's gradient.
    pub train_norms: unsafe extern "C" fn(*mut c_void, *mut f64, *mut Trouble) -> Status,
    /// One AdamW step with the gradients times `scale`, then sets them to zero: rates by tensor, `scale`, `root`.
    pub train_apply:
        unsafe extern "C" fn(*mut c_void, *const Rate, f32, f32, *mut Trouble) -> Status,
}

// SAFETY: functions and two numbers; the pointers in it are to code.
unsafe impl Sync for Head {}
