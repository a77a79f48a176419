//! The whole object, as it is, on a driver that runs its kernels on the processor.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use super::OBJECT;

/// Where both were built, for this process and those it starts.
pub(super) struct StandIn {
    pub object: PathBuf,
    /// libcuda.so.1 and libcublas.so.13.
    pub libraries: PathBuf,
}

/// Builds the object without kernels for a card, and the stand-in; a few seconds, most of them in the first run.
pub(super) fn stand_in() -> &'static StandIn {
    static BUILT: OnceLock<StandIn> = OnceLock::new();
    BUILT.get_or_init(|| {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda");
        let tests = std::env::current_exe().unwrap();
        let work = tests.parent().unwrap().join("locum-cuda");
        let libraries = work.join("stand-in");
        std::fs::create_dir_all(&libraries).unwrap();
        let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
        let mut build = Command::new(cargo);
        build
            .args(["build", "--release", "--quiet", "--manifest-path"])
            .arg(source.join("Cargo.toml"))
            .env("CARGO_TARGET_DIR", &work)
            .env_remove("LOCUM_CUDA_KERNELS");
        must_succeed(&mut build);
        let driver = libraries.join("libcuda.so.1");
        let mut compile = Command::new(std::env::var("CXX").unwrap_or_else(|_| "c++".into()));
        compile
            .args([
                "-std=c++17",
                "-O2",
                "-fPIC",
                "-shared",
                "-fvisibility=hidden",
                "-fno-strict-aliasing",
            ])
            .args(["-Wall", "-Werror", "-Wno-unknown-pragmas", "-o"])
            .arg(&driver)
            .arg(source.join("emulate/driver.cpp"));
        must_succeed(&mut compile);
        let blas = libraries.join("libcublas.so.13");
        if !blas.exists() {
            std::os::unix::fs::symlink("libcuda.so.1", &blas).unwrap();
        }
        StandIn {
            object: work.join("release").join(super::super::FILE),
            libraries,
        }
    })
}

fn must_succeed(command: &mut Command) {
    let output = command
        .output()
        .unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
}

/// Runs tests of this binary in a process that finds the stand-in where a driver would be.
pub(super) fn run(filter: &str, order: Option<&str>) -> Output {
    let built = stand_in();
    let mut tests = Command::new(std::env::current_exe().unwrap());
    tests
        .args([filter, "--nocapture", "--include-ignored"])
        .env("LD_LIBRARY_PATH", &built.libraries)
        .env(OBJECT, &built.object);
    if let Some(order) = order {
        tests.env("LOCUM_EMULATE", order);
    }
    tests.output().unwrap()
}

fn must_pass(filter: &str, least: usize) {
    let output = run(filter, None);
    let said = String::from_utf8_lossy(&output.stdout);
    let passed = said.lines().find_map(|l| {
        l.strip_prefix("test result: ok. ")?
            .split(' ')
            .next()?
            .parse::<usize>()
            .ok()
    });
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}\n{errors}");
    assert!(passed.is_some_and(|n| n >= least), "{said}\n{errors}");
    assert!(
        said.contains("on stand-in on the processor") && !said.contains("skipped"),
        "{said}"
    );
}

#[test]
fn serving_on_the_stand_in_is_serving_on_the_processor() {
    must_pass("device::tests::parity::", 10);
}

#[test]
fn the_measurement_runs_on_the_stand_in() {
    must_pass("device::tests::speed::the_measurement_runs", 1);
    must_pass("device::tests::label::the_measurement_runs", 1);
}

#[test]
fn training_on_the_stand_in_is_training_on_the_processor() {
    must_pass("device::tests::training::", 10);
}

#[test]
fn a_training_goes_on_on_the_processor_where_the_card_has_no_memory_or_fails() {
    let said = |order| {
        let output = run("device::tests::training::train_until_it_fails", Some(order));
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{order}: {said}");
        said
    };
    for order in ["alloc=20", "alloc=300"] {
        let said = said(order);
        assert!(
            said.contains("losses:") && said.contains("then stand-in"),
            "{order}: {said}"
        );
    }
    for order in ["launch=20", "launch=700"] {
        let said = said(order);
        assert!(
            said.contains("losses:") && said.contains("then processor: the card failed"),
            "{order}: {said}"
        );
    }
}
