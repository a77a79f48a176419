//! Whether a store is sound: the database, the models, and what each says of the other.

use std::collections::BTreeSet;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::jobs::JobRecord;
use super::trial::TrialRecord;
use super::Error;
use crate::registry::{self, CheckedModels};
use crate::store::{self, Checked, Finding, JsonTable, Severity, Store, StoreOptions};

/// What a look through a whole store found.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StoreCheck {
    pub store: Checked,
    pub models: CheckedModels,
    /// Documents that name what is not there.
    pub links: Vec<Finding>,
}

impl StoreCheck {
    /// Everything that was found.
    pub fn findings(&self) -> impl Iterator<Item = &Finding> {
        let models = self.models.findings.iter();
        self.store.findings.iter().chain(models).chain(&self.links)
    }

    /// True if nothing is other than what was written; leftovers of a process that was killed are no damage.
    pub fn sound(&self) -> bool {
        self.findings().all(|f| f.severity < Severity::Damage)
    }
}

/// Looks through a store without changing it: the database and its rows, the hashes of every model, the pointer to the one that
/// serves, and the trials that name them. Reads every byte once. May be used beside processes that have the store open.
///
/// # Errors
/// There is no store, a newer release wrote it, or a folder cannot be read. Damage is a finding and no error.
pub fn check_store(dir: &Path) -> Result<StoreCheck, Error> {
    let mut found = StoreCheck {
        store: store::check(dir)?,
        models: registry::check(dir)?,
        links: Vec::new(),
    };
    if found.sound() {
        let options = StoreOptions {
            read_only: true,
            ..StoreOptions::default()
        };
        found.links = look_at_links(&Store::open(dir, options)?, &found.models.versions)?;
    }
    Ok(found)
}

fn look_at_links(store: &Store, students: &BTreeSet<u64>) -> Result<Vec<Finding>, Error> {
    let mut links = Vec::new();
    for (id, value) in store.list_json(JsonTable::Trial)? {
        let place = format!("trial {id}");
        match serde_json::from_value::<TrialRecord>(value) {
            Err(error) => links.push(Finding::damage(
                place,
                format!("cannot be read: {error}"),
                "remove the document: its candidate stays, without a trial",
            )),
            Ok(trial) if !students.contains(&trial.version) => links.push(Finding::damage(
                place,
                format!("is of student {}, which is not there", trial.version),
                "remove the document",
            )),
            Ok(_) => {}
        }
    }
    for (id, value) in store.list_json(JsonTable::Job)? {
        let place = format!("job {id}");
        match serde_json::from_value::<JobRecord>(value) {
            Err(error) => links.push(Finding::damage(
                place,
                format!("cannot be read: {error}"),
                "remove the document: its student stays",
            )),
            Ok(job) if job.status.student.is_some() && !students.contains(&job.status.version) => {
                links.push(Finding::damage(
                    place,
                    format!("made student {}, which is not there", job.status.version),
                    "none: the student was removed by hand",
                ))
            }
            Ok(_) => {}
        }
    }
    Ok(links)
}

/// Puts right what needs no guess: see [`store::repair`]. Folders that were being written are swept, too.
///
/// # Errors
/// A store that cannot be opened, a damaged file, a disk that refuses.
pub fn repair_store(dir: &Path) -> Result<(), Error> {
    store::repair(dir)?;
    registry::Registry::open(dir)?;
    Ok(())
}
