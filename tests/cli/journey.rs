//! Model, episodes, distillation, promotion and report, all by hand, on a tiny random model.

use super::{text, World};

#[test]
fn an_operator_makes_a_student_and_lets_it_answer_and_takes_it_back() {
    let world = World::new();
    let model = world.path("tiny");
    world.json(&["model", "tiny", model.to_str().unwrap()]);
    world.json(&["model", "import", model.to_str().unwrap(), "--name", "tiny"]);
    let listed = world.json(&["model", "list"]);
    assert!(listed["models"].to_string().contains("tiny"), "{listed}");

    let file = world.episodes_file(60);
    world.json(&["episodes", "import", &file]);
    let job = world.json(&[
        "distil",
        "run",
        "--tokens",
        "4000",
        "--max-seconds",
        "60",
        "--no-trial",
    ]);
    assert_eq!(job["state"], "stored", "{job}");
    // Every third episode failed, and the policy keeps at most some of a kind: what is kept is a part, and not nothing.
    let kept = job["episodes_kept"].as_u64().unwrap();
    assert!((1..=40).contains(&kept), "{job}");
    assert_eq!(world.json(&["distil", "status"])["job"], job["job"]);

    let students = world.json(&["students"]);
    assert_eq!(students["students"][0]["version"], 1, "{students}");
    let unsure = world.run(&["promote", "1"]);
    assert_eq!(unsure.code(), 1);
    assert!(unsure.stderr().contains("--yes"), "{}", unsure.stderr());
    assert_eq!(world.json(&["promote", "1", "--yes"])["promoted"], 1);
    assert!(world.run(&["students"]).stdout().contains("pinned"));
    assert_eq!(world.json(&["rollback"])["before"], 1);

    let page = world.path("page.html");
    world.json(&["report", "-o", page.to_str().unwrap()]);
    let html = text(&page);
    assert!(html.starts_with("<!doctype html>") && html.trim_end().ends_with("</html>"));
    assert!(html.contains("60") && html.contains("Student"));
    assert_eq!(world.json(&["doctor"])["ok"], true);
}
