//! From an episode's steps to the student's prompt.

use super::{focus, GoalPlace, Older, Prompt, ToolsShown, View, ViewError};
use crate::calls::CallFormat;
use crate::episode::{Observation, Source, Step, Task, ToolCall};

/// Tokens left free for what the chat template puts around the texts (roles, begin and end of turn).
const FRAME_TOKENS: usize = 24;
/// Tokens counted for the frame of each turn, where there are several.
const TURN_TOKENS: usize = 16;
/// Longest form of one older turn, in characters; a mail's body has no place there.
const MAX_OLDER_CHARS: usize = 160;
/// What stands where a text was cut.
const CUT: &str = "...";

/// An agent's step and everything that came before the next one.
struct Turn<'a> {
    step: &'a Step,
    answers: Vec<&'a Step>,
}

/// An episode taken apart; nothing is left out yet.
struct Scene<'a> {
    host_system: String,
    goal: String,
    turns: Vec<Turn<'a>>,
    /// What was said before the first turn, less the goal.
    opening: String,
    /// What the student has to answer: the last observation or user message.
    seen: String,
}

impl View {
    /// Renders what the student sees before an agent's step.
    ///
    /// `steps` is everything before that step: the host's history as steps. `count` gives the number of tokens of a text.
    /// Lines in order, each left out if it is empty: `Tools`, `Goal` (if first), `Earlier`, `Last`, `See`, `Goal`, `Focus`;
    /// `Last` and `Focus` say `none` instead. A prompt longer than `max_tokens` sheds its oldest turns first, then the
    /// beginning of the observation, then the focus. The same arguments give the same prompt.
    ///
    /// A view of `turns` writes a user turn for each observation, without labels, and a reply for each step; tools, and a goal that
    /// stands first, are in the first.
    ///
    /// # Errors
    /// [`ViewError::TooLong`] if system, tools and goal alone are longer than `max_tokens`.
    pub fn render(
        &self,
        task: &Task,
        steps: &[Step],
        calls: &CallFormat,
        count: &dyn Fn(&str) -> usize,
    ) -> Result<Prompt, ViewError> {
        let scene = Scene::new(task, steps);
        let mut system = self.system.clone();
        if self.host_system && !scene.host_system.is_empty() {
            if !system.is_empty() {
                system.push_str("\n\n");
            }
            system.push_str(&scene.host_system);
        }
        let limit = self
            .max_tokens
            .saturating_sub(FRAME_TOKENS + if system.is_empty() { 0 } else { count(&system) });
        let observation = strip_label(&scene.seen, "See:");
        let mut chars = observation.chars().count().min(self.observation_chars);
        let mut turns = scene.turns.len().min(self.steps_back);
        let write = |turns: usize, chars: usize, focused: usize| match self.turns {
            true => self.all_turns(&scene, calls, turns, chars, focused),
            false => Prompt {
                user: self.user_turn(&scene, calls, observation, turns, chars, focused),
                ..Prompt::default()
            },
        };
        let size = |prompt: &Prompt| {
            let earlier = prompt.earlier.iter();
            let earlier = earlier.map(|(seen, reply)| count(seen) + count(reply) + TURN_TOKENS);
            earlier.sum::<usize>() + count(&prompt.user)
        };
        let mut prompt = write(turns, chars, self.focus);
        while size(&prompt) > limit && turns > 0 {
            turns -= 1;
            prompt = write(turns, chars, self.focus);
        }
        if size(&prompt) > limit && chars > 0 {
            // The longest end of the observation that fits, by bisection: `fits` characters do, `chars` do not.
            let mut fits = 0;
            while chars - fits > 1 {
                let middle = fits + (chars - fits) / 2;
                if size(&write(turns, middle, self.focus)) <= limit {
                    fits = middle;
                } else {
                    chars = middle;
                }
            }
            prompt = write(turns, fits, self.focus);
        }
        if size(&prompt) > limit {
            prompt = write(turns, 0, 0);
        }
        let found = size(&prompt);
        if found > limit {
            return Err(ViewError::TooLong {
                found: found + self.max_tokens - limit,
                limit: self.max_tokens,
            });
        }
        Ok(Prompt { system, ..prompt })
    }

    /// The last `turns` turns as turns, and `chars` characters of the observation to answer.
    fn all_turns(
        &self,
        scene: &Scene,
        calls: &CallFormat,
        turns: usize,
        chars: usize,
        focused: usize,
    ) -> Prompt {
        let first = scene.turns.len() - turns;
        let goes_first = matches!(self.goal, GoalPlace::First | GoalPlace::Both);
        let goes_last = matches!(self.goal, GoalPlace::Last | GoalPlace::Both);
        let text = |at: usize, chars: usize, focused: usize| {
            let seen = match at.checked_sub(1) {
                Some(before) => scene.turns[before].answer(),
                None => scene.opening.clone(),
            };
            let seen = strip_label(&seen, "See:");
            let goal = format!("Goal: {}", scene.goal);
            let tools = self.tools_text(calls);
            let gap = if tools.contains('\n') { "\n" } else { " " };
            let lines = [
                (at == first && !tools.is_empty()).then(|| format!("Tools:{gap}{tools}")),
                (at == first && goes_first && !scene.goal.is_empty()).then(|| goal.clone()),
                Some(cut_front(seen, chars)).filter(|seen| !seen.is_empty()),
                (goes_last && !scene.goal.is_empty()).then_some(goal),
                (focused > 0).then(|| format!("Focus: {}", self.focus_text(scene, seen, focused))),
            ];
            lines.into_iter().flatten().collect::<Vec<_>>().join("\n")
        };
        let earlier = (first..scene.turns.len()).map(|at| {
            let step = scene.turns[at].step;
            let reply = calls.print_reply(step);
            let reply = reply.unwrap_or_else(|_| said(step, calls, usize::MAX));
            (text(at, self.observation_chars, self.focus), reply)
        });
        Prompt {
            earlier: earlier.collect(),
            user: text(scene.turns.len(), chars, focused),
            ..Prompt::default()
        }
    }

    fn focus_text(&self, scene: &Scene, seen: &str, focused: usize) -> String {
        let clauses = focus(&scene.goal, seen, focused, self.focus_overlap);
        match clauses.is_empty() {
            true => "none".into(),
            false => clauses.join("; "),
        }
    }

    /// The user turn with the last `turns` turns, the last `chars` characters of the observation and `focused` focus clauses.
    fn user_turn(
        &self,
        scene: &Scene,
        calls: &CallFormat,
        observation: &str,
        turns: usize,
        chars: usize,
        focused: usize,
    ) -> String {
        let mut lines: Vec<String> = Vec::new();
        let mut line = |label: &str, text: &str| {
            if !text.is_empty() {
                let gap = if text.contains('\n') && label != "Goal" && label != "See" {
                    "\n"
                } else {
                    " "
                };
                lines.push(format!("{label}:{gap}{text}"));
            }
        };
        line("Tools", &self.tools_text(calls));
        if matches!(self.goal, GoalPlace::First | GoalPlace::Both) {
            line("Goal", &scene.goal);
        }
        let window = &scene.turns[scene.turns.len() - turns..];
        let before_last = &window[..window.len().saturating_sub(1)];
        let whole = &before_last[before_last.len() - before_last.len().min(self.full_steps)..];
        let earlier: Vec<String> = whole
            .iter()
            .map(|turn| {
                let (call, answer) = (said(turn.step, calls, usize::MAX), turn.answer());
                format!(
                    "{call} -> {}",
                    cut_front(strip_label(&answer, "See:"), self.observation_chars)
                )
            })
            .collect();
        line("Earlier", &earlier.join("\n"));
        if scene.turns.is_empty() && self.steps_back > 0 {
            line("Last", "none");
        } else {
            line("Last", &self.last_text(window, calls));
        }
        line("See", &cut_front(observation, chars));
        if matches!(self.goal, GoalPlace::Last | GoalPlace::Both) {
            line("Goal", &scene.goal);
        }
        if focused > 0 {
            line("Focus", &self.focus_text(scene, observation, focused));
        }
        lines.join("\n")
    }

    fn tools_text(&self, calls: &CallFormat) -> String {
        let describe = |(i, tool): (usize, &crate::episode::ToolSpec)| {
            let first = first_sentence(&tool.description);
            match self.tools {
                ToolsShown::Described if !first.is_empty() => {
                    format!("{}: {first}", calls.signature(i))
                }
                _ => calls.signature(i),
            }
        };
        match self.tools {
            ToolsShown::None => String::new(),
            _ => calls
                .tools()
                .iter()
                .enumerate()
                .map(describe)
                .collect::<Vec<_>>()
                .join("\n"),
        }
    }

    fn last_text(&self, window: &[Turn], calls: &CallFormat) -> String {
        let values = self.older == Older::Values && calls.tools().len() == 1;
        let older: Vec<String> = window
            .iter()
            .enumerate()
            .map(|(i, turn)| match self.older {
                Older::Values if values && !turn.step.tool_calls.is_empty() => {
                    let values: Vec<_> = turn
                        .step
                        .tool_calls
                        .iter()
                        .map(|c| calls.print_values(c))
                        .collect();
                    cut_end(&values.join(" "), MAX_OLDER_CHARS)
                }
                // What came back for the last turn is the observation itself.
                Older::CallAndLine if i + 1 < window.len() => {
                    let answer = turn.answer();
                    let first = strip_label(&answer, "See:")
                        .lines()
                        .next()
                        .unwrap_or("")
                        .trim();
                    format!(
                        "{} -> {}",
                        said(turn.step, calls, MAX_OLDER_CHARS),
                        cut_end(first, MAX_OLDER_CHARS)
                    )
                }
                _ => said(turn.step, calls, MAX_OLDER_CHARS),
            })
            .collect();
        older.join(match self.older {
            Older::Values if values => " ",
            Older::CallAndLine => "\n",
            _ => "; ",
        })
    }
}

impl<'a> Scene<'a> {
    fn new(task: &Task, steps: &'a [Step]) -> Self {
        let mut host_system = Vec::new();
        let mut opening: Vec<String> = Vec::new();
        let mut turns: Vec<Turn> = Vec::new();
        for step in steps {
            match step.source {
                Source::System if turns.is_empty() => host_system.push(message(step)),
                Source::Agent => turns.push(Turn {
                    step,
                    answers: Vec::new(),
                }),
                _ => match turns.last_mut() {
                    Some(turn) => turn.answers.push(step),
                    None => opening.push(message(step)),
                },
            }
        }
        let first = if opening.is_empty() {
            String::new()
        } else {
            opening.remove(0)
        };
        let (goal, rest) = split_goal(&task.instruction, &first);
        opening.insert(0, rest);
        opening.retain(|text| !text.is_empty());
        let opening = opening.join("\n");
        let seen = match turns.last() {
            Some(turn) => turn.answer(),
            None => opening.clone(),
        };
        Scene {
            host_system: host_system.join("\n\n"),
            goal,
            turns,
            opening,
            seen,
        }
    }
}

impl Turn<'_> {
    /// What came back: the calls' results (named where there are several), then what the user said.
    fn answer(&self) -> String {
        let results = &self.step.observations;
        let several = results.len() > 1;
        let result = |(i, observation): (usize, &Observation)| {
            let text = result_text(observation);
            match call_of(self.step, observation, i) {
                Some(call) if several => format!("{}: {}", call.name, strip_label(&text, "See:")),
                _ => text,
            }
        };
        let said = self.answers.iter().map(|step| {
            let who = if step.source == Source::System {
                "System"
            } else {
                "User"
            };
            format!("{who}: {}", message(step))
        });
        let all: Vec<String> = results.iter().enumerate().map(result).chain(said).collect();
        all.join("\n")
    }
}

fn message(step: &Step) -> String {
    step.message
        .as_ref()
        .map(|m| m.text().trim().to_string())
        .unwrap_or_default()
}

fn result_text(observation: &Observation) -> String {
    let text = observation
        .content
        .as_ref()
        .map(|c| c.text().trim().to_string())
        .unwrap_or_default();
    let says_so = text
        .get(..5)
        .is_some_and(|start| start.eq_ignore_ascii_case("error"));
    if observation.is_error && !says_so {
        format!("Error: {text}")
    } else {
        text
    }
}

fn call_of<'a>(step: &'a Step, observation: &Observation, i: usize) -> Option<&'a ToolCall> {
    let by_id = observation
        .call_id
        .as_ref()
        .and_then(|id| step.tool_calls.iter().find(|c| c.id == *id));
    by_id.or_else(|| step.tool_calls.get(i))
}

/// The step in the compact notation, at most `max` characters of it. A call that has no compact form (an unknown tool, arguments
/// that are no object) is shown as name and JSON.
fn said(step: &Step, calls: &CallFormat, max: usize) -> String {
    let call = |c: &ToolCall| {
        calls
            .print(c)
            .unwrap_or_else(|_| format!("{}({})", c.name, c.arguments))
    };
    let text = if step.tool_calls.is_empty() {
        format!(
            "{}{}",
            crate::calls::TEXT_PREFIX,
            message(step).replace('\n', " ")
        )
    } else {
        step.tool_calls
            .iter()
            .map(call)
            .collect::<Vec<_>>()
            .join(" ")
    };
    cut_end(&text, max)
}

/// The goal, and what of the first user message is not the goal.
///
/// The goal is the task's instruction if there is one, else a first line `Goal: ...` or `Task: ...` (or the line after it,
/// where the heading stands alone), else the whole message.
fn split_goal(instruction: &str, first: &str) -> (String, String) {
    let instruction = instruction.trim();
    let (line, rest) = first.split_once('\n').unwrap_or((first, ""));
    let heading = ["goal:", "task:", "task description:", "instruction:"]
        .iter()
        .find(|h| {
            line.get(..h.len())
                .is_some_and(|start| start.eq_ignore_ascii_case(h))
        });
    let headed = heading.map(|h| match line[h.len()..].trim() {
        "" => rest.split_once('\n').unwrap_or((rest, "")),
        goal => (goal, rest),
    });
    let (goal, rest) = match (instruction, headed) {
        ("", Some((goal, rest))) => (goal, rest),
        ("", None) => (first, ""),
        (_, Some((_, rest))) => (instruction, rest),
        (_, None) => (
            instruction,
            first.strip_prefix(instruction).unwrap_or(first),
        ),
    };
    (
        strip_label(goal.trim(), "Goal:").to_string(),
        rest.trim().to_string(),
    )
}

fn strip_label<'a>(text: &'a str, label: &str) -> &'a str {
    text.strip_prefix(label).map_or(text, str::trim_start)
}

fn first_sentence(text: &str) -> &str {
    let line = text.trim().lines().next().unwrap_or("");
    line.find(". ")
        .map_or(line, |at| &line[..at])
        .trim_end_matches('.')
}

/// The last `max` characters.
fn cut_front(text: &str, max: usize) -> String {
    match text.chars().count().checked_sub(max) {
        None | Some(0) => text.to_string(),
        Some(_) if max == 0 => String::new(),
        Some(extra) => CUT.chars().chain(text.chars().skip(extra)).collect(),
    }
}

/// The first `max` characters.
fn cut_end(text: &str, max: usize) -> String {
    match text.char_indices().nth(max) {
        Some((at, _)) => format!("{}{CUT}", &text[..at]),
        None => text.to_string(),
    }
}
