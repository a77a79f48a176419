//! Erasing, lineage and replay from the command line.

use serde_json::json;

use super::World;

#[test]
fn an_operator_erases_an_episode_and_sees_which_students_learned_from_it() {
    let world = World::new();
    let model = world.path("tiny");
    world.json(&["model", "tiny", model.to_str().unwrap()]);
    world.json(&["model", "import", model.to_str().unwrap(), "--name", "tiny"]);
    let file = world.episodes_file(45);
    world.json(&["episodes", "import", &file]);
    let run = ["distil", "run", "--tokens", "3000", "--no-trial"];
    assert_eq!(world.json(&run)["state"], "stored");

    let lineage = world.json(&["lineage", "1"]);
    let episodes = lineage["episodes"].as_array().unwrap();
    assert!(!episodes.is_empty());
    let id = episodes[0]["id"].as_str().unwrap();
    let learned = world.json(&["lineage", id]);
    assert_eq!(learned["students"][0]["version"], 1, "{learned}");

    let unsure = world.run(&["forget", id]);
    assert_eq!(unsure.code(), 1);
    assert!(unsure.stderr().contains("--yes"), "{}", unsure.stderr());
    let done = world.json(&["forget", id, "--yes"]);
    assert_eq!(
        (&done["episodes"], &done["students"]),
        (&json!([id]), &json!([1]))
    );
    assert_eq!(world.json(&["students"])["students"][0]["erased"], 1);
    assert_eq!(world.json(&["lineage", "1"])["episodes"][0]["erased"], true);
    let shown = world.run(&["episodes", "show", id]);
    assert_eq!(shown.code(), 1);
    for wrong in [
        &["forget", "xyz", "--yes"][..],
        &["forget", &"0".repeat(32), "--yes"],
        &["forget", "--scope", "nobody", "--yes"],
        &["lineage", "7"],
    ] {
        let ran = world.run(wrong);
        assert_eq!(ran.code(), 1, "{wrong:?}: {}", ran.stdout());
        assert!(!ran.stderr().contains("panicked"), "{}", ran.stderr());
    }
}

#[test]
fn a_replay_gives_the_same_digest_twice_and_names_what_changed() {
    let world = World::new();
    let file = world.episodes_file(30);
    world.json(&["episodes", "import", &file]);
    let policy = |name: &str, source: &str| {
        let path = world.path(name);
        std::fs::write(&path, source).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let new = policy(
        "new.lua",
        "return { decide = function(s) return s.turn % 2 == 0 and 'student' or 'teacher' end }",
    );
    let old = policy(
        "old.lua",
        "return { decide = function() return 'student' end }",
    );
    let replayed = world.json(&["policy", "replay", &new, "--against", &old]);
    assert_eq!(replayed["episodes"], 30);
    assert_eq!(replayed["steps"], 60);
    assert_eq!(replayed["student_share"], 0.5);
    assert_eq!(replayed["student_share_against"], 1.0);
    assert_eq!(replayed["disagreements"].as_array().unwrap().len(), 30);
    assert_eq!(replayed["state_dependent"], 0);
    let again = world.json(&["policy", "replay", &new]);
    assert_eq!(again["digest"], replayed["digest"]);
    let remembers = policy("remembers.lua", "local n = 0\nreturn { decide = function() n += 1 return n <= 10 and 'student' or 'teacher' end }");
    let caught = world.json(&["policy", "replay", &remembers]);
    assert!(caught["state_dependent"].as_u64().unwrap() > 0, "{caught}");
}

#[test]
fn an_import_hides_secrets_unless_it_is_told_not_to() {
    let world = World::new();
    let line = json!({"messages": [
        {"role": "user", "content": "Write to ada@example.com about 4111111111111111."},
        {"role": "assistant", "content": "Done."}], "outcome": {"success": true}});
    let path = world.path("chat.jsonl");
    std::fs::write(&path, format!("{line}\n")).unwrap();
    let path = path.to_str().unwrap();
    world.json(&["episodes", "import", path]);
    let shown = world.run(&["episodes", "export"]).stdout();
    assert!(
        !shown.contains("ada@") && !shown.contains("4111"),
        "{shown}"
    );
    assert!(
        shown.contains("<email:") && shown.contains("<card:"),
        "{shown}"
    );
    let other = World::new();
    other.json(&["episodes", "import", path, "--detectors", "-email"]);
    let shown = other.run(&["episodes", "export"]).stdout();
    assert!(
        shown.contains("ada@example.com") && shown.contains("<card:"),
        "{shown}"
    );
}
