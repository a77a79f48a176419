//! `locum store check`: what is sound, what a repair puts right, and what it does not touch.

use super::World;

fn world() -> World {
    let world = World::new();
    let tiny = world.path("tiny");
    world.json(&["model", "tiny", tiny.to_str().unwrap()]);
    world.json(&["model", "import", tiny.to_str().unwrap(), "--name", "tiny"]);
    let file = world.episodes_file(20);
    world.json(&["episodes", "import", &file]);
    world
}

#[test]
fn a_store_as_it_was_written_is_sound_and_a_check_changes_nothing() {
    let world = world();
    let before = std::fs::read(world.path("store/locum.db")).unwrap();
    let check = world.json(&["store", "check"]);
    assert_eq!(check["sound"], true, "{check}");
    assert_eq!(check["findings"].as_array().map(Vec::len), Some(0));
    assert_eq!(
        (check["episodes"].as_u64(), check["bases"].as_u64()),
        (Some(20), Some(1))
    );
    assert_eq!(std::fs::read(world.path("store/locum.db")).unwrap(), before);
    let text = world.run(&["store", "check"]).stdout();
    assert!(text.contains("all of it is as it was written"), "{text}");
}

#[test]
fn what_does_not_fit_is_named_with_its_repair_and_repaired_on_demand() {
    let world = world();
    let db = rusqlite::Connection::open(world.path("store/locum.db")).unwrap();
    db.execute_batch(
        "UPDATE episodes SET n_steps=99 WHERE episode=3;
         UPDATE episodes SET status='success' WHERE status='failure';
         DELETE FROM steps WHERE episode=4 AND step=3;
         INSERT INTO outcomes (episode, n, recorded_at_ms, status, integrity, judge) VALUES (777, 0, 0, 'success', '{}', '{}');",
    )
    .unwrap();
    drop(db);
    std::fs::write(world.path("store/sessions/4711.lock"), "").unwrap();
    let ran = world.run(&["store", "check", "--json"]);
    assert_eq!(ran.code(), 1, "{}", ran.stdout());
    let check = ran.last_line();
    assert!(
        check["error"]
            .as_str()
            .unwrap()
            .contains("findings of damage"),
        "{check}"
    );
    let found = check["findings"].to_string();
    for what in [
        "counts other steps than it has",
        "has another status than its last outcome",
        "tool calls of no step",
        "outcomes of no episode",
        "sessions/4711.lock",
    ] {
        assert!(found.contains(what), "{what}: {found}");
    }
    assert!(ran.stderr().contains("--repair"), "{}", ran.stderr());
    let repaired = world.json(&["store", "check", "--repair"]);
    assert_eq!(repaired["sound"], true, "{repaired}");
    assert!(repaired["repaired"].as_u64().unwrap() >= 5, "{repaired}");
    assert_eq!(repaired["episodes"], 20, "no episode is lost by a repair");
}

#[test]
fn damaged_weights_and_a_pointer_to_nobody_are_found() {
    let world = world();
    let weights = world.path("store/base/tiny/model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&weights, bytes).unwrap();
    let pointer = r#"{"version": 7, "id": "nobody", "previous": []}"#;
    std::fs::write(world.path("store/current.json"), pointer).unwrap();
    let check = world.run(&["store", "check", "--json"]).last_line();
    let found = check["findings"].to_string();
    assert!(found.contains("SHA-256 of the weights"), "{found}");
    assert!(
        found.contains("points at student 7, which is not there"),
        "{found}"
    );
    assert_eq!(check["sound"], false);
}

#[test]
fn a_damaged_database_is_a_finding_and_is_not_repaired() {
    let world = world();
    let path = world.path("store/locum.db");
    let mut bytes = std::fs::read(&path).unwrap();
    let from = 4096 * 3;
    bytes[from..].iter_mut().for_each(|byte| *byte = 0xA5);
    std::fs::write(&path, &bytes).unwrap();
    let check = world.run(&["store", "check", "--json"]);
    assert_eq!(check.code(), 1);
    let found = check.last_line()["findings"].to_string();
    assert!(found.contains("restore a copy"), "{found}");
    let repair = world.run(&["store", "check", "--repair"]);
    assert_eq!(repair.code(), 1, "{}", repair.stdout());
    assert!(!repair.stderr().contains("panicked"));
}
