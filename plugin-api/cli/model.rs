//! `locum model`: the base model that students are made from.

use std::path::PathBuf;

use clap::Subcommand;
use locum_core::registry::{import_base, list_bases, BaseSummary};
use locum_core::secrets::Detect;
use serde_json::json;

use crate::fail::Fail;
use crate::out::{bytes, Out, Table};
use crate::Place;

#[derive(Subcommand)]
pub enum Command {
    /// Bring a model into the store: a GGUF file, or a Hugging Face folder of a Llama- or Qwen3-type decoder
    Import {
        source: PathBuf,
        /// What to call it; made from the file's name if not given
        #[arg(long)]
        name: Option<String>,
    },
    /// List the models in the store
    List,
    /// Write a tiny model with random weights, for tests of hosts
    Tiny {
        dir: PathBuf,
        #[arg(long, default_value_t = 0)]
        seed: u64,
    },
}

pub fn run(command: Command, place: &Place, out: &Out) -> Result<(), Fail> {
    match command {
        Command::Import { source, name } => {
            // Opening the store first makes its folder private and refuses a foreign one.
            drop(place.write(Detect::ALL)?);
            out.note(&format!("reading {}", source.display()));
            let base = import_base(&place.dir, &source, name.as_deref())?;
            out.table(&table(std::slice::from_ref(&base)));
            out.result(&json!({ "imported": base }));
        }
        Command::List => {
            place.must_exist()?;
            let models = list_bases(&place.dir)?;
            match models.is_empty() {
                true => out.line("No model yet. `locum model import FILE_OR_DIR` brings one in."),
                false => out.table(&table(&models)),
            }
            out.result(&json!({ "models": models }));
        }
        Command::Tiny { dir, seed } => {
            locum_core::model::write_tiny(&dir, seed)?;
            out.line(&format!(
                "{} written: two layers of random weights",
                dir.display()
            ));
            out.result(&json!({ "dir": dir }));
        }
    }
    Ok(())
}

fn table(models: &[BaseSummary]) -> Table {
    let mut table = Table::new(&[
        "name",
        "architecture",
        ">layers",
        ">parameters",
        ">size",
        "",
    ]);
    for m in models {
        table.row([
            m.name.clone(),
            m.architecture.clone(),
            m.num_hidden_layers.to_string(),
            format!("{:.1} M", m.parameters as f64 / 1e6),
            bytes(m.bytes),
            if m.default {
                "students start here".into()
            } else {
                String::new()
            },
        ]);
    }
    table
}
