//! Rows of a batch and the attention over them: which form it takes.

use std::sync::Arc;

use crate::card::{launch, or_null, Buffer, Format, Lane};
use crate::driver::{Address, Result};
use crate::model::{Layer, Model};

/// Queries of one tile.
const TILE_ROWS: usize = 64;
/// New rows of a sequence from which on tiles are worth their place.
const MIN_TILED: usize = 16;
/// Keys of one block where a long cache is split (attention.cu).
const SPLIT_KEYS: usize = 256;
const MOST_SPLITS: usize = 64;

/// Shared memory of a tile (attention.cu, backward.cu): four places of 64 rows, or three and the sums; scores and weights of four warps.
pub fn tile_bytes(kernel: &str, e: usize) -> usize {
    let (place, sums) = (64 * (e + 8) * 2, 64 * (e + 4) * 4);
    let (scores, weights) = (64 * (64 + 4) * 4, 64 * (64 + 8) * 2);
    match kernel {
        "attend_tile" => 3 * place + sums + scores + weights,
        "attend_dq_tile" => 4 * place + 2 * scores + weights,
        _ => 4 * place + 2 * 64 * 4 + 2 * scores + 2 * weights,
    }
}

/// New rows of one sequence, as kernels read it (common.cuh, `Span`).
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Span {
    pub base: u64,
    pub layer_stride: u64,
    pub v_offset: u64,
    pub row: i32,
    pub len: i32,
    pub pos: i32,
    pub unused: i32,
}

impl Span {
    pub fn nobody() -> Self {
        Self {
            base: 0,
            layer_stride: 0,
            v_offset: 0,
            row: 0,
            len: 0,
            pos: 0,
            unused: 0,
        }
    }
}

/// Where the rows of a batch stand, on the card.
pub struct Rows {
    pub t: usize,
    pub ids: Buffer,
    pub positions: Buffer,
    pub span_of: Buffer,
    pub spans: Buffer,
    /// Spans in tiles, and the rows of the others; `None` for all rows.
    tiles: Option<(Buffer, usize)>,
    by_row: Option<(Option<Buffer>, usize)>,
    /// Most keys of a row that goes by itself.
    keys: usize,
    /// Where blocks that share a row put their parts; `None`: made when wanted.
    parts: Option<Buffer>,
}

/// Whether a sequence's new rows go in tiles.
pub fn tiled(lane: &Lane, (format, e): (Format, usize), len: usize) -> bool {
    format == Format::Bf16 && len >= MIN_TILED && lane.card.has_tiles(e)
}

impl Rows {
    /// `ids` are the tokens of `spans`, one after another.
    pub fn new(
        lane: &Arc<Lane>,
        (format, e): (Format, usize),
        ids: &[u32],
        spans: &[Span],
    ) -> Result<Self> {
        let t = ids.len();
        let (mut positions, mut span_of) = (Vec::with_capacity(t), Vec::with_capacity(t));
        let (mut tiles, mut single, mut keys) = (Vec::new(), Vec::new(), 0);
        for (i, span) in spans.iter().enumerate() {
            let (row, len, pos) = (span.row as usize, span.len as usize, span.pos as usize);
            positions.extend((pos..pos + len).map(|p| p as u32));
            span_of.extend(std::iter::repeat_n(i as i32, len));
            match tiled(lane, (format, e), len) {
                true => tiles.extend(
                    (0..len)
                        .step_by(TILE_ROWS)
                        .map(|first| [i as i32, first as i32]),
                ),
                false => {
                    single.extend((row..row + len).map(|r| r as i32));
                    keys = keys.max(pos + len);
                }
            }
        }
        let by_row = match single.len() {
            0 => None,
            n if n == t => Some((None, n)),
            n => Some((Some(lane.upload(&single)?), n)),
        };
        Ok(Self {
            t,
            ids: lane.upload(ids)?,
            positions: lane.upload(&positions)?,
            span_of: lane.upload(&span_of)?,
            spans: lane.upload(spans)?,
            tiles: match tiles.len() {
                0 => None,
                n => Some((lane.upload(&tiles)?, n)),
            },
            by_row,
            keys,
            parts: None,
        })
    }

    /// Rows that all go by themselves, whatever their sequences' lengths: what is in the buffers may change from use to use.
    pub fn fixed(
        (ids, positions, span_of, spans): (Buffer, Buffer, Buffer, Buffer),
        t: usize,
        parts: Option<Buffer>,
    ) -> Self {
        Self {
            t,
            ids,
            positions,
            span_of,
            spans,
            tiles: None,
            by_row: Some((None, t)),
            keys: usize::MAX,
            parts,
        }
    }
}

impl Model {
    /// Rotates queries and keys of qkv (t, qkv), puts keys and values where their sequences keep them, and queries into q (t, h, e).
    pub fn rope(
        &self,
        block: &Layer,
        rows: &Rows,
        layer: usize,
        qkv: Address,
        q: Address,
    ) -> Result<()> {
        let m = &self.dims;
        let kernel = self.lane.kernel("rope_split", Some(m.format));
        launch!(self.lane, kernel, (rows.t, (m.h + 2 * m.g).div_ceil(4), 1), 128, 0;
            qkv, rows.positions.at, self.cos.at, self.sin.at, or_null(block.q_norm.as_ref()), or_null(block.k_norm.as_ref()),
            rows.span_of.at, rows.spans.at, layer as i32, q, m.h as i32, m.g as i32, m.e as i32, m.eps)
    }

    /// out (t, h, e) of q (t, h, e) over what each sequence has read so far; `lse` (t, h), unless 0, for the backward pass.
    pub fn attend(
        &self,
        rows: &Rows,
        layer: usize,
        q: Address,
        out: Address,
        lse: Address,
    ) -> Result<()> {
        let (m, lane) = (&self.dims, &self.lane);
        if let Some((tiles, n)) = &rows.tiles {
            launch!(lane, lane.tile_kernel("attend_tile", m.e), (*n, m.h, 1), 128, tile_bytes("attend_tile", m.e);
                q, rows.spans.at, tiles.at, layer as i32, out, lse, m.h as i32, m.g as i32, m.scale())?;
        }
        let Some((list, n)) = &rows.by_row else {
            return Ok(());
        };
        let splits = match lse {
            0 => self.splits(*n).min(rows.keys.div_ceil(SPLIT_KEYS)).max(1),
            _ => 1,
        };
        let made;
        let parts = match (splits, &rows.parts) {
            (1, _) => 0,
            (_, Some(parts)) => parts.at,
            (_, None) => {
                made = lane.buffer(self.parts_bytes(*n, splits))?;
                made.at
            }
        };
        let list = or_null(list.as_ref());
        launch!(lane, lane.kernel(by_width(m.e, ROWS), Some(m.format)), (*n, m.h, splits), 128, 0;
            q, list, rows.span_of.at, rows.spans.at, layer as i32, out, lse, parts, self.arrived.at,
            m.h as i32, m.g as i32, m.e as i32, m.scale())
    }

    /// dq (t, h, e), dk and dv (t, g, e) in `f32`, of whole sequences: q, what attention's output has of gradient, its `lse`, and `dots`
    /// (t, h) of that output and gradient; spans as the layer's keys and values have them.
    pub fn attend_back(
        &self,
        rows: &Rows,
        spans: &Buffer,
        (q, dout, lse, dots): (Address, Address, Address, Address),
        (dq, dk, dv): (Address, Address, Address),
    ) -> Result<()> {
        let (m, lane) = (&self.dims, &self.lane);
        let shape = (m.h as i32, m.g as i32, m.e as i32);
        if let Some((tiles, n)) = &rows.tiles {
            let (of_q, of_kv) = ("attend_dq_tile", "attend_dkv_tile");
            launch!(lane, lane.tile_kernel(of_q, m.e), (*n, m.h, 1), 128, tile_bytes(of_q, m.e);
                q, dout, lse, dots, spans.at, tiles.at, dq, shape.0, shape.1, m.scale())?;
            launch!(lane, lane.tile_kernel(of_kv, m.e), (*n, m.g, 1), 128, tile_bytes(of_kv, m.e);
                q, dout, lse, dots, spans.at, tiles.at, dk, dv, shape.0, shape.1, m.scale())?;
        }
        let Some((list, n)) = &rows.by_row else {
            return Ok(());
        };
        let list = or_null(list.as_ref());
        let kernel = |names| lane.kernel(by_width(m.e, names), Some(m.format));
        launch!(lane, kernel(QUERIES_BACK), (*n, m.h, 1), 128, 0;
            q, dout, lse, dots, list, rows.span_of.at, spans.at, dq, shape.0, shape.1, shape.2, m.scale())?;
        launch!(lane, kernel(KEYS_BACK), (*n, m.g, 1), 128, 0;
            q, dout, lse, dots, list, rows.span_of.at, spans.at, dk, dv, shape.0, shape.1, shape.2, m.scale())
    }

    /// Blocks over which a row is split at most: as many as keep the card busy. The same for all numbers of rows that a step of fixed
    /// size is made for, so that it computes what any other step does.
    pub fn splits(&self, n: usize) -> usize {
        let blocks = n.next_power_of_two() * self.dims.h;
        busy(&self.lane).div_ceil(blocks).clamp(1, MOST_SPLITS)
    }

    pub fn parts_bytes(&self, n: usize, splits: usize) -> usize {
        n * self.dims.h * splits * (self.dims.e + 2) * 4
    }
}

/// Blocks that keep a card busy: rows and heads that are split are fewer.
pub fn busy(lane: &Lane) -> usize {
    4 * lane.card.multiprocessors()
}

const ROWS: [&str; 4] = ["attend_row1", "attend_row2", "attend_row4", "attend_row8"];
const QUERIES_BACK: [&str; 4] = ["attend_dq1", "attend_dq2", "attend_dq4", "attend_dq8"];
const KEYS_BACK: [&str; 4] = ["attend_dkv1", "attend_dkv2", "attend_dkv4", "attend_dkv8"];

/// The kernel for heads of this width.
fn by_width(e: usize, names: [&'static str; 4]) -> &'static str {
    match e.div_ceil(32) {
        1 => names[0],
        2 => names[1],
        3 | 4 => names[2],
        _ => names[3],
    }
}
