//! Episodes for tests: a robot on a line that is told to reach the gold star, and a policy that lets everything through.

use serde_json::json;

use crate::episode::*;
use crate::policy::*;

/// Keeps whatever the built-in rules keep.
pub struct KeepAll;

impl Policy for KeepAll {
    fn id(&self) -> PolicyId {
        PolicyId {
            name: "keep-all".into(),
            digest: "0".into(),
        }
    }
    fn decide(&self, _: &StepInfo) -> Choice {
        Choice::teacher("test")
    }
    fn accept(&self, _: &ReplyInfo) -> Choice {
        Choice::teacher("test")
    }
    fn allow_tool(&self, _: &ToolInfo) -> Allow {
        Allow::Yes
    }
    fn redact(&self, step: &RedactInfo) -> Result<Option<String>, HookFailed> {
        Ok(Some(step.content.clone()))
    }
    fn label(&self, _: &EpisodeInfo) -> Option<LabelVerdict> {
        None
    }
    fn curate(&self, _: &EpisodeInfo) -> CurateVerdict {
        CurateVerdict {
            use_it: true,
            weight: 1.0,
            reason: String::new(),
        }
    }
    fn schedule(&self, _: &WorldInfo) -> ScheduleVerdict {
        ScheduleVerdict {
            now: false,
            reason: String::new(),
        }
    }
    fn recipe(&self, _: &DatasetInfo) -> Option<RecipeKnobs> {
        None
    }
    fn gate(&self, _: &GateInfo) -> GateVote {
        GateVote::Promote(String::new())
    }
    fn rollback(&self, _: &LiveInfo) -> Option<(bool, String)> {
        None
    }
}

pub fn act_tool() -> ToolSpec {
    ToolSpec {
        name: "act".into(),
        description: "Move the robot.".into(),
        parameters: json!({"type": "object", "properties": {"action": {"type": "string", "enum": ["left", "right", "wait"]}}, "required": ["action"]}),
        ..ToolSpec::default()
    }
}

/// An episode with a user turn and one `act` call a pair `(action, result)`, played by the teacher.
pub fn episode(
    number: u64,
    task: &str,
    told: &str,
    moves: &[(&str, &str)],
    status: Status,
) -> Episode {
    let mut steps = vec![Step {
        index: 1,
        source: Source::User,
        message: Some(Content::Text(told.into())),
        ..Step::default()
    }];
    for (n, (action, result)) in moves.iter().enumerate() {
        let id = format!("call_{n}");
        steps.push(Step {
            index: n as u32 + 2,
            source: Source::Agent,
            actor: Actor::Teacher,
            tool_calls: vec![ToolCall {
                id: id.clone(),
                name: "act".into(),
                arguments: json!({"action": action}),
                ..ToolCall::default()
            }],
            observations: vec![Observation {
                call_id: Some(id),
                content: Some(Content::Text((*result).into())),
                ..Observation::default()
            }],
            ..Step::default()
        });
    }
    Episode {
        schema: SCHEMA.into(),
        episode_id: EpisodeId::new(number, 1),
        task: Task {
            id: task.into(),
            domain: "line".into(),
            ..Task::default()
        },
        tools: vec![act_tool()],
        steps,
        outcome: Some(Outcome {
            status,
            ..Outcome::default()
        }),
        closed: true,
        ..Episode::default()
    }
}

/// What the robot sees with the star `ahead` places to its right and `behind` places of floor to its left.
pub fn sight(ahead: i32, behind: i32) -> String {
    format!("See: gold star {ahead} right; grey stone here. wall {behind} left.")
}

/// Plays `actions` on a line of nine places from place `start`; the star lies at place 8.
pub fn line(number: u64, start: i32, actions: &[&str]) -> Episode {
    let mut place = start;
    let mut moves: Vec<(&str, String)> = Vec::new();
    for action in actions {
        place += match *action {
            "left" if place > 0 => -1,
            "right" => 1,
            _ => 0,
        };
        if place == 8 {
            moves.push((action, "Goal reached.".into()));
            break;
        }
        moves.push((action, sight(8 - place, place)));
    }
    let status = if place == 8 {
        Status::Success
    } else {
        Status::Failure
    };
    let told = format!("Goal: reach the gold star.\n{}", sight(8 - start, start));
    let moves: Vec<(&str, &str)> = moves.iter().map(|(a, r)| (*a, r.as_str())).collect();
    episode(number, &format!("line-{number}"), &told, &moves, status)
}

/// A teacher that goes right, left or nowhere by chance (chance of right 0.5): some of its episodes succeed.
pub fn wanderers(count: u64) -> Vec<Episode> {
    let mut random = 12345u64;
    let mut next = move || {
        random = random
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        random >> 33
    };
    (0..count)
        .map(|number| {
            let start = (next() % 6) as i32;
            let actions: Vec<&str> = (0..12)
                .map(|_| ["right", "right", "left", "wait"][(next() % 4) as usize])
                .collect();
            line(number + 1, start, &actions)
        })
        .collect()
}

/// What the robot sees on a road of two lanes: the star's distance, a stone's, and the wall behind.
fn road(x: i32, lane: i32, stone: i32) -> String {
    let aside = |other: i32| if other == lane { "" } else { " 1 aside" };
    let mut seen = format!("See: gold star {} right{}", 8 - x, aside(0));
    if stone > x {
        seen += &format!("; grey stone {} right{}", stone - x, aside(0));
    }
    format!("{seen}. wall {} left.", x + 1)
}

/// Episodes of a teacher that goes right (chance 0.6), changes lanes or waits. The star lies in lane 0, in half of the episodes
/// behind a stone that one cannot pass but in lane 1.
pub fn road_walkers(count: u64) -> Vec<Episode> {
    let mut random = crate::kernels::Random::new(7);
    (1..=count)
        .map(|number| {
            let stone = match random.below(2) {
                0 => -1,
                _ => 3 + random.below(4) as i32,
            };
            let (mut x, mut lane) = (random.below(3) as i32, 0);
            let told = format!("Goal: reach the gold star.\n{}", road(x, lane, stone));
            let mut moves: Vec<(&str, String)> = Vec::new();
            for _ in 0..14 {
                let action = ["right", "right", "right", "lane", "wait"][random.below(5)];
                match action {
                    "right" if (x + 1, lane) != (stone, 0) && x < 8 => x += 1,
                    "lane" if (x, 1 - lane) != (stone, 0) => lane = 1 - lane,
                    _ => {}
                }
                if (x, lane) == (8, 0) {
                    moves.push((action, "Goal reached.".into()));
                    break;
                }
                moves.push((action, road(x, lane, stone)));
            }
            let status = match (x, lane) {
                (8, 0) => Status::Success,
                _ => Status::Failure,
            };
            let moves: Vec<(&str, &str)> = moves.iter().map(|(a, r)| (*a, r.as_str())).collect();
            episode(number, &format!("road-{number}"), &told, &moves, status)
        })
        .collect()
}
