//! The page: headline, tiles, then a section a question, in the order a reader asks them.

use std::fmt::Write;

use super::html::{brief, count, duration, esc, percent, short, utc};
use super::{
    chart, DatasetSummary, GateRecord, Player, ReportData, StageState, StudentRow, SuccessRow,
};

pub fn page(data: &ReportData) -> String {
    let mut s = String::with_capacity(64 << 10);
    let (headline, under) = headline(data);
    let _ = write!(
        s,
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\
         <meta name=\"color-scheme\" content=\"light dark\"><title>Locum: {headline}</title><style>{}</style></head><body>\n<header class=\"top\">\
         <p class=\"brand\"><span class=\"logo\" aria-hidden=\"true\"></span>Locum<span class=\"where\">{}</span></p>\
         <p class=\"when\">{} UTC</p></header>\n<main>\n<section class=\"lead\"><h1>{headline}</h1><p>{under}</p></section>\n",
        include_str!("style.css"),
        esc(&data.store),
        utc(data.generated_at_ms),
    );
    tiles(&mut s, data);
    answered(&mut s, data);
    success(&mut s, &data.success);
    gates(&mut s, &data.gates);
    learning(&mut s, data);
    dataset(&mut s, data.dataset.as_ref());
    students(&mut s, &data.students);
    jobs(&mut s, data);
    policy(&mut s, data);
    machine(&mut s, data);
    let _ = write!(
        s,
        "</main>\n<footer><p>Written by locum {} from its own store. Nothing on this page was loaded from elsewhere.</p></footer>\n</body></html>\n",
        esc(&data.version)
    );
    s
}

/// What stands on top, in one sentence, and the sentence under it.
fn headline(data: &ReportData) -> (String, String) {
    let t = &data.totals;
    if t.episodes == 0 {
        return (
            "Nothing has been recorded yet".into(),
            "As soon as an agent runs with Locum, its episodes appear here.".into(),
        );
    }
    let recorded = format!(
        "{} recorded, of which {} succeeded and {} failed",
        plural(t.episodes, "episode"),
        count(t.successes),
        count(t.failures)
    );
    let rate = |pick: &dyn Fn(&SuccessRow) -> bool| {
        data.success
            .iter()
            .find(|r| r.episodes > 0 && pick(r))
            .map(|r| percent(r.successes as f64 / r.episodes as f64))
    };
    let teacher = rate(&|r| r.player == Player::Teacher);
    if let Some(version) = data.serving {
        let label = format!("Student {version}");
        let compared = match (
            rate(&|r| r.player == Player::Student && r.label == label),
            teacher,
        ) {
            (Some(s), Some(t)) => {
                format!(" It succeeds in {s} of its live episodes; the teacher did in {t}.")
            }
            (Some(s), None) => format!(" It succeeds in {s} of its live episodes."),
            _ => String::new(),
        };
        return (
            format!("Student {version} stands in for the teacher"),
            format!(
                "It has answered {} that would have been calls to the teacher.{compared}",
                plural(t.student_steps, "step")
            ),
        );
    }
    if let Some(version) = data.on_trial {
        return (
            format!("Student {version} is on trial"),
            format!("The teacher still has the last word. {recorded}."),
        );
    }
    match data.gates.first() {
        Some(gate) => {
            let why = gate
                .reasons
                .first()
                .map(|r| format!(" {}", sentence(r)))
                .unwrap_or_default();
            (
                "The teacher answers".into(),
                format!(
                    "Student {} was not let through the gate ({}).{why}",
                    gate.version,
                    esc(&gate.verdict)
                ),
            )
        }
        None => (
            "The teacher answers".into(),
            format!("{recorded}. No student has been tried yet."),
        ),
    }
}

fn tiles(s: &mut String, data: &ReportData) {
    let t = &data.totals;
    let answered = t.teacher_steps + t.student_steps + t.deferred_steps;
    let share = if answered > 0 {
        percent(t.student_steps as f64 / answered as f64)
    } else {
        "–".into()
    };
    let kept = data
        .dataset
        .as_ref()
        .map_or("no dataset yet".to_string(), |d| {
            format!(
                "{} of {} seen were kept to learn from",
                count(d.episodes_kept),
                count(d.episodes_seen)
            )
        });
    let tile = |s: &mut String, class: &str, name: &str, value: &str, note: &str| {
        let _ = write!(s, "<div class=\"tile {class}\"><dt>{name}</dt><dd><b>{value}</b><span>{note}</span></dd></div>");
    };
    s.push_str("<dl class=\"tiles\">");
    tile(
        s,
        "good",
        "Teacher calls saved",
        &count(t.student_steps),
        "steps answered by a student",
    );
    tile(
        s,
        "",
        "Share of all steps",
        &share,
        &format!("of {} answered", count(answered)),
    );
    tile(
        s,
        "",
        "Episodes",
        &count(t.episodes),
        &format!(
            "{} succeeded, {} failed, {} unknown",
            count(t.successes),
            count(t.failures),
            count(t.unknown)
        ),
    );
    tile(
        s,
        "",
        "Learned from",
        &data
            .dataset
            .as_ref()
            .map_or("–".into(), |d| count(d.episodes_kept)),
        &kept,
    );
    s.push_str("</dl>\n");
}

fn answered(s: &mut String, data: &ReportData) {
    open(
        s,
        "Who answered",
        "Each bar is a span of time; its height is the number of agent steps.",
    );
    let drawn = chart::who_answered(&data.timeline, &data.events);
    if drawn.is_empty() {
        empty(s, "No step has been answered yet.");
    } else {
        legend(
            s,
            &[
                ("teacher", "teacher"),
                ("student", "student"),
                ("deferred", "student asked, teacher answered"),
            ],
        );
        s.push_str(&drawn);
    }
    close(s);
}

fn success(s: &mut String, rows: &[SuccessRow]) {
    open(
        s,
        "How often it goes well",
        "Share of live episodes with a known outcome that succeeded.",
    );
    let drawn = chart::success(rows);
    if drawn.is_empty() {
        empty(s, "No episode with a known outcome yet.");
    } else {
        s.push_str(&drawn);
        s.push_str(
            "<p class=\"note\">The dot is what was seen. The thick bar is the 95 % interval for one look (Wilson); \
             the thin bar stays right however often one looks, and is what the gate decides by.</p>",
        );
    }
    close(s);
}

fn gates(s: &mut String, gates: &[GateRecord]) {
    open(
        s,
        "The gate",
        "Nothing answers in the teacher’s place before it has passed here.",
    );
    let Some(newest) = gates.first() else {
        empty(s, "No candidate has come to the gate.");
        close(s);
        return;
    };
    gate(s, newest);
    if gates.len() > 1 {
        let _ = write!(
            s,
            "<details><summary>{} before it</summary>",
            plural(gates.len() as u64 - 1, "candidate")
        );
        for g in &gates[1..] {
            gate(s, g);
        }
        s.push_str("</details>");
    }
    close(s);
}

fn gate(s: &mut String, g: &GateRecord) {
    let _ = write!(
        s,
        "<div class=\"gate\"><p class=\"verdict\"><b>Student {}</b> <code>{}</code> {}</p>",
        g.version,
        short(&g.student, 12),
        badge(&g.verdict)
    );
    list(s, &g.reasons);
    s.push_str("<ol class=\"stages\">");
    for stage in &g.stages {
        let (class, word) = match stage.state {
            StageState::Passed => ("passed", "passed"),
            StageState::Refused => ("refused", "refused"),
            StageState::Running => ("running", "under way"),
            StageState::Waiting => ("waiting", "not reached"),
        };
        let _ = write!(
            s,
            "<li class=\"{class}\"><p><b>{}</b> <span class=\"state\">{word}</span></p><p>{}</p>",
            esc(&stage.name),
            esc(&stage.sentence)
        );
        list(s, &stage.reasons);
        facts(s, &stage.facts);
        s.push_str("</li>");
    }
    s.push_str("</ol></div>");
}

fn learning(s: &mut String, data: &ReportData) {
    let drawn: Vec<_> = data
        .curves
        .iter()
        .map(|c| (c, chart::curve(c)))
        .filter(|(_, d)| !d.is_empty())
        .collect();
    if drawn.is_empty() {
        return;
    }
    open(
        s,
        "Learning",
        "Loss in nats a token: on what it trained on, and on episodes it never saw.",
    );
    legend(s, &[("train", "training"), ("student", "held out")]);
    for (i, (curve, svg)) in drawn.iter().enumerate() {
        if i == 1 {
            s.push_str("<details><summary>earlier jobs</summary>");
        }
        let who = curve
            .version
            .map_or(String::new(), |v| format!(", student {v}"));
        let last = curve.held_out.iter().rev().find(|p| p.1.is_finite());
        let end = last.map_or(String::new(), |p| {
            format!(" · held-out loss {:.3} after {} tokens", p.1, brief(p.0))
        });
        let _ = write!(
            s,
            "<p class=\"caption\">Job {}{who}{end}</p>{svg}",
            curve.job
        );
    }
    if drawn.len() > 1 {
        s.push_str("</details>");
    }
    if drawn.iter().any(|(c, _)| c.kept_at.is_some()) {
        s.push_str("<p class=\"note\">The dashed line is the checkpoint that was kept.</p>");
    }
    close(s);
}

fn dataset(s: &mut String, dataset: Option<&DatasetSummary>) {
    open(
        s,
        "What it learned from",
        "The newest dataset, and everything that was left out of it.",
    );
    let Some(d) = dataset else {
        empty(s, "No dataset has been made yet.");
        close(s);
        return;
    };
    let seen = d.episodes_seen.max(1) as f64;
    let _ = write!(
        s,
        "<p class=\"caption\">{} kept of {} · {} to train on, {} held out · loss on {} of {} tokens · <code>{}</code></p><ul class=\"bars\">",
        plural(d.episodes_kept, "episode"),
        count(d.episodes_seen),
        plural(d.samples_train, "step"),
        count(d.samples_held_out),
        brief(d.target_tokens as f64),
        brief(d.tokens as f64),
        short(&d.hash, 12)
    );
    bar(
        s,
        "kept",
        "kept",
        d.episodes_kept,
        d.episodes_kept as f64 / seen,
        &[],
    );
    for row in &d.left_out {
        bar(
            s,
            "out",
            &row.reason,
            row.episodes,
            row.episodes as f64 / seen,
            &row.examples,
        );
    }
    s.push_str("</ul>");
    if !d.masked.is_empty() {
        let most = d.masked.iter().map(|m| m.steps).max().unwrap_or(1).max(1) as f64;
        s.push_str("<h3>Steps inside kept episodes that carry no loss</h3><ul class=\"bars\">");
        for row in &d.masked {
            bar(
                s,
                "masked",
                &row.reason,
                row.steps,
                row.steps as f64 / most,
                &[],
            );
        }
        s.push_str("</ul><p class=\"note\">A masked step stays in the context: the student sees it and does not learn to repeat it.</p>");
    }
    close(s);
}

fn bar(s: &mut String, class: &str, name: &str, n: u64, share: f64, examples: &[String]) {
    let width = (share.clamp(0.0, 1.0) * 1000.0).round() / 10.0;
    let _ = write!(
        s,
        "<li class=\"{class}\"><span class=\"name\">{}</span><span class=\"n\">{}</span><i style=\"width:{width}%\"></i>",
        esc(name),
        count(n)
    );
    if !examples.is_empty() {
        s.push_str("<details><summary>which</summary>");
        s.push_str("<ul class=\"why\">");
        for example in examples {
            let _ = write!(s, "<li>{}</li>", esc(example));
        }
        s.push_str("</ul></details>");
    }
    s.push_str("</li>");
}

fn students(s: &mut String, students: &[StudentRow]) {
    if students.is_empty() {
        return;
    }
    open(
        s,
        "Students",
        "Where each one comes from, and how it did on held-out steps.",
    );
    s.push_str(
        "<div class=\"scroll\"><table><thead><tr><th>Student</th><th>State</th><th>From</th><th>Method</th><th class=\"num\">Tokens</th>\
         <th class=\"num\">Exact</th><th class=\"num\">Loss</th><th>Made (UTC)</th></tr></thead><tbody>",
    );
    for row in students {
        let parent = row.parent_version.map_or_else(
            || format!("<code>{}</code>", short(&row.parent, 24)),
            |v| format!("student {v}"),
        );
        let _ = write!(
            s,
            "<tr><td><b>{}</b> <code>{}</code></td><td>{}</td><td>{parent}</td><td>{}</td><td class=\"num\">{}</td><td class=\"num\">{}</td><td class=\"num\">{}</td><td>{}</td></tr>",
            row.version,
            short(&row.id, 12),
            badge(&row.state),
            esc(&row.method),
            brief(row.trained_tokens as f64),
            row.held_out_exact.map_or("–".into(), percent),
            row.held_out_loss.filter(|l| l.is_finite()).map_or("–".into(), |l| format!("{l:.3}")),
            utc(row.created_at_ms)
        );
    }
    s.push_str("</tbody></table></div>");
    close(s);
}

fn jobs(s: &mut String, data: &ReportData) {
    if data.jobs.is_empty() {
        return;
    }
    open(s, "Distillations", "Background jobs, newest first.");
    s.push_str("<div class=\"scroll\"><table><thead><tr><th>Job</th><th>State</th><th>Began (UTC)</th><th class=\"num\">Took</th><th class=\"num\">Tokens</th><th>In words</th></tr></thead><tbody>");
    for job in &data.jobs {
        let _ = write!(
            s,
            "<tr><td><b>{}</b></td><td>{}</td><td>{}</td><td class=\"num\">{}</td><td class=\"num\">{}</td><td class=\"words\">{}</td></tr>",
            job.job,
            badge(&job.state),
            utc(job.started_at_ms),
            job.seconds.map_or("–".into(), duration),
            brief(job.tokens as f64),
            esc(&job.message)
        );
    }
    s.push_str("</tbody></table></div>");
    close(s);
}

fn policy(s: &mut String, data: &ReportData) {
    if data.policy.name.is_empty() {
        return;
    }
    open(
        s,
        "Policy",
        "The operator’s rules: who answers, what is kept, when to learn.",
    );
    let digest = if data.policy.digest.is_empty() {
        String::new()
    } else {
        format!(" · <code>{}</code>", short(&data.policy.digest, 12))
    };
    let _ = write!(
        s,
        "<p class=\"caption\">{}{digest}</p>",
        esc(&data.policy.name)
    );
    if !data.policy.hooks.is_empty() {
        s.push_str("<div class=\"scroll\"><table><thead><tr><th>Hook</th><th class=\"num\">Calls</th><th class=\"num\">Failures</th><th class=\"num\">p50</th><th class=\"num\">p99</th><th></th></tr></thead><tbody>");
        for hook in &data.policy.hooks {
            let _ = write!(
                s,
                "<tr><td>{}</td><td class=\"num\">{}</td><td class=\"num\">{}</td><td class=\"num\">{}</td><td class=\"num\">{}</td><td>{}</td></tr>",
                esc(&hook.hook),
                count(hook.calls),
                count(hook.failures),
                micros(hook.p50_us),
                micros(hook.p99_us),
                if hook.switched_off { badge("switched off") } else { String::new() }
            );
        }
        s.push_str("</tbody></table></div>");
    }
    close(s);
}

fn machine(s: &mut String, data: &ReportData) {
    if data.machine.is_empty() {
        return;
    }
    open(s, "Machine", "What all this ran on.");
    facts(s, &data.machine);
    close(s);
}

fn micros(us: f64) -> String {
    match us {
        us if !us.is_finite() => "–".into(),
        us if us >= 1000.0 => format!("{:.1} ms", us / 1000.0),
        us => format!("{us:.0} µs"),
    }
}

fn facts(s: &mut String, facts: &[super::Fact]) {
    if facts.is_empty() {
        return;
    }
    s.push_str("<dl class=\"facts\">");
    for fact in facts {
        let _ = write!(
            s,
            "<div><dt>{}</dt><dd>{}</dd></div>",
            esc(&fact.name),
            esc(&fact.value)
        );
    }
    s.push_str("</dl>");
}

fn list(s: &mut String, lines: &[String]) {
    if lines.is_empty() {
        return;
    }
    s.push_str("<ul class=\"why\">");
    for line in lines {
        let _ = write!(s, "<li>{}</li>", sentence(line));
    }
    s.push_str("</ul>");
}

fn badge(word: &str) -> String {
    let class = match word {
        "promoted" | "passed" | "serving" => "good",
        "rejected" | "failed" | "rolled back" | "switched off" => "bad",
        "training" | "curating" | "evaluating" | "saving" | "shadow" | "canary" | "on trial"
        | "candidate" | "queued" => "busy",
        _ => "calm",
    };
    format!("<span class=\"badge {class}\">{}</span>", esc(word))
}

fn legend(s: &mut String, entries: &[(&str, &str)]) {
    s.push_str("<ul class=\"legend\">");
    for (class, text) in entries {
        let _ = write!(s, "<li><i class=\"key-{class}\"></i>{text}</li>");
    }
    s.push_str("</ul>");
}

fn open(s: &mut String, title: &str, under: &str) {
    let _ = write!(
        s,
        "<section class=\"card\"><h2>{title}</h2><p class=\"under\">{under}</p>"
    );
}

fn close(s: &mut String) {
    s.push_str("</section>\n");
}

fn empty(s: &mut String, text: &str) {
    let _ = write!(s, "<p class=\"empty\">{text}</p>");
}

fn plural(n: u64, noun: &str) -> String {
    format!("{} {noun}{}", count(n), if n == 1 { "" } else { "s" })
}

/// Escaped, with a capital and a full stop, so that a reason can stand in running text.
fn sentence(reason: &str) -> String {
    let reason = reason.trim();
    let mut chars = reason.chars();
    let first: String = chars
        .next()
        .map(|c| c.to_uppercase().collect())
        .unwrap_or_default();
    let stop = if reason.ends_with(['.', '!', '?']) {
        ""
    } else {
        "."
    };
    format!("{}{stop}", esc(&(first + chars.as_str())))
}
