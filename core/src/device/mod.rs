//! The graphics processor, where there is one: liblocum_cuda.so is looked for, checked, and called through a private table.
//!
//! It stands beside the library and is optional: whatever is missing (the object, the driver, cuBLAS, a card young enough, memory) is a
//! sentence, and the processor serves. The object is loaded at the first use and never unloaded.

#[cfg_attr(not(unix), path = "absent.rs")]
mod load;
mod serve;
mod table;
#[cfg(test)]
mod tests;
mod train;

use std::ffi::c_void;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

pub use load::{beside_the_library, FILE};
pub use serve::{CardModel, CardSequence};
pub use train::{CardTraining, Numbers, TrainRates};

use table::{Info, Limits, Status, Table, Trouble};

/// Why a card is not used, or a call on it failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// It was switched off by an option.
    #[error("switched off")]
    Off,
    #[error("no {FILE} in {}", .0.display())]
    Absent(PathBuf),
    /// No object is made for this system.
    #[error("Locum computes on cards on Linux only")]
    Unsupported,
    /// There is an object, and it is not the one that belongs to this library.
    #[error("{}: {why}", path.display())]
    Object { path: PathBuf, why: String },
    /// No driver, no cuBLAS, a card that is too old or too small, or a model that the card's kernels are not for.
    #[error("{0}")]
    Refused(String),
    /// This call did nothing; others may go on.
    #[error("no memory on the card: {0}")]
    Memory(String),
    /// Nothing on the card can be used any more.
    #[error("the card failed: {0}")]
    Lost(String),
    #[error("a sequence cannot be cut back there: {0}")]
    Behind(String),
}

/// Whether a card is used, and how much of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceOptions {
    /// The processor alone computes.
    pub off: bool,
    /// The object; `None` looks beside the library and nowhere else.
    pub library: Option<PathBuf>,
    /// Most bytes of the card's memory; 0 is three quarters of what is free when it is opened.
    pub memory_bytes: u64,
}

/// A card, as its driver describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct CardInfo {
    pub name: String,
    /// Generation: (9, 0) is Hopper.
    pub capability: (u32, u32),
    /// 13000 is 13.0.
    pub driver: u32,
    pub blas: u32,
    pub memory_bytes: u64,
    pub free_bytes: u64,
    /// Of ours: the limit, what is used, and the most that was.
    pub limit_bytes: u64,
    pub used_bytes: u64,
    pub peak_bytes: u64,
    /// Graphs that small steps of serving are replayed from, and why none are made; empty where nothing speaks against them.
    pub graphs: u32,
    pub single: String,
}

/// An open card. Models, sequences and trainings on it keep it open.
pub struct Card {
    table: &'static Table,
    engine: *mut c_void,
    pub path: PathBuf,
}

// SAFETY: the table says that its calls may come from any thread; who calls at once is said at each user.
unsafe impl Send for Card {}
// SAFETY: as above.
unsafe impl Sync for Card {}

impl Card {
    /// Loads the object and opens the card.
    ///
    /// # Errors
    /// [`DeviceError`] in all but its last kinds says what is missing.
    pub fn open(options: &DeviceOptions) -> Result<Arc<Self>, DeviceError> {
        if options.off {
            return Err(DeviceError::Off);
        }
        let (table, path) = load::table(options.library.as_deref())?;
        let limits = Limits {
            device: 0,
            reserved: 0,
            memory_bytes: options.memory_bytes,
        };
        let mut engine = std::ptr::null_mut();
        // SAFETY: the table's own types; the pointers are to variables that live through the call.
        called(|trouble| unsafe { (table.open)(&limits, &mut engine, trouble) })?;
        Ok(Arc::new(Self {
            table,
            engine,
            path,
        }))
    }

    /// What it is, and what is used of it.
    pub fn info(&self) -> CardInfo {
        // SAFETY: numbers, for which zeros are values.
        let mut info: Info = unsafe { std::mem::zeroed() };
        // SAFETY: as in `open`; the engine is open.
        let done = called(|trouble| unsafe { (self.table.info)(self.engine, &mut info, trouble) });
        let text = |bytes: &[u8]| {
            let end = bytes.iter().position(|b| *b == 0).unwrap_or(0);
            String::from_utf8_lossy(&bytes[..end]).into_owned()
        };
        match done {
            Err(_) => CardInfo::default(),
            Ok(()) => CardInfo {
                name: text(&info.name),
                capability: (info.major, info.minor),
                driver: info.driver,
                blas: info.blas,
                memory_bytes: info.memory_bytes,
                free_bytes: info.free_bytes,
                limit_bytes: info.limit_bytes,
                used_bytes: info.used_bytes,
                peak_bytes: info.peak_bytes,
                graphs: info.graphs,
                single: text(&info.single),
            },
        }
    }
}

impl Drop for Card {
    fn drop(&mut self) {
        // SAFETY: opened once, closed once; what was made on it keeps the card.
        unsafe { (self.table.close)(self.engine) }
    }
}

impl CardInfo {
    /// For a reader: name, generation, memory.
    pub fn words(&self) -> String {
        let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
        format!(
            "{} (generation {}.{}, driver {}.{}), at most {:.1} of {:.1} GiB",
            self.name,
            self.capability.0,
            self.capability.1,
            self.driver / 1000,
            self.driver % 1000 / 10,
            gib(self.limit_bytes),
            gib(self.memory_bytes)
        )
    }
}

/// The door to the card for all who may use it: opened at the first use, closed for good when it fails.
#[derive(Default)]
pub struct Device {
    options: DeviceOptions,
    state: Mutex<State>,
}

#[derive(Clone, Default)]
enum State {
    #[default]
    NotAsked,
    Open(Arc<Card>, String),
    Closed(DeviceError),
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "Device({})", self.words())
    }
}

impl Device {
    pub fn new(options: DeviceOptions) -> Arc<Self> {
        Arc::new(Self {
            options,
            state: Mutex::default(),
        })
    }

    /// The processor alone.
    pub fn off() -> Arc<Self> {
        Self::new(DeviceOptions {
            off: true,
            ..DeviceOptions::default()
        })
    }

    /// The card, opened by the first who asks; `None` where the processor has to do.
    pub fn card(&self) -> Option<Arc<Card>> {
        let mut state = self.state();
        if let State::NotAsked = *state {
            *state = match Card::open(&self.options) {
                Ok(card) => {
                    let words = card.info().words();
                    tracing::info!(card = words, object = %card.path.display(), "the student computes on a card");
                    State::Open(card, words)
                }
                Err(why) => {
                    match &why {
                        // Most machines have none.
                        DeviceError::Off | DeviceError::Absent(_) | DeviceError::Unsupported => {
                            tracing::debug!(%why, "the student computes on the processor")
                        }
                        _ => tracing::warn!(%why, "the student computes on the processor"),
                    }
                    State::Closed(why)
                }
            };
        }
        match &*state {
            State::Open(card, _) => Some(card.clone()),
            _ => None,
        }
    }

    /// Notes what a call on the card came to: after a failure of the card itself nobody gets it any more.
    pub fn note(&self, why: &DeviceError) {
        tracing::warn!(%why, "the processor goes on");
        if let DeviceError::Lost(_) = why {
            *self.state() = State::Closed(why.clone());
        }
    }

    /// What computes, for stats: a card's name, or the processor and why.
    pub fn words(&self) -> String {
        match &*self.state() {
            State::NotAsked if self.options.off => "processor".into(),
            State::NotAsked => "not asked for yet".into(),
            State::Open(card, words) => match card.info().single {
                why if why.is_empty() => words.clone(),
                why => format!("{words}; steps are queued kernel by kernel: {why}"),
            },
            State::Closed(why) => format!("processor: {why}"),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// Makes a call and turns its status and sentence into an error.
fn called(call: impl FnOnce(*mut Trouble) -> Status) -> Result<(), DeviceError> {
    let mut trouble = Trouble {
        len: 0,
        text: [0; 400],
    };
    let status = call(&mut trouble);
    let len = (trouble.len as usize).min(trouble.text.len());
    let why = String::from_utf8_lossy(&trouble.text[..len]).into_owned();
    Err(match status {
        table::OK => return Ok(()),
        table::OUT_OF_MEMORY => DeviceError::Memory(why),
        table::REFUSED => DeviceError::Refused(why),
        table::BEHIND => DeviceError::Behind(why),
        _ => DeviceError::Lost(why),
    })
}
