//! Link arguments of the shared library: a SONAME, no unloading, and a C++ runtime of our own.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=CXX");
    println!("cargo:rerun-if-env-changed=CXX_x86_64_pc_windows_gnu");
    println!(
        "cargo:rustc-env=LOCUM_TARGET={}",
        env::var("TARGET").unwrap_or_default()
    );
    let system = env::var("CARGO_CFG_TARGET_OS").unwrap_or_default();
    let gnu = env::var("CARGO_CFG_TARGET_ENV").as_deref() == Ok("gnu");
    match system.as_str() {
        "linux" => link_arguments(),
        "windows" if gnu => {}
        _ => return,
    }
    // Luau needs libstdc++. Hosts (old distributions, conda) bring older ones, and Windows has none, so ours is linked in: a search
    // directory that holds nothing but the static archive leaves the linker no other choice. Where there is no archive, the library
    // simply needs the shared one.
    if let Some(archive) = static_libstdcxx() {
        let dir =
            PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("static-cxx");
        if link_only(&archive, &dir).is_ok() {
            println!("cargo:rustc-link-search=native={}", dir.display());
        }
    }
}

fn link_arguments() {
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,liblocum.so.0");
    // Threads of ours, and thread-local destructors on the host's threads, may still run code of ours after dlclose.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
    // rustc exports every `#[no_mangle]` function of every crate, and llguidance has fifty of them. Ours stand in the object
    // files of this crate, theirs in archives, whose symbols stay inside.
    println!("cargo:rustc-cdylib-link-arg=-Wl,--exclude-libs,ALL");
}

fn static_libstdcxx() -> Option<PathBuf> {
    let target = env::var("TARGET").unwrap_or_default().replace('-', "_");
    let compiler = env::var(format!("CXX_{target}"))
        .or_else(|_| env::var("CXX"))
        .unwrap_or_else(|_| "g++".into());
    let output = Command::new(compiler)
        .arg("-print-file-name=libstdc++.a")
        .output()
        .ok()?;
    let path = PathBuf::from(String::from_utf8(output.stdout).ok()?.trim());
    // A compiler that has no such file prints the bare name.
    (path.is_absolute() && path.exists()).then_some(path)
}

fn link_only(archive: &Path, dir: &Path) -> std::io::Result<()> {
    fs::create_dir_all(dir)?;
    let link = dir.join("libstdc++.a");
    let _ = fs::remove_file(&link);
    #[cfg(unix)]
    std::os::unix::fs::symlink(archive, &link)?;
    #[cfg(not(unix))]
    fs::copy(archive, &link)?;
    Ok(())
}
