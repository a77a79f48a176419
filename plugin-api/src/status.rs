//! Statuses of `locum.h`, and [`Failure`], what becomes a `locum_error`.

use std::ffi::CStr;

use crate::handles::BadHandle;

pub const OK: i32 = 0;
pub const PENDING: i32 = 1;
pub const EMPTY: i32 = 2;
pub const TEACHER: i32 = 3;
pub const E_MISUSE: i32 = -1;
pub const E_ARGUMENT: i32 = -2;
pub const E_LIMIT: i32 = -3;
pub const E_BUSY: i32 = -4;
pub const E_TIMEOUT: i32 = -5;
pub const E_CANCELLED: i32 = -6;
pub const E_CLOSED: i32 = -7;
pub const E_FORKED: i32 = -8;
pub const E_NOT_FOUND: i32 = -9;
pub const E_STORE: i32 = -10;
pub const E_CORRUPT: i32 = -11;
pub const E_MODEL: i32 = -12;
pub const E_POLICY: i32 = -13;
pub const E_DEVICE: i32 = -14;
pub const E_MEMORY: i32 = -15;
pub const E_UNSUPPORTED: i32 = -16;
pub const E_INTERNAL: i32 = -17;

/// The name that `locum.h` gives a status.
pub fn name(status: i32) -> &'static CStr {
    match status {
        OK => c"LOCUM_OK",
        PENDING => c"LOCUM_PENDING",
        EMPTY => c"LOCUM_EMPTY",
        TEACHER => c"LOCUM_TEACHER",
        E_MISUSE => c"LOCUM_E_MISUSE",
        E_ARGUMENT => c"LOCUM_E_ARGUMENT",
        E_LIMIT => c"LOCUM_E_LIMIT",
        E_BUSY => c"LOCUM_E_BUSY",
        E_TIMEOUT => c"LOCUM_E_TIMEOUT",
        E_CANCELLED => c"LOCUM_E_CANCELLED",
        E_CLOSED => c"LOCUM_E_CLOSED",
        E_FORKED => c"LOCUM_E_FORKED",
        E_NOT_FOUND => c"LOCUM_E_NOT_FOUND",
        E_STORE => c"LOCUM_E_STORE",
        E_CORRUPT => c"LOCUM_E_CORRUPT",
        E_MODEL => c"LOCUM_E_MODEL",
        E_POLICY => c"LOCUM_E_POLICY",
        E_DEVICE => c"LOCUM_E_DEVICE",
        E_MEMORY => c"LOCUM_E_MEMORY",
        E_UNSUPPORTED => c"LOCUM_E_UNSUPPORTED",
        E_INTERNAL => c"LOCUM_E_INTERNAL",
        _ => c"LOCUM_E_UNKNOWN",
    }
}

/// Why an export failed. The message names ids, limits and causes, never what the host passed in as content.
#[derive(Debug)]
pub struct Failure {
    pub status: i32,
    pub message: String,
    pub os_code: i32,
}

impl Failure {
    pub fn new(status: i32, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
            os_code: 0,
        }
    }

    pub fn misuse(message: impl Into<String>) -> Self {
        Self::new(E_MISUSE, message)
    }

    pub fn argument(message: impl Into<String>) -> Self {
        Self::new(E_ARGUMENT, message)
    }
}

impl From<BadHandle> for Failure {
    fn from(bad: BadHandle) -> Self {
        let status = if bad == BadHandle::Forked {
            E_FORKED
        } else {
            E_MISUSE
        };
        Self::new(status, bad.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_of_the_header_has_its_name_and_its_number() {
        let header = include_str!("../include/locum.h");
        let mut seen = 0;
        for line in header.lines() {
            let Some((name_part, rest)) = line.trim().split_once(" = ") else {
                continue;
            };
            let is_status = name_part.starts_with("LOCUM_E_")
                || ["LOCUM_OK", "LOCUM_PENDING", "LOCUM_EMPTY", "LOCUM_TEACHER"]
                    .contains(&name_part);
            if !is_status {
                continue;
            }
            let digits: String = rest
                .chars()
                .take_while(|c| c.is_ascii_digit() || *c == '-')
                .collect();
            assert_eq!(name(digits.parse().unwrap()).to_str().unwrap(), name_part);
            seen += 1;
        }
        assert_eq!(seen, 21);
    }
}
