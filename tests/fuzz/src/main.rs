//! One program for all doors: `LOCUM_FUZZ_DOOR` says which, and libFuzzer's own options follow. `tests/fuzz/run.py` builds and runs it.

#![no_main]

#[path = "../doors.rs"]
mod doors;

use std::ffi::{c_char, CString};
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;

// Its functions are called from abi.c.
extern crate locum as _;

extern "C" {
    /// Opens a store in a folder that is not there yet, with the model of another one (`abi.c`).
    fn locum_fuzz_begin(store: *const c_char, model: *const c_char);
    /// A host's calls, made from bytes.
    fn locum_fuzz_abi(data: *const u8, size: usize);
}

fn abi(bytes: &[u8]) {
    static SCENE: OnceLock<tempfile::TempDir> = OnceLock::new();
    SCENE.get_or_init(|| {
        let dir = tempfile::tempdir().expect("a folder for temporary files");
        let path = |name| dir.path().join(name).into_os_string().into_encoded_bytes();
        let path = |name| CString::new(path(name)).expect("a path has no NUL");
        locum_core::model::write_tiny(&dir.path().join("model"), 1).expect("a tiny model");
        // SAFETY: both are texts that end in NUL.
        unsafe { locum_fuzz_begin(path("store").as_ptr(), path("model").as_ptr()) };
        dir
    });
    // SAFETY: the function reads `size` bytes at `data`.
    unsafe { locum_fuzz_abi(bytes.as_ptr(), bytes.len()) }
}

fn open() -> fn(&[u8]) {
    let name = std::env::var("LOCUM_FUZZ_DOOR").unwrap_or_default();
    if name == "abi" {
        return abi;
    }
    let door = doors::DOORS.iter().find(|(known, _)| *known == name);
    door.unwrap_or_else(|| panic!("LOCUM_FUZZ_DOOR={name:?} is no door")).1
}

fuzz_target!(|bytes: &[u8]| {
    static OPEN: OnceLock<fn(&[u8])> = OnceLock::new();
    OPEN.get_or_init(open)(bytes)
});
