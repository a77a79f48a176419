//! `locum distil`: a job by hand, in this process.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Subcommand, ValueEnum};
use locum_core::locum::{DistilOptions, JobState, JobStatus, Locum};
use locum_core::policy::RecipeKnobs;

use crate::fail::Fail;
use crate::out::{clean, duration, Out};
use crate::Place;

/// How often a running job is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(300);

#[derive(Subcommand)]
pub enum Command {
    /// Curate, train and judge a student; returns when that is done
    Run(Box<Run>),
    /// Say where a job stands
    Status {
        /// Number of the job; the newest if not given
        #[arg(default_value_t = 0)]
        job: u64,
    },
    /// Stop a job; what it trained so far is kept for the next run
    Cancel {
        /// Number of the job; the newest if not given
        #[arg(default_value_t = 0)]
        job: u64,
    },
}

#[derive(clap::Args)]
pub struct Run {
    /// Show how it goes
    #[arg(long, short)]
    follow: bool,
    /// Policy that curates and names the recipe; the one that Locum ships if not given
    #[arg(long, value_name = "FILE")]
    policy: Option<PathBuf>,
    /// What is trained
    #[arg(long)]
    method: Option<Method>,
    /// Tokens to train on
    #[arg(long)]
    tokens: Option<u64>,
    /// Stop after this many seconds
    #[arg(long)]
    max_seconds: Option<f64>,
    /// Times to go through the dataset
    #[arg(long)]
    epochs: Option<f64>,
    /// Highest learning rate
    #[arg(long)]
    lr: Option<f64>,
    /// Rank of a LoRA adapter
    #[arg(long)]
    rank: Option<usize>,
    /// Layers trained by `--method upper`
    #[arg(long)]
    upper_layers: Option<usize>,
    #[arg(long)]
    seed: Option<u64>,
    /// Train on everything, successes or not, with no step masked: a comparison, never promoted by itself
    #[arg(long)]
    unfiltered: bool,
    /// Go on from the promoted student instead of the base
    #[arg(long)]
    continue_student: bool,
    /// Learn from the episodes of this scope; without it, from those that have none
    #[arg(long, default_value = "")]
    scope: String,
    /// Only store the student: no shadow, no canary
    #[arg(long)]
    no_trial: bool,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum Method {
    Lora,
    Upper,
    Full,
}

impl Run {
    fn options(&self) -> DistilOptions {
        let method = self.method.map(|m| match m {
            Method::Lora => "lora".to_string(),
            Method::Upper => "upper".to_string(),
            Method::Full => "full".to_string(),
        });
        DistilOptions {
            knobs: RecipeKnobs {
                method,
                tokens: self.tokens,
                max_seconds: self.max_seconds,
                epochs: self.epochs,
                lr: self.lr,
                rank: self.rank,
                upper_layers: self.upper_layers,
                seed: self.seed,
                ..RecipeKnobs::default()
            },
            unfiltered: self.unfiltered,
            continue_student: self.continue_student,
            trial: self.no_trial.then_some(false),
            scope: self.scope.clone(),
        }
    }
}

pub fn run(command: Command, place: &Place, out: &Out) -> Result<(), Fail> {
    match command {
        Command::Run(run) => start(&run, place, out),
        Command::Status { job } => {
            let status = place.locum(None, false)?.distil_status(job)?;
            show(&status, out);
            Ok(())
        }
        Command::Cancel { job } => {
            let locum = place.locum(None, false)?;
            locum.distil_cancel(job)?;
            let status = locum.distil_status(job)?;
            show(&status, out);
            Ok(())
        }
    }
}

fn start(run: &Run, place: &Place, out: &Out) -> Result<(), Fail> {
    let locum = place.locum(run.policy.as_deref(), true)?;
    let job = locum.distil_start(run.options())?;
    out.note(&format!(
        "job {job} has begun; it goes on where it stood if this command is stopped and run again"
    ));
    let status = follow(&locum, job, run.follow, out)?;
    show(&status, out);
    locum.close(Duration::from_secs(30))?;
    match status.state {
        JobState::Failed | JobState::Cancelled => Err(Fail::Job {
            job,
            state: word(status.state).into(),
            message: status.message,
        }),
        _ => Ok(()),
    }
}

pub(crate) fn follow(locum: &Locum, job: u64, shown: bool, out: &Out) -> Result<JobStatus, Fail> {
    let progress = shown.then(|| out.progress());
    let last = loop {
        let status = locum.distil_status(job)?;
        if let Some(progress) = &progress {
            progress.set(status.progress, word(status.state), &detail(&status));
        }
        if !status.state.is_running() {
            break status;
        }
        std::thread::sleep(LOOK_EVERY);
    };
    if let Some(progress) = progress {
        progress.done();
    }
    Ok(last)
}

/// The numbers of a running job in a line.
fn detail(status: &JobStatus) -> String {
    let mut parts = Vec::new();
    if status.tokens_total > 0 {
        parts.push(format!(
            "{} of {} tokens",
            status.tokens_done, status.tokens_total
        ));
    }
    if status.held_seconds >= 1.0 {
        parts.push(format!("held back for {:.0} s", status.held_seconds));
    }
    if status.tokens_shared > 0 {
        parts.push(format!("{} of them shared", status.tokens_shared));
    }
    if let Some(loss) = status.loss {
        parts.push(format!("loss {loss:.3}"));
    }
    if let Some(loss) = status.held_out_loss {
        parts.push(format!("held out {loss:.3}"));
    }
    if let Some(left) = status.seconds_left {
        parts.push(format!("{} left", duration(left)));
    }
    parts.join(", ")
}

pub(crate) fn show(status: &JobStatus, out: &Out) {
    out.line(&format!("job {}: {}", status.job, word(status.state)));
    let line = |name: &str, value: String| {
        if !value.is_empty() {
            out.line(&format!("  {name:<10} {}", clean(&value)));
        }
    };
    line("why", status.message.clone());
    if status.episodes_seen > 0 {
        line(
            "episodes",
            format!(
                "{} kept of {}, {} steps to learn from",
                status.episodes_kept, status.episodes_seen, status.samples
            ),
        );
    }
    line("training", detail(status));
    if status.seconds > 0.0 {
        line("took", duration(status.seconds));
    }
    if let Some(student) = &status.student {
        line(
            "student",
            format!(
                "{} ({})",
                status.version,
                student.chars().take(12).collect::<String>()
            ),
        );
    }
    if status.state.is_trial() {
        line(
            "trial",
            format!(
                "{} steps shadowed, {} episodes played by the student and {} by the teacher",
                status.shadow_steps, status.canary_student, status.canary_teacher
            ),
        );
        line("next", "it needs live episodes: run the agent".into());
    }
    out.result(&serde_json::to_value(status).unwrap_or_default());
}

fn word(state: JobState) -> &'static str {
    match state {
        JobState::Queued => "queued",
        JobState::Curating => "curating",
        JobState::Training => "training",
        JobState::Saving => "saving",
        JobState::Evaluating => "evaluating",
        JobState::Shadow => "shadow",
        JobState::Canary => "canary",
        JobState::Promoted => "promoted",
        JobState::Held => "held",
        JobState::Stored => "stored",
        JobState::Cancelled => "cancelled",
        JobState::Failed => "failed",
    }
}
