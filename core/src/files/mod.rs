//! Files that are there whole or not at all: a temporary sibling, forced to the disk, renamed, and the folder forced to the disk.
//!
//! Each of these operations is a named point at which core's own tests make the disk fail or the process die (`faults`).

pub mod faults;
mod system;

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use faults::Fate;
pub use system::{
    folder_is_free, free_to_move, lock_folder, owner_only, private_folder, unfollowed,
};

/// Writes a file so that it holds `bytes`, or is as it was, whatever happens meanwhile; durable on return.
///
/// The temporary sibling has the extension `tmp`: two writers of one path must agree on a lock.
///
/// # Errors
/// What the system says. The file is then as it was, unless the folder alone could not be forced to the disk.
pub fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("tmp");
    let write = || {
        faults::check("create", path)?;
        let mut new = OpenOptions::new();
        new.write(true).create(true).truncate(true);
        let mut file = owner_only(&mut new).open(&temporary)?;
        match faults::point("write", path)? {
            Fate::Go => file.write_all(bytes)?,
            Fate::Short(then) => {
                file.write_all(&bytes[..bytes.len() / 2])?;
                return Err(then());
            }
        }
        faults::check("sync", path)?;
        file.sync_all()?;
        rename(&temporary, path)
    };
    write().inspect_err(|_| {
        let _ = fs::remove_file(&temporary);
    })
}

/// Gives a finished file or folder its name, durably.
///
/// # Errors
/// What the system says.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    faults::check("rename", to)?;
    system::rename(from, to)?;
    faults::check("sync the folder of", to)?;
    if let Some(parent) = to.parent() {
        system::sync_names(parent)?;
    }
    faults::check("after", to)
}

/// Forces everything in a folder to the disk, and the folder itself.
///
/// # Errors
/// What the system says.
pub fn sync_folder(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        match path.is_dir() {
            true => sync_folder(&path)?,
            false => {
                faults::check("sync again", &path)?;
                system::sync_again(&path)?
            }
        }
    }
    faults::check("sync folder", dir)?;
    system::sync_names(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_leaves_nothing_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        write_whole(&path, b"first").unwrap();
        write_whole(&path, b"second").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"second");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        let nowhere = write_whole(&dir.path().join("no/such/folder"), b"x");
        assert_eq!(nowhere.unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
