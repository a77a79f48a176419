//! `locum episodes`: what was recorded, in and out.

use std::io::Write;
use std::path::PathBuf;

use clap::{Subcommand, ValueEnum};
use locum_core::episode::{EpisodeId, Source, Status, Step};
use locum_core::formats;
use locum_core::policy::Policy;
use locum_core::report::utc;
use locum_core::secrets::Detect;
use locum_core::store::{EpisodeSummary, Query, Store};
use serde_json::{json, Value};

use crate::fail::Fail;
use crate::out::{clean, Out, Table};
use crate::Place;

/// Episodes read at a time by an export, so that a large store does not need to fit into memory.
const EXPORT_BATCH: u32 = 64;
/// Longest text of a step that `show` prints, in characters.
const SHOWN_CHARS: usize = 600;

#[derive(Subcommand)]
pub enum Command {
    /// List episodes, newest first
    List {
        #[command(flatten)]
        filter: Filter,
        /// At most this many
        #[arg(long, short = 'n', default_value_t = 50)]
        limit: u32,
    },
    /// Show one episode step by step
    Show {
        /// The episode's id, or the beginning of it
        id: String,
    },
    /// Read episodes from files: OpenAI chat JSONL, tau-bench or InterCode runs
    Import {
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// openai-chat, tau-bench or intercode; told from the content if not given
        #[arg(long)]
        format: Option<String>,
        /// Policy whose `redact` sees every text before it is written; the one that Locum ships if not given
        #[arg(long, value_name = "FILE")]
        policy: Option<PathBuf>,
        /// Secrets that are replaced by a mark: all, none, or kinds to leave out ("-email,-entropy")
        #[arg(long, default_value = "all", allow_hyphen_values = true)]
        detectors: Detect,
    },
    /// Write episodes as OpenAI chat JSONL
    Export {
        #[command(flatten)]
        filter: Filter,
        /// File to write instead of stdout
        #[arg(long, short)]
        output: Option<PathBuf>,
        /// Leave out `metadata.locum`, in which stands what the chat format has no place for
        #[arg(long)]
        plain: bool,
    },
}

#[derive(clap::Args)]
pub struct Filter {
    /// Only episodes that ended so
    #[arg(long)]
    status: Vec<StatusName>,
    /// Only this family of tasks
    #[arg(long)]
    domain: Option<String>,
    /// Only episodes of this task id
    #[arg(long)]
    task: Option<String>,
    /// Only episodes in which this text occurs
    #[arg(long)]
    text: Option<String>,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum StatusName {
    Success,
    Partial,
    Failure,
    Aborted,
    Unknown,
}

impl Filter {
    fn query(self) -> Query {
        let status = |name: StatusName| match name {
            StatusName::Success => Status::Success,
            StatusName::Partial => Status::Partial,
            StatusName::Failure => Status::Failure,
            StatusName::Aborted => Status::Aborted,
            StatusName::Unknown => Status::Unknown,
        };
        Query {
            statuses: self.status.into_iter().map(status).collect(),
            domain: self.domain,
            task_id: self.task,
            text: self.text,
            ..Query::default()
        }
    }
}

pub fn run(command: Command, place: &Place, out: &Out) -> Result<(), Fail> {
    match command {
        Command::List { filter, limit } => list(&place.read()?, filter.query(), limit, out),
        Command::Show { id } => show(&place.read()?, &id, out),
        Command::Import {
            files,
            format,
            policy,
            detectors,
        } => {
            let policy = crate::load_policy(policy.as_deref())?;
            let store = place.write(detectors)?;
            import(&store, &files, format.as_deref(), policy.as_ref(), out)
        }
        Command::Export {
            filter,
            output,
            plain,
        } => export(&place.read()?, filter.query(), output, !plain, out),
    }
}

fn list(store: &Store, query: Query, limit: u32, out: &Out) -> Result<(), Fail> {
    let episodes = store.episodes(&Query {
        newest_first: true,
        limit: Some(limit),
        ..query
    })?;
    let counts = store.counts(None)?;
    let mut table = Table::new(&[
        "episode",
        "began (UTC)",
        "task",
        ">steps",
        ">teacher",
        ">student",
        "outcome",
    ]);
    for e in &episodes {
        table.row([
            e.id.to_string(),
            utc(e.started_at_ms),
            if e.task_id.is_empty() {
                e.instruction.clone()
            } else {
                e.task_id.clone()
            },
            e.steps.to_string(),
            e.teacher_steps.to_string(),
            e.student_steps.to_string(),
            outcome(e),
        ]);
    }
    if !table.is_empty() {
        out.table(&table);
    }
    out.note(&format!(
        "{} of {} episodes",
        episodes.len(),
        counts.episodes
    ));
    out.result(&json!({ "episodes": episodes, "counts": counts }));
    Ok(())
}

fn outcome(e: &EpisodeSummary) -> String {
    let status = if e.closed { word(e.status) } else { "open" };
    match (e.score, e.incomplete) {
        (Some(score), false) => format!("{status} ({score})"),
        (_, true) => format!("{status}, incomplete"),
        _ => status.into(),
    }
}

fn word(status: Status) -> &'static str {
    match status {
        Status::Success => "success",
        Status::Partial => "partial",
        Status::Failure => "failure",
        Status::Aborted => "aborted",
        Status::Unknown => "unknown",
    }
}

fn show(store: &Store, id: &str, out: &Out) -> Result<(), Fail> {
    let id = find(store, id)?;
    let episode = store
        .episode(id)?
        .ok_or_else(|| no_episode(&id.to_string()))?;
    out.line(&format!("episode {id}"));
    for (name, value) in [
        ("task", episode.task.id.as_str()),
        ("domain", &episode.task.domain),
        ("goal", &episode.task.instruction),
        ("came as", &episode.provenance.source_format),
    ] {
        if !value.is_empty() {
            out.line(&format!("  {name:<8} {}", clip(value)));
        }
    }
    out.line(&format!("  {:<8} {}", "began", utc(episode.started_at_ms)));
    if let Some(outcome) = &episode.outcome {
        let why = outcome
            .reason
            .as_deref()
            .map(|r| format!(": {}", clip(r)))
            .unwrap_or_default();
        out.line(&format!("  {:<8} {}{why}", "outcome", word(outcome.status)));
    }
    for step in &episode.steps {
        show_step(step, out);
    }
    out.result(&serde_json::to_value(&episode).unwrap_or_default());
    Ok(())
}

fn show_step(step: &Step, out: &Out) {
    let who = match step.source {
        Source::System => "system".to_string(),
        Source::User => "user".to_string(),
        Source::Agent => format!("{:?}", step.actor).to_lowercase(),
    };
    let text = step.message.as_ref().map(|m| m.text()).unwrap_or_default();
    out.line(format!("\n{:>3} {who}  {}", step.index, clip(&text)).trim_end());
    for call in &step.tool_calls {
        let arguments = call
            .arguments_raw
            .clone()
            .unwrap_or_else(|| call.arguments.to_string());
        out.line(&format!(
            "      → {}({})",
            clean(&call.name),
            clip(&arguments)
        ));
    }
    for observation in &step.observations {
        let mark = if observation.is_error { "✗" } else { "←" };
        let text = observation
            .content
            .as_ref()
            .map(|c| c.text())
            .unwrap_or_default();
        out.line(&format!("      {mark} {}", clip(&text)));
    }
    if let Some(decision) = &step.decision {
        out.line(&format!("      ({})", clip(&decision.reason)));
    }
}

fn clip(text: &str) -> String {
    let text = clean(text);
    match text.chars().count() > SHOWN_CHARS {
        true => text.chars().take(SHOWN_CHARS).chain(['…']).collect(),
        false => text,
    }
}

/// The episode whose id begins with `prefix`.
fn find(store: &Store, prefix: &str) -> Result<EpisodeId, Fail> {
    if let Ok(id) = prefix.parse() {
        return Ok(id);
    }
    let prefix = prefix.to_ascii_lowercase();
    let mut found = store
        .episodes(&Query::default())?
        .into_iter()
        .map(|e| e.id)
        .filter(|id| id.to_string().starts_with(&prefix));
    match (found.next(), found.next()) {
        (Some(id), None) if !prefix.is_empty() => Ok(id),
        (Some(_), Some(_)) => Err(Fail::Missing {
            what: format!("several episodes begin with {prefix:?}"),
            next: "Give more of the id; `locum episodes list` shows them whole.",
        }),
        _ => Err(no_episode(&prefix)),
    }
}

fn no_episode(id: &str) -> Fail {
    Fail::Missing {
        what: format!("no episode is called {id:?}"),
        next: "`locum episodes list` shows them.",
    }
}

fn import(
    store: &Store,
    files: &[PathBuf],
    format: Option<&str>,
    policy: &dyn Policy,
    out: &Out,
) -> Result<(), Fail> {
    let mut total = formats::ImportCounts::default();
    let mut by_file = Vec::new();
    let progress = out.progress();
    for (i, file) in files.iter().enumerate() {
        progress.set(
            i as f64 / files.len() as f64,
            &file.display().to_string(),
            "",
        );
        let counts = formats::import_into(file, format, store, policy)?;
        total.episodes += counts.episodes;
        total.steps += counts.steps;
        total.successes += counts.successes;
        total.failures += counts.failures;
        total.partial += counts.partial;
        total.aborted += counts.aborted;
        total.unknown += counts.unknown;
        total.skipped += counts.skipped;
        by_file.push((file, counts));
    }
    progress.done();
    let mut table = Table::new(&[
        "file",
        "format",
        ">episodes",
        ">steps",
        ">successes",
        ">failures",
        ">unknown",
        ">skipped",
    ]);
    for (file, c) in &by_file {
        let name = file
            .file_name()
            .map(|n| n.to_string_lossy().into_owned())
            .unwrap_or_default();
        let numbers = [
            c.episodes,
            c.steps,
            c.successes,
            c.failures,
            c.unknown,
            c.skipped,
        ]
        .map(|n| n.to_string());
        let [episodes, steps, successes, failures, unknown, skipped] = numbers;
        table.row([
            name,
            c.format.clone(),
            episodes,
            steps,
            successes,
            failures,
            unknown,
            skipped,
        ]);
    }
    out.table(&table);
    for (file, counts) in &by_file {
        for skip in counts.reasons.iter().take(5) {
            out.note(&format!(
                "{} line {}: {}",
                file.display(),
                skip.line,
                clean(&skip.reason)
            ));
        }
        if counts.skipped > 5 {
            out.note(&format!(
                "{}: {} more were skipped",
                file.display(),
                counts.skipped - 5
            ));
        }
    }
    let reasons: Vec<Value> = by_file
        .iter()
        .flat_map(|(file, c)| {
            c.reasons
                .iter()
                .map(move |s| json!({ "file": file, "line": s.line, "reason": s.reason }))
        })
        .collect();
    out.result(&json!({
        "episodes": total.episodes, "steps": total.steps, "successes": total.successes, "failures": total.failures,
        "unknown": total.unknown, "skipped": total.skipped, "partial": total.partial, "aborted": total.aborted, "reasons": reasons,
    }));
    store.close(std::time::Duration::from_secs(30))?;
    Ok(())
}

fn export(
    store: &Store,
    query: Query,
    output: Option<PathBuf>,
    sidecar: bool,
    out: &Out,
) -> Result<(), Fail> {
    let mut losses = formats::LossReport::default();
    let (mut episodes, mut offset) = (0u64, 0u32);
    let mut file = match &output {
        Some(path) => Some(PartFile::create(path)?),
        None => None,
    };
    loop {
        let batch = store.load(&Query {
            limit: Some(EXPORT_BATCH),
            offset,
            ..query.clone()
        })?;
        offset += batch.len() as u32;
        for episode in &batch {
            let exported = formats::export_openai(episode, sidecar);
            losses.add(&exported.losses);
            episodes += 1;
            match &mut file {
                Some(file) => file.line(&exported.line.to_string())?,
                None => out.raw(&exported.line.to_string()),
            }
        }
        if batch.len() < EXPORT_BATCH as usize || out.closed() {
            break;
        }
    }
    let Some(file) = file else {
        // The episodes themselves are the output; an account of losses between them would spoil it.
        out.result(&json!({ "episodes": episodes, "losses": losses.losses }));
        return Ok(());
    };
    file.finish()?;
    let mut table = Table::new(&["field", ">values", "what becomes of it"]);
    for loss in &losses.losses {
        let fate = if loss.kept {
            "kept in metadata.locum"
        } else {
            "left out"
        };
        table.row([loss.field.clone(), loss.count.to_string(), fate.into()]);
    }
    if !table.is_empty() {
        out.table(&table);
    }
    out.note(&format!("{episodes} episodes written"));
    out.result(&json!({ "episodes": episodes, "output": output, "losses": losses.losses }));
    Ok(())
}

/// A file that is there whole or not at all: written beside its place and renamed.
struct PartFile {
    path: PathBuf,
    part: PathBuf,
    file: std::io::BufWriter<std::fs::File>,
}

impl PartFile {
    fn create(path: &std::path::Path) -> Result<Self, Fail> {
        let mut name = path.file_name().unwrap_or_default().to_os_string();
        name.push(".part");
        let part = path.with_file_name(name);
        let file = std::fs::File::create(&part).map_err(|source| Fail::Write {
            path: part.clone(),
            source,
        })?;
        Ok(Self {
            path: path.into(),
            part,
            file: std::io::BufWriter::new(file),
        })
    }

    fn line(&mut self, text: &str) -> Result<(), Fail> {
        writeln!(self.file, "{text}").map_err(|source| Fail::Write {
            path: self.part.clone(),
            source,
        })
    }

    fn finish(self) -> Result<(), Fail> {
        let failed = |source| Fail::Write {
            path: self.path.clone(),
            source,
        };
        self.file
            .into_inner()
            .map_err(|e| failed(e.into_error()))?
            .sync_all()
            .map_err(failed)?;
        std::fs::rename(&self.part, &self.path).map_err(failed)
    }
}
