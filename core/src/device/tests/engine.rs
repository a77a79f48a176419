//! The engine with a card: answers, fast weights and what happens when the card fails under them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::{Device, DeviceOptions};
use super::stand_in::run;
use super::OBJECT;
use crate::chat::Chat;
use crate::generate::{Engine, EngineOptions, FastOp, FastOrder, Generated, Job, Student};
use crate::model::{write_tiny_learner, Model};
use crate::ttt::TttConfig;

fn student(seed: u64) -> Arc<Student> {
    let dir = tempfile::tempdir().unwrap();
    let ttt = TttConfig {
        layers: vec![0, 1],
        chunk_len: 8,
        lr: 0.01,
        ..TttConfig::default()
    };
    write_tiny_learner(dir.path(), seed, &ttt).unwrap();
    Arc::new(Student {
        id: format!("tiny-{seed}"),
        version: seed,
        model: Arc::new(Model::load(dir.path()).unwrap()),
        chat: Arc::new(Chat::load(dir.path()).unwrap()),
        view: Default::default(),
        tool_names: Default::default(),
        held_out_exact: None,
        learns: true,
        scope: String::new(),
    })
}

fn job(student: &Arc<Student>, key: u128, prompt: &str, learns: bool, ruled: bool) -> Job {
    let rule = Arc::new(|seen: &crate::generate::FastSeen| FastOrder {
        on: true,
        // What is seen of the losses decides, so that these must be the same too.
        step: if seen.loss.is_some_and(|loss| loss > 5.6) {
            0.5
        } else {
            1.0
        },
        reset: false,
    });
    Job {
        student: student.clone(),
        key,
        prompt_ids: student.chat.tokenizer.encode(prompt, true),
        grammar: None,
        avoid: None,
        max_tokens: 12,
        deadline: Instant::now() + Duration::from_secs(100),
        temperature: 0.0,
        seed: 0,
        fast_weights: learns,
        fast_rule: if ruled { Some(rule) } else { None },
        background: false,
    }
}

/// A few episodes, some steps each, at once; and what their fast weights came to.
fn answers(device: &Arc<Device>) -> Vec<(Vec<u32>, usize, usize)> {
    let options = EngineOptions {
        device: device.clone(),
        ..EngineOptions::default()
    };
    let engine = Engine::new(options, Box::new(|_| ())).unwrap();
    let students = [student(1), student(2)];
    let mut out = Vec::new();
    for step in 0..2 {
        let tickets: Vec<_> = (0..3u128)
            .map(|episode| {
                let prompt = format!("episode {episode}: {}", "look around; ".repeat(step + 1));
                let student = &students[episode as usize % 2];
                engine.submit(job(student, episode, &prompt, episode != 1, episode == 2))
            })
            .collect();
        for (episode, ticket) in tickets.into_iter().enumerate() {
            assert!(ticket.wait(Duration::from_secs(100)));
            let reply: Generated = ticket.outcome().unwrap().unwrap();
            let report = engine
                .fast_weights(episode as u128, FastOp::Inspect)
                .unwrap();
            out.push((reply.reply_ids, reply.cached_tokens, report.layers.len()));
        }
    }
    let kept = engine.fast_weights(2, FastOp::Snapshot).unwrap();
    let report = engine.fast_weights(2, FastOp::Inspect).unwrap();
    assert!(report.drift > 0.0 && report.bytes > 0, "{report:?}");
    assert_eq!(engine.fast_weights(2, FastOp::Reset).unwrap().drift, 0.0);
    let back = engine
        .fast_weights(2, FastOp::Restore(kept.snapshot))
        .unwrap();
    assert_eq!((back.drift, back.position), (report.drift, report.position));
    out
}

/// Run by the tests below in processes of their own, and by `make cuda-check` on a card.
#[test]
fn answers_on_a_card_are_those_of_the_processor() {
    let Some(library) = std::env::var_os(OBJECT) else {
        println!("skipped: no CUDA device (run `make cuda-check` on a machine with one)");
        return;
    };
    let device = Device::new(DeviceOptions {
        library: Some(library.into()),
        ..DeviceOptions::default()
    });
    let want = answers(&Device::off());
    let got = answers(&device);
    println!("on {}", device.words());
    // Where a card failed, what had been kept there is read again.
    let tokens = |all: &[(Vec<u32>, usize, usize)]| -> Vec<Vec<u32>> {
        all.iter().map(|(ids, ..)| ids.clone()).collect()
    };
    assert_eq!(tokens(&want), tokens(&got));
    if std::env::var_os("LOCUM_EMULATE").is_none() {
        assert_eq!(want, got);
    }
}

const TEST: &str = "device::tests::engine::answers_on_a_card_are_those_of_the_processor";

fn passes(order: Option<&str>) -> String {
    let output = run(TEST, order);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    said
}

#[test]
fn answers_on_the_stand_in_are_those_of_the_processor() {
    assert!(passes(None).contains("on stand-in on the processor"));
}

#[test]
fn answers_go_on_on_the_processor_where_a_card_has_no_memory_or_fails() {
    for order in ["alloc=40", "alloc=200"] {
        assert!(passes(Some(order)).contains("on stand-in"), "{order}");
    }
    for order in ["launch=1", "launch=300"] {
        let said = passes(Some(order));
        assert!(
            said.contains("on processor: the card failed"),
            "{order}: {said}"
        );
    }
    assert!(passes(Some("old")).contains("on processor: stand-in on the processor is too old"));
}
