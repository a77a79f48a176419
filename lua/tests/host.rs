//! A policy inside a whole Locum: what the host hears of a failing hook, and under which policy a record is redacted.

use std::sync::Arc;
use std::time::{Duration, Instant};

use locum_core::episode::{Outcome, Status};
use locum_core::locum::{EpisodeHandle, EpisodeStart, Event, EventKind, Locum, Options, StepMeta};
use locum_core::policy::Policy;
use locum_core::store::{Query, Store, StoreOptions};
use locum_lua::{LuaPolicy, PolicyOptions};
use serde_json::json;

fn load(source: &str) -> Arc<dyn Policy> {
    Arc::new(LuaPolicy::from_source(source, "test.lua", PolicyOptions::default()).unwrap())
}

fn open(dir: &std::path::Path, policy: &str) -> Locum {
    Locum::open(Options {
        store_dir: dir.join("store"),
        policy: Some(load(policy)),
        no_model: true,
        ..Options::default()
    })
    .unwrap()
}

fn say(locum: &Locum, episode: &EpisodeHandle, text: &str) {
    let message = json!({"role": "user", "content": text});
    locum
        .message(episode, &message, StepMeta::default())
        .unwrap();
}

fn heard(locum: &Locum, seconds: f64) -> Vec<Event> {
    let (begun, mut events) = (Instant::now(), Vec::new());
    while begun.elapsed().as_secs_f64() < seconds {
        match locum.next_event() {
            Some(event) => events.push(event),
            None => std::thread::sleep(Duration::from_millis(10)),
        }
    }
    events
}

fn stored(dir: &std::path::Path) -> Vec<locum_core::episode::Episode> {
    let options = StoreOptions {
        read_only: true,
        ..StoreOptions::default()
    };
    let store = Store::open(&dir.join("store"), options).unwrap();
    store.load(&Query::default()).unwrap()
}

#[test]
fn a_hook_that_fails_five_times_in_a_minute_is_off_until_a_reload_with_one_event() {
    let dir = tempfile::tempdir().unwrap();
    let failing = "return { redact = function(t) if t.content == 'x' then error('no') end return t.content end, on_event = function(e) assert(e.kind) end }";
    let locum = open(dir.path(), failing);
    let episode = locum.begin(EpisodeStart::default()).unwrap();
    for _ in 0..9 {
        say(&locum, &episode, "x");
    }
    let off = |events: &[Event]| -> Vec<String> {
        let off = events.iter().filter(|e| e.kind == EventKind::HookOff);
        off.map(|e| e.detail["hook"].as_str().unwrap().to_owned())
            .collect()
    };
    assert_eq!(
        off(&heard(&locum, 3.0)),
        ["redact"],
        "one event, and no other"
    );
    let stats = locum.stats();
    let hook = |name: &str| stats.hooks.iter().find(|h| h.hook == name).unwrap().clone();
    assert!(hook("redact").switched_off, "{:?}", stats.hooks);
    assert_eq!(hook("redact").failures, 5);
    assert!(hook("on_event").calls >= 1, "the policy hears of it too");
    // Off, it lets nothing through, not even what it would have kept.
    say(&locum, &episode, "y");
    locum.set_policy(load(failing)).unwrap();
    let fresh = locum.begin(EpisodeStart::default()).unwrap();
    say(&locum, &fresh, "y");
    for handle in [&episode, &fresh] {
        let outcome = Outcome {
            status: Status::Success,
            ..Outcome::default()
        };
        locum.end(handle, outcome).unwrap();
    }
    assert_eq!(off(&heard(&locum, 1.5)), Vec::<String>::new());
    locum.close(Duration::from_secs(10)).unwrap();
    let episodes = stored(dir.path());
    assert_eq!((episodes[0].incomplete, episodes[0].steps.len()), (true, 0));
    assert_eq!(
        (episodes[1].incomplete, episodes[1].steps.len()),
        (false, 1)
    );
}

#[test]
fn what_was_recorded_before_a_reload_is_redacted_by_the_policy_it_was_recorded_under() {
    let dir = tempfile::tempdir().unwrap();
    // Some milliseconds each, so that the reload comes while most of them wait for the writer.
    let policy = |mark: &str| {
        format!("return {{ redact = function(t) local n = 0 for i = 1, 100000 do n += i % 7 end return t.content .. ' {mark}' .. (n > 0 and '' or '!') end }}")
    };
    let locum = open(dir.path(), &policy("old"));
    let episode = locum.begin(EpisodeStart::default()).unwrap();
    for n in 0..40 {
        say(&locum, &episode, &format!("{n}"));
    }
    let waiting = locum.stats().queued;
    locum.set_policy(load(&policy("new"))).unwrap();
    for n in 40..50 {
        say(&locum, &episode, &format!("{n}"));
    }
    locum.end(&episode, Outcome::default()).unwrap();
    locum.close(Duration::from_secs(10)).unwrap();
    let episodes = stored(dir.path());
    let texts: Vec<String> = episodes[0]
        .steps
        .iter()
        .map(|s| s.message.as_ref().unwrap().text())
        .collect();
    let expected = (0..50).map(|n| format!("{n} {}", if n < 40 { "old" } else { "new" }));
    assert_eq!(texts, expected.collect::<Vec<_>>());
    assert!(
        waiting > 0,
        "everything was written before the reload, so nothing was tested"
    );
}

#[test]
fn retain_drops_and_anonymises_on_disk() {
    let dir = tempfile::tempdir().unwrap();
    let locum = open(
        dir.path(),
        "return { retain = function(e) if e.task == 'old' then return 'drop' elseif e.task == 'mine' then return 'anonymise' end return 'keep' end }",
    );
    for task in ["old", "mine", "new"] {
        let start = EpisodeStart {
            task: locum_core::episode::Task {
                id: task.into(),
                ..Default::default()
            },
            session_id: Some(format!("session of {task}")),
            ..EpisodeStart::default()
        };
        let episode = locum.begin(start).unwrap();
        say(&locum, &episode, &format!("the words of {task}"));
        locum.end(&episode, Outcome::default()).unwrap();
    }
    let retained = locum.apply_retention().unwrap();
    assert_eq!(
        (retained.asked, retained.dropped, retained.anonymised),
        (3, 1, 1)
    );
    let mut bytes = std::fs::read(dir.path().join("store/locum.db")).unwrap();
    bytes.extend(std::fs::read(dir.path().join("store/locum.db-wal")).unwrap_or_default());
    let holds = |text: &str| bytes.windows(text.len()).any(|w| w == text.as_bytes());
    assert_eq!(
        [
            "the words of old",
            "session of mine",
            "the words of mine",
            "session of new"
        ]
        .map(holds),
        [false, false, true, true]
    );
    locum.close(Duration::from_secs(10)).unwrap();
}
