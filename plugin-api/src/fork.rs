//! What a child of `fork()` may see of its parent: nothing.
//!
//! A fork copies one thread. Locks that other threads held stay locked for ever in the child, and our threads are gone.
//! So every global of this crate is [`PerProcess`]: the child starts with fresh ones and leaks the old without touching
//! a lock, and SQLite's locks are held over the fork. A handle carries the epoch it was made in, which is how one of the parent is recognised (`LOCUM_E_FORKED`).
//! Windows has no fork: a process begins with nothing of another's.

use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};
use std::sync::Once;

static EPOCH: AtomicU32 = AtomicU32::new(0);

/// Forks between the first process that opened a store and this one.
pub fn epoch() -> u32 {
    EPOCH.load(Ordering::Acquire)
}

/// Watches for forks from now on, and keeps the library loaded. Called before the first thread of ours; later calls do nothing.
pub fn watch() {
    static WATCH: Once = Once::new();
    WATCH.call_once(|| {
        stay_loaded();
        #[cfg(unix)]
        // SAFETY: the handler is a plain function that lives as long as the library, which is never unloaded (build.rs);
        // SQLite's locks are taken by plain calls before the fork and given back after it; besides, one atomic is touched.
        unsafe {
            libc::pthread_atfork(Some(before), Some(in_parent), Some(in_child));
        }
    });
}

#[cfg(unix)]
extern "C" fn before() {
    locum_core::store::before_fork();
}

#[cfg(unix)]
extern "C" fn in_parent() {
    locum_core::store::after_fork();
}

#[cfg(unix)]
extern "C" fn in_child() {
    locum_core::store::after_fork();
    EPOCH.fetch_add(1, Ordering::AcqRel);
}

/// Keeps the library in the process until that ends: threads of ours, and destructors on the host's threads, may still run code of
/// ours after the host has let go of it. On Linux a link argument says so (build.rs).
fn stay_loaded() {
    #[cfg(windows)]
    // SAFETY: the address is one of this module, and the module's handle is written to a variable of ours.
    unsafe {
        use windows_sys::Win32::System::LibraryLoader::{
            GetModuleHandleExW, GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS,
            GET_MODULE_HANDLE_EX_FLAG_PIN,
        };
        let mut module = std::ptr::null_mut();
        GetModuleHandleExW(
            GET_MODULE_HANDLE_EX_FLAG_PIN | GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS,
            stay_loaded as *const () as *const u16,
            &mut module,
        );
    }
}

/// A global that a forked child gets afresh.
pub struct PerProcess<T: 'static> {
    current: AtomicPtr<Scoped<T>>,
    make: fn() -> T,
}

struct Scoped<T> {
    epoch: u32,
    value: T,
}

impl<T: Send + Sync> PerProcess<T> {
    /// A global made by `make` at its first use in each process.
    pub const fn new(make: fn() -> T) -> Self {
        Self {
            current: AtomicPtr::new(ptr::null_mut()),
            make,
        }
    }

    /// The value of this process. Takes no lock.
    pub fn get(&'static self) -> &'static T {
        let epoch = epoch();
        loop {
            let seen = self.current.load(Ordering::Acquire);
            if !seen.is_null() {
                // SAFETY: the pointer came from Box::into_raw below and is never freed: a value that was replaced after a
                // fork is leaked on purpose.
                let scoped: &'static Scoped<T> = unsafe { &*seen };
                if scoped.epoch == epoch {
                    return &scoped.value;
                }
            }
            let fresh = Box::into_raw(Box::new(Scoped {
                epoch,
                value: (self.make)(),
            }));
            if self
                .current
                .compare_exchange(seen, fresh, Ordering::AcqRel, Ordering::Acquire)
                .is_err()
            {
                // SAFETY: `fresh` was made two lines above and nobody else has seen it.
                drop(unsafe { Box::from_raw(fresh) });
            }
        }
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[test]
    fn a_child_gets_a_fresh_global_even_while_its_parent_holds_the_lock() {
        static COUNTER: PerProcess<Mutex<u32>> = PerProcess::new(|| Mutex::new(7));
        watch();
        let mut held = COUNTER.get().lock().unwrap();
        *held = 8;
        let parent_epoch = epoch();
        // SAFETY: the child only touches atomics, one fresh allocation and _exit.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            let fresh = COUNTER.get().try_lock().map(|v| *v).unwrap_or(0);
            let ok = fresh == 7 && epoch() == parent_epoch + 1;
            // SAFETY: ends the child without running the test harness twice.
            unsafe { libc::_exit(if ok { 0 } else { 1 }) };
        }
        let mut status = 0;
        // SAFETY: waits for the child made above.
        assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
        assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0);
        assert_eq!(epoch(), parent_epoch);
    }
}
