//! Causal grouped-query attention over packed sequences, forward. Keys and values are read where they lie; scores
//! exist for one block of queries and one block of keys at a time (FlashAttention, arXiv:2205.14135).
//!
//! Keys stand in blocks of sixteen, transposed, so that one register holds the same element of sixteen keys: [`KeyLayout`].

use std::cell::RefCell;
use std::ops::Range;

use super::lanes::{on_lanes, Lanes, OnLanes, LANES};
use super::pool::{Pool, SharedMut};

/// Heads of an attention layer: `h` query heads share `g` key/value heads of `e` numbers each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
}

impl AttentionShape {
    pub(super) fn group(&self) -> usize {
        self.num_attention_heads / self.num_key_value_heads
    }

    /// Where the keys of a sequence stand.
    pub fn keys(&self) -> KeyLayout {
        KeyLayout {
            heads: self.num_key_value_heads,
            head_dim: self.head_dim,
        }
    }
}

/// Keys of a sequence as (s / 16, g, e, 16): element `c` of head `i` of key `j` is number `j % 16` of line (j / 16, i, c).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyLayout {
    heads: usize,
    head_dim: usize,
}

impl KeyLayout {
    /// Numbers that `keys` keys take: whole blocks.
    pub fn len(&self, keys: usize) -> usize {
        self.whole_blocks(keys) * self.heads * self.head_dim
    }

    /// Keys in as many blocks as `keys` keys take.
    pub fn whole_blocks(&self, keys: usize) -> usize {
        keys.next_multiple_of(LANES)
    }

    /// Writes `rows` (n, g, e) as the keys `pos..pos + n`.
    ///
    /// # Panics
    /// If they do not fit.
    pub fn write(&self, keys: &mut [f32], pos: usize, rows: &[f32]) {
        // SAFETY: the borrow is exclusive.
        unsafe { self.write_shared(&SharedMut::new(keys), pos, rows) }
    }

    /// The first keys as `rows` (n, g, e), so many as fit there.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn read(&self, keys: &[f32], rows: &mut [f32]) {
        let width = self.heads * self.head_dim;
        for (j, row) in rows.chunks_exact_mut(width).enumerate() {
            let block = &keys[j / LANES * width * LANES..];
            for (c, x) in row.iter_mut().enumerate() {
                *x = block[c * LANES + j % LANES];
            }
        }
    }

    /// [`Self::write`] while other threads write other keys.
    ///
    /// # Safety
    /// No other thread writes these keys or reads them.
    ///
    /// # Panics
    /// If they do not fit.
    pub unsafe fn write_shared(&self, keys: &SharedMut<f32>, pos: usize, rows: &[f32]) {
        let width = self.heads * self.head_dim;
        let end = pos + rows.len() / width;
        assert!(self.len(end) <= keys.len(), "keys up to {end} do not fit");
        for (j, row) in (pos..).zip(rows.chunks_exact(width)) {
            let first = j / LANES * width * LANES + j % LANES;
            for (c, x) in row.iter().enumerate() {
                // SAFETY: inside by the assertion above; a key's elements belong to this thread.
                unsafe { keys.as_ptr().add(first + c * LANES).write(*x) };
            }
        }
    }
}

/// One sequence of a packed batch: queries in rows `row..row + len`, standing at positions `pos..pos + len`;
/// `k` in [`KeyLayout`] and `v` (pos + len, g, e) hold its keys and values from position 0 on.
#[derive(Clone, Copy)]
pub struct Span<'a> {
    pub row: usize,
    pub len: usize,
    pub pos: usize,
    pub k: &'a [f32],
    pub v: &'a [f32],
}

/// Rows of a packed batch that attend as one sequence: `len` rows from `row` on, behind the rows `before`, which other sequences may
/// stand behind too.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpanRows {
    pub row: usize,
    pub len: usize,
    pub before: Vec<Range<usize>>,
}

impl SpanRows {
    /// Position of the first of the rows: how many stand before it.
    pub fn pos(&self) -> usize {
        self.before.iter().map(ExactSizeIterator::len).sum()
    }

    /// The sequence's rows up to the last of these, in order.
    pub fn all(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        let own = self.row..self.row + self.len;
        self.before.iter().cloned().chain([own])
    }
}

/// Positions of the queries whose scores are in memory at a time.
const QUERY_BLOCK: usize = 64;
/// Keys whose scores are in memory at a time. Blocks begin at its multiples, so that a query's result does not depend on what it
/// was computed together with.
const KEY_BLOCK: usize = 128;
/// Queries side by side where registers are many: twelve by two blocks of keys are 24 sums.
const QUERY_LINE: usize = 12;

thread_local! {
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

pub(super) fn with_scratch<R>(len: usize, body: impl FnOnce(&mut [f32]) -> R) -> R {
    SCRATCH.with_borrow_mut(|buffer| {
        if buffer.len() < len {
            buffer.resize(len, 0.0);
        }
        body(&mut buffer[..len])
    })
}

/// `out = softmax(q kᵀ / √e + causal mask) v` for each span and head. Shapes: q, out (t, h, e), t the rows of all spans together.
///
/// # Panics
/// If a span reaches outside its buffers.
pub fn attention(
    pool: Option<&Pool>,
    shape: AttentionShape,
    q: &[f32],
    spans: &[Span],
    out: &mut [f32],
) {
    let items: Vec<(usize, usize, usize)> = spans
        .iter()
        .enumerate()
        .flat_map(|(i, span)| {
            (0..shape.num_key_value_heads).flat_map(move |head| {
                (0..span.len)
                    .step_by(QUERY_BLOCK)
                    .map(move |q0| (i, head, q0))
            })
        })
        .collect();
    assert!(out.len() >= q.len());
    let out = SharedMut::new(out);
    let run = |item: usize| {
        let (i, head, q0) = items[item];
        let count = QUERY_BLOCK.min(spans[i].len - q0);
        // SAFETY: these rows of this group of heads belong to this item alone.
        unsafe { attend(shape, q, &spans[i], head, (q0, count), &out) };
    };
    match pool {
        Some(pool) if items.len() > 1 => pool.run(items.len(), run),
        _ => (0..items.len()).for_each(run),
    }
}

/// [`attention`] for the rows `rows` of a batch alone, on the calling thread. `q` and `out` hold those rows and no others.
pub fn attention_of_rows(
    shape: AttentionShape,
    q: &[f32],
    spans: &[Span],
    rows: Range<usize>,
    out: &mut [f32],
) {
    assert!(out.len() >= q.len());
    let out = SharedMut::new(out);
    for span in spans {
        let (from, to) = (rows.start.max(span.row), rows.end.min(span.row + span.len));
        let part = Span {
            row: from.wrapping_sub(rows.start),
            len: to.saturating_sub(from),
            pos: span.pos + from.saturating_sub(span.row),
            ..*span
        };
        for q0 in (0..part.len).step_by(QUERY_BLOCK) {
            let count = QUERY_BLOCK.min(part.len - q0);
            for head in 0..shape.num_key_value_heads {
                // SAFETY: one thread.
                unsafe { attend(shape, q, &part, head, (q0, count), &out) };
            }
        }
    }
}

/// The `count` queries from `q0` on of a span, for the query heads that share the key/value head `kv_head`.
///
/// # Safety
/// No other thread writes these rows of these heads of `out` or reads them.
unsafe fn attend(
    shape: AttentionShape,
    q: &[f32],
    span: &Span,
    kv_head: usize,
    (q0, count): (usize, usize),
    out: &SharedMut<f32>,
) {
    let (e, group) = (shape.head_dim, shape.group());
    let width = shape.num_attention_heads * e;
    let kv_width = shape.num_key_value_heads * e;
    let pos = span.pos + q0;
    let s = pos + count;
    assert!(
        span.k.len() >= shape.keys().len(s)
            && span.v.len() >= s * kv_width
            && q.len() >= (span.row + q0 + count) * width,
        "a span outside its buffers"
    );
    let m = count * group;
    let most = m.next_multiple_of(QUERY_LINE);
    with_scratch(m * (e + 2) + most * (e + KEY_BLOCK), |scratch| {
        let (queries, rest) = scratch.split_at_mut(most * e);
        let (sums, rest) = rest.split_at_mut(m * e);
        let (scores, rest) = rest.split_at_mut(most * KEY_BLOCK);
        let (largest, total) = rest.split_at_mut(m);
        let first = |r: usize| (span.row + q0 + r) * width + kv_head * group * e;
        sums.fill(0.0);
        largest.fill(f32::NEG_INFINITY);
        total.fill(0.0);
        on_lanes(Attend {
            e,
            group,
            pos,
            count,
            kv_width,
            q: &q[first(0)..],
            width,
            keys: &span.k[kv_head * e * LANES..],
            values: &span.v[kv_head * e..],
            queries,
            scores,
            sums: &mut *sums,
            largest,
            total,
        });
        for (r, from) in sums.chunks_exact(group * e).enumerate() {
            // SAFETY: the caller's promise.
            let to = unsafe { out.slice(first(r), group * e) };
            for (head, (to, from)) in to.chunks_mut(e).zip(from.chunks(e)).enumerate() {
                let inverse = 1.0 / total[r * group + head];
                for (to, from) in to.iter_mut().zip(from) {
                    *to = from * inverse;
                }
            }
        }
    })
}

/// Running softmax over blocks of keys. Row `r · group + i` is query `r` in head `i` of the group.
struct Attend<'a> {
    e: usize,
    group: usize,
    /// Position of the first query.
    pos: usize,
    count: usize,
    /// Numbers from one value to the next; a block of keys takes sixteen times as many.
    kv_width: usize,
    /// From this head's first on.
    keys: &'a [f32],
    values: &'a [f32],
    /// The first query's first head of the group, and the numbers from one query to the next.
    q: &'a [f32],
    width: usize,
    /// Queries divided by √e, some rows a line: (rows / n, e, n).
    queries: &'a mut [f32],
    /// (rows, KEY_BLOCK)
    scores: &'a mut [f32],
    /// (rows, e): Σ exp(score - largest) · value
    sums: &'a mut [f32],
    largest: &'a mut [f32],
    total: &'a mut [f32],
}

impl OnLanes for Attend<'_> {
    type Out = ();

    #[inline(always)]
    fn run<L: Lanes>(mut self) {
        let end = self.pos + self.count;
        let line = match self.rows() {
            QUERY_LINE.. if L::SUMS >= 24 => QUERY_LINE,
            6.. if L::SUMS >= 6 => 6,
            3.. => 3,
            _ => 1,
        };
        self.pack_queries(line);
        for first_key in (0..end).step_by(KEY_BLOCK) {
            let keys = KEY_BLOCK.min(end - first_key);
            // Queries before the block see none of it.
            let row = first_key.saturating_sub(self.pos) * self.group;
            // SAFETY: `attend` checked that keys and values up to `end` are there, keys up to whole blocks, and made the scratch.
            unsafe {
                self.score::<L>(line, row / line, first_key, keys);
                self.softmax::<L>(row, first_key, keys);
                self.add_values::<L>(row, first_key, keys);
            }
        }
    }
}

impl Attend<'_> {
    fn rows(&self) -> usize {
        self.count * self.group
    }

    /// Keys of the block that row `row` sees.
    #[inline(always)]
    fn visible(&self, row: usize, first_key: usize, keys: usize) -> usize {
        (self.pos + row / self.group + 1 - first_key).min(keys)
    }

    #[inline(always)]
    fn pack_queries(&mut self, line: usize) {
        let scale = 1.0 / (self.e as f32).sqrt();
        let rows = self.rows();
        for (i, lines) in self.queries.chunks_exact_mut(line * self.e).enumerate() {
            for r in 0..line {
                // What fills up the last line is computed and never looked at.
                let row = (i * line + r).min(rows - 1);
                let at = row / self.group * self.width + row % self.group * self.e;
                let from = &self.q[at..at + self.e];
                for (to, from) in lines[r..].iter_mut().step_by(line).zip(from) {
                    *to = from * scale;
                }
            }
            if (i + 1) * line >= rows {
                break;
            }
        }
    }

    /// Scores of the rows from line `first` of the queries on.
    ///
    /// # Safety
    /// The keys are there up to whole blocks of sixteen, and the scratch has its lengths.
    #[inline(always)]
    unsafe fn score<L: Lanes>(&mut self, line: usize, first: usize, first_key: usize, keys: usize) {
        let blocks = keys.div_ceil(LANES);
        for i in first..self.rows().div_ceil(line) {
            let mut block = 0;
            while block < blocks {
                let left = blocks - block;
                // SAFETY: the caller's promise, and so many blocks are left.
                unsafe {
                    block += match line {
                        QUERY_LINE if L::SUMS >= 24 => match left {
                            2.. => self.score_tile::<L, QUERY_LINE, 2>(i, first_key, block),
                            _ => self.score_tile::<L, QUERY_LINE, 1>(i, first_key, block),
                        },
                        6 if L::SUMS >= 6 => match left {
                            4.. if L::SUMS >= 24 => self.score_tile::<L, 6, 4>(i, first_key, block),
                            _ => self.score_tile::<L, 6, 1>(i, first_key, block),
                        },
                        3 => match left {
                            4.. if L::SUMS >= 24 => self.score_tile::<L, 3, 4>(i, first_key, block),
                            _ => self.score_tile::<L, 3, 1>(i, first_key, block),
                        },
                        _ => match left {
                            4.. if L::SUMS >= 6 => self.score_tile::<L, 1, 4>(i, first_key, block),
                            _ => self.score_tile::<L, 1, 1>(i, first_key, block),
                        },
                    }
                }
            }
        }
    }

    /// Scores of line `line` of `R` queries and `B` blocks of keys; returns `B`.
    ///
    /// # Safety
    /// That line of queries and blocks `block..block + B` of the keys from `first_key` on are there.
    #[inline(always)]
    unsafe fn score_tile<L: Lanes, const R: usize, const B: usize>(
        &mut self,
        line: usize,
        first_key: usize,
        block: usize,
    ) -> usize {
        let e = self.e;
        let stride = self.kv_width * LANES;
        // SAFETY: the caller's promise.
        unsafe {
            let mut keys = self.keys.as_ptr().add((first_key / LANES + block) * stride);
            let mut queries = self.queries.as_ptr().add(line * R * e);
            let mut sums = [[L::splat(0.0); B]; R];
            for _ in 0..e {
                let mut lines = [L::splat(0.0); B];
                for (b, line) in lines.iter_mut().enumerate() {
                    *line = L::load(keys.add(b * stride));
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let query = L::splat(*queries.add(r));
                    for (sum, line) in sums.iter_mut().zip(lines) {
                        *sum = query.mul_add(line, *sum);
                    }
                }
                keys = keys.add(LANES);
                queries = queries.add(R);
            }
            for (r, sums) in sums.iter().enumerate() {
                for (b, sum) in sums.iter().enumerate() {
                    let at = (line * R + r) * KEY_BLOCK + (block + b) * LANES;
                    sum.store(self.scores.as_mut_ptr().add(at));
                }
            }
        }
        B
    }

    /// Scores to exp(score - largest so far), with what was summed up before brought to the new largest.
    ///
    /// # Safety
    /// The scratch has its lengths.
    #[inline(always)]
    unsafe fn softmax<L: Lanes>(&mut self, row: usize, first_key: usize, keys: usize) {
        let whole = keys.next_multiple_of(LANES);
        for row in row..self.rows() {
            let scores = &mut self.scores[row * KEY_BLOCK..][..whole];
            let visible = (self.pos + row / self.group + 1 - first_key).min(keys);
            scores[visible..].fill(f32::NEG_INFINITY);
            let mut top = L::splat(f32::NEG_INFINITY);
            for line in scores.as_chunks::<LANES>().0 {
                // SAFETY: a chunk has sixteen numbers.
                top = unsafe { L::load(line.as_ptr()) }.max(top);
            }
            let before = self.largest[row];
            let largest = before.max(top.largest());
            if largest > before {
                let shrink = (before - largest).exp();
                self.largest[row] = largest;
                self.total[row] *= shrink;
                if before > f32::NEG_INFINITY {
                    for sum in &mut self.sums[row * self.e..][..self.e] {
                        *sum *= shrink;
                    }
                }
            }
            let largest = L::splat(largest);
            let mut total = L::splat(0.0);
            for line in scores.as_chunks_mut::<LANES>().0 {
                // SAFETY: a chunk has sixteen numbers.
                unsafe {
                    let p = L::load(line.as_ptr()).sub(largest).exp();
                    p.store(line.as_mut_ptr());
                    total = total.add(p);
                }
            }
            self.total[row] += total.sum();
        }
    }

    /// # Safety
    /// The values are there, and the scratch has its lengths.
    #[inline(always)]
    unsafe fn add_values<L: Lanes>(&mut self, mut row: usize, first_key: usize, keys: usize) {
        let columns = self.e / LANES;
        // SAFETY: the caller's promise; `R` rows and `C` columns are left wherever they are taken.
        unsafe {
            while row < self.rows() {
                let left = self.rows() - row;
                let mut c = 0;
                if L::SUMS >= 24 {
                    while c + 4 <= columns {
                        match left {
                            6.. => self.value_tile::<L, 6, 4>(row, c, first_key, keys),
                            3.. => self.value_tile::<L, 3, 4>(row, c, first_key, keys),
                            _ => self.value_tile::<L, 1, 4>(row, c, first_key, keys),
                        }
                        c += 4;
                    }
                }
                while c < columns {
                    match left {
                        6.. if L::SUMS >= 6 => self.value_tile::<L, 6, 1>(row, c, first_key, keys),
                        3.. => self.value_tile::<L, 3, 1>(row, c, first_key, keys),
                        _ => self.value_tile::<L, 1, 1>(row, c, first_key, keys),
                    }
                    c += 1;
                }
                let rows = match left {
                    6.. if L::SUMS >= 6 => 6,
                    3.. => 3,
                    _ => 1,
                };
                if !self.e.is_multiple_of(LANES) {
                    self.add_rest(row, rows, columns * LANES, first_key, keys);
                }
                row += rows;
            }
        }
    }

    /// # Safety
    /// Rows `row..row + R`, columns `16 c..16 (c + C)` and the values from `first_key` on are there.
    #[inline(always)]
    unsafe fn value_tile<L: Lanes, const R: usize, const C: usize>(
        &mut self,
        row: usize,
        c: usize,
        first_key: usize,
        keys: usize,
    ) {
        // What a row of the tile does not see has probability 0.
        let seen = self.visible(row + R - 1, first_key, keys);
        // SAFETY: the caller's promise.
        unsafe {
            let at = first_key * self.kv_width + c * LANES;
            let values = self.values.as_ptr().add(at);
            let scores = self.scores.as_ptr().add(row * KEY_BLOCK);
            let out = self.sums.as_mut_ptr().add(row * self.e + c * LANES);
            let mut sums = [[L::splat(0.0); C]; R];
            for (r, sums) in sums.iter_mut().enumerate() {
                for (i, sum) in sums.iter_mut().enumerate() {
                    *sum = L::load(out.add(r * self.e + i * LANES));
                }
            }
            for j in 0..seen {
                let mut line = [L::splat(0.0); C];
                for (i, line) in line.iter_mut().enumerate() {
                    *line = L::load(values.add(j * self.kv_width + i * LANES));
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let p = L::splat(*scores.add(r * KEY_BLOCK + j));
                    for (sum, line) in sums.iter_mut().zip(line) {
                        *sum = p.mul_add(line, *sum);
                    }
                }
            }
            for (r, sums) in sums.iter().enumerate() {
                for (i, sum) in sums.iter().enumerate() {
                    sum.store(out.add(r * self.e + i * LANES));
                }
            }
        }
    }

    /// The columns from `column` on, fewer than sixteen.
    fn add_rest(&mut self, row: usize, rows: usize, column: usize, first_key: usize, keys: usize) {
        for row in row..row + rows {
            let seen = self.visible(row, first_key, keys);
            let scores = &self.scores[row * KEY_BLOCK..][..seen];
            for (j, p) in scores.iter().enumerate() {
                let value = &self.values[(first_key + j) * self.kv_width..][..self.e];
                let sums = &mut self.sums[row * self.e..][..self.e];
                for (sum, v) in sums[column..].iter_mut().zip(&value[column..]) {
                    *sum += p * v;
                }
            }
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::lanes::on_each_kind_of_lanes;
    use super::*;

    pub fn numbers(n: usize, seed: usize) -> Vec<f32> {
        (0..n)
            .map(|i| (((i + seed) * 7919 % 1009) as f32 - 504.0) / 504.0)
            .collect()
    }

    /// The definition, one query and one key at a time, in f64. The span's keys are (s, g, e) here.
    pub fn slow(shape: AttentionShape, q: &[f32], span: &Span) -> Vec<f32> {
        let (h, g, e) = (
            shape.num_attention_heads,
            shape.num_key_value_heads,
            shape.head_dim,
        );
        let mut out = vec![0.0; span.len * h * e];
        for r in 0..span.len {
            for head in 0..h {
                let kv = head / (h / g);
                let score = |j: usize| -> f64 {
                    (0..e)
                        .map(|c| {
                            q[((span.row + r) * h + head) * e + c] as f64
                                * span.k[(j * g + kv) * e + c] as f64
                        })
                        .sum::<f64>()
                        / (e as f64).sqrt()
                };
                let weights: Vec<f64> = (0..=span.pos + r).map(|j| score(j).exp()).collect();
                let sum: f64 = weights.iter().sum();
                for c in 0..e {
                    out[(r * h + head) * e + c] = weights
                        .iter()
                        .enumerate()
                        .map(|(j, w)| w / sum * span.v[(j * g + kv) * e + c] as f64)
                        .sum::<f64>() as f32;
                }
            }
        }
        out
    }

    pub const SHAPE: AttentionShape = AttentionShape {
        num_attention_heads: 6,
        num_key_value_heads: 2,
        head_dim: 8,
    };

    /// Prefill, decode and both in one batch: (new rows, rows before) of each sequence.
    fn check(shape: AttentionShape, lens: &[(usize, usize)], pool: Option<&Pool>) {
        let (h, e) = (shape.num_attention_heads, shape.head_dim);
        let width = shape.num_key_value_heads * e;
        let t: usize = lens.iter().map(|l| l.0).sum();
        let q = numbers(t * h * e, 3);
        let caches: Vec<_> = (0..lens.len())
            .map(|i| {
                let s = lens[i].0 + lens[i].1;
                let (k, v) = (numbers(s * width, 10 + i), numbers(s * width, 50 + i));
                // What stands behind the last key must not matter.
                let mut blocked = vec![f32::NAN; shape.keys().len(s)];
                shape.keys().write(&mut blocked, 0, &k[..lens[i].1 * width]);
                shape
                    .keys()
                    .write(&mut blocked, lens[i].1, &k[lens[i].1 * width..]);
                let mut again = vec![0.0; k.len()];
                shape.keys().read(&blocked, &mut again);
                assert_eq!(again, k);
                (k, blocked, v)
            })
            .collect();
        let (mut fast, mut plain, mut row) = (Vec::new(), Vec::new(), 0);
        for (&(len, pos), (k, blocked, v)) in lens.iter().zip(&caches) {
            let span = Span {
                row,
                len,
                pos,
                k,
                v,
            };
            plain.push(span);
            fast.push(Span { k: blocked, ..span });
            row += len;
        }
        let mut out = vec![9.0; q.len()];
        attention(pool, shape, &q, &fast, &mut out);
        for span in &plain {
            let want = slow(shape, &q, span);
            let got = &out[span.row * h * e..][..span.len * h * e];
            for (i, (g, w)) in got.iter().zip(&want).enumerate() {
                assert!(
                    (g - w).abs() < 1e-5,
                    "{shape:?} {lens:?} row {} number {i}: {g}, not {w}",
                    span.row
                );
            }
        }
        let middle = t / 3..t - t / 4;
        let range = middle.start * h * e..middle.end * h * e;
        let mut part = vec![9.0; range.len()];
        attention_of_rows(shape, &q[range.clone()], &fast, middle, &mut part);
        assert_eq!(
            part, out[range],
            "a row's result depends on its company: {lens:?}"
        );
    }

    #[test]
    fn attention_agrees_with_the_definition_for_prefill_decode_and_mixed_batches() {
        let pool = Pool::new(2, 0);
        let lens = [(70, 0), (1, 33), (3, 0), (130, 5), (1, 0), (1, 200)];
        check(SHAPE, &lens, Some(&pool));
        on_each_kind_of_lanes(|| {
            for (h, g, e) in [
                (6, 2, 8),
                (9, 3, 64),
                (4, 4, 16),
                (5, 1, 80),
                (8, 2, 128),
                (1, 1, 24),
            ] {
                let shape = AttentionShape {
                    num_attention_heads: h,
                    num_key_value_heads: g,
                    head_dim: e,
                };
                check(shape, &lens, None);
            }
        });
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]
        #[test]
        fn attention_agrees_with_the_definition_for_any_shape(
            group in 1usize..5, g in 1usize..4, e in 1usize..70, lens in proptest::collection::vec((1usize..80, 0usize..150), 1..4),
        ) {
            let shape = AttentionShape { num_attention_heads: group * g, num_key_value_heads: g, head_dim: e };
            on_each_kind_of_lanes(|| check(shape, &lens, None));
        }
    }
}
