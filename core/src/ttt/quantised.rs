//! The update of a chunk in a student of 8 or 4 bits: outer products in bytes, and the new weight packed as it is summed.
//!
//! Rows are taken in blocks of 32, all but the last of a chunk ahead of its edge where there is time. Both the blocks and the order
//! of the sums are fixed by positions, so the weight does not depend, to the bit, on what was done when.

use super::rule::decay_part;
use super::state::StartWeight;
use super::{Forgetting, TttConfig};
use crate::kernels::{squared_distance, OuterQ8, PackedQ8, Pool, SharedMut, PANEL_ROWS};

/// Rows that are quantised together.
pub(super) const BLOCK_ROWS: usize = 32;

/// What a chunk has to add, and how much of it is in the coming weight already.
#[derive(Clone)]
pub(super) struct Terms {
    /// The chunk's blocks up to the last one.
    first: OuterQ8,
    last: OuterQ8,
    /// Whether any target so far was not zero.
    pub any: bool,
    /// Panels of the coming weight that hold the first blocks already.
    panels: usize,
}

/// Rows of a chunk that stand in blocks before its last one.
pub(super) fn first_rows(chunk_len: usize) -> usize {
    (chunk_len - 1) / BLOCK_ROWS * BLOCK_ROWS
}

impl Terms {
    pub fn new(shape: (usize, usize), chunk_len: usize) -> Self {
        let rows = first_rows(chunk_len);
        Self {
            first: OuterQ8::new(shape, rows),
            last: OuterQ8::new(shape, chunk_len - rows),
            any: false,
            panels: 0,
        }
    }

    pub fn bytes(&self) -> usize {
        self.first.bytes() + self.last.bytes()
    }

    /// Begins another chunk.
    pub fn clear(&mut self) {
        self.any = false;
        self.panels = 0;
    }

    /// Takes in rows from row `from` of the chunk on, whole blocks or up to its end: v (n, d), z (n, f).
    pub fn fill(
        &mut self,
        pool: Option<&Pool>,
        from: usize,
        (d, f): (usize, usize),
        v: &[f32],
        z: &[f32],
    ) {
        let first = (self.first.blocks() * BLOCK_ROWS).saturating_sub(from);
        let first = first.min(v.len() / d);
        let (v, last_v) = v.split_at(first * d);
        let (z, last_z) = z.split_at(first * f);
        if !v.is_empty() {
            self.first.fill(pool, from / BLOCK_ROWS, v, z);
        }
        if !last_v.is_empty() {
            self.last.fill(pool, 0, last_v, last_z);
        }
    }

    /// Brings up to `count` more panels of the coming weight to where the first blocks leave them.
    pub fn add_first(
        &mut self,
        pool: Option<&Pool>,
        (d, f): (usize, usize),
        lr: f32,
        (now, coming): (&[f32], &mut [f32]),
        count: usize,
    ) {
        let panels = d.div_ceil(PANEL_ROWS);
        let from = self.panels;
        let count = count.min(panels - from);
        let coming = SharedMut::new(coming);
        let run = |i: usize| {
            let rows = (from + i) * PANEL_ROWS..d.min((from + i + 1) * PANEL_ROWS);
            // SAFETY: a panel's rows belong to one part.
            let to = unsafe { coming.slice(rows.start * f, rows.len() * f) };
            to.copy_from_slice(&now[rows.start * f..rows.end * f]);
            self.first.add_to(rows, lr, to);
        };
        match pool {
            Some(pool) if count > 1 => pool.run(count, run),
            _ => (0..count).for_each(run),
        }
        self.panels += count;
    }

    /// Ends the chunk: what is not yet in the coming weight is added, the sum decayed where the rule does, and the whole packed. `now` is what the panels without the first
    /// blocks begin from; without it they stand in `coming`. Returns the distance from the trained weight.
    pub fn finish(
        &mut self,
        pool: Option<&Pool>,
        start: &StartWeight,
        config: &TttConfig,
        (now, coming): (Option<&[f32]>, &mut [f32]),
        packed: &mut PackedQ8,
    ) -> f64 {
        let (_, f) = start.shape();
        let lr = config.lr;
        let done = self.panels * PANEL_ROWS;
        let squares = packed.refill(pool, coming, |rows, to| {
            let here = rows.start * f..rows.end * f;
            if rows.start >= done {
                if let Some(now) = now {
                    to.copy_from_slice(&now[here.clone()]);
                }
                OuterQ8::add_all_to([&self.first, &self.last], rows, lr, to);
            } else {
                self.last.add_to(rows, lr, to);
            }
            if let Forgetting::Decay(kept) = config.forgets {
                decay_part(&start.weight()[here.clone()], kept, to);
            }
            squared_distance(to, &start.weight()[here])
        });
        self.clear();
        squares.sqrt()
    }

    /// Adds a whole chunk to a sum.
    pub fn add_all(&self, pool: Option<&Pool>, (d, f): (usize, usize), lr: f32, sum: &mut [f32]) {
        let sum = SharedMut::new(sum);
        let run = |panel: usize| {
            let rows = panel * PANEL_ROWS..d.min((panel + 1) * PANEL_ROWS);
            // SAFETY: a panel's rows belong to one part.
            let to = unsafe { sum.slice(rows.start * f, rows.len() * f) };
            OuterQ8::add_all_to([&self.first, &self.last], rows, lr, to);
        };
        let panels = d.div_ceil(PANEL_ROWS);
        match pool {
            Some(pool) => pool.run(panels, run),
            None => (0..panels).for_each(run),
        }
    }
}
