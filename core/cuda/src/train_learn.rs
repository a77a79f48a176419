//! Layers that learn while they read, in a training (core/src/ttt/training.rs). `D` is what a sequence has added to its trained weight
//! up to a chunk, `G` the gradient of the weight that chunk i meets, both (d, f):
//!
//! ```text
//! yᵢ = zᵢ W₀ᵀ + zᵢ Dᵢᵀ        Dᵢ₊₁ = Dᵢ + η vᵢᵀ zᵢ        v = conv(u) P
//! dzᵢ = dyᵢ W₀ + dyᵢ Dᵢ + η vᵢ Gᵢ₊₁        dvᵢ = η zᵢ Gᵢ₊₁ᵀ        Gᵢ = Gᵢ₊₁ + dyᵢᵀ zᵢ
//! ```
//!
//! By a rule that forgets, `Dᵢ₊₁` and `Gᵢ₊₁` are multiplied by γ, or a chunk's v loses `κ Dᵢ zᵢ` and passes `r = -κ dv` on to `Dᵢ` and z
//! (core/src/ttt/training.rs).
//!
//! The terms with `W₀` are those of a plain block, adapters included, and `dW₀` is what a plain block adds up, so `train` makes them.
//! What is here comes on top, in `f32`: one `D` and one `G` walk through one sequence after another, so memory does not grow with
//! chunks. An untrained filter has `D = 0`, and the numbers are those of the plain model.

use std::ops::Range;

use crate::card::{launch, Buffer, Format, Mat};
use crate::driver::{Address, Result};
use crate::model::{Layer, Start};
use crate::step::offset;
use crate::table;
use crate::train::Training;

/// The chunk of a row (learn.cu, `Chunk`).
#[repr(C)]
#[derive(Clone, Copy)]
struct Chunk {
    first: i32,
    rows: i32,
}

/// The chunks of a forward pass, and the step size of their updates.
pub struct Walk {
    lr: f32,
    /// Rows in all.
    t: usize,
    /// Each row's [`Chunk`].
    chunks: Buffer,
    /// Rows of the chunks of each sequence that has several.
    sequences: Vec<Vec<Range<usize>>>,
}

/// What updates are made from, in `f32`: activations z (t, f) and the MLP's normed inputs u (t, d).
pub struct Seen {
    z: Address,
    u: Address,
    _own: Option<(Buffer, Buffer)>,
}

/// Rows of a matrix (t, width) of `f32`.
fn rows(at: Address, rows: &Range<usize>, width: usize) -> Mat {
    Mat::new(
        offset(at, rows.start * width, Format::F32),
        width,
        Format::F32,
    )
}

impl Training {
    /// The chunks of sequences of these lengths; `None` if none has several, or nothing is written.
    pub fn walk(&self, lens: &[u32], lr: f32) -> Result<Option<Walk>> {
        let c = self.dims().chunk;
        if c == 0 || lr == 0.0 || self.model.starts.is_empty() {
            return Ok(None);
        }
        let (mut chunks, mut sequences, mut row) = (Vec::new(), Vec::new(), 0);
        for len in lens {
            let end = row + *len as usize;
            let of_one: Vec<Range<usize>> =
                (row..end).step_by(c).map(|i| i..end.min(i + c)).collect();
            for chunk in &of_one {
                let last = chunk.end == end;
                let of_row = Chunk {
                    first: chunk.start as i32,
                    rows: if last { 0 } else { c as i32 },
                };
                chunks.extend(chunk.clone().map(|_| of_row));
            }
            if of_one.len() > 1 {
                sequences.push(of_one);
            }
            row = end;
        }
        if sequences.is_empty() {
            return Ok(None);
        }
        Ok(Some(Walk {
            lr,
            t: row,
            chunks: self.lane.upload(&chunks)?,
            sequences,
        }))
    }

    /// The block's MLP inputs and activations in `f32`: where they are kept in another format, they are computed again from what they
    /// were made of, rather than kept twice.
    pub fn seen(
        &self,
        block: &Layer,
        (x2, n2): (Address, Address),
        (gate_up, act): (Address, Address),
        t: usize,
    ) -> Result<Seen> {
        let m = self.dims();
        if m.format == Format::F32 {
            return Ok(Seen {
                z: act,
                u: n2,
                _own: None,
            });
        }
        let (z, u) = (
            self.lane.buffer(t * m.f * 4)?,
            self.lane.buffer(t * m.d * 4)?,
        );
        self.model.norm(x2, &block.post_norm, 0, n2, u.at, t)?;
        self.model.swiglu(gate_up, act, z.at, t)?;
        Ok(Seen {
            z: z.at,
            u: u.at,
            _own: Some((z, u)),
        })
    }

    /// Adds to y (t, d) what the sequences' own weights say beyond the trained one.
    pub fn learn(&self, walk: &Walk, start: &Start, seen: &Seen, y: Address) -> Result<()> {
        let m = self.dims();
        let filtered = self.filtered(walk, start, seen)?;
        let target = self.target(walk, start, &filtered)?;
        let v = target.as_ref().unwrap_or(&filtered).at;
        self.follow(walk, (v, seen.z), |chunk, learned| {
            self.lane.product(
                rows(y, chunk, m.d),
                rows(seen.z, chunk, m.f),
                learned.t(),
                (chunk.len(), m.d, m.f),
                1.0,
                1.0,
            )
        })
    }

    /// Backward of [`Self::learn`] for dy (t, d): adds to dz (t, f), and to the sums of filter and projection if they train.
    /// Returns the gradient of the filtered rows (t, d), with which [`Self::sources_back`] goes on.
    pub fn learn_back(
        &self,
        layer: usize,
        walk: &Walk,
        start: &Start,
        seen: Seen,
        (dy, dz): (Address, Address),
    ) -> Result<Buffer> {
        let (m, lane, t) = (self.dims(), &self.lane, walk.t);
        let filtered = self.filtered(walk, start, &seen)?;
        let target = self.target(walk, start, &filtered)?;
        let v = target.as_ref().unwrap_or(&filtered).at;
        self.follow(walk, (v, seen.z), |chunk, learned| {
            let (dz, dy) = (rows(dz, chunk, m.f), rows(dy, chunk, m.d));
            lane.product(dz, dy, learned, (chunk.len(), m.f, m.d), 1.0, 1.0)
        })?;
        let (dv, sum) = (lane.buffer(t * m.d * 4)?, lane.buffer(m.d * m.f * 4)?);
        // The last chunks write nothing that is read.
        lane.zero(dv.at, t * m.d * 4)?;
        let g = Mat::new(sum.at, m.f, Format::F32);
        let delta = match m.delta_rate(walk.lr) {
            Some(rate) => Some((rate, lane.buffer(m.d * m.f * 4)?)),
            None => None,
        };
        let lr = walk.lr * m.decay;
        for chunks in &walk.sequences {
            if let Some((_, room)) = &delta {
                self.sum(walk, chunks, (v, seen.z), room)?;
            }
            for (i, pair) in chunks.windows(2).rev().enumerate() {
                let (chunk, later) = (&pair[0], &pair[1]);
                let before = if i == 0 { 0.0 } else { m.decay };
                let (read, n) = (rows(seen.z, later, m.f), later.len());
                lane.product(
                    g,
                    rows(dy, later, m.d).t(),
                    read,
                    (m.d, m.f, n),
                    1.0,
                    before,
                )?;
                let (z, n) = (rows(seen.z, chunk, m.f), chunk.len());
                let to = rows(dz, chunk, m.f);
                lane.product(to, rows(v, chunk, m.d), g, (n, m.f, m.d), lr, 1.0)?;
                let to = rows(dv.at, chunk, m.d);
                lane.product(to, z, g.t(), (n, m.d, m.f), lr, 0.0)?;
                // The first chunk met the trained weight, which answers nothing of its own.
                if let (Some((rate, room)), true) = (&delta, i + 2 < chunks.len()) {
                    let learned = Mat::new(room.at, m.f, Format::F32);
                    let wrote = rows(v, chunk, m.d).t();
                    lane.product(learned, wrote, z, (m.d, m.f, n), -walk.lr, 1.0)?;
                    let r = self.answered(learned, z, n)?;
                    let to = rows(dz, chunk, m.f);
                    launch!(lane, lane.kernel("correct_rows_back", None), (n, 1, 1), 256, 0;
                        rows(dv.at, chunk, m.d).at, r.at, z.at, to.at, *rate, m.d as i32, m.f as i32)?;
                    let r = Mat::new(r.at, m.d, Format::F32);
                    lane.product(to, r, learned, (n, m.f, m.d), 1.0, 1.0)?;
                    lane.product(g, r.t(), z, (m.d, m.f, n), 1.0, 1.0)?;
                }
            }
        }
        let mat = |at| Mat::new(at, m.d, Format::F32);
        let mut dfiltered = dv;
        if let Some(proj) = &start.proj {
            let dv = dfiltered;
            if let Some(grad) = self.grad(layer, table::TTT_PROJ) {
                let (to, square) = (mat(grad.at), (m.d, m.d, t));
                lane.product(to, mat(filtered.at).t(), mat(dv.at), square, 1.0, 1.0)?;
            }
            dfiltered = lane.buffer(t * m.d * 4)?;
            let (to, shape) = (mat(dfiltered.at), (t, m.d, m.d));
            lane.product(to, mat(dv.at), mat(proj.at).t(), shape, 1.0, 0.0)?;
        }
        if let Some(grad) = self.grad(layer, table::TTT_CONV) {
            launch!(lane, lane.kernel("filter_taps_back", None), (m.d.div_ceil(32), m.taps, 1), 256, 0;
                seen.u, dfiltered.at, walk.chunks.at, grad.at, t as i32, m.d as i32, m.taps as i32)?;
        }
        Ok(dfiltered)
    }

    /// Adds to du (t, d) what the targets pass back to what they were made from.
    pub fn sources_back(
        &self,
        walk: &Walk,
        start: &Start,
        dfiltered: &Buffer,
        du: Address,
    ) -> Result<()> {
        let (m, lane) = (self.dims(), &self.lane);
        launch!(lane, lane.kernel("filter_rows_back", None), (walk.t, 1, 1), 256, 0;
            dfiltered.at, start.taps.at, walk.chunks.at, du, m.d as i32, m.taps as i32)
    }

    /// `conv(u)` (t, d) of every chunk, zeros for the last ones.
    fn filtered(&self, walk: &Walk, start: &Start, seen: &Seen) -> Result<Buffer> {
        let (m, lane) = (self.dims(), &self.lane);
        let filtered = lane.buffer(walk.t * m.d * 4)?;
        launch!(lane, lane.kernel("filter_rows", None), (walk.t, 1, 1), 256, 0;
            seen.u, start.taps.at, walk.chunks.at, filtered.at, m.d as i32, m.taps as i32)?;
        Ok(filtered)
    }

    /// `v = conv(u) P` (t, d); `None` without a projection, where the filtered rows are the target.
    fn target(&self, walk: &Walk, start: &Start, filtered: &Buffer) -> Result<Option<Buffer>> {
        let (m, lane, t) = (self.dims(), &self.lane, walk.t);
        let Some(proj) = &start.proj else {
            return Ok(None);
        };
        let v = lane.buffer(t * m.d * 4)?;
        let mat = |at| Mat::new(at, m.d, Format::F32);
        let (from, proj) = (mat(filtered.at), mat(proj.at));
        lane.product(mat(v.at), from, proj, (t, m.d, m.d), 1.0, 0.0)?;
        Ok(Some(v))
    }

    /// Calls `each` with every chunk that comes behind another one, and the `D` (d, f) that it meets. A delta rule corrects the targets
    /// v (t, d) where they lie.
    fn follow(
        &self,
        walk: &Walk,
        (v, z): (Address, Address),
        mut each: impl FnMut(&Range<usize>, Mat) -> Result<()>,
    ) -> Result<()> {
        let m = self.dims();
        let room = self.lane.buffer(m.d * m.f * 4)?;
        let learned = Mat::new(room.at, m.f, Format::F32);
        for chunks in &walk.sequences {
            for (i, pair) in chunks.windows(2).enumerate() {
                let (chunk, later) = (&pair[0], &pair[1]);
                let (wrote, seen, n) = (rows(v, chunk, m.d), rows(z, chunk, m.f), chunk.len());
                if let (Some(rate), true) = (m.delta_rate(walk.lr), i > 0) {
                    let answered = self.answered(learned, seen, n)?;
                    launch!(self.lane, self.lane.kernel("correct_rows", None), (n, 1, 1), 256, 0;
                        wrote.at, answered.at, seen.at, rate, m.d as i32, m.f as i32)?;
                }
                let before = if i == 0 { 0.0 } else { m.decay };
                let lr = walk.lr * m.decay;
                self.lane
                    .product(learned, wrote.t(), seen, (m.d, m.f, n), lr, before)?;
                each(later, learned)?;
            }
        }
        Ok(())
    }

    /// `D z` (n, d) for n rows z (n, f).
    fn answered(&self, learned: Mat, z: Mat, n: usize) -> Result<Buffer> {
        let m = self.dims();
        let answered = self.lane.buffer(n * m.d * 4)?;
        let to = Mat::new(answered.at, m.d, Format::F32);
        self.lane
            .product(to, z, learned.t(), (n, m.d, m.f), 1.0, 0.0)?;
        Ok(answered)
    }

    /// The `D` (d, f) that the last chunk of a sequence meets, of targets that are what was added.
    fn sum(
        &self,
        walk: &Walk,
        chunks: &[Range<usize>],
        (v, z): (Address, Address),
        room: &Buffer,
    ) -> Result<()> {
        let m = self.dims();
        let learned = Mat::new(room.at, m.f, Format::F32);
        let Some((_, written)) = chunks.split_last() else {
            return Ok(());
        };
        for (i, chunk) in written.iter().enumerate() {
            let (wrote, seen) = (rows(v, chunk, m.d).t(), rows(z, chunk, m.f));
            let before = if i == 0 { 0.0 } else { 1.0 };
            let shape = (m.d, m.f, chunk.len());
            self.lane
                .product(learned, wrote, seen, shape, walk.lr, before)?;
        }
        Ok(())
    }
}
