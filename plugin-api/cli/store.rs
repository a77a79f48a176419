//! `locum store`: whether what lies in a store's folder is what was written there.

use clap::Subcommand;
use locum_core::locum::{check_store, repair_store, StoreCheck};
use locum_core::store::Severity;
use serde_json::json;

use crate::fail::Fail;
use crate::out::{clean, Out, Table};
use crate::Place;

#[derive(Subcommand)]
pub enum Command {
    /// Read everything once and say what is not as it was written, and what would put it right
    Check {
        /// Put right what needs no guess: rows that fit nothing, counts, episodes left open, unfinished folders
        #[arg(long)]
        repair: bool,
    },
}

pub fn run(command: Command, place: &Place, out: &Out) -> Result<(), Fail> {
    let Command::Check { repair } = command;
    place.must_exist()?;
    let mut check = check_store(&place.dir)?;
    let before: Vec<_> = check.findings().cloned().collect();
    if repair && !before.is_empty() {
        repair_store(&place.dir)?;
        check = check_store(&place.dir)?;
    }
    let left: Vec<_> = check.findings().cloned().collect();
    if !left.is_empty() {
        let mut table = Table::new(&["", "where", "what", "repair"]);
        for finding in &left {
            let word = match finding.severity {
                Severity::Leftover => "left over",
                Severity::Damage => "DAMAGE",
            };
            table.row([
                word.into(),
                clean(&finding.place),
                clean(&finding.what),
                finding.repair.clone(),
            ]);
        }
        out.table(&table);
    }
    let repaired = before.iter().filter(|f| !left.contains(f)).count();
    out.line(&sentence(&check, repaired));
    let damaged = left
        .iter()
        .filter(|f| f.severity == Severity::Damage)
        .count();
    let result = json!({ "sound": check.sound(), "findings": left, "repaired": repaired,
        "episodes": check.store.episodes, "steps": check.store.steps, "documents": check.store.documents,
        "bases": check.models.bases, "students": check.models.students, "current": check.models.current });
    match damaged {
        0 => {
            out.result(&result);
            Ok(())
        }
        n => Err(Fail::Damaged {
            n,
            dir: place.dir.clone(),
            result: Box::new(result),
        }),
    }
}

fn sentence(check: &StoreCheck, repaired: usize) -> String {
    let read = format!(
        "{} episodes with {} steps, {} documents, {} bases and {} students were read",
        check.store.episodes,
        check.store.steps,
        check.store.documents,
        check.models.bases,
        check.models.students
    );
    let repaired = match repaired {
        0 => String::new(),
        n => format!(" {n} findings were put right."),
    };
    match check.sound() {
        true => format!("{read}; all of it is as it was written.{repaired}"),
        false => format!("{read}; what is marked DAMAGE is not as it was written.{repaired}"),
    }
}
