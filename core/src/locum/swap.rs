//! Who serves, and what the store was last seen to say of it.
//!
//! The store is changed by this process and by others. Whoever changes it here holds `seen` until the change serves; whoever follows
//! it holds `seen` from the look until what was seen serves. A look from before a promotion would otherwise put the student before
//! back into service after it. `tests/loom.rs` tries every order.

use super::sync::{Mutex, MutexGuard};

pub struct Swap<K, S> {
    seen: Mutex<K>,
    serving: Mutex<S>,
}

impl<K, S> Swap<K, S> {
    pub fn new(seen: K, serving: S) -> Self {
        Self {
            seen: Mutex::new(seen),
            serving: Mutex::new(serving),
        }
    }

    /// Who serves. Held only to look at it or to change it, so that a step never waits for a disk.
    pub fn serving(&self) -> MutexGuard<'_, S> {
        self.serving.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Changes the store, with what it will be seen to say, and then who serves.
    ///
    /// # Errors
    /// Those of `store`, after which nobody else serves than before.
    pub fn change<T, R, E>(
        &self,
        store: impl FnOnce(&mut K) -> Result<T, E>,
        serve: impl FnOnce(&mut S, T) -> R,
    ) -> Result<R, E> {
        let mut seen = self.seen.lock().unwrap_or_else(|e| e.into_inner());
        let stored = store(&mut seen)?;
        Ok(serve(&mut self.serving(), stored))
    }

    /// Looks at the store and takes up what changed: `serve` gets what was seen before and what is seen now. A store that cannot be
    /// read right now is looked at again the next time.
    pub fn follow(&self, look: impl FnOnce() -> Option<K>, serve: impl FnOnce(&K, &K)) {
        let mut seen = self.seen.lock().unwrap_or_else(|e| e.into_inner());
        let Some(now) = look() else { return };
        serve(&seen, &now);
        *seen = now;
    }
}
