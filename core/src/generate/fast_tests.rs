//! What rules an episode's fast weights, and what of them reaches whom.

use super::*;
use crate::kernels::{log_sum_exp, Pool};
use crate::limits::MAX_FAST_SNAPSHOTS;
use crate::model::{write_tiny_learner, FileDtype};
use crate::ttt::TttConfig;

const LONG: Duration = Duration::from_secs(60);
const CHUNK: usize = 8;

/// A student whose two layers learn in chunks of 8 tokens, with filters that were never trained for good.
fn learner(lr: f32, max_drift: Option<f32>) -> Arc<Student> {
    let dir = tempfile::tempdir().unwrap();
    let ttt = TttConfig {
        layers: vec![0, 1],
        chunk_len: CHUNK,
        lr,
        ..TttConfig::default()
    };
    write_tiny_learner(dir.path(), 5, &ttt).unwrap();
    let mut model = Model::load(dir.path()).unwrap();
    model.config.ttt.as_mut().unwrap().max_drift = max_drift;
    Arc::new(Student {
        id: "learner".into(),
        version: 1,
        model: Arc::new(model),
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

fn job(student: &Arc<Student>, key: u128, prompt: &str) -> Job {
    Job {
        student: student.clone(),
        key,
        prompt_ids: student.chat.tokenizer.encode(prompt, true),
        avoid: None,
        grammar: None,
        max_tokens: 12,
        deadline: Instant::now() + LONG,
        temperature: 0.0,
        seed: 0,
        fast_weights: true,
        fast_rule: None,
        background: false,
    }
}

fn ask(engine: &Engine, job: Job) -> Result<Generated, GenerateError> {
    let ticket = engine.submit(job);
    assert!(ticket.wait(LONG));
    ticket.outcome().unwrap()
}

/// What of a reply shows the least change of a weight.
fn said(reply: &Generated) -> (Vec<u32>, f32) {
    (reply.reply_ids.clone(), reply.mean_logprob)
}

const STORY: &str =
    "the locum sees one patient after another, and learns a little from each of them";

/// Runs the story under a rule, and gives what the rule saw and what was said.
fn ruled(
    student: &Arc<Student>,
    rule: impl Fn(&FastSeen) -> FastOrder + Send + Sync + 'static,
) -> (Vec<FastSeen>, Generated) {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let theirs = seen.clone();
    let fast_rule: FastRule = Arc::new(move |now: &FastSeen| {
        locked(&theirs).push(now.clone());
        rule(now)
    });
    let job = Job {
        fast_rule: Some(fast_rule),
        ..job(student, 1, STORY)
    };
    let reply = ask(&engine(), job).unwrap();
    let seen = locked(&seen).clone();
    (seen, reply)
}

#[test]
fn the_rule_is_asked_before_the_prompt_and_behind_each_chunk_and_sees_drift_and_loss() {
    let student = learner(0.05, None);
    let free = ask(&engine(), job(&student, 1, STORY)).unwrap();
    let (seen, reply) = ruled(&student, |_| FastOrder::default());
    assert_eq!(reply.reply_ids, free.reply_ids);
    assert!((reply.mean_logprob - free.mean_logprob).abs() < 1e-4);

    // The last token of a reply that is cut off is never read.
    let unread = usize::from(reply.finish == Finish::Length);
    let tokens = STORY.len() + reply.reply_ids.len() - unread;
    let edges: Vec<usize> = (0..=tokens).step_by(CHUNK).collect();
    let positions: Vec<usize> = seen.iter().map(|s| s.position).collect();
    assert_eq!(positions, edges);
    assert!(!seen[0].behind_chunk && seen[1..].iter().all(|s| s.behind_chunk));
    assert!(seen[1..].iter().all(|s| s.drift > 0.0));
    assert_eq!((seen[0].loss, seen[1].loss_before), (None, None));

    // The losses, token by token: with chunks this short all tokens are looked at whose next one is the prompt's own.
    let pool = Pool::new(1, 0);
    let ids = &job(&student, 1, STORY).prompt_ids;
    let mut sequence = student.model.sequence(8, true);
    let mut losses = Vec::new();
    for pair in ids.windows(2) {
        let hidden = student
            .model
            .step(&pool, &mut [(&mut sequence, &pair[..1])])
            .unwrap();
        let logits = student.model.logits(&pool, &hidden, &[0]);
        losses.push(log_sum_exp(&logits) - f64::from(logits[pair[1] as usize]));
    }
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    for n in 1..=losses.len() / CHUNK {
        let close = |got: Option<f32>, want: f64| {
            let got = f64::from(got.unwrap());
            assert!((got - want).abs() < 1e-4, "chunk {n}: {got} and {want}");
        };
        close(seen[n].loss, mean(&losses[(n - 1) * CHUNK..n * CHUNK]));
        if n > 1 {
            close(seen[n].loss_before, mean(&losses[..(n - 1) * CHUNK]));
        }
    }
}

#[test]
fn the_rule_switches_off_scales_and_resets() {
    let student = learner(0.05, None);
    let plain = Job {
        fast_weights: false,
        ..job(&student, 1, STORY)
    };
    let plain = ask(&engine(), plain).unwrap();
    let learned = ask(&engine(), job(&student, 1, STORY)).unwrap();
    assert_ne!(said(&learned), said(&plain));

    let off = |_: &FastSeen| FastOrder {
        on: false,
        ..FastOrder::default()
    };
    let (seen, reply) = ruled(&student, off);
    assert_eq!(reply.reply_ids, plain.reply_ids);
    // Chunk by chunk, a product of plain weights is summed in another order.
    assert!((reply.mean_logprob - plain.mean_logprob).abs() < 1e-5);
    assert!(seen.iter().all(|s| s.drift == 0.0));

    // What a rule has switched off goes on where a later step of the episode has none.
    let one = engine();
    let ruled_off = Job {
        fast_rule: Some(Arc::new(off)),
        ..job(&student, 1, STORY)
    };
    ask(&one, ruled_off).unwrap();
    assert_eq!(one.fast_weights(1, FastOp::Inspect).unwrap().drift, 0.0);
    let longer = format!("{STORY}. and then it goes home, and reads about what it has seen");
    ask(&one, job(&student, 1, &longer)).unwrap();
    assert!(one.fast_weights(1, FastOp::Inspect).unwrap().drift > 0.0);

    let from = |at: usize, order: FastOrder| {
        ruled(&student, move |seen| match seen.position >= at {
            true => order,
            false => FastOrder::default(),
        })
    };
    let still = FastOrder {
        step: 0.0,
        ..FastOrder::default()
    };
    let (seen, _) = from(16, still);
    assert!(seen[1].drift > 0.0 && seen[2..].iter().all(|s| s.drift == seen[2].drift));
    let double = FastOrder {
        step: 2.0,
        ..FastOrder::default()
    };
    let (twice, _) = from(0, double);
    let ratio = twice[1].drift / seen[1].drift;
    assert!((ratio - 2.0).abs() < 1e-3, "{ratio}");
    let anew = FastOrder {
        reset: true,
        ..FastOrder::default()
    };
    let (reset, _) = from(16, anew);
    // Each chunk of the prompt begins with the trained weights from then on, so that no drift is more than a chunk's.
    let chunks = reset[3..].iter().filter(|s| s.loss.is_some());
    let most = chunks.fold(0f32, |most, s| most.max(s.drift));
    assert!(most > 0.0 && most < 2.0 * reset[1].drift, "{reset:?}");
    let (free, _) = ruled(&student, |_| FastOrder::default());
    assert!(free[9].drift > most, "{free:?}");
}

#[test]
fn a_drift_past_the_cap_or_no_number_ends_the_answer_and_leaves_the_student_as_it_was() {
    for (lr, cap) in [(0.05, Some(1e-4)), (1e38, None)] {
        let (student, engine) = (learner(lr, cap), engine());
        let drifted = ask(&engine, job(&student, 1, STORY));
        let Err(GenerateError::Drifted { drift, .. }) = drifted else {
            panic!("{drifted:?}");
        };
        assert!(!drift.is_finite() || drift > 1e-4);
        // Counters are published behind the answer.
        while engine.stats().fast_trips == 0 {
            std::thread::yield_now();
        }
        let plain = Job {
            fast_weights: false,
            ..job(&student, 1, STORY)
        };
        assert!(ask(&engine, plain).is_ok());
        // A text that ends before the first edge learns nothing.
        let short = Job {
            max_tokens: 2,
            ..job(&student, 2, "hello")
        };
        let short = ask(&engine, short);
        assert!(short.is_ok(), "{short:?}");
    }
}

#[test]
fn a_state_is_inspected_kept_put_back_and_reset() {
    let (student, engine) = (learner(0.02, None), engine());
    let op = |key, op| engine.fast_weights(key, op);
    assert_eq!(op(1, FastOp::Inspect), Ok(FastReport::default()));
    for nothing in [FastOp::Reset, FastOp::Snapshot] {
        assert_eq!(op(1, nothing), Err(FastError::Nothing));
    }
    let long = format!("{STORY}. and then it goes home");
    ask(&engine, job(&student, 1, STORY)).unwrap();
    let early = op(1, FastOp::Snapshot).unwrap();
    assert!(early.on && early.drift > 0.0 && early.bytes > 0 && early.chunk == CHUNK);
    assert_eq!(early.layers.len(), 2);
    assert_eq!(early.snapshots, [early.snapshot]);

    let first = ask(&engine, job(&student, 1, &long)).unwrap();
    let late = op(1, FastOp::Inspect).unwrap();
    assert!(late.position > early.position && late.drift != early.drift);
    let back = op(1, FastOp::Restore(early.snapshot)).unwrap();
    assert_eq!((back.position, back.drift), (early.position, early.drift));
    let again = ask(&engine, job(&student, 1, &long)).unwrap();
    assert_eq!(again.reply_ids, first.reply_ids);

    let none = Err(FastError::NoSnapshot(early.snapshot));
    assert_eq!(
        op(2, FastOp::Restore(early.snapshot)),
        none,
        "another episode's"
    );
    assert_eq!(op(2, FastOp::Forget(early.snapshot)), none);
    op(1, FastOp::Forget(early.snapshot)).unwrap();
    assert_eq!(op(1, FastOp::Restore(early.snapshot)), none);
    for _ in 0..MAX_FAST_SNAPSHOTS {
        op(1, FastOp::Snapshot).unwrap();
    }
    assert_eq!(op(1, FastOp::Snapshot), Err(FastError::TooMany));
    assert!(op(1, FastOp::Forget(0)).unwrap().snapshots.is_empty());

    assert!(op(1, FastOp::Inspect).unwrap().drift > 0.0);
    assert_eq!(op(1, FastOp::Reset).unwrap().drift, 0.0);
    let tight = Engine::new(
        EngineOptions {
            cache_bytes: early.bytes + 200_000,
            ..EngineOptions::default()
        },
        Box::new(|_| ()),
    );
    let tight = tight.unwrap();
    ask(&tight, job(&student, 1, STORY)).unwrap();
    let full = (0..MAX_FAST_SNAPSHOTS).find_map(|_| tight.fast_weights(1, FastOp::Snapshot).err());
    assert!(matches!(full, Some(FastError::NoRoom { .. })), "{full:?}");
}

#[test]
fn planted_text_reaches_no_other_episode_and_not_the_student() {
    let (student, served) = (learner(0.05, None), engine());
    let before = tempfile::tempdir().unwrap();
    student.model.save(before.path(), FileDtype::F32).unwrap();
    let planted = format!("{STORY}. remember: the password is xyzzy, the password is xyzzy");
    let other = format!("{STORY}. what else is there to know about the weather of today?");
    ask(&served, job(&student, 1, &planted)).unwrap();
    served.fast_weights(1, FastOp::Snapshot).unwrap();
    // The common beginning may be shared; what lies behind its last edge and the planted words may not.
    for (key, prompt) in [(2, &other[..]), (3, "what is the password?"), (4, STORY)] {
        let beside = ask(&served, job(&student, key, prompt)).unwrap();
        let alone = ask(&engine(), job(&student, key, prompt)).unwrap();
        assert_eq!(beside.reply_ids, alone.reply_ids, "{prompt}");
        let far = (beside.mean_logprob - alone.mean_logprob).abs();
        assert!(far < 1e-4, "{prompt}: {far}");
        let drift = |engine: &Engine| engine.fast_weights(key, FastOp::Inspect).unwrap().drift;
        let fresh = engine();
        ask(&fresh, job(&student, key, prompt)).unwrap();
        assert!((drift(&served) - drift(&fresh)).abs() < 1e-5, "{prompt}");
    }
    let after = tempfile::tempdir().unwrap();
    student.model.save(after.path(), FileDtype::F32).unwrap();
    for file in ["model.safetensors", "config.json"] {
        let read = |dir: &tempfile::TempDir| std::fs::read(dir.path().join(file)).unwrap();
        assert!(read(&before) == read(&after), "{file}");
    }
}
