//! How far the weights of a student that learns while it reads go from their trained values, as a picture of its own.

use std::fmt::Write;

use crate::evaluate::ttt::{Comparison, Drift};

const WIDTH: f64 = 720.0;
const LEFT: f64 = 60.0;
const RIGHT: f64 = 60.0;
const TOP: f64 = 30.0;
const HEIGHT: f64 = 220.0;

/// The largest drift of a layer by tokens read: the median episode, the furthest one, and the cap. Empty if nothing was learned.
pub fn drift_svg(c: &Comparison) -> String {
    let known = |d: &&Drift| d.most.is_finite();
    let drift: Vec<&Drift> = c.drift.iter().filter(known).collect();
    let Some(last) = drift.last() else {
        return String::new();
    };
    let cap = c.max_drift.map_or(0.0, f64::from);
    let furthest = drift.iter().fold(0f64, |m, d| m.max(d.most.into()));
    let top = 1.1 * furthest.max(cap).max(1e-6);
    let x = |position: u64| LEFT + position as f64 / last.position as f64 * (WIDTH - LEFT - RIGHT);
    let y = |v: f64| TOP + HEIGHT * (1.0 - v / top);
    let mut s = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {}\" role=\"img\" font-family=\"system-ui, sans-serif\" font-size=\"13\" fill=\"#6b7671\">\
         <title>Relative change of the layer that went furthest, by tokens read</title>\
         <text x=\"{LEFT}\" y=\"16\">relative change of the layer that went furthest, by tokens read ({} held-out episodes)</text>",
        TOP + HEIGHT + 40.0,
        c.episodes
    );
    for tick in 0..=4 {
        let v = top * f64::from(tick) / 4.0;
        let _ = write!(
            s,
            "<line x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{1:.1}\" y2=\"{1:.1}\" stroke=\"#8b958f\" stroke-opacity=\"0.25\"/><text x=\"{2:.1}\" y=\"{3:.1}\" text-anchor=\"end\">{v:.3}</text>",
            WIDTH - RIGHT,
            y(v),
            LEFT - 6.0,
            y(v) + 4.0
        );
    }
    let mut line = |colour: &str, name: &str, points: Vec<(f64, f64)>| {
        let path: Vec<String> = points
            .iter()
            .map(|(x, y)| format!("{x:.1},{y:.1}"))
            .collect();
        let (end_x, end_y) = points[points.len() - 1];
        let _ = write!(
            s,
            "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\" points=\"{}\"/><text x=\"{:.1}\" y=\"{:.1}\" fill=\"{colour}\">{name}</text>",
            path.join(" "),
            end_x + 5.0,
            end_y + 4.0
        );
    };
    let of = |value: fn(&Drift) -> f32| {
        let point = |d: &&Drift| (x(d.position), y(value(d).into()));
        std::iter::once((x(0), y(0.0)))
            .chain(drift.iter().map(point))
            .collect()
    };
    line("#c9892b", "furthest", of(|d| d.most));
    line("#12776a", "median", of(|d| d.median));
    if cap > 0.0 {
        line(
            "#b04a3a",
            "cap",
            vec![(x(0), y(cap)), (x(last.position), y(cap))],
        );
    }
    for position in [0, last.position / 2, last.position] {
        let _ = write!(
            s,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{position}</text>",
            x(position),
            TOP + HEIGHT + 22.0
        );
    }
    s.push_str("</svg>\n");
    s
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_picture_holds_every_edge_inside_its_frame_and_is_empty_without_any() {
        let edge = |n: u64| Drift {
            position: 256 * n,
            episodes: 10 - n,
            median: 0.01 * n as f32,
            most: 0.02 * n as f32,
            tripped: 0,
        };
        let runaway = Drift {
            most: f32::INFINITY,
            ..edge(9)
        };
        let comparison = Comparison {
            episodes: 9,
            drift: (1..6).map(edge).chain([runaway]).collect(),
            max_drift: Some(0.1),
            ..Comparison::default()
        };
        let svg = drift_svg(&comparison);
        assert_eq!(svg.matches("<polyline").count(), 3);
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        for points in svg.split("points=\"").skip(1) {
            for point in points.split('"').next().unwrap().split(' ') {
                let (x, y) = point.split_once(',').unwrap();
                let (x, y): (f64, f64) = (x.parse().unwrap(), y.parse().unwrap());
                assert!((LEFT..=WIDTH - RIGHT).contains(&x) && (TOP..=TOP + HEIGHT).contains(&y));
            }
        }
        assert_eq!(drift_svg(&Comparison::default()), "");
    }
}
