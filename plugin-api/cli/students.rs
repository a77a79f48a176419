//! `locum students`, `promote`, `rollback`: who may answer, and the operator's word over the gate's.

use locum_core::locum::{Pin, StudentSummary};
use locum_core::model::WeightFormat;
use locum_core::report::utc;
use serde_json::json;

use crate::fail::Fail;
use crate::out::{clean, Out, Table};
use crate::Place;

#[derive(clap::Args)]
pub struct Promote {
    /// Version of the student, or the beginning of its id
    student: String,
    /// Do it
    #[arg(long)]
    yes: bool,
}

pub fn list(place: &Place, out: &Out) -> Result<(), Fail> {
    let students = place.locum(None, false)?.students()?;
    if students.is_empty() {
        out.line("No student has been made yet. `locum distil run` makes one from the recorded successes.");
    } else {
        out.table(&table(&students));
    }
    out.result(&json!({ "students": students }));
    Ok(())
}

fn table(students: &[StudentSummary]) -> Table {
    let mut table = Table::new(&[
        ">version",
        "id",
        "state",
        "method",
        ">tokens",
        ">exact",
        ">loss",
        ">erased",
        "fast weights",
        "made (UTC)",
        "the gate said",
    ]);
    for s in students {
        let mark = match (s.current, s.pinned) {
            (_, true) => " (pinned)",
            (true, _) => " (answers)",
            _ => "",
        };
        table.row([
            s.version.to_string(),
            short(&s.id),
            format!("{}{mark}", s.state),
            s.method.clone(),
            s.trained_tokens.to_string(),
            s.held_out_exact
                .map_or("–".into(), |x| format!("{:.0} %", x * 100.0)),
            s.held_out_loss.map_or("–".into(), |x| format!("{x:.3}")),
            match s.erased {
                0 => "–".into(),
                n => n.to_string(),
            },
            match s.fast_weights.as_str() {
                "" => "–".into(),
                why if why.starts_with("fast weights on") => "on".into(),
                _ => "off".to_string(),
            },
            utc(s.created_at_ms),
            s.verdict.clone(),
        ]);
    }
    table
}

pub fn promote(args: Promote, place: &Place, out: &Out) -> Result<(), Fail> {
    let locum = place.serving(WeightFormat::default())?;
    let student = find(locum.students()?, &args.student)?;
    let said = match student.verdict.as_str() {
        "" => "The gate has not judged it.".to_string(),
        verdict => format!("The gate said: {}", clean(verdict)),
    };
    out.note(&format!(
        "Student {} ({}), {}. {said}",
        student.version,
        short(&student.id),
        student.state
    ));
    if !args.yes {
        let what = format!(
            "promoting student {} by hand overrides the gate",
            student.version
        );
        return Err(Fail::NotConfirmed { what });
    }
    locum.use_student(Pin::Student(student.version))?;
    out.line(&format!(
        "Student {} answers wherever this store is open, from the next second on and until `locum rollback`.",
        student.version
    ));
    out.result(
        &json!({ "promoted": student.version, "student": student.id, "gate": student.verdict }),
    );
    Ok(())
}

pub fn rollback(place: &Place, out: &Out) -> Result<(), Fail> {
    let locum = place.locum(None, false)?;
    let before = current(&locum.students()?);
    locum.rollback()?;
    let now = current(&locum.students()?);
    match (before, now) {
        (Some(before), Some(now)) => out.line(&format!(
            "Student {before} no longer answers; student {now} does."
        )),
        (Some(before), None) => out.line(&format!(
            "Student {before} no longer answers; the teacher does."
        )),
        (None, _) => out.line("No student was answering; the teacher goes on."),
    }
    out.result(&json!({ "before": before, "now": now }));
    Ok(())
}

fn current(students: &[StudentSummary]) -> Option<u64> {
    students
        .iter()
        .find(|s| s.pinned)
        .or_else(|| students.iter().find(|s| s.current))
        .map(|s| s.version)
}

pub(crate) fn find(students: Vec<StudentSummary>, wanted: &str) -> Result<StudentSummary, Fail> {
    let version: Option<u64> = wanted.parse().ok();
    let by_version = students.iter().find(|s| Some(s.version) == version);
    let mut by_id = students
        .iter()
        .filter(|s| wanted.len() >= 4 && s.id.starts_with(wanted));
    match by_version.or_else(|| by_id.next().filter(|_| by_id.next().is_none())) {
        Some(student) => Ok(student.clone()),
        None => Err(Fail::Missing {
            what: format!("no student is called {wanted:?}"),
            next: "`locum students` shows their versions and ids; an id needs at least four digits of its own.",
        }),
    }
}

pub(crate) fn short(id: &str) -> String {
    id.chars().take(12).collect()
}
