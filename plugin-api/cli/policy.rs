//! `locum policy check`: what is wrong with a policy, before a host relies on it.

use std::path::{Path, PathBuf};

use clap::Subcommand;
use locum_core::limits::MAX_POLICY_BYTES;

use crate::fail::Fail;
use crate::out::{clean, Out};

#[derive(Subcommand)]
pub enum Command {
    /// Compile a policy, call each hook with a sample and run its selftest
    Check { file: PathBuf },
}

pub fn run(command: Command, out: &Out) -> Result<(), Fail> {
    let Command::Check { file } = command;
    let (source, name) = read(&file)?;
    let report = locum_lua::check(&source, &name);
    for line in report.to_string().lines() {
        out.line(&clean(line));
    }
    if !report.is_ok() {
        return Err(Fail::Policy {
            name: report.name,
            errors: report.errors,
        });
    }
    out.result(&serde_json::to_value(&report).unwrap_or_default());
    Ok(())
}

/// A policy's source and the name it goes by in messages.
pub fn read(path: &Path) -> Result<(String, String), Fail> {
    let failed = |source| Fail::Read {
        path: path.into(),
        source,
    };
    let bytes = std::fs::metadata(path).map_err(failed)?.len();
    if bytes > MAX_POLICY_BYTES as u64 {
        let what = format!(
            "{} has {bytes} bytes, the limit for a policy is {MAX_POLICY_BYTES}",
            path.display()
        );
        return Err(Fail::Missing {
            what,
            next: "A policy is a short Lua file that returns a table.",
        });
    }
    let source = std::fs::read_to_string(path).map_err(failed)?;
    let name = path
        .file_name()
        .map(|n| n.to_string_lossy().into_owned())
        .unwrap_or_default();
    Ok((source, name))
}
