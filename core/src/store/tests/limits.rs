//! A store at its size limit, under load.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::*;

const LIMIT: u64 = 4 << 20;
/// Steps of an episode here, of 4 KiB each.
const STEPS: u32 = 8;

fn limited(dir: &Path, drop_oldest: bool) -> Store {
    let options = StoreOptions {
        max_disk_bytes: LIMIT,
        drop_oldest,
        ..StoreOptions::default()
    };
    Store::open(dir, options).unwrap()
}

fn bytes_of(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).unwrap().flatten();
    entries
        .filter_map(|e| e.metadata().ok())
        .map(|m| m.len())
        .sum()
}

/// Records whole episodes from two threads, looks at the folder all the while, and gives the largest size it had.
fn load(store: &Store, episodes: u64, record: impl Fn(u64) + Sync) -> u64 {
    let (next, stop, largest) = (AtomicU64::new(1), AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let watch = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                largest.fetch_max(bytes_of(store.dir()), Ordering::Relaxed);
                // A reader beside the writer, as a host's statistics are.
                let _ = store.counts(None);
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let recorders = [(); 2].map(|()| {
            scope.spawn(|| loop {
                let n = next.fetch_add(1, Ordering::Relaxed);
                if n > episodes {
                    break;
                }
                record(n);
            })
        });
        for recorder in recorders {
            recorder.join().unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        watch.join().unwrap();
    });
    largest.into_inner()
}

/// The limit, its log, and what one commit more may add to the log before it is moved.
const MOST: u64 = LIMIT + LIMIT / 8 + (2 << 20);

#[test]
fn at_its_limit_a_store_drops_the_oldest_and_goes_on_and_never_grows_beyond() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("s");
    let store = limited(&dir, true);
    let text = "x".repeat(4096);
    let episodes = 600;
    let largest = load(&store, episodes, |n| {
        patiently(&store, begin(n));
        for index in 1..=STEPS {
            patiently(&store, step(n, index, &text));
        }
        patiently(&store, outcome(n, Status::Success, true));
        if n % 10 == 0 {
            store.flush(SOON).unwrap();
        }
    });
    store.flush(SOON).unwrap();
    let (health, counts) = (store.health(), store.counts(None).unwrap());
    assert!(health.dropped > 0, "{health:?}");
    assert_eq!((health.refused, health.failing.clone()), (0, None));
    assert_eq!(counts.episodes, episodes - health.dropped);
    assert_eq!(counts.steps, counts.episodes * u64::from(STEPS));
    // 20 MB were recorded; what is left is most of what fits, and the newest.
    assert!(
        counts.episodes * u64::from(STEPS) * 4096 > LIMIT / 2,
        "{counts:?}"
    );
    for n in episodes - 20..=episodes {
        assert!(store.has(id(n)).unwrap(), "{n} is one of the newest");
    }
    assert!(!store.has(id(1)).unwrap());
    assert!(largest <= MOST, "the folder had {largest} bytes");
    store.close(SOON).unwrap();
    assert_eq!(check(&dir).unwrap().findings, []);
}

#[test]
fn without_leave_to_drop_a_store_at_its_limit_refuses_and_keeps_everything() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("s");
    let store = limited(&dir, false);
    let text = "x".repeat(4096);
    let largest = load(&store, 300, |n| {
        let _ = store.record(begin(n));
        for index in 1..=STEPS {
            let _ = store.record(step(n, index, &text));
        }
        let _ = store.record(outcome(n, Status::Success, true));
        let _ = store.flush(SOON);
    });
    let full = store.flush(SOON).unwrap_err();
    assert!(matches!(full, StoreError::Full { .. }), "{full}");
    assert_eq!(store.health().dropped, 0);
    assert!(store.has(id(1)).unwrap(), "the oldest is kept");
    assert!(largest <= MOST, "the folder had {largest} bytes");
    let closed = store.close(SOON).unwrap_err();
    assert!(matches!(closed, StoreError::Lost { .. }), "{closed}");
    assert!(check(&dir)
        .unwrap()
        .findings
        .iter()
        .all(|f| f.severity < Severity::Damage));
}
