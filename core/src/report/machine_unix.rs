//! What Linux says of the machine; on other systems of its kind `/proc` is missing and most of this is unknown.

use std::path::Path;

/// All of the memory, and what programs can still get; 0 where the system does not say.
pub fn memory() -> (u64, u64) {
    let bytes = |name: &str| {
        field("/proc/meminfo", name)
            .and_then(|v| v.split(' ').next()?.parse::<u64>().ok())
            .unwrap_or(0)
            * 1024
    };
    (bytes("MemTotal"), bytes("MemAvailable"))
}

pub fn processor() -> Option<String> {
    field("/proc/cpuinfo", "model name")
}

pub fn graphics() -> &'static str {
    match Path::new("/proc/driver/nvidia/version").exists() {
        true => "an NVIDIA driver is here",
        false => "no NVIDIA driver found",
    }
}

/// Bytes that this user may still write to the file system that holds `path` or its nearest existing parent;
/// `None` where the system does not say.
pub fn disk_free_bytes(path: &Path) -> Option<u64> {
    use std::os::unix::ffi::OsStrExt;
    let absolute = std::path::absolute(path).ok()?;
    let place = absolute.ancestors().find(|p| p.exists())?;
    let name = std::ffi::CString::new(place.as_os_str().as_bytes()).ok()?;
    let mut found = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: `name` ends in a zero byte and `found` has room for what statvfs writes when it returns 0.
    let found = unsafe {
        if libc::statvfs(name.as_ptr(), found.as_mut_ptr()) != 0 {
            return None;
        }
        found.assume_init()
    };
    #[allow(clippy::unnecessary_cast)] // the width of these fields differs between systems
    Some(found.f_bavail as u64 * found.f_frsize as u64)
}

/// The value after `name:` in a file of lines; the first one.
fn field(file: &str, name: &str) -> Option<String> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text
        .lines()
        .find_map(|l| l.strip_prefix(name)?.trim_start().strip_prefix(':'))?;
    Some(line.trim().to_string())
}
