use serde_json::{json, Value};

use super::*;
use crate::calls::CallFormat;
use crate::episode::{Content, Observation, Source, Step, Task, ToolCall, ToolSpec};

fn chars(text: &str) -> usize {
    text.chars().count()
}

fn tool(name: &str, description: &str, parameters: Value) -> ToolSpec {
    ToolSpec {
        name: name.into(),
        description: description.into(),
        parameters,
        ..ToolSpec::default()
    }
}

fn act() -> CallFormat {
    let actions = [
        "left", "right", "forward", "pickup", "drop", "toggle", "done",
    ];
    let parameters = json!({
        "type": "object", "properties": { "action": { "type": "string", "enum": actions } }, "required": ["action"]
    });
    CallFormat::new(&[tool("act", "Take one step in the grid world.", parameters)]).unwrap()
}

fn says(source: Source, text: &str) -> Step {
    Step {
        source,
        message: Some(Content::Text(text.into())),
        ..Step::default()
    }
}

fn calls(calls: &[(&str, Value, &str)]) -> Step {
    Step {
        source: Source::Agent,
        tool_calls: calls
            .iter()
            .map(|(name, arguments, _)| ToolCall {
                id: format!("id {arguments}"),
                name: name.to_string(),
                arguments: arguments.clone(),
                ..ToolCall::default()
            })
            .collect(),
        observations: calls
            .iter()
            .map(|(_, arguments, result)| Observation {
                call_id: Some(format!("id {arguments}")),
                content: Some(Content::Text(result.to_string())),
                ..Observation::default()
            })
            .collect(),
        ..Step::default()
    }
}

fn grid(action: &str, result: &str) -> Step {
    calls(&[("act", json!({ "action": action }), result)])
}

fn probe_view() -> View {
    View {
        tools: ToolsShown::None,
        older: Older::Values,
        steps_back: 3,
        full_steps: 0,
        ..View::default()
    }
}

fn grid_episode() -> Vec<Step> {
    vec![
        says(Source::System, "You control a robot in a grid world."),
        says(Source::User, "Goal: go to the purple key.\nSee: purple key 5 ahead 3 right. wall 6 ahead."),
        grid("forward", "See: purple key 4 ahead 3 right."),
        grid("forward", "See: purple key 3 ahead 3 right."),
        grid("left", "See: red ball 1 ahead."),
        grid("forward", "See: blue box 1 ahead 2 right; purple key 3 right; red ball 2 ahead 1 right. wall 5 ahead, wall 2 left."),
    ]
}

fn render(view: &View, steps: &[Step], format: &CallFormat) -> Prompt {
    view.render(&Task::default(), steps, format, &chars)
        .unwrap()
}

// The prompt of notes on learnability: the form that won there, to the letter.
#[test]
fn the_prompt_of_the_probe_is_reproduced_to_the_letter() {
    let prompt = render(&probe_view(), &grid_episode(), &act());
    assert_eq!(prompt.system, "");
    assert_eq!(
        prompt.user,
        "Last: forward left forward\n\
         See: blue box 1 ahead 2 right; purple key 3 right; red ball 2 ahead 1 right. wall 5 ahead, wall 2 left.\n\
         Goal: go to the purple key.\n\
         Focus: purple key 3 right"
    );
}

#[test]
fn before_the_first_step_the_observation_comes_from_the_first_user_message() {
    let prompt = render(&probe_view(), &grid_episode()[..2], &act());
    assert_eq!(
        prompt.user,
        "Last: none\nSee: purple key 5 ahead 3 right. wall 6 ahead.\nGoal: go to the purple key.\nFocus: purple key 5 ahead 3 right"
    );
}

#[test]
fn a_heading_on_its_own_line_and_an_instruction_of_the_task_are_understood() {
    let steps = [says(
        Source::User,
        "Task Description:\nBoil the water.\nYou see a pot.",
    )];
    let prompt = render(&probe_view(), &steps, &act());
    assert_eq!(
        prompt.user,
        "Last: none\nSee: You see a pot.\nGoal: Boil the water.\nFocus: none"
    );
    let task = Task {
        instruction: "Goal: boil the water".into(),
        ..Task::default()
    };
    let prompt = probe_view().render(&task, &steps, &act(), &chars).unwrap();
    assert!(
        prompt.user.contains("\nGoal: boil the water\n")
            && prompt.user.contains("See: You see a pot.")
    );
}

#[test]
fn every_kind_of_older_turn_and_goal_place_has_its_form() {
    let steps = grid_episode();
    let with = |change: &dyn Fn(&mut View)| {
        let mut view = probe_view();
        view.focus = 0;
        change(&mut view);
        render(&view, &steps, &act()).user
    };
    let call = with(&|v| v.older = Older::Call);
    assert!(
        call.starts_with("Last: act(forward); act(left); act(forward)\nSee: blue"),
        "{call}"
    );
    let line = with(&|v| v.older = Older::CallAndLine);
    assert!(
        line.starts_with("Last:\nact(forward) -> purple key 3 ahead 3 right.\nact(left) -> red ball 1 ahead.\nact(forward)\nSee:"),
        "{line}"
    );
    let whole = with(&|v| v.full_steps = 1);
    assert!(
        whole.starts_with("Earlier: act(left) -> red ball 1 ahead.\nLast: forward left forward\n"),
        "{whole}"
    );
    let first = with(&|v| v.goal = GoalPlace::First);
    assert!(
        first.starts_with("Goal: go to the purple key.\nLast:")
            && first.matches("Goal:").count() == 1
    );
    assert_eq!(
        with(&|v| v.goal = GoalPlace::Both).matches("Goal:").count(),
        2
    );
    assert_eq!(
        with(&|v| v.goal = GoalPlace::None).matches("Goal:").count(),
        0
    );
    assert!(with(&|v| v.tools = ToolsShown::Signatures).starts_with("Tools: act(action)\n"));
    assert!(with(&|v| v.tools = ToolsShown::Described)
        .starts_with("Tools: act(action): Take one step in the grid world\n"));
    assert!(!with(&|v| v.steps_back = 0).contains("Last"));
}

fn airline() -> (CallFormat, Vec<Step>) {
    let id = json!({ "type": "object", "properties": { "user_id": { "type": "string" } }, "required": ["user_id"] });
    let search = json!({
        "type": "object",
        "properties": { "origin": { "type": "string" }, "destination": { "type": "string" }, "date": { "type": "string" } },
        "required": ["origin", "destination"]
    });
    let format = CallFormat::new(&[
        tool("get_user", "Look up a customer. Needs an id.", id),
        tool("search", "Search direct flights.", search),
    ])
    .unwrap();
    let mut steps = vec![
        says(Source::System, "# Airline policy\nNever give refunds."),
        says(
            Source::User,
            "Hi! I want a flight from New York to Seattle on May 20th.",
        ),
        says(Source::Agent, "May I have\nyour user id?"),
        says(Source::User, "mia_li_3668"),
        calls(&[
            (
                "get_user",
                json!({ "user_id": "mia_li_3668" }),
                "{\"name\": \"Mia\"}",
            ),
            (
                "search",
                json!({ "destination": "SEA", "origin": "JFK" }),
                "no such date",
            ),
        ]),
        says(Source::User, "The cheapest one, please."),
    ];
    steps[4].observations[1].is_error = true;
    (format, steps)
}

#[test]
fn a_customer_service_episode_with_parallel_calls_and_an_error_is_readable() {
    let (format, steps) = airline();
    let view = View {
        host_system: true,
        system: "Be brief.".into(),
        ..View::default()
    };
    let prompt = render(&view, &steps, &format);
    assert_eq!(
        prompt.system,
        "Be brief.\n\n# Airline policy\nNever give refunds."
    );
    assert_eq!(
        prompt.user,
        "Tools:\nget_user(user_id)\nsearch(origin, destination, date?)\n\
         Earlier: text: May I have your user id? -> User: mia_li_3668\n\
         Last: text: May I have your user id?; get_user(\"mia_li_3668\") search(origin=\"JFK\", destination=\"SEA\")\n\
         See: get_user: {\"name\": \"Mia\"}\nsearch: Error: no such date\nUser: The cheapest one, please.\n\
         Goal: Hi! I want a flight from New York to Seattle on May 20th.\n\
         Focus: none"
    );
    // Two tools: values alone would not say which was called.
    let values = render(
        &View {
            older: Older::Values,
            ..view
        },
        &steps,
        &format,
    );
    assert!(
        values.user.contains("; get_user(\"mia_li_3668\") search("),
        "{}",
        values.user
    );
}

#[test]
fn calls_that_have_no_compact_form_are_shown_all_the_same() {
    let (format, mut steps) = airline();
    steps[4].tool_calls[0].name = "fly away".into();
    steps[4].tool_calls[1].arguments = Value::Null;
    let prompt = render(&View::default(), &steps, &format);
    assert!(
        prompt
            .user
            .contains("fly away({\"user_id\":\"mia_li_3668\"}) search(null)"),
        "{}",
        prompt.user
    );
}

#[test]
fn a_long_prompt_sheds_oldest_turns_then_the_front_of_the_observation_and_never_the_goal() {
    let mut steps = grid_episode();
    steps.push(grid(
        "right",
        &format!("See: {}, purple key 1 ahead.", "x ".repeat(500)),
    ));
    let render = |max_tokens: usize| {
        View {
            max_tokens,
            observation_chars: 2000,
            ..probe_view()
        }
        .render(&Task::default(), &steps, &act(), &chars)
    };
    let whole = render(8000).unwrap().user;
    assert!(whole.starts_with("Last: left forward right\nSee: x x"));
    let room = whole.chars().count() + 24;
    assert_eq!(render(room).unwrap().user, whole);
    assert!(render(room - 1)
        .unwrap()
        .user
        .starts_with("Last: forward right\nSee: x x"));
    let short = render(150).unwrap().user;
    assert!(
        short.starts_with("See: ...")
            && short.contains("purple key 1 ahead.\nGoal: go to the purple key.\nFocus: ")
    );
    assert!(
        (120..=126).contains(&short.chars().count()),
        "{}",
        short.chars().count()
    );
    assert_eq!(render(60).unwrap().user, "Goal: go to the purple key.");
    let error = render(50).unwrap_err();
    assert!(error.to_string().ends_with("the view allows 50"), "{error}");
    let kept = View {
        observation_chars: 5,
        focus: 0,
        ..probe_view()
    };
    assert!(super::tests::render(&kept, &steps, &act())
        .user
        .contains("See: ...head.\n"));
}

#[test]
fn focus_prefers_the_best_overlap_and_keeps_the_order_of_the_observation() {
    let seen = "red ball 2 left; blue key, red key 3 ahead. a Red-Key door\nred ball 2 left; version 3.5, of the red key";
    assert_eq!(
        focus("go to the red key", seen, 9, 2),
        ["red key 3 ahead", "a Red-Key door", "of the red key"]
    );
    assert_eq!(focus("go to the red key", seen, 1, 2), ["red key 3 ahead"]);
    assert_eq!(
        focus("go to the red key", seen, 2, 1),
        ["red key 3 ahead", "a Red-Key door"]
    );
    assert_eq!(
        focus("open the door", seen, 9, 2),
        ["a Red-Key door"],
        "a goal of one content word asks for that one"
    );
    assert_eq!(
        focus("go next to it", seen, 9, 2),
        [""; 0],
        "no content word, no focus"
    );
    assert_eq!(
        focus("version 3", seen, 9, 2),
        ["version 3.5"],
        "a number is not cut in two"
    );
    assert_eq!(focus("red key", seen, 0, 2), [""; 0]);
    assert_eq!(focus("赤い 鍵", "赤い 鍵 3; 青い 鍵", 3, 2), ["赤い 鍵 3"]);
}

#[test]
fn the_digest_changes_exactly_when_the_rendering_could() {
    let base = View::default();
    let digest = |change: &dyn Fn(&mut View)| {
        let mut view = base.clone();
        change(&mut view);
        view.digest()
    };
    let changes: [&dyn Fn(&mut View); 12] = [
        &|v| v.system = "x".into(),
        &|v| v.host_system = true,
        &|v| v.tools = ToolsShown::Described,
        &|v| v.goal = GoalPlace::First,
        &|v| v.steps_back = 5,
        &|v| v.older = Older::Values,
        &|v| v.full_steps = 2,
        &|v| v.observation_chars = 1999,
        &|v| v.focus = 2,
        &|v| v.focus_overlap = 1,
        &|v| v.max_tokens = 1023,
        &|v| v.focus = 0,
    ];
    let mut seen = std::collections::HashSet::from([base.digest()]);
    for (i, change) in changes.iter().enumerate() {
        assert!(
            seen.insert(digest(change)),
            "change {i} left the digest as it was"
        );
    }
    assert_eq!(base.digest(), View::default().digest());
    let no_focus = |overlap| digest(&|v| (v.focus, v.focus_overlap) = (0, overlap));
    assert_eq!(no_focus(1), no_focus(7));
    let no_past = |older| {
        digest(&|v| {
            (v.steps_back, v.full_steps, v.older) =
                (0, if older == Older::Call { 0 } else { 4 }, older)
        })
    };
    assert_eq!(no_past(Older::Call), no_past(Older::Values));
    assert_eq!(
        digest(&|v| v.full_steps = 5),
        digest(&|v| v.full_steps = 60),
        "six turns back, five before the last"
    );
}

#[test]
fn a_view_out_of_range_is_refused_by_name() {
    assert_eq!(View::default().check(), Ok(()));
    let view = View {
        max_tokens: 0,
        ..View::default()
    };
    assert_eq!(
        view.check().unwrap_err().to_string(),
        "view.max_tokens is 0, 1 to 8192 is expected"
    );
    assert!(View {
        focus: 1000,
        ..View::default()
    }
    .check()
    .unwrap_err()
    .to_string()
    .contains("view.focus is 1000"));
}

fn turns_view() -> View {
    View {
        tools: ToolsShown::None,
        goal: GoalPlace::First,
        turns: true,
        steps_back: 100,
        focus: 0,
        ..View::default()
    }
}

#[test]
fn under_a_view_of_turns_each_step_stands_as_it_was() {
    let prompt = render(&turns_view(), &grid_episode()[..4], &act());
    let turn = |seen: &str, reply: &str| (seen.to_string(), reply.to_string());
    assert_eq!(
        prompt.earlier,
        [
            turn(
                "Goal: go to the purple key.\npurple key 5 ahead 3 right. wall 6 ahead.",
                "act(forward)"
            ),
            turn("purple key 4 ahead 3 right.", "act(forward)"),
        ]
    );
    assert_eq!(prompt.user, "purple key 3 ahead 3 right.");
    let everything = View {
        goal: GoalPlace::Both,
        tools: ToolsShown::Signatures,
        focus: 2,
        ..turns_view()
    };
    let prompt = render(&everything, &grid_episode()[..3], &act());
    assert_eq!(
        prompt.earlier[0].0,
        "Tools: act(action)\nGoal: go to the purple key.\npurple key 5 ahead 3 right. wall 6 ahead.\n\
         Goal: go to the purple key.\nFocus: purple key 5 ahead 3 right"
    );
    assert_eq!(
        prompt.user,
        "purple key 4 ahead 3 right.\nGoal: go to the purple key.\nFocus: purple key 4 ahead 3 right"
    );
}

#[test]
fn turns_are_shed_from_the_oldest_and_the_goal_stays() {
    let steps = grid_episode();
    let whole = render(&turns_view(), &steps, &act());
    assert_eq!(whole.earlier.len(), 4);
    for max_tokens in [360, 280, 200, 140] {
        let view = View {
            max_tokens,
            ..turns_view()
        };
        let prompt = render(&view, &steps, &act());
        let size: usize = (prompt.earlier.iter())
            .map(|(seen, reply)| chars(seen) + chars(reply) + 16)
            .sum();
        assert!(
            size + chars(&prompt.user) + 24 <= max_tokens,
            "{max_tokens}"
        );
        assert!(prompt.earlier.len() < 4);
        let first = prompt.earlier.first().map_or(&prompt.user, |turn| &turn.0);
        assert!(
            first.starts_with("Goal: go to the purple key.\n"),
            "{first}"
        );
        assert!(prompt.user.ends_with("wall 2 left."), "{}", prompt.user);
    }
    let one = View {
        steps_back: 1,
        ..turns_view()
    };
    assert_eq!(render(&one, &steps, &act()).earlier.len(), 1);
}

#[test]
fn turns_are_another_view_and_its_absence_changes_no_digest() {
    assert_ne!(
        turns_view().digest(),
        View {
            turns: false,
            ..turns_view()
        }
        .digest()
    );
    let text = serde_json::to_string(&View::default()).unwrap();
    assert!(!text.contains("turns"), "{text}");
    // What a view of turns does not look at.
    let other = View {
        older: Older::CallAndLine,
        full_steps: 3,
        ..turns_view()
    };
    assert_eq!(turns_view().digest(), other.digest());
}
