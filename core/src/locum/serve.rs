//! The path of a step: who plays it, and the student's answer. Every failure here ends in "ask the teacher".

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use serde_json::{json, Value};

use super::fast::key;
use super::record::{LastAnswer, Plays, Shadow};
use super::{
    Answer, AnswerError, Decision, EpisodeHandle, Error, Inner, Locum, Pin, Polled, ReasonCode,
    Request,
};
use crate::calls::{CallFormat, GrammarOptions};
use crate::chat::{render_sample, Memo};
use crate::episode::{Actor, DecisionRecord, Task, TokenIds, ToolSpec};
use crate::formats::steps_from_messages;
use crate::generate::{Finish, GenerateError, Generated, Job, Student, Ticket};
use crate::limits;
use crate::policy::{Allow, Choice, ReplyInfo, StepInfo, StudentInfo, ToolInfo, Who};
use crate::store::prompt_digest;

/// Tool formats kept compiled; hosts use few tool sets.
const MAX_FORMATS: usize = 64;
/// Calls in one reply of a student.
const MAX_PARALLEL_CALLS: usize = 1;

type Refusal = (ReasonCode, String);

/// What a step is to be played by.
struct Offer {
    student: Arc<Student>,
    stage: &'static str,
    code: ReasonCode,
}

/// A generation, running or done. Cloning shares it.
#[derive(Clone)]
pub struct Call {
    inner: Arc<Inner>,
    episode: crate::episode::EpisodeId,
    task: Task,
    student: Arc<Student>,
    format: Arc<CallFormat>,
    ticket: Ticket,
    prompt_ids: Arc<Vec<u32>>,
    result: Arc<OnceLock<Result<Answer, AnswerError>>>,
}

impl Locum {
    /// Who plays this step? Never fails and never waits: whatever goes wrong, the teacher is asked and the reason says why.
    pub fn decide(&self, episode: &EpisodeHandle, request: &Request) -> Decision {
        let started = Instant::now();
        let outcome = self.inner.offer(episode, request, true);
        let decided_ns = started.elapsed().as_nanos() as u64;
        let (who, reason, code, student) = match outcome {
            Ok((offer, choice)) => (Who::Student, choice.reason, offer.code, Some(offer.student)),
            Err((code, reason)) => (Who::Teacher, reason, code, None),
        };
        let decision = Decision {
            who,
            reason_code: code,
            version: student.as_ref().map_or(0, |s| s.version),
            confidence: student
                .as_ref()
                .and_then(|s| s.held_out_exact)
                .unwrap_or(0.0) as f32,
            student: student.map(|s| s.id.clone()),
            reason,
            decided_ns,
        };
        let mut episodes = self
            .inner
            .episodes
            .lock()
            .unwrap_or_else(|e| e.into_inner());
        if let Some(open) = episodes.get_mut(&episode.0) {
            open.decision = Some(DecisionRecord {
                served: if who == Who::Student {
                    Actor::Student
                } else {
                    Actor::Teacher
                },
                deferred: false,
                reason: decision.reason.clone(),
                student: decision.student.clone(),
                confidence: (decision.confidence > 0.0).then_some(decision.confidence),
                policy: Some(self.inner.loaded().id.name.clone()),
            });
        }
        decision
    }

    /// Starts the student's answer and returns at once.
    ///
    /// # Errors
    /// [`Error::Teacher`] with the reason where no student can even begin; the host then asks its teacher.
    pub fn generate(&self, episode: &EpisodeHandle, request: &Request) -> Result<Call, Error> {
        self.inner.check_open()?;
        let (offer, choice) = self
            .inner
            .offer(episode, request, false)
            .map_err(|(_, why)| Error::Teacher { reason: why })?;
        let (task, _) = self
            .inner
            .of_episode(episode, request)
            .map_err(|(_, why)| Error::Teacher { reason: why })?;
        let prepared = self
            .inner
            .prepare(&offer.student, &task, request)
            .map_err(|(_, why)| Error::Teacher { reason: why })?;
        let engine = self.inner.engine.as_ref().ok_or(Error::NoModel)?;
        let deadline_ms = if request.deadline_ms == 0 {
            limits::DEFAULT_DEADLINE_MS
        } else {
            request.deadline_ms
        };
        let max_tokens = match choice.max_tokens.unwrap_or(request.max_tokens) as usize {
            0 => limits::DEFAULT_REPLY_TOKENS,
            n => n.min(limits::MAX_REPLY_TOKENS),
        };
        let ticket = engine.submit(Job {
            student: offer.student.clone(),
            key: key(episode.0),
            prompt_ids: prepared.prompt_ids.clone(),
            grammar: Some(prepared.grammar),
            avoid: prepared.avoid,
            max_tokens,
            deadline: Instant::now() + Duration::from_millis(deadline_ms as u64),
            temperature: choice.temperature.unwrap_or(request.temperature).max(0.0),
            seed: request.seed,
            fast_weights: self.inner.learns(episode.0, &offer.student),
            fast_rule: self.inner.fast_rule(&offer.student, &task),
            background: false,
        });
        Ok(Call {
            inner: self.inner.clone(),
            episode: episode.0,
            task,
            student: offer.student,
            format: prepared.format,
            ticket,
            prompt_ids: Arc::new(prepared.prompt_ids),
            result: Arc::default(),
        })
    }
}

struct Prepared {
    format: Arc<CallFormat>,
    prompt_ids: Vec<u32>,
    grammar: crate::chat::Grammar,
    avoid: Option<String>,
}

impl Inner {
    /// The student that may play this step, with the policy's word on it, or why the teacher does.
    fn offer(
        &self,
        episode: &EpisodeHandle,
        request: &Request,
        first: bool,
    ) -> Result<(Offer, Choice), Refusal> {
        if self.check_open().is_err() {
            return Err((ReasonCode::Closed, "Locum is closed".into()));
        }
        let (task, turn) = self.of_episode(episode, request)?;
        let scope = self.scope_of(episode);
        let loaded = self.loaded();
        let mut shadow = None;
        let offer = {
            let mut serving = self.swap.serving();
            match serving.pin {
                Pin::Teacher => return Err((ReasonCode::Pinned, "pinned to the teacher".into())),
                Pin::Base | Pin::Student(_) => {
                    let student = serving.pinned.clone().ok_or((
                        ReasonCode::NoStudent,
                        "the pinned student is gone".to_string(),
                    ))?;
                    if student.version > 0 && student.scope != scope {
                        return Err((
                            ReasonCode::NoStudent,
                            "the pinned student belongs to another scope".into(),
                        ));
                    }
                    Offer {
                        student,
                        stage: "pinned",
                        code: ReasonCode::Pinned,
                    }
                }
                Pin::Automatic => {
                    let mut episodes = self.episodes.lock().unwrap_or_else(|e| e.into_inner());
                    let open = episodes
                        .get_mut(&episode.0)
                        .ok_or((ReasonCode::BadRequest, "this episode has ended".to_string()))?;
                    let fresh = open.plays.is_none();
                    let plays = open
                        .plays
                        .get_or_insert_with(|| self.plays(episode.0, &scope, &serving))
                        .clone();
                    drop(episodes);
                    let own = |student: &Student| student.scope == scope;
                    let begun = serving.trial.as_mut().filter(|t| fresh && own(&t.student));
                    if let Some(trial) = begun {
                        trial.begin(episode.0);
                    }
                    if let Some(trial) = serving
                        .trial
                        .as_ref()
                        .filter(|t| t.record.stage == "shadow" && own(&t.student))
                    {
                        if first && plays == Plays::Teacher && serving.shadows.len() < 64 {
                            shadow = Some(trial.student.clone());
                        }
                    }
                    let trial = serving.trial.as_ref().filter(|t| own(&t.student));
                    match plays {
                        Plays::Candidate(version) => {
                            let student = trial
                                .filter(|t| t.record.version == version)
                                .map(|t| t.student.clone());
                            // The candidate may have been promoted while its episode was running.
                            let student = student.or_else(|| {
                                serving.current.clone().filter(|s| s.version == version)
                            });
                            match student {
                                Some(student) => Offer {
                                    student,
                                    stage: "canary",
                                    code: ReasonCode::CanaryStudent,
                                },
                                None => {
                                    return Err((
                                        ReasonCode::NoStudent,
                                        "the candidate is no longer on trial".into(),
                                    ))
                                }
                            }
                        }
                        Plays::Current(version) => {
                            let student = serving.current.clone().filter(|s| s.version == version);
                            if let Some(watch) = serving.watch.as_mut() {
                                watch.steps += first as u64;
                            }
                            match student {
                                Some(student) => Offer {
                                    student,
                                    stage: "promoted",
                                    code: ReasonCode::Promoted,
                                },
                                None => {
                                    return Err((
                                        ReasonCode::NoStudent,
                                        "the student was taken back".into(),
                                    ))
                                }
                            }
                        }
                        Plays::Teacher => {
                            let (code, why) = match (
                                trial.map(|t| t.record.stage.as_str()),
                                serving.current.as_ref().map(|s| own(s)),
                                &serving.trouble,
                            ) {
                                (Some("shadow"), ..) => (
                                    ReasonCode::Shadow,
                                    "a candidate watches in shadow".to_string(),
                                ),
                                (Some(_), ..) => (
                                    ReasonCode::CanaryTeacher,
                                    "the teacher's side of a canary".to_string(),
                                ),
                                (None, Some(true), _) => (
                                    ReasonCode::Policy,
                                    "the teacher keeps a share of the episodes".to_string(),
                                ),
                                (None, Some(false), _) => (
                                    ReasonCode::NoStudent,
                                    "the promoted student belongs to another scope".to_string(),
                                ),
                                (None, None, Some(trouble)) => {
                                    (ReasonCode::NoStudent, trouble.clone())
                                }
                                (None, None, None) if self.base.is_none() => (
                                    ReasonCode::NoStudent,
                                    "no base model is imported".to_string(),
                                ),
                                (None, None, None) => {
                                    (ReasonCode::NoStudent, "no student is promoted".to_string())
                                }
                            };
                            drop(serving);
                            if let Some(student) = shadow {
                                self.start_shadow(episode, &student, &task, request);
                            }
                            return Err((code, why));
                        }
                    }
                }
            }
        };
        if offer.stage != "pinned" && offer.student.view != loaded.view {
            return Err((
                ReasonCode::ViewMismatch,
                format!(
                    "student {} learned under another view than the policy's",
                    offer.student.version
                ),
            ));
        }
        let known = request
            .tools
            .iter()
            .filter(|t| offer.student.tool_names.contains(&t.name))
            .count();
        let novelty = if request.tools.is_empty() {
            0.0
        } else {
            1.0 - known as f32 / request.tools.len() as f32
        };
        let live = {
            let serving = self.swap.serving();
            let wins =
                |l: &[(bool, u64)]| (l.iter().filter(|x| x.0).count() as f64, l.len() as u64);
            match (&serving.watch, offer.stage) {
                (Some(watch), "promoted") => wins(&watch.record.live),
                _ => match &serving.trial {
                    Some(trial) if offer.stage == "canary" => {
                        let summary = trial.canary.summary();
                        (summary.student_successes as f64, summary.student_episodes)
                    }
                    _ => (0.0, 0),
                },
            }
        };
        let choice = loaded.policy.decide(&StepInfo {
            task: task.id.clone(),
            domain: task.domain.clone(),
            turn,
            tools: request.tools.iter().map(|t| t.name.clone()).collect(),
            prompt_bytes: request.messages.iter().map(content_bytes).sum(),
            novelty,
            deadline_ms: request.deadline_ms,
            student: Some(StudentInfo {
                id: offer.student.id.clone(),
                version: offer.student.version,
                live_success: (live.1 > 0).then(|| live.0 / live.1 as f64),
                live_episodes: live.1,
                held_out_exact: offer.student.held_out_exact,
            }),
            stage: offer.stage.into(),
        });
        match choice.who {
            Who::Student => {
                self.format(&request.tools, &offer.student)?;
                Ok((offer, choice))
            }
            Who::Teacher => Err((ReasonCode::Policy, choice.reason)),
        }
    }

    /// Whom the episode belongs to.
    fn scope_of(&self, episode: &EpisodeHandle) -> String {
        let episodes = self.episodes.lock().unwrap_or_else(|e| e.into_inner());
        episodes
            .get(&episode.0)
            .map_or_else(String::new, |open| open.scope.clone())
    }

    /// The episode's task, and how many turns its agent has played.
    fn of_episode(
        &self,
        episode: &EpisodeHandle,
        request: &Request,
    ) -> Result<(Task, u32), Refusal> {
        if request.tools.len() > limits::MAX_TOOLS {
            return Err((
                ReasonCode::ToolsInexpressible,
                format!(
                    "{} tools are more than the limit of {}",
                    request.tools.len(),
                    limits::MAX_TOOLS
                ),
            ));
        }
        let episodes = self.episodes.lock().unwrap_or_else(|e| e.into_inner());
        let open = episodes
            .get(&episode.0)
            .ok_or((ReasonCode::BadRequest, "this episode has ended".to_string()))?;
        let turns = open
            .steps
            .iter()
            .filter(|s| s.source == crate::episode::Source::Agent)
            .count();
        Ok((open.task.clone(), turns as u32))
    }

    /// The compiled notation of a tool set. A set that has none is remembered too; whether its grammar compiles is tried once,
    /// so that the decision, and not only the generation, can say so.
    fn format(&self, tools: &[ToolSpec], student: &Student) -> Result<Arc<CallFormat>, Refusal> {
        let refusal = |why: String| (ReasonCode::ToolsInexpressible, why);
        let key = serde_json::to_string(tools).expect("tools print");
        if let Some(format) = self
            .formats
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .get(&key)
        {
            return format.clone().map_err(refusal);
        }
        let format = compile(tools, student).map(Arc::new);
        let mut formats = self.formats.lock().unwrap_or_else(|e| e.into_inner());
        if formats.len() >= MAX_FORMATS {
            formats.clear();
        }
        formats.insert(key, format.clone());
        format.map_err(refusal)
    }

    fn prepare(
        &self,
        student: &Student,
        task: &Task,
        request: &Request,
    ) -> Result<Prepared, Refusal> {
        let format = self.format(&request.tools, student)?;
        let steps = steps_from_messages(&request.messages)
            .map_err(|e| (ReasonCode::BadRequest, e.to_string()))?;
        let (prompt_ids, _) = render_sample(
            &student.chat,
            &student.view,
            &format,
            task,
            &steps,
            None,
            &Memo::default(),
        )
        .map_err(|e| (ReasonCode::PromptTooLong, e.to_string()))?;
        let options = GrammarOptions {
            allow_text: request.allow_text,
            max_calls: MAX_PARALLEL_CALLS,
            require_call: !request.allow_text,
        };
        let grammar = format
            .lark(options)
            .map_err(|e| (ReasonCode::ToolsInexpressible, e.to_string()))
            .and_then(|lark| {
                student
                    .chat
                    .grammar(&lark)
                    .map_err(|e| (ReasonCode::ToolsInexpressible, e.to_string()))
            })?;
        let avoid = self
            .loaded()
            .settings
            .serve
            .avoid_repeats
            .then(|| crate::curate::without_effect(&steps))
            .flatten()
            .and_then(|step| format.print_reply(step).ok());
        Ok(Prepared {
            format,
            prompt_ids,
            grammar,
            avoid,
        })
    }

    fn start_shadow(
        &self,
        episode: &EpisodeHandle,
        student: &Arc<Student>,
        task: &Task,
        request: &Request,
    ) {
        let (Some(engine), Ok(prepared)) = (&self.engine, self.prepare(student, task, request))
        else {
            return;
        };
        let ticket = engine.submit(Job {
            student: student.clone(),
            key: key(episode.0),
            prompt_ids: prepared.prompt_ids,
            grammar: Some(prepared.grammar),
            avoid: prepared.avoid,
            max_tokens: limits::DEFAULT_REPLY_TOKENS,
            deadline: Instant::now() + Duration::from_millis(limits::DEFAULT_DEADLINE_MS as u64),
            temperature: 0.0,
            seed: 0,
            fast_weights: self.learns(episode.0, student),
            fast_rule: self.fast_rule(student, task),
            background: true,
        });
        let mut episodes = self.episodes.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(open) = episodes.get_mut(&episode.0) {
            open.shadow = Some(Shadow {
                version: student.version,
                ticket,
                format: prepared.format,
            });
        }
    }
}

fn compile(tools: &[ToolSpec], student: &Student) -> Result<CallFormat, String> {
    let format = CallFormat::new(tools).map_err(|e| e.to_string())?;
    let options = GrammarOptions {
        allow_text: true,
        max_calls: MAX_PARALLEL_CALLS,
        require_call: false,
    };
    let lark = format.lark(options).map_err(|e| e.to_string())?;
    match student.chat.grammar(&lark) {
        Ok(_) => Ok(format),
        Err(error) => Err(format!(
            "the tools {} have no grammar: {error}",
            tools
                .iter()
                .map(|t| t.name.as_str())
                .collect::<Vec<_>>()
                .join(", ")
        )),
    }
}

impl Call {
    /// Number of the call, the subject of its `CallDone` event.
    pub fn number(&self) -> u64 {
        self.ticket.number()
    }

    /// Text that came since the last poll; for tool calls the compact form as it is written.
    pub fn poll(&self) -> Polled {
        let (new_text, done) = self.ticket.poll();
        Polled { new_text, done }
    }

    /// Waits until the answer is there; false if it is not after `timeout`.
    pub fn wait(&self, timeout: Duration) -> bool {
        self.ticket.wait(timeout)
    }

    /// Ends the generation within one token.
    pub fn cancel(&self) {
        self.ticket.cancel();
    }

    /// The answer: parsed, checked against the tool's schema, and passed by the policy's `allow_tool` and `accept`.
    ///
    /// # Errors
    /// [`AnswerError::Teacher`] wherever the host should ask its teacher, [`AnswerError::Running`] before the end.
    pub fn result(&self) -> Result<Answer, AnswerError> {
        if let Some(result) = self.result.get() {
            return result.clone();
        }
        let Some(outcome) = self.ticket.outcome() else {
            return Err(AnswerError::Running);
        };
        self.result
            .get_or_init(|| {
                let result = match outcome {
                    Ok(generated) => self.settle(generated),
                    Err(GenerateError::Cancelled) => return Err(AnswerError::Cancelled),
                    Err(error @ GenerateError::Late { .. }) => {
                        Err((ReasonCode::Late, error.to_string()))
                    }
                    Err(error @ GenerateError::Closed) => {
                        Err((ReasonCode::Closed, error.to_string()))
                    }
                    Err(error @ GenerateError::Drifted { layer, drift }) => {
                        let student = &self.student;
                        self.inner.drifted(self.episode, student, layer, drift);
                        Err((ReasonCode::Drifted, error.to_string()))
                    }
                    Err(error) => Err((ReasonCode::Fault, error.to_string())),
                };
                result.map_err(|(code, reason)| {
                    self.inner.count_deferral(name_of(code));
                    self.defer(&reason);
                    AnswerError::Teacher { reason, code }
                })
            })
            .clone()
    }

    fn defer(&self, reason: &str) {
        if let Some(watch) = self.inner.swap.serving().watch.as_mut() {
            watch.deferrals += 1;
        }
        let mut episodes = self
            .inner
            .episodes
            .lock()
            .unwrap_or_else(|e| e.into_inner());
        if let Some(open) = episodes.get_mut(&self.episode) {
            open.answer = None;
            if let Some(decision) = open.decision.as_mut() {
                decision.deferred = true;
                decision.reason = reason.into();
            }
        }
    }

    fn settle(&self, generated: Generated) -> Result<Answer, (ReasonCode, String)> {
        let refused = |why: String| (ReasonCode::Refused, why);
        let invalid = |why: String| {
            if let Some(open) = self
                .inner
                .episodes
                .lock()
                .unwrap_or_else(|e| e.into_inner())
                .get_mut(&self.episode)
            {
                open.invalid_calls += 1;
            }
            refused(why)
        };
        let policy = self.inner.loaded().policy.clone();
        let reply = self
            .format
            .parse_reply(&generated.text)
            .map_err(|e| invalid(format!("the student's reply is no call: {e}")))?;
        let mut calls = reply.calls;
        for (n, call) in calls.iter_mut().enumerate() {
            self.format
                .validate(call)
                .map_err(|e| invalid(format!("the student's call does not fit its tool: {e}")))?;
            call.id = format!(
                "call_{:x}_{:x}_{n}",
                self.episode_tail(),
                self.ticket.number()
            );
            let info = ToolInfo {
                task: self.task.id.clone(),
                domain: self.task.domain.clone(),
                name: call.name.clone(),
                arguments: call.arguments.clone(),
            };
            if let Allow::No(why) = policy.allow_tool(&info) {
                return Err(refused(format!(
                    "the policy does not allow the call: {why}"
                )));
            }
        }
        let choice = policy.accept(&ReplyInfo {
            task: self.task.id.clone(),
            domain: self.task.domain.clone(),
            text: generated.text.clone(),
            tool_calls: calls.clone(),
            mean_logprob: generated.mean_logprob,
            min_prob: generated.min_prob,
            tokens: generated.reply_ids.len() as u32,
            latency_ms: (generated.queue_ms + generated.prefill_ms + generated.decode_ms) as u32,
        });
        if choice.who == Who::Teacher {
            return Err(refused(format!(
                "the policy does not accept the reply: {}",
                choice.reason
            )));
        }
        let finish_reason = match (&generated.finish, calls.is_empty()) {
            (_, false) => "tool_calls",
            (Finish::Length, true) => "length",
            (_, true) => "stop",
        };
        let mut message = json!({ "role": "assistant", "content": reply.text });
        if !calls.is_empty() {
            message["tool_calls"] = calls
                .iter()
                .map(|c| json!({ "id": c.id, "type": "function", "function": { "name": c.name, "arguments": c.arguments.to_string() } }))
                .collect();
        }
        let answer = Answer {
            message,
            calls,
            text: reply.text,
            finish_reason: finish_reason.into(),
            student: self.student.id.clone(),
            version: self.student.version,
            confidence: generated.confidence,
            mean_logprob: generated.mean_logprob,
            prompt_ids: self.prompt_ids.to_vec(),
            reply_ids: generated.reply_ids,
            cached_tokens: generated.cached_tokens,
            queue_ms: generated.queue_ms,
            prefill_ms: generated.prefill_ms,
            decode_ms: generated.decode_ms,
        };
        let mut episodes = self
            .inner
            .episodes
            .lock()
            .unwrap_or_else(|e| e.into_inner());
        if let Some(open) = episodes.get_mut(&self.episode) {
            open.answer = Some(LastAnswer {
                student: self.student.clone(),
                tokens: TokenIds {
                    prompt: answer.prompt_ids.clone(),
                    reply: answer.reply_ids.clone(),
                },
                digest: prompt_digest(&answer.prompt_ids),
            });
            if let Some(decision) = open.decision.as_mut() {
                decision.confidence = Some(answer.confidence);
            }
        }
        Ok(answer)
    }

    fn episode_tail(&self) -> u32 {
        u32::from_be_bytes(self.episode.0[12..].try_into().expect("an id has 16 bytes"))
    }
}

fn content_bytes(message: &Value) -> usize {
    match message.get("content") {
        Some(Value::String(text)) => text.len(),
        Some(other) => other.to_string().len(),
        None => 0,
    }
}

fn name_of(code: ReasonCode) -> &'static str {
    match code {
        ReasonCode::Late => "late",
        ReasonCode::Refused => "refused",
        ReasonCode::Closed => "closed",
        ReasonCode::Drifted => "drifted",
        _ => "fault",
    }
}
