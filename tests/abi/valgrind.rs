//! C hosts under Valgrind: `make valgrind`. Slow, so not part of `make test`.

use std::process::Command;

use super::{source, Bench};

/// Runs a host under memcheck, which fails on any invalid access, use of what was never written, and block that nobody can free any more.
fn memcheck(bench: &Bench, exe: &std::path::Path, arguments: &[std::path::PathBuf]) {
    let suppressions = source("tests/abi/valgrind.supp");
    let said = Command::new("valgrind")
        .args(["--quiet", "--error-exitcode=99", "--leak-check=full"])
        .args([
            "--show-leak-kinds=definite",
            "--errors-for-leak-kinds=definite",
        ])
        .arg(format!("--suppressions={}", suppressions.display()))
        .arg(exe)
        .args(arguments)
        .env("LD_LIBRARY_PATH", bench.path(""))
        .output()
        .expect("valgrind is needed for this test; on Debian and Ubuntu: apt-get install valgrind");
    let (out, err) = (
        String::from_utf8_lossy(&said.stdout),
        String::from_utf8_lossy(&said.stderr),
    );
    assert!(
        said.status.success() && !err.contains("=="),
        "{}: {}\n{out}\n{err}",
        exe.display(),
        said.status
    );
    assert!(out.ends_with("done\n"), "{out}");
    println!("{}: no error", exe.display());
}

#[test]
#[ignore = "minutes: make valgrind"]
fn under_valgrind_the_c_journey_with_a_tiny_model_has_no_error_and_loses_nothing() {
    let bench = Bench::new();
    let model = bench.path("model");
    locum_core::model::write_tiny(&model, 7).unwrap();
    let exe = bench.build("cc", "-std=c99", "host-examples/c/journey.c", true);
    memcheck(&bench, &exe, &[bench.path("store"), model]);
}

#[test]
#[ignore = "minutes: make valgrind"]
fn under_valgrind_the_cpp_journey_has_no_error_and_loses_nothing() {
    let bench = Bench::new();
    let exe = bench.build("c++", "-std=c++17", "host-examples/cpp/journey.cpp", true);
    memcheck(&bench, &exe, &[bench.path("store")]);
}

#[test]
#[ignore = "minutes: make valgrind"]
fn under_valgrind_a_careless_host_has_no_error_and_loses_nothing() {
    let bench = Bench::new();
    let exe = bench.build("cc", "-std=c99", "tests/abi/misuse.c", true);
    memcheck(&bench, &exe, &[bench.path("store")]);
}
