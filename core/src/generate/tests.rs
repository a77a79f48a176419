use std::sync::atomic::Ordering::SeqCst;

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::calls::{CallFormat, GrammarOptions};
use crate::episode::ToolSpec;
use crate::kernels::Pool;
use crate::model::{write_tiny, Sequence};

const LONG: Duration = Duration::from_secs(60);

fn student(version: u64) -> Arc<Student> {
    let dir = tempfile::tempdir().unwrap();
    write_tiny(dir.path(), version).unwrap();
    Arc::new(Student {
        id: format!("tiny-{version}"),
        version,
        model: Arc::new(Model::load(dir.path()).unwrap()),
        chat: Arc::new(Chat::load(dir.path()).unwrap()),
        view: View::default(),
        tool_names: BTreeSet::new(),
        scope: String::new(),
        held_out_exact: None,
        learns: true,
    })
}

fn engine() -> Engine {
    Engine::new(EngineOptions::default(), Box::new(|_| ())).unwrap()
}

fn job(student: &Arc<Student>, prompt: &str) -> Job {
    Job {
        student: student.clone(),
        key: 1,
        prompt_ids: student.chat.tokenizer.encode(prompt, true),
        avoid: None,
        grammar: None,
        max_tokens: 24,
        deadline: Instant::now() + LONG,
        temperature: 0.0,
        seed: 0,
        fast_weights: true,
        fast_rule: None,
        background: false,
    }
}

fn outcome(ticket: &Ticket) -> Result<Generated, GenerateError> {
    assert!(ticket.wait(LONG), "job {} did not end", ticket.number());
    ticket.outcome().unwrap()
}

/// The engine's answer without an engine: one sequence, one token at a time.
fn by_hand(student: &Student, job: &Job) -> (Vec<u32>, f64) {
    let pool = Pool::new(1, 0);
    let mut sequence = Sequence::new(&student.model.config, 4);
    let (mut reply, mut logprob) = (Vec::new(), 0.0);
    let mut hidden = Vec::new();
    for token in &job.prompt_ids {
        hidden = student
            .model
            .step(&pool, &mut [(&mut sequence, &[*token])])
            .unwrap();
    }
    while reply.len() < job.max_tokens {
        let logits = student.model.logits(&pool, &hidden, &[0]);
        let best = (0..logits.len())
            .max_by(|a, b| logits[*a].total_cmp(&logits[*b]))
            .unwrap();
        let sum: f64 = logits
            .iter()
            .map(|l| f64::from(l - logits[best]).exp())
            .sum();
        logprob -= sum.ln();
        if student.chat.eos_ids.contains(&(best as u32)) {
            break;
        }
        reply.push(best as u32);
        hidden = student
            .model
            .step(&pool, &mut [(&mut sequence, &[best as u32])])
            .unwrap();
    }
    (reply, logprob)
}

fn prompts() -> Vec<String> {
    (0..8)
        .map(|i| {
            format!(
                "<|im_start|>user\nquestion {}{i}<|im_end|>\n",
                "so ".repeat(i * 9)
            )
        })
        .collect()
}

fn tools() -> CallFormat {
    let tool = |name: &str, properties: serde_json::Value, required: &[&str]| ToolSpec {
        name: name.into(),
        description: String::new(),
        parameters: json!({"type": "object", "properties": properties, "required": required}),
        extra: serde_json::Map::new(),
    };
    let act = tool(
        "act",
        json!({"action": {"enum": ["left", "right", "up the stairs"]}}),
        &["action"],
    );
    let set = tool(
        "set",
        json!({"lamp": {"enum": ["hall", "attic"]}, "on": {"type": "boolean"}}),
        &["lamp", "on"],
    );
    CallFormat::new(&[act, set]).unwrap()
}

#[test]
fn a_greedy_reply_is_what_the_model_says_token_by_token() {
    let (student, engine) = (student(1), engine());
    for prompt in prompts() {
        let expected = by_hand(&student, &job(&student, &prompt));
        let ticket = engine.submit(job(&student, &prompt));
        let reply = outcome(&ticket).unwrap();
        assert_eq!(reply.reply_ids, expected.0);
        assert!(
            (f64::from(reply.mean_logprob) * reply.free_tokens as f64 - expected.1).abs() < 1e-2
        );
        assert_eq!(reply.finish == Finish::Length, reply.reply_ids.len() == 24);
        assert_eq!(reply.text, student.chat.tokenizer.decode(&reply.reply_ids));
        assert_eq!(ticket.poll(), (reply.text, true));
        assert_eq!(ticket.poll(), (String::new(), true));
    }
}

#[test]
fn eight_answers_at_once_are_the_same_as_one_after_another() {
    let (student, engine) = (student(2), engine());
    let make = |(i, prompt): (usize, &String)| Job {
        key: i as u128,
        temperature: if i % 2 == 0 { 0.0 } else { 0.7 },
        seed: i as u64,
        ..job(&student, prompt)
    };
    let prompts = prompts();
    let all: Vec<Ticket> = prompts
        .iter()
        .enumerate()
        .map(|p| engine.submit(make(p)))
        .collect();
    let together: Vec<Vec<u32>> = all.iter().map(|t| outcome(t).unwrap().reply_ids).collect();
    let alone = super::Engine::new(
        EngineOptions {
            max_batch: 1,
            cache_bytes: 0,
            threads: 2,
            ..EngineOptions::default()
        },
        Box::new(|_| ()),
    )
    .unwrap();
    for (i, p) in prompts.iter().enumerate() {
        let reply = outcome(&alone.submit(make((i, p)))).unwrap();
        assert_eq!(
            (reply.reply_ids, reply.cached_tokens),
            (together[i].clone(), 0),
            "prompt {i}"
        );
    }
}

#[test]
fn a_prompt_that_begins_like_an_earlier_one_is_not_read_again_and_answered_alike() {
    let (student, engine) = (student(3), engine());
    let first = "<|im_start|>user\nthe goal is to find the lamp<|im_end|>\n";
    let second = format!("{first}and then some");
    let read = outcome(&engine.submit(job(&student, first))).unwrap();
    assert_eq!(read.cached_tokens, 0);
    let again = outcome(&engine.submit(job(&student, &second))).unwrap();
    assert_eq!(again.cached_tokens, job(&student, first).prompt_ids.len());
    assert_eq!(
        again.reply_ids,
        by_hand(&student, &job(&student, &second)).0
    );
    // Another episode shares it too, and leaves it to the one it came from.
    for key in [2, 1] {
        let reply = outcome(&engine.submit(Job {
            key,
            ..job(&student, &second)
        }))
        .unwrap();
        assert!(reply.cached_tokens >= again.cached_tokens);
        assert_eq!(reply.reply_ids, again.reply_ids);
    }
    let counted = |want: bool| {
        let until = Instant::now() + LONG;
        while (engine.stats().cache_bytes > 0) != want && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
        engine.stats()
    };
    let stats = counted(true);
    assert!(
        stats.cached_tokens > 0
            && stats.prompt_tokens > stats.cached_tokens
            && stats.prefill_tok_s > 0.0
    );
    engine.keep_only(&[4]);
    assert_eq!(counted(false).cache_bytes, 0);
    assert_eq!(
        outcome(&engine.submit(job(&student, &second)))
            .unwrap()
            .cached_tokens,
        0
    );
}

#[test]
fn kept_sequences_stay_within_their_bytes_and_the_oldest_goes_first() {
    let student = student(4);
    let sequence = |token: u32| {
        let mut sequence = Sequence::new(&student.model.config, 40);
        student
            .model
            .step(&Pool::new(1, 0), &mut [(&mut sequence, &[token; 30])])
            .unwrap();
        seat::Seat::Host(sequence)
    };
    let each = sequence(0).bytes();
    let mut prefixes = prefix::Prefixes::new(2 * each + each / 2);
    for key in [10, 11] {
        prefixes.put(&student, key, sequence(key as u32));
    }
    // A use by another episode counts as a use.
    let copy = prefixes.take(&student, 5, &[10; 21], 0, false).unwrap();
    assert_eq!((copy.ids().len(), prefixes.bytes()), (20, 2 * each));
    prefixes.put(&student, 12, sequence(12));
    assert_eq!(prefixes.bytes(), 2 * each);
    assert!(prefixes.take(&student, 5, &[11; 30], 0, false).is_none());
    assert_eq!(
        prefixes
            .take(&student, 10, &[10; 30], 0, false)
            .unwrap()
            .ids(),
        [10; 29]
    );
    assert_eq!(prefixes.bytes(), each);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn whatever_the_model_a_reply_under_a_grammar_is_a_call(version in 0u64..1000, seed: u64, hot: bool) {
        let (student, engine, calls) = (student(version), engine(), tools());
        let lark = calls.lark(GrammarOptions::default()).unwrap();
        let tickets: Vec<Ticket> = (0..4).map(|i| engine.submit(Job {
            avoid: None,
        grammar: Some(student.chat.grammar(&lark).unwrap()),
            temperature: if hot { 2.0 } else { 0.0 },
            seed: seed.wrapping_add(i),
            key: i.into(),
            max_tokens: 64,
            ..job(&student, "<|im_start|>user\ngo<|im_end|>\n")
        })).collect();
        for ticket in tickets {
            let reply = outcome(&ticket).unwrap();
            prop_assert_eq!(reply.finish, Finish::Stop);
            let parsed = calls.parse_reply(&reply.text);
            prop_assert!(parsed.is_ok(), "{:?}: {:?}", reply.text, parsed);
            calls.validate(&parsed.unwrap().calls[0]).unwrap();
            prop_assert!(reply.free_tokens > 0 && reply.free_tokens < reply.reply_ids.len());
            prop_assert!(reply.confidence > 0.0 && reply.confidence <= reply.min_prob && reply.min_prob < 1.0);
            prop_assert_eq!(ticket.poll().0, reply.text);
        }
    }
}

#[test]
fn a_reply_to_avoid_gives_way_to_the_next_likeliest_and_is_given_where_it_is_the_only_one() {
    let (student, engine) = (student(5), engine());
    let ask = |lark: &str, avoid: Option<&str>| {
        let ticket = engine.submit(Job {
            avoid: avoid.map(str::to_string),
            grammar: Some(student.chat.grammar(lark).unwrap()),
            ..job(&student, "<|im_start|>user\ngo<|im_end|>\n")
        });
        let reply = outcome(&ticket).unwrap();
        assert_eq!(
            ticket.poll().0,
            reply.text,
            "what was streamed is what was said"
        );
        assert_eq!(reply.finish, Finish::Stop);
        reply.text
    };
    let moves = r#"start: "act(" ("left" | "right" | "wait" | "lean" | "wave") ")""#;
    let first = ask(moves, None);
    let second = ask(moves, Some(&first));
    assert_ne!(first, second);
    assert_eq!(
        ask(moves, Some(&second)),
        first,
        "avoiding another reply changes nothing"
    );
    let only = r#"start: "act(" "left" ")" | "act(left)""#;
    assert_eq!(ask(only, Some("act(left)")), "act(left)");
    // A reply that may go on: avoiding the short one must not end in the same call by another way.
    let more = r#"start: CALL ("\n" CALL)?
CALL: /act\((left|right)\)/"#;
    let one = ask(more, None);
    let begun = one.split('\n').next().unwrap().to_string();
    assert!(!ask(more, Some(&begun)).starts_with(&begun), "{one}");
}

#[test]
fn a_cancelled_answer_ends_at_the_next_token() {
    let (student, engine) = (student(5), engine());
    let endless = || {
        let lark = "start: /[a-z]{4000}/";
        let grammar = Some(student.chat.grammar(lark).unwrap());
        Job {
            max_tokens: 4000,
            grammar,
            ..job(&student, "go")
        }
    };
    let (ticket, other) = (
        engine.submit(endless()),
        engine.submit(Job {
            max_tokens: 300,
            ..endless()
        }),
    );
    let mut said = String::new();
    while said.len() < 3 {
        let (text, done) = ticket.poll();
        assert!(!done);
        said += &text;
    }
    ticket.cancel();
    assert_eq!(outcome(&ticket), Err(GenerateError::Cancelled));
    said += &ticket.poll().0;
    assert!(said.len() < 4000);
    let reply = outcome(&other).unwrap();
    assert_eq!((reply.finish, reply.reply_ids.len()), (Finish::Length, 300));
}

#[test]
fn an_answer_after_its_deadline_is_late_and_a_prompt_beyond_the_model_is_refused() {
    let (student, engine) = (student(6), engine());
    let late = engine.submit(Job {
        deadline: Instant::now(),
        ..job(&student, "go")
    });
    assert!(matches!(outcome(&late), Err(GenerateError::Late { .. })));
    let long = engine.submit(Job {
        prompt_ids: vec![70; 2048],
        ..job(&student, "")
    });
    assert_eq!(
        outcome(&long),
        Err(GenerateError::PromptTooLong {
            tokens: 2048,
            limit: 2047
        })
    );
    // The last position may be used, and a prompt that needs several steps is read whole.
    let full = engine.submit(Job {
        prompt_ids: vec![70; 2047],
        ..job(&student, "")
    });
    assert_eq!(outcome(&full).unwrap().reply_ids.len(), 1);
    let unknown = engine.submit(Job {
        prompt_ids: vec![70, 9999],
        ..job(&student, "")
    });
    assert!(matches!(outcome(&unknown), Err(GenerateError::Model(why)) if why.contains("9999")));
    let empty = engine.submit(Job {
        prompt_ids: vec![],
        ..job(&student, "")
    });
    assert!(matches!(outcome(&empty), Err(GenerateError::Model(_))));
}

#[test]
fn an_answer_keeps_the_student_it_began_with() {
    let (old, new, engine) = (student(7), student(8), engine());
    let prompt = "<|im_start|>user\nwho are you<|im_end|>\n";
    let long = |s: &Arc<Student>| Job {
        max_tokens: 200,
        ..job(s, prompt)
    };
    let expected = [by_hand(&old, &long(&old)).0, by_hand(&new, &long(&new)).0];
    assert_ne!(expected[0], expected[1]);
    let first = engine.submit(long(&old));
    let behind = engine.submit(Job {
        fast_weights: true,
        background: true,
        key: 9,
        ..long(&old)
    });
    let later: Vec<Ticket> = (0..3)
        .map(|key| engine.submit(Job { key, ..long(&new) }))
        .collect();
    engine.keep_only(&[8]);
    assert_eq!(outcome(&first).unwrap().reply_ids, expected[0]);
    assert_eq!(outcome(&behind).unwrap().reply_ids, expected[0]);
    for ticket in later {
        assert_eq!(outcome(&ticket).unwrap().reply_ids, expected[1]);
    }
}

#[test]
fn every_job_but_those_in_the_background_is_reported_and_a_panic_costs_all_answers_but_no_waiter() {
    let reported = Arc::new(Mutex::new(Vec::new()));
    let theirs = reported.clone();
    let wrong = Arc::new(AtomicBool::new(true));
    let panics = wrong.clone();
    let on_done = move |number| {
        locked(&theirs).push(number);
        assert!(!panics.load(SeqCst), "the host's mistake");
    };
    let engine = Engine::new(EngineOptions::default(), Box::new(on_done)).unwrap();
    let good = student(9);
    let before = engine.submit(job(&good, "go"));
    outcome(&before).unwrap();
    wrong.store(false, SeqCst);
    let quiet = engine.submit(Job {
        fast_weights: true,
        background: true,
        ..job(&good, "go")
    });
    outcome(&quiet).unwrap();
    // A model whose weights are not of its config's shape: what no check lets through.
    let mut model = (*good.model).clone();
    model.config.intermediate_size *= 2;
    let chat = good.chat.clone();
    let bad = Student {
        id: "bad".into(),
        version: 10,
        model: Arc::new(model),
        chat,
        view: View::default(),
        tool_names: BTreeSet::new(),
        scope: String::new(),
        held_out_exact: None,
        learns: true,
    };
    let fault = engine.submit(job(&Arc::new(bad), "go"));
    assert!(matches!(outcome(&fault), Err(GenerateError::Fault(_))));
    let after = engine.submit(job(&good, "go"));
    assert!(matches!(outcome(&after), Err(GenerateError::Fault(_))));
    drop(engine);
    assert_eq!(*locked(&reported), [1, 3, 4]);
}

#[test]
fn closing_the_engine_ends_what_is_running() {
    let (student, engine) = (student(11), engine());
    let grammar = Some(student.chat.grammar("start: /[a-z]{4000}/").unwrap());
    let running = engine.submit(Job {
        max_tokens: 4000,
        grammar,
        ..job(&student, "go")
    });
    while running.poll().0.is_empty() {}
    drop(engine);
    assert_eq!(running.outcome(), Some(Err(GenerateError::Closed)));
}

#[test]
fn the_gate_is_closed_while_a_job_is_in_the_foreground_and_open_afterwards_however_it_ended() {
    let (student, engine) = (student(1), engine());
    let gate = engine.gate();
    for prompt in prompts().into_iter().take(3) {
        let ticket = engine.submit(job(&student, &prompt));
        assert!(gate.is_closed() || ticket.outcome().is_some());
        outcome(&ticket).unwrap();
        gate.pass();
        let background = Job {
            fast_weights: true,
            background: true,
            ..job(&student, &prompt)
        };
        let ticket = engine.submit(background);
        gate.pass();
        outcome(&ticket).unwrap();
    }
    // A long one that the engine leaves behind.
    let endless = Job {
        max_tokens: 4000,
        ..job(&student, &prompts()[0])
    };
    engine.submit(endless);
    drop(engine);
    gate.pass();
    assert!(!gate.is_closed());
}
