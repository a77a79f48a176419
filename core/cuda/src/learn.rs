//! Layers that learn while they are read (core/src/ttt): each run of tokens up to a chunk's edge meets its sequence's weight, then the
//! weight is updated from the chunk, `W += lr · vᵀ z` with `v = conv(u) P`, by the rules that forget less what they forget. All in
//! `f32`, and nothing waits for the card until the step ends: what is past the cap begins again by a flag on the card.

use std::ops::Range;
use std::sync::Arc;

use crate::card::{launch, Buffer, Format, Mat};
use crate::driver::{Address, Result};
use crate::model::{Model, Start};
use crate::sequence::Fast;
use crate::step::{offset, Learns, Part};
use crate::table::Learned;

/// Rows of one run below which its product is made row by row.
pub const MIN_PRODUCT: usize = 8;
/// Parts of a sum over a matrix.
const SUM_PARTS: usize = 64;

/// A row and the weight that it meets (learn.cu, `Met`).
#[repr(C)]
#[derive(Clone, Copy)]
struct Met {
    weight: u64,
    row: i32,
    unused: i32,
}

/// A run of a sequence's tokens within one chunk.
pub struct Run {
    pub part: usize,
    pub rows: Range<usize>,
    /// Where the first stands in the sequence, and how many rows wait before it.
    pub position: usize,
    pub waiting: usize,
}

/// What a step keeps for its layers that learn.
pub struct Learning {
    model: Arc<Model>,
    t: usize,
    /// Activations (t, f) and what targets are made from (t, d), of the layer at hand.
    seen: Option<(Buffer, Buffer)>,
    /// Rounds of runs: each sequence's first ones, its second ones, ...
    pub rounds: Vec<Vec<Run>>,
    /// Rows that meet the trained weight throughout.
    plain: Vec<Range<usize>>,
    /// What every update left: drift and flag, on the card, and which update it was.
    slots: Option<(Buffer, Buffer, Buffer)>,
    made: Vec<Learned>,
    /// Chunks that end in this step and are learned from.
    pub edges: usize,
}

/// A step's learning with the sequences that learn.
pub struct Over<'a, 'b, 'c> {
    learning: &'a mut Learning,
    parts: &'b mut [Part<'c>],
}

impl Learns for Over<'_, '_, '_> {
    fn keep_embeddings(&self, x: &Buffer) -> Result<()> {
        self.learning.keep_embeddings(x)
    }

    fn keeps(&self, layer: u32) -> (Address, Address) {
        self.learning.keeps(layer)
    }

    fn learn(&mut self, layer: u32, act: Address, x: Address) -> Result<()> {
        self.learning.learn(layer, self.parts, (act, x))
    }
}

impl Learning {
    /// What there is to learn, before anything is made for it.
    pub fn plan(model: &Arc<Model>, parts: &[Part], t: usize) -> Self {
        let c = model.dims.chunk;
        let mut learning = Self {
            model: model.clone(),
            t,
            seen: None,
            rounds: Vec::new(),
            plain: Vec::new(),
            slots: None,
            made: Vec::new(),
            edges: 0,
        };
        let mut row = 0;
        for (i, part) in parts.iter().enumerate() {
            let end = row + part.tokens.len();
            if !part.sequence.learns || part.off {
                learning.plain.push(row..end);
                row = end;
                continue;
            }
            let (mut position, mut waiting) = (part.sequence.len, part.sequence.waiting);
            for round in 0.. {
                if row == end {
                    break;
                }
                let to = end.min(row + c - position % c);
                if learning.rounds.len() == round {
                    learning.rounds.push(Vec::new());
                }
                learning.rounds[round].push(Run {
                    part: i,
                    rows: row..to,
                    position,
                    waiting,
                });
                let reading = waiting == position % c;
                position += to - row;
                let full = position.is_multiple_of(c);
                learning.edges += usize::from(full && reading);
                waiting = match reading && !full {
                    true => waiting + to - row,
                    false => 0,
                };
                row = to;
            }
        }
        learning
    }

    pub fn begin(model: &Arc<Model>, parts: &[Part], t: usize) -> Result<Self> {
        let mut learning = Self::plan(model, parts, t);
        if !learning.rounds.is_empty() {
            let (lane, m) = (&model.lane, &model.dims);
            learning.seen = Some((lane.buffer(t * m.f * 4)?, lane.buffer(t * m.d * 4)?));
            let slots = learning.edges * model.starts.len();
            learning.slots = Some((
                lane.buffer(slots * 4)?,
                lane.buffer(slots * 4)?,
                lane.buffer(SUM_PARTS * 8)?,
            ));
        }
        Ok(learning)
    }

    pub fn over<'a, 'b, 'c>(&'a mut self, parts: &'b mut [Part<'c>]) -> Over<'a, 'b, 'c> {
        Over {
            learning: self,
            parts,
        }
    }

    fn keep_embeddings(&self, x: &Buffer) -> Result<()> {
        match &self.seen {
            Some((_, u)) if self.model.dims.embedded_targets => {
                self.model
                    .lane
                    .copy(u.at, x.at, self.t * self.model.dims.d * 4)
            }
            _ => Ok(()),
        }
    }

    fn keeps(&self, layer: u32) -> (Address, Address) {
        match &self.seen {
            Some((z, u)) if self.model.starts.contains_key(&layer) => {
                match self.model.dims.embedded_targets {
                    true => (z.at, 0),
                    false => (z.at, u.at),
                }
            }
            _ => (0, 0),
        }
    }

    /// `x += down(z)`, each sequence by its own weight, and the updates at the edges.
    fn learn(
        &mut self,
        layer: u32,
        parts: &mut [Part],
        (act, x): (Address, Address),
    ) -> Result<()> {
        let model = self.model.clone();
        let start = &model.starts[&layer];
        for rows in &self.plain {
            self.by_trained(layer, rows.clone(), (act, x))?;
        }
        let rounds = std::mem::take(&mut self.rounds);
        for round in &rounds {
            self.apply(layer, round, parts, (act, x))?;
            for run in round {
                let part = &mut parts[run.part];
                let lr = part.lr;
                let Some(fast) = part.sequence.fast.get_mut(&layer) else {
                    continue;
                };
                let update = absorb(
                    &model,
                    self.seen.as_ref(),
                    start,
                    run,
                    fast,
                    lr,
                    self.slots.as_ref(),
                    self.made.len(),
                )?;
                if update {
                    self.made.push(Learned {
                        part: run.part as u32,
                        layer,
                        position: (run.position + run.rows.len()) as u64,
                        ..Learned::default()
                    });
                }
            }
        }
        self.rounds = rounds;
        Ok(())
    }

    fn by_trained(
        &self,
        layer: u32,
        rows: Range<usize>,
        (act, x): (Address, Address),
    ) -> Result<()> {
        let m = &self.model.dims;
        let down = &self.model.layers[layer as usize].down;
        let (act, x) = (
            offset(act, rows.start * m.f, m.format),
            offset(x, rows.start * m.d, Format::F32),
        );
        self.model
            .linear_f32(act, down.at, x, true, rows.len(), (m.f, m.d))
    }

    fn apply(
        &self,
        layer: u32,
        round: &[Run],
        parts: &[Part],
        at: (Address, Address),
    ) -> Result<()> {
        let (m, lane) = (&self.model.dims, &self.model.lane);
        let Some((z, _)) = &self.seen else {
            return Ok(());
        };
        let mut met = Vec::new();
        for run in round {
            let own = parts[run.part]
                .sequence
                .fast
                .get(&layer)
                .and_then(|fast| fast.w.as_ref());
            let Some(w) = own else {
                self.by_trained(layer, run.rows.clone(), at)?;
                continue;
            };
            if run.rows.len() < MIN_PRODUCT {
                met.extend(run.rows.clone().map(|row| Met {
                    weight: w.at,
                    row: row as i32,
                    unused: 0,
                }));
                continue;
            }
            let row = |base, width| {
                Mat::new(
                    offset(base, run.rows.start * width, Format::F32),
                    width,
                    Format::F32,
                )
            };
            let w = Mat::new(w.at, m.f, Format::F32).t();
            lane.product(
                row(at.1, m.d),
                row(z.at, m.f),
                w,
                (run.rows.len(), m.d, m.f),
                1.0,
                1.0,
            )?;
        }
        let list = lane.upload(&met)?;
        launch!(lane, lane.kernel("met_rows", None), (met.len(), m.d.div_ceil(4), 1), 128, 0;
            list.at, z.at, at.1, m.d as i32, m.f as i32)
    }

    /// Ends the step: sequences stand behind their tokens, and what was learned is known.
    pub fn end(self, parts: &mut [Part]) -> Result<Vec<Learned>> {
        let mut made = self.made;
        if let (Some((drifts, flags, _)), false) = (&self.slots, made.is_empty()) {
            let (mut drift, mut flag) = (vec![0f32; made.len()], vec![0i32; made.len()]);
            self.model.lane.get(drifts.at, &mut drift)?;
            self.model.lane.get(flags.at, &mut flag)?;
            for ((learned, drift), flag) in made.iter_mut().zip(drift).zip(flag) {
                (learned.drift, learned.tripped) = (drift, flag as u32);
                let fast = parts[learned.part as usize]
                    .sequence
                    .fast
                    .get_mut(&learned.layer);
                if let Some(fast) = fast {
                    fast.drift = if flag == 0 { drift } else { 0.0 };
                    if flag != 0 {
                        fast.w = None;
                    }
                }
            }
        }
        for run in self.rounds.iter().flatten() {
            let sequence = &mut parts[run.part].sequence;
            let c = self.model.dims.chunk;
            let end = run.position + run.rows.len();
            sequence.waiting = match run.waiting == run.position % c && !end.is_multiple_of(c) {
                true => run.waiting + run.rows.len(),
                false => 0,
            };
        }
        for part in parts {
            part.sequence.len += part.tokens.len();
            if part.off {
                part.sequence.waiting = 0;
            }
        }
        Ok(made)
    }
}

/// Takes a run's rows into the chunk and updates the weight where they fill it; whether they did.
#[allow(clippy::too_many_arguments)]
fn absorb(
    model: &Model,
    seen: Option<&(Buffer, Buffer)>,
    start: &Start,
    run: &Run,
    fast: &mut Fast,
    lr: f32,
    slots: Option<&(Buffer, Buffer, Buffer)>,
    slot: usize,
) -> Result<bool> {
    let (m, lane) = (&model.dims, &model.lane);
    let (Some((z, u)), Some(slots)) = (seen, slots) else {
        return Ok(false);
    };
    let (c, n) = (m.chunk, run.rows.len());
    if run.waiting != run.position % c {
        // The chunk's beginning was not learned from.
        return Ok(false);
    }
    let row = |at, width| offset(at, run.rows.start * width, Format::F32);
    let (z, u) = (row(z.at, m.f), row(u.at, m.d));
    let full = (run.position + n).is_multiple_of(c);
    if n == c {
        update(model, start, fast, (z, u), lr, slots, slot)?;
        return Ok(true);
    }
    let (zs, us) = fast.waits(model)?;
    lane.copy(offset(zs, run.waiting * m.f, Format::F32), z, n * m.f * 4)?;
    lane.copy(offset(us, run.waiting * m.d, Format::F32), u, n * m.d * 4)?;
    if full {
        update(model, start, fast, (zs, us), lr, slots, slot)?;
    }
    Ok(full)
}

/// Updates the weight from a whole chunk: z (c, f), u (c, d).
fn update(
    model: &Model,
    start: &Start,
    fast: &mut Fast,
    (z, u): (Address, Address),
    lr: f32,
    (drifts, flags, sums): &(Buffer, Buffer, Buffer),
    slot: usize,
) -> Result<()> {
    let (m, lane) = (&model.dims, &model.lane);
    let (c, n) = (m.chunk, m.d * m.f);
    let slot = |buffer: &Buffer| buffer.at + 4 * slot as Address;
    if lr != 0.0 && start.writes {
        let mat = |at, stride| Mat::new(at, stride, Format::F32);
        let filtered = lane.buffer(c * m.d * 4)?;
        launch!(lane, lane.kernel("filter_chunk", None), (c, 1, 1), 256, 0;
            u, start.taps.at, filtered.at, c as i32, m.d as i32, m.taps as i32)?;
        let v = match &start.proj {
            None => filtered,
            Some(proj) => {
                let v = lane.buffer(c * m.d * 4)?;
                lane.product(
                    mat(v.at, m.d),
                    mat(filtered.at, m.d),
                    mat(proj.at, m.d),
                    (c, m.d, m.d),
                    1.0,
                    0.0,
                )?;
                v
            }
        };
        if let (Some(w), Some(rate)) = (&fast.w, m.delta_rate(lr)) {
            let (change, answered) = (lane.buffer(n * 4)?, lane.buffer(c * m.d * 4)?);
            launch!(lane, lane.kernel("learned_change", None), (n.div_ceil(256), 1, 1), 256, 0;
                w.at, start.w.at, change.at, n as u64)?;
            let (to, learned) = (mat(answered.at, m.d), mat(change.at, m.f).t());
            lane.product(to, mat(z, m.f), learned, (c, m.d, m.f), 1.0, 0.0)?;
            launch!(lane, lane.kernel("correct_rows", None), (c, 1, 1), 256, 0;
                v.at, answered.at, z, rate, m.d as i32, m.f as i32)?;
        }
        if fast.w.is_none() {
            let w = lane.buffer(n * 4)?;
            lane.copy(w.at, start.w.at, n * 4)?;
            fast.w = Some(w);
        }
        if let Some(w) = &fast.w {
            lane.product(
                mat(w.at, m.f),
                mat(v.at, m.d).t(),
                mat(z, m.f),
                (m.d, m.f, c),
                lr,
                1.0,
            )?;
            if m.decay != 1.0 {
                launch!(lane, lane.kernel("decay_weight", None), (n.div_ceil(256), 1, 1), 256, 0;
                    w.at, start.w.at, m.decay, n as u64)?;
            }
        }
    }
    let Some(w) = &fast.w else {
        // Still the trained weight.
        lane.zero(slot(drifts), 4)?;
        return lane.zero(slot(flags), 4);
    };
    launch!(lane, lane.kernel("distance_parts", None), (SUM_PARTS, 1, 1), 256, 0; w.at, start.w.at, n as u64, sums.at)?;
    launch!(lane, lane.kernel("judge_drift", None), (1, 1, 1), 1, 0;
        sums.at, SUM_PARTS as i32, start.norm, m.max_drift, slot(drifts), slot(flags))?;
    launch!(lane, lane.kernel("begin_again", None), (n.div_ceil(256), 1, 1), 256, 0; w.at, start.w.at, n as u64, slot(flags))
}
