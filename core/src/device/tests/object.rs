//! Objects that are not there, not ours, or not this build's.

use std::path::Path;
use std::process::Command;

use super::super::table::{BUILD, MAGIC};
use super::super::{beside_the_library, Card, Device, DeviceError, DeviceOptions, FILE};

fn opened(path: &Path) -> DeviceError {
    let options = DeviceOptions {
        library: Some(path.into()),
        ..DeviceOptions::default()
    };
    match Card::open(&options) {
        Ok(_) => panic!("{} was taken", path.display()),
        Err(why) => why,
    }
}

/// A shared object from C.
fn compiled(folder: &Path, name: &str, source: &str) -> std::path::PathBuf {
    let (c, object) = (folder.join("object.c"), folder.join(name));
    std::fs::write(&c, source).unwrap();
    let mut cc = Command::new(std::env::var("CC").unwrap_or_else(|_| "cc".into()));
    let done = cc
        .args(["-shared", "-fPIC", "-o"])
        .arg(&object)
        .arg(&c)
        .status()
        .unwrap();
    assert!(done.success());
    object
}

#[test]
fn an_object_is_looked_for_beside_the_program_and_nowhere_else() {
    let beside = beside_the_library().unwrap();
    let folder = std::env::current_exe().unwrap().canonicalize().unwrap();
    assert_eq!(beside, folder.parent().unwrap().join(FILE));
    let device = Device::new(DeviceOptions::default());
    assert_eq!(device.words(), "not asked for yet");
    assert!(device.card().is_none());
    let words = device.words();
    assert!(
        words.starts_with("processor: no liblocum_cuda.so in /"),
        "{words}"
    );
    assert!(Device::off().card().is_none());
}

#[test]
fn an_object_that_an_option_names_must_be_there_and_be_one() {
    let folder = tempfile::tempdir().unwrap();
    let missing = opened(&folder.path().join("none.so"));
    assert!(
        matches!(&missing, DeviceError::Object { why, .. } if why.contains("No such file")),
        "{missing}"
    );
    let text = folder.path().join("text.so");
    std::fs::write(&text, "not an object").unwrap();
    let refused = opened(&text);
    assert!(
        matches!(&refused, DeviceError::Object { why, .. } if why.contains("cannot be loaded")),
        "{refused}"
    );
    let refused = opened(folder.path());
    assert!(
        matches!(&refused, DeviceError::Object { why, .. } if why == "it is no file"),
        "{refused}"
    );
}

#[test]
fn an_object_that_is_not_ours_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let other = compiled(folder.path(), "other.so", "int other(void) { return 1; }");
    let refused = opened(&other);
    assert!(
        matches!(&refused, DeviceError::Object { why, .. } if why == "it is not Locum's"),
        "{refused}"
    );
    let alike = "unsigned long long LOCUM_CUDA_TABLE[64] = {1, 2};";
    let refused = opened(&compiled(folder.path(), "alike.so", alike));
    assert!(
        matches!(&refused, DeviceError::Object { why, .. } if why == "it is not Locum's"),
        "{refused}"
    );
}

#[test]
fn an_object_of_another_build_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let source = format!(
        "unsigned long long LOCUM_CUDA_TABLE[64] = {{{MAGIC}ULL, {}ULL}};",
        BUILD ^ 1
    );
    let refused = opened(&compiled(folder.path(), "older.so", &source));
    assert!(
        matches!(&refused, DeviceError::Object { why, .. } if why.contains("another build")),
        "{refused}"
    );
    let device = Device::new(DeviceOptions {
        library: Some(folder.path().join("older.so")),
        ..DeviceOptions::default()
    });
    assert!(device.card().is_none() && device.words().contains("`make cuda` builds the right one"));
}

#[cfg(unix)]
#[test]
fn an_object_that_everybody_may_write_to_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let object = compiled(folder.path(), "open.so", "int other(void) { return 1; }");
    std::fs::set_permissions(&object, std::fs::Permissions::from_mode(0o777)).unwrap();
    let refused = opened(&object);
    assert!(
        matches!(&refused, DeviceError::Object { why, .. } if why == "everybody may write to it"),
        "{refused}"
    );
}

/// What a shared object wants of others when it is loaded.
fn undefined(object: &Path) -> Vec<String> {
    let nm = Command::new("nm")
        .args(["-D", "--undefined-only"])
        .arg(object)
        .output()
        .unwrap();
    assert!(
        nm.status.success(),
        "{}",
        String::from_utf8_lossy(&nm.stderr)
    );
    let said = String::from_utf8_lossy(&nm.stdout);
    let names = said
        .lines()
        .filter_map(|line| line.split_whitespace().last());
    names
        .map(|name| name.split('@').next().unwrap_or(name).to_string())
        .collect()
}

#[test]
fn the_object_needs_nothing_of_cuda_to_be_loaded() {
    // The one that `make cuda` built, where it did, in the folder that this test was built into.
    let tests = std::env::current_exe().unwrap();
    let built = tests.ancestors().nth(2).map(|folder| folder.join(FILE));
    let built = built.filter(|object| object.exists());
    if built.is_none() {
        println!("skipped for the object with kernels: `make cuda` was not run");
    }
    let of_tests = super::stand_in::stand_in().object.clone();
    for object in built.into_iter().chain([of_tests]) {
        let wanted = undefined(&object);
        assert!(wanted.iter().any(|name| name == "dlopen"), "{wanted:?}");
        let of_cuda: Vec<&String> = wanted
            .iter()
            .filter(|name| name.starts_with("cu") || name.starts_with("nv"))
            .collect();
        assert!(
            of_cuda.is_empty(),
            "{} leaves {of_cuda:?} undefined",
            object.display()
        );
        let needed = Command::new("readelf")
            .arg("-d")
            .arg(&object)
            .output()
            .unwrap();
        let needed = String::from_utf8_lossy(&needed.stdout).into_owned();
        assert!(!needed.contains("libcu"), "{needed}");
    }
}
