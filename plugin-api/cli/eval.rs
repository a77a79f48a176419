//! `locum eval`: is a way of reading worth its while, on episodes that no training saw?

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Subcommand;
use locum_core::evaluate::ttt::Comparison;
use locum_core::locum::TttOptions;
use locum_core::report::{drift_svg, gain_markdown, gain_svg, reach, signed};
use locum_core::ttt::Forgetting;

use crate::bench::Weights;
use crate::fail::Fail;
use crate::out::{clean, Out, Table};
use crate::Place;

/// Shortest window that can be asked for, in tokens.
const MIN_WINDOW: usize = 64;

#[derive(Subcommand)]
pub enum Command {
    /// Compare a student with its updates on and off, the base, and a student trained without, on held-out episodes
    Ttt(Ttt),
}

#[derive(clap::Args)]
pub struct Ttt {
    /// Version of the student; the newest with TTT layers if not given
    #[arg(long, value_name = "VERSION")]
    student: Option<u64>,
    /// Version of a student that was trained without
    #[arg(long, value_name = "VERSION")]
    plain: Option<u64>,
    /// Read also under chunk-wise dynamic evaluation, a control that needs no training, with this step size
    #[arg(long, value_name = "STEP")]
    control: Option<f32>,
    /// Read also with the student's step size times each of these
    #[arg(long, value_delimiter = ',', value_name = "FACTORS")]
    scales: Vec<f32>,
    /// Read also with the updates decayed to each of these shares at every edge
    #[arg(long, value_delimiter = ',', value_name = "SHARES")]
    decay: Vec<f32>,
    /// Read also under a delta rule of each of these strengths
    #[arg(long, value_delimiter = ',', value_name = "STRENGTHS")]
    delta: Vec<f32>,
    /// Leave the base model out, whose reading takes as long as any other
    #[arg(long)]
    without_base: bool,
    /// Held-out episodes at most; 0 takes all
    #[arg(long, default_value_t = 0, value_name = "N")]
    episodes: usize,
    /// Tokens to which attention reaches back, `full` for everything
    #[arg(long, value_delimiter = ',', default_value = "512,1024,full", value_parser = window)]
    windows: Vec<Reach>,
    /// Numbers that all readers' weights are in
    #[arg(long, value_enum, default_value_t)]
    weights: Weights,
    /// Stop after the episode in which this many seconds are over
    #[arg(long, value_name = "SECONDS")]
    max_seconds: Option<f64>,
    /// Show what an earlier comparison found, from its ttt.json, and compare nothing
    #[arg(long, value_name = "FILE", conflicts_with_all = ["student", "plain", "max_seconds"])]
    from: Option<PathBuf>,
    /// Folder for ttt.json, ttt.md, ttt.svg and drift.svg
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// `512`, or everything.
#[derive(Clone, Copy)]
struct Reach(Option<usize>);

fn window(text: &str) -> Result<Reach, String> {
    match (text, text.parse::<usize>()) {
        ("full", _) => Ok(Reach(None)),
        (_, Ok(tokens)) if tokens >= MIN_WINDOW => Ok(Reach(Some(tokens))),
        _ => Err(format!(
            "a number of tokens from {MIN_WINDOW} on, or `full`, is expected"
        )),
    }
}

pub fn run(command: Command, place: &Place, out: &Out) -> Result<(), Fail> {
    let Command::Ttt(args) = command;
    let compared = match &args.from {
        Some(path) => read(path)?,
        None => compare(&args, place, out)?,
    };
    show(&compared, out);
    if let Some(dir) = &args.out {
        write(dir, &compared)?;
        out.note(&format!(
            "ttt.json, ttt.md, ttt.svg and drift.svg are in {}",
            dir.display()
        ));
    }
    out.result(&serde_json::to_value(&compared).unwrap_or_default());
    Ok(())
}

fn read(path: &Path) -> Result<Comparison, Fail> {
    let unreadable = |source| Fail::Read {
        path: path.into(),
        source,
    };
    let text = std::fs::read(path).map_err(unreadable)?;
    serde_json::from_slice(&text).map_err(|e| unreadable(e.into()))
}

fn compare(args: &Ttt, place: &Place, out: &Out) -> Result<Comparison, Fail> {
    let locum = place.serving(args.weights.into())?;
    let options = TttOptions {
        student: args.student,
        plain: args.plain,
        control: args.control,
        without_base: args.without_base,
        scales: args.scales.clone(),
        forgets: (args.decay.iter().map(|kept| Forgetting::Decay(*kept)))
            .chain(
                args.delta
                    .iter()
                    .map(|strength| Forgetting::Delta(*strength)),
            )
            .collect(),
        episodes: args.episodes,
        windows: args.windows.iter().map(|w| w.0).collect(),
        ..TttOptions::default()
    };
    let began = Instant::now();
    let progress = out.progress();
    let compared = locum.eval_ttt(&options, &mut |done, of| {
        progress.set(
            done as f64 / of.max(1) as f64,
            "reading",
            &format!("{done} of {of} episodes"),
        );
        let over = |most| began.elapsed().as_secs_f64() >= most;
        !args.max_seconds.is_some_and(over) || done == 0
    });
    progress.done();
    Ok(compared?)
}

fn show(c: &Comparison, out: &Out) {
    let mut table = Table::new(&["attention", "read by", ">nats an action", ">exact"]);
    for window in &c.windows {
        for variant in &window.variants {
            table.row([
                reach(window),
                variant.name.clone(),
                format!("{:.4}", variant.scores.logprob.mean),
                format!("{:.1} %", 100.0 * variant.scores.exact.mean),
            ]);
        }
    }
    out.table(&table);
    let mut table = Table::new(&[
        "attention",
        "updates on less",
        "where",
        ">nats an action",
        ">points exact",
    ]);
    for window in &c.windows {
        for gain in &window.gains {
            let parts = gain.parts.iter().filter(|_| gain.over == "updates off");
            let all = std::iter::once(("all", &gain.all));
            for (name, scores) in all.chain(parts.map(|part| (&part.name[..], &part.scores))) {
                table.row([
                    reach(window),
                    gain.over.clone(),
                    name.into(),
                    signed(scores.logprob, 4, 1.0),
                    signed(scores.exact, 1, 100.0),
                ]);
            }
        }
    }
    out.table(&table);
    out.line(&format!(
        "{}; {} held-out episodes, {} actions, {} tokens; {} actions behind the model's last position were cut",
        clean(&c.student),
        c.episodes,
        c.actions,
        c.tokens,
        c.actions_cut
    ));
}

fn write(dir: &Path, c: &Comparison) -> Result<(), Fail> {
    let put = |name: &str, text: &str| {
        let path = dir.join(name);
        std::fs::write(&path, text).map_err(|source| Fail::Write { path, source })
    };
    std::fs::create_dir_all(dir).map_err(|source| Fail::Write {
        path: dir.into(),
        source,
    })?;
    let json = serde_json::to_string_pretty(c).unwrap_or_default();
    put("ttt.json", &(json + "\n"))?;
    put("ttt.md", &gain_markdown(c))?;
    put("ttt.svg", &gain_svg(c))?;
    put("drift.svg", &drift_svg(c))
}
