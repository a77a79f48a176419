//! What a reader relies on and a compiler does not check: the order of the rooms, the examples in the README, the file map.

use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// Every committed file, or every file outside of build output where this is no git checkout.
fn files() -> Vec<String> {
    let listed = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(root())
        .output();
    match listed {
        Ok(output) if output.status.success() => {
            let all = String::from_utf8(output.stdout).expect("file names are UTF-8");
            all.lines()
                .filter(|f| root().join(f).is_file())
                .map(str::to_string)
                .collect()
        }
        _ => {
            let mut found = Vec::new();
            walk(root(), &mut found);
            found
        }
    }
}

fn walk(dir: &Path, found: &mut Vec<String>) {
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        let (path, name) = (
            entry.path(),
            entry.file_name().to_string_lossy().into_owned(),
        );
        if path.is_dir() && !["target", ".cache", ".git", "node_modules"].contains(&name.as_str()) {
            walk(&path, found);
        } else if path.is_file() {
            found.push(
                path.strip_prefix(root())
                    .unwrap()
                    .to_string_lossy()
                    .into_owned(),
            );
        }
    }
}

/// The rooms of core, in the order in which `lib.rs` declares them.
fn rooms() -> Vec<String> {
    let rooms: Vec<_> = read("core/src/lib.rs")
        .lines()
        .filter_map(|l| l.strip_prefix("pub mod ")?.strip_suffix(';'))
        .map(str::to_string)
        .collect();
    assert!(
        rooms.len() > 10,
        "core/src/lib.rs declares its rooms as `pub mod name;`, found {rooms:?}"
    );
    rooms
}

/// The code of a file without its comments and without its tests, which may use any room.
fn code(text: &str) -> String {
    let before_tests = text
        .split("#[cfg(test)]\nmod tests {")
        .next()
        .unwrap_or(text);
    before_tests
        .lines()
        .map(|l| l.split("//").next().unwrap_or(""))
        .collect::<Vec<_>>()
        .join("\n")
}

/// First path segments after `crate::`, also those in `crate::{a::b, c}`.
fn used_rooms(code: &str) -> Vec<String> {
    let ident = |s: &str| {
        s.chars()
            .take_while(|c| c.is_alphanumeric() || *c == '_')
            .collect::<String>()
    };
    let mut used = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        if !rest.starts_with('{') {
            used.push(ident(rest));
            continue;
        }
        let (mut depth, mut start) = (0, 1);
        for (i, c) in rest.char_indices() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            if (c == ',' && depth == 1) || depth == 0 {
                used.push(ident(rest[start..i].trim_start()));
                start = i + 1;
            }
            if depth == 0 {
                break;
            }
        }
    }
    used
}

#[test]
fn a_room_uses_only_the_rooms_declared_above_it() {
    let rooms = rooms();
    let place = |name: &str| rooms.iter().position(|r| r == name);
    let mut wrong = Vec::new();
    let mut seen = 0;
    for file in files()
        .iter()
        .filter(|f| f.starts_with("core/src/") && f.ends_with(".rs"))
    {
        let inside = &file["core/src/".len()..];
        let room = inside.split('/').next().unwrap().trim_end_matches(".rs");
        let Some(own) = place(room) else { continue };
        // What only tests see may use any room.
        if ["/tests.rs", "/fixtures.rs"]
            .iter()
            .any(|end| inside.ends_with(end))
            || inside.contains("/tests/")
        {
            continue;
        }
        seen += 1;
        for used in used_rooms(&code(&read(file))) {
            if place(&used).is_some_and(|other| other > own) {
                wrong.push(format!(
                    "{file} uses crate::{used}, which is declared below {room}"
                ));
            }
        }
    }
    assert!(
        seen >= rooms.len() / 2,
        "only {seen} files of core were looked at"
    );
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn grouped_imports_are_seen_by_the_room_check() {
    let text = "use crate::{episode::{Episode, Step}, gate, store::Store};\nlet x = crate::view::View::default(); // crate::locum";
    assert_eq!(
        used_rooms(&code(text)),
        ["episode", "gate", "store", "view"]
    );
}

#[test]
fn the_architecture_page_walks_the_rooms_in_their_order() {
    let page = read("ARCHITECTURE.md");
    let map = page
        .split("## Code map")
        .nth(1)
        .expect("ARCHITECTURE.md has a section \"Code map\"");
    let map = map.split("\n## ").next().unwrap();
    let mut last = (0, String::from("the section's head"));
    for room in rooms() {
        let at = map
            .find(&format!("\n### `{room}`"))
            .unwrap_or_else(|| panic!("the code map has no heading for the room `{room}`"));
        assert!(
            at >= last.0,
            "`{room}` stands before `{}` in the code map and after it in lib.rs",
            last.1
        );
        let text = map[at + 5..].split("\n### ").next().unwrap();
        assert!(
            text.contains("**Invariant:**"),
            "the code map states no invariant for `{room}`"
        );
        last = (at, room);
    }
}

/// The fenced blocks of a Markdown file with this language.
fn blocks(page: &str, language: &str) -> Vec<String> {
    let text = read(page);
    let found: Vec<_> = text
        .split(&format!("```{language}\n"))
        .skip(1)
        .map(|b| b.split("\n```").next().unwrap().to_string() + "\n")
        .collect();
    assert!(!found.is_empty(), "{page} has no block of {language}");
    found
}

fn must_succeed(command: &mut Command, what: &str) {
    let output = command
        .output()
        .unwrap_or_else(|e| panic!("{what}: {command:?}: {e}"));
    assert!(
        output.status.success(),
        "{what}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn the_readme_s_python_host_compiles() {
    let folder = tempfile::tempdir().unwrap();
    let python = std::env::var("LOCUM_TEST_PYTHON").unwrap_or_else(|_| "python3".into());
    for (i, block) in blocks("README.md", "python").iter().enumerate() {
        let file = folder.path().join(format!("block{i}.py"));
        std::fs::write(&file, block).unwrap();
        must_succeed(
            Command::new(&python).args(["-m", "py_compile"]).arg(&file),
            "the README's Python block",
        );
    }
}

#[test]
fn the_readme_s_c_host_compiles_against_the_header() {
    let folder = tempfile::tempdir().unwrap();
    for (i, block) in blocks("README.md", "c").iter().enumerate() {
        let file = folder.path().join(format!("block{i}.c"));
        std::fs::write(&file, block).unwrap();
        let include = root().join("plugin-api/include");
        let mut cc = Command::new(std::env::var("CC").unwrap_or_else(|_| "cc".into()));
        cc.args([
            "-std=c99",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-fsyntax-only",
            "-I",
        ])
        .arg(include)
        .arg(&file);
        must_succeed(&mut cc, "the README's C block");
    }
}

#[test]
fn the_readme_s_make_targets_exist() {
    let makefile = read("Makefile");
    let readme = read("README.md");
    let mut seen = 0;
    for (at, _) in readme.match_indices("make ") {
        let before = readme[..at].chars().last();
        let word: String = readme[at + 5..]
            .chars()
            .take_while(|c| c.is_ascii_lowercase() || *c == '-')
            .collect();
        if !matches!(before, Some('`') | Some('\n')) || word.is_empty() {
            continue;
        }
        seen += 1;
        assert!(
            makefile.contains(&format!("\n{word}:")),
            "README.md says `make {word}`, the Makefile has no such target"
        );
    }
    assert!(seen > 0, "README.md names no make target");
}

/// Paths named by the README's file map.
fn file_map() -> Vec<String> {
    let readme = read("README.md");
    let map = readme
        .split("## File map")
        .nth(1)
        .expect("README.md has a section \"File map\"")
        .to_string();
    let paths: Vec<_> = map
        .lines()
        .take_while(|l| !l.starts_with("## "))
        .filter_map(|l| {
            Some(
                l.trim_start()
                    .strip_prefix("- `")?
                    .split('`')
                    .next()?
                    .to_string(),
            )
        })
        .collect();
    assert!(
        paths.len() > 20,
        "the file map has only {} entries",
        paths.len()
    );
    paths
}

#[test]
fn the_file_map_lists_what_is_there() {
    for path in file_map() {
        assert!(
            root().join(&path).exists(),
            "the README's file map lists {path}, which is not there"
        );
    }
}

#[test]
fn the_file_map_leaves_no_room_and_no_top_level_entry_out() {
    let map: Vec<PathBuf> = file_map()
        .iter()
        .map(|p| Path::new(p.trim_end_matches('/')).to_path_buf())
        .collect();
    let covers = |wanted: &Path| {
        map.iter()
            .any(|p| p == wanted || p.starts_with(wanted) || wanted.starts_with(p))
    };
    for file in files() {
        let top = Path::new(file.split('/').next().unwrap());
        if top.to_string_lossy().starts_with('.') && top != Path::new(".ci") {
            continue;
        }
        assert!(
            covers(top),
            "{} is missing from the README's file map",
            top.display()
        );
    }
    for room in rooms() {
        let folder = PathBuf::from(format!("core/src/{room}"));
        let file = folder.with_extension("rs");
        assert!(
            map.contains(&folder) || map.contains(&file),
            "the room `{room}` is missing from the README's file map"
        );
    }
}

#[test]
fn no_committed_file_holds_a_path_of_somebody_s_machine() {
    // Put together here, so that this file does not hold them itself.
    let slash = "/";
    let mut forbidden: Vec<String> = ["root", "work", "Users"]
        .iter()
        .map(|d| format!("{slash}{d}{slash}"))
        .collect();
    let checkout = root().to_string_lossy().into_owned();
    forbidden.push(format!("{checkout}{slash}"));
    for file in files() {
        let Ok(text) = std::fs::read_to_string(root().join(&file)) else {
            continue;
        };
        for path in &forbidden {
            // A path begins at a word's edge: `src/root/x` is none.
            let hit = text.match_indices(path.as_str()).find(|(at, _)| {
                !text[..*at].chars().last().is_some_and(|c| {
                    c.is_alphanumeric() || matches!(c, '.' | '_' | '-' | ')' | '}' | '*')
                })
            });
            if let Some((at, _)) = hit {
                panic!(
                    "{file}:{} holds {path}",
                    text[..at].matches('\n').count() + 1
                );
            }
        }
    }
}

#[test]
fn the_changelog_begins_with_this_version() {
    let changelog = read("CHANGELOG.md");
    let first = changelog
        .lines()
        .find(|l| l.starts_with("## "))
        .expect("CHANGELOG.md has a section for a version");
    assert!(
        first.contains(env!("CARGO_PKG_VERSION")),
        "the newest section is {first:?}"
    );
}

#[test]
fn every_package_carries_the_same_version() {
    let python = read("host-examples/python/pyproject.toml");
    let version = format!("version = \"{}\"", env!("CARGO_PKG_VERSION"));
    assert!(
        python.contains(&version),
        "the Python package has another version"
    );
    let cuda = read("core/cuda/Cargo.toml");
    assert!(
        cuda.contains(&version),
        "liblocum_cuda.so has another version"
    );
}
