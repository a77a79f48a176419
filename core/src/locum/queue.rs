//! A bounded queue that drops its oldest, and a bell that rings while it is not empty.

use std::collections::VecDeque;

use super::sync::{Mutex, MutexGuard};

/// Rung whenever something came, silenced when nothing is left.
pub trait Bell {
    fn ring(&self);
    fn silence(&self);
}

/// Nobody waits.
impl Bell for () {
    fn ring(&self) {}
    fn silence(&self) {}
}

pub struct Queue<T, B> {
    inside: Mutex<Inside<T>>,
    most: usize,
    pub bell: B,
}

struct Inside<T> {
    kept: VecDeque<T>,
    dropped: u64,
}

impl<T, B: Bell> Queue<T, B> {
    /// Keeps `most`, at least one.
    pub fn new(most: usize, bell: B) -> Self {
        Self {
            inside: Mutex::new(Inside {
                kept: VecDeque::new(),
                dropped: 0,
            }),
            most,
            bell,
        }
    }

    /// The bell is rung and silenced under the lock, or it could ring over an empty queue, and be silent over a value.
    pub fn push(&self, value: T) {
        let mut inside = self.inside();
        if inside.kept.len() >= self.most {
            inside.kept.pop_front();
            inside.dropped += 1;
        }
        inside.kept.push_back(value);
        self.bell.ring();
    }

    /// The oldest. The bell is silent once none is left.
    pub fn pop(&self) -> Option<T> {
        let mut inside = self.inside();
        let value = inside.kept.pop_front();
        if inside.kept.is_empty() {
            self.bell.silence();
        }
        value
    }

    /// All of them, oldest first.
    pub fn take(&self) -> VecDeque<T> {
        let mut inside = self.inside();
        self.bell.silence();
        std::mem::take(&mut inside.kept)
    }

    /// How many were dropped because nobody took them.
    pub fn dropped(&self) -> u64 {
        self.inside().dropped
    }

    fn inside(&self) -> MutexGuard<'_, Inside<T>> {
        self.inside.lock().unwrap_or_else(|e| e.into_inner())
    }
}
