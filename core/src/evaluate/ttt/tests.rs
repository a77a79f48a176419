#![allow(
    clippy::single_range_in_vec_init,
    reason = "an episode may have one action"
)]
use std::path::Path;
use std::sync::Arc;

use super::*;
use crate::kernels::Random;
use crate::model::{write_tiny, LayerParam, ParamId, WeightFormat};
use crate::ttt::{TttConfig, TttStart};

const CHUNK: usize = 16;

fn plain(dir: &Path) -> Model {
    write_tiny(dir, 3).unwrap();
    Model::load(dir).unwrap()
}

/// The tiny model with a layer that learns, its filter and projection drawn with this deviation.
fn learner(deviation: f64, seed: u64) -> Model {
    let dir = tempfile::tempdir().unwrap();
    let ttt = TttConfig {
        layers: vec![0, 1],
        chunk_len: CHUNK,
        lr: 1.0,
        max_drift: None,
        ..TttConfig::default()
    };
    let mut random = Random::new(seed);
    let mut model = plain(dir.path())
        .with_ttt(ttt, TttStart::Published, &mut random)
        .unwrap();
    for layer in [0, 1] {
        for which in [LayerParam::TttConv, LayerParam::TttProj] {
            let id = ParamId::Layer(layer, which);
            let tensor = model.weights.params.get_mut(&id).unwrap();
            for x in Arc::make_mut(tensor) {
                *x = (deviation * random.normal()) as f32;
            }
        }
    }
    model
}

/// A text of `len` tokens with an action of three tokens in every twenty.
fn stream(len: usize, seed: u64) -> Stream {
    let mut random = Random::new(seed);
    Stream {
        episode: EpisodeId::new(seed, 1),
        ids: (0..len).map(|_| 3 + random.below(60) as u32).collect(),
        actions: (1..len / 20).map(|i| 20 * i..20 * i + 3).collect(),
    }
}

const WHOLE: Reading = Reading {
    learning: false,
    window: None,
};

/// One call for everything and a softmax over all logits: slow and plain.
fn slowly(pool: &Pool, model: &Model, stream: &Stream, learning: bool) -> Vec<Seen> {
    let mut sequence = model.sequence(8, learning);
    let hidden = model
        .step(pool, &mut [(&mut sequence, &stream.ids)])
        .unwrap();
    let v = model.config.vocab_size;
    let rows: Vec<usize> = (0..stream.ids.len()).collect();
    let logits = model.logits(pool, &hidden, &rows);
    let of_token = |at: usize| {
        let row = &logits[(at - 1) * v..at * v];
        let most = row.iter().copied().fold(f32::MIN, f32::max);
        let sum: f64 = row.iter().map(|x| f64::from(x - most).exp()).sum();
        let own = row[stream.ids[at] as usize];
        (f64::from(own - most) - sum.ln(), own == most)
    };
    let of = |span: &Range<usize>| Seen {
        position: span.start,
        logprob: span.clone().map(|at| of_token(at).0).sum(),
        exact: span.clone().all(|at| of_token(at).1),
    };
    stream.actions.iter().map(of).collect()
}

fn close(got: &[Seen], want: &[Seen]) {
    assert_eq!(got.len(), want.len());
    for (got, want) in got.iter().zip(want) {
        assert_eq!((got.position, got.exact), (want.position, want.exact));
        assert!(
            (got.logprob - want.logprob).abs() < 2e-3,
            "{got:?} {want:?}"
        );
    }
}

#[test]
fn a_text_read_in_pieces_is_worth_what_it_is_in_one() {
    let pool = Pool::new(2, 0);
    let model = learner(0.3, 5);
    let stream = stream(421, 9);
    assert!(stream.actions.len() > 15);
    for learning in [false, true] {
        let how = Reading { learning, ..WHOLE };
        let got = read(&pool, &model, &stream, how).unwrap();
        close(&got, &slowly(&pool, &model, &stream, learning));
    }
    // A window that is longer than the text forgets nothing.
    let wide = Reading {
        window: Some(430),
        ..WHOLE
    };
    let got = read(&pool, &model, &stream, wide).unwrap();
    assert_eq!(got, read(&pool, &model, &stream, WHOLE).unwrap());
}

#[test]
fn a_window_hides_what_was_read_long_ago_and_only_that() {
    let pool = Pool::new(2, 0);
    let dir = tempfile::tempdir().unwrap();
    let model = plain(dir.path());
    // Two layers carry what a window shows over at most twice its length.
    let (a, mut b) = (stream(600, 9), stream(600, 9));
    b.ids[SINK..SINK + 40].reverse();
    let seen = |stream: &Stream, window| {
        let how = Reading { window, ..WHOLE };
        read(&pool, &model, stream, how).unwrap()
    };
    let late = |seen: Vec<Seen>| {
        seen.into_iter()
            .filter(|s| s.position > 450)
            .collect::<Vec<_>>()
    };
    assert_eq!(late(seen(&a, Some(64))), late(seen(&b, Some(64))));
    assert_ne!(late(seen(&a, None)), late(seen(&b, None)));
    // Fast weights have read what attention no longer reaches.
    let model = learner(0.3, 5);
    let learned = |stream: &Stream| {
        let how = Reading {
            learning: true,
            window: Some(64),
        };
        late(read(&pool, &model, stream, how).unwrap())
    };
    assert_ne!(learned(&a), learned(&b));
}

/// The same text with the actions that the model itself would have said: whatever changes it at random then makes them less likely.
fn as_said_by(pool: &Pool, model: &Model, mut stream: Stream) -> Stream {
    let mut sequence = model.sequence(8, false);
    let mut said = 0;
    for at in 0..stream.ids.len() {
        if stream.actions.iter().any(|action| action.contains(&at)) {
            stream.ids[at] = said;
        }
        let hidden = model.step(pool, &mut [(&mut sequence, &stream.ids[at..at + 1])]);
        let logits = model.logits(pool, &hidden.unwrap(), &[0]);
        let best = |best: usize, at: usize| if logits[at] > logits[best] { at } else { best };
        said = (0..logits.len()).fold(0, best) as u32;
    }
    stream
}

#[test]
fn a_random_filter_is_judged_off_and_an_untrained_one_too() {
    let pool = Pool::new(2, 0);
    let plain = learner(0.0, 5).packed(WeightFormat::Bf16);
    let streams: Vec<Stream> = (0..8)
        .map(|seed| as_said_by(&pool, &plain, stream(200, 40 + seed)))
        .collect();
    for (deviation, harms) in [(0.5, true), (0.0, false)] {
        let model = learner(deviation, 5).packed(WeightFormat::Bf16);
        let verdict = judge(&pool, &model, &streams, 0.05, &mut || true)
            .unwrap()
            .unwrap();
        assert!(!verdict.learns, "{}", verdict.reason);
        assert_eq!(
            verdict.difference.logprob.mean < -0.01,
            harms,
            "{}",
            verdict.reason
        );
        assert!(
            verdict.reason.contains("not seen to help"),
            "{}",
            verdict.reason
        );
        assert_eq!((verdict.episodes, verdict.actions), (8, 8 * 9));
    }
}

#[test]
fn updates_that_help_on_every_text_are_judged_on() {
    let pool = Pool::new(2, 0);
    // The same filter with the other sign moves the other way, to first order: of two that are small, one helps.
    let streams: Vec<Stream> = (0..8).map(|_| stream(200, 77)).collect();
    let streams: Vec<Stream> = (streams.into_iter().enumerate())
        .map(|(i, s)| Stream {
            episode: EpisodeId::new(i as u64, 1),
            ..s
        })
        .collect();
    let verdicts: Vec<TttVerdict> = [1.0, -1.0]
        .map(|sign| {
            let mut model = learner(0.02, 5);
            for layer in [0, 1] {
                let id = ParamId::Layer(layer, LayerParam::TttConv);
                let tensor = model.weights.params.get_mut(&id).unwrap();
                Arc::make_mut(tensor).iter_mut().for_each(|x| *x *= sign);
            }
            judge(&pool, &model, &streams, 0.05, &mut || true)
                .unwrap()
                .unwrap()
        })
        .into();
    assert_eq!(
        verdicts.iter().filter(|v| v.learns).count(),
        1,
        "{verdicts:?}"
    );
}

#[test]
fn too_few_or_too_short_texts_are_judged_off_with_the_reason() {
    let pool = Pool::new(1, 0);
    let model = learner(0.5, 5);
    let said = |streams: &[Stream]| {
        let verdict = judge(&pool, &model, streams, 0.05, &mut || true)
            .unwrap()
            .unwrap();
        assert!(!verdict.learns);
        verdict.reason
    };
    let short = Stream {
        actions: vec![3..6],
        ..stream(CHUNK, 1)
    };
    assert!(said(&[short]).contains("no held-out text is longer than a chunk of 16 tokens"));
    assert!(said(&[stream(100, 1), stream(100, 2)]).contains("2 held-out episodes"));
    let stopped = judge(&pool, &model, &[stream(100, 1)], 0.05, &mut || false);
    assert!(stopped.unwrap().is_none());
}

#[test]
fn weights_that_are_no_numbers_are_judged_off() {
    let pool = Pool::new(1, 0);
    let mut model = learner(0.5, 5);
    let id = ParamId::Layer(1, LayerParam::TttConv);
    Arc::make_mut(model.weights.params.get_mut(&id).unwrap()).fill(f32::NAN);
    // Without the guard of the drift, that is: with it the layer begins again from its trained weight.
    let streams: Vec<Stream> = (0..6).map(|seed| stream(100, seed)).collect();
    let verdict = judge(&pool, &model, &streams, 0.05, &mut || true)
        .unwrap()
        .unwrap();
    assert!(!verdict.learns, "{}", verdict.reason);
}

#[test]
fn differences_are_paired_by_action_and_weigh_episodes_alike() {
    let seen = |logprobs: &[f64]| -> Vec<Seen> {
        let seen = logprobs.iter().enumerate().map(|(i, logprob)| Seen {
            position: 600 * i,
            logprob: *logprob,
            exact: *logprob > -1.0,
        });
        seen.collect()
    };
    let a = vec![seen(&[-1.0, -2.0, -0.5]), seen(&[-3.0])];
    let b = vec![seen(&[-2.0, -2.0, -0.5]), seen(&[-2.0])];
    let all = difference(&a, &b, Part::All, 0.05);
    assert!((all.logprob.mean - (1.0 / 3.0 - 1.0) / 2.0).abs() < 1e-12);
    assert_eq!(all.logprob.n, 2);
    let part = |part| difference(&a, &b, part, 0.05).logprob;
    assert_eq!(
        (part(Part::Third(0)).mean, part(Part::Third(0)).n),
        (0.0, 2)
    );
    assert_eq!(
        (part(Part::Third(2)).mean, part(Part::Third(2)).n),
        (0.0, 1)
    );
    assert_eq!(part(Part::Tokens(256, 1024)).n, 1);
    assert_eq!(part(Part::Tokens(2048, usize::MAX)).n, 0);
    let exact = scores(&a, Part::All, 0.05).exact;
    assert!((exact.mean - (1.0 / 3.0) / 2.0).abs() < 1e-12);
}

#[test]
fn behind_a_drift_past_the_cap_a_text_is_read_as_it_is_without_updates() {
    let pool = Pool::new(2, 0);
    let mut model = learner(0.5, 5);
    let stream = stream(421, 9);
    let on = Reading {
        learning: true,
        ..WHOLE
    };
    let (free, mut updates) = (read(&pool, &model, &stream, on).unwrap(), Vec::new());
    read_and_watch(&pool, &model, &stream, on, &mut updates).unwrap();
    // A cap between the largest drift of the fifth edge and that of the last.
    let most = |position: usize| {
        let at = updates.iter().filter(|u| u.1.position == position);
        at.map(|u| u.1.drift).fold(0.0, f32::max)
    };
    let (early, late) = (most(5 * CHUNK), most(416));
    assert!(late > 1.05 * early, "{early} {late}");
    model.config.ttt.as_mut().unwrap().max_drift = Some(1.02 * early);
    let mut updates = Vec::new();
    let (capped, tripped) = read_and_watch(&pool, &model, &stream, on, &mut updates).unwrap();
    assert!(tripped);
    let edge = updates.iter().find(|u| u.1.tripped).unwrap().1.position;
    assert!(edge > 5 * CHUNK);
    let off = read(&pool, &model, &stream, WHOLE).unwrap();
    let (mut before, mut behind) = (0, 0);
    for (at, span) in stream.actions.iter().enumerate() {
        if span.end <= edge {
            assert_eq!(capped[at], free[at]);
            before += 1;
        } else {
            assert_eq!(capped[at], off[at]);
            behind += 1;
        }
    }
    assert!(before > 0 && behind > 0, "{before} {behind}");
    assert_ne!(free, off);
}

#[test]
fn variants_are_compared_window_by_window_on_the_texts_read_until_the_stop() {
    let pool = Pool::new(2, 0);
    let model = learner(0.5, 5);
    let streams: Vec<Stream> = (0..4).map(|seed| stream(300, seed)).collect();
    let variants: Variants = vec![("on".into(), &model, true), ("off".into(), &model, false)];
    let compared = compare(
        &pool,
        &variants,
        &streams,
        &[Some(128), Some(400), None],
        0.05,
        &mut |done| done < 3,
    )
    .unwrap();
    let windows = compared.windows;
    assert_eq!((compared.done, windows.len()), (3, 3));
    // Every edge of every text read, with the drift of what was read with everything in reach.
    let chunk = model.config.ttt.as_ref().unwrap().chunk_len as u64;
    let edges: Vec<u64> = compared.drift.iter().map(|d| d.position).collect();
    assert_eq!(
        edges,
        (1..=300 / chunk).map(|n| n * chunk).collect::<Vec<_>>()
    );
    for edge in &compared.drift {
        assert_eq!(edge.episodes, 3);
        assert!(0.0 < edge.median && edge.median <= edge.most, "{edge:?}");
    }
    // No text is longer than the second window.
    assert_eq!(windows[1].variants, windows[2].variants);
    assert_ne!(windows[0].variants, windows[2].variants);
    let gain = &windows[2].gains[0];
    let [on, off] = &windows[2].variants[..] else {
        panic!("two variants");
    };
    assert_eq!((gain.of.as_str(), gain.over.as_str()), ("on", "off"));
    let want = on.scores.logprob.mean - off.scores.logprob.mean;
    assert!((gain.all.logprob.mean - want).abs() < 1e-9);
}

#[test]
fn the_texts_of_an_episode_hold_all_its_actions_up_to_the_limit() {
    let sample = |episode: u64, ids: &[u32], target_start| Sample {
        ids: ids.to_vec(),
        target_start,
        weight: 1.0,
        episode: EpisodeId::new(episode, 1),
        step: 1,
        task: String::new(),
        domain: String::new(),
        calls: Vec::new(),
    };
    let all = [
        sample(1, &[1, 2, 3], 2),
        sample(1, &[1, 2, 3, 4, 5], 4),
        sample(1, &[1, 2, 3, 4, 5, 6, 7, 8], 6),
        // Begins anew, as under a view of windows.
        sample(1, &[9, 2, 3], 1),
        sample(2, &[9, 2, 3, 4, 5], 4),
    ];
    let samples: Vec<&Sample> = all.iter().collect();
    let got = streams(&samples, 6);
    let want = [(5, vec![2..3, 4..5]), (3, vec![1..3]), (5, vec![4..5])];
    let got: Vec<_> = got.into_iter().map(|s| (s.ids.len(), s.actions)).collect();
    assert_eq!(got, want);
}

#[test]
fn a_step_that_drifts_past_the_cap_is_halved_until_texts_stay_below() {
    let pool = Pool::new(2, 0);
    let mut model = learner(0.02, 5);
    // One text in six episodes, so that all of them drift alike.
    let streams = (0..6).map(|i| Stream {
        episode: EpisodeId::new(i, 1),
        ..stream(300, 77)
    });
    let streams: Vec<Stream> = streams.collect();
    let verdict = |model: &Model| {
        let verdict = judge(&pool, model, &streams, 0.05, &mut || true);
        verdict.unwrap().unwrap()
    };
    let free = verdict(&model);
    assert_eq!((free.step, free.past_cap), (1.0, 0));
    let on = Reading {
        learning: true,
        ..WHOLE
    };
    let mut updates = Vec::new();
    read_and_watch(&pool, &model, &streams[0], on, &mut updates).unwrap();
    let most = updates.iter().map(|u| u.1.drift).fold(0.0, f32::max);
    // All texts are past the cap at the whole step, none at half of it.
    model.config.ttt.as_mut().unwrap().max_drift = Some(0.75 * most);
    let halved = verdict(&model);
    assert_eq!((halved.step, halved.past_cap), (0.5, 0));
    assert!(
        halved.reason.contains("at 0.5 of the step"),
        "{}",
        halved.reason
    );
    // Where no step of those tried is small enough, the verdict says how many texts were read on without.
    model.config.ttt.as_mut().unwrap().max_drift = Some(1e-6 * most);
    let capped = verdict(&model);
    assert_eq!((capped.step, capped.past_cap), (1.0 / 16.0, 6));
}
