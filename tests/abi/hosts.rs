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

/// Hosts compiled against the header of an earlier release, as object files in `tests/fixtures/hosts`, linked with this library.
/// Made with `cc -std=c99 -O1 -fPIE -Iplugin-api/include -c host-examples/c/journey.c` at that release.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
#[test]
fn hosts_compiled_against_earlier_releases_run_with_this_library() {
    let mut releases = 0;
    for release in std::fs::read_dir(super::source("tests/fixtures/hosts")).unwrap() {
        let release = release.unwrap().path();
        let name = release.file_name().unwrap().to_string_lossy().into_owned();
        let bench = Bench::new();
        let model = bench.path("model");
        locum_core::model::write_tiny(&model, 7).unwrap();
        let minimal = bench.link(&release.join("minimal.o"));
        let said = bench.run(&minimal, &[bench.path("least")]);
        assert!(said.starts_with("the teacher plays: "), "{name}: {said}");
        let journey = bench.link(&release.join("journey.o"));
        let said = bench.run(&journey, &[bench.path("store"), model]);
        assert!(said.ends_with("done\n"), "{name}: {said}");
        assert!(said.contains("steps by the student"), "{name}: {said}");
        releases += 1;
    }
    assert!(releases > 0);
}
