//! What the operator sees: lines, tables, a progress bar on a terminal, or one JSON object. The only caller of stdout.

use std::cell::Cell;
use std::io::{IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;

/// Widest cell of a table, in characters; the rest is cut with an ellipsis.
const MAX_CELL_CHARS: usize = 60;

/// How output is wanted. A reader that closes the pipe early (`locum episodes list | head`) ends the output, not the command.
pub struct Out {
    json: bool,
    quiet: bool,
    closed: Cell<bool>,
}

impl Out {
    pub fn new(json: bool, quiet: bool) -> Self {
        Self {
            json,
            quiet,
            closed: Cell::new(false),
        }
    }

    /// A line for a human; nothing with `--json`.
    pub fn line(&self, text: &str) {
        if !self.json {
            self.write(text);
        }
    }

    /// A line that says what goes on; nothing with `--json` or `--quiet`.
    pub fn note(&self, text: &str) {
        if !self.quiet {
            self.line(text);
        }
    }

    /// A table for a human; nothing with `--json`.
    pub fn table(&self, table: &Table) {
        if !self.json {
            self.write(table.print().trim_end_matches('\n'));
        }
    }

    /// The result: the last line with `--json`, nothing otherwise.
    pub fn result(&self, value: &Value) {
        if self.json {
            self.write(&value.to_string());
        }
    }

    /// Text that is the result itself (an exported episode, a page), whatever the mode.
    pub fn raw(&self, text: &str) {
        self.write(text);
    }

    /// True once the reader of stdout has gone.
    pub fn closed(&self) -> bool {
        self.closed.get()
    }

    fn write(&self, text: &str) {
        if self.closed.get() {
            return;
        }
        let mut stdout = std::io::stdout().lock();
        if writeln!(stdout, "{text}")
            .and_then(|_| stdout.flush())
            .is_err()
        {
            self.closed.set(true);
        }
    }

    /// Progress of something long: a bar if stderr is a terminal, else a line each time the words change.
    pub fn progress(&self) -> Progress {
        if self.quiet {
            return Progress {
                bar: None,
                plain: false,
                last: Cell::new(0),
            };
        }
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(1000);
            let style = ProgressStyle::with_template("{bar:32.cyan/dim} {percent:>3} %  {msg}")
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            bar.set_style(style.progress_chars("━╸─"));
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
        Progress {
            plain: bar.is_none(),
            bar,
            last: Cell::new(0),
        }
    }
}

/// See [`Out::progress`].
pub struct Progress {
    bar: Option<ProgressBar>,
    plain: bool,
    /// Hash of what was printed last, so that a log does not repeat itself.
    last: Cell<u64>,
}

impl Progress {
    /// `share` in 0..1; `stage` changes seldom, `detail` often. A plain log gets a line a stage and each tenth of it.
    pub fn set(&self, share: f64, stage: &str, detail: &str) {
        let share = if share.is_finite() {
            share.clamp(0.0, 1.0)
        } else {
            0.0
        };
        let text = if detail.is_empty() {
            clean(stage)
        } else {
            format!("{}  {}", clean(stage), clean(detail))
        };
        if let Some(bar) = &self.bar {
            bar.set_position((share * 1000.0) as u64);
            bar.set_message(text);
        } else if self.plain {
            use std::hash::{Hash, Hasher};
            let mut hasher = std::collections::hash_map::DefaultHasher::new();
            (stage, (share * 10.0) as u64).hash(&mut hasher);
            if self.last.replace(hasher.finish()) != hasher.finish() {
                eprintln!("{:>3} %  {text}", (share * 100.0) as u64);
            }
        }
    }

    pub fn done(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}

/// A table of text: columns as wide as their widest cell, two spaces between, numbers to the right.
pub struct Table {
    head: Vec<(String, bool)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// Column names; a name that starts with `>` is a column of numbers.
    pub fn new(columns: &[&str]) -> Self {
        let head = columns
            .iter()
            .map(|c| (c.trim_start_matches('>').to_string(), c.starts_with('>')))
            .collect();
        Self {
            head,
            rows: Vec::new(),
        }
    }

    pub fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.iter().map(|c| cell(c)).collect());
    }

    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    fn print(&self) -> String {
        let widths: Vec<usize> = (0..self.head.len())
            .map(|i| {
                let rows = self
                    .rows
                    .iter()
                    .filter_map(|r| r.get(i))
                    .map(|c| c.chars().count());
                rows.chain([self.head[i].0.chars().count()])
                    .max()
                    .unwrap_or(0)
            })
            .collect();
        let mut out = String::new();
        let line = |cells: Vec<&str>, out: &mut String| {
            let mut text = String::new();
            for (i, c) in cells.iter().enumerate() {
                let pad = " ".repeat(widths[i].saturating_sub(c.chars().count()));
                let gap = if i == 0 { "" } else { "  " };
                text += &if self.head[i].1 {
                    format!("{gap}{pad}{c}")
                } else {
                    format!("{gap}{c}{pad}")
                };
            }
            out.push_str(text.trim_end());
            out.push('\n');
        };
        line(self.head.iter().map(|h| h.0.as_str()).collect(), &mut out);
        line(
            widths
                .iter()
                .map(|w| "─".repeat(*w))
                .collect::<Vec<_>>()
                .iter()
                .map(String::as_str)
                .collect(),
            &mut out,
        );
        for row in &self.rows {
            line(row.iter().map(String::as_str).collect(), &mut out);
        }
        out
    }
}

fn cell(text: &str) -> String {
    let text = clean(text);
    match text.chars().count() > MAX_CELL_CHARS {
        true => text.chars().take(MAX_CELL_CHARS - 1).chain(['…']).collect(),
        false => text,
    }
}

/// Text without control characters: what an episode holds must not drive the operator's terminal.
pub fn clean(text: &str) -> String {
    text.chars()
        .map(|c| if c == '\n' || c == '\t' { ' ' } else { c })
        .filter(|c| {
            !c.is_control() && !matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
        })
        .collect()
}

/// `3 min 20 s`.
pub fn duration(seconds: f64) -> String {
    match seconds {
        s if !s.is_finite() || s < 0.0 => "–".into(),
        s if s < 60.0 => format!("{s:.0} s"),
        s if s < 3600.0 => format!("{} min {} s", s as u64 / 60, s as u64 % 60),
        s => format!("{} h {} min", s as u64 / 3600, s as u64 % 3600 / 60),
    }
}

/// `1.5 GiB`.
pub fn bytes(n: u64) -> String {
    match n as f64 {
        b if b >= (1u64 << 30) as f64 => format!("{:.1} GiB", b / (1u64 << 30) as f64),
        b if b >= (1u64 << 20) as f64 => format!("{:.1} MiB", b / (1u64 << 20) as f64),
        b if b >= 1024.0 => format!("{:.1} KiB", b / 1024.0),
        b => format!("{b} bytes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_numbers_stand_to_the_right() {
        let mut table = Table::new(&["name", ">steps"]);
        table.row(["a".into(), "7".into()]);
        table.row(["longer".into(), "1234".into()]);
        assert_eq!(
            table.print(),
            "name    steps\n──────  ─────\na           7\nlonger   1234\n"
        );
    }

    #[test]
    fn cells_cannot_drive_the_terminal() {
        let mut table = Table::new(&["name"]);
        table.row(["\u{1b}[31mred\u{7}\nsecond \u{202e}line".into()]);
        assert!(table.print().ends_with("[31mred second line\n"));
    }

    #[test]
    fn a_long_cell_is_cut() {
        assert_eq!(cell(&"x".repeat(200)).chars().count(), MAX_CELL_CHARS);
    }
}
