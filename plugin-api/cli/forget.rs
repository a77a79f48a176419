//! `locum forget` and `locum lineage`: what becomes of an episode that must go, and what a student is made of.

use locum_core::episode::EpisodeId;
use locum_core::locum::Forget as What;
use locum_core::store::Query;
use serde_json::json;

use crate::fail::Fail;
use crate::out::{Out, Table};
use crate::students::{find, short};
use crate::Place;

#[derive(clap::Args)]
pub struct Forget {
    /// Id of the episode
    #[arg(required_unless_present = "scope", conflicts_with = "scope")]
    episode: Option<String>,
    /// Every episode of this scope instead
    #[arg(long)]
    scope: Option<String>,
    /// Make the newest student that learned from it again without it
    #[arg(long)]
    retrain: bool,
    /// Do it
    #[arg(long)]
    yes: bool,
}

#[derive(clap::Args)]
pub struct Lineage {
    /// Version of a student, the beginning of its id, or the id of an episode
    of: String,
}

pub fn forget(args: Forget, place: &Place, out: &Out) -> Result<(), Fail> {
    let what = match (&args.episode, &args.scope) {
        (Some(id), _) => What::Episode(episode(id)?),
        (None, scope) => What::Scope(scope.clone().unwrap_or_default()),
    };
    if !args.yes {
        let what = match &what {
            What::Scope(scope) => {
                let query = Query {
                    scope: Some(scope.clone()),
                    ..Query::default()
                };
                let n = place.read()?.episodes(&query)?.len();
                format!("erasing the {n} episodes of scope {scope:?} cannot be undone")
            }
            _ => format!(
                "erasing episode {} cannot be undone",
                args.episode.as_deref().unwrap_or_default()
            ),
        };
        return Err(Fail::NotConfirmed { what });
    }
    let locum = place.locum(None, args.retrain)?;
    let done = locum.forget(&what, args.retrain)?;
    out.line(&format!(
        "{} erased from the store's files.",
        count(done.episodes.len(), "episode")
    ));
    if let Some(job) = done.cancelled_job {
        out.line(&format!("Job {job} was learning from it and is cancelled."));
    }
    let versions: Vec<String> = done.students.iter().map(u64::to_string).collect();
    match versions.is_empty() {
        true => out.line("No student learned from it."),
        false => out.line(&format!(
            "Learned from by student {}; marked. {}",
            versions.join(", "),
            match done.serving {
                true => "One of them answers now: `locum rollback` takes it back.",
                false => "None of them answers now.",
            }
        )),
    }
    if let Some(job) = done.retraining {
        let status = crate::distil::follow(&locum, job, true, out)?;
        crate::distil::show(&status, out);
    }
    out.result(&json!(done));
    Ok(())
}

pub fn lineage(args: Lineage, place: &Place, out: &Out) -> Result<(), Fail> {
    let locum = place.locum(None, false)?;
    if let Ok(id) = args.of.parse::<EpisodeId>() {
        let learned = locum.students_of(id)?;
        let mut table = Table::new(&[">student", "id", "learned", "answers"]);
        for student in &learned {
            table.row([
                student.version.to_string(),
                short(&student.id),
                match student.directly {
                    true => "from it".into(),
                    false => "by an ancestor".to_string(),
                },
                match student.current {
                    true => "yes".into(),
                    false => "–".to_string(),
                },
            ]);
        }
        match learned.is_empty() {
            true => out.line("No student learned from this episode."),
            false => out.table(&table),
        }
        out.result(&json!({ "episode": id, "students": learned }));
        return Ok(());
    }
    let student = find(locum.students()?, &args.of)?;
    let lineage = locum.lineage(student.version)?;
    let from: Vec<String> = lineage
        .ancestors
        .iter()
        .map(|a| format!("student {}", a.version))
        .chain([format!("base {}", lineage.base)])
        .collect();
    out.line(&format!(
        "Student {} ({}), made by job {} from {}.",
        lineage.version,
        short(&lineage.id),
        lineage.job,
        from.join(", from ")
    ));
    let mut table = Table::new(&["episode", ">by student", "state"]);
    for episode in &lineage.episodes {
        table.row([
            episode.id.clone(),
            episode.version.to_string(),
            match episode.erased {
                true => "erased".into(),
                false => "–".to_string(),
            },
        ]);
    }
    out.table(&table);
    out.result(&json!(lineage));
    Ok(())
}

fn episode(id: &str) -> Result<EpisodeId, Fail> {
    id.parse().map_err(|_| Fail::Missing {
        what: format!("{id:?} is no episode's id"),
        next: "`locum episodes list --json` shows the ids whole: 32 hexadecimal digits.",
    })
}

fn count(n: usize, what: &str) -> String {
    match n {
        1 => format!("1 {what}"),
        n => format!("{n} {what}s"),
    }
}
