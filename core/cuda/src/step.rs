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
        let rows = Rows::new(lane, (m.format, m.e), &ids, &spans)?;
        let mut learning = Learning::begin(self, parts, t)?;
        let size = m.format.bytes();
        let buffer = |width: usize, size: usize| lane.buffer(t * width * size);
        let x = buffer(m.d, 4)?;
        let (normed, qkv, q, mixed) = (
            buffer(m.d, size)?,
            buffer(m.qkv(), size)?,
            buffer(m.qd(), size)?,
            buffer(m.qd(), size)?,
        );
        let (gate_up, act) = (buffer(2 * m.f, size)?, buffer(m.f, size)?);
        self.embed_rows(rows.ids.at, x.at, t)?;
        learning.keep_embeddings(&x)?;
        for (layer, block) in self.layers.iter().enumerate() {
            self.norm(x.at, &block.input_norm, 0, normed.at, 0, t)?;
            self.linear(normed.at, block.qkv.at, qkv.at, t, (m.d, m.qkv()))?;
            self.rope(block, &rows, layer, qkv.at, q.at)?;
            self.attend(&rows, layer, q.at, mixed.at, 0)?;
            self.linear_f32(mixed.at, block.o.at, x.at, true, t, (m.qd(), m.d))?;
            let (z, u) = learning.keeps(layer as u32);
            self.norm(x.at, &block.post_norm, 0, normed.at, u, t)?;
            self.linear(normed.at, block.gate_up.at, gate_up.at, t, (m.d, 2 * m.f))?;
            self.swiglu(gate_up.at, act.at, z, t)?;
            match z {
                0 => self.linear_f32(act.at, block.down.at, x.at, true, t, (m.f, m.d))?,
                _ => learning.learn(layer as u32, parts, (act.at, x.at))?,
            }
        }
        self.logits(&x, wanted, logits)?;
        let learned = learning.end(parts)?;
        lane.wait()?;
        Ok(learned)
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
