//! The background job: episodes → dataset → training → student on disk → verdict on held-out steps. What becomes of the
//! verdict is decided by the caller; the incumbent is never touched here.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{json, Value};

use crate::calls::CallFormat;
use crate::curate::{self, Extras, SplitDocument};
use crate::dataset::{self, Dataset};
use crate::episode::{Episode, EpisodeId};
use crate::error::Error;
use crate::evaluate::ttt::{self, TttVerdict};
use crate::evaluate::{as_train, evaluate, Question};
use crate::files::private_folder;
use crate::gate::{self, OfflineReport, Verdict};
use crate::generate::{Engine, Student};
use crate::kernels::{Pool, Random};
use crate::model::{write_atomically, Compute, WeightFormat};
use crate::policy::{DatasetInfo, GateInfo, Policy, RecipeKnobs, Settings};
use crate::registry::{Manifest, Registry};
use crate::store::{Query, Store};
use crate::train::{self, CurvePoint, Flow, TrainError, TrainPlan};
use crate::view::View;

/// Held-out steps asked for the offline verdict; more would only keep the verdict waiting.
const MAX_QUESTIONS: usize = 120;
/// Tokens of the texts that they are asked in.
const MAX_QUESTION_TOKENS: usize = 48_000;
/// Tokens of the texts on which fast weights are judged, each read twice, unless a verdict needs longer ones.
const MAX_JUDGED_TOKENS: usize = 32_000;
/// Looks at the held-out loss read at most this part of the training's tokens each, or the tokens below if that is more.
const LOOK_SHARE: u64 = 25;
const MIN_LOOK_TOKENS: u64 = 6_144;
/// Episodes that are read for a dataset, newest first.
const MAX_EPISODES: u32 = 100_000;

/// What a job works with. The values are fixed for the job's life: a policy loaded meanwhile is for the next one.
pub struct Context<'a> {
    pub store: &'a Store,
    pub registry: &'a Registry,
    pub engine: &'a Engine,
    pub policy: &'a dyn Policy,
    pub settings: &'a Settings,
    pub view: &'a View,
    /// The untrained base, and the student in service if there is one.
    pub base: &'a Arc<Student>,
    /// Where the base's weights are, for a model in service has them packed.
    pub base_dir: &'a Path,
    /// Numbers in which the candidate is judged and served.
    pub weights: WeightFormat,
    pub base_digest: &'a str,
    pub base_name: &'a str,
    pub incumbent: Option<&'a Arc<Student>>,
    pub threads: usize,
    pub job: u64,
    pub now_ms: u64,
}

/// What was asked for.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Order {
    pub knobs: RecipeKnobs,
    pub unfiltered: bool,
    pub continue_student: bool,
    /// Only episodes of this scope are learned from; empty means those without one.
    pub scope: String,
}

/// Where a job stands, told after every step.
#[derive(Clone, Debug)]
pub enum Stage {
    Curating,
    Training {
        progress: train::Progress,
        kept: u64,
        seen: u64,
        samples: u64,
    },
    Saving,
    Evaluating {
        done: usize,
        of: usize,
    },
}

/// A finished job.
pub struct Finished {
    pub manifest: Manifest,
    pub student: Arc<Student>,
    pub verdict: Verdict,
    pub report: OfflineReport,
    pub base_report: OfflineReport,
    pub episodes_seen: u64,
    pub episodes_kept: u64,
    pub samples: u64,
    pub tokens: u64,
    pub seconds: f64,
    pub held_out_loss: Option<f64>,
    /// Whether its TTT layers are to learn while it serves; `None` if it has none.
    pub ttt: Option<TttVerdict>,
}

/// Files of one job: the episodes it was begun with, its checkpoint, its manifest. Kept after the end for the report.
pub fn job_dir(store_dir: &Path, job: u64) -> PathBuf {
    store_dir.join("jobs").join(format!("{job:06}"))
}

/// Runs a job from the beginning, or from where a killed one was: the episodes are those listed at its first start, and the
/// training resumes at its checkpoint. `tell` is called often; when it says stop, the job ends with [`Error::Cancelled`].
pub fn run(
    context: &Context,
    order: &Order,
    tell: &mut dyn FnMut(&Stage) -> Flow,
) -> Result<Finished, Error> {
    let dir = job_dir(context.store.dir(), context.job);
    private_dir(&dir)?;
    let stop = |stage: &Stage, tell: &mut dyn FnMut(&Stage) -> Flow| match tell(stage) {
        Flow::Go => Ok(()),
        Flow::Stop => Err(Error::Cancelled),
    };
    stop(&Stage::Curating, tell)?;
    let episodes = frozen_episodes(context.store, &dir, &order.scope)?;
    let frozen = read_json::<SplitDocument>(&split_path(context.store.dir()));
    let seen = episodes.len() as u64;
    let extras = Extras {
        frozen,
        unfiltered: order.unfiltered,
        ..Extras::default()
    };
    let curated = curate::curate_with(episodes, context.policy, &context.settings.curate, extras);
    if !order.unfiltered {
        write_json(&split_path(context.store.dir()), &curated.split)?;
    }
    let data = dataset::build(&curated, &context.base.chat, context.view);
    write_json(&dir.join("manifest.json"), &curated.manifest)?;
    write_json(
        &dir.join("dataset.json"),
        &json!({
            "hash": data.hash, "train": data.train.len(), "held_out": data.held_out.len(),
            "tokens": data.train_tokens(), "target_tokens": data.target_tokens(), "skipped": data.skipped,
        }),
    )?;
    let kept = curated.kept.len() as u64;
    if data.train.is_empty() {
        let left: Vec<String> = curated
            .manifest
            .counts
            .left_out
            .iter()
            .map(|(why, n)| format!("{n} {why}"))
            .collect();
        return Err(Error::Argument(format!(
            "there is nothing to train on: of {seen} episodes {kept} were kept ({}), and {} of their steps could not be rendered",
            if left.is_empty() { "none was left out".into() } else { left.join(", ") },
            data.skipped.len()
        )));
    }

    let start = match (order.continue_student, context.incumbent) {
        // A student of another scope would carry that scope's episodes over.
        (true, Some(student)) if student.scope == order.scope => student,
        _ => context.base,
    };
    let start_model = match start.version {
        0 => context.registry.load_base(context.base_dir)?.0,
        version => context.registry.load(version)?.1,
    };
    let plan = plan(context, order, &start_model.config, &data, kept as usize)?;
    let start_model = match &plan.ttt {
        Some(ttt) if start_model.config.ttt.is_none() => {
            let layers = ttt.config(start_model.config.num_hidden_layers);
            start_model.with_ttt(layers, ttt.start, &mut Random::new(plan.seed))?
        }
        _ => start_model,
    };
    let sample = |&i: &usize| &data.samples[i];
    let as_row = |row: &Vec<usize>| as_train(&row.iter().map(sample).collect::<Vec<_>>());
    let train: Vec<train::Sample> = data.rows(&data.train).iter().map(as_row).collect();
    let asked_rows = data.rows(&data.held_out);
    let look = (plan.tokens / LOOK_SHARE).max(MIN_LOOK_TOKENS) as usize;
    let held_out: Vec<train::Sample> = few(&asked_rows, &data, 1, MAX_QUESTIONS, look)
        .iter()
        .map(as_row)
        .collect();
    let pool = Pool::gated(context.threads, TRAIN_NICE, context.engine.gate());
    let samples = data.train.len() as u64;
    let trained = train::fit_on(
        &pool,
        context.engine.device(),
        start_model,
        &train,
        &held_out,
        &data.hash,
        &plan,
        Some(&dir),
        &mut |progress| {
            tell(&Stage::Training {
                progress: progress.clone(),
                kept,
                seen,
                samples,
            })
        },
    );
    let mut trained = match trained {
        Err(TrainError::Cancelled) => return Err(Error::Cancelled),
        other => other?,
    };

    stop(&Stage::Saving, tell)?;
    trained.model.round_to_bf16();
    let episodes: Vec<String> = curated
        .kept
        .iter()
        .map(|k| k.episode.episode_id.to_string())
        .collect();
    let tool_names: BTreeSet<String> = curated
        .kept
        .iter()
        .flat_map(|k| k.episode.tools.iter().map(|t| t.name.clone()))
        .collect();
    write_json(&dir.join("curve.json"), &trained.curve)?;
    let version = context.registry.next_version()?;
    let held_out_loss = trained.curve.last().and_then(|p| p.held_out_loss);
    // What is judged is what will be served.
    let served = trained.model.clone();
    let mut served = served.packed_beside(context.weights, &context.base.model);
    let mut go_on = || tell(&Stage::Evaluating { done: 0, of: 1 }) == Flow::Go;
    let ttt = match served.config.ttt {
        Some(_) => {
            let rows = few(
                &asked_rows,
                &data,
                ttt::MIN_EPISODES,
                usize::MAX,
                MAX_JUDGED_TOKENS,
            );
            let samples: Vec<&dataset::Sample> = rows.iter().flatten().map(sample).collect();
            let texts = ttt::streams(&samples, served.max_positions());
            let alpha = context.settings.gate.alpha;
            let verdict = ttt::judge(&pool, &served, &texts, alpha, &mut go_on)?;
            Some(verdict.ok_or(Error::Cancelled)?)
        }
        None => None,
    };
    if let Some(verdict) = &ttt {
        for model in [&mut served, &mut trained.model] {
            if let Some(ttt) = &mut model.config.ttt {
                ttt.lr *= verdict.step;
            }
        }
    }
    let served = Arc::new(served);
    let learns = ttt.as_ref().is_some_and(|verdict| verdict.learns);
    let mut candidate = Student {
        id: String::new(),
        version,
        model: served,
        chat: context.base.chat.clone(),
        view: context.view.clone(),
        tool_names: tool_names.clone(),
        scope: order.scope.clone(),
        held_out_exact: None,
        learns,
    };

    // The verdict is formed before the student is written, so that its folder always holds its evaluation.
    let formats = formats_of(&curated.kept.iter().map(|k| &k.episode).collect::<Vec<_>>());
    let rows = few(&asked_rows, &data, 1, MAX_QUESTIONS, MAX_QUESTION_TOKENS);
    let questions: Vec<Question> = rows
        .iter()
        .flatten()
        .map(sample)
        .filter_map(|sample| {
            Some(Question {
                sample,
                calls: formats.get(&sample.episode)?.clone(),
            })
        })
        .collect();
    let share = data.held_out.len() as f64 / data.samples.len().max(1) as f64;
    let of = 2 * questions.len();
    let shared = Arc::new(candidate);
    let report = evaluate(
        &pool,
        context.engine,
        &shared,
        &questions,
        share,
        &mut |done| tell(&Stage::Evaluating { done, of }) == Flow::Go,
    )?
    .ok_or(Error::Cancelled)?;
    let base_report = evaluate(
        &pool,
        context.engine,
        context.base,
        &questions,
        share,
        &mut |done| {
            tell(&Stage::Evaluating {
                done: done + questions.len(),
                of,
            }) == Flow::Go
        },
    )?
    .ok_or(Error::Cancelled)?;
    let mut verdict = gate::offline(&report, Some(&base_report), None, &context.settings.gate);
    verdict
        .reasons
        .extend(ttt.iter().map(|ttt| ttt.reason.clone()));
    let vote = context.policy.gate(&GateInfo {
        stage: "offline".into(),
        candidate: version.to_string(),
        held_out_exact: report.exact_share(),
        held_out_loss: report.loss,
        base_exact: base_report.exact_share(),
        verdict: if verdict.pass { "promote" } else { "hold" }.into(),
        reasons: verdict.reasons.clone(),
        ..GateInfo::default()
    });
    let verdict = verdict.with_vote(&vote);

    let manifest = Manifest {
        version,
        parent: (start.version > 0).then(|| start.id.clone()),
        base: context.base_digest.into(),
        base_name: context.base_name.into(),
        chat_digest: context.base.chat.digest(),
        view: context.view.clone(),
        view_digest: context.view.digest(),
        dataset_hash: data.hash.clone(),
        scope: order.scope.clone(),
        split_hash: curated.split.hash.clone(),
        episodes,
        tool_names,
        job: context.job,
        method: method_name(&plan),
        plan: serde_json::to_value(&plan).expect("a plan prints"),
        policy: context.policy.id().digest,
        trained_tokens: trained.tokens,
        train_seconds: trained.seconds,
        curve: serde_json::to_value(&trained.curve).expect("a curve prints"),
        evaluation: json!({ "candidate": report, "base": base_report, "verdict": verdict, "unfiltered": order.unfiltered, "ttt": ttt }),
        created_at_ms: context.now_ms,
        ..Manifest::default()
    };
    let manifest = context.registry.save(
        &trained.model,
        trained.lora.as_ref(),
        &shared.chat,
        manifest,
    )?;
    candidate = Student {
        id: manifest.id.clone(),
        version,
        model: shared.model.clone(),
        chat: shared.chat.clone(),
        view: shared.view.clone(),
        tool_names: shared.tool_names.clone(),
        scope: shared.scope.clone(),
        held_out_exact: Some(report.exact_share()),
        learns,
    };
    // Tensors and moments are of no more use; the lists beside them are what the report shows.
    train::forget(&dir);
    Ok(Finished {
        manifest,
        student: Arc::new(candidate),
        verdict,
        report,
        base_report,
        episodes_seen: seen,
        episodes_kept: kept,
        samples,
        tokens: trained.tokens,
        seconds: trained.seconds,
        held_out_loss,
        ttt,
    })
}

/// Niceness of the training threads: serving and the host come first.
const TRAIN_NICE: i32 = 10;

fn plan(
    context: &Context,
    order: &Order,
    config: &crate::model::Config,
    data: &Dataset,
    episodes: usize,
) -> Result<TrainPlan, Error> {
    let tasks: BTreeSet<&str> = data
        .train
        .iter()
        .map(|&i| data.samples[i].task.as_str())
        .collect();
    let info = DatasetInfo {
        episodes,
        samples: data.train.len(),
        tokens: data.train_tokens(),
        target_tokens: data.target_tokens(),
        tasks: tasks.len(),
        num_hidden_layers: config.num_hidden_layers,
        threads: context.threads,
    };
    let recipe = context.policy.recipe(&info).unwrap_or_default();
    let knobs = merge(&order.knobs, &recipe);
    let mut plan = TrainPlan::from_knobs(config, data.train_tokens(), &knobs)?;
    // A card is faster in bf16, whatever the processor is.
    let exact = context.weights == WeightFormat::F32;
    if knobs.compute.is_none() && !exact && context.engine.device().card().is_some() {
        plan.compute = Compute::Bf16;
    }
    Ok(plan)
}

/// A caller's knobs where they are turned, else the policy's.
fn merge(first: &RecipeKnobs, second: &RecipeKnobs) -> RecipeKnobs {
    let text = |k: &RecipeKnobs| serde_json::to_value(k).expect("knobs print");
    let (mut merged, own) = (text(second), text(first));
    if let (Value::Object(merged), Value::Object(own)) = (&mut merged, own) {
        // One choice in two knobs.
        let forgets = ["ttt_decay", "ttt_delta"];
        if forgets
            .iter()
            .any(|key| own.get(*key).is_some_and(|v| !v.is_null()))
        {
            forgets.iter().for_each(|key| drop(merged.remove(*key)));
        }
        for (key, value) in own {
            if !value.is_null() {
                merged.insert(key, value);
            }
        }
    }
    serde_json::from_value(merged).expect("knobs that were printed can be read")
}

fn method_name(plan: &TrainPlan) -> String {
    match plan.method {
        train::Method::Upper { layers } => format!("upper {layers} layers"),
        train::Method::Lora { rank, .. } => format!("lora r={rank}"),
        train::Method::Full => "full".into(),
    }
}

/// At most so many rows, evenly spread, so that no domain recorded late is left out: as many as have `steps` steps and `tokens` tokens
/// together, but not fewer than `least`.
fn few(
    rows: &[Vec<usize>],
    data: &Dataset,
    least: usize,
    steps: usize,
    tokens: usize,
) -> Vec<Vec<usize>> {
    let length = |row: &Vec<usize>| row.last().map_or(0, |&i| data.samples[i].ids.len());
    let spread = |n: usize| (0..n).map(move |i| &rows[i * rows.len() / n]);
    let fits = |n: &usize| {
        spread(*n).map(Vec::len).sum::<usize>() <= steps
            && spread(*n).map(length).sum::<usize>() <= tokens
    };
    let fewer = std::iter::successors(Some(rows.len().min(steps)), |n| Some(n - n.div_ceil(20)));
    let n = fewer.take_while(|n| *n > least).find(fits);
    spread(n.unwrap_or(rows.len().min(least)))
        .cloned()
        .collect()
}

/// The tool formats of episodes, one object for equal tools.
fn formats_of(episodes: &[&Episode]) -> BTreeMap<EpisodeId, Arc<CallFormat>> {
    let mut by_tools: BTreeMap<String, Arc<CallFormat>> = BTreeMap::new();
    let mut out = BTreeMap::new();
    for episode in episodes {
        let key = serde_json::to_string(&episode.tools).expect("tools print");
        let format = match by_tools.get(&key) {
            Some(format) => format.clone(),
            None => {
                let Ok(format) = CallFormat::new(&episode.tools) else {
                    continue;
                };
                let format = Arc::new(format);
                by_tools.insert(key, format.clone());
                format
            }
        };
        out.insert(episode.episode_id, format);
    }
    out
}

/// The closed episodes, as listed when the job first ran: a resumed job sees no others, so its dataset is the same.
fn frozen_episodes(store: &Store, dir: &Path, scope: &str) -> Result<Vec<Episode>, Error> {
    let path = dir.join("episodes.json");
    let ids: Vec<EpisodeId> = match read_json(&path) {
        Some(ids) => ids,
        None => {
            let query = Query {
                scope: Some(scope.into()),
                closed_only: true,
                newest_first: true,
                limit: Some(MAX_EPISODES),
                ..Query::default()
            };
            let ids: Vec<EpisodeId> = store.episodes(&query)?.into_iter().map(|e| e.id).collect();
            write_json(&path, &ids)?;
            ids
        }
    };
    let mut episodes = Vec::with_capacity(ids.len());
    for chunk in ids.chunks(500) {
        episodes.extend(store.load(&Query {
            ids: chunk.to_vec(),
            ..Query::default()
        })?);
    }
    Ok(episodes)
}

/// Which task groups are held out, kept from job to job.
pub fn split_path(store_dir: &Path) -> PathBuf {
    store_dir.join("split.json")
}

fn private_dir(dir: &Path) -> Result<(), Error> {
    let made = private_folder().recursive(true).create(dir);
    made.map_err(|e| Error::Argument(format!("{}: {e}", dir.display())))
}

/// A document written by `write_json`; `None` if it is absent or not of this kind.
pub fn read_json<T: for<'a> Deserialize<'a>>(path: &Path) -> Option<T> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// Writes a file of a job, whole or not at all.
pub fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), Error> {
    let text = serde_json::to_vec_pretty(value).expect("plain values print");
    Ok(write_atomically(path, &text)?)
}

/// The loss curve of a finished job.
pub fn curve(store_dir: &Path, job: u64) -> Vec<CurvePoint> {
    read_json(&job_dir(store_dir, job).join("curve.json")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows of so many samples, each of whose last has so many tokens.
    fn rows(of: &[(usize, usize)]) -> (Vec<Vec<usize>>, Dataset) {
        let mut data = Dataset::default();
        let mut rows = Vec::new();
        for &(steps, tokens) in of {
            let first = data.samples.len();
            rows.push((first..first + steps).collect());
            data.samples.extend((0..steps).map(|_| dataset::Sample {
                ids: vec![1; tokens],
                target_start: 1,
                weight: 1.0,
                episode: EpisodeId::default(),
                step: 1,
                task: String::new(),
                domain: String::new(),
                calls: Vec::new(),
            }));
        }
        (rows, data)
    }

    #[test]
    fn rows_are_picked_evenly_up_to_both_limits_and_never_none() {
        let (single, data) = rows(&[(1, 90); 500]);
        let picked = few(&single, &data, 1, 120, 1 << 20);
        assert_eq!(picked.len(), 120);
        assert_eq!((picked[0][0], picked[119][0]), (0, 119 * 500 / 120));
        assert!((few(&single, &data, 1, 120, 4500).len() as i64 - 50).abs() <= 3);
        let (long, data) = rows(&[(80, 2500); 20]);
        assert_eq!(few(&long, &data, 1, 170, 1 << 20).len(), 2);
        assert_eq!(few(&long, &data, 1, usize::MAX, 26_000).len(), 10);
        assert_eq!(few(&long, &data, 1, 5, 5).len(), 1);
        assert_eq!(few(&long, &data, 5, usize::MAX, 5).len(), 5);
        assert_eq!(few(&long[..3], &data, 5, usize::MAX, 5).len(), 3);
        assert!(few(&[], &data, 5, 5, 5).is_empty());
    }

    #[test]
    fn a_callers_knobs_go_before_the_policys_and_one_way_to_forget_before_the_other() {
        let policy = RecipeKnobs {
            lr: Some(1e-3),
            rank: Some(8),
            ttt_decay: Some(0.9),
            ..RecipeKnobs::default()
        };
        let caller = RecipeKnobs {
            rank: Some(16),
            ttt_delta: Some(1.0),
            ..RecipeKnobs::default()
        };
        let merged = merge(&caller, &policy);
        assert_eq!((merged.lr, merged.rank), (Some(1e-3), Some(16)));
        assert_eq!((merged.ttt_decay, merged.ttt_delta), (None, Some(1.0)));
        let merged = merge(&RecipeKnobs::default(), &policy);
        assert_eq!(merged, policy);
    }
}
