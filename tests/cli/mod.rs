//! The command `locum` from outside: as a process, with its exit codes, its last line and its sentences.

mod bench;
mod episodes;
mod eval;
mod journey;
mod pause;
mod refusals;
mod store;
mod trust;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{json, Value};

/// A folder of its own with a store in it.
pub struct World {
    folder: tempfile::TempDir,
}

impl World {
    pub fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_locum"));
        command
            .arg("--store")
            .arg(self.path("store"))
            .args(args)
            .env_remove("LOCUM_STORE")
            .current_dir(self.folder.path());
        command.stdin(Stdio::null());
        command
    }

    pub fn run(&self, args: &[&str]) -> Ran {
        Ran(self.command(args).output().unwrap())
    }

    /// Runs with `--json`, expects success, and gives the last line.
    pub fn json(&self, args: &[&str]) -> Value {
        let ran = self.run(&[args, &["--json"]].concat());
        assert_eq!(ran.code(), 0, "{args:?}: {}", ran.stderr());
        ran.last_line()
    }

    /// Writes a file of made-up episodes in OpenAI chat form and gives its path. Every third one is a failure.
    pub fn episodes_file(&self, n: usize) -> String {
        let path = self.path("episodes.jsonl");
        let lines: Vec<_> = (0..n).map(|i| episode(i).to_string()).collect();
        std::fs::write(&path, lines.join("\n") + "\n").unwrap();
        path.to_str().unwrap().to_string()
    }
}

/// An episode of a small mail desk: look a customer up, then send the letter that belongs to the answer.
pub fn episode(i: usize) -> Value {
    let letters = ["welcome", "reminder", "invoice", "thanks"];
    let letter = letters[i % letters.len()];
    let success = i % 3 != 2;
    let call = |id: &str, name: &str, arguments: Value| {
        json!({"role": "assistant", "content": null,
               "tool_calls": [{"id": id, "type": "function", "function": {"name": name, "arguments": arguments.to_string()}}]})
    };
    let sent = if success {
        letter
    } else {
        letters[(i + 1) % letters.len()]
    };
    json!({
        "messages": [
            {"role": "system", "content": "You work at a mail desk."},
            {"role": "user", "content": format!("Send customer {i} the letter they wait for.")},
            call("a", "lookup", json!({"customer": i.to_string()})),
            {"role": "tool", "tool_call_id": "a", "content": format!("customer {i} waits for: {letter}")},
            call("b", "send", json!({"letter": sent})),
            {"role": "tool", "tool_call_id": "b", "content": "sent"},
        ],
        "tools": [
            {"type": "function", "function": {"name": "lookup", "description": "Look a customer up.",
                "parameters": {"type": "object", "properties": {"customer": {"type": "string"}}, "required": ["customer"]}}},
            {"type": "function", "function": {"name": "send", "description": "Send a letter.",
                "parameters": {"type": "object", "properties": {"letter": {"type": "string", "enum": letters}}, "required": ["letter"]}}},
        ],
        "outcome": {"success": success, "reward": if success { 1.0 } else { 0.0 }},
    })
}

pub struct Ran(Output);

impl Ran {
    pub fn code(&self) -> i32 {
        self.0.status.code().unwrap_or(-1)
    }

    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.0.stdout).into_owned()
    }

    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.0.stderr).into_owned()
    }

    pub fn last_line(&self) -> Value {
        let stdout = self.stdout();
        let line = stdout
            .lines()
            .last()
            .unwrap_or_else(|| panic!("nothing on stdout; stderr: {}", self.stderr()));
        serde_json::from_str(line)
            .unwrap_or_else(|e| panic!("the last line is no JSON ({e}): {line}"))
    }
}

pub fn text(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap()
}
