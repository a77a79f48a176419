//! A job that is paused computes nothing, soon and for as long as it is paused, and then goes on to its end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use locum_core::locum::{DistilOptions, Locum, Options};
use locum_lua::LuaPolicy;
use serde_json::json;

use super::World;

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < Duration::from_secs(30), "not yet: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_paused_job_stands_still_and_a_resumed_one_goes_on() {
    let world = World::new();
    let model = world.path("tiny");
    world.json(&["model", "tiny", model.to_str().unwrap()]);
    world.json(&["model", "import", model.to_str().unwrap(), "--name", "tiny"]);
    let file = world.episodes_file(60);
    world.json(&["episodes", "import", &file]);

    let locum = Locum::open(Options {
        store_dir: world.path("store"),
        train_threads: 2,
        policy: Some(Arc::new(LuaPolicy::default_policy().unwrap())),
        ..Options::default()
    })
    .unwrap();
    assert!(locum.distil_pause(0).is_err(), "there is no job to pause");
    let options = json!({ "tokens": 50_000_000u64, "max_seconds": 300.0, "promote": "never" });
    let job = locum
        .distil_start(DistilOptions::try_from(options).unwrap())
        .unwrap();
    let tokens = || locum.distil_status(job).unwrap().tokens_done;
    until("the training has begun", || {
        let status = locum.distil_status(job).unwrap();
        assert!(status.state.is_running(), "{status:?}");
        status.tokens_done > 0
    });

    locum.distil_pause(job).unwrap();
    // What was under way when the gate closed may end on a busy machine later than in the milliseconds it takes.
    until("the job stands still", || {
        let before = tokens();
        std::thread::sleep(Duration::from_millis(100));
        tokens() == before
    });
    let paused = locum.distil_status(job).unwrap();
    assert_eq!(paused.message, "paused");
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(tokens(), paused.tokens_done, "a paused job went on");

    locum.distil_resume(job).unwrap();
    until("the training goes on", || tokens() > paused.tokens_done);
    let resumed = locum.distil_status(job).unwrap();
    assert!(resumed.held_seconds >= 0.3, "{resumed:?}");
    // A paused job can be cancelled, and a close does not wait for one.
    locum.distil_pause(job).unwrap();
    locum.distil_cancel(job).unwrap();
    until("the job is cancelled", || {
        !locum.distil_status(job).unwrap().state.is_running()
    });
    locum.close(Duration::from_secs(10)).unwrap();
}
