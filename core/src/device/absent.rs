//! Where no object is made for the system: there is none to find.

use std::path::{Path, PathBuf};

use super::table::Table;
use super::DeviceError;

/// The object's name, on the systems that have one.
pub const FILE: &str = "liblocum_cuda.so";

/// Where the object would be looked for: nowhere.
pub fn beside_the_library() -> Option<PathBuf> {
    None
}

/// # Errors
/// [`DeviceError::Unsupported`], also of an object that was named.
pub(super) fn table(_: Option<&Path>) -> Result<(&'static Table, PathBuf), DeviceError> {
    Err(DeviceError::Unsupported)
}
