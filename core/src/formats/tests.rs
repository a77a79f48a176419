//! The formats at their door: what comes in whole, what goes out equal, what is refused and with which words.

use std::path::PathBuf;
use std::time::Duration;

use proptest::prelude::*;
use serde_json::{json, Value};

use super::*;
use crate::episode::{Actor, Content, Episode, Source, Status, Step};
use crate::policy::TeacherFirst;
use crate::store::{json, Query, Store, StoreOptions};

/// A folder of data that lies beside the checkout, not in it; says so when it is absent.
fn shared(name: &str) -> Option<PathBuf> {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let places = ["../../shared", "../../../shared"];
    let found = places
        .iter()
        .map(|up| here.join(up).join(name))
        .find(|path| path.exists());
    if found.is_none() {
        eprintln!("skipped: {name} is not beside this checkout");
    }
    found
}

fn written(text: impl AsRef<[u8]>) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    file
}

fn imported(path: &std::path::Path) -> (ImportCounts, Vec<Episode>) {
    let mut episodes = Vec::new();
    let counts = import(path, None, &mut |episode| {
        episodes.push(episode);
        Ok(Taken::Stored)
    });
    (counts.unwrap(), episodes)
}

fn check_messages(messages: Value) {
    let list = messages.as_array().unwrap();
    let steps = steps_from_messages(list).unwrap();
    assert_eq!(Value::Array(messages_from_steps(&steps)), messages);
    for (at, step) in steps.iter().enumerate() {
        assert_eq!(step.index as usize, at + 1);
    }
}

/// A store that takes everything as it is: what these tests compare.
fn exact() -> StoreOptions {
    StoreOptions {
        detect: crate::secrets::Detect::NONE,
        ..StoreOptions::default()
    }
}

#[test]
fn messages_come_back_equal_whatever_they_leave_out() {
    let call = |id: &str, arguments: &str| json!({"id": id, "type": "function", "function": {"name": "f", "arguments": arguments}});
    check_messages(json!([
        {"role": "developer", "content": "be brief", "name": "boss"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "assistant", "content": null, "tool_calls": [call("1", "{\"b\":1,\"a\":[2]}"), call("2", "{ \"x\" : 1.0 }")]},
        {"role": "tool", "tool_call_id": "1", "name": "f", "content": "one"},
        {"role": "tool", "tool_call_id": "2", "content": ""},
        {"role": "assistant", "content": "", "weight": 0, "refusal": null},
        {"role": "assistant", "weight": 1.0, "tool_calls": [call("3", "not json"), call("4", "[1]")]},
        {"role": "tool", "tool_call_id": "3", "content": [{"type": "text", "text": "x"}]},
        {"role": "tool", "tool_call_id": "4", "content": null},
        {"role": "assistant", "content": "x", "reasoning_content": "hm", "tool_calls": []},
        {"role": "assistant", "content": "x", "reasoning": "hm", "tool_calls": null, "audio": {"id": 1}},
        {"role": "user"},
        {"role": "user", "content": null, "@odd": 1, "@locum": {"fields": 2}},
    ]));
    check_messages(json!([
        {"role": "assistant", "content": null, "tool_calls": [
            {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}},
            {"id": "2", "function": {"name": "f", "strict": true}, "index": 0},
            {"id": null, "type": "function", "function": {"name": "f", "arguments": "{\"a\":1,\"a\":2}"}},
        ]},
    ]));
    check_messages(json!([]));
}

#[test]
fn results_far_from_their_calls_come_back_in_their_places() {
    let turn = |id: &str| json!({"role": "assistant", "content": null, "tool_calls": [{"id": id, "type": "function", "function": {"name": "f", "arguments": "{}"}}]});
    let result =
        |id: &str, text: &str| json!({"role": "tool", "tool_call_id": id, "content": text});
    check_messages(json!([
        turn("a"), turn("b"), result("a", "1"), result("b", "2"), result("a", "3"),
        {"role": "user", "content": "go on"}, result("b", "late"), result("nobody", "orphan"),
        turn("a"), result("a", "again"),
    ]));
    // Before any call, and with no id at all.
    check_messages(
        json!([result("x", "1"), {"role": "tool", "content": "2"}, {"role": "user", "content": "u"}, result("y", "3")]),
    );
}

#[test]
fn a_result_belongs_to_the_latest_open_call_when_ids_are_used_again() {
    let turn = json!({"role": "assistant", "content": null, "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]});
    let result = json!({"role": "tool", "tool_call_id": "c", "content": "r"});
    let steps = steps_from_messages(&[turn.clone(), result.clone(), turn, result]).unwrap();
    assert_eq!(
        steps
            .iter()
            .map(|step| step.observations.len())
            .collect::<Vec<_>>(),
        [1, 1]
    );
}

#[test]
fn arguments_are_kept_raw_only_where_printing_would_change_them() {
    let raw_of = |arguments: &str| {
        let message = json!({"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}]});
        let Piece::Step(step) = piece_from_message(&message).unwrap() else {
            panic!("a step")
        };
        (
            step.tool_calls[0].arguments.clone(),
            step.tool_calls[0].arguments_raw.clone(),
        )
    };
    assert_eq!(raw_of("{\"a\":1.5}"), (json!({"a": 1.5}), None));
    assert_eq!(
        raw_of("{\"a\": 1}"),
        (json!({"a": 1}), Some("{\"a\": 1}".into()))
    );
    for unparseable in ["", "{", "[]", "{\"a\":\"\\ud800\"}", "\u{0}"] {
        assert_eq!(raw_of(unparseable), (Value::Null, Some(unparseable.into())));
    }
    let deep = format!("{}1{}", "{\"a\":".repeat(65), "}".repeat(65));
    assert_eq!(raw_of(&deep), (Value::Null, Some(deep.clone())));
}

#[test]
fn a_weight_of_zero_says_do_not_train() {
    let steps =
        steps_from_messages(&[json!({"role": "assistant", "content": "x", "weight": 0})]).unwrap();
    assert!(!steps[0].label.as_ref().unwrap().train);
}

#[test]
fn messages_that_cannot_be_recorded_are_refused_by_place_and_reason() {
    let check = |message: Value, words: &str| {
        let error = steps_from_messages(&[json!({"role": "user", "content": "u"}), message])
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("message 1: ") && error.contains(words),
            "{error}"
        );
    };
    check(json!("hello"), "an object is expected, found a string");
    check(json!({"content": "x"}), "`role` is missing");
    check(json!({"role": "robot"}), "unknown role \"robot\"");
    check(
        json!({"role": "function", "name": "f", "content": ""}),
        "legacy",
    );
    check(
        json!({"role": "assistant", "function_call": {"name": "f"}}),
        "legacy",
    );
    check(
        json!({"role": "user", "content": 7}),
        "`content` must be text",
    );
    check(
        json!({"role": "assistant", "tool_calls": {}}),
        "`tool_calls` must be a list",
    );
    check(
        json!({"role": "assistant", "tool_calls": [{"type": "custom"}]}),
        "tool call 0: only calls of type",
    );
    check(
        json!({"role": "assistant", "tool_calls": [{"function": {"arguments": ""}}]}),
        "`function.name` is missing",
    );
    check(json!({"role": "assistant", "weight": -1}), "`weight`");
    check(json!({"role": "tool", "tool_call_id": 3}), "`tool_call_id`");
}

#[test]
fn tools_come_back_equal_and_bad_ones_are_named() {
    let tools = json!([
        {"type": "function", "function": {"name": "a", "description": "", "parameters": {"type": "object"}, "strict": true}},
        {"type": "function", "function": {"name": "b"}, "cache": 1},
        {"type": "function", "function": {"name": "c", "description": null, "parameters": null}},
    ]);
    assert_eq!(tools_to_json(&tools_from_json(&tools).unwrap()), tools);
    assert!(tools_from_json(&Value::Null).unwrap().is_empty());
    let check = |tools: Value, words: &str| {
        let error = tools_from_json(&tools).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    };
    check(json!({}), "`tools` must be a list");
    check(
        json!([{"type": "web_search"}]),
        "only tools of type \"function\"",
    );
    check(
        json!([{"type": "function", "function": {}}]),
        "tool 0: `function.name` is missing",
    );
    check(
        json!([tools[1], tools[1]]),
        "tool 1: the name \"b\" is used twice",
    );
    let many: Vec<Value> = (0..257)
        .map(|n| json!({"type": "function", "function": {"name": format!("t{n}")}}))
        .collect();
    check(Value::Array(many), "257 tools");
}

/// Random chats: every role, results in any order, fields absent, null or odd.
fn chats() -> impl Strategy<Value = Vec<Value>> {
    let content = prop_oneof![
        Just(None),
        Just(Some(Value::Null)),
        "[a-z\u{0}é\"\\\\]{0,6}".prop_map(|text| Some(json!(text))),
        Just(Some(json!([{"type": "text", "text": "t"}]))),
    ];
    let arguments = prop_oneof![
        Just(json!("{}")),
        Just(json!("{\"a\": 1}")),
        Just(json!("{\"a\":0.1}")),
        Just(json!("oops")),
        Just(json!({"a": 1})),
    ];
    let calls = proptest::collection::vec(("[a-c]", arguments), 0..3);
    let message = (0..5u8, content, calls, "[a-c]", proptest::option::of("[@a-z]{1,3}")).prop_map(|(role, content, calls, id, odd)| {
        let mut message = serde_json::Map::new();
        let role = ["system", "user", "assistant", "tool", "developer"][role as usize];
        message.insert("role".into(), json!(role));
        if let Some(content) = content {
            message.insert("content".into(), content);
        }
        if role == "assistant" && !calls.is_empty() {
            let call = |(id, arguments): (String, Value)| json!({"id": id, "type": "function", "function": {"name": "f", "arguments": arguments}});
            message.insert("tool_calls".into(), calls.into_iter().map(call).collect());
        }
        if role == "tool" {
            message.insert("tool_call_id".into(), json!(id));
        }
        if let Some(odd) = odd {
            message.insert(odd, json!("odd"));
        }
        Value::Object(message)
    });
    proptest::collection::vec(message, 0..12)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn any_chat_comes_back_equal(messages in chats()) {
        let steps = steps_from_messages(&messages).unwrap();
        prop_assert_eq!(messages_from_steps(&steps), messages);
    }

    #[test]
    fn an_exported_episode_is_imported_as_it_was(messages in chats(), student in any::<bool>(), score in 0.0f64..1.0) {
        prop_assume!(!messages.is_empty());
        let mut steps = steps_from_messages(&messages).unwrap();
        for step in &mut steps {
            step.actor = if student { Actor::Student } else { Actor::Human };
            step.usage = Some(crate::episode::Usage { cost_usd: Some(score), ..Default::default() });
        }
        let mut episode = Episode { schema: "locum/1".into(), steps, closed: true, started_at_ms: 5, ..Episode::default() };
        episode.episode_id = crate::episode::EpisodeId::new(5, 7);
        episode.outcome = Some(crate::episode::Outcome { score: Some(score), ..Default::default() });
        episode.extra.insert("seed".into(), json!(3));
        episode.extra.insert("@ours".into(), json!(score));
        let exported = export_openai(&episode, true);
        let (counts, mut back) = imported(written(exported.line.to_string()).path());
        prop_assert_eq!(counts.reasons, vec![]);
        back[0].provenance = Default::default();
        prop_assert_eq!(&back[0], &episode);
    }
}

#[test]
fn what_the_format_cannot_hold_is_reported() {
    let mut steps = steps_from_messages(&[json!({"role": "assistant", "content": "x"})]).unwrap();
    steps[0].actor = Actor::Student;
    steps[0].token_ids = Some(Default::default());
    let episode = Episode {
        steps,
        incomplete: true,
        ..Episode::default()
    };
    let find = |sidecar: bool, field: &str| {
        let exported = export_openai(&episode, sidecar);
        let found = exported
            .losses
            .losses
            .into_iter()
            .find(|loss| loss.field == field);
        found.map(|loss| (loss.count, loss.kept))
    };
    assert_eq!(find(true, "steps[].actor"), Some((1, true)));
    assert_eq!(find(false, "steps[].actor"), Some((1, false)));
    assert_eq!(find(true, "steps[].token_ids"), Some((1, false)));
    assert_eq!(find(true, "incomplete"), Some((1, true)));
    assert_eq!(find(true, "steps[].decision"), None);
    assert!(export_openai(&episode, false)
        .line
        .get("metadata")
        .is_none());
    let mut total = LossReport::default();
    total.add(&export_openai(&episode, false).losses);
    total.add(&export_openai(&episode, false).losses);
    assert_eq!(
        total
            .losses
            .iter()
            .find(|loss| loss.field == "incomplete")
            .unwrap()
            .count,
        2
    );
}

#[test]
fn what_a_student_said_is_not_imported_as_the_teachers() {
    let mut steps = steps_from_messages(&[json!({"role": "assistant", "content": "x"})]).unwrap();
    steps[0].actor = Actor::Student;
    let line = export_openai(
        &Episode {
            steps,
            ..Episode::default()
        },
        true,
    )
    .line;
    let (_, back) = imported(written(line.to_string()).path());
    assert_eq!(back[0].steps[0].actor, Actor::Student);
}

#[test]
fn a_bad_line_costs_that_line_only_and_is_named() {
    let good = r#"{"messages":[{"role":"user","content":"u"},{"role":"assistant","content":"nul \u0000 is text"}],"outcome":{"success":true}}"#;
    let deep = format!(
        r#"{{"messages":[],"x":{}1{}}}"#,
        "[".repeat(70),
        "]".repeat(70)
    );
    let mut text = Vec::new();
    for line in [
        good.as_bytes(),
        br#"{"messages":[{"role":"user","content":"\ud800"}]}"#,
        b"{\"messages\":[{\"role\":\"user\",\"content\":\"\xff\"}]}",
        b"{\"messages\":[{\"role\":\"user\",\"content\":\"a\0b\"}]}",
        deep.as_bytes(),
        b"",
        br#"{"messages":[{"role":"robot"}]}"#,
        br#"{"messages":[]}"#,
        br#"{"messages":[{"role":"user","content":"u"}],"functions":[{"name":"f"}]}"#,
        br#"{"messages":[{"role":"user","content":"u"}],"tools":[{"type":"mcp"}]}"#,
        br#"{"messages":[{"role":"user","content":"u"}],"outcome":7}"#,
        b"[1]",
        b"{\"messages\"",
        br#"{"messages":[{"role":"user","content":"no outcome"}]}"#,
    ] {
        text.extend_from_slice(line);
        text.extend_from_slice(b"\r\n");
    }
    let (counts, episodes) = imported(written(text).path());
    let skipped: Vec<(u64, &str)> = counts
        .reasons
        .iter()
        .map(|skip| (skip.line, skip.reason.as_str()))
        .collect();
    let expected = [
        (2, "a lone surrogate at byte 39"),
        (3, "invalid UTF-8 at byte 39"),
        (4, "a raw NUL byte at byte 40"),
        (5, "nested deeper than 64 levels"),
        (7, "message 0: unknown role \"robot\""),
        (8, "`messages` is empty"),
        (9, "`functions` is the legacy form of tools"),
        (10, "tool 0: only tools of type \"function\""),
        (11, "`outcome` must be an object"),
        (12, "an object is expected"),
        (13, "the text ends too early"),
    ];
    assert_eq!(skipped.len(), expected.len(), "{skipped:?}");
    for ((line, reason), (expected_line, words)) in skipped.iter().zip(expected) {
        assert!(
            *line == expected_line && reason.contains(words),
            "line {line}: {reason}"
        );
    }
    assert_eq!(
        (
            counts.episodes,
            counts.steps,
            counts.successes,
            counts.unknown,
            counts.skipped
        ),
        (2, 3, 1, 1, 11)
    );
    assert_eq!(
        episodes[0].steps[1].message,
        Some(Content::Text("nul \0 is text".into()))
    );
    assert_eq!(episodes[0].steps[1].actor, Actor::Teacher);
    assert!(episodes.iter().all(|episode| episode.closed));
}

#[test]
fn files_that_are_no_runs_are_refused_with_a_sentence() {
    let check = |text: &str, words: &str| {
        let error = import(written(text).path(), None, &mut |_| Ok(Taken::Stored))
            .unwrap_err()
            .to_string();
        assert!(error.contains(words), "{error}");
    };
    check("", "the file is empty");
    check("hello", "not JSON");
    check("[]", "neither `traj` nor `messages`");
    check("{\"a\":1}", "neither `messages` nor runs");
    check("[{\"traj\":[]}", "the text ends too early");
    let absent = import(std::path::Path::new("no/such/file"), None, &mut |_| {
        Ok(Taken::Stored)
    })
    .unwrap_err();
    assert!(absent.to_string().starts_with("cannot read no/such/file"));
    let folder = tempfile::tempdir().unwrap();
    let error = import(folder.path(), None, &mut |_| Ok(Taken::Stored)).unwrap_err();
    assert!(error.to_string().contains("not a regular file"));
    let named = import(written("{}").path(), Some("atif"), &mut |_| {
        Ok(Taken::Stored)
    })
    .unwrap_err();
    assert!(named.to_string().contains("no format is called \"atif\""));
}

#[test]
fn a_bad_run_in_an_array_does_not_hide_the_others() {
    let run = |reward: &str| {
        format!(r#"{{"task_id":1,"reward":{reward},"traj":[{{"role":"user","content":"u"}}]}}"#)
    };
    let text = format!(
        "[{},\n{{\"traj\":\"\\ud800\"}},\n{},{}, {{\"reward\":1}}]",
        run("1.0"),
        run("0.5"),
        run("null")
    );
    let (counts, _) = imported(written(text).path());
    assert_eq!(
        (
            counts.format.as_str(),
            counts.episodes,
            counts.successes,
            counts.failures,
            counts.unknown
        ),
        ("tau-bench", 3, 1, 1, 1)
    );
    assert_eq!(
        counts
            .reasons
            .iter()
            .map(|skip| skip.line)
            .collect::<Vec<_>>(),
        [2, 3]
    );
}

#[test]
fn equal_runs_are_counted_apart_and_importing_again_adds_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&folder.path().join("s"), exact()).unwrap();
    let line = r#"{"messages":[{"role":"user","content":"u"}],"outcome":{"success":false}}"#;
    let file = written(format!("{line}\n{line}\n"));
    let first = import_into(file.path(), None, &store, &TeacherFirst).unwrap();
    assert_eq!((first.episodes, first.failures, first.skipped), (2, 2, 0));
    let again = import_into(file.path(), None, &store, &TeacherFirst).unwrap();
    assert_eq!((again.episodes, again.skipped), (0, 2));
    assert!(again
        .reasons
        .iter()
        .all(|skip| skip.reason == "already there"));
    // Our own export keeps its ids, so it does not double them either.
    let lines: Vec<String> = store
        .load(&Query::default())
        .unwrap()
        .iter()
        .map(|e| export_openai(e, true).line.to_string())
        .collect();
    let exported = written(lines.join("\n"));
    let exported = import_into(exported.path(), None, &store, &TeacherFirst).unwrap();
    assert_eq!((exported.episodes, exported.skipped), (0, 2));
    assert_eq!(store.counts(None).unwrap().episodes, 2);
}

#[test]
fn the_recorded_tau_bench_runs_import_whole_and_export_equal() {
    let Some(file) = shared("real-trajectories/tau-bench/gpt-4o-airline.sample60.json") else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&folder.path().join("s"), exact()).unwrap();
    let counts = import_into(&file, None, &store, &TeacherFirst).unwrap();
    // 1616 messages, of which 327 are results of tools.
    assert_eq!(
        (
            counts.episodes,
            counts.steps,
            counts.successes,
            counts.failures
        ),
        (60, 1289, 30, 30)
    );
    assert_eq!(
        (counts.unknown, counts.skipped, counts.format.as_str()),
        (0, 0, "tau-bench")
    );
    let source = json::parse(&std::fs::read(&file).unwrap(), 64).unwrap();
    let episodes = store.load(&Query::default()).unwrap();
    assert_eq!(
        episodes
            .iter()
            .flat_map(|e| &e.steps)
            .map(|s| s.observations.len())
            .sum::<usize>(),
        327
    );
    for (episode, run) in episodes.iter().zip(source.as_array().unwrap()) {
        let line = export_openai(episode, true).line;
        assert_eq!(line["messages"], run["traj"]);
        assert!(line.get("tools").is_none());
        assert_eq!(
            line["outcome"]["success"],
            json!(run["reward"] == json!(1.0))
        );
        for field in ["task_id", "reward", "trial", "info"] {
            assert_eq!(line[field], run[field], "{field}");
        }
        assert_eq!(episode.task.id, format!("airline/{}", run["task_id"]));
        assert!(
            episode.task.instruction.is_empty(),
            "the customer's hidden instruction is not the agent's goal"
        );
        let agent = episode
            .steps
            .iter()
            .filter(|step| step.source == Source::Agent);
        assert!(
            agent.clone().count() > 0 && agent.into_iter().all(|step| step.actor == Actor::Teacher)
        );
    }
    let errors = episodes
        .iter()
        .flat_map(|e| &e.steps)
        .flat_map(|s| &s.observations)
        .filter(|o| o.is_error)
        .count();
    assert!(errors > 0, "some calls of these runs failed");
}

#[test]
fn the_recorded_intercode_runs_import_whole_with_every_turn() {
    let Some(folder) = shared("real-trajectories/intercode") else {
        return;
    };
    let home = tempfile::tempdir().unwrap();
    let store = Store::open(&home.path().join("s"), exact()).unwrap();
    for (name, runs, turns, solved, tool) in [
        ("bash_gpt-4_10_turns_fs_2.json", 53, 310, 25, "bash"),
        ("sql_gpt-4_10_turns.sample200.json", 200, 1160, 149, "sql"),
    ] {
        let before = store.counts(None).unwrap().episodes;
        let counts = import_into(&folder.join(name), None, &store, &TeacherFirst).unwrap();
        assert_eq!((counts.episodes, counts.steps), (runs, turns + runs));
        assert_eq!(
            (
                counts.successes,
                counts.failures,
                counts.unknown,
                counts.skipped
            ),
            (solved, runs - solved, 0, 0)
        );
        let source = json::parse(&std::fs::read(folder.join(name)).unwrap(), 64).unwrap();
        let episodes = store
            .load(&Query {
                offset: before as u32,
                ..Query::default()
            })
            .unwrap();
        for (episode, run) in episodes.iter().zip(source.as_object().unwrap().values()) {
            assert_eq!(turn_history(episode).as_ref(), Some(&run["turn_history"]));
            for (field, value) in run
                .as_object()
                .unwrap()
                .iter()
                .filter(|(field, _)| *field != "turn_history")
            {
                assert_eq!(&episode.extra[field], value, "{field}");
            }
            assert_eq!(
                episode.outcome.as_ref().unwrap().score,
                run["summary"]["max_reward"].as_f64()
            );
            assert_eq!(episode.tools[0].name, tool);
            // The turns survive our own export, too.
            let line = export_openai(episode, true).line;
            let (_, back) = imported(written(line.to_string()).path());
            assert_eq!(turn_history(&back[0]).as_ref(), Some(&run["turn_history"]));
            assert_eq!(back[0].steps, episode.steps);
        }
    }
}

#[test]
fn the_sample_episodes_import_whole_and_export_equal() {
    let Some(folder) = shared("sample-episodes") else {
        return;
    };
    let mut totals = (0, 0, 0);
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path
            .extension()
            .is_none_or(|extension| extension != "jsonl")
        {
            continue;
        }
        let (counts, episodes) = imported(&path);
        assert_eq!((counts.skipped, counts.unknown), (0, 0));
        totals = (
            totals.0 + counts.episodes,
            totals.1 + counts.successes,
            totals.2 + counts.failures,
        );
        let text = std::fs::read_to_string(&path).unwrap();
        for (episode, line) in episodes.iter().zip(text.lines()) {
            let source = json::parse(line.as_bytes(), 64).unwrap();
            let exported = export_openai(episode, true).line;
            for (field, value) in source
                .as_object()
                .unwrap()
                .iter()
                .filter(|(field, _)| *field != "outcome")
            {
                assert_eq!(&exported[field], value, "{field}");
            }
            for (field, value) in source["outcome"].as_object().unwrap() {
                assert_eq!(&exported["outcome"][field], value, "outcome.{field}");
            }
            let success = source["outcome"]["success"].as_bool().unwrap();
            assert_eq!(
                episode.outcome.as_ref().unwrap().status == Status::Success,
                success
            );
        }
    }
    assert_eq!(totals, (132, 87, 45));
}

#[test]
fn an_import_larger_than_the_queue_waits_instead_of_failing() {
    let folder = tempfile::tempdir().unwrap();
    let options = StoreOptions {
        max_queued_records: 2,
        ..StoreOptions::default()
    };
    let store = Store::open(&folder.path().join("s"), options).unwrap();
    let lines: Vec<String> = (0..300)
        .map(|n| format!(r#"{{"messages":[{{"role":"user","content":"{n}"}}]}}"#))
        .collect();
    let file = written(lines.join("\n"));
    let counts = import_into(file.path(), None, &store, &TeacherFirst).unwrap();
    assert_eq!((counts.episodes, counts.unknown), (300, 300));
    store.flush(Duration::from_secs(10)).unwrap();
    assert_eq!(store.counts(None).unwrap().episodes, 300);
}

/// A running episode is kept in outlines; results find their steps among them as among the steps themselves.
#[test]
fn results_find_their_steps_among_outlines_too() {
    let call = |ids: &[&str]| {
        let calls: Vec<Value> = ids
            .iter()
            .map(|id| json!({"id": id, "type": "function", "function": {"name": "act", "arguments": "{}"}}))
            .collect();
        json!({"role": "assistant", "content": "c", "tool_calls": calls})
    };
    let result = |id: &str| json!({"role": "tool", "tool_call_id": id, "content": "r"});
    let messages = [
        result("nobody"),
        json!({"role": "user", "content": "u"}),
        call(&["a", "b"]),
        result("b"),
        call(&["a"]),
        result("a"),
        result("a"),
        json!({"role": "user", "content": "u"}),
        result("a"),
        result("b"),
        result("unknown"),
        call(&["c"]),
        result("a"),
        result("c"),
    ];
    let (mut whole, mut outlines): (Vec<Step>, Vec<Box<Step>>) = Default::default();
    for message in &messages {
        match piece_from_message(message).unwrap() {
            Piece::Step(mut step) => {
                step.index = whole.len() as u32 + 1;
                outlines.push(Box::new(outline(&step)));
                whole.push(step);
            }
            Piece::Observation(observation) => {
                let thin = outline_of(&observation);
                assert_eq!(attach(&mut whole, observation), attach(&mut outlines, thin));
            }
        }
        let thin: Vec<Step> = whole.iter().map(outline).collect();
        assert_eq!(
            outlines.iter().map(|s| (**s).clone()).collect::<Vec<_>>(),
            thin
        );
    }
    assert_eq!(messages_from_steps(&whole), messages);
}
