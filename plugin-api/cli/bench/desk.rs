//! A mail desk for benches: a store of its own that goes away afterwards, episodes that grow, steps through the same door as a host's.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use locum_core::episode::{Actor, Outcome, Status, Task, ToolSpec};
use locum_core::formats::tools_from_json;
use locum_core::locum::{
    Answer, EpisodeHandle, EpisodeStart, Locum, Options, Pin, Request, StepMeta,
};
use locum_core::policy::{Policy, Who};
use locum_lua::{LuaPolicy, PolicyOptions};
use serde_json::{json, Value};

use crate::fail::Fail;
use crate::{load_policy, Place};

/// Longest wait for one answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(120);
/// All that a call can say is listed, so that every answer ends by itself within few tokens, also a random model's.
const LETTERS: [&str; 4] = ["welcome", "reminder", "invoice", "thanks"];
const FILES: [&str; 2] = ["orders", "mail"];

/// A policy that shows the history as it grew.
const TURNS: &str =
    "return { view = { turns = true, goal = 'first', steps_back = 64, max_tokens = 4096 } }";

/// The base model, pinned, on a store that holds nothing else.
pub struct Desk {
    pub locum: Locum,
    tools: Vec<ToolSpec>,
    reply_tokens: u32,
    dir: PathBuf,
}

/// An episode in progress, with the history that its host sends.
pub struct Visit {
    handle: EpisodeHandle,
    messages: Vec<Value>,
    customer: usize,
}

/// One answered step.
pub struct Step {
    pub ms: f64,
    pub answer: Answer,
}

impl Desk {
    pub fn open(args: &super::Args, place: &Place, reply_tokens: u32) -> Result<Self, Fail> {
        let base = args.base_dir(place)?;
        let dir = std::env::temp_dir().join(format!("locum-bench-{}", std::process::id()));
        let policy: Arc<dyn Policy> = match args.turns {
            true => Arc::new(LuaPolicy::from_source(
                TURNS,
                "turns.lua",
                PolicyOptions::default(),
            )?),
            false => load_policy(None)?,
        };
        let locum = Locum::open(Options {
            store_dir: dir.clone(),
            base: Some(base),
            threads: args.threads,
            train_threads: args.threads,
            weights: args.weights.first().copied().unwrap_or_default().into(),
            policy: Some(policy),
            // No job but the one that a bench starts.
            no_learning: true,
            ..Options::default()
        })?;
        locum.use_student_here(Pin::Base)?;
        let one_of = |words: &[&str]| json!({ "type": "string", "enum": words });
        let tool = |name: &str, about: &str, field: &str, kind: Value| {
            let parameters =
                json!({ "type": "object", "properties": { field: kind }, "required": [field] });
            json!({ "type": "function", "function": { "name": name, "description": about, "parameters": parameters } })
        };
        let tools = json!([
            tool("lookup", "Look the customer up.", "file", one_of(&FILES)),
            tool("send", "Send a letter.", "letter", one_of(&LETTERS)),
        ]);
        Ok(Self {
            locum,
            tools: tools_from_json(&tools)?,
            reply_tokens,
            dir,
        })
    }

    /// Begins an episode with the customer of this number.
    pub fn visit(&self, customer: usize) -> Result<Visit, Fail> {
        let handle = self.locum.begin(EpisodeStart {
            task: Task {
                id: format!("customer-{customer}"),
                ..Task::default()
            },
            tools: self.tools.clone(),
            ..EpisodeStart::default()
        })?;
        let mut visit = Visit {
            handle,
            messages: Vec::new(),
            customer,
        };
        let order = format!("Customer {customer}: send the letters they wait for, one by one.");
        for (role, content) in [("system", "You work at a mail desk."), ("user", &order)] {
            self.add(
                &mut visit,
                json!({ "role": role, "content": content }),
                Actor::Human,
            )?;
        }
        Ok(visit)
    }

    /// The next step as a host would ask for it.
    pub fn request(&self, visit: &Visit) -> Request {
        Request {
            messages: visit.messages.clone(),
            tools: self.tools.clone(),
            ..Request::default()
        }
    }

    /// Asks who plays; the base is pinned, so the policy is asked, and must say the student.
    pub fn decide(&self, visit: &Visit, request: &Request) -> Result<(), Fail> {
        let decision = self.locum.decide(&visit.handle, request);
        match decision.who {
            Who::Student => Ok(()),
            Who::Teacher => Err(Fail::Missing {
                what: format!("the teacher was chosen: {}", decision.reason),
                next: "This bench times decisions for the student.",
            }),
        }
    }

    /// Lets the student play the next step, then records it with its result, as a host does.
    pub fn step(&self, visit: &mut Visit) -> Result<Step, Fail> {
        let failed = |what: String| Fail::Missing {
            what,
            next: "A bench needs a base model that can answer.",
        };
        let request = Request {
            messages: visit.messages.clone(),
            tools: self.tools.clone(),
            allow_text: false,
            max_tokens: self.reply_tokens,
            deadline_ms: ANSWER_TIMEOUT.as_millis() as u32,
            ..Request::default()
        };
        let began = Instant::now();
        let call = self.locum.generate(&visit.handle, &request)?;
        if !call.wait(ANSWER_TIMEOUT) {
            let seconds = ANSWER_TIMEOUT.as_secs();
            return Err(failed(format!("no answer within {seconds} s")));
        }
        let answer = call.result();
        let ms = began.elapsed().as_secs_f64() * 1e3;
        let answer = answer.map_err(|e| failed(e.to_string()))?;
        // What it answered is its own affair: the history goes on with a call that is always valid, so that all runs read the same.
        self.play(visit, Actor::Student)?;
        Ok(Step { ms, answer })
    }

    /// A whole episode by the teacher, recorded as a success.
    pub fn teach(&self, customer: usize) -> Result<(), Fail> {
        let mut visit = self.visit(customer)?;
        for _ in 0..4 {
            self.play(&mut visit, Actor::Teacher)?;
        }
        let outcome = Outcome {
            status: Status::Success,
            ..Outcome::default()
        };
        Ok(self.locum.end(&visit.handle, outcome)?)
    }

    /// Forgets an episode.
    pub fn leave(&self, visit: Visit) -> Result<(), Fail> {
        Ok(self.locum.drop_episode(&visit.handle)?)
    }

    /// Adds the next call of the desk's routine and what came of it.
    fn play(&self, visit: &mut Visit, actor: Actor) -> Result<(), Fail> {
        let (customer, turn) = (visit.customer, visit.messages.len() / 2);
        let letter = LETTERS[(customer + turn) % LETTERS.len()];
        let (name, arguments, result) = match turn % 2 {
            1 => (
                "lookup",
                json!({ "file": FILES[turn / 2 % FILES.len()] }),
                format!(
                    "customer {customer} waits for: {}",
                    LETTERS[(customer + turn + 1) % LETTERS.len()]
                ),
            ),
            _ => (
                "send",
                json!({ "letter": letter }),
                format!("letter {turn} sent: {letter}"),
            ),
        };
        let id = format!("call-{turn}");
        let call = json!({ "id": id, "type": "function", "function": { "name": name, "arguments": arguments.to_string() } });
        self.add(
            visit,
            json!({ "role": "assistant", "content": null, "tool_calls": [call] }),
            actor,
        )?;
        self.add(
            visit,
            json!({ "role": "tool", "tool_call_id": id, "content": result }),
            actor,
        )
    }

    fn add(&self, visit: &mut Visit, message: Value, actor: Actor) -> Result<(), Fail> {
        let meta = StepMeta {
            actor,
            ..StepMeta::default()
        };
        self.locum.message(&visit.handle, &message, meta)?;
        visit.messages.push(message);
        Ok(())
    }
}

impl Drop for Desk {
    fn drop(&mut self) {
        let _ = self.locum.close(Duration::from_secs(10));
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}
