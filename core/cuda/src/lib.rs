//! liblocum_cuda.so: the student on an NVIDIA device. liblocum loads it, checks that both were made from one source, and calls it
//! through the table in core/src/device/table.rs; nobody else does.
//!
//! The rooms, in the order of reading: `driver` finds libcuda and cuBLAS, `card` opens a device, `model` holds weights, `sequence` what
//! belongs to one sequence, `attention`, `learn`, `step` and `small` serve, `train` trains, with `train_learn` for layers that learn while
//! they read. Each call makes the device's context current and puts back what was; nothing is reset, and memory comes from a pool of our
//! own under a ceiling.

#![deny(unsafe_op_in_unsafe_fn)]

mod attention;
mod card;
mod driver;
mod learn;
mod model;
mod sequence;
mod small;
mod step;
#[path = "../../src/device/table.rs"]
mod table;
mod train;
mod train_learn;

use std::ffi::c_void;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::slice::{from_raw_parts, from_raw_parts_mut};
use std::sync::Arc;

use card::{Card, Lane};
use driver::{Fault, Result};
use model::Model;
use sequence::Sequence;
use step::Part;
use table::{Head, Info, Learned, Limits, Moves, Rate, Shape, Status, Table, Tensor, Trouble};
use train::Training;

/// What liblocum looks for.
#[no_mangle]
pub static LOCUM_CUDA_TABLE: Head = Head {
    magic: table::MAGIC,
    build: table::BUILD,
    table: Table {
        probe,
        open,
        close,
        info,
        model_load,
        model_free,
        sequence_new,
        sequence_copy,
        sequence_cut,
        sequence_reset,
        sequence_bytes,
        sequence_free,
        step,
        train_open,
        train_close,
        train_put,
        train_get,
        train_forward,
        train_head,
        train_backward,
        train_norms,
        train_apply,
    },
};

/// An opened device with its lane for serving.
struct Engine {
    card: Arc<Card>,
    serving: Arc<Lane>,
}

/// Runs a call: no panic leaves it, and what went wrong is told.
///
/// # Safety
/// `trouble` can be written to.
unsafe fn call(trouble: *mut Trouble, body: impl FnOnce() -> Result<()>) -> Status {
    let done = catch_unwind(AssertUnwindSafe(body));
    let fault = match done {
        Ok(Ok(())) => return table::OK,
        Ok(Err(fault)) => fault,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
            Fault {
                status: table::LOST,
                why: format!("a defect: {}", text.unwrap_or("a panic without a message")),
            }
        }
    };
    // SAFETY: the caller's promise.
    let trouble = unsafe { &mut *trouble };
    let mut len = fault.why.len().min(trouble.text.len());
    while !fault.why.is_char_boundary(len) {
        len -= 1;
    }
    trouble.text[..len].copy_from_slice(&fault.why.as_bytes()[..len]);
    trouble.len = len as u32;
    fault.status
}

/// Runs a call with a card's context current; a device that fails is remembered as lost.
///
/// # Safety
/// As [`call`].
unsafe fn on(card: &Arc<Card>, trouble: *mut Trouble, body: impl FnOnce() -> Result<()>) -> Status {
    let body = || {
        let entered = card.enter()?;
        let done = body();
        drop(entered);
        done.inspect_err(|fault| card.note(fault))
    };
    // SAFETY: the caller's promise.
    unsafe { call(trouble, body) }
}

/// # Safety
/// `at` was made by `give` of the same type, and nobody writes to it meanwhile.
unsafe fn borrow<'a, T>(at: *mut c_void) -> &'a T {
    // SAFETY: the caller's promise.
    unsafe { &*at.cast() }
}

/// # Safety
/// `at` was made by `give` of the same type, and nobody else has it meanwhile.
unsafe fn borrow_mut<'a, T>(at: *mut c_void) -> &'a mut T {
    // SAFETY: the caller's promise.
    unsafe { &mut *at.cast() }
}

/// # Safety
/// `out` can be written to.
unsafe fn give<T>(out: *mut *mut c_void, value: T) {
    // SAFETY: the caller's promise.
    unsafe { *out = Box::into_raw(Box::new(value)).cast() }
}

/// # Safety
/// `at` was made by `give` of the same type, and is not used again.
unsafe fn take<T>(at: *mut c_void) -> Box<T> {
    // SAFETY: the caller's promise.
    unsafe { Box::from_raw(at.cast()) }
}

// What follows relies on the table's promises: pointers are of the kind that the table's documentation names, and valid for the call.

unsafe extern "C" fn probe(limits: *const Limits, out: *mut Info, trouble: *mut Trouble) -> Status {
    // SAFETY: the table's promises.
    unsafe {
        call(trouble, || {
            *out = Card::probe(&*limits)?;
            Ok(())
        })
    }
}

unsafe extern "C" fn open(
    limits: *const Limits,
    out: *mut *mut c_void,
    trouble: *mut Trouble,
) -> Status {
    // SAFETY: the table's promises.
    unsafe {
        call(trouble, || {
            let card = Card::open(&*limits)?;
            let serving = Lane::new(&card, false)?;
            give(out, Engine { card, serving });
            Ok(())
        })
    }
}

unsafe extern "C" fn close(engine: *mut c_void) {
    // SAFETY: the table's promises.
    drop(unsafe { take::<Engine>(engine) });
}

unsafe extern "C" fn info(engine: *mut c_void, out: *mut Info, trouble: *mut Trouble) -> Status {
    // SAFETY: the table's promises.
    unsafe {
        call(trouble, || {
            *out = borrow::<Engine>(engine).card.info();
            Ok(())
        })
    }
}

unsafe extern "C" fn model_load(
    engine: *mut c_void,
    shape: *const Shape,
    tensors: *const Tensor,
    n: usize,
    out: *mut *mut c_void,
    trouble: *mut Trouble,
) -> Status {
    // SAFETY: the table's promises.
    unsafe {
        let engine = borrow::<Engine>(engine);
        on(&engine.card, trouble, || {
            let model = Model::load(&engine.serving, &*shape, from_raw_parts(tensors, n))?;
            give(out, Arc::new(model));
            Ok(())
        })
    }
}

unsafe extern "C" fn model_free(model: *mut c_void) {
    // SAFETY: the table's promises.
    drop(unsafe { take::<Arc<Model>>(model) });
}

unsafe extern "C" fn sequence_new(
    model: *mut c_void,
    capacity: usize,
    learns: u32,
    out: *mut *mut c_void,
    trouble: *mut Trouble,
) -> Status {
    // SAFETY: the table's promises.
    unsafe {
        let model = borrow::<Arc<Model>>(model);
        on(&model.lane.card, trouble, || {
            give(out, Sequence::new(model, capacity, learns != 0)?);
            Ok(())
        })
    }
}

unsafe extern "C" fn sequence_copy(
    sequence: *mut c_void,
    len: usize,
    capacity: usize,
    out: *mut *mut c_void,
    trouble: *mut Trouble,
) -> Status {
    // SAFETY: the table's promises.
    unsafe {
        let sequence = borrow::<Sequence>(sequence);
        on(&sequence.model.lane.card, trouble, || {
            give(out, sequence.copy(len, capacity)?);
            Ok(())
        })
    }
}

unsafe extern "C" fn sequence_cut(
    sequence: *mut c_void,
    len: usize,
    trouble: *mut Trouble,
) -> Status {
    // SAFETY: the table's promises.
    unsafe { call(trouble, || borrow_mut::<Sequence>(sequence).cut(len)) }
}

unsafe extern "C" fn sequence_reset(sequence: *mut c_void) {
    // SAFETY: the table's promises.
    unsafe { borrow_mut::<Sequence>(sequence).reset() }
}

unsafe extern "C" fn sequence_bytes(sequence: *mut c_void) -> u64 {
    // SAFETY: the table's promises.
    unsafe { borrow::<Sequence>(sequence).bytes() }
}

unsafe extern "C" fn sequence_free(sequence: *mut c_void) {
    // SAFETY: the table's promises.
    drop(unsafe { take::<Sequence>(sequence) });
}

#[allow(clippy::too_many_arguments)]
unsafe extern "C" fn step(
    model: *mut c_void,
    parts: *const table::Part,
    n: usize,
    rows: *const u32,
    n_rows: usize,
    logits: *mut f32,
    learned: *mut Learned,
    room: usize,
    made: *mut usize,
    trouble: *mut Trouble,
) -> Status {
    // SAFETY: the table's promises; no sequence stands in two parts.
    unsafe {
        let model = borrow::<Arc<Model>>(model);
        on(&model.lane.card, trouble, || {
            let part = |part: &table::Part| Part {
                sequence: borrow_mut::<Sequence>(part.sequence),
                tokens: from_raw_parts(part.tokens, part.n as usize),
                off: part.off != 0,
                lr: part.lr,
            };
            let mut parts: Vec<Part> = from_raw_parts(parts, n).iter().map(part).collect();
            let logits = match n_rows {
                0 => &mut [],
                _ => from_raw_parts_mut(logits, n_rows * model.dims.v),
            };
            let updates = model.step(&mut parts, from_raw_parts(rows, n_rows), logits)?;
            if updates.len() > room {
                return Err(Fault::refused(format!(
                    "{} updates, room for {room}",
                    updates.len()
                )));
            }
            std::ptr::copy_nonoverlapping(updates.as_ptr(), learned, updates.len());
            *made = updates.len();
            Ok(())
        })
    }
}

#[allow(clippy::too_many_arguments)]
unsafe extern "C" fn train_open(
    engine: *mut c_void,
    shape: *const Shape,
    tensors: *const Tensor,
    n: usize,
    moves: *const Moves,
    n_moves: usize,
    rank: u32,
    scale: f32,
    first: u32,
    out: *mut *mut c_void,
    trouble: *mut Trouble,
) -> Status {
    // SAFETY: the table's promises.
    unsafe {
        let card = &borrow::<Engine>(engine).card;
        on(card, trouble, || {
            let lane = Lane::new(card, true)?;
            let model = Model::load(&lane, &*shape, from_raw_parts(tensors, n))?;
            let moves = from_raw_parts(moves, n_moves);
            give(
                out,
                (
                    card.clone(),
                    Training::new(&lane, model, moves, rank as usize, scale, first as usize)?,
                ),
            );
            Ok(())
        })
    }
}

/// A training with its card, which every call enters.
type Job = (Arc<Card>, Training);

unsafe extern "C" fn train_close(job: *mut c_void) {
    // SAFETY: the table's promises.
    drop(unsafe { take::<Job>(job) });
}

unsafe extern "C" fn train_put(
    job: *mut c_void,
    index: usize,
    which: u32,
    data: *const f32,
    len: u64,
    trouble: *mut Trouble,
) -> Status {
    // SAFETY: the table's promises.
    unsafe {
        let (card, training) = borrow::<Job>(job);
        on(card, trouble, || {
            training.put(index, which, from_raw_parts(data, len as usize))
        })
    }
}

unsafe extern "C" fn train_get(
    job: *mut c_void,
    index: usize,
    which: u32,
    data: *mut f32,
    len: u64,
    trouble: *mut Trouble,
) -> Status {
    // SAFETY: the table's promises.
    unsafe {
        let (card, training) = borrow::<Job>(job);
        on(card, trouble, || {
            training.get(index, which, from_raw_parts_mut(data, len as usize))
        })
    }
}

unsafe extern "C" fn train_forward(
    job: *mut c_void,
    ids: *const u32,
    t: usize,
    lens: *const u32,
    n: usize,
    lr: f32,
    keep: u32,
    trouble: *mut Trouble,
) -> Status {
    // SAFETY: the table's promises.
    unsafe {
        let (card, training) = borrow_mut::<Job>(job);
        on(card, trouble, || {
            training.forward(
                from_raw_parts(ids, t),
                from_raw_parts(lens, n),
                lr,
                keep != 0,
            )
        })
    }
}

#[allow(clippy::too_many_arguments)]
unsafe extern "C" fn train_head(
    job: *mut c_void,
    rows: *const u32,
    labels: *const u32,
    weights: *const f32,
    n: usize,
    scale: f32,
    nll: *mut f32,
    hits: *mut u32,
    trouble: *mut Trouble,
) -> Status {
    // SAFETY: the table's promises.
    unsafe {
        let (card, training) = borrow_mut::<Job>(job);
        on(card, trouble, || {
            let asked = (
                from_raw_parts(rows, n),
                from_raw_parts(labels, n),
                from_raw_parts(weights, n),
            );
            training.head(
                asked,
                scale,
                (from_raw_parts_mut(nll, n), from_raw_parts_mut(hits, n)),
            )
        })
    }
}

unsafe extern "C" fn train_backward(job: *mut c_void, trouble: *mut Trouble) -> Status {
    // SAFETY: the table's promises.
    unsafe {
        let (card, training) = borrow_mut::<Job>(job);
        on(card, trouble, || training.backward())
    }
}

unsafe extern "C" fn train_norms(job: *mut c_void, out: *mut f64, trouble: *mut Trouble) -> Status {
    // SAFETY: the table's promises; there are as many numbers as tensors that move.
    unsafe {
        let (card, training) = borrow::<Job>(job);
        on(card, trouble, || {
            training.norms(from_raw_parts_mut(out, training.len()))
        })
    }
}

unsafe extern "C" fn train_apply(
    job: *mut c_void,
    rates: *const Rate,
    scale: f32,
    root: f32,
    trouble: *mut Trouble,
) -> Status {
    // SAFETY: as above.
    unsafe {
        let (card, training) = borrow::<Job>(job);
        on(card, trouble, || {
            training.apply(from_raw_parts(rates, training.len()), scale, root)
        })
    }
}
