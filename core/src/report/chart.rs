//! The three charts, as inline SVG. Colours are classes, so that the style sheet sets them for light and dark alike; every mark
//! carries a `<title>`, which browsers show on hover.

use std::fmt::Write;

use super::html::{brief, count, esc, percent, utc};
use super::{Bucket, Curve, Mark, Player, SuccessRow, MAX_CURVE_POINTS};

const WIDTH: f64 = 720.0;
const LEFT: f64 = 66.0;
const RIGHT: f64 = 14.0;
/// Height of a row of labels over the timeline.
const MARK_ROW: f64 = 22.0;
/// Most marks over the timeline; of more, the latest are shown.
const MAX_MARKS: usize = 6;

/// Stacked bars: steps by who answered, with the marks that fall into the span.
pub fn who_answered(buckets: &[Bucket], marks: &[Mark]) -> String {
    let (Some(first), Some(last)) = (buckets.first(), buckets.last()) else {
        return String::new();
    };
    let span = (last.end_ms - first.start_ms).max(1) as f64;
    let x =
        |ms: u64| LEFT + (ms.saturating_sub(first.start_ms)) as f64 / span * (WIDTH - LEFT - RIGHT);
    let marks = rows_of_marks(
        marks
            .iter()
            .filter(|m| m.unix_ms >= first.start_ms && m.unix_ms <= last.end_ms),
        x,
    );
    let rows = marks.iter().map(|m| m.1 + 1).max().unwrap_or(0);
    let (top, height, bottom) = (12.0 + rows as f64 * MARK_ROW, 190.0, 38.0);
    let most = buckets
        .iter()
        .map(|b| b.teacher + b.student + b.deferred)
        .max()
        .unwrap_or(0)
        .max(1) as f64;
    let axis = Axis::new(0.0, most);
    let y = |v: f64| top + height - v / axis.top * height;
    let mut s = open(top + height + bottom, "Steps by who answered, over time");
    grid(&mut s, &axis, y, |v| count(v as u64));
    for b in buckets {
        let (x0, x1) = (x(b.start_ms), x(b.end_ms));
        let gap = if buckets.len() > 1 {
            ((x1 - x0) * 0.12).min(2.0)
        } else {
            0.0
        };
        let mut base = 0.0;
        for (class, name, n) in [
            ("student", "student", b.student),
            (
                "deferred",
                "asked the student, used the teacher",
                b.deferred,
            ),
            ("teacher", "teacher", b.teacher),
        ] {
            if n == 0 {
                continue;
            }
            let n = n as f64;
            let _ = write!(
                s,
                "<rect class=\"fill-{class}\" x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\"><title>{} UTC: {} steps, {name}</title></rect>",
                x0 + gap,
                y(base + n),
                (x1 - x0 - 2.0 * gap).max(0.5),
                y(base) - y(base + n),
                utc(b.start_ms),
                count(n as u64),
            );
            base += n;
        }
    }
    for (mark, row) in &marks {
        let at = x(mark.unix_ms);
        let (anchor, dx) = if leans_left(at) {
            ("end", -6.0)
        } else {
            ("start", 6.0)
        };
        let label_y = 16.0 + *row as f64 * MARK_ROW;
        let _ = write!(
            s,
            "<line class=\"mark\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{:.1}\" y2=\"{:.1}\"/><text class=\"mark-label\" x=\"{:.1}\" y=\"{label_y:.1}\" text-anchor=\"{anchor}\">{}</text>",
            label_y - 11.0,
            top + height,
            at + dx,
            esc(&mark.label)
        );
    }
    let clock = |ms: u64| {
        let text = utc(ms);
        // Within one day the date says nothing: it stands in the page's head.
        if span < 86_400_000.0 {
            text.split(' ').nth(1).unwrap_or("").to_string()
        } else {
            text[..text.len().min(10)].to_string()
        }
    };
    for (share, anchor) in [(0.0, "start"), (0.5, "middle"), (1.0, "end")] {
        let ms = first.start_ms + (span * share) as u64;
        let _ = write!(
            s,
            "<text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"{anchor}\">{}</text>",
            x(ms),
            top + height + 26.0,
            clock(ms)
        );
    }
    s.push_str("</svg>");
    s
}

/// Near the right edge a label stands to the left of its line, or it would leave the page.
fn leans_left(at: f64) -> bool {
    at > WIDTH * 0.6
}

/// Each mark with the row of its label, so that no two labels overlap. The latest marks are drawn, at most [`MAX_MARKS`].
fn rows_of_marks<'a>(
    marks: impl Iterator<Item = &'a Mark>,
    x: impl Fn(u64) -> f64,
) -> Vec<(&'a Mark, usize)> {
    let mut marks: Vec<_> = marks.collect();
    marks.sort_by_key(|m| m.unix_ms);
    let mut taken: Vec<(usize, f64, f64)> = Vec::new();
    let skip = marks.len().saturating_sub(MAX_MARKS);
    marks
        .into_iter()
        .skip(skip)
        .map(|mark| {
            let at = x(mark.unix_ms);
            // About half the size of a letter on a phone, where the chart is smallest.
            let width = mark.label.chars().count() as f64 * 9.0 + 12.0;
            let (from, to) = if leans_left(at) {
                (at - width, at)
            } else {
                (at, at + width)
            };
            let free = |row: &usize| {
                !taken
                    .iter()
                    .any(|(r, a, b)| r == row && from < *b && *a < to)
            };
            let row = (0..MAX_MARKS).find(free).unwrap_or(0);
            taken.push((row, from, to));
            (mark, row)
        })
        .collect()
}

/// A line a player: a dot at the observed success, a thick bar for the Wilson interval, a thin one for the anytime-valid interval.
pub fn success(rows: &[SuccessRow]) -> String {
    let rows: Vec<_> = rows.iter().filter(|r| r.episodes > 0).collect();
    if rows.is_empty() {
        return String::new();
    }
    let row_height = 64.0;
    let (left, right) = (14.0, 20.0);
    let body = rows.len() as f64 * row_height;
    let x = |share: f64| left + share.clamp(0.0, 1.0) * (WIDTH - left - right);
    let mut s = open(body + 44.0, "Success by player, with intervals");
    for tick in [0.0, 0.25, 0.5, 0.75, 1.0] {
        let anchor = if tick == 0.0 {
            "start"
        } else if tick == 1.0 {
            "end"
        } else {
            "middle"
        };
        let _ = write!(
            s,
            "<line class=\"grid\" x1=\"{0:.1}\" x2=\"{0:.1}\" y1=\"6\" y2=\"{1:.1}\"/><text class=\"tick\" x=\"{0:.1}\" y=\"{2:.1}\" text-anchor=\"{anchor}\">{3}</text>",
            x(tick),
            body + 8.0,
            body + 34.0,
            percent(tick)
        );
    }
    for (i, row) in rows.iter().enumerate() {
        let class = player_class(row.player);
        let share = row.successes as f64 / row.episodes as f64;
        let y = i as f64 * row_height + 48.0;
        let wilson = ordered(row.wilson);
        let _ = write!(
            s,
            "<g><title>{}: {} of {} episodes, 95 % interval {} to {}",
            esc(&row.label),
            count(row.successes),
            count(row.episodes),
            percent(wilson[0]),
            percent(wilson[1])
        );
        if let Some(anytime) = row.anytime.map(ordered) {
            let _ = write!(
                s,
                ", at any time {} to {}</title><line class=\"thin stroke-{class}\" x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>",
                percent(anytime[0]),
                percent(anytime[1]),
                x(anytime[0]),
                x(anytime[1])
            );
        } else {
            s.push_str("</title>");
        }
        let _ = write!(
            s,
            "<line class=\"thick stroke-{class}\" x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/><circle class=\"dot fill-{class}\" cx=\"{:.1}\" cy=\"{y:.1}\" r=\"7\"/>\
             <text class=\"row-label\" x=\"{:.1}\" y=\"{:.1}\">{}</text><text class=\"row-value\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{} · {} of {}</text></g>",
            x(wilson[0]),
            x(wilson[1]),
            x(share),
            // Clear of the grid's outer lines.
            left + 10.0,
            y - 20.0,
            esc(&row.label),
            WIDTH - right - 10.0,
            y - 20.0,
            percent(share),
            count(row.successes),
            count(row.episodes),
        );
    }
    s.push_str("</svg>");
    s
}

/// Train and held-out loss of one job over the tokens trained.
pub fn curve(curve: &Curve) -> String {
    let train = finite(&curve.train);
    let held_out = finite(&curve.held_out);
    let all = || train.iter().chain(&held_out);
    let (Some(x_max), Some(y_max)) = (
        all().map(|p| p.0).reduce(f64::max).filter(|v| *v > 0.0),
        all().map(|p| p.1).reduce(f64::max).filter(|v| *v > 0.0),
    ) else {
        return String::new();
    };
    let (top, height, bottom) = (14.0, 200.0, 38.0);
    let axis = Axis::new(0.0, y_max);
    let y = |v: f64| top + height - v / axis.top * height;
    let x = |v: f64| LEFT + v / x_max * (WIDTH - LEFT - RIGHT);
    let mut s = open(top + height + bottom, "Loss over trained tokens");
    grid(&mut s, &axis, y, brief_loss);
    let line = |points: &[(f64, f64)]| {
        points
            .iter()
            .map(|p| format!("{:.1},{:.1}", x(p.0), y(p.1)))
            .collect::<Vec<_>>()
            .join(" ")
    };
    if let Some(kept) = curve
        .kept_at
        .filter(|k| k.is_finite() && *k >= 0.0 && *k <= x_max)
    {
        let _ = write!(s, "<line class=\"mark\" x1=\"{0:.1}\" x2=\"{0:.1}\" y1=\"{top}\" y2=\"{1:.1}\"><title>kept at {2} tokens</title></line>", x(kept), top + height, brief(kept));
    }
    let _ = write!(
        s,
        "<polyline class=\"line line-train\" points=\"{}\"/>",
        line(&train)
    );
    let _ = write!(
        s,
        "<polyline class=\"line line-held\" points=\"{}\"/>",
        line(&held_out)
    );
    for p in &held_out {
        let _ = write!(
            s,
            "<circle class=\"dot fill-student\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"4.5\"><title>held-out loss {:.3} at {} tokens</title></circle>",
            x(p.0),
            y(p.1),
            p.1,
            brief(p.0)
        );
    }
    for (share, anchor) in [(0.0, "start"), (0.5, "middle"), (1.0, "end")] {
        let v = x_max * share;
        let unit = if share == 1.0 { " tokens" } else { "" };
        let _ = write!(
            s,
            "<text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"{anchor}\">{}{unit}</text>",
            x(v),
            top + height + 26.0,
            brief(v)
        );
    }
    s.push_str("</svg>");
    s
}

/// The class that colours a player everywhere on the page.
pub fn player_class(player: Player) -> &'static str {
    match player {
        Player::Teacher => "teacher",
        Player::Base => "base",
        Player::Student => "student",
    }
}

/// Upper end and step of an axis from 0, at round numbers.
struct Axis {
    top: f64,
    step: f64,
}

impl Axis {
    fn new(from: f64, to: f64) -> Self {
        let raw = ((to - from) / 4.0).max(1e-9);
        let power = 10f64.powf(raw.log10().floor());
        let step = [1.0, 2.0, 2.5, 5.0, 10.0]
            .iter()
            .map(|m| m * power)
            .find(|s| *s >= raw)
            .unwrap_or(10.0 * power);
        Self {
            top: (to / step).ceil().max(1.0) * step,
            step,
        }
    }

    fn ticks(&self) -> impl Iterator<Item = f64> + '_ {
        (0..=(self.top / self.step).round() as usize).map(|i| i as f64 * self.step)
    }
}

fn open(height: f64, label: &str) -> String {
    format!("<svg class=\"chart\" viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{label}\">")
}

fn grid(s: &mut String, axis: &Axis, y: impl Fn(f64) -> f64, text: impl Fn(f64) -> String) {
    for tick in axis.ticks() {
        let _ = write!(
            s,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{1:.1}\" y2=\"{1:.1}\"/><text class=\"tick\" x=\"{2:.1}\" y=\"{3:.1}\" text-anchor=\"end\">{4}</text>",
            WIDTH - RIGHT,
            y(tick),
            LEFT - 10.0,
            y(tick) + 5.0,
            text(tick)
        );
    }
}

fn brief_loss(v: f64) -> String {
    let text = format!("{v:.2}");
    text.trim_end_matches('0').trim_end_matches('.').to_string()
}

/// A loss that is not a number (a diverged run) has no place in a picture; long curves are thinned evenly, ends kept.
fn finite(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let points: Vec<_> = points
        .iter()
        .copied()
        .filter(|p| p.0.is_finite() && p.1.is_finite() && p.0 >= 0.0 && p.1 >= 0.0)
        .collect();
    if points.len() <= MAX_CURVE_POINTS {
        return points;
    }
    (0..MAX_CURVE_POINTS)
        .map(|i| points[i * (points.len() - 1) / (MAX_CURVE_POINTS - 1)])
        .collect()
}

fn ordered(interval: [f64; 2]) -> [f64; 2] {
    let clean = |v: f64, otherwise: f64| {
        if v.is_finite() {
            v.clamp(0.0, 1.0)
        } else {
            otherwise
        }
    };
    let (a, b) = (clean(interval[0], 0.0), clean(interval[1], 1.0));
    [a.min(b), a.max(b)]
}
