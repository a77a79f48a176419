//! What files and folders are to each system: whose they are, how one is renamed for good, how a folder is locked.

#[cfg(unix)]
pub use unix::*;
#[cfg(windows)]
pub use windows::*;

#[cfg(unix)]
mod unix {
    use std::fs::{self, DirBuilder, File, OpenOptions};
    use std::io;
    use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
    use std::path::Path;

    /// A file that is made shall be its user's alone: mode 0600.
    pub fn owner_only(options: &mut OpenOptions) -> &mut OpenOptions {
        options.mode(0o600)
    }

    /// A file that is opened shall not lie behind a symbolic link.
    pub fn unfollowed(options: &mut OpenOptions) -> &mut OpenOptions {
        options.custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
    }

    /// Makes folders that are their user's alone: mode 0700.
    pub fn private_folder() -> DirBuilder {
        let mut builder = DirBuilder::new();
        builder.mode(0o700);
        builder
    }

    pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    /// Forces the names in a folder to the disk.
    pub fn sync_names(dir: &Path) -> io::Result<()> {
        File::open(dir)?.sync_all()
    }

    /// Forces a file that is not open any more to the disk.
    pub fn sync_again(path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    /// Waits for the lock on a folder; the kernel gives it back when the file is dropped or the process ends.
    pub fn lock_folder(dir: &Path) -> io::Result<File> {
        let file = File::open(dir)?;
        file.lock()?;
        Ok(file)
    }

    /// Before a locked folder is renamed or removed: nothing to do here.
    pub fn free_to_move(_: &mut Option<File>, _: &Path) {}

    /// True if nobody holds the lock on a folder that is there.
    pub fn folder_is_free(dir: &Path) -> bool {
        File::open(dir).is_ok_and(|file| file.try_lock().is_ok())
    }
}

#[cfg(windows)]
mod windows {
    use std::fs::{self, DirBuilder, File, OpenOptions};
    use std::io;
    use std::os::windows::ffi::OsStrExt;
    use std::os::windows::fs::OpenOptionsExt;
    use std::path::Path;
    use std::time::Duration;

    use windows_sys::Win32::Storage::FileSystem::{
        MoveFileExW, FILE_FLAG_OPEN_REPARSE_POINT, MOVEFILE_REPLACE_EXISTING,
        MOVEFILE_WRITE_THROUGH,
    };

    /// Name of the file that stands for its folder where a folder itself cannot be locked.
    const LOCK: &str = ".lock";
    /// How often a name is tried that a reader, an indexer or a virus scanner holds for the moment, and the pause between.
    const TRIES: u32 = 50;
    const PAUSE: Duration = Duration::from_millis(10);

    /// Who may read a file is what its folder says: access lists are inherited, and none is set here.
    pub fn owner_only(options: &mut OpenOptions) -> &mut OpenOptions {
        options
    }

    /// A file that is opened shall not lie behind a symbolic link or a junction: the link itself is opened, which no lock and no
    /// write goes through.
    pub fn unfollowed(options: &mut OpenOptions) -> &mut OpenOptions {
        options.custom_flags(FILE_FLAG_OPEN_REPARSE_POINT)
    }

    /// Folders inherit the access list of the one above, which in a user's profile is that user's, the system's and the
    /// administrators'.
    pub fn private_folder() -> DirBuilder {
        DirBuilder::new()
    }

    /// Renames over what is there, and returns when the new name is on the disk.
    pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
        let wide =
            |path: &Path| -> Vec<u16> { path.as_os_str().encode_wide().chain([0]).collect() };
        let (from_wide, to_wide) = (wide(from), wide(to));
        let flags = MOVEFILE_REPLACE_EXISTING | MOVEFILE_WRITE_THROUGH;
        for _ in 1..TRIES {
            // SAFETY: both names end in a zero and outlive the call.
            if unsafe { MoveFileExW(from_wide.as_ptr(), to_wide.as_ptr(), flags) } != 0 {
                return Ok(());
            }
            let why = io::Error::last_os_error();
            if !held_for_the_moment(&why) || !from.exists() {
                return Err(why);
            }
            std::thread::sleep(PAUSE);
        }
        // Renames also over a file that somebody reads, where the file system can; it does not say when that is on the disk.
        fs::rename(from, to)
    }

    fn held_for_the_moment(error: &io::Error) -> bool {
        const SHARING_VIOLATION: i32 = 32;
        error.kind() == io::ErrorKind::PermissionDenied
            || error.raw_os_error() == Some(SHARING_VIOLATION)
    }

    /// A folder cannot be forced to the disk here: NTFS keeps its names in a journal of its own, and [`rename`] waits for it.
    pub fn sync_names(_: &Path) -> io::Result<()> {
        Ok(())
    }

    /// Forces a file that is not open any more to the disk, for which it must be opened to write.
    pub fn sync_again(path: &Path) -> io::Result<()> {
        OpenOptions::new().write(true).open(path)?.sync_all()
    }

    /// Waits for the lock on a folder, which is one on a file in it; the system gives it back when the file is dropped or the
    /// process ends.
    pub fn lock_folder(dir: &Path) -> io::Result<File> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let file = options.open(dir.join(LOCK))?;
        file.lock()?;
        Ok(file)
    }

    /// Before a locked folder is renamed or removed: the lock is given back and its file removed, for a folder with an open file in
    /// it can be neither. Nobody takes it for one that was left meanwhile: whoever renames holds the lock of the folder above.
    pub fn free_to_move(lock: &mut Option<File>, dir: &Path) {
        *lock = None;
        let _ = fs::remove_file(dir.join(LOCK));
    }

    /// True if nobody holds the lock on a folder that is there.
    pub fn folder_is_free(dir: &Path) -> bool {
        match OpenOptions::new()
            .read(true)
            .write(true)
            .open(dir.join(LOCK))
        {
            Ok(file) => file.try_lock().is_ok(),
            Err(error) => error.kind() == io::ErrorKind::NotFound && dir.is_dir(),
        }
    }
}
