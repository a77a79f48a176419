//! A step of serving: new tokens of a batch through all blocks, logits of the rows that are asked for.

use std::sync::Arc;

use crate::attention::Rows;
use crate::card::{Buffer, Format};
use crate::driver::{Address, Fault, Result};
use crate::learn::Learning;
use crate::model::Model;
use crate::sequence::Sequence;
use crate::table::Learned;

/// Rows of logits on the card at a time.
const LOGIT_ROWS: usize = 256;

/// New tokens of one sequence.
pub struct Part<'a> {
    pub sequence: &'a mut Sequence,
    pub tokens: &'a [u32],
    pub off: bool,
    pub lr: f32,
}

/// What a pass through the blocks is made in, for so many rows.
pub struct Work {
    t: usize,
    pub x: Buffer,
    normed: Buffer,
    qkv: Buffer,
    q: Buffer,
    mixed: Buffer,
    gate_up: Buffer,
    act: Buffer,
}

impl Work {
    pub fn new(model: &Model, t: usize) -> Result<Self> {
        let m = &model.dims;
        let buffer = |width: usize, size: usize| model.lane.buffer(t * width * size);
        let size = m.format.bytes();
        Ok(Self {
            t,
            x: buffer(m.d, 4)?,
            normed: buffer(m.d, size)?,
            qkv: buffer(m.qkv(), size)?,
            q: buffer(m.qd(), size)?,
            mixed: buffer(m.qd(), size)?,
            gate_up: buffer(2 * m.f, size)?,
            act: buffer(m.f, size)?,
        })
    }
}

/// What a pass does at the layers that learn.
pub trait Learns {
    /// Keeps the embeddings x (t, d) where targets are made from them.
    fn keep_embeddings(&self, x: &Buffer) -> Result<()>;
    /// Where this layer's activations and normed inputs are wanted in `f32`; 0 for not. With a 0 for the first it is a plain layer.
    fn keeps(&self, layer: u32) -> (Address, Address);
    /// `x += down(z)`, each row by the weight that it meets. `act`: z in the model's format.
    fn learn(&mut self, layer: u32, act: Address, x: Address) -> Result<()>;
}

impl Model {
    /// Reads the tokens; `logits` gets those of `wanted` rows (n, v). After an error the sequences are not to be used.
    pub fn step(
        self: &Arc<Self>,
        parts: &mut [Part],
        wanted: &[u32],
        logits: &mut [f32],
    ) -> Result<Vec<Learned>> {
        let (m, lane) = (&self.dims, &self.lane);
        let (mut ids, mut spans) = (Vec::new(), Vec::new());
        for part in &mut *parts {
            let Part {
                sequence, tokens, ..
            } = part;
            let end = sequence.len + tokens.len();
            if end > m.positions
                || tokens.iter().any(|id| *id as usize >= m.v)
                || !Arc::ptr_eq(&sequence.model, self)
            {
                return Err(Fault::refused(format!(
                    "tokens up to {end} of a model of {} positions and {} words",
                    m.positions, m.v
                )));
            }
            sequence.reserve(end)?;
            spans.push(sequence.span(ids.len(), tokens.len()));
            ids.extend_from_slice(tokens);
        }
        let t = ids.len();
        if wanted.iter().any(|row| *row as usize >= t) || logits.len() != wanted.len() * m.v {
            return Err(Fault::refused("logits of rows that are not there"));
        }
        if self.small_step(parts, (&ids, &spans), wanted, logits)? {
            return Ok(Vec::new());
        }
        let rows = Rows::new(lane, (m.format, m.e), &ids, &spans)?;
        let mut learning = Learning::begin(self, parts, t)?;
        let work = Work::new(self, t)?;
        self.pass(&rows, &work, &mut learning.over(parts))?;
        self.logits(&work.x, wanted, logits)?;
        let learned = learning.end(parts)?;
        lane.wait()?;
        Ok(learned)
    }

    /// All rows through all blocks: what comes out is `work.x`.
    pub fn pass(&self, rows: &Rows, work: &Work, learns: &mut impl Learns) -> Result<()> {
        let (m, t) = (&self.dims, work.t);
        let (x, normed, act) = (work.x.at, work.normed.at, work.act.at);
        self.embed_rows(rows.ids.at, x, t)?;
        learns.keep_embeddings(&work.x)?;
        for (layer, block) in self.layers.iter().enumerate() {
            let made = (normed, work.qkv.at);
            self.normed_linear((x, &block.input_norm), block.qkv.at, made, t, m.qkv())?;
            self.rope(block, rows, layer, work.qkv.at, work.q.at)?;
            self.attend(rows, layer, work.q.at, work.mixed.at, 0)?;
            self.linear_f32(work.mixed.at, block.o.at, x, true, t, (m.qd(), m.d))?;
            let (z, u) = learns.keeps(layer as u32);
            let made = (normed, work.gate_up.at, act);
            self.gated((x, &block.post_norm), block.gate_up.at, made, (u, z), t)?;
            match z {
                0 => self.linear_f32(act, block.down.at, x, true, t, (m.f, m.d))?,
                _ => learns.learn(layer as u32, act, x)?,
            }
        }
        Ok(())
    }

    fn logits(&self, x: &Buffer, wanted: &[u32], logits: &mut [f32]) -> Result<()> {
        let (m, lane) = (&self.dims, &self.lane);
        for (rows, out) in wanted
            .chunks(LOGIT_ROWS)
            .zip(logits.chunks_mut(LOGIT_ROWS * m.v))
        {
            let n = rows.len();
            let list = lane.upload(rows)?;
            let normed = lane.buffer(n * m.d * m.format.bytes())?;
            let scores = lane.buffer(n * m.v * Format::F32.bytes())?;
            self.norm(x.at, &self.final_norm, list.at, normed.at, 0, n)?;
            self.linear_f32(normed.at, self.head().at, scores.at, false, n, (m.d, m.v))?;
            lane.get(scores.at, out)?;
        }
        Ok(())
    }
}

/// An address so many numbers on.
pub fn offset(at: Address, numbers: usize, format: Format) -> Address {
    at + (numbers * format.bytes()) as Address
}
