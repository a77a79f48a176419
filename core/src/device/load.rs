//! Finding and checking the object. What is found is trusted as the library itself is, so it is looked for in one place.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use super::table::{Head, Table, BUILD, MAGIC, SYMBOL};
use super::DeviceError;

/// The object's name.
pub const FILE: &str = "liblocum_cuda.so";

/// Where the object is looked for if no option names it: in the folder of the library (or program) that holds this code.
pub fn beside_the_library() -> Option<PathBuf> {
    Some(own_file()?.parent()?.join(FILE))
}

/// The file that holds this code.
fn own_file() -> Option<PathBuf> {
    // SAFETY: writes into `found`, or says that it did not.
    let named = unsafe {
        let mut found: libc::Dl_info = std::mem::zeroed();
        let here = own_file as *const libc::c_void;
        match libc::dladdr(here, &mut found) != 0 && !found.dli_fname.is_null() {
            true => std::ffi::CStr::from_ptr(found.dli_fname).to_str().ok()?,
            false => "",
        }
    };
    // Of a program the loader knows only what it was called by, which may be relative to a folder that was left since.
    match Path::new(named).is_absolute() {
        true => Path::new(named).canonicalize().ok(),
        false => std::env::current_exe().ok()?.canonicalize().ok(),
    }
}

/// The object's table. It stays loaded: threads of the driver may run code of it after us.
///
/// # Errors
/// It is not there, not a file of ours to trust, or not made from the source that this library was made from.
pub(super) fn table(named: Option<&Path>) -> Result<(&'static Table, PathBuf), DeviceError> {
    static LOADED: Mutex<Vec<(PathBuf, &'static Head)>> = Mutex::new(Vec::new());
    let path = match named {
        Some(path) => path.to_path_buf(),
        None => {
            beside_the_library().ok_or_else(|| DeviceError::Absent("an unknown folder".into()))?
        }
    };
    let wrong = |why: String| DeviceError::Object {
        path: path.clone(),
        why,
    };
    let real = match path.canonicalize() {
        Ok(real) => real,
        Err(error) if named.is_some() => return Err(wrong(error.to_string())),
        Err(_) => return Err(DeviceError::Absent(path.parent().unwrap_or(&path).into())),
    };
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, head)) = loaded.iter().find(|(known, _)| *known == real) {
        return Ok((&head.table, real));
    }
    trusted(&real).map_err(&wrong)?;
    // SAFETY: a shared object of the operator's, beside the library or named by an option, that only its owner can have written.
    let library = unsafe { Library::open(Some(&real), RTLD_NOW | RTLD_LOCAL) };
    let library =
        library.map_err(|error| wrong(format!("it cannot be loaded: {}", innermost(&error))))?;
    // SAFETY: only the address is taken; what lies there is checked before it is believed.
    let head = unsafe { library.get::<*const Head>(SYMBOL) };
    let head = head.map(|symbol| symbol.as_raw_ptr().cast::<Head>());
    let head = head.map_err(|_| wrong("it is not Locum's".into()))?;
    // SAFETY: an object that exports this name has at least two numbers there, which no version of ours will move.
    let (magic, build) = unsafe { ((*head).magic, (*head).build) };
    if magic != MAGIC {
        return Err(wrong("it is not Locum's".into()));
    }
    if build != BUILD {
        return Err(wrong(format!(
            "it belongs to another build of Locum ({build:016x}, this is {BUILD:016x}): `make cuda` builds the right one"
        )));
    }
    std::mem::forget(library);
    // SAFETY: the build number vouches for the layout, and the object stays loaded.
    let head: &'static Head = unsafe { &*head };
    loaded.push((real.clone(), head));
    Ok((&head.table, real))
}

/// Whether a file is the operator's own, for what is in it will run as part of the host.
fn trusted(path: &Path) -> Result<(), String> {
    use std::os::unix::fs::MetadataExt;
    let found = path.metadata().map_err(|e| e.to_string())?;
    if !found.is_file() {
        return Err("it is no file".into());
    }
    // SAFETY: asks for a number.
    let user = unsafe { libc::geteuid() };
    if found.uid() != 0 && found.uid() != user {
        return Err(format!(
            "it belongs to user {}, who is neither you nor root",
            found.uid()
        ));
    }
    if found.mode() & 0o002 != 0 {
        return Err("everybody may write to it".into());
    }
    Ok(())
}

fn innermost(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}
