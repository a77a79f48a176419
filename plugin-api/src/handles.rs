//! Handles: integers that name an object and can go stale without harm.
//!
//! From the high bits to the low: kind (4), fork epoch (8), generation (28), slot (24). The kind is never 0 and below 8, so a
//! handle is never 0 and fits a signed integer. A slot that is given back gets the next generation; a slot whose
//! generations are used up is never used again, so an old handle can not come to mean a new object.

use super::sync::{Arc, RwLock};

const SLOT_BITS: u32 = 24;
const GENERATION_BITS: u32 = 28;
const EPOCH_BITS: u32 = 8;
const MAX_SLOTS: usize = 1 << SLOT_BITS;
const LAST_GENERATION: u32 = (1 << GENERATION_BITS) - 1;

/// What a handle names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    Locum = 1,
    Episode = 2,
    Call = 3,
}

impl Kind {
    fn word(bits: u64) -> &'static str {
        match bits {
            1 => "a locum",
            2 => "an episode",
            3 => "a call",
            _ => "no handle of this library",
        }
    }
}

/// Why a handle names nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadHandle {
    /// It is 0.
    None,
    /// It was made by the parent process.
    Forked,
    /// It is a handle of another kind, or a made-up number.
    Kind { expected: Kind, found: &'static str },
    /// It was given back, or never given out.
    Stale,
}

impl std::fmt::Display for BadHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            BadHandle::None => write!(f, "the handle is none (0)"),
            BadHandle::Forked => write!(
                f,
                "the handle belongs to the parent process; open the store again in this one"
            ),
            BadHandle::Kind { expected, found } => {
                write!(
                    f,
                    "the handle should be {} but is {found}",
                    Kind::word(*expected as u64)
                )
            }
            BadHandle::Stale => write!(
                f,
                "the handle is stale: it was given back, or its locum was closed"
            ),
        }
    }
}

struct Slot<T> {
    generation: u32,
    value: Option<Arc<T>>,
}

struct Slots<T> {
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
}

/// Objects of one kind by handle. Its lock is held only to look at or change a slot, never while an object is used.
pub struct Table<T> {
    kind: Kind,
    epoch: u32,
    slots: RwLock<Slots<T>>,
}

impl<T> Table<T> {
    /// An empty table whose handles carry `epoch` (see `fork`).
    pub fn new(kind: Kind, epoch: u32) -> Self {
        Self {
            kind,
            epoch: epoch & ((1 << EPOCH_BITS) - 1),
            slots: RwLock::new(Slots {
                slots: Vec::new(),
                free: Vec::new(),
            }),
        }
    }

    /// Keeps `value` and names it; `None` if 2^24 objects live.
    pub fn insert(&self, value: Arc<T>) -> Option<u64> {
        let mut table = self.slots.write().unwrap_or_else(|e| e.into_inner());
        let slot = match table.free.pop() {
            Some(slot) => slot as usize,
            None if table.slots.len() < MAX_SLOTS => {
                table.slots.push(Slot {
                    generation: 1,
                    value: None,
                });
                table.slots.len() - 1
            }
            None => return None,
        };
        table.slots[slot].value = Some(value);
        Some(self.encode(table.slots[slot].generation, slot))
    }

    /// The object that `id` names.
    pub fn get(&self, id: u64) -> Result<Arc<T>, BadHandle> {
        let (generation, slot) = self.decode(id)?;
        let table = self.slots.read().unwrap_or_else(|e| e.into_inner());
        match table.slots.get(slot) {
            Some(Slot {
                generation: current,
                value: Some(value),
            }) if *current == generation => Ok(value.clone()),
            _ => Err(BadHandle::Stale),
        }
    }

    /// Takes the object out; its handle is stale from then on. Others may still hold the object itself.
    pub fn remove(&self, id: u64) -> Result<Arc<T>, BadHandle> {
        let (generation, slot) = self.decode(id)?;
        let mut table = self.slots.write().unwrap_or_else(|e| e.into_inner());
        match table.slots.get(slot) {
            Some(Slot {
                generation: current,
                value: Some(_),
            }) if *current == generation => {}
            _ => return Err(BadHandle::Stale),
        }
        Ok(table.take(slot))
    }

    /// Takes out every object that `which` picks.
    pub fn remove_where(&self, which: impl Fn(&T) -> bool) -> Vec<Arc<T>> {
        let mut table = self.slots.write().unwrap_or_else(|e| e.into_inner());
        let picked: Vec<usize> = (0..table.slots.len())
            .filter(|slot| table.slots[*slot].value.as_deref().is_some_and(&which))
            .collect();
        picked.into_iter().map(|slot| table.take(slot)).collect()
    }

    fn encode(&self, generation: u32, slot: usize) -> u64 {
        (self.kind as u64) << (SLOT_BITS + GENERATION_BITS + EPOCH_BITS)
            | (self.epoch as u64) << (SLOT_BITS + GENERATION_BITS)
            | (generation as u64) << SLOT_BITS
            | slot as u64
    }

    fn decode(&self, id: u64) -> Result<(u32, usize), BadHandle> {
        if id == 0 {
            return Err(BadHandle::None);
        }
        let kind = id >> (SLOT_BITS + GENERATION_BITS + EPOCH_BITS);
        if kind != self.kind as u64 {
            return Err(BadHandle::Kind {
                expected: self.kind,
                found: Kind::word(kind),
            });
        }
        if (id >> (SLOT_BITS + GENERATION_BITS)) & ((1 << EPOCH_BITS) - 1) != self.epoch as u64 {
            return Err(BadHandle::Forked);
        }
        Ok((
            (id >> SLOT_BITS) as u32 & LAST_GENERATION,
            (id & (MAX_SLOTS as u64 - 1)) as usize,
        ))
    }
}

impl<T> Slots<T> {
    fn take(&mut self, slot: usize) -> Arc<T> {
        let entry = &mut self.slots[slot];
        let value = entry
            .value
            .take()
            .expect("the caller has seen a value in this slot");
        if entry.generation < LAST_GENERATION {
            entry.generation += 1;
            self.free.push(slot as u32);
        }
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handle_finds_its_object_until_it_is_given_back() {
        let table = Table::new(Kind::Episode, 0);
        let a = table.insert(Arc::new("a")).unwrap();
        let b = table.insert(Arc::new("b")).unwrap();
        assert_eq!(*table.get(a).unwrap(), "a");
        assert_eq!(*table.remove(a).unwrap(), "a");
        assert_eq!(table.get(a), Err(BadHandle::Stale));
        assert_eq!(table.remove(a), Err(BadHandle::Stale));
        assert_eq!(*table.get(b).unwrap(), "b");
        assert!(a < 1 << 63 && b < 1 << 63, "handles fit a signed integer");
    }

    #[test]
    fn an_old_handle_never_comes_to_mean_the_new_object_of_its_slot() {
        let table = Table::new(Kind::Call, 0);
        let first = table.insert(Arc::new(1)).unwrap();
        table.remove(first).unwrap();
        let second = table.insert(Arc::new(2)).unwrap();
        assert_eq!(
            first & (MAX_SLOTS as u64 - 1),
            second & (MAX_SLOTS as u64 - 1),
            "the slot is used again"
        );
        assert_ne!(first, second);
        assert_eq!(table.get(first), Err(BadHandle::Stale));
        assert_eq!(*table.get(second).unwrap(), 2);
    }

    #[test]
    fn a_slot_whose_generations_are_used_up_is_never_used_again() {
        let table = Table::new(Kind::Call, 0);
        table.insert(Arc::new(0)).unwrap();
        table.slots.write().unwrap().slots[0].generation = LAST_GENERATION;
        let last = table.encode(LAST_GENERATION, 0);
        table.remove(last).unwrap();
        let next = table.insert(Arc::new(1)).unwrap();
        assert_eq!(next & (MAX_SLOTS as u64 - 1), 1);
        assert_eq!(table.get(last), Err(BadHandle::Stale));
    }

    #[test]
    fn handles_of_another_kind_and_of_the_parent_process_are_told_apart() {
        let episodes = Table::new(Kind::Episode, 0);
        let calls = Table::<u8>::new(Kind::Call, 0);
        let child = Table::<u8>::new(Kind::Episode, 1);
        let id = episodes.insert(Arc::new(1u8)).unwrap();
        assert_eq!(
            calls.get(id),
            Err(BadHandle::Kind {
                expected: Kind::Call,
                found: "an episode"
            })
        );
        assert_eq!(child.get(id), Err(BadHandle::Forked));
        assert_eq!(episodes.get(0), Err(BadHandle::None));
    }

    #[test]
    fn no_number_at_all_makes_a_table_do_anything_but_refuse() {
        let table = Table::new(Kind::Episode, 3);
        let good = table.insert(Arc::new(())).unwrap();
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        for _ in 0..100_000 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            assert!(state == good || table.get(state).is_err());
        }
        for bit in 0..64 {
            assert!(table.get(good ^ (1 << bit)).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn closing_takes_out_what_belongs_to_it_and_nothing_else() {
        let table = Table::new(Kind::Episode, 0);
        let ids: Vec<u64> = (0..10)
            .map(|n| table.insert(Arc::new(n)).unwrap())
            .collect();
        assert_eq!(table.remove_where(|n| n % 2 == 0).len(), 5);
        for (n, id) in ids.iter().enumerate() {
            assert_eq!(table.get(*id).is_ok(), n % 2 == 1);
        }
    }

    #[test]
    fn threads_that_insert_and_remove_at_once_never_see_each_others_objects() {
        let table = Arc::new(Table::new(Kind::Call, 0));
        let threads: Vec<_> = (0..4u32)
            .map(|t| {
                let table = table.clone();
                std::thread::spawn(move || {
                    for n in 0..5_000u32 {
                        let id = table.insert(Arc::new((t, n))).unwrap();
                        assert_eq!(*table.get(id).unwrap(), (t, n));
                        assert_eq!(*table.remove(id).unwrap(), (t, n));
                        assert!(table.get(id).is_err());
                    }
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
    }
}
