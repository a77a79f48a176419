//! The system calls of a short run fail one after the other, by `tests/faults/shim.c`, which the process does not know of.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

use super::life::{copy, grounds, verify, Birth, Kind, Said};

/// What a call does instead of what it is for.
const ACTS: &[&str] = &["5", "28", "full", "short", "kill"];
/// Calls of a distillation that are tried in an ordinary run; all of them with `LOCUM_SOAK_KILLS` set.
const LEARNER_CALLS: u64 = 16;
const AT_ONCE: usize = 2;

/// Builds the shim with the machine's C compiler.
fn build(folder: &Path) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/faults/shim.c");
    let library = folder.join("shim.so");
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".into());
    let built = Command::new(compiler)
        .args([
            "-std=c11", "-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC",
        ])
        .arg("-o")
        .args([&library, &source])
        .status();
    assert!(built.expect("a C compiler is there").success());
    library
}

#[test]
fn whichever_system_call_fails_nothing_that_was_promised_is_lost_and_an_error_says_so() {
    let grounds = grounds();
    let folder = tempfile::tempdir().unwrap();
    let library = build(folder.path());
    let all = std::env::var_os("LOCUM_SOAK_KILLS").is_some();
    let (tried, told) = (AtomicU64::new(0), AtomicU64::new(0));
    for kind in [Kind::Recorder, Kind::Learner] {
        let (said, calls) = run(&grounds.store, &library, kind, None);
        assert!(said.done && said.errors.is_empty(), "{:?}", said.errors);
        let calls = calls.expect("it ended by itself");
        assert!(calls > 20, "{calls} calls");
        let orders: Vec<(u64, &str)> = match (kind, all) {
            (_, true) => (1..=calls)
                .flat_map(|n| ACTS.iter().map(move |act| (n, *act)))
                .collect(),
            // An ordinary run fails each call once, in another way than the one before it.
            (Kind::Recorder, false) => (1..=calls)
                .map(|n| (n, ACTS[n as usize % ACTS.len()]))
                .collect(),
            (_, false) => (0..LEARNER_CALLS)
                .map(|k| (1 + k * calls / LEARNER_CALLS, ACTS[k as usize % ACTS.len()]))
                .collect(),
        };
        let next = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..AT_ONCE {
                scope.spawn(|| {
                    while let Some(order) =
                        orders.get(next.fetch_add(1, Ordering::Relaxed) as usize)
                    {
                        let (said, _) = run(&grounds.store, &library, kind, Some(*order));
                        tried.fetch_add(1, Ordering::Relaxed);
                        told.fetch_add(!said.errors.is_empty() as u64, Ordering::Relaxed);
                    }
                });
            }
        });
    }
    println!("{tried:?} failing calls, {told:?} of them told as errors; nothing was lost");
    assert!(told.into_inner() > 0);
}

/// A life under the shim, on a fresh copy, and the verifier after it. Also gives how many calls it made, if it ended by itself.
fn run(
    grounds: &Path,
    library: &Path,
    kind: Kind,
    order: Option<(u64, &str)>,
) -> (Said, Option<u64>) {
    let folder = tempfile::tempdir().unwrap();
    let folder_path = folder.path().canonicalize().unwrap();
    let (store, count) = (folder_path.join("store"), folder_path.join("count"));
    copy(grounds, &store);
    let mut env = vec![
        ("LD_PRELOAD", library.display().to_string()),
        ("LOCUM_SHIM_DIR", store.display().to_string()),
        ("LOCUM_SHIM_COUNT", count.display().to_string()),
    ];
    if let Some((nth, act)) = order {
        env.push(("LOCUM_SHIM_NTH", nth.to_string()));
        env.push(("LOCUM_SHIM_DO", act.to_string()));
    }
    let birth = Birth {
        store: &store,
        life: 1,
        kind,
        fault: None,
        env,
    };
    let said = birth.run();
    let context = format!("{kind:?} with {order:?}, errors {:?}", said.errors);
    assert!(
        said.done || said.killed || !said.errors.is_empty(),
        "{context}"
    );
    assert!(
        said.errors.iter().all(|error| error.len() > 20),
        "{context}"
    );
    verify(&store, &[&said], &context);
    let text = std::fs::read_to_string(count).ok();
    (said, text.map(|text| text.trim().parse().unwrap()))
}
