//! A Rust host that loads the shared library at run time and plays one episode, as a plugin host would.
//! (A Rust program that links Locum itself uses `locum_core::locum::Locum` directly.)
//!
//!     cargo run --release --example rust-host -- target/release/liblocum.so STORE-DIRECTORY

use std::ffi::{c_char, CStr};
use std::process::ExitCode;

use libloading::Library;

/// Borrowed text.
#[repr(C)]
struct Str {
    ptr: *const u8,
    len: usize,
}

impl Str {
    const EMPTY: Str = Str {
        ptr: std::ptr::null(),
        len: 0,
    };

    fn of(text: &str) -> Str {
        Str {
            ptr: text.as_ptr(),
            len: text.len(),
        }
    }
}

/// The structs of `locum.h`; fields not named here are zero, which means "default".
#[repr(C)]
struct Options {
    struct_size: u32,
    flags: u32,
    store_dir: Str,
    policy_path: Str,
    base_model_dir: Str,
}

#[repr(C)]
struct Step {
    struct_size: u32,
    flags: u32,
    role: i32,
    actor: i32,
    content_json: Str,
}

#[repr(C)]
struct Outcome {
    struct_size: u32,
    flags: u32,
    status: i32,
}

#[repr(C)]
struct Request {
    struct_size: u32,
    flags: u32,
}

#[repr(C)]
struct Decision {
    struct_size: u32,
    who: i32,
    confidence: f32,
    decided_ns: u32,
    student_version: u64,
    reason_code: i32,
    reason: [u8; 100],
}

type Error = *mut std::ffi::c_void;

/// The functions this host uses, looked up once.
struct Locum {
    open: unsafe extern "C" fn(*const Options, *mut u64, *mut Error) -> i32,
    close: unsafe extern "C" fn(u64, u32, *mut Error) -> i32,
    begin:
        unsafe extern "C" fn(u64, *const u8, usize, *const u8, usize, *mut u64, *mut Error) -> i32,
    step: unsafe extern "C" fn(u64, *const Step, *mut Error) -> i32,
    end: unsafe extern "C" fn(u64, *const Outcome, *mut Error) -> i32,
    decide: unsafe extern "C" fn(u64, *const Request, *mut Decision, *mut Error) -> i32,
    error_message: unsafe extern "C" fn(Error) -> *const c_char,
    error_free: unsafe extern "C" fn(Error),
}

impl Locum {
    fn load(path: &str) -> Result<Locum, libloading::Error> {
        // SAFETY: the signatures are those of locum.h, and the library stays mapped for good.
        unsafe {
            let library: &'static Library = Box::leak(Box::new(Library::new(path)?));
            Ok(Locum {
                open: *library.get(b"locum_open")?,
                close: *library.get(b"locum_close")?,
                begin: *library.get(b"locum_episode_begin")?,
                step: *library.get(b"locum_episode_step")?,
                end: *library.get(b"locum_episode_end")?,
                decide: *library.get(b"locum_decide")?,
                error_message: *library.get(b"locum_error_message")?,
                error_free: *library.get(b"locum_error_free")?,
            })
        }
    }

    /// A status and its error as a `Result`.
    fn check(&self, what: &str, call: impl FnOnce(*mut Error) -> i32) -> Result<(), String> {
        let mut error: Error = std::ptr::null_mut();
        let status = call(&mut error);
        // SAFETY: the error is ours until it is freed here; its message lives as long.
        let message = unsafe {
            let message = CStr::from_ptr((self.error_message)(error))
                .to_string_lossy()
                .into_owned();
            (self.error_free)(error);
            message
        };
        if status < 0 {
            return Err(format!("{what}: status {status}: {message}"));
        }
        Ok(())
    }

    fn say(&self, episode: u64, actor: i32, message: &str) -> Result<(), String> {
        let step = Step {
            struct_size: size_of::<Step>() as u32,
            flags: 0,
            role: 0,
            actor,
            content_json: Str::of(message),
        };
        // SAFETY: `step` and its text live for the call.
        self.check("locum_episode_step", |error| unsafe {
            (self.step)(episode, &step, error)
        })
    }
}

/// Plays one episode and says who was chosen for its step.
pub fn play(library: &str, store: &str) -> Result<&'static str, String> {
    const TEACHER: i32 = 1;
    const SUCCESS: i32 = 1;
    let l = Locum::load(library).map_err(|e| e.to_string())?;
    let options = Options {
        struct_size: size_of::<Options>() as u32,
        flags: 0,
        store_dir: Str::of(store),
        policy_path: Str::EMPTY,
        base_model_dir: Str::EMPTY,
    };
    let (mut handle, mut episode) = (0, 0);
    // SAFETY: everything passed below is a live local of the type that locum.h names.
    unsafe {
        l.check("locum_open", |error| (l.open)(&options, &mut handle, error))?;
        let task = "door-1";
        l.check("locum_episode_begin", |error| {
            (l.begin)(
                handle,
                task.as_ptr(),
                task.len(),
                std::ptr::null(),
                0,
                &mut episode,
                error,
            )
        })?;
        l.say(episode, 0, r#"{"role":"user","content":"Open the door."}"#)?;
        let request = Request {
            struct_size: size_of::<Request>() as u32,
            flags: 0,
        };
        let mut decision: Decision = std::mem::zeroed();
        decision.struct_size = size_of::<Decision>() as u32;
        l.check("locum_decide", |error| {
            (l.decide)(episode, &request, &mut decision, error)
        })?;
        let who = if decision.who == 1 {
            "student"
        } else {
            "teacher"
        };
        let reason = CStr::from_bytes_until_nul(&decision.reason).unwrap_or_default();
        println!("the {who} plays: {}", reason.to_string_lossy());
        l.say(
            episode,
            TEACHER,
            r#"{"role":"assistant","content":"It is open."}"#,
        )?;
        let outcome = Outcome {
            struct_size: size_of::<Outcome>() as u32,
            flags: 0,
            status: SUCCESS,
        };
        l.check("locum_episode_end", |error| {
            (l.end)(episode, &outcome, error)
        })?;
        l.check("locum_close", |error| (l.close)(handle, 0, error))?;
        Ok(who)
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, library, store] = arguments.as_slice() else {
        eprintln!("usage: rust-host LIBRARY STORE-DIRECTORY");
        return ExitCode::from(2);
    };
    match play(library, store) {
        Ok(_) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("{problem}");
            ExitCode::FAILURE
        }
    }
}
