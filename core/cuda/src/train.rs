//! Training on the card: forward with a tape, head with cross-entropy, backward, AdamW. What is decided (batches, weights of rows,
//! rates, when to stop) is decided by core/src/train.
//!
//! Tensors that move have `f32` masters, moments and sums of gradients; the products read copies in the model's format.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::attention::{Rows, Span};
use crate::card::{launch, or_null, Buffer, Format, Lane, Mat};
use crate::driver::{Address, Fault, Result};
use crate::model::{convert, Dims, Model};
use crate::step::offset;
use crate::table::{self, Moves, Rate, FULL, LORA_A, LORA_B};
use crate::train_learn::Walk;

/// Rows of logits on the card at a time.
const HEAD_ROWS: usize = 512;
const SUM_PARTS: usize = 64;

/// A tensor that moves.
struct Moving {
    what: Moves,
    value: Buffer,
    first: Buffer,
    second: Buffer,
    grad: Buffer,
    /// Where products read it, and in which format.
    copy: (Address, Format),
    /// The copy of an adapter's matrix.
    _own: Option<Buffer>,
}

/// Activations of one block that its backward pass reads.
struct Tape {
    x: Buffer,
    n1: Buffer,
    qkv: Buffer,
    q: Buffer,
    /// Keys of all rows, then values; `spans` points there.
    _kv: Buffer,
    spans: Buffer,
    mixed: Buffer,
    lse: Buffer,
    x2: Buffer,
    n2: Buffer,
    gate_up: Buffer,
    act: Buffer,
}

/// The last forward pass.
struct Pass {
    ids: Vec<u32>,
    rows: Rows,
    /// `None` where no layer learns while it reads.
    walk: Option<Walk>,
    x: Buffer,
    tape: Vec<Tape>,
    dx: Option<Buffer>,
}

pub struct Training {
    pub lane: Arc<Lane>,
    pub model: Model,
    moving: Vec<Moving>,
    places: BTreeMap<(u32, u32, u32), usize>,
    rank: usize,
    scale: f32,
    first: usize,
    pass: Option<Pass>,
}

/// A matrix of a group that is multiplied as one: which, where its outputs begin, and how many they are.
type Member = (u32, usize, usize);

impl Training {
    pub fn new(
        lane: &Arc<Lane>,
        model: Model,
        moves: &[Moves],
        rank: usize,
        scale: f32,
        first: usize,
    ) -> Result<Self> {
        let (mut moving, mut places) = (Vec::new(), BTreeMap::new());
        for what in moves {
            let len = what.len as usize;
            let (copy, own) = match what.kind {
                FULL => {
                    let place = model.place(what.layer, what.which);
                    (
                        place.ok_or_else(|| {
                            Fault::refused(format!(
                                "parameter {} of layer {} is not there to be trained",
                                what.which, what.layer
                            ))
                        })?,
                        None,
                    )
                }
                _ => {
                    let own = lane.buffer(len * model.dims.format.bytes())?;
                    ((own.at, model.dims.format), Some(own))
                }
            };
            let tensor = || -> Result<Buffer> {
                let buffer = lane.buffer(len * 4)?;
                lane.zero(buffer.at, len * 4)?;
                Ok(buffer)
            };
            places.insert((what.kind, what.layer, what.which), moving.len());
            moving.push(Moving {
                what: *what,
                value: tensor()?,
                first: tensor()?,
                second: tensor()?,
                grad: tensor()?,
                copy,
                _own: own,
            });
        }
        lane.wait()?;
        Ok(Self {
            lane: lane.clone(),
            model,
            moving,
            places,
            rank,
            scale,
            first,
            pass: None,
        })
    }

    fn tensor(&self, index: usize, which: u32, len: usize) -> Result<Address> {
        let found = self
            .moving
            .get(index)
            .filter(|m| m.what.len as usize == len);
        let found = found
            .ok_or_else(|| Fault::refused(format!("no moving tensor {index} of {len} numbers")))?;
        Ok(match which {
            table::VALUE => found.value.at,
            table::FIRST_MOMENT => found.first.at,
            table::SECOND_MOMENT => found.second.at,
            _ => found.grad.at,
        })
    }

    pub fn put(&self, index: usize, which: u32, data: &[f32]) -> Result<()> {
        let at = self.tensor(index, which, data.len())?;
        self.lane.put(at, data)?;
        if which == table::VALUE {
            let (copy, format) = self.moving[index].copy;
            convert(&self.lane, data, copy, format)?;
        }
        self.lane.wait()
    }

    pub fn get(&self, index: usize, which: u32, data: &mut [f32]) -> Result<()> {
        let at = self.tensor(index, which, data.len())?;
        self.lane.get(at, data)
    }

    /// Tensors that move.
    pub fn len(&self) -> usize {
        self.moving.len()
    }

    pub fn dims(&self) -> Dims {
        self.model.dims
    }

    pub fn grad(&self, layer: usize, which: u32) -> Option<&Buffer> {
        let at = self.places.get(&(FULL, layer as u32, which))?;
        Some(&self.moving[*at].grad)
    }

    /// An adapter's A and B: their copies, and where their gradients go.
    fn pair(&self, layer: usize, which: u32) -> Option<[(Address, Address); 2]> {
        let get = |kind| {
            let at = self.places.get(&(kind, layer as u32, which))?;
            let moving = &self.moving[*at];
            Some((moving.copy.0, moving.grad.at))
        };
        Some([get(LORA_A)?, get(LORA_B)?])
    }

    /// Adds what adapters say to y, whose rows are `stride` numbers of `format` apart: x (t, width).
    fn adapt(
        &self,
        layer: usize,
        members: &[Member],
        x: Address,
        (t, width): (usize, usize),
        (y, stride, format): (Address, usize, Format),
    ) -> Result<()> {
        let (r, own) = (self.rank, self.dims().format);
        for &(which, from, out) in members {
            let Some([(a, _), (b, _)]) = self.pair(layer, which) else {
                continue;
            };
            let low = self.lane.buffer(t * r * own.bytes())?;
            let mat = |at, stride| Mat::new(at, stride, own);
            self.lane.product(
                mat(low.at, r),
                mat(x, width),
                mat(a, width).t(),
                (t, r, width),
                1.0,
                0.0,
            )?;
            let y = Mat::new(offset(y, from, format), stride, format);
            self.lane.product(
                y,
                mat(low.at, r),
                mat(b, r).t(),
                (t, out, r),
                self.scale,
                1.0,
            )?;
        }
        Ok(())
    }

    /// Backward of a group of matrices side by side: dx (t, width) = dy (t, out) W, with adapters; and the sums of what trains.
    #[allow(clippy::too_many_arguments)]
    fn linear_back(
        &self,
        layer: usize,
        members: &[Member],
        w: Address,
        (x, dy): (Address, Address),
        (t, width, out): (usize, usize, usize),
        (dx, format): (Address, Format),
    ) -> Result<()> {
        let (r, own, lane) = (self.rank, self.dims().format, &self.lane);
        let mat = |at, stride| Mat::new(at, stride, own);
        let dx = Mat::new(dx, width, format);
        lane.product(dx, mat(dy, out), mat(w, width), (t, width, out), 1.0, 0.0)?;
        for &(which, from, n) in members {
            let dy = mat(offset(dy, from, own), out);
            if let Some(grad) = self.grad(layer, which) {
                let grad = Mat::new(grad.at, width, Format::F32);
                lane.product(grad, dy.t(), mat(x, width), (n, width, t), 1.0, 1.0)?;
            }
            let Some([(a, da), (b, db)]) = self.pair(layer, which) else {
                continue;
            };
            let room = lane.buffer(t * r * own.bytes())?;
            let (low, a, b) = (mat(room.at, r), mat(a, width), mat(b, r));
            lane.product(low, mat(x, width), a.t(), (t, r, width), 1.0, 0.0)?;
            lane.product(
                Mat::new(db, r, Format::F32),
                dy.t(),
                low,
                (n, r, t),
                self.scale,
                1.0,
            )?;
            lane.product(low, dy, b, (t, r, n), self.scale, 0.0)?;
            lane.product(dx, low, a, (t, width, r), 1.0, 1.0)?;
            lane.product(
                Mat::new(da, width, Format::F32),
                low.t(),
                mat(x, width),
                (r, width, t),
                1.0,
                1.0,
            )?;
        }
        Ok(())
    }

    fn qkv_members(&self) -> [Member; 3] {
        let m = self.dims();
        [
            (table::Q, 0, m.qd()),
            (table::K, m.qd(), m.kd()),
            (table::V, m.qd() + m.kd(), m.kd()),
        ]
    }

    /// Sequences of these lengths through all blocks; `keep` for a backward pass. `lr`: the step size of layers that learn while they
    /// read.
    pub fn forward(&mut self, ids: &[u32], lens: &[u32], lr: f32, keep: bool) -> Result<()> {
        self.pass = None;
        let (m, lane) = (self.dims(), self.lane.clone());
        let (t, size, kd) = (ids.len(), m.format.bytes(), m.kd());
        let whole: usize = lens.iter().map(|n| *n as usize).sum();
        let longest = lens.iter().copied().max().unwrap_or(0) as usize;
        if whole != t || t == 0 || longest > m.positions || ids.iter().any(|id| *id as usize >= m.v)
        {
            return Err(Fault::refused("tokens that are not the sequences'"));
        }
        // Keys and values of a block lie packed as its rows do; the address comes with the block's own buffer.
        let spans = |kv: Address| -> Vec<Span> {
            let mut row = 0;
            let span = |len: &u32| {
                let span = Span {
                    base: offset(kv, row * kd, m.format),
                    layer_stride: 0,
                    v_offset: (t * kd * size) as u64,
                    row: row as i32,
                    len: *len as i32,
                    pos: 0,
                    unused: 0,
                };
                row += *len as usize;
                span
            };
            lens.iter().map(span).collect()
        };
        let mut rows = Rows::new(&lane, (m.format, m.e), ids, &spans(0))?;
        let walk = self.walk(lens, lr)?;
        let buffer = |width: usize, size: usize| lane.buffer(t * width * size);
        let mut x = buffer(m.d, 4)?;
        self.model.embed_rows(rows.ids.at, x.at, t)?;
        let mut tape = Vec::new();
        for layer in 0..m.layers {
            let block = &self.model.layers[layer];
            let n1 = buffer(m.d, size)?;
            self.model.norm(x.at, &block.input_norm, 0, n1.at, 0, t)?;
            let qkv = buffer(m.qkv(), size)?;
            self.model
                .linear(n1.at, block.qkv.at, qkv.at, t, (m.d, m.qkv()))?;
            self.adapt(
                layer,
                &self.qkv_members(),
                n1.at,
                (t, m.d),
                (qkv.at, m.qkv(), m.format),
            )?;
            let (q, kv, mixed, lse) = (
                buffer(m.qd(), size)?,
                buffer(2 * kd, size)?,
                buffer(m.qd(), size)?,
                buffer(m.h, 4)?,
            );
            rows.spans = lane.upload(&spans(kv.at))?;
            self.model.rope(block, &rows, layer, qkv.at, q.at)?;
            self.model.attend(&rows, layer, q.at, mixed.at, lse.at)?;
            let x2 = buffer(m.d, 4)?;
            lane.copy(x2.at, x.at, t * m.d * 4)?;
            self.model
                .linear_f32(mixed.at, block.o.at, x2.at, true, t, (m.qd(), m.d))?;
            self.adapt(
                layer,
                &[(table::O, 0, m.d)],
                mixed.at,
                (t, m.qd()),
                (x2.at, m.d, Format::F32),
            )?;
            let (n2, gate_up, act) = (
                buffer(m.d, size)?,
                buffer(2 * m.f, size)?,
                buffer(m.f, size)?,
            );
            self.model.norm(x2.at, &block.post_norm, 0, n2.at, 0, t)?;
            self.model
                .linear(n2.at, block.gate_up.at, gate_up.at, t, (m.d, 2 * m.f))?;
            let both = [(table::GATE, 0, m.f), (table::UP, m.f, m.f)];
            self.adapt(
                layer,
                &both,
                n2.at,
                (t, m.d),
                (gate_up.at, 2 * m.f, m.format),
            )?;
            self.model.swiglu(gate_up.at, act.at, 0, t)?;
            let y = buffer(m.d, 4)?;
            lane.copy(y.at, x2.at, t * m.d * 4)?;
            self.model
                .linear_f32(act.at, block.down.at, y.at, true, t, (m.f, m.d))?;
            self.adapt(
                layer,
                &[(table::DOWN, 0, m.d)],
                act.at,
                (t, m.f),
                (y.at, m.d, Format::F32),
            )?;
            if let (Some(walk), Some(start)) = (&walk, self.model.starts.get(&(layer as u32))) {
                let seen = self.seen(block, (x2.at, n2.at), (gate_up.at, act.at), t)?;
                self.learn(walk, start, &seen, y.at)?;
            }
            let before = std::mem::replace(&mut x, y);
            if keep && layer >= self.first {
                let spans = lane.upload(&spans(kv.at))?;
                tape.push(Tape {
                    x: before,
                    n1,
                    qkv,
                    q,
                    _kv: kv,
                    spans,
                    mixed,
                    lse,
                    x2,
                    n2,
                    gate_up,
                    act,
                });
            }
        }
        self.pass = Some(Pass {
            ids: ids.to_vec(),
            rows,
            walk,
            x,
            tape,
            dx: None,
        });
        lane.wait()
    }

    /// Losses of `at` rows; with a scale, also where the backward pass begins.
    pub fn head(
        &mut self,
        (at, labels, weights): (&[u32], &[u32], &[f32]),
        scale: f32,
        (nll, hits): (&mut [f32], &mut [u32]),
    ) -> Result<()> {
        let (m, lane) = (self.dims(), self.lane.clone());
        let Some(pass) = &self.pass else {
            return Err(Fault::refused("no forward pass was made"));
        };
        let wrong = at.iter().any(|row| *row as usize >= pass.rows.t)
            || labels.iter().any(|id| *id as usize >= m.v);
        if wrong {
            return Err(Fault::refused("labels of rows that are not there"));
        }
        let dx = match scale {
            0.0 => None,
            _ => {
                let dx = lane.buffer(pass.rows.t * m.d * 4)?;
                lane.zero(dx.at, pass.rows.t * m.d * 4)?;
                Some(dx)
            }
        };
        let mut done = 0;
        while done < at.len() {
            let n = HEAD_ROWS.min(at.len() - done);
            let part = done..done + n;
            let (rows, labels, weights) = (
                lane.upload(&at[part.clone()])?,
                lane.upload(&labels[part.clone()])?,
                lane.upload(&weights[part.clone()])?,
            );
            let (normed, logits) = (
                lane.buffer(n * m.d * m.format.bytes())?,
                lane.buffer(n * m.v * 4)?,
            );
            let (losses, right) = (lane.buffer(n * 4)?, lane.buffer(n * 4)?);
            self.model
                .norm(pass.x.at, &self.model.final_norm, rows.at, normed.at, 0, n)?;
            self.model.linear_f32(
                normed.at,
                self.model.head().at,
                logits.at,
                false,
                n,
                (m.d, m.v),
            )?;
            let dlogits = match dx {
                Some(_) => Some(lane.buffer(n * m.v * m.format.bytes())?),
                None => None,
            };
            launch!(lane, lane.kernel("cross_entropy", Some(m.format)), (n, 1, 1), 256, 0;
                logits.at, labels.at, weights.at, scale, losses.at, right.at, or_null(dlogits.as_ref()), m.v as i32)?;
            lane.get(losses.at, &mut nll[part.clone()])?;
            lane.get(right.at, &mut hits[part])?;
            if let (Some(dx), Some(dlogits)) = (&dx, &dlogits) {
                self.head_back(pass, (rows.at, normed.at, dlogits.at), n, dx)?;
            }
            done += n;
        }
        if let Some(pass) = self.pass.as_mut() {
            pass.dx = dx;
        }
        lane.wait()
    }

    fn head_back(
        &self,
        pass: &Pass,
        (rows, normed, dlogits): (Address, Address, Address),
        n: usize,
        dx: &Buffer,
    ) -> Result<()> {
        let (m, lane) = (self.dims(), &self.lane);
        let mat = |at, stride| Mat::new(at, stride, m.format);
        let dnormed = lane.buffer(n * m.d * 4)?;
        let plain = Mat::new(dnormed.at, m.d, Format::F32);
        lane.product(
            plain,
            mat(dlogits, m.v),
            mat(self.model.head().at, m.d),
            (n, m.d, m.v),
            1.0,
            0.0,
        )?;
        let which = if m.tied { table::EMBED } else { table::HEAD };
        if let Some(grad) = self.grad(0, which) {
            let grad = Mat::new(grad.at, m.d, Format::F32);
            lane.product(
                grad,
                mat(dlogits, m.v).t(),
                mat(normed, m.d),
                (m.v, m.d, n),
                1.0,
                1.0,
            )?;
        }
        let trained = self.grad(0, table::FINAL_NORM);
        self.norm_back(
            (pass.x.at, &self.model.final_norm, rows),
            dnormed.at,
            dx.at,
            n,
            trained,
        )
    }

    /// dx += the norm's; `trained`: where its weight's gradient goes.
    fn norm_back(
        &self,
        (x, w, rows): (Address, &Buffer, Address),
        dy: Address,
        dx: Address,
        n: usize,
        trained: Option<&Buffer>,
    ) -> Result<()> {
        let (m, lane) = (self.dims(), &self.lane);
        let terms = trained.map(|_| lane.buffer(n * m.d * 4)).transpose()?;
        launch!(lane, lane.kernel("rms_norm_back", None), (n, 1, 1), 256, 0;
            x, w.at, rows, dy, dx, or_null(terms.as_ref()), m.d as i32, m.eps)?;
        if let (Some(terms), Some(grad)) = (&terms, trained) {
            launch!(lane, lane.kernel("add_rows", None), (m.d.div_ceil(32), 1, 1), 256, 0;
                terms.at, grad.at, n as i32, m.d as i32)?;
        }
        Ok(())
    }

    /// Backward through the blocks of the last forward pass, which is used up.
    pub fn backward(&mut self) -> Result<()> {
        let Some(Pass {
            ids,
            rows,
            walk,
            mut tape,
            dx: Some(dx),
            ..
        }) = self.pass.take()
        else {
            return Err(Fault::refused("no loss to begin from"));
        };
        while let Some(block) = tape.pop() {
            let layer = self.first + tape.len();
            self.block_back(layer, &rows, walk.as_ref(), &block, &dx)?;
        }
        if let Some(grad) = self.grad(0, table::EMBED) {
            self.embed_back(&ids, &dx, grad)?;
        }
        self.lane.wait()
    }

    fn block_back(
        &self,
        layer: usize,
        rows: &Rows,
        walk: Option<&Walk>,
        tape: &Tape,
        dx: &Buffer,
    ) -> Result<()> {
        let (m, lane, t) = (self.dims(), &self.lane, rows.t);
        let (size, own, block) = (m.format.bytes(), Some(m.format), &self.model.layers[layer]);
        let buffer = |width: usize, size: usize| lane.buffer(t * width * size);
        let dy = buffer(m.d, size)?;
        let narrow = || launch!(lane, lane.kernel("convert", own), ((t * m.d).div_ceil(256), 1, 1), 256, 0; dx.at, dy.at, (t * m.d) as u64);
        // x_out = x2 + down(act)
        narrow()?;
        let (dact, dgate_up, dn) = (buffer(m.f, size)?, buffer(2 * m.f, size)?, buffer(m.d, 4)?);
        let down = [(table::DOWN, 0, m.d)];
        let learns = walk.zip(self.model.starts.get(&(layer as u32)));
        // What comes back through updates is added in `f32`.
        let exact = match learns {
            Some(_) if m.format != Format::F32 => Some(buffer(m.f, 4)?),
            _ => None,
        };
        let plain = (dact.at, m.format);
        let to = exact.as_ref().map_or(plain, |sums| (sums.at, Format::F32));
        self.linear_back(
            layer,
            &down,
            block.down.at,
            (tape.act.at, dy.at),
            (t, m.f, m.d),
            to,
        )?;
        let mut sources = None;
        if let Some((walk, start)) = learns {
            let activations = (tape.gate_up.at, tape.act.at);
            let seen = self.seen(block, (tape.x2.at, tape.n2.at), activations, t)?;
            sources = Some(self.learn_back(layer, walk, start, seen, (dx.at, to.0))?);
        }
        if let Some(sums) = exact {
            launch!(lane, lane.kernel("convert", own), ((t * m.f).div_ceil(256), 1, 1), 256, 0; sums.at, dact.at, (t * m.f) as u64)?;
        }
        launch!(lane, lane.kernel("swiglu_back", own), (t, 1, 1), 256, 0; tape.gate_up.at, dact.at, dgate_up.at, m.f as i32)?;
        let both = [(table::GATE, 0, m.f), (table::UP, m.f, m.f)];
        let shape = (t, m.d, 2 * m.f);
        self.linear_back(
            layer,
            &both,
            block.gate_up.at,
            (tape.n2.at, dgate_up.at),
            shape,
            (dn.at, Format::F32),
        )?;
        if let (Some((walk, start)), Some(sources)) = (learns, &sources) {
            self.sources_back(walk, start, sources, dn.at)?;
        }
        let trained = self.grad(layer, table::POST_NORM);
        self.norm_back((tape.x2.at, &block.post_norm, 0), dn.at, dx.at, t, trained)?;

        // x2 = x + o(attention)
        narrow()?;
        let (dmixed, dots) = (buffer(m.qd(), size)?, buffer(m.h, 4)?);
        let o = [(table::O, 0, m.d)];
        self.linear_back(
            layer,
            &o,
            block.o.at,
            (tape.mixed.at, dy.at),
            (t, m.qd(), m.d),
            (dmixed.at, m.format),
        )?;
        launch!(lane, lane.kernel("head_dots", own), (t, m.h.div_ceil(4), 1), 128, 0;
            tape.mixed.at, dmixed.at, dots.at, m.h as i32, m.e as i32)?;
        let (dq, dk, dv) = (buffer(m.qd(), 4)?, buffer(m.kd(), 4)?, buffer(m.kd(), 4)?);
        let given = (tape.q.at, dmixed.at, tape.lse.at, dots.at);
        let wanted = (dq.at, dk.at, dv.at);
        self.model.attend_back(rows, &tape.spans, given, wanted)?;
        let dqkv = buffer(m.qkv(), size)?;
        let norms = [table::Q_NORM, table::K_NORM].map(|which| self.grad(layer, which));
        let terms = match norms {
            [None, None] => None,
            _ => Some(buffer((m.h + m.g) * m.e, 4)?),
        };
        launch!(lane, lane.kernel("rope_join", own), (t, (m.h + 2 * m.g).div_ceil(4), 1), 128, 0;
            tape.qkv.at, rows.positions.at, self.model.cos.at, self.model.sin.at, or_null(block.q_norm.as_ref()),
            or_null(block.k_norm.as_ref()), dq.at, dk.at, dv.at, dqkv.at, or_null(terms.as_ref()),
            m.h as i32, m.g as i32, m.e as i32, m.eps)?;
        for (grad, (first, n)) in norms.into_iter().zip([(0, m.h), (m.h, m.g)]) {
            if let (Some(grad), Some(terms)) = (grad, &terms) {
                launch!(lane, lane.kernel("add_heads", None), (m.e.div_ceil(32), 1, 1), 256, 0;
                    terms.at, grad.at, t as i32, (m.h + m.g) as i32, first as i32, n as i32, m.e as i32)?;
            }
        }
        let shape = (t, m.d, m.qkv());
        self.linear_back(
            layer,
            &self.qkv_members(),
            block.qkv.at,
            (tape.n1.at, dqkv.at),
            shape,
            (dn.at, Format::F32),
        )?;
        let trained = self.grad(layer, table::INPUT_NORM);
        self.norm_back((tape.x.at, &block.input_norm, 0), dn.at, dx.at, t, trained)
    }

    fn embed_back(&self, ids: &[u32], dx: &Buffer, grad: &Buffer) -> Result<()> {
        let mut rows_of: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        for (row, id) in ids.iter().enumerate() {
            rows_of.entry(*id).or_default().push(row as u32);
        }
        let (mut tokens, mut begins, mut rows) = (Vec::new(), vec![0u32], Vec::new());
        for (token, own) in rows_of {
            tokens.push(token);
            rows.extend(own);
            begins.push(rows.len() as u32);
        }
        let (n, lane) = (tokens.len(), &self.lane);
        let (tokens, begins, rows) = (
            lane.upload(&tokens)?,
            lane.upload(&begins)?,
            lane.upload(&rows)?,
        );
        launch!(lane, lane.kernel("embed_back", None), (n, 1, 1), 256, 0;
            tokens.at, begins.at, rows.at, dx.at, grad.at, self.dims().d as i32)
    }

    /// The squared norm of each gradient.
    pub fn norms(&self, out: &mut [f64]) -> Result<()> {
        let lane = &self.lane;
        if out.len() != self.moving.len() {
            return Err(Fault::refused("as many norms as tensors that move"));
        }
        let (parts, sums) = (lane.buffer(SUM_PARTS * 8)?, lane.buffer(out.len() * 8)?);
        for (i, moving) in self.moving.iter().enumerate() {
            launch!(lane, lane.kernel("distance_parts", None), (SUM_PARTS, 1, 1), 256, 0;
                moving.grad.at, 0 as Address, moving.what.len, parts.at)?;
            launch!(lane, lane.kernel("join_parts", None), (1, 1, 1), 1, 0;
                parts.at, SUM_PARTS as i32, sums.at + 8 * i as Address)?;
        }
        lane.get(sums.at, out)
    }

    pub fn apply(&self, rates: &[Rate], scale: f32, root: f32) -> Result<()> {
        let lane = &self.lane;
        for (moving, rate) in self.moving.iter().zip(rates) {
            let (n, (copy, format)) = (moving.what.len, moving.copy);
            launch!(lane, lane.kernel("adamw", Some(format)), ((n as usize).div_ceil(256), 1, 1), 256, 0;
                moving.value.at, moving.first.at, moving.second.at, moving.grad.at, copy, n, scale, rate.rate, rate.decay, root)?;
            lane.zero(moving.grad.at, n as usize * 4)?;
        }
        lane.wait()
    }
}
