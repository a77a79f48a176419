//! Text into HTML: escaping, numbers and times as a reader wants them.

use super::MAX_TEXT_CHARS;

/// Escapes text for an element or a quoted attribute. Control characters and the marks that turn the direction of writing
/// are dropped, since they can make a page show something else than it holds; long text is cut at [`MAX_TEXT_CHARS`].
pub fn esc(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 8);
    for (n, c) in text.chars().enumerate() {
        if n == MAX_TEXT_CHARS {
            out.push('…');
            break;
        }
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\n' | '\t' => out.push(' '),
            '\u{202a}'..='\u{202e}'
            | '\u{2066}'..='\u{2069}'
            | '\u{200e}'
            | '\u{200f}'
            | '\u{feff}' => {}
            c if c.is_control() => {}
            c => out.push(c),
        }
    }
    out
}

/// The first `n` characters of a hash, escaped.
pub fn short(id: &str, n: usize) -> String {
    esc(&id.chars().take(n).collect::<String>())
}

/// `1 234 567`, with thin spaces.
pub fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, d) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push('\u{202f}');
        }
        out.push(d);
    }
    out
}

/// `812`, `4.1 k`, `1.27 M`: for axes.
pub fn brief(x: f64) -> String {
    let (value, unit) = match x.abs() {
        a if a >= 1e9 => (x / 1e9, " G"),
        a if a >= 1e6 => (x / 1e6, " M"),
        a if a >= 1e3 => (x / 1e3, " k"),
        _ => (x, ""),
    };
    let text = if value.abs() >= 100.0 || value.fract().abs() < 1e-9 {
        format!("{value:.0}")
    } else {
        format!("{value:.1}")
    };
    format!("{text}{unit}")
}

/// `27 %`; whole percent, since no success rate here is known better.
pub fn percent(share: f64) -> String {
    if share.is_finite() {
        format!("{:.0}\u{202f}%", share * 100.0)
    } else {
        "–".into()
    }
}

/// `3 min 20 s`.
pub fn duration(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "–".into();
    }
    let s = seconds.round() as u64;
    match s {
        0..=59 => format!("{s} s"),
        60..=3599 => format!("{} min {} s", s / 60, s % 60),
        _ => format!("{} h {} min", s / 3600, s % 3600 / 60),
    }
}

/// `2026-11-22 21:59` in UTC. Years past 9999 and the time 0 come out as a dash.
pub fn utc(unix_ms: u64) -> String {
    let seconds = unix_ms / 1000;
    let days = (seconds / 86_400) as i64;
    if unix_ms == 0 || days > 2_932_896 {
        return "–".into();
    }
    // Days to a civil date, after Howard Hinnant, "chrono-compatible low-level date algorithms".
    let z = days + 719_468;
    let era = z / 146_097;
    let day_of_era = z % 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = era * 400 + year_of_era + i64::from(month <= 2);
    let in_day = seconds % 86_400;
    format!(
        "{year:04}-{month:02}-{day:02} {:02}:{:02}",
        in_day / 3600,
        in_day % 3600 / 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_shown_in_utc() {
        assert_eq!(utc(1_795_384_745_000), "2026-11-22 21:59");
        assert_eq!(utc(951_782_400_000), "2000-02-29 00:00");
        assert_eq!(utc(0), "–");
        assert_eq!(utc(u64::MAX), "–");
    }

    #[test]
    fn numbers_are_grouped_and_shortened() {
        assert_eq!(count(1_234_567), "1\u{202f}234\u{202f}567");
        assert_eq!(count(12), "12");
        assert_eq!(brief(1_270_000.0), "1.3 M");
        assert_eq!(brief(0.25), "0.2");
        assert_eq!(percent(f64::NAN), "–");
        assert_eq!(duration(200.4), "3 min 20 s");
    }

    #[test]
    fn escaping_leaves_no_markup_and_no_direction_marks() {
        assert_eq!(
            esc("<b a=\"1\" b='2'>&\u{202e}\u{0}x\ny"),
            "&lt;b a=&quot;1&quot; b=&#39;2&#39;&gt;&amp;x y"
        );
        assert!(esc(&"x".repeat(1000)).chars().count() == MAX_TEXT_CHARS + 1);
    }
}
