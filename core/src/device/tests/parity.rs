//! Serving: logits, greedy text, sequences that are copied and cut, layers that learn.

use super::super::{Card, CardModel, CardSequence};
use super::{apart, assert_close, card, fixtures, learner, reference, tokens, wide};
use crate::kernels::Pool;
use crate::model::{Model, Sequence, WeightFormat};
use crate::ttt::Forgetting;
use std::sync::Arc;

/// `f32` on both sides: sums are made in another order.
const EXACT: f32 = 2e-5;
/// bf16: activations are rounded at other places than on the processor, which keeps them in `f32`.
const BF16: f32 = 4e-2;

/// Reads `parts` on both sides, one call each, and compares the logits of every row.
fn compare(what: &str, model: &Model, on: &Arc<CardModel>, parts: &[&[u32]], tolerance: f32) {
    let pool = Pool::new(1, 0);
    let learning = model.config.ttt.is_some();
    let (mut host, mut device) = (
        model.sequence(4, learning),
        on.sequence(4, learning).unwrap(),
    );
    for (i, part) in parts.iter().enumerate() {
        let hidden = model.step(&pool, &mut [(&mut host, *part)]).unwrap();
        let rows: Vec<usize> = (0..part.len()).collect();
        let want = model.logits(&pool, &hidden, &rows);
        let got = on.step(&mut [(&mut device, *part)], &rows).unwrap();
        assert_close(&format!("{what}, call {i}"), &want, &got, tolerance);
    }
    let updates = |all: &[(u16, crate::ttt::Update)]| -> Vec<(u16, usize, bool)> {
        all.iter()
            .map(|(layer, u)| (*layer, u.position, u.tripped))
            .collect()
    };
    let (mut want, mut got) = (updates(&host.fast.updates), updates(&device.updates));
    want.sort_unstable();
    got.sort_unstable();
    assert_eq!(want, got, "{what}: updates");
    for (layer, drift) in device.drifts() {
        let want = host.fast.layers[layer].drift();
        assert!(
            (want - drift).abs() <= tolerance * want.max(1e-3),
            "{what}: drift {want} and {drift}"
        );
        assert_eq!(
            host.fast.layers[layer].waiting(),
            device.waiting(),
            "{what}: waiting"
        );
    }
}

#[test]
fn logits_are_those_of_the_processor() {
    let Some(card) = card() else { return };
    for name in ["llama", "qwen3"] {
        let model = reference(name);
        let ids = tokens(&model, 90, 1);
        let parts: [&[u32]; 5] = [
            &ids[..37],
            &ids[37..38],
            &ids[38..41],
            &ids[41..42],
            &ids[42..],
        ];
        compare(name, &model, &card.load(&model).unwrap(), &parts, EXACT);
        let packed = model.packed(WeightFormat::Bf16);
        compare(
            &format!("{name} in bf16"),
            &packed,
            &card.load(&packed).unwrap(),
            &parts,
            BF16,
        );
    }
}

#[test]
fn what_is_forgotten_is_what_the_processor_forgets() {
    let Some(card) = card() else { return };
    for name in ["qwen3_hidden_lr3", "qwen3_embed_noproj_lr0p3"] {
        for forgets in [Forgetting::Decay(0.7), Forgetting::Delta(0.8)] {
            let mut model = learner(name);
            let ttt = model.config.ttt.as_mut().unwrap();
            (ttt.forgets, ttt.lr) = (forgets, ttt.lr.min(0.3));
            let ids = tokens(&model, 90, 6);
            // Whole chunks and parts of some, a prompt and single tokens.
            let parts: [&[u32]; 4] = [&ids[..37], &ids[37..38], &ids[38..41], &ids[41..]];
            let on = card.load(&model).unwrap();
            compare(&format!("{name}, {forgets:?}"), &model, &on, &parts, EXACT);
        }
    }
}

#[test]
fn attention_in_tiles_and_over_split_caches_is_that_of_the_processor() {
    let Some(card) = card() else { return };
    for head_dim in [16, 32, 64, 128] {
        let model = wide(head_dim);
        let ids = tokens(&model, 360, 2);
        // Whole tiles, a last tile that is not whole, one row behind a cache long enough to be split, few rows, and tiles behind a cache.
        let parts: [&[u32]; 5] = [
            &ids[..64],
            &ids[64..299],
            &ids[299..300],
            &ids[300..306],
            &ids[306..360],
        ];
        if head_dim <= 32 {
            compare(
                &format!("heads of {head_dim}"),
                &model,
                &card.load(&model).unwrap(),
                &parts,
                EXACT,
            );
        }
        let packed = model.packed(WeightFormat::Bf16);
        compare(
            &format!("heads of {head_dim} in bf16"),
            &packed,
            &card.load(&packed).unwrap(),
            &parts,
            BF16,
        );
    }
}

#[test]
fn sequences_of_a_batch_do_not_see_each_other() {
    let Some(card) = card() else { return };
    for name in ["llama_untrained", "qwen3_hidden_lr3"] {
        let model = learner(name);
        let on = card.load(&model).unwrap();
        let texts: Vec<Vec<u32>> = (0..3)
            .map(|i| tokens(&model, 30 + 7 * i, 10 + i as u64))
            .collect();
        let alone: Vec<Vec<f32>> = texts
            .iter()
            .map(|ids| {
                let mut sequence = on.sequence(4, true).unwrap();
                on.step(&mut [(&mut sequence, ids)], &[ids.len() - 1])
                    .unwrap()
            })
            .collect();
        let mut sequences: Vec<CardSequence> = texts
            .iter()
            .map(|_| on.sequence(4, true).unwrap())
            .collect();
        // A prompt, and beside it what goes on token by token.
        for from in [0, 10, 20] {
            let mut batch: Vec<(&mut CardSequence, &[u32])> = sequences
                .iter_mut()
                .zip(&texts)
                .map(|(s, ids)| (s, &ids[from..from + 10]))
                .collect();
            on.step(&mut batch, &[]).unwrap();
        }
        for (i, (sequence, ids)) in sequences.iter_mut().zip(&texts).enumerate() {
            let left = &ids[30..];
            let got = match left.is_empty() {
                true => continue,
                false => on.step(&mut [(sequence, left)], &[left.len() - 1]).unwrap(),
            };
            assert_close(&format!("{name}, sequence {i}"), &alone[i], &got, EXACT);
        }
    }
}

#[test]
fn tokens_one_by_one_in_batches_are_those_of_the_processor() {
    let Some(card) = card() else { return };
    let pool = Pool::new(1, 0);
    for (format, tolerance) in [(None, EXACT), (Some(WeightFormat::Bf16), BF16)] {
        let model = match format {
            Some(format) => reference("qwen3").packed(format),
            None => reference("qwen3"),
        };
        let on = card.load(&model).unwrap();
        let texts: Vec<Vec<u32>> = (0..9).map(|i| tokens(&model, 30, 70 + i)).collect();
        let mut hosts: Vec<Sequence> = texts
            .iter()
            .map(|_| Sequence::new(&model.config, 4))
            .collect();
        let mut devices: Vec<CardSequence> = texts
            .iter()
            .map(|_| on.sequence(4, false).unwrap())
            .collect();
        let mut worst = 0f32;
        // Places for 1, 2, 4, 8 and 16 rows, each met often enough to be replayed.
        for n in [1, 2, 3, 5, 9].into_iter().flat_map(|n| [n; 4]) {
            let rows: Vec<usize> = (0..n).collect();
            let new: Vec<[u32; 1]> = (0..n).map(|i| [texts[i][hosts[i].ids.len()]]).collect();
            let mut host: Vec<(&mut Sequence, &[u32])> = hosts
                .iter_mut()
                .zip(&new)
                .map(|(s, new)| (s, &new[..]))
                .collect();
            let hidden = model.step(&pool, &mut host).unwrap();
            let want = model.logits(&pool, &hidden, &rows);
            let mut device: Vec<(&mut CardSequence, &[u32])> = devices
                .iter_mut()
                .zip(&new)
                .map(|(s, new)| (s, &new[..]))
                .collect();
            worst = worst.max(apart(&want, &on.step(&mut device, &rows).unwrap()));
        }
        let info = card.info();
        println!("{worst:.2e} apart, {} graphs", info.graphs);
        assert!(worst <= tolerance, "{worst:e} apart");
        assert!(info.graphs >= 5, "{}", info.single);
    }
}

#[test]
fn greedy_text_is_that_of_the_processor() {
    let Some(card) = card() else { return };
    let pool = Pool::new(1, 0);
    for name in ["llama", "qwen3"] {
        let model = reference(name);
        let on = card.load(&model).unwrap();
        let ids = tokens(&model, 20, 3);
        let best = |logits: &[f32]| {
            (0..logits.len())
                .max_by(|a, b| logits[*a].total_cmp(&logits[*b]))
                .unwrap() as u32
        };
        let (mut host, mut device) = (
            Sequence::new(&model.config, 4),
            on.sequence(4, false).unwrap(),
        );
        let (mut want, mut got) = (ids.clone(), ids);
        for _ in 0..40 {
            let new = want[host.ids.len()..].to_vec();
            let hidden = model.step(&pool, &mut [(&mut host, &new)]).unwrap();
            want.push(best(&model.logits(&pool, &hidden, &[new.len() - 1])));
            let new = got[device.ids.len()..].to_vec();
            got.push(best(
                &on.step(&mut [(&mut device, &new)], &[new.len() - 1])
                    .unwrap(),
            ));
        }
        assert_eq!(want, got, "{name}");
    }
}

#[test]
fn a_sequence_that_was_copied_or_cut_goes_on_as_if_it_had_read_no_more() {
    let Some(card) = card() else { return };
    for name in ["llama", "qwen3_hidden_lr3"] {
        let model = match name {
            "llama" => reference(name),
            _ => learner(name),
        };
        let on = card.load(&model).unwrap();
        let learning = model.config.ttt.is_some();
        // 43 is within a chunk of 8, behind the edge at 40.
        let (ids, other) = (tokens(&model, 47, 4), tokens(&model, 20, 5));
        let mut straight = on.sequence(64, learning).unwrap();
        let text = [&ids[..43], &other[..]].concat();
        let want = on
            .step(&mut [(&mut straight, &text)], &[text.len() - 1])
            .unwrap();
        let mut whole = on.sequence(64, learning).unwrap();
        on.step(&mut [(&mut whole, &ids)], &[]).unwrap();
        assert!(learning || whole.prefix(11, 64).is_some());
        assert!(
            !learning || whole.prefix(11, 64).is_none(),
            "an update cannot be taken back"
        );
        let mut copy = whole.prefix(43, 50).unwrap();
        assert!(whole.truncate(43) && (!learning || !whole.truncate(11)));
        for (what, sequence) in [("copied", &mut copy), ("cut", &mut whole)] {
            assert_eq!(sequence.ids, ids[..43]);
            let got = on
                .step(&mut [(sequence, &other)], &[other.len() - 1])
                .unwrap();
            assert_close(&format!("{name}, {what}"), &want, &got, EXACT);
        }
    }
}

#[test]
fn what_layers_learn_is_what_they_learn_on_the_processor() {
    let Some(card) = card() else { return };
    for name in [
        "llama_untrained",
        "qwen3_embed_noproj_lr0p3",
        "qwen3_hidden_lr3",
    ] {
        let model = learner(name);
        let ids = tokens(&model, 70, 6);
        let parts: [&[u32]; 6] = [
            &ids[..21],
            &ids[21..22],
            &ids[22..24],
            &ids[24..29],
            &ids[29..61],
            &ids[61..],
        ];
        compare(name, &model, &card.load(&model).unwrap(), &parts, 1e-4);
        let packed = model.packed(WeightFormat::Bf16);
        // A step size of 3 makes of the rounding of one chunk a hundredth of the next ones.
        if !name.ends_with("lr3") {
            compare(
                &format!("{name} in bf16"),
                &packed,
                &card.load(&packed).unwrap(),
                &parts,
                BF16,
            );
        }
    }
}

#[test]
fn what_layers_learn_is_what_the_authors_code_learns() {
    let Some(card) = card() else { return };
    for name in [
        "llama_untrained",
        "qwen3_embed_noproj_lr0p3",
        "qwen3_hidden_lr3",
    ] {
        let model = learner(name);
        let on = card.load(&model).unwrap();
        let bytes = std::fs::read(
            fixtures()
                .join("ttt")
                .join(name)
                .join("vectors.safetensors"),
        )
        .unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        for n in [7, 8, 9, 16, 37, 64] {
            let ids = file.tensor(&format!("len{n}.input_ids")).unwrap();
            let ids: Vec<u32> = ids
                .data()
                .chunks_exact(8)
                .map(|b| i64::from_le_bytes(b.try_into().unwrap()) as u32)
                .collect();
            let want = file.tensor(&format!("len{n}.logits_infer")).unwrap();
            let want: Vec<f32> = want
                .data()
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
                .collect();
            let mut sequence = on.sequence(n, true).unwrap();
            let rows: Vec<usize> = (0..n).collect();
            let got = on.step(&mut [(&mut sequence, &ids)], &rows).unwrap();
            assert_close(&format!("{name}, {n} tokens"), &want, &got, 2e-4);
        }
    }
}

#[test]
fn a_weight_past_its_cap_begins_again_and_what_is_off_learns_nothing() {
    let Some(card) = card() else { return };
    let mut model = learner("qwen3_hidden_lr3");
    model.config.ttt.as_mut().unwrap().max_drift = Some(1e-3);
    let on = card.load(&model).unwrap();
    let ids = tokens(&model, 40, 8);
    let mut sequence = on.sequence(40, true).unwrap();
    on.step(&mut [(&mut sequence, &ids[..8])], &[]).unwrap();
    assert!(
        !sequence.updates.is_empty()
            && sequence
                .updates
                .iter()
                .all(|(_, update)| update.tripped && update.drift > 1e-3)
    );
    assert!(sequence.drifts().values().all(|drift| *drift == 0.0));

    model.config.ttt.as_mut().unwrap().max_drift = None;
    let on = card.load(&model).unwrap();
    let mut plain = on.sequence(40, false).unwrap();
    let want = on.step(&mut [(&mut plain, &ids)], &[39]).unwrap();
    let mut off = on.sequence(40, true).unwrap();
    off.switch(false);
    let got = on.step(&mut [(&mut off, &ids)], &[39]).unwrap();
    assert_close("off", &want, &got, EXACT);
    assert!(off.updates.is_empty() && off.waiting() == 0);
    off.switch(true);
    on.step(&mut [(&mut off, &ids[..8])], &[]).unwrap();
    assert_eq!(
        off.updates.len(),
        model.config.ttt.as_ref().unwrap().layers.len()
    );
}

#[test]
fn what_is_freed_is_given_back() {
    let Some(card) = card() else { return };
    let before = card.info().used_bytes;
    {
        let model = learner("qwen3_hidden_lr3");
        let on = card.load(&model).unwrap();
        let mut sequence = on.sequence(16, true).unwrap();
        on.step(&mut [(&mut sequence, &tokens(&model, 20, 9))], &[19])
            .unwrap();
        let copy = sequence.prefix(18, 40).unwrap();
        assert!(copy.bytes() > 0 && card.info().used_bytes > before);
    }
    assert_eq!(card.info().used_bytes, before);
    _ = Card::info;
}
