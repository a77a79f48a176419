//! Hosts that break the rules, and hosts that fork.

use super::{source, Bench};

#[test]
fn every_broken_rule_is_answered_by_a_status_and_never_by_a_crash() {
    let bench = Bench::new();
    let exe = bench.build("cc", "-std=c99", "tests/abi/misuse.c", true);
    assert_eq!(bench.run(&exe, &[bench.path("store")]), "done\n");
}

/// What the fuzzer found worth keeping (`make fuzz`).
#[test]
fn arbitrary_calls_with_arbitrary_handles_and_lengths_are_answered_by_a_status() {
    let bench = Bench::new();
    let model = bench.path("model");
    locum_core::model::write_tiny(&model, 1).unwrap();
    let exe = bench.build("cc", "-std=c11", "tests/abi/replay.c", true);
    let corpus = source("tests/fuzz/corpus/abi.bin");
    assert_eq!(
        bench.run(&exe, &[bench.path("store"), model, corpus]),
        "done\n"
    );
}

#[test]
fn a_forked_child_is_told_so_and_may_open_a_store_of_its_own() {
    let bench = Bench::new();
    let exe = bench.build("cc", "-std=c99", "tests/abi/fork.c", true);
    assert_eq!(
        bench.run(&exe, &[bench.path("parent"), bench.path("child")]),
        "done\n"
    );
}

#[test]
fn callbacks_may_only_call_what_is_marked_and_each_is_finalised_once() {
    let bench = Bench::new();
    let exe = bench.build("cc", "-std=c99", "tests/abi/callbacks.c", true);
    assert_eq!(bench.run(&exe, &[bench.path("store")]), "done\n");
}
