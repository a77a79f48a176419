//! What learning while reading was worth, as a page of Markdown and a picture of its own.

use std::fmt::Write;

use super::html::esc;
use crate::evaluate::ttt::{Comparison, Gain, Scores, Variant, Window};
use crate::gate::MeanInterval;

const WIDTH: f64 = 720.0;
const LEFT: f64 = 74.0;
const RIGHT: f64 = 14.0;
const TOP: f64 = 30.0;
/// Of one window: its title, its frame, and the room below.
const PANEL: f64 = 178.0;
const HEIGHT: f64 = 136.0;
/// Readable on light and dark.
const GAIN: &str = "#12776a";
const HARM: &str = "#b0503f";

/// The comparison as Markdown: what each variant thought of the teacher's actions, then what updates gain, by place in the episode.
pub fn gain_markdown(c: &Comparison) -> String {
    let mut s = format!(
        "{} held-out episodes, {} actions, {} tokens; {}, chunks of {} tokens, {} weights.\n",
        c.episodes, c.actions, c.tokens, c.student, c.chunk_len, c.weights
    );
    if c.actions_cut > 0 {
        let _ = writeln!(
            s,
            "{} more actions stand behind the last position of the model and were not looked at.",
            c.actions_cut
        );
    }
    let sure = 100.0 * (1.0 - c.alpha);
    let _ = write!(
        s,
        "Means over episodes with bootstrap intervals of {sure:.0} %; log-likelihood in nats an action.\n\n\
         | attention reaches | read by | log-likelihood of the teacher's action | exact action |\n| --- | --- | --- | --- |\n"
    );
    for window in &c.windows {
        for variant in &window.variants {
            let _ = writeln!(
                s,
                "| {} | {} | {} | {} |",
                reach(window),
                variant.name,
                plain(variant.scores.logprob, 3, 1.0),
                plain(variant.scores.exact, 1, 100.0)
            );
        }
    }
    s += "\n| attention reaches | difference | where | log-likelihood, nats an action | exact action, points | episodes |\n\
          | --- | --- | --- | --- | --- | --- |\n";
    for (window, gain) in gains(c) {
        let mut row = |part: &str, scores: &Scores| {
            let _ = writeln!(
                s,
                "| {} | {} less {} | {part} | {} | {} | {} |",
                reach(window),
                gain.of,
                gain.over,
                signed(scores.logprob, 4, 1.0),
                signed(scores.exact, 1, 100.0),
                scores.logprob.n
            );
        };
        row("all", &gain.all);
        // By place only where the same weights are compared.
        for part in gain.parts.iter().filter(|_| gain.over == "updates off") {
            row(&part.name, &part.scores);
        }
    }
    s
}

fn gains(c: &Comparison) -> impl Iterator<Item = (&Window, &Gain)> {
    c.windows.iter().flat_map(|window| {
        let gains = window.gains.iter();
        gains.map(move |gain| (window, gain))
    })
}

/// `512 tokens`, `everything`.
pub fn reach(window: &Window) -> String {
    match window.window {
        Some(tokens) => format!("{tokens} tokens"),
        None => "everything".into(),
    }
}

fn plain(i: MeanInterval, digits: usize, scale: f64) -> String {
    let [mean, low, high] = [i.mean, i.low, i.high].map(|x| x * scale);
    match known(i) {
        true => format!("{mean:.digits$} ({low:.digits$} to {high:.digits$})"),
        false if i.n == 0 => "–".into(),
        false => format!("{mean:.digits$}"),
    }
}

/// With signs, for a difference: `+0.0123 (-0.0040 to +0.0301)`.
pub fn signed(i: MeanInterval, digits: usize, scale: f64) -> String {
    let [mean, low, high] = [i.mean, i.low, i.high].map(|x| x * scale);
    match known(i) {
        true => format!("{mean:+.digits$} ({low:+.digits$} to {high:+.digits$})"),
        false if i.n == 0 => "–".into(),
        false => format!("{mean:+.digits$}"),
    }
}

/// Whether the interval has ends.
fn known(i: MeanInterval) -> bool {
    i.n > 1 && i.low > f64::MIN && i.high < f64::MAX
}

/// What updates on have over updates off by tokens read before the action, as an SVG of its own: a panel a window, each with a scale
/// of its own, for what helps and what harms can be hundreds of times apart. Empty if there is nothing to draw.
pub fn gain_svg(c: &Comparison) -> String {
    let panels: Vec<(&Window, Vec<&Variant>)> = gains(c)
        .filter(|(_, gain)| gain.over == "updates off")
        .map(|(window, gain)| {
            let parts = gain.parts.iter();
            (
                window,
                parts.filter(|part| part.name.contains("tokens")).collect(),
            )
        })
        .filter(|(_, parts): &(_, Vec<_>)| !parts.is_empty())
        .collect();
    let Some((_, places)) = panels.first() else {
        return String::new();
    };
    let bottom = TOP + PANEL * panels.len() as f64;
    let mut s = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {}\" role=\"img\" font-family=\"system-ui, sans-serif\" font-size=\"13\" fill=\"#6b7671\">\
         <title>Log-likelihood of the teacher's actions, updates on less updates off, by place in the episode</title>\
         <text x=\"{LEFT}\" y=\"16\">nats an action that updates gain, by tokens read before it ({} held-out episodes)</text>",
        bottom + 30.0,
        c.episodes
    );
    for (n, (window, parts)) in panels.iter().enumerate() {
        panel(&mut s, TOP + PANEL * n as f64, window, parts);
    }
    let column = (WIDTH - LEFT - RIGHT) / places.len() as f64;
    for (place, part) in places.iter().enumerate() {
        let _ = write!(
            s,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            LEFT + (place as f64 + 0.5) * column,
            bottom + 14.0,
            esc(&part.name)
        );
    }
    s.push_str("</svg>\n");
    s
}

/// One window's gains by place, from `above` on.
fn panel(s: &mut String, above: f64, window: &Window, parts: &[&Variant]) {
    let known_ones = || {
        parts
            .iter()
            .map(|part| part.scores.logprob)
            .filter(|i| known(*i))
    };
    let most = known_ones().fold(1e-4f64, |m, i| m.max(i.low.abs()).max(i.high.abs()));
    let step = nice(most / 2.0);
    let ticks = (most / step).ceil() as i64;
    let top = ticks as f64 * step;
    let middle = above + 22.0 + HEIGHT / 2.0;
    let y = |v: f64| middle - v.clamp(-top, top) / top * HEIGHT / 2.0;
    let _ = write!(
        s,
        "<text x=\"{LEFT}\" y=\"{:.1}\" font-weight=\"600\">attention reaches {}</text>",
        above + 10.0,
        esc(&reach(window))
    );
    for tick in -ticks..=ticks {
        let v = tick as f64 * step;
        let _ = write!(
            s,
            "<line x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{1:.1}\" y2=\"{1:.1}\" stroke=\"#8b958f\" stroke-opacity=\"{2}\"/><text x=\"{3:.1}\" y=\"{4:.1}\" text-anchor=\"end\">{v:+}</text>",
            WIDTH - RIGHT,
            y(v),
            if tick == 0 { 0.9 } else { 0.25 },
            LEFT - 8.0,
            y(v) + 4.0,
            v = (v * 1e4).round() / 1e4
        );
    }
    let column = (WIDTH - LEFT - RIGHT) / parts.len() as f64;
    for (place, part) in parts.iter().enumerate() {
        let gain = part.scores.logprob;
        if !known(gain) {
            continue;
        }
        let colour = if gain.high < 0.0 { HARM } else { GAIN };
        let x = LEFT + (place as f64 + 0.5) * column;
        let _ = write!(
            s,
            "<g stroke=\"{colour}\" fill=\"{colour}\"><title>{}: {}</title><line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{:.1}\" y2=\"{:.1}\" stroke-width=\"3\"/><circle cx=\"{x:.1}\" cy=\"{:.1}\" r=\"5\"/></g>",
            esc(&part.name),
            signed(gain, 4, 1.0),
            y(gain.low),
            y(gain.high),
            y(gain.mean)
        );
    }
}

/// The next of 1, 2, 5, 10, ... times a power of ten.
fn nice(x: f64) -> f64 {
    let power = 10f64.powf(x.log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0];
    steps
        .iter()
        .map(|m| m * power)
        .find(|s| *s >= x)
        .unwrap_or(10.0 * power)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evaluate::ttt::Part;

    fn interval(mean: f64) -> MeanInterval {
        MeanInterval {
            mean,
            low: mean - 0.02,
            high: mean + 0.02,
            n: 9,
        }
    }

    fn comparison() -> Comparison {
        let scores = |mean| Scores {
            logprob: interval(mean),
            exact: interval(mean / 10.0),
        };
        let part = |part: &Part| Variant {
            name: part.name(),
            scores: match part {
                // Nothing is known of what no episode reaches.
                Part::Tokens(2048, _) => Scores {
                    logprob: crate::gate::bootstrap_mean(&[], 0.05, 1),
                    ..Scores::default()
                },
                _ => scores(0.05),
            },
        };
        let window = |window| Window {
            window,
            variants: vec![Variant {
                name: "updates on".into(),
                scores: scores(-1.25),
            }],
            gains: vec![Gain {
                of: "updates on".into(),
                over: "updates off".into(),
                all: scores(0.04),
                parts: Part::SHOWN.iter().map(part).collect(),
            }],
        };
        Comparison {
            student: "student 2 <b>".into(),
            episodes: 9,
            actions: 700,
            actions_cut: 3,
            alpha: 0.05,
            windows: vec![window(Some(512)), window(None)],
            ..Comparison::default()
        }
    }

    #[test]
    fn the_page_has_a_row_for_each_variant_and_for_each_place() {
        let page = gain_markdown(&comparison());
        assert!(
            page.contains("| 512 tokens | updates on | -1.250 (-1.270 to -1.230) |"),
            "{page}"
        );
        assert!(
            page.contains(
                "| everything | updates on less updates off | all | +0.0400 (+0.0200 to +0.0600) |"
            ),
            "{page}"
        );
        assert!(
            page.contains("| everything | updates on less updates off | first third |"),
            "{page}"
        );
        assert!(page.contains("from 2048 tokens on | – |"), "{page}");
        assert!(page.contains("3 more actions stand behind"), "{page}");
        assert_eq!(
            page.matches("\n| 512 tokens").count(),
            1 + 1 + Part::SHOWN.len()
        );
    }

    #[test]
    fn the_picture_marks_what_is_known_inside_its_frame() {
        let svg = gain_svg(&comparison());
        // Three places of four, under two windows.
        assert_eq!(svg.matches("<circle").count(), 3 * 2);
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        for y in svg
            .split(" y1=\"")
            .skip(1)
            .map(|rest| rest.split('"').next().unwrap())
        {
            let y: f64 = y.parse().unwrap();
            assert!((TOP..=TOP + 2.0 * PANEL).contains(&y), "{y}");
        }
        assert_eq!(gain_svg(&Comparison::default()), "");
    }
}
