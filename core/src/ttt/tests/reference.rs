//! Values made by the authors' code (`tests/reference/ttt`, whose `ttt_numpy.py` is an independent reading of the same equations).
//!
//! `LOCUM_TTT_CASES=DIR` reads the cases of another folder of the same form.

use std::path::{Path, PathBuf};

use super::decoder::{tensors, Decoder, How, Tensors};

/// Largest error of a logit: these are of size 1 to 3, at most 16.
const LOGITS: f32 = 1e-4;
/// Largest error of activations and fast weights.
const VALUES: f32 = 5e-5;
/// Largest error of a gradient, relative to the largest of its tensor.
const GRADS: f32 = 1e-3;

struct Case {
    name: String,
    decoder: Decoder,
    vectors: Tensors,
    grads: Tensors,
}

impl Case {
    fn ids(&self, name: &str) -> Vec<u32> {
        self.vectors[name].iter().map(|x| *x as u32).collect()
    }

    fn lengths(&self) -> Vec<usize> {
        let length = |name: &String| {
            let n = name.strip_prefix("len")?.strip_suffix(".input_ids")?;
            n.parse().ok()
        };
        let lengths: Vec<usize> = self.vectors.keys().filter_map(length).collect();
        assert!(!lengths.is_empty(), "{} has no runs", self.name);
        lengths
    }

    /// Compares fast weights with those of this run where it has them; how many it had.
    fn check_fast(&self, run: &str, past: &super::decoder::Past) -> usize {
        let mut seen = 0;
        for (layer, fast) in &past.fast {
            let name = format!("{run}.layer{layer}.w_after");
            if let Some(want) = self.vectors.get(&name) {
                self.close(&name, fast.weight(), want, VALUES);
                seen += 1;
            }
        }
        seen
    }

    #[track_caller]
    fn close(&self, what: &str, got: &[f32], want: &[f32], tolerance: f32) {
        assert_eq!(got.len(), want.len(), "{} {what}", self.name);
        let mut worst = 0f32;
        for (i, (got, want)) in got.iter().zip(want).enumerate() {
            // Written so that NaN fails.
            let near = (got - want).abs() <= tolerance;
            assert!(near, "{} {what}[{i}]: {got} instead of {want}", self.name);
            worst = worst.max((got - want).abs());
        }
        println!("{:28} {what:34} max error {worst:.1e}", self.name);
    }
}

fn cases() -> Vec<Case> {
    let folder = match std::env::var_os("LOCUM_TTT_CASES") {
        Some(folder) => PathBuf::from(folder),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/reference/ttt"),
    };
    let entries =
        std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut paths: Vec<PathBuf> = entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("config.json").is_file())
        .collect();
    paths.sort();
    assert!(!paths.is_empty(), "no case in {}", folder.display());
    paths
        .iter()
        .map(|path| Case {
            name: path.file_name().unwrap().to_string_lossy().into_owned(),
            decoder: Decoder::load(path),
            vectors: tensors(&path.join("vectors.safetensors")),
            grads: tensors(&path.join("grads_len37.safetensors")),
        })
        .collect()
}

#[test]
fn ttt_reference_sequences_in_one_call_and_in_parallel() {
    for case in cases() {
        for n in case.lengths() {
            let ids = case.ids(&format!("len{n}.input_ids"));
            let mut past = case.decoder.past();
            let got = case.decoder.read(&mut past, &ids);
            let name = format!("len{n}.logits_infer");
            case.close(&name, &got, &case.vectors[&name], LOGITS);
            case.check_fast(&format!("len{n}"), &past);
            let (got, ..) = case.decoder.forward(&[&ids], How::Train(&mut Vec::new()));
            let name = format!("len{n}.logits_train");
            case.close(&name, &got, &case.vectors[&name], LOGITS);
        }
    }
}

#[test]
fn ttt_reference_fast_weights_after_a_call() {
    for case in cases() {
        let mut seen = 0;
        for n in case.lengths() {
            let mut past = case.decoder.past();
            case.decoder
                .read(&mut past, &case.ids(&format!("len{n}.input_ids")));
            seen += case.check_fast(&format!("len{n}"), &past);
        }
        assert!(seen > 0, "{} has fast weights", case.name);
    }
}

#[test]
fn ttt_reference_inside_the_layers() {
    for case in cases() {
        let mut tape = Vec::new();
        let ids = case.ids("len37.input_ids");
        case.decoder.forward(&[&ids], How::Train(&mut tape));
        let d = case.vectors["len37.layer0.target"].len() / 37;
        let c = case.decoder.ttt.chunk_len;
        for &layer in &case.decoder.ttt.layers {
            let block = &tape[usize::from(layer)];
            let name = |what: &str| format!("len37.layer{layer}.{what}");
            case.close(
                &name("mlp_out"),
                &block.mlp_out,
                &case.vectors[&name("mlp_out")],
                VALUES,
            );
            let source = &case.vectors[&name("target")];
            let mlp_in = case.vectors.get(&name("mlp_in")).unwrap_or(source);
            case.close(&name("mlp_in"), &block.n2, mlp_in, VALUES);
            let conv = format!("model.layers.{layer}.mlp.ttt_conv.weight");
            let mut padded = source.clone();
            padded.resize(37usize.next_multiple_of(c) * d, 0.0);
            let filtered: Vec<f32> = padded
                .chunks_exact(c * d)
                .flat_map(|u| {
                    super::super::rule::filter(None, &case.decoder.weights[&conv], u, 0..c, d)
                })
                .collect();
            case.close(
                &name("conv_out"),
                &filtered,
                &case.vectors[&name("conv_out")],
                VALUES,
            );
        }
    }
}

#[test]
fn ttt_reference_a_prompt_of_40_and_30_single_tokens() {
    for case in cases() {
        let ids = case.ids("decode.input_ids");
        let mut past = case.decoder.past();
        let mut got = case.decoder.read(&mut past, &ids[..40]);
        for id in &ids[40..] {
            got.extend(case.decoder.read(&mut past, &[*id]));
        }
        case.close(
            "decode, 40 + 30 x 1",
            &got,
            &case.vectors["decode.logits_infer"],
            LOGITS,
        );
        assert!(case.check_fast("decode", &past) > 0, "{}", case.name);
        let (got, ..) = case.decoder.forward(&[&ids], How::Train(&mut Vec::new()));
        case.close(
            "decode, in parallel",
            &got,
            &case.vectors["decode.logits_train"],
            LOGITS,
        );
    }
}

#[test]
fn ttt_reference_uneven_calls() {
    for case in cases() {
        let mut ids = &case.ids("decode.input_ids")[..];
        let mut past = case.decoder.past();
        let mut got = Vec::new();
        for split in &case.vectors["stream.splits"] {
            let (now, later) = ids.split_at(*split as usize);
            got.extend(case.decoder.read(&mut past, now));
            ids = later;
        }
        assert!(ids.is_empty());
        case.close("stream", &got, &case.vectors["stream.logits_infer"], LOGITS);
        case.check_fast("decode", &past);
    }
}

#[test]
fn ttt_reference_two_sequences_at_once() {
    for case in cases() {
        let ids = case.ids("batch2.input_ids");
        let (one, two) = ids.split_at(ids.len() / 2);
        let want = &case.vectors["batch2.logits_train"];
        let (got, ..) = case
            .decoder
            .forward(&[one, two], How::Train(&mut Vec::new()));
        case.close("batch2, in parallel", &got, want, LOGITS);
        let (mut a, mut b) = (case.decoder.past(), case.decoder.past());
        let (got, ..) = case
            .decoder
            .forward(&[one, two], How::Serve(&mut [&mut a, &mut b]));
        case.close("batch2, incremental", &got, want, LOGITS);
        // Each row's fast weights are those of the row alone.
        for (row, together) in [(one, &a), (two, &b)] {
            let mut alone = case.decoder.past();
            case.decoder.read(&mut alone, row);
            for (layer, fast) in &alone.fast {
                let got = together.fast[layer].weight();
                case.close("batch2, fast weights", got, fast.weight(), VALUES);
            }
        }
    }
}

#[test]
fn ttt_reference_gradients() {
    for case in cases() {
        let (loss, grads) = case.decoder.loss_and_grads(&case.ids("len37.input_ids"));
        case.close("loss", &[loss as f32], &case.grads["loss"], VALUES);
        for (name, want) in &case.grads {
            let Some(weight) = name
                .strip_prefix("grad.")
                .filter(|name| *name != "model.norm.weight")
            else {
                continue;
            };
            let size = want.iter().fold(0f32, |m, x| m.max(x.abs()));
            // A gradient of zeros, such as an untrained projection's, has to be one.
            let (scale, tolerance) = match size {
                0.0 => (1.0, 0.0),
                _ => (1.0 / size, GRADS),
            };
            let scaled = |grad: &[f32]| grad.iter().map(|x| x * scale).collect::<Vec<_>>();
            case.close(weight, &scaled(&grads[weight]), &scaled(want), tolerance);
        }
    }
}

#[test]
fn ttt_reference_the_first_chunk_and_an_untrained_student_equal_the_plain_model_bit_for_bit() {
    for mut case in cases() {
        let c = case.decoder.ttt.chunk_len;
        let ids = case.ids("len64.input_ids");
        let vocab = case.vectors["len64.logits_base"].len() / ids.len();
        let mut filter: Vec<f32> = Vec::new();
        for layer in &case.decoder.ttt.layers {
            filter.extend(
                &case.decoder.weights[&format!("model.layers.{layer}.mlp.ttt_conv.weight")],
            );
        }
        let untrained = filter.iter().all(|tap| *tap == 0.0);
        let equal = if untrained { ids.len() } else { c };
        let run = |decoder: &Decoder, calls: usize| -> Vec<f32> {
            let mut past = decoder.past();
            let calls = ids[..equal].chunks(calls);
            calls.flat_map(|ids| decoder.read(&mut past, ids)).collect()
        };
        let on = [run(&case.decoder, c), run(&case.decoder, 1)];
        case.decoder.off = true;
        let off = [run(&case.decoder, c), run(&case.decoder, 1)];
        for (on, off) in on.iter().zip(&off) {
            let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(on), bits(off), "{}", case.name);
            let want = &case.vectors["len64.logits_base"][..equal * vocab];
            case.close("plain model", off, want, VALUES);
        }
    }
}
