//! What `locum policy check FILE` says about a policy before anybody relies on it.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use locum_core::policy::{
    DatasetInfo, EpisodeInfo, EventInfo, FastInfo, GateInfo, LiveInfo, RedactInfo, ReplyInfo,
    RetainInfo, StepInfo, StepLine, StudentInfo, ToolInfo, WorldInfo,
};
use mlua::Table;
use serde::Serialize;

use crate::convert::{self, Returned};
use crate::hooks::{Failure, Hook};
use crate::sandbox::{Printer, Program, Sandbox, ALLOWED, REMOVED};
use crate::{selftest, start_watchdog, PolicyError, PolicyOptions};

/// The result of [`check`]. `Display` is what the command prints.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    pub name: String,
    /// Sentences that stand in the way: the policy would not be loaded, or a hook fails on a sample.
    pub errors: Vec<String>,
    /// Sentences worth reading; the policy loads all the same.
    pub warnings: Vec<String>,
    pub hooks: Vec<HookReport>,
    /// `passed`, `failed` or `none`.
    pub selftest: String,
    /// What the policy printed while it was checked.
    pub printed: Vec<String>,
}

/// A hook called once with a made-up argument.
#[derive(Clone, Debug, Serialize)]
pub struct HookReport {
    pub hook: String,
    pub present: bool,
    /// What it answered; for an absent hook, that the built-in default applies.
    pub answer: String,
    pub micros: f64,
}

impl Report {
    pub fn is_ok(&self) -> bool {
        self.errors.is_empty()
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(
            f,
            "{}: {}",
            self.name,
            if self.is_ok() { "ok" } else { "not usable" }
        )?;
        for line in &self.errors {
            writeln!(f, "  error: {line}")?;
        }
        for line in &self.warnings {
            writeln!(f, "  warning: {line}")?;
        }
        for hook in &self.hooks {
            match hook.present {
                true => writeln!(
                    f,
                    "  {:<10} {} ({:.0} µs)",
                    hook.hook, hook.answer, hook.micros
                )?,
                false => writeln!(f, "  {:<10} {}", hook.hook, hook.answer)?,
            }
        }
        if !self.selftest.is_empty() {
            writeln!(f, "  selftest   {}", self.selftest)?;
        }
        self.printed
            .iter()
            .try_for_each(|line| writeln!(f, "  printed: {line}"))
    }
}

/// Checks a policy's source: syntax, names that a policy does not have, hooks, what they answer to samples, selftest.
/// Never fails: everything found is in the report.
pub fn check(source: &str, name: &str) -> Report {
    let mut report = Report {
        name: name.into(),
        ..Default::default()
    };
    let printed = Arc::new(Mutex::new(Vec::new()));
    if let Err(error) = examine(source, name, Printer::List(printed.clone()), &mut report) {
        report.errors.push(error.to_string());
    }
    report.printed = std::mem::take(&mut *printed.lock().unwrap_or_else(|e| e.into_inner()));
    report
}

fn examine(
    source: &str,
    name: &str,
    printer: Printer,
    report: &mut Report,
) -> Result<(), PolicyError> {
    let program = Program::compile(source, name, PolicyOptions::default().memory_bytes, printer)?;
    report.warnings = foreign_names(source)
        .into_iter()
        .map(|(line, word)| {
            format!(
                "{}:{line}: `{word}` does not exist in a policy",
                program.name
            )
        })
        .collect();
    let watchdog = start_watchdog(&program.name)?;
    let mut state = Sandbox::new(&program, &watchdog)?;
    convert::declared(&program.name, &state.policy)?;
    report.selftest = match selftest(&state, &program.name) {
        Ok(true) => "passed".into(),
        Ok(false) => "none".into(),
        Err(error) => {
            report.errors.push(error.to_string());
            "failed".into()
        }
    };
    for hook in Hook::ALL {
        let (mut answer, mut micros) = ("absent: the built-in default".to_owned(), 0.0);
        if state.has(hook) {
            let begin = Instant::now();
            let result = sample(&state, hook)
                .and_then(|argument| state.call(hook, argument, 0))
                .and_then(|v| answer_of(hook, v.into()));
            micros = begin.elapsed().as_secs_f64() * 1e6;
            answer = result.unwrap_or_else(|failure| {
                report
                    .errors
                    .push(format!("{}: {}", hook.name(), failure.detail()));
                "failed".into()
            });
        }
        report.hooks.push(HookReport {
            hook: hook.name().into(),
            present: state.has(hook),
            answer,
            micros,
        });
    }
    if report.hooks.iter().all(|hook| !hook.present) {
        report
            .warnings
            .push("the policy has no hook: every built-in default applies".into());
    }
    Ok(())
}

/// An argument like those of a running system.
fn sample(state: &Sandbox, hook: Hook) -> Result<Table, Failure> {
    let lua = state.lua();
    let (task, domain) = ("sample-task".to_owned(), "sample".to_owned());
    let student = StudentInfo {
        id: "0123456789abcdef".into(),
        version: 2,
        live_success: Some(0.8),
        live_episodes: 30,
        held_out_exact: Some(0.7),
    };
    let arguments = serde_json::json!({"query": "blue door", "limit": 3});
    match hook {
        Hook::Decide => convert::argument(
            lua,
            &StepInfo {
                task,
                domain,
                turn: 3,
                tools: vec!["search".into(), "open".into()],
                prompt_bytes: 900,
                novelty: 0.0,
                deadline_ms: 30_000,
                student: Some(student),
                stage: "promoted".into(),
            },
        ),
        Hook::Accept => convert::argument(
            lua,
            &ReplyInfo {
                task,
                domain,
                text: "search(blue door)".into(),
                tool_calls: vec![locum_core::episode::ToolCall {
                    name: "search".into(),
                    arguments,
                    ..Default::default()
                }],
                mean_logprob: -0.05,
                min_prob: 0.9,
                tokens: 6,
                latency_ms: 40,
            },
        ),
        Hook::AllowTool => convert::argument(
            lua,
            &ToolInfo {
                task,
                domain,
                name: "search".into(),
                arguments,
            },
        ),
        Hook::Redact => convert::argument(
            lua,
            &RedactInfo {
                role: "tool".into(),
                tool: Some("search".into()),
                content: "3 results: blue door, red door, a key".into(),
            },
        ),
        Hook::Label | Hook::Curate => convert::argument(
            lua,
            &EpisodeInfo {
                id: "00000000-sample".into(),
                task,
                domain,
                source_format: String::new(),
                teacher: true,
                steps: vec![StepLine {
                    index: 1,
                    source: "agent".into(),
                    call: Some("search{}".into()),
                    ..Default::default()
                }],
                agent_steps: 1,
                status: "success".into(),
                score: Some(1.0),
                ..Default::default()
            },
        ),
        Hook::Schedule => convert::argument(
            lua,
            &WorldInfo {
                episodes: 200,
                successes: 120,
                new_successes: 60,
                new_episodes: 90,
                hours_since_job: Some(5.0),
                has_base: true,
                free_memory_mb: 8000,
                load: 0.5,
                ..Default::default()
            },
        ),
        Hook::Recipe => convert::argument(
            lua,
            &DatasetInfo {
                episodes: 100,
                samples: 600,
                tokens: 120_000,
                target_tokens: 4_000,
                tasks: 60,
                num_hidden_layers: 24,
                threads: 2,
            },
        ),
        Hook::Gate => convert::argument(
            lua,
            &GateInfo {
                stage: "canary".into(),
                candidate: student.id,
                held_out_exact: 0.7,
                held_out_loss: 0.4,
                base_exact: 0.1,
                shadow_agreement: Some(0.7),
                teacher_success: Some(0.8),
                teacher_episodes: 30,
                student_success: Some(0.8),
                student_episodes: 30,
                verdict: "promote".into(),
                reasons: vec!["not worse by more than the margin".into()],
            },
        ),
        Hook::Rollback => convert::argument(
            lua,
            &LiveInfo {
                student: student.id,
                episodes: 40,
                success: 0.8,
                teacher_success: 0.8,
                deferrals: 2,
                steps: 300,
                built_in: false,
            },
        ),
        Hook::FastWeights => convert::argument(
            lua,
            &FastInfo {
                task,
                domain,
                stage: "chunk".into(),
                student: student.id,
                version: student.version,
                position: 768,
                chunk: 256,
                drift: 0.02,
                max_drift: Some(0.1),
                loss: Some(1.1),
                loss_before: Some(1.3),
            },
        ),
        Hook::Retain => convert::argument(
            lua,
            &RetainInfo {
                id: "00000000-sample".into(),
                task,
                domain,
                source_format: "live".into(),
                status: "success".into(),
                age_days: 40.0,
                steps: 12,
                bytes: 24_000,
                ..Default::default()
            },
        ),
        Hook::OnEvent => convert::argument(
            lua,
            &EventInfo {
                kind: "student_swapped".into(),
                subject: student.version,
                detail: serde_json::json!({"why": "sample"}),
                ..Default::default()
            },
        ),
    }
}

fn answer_of(hook: Hook, values: Returned) -> Result<String, Failure> {
    Ok(match hook {
        Hook::Decide => shown(&values.choice("student")?),
        Hook::Accept => shown(&values.choice("keep")?),
        Hook::AllowTool => format!("{:?}", values.allow()?),
        Hook::Redact => values
            .redacted()?
            .map_or("drops the sample".into(), |text| {
                format!("{} bytes", text.len())
            }),
        Hook::Label => values
            .label()?
            .map_or("keeps the host's".into(), |label| shown(&label)),
        Hook::Curate => shown(&values.curate()?),
        Hook::Schedule => shown(&values.schedule()?),
        Hook::Recipe => values
            .recipe()?
            .map_or("the built-in recipe".into(), |knobs| shown(&knobs)),
        Hook::Gate => format!("{:?}", values.gate()?),
        Hook::Rollback => values
            .rollback()?
            .map_or("left to the built-in test".into(), |(back, why)| {
                format!("{back}: {why}")
            }),
        Hook::FastWeights => shown(&values.fast_weights()?),
        Hook::Retain => format!("{:?}", values.retain()?),
        Hook::OnEvent => "noted".into(),
    })
}

/// A verdict as JSON without its absent fields.
fn shown(value: &impl Serialize) -> String {
    let mut json = serde_json::to_value(value).unwrap_or_default();
    if let Some(map) = json.as_object_mut() {
        map.retain(|_, value| !value.is_null());
    }
    json.to_string()
}

/// Uses of names that other Lua hosts have and a policy has not, with their lines. A word counts unless it is a field
/// (`x.os`), a key, or a name that the file itself declares somewhere.
fn foreign_names(source: &str) -> Vec<(u32, String)> {
    let words = words(source);
    let declared: Vec<&str> = words
        .iter()
        .filter(|w| w.declared)
        .map(|w| w.text)
        .collect();
    let mut found = Vec::new();
    for (i, word) in words.iter().enumerate() {
        if word.field || word.key || declared.contains(&word.text) {
            continue;
        }
        if REMOVED.contains(&word.text) {
            found.push((word.line, word.text.to_owned()));
        }
        let members = ALLOWED
            .iter()
            .find(|(library, _)| !library.is_empty() && *library == word.text);
        if let (Some((library, members)), Some(next)) = (members, words.get(i + 1)) {
            if next.field && next.follows && !members.contains(&next.text) {
                found.push((next.line, format!("{library}.{}", next.text)));
            }
        }
    }
    found
}

struct Word<'a> {
    text: &'a str,
    line: u32,
    /// After a dot or colon.
    field: bool,
    /// A field with nothing but the dot between it and the word before.
    follows: bool,
    /// Before a single `=` inside a table constructor or an assignment; or a declared name's own place.
    key: bool,
    /// In a `local` statement, a parameter list or a `for`.
    declared: bool,
}

/// The identifiers of a Lua source, without those in strings and comments.
fn words(source: &str) -> Vec<Word<'_>> {
    let bytes = source.as_bytes();
    let mut words: Vec<Word> = Vec::new();
    let (mut i, mut line) = (0, 1u32);
    // Inside a parameter list, or between `local`/`for` and what ends their names.
    let (mut parameters, mut naming, mut after_function) = (false, false, false);
    let mut previous = b' ';
    while i < bytes.len() {
        let c = bytes[i];
        let skipped = match c {
            b'-' if bytes[i..].starts_with(b"--") => {
                let long = long_bracket(&bytes[i + 2..]).map(|n| n + 2);
                Some(long.unwrap_or_else(|| {
                    bytes[i..]
                        .iter()
                        .position(|b| *b == b'\n')
                        .unwrap_or(bytes.len() - i)
                }))
            }
            b'[' => long_bracket(&bytes[i..]),
            b'"' | b'\'' | b'`' => Some(quoted(&bytes[i..])),
            _ => None,
        };
        if let Some(n) = skipped {
            line += bytes[i..i + n].iter().filter(|b| **b == b'\n').count() as u32;
            i += n;
            continue;
        }
        if c == b'_' || c.is_ascii_alphabetic() {
            let n = bytes[i..]
                .iter()
                .take_while(|b| **b == b'_' || b.is_ascii_alphanumeric())
                .count();
            let text = &source[i..i + n];
            i += n;
            let rest = bytes[i..]
                .iter()
                .position(|b| !b.is_ascii_whitespace())
                .map_or(&b""[..], |n| &bytes[i + n..]);
            match text {
                "local" | "for" => naming = true,
                "in" | "do" => naming = false,
                "function" => (after_function, naming) = (true, naming && previous == b'l'),
                _ => {
                    let field = matches!(previous, b'.' | b':');
                    let key = rest.first() == Some(&b'=')
                        && rest.get(1) != Some(&b'=')
                        && matches!(previous, b'{' | b',' | b';');
                    let follows = field && !words.is_empty();
                    words.push(Word {
                        text,
                        line,
                        field,
                        follows,
                        key,
                        declared: parameters || naming,
                    });
                }
            }
            previous = *text.as_bytes().last().unwrap_or(&b' ');
            continue;
        }
        match c {
            b'\n' => {
                line += 1;
                i += 1;
                continue;
            }
            b'(' if after_function => (parameters, after_function, naming) = (true, false, false),
            b')' => parameters = false,
            b'=' | b';' => naming = false,
            _ => {}
        }
        // `..` joins strings, it does not select a field.
        let double = c == b'.' && bytes.get(i + 1) == Some(&b'.');
        if !c.is_ascii_whitespace() {
            previous = if double { b'~' } else { c };
        }
        i += if double { 2 } else { 1 };
    }
    words
}

/// Length of a long bracket (`[[...]]`, `[=[...]=]`) at the start, if there is one.
fn long_bracket(bytes: &[u8]) -> Option<usize> {
    let level = bytes.get(1..)?.iter().take_while(|b| **b == b'=').count();
    if bytes.first() != Some(&b'[') || bytes.get(level + 1) != Some(&b'[') {
        return None;
    }
    let end: Vec<u8> = [&b"]"[..], &vec![b'='; level][..], b"]"].concat();
    let close = bytes.windows(end.len()).position(|w| w == end);
    Some(close.map_or(bytes.len(), |at| at + end.len()))
}

fn quoted(bytes: &[u8]) -> usize {
    let mut i = 1;
    while i < bytes.len() && bytes[i] != bytes[0] {
        i += if bytes[i] == b'\\' { 2 } else { 1 };
    }
    (i + 1).min(bytes.len())
}
