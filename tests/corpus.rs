//! What the fuzzer found worth keeping, thrown at the doors of an ordinary build again. `make fuzz` looks for more.

#[path = "fuzz/doors.rs"]
mod doors;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use doors::{Door, DOORS};

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus")
}

/// The inputs of a packed corpus: before each its length, four bytes, the lowest first.
fn unpacked(mut packed: &[u8]) -> Vec<&[u8]> {
    let mut inputs = Vec::new();
    while let Some((length, rest)) = packed.split_first_chunk::<4>() {
        let length = u32::from_le_bytes(*length) as usize;
        inputs.push(rest.get(..length).expect("it ends with an input"));
        packed = &rest[length..];
    }
    inputs
}

#[test]
fn every_kept_input_is_read_or_refused() {
    for (name, open) in DOORS {
        let packed = std::fs::read(corpus().join(format!("{name}.bin"))).unwrap();
        let inputs = unpacked(&packed);
        assert!(inputs.len() > 20, "{name} has hardly a corpus");
        for (at, input) in inputs.iter().enumerate() {
            let done = std::panic::catch_unwind(|| open(input));
            assert!(done.is_ok(), "{name}: input {at} of its corpus, {input:?}");
        }
        println!("{name}: {} inputs", inputs.len());
    }
}

/// A door without a corpus would go untried, and a corpus without a door is thrown at nothing. `abi` is opened in `tests/abi`.
#[test]
fn every_door_has_a_corpus_and_every_corpus_a_door() {
    let kept: BTreeSet<String> = std::fs::read_dir(corpus())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    let names = DOORS.iter().map(|(name, _): &Door| *name);
    let expected = names.chain(["abi"]).map(|name| format!("{name}.bin"));
    assert_eq!(kept, expected.collect());
}
