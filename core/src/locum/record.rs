//! Recording: an episode begins, messages come, it ends. Nothing here waits for the disk but the end.

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use super::{now_ms, random_bits, EpisodeHandle, EpisodeStart, Error, Locum, StepMeta};
use crate::episode::{
    Actor, Content, DecisionRecord, Episode, EpisodeId, Outcome, Provenance, Source, Step, Task,
    TokenIds, Usage, SCHEMA,
};
use crate::formats::{attach, outline, outline_of, piece_from_message, Piece};
use crate::generate::{Student, Ticket};
use crate::limits;
use crate::secrets::{find, Cleaner};
use crate::store::{Record, Redact, StoreError};

/// How long the end of an episode may wait for the disk.
const END_TIMEOUT: Duration = Duration::from_secs(30);

/// Who plays a whole episode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Plays {
    Teacher,
    /// The candidate of this version, in its canary.
    Candidate(u64),
    /// The promoted student of this version.
    Current(u64),
}

/// What is kept of an episode that has not ended.
pub(super) struct Open {
    pub task: Task,
    pub scope: String,
    /// Outlines: who spoke and which calls were made. Boxed, so that a growing list moves pointers and a host never waits for more.
    #[allow(clippy::vec_box)]
    pub steps: Vec<Box<Step>>,
    pub bytes: usize,
    /// Why something of it was lost, as long as that could not be recorded either.
    pub lost: Option<String>,
    /// Settled at the first decision and kept to the end.
    pub plays: Option<Plays>,
    /// Steps that somebody else than `plays` had to take over.
    pub deferred: u32,
    pub invalid_calls: u32,
    /// The last answer of a student, to be joined with the step the host records for it.
    pub answer: Option<LastAnswer>,
    pub decision: Option<DecisionRecord>,
    /// What a candidate in shadow would say to the step the teacher is about to play.
    pub shadow: Option<Shadow>,
    /// Whether students learn while they read it: as the policy says, unless the host has switched that off or it went wrong.
    pub learns: bool,
}

pub(super) struct LastAnswer {
    pub student: Arc<Student>,
    pub tokens: TokenIds,
    pub digest: String,
}

pub(super) struct Shadow {
    pub version: u64,
    pub ticket: Ticket,
    pub format: std::sync::Arc<crate::calls::CallFormat>,
}

impl Locum {
    /// Begins an episode.
    ///
    /// # Errors
    /// [`Error::Limit`] for a name that is too long, [`Error::Store`] if the queue is full or the disk refuses.
    pub fn begin(&self, start: EpisodeStart) -> Result<EpisodeHandle, Error> {
        self.inner.check_open()?;
        for name in [
            &start.task.id,
            &start.task.domain,
            &start.agent.name,
            &start.scope,
        ] {
            if name.len() > limits::MAX_NAME_BYTES {
                return Err(Error::Limit {
                    what: "bytes of a name",
                    found: name.len(),
                    limit: limits::MAX_NAME_BYTES,
                });
            }
        }
        let now = now_ms();
        let id = EpisodeId::new(now, random_bits());
        let mut task = start.task;
        // Names go further than the record (outcomes of a trial, the policy's reasons), so they are cleaned at once.
        let mut names = Cleaner::new(self.inner.store.detect());
        names.name(&mut task.id);
        names.name(&mut task.domain);
        task.group_key.as_mut().map(|key| names.name(key));
        let episode = Episode {
            schema: SCHEMA.into(),
            episode_id: id,
            session_id: start.session_id,
            task,
            agent: start.agent,
            tools: start.tools,
            started_at_ms: now,
            provenance: Provenance {
                source_format: "live".into(),
                ..Provenance::default()
            },
            extra: start.extra,
            scope: start.scope,
            ..Episode::default()
        };
        let open = Open {
            task: episode.task.clone(),
            scope: episode.scope.clone(),
            steps: Vec::new(),
            bytes: 0,
            lost: None,
            plays: None,
            deferred: 0,
            invalid_calls: 0,
            answer: None,
            decision: None,
            shadow: None,
            learns: true,
        };
        self.put(Record::Begin(Box::new(episode)))?;
        self.inner
            .episodes
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .insert(id, open);
        Ok(EpisodeHandle(id))
    }

    /// Records one OpenAI chat message of the episode. Copies; does not wait for the disk. Detectors and the policy's `redact` run on
    /// the writer thread, before anything is written.
    ///
    /// # Errors
    /// [`Error::Argument`] for a message that is none, [`Error::Limit`], [`Error::NotFound`] for an episode that has ended, and
    /// [`Error::Store`] if the queue is full; the episode is then marked incomplete and will not train.
    pub fn message(
        &self,
        episode: &EpisodeHandle,
        message: &Value,
        meta: StepMeta,
    ) -> Result<(), Error> {
        self.inner.check_open()?;
        let id = episode.0;
        let piece = piece_from_message(message).map_err(Error::Argument)?;
        let bytes = size(&piece);
        if bytes > limits::MAX_STEP_BYTES {
            self.mark_lost(id, "a step was larger than the limit".into());
            return Err(Error::Limit {
                what: "bytes of a step",
                found: bytes,
                limit: limits::MAX_STEP_BYTES,
            });
        }
        let mut episodes = self
            .inner
            .episodes
            .lock()
            .unwrap_or_else(|e| e.into_inner());
        let open = episodes.get_mut(&id).ok_or_else(|| Error::NotFound {
            what: format!("open episode {id}"),
        })?;
        if open.bytes + bytes > limits::MAX_EPISODE_BYTES {
            let found = open.bytes + bytes;
            drop(episodes);
            self.mark_lost(id, "the episode grew beyond the limit".into());
            return Err(Error::Limit {
                what: "bytes of an episode",
                found,
                limit: limits::MAX_EPISODE_BYTES,
            });
        }
        open.bytes += bytes;
        let (mut shadow, mut spoke) = (None, None);
        let records = match piece {
            Piece::Step(mut step) => {
                step.index = open.steps.len() as u32 + 1;
                step.started_at_ms = Some(meta.unix_ms.unwrap_or_else(now_ms));
                if step.source == Source::Agent {
                    step.actor = meta.actor;
                    step.model = meta.model.clone();
                    if meta.cost_usd.is_some() || meta.latency_ms.is_some() {
                        step.usage = Some(Usage {
                            cost_usd: meta.cost_usd,
                            latency_ms: meta.latency_ms,
                            ..Usage::default()
                        });
                    }
                    step.decision = open.decision.take();
                    if let Some(answer) =
                        open.answer.take().filter(|_| meta.actor == Actor::Student)
                    {
                        step.weights_id = Some(answer.student.id.clone());
                        spoke = Some(answer.student);
                        step.token_ids = Some(answer.tokens);
                        step.prompt_digest = Some(answer.digest);
                    }
                    if let Some(decision) = step.decision.as_mut() {
                        decision.deferred |=
                            decision.served == Actor::Student && meta.actor == Actor::Teacher;
                        decision.served = meta.actor;
                        open.deferred += decision.deferred as u32;
                    }
                    shadow = open
                        .shadow
                        .take()
                        .map(|s| (s, step.index, step.tool_calls.clone()));
                } else {
                    step.actor = match step.source {
                        Source::System => Actor::Script,
                        _ => Actor::Human,
                    };
                }
                open.steps.push(Box::new(outline(&step)));
                vec![Record::Step {
                    episode: id,
                    step: Box::new(step),
                }]
            }
            Piece::Observation(mut observation) => {
                observation.is_error |= meta.is_error;
                let before = open.steps.len();
                let step = attach(&mut open.steps, outline_of(&observation));
                // A result without any step before it stands on an empty step made for it.
                let mut records = Vec::new();
                if open.steps.len() > before {
                    let mut made = open.steps[before].clone();
                    made.observations.clear();
                    records.push(Record::Step {
                        episode: id,
                        step: made,
                    });
                }
                records.push(Record::Observation {
                    episode: id,
                    step,
                    observation,
                });
                records
            }
        };
        drop(episodes);
        for record in records {
            if let Err(error) = self.inner.put_of(record, spoke.take()) {
                self.mark_lost(id, format!("a step was lost: {error}"));
                return Err(error);
            }
        }
        if let Some((shadow, step, calls)) = shadow {
            self.inner.watch_shadow(id, step, calls, shadow);
        }
        Ok(())
    }

    /// Ends an episode; durable when it returns. On an error the episode stays open, and the call may be repeated.
    ///
    /// # Errors
    /// [`Error::NotFound`] if it has ended, [`Error::Store`] if the outcome is not on the disk.
    pub fn end(&self, episode: &EpisodeHandle, outcome: Outcome) -> Result<(), Error> {
        self.inner.check_open()?;
        let id = episode.0;
        let open = self
            .inner
            .episodes
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .remove(&id);
        let open = open.ok_or_else(|| Error::NotFound {
            what: format!("open episode {id}"),
        })?;
        let status = outcome.status;
        let honest = outcome.integrity.ok;
        let record = Record::Outcome {
            episode: id,
            outcome: Box::new(outcome),
            close: true,
        };
        // Before the outcome, or an episode that lacks a step could be taken for a whole one.
        let mark = || match &open.lost {
            Some(reason) => self.put(Record::Incomplete {
                episode: id,
                reason: reason.clone(),
            }),
            None => Ok(()),
        };
        let flush = || Ok(self.inner.store.flush(END_TIMEOUT)?);
        if let Err(error) = mark()
            .and_then(|()| self.put(record))
            .and_then(|()| flush())
        {
            let episodes = self.inner.episodes.lock();
            episodes.unwrap_or_else(|e| e.into_inner()).insert(id, open);
            return Err(error);
        }
        self.inner.account(id, &open, status, honest);
        self.inner.forget_snapshots(id);
        self.inner.nudge();
        Ok(())
    }

    /// An outcome for an episode that has ended already; the newest counts.
    ///
    /// # Errors
    /// [`Error::NotFound`] if there is no such episode.
    pub fn outcome_later(&self, id: EpisodeId, outcome: Outcome) -> Result<(), Error> {
        self.inner.check_open()?;
        if !self.inner.store.has(id)? {
            return Err(Error::NotFound {
                what: format!("episode {id}"),
            });
        }
        let (status, honest) = (outcome.status, outcome.integrity.ok);
        self.put(Record::Outcome {
            episode: id,
            outcome: Box::new(outcome),
            close: false,
        })?;
        self.inner.store.flush(END_TIMEOUT)?;
        self.inner.account_later(id, status, honest);
        self.inner.nudge();
        Ok(())
    }

    /// Forgets an episode, also on disk.
    pub fn drop_episode(&self, episode: &EpisodeHandle) -> Result<(), Error> {
        self.inner.check_open()?;
        if let Some(trial) = &mut self.inner.swap.serving().trial {
            trial.forget(episode.0);
        }
        self.inner
            .episodes
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .remove(&episode.0);
        self.inner.forget_snapshots(episode.0);
        self.put(Record::Drop { episode: episode.0 })
    }

    fn put(&self, record: Record) -> Result<(), Error> {
        self.inner.put(record)
    }

    /// Marks that something of an open episode was lost. Where the queue is full that is remembered, and recorded before the end.
    fn mark_lost(&self, id: EpisodeId, reason: String) {
        // Not counted as a refusal: the host did not ask for it.
        let marked = self.inner.store.record(Record::Incomplete {
            episode: id,
            reason: reason.clone(),
        });
        if marked.is_err() {
            let mut episodes = self
                .inner
                .episodes
                .lock()
                .unwrap_or_else(|e| e.into_inner());
            if let Some(open) = episodes.get_mut(&id) {
                open.lost = Some(reason);
            }
        }
    }
}

impl super::Inner {
    pub(super) fn put(&self, record: Record) -> Result<(), Error> {
        self.put_of(record, None)
    }

    /// Hands a record over, with the policy's `redact` for the writer thread. The tokens of a step that a student spoke are read
    /// there as the text they stand for, and are not kept if a secret is in it.
    fn put_of(&self, record: Record, spoke: Option<Arc<Student>>) -> Result<(), Error> {
        let mut redact = self.loaded().redact.clone();
        if let Some(student) = spoke {
            let (policy, detect) = (redact, self.store.detect());
            redact = Arc::new(move |record: &mut Record| {
                if let Record::Step { step, .. } = record {
                    let secret = |ids: &[u32]| {
                        let text = student.chat.tokenizer.decode(ids);
                        !find(&text, detect).is_empty()
                    };
                    let tokens = step.token_ids.take();
                    step.token_ids = tokens.filter(|t| !secret(&t.prompt) && !secret(&t.reply));
                }
                policy(record)
            }) as Redact;
        }
        match self.store.record_through(record, Some(redact)) {
            Ok(()) => Ok(()),
            Err(error) => {
                if matches!(error, StoreError::Busy { .. }) {
                    self.busy.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                }
                Err(error.into())
            }
        }
    }
}

fn size(piece: &Piece) -> usize {
    let content = |c: &Option<Content>| match c {
        None => 0,
        Some(Content::Text(text)) => text.len(),
        Some(Content::Parts(parts)) => parts.iter().map(|p| p.to_string().len()).sum(),
    };
    match piece {
        Piece::Step(step) => {
            let calls: usize = step
                .tool_calls
                .iter()
                .map(|c| c.name.len() + c.arguments.to_string().len())
                .sum();
            content(&step.message) + calls + step.reasoning.as_ref().map_or(0, String::len)
        }
        Piece::Observation(observation) => content(&observation.content),
    }
}
