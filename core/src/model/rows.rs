//! Where the tokens of a training batch stand: sequences in packed rows, what several of them begin with once.

use std::ops::Range;

use super::KvCache;
use crate::kernels::{Buffer, Pool, SpanRows};

/// Fewest tokens of a shared beginning that are worth a span of their own.
const MIN_SHARED: usize = 16;

/// Where sequences stand in a packed batch, for training, all from position 0.
#[derive(Clone, Default)]
pub struct PackedRows<'a> {
    /// What attends as one: a sequence, or a part of it behind what it shares with others.
    pub spans: Vec<SpanRows>,
    pub positions: Vec<u32>,
    /// For each sequence, in the order given, the rows of its tokens in theirs.
    pub sequences: Vec<Vec<Range<usize>>>,
    /// What the one sequence has read before: keys and values of so many positions, constants to the backward pass.
    past: Option<(&'a KvCache, usize)>,
}

impl<'a> PackedRows<'a> {
    /// `len` tokens of a sequence behind the first `pos` positions that its cache holds.
    pub fn after(cache: &'a KvCache, pos: usize, len: usize) -> Self {
        let first = cache.len() - cache.held() + pos;
        // In keys and values they stand behind the rows themselves.
        let past = len..len + pos;
        let span = SpanRows {
            row: 0,
            len,
            before: Vec::from([past]),
        };
        Self {
            spans: vec![span],
            positions: (first as u32..(first + len) as u32).collect(),
            sequences: vec![vec![0..len]],
            past: Some((cache, pos)),
        }
    }

    /// A layer's keys and values (t, g, e) with those of what was read before behind them.
    pub(super) fn with_past(
        &self,
        pool: &Pool,
        layer: usize,
        (k, v): (Buffer, Buffer),
    ) -> (Buffer, Buffer) {
        let Some((cache, pos)) = self.past else {
            return (k, v);
        };
        let all = k.len() / self.len() * (self.len() + pos);
        let (mut keys, mut values) = (pool.buffer(all), pool.buffer(all));
        keys[..k.len()].copy_from_slice(&k);
        values[..v.len()].copy_from_slice(&v);
        cache.read(layer, &mut keys[k.len()..], &mut values[v.len()..]);
        (keys, values)
    }

    /// Packs sequences of these lengths, each whole.
    pub fn new(lengths: &[usize]) -> Self {
        let mut rows = Self::default();
        for &len in lengths {
            let all = rows.push(&[], 0, len);
            rows.sequences.push(all);
        }
        rows
    }

    /// Packs sequences so that tokens which several of them begin with stand in one row for all of them: the spans are a tree, in
    /// which a span stands behind those on its way from the root.
    ///
    /// What a row computes depends on the tokens up to it and on nothing else, so each sequence has the numbers that it has alone, and
    /// the gradient of a shared row is the sum over its sequences: exact, but for the order of sums. Layers that learn while a
    /// sequence is read break this rule, and models that have them need [`Self::new`].
    pub fn sharing(sequences: &[&[u32]]) -> Self {
        let mut rows = Self {
            sequences: vec![Vec::new(); sequences.len()],
            ..Self::default()
        };
        let mut order: Vec<usize> = (0..sequences.len()).collect();
        order.sort_by_key(|i| sequences[*i]);
        rows.lay(sequences, &order, (0, 0), &[]);
        rows
    }

    /// Lays sequences, sorted, which agree in their first `agreed` tokens, behind the rows `before` of the first `laid` of those.
    fn lay(
        &mut self,
        sequences: &[&[u32]],
        order: &[usize],
        (laid, agreed): (usize, usize),
        before: &[Range<usize>],
    ) {
        let (Some(&first), Some(&last)) = (order.first(), order.last()) else {
            return;
        };
        // Of sorted sequences, the first and the last agree least.
        let (one, other) = (&sequences[first][agreed..], &sequences[last][agreed..]);
        let agreed = agreed + one.iter().zip(other).take_while(|(a, b)| a == b).count();
        let whole = agreed == sequences[last].len();
        if whole || (order.len() > 1 && agreed - laid >= MIN_SHARED) {
            let before = self.push(before, laid, agreed);
            let ended = order.partition_point(|i| sequences[*i].len() == agreed);
            for &i in &order[..ended] {
                self.sequences[i] = before.clone();
            }
            return self.split(sequences, &order[ended..], (agreed, agreed), &before);
        }
        self.split(sequences, order, (laid, agreed), before)
    }

    /// Lays the sequences that go on with the same token together, each such group by itself.
    fn split(
        &mut self,
        sequences: &[&[u32]],
        order: &[usize],
        (laid, agreed): (usize, usize),
        before: &[Range<usize>],
    ) {
        for group in order.chunk_by(|a, b| sequences[*a].get(agreed) == sequences[*b].get(agreed)) {
            self.lay(sequences, group, (laid, agreed), before);
        }
    }

    /// Rows for the positions `from..to` of what stands behind `before`; those rows with these.
    fn push(&mut self, before: &[Range<usize>], from: usize, to: usize) -> Vec<Range<usize>> {
        let span = SpanRows {
            row: self.len(),
            len: to - from,
            before: before.to_vec(),
        };
        self.positions.extend(from as u32..to as u32);
        let all = span.all().filter(|rows| !rows.is_empty()).collect();
        self.spans.push(span);
        all
    }

    /// Rows in all.
    pub fn len(&self) -> usize {
        self.positions.len()
    }

    /// True if no sequence was packed.
    pub fn is_empty(&self) -> bool {
        self.positions.is_empty()
    }

    /// Tokens of all sequences that need no row of their own.
    pub fn shared(&self) -> usize {
        let tokens = self.sequences.iter().flatten().map(|rows| rows.len());
        tokens.sum::<usize>() - self.len()
    }

    /// The rows of a sequence's tokens, one by one.
    pub fn rows_of(&self, sequence: usize) -> impl Iterator<Item = usize> + '_ {
        self.sequences[sequence].iter().cloned().flatten()
    }

    /// The token of each row.
    pub fn ids(&self, sequences: &[&[u32]]) -> Vec<u32> {
        let mut ids = vec![0; self.len()];
        for (i, sequence) in sequences.iter().enumerate() {
            for (row, id) in self.rows_of(i).zip(*sequence) {
                ids[row] = *id;
            }
        }
        ids
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// What the doc of `sharing` says, for these sequences; the tokens that needed no row of their own.
    fn check(sequences: &[&[u32]]) -> usize {
        let rows = PackedRows::sharing(sequences);
        let ids = rows.ids(sequences);
        for (i, sequence) in sequences.iter().enumerate() {
            let own: Vec<usize> = rows.rows_of(i).collect();
            let read: Vec<u32> = own.iter().map(|row| ids[*row]).collect();
            assert_eq!(read, *sequence);
            for (position, row) in own.iter().enumerate() {
                assert_eq!(rows.positions[*row] as usize, position);
            }
        }
        let mut next = 0;
        for span in &rows.spans {
            assert_eq!(span.row, next);
            next += span.len;
            // Every row attends to all positions before it, in their order.
            let positions = span.all().flatten().map(|row| rows.positions[row] as usize);
            assert!(positions.eq(0..span.pos() + span.len));
        }
        assert_eq!(next, rows.len());
        let tokens: usize = sequences.iter().map(|ids| ids.len()).sum();
        assert_eq!(rows.shared(), tokens - rows.len());
        rows.shared()
    }

    #[test]
    fn families_within_families_share_their_beginnings_and_strangers_nothing() {
        let ids: Vec<u32> = (0..90).collect();
        let fork = |at: usize, n: u32| [&ids[..at], &[1000 + n; 7]].concat();
        assert_eq!(check(&[]), 0);
        assert_eq!(check(&[&[], &ids, &[]]), 0);
        assert_eq!(check(&[&ids, &[1, 2, 3]]), 0);
        assert_eq!(check(&[&ids, &ids[..15]]), 0, "too short to be worth it");
        assert_eq!(check(&[&ids, &fork(16, 1)]), 16);
        assert_eq!(check(&[&ids, &ids[..89]]), 89);
        assert_eq!(check(&[&ids, &ids, &ids]), 180);
        // An episode that grows: each sample begins with all that the one before it had read.
        assert_eq!(check(&[&fork(40, 1), &fork(20, 2), &fork(60, 3)]), 20 + 40);
        // A family within a family beside strangers, in any order.
        let other: Vec<u32> = (500..540).collect();
        assert_eq!(
            check(&[
                &other[..30],
                &fork(40, 1),
                &other,
                &fork(40, 2),
                &fork(20, 3)
            ]),
            30 + 20 + 40
        );
        // A fork that comes too soon after another one has the tokens between them twice.
        assert_eq!(check(&[&fork(40, 1), &fork(40, 2), &fork(35, 3)]), 2 * 35);
    }

    proptest::proptest! {
        #[test]
        fn each_beginning_that_is_long_enough_stands_once(
            texts in proptest::collection::vec(proptest::collection::vec(0u32..3, 0..7), 0..9),
        ) {
            // Every branch is as long as it takes to be worth a span.
            let texts: Vec<Vec<u32>> = texts
                .iter()
                .map(|text| text.iter().flat_map(|id| [*id; MIN_SHARED]).collect())
                .collect();
            let sequences: Vec<&[u32]> = texts.iter().map(|text| &text[..]).collect();
            let tokens: usize = texts.iter().map(Vec::len).sum();
            let beginnings: BTreeSet<&[u32]> = sequences
                .iter()
                .flat_map(|text| (1..=text.len()).map(|n| &text[..n]))
                .collect();
            assert_eq!(check(&sequences), tokens - beginnings.len());
        }
    }
}
