//! A process that records, distils and promotes, says on its standard output what it was promised, and is killed by other tests; and
//! the verifier that holds the store against what it said.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{json, Value};

use super::World;
use crate::episode::{Actor, Episode, Outcome, Status, Task};
use crate::files::faults::{self, Act};
use crate::gate::{GateDecision, Verdict};
use crate::locum::trial::TrialRecord;
use crate::locum::{
    check_store, now_ms, DistilOptions, EpisodeStart, Error, JobState, Locum, Options, StepMeta,
};
use crate::policy::fixtures::Eager;
use crate::policy::RecipeKnobs;
use crate::registry::Registry;
use crate::store::{Store, StoreOptions};

/// Episodes that a store has before its first life, so that there is something to distil.
const GROUNDS: u64 = 12;
/// Steps of each episode: a question, and two calls with their results.
const STEPS: u32 = 3;
/// Students that a store's lives make; then they only promote and roll back.
const MAX_STUDENTS: usize = 2;
const SOON: Duration = Duration::from_secs(20);

/// What a life does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// Records until it is killed, and distils and promotes by the way.
    Endless,
    /// Records three episodes, and ends.
    Recorder,
    /// Records and learns as one of several processes, until a file `stop` lies beside the store.
    Member,
    /// Records, distils with a close in mid-training, promotes, rolls back, and ends.
    Learner,
}

/// How a life is begun.
#[derive(Clone)]
pub struct Birth<'a> {
    pub store: &'a Path,
    pub life: u64,
    pub kind: Kind,
    /// The point, which time, and the act.
    pub fault: Option<(&'a str, u64, Act)>,
    pub env: Vec<(&'static str, String)>,
}

impl Birth<'_> {
    pub fn spawn(&self) -> Child {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args([
                "--exact",
                "locum::tests::life::a_life",
                "--ignored",
                "--nocapture",
                "--test-threads=1",
            ])
            .env("LOCUM_TEST_STORE", self.store)
            .env("LOCUM_TEST_LIFE", self.life.to_string())
            .env("LOCUM_TEST_KIND", format!("{:?}", self.kind))
            .envs(self.env.iter().map(|(name, value)| (*name, value)))
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        if let Some((point, nth, act)) = self.fault {
            let fault = format!("{}|{nth}|{point}", act.word());
            command.env("LOCUM_TEST_FAULT", fault);
        }
        command.spawn().unwrap()
    }

    /// Runs it to its end, of whatever kind.
    pub fn run(&self) -> Said {
        let output = self.spawn().wait_with_output().unwrap();
        let mut said = Said::read(&String::from_utf8_lossy(&output.stdout));
        use std::os::unix::process::ExitStatusExt;
        said.killed = output.status.signal() == Some(libc::SIGKILL);
        assert!(
            said.killed || output.status.success(),
            "life {} ended with {}: {}",
            self.life,
            output.status,
            String::from_utf8_lossy(&output.stdout)
        );
        said
    }
}

/// What a life said before it ended.
#[derive(Debug, Default)]
pub struct Said {
    /// Episodes by id: the life, its number there, how many steps are durable, whether it ended.
    pub episodes: BTreeMap<String, (u64, u64, u32, bool)>,
    /// The pointer as it was confirmed last, and what was being written to it.
    pub current: Option<u64>,
    pub pointing: BTreeSet<u64>,
    pub errors: Vec<String>,
    /// Commits that failed, those that went through at another try among them.
    pub store_errors: u64,
    pub points: BTreeMap<String, u64>,
    pub done: bool,
    pub killed: bool,
}

impl Said {
    /// A last line without an end may be cut off by a kill and does not count.
    pub fn read(text: &str) -> Said {
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let mut said = Said::default();
        for line in whole.lines() {
            let mut words = line.split(' ');
            let mut word = || words.next().unwrap_or_default();
            let number = |word: &str| word.parse::<u64>().unwrap();
            match word() {
                "durable" => {
                    let (id, life, n) = (word().to_string(), number(word()), number(word()));
                    let (steps, ended) = (number(word()) as u32, word() == "ended");
                    said.episodes.insert(id, (life, n, steps, ended));
                }
                "pointing" => {
                    said.pointing.insert(number(word()));
                }
                "current" => {
                    said.current = Some(number(word()));
                    said.pointing.clear();
                }
                "error" => said.errors.push(line["error ".len()..].into()),
                "counted" => said.store_errors = number(word()),
                "point" => {
                    let n = number(word());
                    said.points.insert(words.collect::<Vec<_>>().join(" "), n);
                }
                "done" => said.done = true,
                _ => {}
            }
        }
        said
    }
}

/// A folder with a base and a few episodes; lives go on in copies of it.
pub fn grounds() -> World {
    let world = World::new(0);
    let locum = open(&world.store).unwrap();
    for n in 0..GROUNDS {
        play(&locum, 0, n, &mut |_| ()).unwrap();
    }
    locum.close(SOON).unwrap();
    world
}

pub fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.path().is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(std::fs::copy(entry.path(), target).unwrap()),
        }
    }
}

pub fn open(store: &Path) -> Result<Locum, Error> {
    Locum::open(Options {
        store_dir: store.into(),
        policy: Some(Arc::new(Eager::default())),
        threads: 1,
        train_threads: 1,
        ..Options::default()
    })
}

fn say(line: &str) {
    use std::io::Write;
    // One write, so that a kill leaves a whole line or none.
    let mut out = std::io::stdout().lock();
    out.write_all(format!("{line}\n").as_bytes()).unwrap();
    out.flush().unwrap();
}

fn given(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

#[test]
#[ignore = "the process that other tests kill"]
fn a_life() {
    let store = PathBuf::from(given("LOCUM_TEST_STORE").expect("started by another test"));
    let life: u64 = given("LOCUM_TEST_LIFE").unwrap().parse().unwrap();
    match given("LOCUM_TEST_FAULT") {
        Some(fault) => {
            let mut parts = fault.splitn(3, '|');
            let mut part = || parts.next().unwrap();
            let (act, nth, point) = (Act::of(part()), part().parse().unwrap(), part());
            faults::arm(point, nth, act);
        }
        None => drop(faults::record()),
    }
    say("born");
    let done = match given("LOCUM_TEST_KIND").unwrap().as_str() {
        "Recorder" => record(&store, life),
        "Learner" => learn(&store, life),
        "Member" => belong(&store, life),
        _ => live(&store, life),
    };
    match done {
        Ok(()) => say("done"),
        Err(error) => say(&format!("error {error}")),
    }
    if given("LOCUM_TEST_FAULT").is_none() {
        for (point, n) in faults::record() {
            say(&format!("point {n} {point}"));
        }
    }
}

fn record(store: &Path, life: u64) -> Result<(), Error> {
    let locum = open(store)?;
    for n in 0..3 {
        // A refusal is told and the next episode tried, as a host would.
        if let Err(error) = play(&locum, life, n, &mut say) {
            say(&format!("error {error}"));
        }
    }
    say(&format!("counted {}", locum.stats().store_errors));
    locum.close(SOON)
}

fn live(store: &Path, life: u64) -> Result<(), Error> {
    let locum = open(store)?;
    for n in 0.. {
        play(&locum, life, n, &mut say)?;
        if n % 4 == 1 && locum.students()?.len() < MAX_STUDENTS {
            let _ = locum.distil_start(distillation());
        }
        if n % 3 == 2 {
            turn(&locum)?;
        }
    }
    unreachable!()
}

fn belong(store: &Path, life: u64) -> Result<(), Error> {
    let locum = open(store)?;
    let (mut learned, mut served) = (false, None);
    let _ = locum.distil_start(DistilOptions {
        knobs: RecipeKnobs {
            tokens: Some(40_000),
            ..distillation().knobs
        },
        ..distillation()
    });
    let stop = store.with_file_name("stop");
    for n in 0.. {
        play(&locum, life, n, &mut say)?;
        let learns = locum.distil_pause(0).is_ok();
        let _ = locum.distil_resume(0);
        if learns && !learned {
            say("learning");
        }
        learned |= learns;
        let newest = locum.students()?.pop();
        if let Some(student) = newest.filter(|s| learned && !learns && !s.current) {
            promote(&locum, student.version)?;
            say(&format!("promoted {} {}", student.version, now_ms()));
        }
        let serving = locum.inner.swap.serving();
        let current = serving.current.as_ref().map(|s| s.version);
        drop(serving);
        if current != served {
            served = current;
            say(&format!("serves {} {}", current.unwrap_or(0), now_ms()));
        }
        if stop.exists() {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    locum.close(SOON)
}

fn learn(store: &Path, life: u64) -> Result<(), Error> {
    let locum = open(store)?;
    play(&locum, life, 0, &mut say)?;
    locum.distil_start(distillation())?;
    // Closed in mid-training, so that a checkpoint is written, and taken up again.
    until(&locum, |state, tokens| {
        state == JobState::Training && tokens > 0
    })?;
    locum.close(SOON)?;
    drop(locum);
    let locum = open(store)?;
    until(&locum, |_, _| false)?;
    turn(&locum)?;
    turn(&locum)?;
    play(&locum, life, 1, &mut say)?;
    locum.close(SOON)
}

/// Waits until the newest job has ended, or is where it is wanted.
fn until(locum: &Locum, there: impl Fn(JobState, u64) -> bool) -> Result<(), Error> {
    let begun = Instant::now();
    loop {
        let status = locum.distil_status(0)?;
        if there(status.state, status.tokens_done) {
            return Ok(());
        }
        if !status.state.is_running() {
            return match status.state {
                JobState::Stored => Ok(()),
                state => Err(Error::Argument(format!(
                    "job {state:?}: {}",
                    status.message
                ))),
            };
        }
        // On a disk that stays full not even the end of a job can be written; it is tried again as long as the host lives.
        if begun.elapsed() > SOON / 2 {
            return Err(Error::Argument(format!("the job is at {status:?}")));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

pub fn distillation() -> DistilOptions {
    DistilOptions {
        knobs: RecipeKnobs {
            method: Some("lora".into()),
            rank: Some(2),
            tokens: Some(6_000),
            batch_tokens: Some(512),
            ..RecipeKnobs::default()
        },
        trial: Some(false),
        ..DistilOptions::default()
    }
}

/// Promotes the newest student if another or nobody serves, else takes it back.
fn turn(locum: &Locum) -> Result<(), Error> {
    let current = locum.inner.registry.current()?;
    let newest = locum.students()?.last().map(|s| s.version);
    match newest {
        Some(version) if current != Some(version) => {
            say(&format!("pointing {version}"));
            promote(locum, version)?;
            say(&format!("current {version}"));
        }
        Some(_) => {
            let before = locum.inner.registry.previous()?.unwrap_or(0);
            say(&format!("pointing {before}"));
            locum.rollback()?;
            let now = locum.inner.registry.current()?.unwrap_or(0);
            say(&format!("current {now}"));
        }
        None => {}
    }
    Ok(())
}

/// As the gate promotes, without its evidence.
pub fn promote(locum: &Locum, version: u64) -> Result<(), Error> {
    let student = locum.inner.load_student(version)?;
    let students = locum.students()?;
    let job = students
        .iter()
        .find(|s| s.version == version)
        .map_or(0, |s| s.job);
    let verdict = Verdict {
        decision: GateDecision::Pass,
        pass: true,
        reasons: vec!["a test said so".into()],
        needs: Vec::new(),
    };
    let record = TrialRecord {
        job,
        version,
        stage: "canary".into(),
        ..TrialRecord::default()
    };
    locum.inner.promote(record, student, 0.5, verdict)
}

fn text(life: u64, n: u64, step: u32) -> String {
    format!("life {life}, episode {n}, step {step}: which way is it?")
}

fn way(n: u64, step: u32) -> &'static str {
    ["left", "right"][(n + u64::from(step)) as usize % 2]
}

/// Plays an episode of a teacher and says what of it is durable.
fn play(locum: &Locum, life: u64, n: u64, say: &mut dyn FnMut(&str)) -> Result<(), Error> {
    let tool = json!([{"type": "function", "function": {"name": "go", "description": "",
        "parameters": {"type": "object", "properties": {"to": {"enum": ["left", "right"]}}, "required": ["to"]}}}]);
    let handle = locum.begin(EpisodeStart {
        task: Task {
            id: format!("task {life} {n}"),
            domain: "maze".into(),
            ..Task::default()
        },
        tools: crate::formats::tools_from_json(&tool).unwrap(),
        ..EpisodeStart::default()
    })?;
    let durable = |steps: u32, how: &str| format!("durable {} {life} {n} {steps} {how}", handle.0);
    let message = |value: Value, actor| {
        let meta = StepMeta {
            actor,
            ..StepMeta::default()
        };
        locum.message(&handle, &value, meta)
    };
    message(
        json!({"role": "user", "content": text(life, n, 1)}),
        Actor::Human,
    )?;
    if n % 2 == 1 {
        locum.flush(SOON)?;
        say(&durable(1, "open"));
    }
    for step in 2..=STEPS {
        let id = format!("c{step}");
        let arguments = json!({"to": way(n, step)}).to_string();
        let call = json!([{"id": id, "type": "function", "function": {"name": "go", "arguments": arguments}}]);
        message(
            json!({"role": "assistant", "content": null, "tool_calls": call}),
            Actor::Teacher,
        )?;
        message(
            json!({"role": "tool", "tool_call_id": id, "content": text(life, n, step)}),
            Actor::Unknown,
        )?;
    }
    let outcome = Outcome {
        status: Status::Success,
        ..Outcome::default()
    };
    // An end that failed may be tried again.
    let ended = locum.end(&handle, outcome.clone()).or_else(|error| {
        say(&format!("error {error}"));
        locum.end(&handle, outcome)
    });
    ended?;
    say(&durable(STEPS, "ended"));
    Ok(())
}

/// Holds a store against what its lives said. Opens it, so what a life left open is settled before.
#[track_caller]
pub fn verify(store: &Path, lives: &[&Said], context: &str) {
    let opened = Store::open(store, StoreOptions::default());
    let opened = opened.unwrap_or_else(|error| panic!("{context}: {error}"));
    for (id, &(life, n, steps, ended)) in lives.iter().flat_map(|said| &said.episodes) {
        let id = id.parse().unwrap();
        let episode = opened.episode(id).unwrap();
        let episode = episode.unwrap_or_else(|| panic!("{context}: episode {id} is gone"));
        let found = episode.steps.len() as u32;
        assert!(
            found >= steps,
            "{context}: {found} of {steps} steps of {id}"
        );
        assert!(episode.closed, "{context}: {id} is open");
        if ended {
            assert!(!episode.incomplete, "{context}: {id}");
            let status = episode.outcome.as_ref().map(|o| o.status);
            assert_eq!(status, Some(Status::Success), "{context}: {id}");
        }
        same_words(&episode, life, n, steps, context);
    }
    opened.close(SOON).unwrap();
    drop(opened);
    let check = check_store(store).unwrap();
    let damage: Vec<_> = check.findings().collect();
    assert!(check.sound(), "{context}: {damage:?}");
    let Some(said) = lives.iter().rev().find(|said| said.current.is_some()) else {
        return;
    };
    let registry = Registry::open(store).unwrap();
    let now = registry.current().unwrap().unwrap_or(0);
    let pointing: BTreeSet<u64> = lives
        .iter()
        .flat_map(|s| s.pointing.iter().copied())
        .collect();
    assert!(
        said.current == Some(now) || pointing.contains(&now),
        "{context}: student {now} serves, {:?} was confirmed",
        said.current
    );
    if now > 0 {
        let (manifest, ..) = registry.load(now).unwrap();
        let report = manifest.evaluation.pointer("/verdict");
        assert!(report.is_some(), "{context}: student {now} has no report");
    }
}

fn same_words(episode: &Episode, life: u64, n: u64, steps: u32, context: &str) {
    for step in &episode.steps[..steps as usize] {
        let index = step.index;
        if index == 1 {
            let said = step.message.as_ref().map(|m| m.text());
            assert_eq!(
                said.as_deref(),
                Some(text(life, n, 1).as_str()),
                "{context}"
            );
            continue;
        }
        assert_eq!(
            step.tool_calls[0].arguments,
            json!({"to": way(n, index)}),
            "{context}"
        );
        let seen = step.observations[0].content.as_ref().map(|c| c.text());
        assert_eq!(
            seen.as_deref(),
            Some(text(life, n, index).as_str()),
            "{context}"
        );
    }
}
