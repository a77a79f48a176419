//! SQLite's global locks around a `fork()`.
//!
//! A fork copies one thread and every lock as it stands. A lock of SQLite's that another thread of ours held at that moment (each
//! allocation takes one) would never be free in the child, which could then open no store. So all of them are taken before a fork
//! and given back after it, on both sides.

use rusqlite::ffi;

/// Outer ones first, as SQLite takes them: a file's lock is held while memory is asked for, never the other way round.
const STATIC_MUTEXES: [i32; 11] = [
    ffi::SQLITE_MUTEX_STATIC_MAIN,
    ffi::SQLITE_MUTEX_STATIC_OPEN,
    ffi::SQLITE_MUTEX_STATIC_VFS1,
    ffi::SQLITE_MUTEX_STATIC_VFS2,
    ffi::SQLITE_MUTEX_STATIC_VFS3,
    ffi::SQLITE_MUTEX_STATIC_APP1,
    ffi::SQLITE_MUTEX_STATIC_APP2,
    ffi::SQLITE_MUTEX_STATIC_PRNG,
    ffi::SQLITE_MUTEX_STATIC_LRU,
    ffi::SQLITE_MUTEX_STATIC_PMEM,
    ffi::SQLITE_MUTEX_STATIC_MEM,
];

/// Waits until no thread is inside one of SQLite's global locks, and keeps them. For `pthread_atfork`'s first handler, on a thread
/// that is in no call of the store.
pub fn before_fork() {
    for id in STATIC_MUTEXES {
        // SAFETY: a static mutex is returned for its number, or null where there are no mutexes, which `enter` takes for a no-op.
        unsafe { ffi::sqlite3_mutex_enter(ffi::sqlite3_mutex_alloc(id)) }
    }
}

/// Gives them back, in the parent and in the child.
pub fn after_fork() {
    for id in STATIC_MUTEXES.iter().rev() {
        // SAFETY: as above; this thread entered it in `before_fork`, and in the child it is the copy of that thread.
        unsafe { ffi::sqlite3_mutex_leave(ffi::sqlite3_mutex_alloc(*id)) }
    }
}
