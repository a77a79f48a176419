//! Sequences of answers that ended, kept so that the next prompt that begins alike need not be read again.

use super::seat::Seat;
use super::Student;

/// Tokens in common below which another episode's sequence is not worth a copy.
const MIN_SHARED: usize = 16;

struct Kept {
    version: u64,
    id: String,
    key: u128,
    sequence: Seat,
}

impl Kept {
    fn is_of(&self, student: &Student) -> bool {
        self.version == student.version && self.id == student.id
    }
}

/// Kept sequences, least recently used first. Belongs to the engine's thread.
pub(super) struct Prefixes {
    limit: usize,
    bytes: usize,
    kept: Vec<Kept>,
}

impl Prefixes {
    /// At most `limit` bytes of keys and values.
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            bytes: 0,
            kept: Vec::new(),
        }
    }

    /// Bytes held now.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// A sequence of this student that holds the beginning of `tokens`, never all of them (the last one has to be read for
    /// there to be logits), or `None`. The episode's own sequence is taken out and cut back; of another episode's, which that
    /// episode will want again, the common part is copied into a sequence with room for `capacity` tokens. A sequence that learns while
    /// it is read is only for jobs that want one, and only as far back as the last edge of its chunks.
    pub fn take(
        &mut self,
        student: &Student,
        key: u128,
        tokens: &[u32],
        capacity: usize,
        learning: bool,
    ) -> Option<Seat> {
        let most = tokens.len().saturating_sub(1);
        let common = |kept: &Kept| {
            let same = kept
                .sequence
                .ids()
                .iter()
                .zip(tokens)
                .take_while(|(a, b)| a == b);
            same.count().min(most)
        };
        let best = |own: bool, kept: &[Kept]| {
            let usable = |k: &Kept| k.is_of(student) && k.sequence.is_learning() == learning;
            let of_student = kept.iter().enumerate().filter(|(_, k)| usable(k));
            let candidates = of_student.filter(|(_, k)| (k.key == key) == own);
            candidates.map(|(at, k)| (common(k), at)).max()
        };
        let own = best(true, &self.kept).filter(|(shared, _)| *shared > 0);
        let other = best(false, &self.kept).filter(|(shared, _)| *shared >= MIN_SHARED);
        if let Some((shared, at)) = own {
            // A prompt that has only the template's first words in common with its episode takes a neighbour's prefix.
            if other.is_none_or(|(others, _)| shared >= others) {
                let mut sequence = self.remove(at).sequence;
                return sequence.truncate(shared).then_some(sequence);
            }
        }
        let (shared, at) = other?;
        let used = self.kept.remove(at);
        let sequence = used.sequence.prefix(shared, capacity);
        self.kept.push(used);
        sequence
    }

    /// Keeps a sequence of an answer that ended in place of the episode's earlier one, and forgets the least recently used
    /// ones above the limit.
    pub fn put(&mut self, student: &Student, key: u128, sequence: Seat) {
        if sequence.ids().is_empty() {
            return;
        }
        if let Some(at) = self
            .kept
            .iter()
            .position(|k| k.key == key && k.is_of(student))
        {
            self.remove(at);
        }
        self.bytes += sequence.bytes();
        self.kept.push(Kept {
            version: student.version,
            id: student.id.clone(),
            key,
            sequence,
        });
        while self.bytes > self.limit {
            self.remove(0);
        }
    }

    /// The episode's own sequence, the newest student's if it has several.
    pub fn own(&mut self, key: u128) -> Option<&mut Seat> {
        let own = self.kept.iter_mut().filter(|kept| kept.key == key);
        own.max_by_key(|kept| kept.version)
            .map(|kept| &mut kept.sequence)
    }

    /// Puts `sequence` in the place of [`Self::own`]; false if there is none.
    pub fn replace(&mut self, key: u128, sequence: Seat) -> bool {
        let bytes = sequence.bytes();
        let Some(own) = self.own(key) else {
            return false;
        };
        let before = std::mem::replace(own, sequence).bytes();
        self.bytes = self.bytes - before + bytes;
        true
    }

    /// Forgets the sequences of all other students.
    pub fn keep_only(&mut self, versions: &[u64]) {
        self.kept.retain(|kept| versions.contains(&kept.version));
        self.bytes = self.kept.iter().map(|kept| kept.sequence.bytes()).sum();
    }

    /// Forgets what is on a card that failed.
    pub fn forget_cards(&mut self) {
        self.kept.retain(|kept| !kept.sequence.is_on_card());
        self.bytes = self.kept.iter().map(|kept| kept.sequence.bytes()).sum();
    }

    /// Forgets the sequences of these episodes.
    pub fn forget(&mut self, keys: &[u128]) {
        self.kept.retain(|kept| !keys.contains(&kept.key));
        self.bytes = self.kept.iter().map(|kept| kept.sequence.bytes()).sum();
    }

    fn remove(&mut self, at: usize) -> Kept {
        let kept = self.kept.remove(at);
        self.bytes -= kept.sequence.bytes();
        kept
    }
}
