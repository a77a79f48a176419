//! The example hosts, compiled with all warnings as errors and run.

use super::Bench;

#[test]
fn the_minimal_c_host_records_and_asks_its_teacher() {
    let bench = Bench::new();
    let exe = bench.build("cc", "-std=c99", "host-examples/c/minimal.c", true);
    let said = bench.run(&exe, &[bench.path("store")]);
    assert!(said.starts_with("the teacher plays: "), "{said}");
}

#[test]
fn the_c_journey_without_a_model_ends_with_the_teacher() {
    let bench = Bench::new();
    let exe = bench.build("cc", "-std=c99", "host-examples/c/journey.c", true);
    let said = bench.run(&exe, &[bench.path("store")]);
    assert!(said.ends_with("done\n"), "{said}");
}

#[test]
fn the_cpp_journey_without_a_model_ends_with_the_teacher() {
    let bench = Bench::new();
    let exe = bench.build("c++", "-std=c++17", "host-examples/cpp/journey.cpp", true);
    let said = bench.run(&exe, &[bench.path("store")]);
    assert!(said.ends_with("done\n"), "{said}");
}

#[test]
fn the_c_journey_with_a_tiny_model_distils_serves_and_rolls_back() {
    let bench = Bench::new();
    let model = bench.path("model");
    locum_core::model::write_tiny(&model, 7).unwrap();
    let exe = bench.build("cc", "-std=c99", "host-examples/c/journey.c", true);
    let said = bench.run(&exe, &[bench.path("store"), model]);
    assert!(said.ends_with("done\n"), "{said}");
    assert!(said.contains("steps by the student"), "{said}");
}

#[test]
fn the_cpp_journey_with_a_tiny_model_distils_serves_and_rolls_back() {
    let bench = Bench::new();
    let model = bench.path("model");
    locum_core::model::write_tiny(&model, 7).unwrap();
    let exe = bench.build("c++", "-std=c++17", "host-examples/cpp/journey.cpp", true);
    let said = bench.run(&exe, &[bench.path("store"), model]);
    assert!(said.ends_with("done\n"), "{said}");
}
