//! Group 1 of `locum.h`: what the library is. (Its log is in `log`.)

use std::ffi::{c_char, c_void, CStr};

use crate::guard::guard_plain;
use crate::output::{LocumBytes, LocumError};
use crate::status;
use crate::student::report_html;

pub const ABI_MAJOR: u32 = 0;
pub const ABI_MINOR: u32 = 1;

#[no_mangle]
pub extern "C" fn locum_abi_version() -> u32 {
    ABI_MAJOR << 16 | ABI_MINOR
}

#[no_mangle]
pub extern "C" fn locum_build_info() -> *const c_char {
    concat!(
        "locum ",
        env!("CARGO_PKG_VERSION"),
        " for ",
        env!("LOCUM_TARGET"),
        "\0"
    )
    .as_ptr()
    .cast()
}

#[no_mangle]
pub extern "C" fn locum_status_name(number: i32) -> *const c_char {
    status::name(number).as_ptr()
}

/// `locum_ext_report`.
#[repr(C)]
struct ReportExtension {
    struct_size: u32,
    html: unsafe extern "C" fn(u64, *mut LocumBytes, *mut *mut LocumError) -> i32,
}

static REPORT: ReportExtension = ReportExtension {
    struct_size: size_of::<ReportExtension>() as u32,
    html: report_html,
};

/// # Safety
/// `id` is null or NUL-terminated.
#[no_mangle]
pub unsafe extern "C" fn locum_extension(id: *const c_char) -> *const c_void {
    guard_plain(std::ptr::null(), || {
        if id.is_null() {
            return std::ptr::null();
        }
        // SAFETY: not null; locum.h asks for a NUL-terminated id.
        match unsafe { CStr::from_ptr(id) }.to_bytes() {
            b"locum.report/1" => (&raw const REPORT).cast(),
            _ => std::ptr::null(),
        }
    })
}
