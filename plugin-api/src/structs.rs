//! The structs of `locum.h`, field by field. A test compares sizes and offsets with what a C compiler says.

use crate::input::{LocumStr, Sized32};
use crate::output::LocumBytes;

pub const OPEN_READ_ONLY: u32 = 1;
pub const OPEN_NO_LEARNING: u32 = 2;
pub const OPEN_NO_MODEL: u32 = 4;
pub const OPEN_NO_DEVICE: u32 = 8;
pub const OPEN_DROP_OLDEST: u32 = 16;

#[derive(Clone, Copy)]
#[repr(C)]
pub struct Options {
    pub struct_size: u32,
    pub flags: u32,
    pub store_dir: LocumStr,
    pub policy_path: LocumStr,
    pub base_model_dir: LocumStr,
    pub worker_threads: u32,
    pub train_threads: u32,
    pub max_disk_bytes: u64,
    pub max_cache_bytes: u64,
    pub weights: i32,
    pub reserved: u32,
    pub device_library: LocumStr,
    pub max_device_bytes: u64,
    pub detectors: LocumStr,
}

pub const STEP_IS_ERROR: u32 = 1;

#[derive(Clone, Copy)]
#[repr(C)]
pub struct Step {
    pub struct_size: u32,
    pub flags: u32,
    pub role: i32,
    pub actor: i32,
    pub content_json: LocumStr,
    pub model: LocumStr,
    pub unix_ms: u64,
    pub cost_usd: f64,
    pub latency_ms: u32,
    pub reserved: u32,
}

pub const OUTCOME_HAS_SCORE: u32 = 1;

#[derive(Clone, Copy)]
#[repr(C)]
pub struct Outcome {
    pub struct_size: u32,
    pub flags: u32,
    pub status: i32,
    pub reserved: u32,
    pub score: f64,
    pub reason: LocumStr,
    pub details_json: LocumStr,
}

pub const REQUEST_GREEDY: u32 = 1;
pub const REQUEST_CALL_REQUIRED: u32 = 2;

#[derive(Clone, Copy)]
#[repr(C)]
pub struct Request {
    pub struct_size: u32,
    pub flags: u32,
    pub messages_json: LocumStr,
    pub tools_json: LocumStr,
    pub max_tokens: u32,
    pub deadline_ms: u32,
    pub temperature: f32,
    pub reserved: u32,
    pub seed: u64,
}

pub const WHO_TEACHER: i32 = 0;
pub const WHO_STUDENT: i32 = 1;

/// Room for a decision's reason with its NUL.
pub const REASON_BYTES: usize = 100;

#[derive(Clone, Copy)]
#[repr(C)]
pub struct Decision {
    pub struct_size: u32,
    pub who: i32,
    pub confidence: f32,
    pub decided_ns: u32,
    pub student_version: u64,
    pub reason_code: i32,
    pub reason: [u8; REASON_BYTES],
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct Event {
    pub struct_size: u32,
    pub kind: i32,
    pub subject: u64,
    pub number: i64,
    pub detail: LocumBytes,
}

// SAFETY: all are repr(C), begin with `struct_size: u32` and hold integers, floats and raw pointers only.
unsafe impl Sized32 for Options {
    const NAME: &'static str = "locum_options";
}
// SAFETY: as above.
unsafe impl Sized32 for Step {
    const NAME: &'static str = "locum_step";
}
// SAFETY: as above.
unsafe impl Sized32 for Outcome {
    const NAME: &'static str = "locum_outcome";
}
// SAFETY: as above.
unsafe impl Sized32 for Request {
    const NAME: &'static str = "locum_request";
}
// SAFETY: as above.
unsafe impl Sized32 for Decision {
    const NAME: &'static str = "locum_decision";
}
// SAFETY: as above.
unsafe impl Sized32 for Event {
    const NAME: &'static str = "locum_event";
}

/// Copies `text` into a fixed field, NUL-terminated and cut at a character.
pub fn fixed<const N: usize>(text: &str) -> [u8; N] {
    let mut field = [0; N];
    let mut end = text.len().min(N - 1);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    field[..end].copy_from_slice(&text.as_bytes()[..end]);
    // A NUL inside would end the text early for some readers and not for others.
    for byte in &mut field[..end] {
        if *byte == 0 {
            *byte = b' ';
        }
    }
    field
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    /// Compiles a C program that prints every size and offset, and compares.
    #[test]
    fn a_c_compiler_lays_the_structs_out_as_we_do() {
        let mut source =
            String::from("#include <stdio.h>\n#include \"locum.h\"\nint main(void) {\n");
        let mut expected = String::new();
        macro_rules! layout {
            ($rust:ty, $c:literal, [$($field:ident),*]) => {
                source += &format!("printf(\"{0} %zu\\n\", sizeof({0}));\n", $c);
                expected += &format!("{} {}\n", $c, size_of::<$rust>());
                $(
                    source += &format!("printf(\"{0}.{1} %zu\\n\", offsetof({0}, {1}));\n", $c, stringify!($field));
                    expected += &format!("{}.{} {}\n", $c, stringify!($field), offset_of!($rust, $field));
                )*
            };
        }
        layout!(LocumStr, "locum_str", [ptr, len]);
        layout!(LocumBytes, "locum_bytes", [ptr, len, owner]);
        layout!(
            Options,
            "locum_options",
            [
                struct_size,
                flags,
                store_dir,
                policy_path,
                base_model_dir,
                worker_threads,
                train_threads,
                max_disk_bytes,
                max_cache_bytes,
                weights,
                reserved,
                device_library,
                max_device_bytes
            ]
        );
        layout!(
            Step,
            "locum_step",
            [
                struct_size,
                flags,
                role,
                actor,
                content_json,
                model,
                unix_ms,
                cost_usd,
                latency_ms,
                reserved
            ]
        );
        layout!(
            Outcome,
            "locum_outcome",
            [
                struct_size,
                flags,
                status,
                reserved,
                score,
                reason,
                details_json
            ]
        );
        layout!(
            Request,
            "locum_request",
            [
                struct_size,
                flags,
                messages_json,
                tools_json,
                max_tokens,
                deadline_ms,
                temperature,
                reserved,
                seed
            ]
        );
        layout!(
            Decision,
            "locum_decision",
            [
                struct_size,
                who,
                confidence,
                decided_ns,
                student_version,
                reason_code,
                reason
            ]
        );
        layout!(
            Event,
            "locum_event",
            [struct_size, kind, subject, number, detail]
        );
        source += "return 0; }\n";
        let dir = tempfile::tempdir().unwrap();
        let (c, exe) = (dir.path().join("layout.c"), dir.path().join("layout"));
        std::fs::write(&c, source).unwrap();
        let include = concat!(env!("CARGO_MANIFEST_DIR"), "/include");
        let built = std::process::Command::new("cc")
            .args(["-std=c99", "-I", include, "-o"])
            .arg(&exe)
            .arg(&c)
            .status();
        assert!(built
            .expect("a C compiler is needed for this test")
            .success());
        let said = std::process::Command::new(&exe).output().unwrap();
        assert_eq!(String::from_utf8(said.stdout).unwrap(), expected);
    }

    #[test]
    fn a_reason_is_cut_at_a_character_and_always_terminated() {
        assert_eq!(&fixed::<8>("policy"), b"policy\0\0");
        assert_eq!(&fixed::<8>("1234567890"), b"1234567\0");
        assert_eq!(&fixed::<4>("aéé"), b"a\xc3\xa9\0");
        assert_eq!(&fixed::<4>("a\0b"), b"a b\0");
    }
}
