//! Secrets in what is recorded, found by their shape and replaced by a mark before anything is written.
//!
//! Each detector reads a text once, from front to back, and looks back at most a fixed number of bytes, so the time is
//! linear in the text whatever stands in it. A mark (`<email:3f>`) holds one byte of a digest of what it replaces: enough to
//! tell two addresses of an episode apart, far too little to find one.

mod keys;
#[cfg(test)]
mod tests;
mod walk;

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use sha2::{Digest, Sha256};

pub use walk::{
    clean_counterfactual, clean_episode, clean_observation, clean_outcome, clean_step, Cleaner,
};

/// What a detector looks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// A key or token that a well-known provider marks by its beginning (`ghp_`, `sk-`, `AKIA`, ...).
    Key,
    /// A private key in PEM, from its first line to its last.
    PrivateKey,
    /// A JSON web token: three parts, the first beginning with `eyJ`.
    Jwt,
    /// What follows `Bearer` or `Basic` in a header.
    Bearer,
    /// A password in a URL, and the value of a field called `password`, `api_key`, `client_secret` and the like.
    Password,
    /// A payment card's number: a known length and beginning, and a valid check digit (Luhn).
    Card,
    Email,
    /// Twenty-four characters or more that look drawn at random: upper case, lower case and digits in quick change. Digests in
    /// hexadecimal, UUIDs and the ids of chat calls are none.
    Entropy,
}

impl Kind {
    pub const ALL: [Kind; 8] = [
        Kind::Key,
        Kind::PrivateKey,
        Kind::Jwt,
        Kind::Bearer,
        Kind::Password,
        Kind::Card,
        Kind::Email,
        Kind::Entropy,
    ];

    /// The name by which it is switched off, and which stands in marks.
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Key => "key",
            Kind::PrivateKey => "private_key",
            Kind::Jwt => "jwt",
            Kind::Bearer => "bearer",
            Kind::Password => "password",
            Kind::Card => "card",
            Kind::Email => "email",
            Kind::Entropy => "entropy",
        }
    }
}

/// Which detectors run. As text: `all`, `none`, or kinds to leave out of all (`-email,-entropy`).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Detect(u16);

impl Detect {
    pub const ALL: Detect = Detect((1 << Kind::ALL.len()) - 1);
    pub const NONE: Detect = Detect(0);

    /// These without `kind`.
    pub const fn without(self, kind: Kind) -> Detect {
        Detect(self.0 & !(1 << kind as u16))
    }

    pub const fn has(self, kind: Kind) -> bool {
        self.0 & (1 << kind as u16) != 0
    }
}

impl Default for Detect {
    fn default() -> Self {
        Detect::ALL
    }
}

impl fmt::Display for Detect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Detect::ALL => f.write_str("all"),
            Detect::NONE => f.write_str("none"),
            some => {
                let off = Kind::ALL.iter().filter(|kind| !some.has(**kind));
                let names: Vec<String> = off.map(|kind| format!("-{}", kind.name())).collect();
                f.write_str(&names.join(","))
            }
        }
    }
}

impl fmt::Debug for Detect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Detect({self})")
    }
}

/// The text names no set of detectors.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} names no detectors: all, none, or kinds to leave out such as -email,-entropy (key, private_key, jwt, bearer, password, card, email, entropy)")]
pub struct BadDetect(String);

impl FromStr for Detect {
    type Err = BadDetect;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || BadDetect(text.chars().take(80).collect());
        match text.trim() {
            "" | "all" => return Ok(Detect::ALL),
            "none" => return Ok(Detect::NONE),
            _ => {}
        }
        text.split(',').try_fold(Detect::ALL, |set, part| {
            let name = part.trim().strip_prefix('-').ok_or_else(bad)?;
            let kind = Kind::ALL.into_iter().find(|kind| kind.name() == name);
            Ok(set.without(kind.ok_or_else(bad)?))
        })
    }
}

/// A secret's place in a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    pub kind: Kind,
    /// Bytes of the text, on character boundaries.
    pub range: Range<usize>,
}

/// All secrets of a text, in order, without overlaps: of two that overlap, both are covered and the first gives its kind.
pub fn find(text: &str, detect: Detect) -> Vec<Found> {
    let mut found = Vec::new();
    if detect == Detect::NONE || text.len() < 6 {
        return found;
    }
    let bytes = text.as_bytes();
    scan(bytes, detect, &mut found);
    found.sort_by_key(|f| (f.range.start, f.kind));
    found.dedup_by(|next, first| {
        let overlap = next.range.start < first.range.end;
        if overlap {
            first.range.end = first.range.end.max(next.range.end);
        }
        overlap
    });
    found
}

/// Looks at a text that had secrets, because a mark ends what stood before it: an address that ran on into a key is one only then.
const PASSES: usize = 8;

/// Replaces the secrets of a text by their marks and tells which kinds there were. A second call changes nothing.
pub fn clean(text: &mut String, detect: Detect, kinds: &mut Vec<Kind>) -> bool {
    (0..PASSES)
        .take_while(|_| replace(text, detect, kinds))
        .count()
        > 0
}

fn replace(text: &mut String, detect: Detect, kinds: &mut Vec<Kind>) -> bool {
    let found = find(text, detect);
    if found.is_empty() {
        return false;
    }
    let mut out = String::with_capacity(text.len());
    let mut from = 0;
    for Found { kind, range } in found {
        out.push_str(&text[from..range.start]);
        out.push_str(&mark(kind, &text[range.clone()]));
        from = range.end;
        if !kinds.contains(&kind) {
            kinds.push(kind);
        }
    }
    out.push_str(&text[from..]);
    *text = out;
    true
}

/// What stands in place of a secret: its kind and the first byte of SHA-256 over kind, a zero byte and the secret (an
/// address in lower case, a card without its separators), as the policies' `locum.hash` computes it.
pub fn mark(kind: Kind, secret: &str) -> String {
    let plain: String = match kind {
        Kind::Email => secret.to_lowercase(),
        Kind::Card => secret.chars().filter(char::is_ascii_digit).collect(),
        _ => secret.into(),
    };
    let digest = Sha256::new()
        .chain_update(kind.name())
        .chain_update([0])
        .chain_update(plain)
        .finalize();
    format!("<{}:{:02x}>", kind.name(), digest[0])
}

/// One walk over the bytes; what a byte may begin decides which detector looks there.
fn scan(bytes: &[u8], detect: Detect, found: &mut Vec<Found>) {
    let mut put = |kind: Kind, range: Option<Range<usize>>| {
        if let Some(range) = range.filter(|r| !r.is_empty()) {
            found.push(Found { kind, range });
        }
    };
    // Where the word that is being read began, and up to where digits were taken for a card already.
    let mut at = 0;
    let mut cards_from = 0;
    let mut pem_from = 0;
    let mut email_from = 0;
    while at < bytes.len() {
        let byte = bytes[at];
        if !is_word(byte) {
            match byte {
                b'@' if detect.has(Kind::Email) => {
                    let range = email(bytes, at, email_from);
                    email_from = range.as_ref().map_or(email_from, |r| r.end);
                    put(Kind::Email, range);
                }
                b':' if detect.has(Kind::Password) => {
                    put(Kind::Password, url_password(bytes, at));
                    put(Kind::Password, keys::assigned(bytes, at));
                }
                b'=' if detect.has(Kind::Password) => {
                    put(Kind::Password, keys::assigned(bytes, at));
                }
                _ => {}
            }
            at += 1;
            continue;
        }
        let end = at + bytes[at..].iter().take_while(|b| is_word(**b)).count();
        if byte == b'-' && at >= pem_from && detect.has(Kind::PrivateKey) {
            let range = pem(bytes, at);
            pem_from = range.as_ref().map_or(pem_from, |r| r.end);
            put(Kind::PrivateKey, range);
        }
        if detect.has(Kind::Card) {
            let mut digit = at;
            // Dashes are part of words, spaces are not: a card may begin inside a word and end in a later one.
            while digit < end {
                let begins = bytes[digit].is_ascii_digit() && digit >= cards_from;
                if begins && (digit == 0 || !is_part_of_number(bytes[digit - 1])) {
                    let (range, next) = card(bytes, digit);
                    cards_from = next;
                    put(Kind::Card, range);
                }
                digit += 1;
            }
        }
        // No key is shorter, but for those that a dot or a colon divides.
        let divided = matches!(bytes.get(end), Some(b'.' | b':'));
        if detect.has(Kind::Key) && (divided || end - at >= keys::MIN_KEY) {
            put(Kind::Key, keys::provider(bytes, at));
        }
        if detect.has(Kind::Jwt) && byte == b'e' {
            put(Kind::Jwt, jwt(bytes, at));
        }
        if detect.has(Kind::Bearer) && matches!(byte, b'b' | b'B') {
            put(Kind::Bearer, bearer(bytes, at, end));
        }
        if detect.has(Kind::Entropy) && end - at >= MIN_RANDOM - 8 {
            put(Kind::Entropy, random(bytes, at, end));
        }
        at = end;
    }
}

/// What words are made of: names, keys, base64url.
fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-')
}

fn is_part_of_number(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-' | b'/')
}

/// Local part and domain around the `@` at `at`; the local part begins at `from` at the earliest.
fn email(bytes: &[u8], at: usize, from: usize) -> Option<Range<usize>> {
    let local = |b: u8| b.is_ascii_alphanumeric() || b"._%+-'".contains(&b);
    let before = &bytes[from.max(at.saturating_sub(64))..at];
    let start = at - before.iter().rev().take_while(|b| local(**b)).count();
    let start = start
        + bytes[start..at]
            .iter()
            .take_while(|b| !b.is_ascii_alphanumeric())
            .count();
    let domain = |b: &u8| b.is_ascii_alphanumeric() || matches!(*b, b'.' | b'-');
    let after = &bytes[at + 1..bytes.len().min(at + 256)];
    let mut n = after.iter().take_while(|b| domain(b)).count();
    while n > 0 && !after[n - 1].is_ascii_alphanumeric() {
        n -= 1;
    }
    let top = after[..n].rsplit(|b| *b == b'.').next()?;
    let dotted = top.len() < n && after[0] != b'.';
    let named = top.len() >= 2 && top.iter().all(u8::is_ascii_alphabetic);
    // `git@host:path` is where a repository lies.
    let is_git = &bytes[start..at] == b"git" && bytes.get(at + 1 + n) == Some(&b':');
    (start < at && dotted && named && !is_git).then_some(start..at + 1 + n)
}

/// The password of `scheme://user:password@host`, for the colon of `://` at `at`.
fn url_password(bytes: &[u8], at: usize) -> Option<Range<usize>> {
    let rest = bytes[at..].strip_prefix(b"://")?;
    let stop = |b: &u8| b.is_ascii_whitespace() || b"/?#\"'<>\\`".contains(b);
    let authority = &rest[..rest.iter().take(512).take_while(|b| !stop(b)).count()];
    let host = authority.iter().rposition(|b| *b == b'@')?;
    let colon = authority[..host].iter().position(|b| *b == b':')?;
    let from = at + 3 + colon + 1;
    let range = from..at + 3 + host;
    (!range.is_empty() && bytes[from] != b'<').then_some(range)
}

/// From `-----BEGIN ... PRIVATE KEY` to the end of the matching last line, or of the text if that was cut off.
fn pem(bytes: &[u8], at: usize) -> Option<Range<usize>> {
    let rest = bytes[at..].strip_prefix(b"-----BEGIN ")?;
    let head = &rest[..rest.len().min(64)];
    let label = head.windows(11).position(|w| w == b"PRIVATE KEY")?;
    if head[..label].contains(&b'\n') {
        return None;
    }
    let tail = &bytes[at + 11 + label + 11..];
    let end = tail.windows(9).position(|w| w == b"-----END ");
    let end = end.map_or(bytes.len(), |n| {
        let last = at + 11 + label + 11 + n + 9;
        let dashes = bytes[last..]
            .windows(5)
            .take(64)
            .position(|w| w == b"-----");
        dashes.map_or(bytes.len().min(last), |n| last + n + 5)
    });
    // Never in the middle of a character: what was cut may end in any byte.
    let end = (end..=bytes.len()).find(|e| bytes.get(*e).is_none_or(|b| b & 0xc0 != 0x80))?;
    Some(at..end)
}

fn jwt(bytes: &[u8], at: usize) -> Option<Range<usize>> {
    if !bytes[at..].starts_with(b"eyJ") {
        return None;
    }
    let part = |from: usize| {
        let rest = bytes.get(from..).unwrap_or_default();
        from + rest.iter().take_while(|b| is_word(**b)).count()
    };
    let first = part(at);
    let second = (bytes.get(first) == Some(&b'.')).then(|| part(first + 1))?;
    let end = match bytes.get(second) {
        Some(b'.') => part(second + 1),
        _ => second,
    };
    (first - at >= 10 && second - first > 10).then_some(at..end)
}

/// What follows the word `Bearer` or `Basic`, if it does not look like a word of a language.
fn bearer(bytes: &[u8], at: usize, end: usize) -> Option<Range<usize>> {
    let word = &bytes[at..end];
    let named = word.eq_ignore_ascii_case(b"bearer") || word.eq_ignore_ascii_case(b"basic");
    if !named || bytes.get(end) != Some(&b' ') {
        return None;
    }
    let spaces = bytes[end..].iter().take(3);
    let from = end + spaces.take_while(|b| **b == b' ').count();
    let token = |b: &&u8| is_word(**b) || b".~+/=".contains(b);
    let n = bytes[from..].iter().take_while(token).count();
    let token = &bytes[from..from + n];
    let odd = token
        .iter()
        .any(|b| b.is_ascii_digit() || b"+/=".contains(b));
    (n >= 16 && odd).then_some(from..from + n)
}

/// A card's number that begins at the digit at `at`, and the place behind the run of digits it was looked for in.
fn card(bytes: &[u8], at: usize) -> (Option<Range<usize>>, usize) {
    let (mut digits, mut n, mut end, mut groups) = ([0u8; 20], 0, at, 1);
    let mut i = at;
    while let Some(byte) = bytes.get(i) {
        let separates = matches!(byte, b' ' | b'-')
            && i == end
            && bytes.get(i + 1).is_some_and(u8::is_ascii_digit);
        if byte.is_ascii_digit() {
            if n < digits.len() {
                digits[n] = byte - b'0';
            }
            n += 1;
            end = i + 1;
        } else if separates {
            groups += 1;
        } else {
            break;
        }
        i += 1;
    }
    let grouped = groups == 1 || (3..=5).contains(&groups);
    let word_goes_on = bytes
        .get(end)
        .is_some_and(|b| b.is_ascii_alphanumeric() || *b == b'_');
    let is_card = grouped
        && !word_goes_on
        && n <= 19
        && is_issued(&digits[..n.min(20)])
        && luhn(&digits[..n]);
    (is_card.then_some(at..end), end.max(at + 1))
}

/// Whether an issuer gives out numbers of this length with this beginning.
fn is_issued(digits: &[u8]) -> bool {
    if digits.len() < 13 {
        return false;
    }
    let first = |n: usize| digits[..n].iter().fold(0u32, |sum, d| sum * 10 + *d as u32);
    let (two, three, four) = (first(2), first(3), first(4));
    match digits.len() {
        14 => matches!(two, 36 | 38 | 39) || (300..=305).contains(&three),
        15 => matches!(two, 34 | 37),
        13 => digits[0] == 4,
        16 => {
            digits[0] == 4
                || (51..=55).contains(&two)
                || (2221..=2720).contains(&four)
                || four == 6011
                || (644..=659).contains(&three)
                || (3528..=3589).contains(&four)
                || two == 62
        }
        17..=19 => digits[0] == 4 && digits.len() == 19 || two == 62,
        _ => false,
    }
}

fn luhn(digits: &[u8]) -> bool {
    let sum: u32 = digits
        .iter()
        .rev()
        .enumerate()
        .map(|(i, digit)| match (i % 2, *digit as u32) {
            (0, digit) => digit,
            (_, digit) if digit > 4 => digit * 2 - 9,
            (_, digit) => digit * 2,
        })
        .sum();
    sum.is_multiple_of(10)
}

/// Fewest characters that are taken for drawn at random, and most: longer ones are files in base64.
const MIN_RANDOM: usize = 24;
const MAX_RANDOM: usize = 256;
/// What ids begin with that many hosts write into texts; what follows is random by design and opens nothing.
const IDS: [&[u8]; 12] = [
    b"call_",
    b"chatcmpl-",
    b"toolu_",
    b"msg_",
    b"run_",
    b"resp_",
    b"req_",
    b"thread_",
    b"fc_",
    b"asst_",
    b"file-",
    b"sha",
];

/// The word at `at..end`, together with `+`, `/` and `=` around it, if it looks drawn at random.
fn random(bytes: &[u8], at: usize, end: usize) -> Option<Range<usize>> {
    let base64 = |b: &u8| is_word(*b) || b"+/=".contains(b);
    let before = bytes[at.saturating_sub(MAX_RANDOM)..at].iter();
    let start = at - before.rev().take_while(|b| base64(b)).count();
    let after = bytes[end..].iter().take(MAX_RANDOM);
    let end = end + after.take_while(|b| base64(b)).count();
    // An assignment (`name=value`) is judged by its value.
    let equals = bytes[start..at].iter().rposition(|b| *b == b'=');
    let start = equals.map_or(start, |n| start + n + 1);
    let word = &bytes[start..end];
    if !(MIN_RANDOM..=MAX_RANDOM).contains(&word.len()) || IDS.iter().any(|id| word.starts_with(id))
    {
        return None;
    }
    let class = |b: u8| match b {
        b'a'..=b'z' => 0usize,
        b'A'..=b'Z' => 1,
        b'0'..=b'9' => 2,
        _ => 3,
    };
    let mut counts = [0usize; 4];
    word.iter().for_each(|b| counts[class(*b)] += 1);
    // A path has words between its slashes, a name has words between its dashes.
    let [lower, upper, digits, others] = counts;
    if lower == 0 || upper == 0 || digits == 0 || others * 8 > word.len() {
        return None;
    }
    let changes = word
        .windows(2)
        .filter(|w| class(w[0]) != class(w[1]))
        .count();
    (changes * 5 >= (word.len() - 1) * 2 && entropy(word) >= 3.7).then_some(start..end)
}

/// Shannon entropy of the bytes' frequencies, in bits a byte: 4.3 for 24 letters and digits drawn at random.
fn entropy(word: &[u8]) -> f64 {
    let mut counts = [0u32; 256];
    word.iter().for_each(|b| counts[*b as usize] += 1);
    let n = word.len() as f64;
    let share = counts.iter().filter(|c| **c > 0).map(|c| *c as f64 / n);
    -share.map(|p| p * p.log2()).sum::<f64>()
}
