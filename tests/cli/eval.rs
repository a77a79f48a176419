//! `locum eval ttt` on tiny students: refusals as sentences, then a whole comparison and its files.

use super::{text, World};

/// Long view, a chunk of 16 tokens, all steps kept.
const POLICY: &str = r#"
local M = {}
M.view = { turns = true, tools = "none", goal = "first", steps_back = 50, focus = 0, max_tokens = 1500 }
M.settings = { curate = { held_out = 0.4, near_duplicate = 1.0, mask_derails = false }, gate = { min_exact = 0.0 } }
function M.recipe() return { method = "lora", tokens = 3000, ttt = "TTT", ttt_chunk = 16, ttt_every = 1 } end
return M
"#;

fn refused(world: &World, args: &[&str], sentence: &str) {
    let ran = world.run(args);
    assert_eq!(ran.code(), 1, "{args:?}: {}", ran.stdout());
    assert!(
        ran.stderr().contains(sentence),
        "{args:?}: {}",
        ran.stderr()
    );
}

fn policy(world: &World, ttt: &str) -> String {
    let path = world.path("policy.lua");
    std::fs::write(&path, POLICY.replace("TTT", ttt)).unwrap();
    path.to_str().unwrap().into()
}

#[test]
fn updates_are_compared_on_held_out_episodes_and_the_student_is_served_by_the_verdict() {
    let world = World::new();
    let model = world.path("tiny");
    world.json(&["model", "tiny", model.to_str().unwrap()]);
    world.json(&["model", "import", model.to_str().unwrap(), "--name", "tiny"]);
    refused(&world, &["eval", "ttt"], "there is no student yet");
    assert_eq!(world.run(&["eval", "ttt", "--windows", "12"]).code(), 2);

    let file = world.episodes_file(60);
    world.json(&["episodes", "import", &file]);
    let plain = policy(&world, "off");
    let run = |policy: &str| world.json(&["distil", "run", "--policy", policy, "--no-trial"]);
    assert_eq!(run(&plain)["version"], 1);
    refused(&world, &["eval", "ttt"], "no student has layers that learn");
    refused(
        &world,
        &["eval", "ttt", "--student", "1"],
        "student 1 has no layers that learn",
    );
    let learning = policy(&world, "next_token");
    let job = run(&learning);
    assert_eq!(job["version"], 2);
    // The verdict is in the job's message and in the list, whichever way it went.
    assert!(
        job["message"].as_str().unwrap().contains("fast weights o"),
        "{job}"
    );
    let students = world.json(&["students"]);
    let of = |at: usize| {
        students["students"][at]["fast_weights"]
            .as_str()
            .unwrap()
            .to_string()
    };
    assert_eq!(of(0), "");
    assert!(of(1).starts_with("fast weights o"), "{students}");

    let out = world.path("out");
    let compared = world.json(&[
        "eval",
        "ttt",
        "--plain",
        "1",
        "--control",
        "0.01",
        "--decay",
        "0.5,0.9",
        "--delta",
        "1",
        "--episodes",
        "6",
        "--windows",
        "64,full",
        "--out",
        out.to_str().unwrap(),
    ]);
    assert_eq!(compared["episodes"], 6, "{compared}");
    let windows = compared["windows"].as_array().unwrap();
    assert_eq!(windows.len(), 2);
    let names: Vec<_> = (windows[1]["variants"].as_array().unwrap().iter())
        .map(|v| v["name"].as_str().unwrap())
        .collect();
    assert_eq!(
        names,
        [
            "updates on",
            "updates off",
            "base",
            "updates with a decay of 0.5",
            "updates with a decay of 0.9",
            "updates with a delta rule of 1",
            "trained without",
            "dynamic evaluation"
        ]
    );
    assert_eq!(windows[0]["gains"].as_array().unwrap().len(), 7);
    for name in ["ttt.json", "ttt.md", "ttt.svg", "drift.svg"] {
        assert!(!text(&out.join(name)).is_empty(), "{name}");
    }
    assert!(
        text(&out.join("ttt.md")).contains("| everything | updates on less updates off | all |")
    );
    let file = out.join("ttt.json");
    let again = world.json(&["eval", "ttt", "--from", file.to_str().unwrap()]);
    assert_eq!(again, compared);
    refused(
        &world,
        &["eval", "ttt", "--decay", "1.5"],
        "ttt_decay is 1.5",
    );
    let none = world.path("none.json");
    refused(
        &world,
        &["eval", "ttt", "--from", none.to_str().unwrap()],
        "cannot read",
    );
    let shown = world.run(&["eval", "ttt", "--episodes", "2", "--windows", "full"]);
    let said = shown.stdout();
    assert!(
        said.contains("updates on less") && said.contains("  base "),
        "{said}"
    );
    let few = [
        "eval",
        "ttt",
        "--without-base",
        "--episodes",
        "2",
        "--windows",
        "full",
    ];
    let said = world.run(&few).stdout();
    assert!(
        said.contains("  updates off ") && !said.contains("  base "),
        "{said}"
    );
}
