//! Files of recorded runs: which format it is, one episode for each run, and an account of every run left out.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::{intercode, openai, redact_episode, tau_bench, FormatError};
use crate::episode::{Episode, EpisodeId, Status};
use crate::limits::{MAX_IMPORT_BYTES, MAX_JSON_DEPTH};
use crate::policy::Policy;
use crate::secrets::{clean_episode, Cleaner};
use crate::store::{json, Record, Store, StoreError};

/// The formats that [`import`] knows by name.
pub const FORMATS: [&str; 3] = [openai::NAME, tau_bench::NAME, intercode::NAME];
/// Reasons kept of one import; further ones are counted only.
const MAX_REASONS: usize = 1000;
/// Lines looked at to tell a format, so that a bad first line does not hide it.
const PROBED_LINES: usize = 20;
/// Longest wait for the store during an import.
const STORE_TIMEOUT: Duration = Duration::from_secs(60);

/// What became of an episode that an import handed over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Taken {
    Stored,
    /// An episode with this id is there already.
    AlreadyThere,
    /// It cannot be stored; the import goes on without it.
    Refused(String),
}

/// What an import did. `episodes` were stored; `successes + failures + partial + aborted + unknown` add up to it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImportCounts {
    pub format: String,
    pub episodes: u64,
    /// Steps of these episodes: messages, without the results of tools.
    pub steps: u64,
    pub successes: u64,
    pub failures: u64,
    pub partial: u64,
    pub aborted: u64,
    pub unknown: u64,
    /// Runs that were not stored.
    pub skipped: u64,
    /// Why, for the first thousand of them.
    pub reasons: Vec<Skip>,
}

/// One run that was left out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skip {
    /// Line of the file on which the run begins, counted from 1.
    pub line: u64,
    pub reason: String,
}

impl ImportCounts {
    fn skip(&mut self, line: u64, reason: String) {
        self.skipped += 1;
        if self.reasons.len() < MAX_REASONS {
            self.reasons.push(Skip { line, reason });
        }
    }

    fn stored(&mut self, status: Status, steps: usize) {
        self.episodes += 1;
        self.steps += steps as u64;
        *match status {
            Status::Success => &mut self.successes,
            Status::Failure => &mut self.failures,
            Status::Partial => &mut self.partial,
            Status::Aborted => &mut self.aborted,
            Status::Unknown => &mut self.unknown,
        } += 1;
    }
}

/// Reads every run of a file and hands each to `sink` as a closed episode.
///
/// The format is told from the content unless named (see [`FORMATS`]). A run's id is made from its
/// bytes, and from how many equal runs stand before it in the file, so that the same file gives the
/// same ids again; a run that our export wrote keeps its id. A run that cannot be read is skipped with
/// its line and reason, and the rest goes on.
///
/// # Errors
/// The file cannot be read or is of no known format, or `sink` failed; what was handed over before stays.
pub fn import(
    path: &Path,
    format: Option<&str>,
    sink: &mut dyn FnMut(Episode) -> Result<Taken, String>,
) -> Result<ImportCounts, FormatError> {
    let bytes = read(path)?;
    let text = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);
    let format = match format {
        None => detect(text).map_err(|problem| FormatError::Unrecognised {
            path: path.into(),
            problem,
        })?,
        Some(name) => *FORMATS
            .iter()
            .find(|known| **known == name)
            .ok_or_else(|| FormatError::NoSuchFormat {
                name: name.chars().take(64).collect(),
            })?,
    };
    let runs = runs(text, format).map_err(|problem| FormatError::Unrecognised {
        path: path.into(),
        problem,
    })?;
    let file = path
        .file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();
    let now_ms = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as u64);

    let mut counts = ImportCounts {
        format: format.into(),
        ..ImportCounts::default()
    };
    let mut equal_before: HashMap<[u8; 32], u64> = HashMap::new();
    let mut seen: HashSet<EpisodeId> = HashSet::new();
    let (mut line, mut counted_to) = (1u64, 0usize);
    for run in runs {
        line += text[counted_to..run.start]
            .iter()
            .filter(|byte| **byte == b'\n')
            .count() as u64;
        counted_to = run.start;
        let raw = &text[run];
        let mut episode = match read_run(raw, format) {
            Ok(episode) => episode,
            Err(reason) => {
                counts.skip(line, reason);
                continue;
            }
        };
        if episode.episode_id == EpisodeId::default() {
            let content: [u8; 32] = Sha256::digest(raw).into();
            let nth = equal_before.entry(content).or_default();
            episode.episode_id = content_id(format, &content, *nth);
            *nth += 1;
        }
        episode.provenance.source_format = format.into();
        episode.provenance.source_id = Some(format!("{file}:{line}"));
        episode.provenance.imported_at_ms = Some(now_ms);
        let status = episode
            .outcome
            .as_ref()
            .map_or(Status::Unknown, |outcome| outcome.status);
        let steps = episode.steps.len();
        let taken = match seen.insert(episode.episode_id) {
            true => sink(episode).map_err(|problem| FormatError::Sink { problem })?,
            false => Taken::AlreadyThere,
        };
        match taken {
            Taken::Stored => counts.stored(status, steps),
            Taken::AlreadyThere => counts.skip(line, "already there".into()),
            Taken::Refused(reason) => counts.skip(line, reason),
        }
    }
    Ok(counts)
}

/// Imports a file into a store; everything counted as stored is durable on return. Each episode goes through the
/// store's detectors and the policy's `redact` first, and is left out where that fails.
///
/// # Errors
/// As [`import`]; [`FormatError::Sink`] if the store cannot write.
pub fn import_into(
    path: &Path,
    format: Option<&str>,
    store: &Store,
    policy: &dyn Policy,
) -> Result<ImportCounts, FormatError> {
    let failed = |error: StoreError| FormatError::Sink {
        problem: error.to_string(),
    };
    let counts = import(path, format, &mut |mut episode| {
        if store
            .has(episode.episode_id)
            .map_err(|error| error.to_string())?
        {
            return Ok(Taken::AlreadyThere);
        }
        // The writer would find the same, but the hook is asked about what is left.
        clean_episode(&mut episode, &mut Cleaner::new(store.detect()));
        if let Err(why) = redact_episode(&mut episode, &mut |info| policy.redact(&info)) {
            return Ok(Taken::Refused(why.to_string()));
        }
        let record = Record::Begin(Box::new(episode));
        match store.record(record.clone()) {
            Ok(()) => Ok(Taken::Stored),
            Err(StoreError::Busy { .. }) => {
                store
                    .flush(STORE_TIMEOUT)
                    .map_err(|error| error.to_string())?;
                store
                    .record(record)
                    .map(|()| Taken::Stored)
                    .map_err(|error| error.to_string())
            }
            Err(error @ StoreError::TooLarge { .. }) => Ok(Taken::Refused(error.to_string())),
            Err(error) => Err(error.to_string()),
        }
    })?;
    store.flush(STORE_TIMEOUT).map_err(failed)?;
    Ok(counts)
}

fn read(path: &Path) -> Result<Vec<u8>, FormatError> {
    let failed = |source| FormatError::Io {
        path: path.into(),
        source,
    };
    let facts = std::fs::metadata(path).map_err(failed)?;
    if !facts.is_file() {
        // A pipe would be waited for without end.
        return Err(failed(std::io::Error::other("not a regular file")));
    }
    if facts.len() > MAX_IMPORT_BYTES {
        return Err(FormatError::TooLarge {
            path: path.into(),
            bytes: facts.len(),
            limit: MAX_IMPORT_BYTES,
        });
    }
    std::fs::read(path).map_err(failed)
}

fn content_id(format: &str, content: &[u8; 32], nth: u64) -> EpisodeId {
    let hash = Sha256::new()
        .chain_update(b"locum import\0")
        .chain_update(format)
        .chain_update(content);
    let hash: [u8; 32] = hash.chain_update(nth.to_be_bytes()).finalize().into();
    // The time part stays zero: when the run took place is not known.
    let mut random = [0u8; 16];
    random.copy_from_slice(&hash[..16]);
    EpisodeId::new(0, u128::from_be_bytes(random))
}

/// Where the runs stand in the text.
fn runs(text: &[u8], format: &str) -> Result<Vec<Range<usize>>, String> {
    let whole = || json::elements(text).map_err(|error| error.to_string());
    let first = text.iter().find(|byte| !byte.is_ascii_whitespace());
    match format {
        openai::NAME if first != Some(&b'[') => {
            if parse_object(text).is_some_and(|object| object.contains_key("messages")) {
                // One object over several lines.
                return Ok(vec![trim(text, 0..text.len())]);
            }
            Ok(lines(text).collect())
        }
        intercode::NAME if first != Some(&b'{') => {
            Err("an InterCode file is one JSON object".into())
        }
        tau_bench::NAME if first != Some(&b'[') => Err("a tau-bench file is one JSON array".into()),
        _ => Ok(whole()?.into_iter().map(|element| element.value).collect()),
    }
}

fn lines(text: &[u8]) -> impl Iterator<Item = Range<usize>> + '_ {
    let mut at = 0;
    text.split_inclusive(|byte| *byte == b'\n')
        .filter_map(move |line| {
            let range = trim(text, at..at + line.len());
            at += line.len();
            (!range.is_empty()).then_some(range)
        })
}

fn trim(text: &[u8], mut range: Range<usize>) -> Range<usize> {
    while range.start < range.end && text[range.start].is_ascii_whitespace() {
        range.start += 1;
    }
    while range.end > range.start && text[range.end - 1].is_ascii_whitespace() {
        range.end -= 1;
    }
    range
}

fn parse_object(text: &[u8]) -> Option<Map<String, Value>> {
    match json::parse(text, MAX_JSON_DEPTH) {
        Ok(Value::Object(object)) => Some(object),
        _ => None,
    }
}

/// Tells the format from the content; the error says what was looked for.
fn detect(text: &[u8]) -> Result<&'static str, String> {
    let first = text.iter().find(|byte| !byte.is_ascii_whitespace());
    let has = |object: &Map<String, Value>, key: &str| object.contains_key(key);
    match first {
        None => return Err("the file is empty".into()),
        Some(b'[') => {
            let elements = json::elements(text).map_err(|error| error.to_string())?;
            for element in elements.iter().take(PROBED_LINES) {
                match parse_object(&text[element.value.clone()]) {
                    Some(run) if has(&run, "traj") => return Ok(tau_bench::NAME),
                    Some(run) if has(&run, "messages") => return Ok(openai::NAME),
                    _ => {}
                }
            }
            return Err("an array whose runs have neither `traj` nor `messages`".into());
        }
        Some(b'{') => {}
        Some(_) => return Err("not JSON".into()),
    }
    for range in lines(text).take(PROBED_LINES) {
        if parse_object(&text[range]).is_some_and(|line| has(&line, "messages")) {
            return Ok(openai::NAME);
        }
    }
    let elements = json::elements(text).map_err(|error| error.to_string())?;
    for element in &elements {
        let key = element.key.clone().map(|key| &text[key]);
        if key == Some(br#""messages""#) {
            return Ok(openai::NAME);
        }
    }
    for element in elements.iter().take(PROBED_LINES) {
        if parse_object(&text[element.value.clone()]).is_some_and(|run| has(&run, "turn_history")) {
            return Ok(intercode::NAME);
        }
    }
    Err("an object with neither `messages` nor runs that have a `turn_history`".into())
}

fn read_run(raw: &[u8], format: &str) -> Result<Episode, String> {
    let value = json::parse(raw, MAX_JSON_DEPTH)
        .map_err(|error| format!("not JSON that can be taken: {error}"))?;
    let Value::Object(run) = value else {
        return Err("an object is expected".into());
    };
    let episode = match format {
        tau_bench::NAME => tau_bench::episode(&run),
        intercode::NAME => intercode::episode(&run),
        _ => openai::episode(&run),
    };
    episode.map_err(|error| error.to_string())
}
