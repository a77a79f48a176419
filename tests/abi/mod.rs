//! The C interface from outside: the shared library as a compiler, a linker, a loader and a careless host see it.

mod crowd;
mod exports;
mod hosts;
mod misuse;
mod valgrind;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The shared library, which cargo builds beside the test binary because the tests depend on its crate.
fn library() -> PathBuf {
    let deps = std::env::current_exe()
        .unwrap()
        .parent()
        .unwrap()
        .to_path_buf();
    let here = [
        deps.join("liblocum.so"),
        deps.parent().unwrap().join("liblocum.so"),
    ];
    here.into_iter()
        .find(|path| path.exists())
        .expect("liblocum.so is built beside the tests")
}

/// A file of the repository.
fn source(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// A directory in which C hosts are built and run against the library.
struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        // The name that the loader looks for is the library's SONAME.
        std::os::unix::fs::symlink(library(), dir.path().join("liblocum.so.0")).unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Compiles one source of the repository, warnings being errors, and links it with the library.
    fn build(&self, compiler: &str, standard: &str, path: &str, link_locum: bool) -> PathBuf {
        let exe = self.path(&path.replace(['/', '.'], "-"));
        let mut command = Command::new(compiler);
        command.arg(standard).args([
            "-Wall",
            "-Wextra",
            "-Werror",
            "-pedantic",
            "-g",
            "-O1",
            "-pthread",
        ]);
        command
            .arg("-I")
            .arg(source("plugin-api/include"))
            .arg("-o")
            .arg(&exe)
            .arg(source(path));
        if link_locum {
            command
                .arg("-L")
                .arg(self.dir.path())
                .arg("-l:liblocum.so.0");
        }
        command.arg("-ldl");
        let said = command
            .output()
            .expect("a C and a C++ compiler are needed for this test");
        assert!(
            said.status.success(),
            "{path} with {compiler} {standard}:\n{}",
            String::from_utf8_lossy(&said.stderr)
        );
        exe
    }

    /// Links an object file with the library.
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    fn link(&self, object: &Path) -> PathBuf {
        let exe = self.path(&object.file_stem().unwrap().to_string_lossy());
        let mut command = Command::new("cc");
        command.arg(object).arg("-o").arg(&exe).arg("-pthread");
        command.arg("-L").arg(self.dir.path());
        let linked = command.args(["-l:liblocum.so.0", "-ldl"]).output().unwrap();
        assert!(
            linked.status.success(),
            "{}",
            String::from_utf8_lossy(&linked.stderr)
        );
        exe
    }

    /// Runs a host; a failure shows all it printed. The library itself must print nothing, so stderr stays empty.
    fn run<S: AsRef<OsStr>>(&self, exe: &Path, arguments: &[S]) -> String {
        let said = self.try_run(exe, arguments);
        let (out, err) = (
            String::from_utf8_lossy(&said.stdout),
            String::from_utf8_lossy(&said.stderr),
        );
        assert!(
            said.status.success(),
            "{}: {}\n{out}\n{err}",
            exe.display(),
            said.status
        );
        assert_eq!(err, "", "{out}");
        out.into_owned()
    }

    fn try_run<S: AsRef<OsStr>>(&self, exe: &Path, arguments: &[S]) -> Output {
        Command::new(exe)
            .args(arguments)
            .env("LD_LIBRARY_PATH", self.dir.path())
            .output()
            .unwrap()
    }
}

/// What a command prints.
fn said(program: &str, arguments: &[&OsStr]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(
        output.status.success(),
        "{program}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}
