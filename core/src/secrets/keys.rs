//! Keys that their beginning gives away, and values that their name does.

use std::ops::Range;

/// Bytes that may follow a beginning.
#[derive(Clone, Copy)]
enum Of {
    /// Letters, digits, `_` and `-`.
    Word,
    /// Letters and digits.
    Alnum,
    /// Upper case and digits.
    Upper,
    Hex,
    /// A word with dots in it.
    Dotted,
}

/// Beginning, what follows, and at least how many of it. Sorted by nothing: the first that fits counts.
const PROVIDERS: &[(&str, Of, usize)] = &[
    // Amazon
    ("AKIA", Of::Upper, 16),
    ("ASIA", Of::Upper, 16),
    ("ABIA", Of::Upper, 16),
    ("ACCA", Of::Upper, 16),
    // GitHub, GitLab, Bitbucket, Atlassian
    ("ghp_", Of::Alnum, 30),
    ("gho_", Of::Alnum, 30),
    ("ghu_", Of::Alnum, 30),
    ("ghs_", Of::Alnum, 30),
    ("ghr_", Of::Alnum, 30),
    ("github_pat_", Of::Word, 30),
    ("glpat-", Of::Word, 20),
    ("gldt-", Of::Word, 20),
    ("glrt-", Of::Word, 20),
    ("glsa_", Of::Word, 20),
    ("glc_", Of::Word, 20),
    ("ATATT3", Of::Word, 30),
    ("ATBB", Of::Alnum, 28),
    // Models
    ("sk-", Of::Word, 20),
    ("xai-", Of::Word, 30),
    ("gsk_", Of::Alnum, 30),
    ("hf_", Of::Alnum, 30),
    ("r8_", Of::Alnum, 30),
    ("pplx-", Of::Alnum, 30),
    // Google
    ("AIza", Of::Word, 30),
    ("ya29.", Of::Word, 20),
    ("GOCSPX-", Of::Word, 20),
    // Slack, Discord, telephone and mail
    ("xoxb-", Of::Word, 10),
    ("xoxp-", Of::Word, 10),
    ("xoxa-", Of::Word, 10),
    ("xoxr-", Of::Word, 10),
    ("xoxs-", Of::Word, 10),
    ("xapp-", Of::Word, 10),
    ("SG.", Of::Dotted, 40),
    ("key-", Of::Hex, 32),
    ("SK", Of::Hex, 32),
    // Payments and shops
    ("sk_live_", Of::Alnum, 16),
    ("sk_test_", Of::Alnum, 16),
    ("rk_live_", Of::Alnum, 16),
    ("rk_test_", Of::Alnum, 16),
    ("whsec_", Of::Alnum, 16),
    ("sq0atp-", Of::Word, 20),
    ("sq0csp-", Of::Word, 30),
    ("shpat_", Of::Hex, 32),
    ("shpss_", Of::Hex, 32),
    ("shpca_", Of::Hex, 32),
    ("shppa_", Of::Hex, 32),
    // Packages and containers
    ("npm_", Of::Alnum, 30),
    ("pypi-", Of::Word, 40),
    ("rubygems_", Of::Hex, 40),
    ("dckr_pat_", Of::Word, 20),
    // Clouds and services
    ("dop_v1_", Of::Hex, 40),
    ("doo_v1_", Of::Hex, 40),
    ("dapi", Of::Hex, 32),
    ("hvs.", Of::Word, 20),
    ("hvb.", Of::Word, 20),
    ("sbp_", Of::Hex, 40),
    ("tskey-", Of::Word, 20),
    ("lin_api_", Of::Alnum, 30),
    ("ntn_", Of::Alnum, 30),
    ("secret_", Of::Alnum, 40),
    ("figd_", Of::Word, 30),
    ("PMAK-", Of::Word, 30),
    ("NRAK-", Of::Alnum, 20),
    ("dp.pt.", Of::Alnum, 30),
    ("HRKU-", Of::Word, 30),
    ("AGE-SECRET-KEY-1", Of::Upper, 40),
];

/// Bytes of the shortest word that is a key.
pub const MIN_KEY: usize = 15;
const _: () = {
    let mut i = 0;
    while i < PROVIDERS.len() {
        assert!(PROVIDERS[i].0.len() + PROVIDERS[i].2 >= MIN_KEY);
        i += 1;
    }
};
/// Longest key that is looked at, so that a text made of beginnings costs no more than another.
const MAX_KEY: usize = 512;

/// A provider's key that begins at `at`, the beginning of a word.
pub fn provider(bytes: &[u8], at: usize) -> Option<Range<usize>> {
    let rest = &bytes[at..];
    let fits = |(head, of, least): &(&str, Of, usize)| {
        let tail = rest.strip_prefix(head.as_bytes())?;
        let most = tail.iter().take(MAX_KEY);
        let n = most.take_while(|b| belongs(**b, *of)).count();
        let word_ends = tail.get(n).is_none_or(|b| !b.is_ascii_alphanumeric());
        // A name made of words, such as `sk-learn-compatible-estimator`, has no digit.
        let odd = tail[..n].iter().any(u8::is_ascii_digit) || matches!(of, Of::Upper);
        (n >= *least && word_ends && odd).then_some(at..at + head.len() + n)
    };
    let first = *rest.first()?;
    let known = PROVIDERS.iter().filter(|p| p.0.as_bytes()[0] == first);
    known
        .into_iter()
        .find_map(fits)
        .or_else(|| telegram(bytes, at))
}

fn belongs(byte: u8, of: Of) -> bool {
    match of {
        Of::Word => byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-'),
        Of::Alnum => byte.is_ascii_alphanumeric(),
        Of::Upper => byte.is_ascii_uppercase() || byte.is_ascii_digit(),
        Of::Hex => byte.is_ascii_hexdigit(),
        Of::Dotted => byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.'),
    }
}

/// A bot's token: eight to ten digits, a colon, `AA` and thirty or more characters.
fn telegram(bytes: &[u8], at: usize) -> Option<Range<usize>> {
    let digits = bytes[at..]
        .iter()
        .take(11)
        .take_while(|b| b.is_ascii_digit())
        .count();
    let tail = bytes[at + digits..].strip_prefix(b":AA")?;
    let most = tail.iter().take(MAX_KEY);
    let n = most.take_while(|b| belongs(**b, Of::Word)).count();
    ((8..=10).contains(&digits) && n >= 30).then_some(at..at + digits + 3 + n)
}

/// Names whose value is a secret, in lower case and with `_` for `-`. A name counts if it is one of these or ends in `_` and one.
const NAMES: &[&str] = &[
    "password",
    "passwd",
    "pwd",
    "passphrase",
    "api_key",
    "apikey",
    "x_api_key",
    "secret",
    "client_secret",
    "secret_key",
    "secret_access_key",
    "private_key",
    "access_key",
    "accountkey",
    "account_key",
    "sharedaccesskey",
    "access_token",
    "auth_token",
    "refresh_token",
    "bot_token",
    "session_token",
    "x_amz_signature",
    "x_goog_signature",
    "webhook_secret",
];

/// Whether the value that goes by this name is a secret.
pub fn is_secret_name(name: &[u8]) -> bool {
    let mut plain = [0u8; 40];
    let Some(plain) = plain.get_mut(..name.len()) else {
        return false;
    };
    for (to, from) in plain.iter_mut().zip(name) {
        *to = if *from == b'-' {
            b'_'
        } else {
            from.to_ascii_lowercase()
        };
    }
    let plain: &[u8] = plain;
    NAMES.iter().any(|known| {
        let before = plain.strip_suffix(known.as_bytes());
        before.is_some_and(|b| b.is_empty() || b.ends_with(b"_"))
    })
}

/// The value in `name=value`, `name: value` or `"name": "value"`, for the `=` or `:` at `at`.
pub fn assigned(bytes: &[u8], at: usize) -> Option<Range<usize>> {
    let around = |b: &&u8| matches!(**b, b' ' | b'"' | b'\'' | b'\\');
    let gap = bytes[..at].iter().rev().take(4).take_while(around).count();
    let name_end = at - gap;
    let in_name = |b: &&u8| b.is_ascii_alphanumeric() || matches!(**b, b'_' | b'-');
    let n = bytes[..name_end]
        .iter()
        .rev()
        .take(40)
        .take_while(in_name)
        .count();
    if n == 0 || !is_secret_name(&bytes[name_end - n..name_end]) {
        return None;
    }
    let mut from = at + 1;
    while from < bytes.len().min(at + 6) && around(&&bytes[from]) {
        from += 1;
    }
    let quote = bytes[from - 1];
    let quoted = matches!(quote, b'"' | b'\'');
    let inside = |b: &&u8| match quoted {
        true => **b != quote && **b != b'\\' && **b != b'\n',
        false => !b.is_ascii_whitespace() && !b"\"'&;,<>(){}[]\\`".contains(b),
    };
    let n = bytes[from..].iter().take(512).take_while(inside).count();
    let value = &bytes[from..from + n];
    // Marks, placeholders and words of a form (`password: required`) are none.
    let stands_for_one = value.first().is_none_or(|b| b"<[{$*%(".contains(b));
    let is_word = !quoted && value.iter().all(u8::is_ascii_lowercase);
    let literal = [&b"null"[..], b"None", b"true", b"false", b"string"].contains(&value);
    if stands_for_one || is_word || literal || n < 4 {
        return None;
    }
    // The limit may have cut a character in two.
    let end = (from + n..=bytes.len()).find(|e| bytes.get(*e).is_none_or(|b| b & 0xc0 != 0x80))?;
    Some(from..end)
}
