//! Folders that are there whole or not at all, and digests of what is in them.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use sha2::{Digest, Sha256};

use super::RegistryError;
use crate::files::{
    folder_is_free, free_to_move, lock_folder, private_folder, rename, sync_folder,
};

/// What names of unfinished folders begin with.
const PREFIX: &str = ".tmp-";

/// A private folder being written. Its writer holds a lock on it, so that nobody sweeps it away; dropped before
/// [`Temporary::publish`] it is removed.
pub struct Temporary {
    path: PathBuf,
    published: bool,
    lock: Option<File>,
}

impl Temporary {
    /// Creates one in `parent`, and `parent` itself if need be.
    pub fn new(parent: &Path) -> Result<Temporary, RegistryError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let mut private = private_folder();
        private
            .recursive(true)
            .create(parent)
            .map_err(|e| RegistryError::io(parent, e))?;
        // Sweepers take this lock too: none comes between the folder and its own lock.
        let _held = lock(parent)?;
        loop {
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let path = parent.join(format!("{PREFIX}{}-{number}", std::process::id()));
            match private.recursive(false).create(&path) {
                // Left by a process that had the same number.
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
                other => other.map_err(|e| RegistryError::io(&path, e))?,
            }
            return Ok(Temporary {
                lock: Some(lock(&path)?),
                path,
                published: false,
            });
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Syncs everything and gives the folder its name. The caller holds the lock on the folder above.
    pub fn publish(mut self, to: &Path) -> Result<(), RegistryError> {
        sync_folder(&self.path).map_err(|e| RegistryError::io(&self.path, e))?;
        free_to_move(&mut self.lock, &self.path);
        // The folder has its name from here on, whatever becomes of the sync behind it.
        let renamed = rename(&self.path, to);
        self.published = !self.path.exists();
        renamed.map_err(|e| RegistryError::io(to, e))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.published {
            free_to_move(&mut self.lock, &self.path);
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// Waits for the lock on a folder; the system gives it back when the file is dropped or the process ends.
pub fn lock(dir: &Path) -> Result<File, RegistryError> {
    lock_folder(dir).map_err(|e| RegistryError::io(dir, e))
}

/// Removes unfinished folders whose writers are gone. A folder that is not there or may not be written is left as it is.
pub fn sweep(parent: &Path) {
    let Ok(_held) = lock(parent) else { return };
    for path in unfinished(parent) {
        if let Err(e) = fs::remove_dir_all(&path) {
            tracing::warn!(path = %path.display(), error = %e, "an unfinished folder cannot be removed");
        }
    }
}

/// Unfinished folders whose writers are gone.
pub fn unfinished(parent: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    let begun = entries.filter(|e| e.file_name().to_string_lossy().starts_with(PREFIX));
    let paths = begun.map(|entry| entry.path());
    paths.filter(|path| folder_is_free(path)).collect()
}

/// The finished folders of a folder, by name; none if it is not there.
pub fn children(parent: &Path) -> Result<Vec<PathBuf>, RegistryError> {
    let entries = match fs::read_dir(parent) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(|e| RegistryError::io(parent, e))?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|e| RegistryError::io(parent, e))?;
        if !entry.file_name().to_string_lossy().starts_with('.') && entry.path().is_dir() {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}

/// Bytes of all files below a folder; what cannot be read counts nothing.
pub fn bytes(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else {
        return 0;
    };
    entries
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(data) if data.is_dir() => bytes(&entry.path()),
            Ok(data) => data.len(),
            Err(_) => 0,
        })
        .sum()
}

/// Reads a file that must not be larger than `limit`.
pub fn read(path: &Path, limit: u64) -> Result<Vec<u8>, RegistryError> {
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(|e| RegistryError::io(path, e))?;
    // One byte more than allowed, so that a file that grows meanwhile is found out as well.
    file.take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| RegistryError::io(path, e))?;
    match bytes.len() as u64 {
        found if found > limit => Err(RegistryError::TooLarge {
            path: path.into(),
            found,
            limit,
        }),
        _ => Ok(bytes),
    }
}

/// SHA-256 (hex) of `model.safetensors`; of a folder with shards, over the digests of the shards by name.
pub fn weights_digest(dir: &Path) -> Result<String, RegistryError> {
    let single = dir.join("model.safetensors");
    if single.is_file() {
        return digest_file(&single);
    }
    let mut shards: Vec<PathBuf> = fs::read_dir(dir)
        .map_err(|e| RegistryError::io(dir, e))?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .collect();
    if shards.is_empty() {
        return Err(RegistryError::file(dir, "it has no model.safetensors"));
    }
    shards.sort();
    let digests: Vec<String> = shards
        .iter()
        .map(|path| digest_file(path))
        .collect::<Result<_, _>>()?;
    Ok(sha256_hex(digests.join("\n").as_bytes()))
}

pub fn sha256_hex(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn digest_file(path: &Path) -> Result<String, RegistryError> {
    let mut digest = Sha256::new();
    let mut file = File::open(path).map_err(|e| RegistryError::io(path, e))?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(hex(&digest.finalize())),
            Ok(n) => digest.update(&buffer[..n]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(RegistryError::io(path, e)),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
