//! Stores that earlier releases wrote, kept under `tests/fixtures/stores`: each later release opens them.
//!
//! A release writes its own with
//! `cargo test --release -p locum-core --lib write_the_store_of_this_release -- --ignored`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::life::{copy, grounds, open, Birth, Kind};
use crate::episode::Status;
use crate::locum::{check_store, EpisodeStart, JobState, Pin};
use crate::store::Query;

/// Largest store that is kept, in bytes: it lies in the repository for ever.
const MAX_BYTES: u64 = 400 << 10;

/// What the release that wrote a store said of it.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Expected {
    episodes: u64,
    steps: u64,
    /// The first step of the first episode.
    first_words: String,
    /// The student that serves.
    current: u64,
    students: Vec<String>,
}

fn stores() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/stores")
}

#[test]
#[ignore = "writes into the repository, once for each release"]
fn write_the_store_of_this_release() {
    let to = stores().join(env!("CARGO_PKG_VERSION"));
    assert!(!to.exists(), "{} is there already", to.display());
    let grounds = grounds();
    let birth = Birth {
        store: &grounds.store,
        life: 1,
        kind: Kind::Learner,
        fault: None,
        env: Vec::new(),
    };
    let said = birth.run();
    assert!(said.done && said.errors.is_empty(), "{said:?}");
    let locum = open(&grounds.store).unwrap();
    let version = locum.students().unwrap()[0].version;
    super::life::promote(&locum, version).unwrap();
    locum.use_student(Pin::Student(version)).unwrap();
    let expected = look(&locum);
    locum.close(Duration::from_secs(5)).unwrap();
    copy(&grounds.store, &to.join("store"));
    let text = serde_json::to_string_pretty(&expected).unwrap();
    std::fs::write(to.join("expected.json"), text + "\n").unwrap();
}

fn look(locum: &super::Locum) -> Expected {
    let inner = &locum.inner;
    let counts = inner.store.counts(None).unwrap();
    let first = inner.store.load(&Query {
        limit: Some(1),
        ..Query::default()
    });
    let first = &first.unwrap()[0];
    assert_eq!(first.outcome.as_ref().unwrap().status, Status::Success);
    Expected {
        episodes: counts.episodes,
        steps: counts.steps,
        first_words: first.steps[0].message.as_ref().unwrap().text(),
        current: inner.registry.current().unwrap().unwrap_or(0),
        students: inner
            .registry
            .list()
            .unwrap()
            .into_iter()
            .map(|m| m.id)
            .collect(),
    }
}

#[test]
fn stores_of_earlier_releases_open_serve_and_go_on() {
    let mut tried = 0;
    for release in std::fs::read_dir(stores()).unwrap().flatten() {
        let name = release.file_name().to_string_lossy().into_owned();
        let bytes = std::fs::read(release.path().join("expected.json")).unwrap();
        let expected: Expected = serde_json::from_slice(&bytes).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let store = folder.path().join("store");
        copy(&release.path().join("store"), &store);
        assert!(bytes_of(&store) < MAX_BYTES, "{name} is too large to keep");
        private(&store);
        let check = check_store(&store).unwrap();
        let found: Vec<_> = check.findings().collect();
        assert!(found.is_empty(), "{name}: {found:?}");

        let locum = open(&store).unwrap();
        assert_eq!(look(&locum), expected, "{name}");
        assert_eq!(
            locum.distil_status(0).unwrap().state,
            JobState::Promoted,
            "{name}"
        );
        let stats = locum.stats();
        assert_eq!(stats.pin, Pin::Student(expected.current), "{name}");
        assert_eq!(
            stats.current_version, expected.current,
            "{name}: {:?}",
            stats.faulted
        );
        let handle = locum.begin(EpisodeStart::default()).unwrap();
        super::answer(&locum, &handle).unwrap();
        locum.end(&handle, Default::default()).unwrap();
        locum.close(Duration::from_secs(5)).unwrap();
        let check = check_store(&store).unwrap();
        assert!(
            check.sound(),
            "{name}: {:?}",
            check.findings().collect::<Vec<_>>()
        );
        assert_eq!(check.store.episodes, expected.episodes + 1, "{name}");
        tried += 1;
    }
    assert!(tried > 0, "no store of an earlier release is there");
}

/// What a version control system does not keep.
fn private(dir: &Path) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700)).unwrap();
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        match entry.path().is_dir() {
            true => private(&entry.path()),
            false => {
                let mode = std::fs::Permissions::from_mode(0o600);
                std::fs::set_permissions(entry.path(), mode).unwrap();
            }
        }
    }
}

fn bytes_of(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).unwrap().flatten();
    let bytes = entries.map(|entry| match entry.path().is_dir() {
        true => bytes_of(&entry.path()),
        false => entry.metadata().unwrap().len(),
    });
    bytes.sum()
}
