//! Small steps: few rows, none of which ends a chunk that is learned from. There is a place for each number of rows, rounded up, in which
//! such a step is made: buffers that stay where they are, filled by one copy, so that what is queued is the same every time. The first
//! step in a place queues it kernel by kernel, which also has cuBLAS load what it needs; the second one records it as a graph, and from
//! then on it is replayed. Where that is not possible, any step's way is taken, and the card knows why.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};

use crate::attention::{tiled, Rows, Span};
use crate::card::{launch, Buffer, Format, Graph};
use crate::driver::{Address, Fault, Result};
use crate::learn::{Learning, MIN_PRODUCT};
use crate::model::{Model, FEW_ROWS};
use crate::step::{offset, Learns, Part, Work};
use crate::table::OUT_OF_MEMORY;

/// Rows of a small step at most; places are for 1, 2, 4, ... of them.
const MOST_ROWS: usize = 64;
/// Small steps until a place that there was no memory for is tried again.
const PATIENCE: u64 = 256;
/// Kernels of a block, and those around all of them.
const BLOCK_KERNELS: usize = 9;
const OTHER_KERNELS: usize = 4;

/// What a row of a layer that learns meets (learn.cu, `Meets`).
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Meets {
    weight: u64,
    z: u64,
    u: u64,
}

/// Numbers without gaps between them, so that they are bytes too.
trait Plain: Copy {}
impl Plain for u32 {}
impl Plain for i32 {}
impl Plain for Span {}
impl Plain for Meets {}

/// A model's places.
#[derive(Default)]
pub struct Small {
    /// By rows, and whether any of them learns.
    places: BTreeMap<(usize, bool), Place>,
    steps: u64,
    /// No place is made before this step.
    not_before: u64,
}

/// Where steps of so many rows are made.
struct Place {
    t: usize,
    /// What changes from step to step: spans, what is met (layers that learn, t), ids, positions, span_of, rows wanted.
    inputs: Buffer,
    meeting: Meeting,
    rows: Rows,
    wanted: Buffer,
    work: Work,
    normed: Buffer,
    scores: Buffer,
    graph: Option<Graph>,
    /// Whether a step was made here.
    used: bool,
}

/// What the layers that learn have in a place.
struct Meeting {
    /// For each of them (t).
    meets: BTreeMap<u32, Address>,
    /// Activations (t, f) and what targets are made from (t, d), of the layer at hand.
    z: Buffer,
    u: Buffer,
}

impl Model {
    /// Makes a small step. False, with nothing done, where the step is another or there is no place for it.
    pub fn small_step(
        self: &Arc<Self>,
        parts: &mut [Part],
        (ids, spans): (&[u32], &[Span]),
        wanted: &[u32],
        logits: &mut [f32],
    ) -> Result<bool> {
        let (m, lane) = (&self.dims, &self.lane);
        let t = ids.len().next_power_of_two();
        let mut small = self.small.lock().unwrap_or_else(PoisonError::into_inner);
        if !lane.card.makes_graphs() {
            small.places.clear();
            return Ok(false);
        }
        let in_tiles = |span: &Span| tiled(lane, (m.format, m.e), span.len as usize);
        let fits = !ids.is_empty() && t <= MOST_ROWS && spans.len() <= t && wanted.len() <= t;
        if !fits || spans.iter().any(in_tiles) {
            return Ok(false);
        }
        let learning = Learning::plan(self, parts, ids.len());
        let mut runs = learning.rounds.iter().flatten();
        if learning.rounds.len() > 1
            || learning.edges > 0
            || runs.any(|run| run.rows.len() >= MIN_PRODUCT)
        {
            return Ok(false);
        }
        let key = (t, !learning.rounds.is_empty());
        let Some(place) = small.place(self, key)? else {
            return Ok(false);
        };
        place.fill(self, &learning, parts, (ids, spans), wanted)?;
        if let Err(why) = place.run(self) {
            small.places.remove(&key);
            small.failed(self, &why)?;
            return Ok(false);
        }
        match wanted.is_empty() {
            true => lane.wait()?,
            false => lane.get(place.scores.at, logits)?,
        }
        learning.end(parts)?;
        Ok(true)
    }
}

impl Small {
    /// The place for steps of this kind; `None` where there cannot be one.
    fn place(&mut self, model: &Model, key: (usize, bool)) -> Result<Option<&mut Place>> {
        self.steps += 1;
        if !self.places.contains_key(&key) {
            if self.steps < self.not_before {
                return Ok(None);
            }
            match Place::new(model, key) {
                Ok(place) => self.places.insert(key, place),
                Err(why) => {
                    self.failed(model, &why)?;
                    return Ok(None);
                }
            };
        }
        Ok(self.places.get_mut(&key))
    }

    /// Takes note that there is no place or graph: where memory is short for a while, otherwise for good.
    ///
    /// # Errors
    /// If it is the card that failed.
    fn failed(&mut self, model: &Model, why: &Fault) -> Result<()> {
        if model.lane.wait().is_err() {
            return Err(why.clone());
        }
        let short = why.status == OUT_OF_MEMORY;
        model.lane.card.queues_singly(&why.why, !short);
        self.not_before = self.steps + PATIENCE;
        if !short {
            self.places.clear();
        }
        Ok(())
    }
}

impl Place {
    fn new(model: &Model, (t, learns): (usize, bool)) -> Result<Self> {
        let (m, lane) = (&model.dims, &model.lane);
        if t > FEW_ROWS {
            lane.give_workspace()?;
        }
        let layers = if learns { model.starts.len() } else { 0 };
        let (span, meet) = (size_of::<Span>() * t, size_of::<Meets>() * t);
        let lists = span + layers * meet;
        let inputs = lane.buffer(lists + 4 * 4 * t)?;
        let list = |i: usize| inputs.part(lists + i * 4 * t, 4 * t);
        let splits = model.splits(t);
        let parts = match splits {
            1 => None,
            _ => Some(lane.buffer(model.parts_bytes(t, splits))?),
        };
        let rows = (list(0), list(1), list(2), inputs.part(0, span));
        let meets = (0..layers).map(|i| inputs.at + (span + i * meet) as Address);
        let meeting = Meeting {
            meets: model.starts.keys().copied().zip(meets).collect(),
            z: lane.buffer(if learns { t * m.f * 4 } else { 0 })?,
            u: lane.buffer(if learns { t * m.d * 4 } else { 0 })?,
        };
        Ok(Self {
            t,
            rows: Rows::fixed(rows, t, parts),
            wanted: list(3),
            meeting,
            work: Work::new(model, t)?,
            normed: lane.buffer(t * m.d * m.format.bytes())?,
            scores: lane.buffer(t * m.v * 4)?,
            inputs,
            graph: None,
            used: false,
        })
    }

    /// Puts a step's inputs into their place. Rows that are left over are nobody's.
    fn fill(
        &self,
        model: &Model,
        learning: &Learning,
        parts: &mut [Part],
        (ids, spans): (&[u32], &[Span]),
        wanted: &[u32],
    ) -> Result<()> {
        let t = self.t;
        let mut inputs = Vec::with_capacity(self.inputs.bytes);
        append(&mut inputs, spans, t, Span::nobody());
        for layer in self.meeting.meets.keys() {
            let meets = meets(model, learning, parts, *layer, t)?;
            append(&mut inputs, &meets, t, Meets::default());
        }
        let positions = spans
            .iter()
            .flat_map(|s| s.pos as u32..(s.pos + s.len) as u32);
        let span_of = spans.iter().zip(0i32..);
        let span_of = span_of.flat_map(|(s, i)| std::iter::repeat_n(i, s.len as usize));
        append(&mut inputs, ids, t, 0);
        append(&mut inputs, &positions.collect::<Vec<u32>>(), t, 0);
        append(&mut inputs, &span_of.collect::<Vec<i32>>(), t, -1);
        append(&mut inputs, wanted, t, 0);
        model.lane.put(self.inputs.at, &inputs)
    }

    /// Queues the step that was put here.
    ///
    /// # Errors
    /// What the driver says; what was not done then can be done in another way.
    fn run(&mut self, model: &Model) -> Result<()> {
        if self.graph.is_none() && self.used {
            let kernels = model.dims.layers * BLOCK_KERNELS + OTHER_KERNELS;
            self.graph = Some(model.lane.record(kernels, || self.queue(model))?);
            model.lane.card.queues_singly("", false);
        }
        self.used = true;
        match &self.graph {
            Some(graph) => graph.queue(),
            None => self.queue(model),
        }
    }

    /// The step, kernel by kernel: nothing in it depends on anything but the place.
    fn queue(&self, model: &Model) -> Result<()> {
        let (m, t) = (&model.dims, self.t);
        model.pass(&self.rows, &self.work, &mut Here { model, place: self })?;
        let (x, normed) = (self.work.x.at, self.normed.at);
        model.norm(x, &model.final_norm, self.wanted.at, normed, 0, t)?;
        let head = model.head().at;
        model.linear_f32(normed, head, self.scores.at, false, t, (m.d, m.v))
    }
}

/// A pass in a place.
struct Here<'a> {
    model: &'a Model,
    place: &'a Place,
}

impl Learns for Here<'_> {
    fn keep_embeddings(&self, x: &Buffer) -> Result<()> {
        let (m, meeting) = (&self.model.dims, &self.place.meeting);
        match m.embedded_targets && !meeting.meets.is_empty() {
            true => self
                .model
                .lane
                .copy(meeting.u.at, x.at, self.place.t * m.d * 4),
            false => Ok(()),
        }
    }

    fn keeps(&self, layer: u32) -> (Address, Address) {
        let meeting = &self.place.meeting;
        match (
            meeting.meets.contains_key(&layer),
            self.model.dims.embedded_targets,
        ) {
            (false, _) => (0, 0),
            (true, true) => (meeting.z.at, 0),
            (true, false) => (meeting.z.at, meeting.u.at),
        }
    }

    fn learn(&mut self, layer: u32, act: Address, x: Address) -> Result<()> {
        let (m, meeting) = (&self.model.dims, &self.place.meeting);
        let kernel = self.model.lane.kernel("meet_rows", Some(m.format));
        let down = self.model.layers[layer as usize].down.at;
        launch!(self.model.lane, kernel, (self.place.t, m.d.div_ceil(4), 1), 128, 0;
            meeting.meets[&layer], down, act, meeting.z.at, meeting.u.at, x, m.d as i32, m.f as i32)
    }
}

/// What rows meet at a layer that learns, and where they wait if their chunk is learned from.
fn meets(
    model: &Model,
    learning: &Learning,
    parts: &mut [Part],
    layer: u32,
    t: usize,
) -> Result<Vec<Meets>> {
    let m = &model.dims;
    let mut meets = vec![Meets::default(); t];
    for run in learning.rounds.iter().flatten() {
        let Some(fast) = parts[run.part].sequence.fast.get_mut(&layer) else {
            continue;
        };
        let weight = fast.w.as_ref().map_or(0, |w| w.at);
        let waits = match run.waiting == run.position % m.chunk {
            true => Some(fast.waits(model)?),
            false => None,
        };
        for (i, row) in run.rows.clone().enumerate() {
            let at =
                |base: Address, width: usize| offset(base, (run.waiting + i) * width, Format::F32);
            meets[row] = Meets {
                weight,
                z: waits.map_or(0, |(z, _)| at(z, m.f)),
                u: waits.map_or(0, |(_, u)| at(u, m.d)),
            };
        }
    }
    Ok(meets)
}

/// Appends `data`, made up to `n` with `rest`.
fn append<T: Plain>(to: &mut Vec<u8>, data: &[T], n: usize, rest: T) {
    let rest = vec![rest; n - data.len()];
    for part in [data, &rest] {
        // SAFETY: `Plain` says that every byte is one of a number.
        to.extend_from_slice(unsafe {
            std::slice::from_raw_parts(part.as_ptr().cast(), size_of_val(part))
        });
    }
}
