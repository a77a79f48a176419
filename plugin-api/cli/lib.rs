//! The command `locum`: what an operator does to a store by hand. A door like the C ABI: it parses, calls `Locum` or the store,
//! and prints; it decides nothing.
//!
//! Exit code 0 is success, 1 a failure told in one sentence, 2 wrong usage. With `--json` the last line of stdout is one JSON object,
//! also when the command failed.

mod bench;
mod distil;
mod doctor;
mod episodes;
mod eval;
mod fail;
mod forget;
mod model;
mod out;
mod policy;
mod report;
mod store;
mod students;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Parser, Subcommand};
use locum_core::device::DeviceOptions;
use locum_core::locum::{Locum, Options};
use locum_core::model::WeightFormat;
use locum_core::policy::Policy;
use locum_core::secrets::Detect;
use locum_core::store::{Store, StoreOptions};
use serde_json::json;

use fail::Fail;
use out::Out;

/// Folder of the store if neither `--store` nor `LOCUM_STORE` names one.
const DEFAULT_STORE: &str = "locum-store";

/// Locum stands in for the large model behind an agent: it records, distils, proves and swaps in.
#[derive(Parser)]
#[command(
    name = "locum",
    version,
    max_term_width = 100,
    disable_help_subcommand = true
)]
struct Args {
    /// Folder of the store [default: $LOCUM_STORE, else ./locum-store]
    #[arg(long, global = true, value_name = "DIR")]
    store: Option<PathBuf>,
    /// liblocum_cuda.so [default: the one in this program's folder, if any]
    #[arg(long, global = true, value_name = "FILE")]
    device_library: Option<PathBuf>,
    /// Print one JSON object as the last line instead of tables
    #[arg(long, global = true)]
    json: bool,
    /// Print results only
    #[arg(short, long, global = true)]
    quiet: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Say what this machine and this store can do
    Doctor,
    /// The base model that students are made from
    #[command(subcommand)]
    Model(model::Command),
    /// What was recorded
    #[command(subcommand)]
    Episodes(episodes::Command),
    /// Make a student from the episodes that went well
    #[command(subcommand)]
    Distil(distil::Command),
    /// Measure what a student's ways of reading are worth
    #[command(subcommand)]
    Eval(eval::Command),
    /// List the students, newest first
    Students,
    /// Let a student answer, whatever the gate said
    Promote(students::Promote),
    /// Take the promoted student back
    Rollback,
    /// Whether the store is sound
    #[command(subcommand)]
    Store(store::Command),
    /// Erase an episode, or everything of a scope, from the store's files
    Forget(forget::Forget),
    /// Say which episodes made a student, or which students learned from an episode
    Lineage(forget::Lineage),
    /// Policies written in Lua
    #[command(subcommand)]
    Policy(policy::Command),
    /// Time the base model on this machine
    Bench(bench::Args),
    /// Write the store's report as one HTML file
    Report(report::Args),
}

/// Runs the command with these arguments (the first is the program's name) and says how it should exit.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args = match Args::try_parse_from(args) {
        Ok(args) => args,
        Err(error) => {
            // Help and version go to stdout with code 0; a closed pipe there is nobody's problem.
            let _ = error.print();
            return ExitCode::from(error.exit_code() as u8);
        }
    };
    let out = Out::new(args.json, args.quiet);
    let store = args.store.clone().or_else(|| {
        std::env::var_os("LOCUM_STORE")
            .filter(|s| !s.is_empty())
            .map(PathBuf::from)
    });
    let place = Place {
        dir: store.unwrap_or_else(|| DEFAULT_STORE.into()),
        device: DeviceOptions {
            library: args.device_library.clone(),
            ..DeviceOptions::default()
        },
    };
    let done = match args.command {
        Command::Doctor => doctor::run(&place, &out),
        Command::Model(command) => model::run(command, &place, &out),
        Command::Episodes(command) => episodes::run(command, &place, &out),
        Command::Distil(command) => distil::run(command, &place, &out),
        Command::Eval(command) => eval::run(command, &place, &out),
        Command::Students => students::list(&place, &out),
        Command::Promote(promote) => students::promote(promote, &place, &out),
        Command::Rollback => students::rollback(&place, &out),
        Command::Store(command) => store::run(command, &place, &out),
        Command::Forget(args) => forget::forget(args, &place, &out),
        Command::Lineage(args) => forget::lineage(args, &place, &out),
        Command::Policy(command) => policy::run(command, &place, &out),
        Command::Bench(args) => bench::run(args, &place, &out),
        Command::Report(report) => report::run(report, &place, &out),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(fail) => {
            eprintln!("locum: {}", out::clean(&fail.to_string()));
            if let Some(next) = fail.next() {
                eprintln!("       {next}");
            }
            let mut result = fail.result().unwrap_or_else(|| json!({}));
            result["error"] = json!(fail.to_string());
            out.result(&result);
            ExitCode::FAILURE
        }
    }
}

/// Where the store is, and how commands open it.
pub(crate) struct Place {
    pub dir: PathBuf,
    /// What computes beside the processor.
    pub device: DeviceOptions,
}

impl Place {
    /// The store for reading; it must be there.
    pub fn read(&self) -> Result<Store, Fail> {
        self.must_exist()?;
        Ok(Store::open(
            &self.dir,
            StoreOptions {
                read_only: true,
                ..StoreOptions::default()
            },
        )?)
    }

    /// The store for recording; made if absent.
    pub fn write(&self, detect: Detect) -> Result<Store, Fail> {
        let options = StoreOptions {
            detect,
            ..StoreOptions::default()
        };
        Ok(Store::open(&self.dir, options)?)
    }

    /// The whole of Locum over an existing store.
    pub fn locum(&self, policy: Option<&Path>, with_model: bool) -> Result<Locum, Fail> {
        self.must_exist()?;
        Ok(Locum::open(Options {
            store_dir: self.dir.clone(),
            policy: Some(load_policy(policy)?),
            no_learning: !with_model,
            no_model: !with_model,
            device: self.device.clone(),
            ..Options::default()
        })?)
    }

    /// With the model, so that a student which cannot be loaded is noticed, and without learning meanwhile.
    pub fn serving(&self, weights: WeightFormat) -> Result<Locum, Fail> {
        self.must_exist()?;
        Ok(Locum::open(Options {
            store_dir: self.dir.clone(),
            policy: Some(load_policy(None)?),
            no_learning: true,
            weights,
            device: self.device.clone(),
            ..Options::default()
        })?)
    }

    pub fn must_exist(&self) -> Result<(), Fail> {
        match self.dir.is_dir() {
            true => Ok(()),
            false => Err(Fail::NoStore {
                dir: self.dir.clone(),
            }),
        }
    }
}

/// The policy in a file, or the one that Locum ships.
pub(crate) fn load_policy(path: Option<&Path>) -> Result<Arc<dyn Policy>, Fail> {
    let policy = match path {
        None => locum_lua::LuaPolicy::default_policy()?,
        Some(path) => {
            let (source, name) = policy::read(path)?;
            locum_lua::LuaPolicy::from_source(&source, &name, locum_lua::PolicyOptions::default())?
        }
    };
    Ok(Arc::new(policy))
}
