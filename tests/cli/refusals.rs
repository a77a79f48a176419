//! Bad input: one clear sentence on stderr, the right exit code, and the last line still JSON.

use super::World;

fn refused(world: &World, args: &[&str], sentence: &str) {
    let ran = world.run(&[args, &["--json"]].concat());
    assert_eq!(ran.code(), 1, "{args:?} succeeded: {}", ran.stdout());
    assert!(
        ran.stderr().contains(sentence),
        "{args:?} said: {}",
        ran.stderr()
    );
    assert!(ran.last_line()["error"]
        .as_str()
        .unwrap()
        .contains(sentence));
    assert!(!ran.stderr().contains("panicked"));
}

#[test]
fn wrong_usage_exits_with_2_and_help_with_0() {
    let world = World::new();
    assert_eq!(world.run(&["epsiodes"]).code(), 2);
    assert_eq!(world.run(&["episodes", "import"]).code(), 2);
    let help = world.run(&["--help"]);
    assert_eq!(help.code(), 0);
    for command in [
        "doctor", "model", "episodes", "distil", "eval", "students", "promote", "rollback",
        "policy", "report", "forget", "lineage",
    ] {
        assert!(
            help.stdout().contains(command),
            "--help does not name {command}"
        );
    }
}

#[test]
fn a_store_that_is_not_there_is_not_made_by_looking_at_it() {
    let world = World::new();
    for args in [
        &["episodes", "list"][..],
        &["students"],
        &["report"],
        &["rollback"],
        &["distil", "status"],
    ] {
        refused(&world, args, "there is no store at");
    }
    assert!(!world.path("store").exists());
}

#[test]
fn a_file_that_is_no_database_is_named_and_left_alone() {
    let world = World::new();
    let file = world.episodes_file(3);
    world.json(&["episodes", "import", &file]);
    for entry in std::fs::read_dir(world.path("store")).unwrap().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.contains(".db") || name.contains(".sqlite") {
            std::fs::write(
                entry.path(),
                "this is a shopping list, not a database, and it is longer than a header. "
                    .repeat(20),
            )
            .unwrap();
        }
    }
    refused(&world, &["episodes", "list"], "damaged or not a database");
    let doctor = world.json(&["doctor"]);
    assert_eq!(doctor["ok"], false);
}

#[test]
fn a_file_of_no_known_format_is_refused_with_the_formats_that_are_known() {
    let world = World::new();
    let file = world.path("poem.txt");
    std::fs::write(&file, "So much depends\nupon\n").unwrap();
    refused(
        &world,
        &["episodes", "import", file.to_str().unwrap()],
        "openai-chat",
    );
    refused(
        &world,
        &["episodes", "import", "absent.jsonl"],
        "absent.jsonl",
    );
}

#[test]
fn an_unknown_episode_or_student_is_refused() {
    let world = World::new();
    let file = world.episodes_file(3);
    world.json(&["episodes", "import", &file]);
    refused(
        &world,
        &["episodes", "show", "ffff"],
        "no episode is called",
    );
    refused(&world, &["promote", "7", "--yes"], "no student is called");
}

#[test]
fn a_policy_with_a_syntax_error_is_refused_with_file_and_line() {
    let world = World::new();
    let file = world.path("broken.lua");
    std::fs::write(
        &file,
        "return {\n  decide = function(step) retrun \"teacher\" end\n}\n",
    )
    .unwrap();
    refused(
        &world,
        &["policy", "check", file.to_str().unwrap()],
        "broken.lua:2",
    );
    let good = world.path("good.lua");
    std::fs::write(
        &good,
        "return { decide = function(step) return \"teacher\", \"always\" end }\n",
    )
    .unwrap();
    assert!(
        world.json(&["policy", "check", good.to_str().unwrap()])["errors"]
            .as_array()
            .unwrap()
            .is_empty()
    );
}

#[test]
fn a_distillation_without_a_base_model_says_how_to_import_one() {
    let world = World::new();
    let file = world.episodes_file(3);
    world.json(&["episodes", "import", &file]);
    refused(&world, &["distil", "run"], "model");
}

#[test]
fn a_file_that_is_no_model_is_refused() {
    let world = World::new();
    let file = world.path("not-a-model.gguf");
    std::fs::write(&file, b"GGUF but not really").unwrap();
    refused(
        &world,
        &["model", "import", file.to_str().unwrap()],
        "not-a-model.gguf",
    );
    refused(&world, &["model", "import", "nowhere.gguf"], "nowhere.gguf");
}

#[test]
fn a_model_file_that_was_changed_after_its_import_is_found_by_the_doctor() {
    let world = World::new();
    let tiny = world.path("tiny");
    world.json(&["model", "tiny", tiny.to_str().unwrap()]);
    world.json(&["model", "import", tiny.to_str().unwrap(), "--name", "tiny"]);
    assert_eq!(world.json(&["doctor"])["ok"], true);
    let weights = world.path("store/base/tiny/model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&weights, bytes).unwrap();
    assert_eq!(world.json(&["doctor"])["ok"], false);
    let said = world.run(&["doctor"]).stdout();
    assert!(said.contains("SHA-256 of the weights should be"), "{said}");
}

#[test]
fn a_model_file_that_is_cut_short_is_named_in_one_line_whatever_candle_adds() {
    let Some(whole) = std::env::var_os("LOCUM_TEST_GGUF") else {
        println!("skipped: LOCUM_TEST_GGUF names no GGUF file");
        return;
    };
    use std::io::Read;
    let world = World::new();
    let cut = world.path("cut.gguf");
    let mut head = Vec::new();
    let file = std::fs::File::open(whole).unwrap();
    file.take(3_000_000).read_to_end(&mut head).unwrap();
    std::fs::write(&cut, head).unwrap();
    let mut command = world.command(&["model", "import", cut.to_str().unwrap(), "--quiet"]);
    let ran = command.env("RUST_BACKTRACE", "1").output().unwrap();
    let said = String::from_utf8(ran.stderr).unwrap();
    assert!(
        said.contains("cut.gguf") && said.contains("tensor token_embd.weight"),
        "{said}"
    );
    assert!(!said.contains("candle"), "{said}");
}

#[test]
fn an_output_that_cannot_be_written_is_named() {
    let world = World::new();
    let file = world.episodes_file(3);
    world.json(&["episodes", "import", &file]);
    let nowhere = world.path("no/such/folder/out.jsonl");
    refused(
        &world,
        &["episodes", "export", "-o", nowhere.to_str().unwrap()],
        "cannot write",
    );
}

#[test]
fn the_doctor_finds_something_to_say_without_a_store() {
    let world = World::new();
    let found = world.json(&["doctor"]);
    assert!(found["machine"]["cores"].as_u64().unwrap() >= 1);
    assert_eq!(found["store"]["exists"], false);
}
