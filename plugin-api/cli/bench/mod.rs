//! `locum bench`: how fast a model reads, answers and learns on this machine, how near its limits, and what fewer bits cost.

mod answer;
mod decide;
mod desk;
mod engine;
mod greedy;
mod learner;
mod limits;
mod quality;
mod record;
mod serve;
mod split;
mod step;
mod train;
mod ttt;

use std::path::PathBuf;
use std::time::Instant;

use clap::ValueEnum;
use locum_core::chat::Chat;
use locum_core::error::Error;
use locum_core::kernels::{limit_features, Isa, PackedBf16, Pool, QuantPath};
use locum_core::model::{Model, WeightFormat};
use locum_core::registry::Registry;
use locum_core::view::View;

use crate::fail::Fail;
use crate::out::Out;
use crate::Place;

#[derive(clap::Args)]
pub struct Args {
    /// What to time; without it prefill, decode and batch
    #[arg(value_enum)]
    what: Option<What>,
    /// Hugging Face folder of the model; the store's base model if not given
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// This student of the store instead of a base model
    #[arg(long, value_name = "VERSION", conflicts_with = "model")]
    student: Option<u64>,
    /// Numbers in which the weights are kept; may be given several times
    #[arg(long, value_enum)]
    weights: Vec<Weights>,
    /// Threads that compute; 0 = as many as there are cores
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Tokens of a prompt, or of an answer; for `quality` and `record` the number of recorded steps,
    /// for `greedy` the tokens compared; `split` takes several, separated by commas
    #[arg(long, value_delimiter = ',')]
    tokens: Vec<usize>,
    /// Times to measure; one more goes before them
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// What `train` trains
    #[arg(long, value_enum, default_value = "lora")]
    method: train::Method,
    /// Numbers of the products in `train`: bf16 by itself where the processor is faster at it
    #[arg(long, value_parser = ["bf16", "f32"])]
    compute: Option<String>,
    /// Share of each row that all rows of `train` begin with, in percent: the step is timed with that computed once, and each time
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u8).range(..=99))]
    shared: u8,
    /// Memory that `train` may take; with less, more is computed twice
    #[arg(long)]
    memory_mib: Option<usize>,
    /// The layers of `ttt` keep this share of what was written at every edge
    #[arg(long, value_name = "SHARE")]
    decay: Option<f32>,
    /// The layers of `ttt` learn by a delta rule of this strength
    #[arg(long, value_name = "STRENGTH", conflicts_with = "decay")]
    delta: Option<f32>,
    /// Show the history of `step` as turns of the chat, so that a step reads what is new alone
    #[arg(long)]
    turns: bool,
    /// Take the processor for an older one
    #[arg(long, value_enum, hide = true)]
    isa: Option<Older>,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Older {
    Scalar,
    Avx2,
    Avx512,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum What {
    /// Reading a prompt of 512 tokens
    Prefill,
    /// Writing 128 tokens, one at a time
    Decode,
    /// Eight answers at once, 128 tokens read and 64 written each
    Batch,
    /// Training on 4 x 512 tokens a step
    Train,
    /// Answers through the same door as a host
    Answer,
    /// Who plays a step: the decision alone with the policy's hook, idle and while a student is being made
    Decide,
    /// One step of an episode that grows: its second turn against its twentieth
    Step,
    /// Steps while a student is being made in the same process, against steps on an idle machine
    ServeWhileTraining,
    /// What recording costs the host, and what reaches the disk, beside fdatasync and plain SQLite on the same disk
    Record,
    /// What each kind of weights changes in the answers to recorded steps
    Quality,
    /// Whether the tokens that fast kernels choose are those of the plain forward pass on the same weights
    Greedy,
    /// What learning while reading costs: on and off in turn, in prefill, per token, and at the edges of chunks
    Ttt,
    /// A prompt read by several workers, beside the ordinary way with as many threads; without and with learning
    Split,
}

#[derive(Clone, Copy, Default, PartialEq, ValueEnum)]
pub enum Weights {
    F32,
    #[default]
    Bf16,
    Q8,
    Q4,
}

impl From<Weights> for WeightFormat {
    fn from(weights: Weights) -> Self {
        match weights {
            Weights::F32 => Self::F32,
            Weights::Bf16 => Self::Bf16,
            Weights::Q8 => Self::Q8,
            Weights::Q4 => Self::Q4,
        }
    }
}

pub fn run(args: Args, place: &Place, out: &Out) -> Result<(), Fail> {
    if let Some(older) = args.isa {
        let isa = match older {
            Older::Scalar => Isa::Scalar,
            Older::Avx2 => Isa::Avx2,
            Older::Avx512 => Isa::Avx512,
        };
        limit_features(isa).expect("no command before this one has asked for the features");
    }
    match args.what {
        Some(What::Decide) => decide::run(&args, place, out),
        Some(What::Step) => step::run(&args, place, out),
        Some(What::ServeWhileTraining) => serve::run(&args, place, out),
        Some(What::Answer) => answer::run(&args, place, out),
        Some(What::Record) => record::run(&args, place, out),
        Some(What::Quality) => quality::run(&args, place, out),
        Some(What::Greedy) => greedy::run(&args, place, out),
        Some(What::Ttt) => ttt::run(&args, place, out),
        Some(What::Split) => split::run(&args, place, out),
        Some(What::Train) => train::run(&args, place, out),
        _ => engine::run(&args, place, out),
    }
}

impl Args {
    fn threads(&self) -> usize {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        match self.threads {
            0 => cores,
            n => n.min(256),
        }
    }

    fn pool(&self) -> Pool {
        Pool::new(self.threads(), 0)
    }

    fn reply_tokens(&self) -> u32 {
        self.tokens().unwrap_or(64).min(4096) as u32
    }

    fn tokens(&self) -> Option<usize> {
        self.tokens.first().copied()
    }

    fn formats(&self, otherwise: &[Weights]) -> Vec<WeightFormat> {
        let asked = match self.weights.is_empty() {
            true => otherwise,
            false => &self.weights,
        };
        asked.iter().map(|w| (*w).into()).collect()
    }

    /// The model to time, in `f32`.
    fn load(&self, place: &Place) -> Result<Loaded, Fail> {
        if let Some(dir) = &self.model {
            return Ok(Loaded {
                model: Model::load(dir)?,
                chat: Chat::load(dir).map_err(Error::from)?,
                name: dir.display().to_string(),
                view: None,
                base: None,
            });
        }
        place.must_exist()?;
        let registry = Registry::open(&place.dir)?;
        if let Some(version) = self.student {
            let (manifest, model, chat) = registry.load(version)?;
            return Ok(Loaded {
                model,
                chat,
                name: format!("student {version} ({})", manifest.id),
                view: Some(manifest.view),
                base: Some(registry.load_base(&self.base_dir(place)?)?.0),
            });
        }
        let dir = self.base_dir(place)?;
        let (model, chat, _) = registry.load_base(&dir)?;
        Ok(Loaded {
            model,
            chat,
            name: dir.display().to_string(),
            view: None,
            base: None,
        })
    }
}

impl Args {
    /// Folder of the base model to time.
    fn base_dir(&self, place: &Place) -> Result<PathBuf, Fail> {
        if let Some(dir) = &self.model {
            return Ok(dir.clone());
        }
        place.must_exist()?;
        Registry::open(&place.dir)?
            .base_dir(None)?
            .ok_or(Fail::Missing {
            what: "there is no base model to time".into(),
            next:
                "Import one with `locum model import FILE_OR_DIR`, or name a folder with --model.",
        })
    }
}

struct Loaded {
    model: Model,
    chat: Chat,
    name: String,
    /// The view it learned under; absent for a base model.
    view: Option<View>,
    /// What a student was trained from.
    base: Option<Model>,
}

/// Seconds of `runs` calls after one that warms caches and clocks, in ascending order.
fn timed(runs: usize, mut body: impl FnMut()) -> Vec<f64> {
    body();
    let mut seconds: Vec<f64> = (0..runs.max(1))
        .map(|_| {
            let began = Instant::now();
            body();
            began.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    seconds
}

fn median(sorted: &[f64]) -> f64 {
    sorted.get(sorted.len() / 2).copied().unwrap_or(0.0)
}

/// The kernels that a format uses here, by their own word.
fn path(format: WeightFormat) -> String {
    match format {
        WeightFormat::F32 => "gemm".into(),
        WeightFormat::Bf16 => PackedBf16::path(),
        WeightFormat::Q8 | WeightFormat::Q4 => format!("{:?}", QuantPath::best()),
    }
}

/// Most memory this process has had so far, in bytes; 0 where the system does not say.
fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    status
        .lines()
        .find_map(|l| l.strip_prefix("VmHWM:"))
        .and_then(|rest| rest.trim().split(' ').next()?.parse::<u64>().ok())
        .unwrap_or(0)
        * 1024
}
