//! What of the facade needs no agent: the order in which a canary counts, a rollback, and a pin made by another process.

mod crash;
mod earlier;
mod fire;
mod life;
mod several;
mod shim;
mod trust;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::trial::{Trial, TrialRecord, EPISODE_PATIENCE};
use serde_json::json;

use super::{cache_bytes, EpisodeStart, Error, Locum, Options, Pin, ReasonCode, Request, StepMeta};
use crate::chat::Chat;
use crate::episode::{EpisodeId, Outcome, Status, Task};
use crate::gate::{Arm, CanaryTest, LiveOutcome};
use crate::generate::Student;
use crate::limits;
use crate::model::{write_tiny, KvCache, Model, Sequence};
use crate::policy::fixtures::Eager;
use crate::policy::{
    Allow, Choice, CurateVerdict, DatasetInfo, EpisodeInfo, GateInfo, GateSettings, GateVote,
    HookFailed, LabelVerdict, LiveInfo, Policy, PolicyId, RecipeKnobs, RedactInfo, ReplyInfo,
    ScheduleVerdict, StepInfo, TeacherFirst, ToolInfo, Who, WorldInfo,
};
use crate::registry::{import_base, Manifest, Registry};
use crate::view::View;

/// A store with a tiny base and as many students.
struct World {
    _dir: tempfile::TempDir,
    store: PathBuf,
    tiny: PathBuf,
}

impl World {
    fn new(students: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (store, tiny) = (dir.path().join("store"), dir.path().join("tiny"));
        write_tiny(&tiny, 1).unwrap();
        let world = Self {
            _dir: dir,
            store,
            tiny,
        };
        world.open(true).close(Duration::from_secs(5)).unwrap();
        import_base(&world.store, &world.tiny, Some("tiny")).unwrap();
        let (model, chat) = load(&world.tiny);
        for _ in 0..students {
            let manifest = world
                .registry()
                .save(&model, None, &chat, Manifest::default());
            manifest.unwrap();
        }
        world
    }

    fn registry(&self) -> Registry {
        Registry::open(&self.store).unwrap()
    }

    fn open(&self, no_model: bool) -> Locum {
        Locum::open(Options {
            store_dir: self.store.clone(),
            no_model,
            no_learning: true,
            threads: 1,
            train_threads: 1,
            ..Options::default()
        })
        .unwrap()
    }
}

fn load(dir: &Path) -> (Model, Chat) {
    (Model::load(dir).unwrap(), Chat::load(dir).unwrap())
}

fn canary() -> Trial {
    let dir = tempfile::tempdir().unwrap();
    write_tiny(dir.path(), 1).unwrap();
    let (model, chat) = load(dir.path());
    let student = Student {
        id: "s".into(),
        version: 1,
        model: Arc::new(model),
        chat: Arc::new(chat),
        view: View::default(),
        tool_names: Default::default(),
        scope: String::new(),
        held_out_exact: None,
        learns: false,
    };
    Trial {
        record: TrialRecord {
            stage: "canary".into(),
            version: 1,
            ..TrialRecord::default()
        },
        student: Arc::new(student),
        canary: CanaryTest::new(&GateSettings::default()),
        order: BTreeMap::new(),
        late: BTreeSet::new(),
    }
}

/// The `n`th episode to begin.
fn id(n: u64) -> EpisodeId {
    EpisodeId::new(1_000 + n, 7)
}

fn outcome(task: &str, success: bool) -> LiveOutcome {
    LiveOutcome {
        arm: Arm::Student,
        task: task.into(),
        domain: String::new(),
        success,
        at_ms: 0,
        integrity_ok: true,
        invalid_calls: 0,
    }
}

fn counted(trial: &Trial) -> Vec<&str> {
    let outcomes = trial.record.outcomes.iter();
    outcomes.map(|o| o.task.as_str()).collect()
}

#[test]
fn a_success_that_ends_early_does_not_overtake_an_unfinished_earlier_episode() {
    let mut trial = canary();
    let now = Instant::now();
    // Whoever asks first, the order is that of the ids, which begin with the time of the beginning.
    for n in [2, 1, 3] {
        trial.begin(id(n));
    }
    trial.take(id(3), outcome("third", true));
    trial.take(id(2), outcome("second", true));
    assert!(!trial.drain(now), "the first episode still runs");
    assert_eq!(counted(&trial), Vec::<&str>::new());
    assert_eq!(trial.canary.summary().student_episodes, 0);

    trial.take(id(1), outcome("first", false));
    assert!(trial.drain(now));
    assert_eq!(counted(&trial), ["first", "second", "third"]);
    assert_eq!(trial.canary.summary().student_episodes, 3);
    assert!(!trial.drain(now), "nothing is counted twice");
    assert!(trial.order.is_empty() && trial.late.is_empty());
}

#[test]
fn an_episode_that_is_waited_for_too_long_is_taken_late_and_holds_nobody_up() {
    let mut trial = canary();
    trial.begin(id(1));
    trial.begin(id(2));
    trial.take(id(2), outcome("second", true));
    let patient = Instant::now();
    assert!(!trial.drain(patient));
    assert!(trial.drain(patient + EPISODE_PATIENCE));
    assert_eq!(counted(&trial), ["second"]);
    // It is not forgotten: its outcome counts when it comes, also where that is long after the others.
    trial.take(id(1), outcome("first", false));
    assert_eq!(counted(&trial), ["second", "first"]);
    trial.take(id(1), outcome("first", false));
    assert_eq!(counted(&trial).len(), 2, "and counts once");
}

#[test]
fn episodes_from_before_the_canary_and_dropped_ones_are_no_evidence() {
    let mut trial = canary();
    trial.take(id(1), outcome("before", true));
    trial.drain(Instant::now());
    assert_eq!(counted(&trial), Vec::<&str>::new());

    trial.begin(id(2));
    trial.begin(id(3));
    trial.take(id(3), outcome("third", true));
    trial.forget(id(2));
    assert!(
        trial.drain(Instant::now()),
        "a dropped episode is not waited for"
    );
    assert_eq!(counted(&trial), ["third"]);

    trial.record.stage = "shadow".into();
    trial.begin(id(4));
    assert!(trial.order.is_empty(), "in shadow nothing is counted");
}

#[test]
fn a_rollback_without_a_model_goes_to_the_student_before_and_then_to_the_teacher() {
    let world = World::new(2);
    let registry = world.registry();
    for version in [1, 2] {
        registry.set_current(Some(version)).unwrap();
    }
    let locum = world.open(true);
    let promoted = TrialRecord {
        version: 2,
        stage: "promoted".into(),
        ..TrialRecord::default()
    };
    locum.inner.save_trial(&promoted).unwrap();

    locum.rollback().unwrap();
    assert_eq!(registry.current().unwrap(), Some(1));
    let trials = locum.inner.trials().unwrap();
    assert_eq!(trials[0].stage, "rolled_back", "{trials:?}");
    assert!(trials[0].ended_at_ms.is_some());

    locum.rollback().unwrap();
    assert_eq!(registry.current().unwrap(), None, "the teacher plays again");
    let again = locum.rollback();
    assert!(matches!(again, Err(Error::NotFound { .. })), "{again:?}");
}

#[test]
fn an_alarm_that_comes_late_does_not_take_back_the_student_before() {
    let world = World::new(2);
    let registry = world.registry();
    for version in [1, 2] {
        registry.set_current(Some(version)).unwrap();
    }
    let locum = world.open(false);
    let rollbacks = || {
        let events = std::iter::from_fn(|| locum.next_event());
        let kinds = events.map(|event| event.kind);
        kinds
            .filter(|kind| *kind == super::EventKind::RolledBack)
            .count()
    };
    locum.rollback().unwrap();
    locum.inner.take_back(2, "it fell behind").unwrap();
    assert_eq!(registry.current().unwrap(), Some(1));
    let serving = locum.inner.swap.serving();
    assert_eq!(serving.current.as_ref().map(|s| s.version), Some(1));
    drop(serving);
    assert_eq!(rollbacks(), 1, "and nobody is told of it twice");
}

#[test]
fn a_rollback_without_a_model_takes_a_pin_back_too() {
    let world = World::new(1);
    let with_model = world.open(false);
    with_model.use_student(Pin::Student(1)).unwrap();
    with_model.close(Duration::from_secs(5)).unwrap();
    let locum = world.open(true);
    assert_eq!(locum.stats().pin, Pin::Student(1));
    locum.rollback().unwrap();
    assert_eq!(locum.stats().pin, Pin::Automatic);
}

/// Waits until `done`, at most three of the keeper's ticks.
#[track_caller]
fn soon(what: &str, done: impl Fn() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < Duration::from_secs(3), "not yet: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn what_another_process_pins_or_takes_back_reaches_a_running_host() {
    let world = World::new(2);
    world.registry().set_current(Some(1)).unwrap();
    let host = world.open(false);
    let pinned = || {
        let serving = host.inner.swap.serving();
        serving.pinned.as_ref().map(|s| s.version)
    };
    let current = || {
        let serving = host.inner.swap.serving();
        serving.current.as_ref().map(|s| s.version)
    };
    assert_eq!((pinned(), current()), (None, Some(1)));

    let command = world.open(false);
    command.use_student(Pin::Student(2)).unwrap();
    soon("student 2 is pinned", || {
        host.stats().pin == Pin::Student(2) && pinned() == Some(2)
    });
    command.use_student(Pin::Teacher).unwrap();
    soon("the teacher is pinned", || {
        host.stats().pin == Pin::Teacher && pinned().is_none()
    });
    // One rollback takes the pin and the promoted student back.
    command.rollback().unwrap();
    soon("nobody is pinned and nobody serves", || {
        host.stats().pin == Pin::Automatic && current().is_none()
    });
}

#[test]
fn a_pin_for_a_measurement_is_not_undone_by_a_look_at_the_store() {
    let world = World::new(1);
    let host = world.open(false);
    host.use_student_here(Pin::Student(1)).unwrap();
    host.inner.follow_store();
    assert_eq!(host.stats().pin, Pin::Student(1));
}

#[test]
fn a_tool_that_no_grammar_can_express_is_named_by_the_decision() {
    let world = World::new(1);
    let locum = world.open(false);
    locum.set_policy(Arc::new(Hiding)).unwrap();
    locum.use_student(Pin::Student(1)).unwrap();
    let handle = locum.begin(EpisodeStart::default()).unwrap();
    let ask = |to: serde_json::Value| {
        let parameters = json!({"type": "object", "properties": {"to": to}, "required": ["to"]});
        let tools =
            json!([{"type": "function", "function": {"name": "move", "parameters": parameters}}]);
        let request = Request {
            messages: vec![json!({"role": "user", "content": "Go."})],
            tools: crate::formats::tools_from_json(&tools).unwrap(),
            ..Request::default()
        };
        locum.decide(&handle, &request)
    };
    assert_eq!(ask(json!({"type": "string"})).who, Who::Student);
    let odd = json!({"type": "string", "pattern": "^(?=a).*(?<!b)$"});
    for _ in 0..2 {
        let decision = ask(odd.clone());
        assert_eq!(decision.who, Who::Teacher);
        assert_eq!(decision.reason_code, ReasonCode::ToolsInexpressible);
        let reason = decision.reason;
        assert!(
            reason.contains("move") && reason.contains("look-around"),
            "{reason}"
        );
    }
}

#[test]
fn an_episode_whose_end_cannot_be_written_stays_open() {
    let world = World::new(0);
    let locum = Locum::open(Options {
        store_dir: world.store.clone(),
        no_model: true,
        max_disk_bytes: 300_000,
        ..Options::default()
    })
    .unwrap();
    let handle = locum.begin(EpisodeStart::default()).unwrap();
    let long = "a long story. ".repeat(4_000);
    let full = (0..100).find_map(|_| {
        let message = json!({"role": "user", "content": long});
        let said = locum.message(&handle, &message, StepMeta::default());
        said.and_then(|()| locum.flush(Duration::from_secs(5)))
            .err()
    });
    assert!(matches!(full, Some(Error::Store(_))), "{full:?}");
    for _ in 0..2 {
        let ended = locum.end(&handle, Outcome::default());
        assert!(matches!(ended, Err(Error::Store(_))), "{ended:?}");
    }
}

#[test]
fn a_full_queue_answers_busy_at_once_and_marks_what_it_cost_however_full_it_was() {
    let world = World::new(0);
    let locum = world.open(true);
    let path = world.store.join(crate::store::DATABASE);
    let other = rusqlite::Connection::open(path).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let text = "x".repeat(60_000);
    let message = json!({"role": "user", "content": text});
    let mut episodes = Vec::new();
    let mut busy = 0;
    // Five episodes of 15 MB are more than what may wait.
    for _ in 0..5 {
        let handle = locum.begin(EpisodeStart::default()).unwrap();
        let mut lost = 0;
        for _ in 0..250 {
            let began = Instant::now();
            match locum.message(&handle, &message, StepMeta::default()) {
                Ok(()) => {}
                Err(Error::Store(crate::store::StoreError::Busy { .. })) => lost += 1,
                Err(other) => panic!("{other}"),
            }
            assert!(began.elapsed() < Duration::from_secs(1), "it waited");
        }
        episodes.push((handle, lost));
        busy += lost;
    }
    assert!(
        busy > 50 && locum.stats().busy >= busy,
        "{busy} were refused"
    );
    other.execute_batch("COMMIT").unwrap();
    for (handle, lost) in episodes {
        while locum.end(&handle, Outcome::default()).is_err() {
            std::thread::sleep(Duration::from_millis(1));
        }
        let episode = locum.inner.store.episode(handle.0).unwrap().unwrap();
        assert_eq!(episode.steps.len() as u64, 250 - lost);
        assert_eq!(episode.incomplete, lost > 0, "{lost} were lost");
    }
    assert!(super::check_store(&world.store).unwrap().sound());
}

/// Hides the word "secret", and fails at "poison"; lets whoever is offered answer.
struct Hiding;

impl Policy for Hiding {
    fn redact(&self, step: &RedactInfo) -> Result<Option<String>, HookFailed> {
        match step.content.contains("poison") {
            true => Err(HookFailed {
                hook: "redact",
                message: "it was poisoned".into(),
            }),
            false => Ok(Some(step.content.replace("secret", "…"))),
        }
    }
    fn id(&self) -> PolicyId {
        TeacherFirst.id()
    }
    fn decide(&self, _: &StepInfo) -> Choice {
        Choice {
            who: Who::Student,
            ..Choice::teacher("whoever is offered")
        }
    }
    fn accept(&self, reply: &ReplyInfo) -> Choice {
        TeacherFirst.accept(reply)
    }
    fn allow_tool(&self, call: &ToolInfo) -> Allow {
        TeacherFirst.allow_tool(call)
    }
    fn label(&self, episode: &EpisodeInfo) -> Option<LabelVerdict> {
        TeacherFirst.label(episode)
    }
    fn curate(&self, episode: &EpisodeInfo) -> CurateVerdict {
        TeacherFirst.curate(episode)
    }
    fn schedule(&self, world: &WorldInfo) -> ScheduleVerdict {
        TeacherFirst.schedule(world)
    }
    fn recipe(&self, dataset: &DatasetInfo) -> Option<RecipeKnobs> {
        TeacherFirst.recipe(dataset)
    }
    fn gate(&self, report: &GateInfo) -> GateVote {
        TeacherFirst.gate(report)
    }
    fn rollback(&self, live: &LiveInfo) -> Option<(bool, String)> {
        TeacherFirst.rollback(live)
    }
}

#[test]
fn the_task_of_a_live_episode_is_redacted_like_its_messages() {
    let world = World::new(0);
    let locum = world.open(true);
    locum.set_policy(Arc::new(Hiding)).unwrap();
    let play = |instruction: &str| {
        let task = Task {
            instruction: instruction.into(),
            ..Task::default()
        };
        let start = EpisodeStart {
            task,
            ..EpisodeStart::default()
        };
        let handle = locum.begin(start).unwrap();
        let message = json!({"role": "user", "content": "my secret"});
        let meta = StepMeta::default();
        locum.message(&handle, &message, meta).unwrap();
        let outcome = Outcome {
            status: Status::Success,
            ..Outcome::default()
        };
        locum.end(&handle, outcome).unwrap();
        locum.inner.store.episode(handle.0).unwrap().unwrap()
    };
    let episode = play("tell the secret");
    assert_eq!(episode.task.instruction, "tell the …");
    assert_eq!(episode.steps[0].message.as_ref().unwrap().text(), "my …");
    assert!(!episode.incomplete);
    let episode = play("poison");
    assert_eq!(episode.task.instruction, "");
    assert!(
        episode.incomplete,
        "what could not be redacted never trains"
    );
}

/// A store with a student that learns while it reads and was judged to be better for it, and a host that asks it with [`Eager`].
fn learning_host(lr: f32) -> (World, Locum) {
    let world = World::new(0);
    let dir = tempfile::tempdir().unwrap();
    let ttt = crate::ttt::TttConfig {
        layers: vec![0, 1],
        chunk_len: 16,
        lr,
        ..Default::default()
    };
    crate::model::write_tiny_learner(dir.path(), 3, &ttt).unwrap();
    let (model, chat) = load(dir.path());
    let judged = Manifest {
        evaluation: json!({"ttt": {"learns": true}}),
        ..Manifest::default()
    };
    let saved = world.registry().save(&model, None, &chat, judged).unwrap();
    let locum = Locum::open(Options {
        store_dir: world.store.clone(),
        no_learning: true,
        threads: 1,
        policy: Some(Arc::new(Eager::default())),
        ..Options::default()
    });
    let locum = locum.unwrap();
    locum.use_student(Pin::Student(saved.version)).unwrap();
    (world, locum)
}

/// One answer to a long question with one tool.
fn answer(
    locum: &Locum,
    handle: &super::EpisodeHandle,
) -> Result<super::Answer, super::AnswerError> {
    let tool = json!([{"type": "function", "function": {"name": "go", "description": "",
        "parameters": {"type": "object", "properties": {"to": {"enum": ["left", "right"]}}, "required": ["to"]}}}]);
    let tools = crate::formats::tools_from_json(&tool).unwrap();
    let request = Request {
        messages: vec![
            json!({"role": "user", "content": "which way is it to the sea? ".repeat(6)}),
        ],
        tools,
        allow_text: false,
        ..Request::default()
    };
    let call = locum.generate(handle, &request).unwrap();
    assert!(call.wait(Duration::from_secs(60)));
    call.result()
}

#[test]
fn an_episode_learns_within_its_own_bounds_and_the_host_can_look_switch_keep_and_restore() {
    let (_world, locum) = learning_host(0.001);
    let (one, two) = (
        locum.begin(EpisodeStart::default()).unwrap(),
        locum.begin(EpisodeStart::default()).unwrap(),
    );
    assert!(!locum.fast_weights(&one).unwrap().on, "nothing was read");
    assert!(locum.snapshot_fast_weights(&one).is_err());
    let first = answer(&locum, &one).unwrap();
    let learned = locum.fast_weights(&one).unwrap();
    assert!(learned.on && learned.drift > 0.0, "{learned:?}");
    let snapshot = locum.snapshot_fast_weights(&one).unwrap();
    locum.reset_fast_weights(&one).unwrap();
    assert_eq!(locum.fast_weights(&one).unwrap().drift, 0.0);
    locum.restore_fast_weights(&one, snapshot).unwrap();
    assert_eq!(locum.fast_weights(&one).unwrap().drift, learned.drift);
    let foreign = locum.restore_fast_weights(&two, snapshot);
    assert!(
        matches!(foreign, Err(Error::NotFound { .. })),
        "{foreign:?}"
    );

    locum.switch_fast_weights(&two, false).unwrap();
    let plain = answer(&locum, &two).unwrap();
    assert!(!locum.fast_weights(&two).unwrap().on);
    assert_ne!(plain.mean_logprob, first.mean_logprob);
    locum.forget_fast_weights(&one, 0).unwrap();
    let gone = locum.restore_fast_weights(&one, snapshot);
    assert!(matches!(gone, Err(Error::NotFound { .. })), "{gone:?}");

    locum.end(&one, Outcome::default()).unwrap();
    assert!(locum.fast_weights(&one).is_err(), "the episode has ended");
    assert!(locum.switch_fast_weights(&one, true).is_err());
}

#[test]
fn a_runaway_drift_asks_the_teacher_says_so_and_is_the_last_of_its_episode() {
    let (_world, locum) = learning_host(100.0);
    let handle = locum.begin(EpisodeStart::default()).unwrap();
    let refused = answer(&locum, &handle).unwrap_err();
    let super::AnswerError::Teacher { reason, code } = refused else {
        panic!("{refused}");
    };
    assert_eq!(code, ReasonCode::Drifted, "{reason}");
    let events = std::iter::from_fn(|| locum.next_event());
    let event = events
        .into_iter()
        .find(|e| e.kind == super::EventKind::FastWeights);
    let event = event.expect("an event says that a layer was reset");
    assert_eq!(event.detail["episode"], handle.0.to_string());
    soon("the trip is counted", || {
        locum.stats().engine.fast_trips > 0
    });
    assert_eq!(locum.stats().deferral_reasons["drifted"], 1);

    let next = answer(&locum, &handle).unwrap();
    assert!(!locum.fast_weights(&handle).unwrap().on);
    assert!(next.confidence > 0.0);
}

#[test]
fn without_a_limit_two_of_the_views_longest_prompts_stay_in_memory() {
    let dir = tempfile::tempdir().unwrap();
    crate::model::write_tiny(dir.path(), 1).unwrap();
    let mut config = Model::load(dir.path()).unwrap().config.clone();
    let cache = KvCache::new(&config, 640);
    assert_eq!(cache.bytes(), 640 * Sequence::bytes_per_token(&config));
    let mut view = View::default();
    assert_eq!(
        cache_bytes(&config, &view),
        limits::MAX_PREFIX_CACHE_BYTES,
        "short prompts of a small model"
    );
    config.num_hidden_layers = 30;
    (config.num_key_value_heads, config.head_dim) = (3, 64);
    config.max_position_embeddings = 8192;
    view.max_tokens = 8000;
    let two = 2 * KvCache::new(&config, view.max_tokens).bytes();
    assert!((two..two + two / 10).contains(&cache_bytes(&config, &view)));
}
