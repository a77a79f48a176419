//! Kills at random instants, and every named point at which the disk can fail or the process die.

use std::io::Read;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::life::{copy, distillation, grounds, open, verify, Birth, Kind, Said};
use crate::files::faults::Act;
use crate::locum::{DistilOptions, Error, JobState, Locum};
use crate::policy::RecipeKnobs;

/// Kills in an ordinary test run; `LOCUM_SOAK_KILLS` sets another number.
const KILLS: u64 = 200;
/// Lives that one store has to bear.
const LIVES: usize = 25;
/// Processes that are killed side by side.
const AT_ONCE: u64 = 2;

fn soak(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// A number that depends on the other alone (SplitMix64).
fn mixed(n: u64) -> u64 {
    let mut x = n.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0x5DEE_CE66;
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

#[test]
fn a_process_killed_at_a_random_instant_loses_nothing_it_was_promised() {
    let kills = soak("LOCUM_SOAK_KILLS").unwrap_or(KILLS);
    let grounds = grounds();
    let first = soak("LOCUM_SOAK_SEED").unwrap_or(0) << 32;
    let kills = first + kills;
    let (next, promised, students) = (
        AtomicU64::new(first + 1),
        AtomicU64::new(0),
        AtomicU64::new(0),
    );
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| loop {
                let folder = tempfile::tempdir().unwrap();
                let store = folder.path().join("store");
                copy(&grounds.store, &store);
                let mut lives: Vec<Said> = Vec::new();
                while lives.len() < LIVES {
                    let life = next.fetch_add(1, Ordering::Relaxed);
                    if life > kills {
                        break;
                    }
                    let said = cut_short(&store, life);
                    promised.fetch_add(said.episodes.len() as u64, Ordering::Relaxed);
                    lives.push(said);
                    // The newest life after each kill, all of them at the end.
                    let newest = &lives[lives.len() - 1..];
                    verify(
                        &store,
                        &newest.iter().collect::<Vec<_>>(),
                        &format!("life {life}"),
                    );
                }
                verify(&store, &lives.iter().collect::<Vec<_>>(), "all lives");
                let made = crate::registry::Registry::open(&store)
                    .unwrap()
                    .list()
                    .unwrap();
                students.fetch_add(made.len() as u64, Ordering::Relaxed);
                if next.load(Ordering::Relaxed) > kills {
                    break;
                }
            });
        }
    });
    let (promised, students) = (promised.into_inner(), students.into_inner());
    println!(
        "{} kills in {:.0} s: {promised} episodes were promised and {students} students made, none was lost",
        kills - first,
        begun.elapsed().as_secs_f64()
    );
    assert!(
        promised >= kills - first,
        "only {promised} episodes were promised"
    );
    assert!(
        students > 0 || kills - first < KILLS,
        "no life came as far as a student"
    );
}

/// Longest wait for a student, on however slow a machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A life killed at a random instant: most of them early, one in eight later, one in forty soon after there is a student.
fn cut_short(store: &std::path::Path, life: u64) -> Said {
    let birth = Birth {
        store,
        life,
        kind: Kind::Endless,
        fault: None,
        env: Vec::new(),
    };
    let mut process = birth.spawn();
    let mut out = process.stdout.take().unwrap();
    let random = mixed(life);
    let longest = if random.is_multiple_of(8) {
        1_500_000
    } else {
        200_000
    };
    let born = Instant::now();
    let students = || crate::registry::Registry::open(store).and_then(|r| r.list());
    while random.is_multiple_of(40)
        && students().is_ok_and(|all| all.is_empty())
        && born.elapsed() < PATIENCE
    {
        std::thread::sleep(Duration::from_millis(20));
    }
    std::thread::sleep(Duration::from_micros((random >> 8) % longest));
    process.kill().unwrap();
    process.wait().unwrap();
    let mut text = String::new();
    out.read_to_string(&mut text).unwrap();
    let said = Said::read(&text);
    assert!(said.errors.is_empty(), "life {life}: {:?}", said.errors);
    said
}

#[test]
fn at_every_named_point_a_kill_or_a_failing_disk_costs_nothing_that_was_promised() {
    let grounds = grounds();
    let tried = AtomicU64::new(0);
    let all = soak("LOCUM_SOAK_KILLS").is_some();
    for kind in [Kind::Recorder, Kind::Learner] {
        let whole = once(&grounds.store, kind, None, 0);
        assert!(whole.done && whole.errors.is_empty(), "{:?}", whole.errors);
        // What needs no student is tried without one, for that is quicker.
        let points: Vec<(&String, &u64)> = (whole.points.iter())
            .filter(|(point, _)| kind == Kind::Recorder || !of_recorder(point))
            .collect();
        let wanted: &[&str] = match kind {
            Kind::Recorder => &["begin locum.db", "commit locum.db", "after commit locum.db"],
            _ => &[
                "write model.safetensors",
                "write checkpoint.safetensors",
                "rename current.json",
                "after current.json",
                "write locum.json",
                "write split.json",
            ],
        };
        for point in wanted {
            assert!(
                points.iter().any(|p| p.0 == point),
                "{point} is not in {points:?}"
            );
        }
        let mut orders = Vec::new();
        for (at, (point, n)) in points.into_iter().enumerate() {
            let acts: &[Act] = match point.starts_with("write ") {
                true => &Act::ALL,
                false => &[Act::Kill, Act::Eio, Act::Enospc],
            };
            for (which, &act) in acts.iter().enumerate() {
                // An ordinary run tries one act at each point, the next one at the next.
                if all || which == at % acts.len() {
                    orders.push((
                        point.as_str(),
                        1 + mixed(tried.load(Ordering::Relaxed)) % n,
                        act,
                    ));
                    tried.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        let next = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..AT_ONCE {
                scope.spawn(|| loop {
                    let at = next.fetch_add(1, Ordering::Relaxed) as usize;
                    let Some(&order) = orders.get(at) else { break };
                    once(&grounds.store, kind, Some(order), 1 + at as u64);
                });
            }
        });
    }
    println!("{} orders were survived", tried.into_inner());
}

fn of_recorder(point: &str) -> bool {
    let file = point.rsplit(' ').next().unwrap();
    matches!(file, "locum.db" | "lock")
}

/// A whole life on a fresh copy, with a fault or without, and the verifier after it.
fn once(grounds: &std::path::Path, kind: Kind, fault: Option<(&str, u64, Act)>, life: u64) -> Said {
    let folder = tempfile::tempdir().unwrap();
    let store = folder.path().join("store");
    copy(grounds, &store);
    let birth = Birth {
        store: &store,
        life,
        kind,
        fault,
        env: Vec::new(),
    };
    let said = birth.run();
    let context = format!("{kind:?} with {fault:?}, errors {:?}", said.errors);
    verify(&store, &[&said], &context);
    if let Some((_, _, Act::Kill | Act::Torn)) = fault {
        assert!(said.killed, "{context}: it was not killed");
    }
    if let Some((point, _, Act::Eio | Act::Enospc)) = fault {
        // What runs after the last word of a life, or where a failure is put off to the next idle time, fails silently by design. A
        // commit that nobody waited for is made again, and counted.
        let quiet = point.contains("checkpoint locum.db")
            || point.starts_with("after ")
            || point.starts_with("end of session");
        assert!(
            quiet || !said.errors.is_empty() || said.store_errors > 0,
            "{context}: nothing was said or counted"
        );
    }
    if fault.is_some() {
        // Whatever was cut off or refused, the next life goes through.
        let next = Birth {
            life: 1_000_000 + life,
            kind: Kind::Recorder,
            fault: None,
            ..birth
        };
        let next = next.run();
        assert!(
            next.done && next.errors.is_empty(),
            "{context}: then {:?}",
            next.errors
        );
        verify(&store, &[&said, &next], &context);
    }
    said
}

#[test]
fn the_verifier_notices_what_is_missing_or_other_than_it_was_told() {
    let grounds = grounds();
    let folder = tempfile::tempdir().unwrap();
    let told = folder.path().join("told");
    copy(&grounds.store, &told);
    let birth = Birth {
        store: &told,
        life: 1,
        kind: Kind::Learner,
        fault: None,
        env: Vec::new(),
    };
    let mut said = birth.run();
    verify(&told, &[&said], "as it was told");
    let weights = crate::registry::Registry::open(&told).unwrap();
    let weights = weights
        .student_dir(&weights.list().unwrap()[0].id)
        .join("model.safetensors");
    let weights = weights.strip_prefix(&told).unwrap();
    let of_life = "episode=(SELECT max(episode) FROM episodes)";
    let sql = |what: &str| format!("{what} WHERE {of_life}");
    type Tamper<'a> = Box<dyn Fn(&std::path::Path) + 'a>;
    let tampered: Vec<(&str, Tamper)> = vec![
        (
            "a step is gone",
            Box::new(|s| run(s, &sql("DELETE FROM steps"))),
        ),
        (
            "a word is another",
            Box::new(|s| run(s, &sql("UPDATE steps SET message='no'"))),
        ),
        (
            "an end is forgotten",
            Box::new(|s| run(s, &sql("UPDATE episodes SET incomplete=1"))),
        ),
        (
            "an episode is gone",
            Box::new(|s| run(s, &sql("DELETE FROM episodes"))),
        ),
        ("a weight is another", Box::new(|s| flip(&s.join(weights)))),
    ];
    for (what, tamper) in &tampered {
        let store = folder.path().join(what);
        copy(&told, &store);
        tamper(&store);
        let noticed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            verify(&store, &[&said], what)
        }));
        assert!(noticed.is_err(), "it was not noticed that {what}");
    }
    said.current = Some(77);
    let noticed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        verify(&told, &[&said], "another student was confirmed")
    }));
    assert!(noticed.is_err());
}

fn run(store: &std::path::Path, sql: &str) {
    let db = rusqlite::Connection::open(store.join(crate::store::DATABASE)).unwrap();
    assert!(db.execute(sql, []).unwrap() > 0, "{sql}");
}

fn flip(path: &std::path::Path) {
    let mut bytes = std::fs::read(path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn the_same_order_again_is_the_job_that_was_left_and_another_is_not() {
    let grounds = grounds();
    let long = |tokens| DistilOptions {
        knobs: RecipeKnobs {
            tokens: Some(tokens),
            ..distillation().knobs
        },
        ..distillation()
    };
    let training = |locum: &Locum| {
        let status = locum.distil_status(0).unwrap();
        status.state == JobState::Training && status.tokens_done > 0
    };
    let until = |what: &dyn Fn() -> bool| {
        let begun = Instant::now();
        while !what() {
            assert!(begun.elapsed() < PATIENCE);
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    let order = long(100_000_000);
    let locum = open(&grounds.store).unwrap();
    let job = locum.distil_start(order.clone()).unwrap();
    until(&|| training(&locum));
    locum.close(PATIENCE).unwrap();
    for keeper_first in [false, true] {
        let locum = open(&grounds.store).unwrap();
        if keeper_first {
            until(&|| locum.distil_pause(job).is_ok());
            locum.distil_resume(job).unwrap();
            // Another order is none that goes on.
            let other = locum.distil_start(long(90_000_000));
            assert!(matches!(other, Err(Error::Busy(_))), "{other:?}");
        }
        assert_eq!(locum.distil_start(order.clone()).unwrap(), job);
        // Given twice in one process it is an order of its own, which has to wait.
        let twice = locum.distil_start(order.clone());
        assert!(matches!(twice, Err(Error::Busy(_))), "{twice:?}");
        until(&|| training(&locum));
        locum.close(PATIENCE).unwrap();
    }
    let locum = open(&grounds.store).unwrap();
    assert_eq!(locum.distil_status(0).unwrap().job, job, "there is one job");
    locum.distil_cancel(job).unwrap();
}
