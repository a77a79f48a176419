//! What belongs to one sequence: keys and values, and the weights of layers that learn while it is read.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::attention::Span;
use crate::card::Buffer;
use crate::driver::{Address, Fault, Result};
use crate::model::Model;
use crate::table::BEHIND;

/// Positions that room is made for at a time.
const BLOCK: usize = 64;

/// The state of a layer that learns, as `FastWeight` in core/src/ttt has it.
#[derive(Default)]
pub struct Fast {
    /// (d, f), once it is not the trained one any more.
    pub w: Option<Buffer>,
    /// What waits for the edge: (c, f) and (c, d), made at the first token that does.
    pub waiting: Option<(Buffer, Buffer)>,
    pub drift: f32,
}

impl Fast {
    /// Where a chunk's z (c, f) and u (c, d) wait for its edge.
    pub fn waits(&mut self, model: &Model) -> Result<(Address, Address)> {
        let (m, lane) = (&model.dims, &model.lane);
        let (z, u) = match self.waiting.take() {
            Some(both) => both,
            None => (
                lane.buffer(m.chunk * m.f * 4)?,
                lane.buffer(m.chunk * m.d * 4)?,
            ),
        };
        let at = (z.at, u.at);
        self.waiting = Some((z, u));
        Ok(at)
    }
}

pub struct Sequence {
    pub model: Arc<Model>,
    /// For each layer keys and values (capacity, g, e).
    kv: Option<Buffer>,
    capacity: usize,
    pub len: usize,
    pub learns: bool,
    pub fast: BTreeMap<u32, Fast>,
    /// Rows that wait, the same in all layers. None in a chunk that was entered without being read.
    pub waiting: usize,
}

impl Sequence {
    pub fn new(model: &Arc<Model>, capacity: usize, learns: bool) -> Result<Self> {
        let mut sequence = Self {
            model: model.clone(),
            kv: None,
            capacity: 0,
            len: 0,
            learns: learns && !model.starts.is_empty(),
            fast: BTreeMap::new(),
            waiting: 0,
        };
        if sequence.learns {
            sequence.fast = model
                .starts
                .keys()
                .map(|layer| (*layer, Fast::default()))
                .collect();
        }
        sequence.reserve(capacity)?;
        Ok(sequence)
    }

    /// Bytes of a layer's keys at this capacity; its values are as many.
    fn half(&self, capacity: usize) -> usize {
        capacity * self.model.dims.kd() * self.model.dims.format.bytes()
    }

    /// Makes room for so many positions.
    pub fn reserve(&mut self, positions: usize) -> Result<()> {
        if positions <= self.capacity && self.kv.is_some() {
            return Ok(());
        }
        let capacity = positions
            .max(self.capacity * 3 / 2)
            .max(1)
            .next_multiple_of(BLOCK);
        let layers = self.model.dims.layers;
        let kv = self.model.lane.buffer(layers * 2 * self.half(capacity))?;
        self.copy_kv(kv.at, capacity, self.len)?;
        (self.kv, self.capacity) = (Some(kv), capacity);
        Ok(())
    }

    fn copy_kv(&self, to: Address, capacity: usize, len: usize) -> Result<()> {
        let Some(kv) = &self.kv else { return Ok(()) };
        for half in 0..2 * self.model.dims.layers {
            let from = kv.at + (half * self.half(self.capacity)) as Address;
            let to = to + (half * self.half(capacity)) as Address;
            self.model.lane.copy(to, from, self.half(len))?;
        }
        Ok(())
    }

    /// Where kernels find its keys and values, with `n` new rows from `row` on.
    pub fn span(&self, row: usize, n: usize) -> Span {
        let half = self.half(self.capacity) as u64;
        Span {
            base: self.kv.as_ref().map_or(0, |kv| kv.at),
            layer_stride: 2 * half,
            v_offset: half,
            row: row as i32,
            len: n as i32,
            pos: self.len as i32,
            unused: 0,
        }
    }

    pub fn reset(&mut self) {
        for fast in self.fast.values_mut() {
            fast.w = None;
            fast.drift = 0.0;
        }
        self.waiting = 0;
    }

    /// Rows that would still wait after a cut to `len`.
    ///
    /// # Errors
    /// [`BEHIND`] if an update since then cannot be taken back.
    fn waiting_at(&self, len: usize) -> Result<usize> {
        if !self.learns || len >= self.len {
            return Ok(self.waiting);
        }
        let edge = self.len - self.len % self.model.dims.chunk;
        match len < edge {
            true => Err(Fault {
                status: BEHIND,
                why: format!("an update at {edge} cannot be taken back to {len}"),
            }),
            false => Ok(self.waiting.min(len - edge)),
        }
    }

    pub fn cut(&mut self, len: usize) -> Result<()> {
        self.waiting = self.waiting_at(len)?;
        self.len = self.len.min(len);
        Ok(())
    }

    /// A sequence that begins with this one's first `len` tokens.
    pub fn copy(&self, len: usize, capacity: usize) -> Result<Self> {
        let len = len.min(self.len);
        let waiting = self.waiting_at(len)?;
        let mut copy = Self::new(&self.model, capacity.max(len), self.learns)?;
        if let Some(kv) = &copy.kv {
            self.copy_kv(kv.at, copy.capacity, len)?;
        }
        let lane = &self.model.lane;
        let twin = |buffer: &Buffer| -> Result<Buffer> {
            let twin = lane.buffer(buffer.bytes)?;
            lane.copy(twin.at, buffer.at, buffer.bytes)?;
            Ok(twin)
        };
        for (layer, fast) in &self.fast {
            let waits = match (&fast.waiting, waiting) {
                (Some((z, u)), 1..) => Some((twin(z)?, twin(u)?)),
                _ => None,
            };
            let w = fast.w.as_ref().map(&twin).transpose()?;
            let drift = fast.drift;
            copy.fast.insert(
                *layer,
                Fast {
                    w,
                    waiting: waits,
                    drift,
                },
            );
        }
        (copy.len, copy.waiting) = (len, waiting);
        Ok(copy)
    }

    pub fn bytes(&self) -> u64 {
        let fast = |fast: &Fast| {
            let waiting = fast.waiting.as_ref().map_or(0, |(z, u)| z.bytes + u.bytes);
            waiting + fast.w.as_ref().map_or(0, |w| w.bytes)
        };
        let kv = self.kv.as_ref().map_or(0, |kv| kv.bytes);
        (kv + self.fast.values().map(fast).sum::<usize>()) as u64
    }
}
