//! Attention's backward pass in tiles, against its slow twin that goes row by row.

use super::super::{CardTraining, Numbers};
use super::stand_in::run;
use super::{apart, card, moving, tokens, value, wide};
use crate::model::{Compute, LayerParam, ParamId, TrainId};

/// In tiles weights and their gradients are rounded to bf16 before they are multiplied, forwards too; by rows they are not.
const TOLERANCE: f32 = 4e-2;

/// Gradients of queries, keys and values, number by number: run by the test below in processes of their own.
#[test]
#[ignore = "a part of another test, in a process of its own"]
fn say_gradients_through_attention() {
    let card = card().unwrap();
    for head_dim in [16, 32, 64, 128] {
        let mut model = wide(head_dim);
        model.compute = Compute::Bf16;
        let moves: Vec<(TrainId, usize)> = moving(&model, None)
            .into_iter()
            .filter(|(id, _)| {
                let through = [LayerParam::Q, LayerParam::K, LayerParam::V];
                matches!(id, TrainId::Full(ParamId::Layer(_, which)) if through.contains(which))
            })
            .collect();
        let mut training = CardTraining::begin(&card, &model, None, &moves, 0).unwrap();
        for (id, _) in &moves {
            training
                .put(*id, Numbers::Value, &value(&model, None, *id))
                .unwrap();
        }
        // Whole tiles, one row beyond one, less than one, and too few for any.
        let texts: Vec<Vec<u32>> = [150, 5, 64, 16, 129]
            .iter()
            .map(|n| tokens(&model, *n, *n as u64))
            .collect();
        let texts: Vec<&[u32]> = texts.iter().map(|ids| &ids[..]).collect();
        let all = texts.concat();
        let rows: Vec<usize> = (0..all.len() - 1).collect();
        let labels: Vec<u32> = rows.iter().map(|row| all[row + 1]).collect();
        let weights: Vec<f32> = rows.iter().map(|row| 0.5 + (row % 4) as f32).collect();
        training.forward(&texts, 0.0, true).unwrap();
        training
            .head((&rows, &labels, &weights), Some(0.01))
            .unwrap();
        training.backward().unwrap();
        for (id, len) in &moves {
            let mut got = vec![0.0; *len];
            training.get(*id, Numbers::Gradient, &mut got).unwrap();
            let bits: String = got.iter().map(|x| format!("{:08x}", x.to_bits())).collect();
            println!("gradient {head_dim}:{} {bits}", id.name());
        }
    }
}

fn said(order: Option<&str>) -> Vec<(String, Vec<f32>)> {
    let output = run(
        "device::tests::tiles::say_gradients_through_attention",
        order,
    );
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{order:?}: {errors}");
    let gradient = |line: &str| -> Option<(String, Vec<f32>)> {
        let (name, bits) = line.strip_prefix("gradient ")?.split_once(' ')?;
        let number = |i: usize| f32::from_bits(u32::from_str_radix(&bits[i..i + 8], 16).unwrap());
        let numbers = (0..bits.len()).step_by(8).map(number).collect();
        Some((name.to_string(), numbers))
    };
    said.lines().filter_map(gradient).collect()
}

#[test]
fn gradients_through_tiles_are_those_row_by_row() {
    // A card with too little shared memory for tiles goes by rows.
    let (tiles, rows) = (said(None), said(Some("narrow")));
    assert_eq!(tiles.len(), 4 * 2 * 3);
    let mut worst = (0.0, "");
    for ((name, got), (same, want)) in tiles.iter().zip(&rows) {
        assert_eq!(name, same);
        let gap = apart(want, got);
        assert!(gap <= TOLERANCE, "{name}: {gap:e} apart");
        assert!(got != want, "{name} went by rows twice");
        if gap > worst.0 {
            worst = (gap, name);
        }
    }
    println!("gradients at most {:.2e} apart ({})", worst.0, worst.1);
}
