//! What learning while reading is worth: the same held-out episodes read by a student with its updates on, with them off, and by
//! others, and what each then thinks of the teacher's actions.

use std::ops::Range;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::dataset::{rows, Sample};
use crate::episode::EpisodeId;
use crate::gate::{bootstrap_mean, MeanInterval};
use crate::kernels::Pool;
use crate::model::{Model, ModelError};
use crate::ttt::Update;

/// Tokens read between two looks at what is to be forgotten, so a window is kept to that many.
const PIECE: usize = 128;
/// Tokens at the beginning of a text that stay in reach under every window: attention rests on them.
const SINK: usize = 16;
/// Seed of all intervals.
const SEED: u64 = 20_260_406;
/// Episodes that a verdict needs.
pub const MIN_EPISODES: usize = 5;
/// One text in so many may drift past the cap before the step is halved, and how often it is at most.
const PAST_CAP_ONE_IN: u64 = 10;
const MAX_HALVINGS: i32 = 4;
/// Everything in reach, nothing learned.
const AS_TRAINED: Reading = Reading {
    learning: false,
    window: None,
};

/// An episode, or what of it a prompt shows, as one text with the teacher's actions in it.
#[derive(Clone, Debug, PartialEq)]
pub struct Stream {
    pub episode: EpisodeId,
    pub ids: Vec<u32>,
    /// Where each action's tokens stand, in order; none begins at 0.
    pub actions: Vec<Range<usize>>,
}

/// Texts of samples, in their order: one an episode under a view that shows turns, else one a sample. What goes beyond `limit` tokens
/// is left out.
pub fn streams(samples: &[&Sample], limit: usize) -> Vec<Stream> {
    let cut = |row: Range<usize>| {
        let fits = samples[row].iter().take_while(|s| s.ids.len() <= limit);
        let fits: Vec<&&Sample> = fits.collect();
        let last = fits.last()?;
        let spans = fits.iter().map(|s| s.target_start..s.ids.len());
        Some(Stream {
            episode: last.episode,
            ids: last.ids.clone(),
            actions: spans
                .filter(|span| span.start > 0 && !span.is_empty())
                .collect(),
        })
    };
    let all = rows(samples).into_iter().filter_map(cut);
    all.filter(|stream| !stream.actions.is_empty()).collect()
}

/// One action of the teacher in the eyes of a model that read everything before it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Seen {
    /// Tokens before it.
    pub position: usize,
    /// Log-probability of its tokens, in nats.
    pub logprob: f64,
    /// Greedy decoding would have said it.
    pub exact: bool,
}

/// How a text is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reading {
    /// Whether TTT layers learn.
    pub learning: bool,
    /// Tokens to which attention reaches back, give or take a piece of 128, beside the first 16; everything if `None`. Fast weights
    /// have read everything.
    pub window: Option<usize>,
}

/// Reads a text from its first token to its last, and says of each action what the model thought of it. Where a layer's drift passes
/// its cap, the rest is read with updates off, as it is when a student serves.
///
/// # Errors
/// The model's, for a text that is too long or not in its vocabulary.
pub fn read(
    pool: &Pool,
    model: &Model,
    stream: &Stream,
    how: Reading,
) -> Result<Vec<Seen>, ModelError> {
    Ok(read_and_watch(pool, model, stream, how, &mut Vec::new())?.0)
}

/// [`read`], which also hands out every update made, with its layer, and tells whether one passed its cap.
fn read_and_watch(
    pool: &Pool,
    model: &Model,
    stream: &Stream,
    how: Reading,
    updates: &mut Vec<(u16, Update)>,
) -> Result<(Vec<Seen>, bool), ModelError> {
    let mut seen = read_until_past_cap(pool, model, stream, how, updates)?;
    if !updates.iter().any(|update| update.1.tripped) {
        return Ok((seen, false));
    }
    let off = Reading {
        learning: false,
        ..how
    };
    let as_trained = read_until_past_cap(pool, model, stream, off, &mut Vec::new())?;
    let tripped = go_on_as_trained(stream, &mut seen, &as_trained, updates);
    Ok((seen, tripped))
}

/// Puts what was seen with updates off in the place of all that lies behind the first update past its cap; whether there was one.
fn go_on_as_trained(
    stream: &Stream,
    seen: &mut [Seen],
    as_trained: &[Seen],
    updates: &[(u16, Update)],
) -> bool {
    let tripped = updates.iter().find(|update| update.1.tripped);
    let Some(edge) = tripped.map(|update| update.1.position) else {
        return false;
    };
    for (at, span) in stream.actions.iter().enumerate() {
        if span.end > edge {
            seen[at] = as_trained[at];
        }
    }
    true
}

/// Reads up to the piece in which an update passes its cap; what lies behind is worth nothing then.
fn read_until_past_cap(
    pool: &Pool,
    model: &Model,
    stream: &Stream,
    how: Reading,
    updates: &mut Vec<(u16, Update)>,
) -> Result<Vec<Seen>, ModelError> {
    let room = how.window.map_or(stream.ids.len(), |w| w + PIECE + SINK);
    let mut sequence = model.sequence(room.min(stream.ids.len()), how.learning);
    let blocks = model.config.attention_shape().keys();
    let mut nll = vec![0f32; stream.ids.len()];
    let mut hits = vec![true; stream.ids.len()];
    let mut wanted = vec![false; stream.ids.len() + 1];
    for span in &stream.actions {
        wanted[span.clone()].fill(true);
    }
    for from in (0..stream.ids.len()).step_by(PIECE) {
        let to = stream.ids.len().min(from + PIECE);
        let hidden = model.step(pool, &mut [(&mut sequence, &stream.ids[from..to])])?;
        updates.append(&mut sequence.fast.updates);
        // The row before a token predicts it.
        let at: Vec<usize> = (from..to).filter(|row| wanted[row + 1]).collect();
        let labels: Vec<u32> = at.iter().map(|row| stream.ids[row + 1]).collect();
        let at_rows: Vec<usize> = at.iter().map(|row| row - from).collect();
        let ones = vec![1.0; at.len()];
        let seen = model.head_loss(pool, &hidden, (&at_rows, &labels, &ones), None);
        for ((row, n), hit) in at.iter().zip(&seen.nll).zip(&seen.hits) {
            (nll[row + 1], hits[row + 1]) = (*n, *hit);
        }
        if let Some(window) = how.window {
            // Whole blocks are forgotten, so at most `window` tokens stay.
            sequence.forget(blocks.whole_blocks(to.saturating_sub(window)), SINK);
        }
        if updates.iter().any(|update| update.1.tripped) {
            break;
        }
    }
    let of = |span: &Range<usize>| Seen {
        position: span.start,
        logprob: -nll[span.clone()].iter().map(|n| f64::from(*n)).sum::<f64>(),
        exact: hits[span.clone()].iter().all(|hit| *hit),
    };
    Ok(stream.actions.iter().map(of).collect())
}

/// What a variant thought of every action of every episode, in the same order for all variants.
pub type Readings = Vec<Vec<Seen>>;

/// Means an action, over episodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// Log-likelihood of the teacher's action, in nats.
    pub logprob: MeanInterval,
    /// Share that greedy decoding would have said.
    pub exact: MeanInterval,
}

/// Which actions of an episode are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    All,
    /// The first, second or last third of the actions.
    Third(usize),
    /// Those with so many tokens before them.
    Tokens(usize, usize),
}

impl Part {
    /// All parts that a report shows.
    pub const SHOWN: [Part; 7] = [
        Part::Third(0),
        Part::Third(1),
        Part::Third(2),
        Part::Tokens(0, 256),
        Part::Tokens(256, 1024),
        Part::Tokens(1024, 2048),
        Part::Tokens(2048, usize::MAX),
    ];

    /// `first third`, `256 to 1024 tokens`.
    pub fn name(self) -> String {
        match self {
            Part::All => "all".into(),
            Part::Third(n) => format!("{} third", ["first", "second", "last"][n.min(2)]),
            Part::Tokens(from, usize::MAX) => format!("from {from} tokens on"),
            Part::Tokens(from, to) => format!("{from} to {to} tokens"),
        }
    }

    fn holds(self, at: usize, of: usize, seen: &Seen) -> bool {
        match self {
            Part::All => true,
            Part::Third(n) => (3 * at / of.max(1)) == n,
            Part::Tokens(from, to) => (from..to).contains(&seen.position),
        }
    }

    fn of(self, episode: &[Seen]) -> impl Iterator<Item = (usize, &Seen)> {
        let n = episode.len();
        let all = episode.iter().enumerate();
        all.filter(move |(at, seen)| self.holds(*at, n, seen))
    }
}

/// Scores of one variant in a part of the episodes; episodes that have no action there do not count.
pub fn scores(readings: &Readings, part: Part, alpha: f64) -> Scores {
    let mean = |value: fn(&Seen) -> f64| {
        let each = readings.iter().filter_map(|episode| {
            let values: Vec<f64> = part.of(episode).map(|(_, seen)| value(seen)).collect();
            mean(&values)
        });
        bootstrap_mean(&each.collect::<Vec<_>>(), alpha, SEED)
    };
    Scores {
        logprob: mean(|seen| seen.logprob),
        exact: mean(|seen| f64::from(u8::from(seen.exact))),
    }
}

/// What `a` has over `b`, paired action by action: the mean of each episode's mean difference.
///
/// # Panics
/// If the two did not read the same episodes.
pub fn difference(a: &Readings, b: &Readings, part: Part, alpha: f64) -> Scores {
    assert_eq!(a.len(), b.len(), "two variants read the same episodes");
    let paired = |value: fn(&Seen) -> f64| {
        let each = a.iter().zip(b).filter_map(|(a, b)| {
            assert_eq!(a.len(), b.len(), "two variants read the same actions");
            let values: Vec<f64> = part
                .of(a)
                .map(|(at, seen)| value(seen) - value(&b[at]))
                .collect();
            mean(&values)
        });
        bootstrap_mean(&each.collect::<Vec<_>>(), alpha, SEED)
    };
    Scores {
        logprob: paired(|seen| seen.logprob),
        exact: paired(|seen| f64::from(u8::from(seen.exact))),
    }
}

fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// Whether a student's updates are on when it serves, and why.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TttVerdict {
    pub learns: bool,
    /// A sentence.
    pub reason: String,
    /// What updates on have over updates off, an action.
    pub difference: Scores,
    pub episodes: u64,
    pub actions: u64,
    pub tokens: u64,
    /// Texts in which a layer drifted past its cap, and which were read on with updates off.
    #[serde(default)]
    pub past_cap: u64,
    /// What the trained step size is to be multiplied by for serving.
    #[serde(default = "whole_step")]
    pub step: f32,
}

fn whole_step() -> f32 {
    1.0
}

/// Judges the updates of a model with TTT layers on held-out texts, by what it thinks of the teacher's actions with them and without:
/// they are for serving only if the interval of the paired difference lies above 0. Where more than one text in ten drifts past the cap,
/// the step is halved, since such a text costs a step of the teacher and the rest of what could be learned; this chooses by reach alone,
/// so the verdict is none the rosier for it. `go_on` is asked before each text; `None` comes back when it says no.
///
/// # Errors
/// The model's, for a text that is too long.
pub fn judge(
    pool: &Pool,
    model: &Model,
    streams: &[Stream],
    alpha: f64,
    go_on: &mut dyn FnMut() -> bool,
) -> Result<Option<TttVerdict>, ModelError> {
    let chunk = model.config.ttt.as_ref().map_or(0, |ttt| ttt.chunk_len);
    // Up to its first edge a text is read the same either way.
    let long: Vec<&Stream> = streams
        .iter()
        .filter(|stream| stream.actions.iter().any(|span| span.start > chunk))
        .collect();
    let mut off = Vec::new();
    for stream in &long {
        if !go_on() {
            return Ok(None);
        }
        off.push((stream.episode, read(pool, model, stream, AS_TRAINED)?));
    }
    let (mut step, mut on, mut past_cap);
    let mut halvings = 0;
    loop {
        step = 0.5f32.powi(halvings);
        let mut model = Model::clone(model);
        if let Some(ttt) = &mut model.config.ttt {
            ttt.lr *= step;
        }
        (on, past_cap) = (Vec::new(), 0);
        for (stream, (_, as_trained)) in long.iter().zip(&off) {
            if !go_on() {
                return Ok(None);
            }
            let mut updates = Vec::new();
            let how = Reading {
                learning: true,
                window: None,
            };
            let mut seen = read_until_past_cap(pool, &model, stream, how, &mut updates)?;
            past_cap += u64::from(go_on_as_trained(stream, &mut seen, as_trained, &updates));
            on.push((stream.episode, seen));
        }
        if past_cap * PAST_CAP_ONE_IN <= long.len() as u64 || halvings == MAX_HALVINGS {
            break;
        }
        halvings += 1;
    }
    let (on, off) = (by_episode(on), by_episode(off));
    let difference = difference(&on, &off, Part::All, alpha);
    let actions = on.iter().map(Vec::len).sum::<usize>() as u64;
    let gain = difference.logprob;
    let measured = match gain.low > f64::MIN {
        true => format!(
            "log-likelihood of the teacher's actions {:+.4} nats an action ({:+.4} to {:+.4}, {} held-out episodes)",
            gain.mean, gain.low, gain.high, on.len()
        ),
        false => "with them the log-likelihood is no longer a number".into(),
    };
    let capped = match past_cap {
        0 => String::new(),
        n => format!(
            "; {n} of {} texts drifted past the cap and were read on without",
            long.len()
        ),
    };
    let halved = match halvings {
        0 => String::new(),
        _ => format!("; at {step} of the step, so that texts stay below the cap"),
    };
    let (learns, reason) = match on.len() {
        0 => (
            false,
            format!("fast weights off: no held-out text is longer than a chunk of {chunk} tokens"),
        ),
        n if n < MIN_EPISODES => (
            false,
            format!("fast weights off: {n} held-out episodes are longer than a chunk, {MIN_EPISODES} are needed"),
        ),
        _ if gain.low > 0.0 => (true, format!("fast weights on: {measured}{halved}{capped}")),
        _ => (
            false,
            format!("fast weights off, for they were not seen to help: {measured}{halved}{capped}"),
        ),
    };
    Ok(Some(TttVerdict {
        learns,
        reason,
        difference,
        episodes: on.len() as u64,
        actions,
        tokens: long.iter().map(|s| s.ids.len() as u64).sum(),
        past_cap,
        step,
    }))
}

/// What several variants made of the same episodes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    pub student: String,
    /// A second student, trained without TTT.
    pub plain: Option<String>,
    pub base: String,
    /// Numbers that the weights were in.
    pub weights: String,
    pub chunk_len: u64,
    pub episodes: u64,
    pub actions: u64,
    pub tokens: u64,
    /// Actions of these episodes that stand behind the model's last position, and were not looked at.
    pub actions_cut: u64,
    /// Of the intervals: 1 less their confidence.
    pub alpha: f64,
    pub windows: Vec<Window>,
    /// How far the student's weights went from their trained values, by tokens read.
    #[serde(default)]
    pub drift: Vec<Drift>,
    /// Where a weight would have begun again; `None` if nothing ends it.
    #[serde(default)]
    pub max_drift: Option<f32>,
}

/// Relative change of the layer that went furthest, over the episodes that came so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Drift {
    /// Tokens read.
    pub position: u64,
    pub episodes: u64,
    pub median: f32,
    pub most: f32,
    /// Episodes in which a layer was past its cap here, and began again.
    pub tripped: u64,
}

/// The drift at each edge, over episodes: the largest of the layers of each.
fn drifts(episodes: &[Vec<(u16, Update)>]) -> Vec<Drift> {
    let mut edges = std::collections::BTreeMap::<usize, Vec<(f32, bool)>>::new();
    for updates in episodes {
        let mut own = std::collections::BTreeMap::<usize, (f32, bool)>::new();
        for (_, update) in updates {
            let most = own.entry(update.position).or_default();
            *most = (most.0.max(update.drift), most.1 || update.tripped);
        }
        for (position, most) in own {
            edges.entry(position).or_default().push(most);
        }
    }
    let edge = |(position, mut seen): (usize, Vec<(f32, bool)>)| {
        seen.sort_by(|a, b| a.0.total_cmp(&b.0));
        Drift {
            position: position as u64,
            episodes: seen.len() as u64,
            median: seen[seen.len() / 2].0,
            most: seen[seen.len() - 1].0,
            tripped: seen.iter().filter(|s| s.1).count() as u64,
        }
    };
    edges.into_iter().map(edge).collect()
}

/// What came of reading: every window, the drift, and how many texts were read.
pub struct Compared {
    pub windows: Vec<Window>,
    pub drift: Vec<Drift>,
    pub done: usize,
}

/// All variants under one window.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Window {
    /// `None` is everything.
    pub window: Option<u64>,
    pub variants: Vec<Variant>,
    pub gains: Vec<Gain>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Variant {
    pub name: String,
    pub scores: Scores,
}

/// What one variant has over another.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Gain {
    pub of: String,
    pub over: String,
    pub all: Scores,
    /// By [`Part::name`], in the order of [`Part::SHOWN`].
    pub parts: Vec<Variant>,
}

/// Models and how they read, by name.
pub type Variants<'a> = Vec<(String, &'a Model, bool)>;

/// Has every variant read every text under every window, text by text, and compares the first variant that learns with all others.
/// `go_on` is asked before each text; when it says no, what was read by then is compared.
///
/// # Errors
/// The model's, for a text that is too long.
pub fn compare(
    pool: &Pool,
    variants: &Variants,
    streams: &[Stream],
    windows: &[Option<usize>],
    alpha: f64,
    go_on: &mut dyn FnMut(usize) -> bool,
) -> Result<Compared, ModelError> {
    let learner = variants.iter().position(|variant| variant.2).unwrap_or(0);
    let mut watched = Vec::new();
    let mut read_so_far = vec![vec![Readings::new(); variants.len()]; windows.len()];
    let mut done = 0;
    for stream in streams {
        if !go_on(done) {
            break;
        }
        for (at, (_, model, learning)) in variants.iter().enumerate() {
            let learning = *learning;
            let mut whole: Option<Vec<Seen>> = None;
            let mut updates = Vec::new();
            for (window, readings) in windows.iter().zip(&mut read_so_far) {
                // A window as long as the text forgets nothing.
                let window = window.filter(|w| *w < stream.ids.len());
                let seen = match (window, &whole) {
                    (None, Some(seen)) => seen.clone(),
                    _ => {
                        // What was learned under the last window is what is told of the drift.
                        updates.clear();
                        let how = Reading { learning, window };
                        read_and_watch(pool, model, stream, how, &mut updates)?.0
                    }
                };
                if window.is_none() {
                    whole = Some(seen.clone());
                }
                readings[at].push(seen);
            }
            if at == learner {
                watched.push(updates);
            }
        }
        done += 1;
    }
    let of_window = |(window, readings): (&Option<usize>, &Vec<Readings>)| {
        let names = variants.iter().map(|variant| variant.0.clone());
        let others = (0..variants.len()).filter(|at| *at != learner);
        Window {
            window: window.map(|w| w as u64),
            variants: names
                .zip(readings)
                .map(|(name, readings)| Variant {
                    name,
                    scores: scores(readings, Part::All, alpha),
                })
                .collect(),
            gains: others
                .map(|other| {
                    let over = |part| difference(&readings[learner], &readings[other], part, alpha);
                    let part = |part: &Part| Variant {
                        name: part.name(),
                        scores: over(*part),
                    };
                    Gain {
                        of: variants[learner].0.clone(),
                        over: variants[other].0.clone(),
                        all: over(Part::All),
                        parts: Part::SHOWN.iter().map(part).collect(),
                    }
                })
                .collect(),
        }
    };
    let compared = windows.iter().zip(&read_so_far).map(of_window).collect();
    Ok(Compared {
        windows: compared,
        drift: drifts(&watched),
        done,
    })
}

/// All that was read of an episode, in one list.
fn by_episode(readings: Vec<(EpisodeId, Vec<Seen>)>) -> Readings {
    let mut out = std::collections::BTreeMap::<EpisodeId, Vec<Seen>>::new();
    for (episode, seen) in readings {
        out.entry(episode).or_default().extend(seen);
    }
    out.into_values().collect()
}

/// Whether a student's stored evaluation says that its updates helped.
pub fn helped(evaluation: &Value) -> bool {
    evaluation.pointer("/ttt/learns") == Some(&Value::Bool(true))
}

#[cfg(test)]
mod tests;
