//! The driver and cuBLAS, found by dlopen when they are asked for: the object links neither, so it loads anywhere.

use std::ffi::{c_char, c_int, c_uint, c_void, CStr};
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use crate::table::{Status, LOST, OUT_OF_MEMORY, REFUSED};

/// Why a call did not work.
#[derive(Clone, Debug)]
pub struct Fault {
    pub status: Status,
    pub why: String,
}

impl Fault {
    pub fn refused(why: impl Into<String>) -> Self {
        Self {
            status: REFUSED,
            why: why.into(),
        }
    }
}

pub type Result<T, E = Fault> = std::result::Result<T, E>;

/// An address in the device's memory.
pub type Address = u64;
pub type Handle = *mut c_void;

macro_rules! functions {
    ($(#[$doc:meta])* $name:ident { $($field:ident = $symbol:literal: fn($($arg:ty),*);)* }) => {
        $(#[$doc])*
        pub struct $name {
            $(pub $field: unsafe extern "C" fn($($arg),*) -> c_int,)*
        }

        impl $name {
            /// # Safety
            /// The library is what its name says, so that its functions have the types given here.
            unsafe fn read(library: &Library, file: &str) -> Result<Self> {
                Ok(Self {
                    $($field: {
                        // SAFETY: the caller's promise.
                        let found = unsafe { library.get::<unsafe extern "C" fn($($arg),*) -> c_int>($symbol) };
                        *found.map_err(|_| {
                            let name = String::from_utf8_lossy(&$symbol[..$symbol.len() - 1]);
                            Fault::refused(format!("{file} has no {name}: it is too old"))
                        })?
                    },)*
                })
            }
        }
    };
}

functions! {
    /// libcuda, by the names of its header, without prefix.
    Driver {
        init = b"cuInit\0": fn(c_uint);
        driver_version = b"cuDriverGetVersion\0": fn(*mut c_int);
        error_string = b"cuGetErrorString\0": fn(c_int, *mut *const c_char);
        device_count = b"cuDeviceGetCount\0": fn(*mut c_int);
        device = b"cuDeviceGet\0": fn(*mut c_int, c_int);
        device_name = b"cuDeviceGetName\0": fn(*mut c_char, c_int, c_int);
        device_attribute = b"cuDeviceGetAttribute\0": fn(*mut c_int, c_int, c_int);
        total_memory = b"cuDeviceTotalMem_v2\0": fn(*mut usize, c_int);
        retain = b"cuDevicePrimaryCtxRetain\0": fn(*mut Handle, c_int);
        release = b"cuDevicePrimaryCtxRelease_v2\0": fn(c_int);
        push = b"cuCtxPushCurrent_v2\0": fn(Handle);
        pop = b"cuCtxPopCurrent_v2\0": fn(*mut Handle);
        priorities = b"cuCtxGetStreamPriorityRange\0": fn(*mut c_int, *mut c_int);
        memory_info = b"cuMemGetInfo_v2\0": fn(*mut usize, *mut usize);
        load = b"cuModuleLoadData\0": fn(*mut Handle, *const c_void);
        function = b"cuModuleGetFunction\0": fn(*mut Handle, Handle, *const c_char);
        function_attribute = b"cuFuncSetAttribute\0": fn(Handle, c_int, c_int);
        unload = b"cuModuleUnload\0": fn(Handle);
        stream = b"cuStreamCreateWithPriority\0": fn(*mut Handle, c_uint, c_int);
        stream_destroy = b"cuStreamDestroy_v2\0": fn(Handle);
        synchronize = b"cuStreamSynchronize\0": fn(Handle);
        pool = b"cuMemPoolCreate\0": fn(*mut Handle, *const PoolProperties);
        pool_attribute = b"cuMemPoolSetAttribute\0": fn(Handle, c_int, *mut c_void);
        pool_destroy = b"cuMemPoolDestroy\0": fn(Handle);
        allocate = b"cuMemAllocFromPoolAsync\0": fn(*mut Address, usize, Handle, Handle);
        free = b"cuMemFreeAsync\0": fn(Address, Handle);
        to_device = b"cuMemcpyHtoDAsync_v2\0": fn(Address, *const c_void, usize, Handle);
        to_host = b"cuMemcpyDtoHAsync_v2\0": fn(*mut c_void, Address, usize, Handle);
        between = b"cuMemcpyDtoDAsync_v2\0": fn(Address, Address, usize, Handle);
        fill = b"cuMemsetD8Async\0": fn(Address, u8, usize, Handle);
        capture = b"cuStreamBeginCapture_v2\0": fn(Handle, c_int);
        capture_end = b"cuStreamEndCapture\0": fn(Handle, *mut Handle);
        graph_destroy = b"cuGraphDestroy\0": fn(Handle);
        instantiate = b"cuGraphInstantiateWithFlags\0": fn(*mut Handle, Handle, u64);
        replay = b"cuGraphLaunch\0": fn(Handle, Handle);
        replay_destroy = b"cuGraphExecDestroy\0": fn(Handle);
        launch = b"cuLaunchKernel\0": fn(Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle, *mut *mut c_void, *mut *mut c_void);
    }
}

functions! {
    /// cuBLAS, likewise.
    Blas {
        create = b"cublasCreate_v2\0": fn(*mut Handle);
        destroy = b"cublasDestroy_v2\0": fn(Handle);
        set_stream = b"cublasSetStream_v2\0": fn(Handle, Handle);
        workspace = b"cublasSetWorkspace_v2\0": fn(Handle, *mut c_void, usize);
        version = b"cublasGetVersion_v2\0": fn(Handle, *mut c_int);
        product = b"cublasGemmEx\0": fn(Handle, c_int, c_int, c_int, c_int, c_int, *const c_void, *const c_void, c_int, c_int, *const c_void, c_int, c_int, *const c_void, *mut c_void, c_int, c_int, c_int, c_int);
    }
}

/// `CUmemPoolProps` of CUDA 12 and 13: pinned memory of a device.
#[repr(C)]
pub struct PoolProperties {
    pub kind: c_int,
    pub handles: c_int,
    pub location_kind: c_int,
    pub location: c_int,
    pub security: *mut c_void,
    /// 0: as much as the system has; the ceiling is kept here.
    pub most: usize,
    pub usage: u16,
    pub reserved: [u8; 54],
}

/// Values of the driver's enums that are used here.
pub const ATTRIBUTE_MULTIPROCESSORS: c_int = 16;
pub const ATTRIBUTE_MAJOR: c_int = 75;
pub const ATTRIBUTE_MINOR: c_int = 76;
pub const ATTRIBUTE_POOLS: c_int = 115;
pub const FUNCTION_SHARED_BYTES: c_int = 8;
pub const POOL_KEEPS: c_int = 4;
/// Other threads, the host's among them, go on allocating while one captures.
pub const CAPTURE_THREAD_LOCAL: c_int = 1;
const ERROR_OUT_OF_MEMORY: c_int = 2;

/// Both libraries, once found. Whoever found them keeps them: a driver is not unloaded under a host that may use it too.
pub struct Libraries {
    pub driver: Driver,
    pub blas: Blas,
}

/// The libraries, looked for at the first call.
///
/// # Errors
/// Which one is missing, in a sentence.
pub fn libraries() -> Result<&'static Libraries> {
    static FOUND: OnceLock<Result<Libraries>> = OnceLock::new();
    let found = FOUND.get_or_init(|| {
        let (library, file) = open(&["libcuda.so.1"]).map_err(|why| {
            Fault::refused(format!(
                "no NVIDIA driver: {why}"
            ))
        })?;
        // SAFETY: libcuda.so.1 is the driver's interface.
        let driver = unsafe { Driver::read(library, file) }?;
        let (library, file) = open(&["libcublas.so.13", "libcublas.so.12"]).map_err(|why| {
            Fault::refused(format!(
                "no cuBLAS: {why} (it comes with the CUDA toolkit, and with PyTorch: put its folder where the system's loader looks)"
            ))
        })?;
        // SAFETY: libcublas.so is cuBLAS.
        let blas = unsafe { Blas::read(library, file) }?;
        Ok(Libraries { driver, blas })
    });
    found.as_ref().map_err(Clone::clone)
}

fn open(names: &[&'static str]) -> std::result::Result<(&'static Library, &'static str), String> {
    let mut why = String::new();
    for &name in names {
        // SAFETY: what these libraries do when they are loaded is what every CUDA program runs.
        match unsafe { Library::open(Some(name), RTLD_NOW | RTLD_LOCAL) } {
            Ok(library) => return Ok((Box::leak(Box::new(library)), name)),
            Err(error) => why = format!("{name} cannot be loaded ({})", root(&error)),
        }
    }
    Err(why)
}

/// The loader's own words.
fn root(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

impl Driver {
    /// Turns the driver's number into a fault.
    pub fn check(&self, code: c_int, doing: &str) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        let mut text = std::ptr::null();
        // SAFETY: writes a pointer to a text that is never freed, or leaves it.
        let said = unsafe { (self.error_string)(code, &mut text) };
        let text = match said == 0 && !text.is_null() {
            // SAFETY: the driver's texts end in a zero.
            true => unsafe { CStr::from_ptr(text) }.to_string_lossy(),
            false => "an error without a text".into(),
        };
        let status = match code {
            ERROR_OUT_OF_MEMORY => OUT_OF_MEMORY,
            _ => LOST,
        };
        Err(Fault {
            status,
            why: format!("{doing}: {text} (CUDA error {code})"),
        })
    }
}
