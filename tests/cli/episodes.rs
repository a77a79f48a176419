//! Episodes in and out through the command.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;

use serde_json::Value;

use super::{text, World};

#[test]
fn an_import_counts_what_it_stored_and_what_it_skipped() {
    let world = World::new();
    let file = world.episodes_file(9);
    let with_a_bad_line = text(file.as_ref()) + "{\"messages\": 7}\n";
    std::fs::write(&file, with_a_bad_line).unwrap();
    let counts = world.json(&["episodes", "import", &file]);
    assert_eq!(counts["episodes"], 9);
    assert_eq!(counts["successes"], 6);
    assert_eq!(counts["failures"], 3);
    assert_eq!(counts["unknown"], 0);
    assert_eq!(counts["skipped"], 1);
    assert_eq!(counts["steps"], 9 * 4);
    let again = world.json(&["episodes", "import", &file]);
    assert_eq!(
        (again["episodes"].as_u64(), again["skipped"].as_u64()),
        (Some(0), Some(10)),
        "the same file twice adds nothing"
    );
}

#[test]
fn a_policy_redacts_what_is_imported_before_it_is_written() {
    let world = World::new();
    let file = world.episodes_file(3);
    let secret = "ada.lovelace@example.org";
    let with_a_name = text(file.as_ref()).replace("You work at a mail desk.", secret);
    let with_names = with_a_name.replace("waits for:", &format!("({secret}) waits for:"));
    std::fs::write(&file, &with_names).unwrap();
    let policy = Path::new(env!("CARGO_MANIFEST_DIR")).join("lua/policies/private.lua");
    let policy = policy.to_str().unwrap();
    let counts = world.json(&["episodes", "import", &file, "--policy", policy]);
    assert_eq!(counts["episodes"], 3);
    let exported = world.run(&["episodes", "export"]).stdout();
    assert!(exported.contains("<email:"), "{exported}");
    for entry in std::fs::read_dir(world.path("store"))
        .unwrap()
        .flatten()
        .filter(|e| e.path().is_file())
    {
        let bytes = std::fs::read(entry.path()).unwrap();
        let found = bytes.windows(secret.len()).any(|w| w == secret.as_bytes());
        assert!(!found, "{:?} holds the address", entry.path());
    }

    // Where the hook fails, the run stays out and is named.
    let other = World::new();
    let failing = other.path("failing.lua");
    let source = "return { redact = function(text) if text.role == 'tool' then error('no') end return text.content end }";
    std::fs::write(&failing, source).unwrap();
    let failing = failing.to_str().unwrap();
    let counts = other.json(&["episodes", "import", &file, "--policy", failing]);
    assert_eq!(
        (counts["episodes"].as_u64(), counts["skipped"].as_u64()),
        (Some(0), Some(3))
    );
    let reason = counts["reasons"][0]["reason"].as_str().unwrap();
    assert!(reason.contains("redact"), "{reason}");
}

#[test]
fn listed_episodes_can_be_filtered_and_shown_by_the_beginning_of_their_id() {
    let world = World::new();
    let file = world.episodes_file(6);
    world.json(&["episodes", "import", &file]);
    let all = world.json(&["episodes", "list"]);
    assert_eq!(all["episodes"].as_array().unwrap().len(), 6);
    let failures = world.json(&["episodes", "list", "--status", "failure"]);
    assert_eq!(failures["episodes"].as_array().unwrap().len(), 2);
    let id = all["episodes"][0]["id"].as_str().unwrap();
    assert_eq!(world.json(&["episodes", "show", id])["episode_id"], id);
    let shown = world.run(&["episodes", "show", id]);
    assert!(shown.stdout().contains("→ lookup("), "{}", shown.stdout());
    assert!(world
        .run(&["episodes", "list"])
        .stdout()
        .contains("6 of 6 episodes"));
}

#[test]
fn what_is_exported_imports_again_as_the_same_episodes() {
    let world = World::new();
    let file = world.episodes_file(5);
    world.json(&["episodes", "import", &file]);
    let exported = world.path("out.jsonl");
    let said = world.json(&["episodes", "export", "-o", exported.to_str().unwrap()]);
    assert_eq!(said["episodes"], 5);

    let second = World::new();
    let counts = second.json(&["episodes", "import", exported.to_str().unwrap()]);
    assert_eq!(
        (counts["episodes"].as_u64(), counts["skipped"].as_u64()),
        (Some(5), Some(0))
    );
    let again = second.path("again.jsonl");
    second.json(&["episodes", "export", "-o", again.to_str().unwrap()]);
    let messages = |path: &std::path::Path| -> Vec<Value> {
        text(path)
            .lines()
            .map(|l| serde_json::from_str::<Value>(l).unwrap()["messages"].take())
            .collect()
    };
    assert_eq!(messages(&exported), messages(&again));
    assert_eq!(
        messages(&exported),
        messages(file.as_ref()),
        "an export gives back the messages that were imported"
    );
}

#[test]
fn a_reader_that_leaves_early_ends_the_output_quietly() {
    let world = World::new();
    let file = world.episodes_file(400);
    world.json(&["episodes", "import", &file]);
    let mut child = world
        .command(&["episodes", "export"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = String::new();
    BufReader::new(child.stdout.take().unwrap())
        .read_line(&mut first)
        .unwrap();
    assert!(first.starts_with('{'));
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}
