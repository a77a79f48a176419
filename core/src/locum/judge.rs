//! Is learning while reading worth its while? Held-out episodes of a student's own job, read by it and by others.

use std::collections::{BTreeMap, BTreeSet};

use super::{Error, Inner, Locum};
use crate::curate::{Kept, Manifest, MaskReason};
use crate::dataset;
use crate::distil::{job_dir, read_json};
use crate::episode::{Episode, EpisodeId, Source, Split, Step};
use crate::evaluate::ttt::{compare, streams, Comparison, Stream, Variants};
use crate::generate::Student;
use crate::kernels::Pool;
use crate::model::Model;
use crate::store::Query;
use crate::ttt::{Forgetting, TttConfig};

/// Niceness of the reading threads.
const NICE: i32 = 5;

/// What [`Locum::eval_ttt`] compares.
#[derive(Clone, Debug, Default)]
pub struct TttOptions {
    /// Version of the student; the newest with TTT layers if `None`.
    pub student: Option<u64>,
    /// A second student, trained without.
    pub plain: Option<u64>,
    /// The student's own steps times these factors are readers too.
    pub scales: Vec<f32>,
    /// Rules that the student is read with as well as its own.
    pub forgets: Vec<Forgetting>,
    /// The base is no reader, which saves its time.
    pub without_base: bool,
    /// Step size of a control: the second student, or the base where there is none, under chunk-wise dynamic evaluation.
    pub control: Option<f32>,
    /// Held-out episodes at most; all of them if 0.
    pub episodes: usize,
    /// Tokens to which attention reaches back; `None` is everything.
    pub windows: Vec<Option<usize>>,
    /// Of the intervals; 0.05 if 0.
    pub alpha: f64,
}

/// By [`Step::index`], the agent's steps that are context only.
type Masked = BTreeMap<u32, MaskReason>;

/// Held-out episodes as texts, and how many of their actions no text holds.
struct Asked {
    streams: Vec<Stream>,
    cut: usize,
}

impl Locum {
    /// Has the base, the student with its updates on and off, and the second student if there is one read the held-out episodes of the
    /// student's job, each as one text under [`View::whole`](crate::view::View::whole), and compares what they think of the teacher's
    /// actions. `go_on` is told episodes done and in all before each; when it says no, what was read by then is compared.
    ///
    /// # Errors
    /// A sentence: a step size or factor that is no number, a rule that is not possible, no student, one without TTT layers, no held-out episode, all of them too short for a chunk.
    pub fn eval_ttt(
        &self,
        options: &TttOptions,
        go_on: &mut dyn FnMut(usize, usize) -> bool,
    ) -> Result<Comparison, Error> {
        let inner = &self.inner;
        inner.check_open()?;
        let base = inner.base.as_ref().ok_or(Error::NoModel)?;
        let student = inner.load_student(inner.learner(options.student)?)?;
        let Some(ttt) = &student.model.config.ttt else {
            return Err(Error::Argument(format!(
                "student {} has no layers that learn while it reads: distil one with the recipe's knob `ttt`",
                student.version
            )));
        };
        let steps = options.control.iter().chain(&options.scales);
        if steps.clone().any(|step| !step.is_finite()) {
            let why = "a step size is no number";
            return Err(Error::Argument(why.into()));
        }
        let plain = options.plain.map(|v| inner.load_student(v)).transpose()?;
        let trained: Vec<&Student> = std::iter::once(&student)
            .chain(&plain)
            .map(|student| &**student)
            .collect();
        let kept = inner.held_out_of(&trained, options.episodes)?;
        let asked = texts(&kept, &student);
        let long = |stream: &&Stream| stream.actions.iter().any(|a| a.start > ttt.chunk_len);
        if asked.streams.iter().filter(long).count() == 0 {
            return Err(Error::Argument(format!(
                "no held-out episode has an action behind its first {} tokens, a chunk, so reading cannot have taught anything",
                ttt.chunk_len
            )));
        }
        let scaled = options.scales.iter().map(|factor| {
            let mut model = Model::clone(&student.model);
            if let Some(ttt) = &mut model.config.ttt {
                ttt.lr *= factor;
            }
            (format!("updates at {factor} of the step"), model)
        });
        let mut scaled: Vec<(String, Model)> = scaled.collect();
        for forgets in &options.forgets {
            let mut model = Model::clone(&student.model);
            if let Some(ttt) = &mut model.config.ttt {
                ttt.forgets = *forgets;
                ttt.check().map_err(|e| Error::Argument(e.to_string()))?;
            }
            let name = match forgets {
                Forgetting::Nothing => "updates that forget nothing".into(),
                Forgetting::Decay(kept) => format!("updates with a decay of {kept}"),
                Forgetting::Delta(strength) => format!("updates with a delta rule of {strength}"),
            };
            scaled.push((name, model));
        }
        let mut variants: Variants = vec![
            ("updates on".into(), &*student.model, true),
            ("updates off".into(), &*student.model, false),
        ];
        if !options.without_base {
            variants.push(("base".into(), &*base.student.model, false));
        }
        variants.extend(
            scaled
                .iter()
                .map(|(name, model)| (name.clone(), model, true)),
        );
        variants.extend(
            plain
                .iter()
                .map(|p| ("trained without".into(), &*p.model, false)),
        );
        let control = options.control.map(|lr| {
            let mut model = Model::clone(&plain.as_ref().unwrap_or(&base.student).model);
            let layers = model.config.num_hidden_layers;
            model.config.ttt = Some(TttConfig::gradient(layers, ttt.chunk_len, lr));
            model
        });
        variants.extend(
            control
                .iter()
                .map(|m| ("dynamic evaluation".into(), m, true)),
        );
        let alpha = match options.alpha {
            alpha if alpha > 0.0 && alpha < 1.0 => alpha,
            _ => 0.05,
        };
        let pool = Pool::new(inner.train_threads, NICE);
        let of = asked.streams.len();
        let compared = compare(
            &pool,
            &variants,
            &asked.streams,
            &options.windows,
            alpha,
            &mut |done| go_on(done, of),
        )?;
        let done = compared.done;
        if done == 0 {
            return Err(Error::Cancelled);
        }
        let read = &asked.streams[..done];
        Ok(Comparison {
            student: format!("student {} ({})", student.version, student.id),
            plain: plain.map(|p| format!("student {} ({})", p.version, p.id)),
            base: base.name.clone(),
            weights: inner.weights.name().into(),
            chunk_len: ttt.chunk_len as u64,
            episodes: done as u64,
            actions: read.iter().map(|s| s.actions.len() as u64).sum(),
            tokens: read.iter().map(|s| s.ids.len() as u64).sum(),
            actions_cut: asked.cut as u64,
            alpha,
            windows: compared.windows,
            drift: compared.drift,
            max_drift: ttt.max_drift,
        })
    }
}

impl Inner {
    /// The version asked for, or the newest student that has TTT layers.
    fn learner(&self, asked: Option<u64>) -> Result<u64, Error> {
        if let Some(version) = asked {
            return Ok(version);
        }
        let all = self.registry.list()?;
        if all.is_empty() {
            let none = "there is no student yet: `locum distil run` makes one";
            return Err(Error::Argument(none.into()));
        }
        let learns = |m: &&crate::registry::Manifest| !m.evaluation["ttt"].is_null();
        let newest = all.iter().filter(learns).map(|m| m.version).max();
        newest.ok_or_else(|| {
            let none = "no student has layers that learn while it reads: distil one with the recipe's knob `ttt`";
            Error::Argument(none.into())
        })
    }

    /// Episodes that the jobs of all these students held out, spread over the store's life.
    fn held_out_of(&self, students: &[&Student], most: usize) -> Result<Vec<Kept>, Error> {
        let none = |why: String| {
            Err(Error::Argument(format!(
                "there are no held-out episodes: {why}"
            )))
        };
        let mut common: Option<BTreeMap<EpisodeId, Masked>> = None;
        for student in students {
            let all = self.registry.list()?;
            let job = all
                .iter()
                .find(|m| m.version == student.version)
                .map_or(0, |m| m.job);
            let path = job_dir(self.store.dir(), job).join("manifest.json");
            let Some(manifest) = read_json::<Manifest>(&path) else {
                return none(format!(
                    "the list of job {job}, which made student {}, is gone",
                    student.version
                ));
            };
            let held = manifest
                .episodes
                .into_iter()
                .filter(|e| e.split == Some(Split::HeldOut));
            let held: BTreeMap<EpisodeId, Masked> = held
                .map(|e| {
                    let masked = e.masked.iter().map(|m| (m.step, m.reason));
                    (e.episode, masked.collect())
                })
                .collect();
            match &mut common {
                Some(common) => common.retain(|id, _| held.contains_key(id)),
                None => common = Some(held),
            }
        }
        let masked = common.unwrap_or_default();
        let ids: Vec<EpisodeId> = masked.keys().copied().collect();
        if ids.is_empty() {
            return none(
                "the policy's `held_out` is the share of task groups that training does not see"
                    .into(),
            );
        }
        let n = if most == 0 {
            ids.len()
        } else {
            most.min(ids.len())
        };
        let ids: Vec<EpisodeId> = (0..n).map(|i| ids[i * ids.len() / n]).collect();
        let episodes = self.store.load(&Query {
            ids,
            ..Query::default()
        })?;
        if episodes.is_empty() {
            return none("those of the student's job were deleted since".into());
        }
        let kept = |episode: Episode| {
            let masked = &masked[&episode.episode_id];
            let mask = |step: &Step| match step.source {
                Source::Agent => masked.get(&step.index).copied(),
                _ => Some(MaskReason::NotAgent),
            };
            Kept {
                masks: episode.steps.iter().map(mask).collect(),
                outcome: episode.outcome.clone().unwrap_or_default(),
                split: Split::HeldOut,
                weight: 1.0,
                episode,
            }
        };
        Ok(episodes.into_iter().map(kept).collect())
    }
}

/// Each episode as the one text of its beginning that the model can hold.
fn texts(kept: &[Kept], student: &Student) -> Asked {
    let data = dataset::of_kept(kept, &student.chat, &student.view.whole());
    let samples: Vec<&dataset::Sample> = data.samples.iter().collect();
    let mut seen = BTreeSet::new();
    let mut all = streams(&samples, student.model.max_positions());
    all.retain(|stream| seen.insert(stream.episode));
    let actions: usize = kept.iter().map(|kept| kept.targets().count()).sum();
    let held: usize = all.iter().map(|stream| stream.actions.len()).sum();
    Asked {
        streams: all,
        cut: actions - held,
    }
}
