//! The header against the library, as the linker and the loader see it.

use std::collections::BTreeSet;

use super::{library, said, source, Bench};

/// Names of the functions that the header declares.
fn declared() -> BTreeSet<String> {
    let header = std::fs::read_to_string(source("plugin-api/include/locum.h")).unwrap();
    header
        .lines()
        .filter_map(|line| line.strip_prefix("LOCUM_API "))
        .map(|line| {
            let name = line
                .split_once('(')
                .expect("a declaration names its arguments")
                .0;
            name.rsplit([' ', '*']).next().unwrap().to_string()
        })
        .collect()
}

#[test]
fn the_library_exports_exactly_what_the_header_declares() {
    let symbols = said(
        "nm",
        &[
            "-D".as_ref(),
            "--defined-only".as_ref(),
            library().as_os_str(),
        ],
    );
    let exported: BTreeSet<String> = symbols
        .lines()
        .filter_map(|l| l.split_whitespace().last())
        .map(Into::into)
        .collect();
    let declared = declared();
    assert!(declared.len() >= 37, "{declared:?}");
    assert_eq!(exported, declared);
}

#[test]
fn the_library_has_its_soname_stays_mapped_and_brings_its_own_cxx_runtime() {
    let dynamic = said("readelf", &["-d".as_ref(), library().as_os_str()]);
    let has = |tag: &str, value: &str| {
        dynamic
            .lines()
            .any(|l| l.contains(tag) && l.contains(value))
    };
    assert!(has("SONAME", "[liblocum.so.0]"), "{dynamic}");
    assert!(has("FLAGS_1", "NODELETE"), "{dynamic}");
    let needed: Vec<&str> = dynamic.lines().filter(|l| l.contains("NEEDED")).collect();
    let archive = said("g++", &["-print-file-name=libstdc++.a".as_ref()]);
    if std::path::Path::new(archive.trim()).is_absolute() {
        assert!(!has("NEEDED", "libstdc++"), "{needed:?}");
    }
    for line in needed {
        let usual = [
            "libc.so",
            "libm.so",
            "libgcc_s.so",
            "ld-linux",
            "libstdc++.so",
            "libpthread",
            "libdl",
        ];
        assert!(
            usual.iter().any(|name| line.contains(name)),
            "an unexpected library is needed: {line}"
        );
    }
}

#[test]
fn no_function_of_the_header_lacks_its_thread_tag() {
    let header = std::fs::read_to_string(source("plugin-api/include/locum.h")).unwrap();
    let chunks: Vec<&str> = header.split("\nLOCUM_API ").collect();
    assert_eq!(chunks.len() - 1, declared().len());
    for chunk in chunks.windows(2) {
        let comment = chunk[0]
            .rsplit_once("\n/* ")
            .expect("a comment stands before every declaration")
            .1;
        let name = chunk[1].split('(').next().unwrap().trim();
        let tagged = ["[any-thread]", "[one-thread-at-a-time]"]
            .iter()
            .any(|tag| comment.contains(tag));
        assert!(tagged, "{name} says nothing about threads:\n{comment}");
    }
}

#[test]
fn the_header_compiles_alone_in_every_dialect() {
    let bench = Bench::new();
    for (compiler, standard, include) in [
        ("cc", "-std=c99", "locum.h"),
        ("cc", "-std=c11", "locum.h"),
        ("c++", "-std=c++11", "locum.h"),
        ("c++", "-std=c++17", "locum.h"),
        ("c++", "-std=c++17", "locum.hpp"),
        ("c++", "-std=c++20", "locum.hpp"),
    ] {
        let file = bench.path(if compiler == "cc" {
            "alone.c"
        } else {
            "alone.cpp"
        });
        std::fs::write(
            &file,
            format!("#include <{include}>\n#include <{include}>\nint main(void) {{ return 0; }}\n"),
        )
        .unwrap();
        let output = std::process::Command::new(compiler)
            .arg(standard)
            .args([
                "-Wall",
                "-Wextra",
                "-Werror",
                "-pedantic",
                "-Wconversion",
                "-fsyntax-only",
                "-I",
            ])
            .arg(source("plugin-api/include"))
            .arg(&file)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{include} with {compiler} {standard}:\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}
