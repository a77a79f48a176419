//! Small steps, which are replayed from graphs: they compute what any step does, and where a graph cannot be had, any step's way is taken.

use super::super::{Card, CardModel, CardSequence, DeviceError, DeviceOptions};
use super::stand_in::run;
use super::{card, learner, reference, tokens, wide, OBJECT};
use crate::model::{Model, WeightFormat};
use std::sync::Arc;

/// Numbers of sequences that go on by one token, one step after another: each place is met, twice and more, upwards and downwards.
const SIZES: [usize; 30] = [
    1, 1, 1, 2, 2, 3, 4, 3, 5, 5, 8, 7, 9, 12, 16, 17, 20, 33, 40, 34, 20, 9, 9, 5, 3, 3, 2, 1, 1,
    1,
];

fn best(logits: &[f32]) -> u32 {
    (0..logits.len())
        .max_by(|a, b| logits[*a].total_cmp(&logits[*b]))
        .unwrap() as u32
}

/// A digest of numbers to their last bit.
fn bits(numbers: &[f32]) -> u64 {
    numbers.iter().fold(0xcbf2_9ce4_8422_2325, |state, x| {
        (state ^ u64::from(x.to_bits())).wrapping_mul(0x0100_0000_01b3)
    })
}

/// A sequence and the token that comes next.
struct Text {
    sequence: CardSequence,
    next: u32,
}

impl Text {
    fn new(on: &Arc<CardModel>, mut sequence: CardSequence, prompt: &[u32]) -> Self {
        let logits = on
            .step(&mut [(&mut sequence, prompt)], &[prompt.len() - 1])
            .unwrap();
        let next = best(&logits);
        Self { sequence, next }
    }
}

/// One greedy token for each of `texts`; what it was computed from.
fn go_on(on: &Arc<CardModel>, texts: &mut [&mut Text]) -> Result<u64, DeviceError> {
    let next: Vec<[u32; 1]> = texts.iter().map(|text| [text.next]).collect();
    let mut batch: Vec<(&mut CardSequence, &[u32])> = texts
        .iter_mut()
        .zip(&next)
        .map(|(text, next)| (&mut text.sequence, &next[..]))
        .collect();
    let rows: Vec<usize> = (0..batch.len()).collect();
    let logits = on.step(&mut batch, &rows)?;
    let v = logits.len() / texts.len();
    for (text, logits) in texts.iter_mut().zip(logits.chunks(v)) {
        text.next = best(logits);
    }
    Ok(bits(&logits))
}

/// Batches that grow and shrink, of sequences of very different lengths.
fn batches(card: &Arc<Card>, name: &str, model: &Model) {
    let on = card.load(model).unwrap();
    let mut texts: Vec<Text> = (0..40)
        .map(|i| {
            // Two of them are split over blocks.
            let n = if i % 20 == 0 { 300 - i } else { 2 + i % 11 };
            let sequence = on.sequence(4, false).unwrap();
            Text::new(&on, sequence, &tokens(model, n, i as u64))
        })
        .collect();
    for (i, n) in SIZES.iter().enumerate() {
        // Others every time, in another order.
        texts.rotate_left(3 * i % 7);
        let mut batch: Vec<&mut Text> = texts.iter_mut().take(*n).collect();
        let seen = go_on(&on, &mut batch).unwrap();
        println!("step {name}, {n} at once: {seen:016x}");
    }
    let info = card.info();
    println!("said: {} graphs, single: {}", info.graphs, info.single);
}

/// Sequences are copied, cut, freed and grow out of their places between two replays.
fn changes(card: &Arc<Card>, name: &str, model: &Model) {
    let on = card.load(model).unwrap();
    let mut texts: Vec<Text> = (0..4)
        .map(|i| {
            let sequence = on.sequence(4, false).unwrap();
            Text::new(&on, sequence, &tokens(model, 58 + i, 30 + i as u64))
        })
        .collect();
    for i in 0..24 {
        match i % 6 {
            2 => assert!(texts[1].sequence.truncate(40 + i)),
            3 => {
                let len = texts[0].sequence.ids.len() - 2;
                let sequence = texts[0].sequence.prefix(len, len + 1).unwrap();
                let next = texts[0].next;
                texts[2] = Text { sequence, next };
            }
            4 => {
                texts.swap(0, 3);
                drop(on.sequence(200, false).unwrap());
            }
            _ => {}
        }
        let mut batch: Vec<&mut Text> = texts.iter_mut().collect();
        let seen = go_on(&on, &mut batch).unwrap();
        println!("step {name}, change {i}: {seen:016x}");
    }
}

/// Sequences that learn, that do not, and that are switched off and on again, over many edges; with a cap, they begin again.
fn learning(card: &Arc<Card>, name: &str, model: &Model) {
    let on = card.load(model).unwrap();
    let mut texts: Vec<Text> = [true, true, false, true]
        .iter()
        .enumerate()
        .map(|(i, learns)| {
            let sequence = on.sequence(4, *learns).unwrap();
            Text::new(&on, sequence, &tokens(model, 1 + i, 50 + i as u64))
        })
        .collect();
    for i in 0..40 {
        match i {
            5 => texts[1].sequence.switch(false),
            19 => texts[1].sequence.switch(true),
            22 => texts[3].sequence.reset(),
            30 => {
                let len = texts[0].sequence.ids.len();
                let sequence = texts[0].sequence.prefix(len, len).unwrap();
                texts[3].sequence = sequence;
            }
            _ => {}
        }
        let mut batch: Vec<&mut Text> = texts.iter_mut().take(1 + (i / 3) % 4).collect();
        let seen = go_on(&on, &mut batch).unwrap();
        let drifts: Vec<f32> = texts
            .iter()
            .flat_map(|t| t.sequence.drifts().values().copied())
            .collect();
        let waiting: Vec<usize> = texts.iter().map(|t| t.sequence.waiting()).collect();
        println!(
            "step {name}, learning {i}: {seen:016x} {:016x} {waiting:?}",
            bits(&drifts)
        );
    }
    let updates: usize = texts.iter().map(|t| t.sequence.updates.len()).sum();
    let tripped = texts.iter().flat_map(|t| &t.sequence.updates);
    let tripped = tripped.filter(|(_, update)| update.tripped).count();
    println!("step {name}: {updates} updates, {tripped} began again");
    assert!(updates > 0);
}

/// What small steps come to, to the last bit, and how they were made: run by the tests below in processes of their own.
#[test]
#[ignore = "a part of other tests, in a process of its own"]
fn say_what_batches_compute() {
    batches(&card().unwrap(), "f32", &wide(32));
}

/// The same for sequences that change and that learn.
#[test]
#[ignore = "a part of other tests, in a process of its own"]
fn say_what_small_steps_compute() {
    let card = card().unwrap();
    batches(&card, "bf16", &wide(64).packed(WeightFormat::Bf16));
    changes(&card, "qwen3", &reference("qwen3"));
    for (cap, format) in [
        (None, None),
        (Some(1e-3), None),
        (None, Some(WeightFormat::Bf16)),
    ] {
        for name in ["qwen3_hidden_lr3", "qwen3_embed_noproj_lr0p3"] {
            let mut model = learner(name);
            model.config.ttt.as_mut().unwrap().max_drift = cap;
            let model = match format {
                Some(format) => model.packed(format),
                None => model,
            };
            learning(&card, &format!("{name} {cap:?} {format:?}"), &model);
        }
    }
}

/// The lines of the steps, and how they were made.
fn said(what: &str, order: Option<&str>) -> (Vec<String>, String) {
    let output = run(
        &format!("device::tests::graph::say_what_{what}_compute"),
        order,
    );
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{order:?}: {said}{errors}");
    let lines = |start: &str| -> Vec<String> {
        let lines = said.lines().filter(|line| line.starts_with(start));
        lines.map(str::to_string).collect()
    };
    (lines("step "), lines("said: ").concat())
}

fn assert_same(what: &str, a: &[String], b: &[String]) {
    let other = a.iter().zip(b).find(|(a, b)| a != b);
    assert_eq!((other, a.len()), (None, b.len()), "{what}");
}

#[test]
fn a_replayed_step_computes_what_a_queued_one_does_to_the_last_bit() {
    let (replayed, how) = said("small_steps", None);
    assert!(replayed.len() > 200, "{replayed:?}");
    // For 1, 2, 4, ... 64 at once.
    assert_eq!(how, "said: 7 graphs, single: ");
    let (queued, how) = said("small_steps", Some("capture"));
    assert!(
        how.starts_with("said: 0 graphs, single: beginning a capture: "),
        "{how}"
    );
    assert_same("all", &replayed, &queued);
}

#[test]
fn where_a_graph_cannot_be_made_steps_are_queued_and_the_card_says_why() {
    let (replayed, how) = said("batches", None);
    assert_eq!(how, "said: 7 graphs, single: ");
    for (order, words) in [
        ("capture", "0 graphs, single: beginning a capture: "),
        (
            "broken",
            "0 graphs, single: starting a kernel: operation failed due to a previous error",
        ),
        ("instantiate=1", "0 graphs, single: making a graph ready: "),
        ("instantiate=4", "0 graphs, single: making a graph ready: "),
        // What finds no memory leaves the others.
        (
            "graph-memory=3",
            "2 graphs, single: making a graph ready: out of memory",
        ),
    ] {
        let (other, how) = said("batches", Some(order));
        assert!(how.starts_with(&format!("said: {words}")), "{order}: {how}");
        assert_same(order, &replayed, &other);
    }
}

/// Goes on until something fails, in a process of its own: run by the test below.
#[test]
#[ignore = "a part of other tests, in a process of its own"]
fn go_on_until_it_fails() {
    let card = card().unwrap();
    let model = reference("llama");
    let on = card.load(&model).unwrap();
    let mut text = Text::new(&on, on.sequence(4, false).unwrap(), &[1, 2, 3]);
    for i in 0..12 {
        let done = go_on(&on, &mut [&mut text]).map(|_| card.info().graphs);
        println!("step {i}: {done:?}");
    }
}

#[test]
fn a_card_that_fails_in_a_replay_is_lost() {
    let output = run(
        "device::tests::graph::go_on_until_it_fails",
        Some("launch=180"),
    );
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}");
    assert!(said.contains("step 3: Ok(1)"), "{said}");
    assert!(
        said.contains("Err(Lost(\"copying from the device: ")
            && said.contains("step 11: Err(Lost(\"the device failed earlier"),
        "{said}"
    );
}

/// Run by the test below, in a process of its own.
#[test]
#[ignore = "a part of other tests, in a process of its own"]
fn go_on_without_memory() {
    let options = DeviceOptions {
        library: std::env::var_os(OBJECT).map(Into::into),
        memory_bytes: 256 << 20,
        ..DeviceOptions::default()
    };
    let card = Card::open(&options).unwrap();
    let model = wide(64);
    let on = card.load(&model).unwrap();
    let mut texts: Vec<Text> = (0..5)
        .map(|i| Text::new(&on, on.sequence(4, false).unwrap(), &[1, 2, 3 + i]))
        .collect();
    let positions = (230 << 20) / (2 * 2 * 4 * 2 * 64);
    let hog = on.sequence(positions, false).unwrap();
    let mut batch: Vec<&mut Text> = texts.iter_mut().collect();
    for _ in 0..3 {
        go_on(&on, &mut batch).unwrap();
    }
    let info = card.info();
    println!("full: {} graphs, single: {}", info.graphs, info.single);
    drop(hog);
    for _ in 0..260 {
        go_on(&on, &mut batch).unwrap();
    }
    let info = card.info();
    println!("again: {} graphs, single: {}", info.graphs, info.single);
    let used = info.used_bytes;
    drop((texts, on));
    // What cuBLAS works in stays with the card.
    println!("left: {} of {used}", card.info().used_bytes >> 20);
}

#[test]
fn where_there_is_no_memory_for_a_graph_steps_are_queued_until_there_is() {
    let output = run("device::tests::graph::go_on_without_memory", None);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}");
    assert!(
        said.contains("full: 1 graphs, single: 32 MiB more are needed, ")
            && said.contains("again: 2 graphs, single: \n")
            && said.contains("left: 32 of "),
        "{said}"
    );
}

/// What the stand-in counted so far: calls, kernels started one by one, graphs started.
fn counts() -> [u64; 3] {
    use libloading::os::unix::{Library, Symbol, RTLD_LOCAL, RTLD_NOW};
    let mut out = [0; 3];
    // SAFETY: the stand-in is loaded already; its function writes three numbers.
    unsafe {
        let library = Library::open(Some("libcuda.so.1"), RTLD_NOW | RTLD_LOCAL).unwrap();
        let counts: Symbol<unsafe extern "C" fn(*mut u64)> =
            library.get(b"emulated_counts\0").unwrap();
        counts(out.as_mut_ptr());
    }
    out
}

/// Counts of a decoded token with 30 blocks, as the default base has: run by the test below.
#[test]
#[ignore = "a part of other tests, in a process of its own"]
fn count_what_a_token_takes() {
    let card = card().unwrap();
    let model = super::layered(30);
    let on = card.load(&model.packed(WeightFormat::Bf16)).unwrap();
    for n in [1, 8] {
        let mut texts: Vec<Text> = (0..n)
            .map(|i| Text::new(&on, on.sequence(64, false).unwrap(), &[1, 2, 3 + i]))
            .collect();
        let mut batch: Vec<&mut Text> = texts.iter_mut().collect();
        for _ in 0..3 {
            go_on(&on, &mut batch).unwrap();
        }
        let before = counts();
        go_on(&on, &mut batch).unwrap();
        let after = counts();
        let [calls, kernels, graphs] = std::array::from_fn(|i| after[i] - before[i]);
        println!("{n} at once: {calls} calls, {kernels} kernels, {graphs} graphs");
    }
}

#[test]
fn a_token_is_four_calls() {
    let said = |order| {
        let output = run("device::tests::graph::count_what_a_token_takes", order);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{said}");
        said
    };
    let (replayed, queued) = (said(None), said(Some("capture")));
    // Of few rows, norms and gates are made where they are read.
    for (n, calls, kernels) in [(1, 219, 183), (8, 309, 273)] {
        let words = format!("{n} at once: 4 calls, 0 kernels, 1 graphs");
        assert!(replayed.contains(&words), "{replayed}");
        let words = format!("{n} at once: {calls} calls, {kernels} kernels, 0 graphs");
        assert!(queued.contains(&words), "{queued}");
    }
}
