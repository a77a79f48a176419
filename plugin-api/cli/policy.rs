//! `locum policy check` and `replay`: what is wrong with a policy, and what it would have said, before a host relies on it.

use std::path::{Path, PathBuf};

use clap::Subcommand;
use locum_core::limits::MAX_POLICY_BYTES;
use locum_core::policy::HookStats;
use locum_core::store::Query;

use crate::fail::Fail;
use crate::out::{clean, Out, Table};
use crate::Place;

#[derive(Subcommand)]
pub enum Command {
    /// Compile a policy, call each hook with a sample and run its selftest
    Check { file: PathBuf },
    /// Ask a policy about recorded episodes: what it would have said, beside what was done or what another policy says
    Replay {
        file: PathBuf,
        /// The policy to hold it against; without one, what was done
        #[arg(long, value_name = "OLD")]
        against: Option<PathBuf>,
        /// At most so many episodes, the newest
        #[arg(long, short = 'n', default_value_t = 1000)]
        limit: u32,
    },
}

pub fn run(command: Command, place: &Place, out: &Out) -> Result<(), Fail> {
    match command {
        Command::Check { file } => check(&file, out),
        Command::Replay {
            file,
            against,
            limit,
        } => replay(&file, against.as_deref(), limit, place, out),
    }
}

fn replay(
    file: &Path,
    against: Option<&Path>,
    limit: u32,
    place: &Place,
    out: &Out,
) -> Result<(), Fail> {
    let policy = crate::load_policy(Some(file))?;
    let old = against
        .map(|file| crate::load_policy(Some(file)))
        .transpose()?;
    let episodes = place.read()?.load(&Query {
        closed_only: true,
        newest_first: true,
        limit: Some(limit),
        ..Query::default()
    })?;
    let replay = locum_core::replay::replay(&episodes, policy.as_ref(), old.as_deref());
    let mut table = Table::new(&[
        "hook",
        ">asked",
        ">other verdicts",
        ">p50 µs",
        ">p99 µs",
        ">failed",
    ]);
    for hook in &replay.hooks {
        let times = replay.times.iter().find(|t| t.hook == hook.hook);
        let time = |of: &dyn Fn(&HookStats) -> String| times.map_or("–".to_owned(), of);
        table.row([
            hook.hook.clone(),
            hook.asked.to_string(),
            hook.changed.to_string(),
            time(&|t| format!("{:.0}", t.p50_us)),
            time(&|t| format!("{:.0}", t.p99_us)),
            time(&|t| t.failures.to_string()),
        ]);
    }
    out.table(&table);
    let beside = replay.against.as_deref().unwrap_or("what was done");
    let share = match replay.student_share_against {
        Some(old) => format!(
            "{:.1} % ({:.1} % with {beside})",
            replay.student_share * 100.0,
            old * 100.0
        ),
        None => format!("{:.1} %", replay.student_share * 100.0),
    };
    let cost = match replay.estimated_cost_against_usd {
        Some(old) => format!(
            "{:.2} USD ({old:.2} with {beside})",
            replay.estimated_cost_usd
        ),
        None => format!(
            "{:.2} USD ({:.2} as recorded)",
            replay.estimated_cost_usd, replay.cost_usd
        ),
    };
    out.line(&format!(
        "{} episodes, {} steps; to a student, were one offered at each: {share}; the teacher's cost then: {cost}.",
        replay.episodes, replay.steps
    ));
    out.line(&format!(
        "In {} episodes with an outcome it decides every step as was done; {} of them were successes.",
        replay.alike_episodes, replay.alike_successes
    ));
    for d in replay.disagreements.iter().take(20) {
        out.line(&clean(&format!(
            "  {} {} step {}: {}, was {}",
            d.hook, d.episode, d.step, d.is, d.was
        )));
    }
    if replay.state_dependent > 0 {
        out.line(&format!(
            "{} verdicts changed with the order of the episodes: the policy remembers things between calls.",
            replay.state_dependent
        ));
    }
    out.result(&serde_json::to_value(&replay).unwrap_or_default());
    Ok(())
}

fn check(file: &Path, out: &Out) -> Result<(), Fail> {
    let (source, name) = read(file)?;
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
