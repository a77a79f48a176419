//! `locum bench record`: what recording costs the host, what reaches the disk, and what the disk and plain SQLite do beside it.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use locum_core::episode::{
    Actor, Content, Episode, EpisodeId, Outcome, Source, Status, Step, Task,
};
use locum_core::locum::{EpisodeHandle, EpisodeStart, Error, Locum, Options, StepMeta};
use locum_core::report::machine;
use locum_core::store::{Record, Store, StoreError, StoreOptions};
use rusqlite::Connection;
use serde_json::{json, Value};

use crate::fail::Fail;
use crate::out::{Out, Table};
use crate::{load_policy, Place};

/// Bytes of a step's text.
const STEP_BYTES: usize = 2048;
/// Pace at which the host's call is timed.
const STEPS_A_SECOND: u64 = 5_000;
/// Steps timed at that pace where `--tokens` does not say; as many go before them.
const STEPS: usize = 20_000;
/// A pause in a thread that does nothing but read the clock: the machine was elsewhere.
const AWAY_US: f64 = 10.0;
/// Steps written as fast as the disk takes them.
const SUSTAINED: usize = 60_000;
/// Steps of one episode.
const EPISODE: u32 = 50;
/// And of a longer one, at the door, where another thread ends the last one meanwhile.
const LONG_EPISODE: u32 = 200;
/// Steps waited for, and syncs of a file beside them, in turn.
const DURABLE: usize = 300;
const DURABLE_PAUSE: Duration = Duration::from_millis(10);
/// How long a host records faster than any disk.
const FLOOD: Duration = Duration::from_millis(500);
/// Inserts of plain SQLite, one a transaction and in groups.
const SINGLE: usize = 2_000;
const GROUPED: usize = 60_000;
const GROUP: usize = 256;
const PLAIN: &str = "plain.db";
const SOON: Duration = Duration::from_secs(60);

/// A folder on the disk that is measured, removed afterwards.
struct Bench(PathBuf);

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub fn run(args: &super::Args, place: &Place, out: &Out) -> Result<(), Fail> {
    let steps = args.tokens().unwrap_or(STEPS).max(100);
    // Beside the store, because what a sync costs is the disk's own.
    let parent = match (place.dir.is_dir(), place.dir.parent()) {
        (true, Some(parent)) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        (true, _) => ".".into(),
        (false, _) => std::env::temp_dir(),
    };
    let dir = parent.join(format!("locum-bench-{}", std::process::id()));
    let failed = |source| Fail::Write {
        path: dir.clone(),
        source,
    };
    std::fs::create_dir_all(&dir).map_err(failed)?;
    let bench = Bench(dir.clone());
    let text = text();

    let (record, paced) = at_the_store(&bench.0.join("paced"), &text, steps)?;
    let (message, busy) = at_the_door(&bench.0.join("door"), &text, steps, EPISODE)?;
    let (message_long, busy_long) =
        at_the_door(&bench.0.join("door-long"), &text, steps, LONG_EPISODE)?;
    let busy_at_pace = busy + busy_long;
    let sustained = sustained(
        &bench.0.join("sustained"),
        &text,
        steps.min(SUSTAINED / 3) * 3,
    )?;
    let (durable, sync) = durable(&bench.0, &text).map_err(|error| match error {
        Ok(fail) => fail,
        Err(source) => failed(source),
    })?;
    let flood = flood(&bench.0.join("flood"), &text)?;
    let (single, grouped) = plain(&bench.0, &text).map_err(|source| StoreError::Sqlite {
        path: bench.0.join(PLAIN),
        source,
    })?;

    let mut table = Table::new(&["", ">p50", ">p99", ">highest", ">core away"]);
    let mut row = |name: &str, us: &[f64], away: String| {
        let cell = |share| format!("{:.1} us", at(us, share));
        table.row([name.into(), cell(0.5), cell(0.99), cell(1.0), away]);
    };
    let mut paced_row = |name: &str, paced: &Paced| {
        let (times, us) = (paced.away_a_second(), at(&paced.away, 0.5));
        row(name, &paced.took, format!("{times:.0}/s x {us:.0} us"));
    };
    paced_row("record, on the host's thread", &record);
    let door = |steps: u32| format!("through the host's door, {steps} steps an episode");
    paced_row(&door(EPISODE), &message);
    paced_row(&door(LONG_EPISODE), &message_long);
    row("until a step is durable", &durable, String::new());
    row("fdatasync of a file beside it", &sync, String::new());
    out.table(&table);
    let times = at(&durable, 0.99) / at(&sync, 0.99);
    out.line(&format!(
        "{STEPS_A_SECOND} steps/s of {STEP_BYTES} bytes: {paced} refused by the store, {busy_at_pace} by the door. A durable step's p99 is {times:.2} fdatasyncs."
    ));
    out.line(&format!(
        "To disk: {sustained:.0} steps/s; plain SQLite {single:.0} rows/s one a transaction, {grouped:.0} rows/s {GROUP} a transaction."
    ));
    out.line(&format!(
        "A host that records faster: {} taken and {} answered BUSY in {:.1} s, the longest call {:.0} us.",
        flood.taken, flood.busy, FLOOD.as_secs_f64(), flood.longest_us
    ));
    let three = |us: &[f64]| json!({ "p50_us": at(us, 0.5), "p99_us": at(us, 0.99), "highest_us": at(us, 1.0) });
    out.result(&json!({
        "steps": steps, "step_bytes": STEP_BYTES, "steps_a_second": STEPS_A_SECOND,
        "record": record.json(), "message": message.json(), "message_long": message_long.json(), "refused_at_pace": paced + busy_at_pace,
        "durable": three(&durable), "fdatasync": three(&sync), "durable_p99_in_fdatasyncs": times,
        "sustained_steps_s": sustained, "sqlite_single_rows_s": single, "sqlite_grouped_rows_s": grouped, "group": GROUP,
        "flood": { "taken": flood.taken, "busy": flood.busy, "stats_busy": flood.counted, "longest_us": flood.longest_us },
        "machine": machine(),
    }));
    Ok(())
}

/// Letters that no compressor would be fond of, the same every time.
fn text() -> String {
    let mut x = 1u64;
    let mut letter = || {
        x = x
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (b'a' + ((x >> 33) % 26) as u8) as char
    };
    let words = std::iter::repeat_with(|| {
        let mut word: String = (0..7).map(|_| letter()).collect();
        word.push(' ');
        word
    });
    let mut text: String = words.take(STEP_BYTES / 8).collect();
    text.truncate(STEP_BYTES);
    text
}

fn begin(n: u64) -> Record {
    Record::Begin(Box::new(Episode {
        episode_id: EpisodeId::new(n, n.into()),
        task: Task {
            id: format!("bench-{n}"),
            ..Task::default()
        },
        ..Episode::default()
    }))
}

fn step(n: u64, index: u32, text: &str) -> Record {
    Record::Step {
        episode: EpisodeId::new(n, n.into()),
        step: Box::new(Step {
            index,
            source: Source::Agent,
            actor: Actor::Teacher,
            message: Some(Content::Text(text.into())),
            ..Step::default()
        }),
    }
}

fn close(n: u64) -> Record {
    let outcome = Outcome {
        status: Status::Success,
        ..Outcome::default()
    };
    Record::Outcome {
        episode: EpisodeId::new(n, n.into()),
        outcome: Box::new(outcome),
        close: true,
    }
}

/// What calls at the pace took, and what the machine took from the thread that made them: interrupts of the disk that its core was
/// given, or another thread.
struct Paced {
    /// Microseconds of each call of the second half, sorted.
    took: Vec<f64>,
    /// Microseconds of each time that the core was away while the thread only read the clock, sorted.
    away: Vec<f64>,
    seconds: f64,
}

impl Paced {
    /// Where that times the length of a call is more than one in a hundred, the p99 is the machine's.
    fn away_a_second(&self) -> f64 {
        self.away.len() as f64 / self.seconds
    }

    fn json(&self) -> Value {
        let away = json!({ "a_second": self.away_a_second(), "p50_us": at(&self.away, 0.5) });
        json!({ "p50_us": at(&self.took, 0.5), "p99_us": at(&self.took, 0.99), "highest_us": at(&self.took, 1.0), "away": away })
    }
}

/// Calls `act` at the pace, without a system call of its own in between.
fn pace(steps: usize, mut act: impl FnMut(usize) -> Result<Duration, Fail>) -> Result<Paced, Fail> {
    let every = Duration::from_nanos(1_000_000_000 / STEPS_A_SECOND);
    let mut took = Vec::with_capacity(2 * steps);
    let mut away = Vec::with_capacity(32 * steps);
    let began = Instant::now();
    let mut due = began;
    for n in 0..2 * steps {
        let mut last = Instant::now();
        while last < due {
            let now = Instant::now();
            let gap = (now - last).as_secs_f64() * 1e6;
            if gap > AWAY_US && away.len() < away.capacity() {
                away.push(gap);
            }
            last = now;
        }
        due += every;
        took.push(act(n)?.as_secs_f64() * 1e6);
    }
    let seconds = began.elapsed().as_secs_f64();
    let mut took = took.split_off(steps);
    took.sort_by(f64::total_cmp);
    away.sort_by(f64::total_cmp);
    Ok(Paced {
        took,
        away,
        seconds,
    })
}

fn timed<T>(act: impl FnOnce() -> T) -> (T, Duration) {
    let began = Instant::now();
    let result = act();
    (result, began.elapsed())
}

/// The call of the recorder alone. The step is made before, as a host has it; taking it over is part of the call.
fn at_the_store(dir: &Path, text: &str, steps: usize) -> Result<(Paced, u64), Fail> {
    let store = Store::open(dir, StoreOptions::default())?;
    let mut refused = 0;
    let took = pace(steps, |n| {
        let (episode, index) = (n as u64 / u64::from(EPISODE), n as u32 % EPISODE);
        if index == 0 {
            store.record(begin(episode))?;
        }
        let record = step(episode, 1 + index, text);
        let (result, took) = timed(|| store.record(record));
        match result {
            Err(StoreError::Busy { .. }) => refused += 1,
            other => other?,
        }
        if index == EPISODE - 1 {
            store.record(close(episode))?;
        }
        Ok(took)
    })?;
    store.flush(SOON)?;
    store.close(SOON)?;
    Ok((took, refused))
}

/// The call that a host makes: an OpenAI message, checked, redacted by the shipped policy, copied. Another thread ends the episodes,
/// because that waits for the disk.
fn at_the_door(
    dir: &Path,
    text: &str,
    steps: usize,
    episode_steps: u32,
) -> Result<(Paced, u64), Fail> {
    let locum = door(dir)?;
    let message = message(text);
    let (played, to_end) = channel::<EpisodeHandle>();
    let took = thread::scope(|scope| {
        let ender = scope.spawn(|| -> Result<(), Error> {
            for episode in to_end {
                loop {
                    match locum.end(&episode, Outcome::default()) {
                        Err(Error::Store(StoreError::Busy { .. })) => {
                            thread::sleep(Duration::from_millis(1));
                        }
                        other => break other?,
                    }
                }
            }
            Ok(())
        });
        let mut open: Option<EpisodeHandle> = None;
        let took = pace(steps, |n| {
            if n % episode_steps as usize == 0 {
                let before = open.replace(locum.begin(EpisodeStart::default())?);
                // Nobody listens any more only where ending failed, which is told below.
                before.map(|episode| played.send(episode));
            }
            let episode = open.expect("begun above");
            let meta = StepMeta {
                actor: Actor::Teacher,
                ..StepMeta::default()
            };
            let (result, took) = timed(|| locum.message(&episode, &message, meta));
            match result {
                Err(Error::Store(StoreError::Busy { .. })) => {}
                other => other?,
            }
            Ok(took)
        });
        drop(played);
        ender.join().expect("it does not panic")?;
        took
    })?;
    let busy = locum.stats().busy;
    locum.close(SOON)?;
    Ok((took, busy))
}

fn door(dir: &Path) -> Result<Locum, Fail> {
    Ok(Locum::open(Options {
        store_dir: dir.into(),
        policy: Some(load_policy(None)?),
        no_model: true,
        no_learning: true,
        ..Options::default()
    })?)
}

fn message(text: &str) -> Value {
    json!({ "role": "assistant", "content": text })
}

/// Steps a second from the first call until all of them are durable; a refusal waits and tries again.
fn sustained(dir: &Path, text: &str, steps: usize) -> Result<f64, Fail> {
    let store = Store::open(dir, StoreOptions::default())?;
    let patiently = |record: Record| loop {
        match store.record(record.clone()) {
            Err(StoreError::Busy { .. }) => thread::sleep(Duration::from_millis(1)),
            other => return other,
        }
    };
    let began = Instant::now();
    for n in 0..steps {
        let (episode, index) = (n as u64 / u64::from(EPISODE), n as u32 % EPISODE);
        if index == 0 {
            patiently(begin(episode))?;
        }
        patiently(step(episode, 1 + index, text))?;
        if index == EPISODE - 1 {
            patiently(close(episode))?;
        }
    }
    store.flush(SOON)?;
    let rate = steps as f64 / began.elapsed().as_secs_f64();
    store.close(SOON)?;
    Ok(rate)
}

/// Microseconds until a step is durable at 100 steps/s, and of an append with fdatasync to a file beside the store, in turn.
fn durable(dir: &Path, text: &str) -> Result<(Vec<f64>, Vec<f64>), Result<Fail, std::io::Error>> {
    let fail = |error: StoreError| Ok(Fail::from(error));
    let store = Store::open(&dir.join("durable"), StoreOptions::default()).map_err(fail)?;
    let mut file = File::create(dir.join("appended")).map_err(Err)?;
    store.record(begin(1)).map_err(fail)?;
    let (mut steps, mut syncs) = (Vec::new(), Vec::new());
    for n in 0..DURABLE {
        thread::sleep(DURABLE_PAUSE / 2);
        let record = step(1, 1 + n as u32, text);
        let (result, took) = timed(|| store.record(record).and_then(|()| store.flush(SOON)));
        result.map_err(fail)?;
        steps.push(took.as_secs_f64() * 1e6);
        thread::sleep(DURABLE_PAUSE / 2);
        let append = || {
            file.write_all(text.as_bytes())
                .and_then(|()| file.sync_data())
        };
        let (result, took) = timed(append);
        result.map_err(Err)?;
        syncs.push(took.as_secs_f64() * 1e6);
    }
    store.close(SOON).map_err(fail)?;
    for all in [&mut steps, &mut syncs] {
        all.sort_by(f64::total_cmp);
    }
    Ok((steps, syncs))
}

struct Flood {
    taken: u64,
    busy: u64,
    /// As `stats` counts them.
    counted: u64,
    longest_us: f64,
}

/// A host that records as fast as it can, and does not wait where it is refused.
fn flood(dir: &Path, text: &str) -> Result<Flood, Fail> {
    let locum = door(dir)?;
    let message = message(text);
    let mut flood = Flood {
        taken: 0,
        busy: 0,
        counted: 0,
        longest_us: 0.0,
    };
    let began = Instant::now();
    let mut episode = None;
    for n in 0u64.. {
        if began.elapsed() >= FLOOD {
            break;
        }
        let handle = match episode {
            Some(handle) if !n.is_multiple_of(1000) => handle,
            _ => match locum.begin(EpisodeStart::default()) {
                Ok(handle) => handle,
                Err(Error::Store(StoreError::Busy { .. })) => {
                    flood.busy += 1;
                    episode = None;
                    continue;
                }
                Err(other) => return Err(other.into()),
            },
        };
        episode = Some(handle);
        let (result, took) = timed(|| locum.message(&handle, &message, StepMeta::default()));
        flood.longest_us = flood.longest_us.max(took.as_secs_f64() * 1e6);
        match result {
            Ok(()) => flood.taken += 1,
            Err(Error::Store(StoreError::Busy { .. })) => flood.busy += 1,
            Err(other) => return Err(other.into()),
        }
    }
    flood.counted = locum.stats().busy;
    locum.close(SOON)?;
    Ok(flood)
}

/// Rows a second of plain SQLite with the same promises (write-ahead log, every commit forced to the disk): one insert a transaction,
/// and many.
fn plain(dir: &Path, text: &str) -> rusqlite::Result<(f64, f64)> {
    let mut db = Connection::open(dir.join(PLAIN))?;
    db.execute_batch(
        "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA wal_autocheckpoint=8192;
         CREATE TABLE steps (episode INTEGER, step INTEGER, message TEXT, UNIQUE (episode, step));",
    )?;
    let insert = "INSERT INTO steps VALUES (?1, ?2, ?3)";
    let mut rate = |rows: usize, group: usize, episode: i64| -> rusqlite::Result<f64> {
        let began = Instant::now();
        for first in (0..rows).step_by(group) {
            let tx = db.transaction()?;
            {
                let mut insert = tx.prepare(insert)?;
                for n in first..(first + group).min(rows) {
                    insert.execute((episode, n as i64, text))?;
                }
            }
            tx.commit()?;
        }
        Ok(rows as f64 / began.elapsed().as_secs_f64())
    };
    Ok((rate(SINGLE, 1, 1)?, rate(GROUPED, GROUP, 2)?))
}

fn at(sorted: &[f64], share: f64) -> f64 {
    let last = sorted.len().saturating_sub(1);
    let i = (last as f64 * share).round() as usize;
    sorted.get(i).copied().unwrap_or(0.0)
}
