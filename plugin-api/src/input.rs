//! What comes in from the host: text, names, JSON and structs, each checked once, here.

use std::borrow::Cow;
use std::mem::{size_of, MaybeUninit};

use locum_core::limits::{MAX_JSON_DEPTH, MAX_NAME_BYTES};
use serde_json::Value;

use crate::status::{Failure, E_LIMIT};

/// Borrowed text of a struct: `locum_str`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct LocumStr {
    pub ptr: *const u8,
    pub len: usize,
}

/// A C struct that begins with `uint32_t struct_size` and for which all bits zero is a value.
///
/// # Safety
/// Implementors are `repr(C)`, begin with the size field, and consist of integers, floats and raw pointers only.
pub unsafe trait Sized32: Copy {
    /// Name for messages.
    const NAME: &'static str;
}

/// Reads a struct of the host that may be shorter than ours; what it lacks is zero.
///
/// # Safety
/// `pointer` is null or points to a struct whose `struct_size` bytes are readable (locum.h, STRUCTS).
pub unsafe fn read_struct<T: Sized32>(pointer: *const T) -> Result<T, Failure> {
    let size = check_struct::<T>(pointer)?;
    let mut value = MaybeUninit::<T>::zeroed();
    // SAFETY: the caller promises `struct_size` readable bytes and we copy no more than those and than fit; all-zero is a
    // valid T, so the rest is initialised.
    unsafe {
        std::ptr::copy_nonoverlapping(
            pointer.cast::<u8>(),
            value.as_mut_ptr().cast::<u8>(),
            size.min(size_of::<T>()),
        );
        Ok(value.assume_init())
    }
}

/// Writes a struct into memory of the host that may be shorter than ours; the host's `struct_size` stays.
///
/// # Safety
/// As [`read_struct`], and writable.
pub unsafe fn write_struct<T: Sized32>(pointer: *mut T, value: &T) -> Result<(), Failure> {
    let size = check_struct::<T>(pointer)?;
    let header = size_of::<u32>();
    // SAFETY: the caller promises `struct_size` writable bytes; no more than those and than T has are written.
    unsafe {
        std::ptr::copy_nonoverlapping(
            (value as *const T).cast::<u8>().add(header),
            pointer.cast::<u8>().add(header),
            size.min(size_of::<T>()) - header,
        );
    }
    Ok(())
}

fn check_struct<T: Sized32>(pointer: *const T) -> Result<usize, Failure> {
    if pointer.is_null() {
        return Err(Failure::misuse(format!("{} is NULL", T::NAME)));
    }
    // SAFETY: not null, and every struct of locum.h begins with four bytes of size; read_unaligned since hosts that build
    // structs by hand may misalign them.
    let size = unsafe { pointer.cast::<u32>().read_unaligned() } as usize;
    if size < size_of::<u32>() {
        return Err(Failure::misuse(format!(
            "{}.struct_size is {size}; set it to sizeof({})",
            T::NAME,
            T::NAME
        )));
    }
    Ok(size)
}

/// Bytes that the host lends for the call. Null is allowed for length 0.
///
/// # Safety
/// `pointer` is null or readable for `len` bytes until the export returns (locum.h, TEXT and OWNERSHIP).
pub unsafe fn borrow_bytes<'a>(
    what: &str,
    pointer: *const u8,
    len: usize,
    limit: usize,
) -> Result<&'a [u8], Failure> {
    if len == 0 {
        return Ok(&[]);
    }
    if pointer.is_null() {
        return Err(Failure::argument(format!(
            "{what} is NULL but has a length of {len}"
        )));
    }
    if len > limit {
        return Err(Failure::new(
            E_LIMIT,
            format!("{what} has {len} bytes; the limit is {limit}"),
        ));
    }
    // SAFETY: not null, and the caller promises `len` readable bytes.
    Ok(unsafe { std::slice::from_raw_parts(pointer, len) })
}

/// A name or an id: valid UTF-8, no control characters, at most 256 bytes.
///
/// # Safety
/// As [`borrow_bytes`].
pub unsafe fn name<'a>(what: &str, pointer: *const u8, len: usize) -> Result<&'a str, Failure> {
    // SAFETY: passed on from the caller.
    let bytes = unsafe { borrow_bytes(what, pointer, len, MAX_NAME_BYTES) }?;
    let text = std::str::from_utf8(bytes)
        .map_err(|_| Failure::argument(format!("{what} is not UTF-8")))?;
    if text.chars().any(char::is_control) {
        return Err(Failure::argument(format!(
            "{what} contains a control character"
        )));
    }
    Ok(text)
}

/// Text in which what is not UTF-8 is replaced.
///
/// # Safety
/// As [`borrow_bytes`].
pub unsafe fn text<'a>(what: &str, s: LocumStr, limit: usize) -> Result<Cow<'a, str>, Failure> {
    // SAFETY: passed on from the caller.
    Ok(String::from_utf8_lossy(unsafe {
        borrow_bytes(what, s.ptr, s.len, limit)
    }?))
}

/// JSON, or `None` where nothing was given. Errors name the place, never the content.
///
/// # Safety
/// As [`borrow_bytes`].
pub unsafe fn json(what: &str, s: LocumStr, limit: usize) -> Result<Option<Value>, Failure> {
    // SAFETY: passed on from the caller.
    let bytes = unsafe { borrow_bytes(what, s.ptr, s.len, limit) }?;
    if bytes.is_empty() {
        return Ok(None);
    }
    let depth = json_depth(bytes);
    if depth > MAX_JSON_DEPTH {
        return Err(Failure::new(
            E_LIMIT,
            format!("{what} is nested deeper than {MAX_JSON_DEPTH} levels"),
        ));
    }
    let text = String::from_utf8_lossy(bytes);
    serde_json::from_str(&text)
        .map(Some)
        .map_err(|e| bad_json(what, &e))
}

/// A message for a value that serde refused, without the value.
pub fn bad_json(what: &str, error: &serde_json::Error) -> Failure {
    use serde_json::error::Category;
    let place = if error.line() > 0 {
        format!(" at line {} column {}", error.line(), error.column())
    } else {
        String::new()
    };
    Failure::argument(match error.classify() {
        Category::Eof => format!("{what} is JSON that ends too early{place}"),
        Category::Data => format!("{what} is JSON of the wrong shape{place}"),
        Category::Syntax | Category::Io => format!("{what} is not JSON{place}"),
    })
}

/// Deepest nesting of arrays and objects, counted without a stack so that no input can exhaust one.
fn json_depth(bytes: &[u8]) -> usize {
    let (mut depth, mut deepest) = (0usize, 0usize);
    let (mut in_string, mut escaped) = (false, false);
    for &byte in bytes {
        if in_string {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => in_string = false,
                _ => {}
            }
            continue;
        }
        match byte {
            b'"' => in_string = true,
            b'[' | b'{' => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::{E_ARGUMENT, E_MISUSE};

    #[derive(Clone, Copy, Debug, PartialEq)]
    #[repr(C)]
    struct Sample {
        struct_size: u32,
        a: u32,
        b: u64,
    }
    // SAFETY: repr(C), begins with its size, integers only.
    unsafe impl Sized32 for Sample {
        const NAME: &'static str = "sample";
    }

    fn str_of(bytes: &[u8]) -> LocumStr {
        LocumStr {
            ptr: bytes.as_ptr(),
            len: bytes.len(),
        }
    }

    #[test]
    fn a_shorter_struct_is_read_as_if_the_rest_were_zero() {
        let full = Sample {
            struct_size: 0,
            a: 0x0101_0101,
            b: u64::MAX,
        };
        for size in 4..=16u32 {
            let host = Sample {
                struct_size: size,
                ..full
            };
            // SAFETY: points to a live value.
            let read = unsafe { read_struct(&host) }.unwrap();
            assert_eq!(
                read.a,
                if size >= 8 {
                    full.a
                } else {
                    full.a & ((1u64 << ((size - 4) * 8)) - 1) as u32
                }
            );
            let whole = size.saturating_sub(8) as u64;
            assert_eq!(
                read.b,
                if whole == 8 {
                    u64::MAX
                } else {
                    (1u64 << (whole * 8)) - 1
                }
            );
        }
    }

    #[test]
    fn a_longer_struct_of_a_newer_host_is_read_as_far_as_we_know_it() {
        let host = [
            Sample {
                struct_size: 32,
                a: 1,
                b: 2,
            },
            Sample {
                struct_size: u32::MAX,
                a: u32::MAX,
                b: u64::MAX,
            },
        ];
        // SAFETY: 32 bytes live behind the pointer.
        let read = unsafe { read_struct(host.as_ptr()) }.unwrap();
        assert_eq!((read.a, read.b), (1, 2));
    }

    #[test]
    fn no_more_is_written_than_the_host_has_room_for() {
        for size in 4..=16usize {
            let mut host = [0xaau8; 24];
            host[..4].copy_from_slice(&(size as u32).to_ne_bytes());
            // SAFETY: 24 bytes live behind the pointer and the size says fewer.
            unsafe {
                write_struct(
                    host.as_mut_ptr().cast::<Sample>(),
                    &Sample {
                        struct_size: 0,
                        a: 0,
                        b: 0,
                    },
                )
            }
            .unwrap();
            assert_eq!(
                host[..4],
                (size as u32).to_ne_bytes(),
                "the host's size stays"
            );
            assert!(host[4..size].iter().all(|b| *b == 0));
            assert!(host[size..].iter().all(|b| *b == 0xaa), "size {size}");
        }
    }

    #[test]
    fn null_and_a_missing_size_are_misuse() {
        // SAFETY: null is allowed.
        let null = unsafe { read_struct::<Sample>(std::ptr::null()) };
        assert_eq!(null.unwrap_err().status, E_MISUSE);
        let unset = Sample {
            struct_size: 3,
            a: 1,
            b: 1,
        };
        // SAFETY: points to a live value.
        let unset = unsafe { read_struct(&unset) };
        assert_eq!(unset.unwrap_err().status, E_MISUSE);
    }

    #[test]
    fn a_null_pointer_with_a_length_and_a_length_over_the_limit_are_refused_before_anything_is_read(
    ) {
        // SAFETY: nothing is read in either case, which is what is tested.
        unsafe {
            assert_eq!(
                borrow_bytes("x", std::ptr::null(), usize::MAX, 10)
                    .unwrap_err()
                    .status,
                E_ARGUMENT
            );
            assert_eq!(borrow_bytes("x", std::ptr::null(), 0, 10).unwrap(), b"");
            assert_eq!(
                borrow_bytes("x", b"a".as_ptr(), usize::MAX, 10)
                    .unwrap_err()
                    .status,
                E_LIMIT
            );
        }
    }

    #[test]
    fn json_is_refused_by_depth_by_syntax_and_without_quoting_it() {
        let deep = [vec![b'['; 65], vec![b']'; 65]].concat();
        let fine = [vec![b'['; 64], vec![b']'; 64]].concat();
        // SAFETY: the slices live as long as the calls.
        unsafe {
            assert_eq!(
                json("x", str_of(&deep), 1 << 20).unwrap_err().status,
                E_LIMIT
            );
            assert!(json("x", str_of(&fine), 1 << 20).unwrap().is_some());
            assert!(json("x", str_of(br#"{"a":"[[[[[[[[\"[["}"#), 1 << 20)
                .unwrap()
                .is_some());
            let refused = json("x", str_of(br#"{"secret": canary}"#), 1 << 20).unwrap_err();
            assert_eq!(refused.status, E_ARGUMENT);
            assert!(
                !refused.message.contains("canary") && !refused.message.contains("secret"),
                "{}",
                refused.message
            );
            let replaced = json("x", str_of(b"\"a\xffb\""), 1 << 20).unwrap().unwrap();
            assert_eq!(replaced, Value::from("a\u{fffd}b"));
        }
    }

    #[test]
    fn names_are_short_printable_utf8() {
        // SAFETY: the slices live as long as the calls.
        unsafe {
            assert_eq!(name("x", "seed-7 é".as_ptr(), 9).unwrap(), "seed-7 é");
            assert_eq!(
                name("x", b"a\n".as_ptr(), 2).unwrap_err().status,
                E_ARGUMENT
            );
            assert_eq!(
                name("x", b"\xff".as_ptr(), 1).unwrap_err().status,
                E_ARGUMENT
            );
            let long = [b'a'; 257];
            assert_eq!(name("x", long.as_ptr(), 257).unwrap_err().status, E_LIMIT);
        }
    }
}
