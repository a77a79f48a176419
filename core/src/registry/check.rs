//! Whether the models of a store are what was written, and whether what points at them points at something.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::folder::{children, unfinished};
use super::{base, current, Manifest, Registry, RegistryError, BASES, STUDENTS};
use crate::store::Finding;

/// What was looked at, and what was found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckedModels {
    pub bases: u64,
    pub students: u64,
    pub current: Option<u64>,
    /// Of the students whose manifests can be read.
    pub versions: BTreeSet<u64>,
    pub findings: Vec<Finding>,
}

/// Reads every file of every model once and compares it with its manifest. Only reads; unlike [`Registry::open`] it sweeps nothing.
///
/// # Errors
/// A folder that cannot be read. What is wrong with a model is a finding.
pub fn check(store_dir: &Path) -> Result<CheckedModels, RegistryError> {
    let registry = Registry {
        dir: store_dir.into(),
    };
    let mut found = CheckedModels::default();
    for dir in children(&store_dir.join(BASES))? {
        found.bases += 1;
        if let Err(error) = base::verify(&dir) {
            let place = named(BASES, &dir);
            let repair = "remove the folder and import the base again";
            let finding = Finding::damage(place, error.to_string(), repair);
            found.findings.push(finding);
        }
    }
    if let Err(error) = base::dir(store_dir, None) {
        let repair = "import a base, or name one that is there";
        let finding = Finding::damage("base/default", error.to_string(), repair);
        found.findings.push(finding);
    }
    let (students, damaged) = registry.list_all()?;
    for (dir, why) in damaged {
        let repair = "remove the folder, or restore it from a copy";
        let finding = Finding::damage(named(STUDENTS, &dir), why.to_string(), repair);
        found.findings.push(finding);
    }
    for student in &students {
        found.students += 1;
        let twice = !found.versions.insert(student.version);
        let dir = registry.student_dir(&student.id);
        let mut tell = |what: String, repair| {
            let finding = Finding::damage(named(STUDENTS, &dir), what, repair);
            found.findings.push(finding)
        };
        if let Err(error) = registry.verify(student) {
            tell(
                error.to_string(),
                "remove the folder, or restore it from a copy",
            );
        }
        // A student that a job made was judged before it was written.
        if student.job > 0 && student.evaluation.pointer("/verdict").is_none() {
            tell("has no report of the gate".into(), "make another student");
        }
        if twice {
            let what = format!("is another student of version {}", student.version);
            tell(what, "remove one of the two");
        }
    }
    look_at_pointer(store_dir, &students, &mut found);
    for parent in [BASES, STUDENTS] {
        for dir in unfinished(&store_dir.join(parent)) {
            found.findings.push(Finding::leftover(
                named(parent, &dir),
                "was being written by a process that is gone",
                "open the store: it is removed",
            ));
        }
    }
    Ok(found)
}

fn look_at_pointer(store_dir: &Path, students: &[Manifest], found: &mut CheckedModels) {
    let mut tell = |what: String| {
        let repair = "`locum rollback`, or remove the file: the teacher plays then";
        let finding = Finding::damage(current::FILE, what, repair);
        found.findings.push(finding);
    };
    let pointer = match current::load(store_dir) {
        Ok(pointer) => pointer,
        Err(error) => return tell(error.to_string()),
    };
    if pointer.version == 0 {
        return;
    }
    match students.iter().find(|s| s.version == pointer.version) {
        None => tell(format!(
            "points at student {}, which is not there",
            pointer.version
        )),
        Some(student) if student.id != pointer.id => tell(format!(
            "points at student {} as {}, which is {}",
            pointer.version, pointer.id, student.id
        )),
        Some(_) => found.current = Some(pointer.version),
    }
}

fn named(parent: &str, dir: &Path) -> String {
    let name: PathBuf = [parent.as_ref(), dir.file_name().unwrap_or_default()]
        .iter()
        .collect();
    name.display().to_string()
}
