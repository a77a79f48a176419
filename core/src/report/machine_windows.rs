//! What Windows says of the machine.

use std::os::windows::ffi::OsStrExt;
use std::path::Path;

use windows_sys::Win32::Storage::FileSystem::GetDiskFreeSpaceExW;
use windows_sys::Win32::System::SystemInformation::{GlobalMemoryStatusEx, MEMORYSTATUSEX};

/// All of the memory, and what programs can still get; 0 if the system does not say.
pub fn memory() -> (u64, u64) {
    let mut found = MEMORYSTATUSEX {
        dwLength: size_of::<MEMORYSTATUSEX>() as u32,
        ..MEMORYSTATUSEX::default()
    };
    // SAFETY: the struct is ours and says its size.
    match unsafe { GlobalMemoryStatusEx(&mut found) } {
        0 => (0, 0),
        _ => (found.ullTotalPhys, found.ullAvailPhys),
    }
}

/// What the processor calls itself.
pub fn processor() -> Option<String> {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::__cpuid;
        if __cpuid(0x8000_0000).eax < 0x8000_0004 {
            return None;
        }
        let parts = (0x8000_0002..=0x8000_0004).map(|leaf| __cpuid(leaf));
        let bytes: Vec<u8> = parts
            .flat_map(|p| [p.eax, p.ebx, p.ecx, p.edx])
            .flat_map(u32::to_le_bytes)
            .take_while(|byte| *byte != 0)
            .collect();
        Some(String::from_utf8_lossy(&bytes).trim().to_string())
    }
    #[cfg(not(target_arch = "x86_64"))]
    None
}

pub fn graphics() -> &'static str {
    "not looked for: Locum computes on cards on Linux only"
}

/// Bytes that this user may still write to the volume that holds `path` or its nearest existing parent; `None` if the system does not
/// say.
pub fn disk_free_bytes(path: &Path) -> Option<u64> {
    let absolute = std::path::absolute(path).ok()?;
    let place = absolute.ancestors().find(|p| p.exists())?;
    let name: Vec<u16> = place.as_os_str().encode_wide().chain([0]).collect();
    let mut free = 0;
    let unasked = std::ptr::null_mut();
    // SAFETY: the name ends in a zero; the number is ours, and the two others are not asked for.
    let said = unsafe { GetDiskFreeSpaceExW(name.as_ptr(), &mut free, unasked, unasked) };
    (said != 0).then_some(free)
}
