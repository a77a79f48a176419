//! Group 3 of `locum.h`: opening and closing.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use locum_core::device::DeviceOptions;
use locum_core::limits::MAX_POLICY_BYTES;
use locum_core::locum::{Locum, Options as CoreOptions};
use locum_core::model::WeightFormat;
use locum_core::policy::Policy;
use locum_core::secrets::BadDetect;
use locum_lua::{LuaPolicy, PolicyOptions};

use crate::fork;
use crate::guard::{guard, quiet_panics, Breaker};
use crate::input::{borrow_bytes, read_struct, text, LocumStr};
use crate::instances::{objects, too_many, Instance};
use crate::output::{put, LocumError};
use crate::status::{Failure, E_LIMIT, E_NOT_FOUND, OK};
use crate::structs::{
    Options, OPEN_DROP_OLDEST, OPEN_NO_DEVICE, OPEN_NO_LEARNING, OPEN_NO_MODEL, OPEN_READ_ONLY,
};
use locum_core::threads::SignalsBlocked;

/// Longest path that is taken, in bytes.
const MAX_PATH_BYTES: usize = 4096;
/// Waiting time where the host says 0, for `locum_close` and `locum_flush`.
pub const DEFAULT_DRAIN_MS: u32 = 5000;

/// # Safety
/// `options`, `out` and `error` are null or as locum.h describes them.
#[no_mangle]
pub unsafe extern "C" fn locum_open(
    options: *const Options,
    out: *mut u64,
    error: *mut *mut LocumError,
) -> i32 {
    // SAFETY: `error` is as locum.h says.
    unsafe {
        guard("locum_open", error, |frame| {
            put("out", out, 0)?;
            // From here on, since compiling a policy starts a thread too.
            let _signals = SignalsBlocked::new();
            let options = read_struct(options)?;
            let read_only = options.flags & OPEN_READ_ONLY != 0;
            let options = core_options(&options)?;
            if read_only && !options.store_dir.is_dir() {
                return Err(Failure::new(
                    E_NOT_FOUND,
                    format!("there is no store in {}", options.store_dir.display()),
                ));
            }
            fork::watch();
            quiet_panics();
            let breaker = Arc::new(Breaker::default());
            frame.runs_in(&breaker);
            let locum = Locum::open(options)?;
            let instance = Arc::new(Instance::new(locum, read_only, breaker));
            let handle = objects()
                .instances
                .insert(instance)
                .ok_or_else(|| too_many("stores"))?;
            put("out", out, handle)?;
            Ok(OK)
        })
    }
}

/// # Safety
/// `error` is null or as locum.h describes it.
#[no_mangle]
pub unsafe extern "C" fn locum_close(
    handle: u64,
    drain_ms: u32,
    error: *mut *mut LocumError,
) -> i32 {
    // SAFETY: `error` is as locum.h says.
    unsafe {
        guard("locum_close", error, |frame| {
            if handle == 0 {
                return Ok(OK);
            }
            let instance = objects().instances.remove(handle)?;
            frame.runs_in(&instance.breaker);
            for generation in objects()
                .calls
                .remove_where(|c| Arc::ptr_eq(&c.instance, &instance))
            {
                generation.call.cancel();
            }
            drop(
                objects()
                    .episodes
                    .remove_where(|e| Arc::ptr_eq(&e.instance, &instance)),
            );
            // Before the event handle goes, which the wake thread watches.
            drop(
                instance
                    .wake
                    .lock()
                    .unwrap_or_else(|e| e.into_inner())
                    .take(),
            );
            instance.locum.close(wait(drain_ms))?;
            Ok(OK)
        })
    }
}

/// The duration that a host means with 0 or a number of milliseconds.
pub fn wait(ms: u32) -> Duration {
    Duration::from_millis(u64::from(if ms == 0 { DEFAULT_DRAIN_MS } else { ms }))
}

/// # Safety
/// The strings of `options` are readable.
unsafe fn core_options(options: &Options) -> Result<CoreOptions, Failure> {
    let known =
        OPEN_READ_ONLY | OPEN_NO_LEARNING | OPEN_NO_MODEL | OPEN_NO_DEVICE | OPEN_DROP_OLDEST;
    if options.flags & !known != 0 {
        return Err(Failure::argument(format!(
            "locum_options.flags has unknown bits {:#x}",
            options.flags & !known
        )));
    }
    // SAFETY: passed on from the caller.
    let (store_dir, policy_path, base, device) = unsafe {
        (
            path("locum_options.store_dir", options.store_dir)?,
            path("locum_options.policy_path", options.policy_path)?,
            path("locum_options.base_model_dir", options.base_model_dir)?,
            path("locum_options.device_library", options.device_library)?,
        )
    };
    let store_dir =
        store_dir.ok_or_else(|| Failure::argument("locum_options.store_dir is empty"))?;
    let policy: Arc<dyn Policy> = match policy_path {
        Some(path) => read_policy(&path)?,
        None => Arc::new(LuaPolicy::default_policy()?),
    };
    // SAFETY: passed on from the caller.
    let detectors = unsafe { text("locum_options.detectors", options.detectors, MAX_PATH_BYTES) }?;
    let detect = detectors
        .parse()
        .map_err(|e: BadDetect| Failure::argument(format!("locum_options.detectors: {e}")))?;
    Ok(CoreOptions {
        store_dir,
        detect,
        base,
        threads: options.worker_threads as usize,
        train_threads: options.train_threads as usize,
        policy: Some(policy),
        no_learning: options.flags & (OPEN_NO_LEARNING | OPEN_READ_ONLY) != 0,
        no_model: options.flags & (OPEN_NO_MODEL | OPEN_READ_ONLY) != 0,
        max_disk_bytes: options.max_disk_bytes,
        drop_oldest: options.flags & OPEN_DROP_OLDEST != 0,
        max_cache_bytes: usize::try_from(options.max_cache_bytes).unwrap_or(usize::MAX),
        weights: match options.weights {
            0 | 2 => WeightFormat::Bf16,
            1 => WeightFormat::F32,
            3 => WeightFormat::Q8,
            4 => WeightFormat::Q4,
            other => {
                return Err(Failure::argument(format!(
                    "weights is {other}, a LOCUM_WEIGHTS_* from 0 to 4 is expected"
                )))
            }
        },
        device: DeviceOptions {
            off: options.flags & OPEN_NO_DEVICE != 0,
            library: device,
            memory_bytes: options.max_device_bytes,
        },
    })
}

/// # Safety
/// `s` is readable.
unsafe fn path(what: &str, s: LocumStr) -> Result<Option<PathBuf>, Failure> {
    // SAFETY: passed on from the caller.
    let bytes = unsafe { borrow_bytes(what, s.ptr, s.len, MAX_PATH_BYTES) }?;
    let text = std::str::from_utf8(bytes)
        .map_err(|_| Failure::argument(format!("{what} is not UTF-8")))?;
    if text.contains('\0') {
        return Err(Failure::argument(format!("{what} contains a NUL")));
    }
    Ok((!text.is_empty()).then(|| PathBuf::from(text)))
}

fn read_policy(path: &std::path::Path) -> Result<Arc<dyn Policy>, Failure> {
    use std::io::Read;
    let fail = |e: std::io::Error| Failure {
        status: E_NOT_FOUND,
        message: format!("policy {}: {e}", path.display()),
        os_code: e.raw_os_error().unwrap_or(0),
    };
    let mut source = String::new();
    let file = std::fs::File::open(path).map_err(fail)?;
    // One byte more than allowed tells a file that is too long from one that just fits, whatever its size says.
    file.take(MAX_POLICY_BYTES as u64 + 1)
        .read_to_string(&mut source)
        .map_err(fail)?;
    if source.len() > MAX_POLICY_BYTES {
        return Err(Failure::new(
            E_LIMIT,
            format!(
                "policy {} is larger than {MAX_POLICY_BYTES} bytes",
                path.display()
            ),
        ));
    }
    let name = path
        .file_name()
        .map_or_else(|| "policy".into(), |n| n.to_string_lossy().into_owned());
    compile(&source, &name)
}

/// Compiles a policy and runs its self-test.
pub fn compile(source: &str, name: &str) -> Result<Arc<dyn Policy>, Failure> {
    let policy = LuaPolicy::from_source(source, name, PolicyOptions::default())?;
    Ok(Arc::new(policy))
}
