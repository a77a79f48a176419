//! The store at its door: exact round trips, full queues and disks, killed processes, several of them at once.

mod limits;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod quiet;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::episode::*;
use crate::secrets::Detect;

const SOON: Duration = Duration::from_secs(20);

fn open(dir: &Path) -> Store {
    // What is made up at random may look like a secret, and is to come back as it was.
    let options = StoreOptions {
        detect: Detect::NONE,
        ..StoreOptions::default()
    };
    Store::open(dir, options).unwrap()
}

fn id(n: u64) -> EpisodeId {
    EpisodeId::new(1_700_000_000_000 + n, u128::from(n))
}

fn begin(n: u64) -> Record {
    Record::Begin(Box::new(Episode {
        schema: SCHEMA.into(),
        episode_id: id(n),
        started_at_ms: n,
        ..Episode::default()
    }))
}

fn step(n: u64, index: u32, text: &str) -> Record {
    let message = Some(Content::Text(text.into()));
    let step = Step {
        index,
        source: Source::Agent,
        actor: Actor::Teacher,
        message,
        ..Step::default()
    };
    Record::Step {
        episode: id(n),
        step: Box::new(step),
    }
}

fn outcome(n: u64, status: Status, close: bool) -> Record {
    Record::Outcome {
        episode: id(n),
        outcome: Box::new(Outcome {
            status,
            ..Outcome::default()
        }),
        close,
    }
}

/// Records although the queue may be full for a while.
fn patiently(store: &Store, record: Record) {
    while store.record(record.clone()).is_err() {
        std::thread::sleep(Duration::from_millis(1));
    }
}

// ---- what is loaded is what was recorded ----

fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        "[a-z]{0,8}",
        "\\PC{0,6}",
        Just("nul\0nl\n\u{1F600}".to_string()),
        Just(String::new())
    ]
}

fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(|b| json!(b)),
        any::<i64>().prop_map(|n| json!(n)),
        any::<u64>().prop_map(|n| json!(n)),
        (-1e300f64..1e300).prop_map(|x| json!(x)),
        (-1.0f64..1.0).prop_map(|x| json!(x)),
        text().prop_map(|t| json!(t)),
    ];
    leaf.prop_recursive(3, 12, 3, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..3).prop_map(Value::Array),
            proptest::collection::vec(("[a-z]{1,4}", inner), 0..3)
                .prop_map(|fields| fields.into_iter().collect()),
        ]
    })
}

fn map() -> impl Strategy<Value = serde_json::Map<String, Value>> {
    proptest::collection::vec(("[@a-z]{1,4}", value()), 0..3)
        .prop_map(|fields| fields.into_iter().collect())
}

fn maybe<T: Strategy>(inner: T) -> impl Strategy<Value = Option<T::Value>>
where
    T::Value: Clone,
{
    proptest::option::of(inner)
}

fn content() -> impl Strategy<Value = Option<Content>> {
    maybe(prop_oneof![
        text().prop_map(Content::Text),
        proptest::collection::vec(value(), 0..3).prop_map(Content::Parts),
    ])
}

fn actor() -> impl Strategy<Value = Actor> {
    proptest::sample::select(vec![
        Actor::Unknown,
        Actor::Teacher,
        Actor::Student,
        Actor::Human,
        Actor::Script,
    ])
}

fn call() -> impl Strategy<Value = ToolCall> {
    (text(), text(), value(), maybe(text()), map()).prop_map(
        |(id, name, arguments, arguments_raw, extra)| ToolCall {
            id,
            name,
            arguments,
            arguments_raw,
            extra,
        },
    )
}

fn observation() -> impl Strategy<Value = Observation> {
    (
        maybe(text()),
        content(),
        any::<bool>(),
        any::<bool>(),
        map(),
    )
        .prop_map(
            |(call_id, content, is_error, truncated, extra)| Observation {
                call_id,
                content,
                is_error,
                truncated,
                extra,
            },
        )
}

fn counterfactual() -> impl Strategy<Value = Counterfactual> {
    (
        actor(),
        maybe(text()),
        proptest::collection::vec(call(), 0..2),
        maybe(text()),
        any::<bool>(),
    )
        .prop_map(
            |(actor, student, tool_calls, message, agrees)| Counterfactual {
                actor,
                student,
                tool_calls,
                message,
                agrees,
            },
        )
}

fn any_step() -> impl Strategy<Value = Step> {
    let said = (
        content(),
        maybe(text()),
        proptest::collection::vec(call(), 0..3),
        proptest::collection::vec(observation(), 0..3),
    );
    let who = (
        proptest::sample::select(vec![Source::System, Source::User, Source::Agent]),
        actor(),
        maybe(text()),
        maybe(text()),
    );
    let usage = (
        maybe(any::<u64>()),
        maybe(any::<u64>()),
        maybe(0.0f64..10.0),
        maybe(any::<u32>()),
    )
        .prop_map(
            |(prompt_tokens, completion_tokens, cost_usd, latency_ms)| Usage {
                prompt_tokens,
                completion_tokens,
                cost_usd,
                latency_ms,
            },
        );
    let ids = proptest::collection::vec(any::<u32>(), 0..5);
    let ids = (ids.clone(), ids).prop_map(|(prompt, reply)| TokenIds { prompt, reply });
    let decision = (
        actor(),
        any::<bool>(),
        text(),
        maybe(text()),
        maybe(0.0f32..1.0),
        maybe(text()),
    )
        .prop_map(
            |(served, deferred, reason, student, confidence, policy)| DecisionRecord {
                served,
                deferred,
                reason,
                student,
                confidence,
                policy,
            },
        );
    let label = (any::<bool>(), 0.0f32..2.0, text()).prop_map(|(train, weight, reason)| Label {
        train,
        weight,
        reason,
    });
    let times = (maybe(any::<u64>()), maybe(any::<u64>()));
    let more = (
        maybe(usage),
        maybe(text()),
        maybe(ids),
        maybe(decision),
        maybe(counterfactual()),
        maybe(label),
        any::<bool>(),
        map(),
    );
    (who, said, times, more).prop_map(|(who, said, times, more)| Step {
        index: 0,
        source: who.0,
        actor: who.1,
        model: who.2,
        weights_id: who.3,
        message: said.0,
        reasoning: said.1,
        tool_calls: said.2,
        observations: said.3,
        started_at_ms: times.0,
        ended_at_ms: times.1,
        usage: more.0,
        prompt_digest: more.1,
        token_ids: more.2,
        decision: more.3,
        counterfactual: more.4,
        label: more.5,
        copied_context: more.6,
        extra: more.7,
    })
}

fn any_outcome() -> impl Strategy<Value = Outcome> {
    let status = proptest::sample::select(vec![
        Status::Success,
        Status::Partial,
        Status::Failure,
        Status::Aborted,
        Status::Unknown,
    ]);
    let criterion =
        (text(), 0.0f64..1.0, any::<bool>(), text()).prop_map(|(id, weight, passed, evidence)| {
            Criterion {
                id,
                weight,
                passed,
                evidence,
            }
        });
    let kind =
        proptest::sample::select(vec![JudgeKind::Host, JudgeKind::Program, JudgeKind::Policy]);
    let judge =
        (kind, text(), text(), any::<bool>()).prop_map(|(kind, name, version, privileged)| Judge {
            kind,
            name,
            version,
            privileged,
        });
    let integrity = (any::<bool>(), proptest::collection::vec(text(), 0..2))
        .prop_map(|(ok, flags)| Integrity { ok, flags });
    let lists = (
        proptest::collection::vec(criterion, 0..2),
        proptest::collection::vec(text(), 0..2),
    );
    (
        status,
        maybe(0.0f64..1.0),
        lists,
        integrity,
        judge,
        maybe(text()),
        map(),
    )
        .prop_map(
            |(status, score, (criteria, tags), integrity, judge, reason, extra)| Outcome {
                status,
                score,
                criteria,
                integrity,
                judge,
                tags,
                reason,
                extra,
            },
        )
}

fn any_episode() -> impl Strategy<Value = Episode> {
    let task = (
        text(),
        text(),
        maybe(text()),
        text(),
        maybe(proptest::sample::select(vec![Split::Train, Split::HeldOut])),
    )
        .prop_map(|(id, domain, group_key, instruction, split)| Task {
            id,
            domain,
            group_key,
            instruction,
            split,
        });
    let tool =
        (text(), text(), value(), map()).prop_map(|(name, description, parameters, extra)| {
            ToolSpec {
                name,
                description,
                parameters,
                extra,
            }
        });
    let provenance = (
        text(),
        maybe(text()),
        maybe(any::<u64>()),
        proptest::collection::vec(text(), 0..2),
    )
        .prop_map(
            |(source_format, source_id, imported_at_ms, redactions)| Provenance {
                source_format,
                source_id,
                imported_at_ms,
                redactions,
            },
        );
    let ids = (
        any::<u128>(),
        maybe(any::<u128>()),
        maybe(any::<u128>()),
        maybe(text()),
    );
    let body = (
        proptest::collection::vec(tool, 0..2),
        proptest::collection::vec(any_step(), 0..4),
        maybe(any_outcome()),
    );
    let times = (
        any::<u64>(),
        maybe(any::<u64>()),
        any::<bool>(),
        any::<bool>(),
    );
    (ids, task, (text(), text()), body, times, provenance, map()).prop_map(
        |(ids, task, agent, body, times, provenance, extra)| {
            let mut steps = body.1;
            for (at, step) in steps.iter_mut().enumerate() {
                step.index = at as u32 + 1;
            }
            let of = |n: u128| EpisodeId(n.to_be_bytes());
            Episode {
                schema: SCHEMA.into(),
                episode_id: of(ids.0),
                parent_id: ids.1.map(of),
                continued_from: ids.2.map(of),
                session_id: ids.3,
                task,
                agent: Agent {
                    name: agent.0,
                    version: agent.1,
                },
                tools: body.0,
                steps,
                outcome: body.2,
                closed: times.2,
                incomplete: times.3,
                started_at_ms: times.0,
                ended_at_ms: times.1,
                provenance,
                extra,
                scope: String::new(),
            }
        },
    )
}

#[test]
fn any_episode_is_loaded_exactly_as_recorded_whole_or_piece_by_piece() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder.path().join("s"));
    let config = ProptestConfig {
        cases: 60,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    proptest::test_runner::TestRunner::new(config)
        .run(&any_episode(), |episode| {
            store
                .record(Record::Begin(Box::new(episode.clone())))
                .unwrap();
            let mut pieces = episode.clone();
            pieces.episode_id =
                EpisodeId((!u128::from_be_bytes(episode.episode_id.0)).to_be_bytes());
            pieces.closed = false;
            let episode_id = pieces.episode_id;
            let start = Episode {
                steps: Vec::new(),
                outcome: None,
                ..pieces.clone()
            };
            store.record(Record::Begin(Box::new(start))).unwrap();
            for step in &pieces.steps {
                let bare = Step {
                    observations: Vec::new(),
                    counterfactual: None,
                    ..step.clone()
                };
                store
                    .record(Record::Step {
                        episode: episode_id,
                        step: Box::new(bare),
                    })
                    .unwrap();
                for observation in step.observations.clone() {
                    store
                        .record(Record::Observation {
                            episode: episode_id,
                            step: step.index,
                            observation,
                        })
                        .unwrap();
                }
                if let Some(value) = step.counterfactual.clone() {
                    store
                        .record(Record::Counterfactual {
                            episode: episode_id,
                            step: step.index,
                            value,
                        })
                        .unwrap();
                }
            }
            if let Some(outcome) = pieces.outcome.clone() {
                store
                    .record(Record::Outcome {
                        episode: episode_id,
                        outcome: Box::new(outcome),
                        close: false,
                    })
                    .unwrap();
            }
            store.flush(SOON).unwrap();
            prop_assert_eq!(store.episode(episode.episode_id).unwrap(), Some(episode));
            prop_assert_eq!(store.episode(episode_id).unwrap(), Some(pieces));
            Ok(())
        })
        .unwrap();
    assert_eq!(store.health().refused, 0, "{:?}", store.health());
}

#[test]
fn numbers_that_are_not_finite_do_not_make_an_episode_unreadable() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder.path().join("s"));
    let mut episode = Episode {
        episode_id: id(1),
        closed: true,
        ..Episode::default()
    };
    let label = Label {
        train: true,
        weight: f32::NAN,
        reason: String::new(),
    };
    let decision = DecisionRecord {
        confidence: Some(f32::INFINITY),
        ..DecisionRecord::default()
    };
    episode.steps = vec![Step {
        index: 1,
        label: Some(label),
        decision: Some(decision),
        ..Step::default()
    }];
    let criterion = Criterion {
        weight: f64::NAN,
        ..Criterion::default()
    };
    episode.outcome = Some(Outcome {
        score: Some(f64::NAN),
        criteria: vec![criterion],
        ..Outcome::default()
    });
    store.record(Record::Begin(Box::new(episode))).unwrap();
    store.flush(SOON).unwrap();
    let back = store.episode(id(1)).unwrap().unwrap();
    assert_eq!(back.steps[0].label.as_ref().unwrap().weight, 0.0);
    assert_eq!(back.steps[0].decision.as_ref().unwrap().confidence, None);
    assert_eq!(back.outcome.unwrap().score, None);
}

// ---- the life of an episode ----

#[test]
fn counts_and_summaries_say_who_answered_and_how_it_ended() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder.path().join("s"));
    for (n, status) in [
        (1, Status::Success),
        (2, Status::Failure),
        (3, Status::Unknown),
    ] {
        store.record(begin(n)).unwrap();
        store.record(step(n, 1, "needle 100%")).unwrap();
        store.record(outcome(n, status, true)).unwrap();
    }
    store.record(begin(4)).unwrap();
    let mut student = step(4, 1, "x");
    if let Record::Step { step, .. } = &mut student {
        step.actor = Actor::Student;
    }
    store.record(student).unwrap();
    store.flush(SOON).unwrap();
    let counts = store.counts(None).unwrap();
    assert_eq!((counts.episodes, counts.open, counts.closed), (4, 1, 3));
    assert_eq!(
        (counts.successes, counts.failures, counts.unknown),
        (1, 1, 1)
    );
    assert_eq!(
        (counts.steps, counts.teacher_steps, counts.student_steps),
        (4, 3, 1)
    );
    assert_eq!(store.counts(Some(3)).unwrap().episodes, 2);

    let ids = |query: &Query| {
        store
            .episodes(query)
            .unwrap()
            .iter()
            .map(|e| e.id)
            .collect::<Vec<_>>()
    };
    assert_eq!(
        ids(&Query {
            closed_only: true,
            newest_first: true,
            limit: Some(2),
            ..Query::default()
        }),
        [id(3), id(2)]
    );
    assert_eq!(
        ids(&Query {
            statuses: vec![Status::Unknown],
            ..Query::default()
        }),
        [id(3), id(4)]
    );
    assert_eq!(
        ids(&Query {
            ids: vec![id(2), id(9)],
            ..Query::default()
        }),
        [id(2)]
    );
    assert_eq!(
        ids(&Query {
            since_ms: Some(2),
            offset: 1,
            ..Query::default()
        }),
        [id(3), id(4)]
    );
    assert_eq!(
        ids(&Query {
            text: Some("NEEDLE 100%".into()),
            ..Query::default()
        }),
        [id(1), id(2), id(3)]
    );
    assert_eq!(
        ids(&Query {
            text: Some("needle_".into()),
            ..Query::default()
        }),
        []
    );
    let summary = &store
        .episodes(&Query {
            ids: vec![id(4)],
            ..Query::default()
        })
        .unwrap()[0];
    assert_eq!(
        (
            summary.steps,
            summary.agent_steps,
            summary.teacher_steps,
            summary.student_steps
        ),
        (1, 1, 0, 1)
    );
}

#[test]
fn a_later_outcome_supersedes_and_the_earlier_ones_stay() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder.path().join("s"));
    store.record(begin(1)).unwrap();
    store.record(outcome(1, Status::Success, true)).unwrap();
    store.record(outcome(1, Status::Failure, false)).unwrap();
    store.flush(SOON).unwrap();
    let history: Vec<Status> = store
        .outcomes(id(1))
        .unwrap()
        .iter()
        .map(|o| o.status)
        .collect();
    assert_eq!(history, [Status::Success, Status::Failure]);
    assert_eq!(
        store
            .episode(id(1))
            .unwrap()
            .unwrap()
            .outcome
            .unwrap()
            .status,
        Status::Failure
    );
    assert_eq!(store.counts(None).unwrap().failures, 1);
}

#[test]
fn records_that_do_not_fit_are_refused_alone_and_mark_their_episode() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder.path().join("s"));
    let check = |record: Record, words: &str| {
        let before = store.health().refused;
        store.record(record).unwrap();
        store.flush(SOON).unwrap();
        let health = store.health();
        assert_eq!(health.refused, before + 1);
        assert!(
            health.last_refusal.as_ref().unwrap().contains(words),
            "{health:?}"
        );
    };
    store.record(begin(1)).unwrap();
    store.record(step(1, 1, "a")).unwrap();
    check(step(7, 1, "a"), "never begun");
    check(begin(1), "begun twice");
    assert!(!store.episode(id(1)).unwrap().unwrap().incomplete);
    check(step(1, 1, "again"), "UNIQUE");
    let observation = Observation::default();
    check(
        Record::Observation {
            episode: id(1),
            step: 9,
            observation,
        },
        "no such step",
    );
    store.record(outcome(1, Status::Success, true)).unwrap();
    check(step(1, 2, "late"), "is closed");
    let episode = store.episode(id(1)).unwrap().unwrap();
    assert!(episode.incomplete && episode.steps.len() == 1);
    store.record(Record::Drop { episode: id(1) }).unwrap();
    store.flush(SOON).unwrap();
    assert_eq!(store.episode(id(1)).unwrap(), None);
    assert_eq!(store.counts(None).unwrap().steps, 0);
}

#[test]
fn documents_are_durable_on_return_and_listed_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("s");
    let store = open(&dir);
    store
        .put_json(JsonTable::Job, "b", &json!({"x": 0.1}))
        .unwrap();
    store.put_json(JsonTable::Job, "a", &json!([1])).unwrap();
    store
        .put_json(JsonTable::Job, "b", &json!({"x": 0.0035475000000000003}))
        .unwrap();
    store.put_json(JsonTable::Event, "b", &json!(null)).unwrap();
    store.put_json(JsonTable::Event, "gone", &json!(1)).unwrap();
    store.delete_json(JsonTable::Event, "gone").unwrap();
    let jobs = store.list_json(JsonTable::Job).unwrap();
    assert_eq!(
        jobs,
        [
            ("b".to_string(), json!({"x": 0.0035475000000000003})),
            ("a".to_string(), json!([1]))
        ]
    );
    assert_eq!(
        store.get_json(JsonTable::Event, "b").unwrap(),
        Some(Value::Null)
    );
    assert_eq!(store.get_json(JsonTable::Event, "gone").unwrap(), None);
    let reader = Store::open(
        &dir,
        StoreOptions {
            read_only: true,
            ..StoreOptions::default()
        },
    )
    .unwrap();
    assert_eq!(reader.list_json(JsonTable::Job).unwrap(), jobs);
    assert!(matches!(reader.record(begin(1)), Err(StoreError::ReadOnly)));
}

// ---- limits ----

#[test]
fn a_full_queue_says_busy_and_loses_nothing_it_accepted() {
    let folder = tempfile::tempdir().unwrap();
    let options = StoreOptions {
        max_queued_records: 8,
        ..StoreOptions::default()
    };
    let store = Store::open(&folder.path().join("s"), options).unwrap();
    store.record(begin(1)).unwrap();
    let (mut accepted, mut busy) = (0u32, 0);
    for _ in 0..5000 {
        match store.record(step(1, accepted + 1, &"x".repeat(2048))) {
            Ok(()) => accepted += 1,
            Err(StoreError::Busy { records, .. }) => {
                assert!(records >= 8);
                busy += 1;
            }
            Err(error) => panic!("{error}"),
        }
    }
    store.flush(SOON).unwrap();
    assert!(busy > 0, "the host is faster than the disk");
    assert_eq!(store.counts(None).unwrap().steps, u64::from(accepted));
    assert_eq!(store.waiting(), (0, 0));
}

#[test]
fn bytes_that_wait_are_bounded_and_a_record_too_large_is_refused_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let options = StoreOptions {
        max_queued_bytes: 3000,
        ..StoreOptions::default()
    };
    let store = Store::open(&folder.path().join("s"), options).unwrap();
    let error = store
        .record(step(1, 1, &"x".repeat((1 << 20) + 1)))
        .unwrap_err();
    assert!(
        matches!(error, StoreError::TooLarge { limit, .. } if limit == 1 << 20),
        "{error}"
    );
    // Larger than the whole queue, but alone in it.
    store.record(begin(1)).unwrap();
    store.flush(SOON).unwrap();
    store.record(step(1, 1, &"x".repeat(10_000))).unwrap();
    store.flush(SOON).unwrap();
    assert_eq!(store.counts(None).unwrap().steps, 1);
}

#[test]
fn a_full_disk_is_told_while_recording_goes_on_and_a_close_counts_what_is_lost() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("s");
    let options = StoreOptions {
        max_disk_bytes: 256 << 10,
        ..StoreOptions::default()
    };
    let store = Store::open(&dir, options).unwrap();
    store.record(begin(1)).unwrap();
    store.flush(SOON).unwrap();
    for index in 1..=200 {
        store.record(step(1, index, &"x".repeat(4096))).unwrap();
    }
    let error = store.flush(SOON).unwrap_err();
    assert!(matches!(error, StoreError::Full { .. }), "{error}");
    assert!(matches!(
        store.put_json(JsonTable::Job, "j", &json!("x".repeat(100_000))),
        Err(StoreError::Full { .. })
    ));
    let health = store.health();
    assert!(health.failed_commits > 0 && health.failing.is_some());
    // The agent goes on: recording still takes, reading still works.
    store.record(step(1, 201, "last")).unwrap();
    assert!(store.episode(id(1)).unwrap().is_some());
    assert!(store.waiting().0 > 0);
    let error = store.close(SOON).unwrap_err();
    assert!(
        matches!(error, StoreError::Lost { records, .. } if records > 0),
        "{error}"
    );
    drop(store);
    let store = open(&dir);
    let episode = store.episode(id(1)).unwrap().unwrap();
    assert!(
        episode.closed && episode.incomplete,
        "what was lost is marked"
    );
}

#[test]
fn what_the_disk_refused_is_written_when_it_takes_again() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("s");
    let options = StoreOptions {
        busy_timeout_ms: 50,
        ..StoreOptions::default()
    };
    let store = Store::open(&dir, options).unwrap();
    store.record(begin(1)).unwrap();
    store.flush(SOON).unwrap();
    // Another process in the middle of a commit stands for any disk that refuses for a while.
    let blocker = rusqlite::Connection::open(dir.join(DATABASE)).unwrap();
    blocker.execute_batch("BEGIN IMMEDIATE").unwrap();
    for index in 1..=50 {
        store.record(step(1, index, "held")).unwrap();
    }
    let error = store.flush(SOON).unwrap_err();
    assert!(matches!(error, StoreError::Locked { .. }), "{error}");
    store.record(step(1, 51, "later")).unwrap();
    blocker.execute_batch("ROLLBACK").unwrap();
    store.flush(SOON).unwrap();
    assert_eq!(store.counts(None).unwrap().steps, 51);
    assert_eq!((store.health().failing, store.waiting()), (None, (0, 0)));
}

// ---- folders and files ----

#[cfg(unix)]
#[test]
fn the_folder_and_its_files_are_private_and_an_open_folder_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("deep/s");
    let store = open(&dir);
    assert!(store.try_lead().unwrap());
    store.record(begin(1)).unwrap();
    store.flush(SOON).unwrap();
    let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&dir), 0o700);
    let mut files = vec![dir.clone()];
    let mut seen = 0;
    while let Some(path) = files.pop() {
        match path.is_dir() {
            true => files.extend(
                std::fs::read_dir(&path)
                    .unwrap()
                    .map(|entry| entry.unwrap().path()),
            ),
            false => {
                assert_eq!(mode(&path), 0o600, "{}", path.display());
                seen += 1;
            }
        }
    }
    assert!(
        seen >= 5,
        "database, log, index, session lock, learner lock"
    );
    let public = folder.path().join("public");
    std::fs::create_dir(&public).unwrap();
    std::fs::set_permissions(&public, std::fs::Permissions::from_mode(0o777)).unwrap();
    let Err(error) = Store::open(&public, StoreOptions::default()) else {
        panic!("must be refused")
    };
    assert!(
        error
            .to_string()
            .contains("writable by every user (mode 777)"),
        "{error}"
    );
    let linked = folder.path().join("linked");
    std::fs::create_dir(&linked).unwrap();
    std::os::unix::fs::symlink(folder.path().join("elsewhere"), linked.join(DATABASE)).unwrap();
    assert!(Store::open(&linked, StoreOptions::default()).is_err());
    assert!(!folder.path().join("elsewhere").exists());
}

#[test]
fn files_that_are_no_store_are_refused_with_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let check = |name: &str, make: &dyn Fn(&Path), words: &str| {
        let dir = folder.path().join(name);
        std::fs::create_dir(&dir).unwrap();
        make(&dir.join(DATABASE));
        let Err(error) = Store::open(&dir, StoreOptions::default()) else {
            panic!("{name} must be refused")
        };
        assert!(error.to_string().contains(words), "{error}");
    };
    check(
        "garbage",
        &|path| std::fs::write(path, "this is no database at all".repeat(200)).unwrap(),
        "damaged or not a database",
    );
    let foreign = |path: &Path| {
        rusqlite::Connection::open(path)
            .unwrap()
            .execute_batch("CREATE TABLE t (x)")
            .unwrap()
    };
    check("foreign", &foreign, "not a Locum store");
    let newer = |path: &Path| {
        let sql = "CREATE TABLE schema_version (version INTEGER, applied_at_ms INTEGER); INSERT INTO schema_version VALUES (99, 0)";
        rusqlite::Connection::open(path)
            .unwrap()
            .execute_batch(sql)
            .unwrap();
    };
    check(
        "newer",
        &newer,
        "has schema version 99; this build knows up to 2",
    );
    let absent = Store::open(
        &folder.path().join("none"),
        StoreOptions {
            read_only: true,
            ..StoreOptions::default()
        },
    );
    assert!(absent.is_err());
    assert!(
        !folder.path().join("none").exists(),
        "reading makes nothing"
    );
}

#[test]
fn a_damaged_page_is_told_as_damage() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("s");
    let store = open(&dir);
    store.record(begin(1)).unwrap();
    for index in 1..=100 {
        store.record(step(1, index, &"x".repeat(3000))).unwrap();
    }
    store.close(SOON).unwrap();
    drop(store);
    let file = dir.join(DATABASE);
    let mut bytes = std::fs::read(&file).unwrap();
    let from = 2 * 4096;
    bytes[from..].iter_mut().for_each(|byte| *byte = 0xA5);
    std::fs::write(&file, bytes).unwrap();
    let error = match Store::open(&dir, StoreOptions::default()) {
        Err(error) => error,
        Ok(store) => store.load(&Query::default()).unwrap_err(),
    };
    assert!(matches!(error, StoreError::Corrupt { .. }), "{error}");
}

#[test]
fn one_store_at_a_time_leads() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("s");
    let (first, second) = (open(&dir), open(&dir));
    assert!(first.try_lead().unwrap() && first.try_lead().unwrap());
    assert!(!second.try_lead().unwrap());
    first.stop_leading();
    assert!(second.try_lead().unwrap());
    drop(second);
    assert!(first.try_lead().unwrap());
}

#[test]
fn closing_a_store_settles_its_open_episodes_and_leaves_one_file() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("s");
    let (store, other) = (open(&dir), open(&dir));
    store.record(begin(1)).unwrap();
    other.record(begin(2)).unwrap();
    other.flush(SOON).unwrap();
    store.close(SOON).unwrap();
    assert!(matches!(store.record(begin(3)), Err(StoreError::Closed)));
    let mine = other.episode(id(1)).unwrap().unwrap();
    assert!(mine.closed && mine.incomplete && mine.outcome.unwrap().status == Status::Aborted);
    assert!(
        !other.episode(id(2)).unwrap().unwrap().closed,
        "another store's episode is its own"
    );
    drop(other);
    assert!(!dir.join("locum.db-wal").exists(), "the log was folded in");
    assert_eq!(std::fs::read_dir(dir.join("sessions")).unwrap().count(), 0);
}

// ---- other processes ----

/// Starts the ignored test `name` in a process of its own, for at most `steps` steps of episode `first`.
fn child(name: &str, dir: &Path, first: u64, steps: u32) -> std::process::Child {
    Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            &format!("store::tests::{name}"),
            "--ignored",
            "--nocapture",
            "--test-threads=1",
        ])
        .env("LOCUM_TEST_STORE", dir)
        .env("LOCUM_TEST_FIRST", first.to_string())
        .env("LOCUM_TEST_STEPS", steps.to_string())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

fn given(name: &str) -> String {
    std::env::var(name).expect("started by another test")
}

#[test]
#[ignore = "the recording process of two other tests"]
fn child_that_records_until_it_is_killed() {
    use std::io::Write;
    let store = open(Path::new(&given("LOCUM_TEST_STORE")));
    let n: u64 = given("LOCUM_TEST_FIRST").parse().unwrap();
    let limit: u32 = given("LOCUM_TEST_STEPS").parse().unwrap();
    store.record(begin(n)).unwrap();
    let mut out = std::io::stdout();
    for index in 1..=limit {
        while store.record(step(n, index, &"x".repeat(300))).is_err() {
            std::thread::yield_now();
        }
        // Sometimes a group, sometimes one at a time.
        if index % (1 + index / 7 % 20) == 0 || index == limit {
            store.flush(SOON).unwrap();
            writeln!(out, "durable {index}").unwrap();
            out.flush().unwrap();
        }
    }
    store.record(outcome(n, Status::Success, true)).unwrap();
    store.close(SOON).unwrap();
}

#[test]
fn a_process_killed_at_any_moment_leaves_every_step_it_was_told_is_durable() {
    use std::io::{BufRead, BufReader, Read};
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("s");
    let kills = 30u64;
    let mut promised = Vec::new();
    for n in 1..=kills {
        let mut process = child("child_that_records_until_it_is_killed", &dir, n, u32::MAX);
        let mut out = BufReader::new(process.stdout.take().unwrap());
        let mut text = String::new();
        // The moments are spread from before the first record to well into the recording; every second one is behind a step that is
        // durable, however slow the machine.
        while n % 2 == 0 && !text.contains("durable ") {
            assert!(out.read_line(&mut text).unwrap() > 0, "{text}");
        }
        std::thread::sleep(Duration::from_millis(n * n * 7 % 120));
        process.kill().unwrap();
        process.wait().unwrap();
        out.read_to_string(&mut text).unwrap();
        // The last line may be cut off by the kill.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let durable = whole
            .lines()
            .filter_map(|line| line.strip_prefix("durable ")?.parse::<u32>().ok())
            .max();
        promised.push((n, durable));
    }
    let durable = promised.iter().filter(|(_, durable)| durable.is_some());
    assert!(durable.count() as u64 >= kills / 2 - 1, "{promised:?}");
    let store = open(&dir);
    for (n, durable) in promised {
        let Some(durable) = durable else { continue };
        let episode = store.episode(id(n)).unwrap().unwrap();
        assert!(
            episode.steps.len() >= durable as usize,
            "episode {n}: {} of {durable} steps",
            episode.steps.len()
        );
        for (at, step) in episode.steps.iter().enumerate() {
            assert_eq!(step.index as usize, at + 1, "no gaps");
        }
        assert!(episode.closed && episode.incomplete);
        assert_eq!(episode.outcome.unwrap().status, Status::Aborted);
        let summary = &store
            .episodes(&Query {
                ids: vec![id(n)],
                ..Query::default()
            })
            .unwrap()[0];
        assert_eq!(
            summary.steps as usize,
            episode.steps.len(),
            "the counts fit the steps"
        );
    }
    assert_eq!(store.counts(None).unwrap().open, 0);
}

#[test]
fn several_processes_record_into_one_store_and_nobody_loses_a_step() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("s");
    let own = open(&dir);
    own.record(begin(100)).unwrap();
    let children: Vec<_> = (1..=3)
        .map(|n| child("child_that_records_until_it_is_killed", &dir, n, 400))
        .collect();
    for index in 1..=400 {
        own.record(step(100, index, "own")).unwrap();
        if index % 20 == 0 {
            own.flush(SOON).unwrap();
        }
    }
    for process in children {
        let output = process.wait_with_output().unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stdout)
        );
    }
    own.flush(SOON).unwrap();
    for n in [1, 2, 3, 100] {
        let episode = own.episode(id(n)).unwrap().unwrap();
        assert_eq!(episode.steps.len(), 400);
        assert_eq!(
            episode.closed,
            n != 100,
            "a living process keeps its open episode"
        );
        assert!(!episode.incomplete);
    }
    assert_eq!(own.health().failed_commits, 0);
}

#[cfg(unix)]
#[test]
#[ignore = "the process of the next test, because a limit on file sizes holds for a whole process"]
fn child_whose_files_may_not_grow_for_a_while() {
    let store = open(Path::new(&given("LOCUM_TEST_STORE")));
    let n: u64 = given("LOCUM_TEST_FIRST").parse().unwrap();
    let steps: u32 = given("LOCUM_TEST_STEPS").parse().unwrap();
    store.record(begin(n)).unwrap();
    store.flush(SOON).unwrap();
    let limit = |bytes: libc::rlim_t| {
        let limit = libc::rlimit {
            rlim_cur: bytes,
            rlim_max: libc::RLIM_INFINITY,
        };
        // SAFETY: reads a local struct and sets a limit of this process.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &limit) }, 0);
    };
    limit(200 << 10);
    for index in 1..=steps {
        store.record(step(n, index, &"x".repeat(4096))).unwrap();
    }
    // The kernel also sends SIGXFSZ, which would end the process if the writer did not block signals.
    let refused = store.flush(SOON).unwrap_err();
    assert!(store.health().failing.is_some(), "{refused}");
    limit(libc::RLIM_INFINITY);
    store.flush(SOON).unwrap();
    assert_eq!(store.health().failing, None);
    store.record(outcome(n, Status::Success, true)).unwrap();
    store.close(SOON).unwrap();
}

#[cfg(unix)]
#[test]
fn a_disk_that_fills_up_and_is_cleared_again_costs_no_step() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("s");
    let process = child("child_whose_files_may_not_grow_for_a_while", &dir, 1, 100);
    let output = process.wait_with_output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stdout)
    );
    let episode = open(&dir).episode(id(1)).unwrap().unwrap();
    assert_eq!(
        (episode.steps.len(), episode.closed, episode.incomplete),
        (100, true, false)
    );
}

#[test]
#[ignore = "a measurement: cargo test --release -p locum-core measure_the_store -- --ignored --nocapture"]
fn measure_the_store() {
    let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let store = open(&folder.path().join("s"));
    let (episodes, steps) = (500u64, 40u32);
    let text = "x".repeat(2048);
    let mut calls: Vec<u64> = Vec::new();
    let start = Instant::now();
    for n in 1..=episodes {
        patiently(&store, begin(n));
        for index in 1..=steps {
            let record = step(n, index, &text);
            let mut observed = record.clone();
            if let Record::Step { step, .. } = &mut observed {
                step.tool_calls = vec![ToolCall {
                    id: "c".into(),
                    name: "act".into(),
                    arguments: json!({"action": "left"}),
                    ..ToolCall::default()
                }];
                step.observations = vec![Observation {
                    call_id: Some("c".into()),
                    content: Some(Content::Text("See: wall".into())),
                    ..Observation::default()
                }];
            }
            loop {
                let before = Instant::now();
                let result = store.record(observed.clone());
                let taken = before.elapsed().as_nanos() as u64;
                if result.is_ok() {
                    calls.push(taken);
                    break;
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        patiently(&store, outcome(n, Status::Success, true));
    }
    store.flush(Duration::from_secs(120)).unwrap();
    let seconds = start.elapsed().as_secs_f64();
    calls.sort_unstable();
    let at = |share: f64| calls[((calls.len() - 1) as f64 * share) as usize] as f64 / 1000.0;
    let total = episodes * u64::from(steps);
    println!(
        "{total} steps of 2 KiB with a call and a result: {:.0} steps/s durable",
        total as f64 / seconds
    );
    println!(
        "record call with its clone, us: p50 {:.1} p99 {:.1} max {:.1}",
        at(0.5),
        at(0.99),
        at(1.0)
    );
    let mut waits: Vec<f64> = Vec::new();
    store.record(begin(9999)).unwrap();
    for index in 1..=200 {
        store.record(step(9999, index, &text)).unwrap();
        let before = Instant::now();
        store.flush(SOON).unwrap();
        waits.push(before.elapsed().as_secs_f64() * 1e6);
        std::thread::sleep(Duration::from_millis(10));
    }
    waits.sort_by(f64::total_cmp);
    println!(
        "durable at 100 steps/s, us: p50 {:.0} p99 {:.0}",
        waits[100], waits[197]
    );
    let timed = |what: &str, run: &dyn Fn()| {
        let before = Instant::now();
        run();
        println!("{what}: {:.2} ms", before.elapsed().as_secs_f64() * 1e3);
    };
    timed("counts of 501 episodes, 20200 steps", &|| {
        let _ = store.counts(None).unwrap();
    });
    timed("summaries of 501 episodes", &|| {
        drop(store.episodes(&Query::default()).unwrap())
    });
    timed("load of 500 episodes of 40 steps", &|| {
        drop(
            store
                .load(&Query {
                    limit: Some(500),
                    ..Query::default()
                })
                .unwrap(),
        )
    });
}
