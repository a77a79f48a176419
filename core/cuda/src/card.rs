//! A device that was opened: its context, the kernels, memory under a ceiling, and lanes on which work is queued.

use std::collections::HashMap;
use std::ffi::{c_int, c_void, CString};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use crate::driver::{
    libraries, Address, Fault, Handle, Libraries, PoolProperties, Result, ATTRIBUTE_MAJOR,
    ATTRIBUTE_MINOR, ATTRIBUTE_MULTIPROCESSORS, ATTRIBUTE_POOLS, CAPTURE_THREAD_LOCAL,
    FUNCTION_SHARED_BYTES, POOL_KEEPS,
};
use crate::table::{Info, Limits, LOST, OUT_OF_MEMORY};

/// What `build.py` compiled; empty where the object was built without.
static KERNELS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin"));
/// The oldest generation that the kernels are made for.
const OLDEST: (u32, u32) = (8, 0);
/// What is counted for a kernel of a graph: the driver does not tell what it keeps for one.
const KERNEL_BYTES: usize = 2 << 10;
/// Memory below which nothing is begun.
const LEAST_BYTES: u64 = 256 << 20;

/// Kernels that there are for each format.
const FORMATTED: &[&str] = &[
    "embed",
    "rms_norm",
    "rope_split",
    "swiglu",
    "one_row",
    "four_rows",
    "normed_one",
    "normed_four",
    "gated_one",
    "gated_four",
    "convert",
    "attend_row1",
    "attend_row2",
    "attend_row4",
    "attend_row8",
    "meet_rows",
    "cross_entropy",
    "swiglu_back",
    "head_dots",
    "rope_join",
    "adamw",
    "attend_dq1",
    "attend_dq2",
    "attend_dq4",
    "attend_dq8",
    "attend_dkv1",
    "attend_dkv2",
    "attend_dkv4",
    "attend_dkv8",
];
/// Kernels that there is one of.
const PLAIN: &[&str] = &[
    "met_rows",
    "filter_chunk",
    "distance_parts",
    "judge_drift",
    "begin_again",
    "learned_change",
    "decay_weight",
    "correct_rows",
    "correct_rows_back",
    "rms_norm_back",
    "add_rows",
    "add_heads",
    "embed_back",
    "join_parts",
    "filter_rows",
    "filter_rows_back",
    "filter_taps_back",
];
/// Kernels that there are for each of some widths of a head.
pub const TILES: [&str; 3] = ["attend_tile", "attend_dq_tile", "attend_dkv_tile"];
/// Widths of a head that attention in tiles knows.
pub const TILED: [usize; 4] = [16, 32, 64, 128];

/// Numbers of matrices and activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    F32,
    Bf16,
}

impl Format {
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }

    /// `cudaDataType`.
    fn data_type(self) -> c_int {
        match self {
            Self::F32 => 0,
            Self::Bf16 => 14,
        }
    }
}

pub struct Card {
    libraries: &'static Libraries,
    device: c_int,
    context: Handle,
    module: Handle,
    functions: HashMap<(&'static str, Option<Format>), Handle>,
    tiles: HashMap<(&'static str, usize), Handle>,
    pool: Handle,
    limit: u64,
    used: AtomicU64,
    peak: AtomicU64,
    lost: AtomicBool,
    graphs: AtomicU32,
    /// Why steps are queued kernel by kernel, and whether that is for good.
    single: Mutex<(String, bool)>,
    about: Info,
}

// SAFETY: the handles may be used from any thread by which the context is current, which `enter` sees to.
unsafe impl Send for Card {}
// SAFETY: as above.
unsafe impl Sync for Card {}

/// While it lives, the card's context is current on this thread; afterwards what was before.
pub struct Entered<'a>(&'a Card);

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let mut left = null_mut();
        // SAFETY: takes back what `enter` pushed.
        unsafe { (self.0.libraries.driver.pop)(&mut left) };
    }
}

/// What the driver says of a device, with its context current or not.
fn about(libraries: &Libraries, limits: &Limits) -> Result<(c_int, Info)> {
    let driver = &libraries.driver;
    let (mut version, mut count, mut device) = (0, 0, 0);
    // SAFETY: each call writes to a variable of the type it expects.
    unsafe {
        driver
            .check((driver.init)(0), "the driver does not start")
            .map_err(absent)?;
        driver
            .check((driver.driver_version)(&mut version), "asking the driver")
            .map_err(absent)?;
        driver
            .check((driver.device_count)(&mut count), "asking for devices")
            .map_err(absent)?;
        if count == 0 {
            return Err(Fault::refused("the driver knows no device"));
        }
        driver
            .check(
                (driver.device)(&mut device, limits.device),
                "asking for the device",
            )
            .map_err(absent)?;
    }
    let attribute = |which| -> Result<u32> {
        let mut value = 0;
        // SAFETY: as above.
        driver.check(
            unsafe { (driver.device_attribute)(&mut value, which, device) },
            "asking for the device",
        )?;
        Ok(value as u32)
    };
    let mut info = Info {
        name: [0; 128],
        major: attribute(ATTRIBUTE_MAJOR)?,
        minor: attribute(ATTRIBUTE_MINOR)?,
        driver: version as u32,
        blas: 0,
        multiprocessors: attribute(ATTRIBUTE_MULTIPROCESSORS)?,
        graphs: 0,
        memory_bytes: 0,
        free_bytes: 0,
        limit_bytes: 0,
        used_bytes: 0,
        peak_bytes: 0,
        single: [0; 256],
    };
    let mut total = 0usize;
    // SAFETY: the name is cut at its room's end by the driver.
    unsafe {
        driver.check(
            (driver.device_name)(info.name.as_mut_ptr().cast(), 127, device),
            "asking for the device's name",
        )?;
        driver.check(
            (driver.total_memory)(&mut total, device),
            "asking for the memory",
        )?;
    }
    info.memory_bytes = total as u64;
    if (info.major, info.minor) < OLDEST {
        return Err(Fault::refused(format!(
            "{} is too old: it is of generation {}.{}, {}.{} (Ampere) is needed",
            name(&info),
            info.major,
            info.minor,
            OLDEST.0,
            OLDEST.1
        )));
    }
    if attribute(ATTRIBUTE_POOLS)? == 0 {
        return Err(Fault::refused(format!(
            "{} has no memory pools",
            name(&info)
        )));
    }
    Ok((device, info))
}

/// A driver that cannot be asked is as good as none.
fn absent(fault: Fault) -> Fault {
    Fault::refused(fault.why)
}

fn name(info: &Info) -> String {
    let end = info.name.iter().position(|b| *b == 0).unwrap_or(0);
    String::from_utf8_lossy(&info.name[..end]).into_owned()
}

impl Card {
    /// Opens a device beside whatever else the process does there: the primary context is shared, nothing is reset.
    ///
    /// # Errors
    /// A sentence that says what is missing.
    pub fn open(limits: &Limits) -> Result<Arc<Self>> {
        let libraries = libraries()?;
        let driver = &libraries.driver;
        let (device, mut about) = about(libraries, limits)?;
        let mut context = null_mut();
        // SAFETY: writes a handle.
        driver
            .check(
                unsafe { (driver.retain)(&mut context, device) },
                "entering the device",
            )
            .map_err(absent)?;
        let mut card = Self {
            libraries,
            device,
            context,
            module: null_mut(),
            functions: HashMap::new(),
            tiles: HashMap::new(),
            pool: null_mut(),
            limit: 0,
            used: AtomicU64::new(0),
            peak: AtomicU64::new(0),
            lost: AtomicBool::new(false),
            graphs: AtomicU32::new(0),
            single: Mutex::default(),
            about,
        };
        {
            let entered = card.enter()?;
            let (mut free, mut total) = (0usize, 0usize);
            // SAFETY: writes two numbers.
            driver.check(
                unsafe { (driver.memory_info)(&mut free, &mut total) },
                "asking for free memory",
            )?;
            about.free_bytes = free as u64;
            about.limit_bytes = match limits.memory_bytes {
                0 => about.free_bytes / 4 * 3,
                some => some.min(about.free_bytes),
            };
            if about.limit_bytes < LEAST_BYTES {
                return Err(Fault::refused(format!(
                    "{} has {} MiB free and {} MiB may be taken: {} MiB are the least",
                    name(&about),
                    about.free_bytes >> 20,
                    about.limit_bytes >> 20,
                    LEAST_BYTES >> 20
                )));
            }
            drop(entered);
        }
        card.about = about;
        card.limit = about.limit_bytes;
        card.load()?;
        card.make_pool()?;
        let card = Arc::new(card);
        let version = Lane::new(&card, false)?.version()?;
        // Nobody else has it yet.
        let mut card = card;
        if let Some(card) = Arc::get_mut(&mut card) {
            card.about.blas = version;
        }
        Ok(card)
    }

    fn load(&mut self) -> Result<()> {
        let driver = &self.libraries.driver;
        let (mut module, mut functions, mut tiles) = (null_mut(), HashMap::new(), HashMap::new());
        {
            let _entered = self.enter()?;
            let image: *const c_void = KERNELS.as_ptr().cast();
            // SAFETY: the image is a fat binary; an empty one is read by the tests' stand-in alone, real drivers refuse it.
            let loaded = match KERNELS.is_empty() {
                true => unsafe { (driver.load)(&mut module, [0u8; 16].as_ptr().cast()) },
                false => unsafe { (driver.load)(&mut module, image) },
            };
            driver
                .check(loaded, "the kernels cannot be loaded")
                .map_err(|fault| {
                    let hint = match KERNELS.is_empty() {
                        true => {
                            ": this object was built without them, `make cuda` builds one with them"
                        }
                        false => ": the driver may be older than CUDA 13 (580)",
                    };
                    Fault::refused(fault.why + hint)
                })?;
            let find = |name: String| -> Result<Handle> {
                let (mut function, text) = (
                    null_mut(),
                    CString::new(name.clone()).expect("no zero in a name"),
                );
                // SAFETY: writes a handle; the name ends in a zero.
                let found = unsafe { (driver.function)(&mut function, module, text.as_ptr()) };
                driver
                    .check(found, &format!("kernel {name}"))
                    .map_err(absent)?;
                Ok(function)
            };
            for base in FORMATTED {
                for (format, end) in [(Format::F32, "f32"), (Format::Bf16, "bf16")] {
                    functions.insert((*base, Some(format)), find(format!("{base}_{end}"))?);
                }
            }
            for base in PLAIN {
                functions.insert((*base, None), find(base.to_string())?);
            }
            for (base, width) in TILES.into_iter().flat_map(|b| TILED.map(|w| (b, w))) {
                let function = find(format!("{base}{width}"))?;
                let bytes = crate::attention::tile_bytes(base, width) as c_int;
                // A device that has not so much goes by rows.
                // SAFETY: plain numbers.
                if unsafe { (driver.function_attribute)(function, FUNCTION_SHARED_BYTES, bytes) }
                    == 0
                {
                    tiles.insert((base, width), function);
                }
            }
        }
        (self.module, self.functions, self.tiles) = (module, functions, tiles);
        Ok(())
    }

    /// A pool of our own: the host's PyTorch keeps its own in the same context.
    fn make_pool(&mut self) -> Result<()> {
        let driver = &self.libraries.driver;
        let properties = PoolProperties {
            kind: 1,
            handles: 0,
            location_kind: 1,
            location: self.device,
            security: null_mut(),
            most: 0,
            usage: 0,
            reserved: [0; 54],
        };
        let (mut pool, mut keeps) = (null_mut(), self.limit);
        {
            let _entered = self.enter()?;
            // SAFETY: the properties are laid out as the driver has them; the attribute is a 64-bit number.
            unsafe {
                driver.check(
                    (driver.pool)(&mut pool, &properties),
                    "making a memory pool",
                )?;
                driver.check(
                    (driver.pool_attribute)(pool, POOL_KEEPS, (&raw mut keeps).cast()),
                    "setting up the memory pool",
                )?;
            }
        }
        self.pool = pool;
        Ok(())
    }

    /// Makes the context current on this thread.
    ///
    /// # Errors
    /// A device that was lost stays lost.
    pub fn enter(&self) -> Result<Entered<'_>> {
        if self.lost.load(Ordering::Relaxed) {
            return Err(Fault {
                status: LOST,
                why: "the device failed earlier".into(),
            });
        }
        let driver = &self.libraries.driver;
        // SAFETY: the context was retained at opening.
        driver.check(
            unsafe { (driver.push)(self.context) },
            "entering the device",
        )?;
        Ok(Entered(self))
    }

    /// Remembers a device that failed.
    pub fn note(&self, fault: &Fault) {
        if fault.status == LOST {
            self.lost.store(true, Ordering::Relaxed);
        }
    }

    /// As it is now.
    pub fn info(&self) -> Info {
        let mut info = self.about;
        if let Ok(_entered) = self.enter() {
            let (mut free, mut total) = (0usize, 0usize);
            // SAFETY: writes two numbers.
            if unsafe { (self.libraries.driver.memory_info)(&mut free, &mut total) } == 0 {
                info.free_bytes = free as u64;
            }
        }
        info.used_bytes = self.used.load(Ordering::Relaxed);
        info.peak_bytes = self.peak.load(Ordering::Relaxed);
        info.graphs = self.graphs.load(Ordering::Relaxed);
        let (why, _) = &*self.single();
        let mut len = why.len().min(info.single.len() - 1);
        while !why.is_char_boundary(len) {
            len -= 1;
        }
        info.single[..len].copy_from_slice(&why.as_bytes()[..len]);
        info
    }

    fn single(&self) -> MutexGuard<'_, (String, bool)> {
        self.single.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Notes why steps are queued kernel by kernel, for good or until there is memory again; empty: they are not. What is for good stays.
    pub fn queues_singly(&self, why: &str, for_good: bool) {
        let mut single = self.single();
        if !single.1 {
            *single = (why.into(), for_good);
        }
    }

    /// Whether this card makes graphs.
    pub fn makes_graphs(&self) -> bool {
        !self.single().1
    }

    /// Counts memory that is not allocated here, but because of us.
    ///
    /// # Errors
    /// Out of memory, under the limit.
    fn claim(self: &Arc<Self>, bytes: usize) -> Result<Claim> {
        let used = self.used.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        let claim = Claim {
            card: self.clone(),
            bytes: bytes as u64,
        };
        if used > self.limit {
            return Err(Fault {
                status: OUT_OF_MEMORY,
                why: format!(
                    "{} MiB more are needed, {} of {} MiB are used",
                    bytes.div_ceil(1 << 20),
                    (used - bytes as u64) >> 20,
                    self.limit >> 20
                ),
            });
        }
        self.peak.fetch_max(used, Ordering::Relaxed);
        Ok(claim)
    }

    pub fn multiprocessors(&self) -> usize {
        self.about.multiprocessors as usize
    }

    /// What cuBLAS is advised to be given to work in.
    fn workspace_bytes(&self) -> usize {
        match self.about.major {
            9.. => 32 << 20,
            _ => 4 << 20,
        }
    }

    /// What a device is, without keeping anything of it.
    pub fn probe(limits: &Limits) -> Result<Info> {
        about(libraries()?, limits).map(|(_, info)| info)
    }

    pub fn has_tiles(&self, width: usize) -> bool {
        TILES
            .iter()
            .all(|base| self.tiles.contains_key(&(*base, width)))
    }
}

impl Drop for Card {
    fn drop(&mut self) {
        let driver = &self.libraries.driver;
        if let Ok(entered) = self.enter() {
            // SAFETY: nothing of the card is left that uses them.
            unsafe {
                if !self.pool.is_null() {
                    (driver.pool_destroy)(self.pool);
                }
                if !self.module.is_null() {
                    (driver.unload)(self.module);
                }
            }
            drop(entered);
        }
        // SAFETY: retained at opening, once.
        unsafe { (driver.release)(self.device) };
    }
}

/// Bytes that are used while it lives.
struct Claim {
    card: Arc<Card>,
    bytes: u64,
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.card.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// A queue of work on the device, with its cuBLAS. Work of one lane is done in order.
pub struct Lane {
    pub card: Arc<Card>,
    stream: Handle,
    blas: Handle,
    /// What cuBLAS works in, once graphs are made: left to itself it allocates, which a capture does not allow.
    workspace: Mutex<Option<(Address, Claim)>>,
}

// SAFETY: as for `Card`; two threads never queue on one lane at once.
unsafe impl Send for Lane {}
// SAFETY: as above.
unsafe impl Sync for Lane {}

/// A matrix in memory: where it begins, and how many numbers its rows, as stored, are apart.
#[derive(Clone, Copy)]
pub struct Mat {
    pub at: Address,
    pub stride: usize,
    pub format: Format,
    pub transposed: bool,
}

impl Mat {
    pub fn new(at: Address, stride: usize, format: Format) -> Self {
        Self {
            at,
            stride,
            format,
            transposed: false,
        }
    }

    pub fn t(self) -> Self {
        Self {
            transposed: !self.transposed,
            ..self
        }
    }
}

/// A kernel's argument of a type that kernels have.
pub trait Argument {}
impl Argument for Address {}
impl Argument for i32 {}
impl Argument for f32 {}
impl Argument for f64 {}

pub fn argument<T: Argument>(x: &mut T) -> *mut c_void {
    std::ptr::from_mut(x).cast()
}

/// `launch!(lane, kernel, (x, y, z), threads, shared bytes; arguments)`.
macro_rules! launch {
    ($lane:expr, $function:expr, $grid:expr, $threads:expr, $shared:expr; $($argument:expr),* $(,)?) => {
        $lane.launch($function, $grid, $threads, $shared, &mut [$($crate::card::argument(&mut { $argument })),*])
    };
}
pub(crate) use launch;

impl Lane {
    /// A lane that serves comes before one that trains, on the device too.
    pub fn new(card: &Arc<Card>, training: bool) -> Result<Arc<Self>> {
        let _entered = card.enter()?;
        let (driver, blas) = (&card.libraries.driver, &card.libraries.blas);
        let (mut least, mut greatest, mut stream, mut handle) = (0, 0, null_mut(), null_mut());
        // SAFETY: each call writes to a variable of the type it expects; 1 is a stream that does not wait for the default one.
        unsafe {
            driver.check(
                (driver.priorities)(&mut least, &mut greatest),
                "asking for priorities",
            )?;
            let priority = if training { least } else { greatest };
            driver.check((driver.stream)(&mut stream, 1, priority), "making a stream")?;
        }
        // SAFETY: as above.
        let made = unsafe { (blas.create)(&mut handle) };
        let lane = Self {
            card: card.clone(),
            stream,
            blas: handle,
            workspace: Mutex::default(),
        };
        blas_check(made, "cuBLAS does not start").map_err(absent)?;
        // SAFETY: both were just made.
        blas_check(
            unsafe { (blas.set_stream)(handle, stream) },
            "cuBLAS takes no stream",
        )?;
        Ok(Arc::new(lane))
    }

    fn version(&self) -> Result<u32> {
        let _entered = self.card.enter()?;
        let mut version = 0;
        // SAFETY: writes a number.
        blas_check(
            unsafe { (self.card.libraries.blas.version)(self.blas, &mut version) },
            "asking cuBLAS",
        )?;
        Ok(version as u32)
    }

    fn check(&self, code: c_int, doing: &str) -> Result<()> {
        self.card.libraries.driver.check(code, doing)
    }

    /// Memory for so many bytes, with rubbish in it.
    ///
    /// # Errors
    /// Out of memory, under the limit or on the device.
    pub fn buffer(self: &Arc<Self>, bytes: usize) -> Result<Buffer> {
        let bytes = bytes.max(16);
        let (at, claim) = self.allocate(bytes)?;
        let memory = Memory {
            lane: self.clone(),
            at,
            _claim: claim,
        };
        Ok(Buffer {
            memory: Arc::new(memory),
            at,
            bytes,
        })
    }

    fn allocate(&self, bytes: usize) -> Result<(Address, Claim)> {
        let card = &self.card;
        let claim = card.claim(bytes)?;
        let mut at = 0;
        // SAFETY: writes an address.
        let got =
            unsafe { (card.libraries.driver.allocate)(&mut at, bytes, card.pool, self.stream) };
        self.check(got, "allocating")?;
        Ok((at, claim))
    }

    /// Gives cuBLAS memory of ours to work in, once.
    ///
    /// # Errors
    /// Out of memory.
    pub fn give_workspace(&self) -> Result<()> {
        let mut workspace = self.workspace.lock().unwrap_or_else(|e| e.into_inner());
        if workspace.is_some() {
            return Ok(());
        }
        let bytes = self.card.workspace_bytes();
        let (at, claim) = self.allocate(bytes)?;
        // The lane frees it from now on, whatever cuBLAS says.
        *workspace = Some((at, claim));
        // SAFETY: memory of this lane, which lives as long as its cuBLAS.
        let given =
            unsafe { (self.card.libraries.blas.workspace)(self.blas, at as *mut c_void, bytes) };
        blas_check(given, "cuBLAS takes no workspace")
    }

    /// Records what `queue` queues, which nothing is done of, as a graph of so many kernels.
    ///
    /// # Errors
    /// Whatever `queue`, the driver or memory for the graph came to. The lane is as it was.
    pub fn record(
        self: &Arc<Self>,
        kernels: usize,
        queue: impl FnOnce() -> Result<()>,
    ) -> Result<Graph> {
        let driver = &self.card.libraries.driver;
        let claim = self.card.claim(kernels * KERNEL_BYTES)?;
        let (mut graph, mut replay) = (null_mut(), null_mut());
        // SAFETY: the lane's own stream.
        let began = unsafe { (driver.capture)(self.stream, CAPTURE_THREAD_LOCAL) };
        self.check(began, "beginning a capture")?;
        let queued = queue();
        // SAFETY: as above; ends the capture, however it went.
        let ended = unsafe { (driver.capture_end)(self.stream, &mut graph) };
        let ended = self.check(ended, "ending a capture");
        let made = queued.and(ended).and_then(|()| {
            // SAFETY: the graph was just made.
            let made = unsafe { (driver.instantiate)(&mut replay, graph, 0) };
            self.check(made, "making a graph ready")
        });
        if !graph.is_null() {
            // SAFETY: what replays it has a copy.
            unsafe { (driver.graph_destroy)(graph) };
        }
        made?;
        self.card.graphs.fetch_add(1, Ordering::Relaxed);
        Ok(Graph {
            lane: self.clone(),
            replay,
            _claim: claim,
        })
    }

    /// Memory with these numbers.
    pub fn upload<T: Copy>(self: &Arc<Self>, data: &[T]) -> Result<Buffer> {
        let buffer = self.buffer(std::mem::size_of_val(data))?;
        self.put(buffer.at, data)?;
        Ok(buffer)
    }

    pub fn put<T: Copy>(&self, at: Address, data: &[T]) -> Result<()> {
        let bytes = std::mem::size_of_val(data);
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the driver has taken the bytes when it returns, for they lie in ordinary memory.
        let done = unsafe {
            (self.card.libraries.driver.to_device)(at, data.as_ptr().cast(), bytes, self.stream)
        };
        self.check(done, "copying to the device")
    }

    /// Waits for the lane and reads.
    pub fn get<T: Copy>(&self, at: Address, data: &mut [T]) -> Result<()> {
        let bytes = std::mem::size_of_val(data);
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: as many bytes as there is room for.
        let done = unsafe {
            (self.card.libraries.driver.to_host)(data.as_mut_ptr().cast(), at, bytes, self.stream)
        };
        self.check(done, "copying from the device")?;
        self.wait()
    }

    pub fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the callers' buffers hold so many bytes.
        let done = unsafe { (self.card.libraries.driver.between)(to, from, bytes, self.stream) };
        self.check(done, "copying on the device")
    }

    pub fn zero(&self, at: Address, bytes: usize) -> Result<()> {
        // SAFETY: as above.
        let done = unsafe { (self.card.libraries.driver.fill)(at, 0, bytes, self.stream) };
        self.check(done, "clearing")
    }

    /// Waits until everything queued is done.
    pub fn wait(&self) -> Result<()> {
        // SAFETY: the lane's own stream.
        let done = unsafe { (self.card.libraries.driver.synchronize)(self.stream) };
        self.check(done, "waiting for the device")
    }

    pub fn kernel(&self, name: &'static str, format: Option<Format>) -> Handle {
        self.card.functions[&(name, format)]
    }

    pub fn tile_kernel(&self, name: &'static str, width: usize) -> Handle {
        self.card.tiles[&(name, width)]
    }

    pub fn launch(
        &self,
        function: Handle,
        (x, y, z): (usize, usize, usize),
        threads: usize,
        shared: usize,
        arguments: &mut [*mut c_void],
    ) -> Result<()> {
        if x * y * z == 0 {
            return Ok(());
        }
        // SAFETY: the arguments are those of the kernel, in its order; `launch!` keeps them alive until this returns.
        let done = unsafe {
            (self.card.libraries.driver.launch)(
                function,
                x as u32,
                y as u32,
                z as u32,
                threads as u32,
                1,
                1,
                shared as u32,
                self.stream,
                arguments.as_mut_ptr(),
                null_mut(),
            )
        };
        self.check(done, "starting a kernel")
    }

    /// `c = alpha · a b + beta · c`: a (m, k), b (k, n), c (m, n), row-major; a and b in one format, sums in `f32`.
    pub fn product(
        &self,
        c: Mat,
        a: Mat,
        b: Mat,
        (m, n, k): (usize, usize, usize),
        alpha: f32,
        beta: f32,
    ) -> Result<()> {
        if m * n == 0 {
            return Ok(());
        }
        assert_eq!(a.format, b.format, "a product of two formats");
        // cuBLAS counts by columns: what it sees is the transposed product.
        let how = |mat: Mat| c_int::from(mat.transposed);
        // SAFETY: shapes and strides as the callers' buffers have them; scalars are read before it returns.
        let done = unsafe {
            (self.card.libraries.blas.product)(
                self.blas,
                how(b),
                how(a),
                n as c_int,
                m as c_int,
                k as c_int,
                (&raw const alpha).cast(),
                b.at as *const c_void,
                b.format.data_type(),
                b.stride as c_int,
                a.at as *const c_void,
                a.format.data_type(),
                a.stride as c_int,
                (&raw const beta).cast(),
                c.at as *mut c_void,
                c.format.data_type(),
                c.stride as c_int,
                // CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT
                68,
                -1,
            )
        };
        blas_check(done, "a product")
    }
}

fn blas_check(code: c_int, doing: &str) -> Result<()> {
    match code {
        0 => Ok(()),
        3 => Err(Fault {
            status: OUT_OF_MEMORY,
            why: format!("{doing}: cuBLAS has no memory"),
        }),
        code => Err(Fault {
            status: LOST,
            why: format!("{doing}: cuBLAS error {code}"),
        }),
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        if let Ok(_entered) = self.card.enter() {
            // SAFETY: made by `new`; no buffer of the lane is left, for each keeps it.
            unsafe {
                (self.card.libraries.driver.synchronize)(self.stream);
                if !self.blas.is_null() {
                    (self.card.libraries.blas.destroy)(self.blas);
                }
                let workspace = self.workspace.get_mut().unwrap_or_else(|e| e.into_inner());
                if let Some((at, _)) = workspace {
                    (self.card.libraries.driver.free)(*at, self.stream);
                }
                (self.card.libraries.driver.stream_destroy)(self.stream);
            }
        }
    }
}

/// Memory of a lane, or a part of it. Freed behind what was queued before.
pub struct Buffer {
    memory: Arc<Memory>,
    pub at: Address,
    pub bytes: usize,
}

struct Memory {
    lane: Arc<Lane>,
    at: Address,
    _claim: Claim,
}

impl Buffer {
    /// So many of its bytes, which keep the whole.
    ///
    /// # Panics
    /// If it has not so many.
    pub fn part(&self, from: usize, bytes: usize) -> Self {
        assert!(from + bytes <= self.bytes, "a part beyond its buffer");
        Self {
            memory: self.memory.clone(),
            at: self.at + from as Address,
            bytes,
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Ok(_entered) = self.lane.card.enter() {
            // SAFETY: allocated by `buffer`, freed once.
            unsafe { (self.lane.card.libraries.driver.free)(self.at, self.lane.stream) };
        }
    }
}

/// Work that was recorded with the addresses it had, and is queued again as one.
pub struct Graph {
    lane: Arc<Lane>,
    replay: Handle,
    _claim: Claim,
}

// SAFETY: as for `Lane`.
unsafe impl Send for Graph {}

impl Graph {
    pub fn queue(&self) -> Result<()> {
        let lane = &self.lane;
        // SAFETY: whoever recorded it keeps what it points to.
        let done = unsafe { (lane.card.libraries.driver.replay)(self.replay, lane.stream) };
        lane.check(done, "starting a graph")
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        self.lane.card.graphs.fetch_sub(1, Ordering::Relaxed);
        if let Ok(_entered) = self.lane.card.enter() {
            // SAFETY: made by `record`, destroyed once; the driver waits where it still runs.
            unsafe { (self.lane.card.libraries.driver.replay_destroy)(self.replay) };
        }
    }
}

/// A pointer for kernels: 0 where there is nothing.
pub fn or_null(buffer: Option<&Buffer>) -> Address {
    buffer.map_or(0, |b| b.at)
}
