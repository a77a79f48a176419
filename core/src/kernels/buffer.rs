//! Buffers that come back: a training step asks for the same sizes again and again, and pages fresh from the system cost more than
//! many a kernel that fills them.

use std::collections::VecDeque;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard};

/// Numbers of some length, back on their pool's shelf when dropped if the pool keeps buffers at the moment.
#[derive(Default)]
pub struct Buffer {
    data: Vec<f32>,
    shelf: Option<Arc<Shelf>>,
}

impl Buffer {
    /// The numbers alone, which then go back to the system.
    pub fn into_vec(mut self) -> Vec<f32> {
        if let Some(shelf) = self.shelf.take() {
            locked(&shelf).lent -= self.data.capacity();
        }
        std::mem::take(&mut self.data)
    }
}

/// A buffer of no shelf.
impl From<Vec<f32>> for Buffer {
    fn from(data: Vec<f32>) -> Self {
        Self { data, shelf: None }
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.data
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.data
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(shelf) = self.shelf.take() {
            let data = std::mem::take(&mut self.data);
            let mut inside = locked(&shelf);
            inside.lent -= data.capacity();
            if inside.keeping > 0 {
                inside.idle.push_back(data);
            }
        }
    }
}

/// Where buffers lie between two uses. Those lent and those idle are together never more than were once lent at the same time.
#[derive(Default)]
pub(super) struct Shelf(Mutex<Inside>);

#[derive(Default)]
struct Inside {
    /// Longest idle first.
    idle: VecDeque<Vec<f32>>,
    /// Numbers in all buffers that are lent, and the most there were.
    lent: usize,
    most: usize,
    keeping: usize,
}

/// Shorter ones are cheap to have from the allocator.
const SHORT: usize = 1 << 14;

impl Shelf {
    /// A buffer of `n` numbers, whatever they are.
    pub fn take(self: &Arc<Self>, n: usize) -> Buffer {
        if n < SHORT {
            return Buffer::from(vec![0.0; n]);
        }
        let mut inside = locked(self);
        if inside.keeping == 0 {
            return Buffer::from(vec![0.0; n]);
        }
        let fitting = (0..inside.idle.len())
            .filter(|&i| (n..=2 * n).contains(&inside.idle[i].capacity()))
            .min_by_key(|&i| inside.idle[i].capacity());
        let mut data = match fitting.and_then(|i| inside.idle.remove(i)) {
            Some(mut data) => {
                data.resize(n, 0.0);
                data
            }
            None => {
                let mut idle: usize = inside.idle.iter().map(Vec::capacity).sum();
                while idle > 0 && inside.lent + idle + n > inside.most {
                    idle -= inside.idle.pop_front().map_or(idle, |old| old.capacity());
                }
                vec![0.0; n]
            }
        };
        inside.lent += data.capacity();
        inside.most = inside.most.max(inside.lent);
        drop(inside);
        if cfg!(any(test, debug_assertions)) {
            // Whoever reads before writing shall notice.
            data.fill(f32::NAN);
        }
        Buffer {
            data,
            shelf: Some(self.clone()),
        }
    }

    pub fn keep(&self, keep: bool) {
        let mut inside = locked(self);
        match keep {
            true => inside.keeping += 1,
            false => inside.keeping -= 1,
        }
        if inside.keeping == 0 {
            inside.idle.clear();
            inside.most = inside.lent;
        }
    }
}

fn locked(shelf: &Shelf) -> MutexGuard<'_, Inside> {
    shelf.0.lock().unwrap_or_else(|e| e.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_only_while_the_shelf_keeps_them_and_never_more_than_were_needed_at_once()
    {
        let shelf = Arc::new(Shelf::default());
        let idle = || locked(&shelf).idle.len();
        drop(shelf.take(SHORT));
        assert_eq!(idle(), 0);
        shelf.keep(true);
        let at = shelf.take(SHORT).as_ptr();
        assert_eq!(idle(), 1);
        let again = shelf.take(SHORT);
        assert_eq!((again.as_ptr(), again.len(), idle()), (at, SHORT, 0));
        drop(again);
        // Nothing idle fits, so it makes room.
        let large = shelf.take(3 * SHORT);
        assert_eq!(idle(), 0);
        drop(large);
        for n in [SHORT, 2 * SHORT, 3 * SHORT, SHORT] {
            drop(shelf.take(n));
            let inside = locked(&shelf);
            let idle: usize = inside.idle.iter().map(Vec::capacity).sum();
            assert!(inside.lent + idle <= inside.most, "{n}");
        }
        shelf.keep(false);
        assert_eq!(idle(), 0);
    }
}
