//! `current.json`: the student that serves, and those to go back to.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::folder::{lock, read};
use super::{Manifest, RegistryError};
use crate::limits::MAX_CONFIG_BYTES;
use crate::model::write_atomically;

pub const FILE: &str = "current.json";
/// Most versions kept to go back to.
const MAX_PREVIOUS: usize = 64;

/// Version 0 means that no student serves.
#[derive(Default, Serialize, Deserialize)]
pub struct Current {
    pub version: u64,
    pub id: String,
    /// The oldest first.
    previous: Vec<u64>,
}

pub fn get(dir: &Path) -> Result<Option<u64>, RegistryError> {
    Ok(Some(load(dir)?.version).filter(|v| *v > 0))
}

pub fn history(dir: &Path) -> Result<Vec<u64>, RegistryError> {
    Ok(load(dir)?.previous)
}

pub fn highest(dir: &Path) -> Result<u64, RegistryError> {
    let current = load(dir)?;
    Ok(current.previous.into_iter().fold(current.version, u64::max))
}

pub fn set(dir: &Path, student: Option<&Manifest>) -> Result<(), RegistryError> {
    let _held = lock(dir)?;
    let mut next = Current::default();
    if let Some(student) = student {
        let old = load(dir)?;
        next = Current {
            version: student.version,
            id: student.id.clone(),
            previous: old.previous,
        };
        match next.previous.iter().position(|v| *v == student.version) {
            Some(at) => next.previous.truncate(at),
            None if old.version > 0 && old.version != student.version => {
                next.previous.push(old.version)
            }
            None => {}
        }
        let surplus = next.previous.len().saturating_sub(MAX_PREVIOUS);
        next.previous.drain(..surplus);
    }
    Ok(write_atomically(
        &path(dir),
        format!("{:#}\n", json!(next)).as_bytes(),
    )?)
}

pub fn load(dir: &Path) -> Result<Current, RegistryError> {
    let path = path(dir);
    match read(&path, MAX_CONFIG_BYTES) {
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| RegistryError::file(&path, e)),
        Err(RegistryError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            Ok(Current::default())
        }
        Err(other) => Err(other),
    }
}

fn path(dir: &Path) -> PathBuf {
    dir.join(FILE)
}
