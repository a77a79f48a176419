//! GGUF files made by hand: every supported type, and what must be refused by name without a panic or a large allocation.

use std::fs;

use half::{bf16, f16};
use proptest::prelude::*;

use super::*;

const VOCAB: usize = 4;
const WIDTH: usize = 256;

/// A file of one block, 256 wide.
#[derive(Clone)]
struct Made {
    entries: Vec<(String, u32, Vec<u8>)>,
    /// Name, shape as in the file, type, offset (in order if `None`), bytes.
    tensors: Vec<(String, Vec<u64>, u32, Option<u64>, Vec<u8>)>,
}

impl Made {
    fn new() -> Self {
        let text = |s: &str| [&(s.len() as u64).to_le_bytes()[..], s.as_bytes()].concat();
        let mut entries = vec![("general.architecture".to_string(), 8, text("llama"))];
        for (key, n) in [
            ("embedding_length", WIDTH),
            ("feed_forward_length", WIDTH),
            ("block_count", 1),
            ("context_length", 64),
            ("attention.head_count", 2),
            ("attention.head_count_kv", 1),
        ] {
            entries.push((format!("llama.{key}"), 4, (n as u32).to_le_bytes().to_vec()));
        }
        let list = [&5u32.to_le_bytes()[..], &2u64.to_le_bytes(), &[1; 8]].concat();
        entries.push(("tokenizer.ggml.token_type".into(), 9, list));
        let w = WIDTH as u64;
        let mut tensors = Vec::new();
        for (name, shape) in [
            ("token_embd", vec![w, VOCAB as u64]),
            ("blk.0.attn_norm", vec![w]),
            ("blk.0.attn_q", vec![w, w]),
            ("blk.0.attn_k", vec![w, w / 2]),
            ("blk.0.attn_v", vec![w, w / 2]),
            ("blk.0.attn_output", vec![w, w]),
            ("blk.0.ffn_norm", vec![w]),
            ("blk.0.ffn_gate", vec![w, w]),
            ("blk.0.ffn_up", vec![w, w]),
            ("blk.0.ffn_down", vec![w, w]),
            ("output_norm", vec![w]),
        ] {
            let bytes = vec![0; 4 * shape.iter().product::<u64>() as usize];
            tensors.push((format!("{name}.weight"), shape, 0, None, bytes));
        }
        Self { entries, tensors }
    }

    fn embedding(kind: u32, bytes: Vec<u8>) -> Self {
        let mut made = Self::new();
        (made.tensors[0].2, made.tensors[0].4) = (kind, bytes);
        made
    }

    /// The file, and the length of its header.
    fn bytes(&self) -> (Vec<u8>, usize) {
        let mut out = [&b"GGUF"[..], &3u32.to_le_bytes()].concat();
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.entries.len() as u64).to_le_bytes());
        let text = |out: &mut Vec<u8>, s: &str| {
            out.extend((s.len() as u64).to_le_bytes());
            out.extend(s.as_bytes());
        };
        for (key, kind, value) in &self.entries {
            text(&mut out, key);
            out.extend(kind.to_le_bytes());
            out.extend(value);
        }
        let mut next = 0u64;
        for (name, shape, kind, offset, bytes) in &self.tensors {
            text(&mut out, name);
            out.extend((shape.len() as u32).to_le_bytes());
            shape.iter().for_each(|n| out.extend(n.to_le_bytes()));
            out.extend(kind.to_le_bytes());
            out.extend(offset.unwrap_or(next).to_le_bytes());
            next += (bytes.len() as u64).next_multiple_of(32);
        }
        let header = out.len();
        for (.., bytes) in &self.tensors {
            out.resize(out.len().next_multiple_of(32), 0);
            out.extend(bytes);
        }
        (out, header)
    }

    fn read(&self) -> Result<Gguf, ModelError> {
        read(&self.bytes().0)
    }

    #[track_caller]
    fn refused(&self, what: &[&str]) {
        says(self.read(), what);
    }
}

fn read(bytes: &[u8]) -> Result<Gguf, ModelError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("made.gguf");
    fs::write(&path, bytes).unwrap();
    read_gguf(&path)
}

#[track_caller]
fn says(read: Result<Gguf, ModelError>, what: &[&str]) {
    let said = read.err().expect("it should be refused").to_string();
    for part in what {
        assert!(said.contains(part), "{said:?} does not say {part:?}");
    }
}

/// Bytes that look random and are always the same.
fn noise(n: usize) -> Vec<u8> {
    let mut state = 7u32;
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..n).map(next).collect()
}

/// Blocks of noise with the scales at these places overwritten by small numbers.
fn blocks(n: usize, size: usize, scales: &[usize]) -> Vec<u8> {
    let mut bytes = noise(n * size);
    for (i, block) in bytes.chunks_mut(size).enumerate() {
        for at in scales {
            let scale = f16::from_f32(0.01 * (1 + i + at) as f32);
            block[*at..at + 2].copy_from_slice(&scale.to_le_bytes());
        }
    }
    bytes
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Reads the embedding back and compares it with the format's definition, written out plainly below.
#[track_caller]
fn check(kind: u32, size: usize, scales: &[usize], elements: usize, plain: fn(&[u8]) -> Vec<f32>) {
    let bytes = blocks(VOCAB * WIDTH / elements, size, scales);
    let want: Vec<f32> = bytes.chunks(size).flat_map(plain).collect();
    let gguf = Made::embedding(kind, bytes).read().unwrap();
    let got = &gguf.weights.params[&ParamId::Embed];
    assert_eq!(got.len(), want.len());
    for (got, want) in got.iter().zip(&want) {
        let near = 1e-5 * (1.0 + want.abs());
        assert!((got - want).abs() <= near, "type {kind}: {got} {want}");
    }
}

#[test]
fn f32_f16_and_bf16_tensors_are_read() {
    let numbers: Vec<f32> = (0..VOCAB * WIDTH).map(|i| i as f32 / 8.0 - 5.0).collect();
    let f32s = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
    let f16s = |x: &f32| f16::from_f32(*x).to_le_bytes();
    let bf16s = |x: &f32| bf16::from_f32(*x).to_le_bytes();
    for (kind, bytes, near) in [
        (0, f32s, 0.0),
        (1, numbers.iter().flat_map(f16s).collect(), 1e-3),
        (30, numbers.iter().flat_map(bf16s).collect(), 1e-2),
    ] {
        let gguf = Made::embedding(kind, bytes).read().unwrap();
        let got = &gguf.weights.params[&ParamId::Embed];
        assert!(
            got.iter()
                .zip(&numbers)
                .all(|(a, b)| (a - b).abs() <= near * b.abs()),
            "{kind}"
        );
    }
}

#[test]
fn quantised_tensors_are_expanded_as_their_formats_define() {
    // Q4_0, Q4_1, Q8_0: one scale for 32 numbers; the low nibbles are the first half.
    check(2, 18, &[0], 32, |b| {
        let d = half_at(b, 0);
        let low = b[2..].iter().map(|q| (f32::from(q & 15) - 8.0) * d);
        low.chain(b[2..].iter().map(|q| (f32::from(q >> 4) - 8.0) * d))
            .collect()
    });
    check(3, 20, &[0, 2], 32, |b| {
        let (d, m) = (half_at(b, 0), half_at(b, 2));
        let low = b[4..].iter().map(|q| f32::from(q & 15) * d + m);
        low.chain(b[4..].iter().map(|q| f32::from(q >> 4) * d + m))
            .collect()
    });
    check(8, 34, &[0], 32, |b| {
        let d = half_at(b, 0);
        b[2..].iter().map(|q| f32::from(*q as i8) * d).collect()
    });
    // Q4_K: eight times 32 numbers, whose scales and minima of 6 bits share 12 bytes.
    check(12, 144, &[0, 2], 256, |b| {
        let (d, dmin, s) = (half_at(b, 0), half_at(b, 2), &b[4..16]);
        let pair = |j: usize| match j < 4 {
            true => (s[j] & 63, s[j + 4] & 63),
            false => (
                s[j + 4] & 15 | s[j - 4] >> 6 << 4,
                s[j + 4] >> 4 | s[j] >> 6 << 4,
            ),
        };
        (0..256)
            .map(|i| {
                let (scale, min) = pair(i / 32);
                let q = b[16 + i / 64 * 32 + i % 32];
                let q = if i / 32 % 2 == 0 { q & 15 } else { q >> 4 };
                d * f32::from(scale) * f32::from(q) - dmin * f32::from(min)
            })
            .collect()
    });
    // Q6_K: sixteen times 16 numbers; four bits of each in one place, two in another.
    check(14, 210, &[208], 256, |b| {
        let d = half_at(b, 208);
        (0..256)
            .map(|i| {
                let (part, quarter, l) = (i / 128, i % 128 / 32, i % 32);
                let low = b[64 * part + 32 * (quarter % 2) + l];
                let low = if quarter < 2 { low & 15 } else { low >> 4 };
                let high = b[128 + 32 * part + l] >> (2 * quarter) & 3;
                let scale = b[192 + 8 * part + 2 * quarter + l / 16] as i8;
                d * f32::from(scale) * (f32::from(low | high << 4) - 32.0)
            })
            .collect()
    });
}

#[test]
fn a_wrong_tensor_is_refused_by_its_name() {
    assert!(Made::new().read().is_ok());
    let with = |change: &dyn Fn(&mut (String, Vec<u64>, u32, Option<u64>, Vec<u8>))| {
        let mut made = Made::new();
        change(&mut made.tensors[7]);
        made
    };
    let name = "blk.0.ffn_gate.weight";
    with(&|t| t.1 = vec![u64::MAX, 2]).refused(&[name, "shape"]);
    with(&|t| t.1 = vec![1 << 32, 1 << 32]).refused(&[name, "shape"]);
    with(&|t| t.1 = vec![1 << 40, 1]).refused(&[name, "shape"]);
    with(&|t| t.1 = vec![0, 256]).refused(&[name, "shape"]);
    with(&|t| t.1 = vec![256 * 256]).refused(&[name, "shape [65536]"]);
    with(&|t| t.1 = vec![128, 512]).refused(&[name, "shape [512, 128]"]);
    with(&|t| t.1 = vec![256, 256, 1]).refused(&[name, "shape [1, 256, 256]"]);
    with(&|t| t.1 = vec![]).refused(&[name, "0 dimensions"]);
    with(&|t| t.1 = vec![1; 5]).refused(&[name, "5 dimensions"]);
    with(&|t| t.2 = 99).refused(&[name, "type 99 is not supported"]);
    with(&|t| t.2 = 9).refused(&[name, "type 9 is not supported"]);
    with(&|t| t.3 = Some(u64::MAX)).refused(&[name, "0 left"]);
    with(&|t| t.3 = Some(1 << 40)).refused(&[name, "needs 262144 bytes"]);
    with(&|t| t.4[5] = 0xff).read().unwrap();
    with(&|t| t.4[4..8].copy_from_slice(&f32::NAN.to_le_bytes())).refused(&[name, "element 1"]);
    with(&|t| t.0 = "blk.0.ffn_gone.weight".into()).refused(&[name, "missing"]);
    with(&|t| t.0 = "output_norm.weight".into()).refused(&["output_norm.weight", "twice"]);
}

#[test]
fn tensors_that_share_their_bytes_cannot_claim_more_than_the_file_has() {
    let mut made = Made::new();
    for tensor in &mut made.tensors[2..] {
        tensor.3 = Some(0);
    }
    // One tensor's worth of bytes, claimed ten times.
    made.tensors.iter_mut().for_each(|t| t.4.clear());
    made.tensors[0].4 = vec![0; 4 * WIDTH * WIDTH];
    made.tensors[1].3 = Some(0);
    made.refused(&["blk.0.", "the tensors up to it need"]);
}

#[test]
fn a_head_count_of_zero_or_above_the_width_is_refused() {
    let heads = |n: u32| {
        let mut made = Made::new();
        made.entries[5].2 = n.to_le_bytes().to_vec();
        made.entries.remove(6);
        made
    };
    heads(0).refused(&["num_attention_heads is 0"]);
    heads(512).refused(&["head_dim is 0"]);
}

#[test]
fn an_alignment_of_zero_or_of_the_whole_address_space_is_refused() {
    for n in [0u32, 3, u32::MAX] {
        let mut made = Made::new();
        let entry = ("general.alignment".into(), 4, n.to_le_bytes().to_vec());
        made.entries.push(entry);
        made.refused(&["general.alignment"]);
    }
}

#[test]
fn a_file_cut_short_anywhere_is_refused() {
    let (bytes, header) = Made::new().bytes();
    for cut in (0..header)
        .step_by(3)
        .chain([header, header + 40, bytes.len() - 1])
    {
        let said = read(&bytes[..cut]).err().expect("cut").to_string();
        assert!(said.contains("GGUF") || said.contains("tensor"), "{said}");
    }
    says(
        read(&bytes[..bytes.len() - 1]),
        &["output_norm.weight", "1024 bytes"],
    );
}

#[test]
fn lists_that_claim_to_be_long_or_deep_are_refused_before_they_are_made() {
    let list = |bytes: Vec<u8>| {
        let mut made = Made::new();
        made.entries.push(("x".into(), 9, bytes));
        made
    };
    let long = [&0u32.to_le_bytes()[..], &(1u64 << 40).to_le_bytes()].concat();
    list(long).refused(&["\"x\"", "elements"]);
    let one = [&9u32.to_le_bytes()[..], &1u64.to_le_bytes()].concat();
    list(one.repeat(1000)).refused(&["lists within lists"]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever a header says, reading ends, in a model or in a sentence.
    #[test]
    fn a_damaged_header_never_panics(changes in prop::collection::vec((0usize..100_000, any::<u8>()), 1..6)) {
        let (mut bytes, header) = Made::new().bytes();
        for (at, byte) in changes {
            bytes[at % header] = byte;
        }
        if let Err(error) = read(&bytes) {
            prop_assert!(!error.to_string().is_empty());
        }
    }

    /// Numbers that are likeliest to break arithmetic, wherever eight bytes may be a length, a count, a dimension or an offset.
    #[test]
    fn a_wild_number_in_a_header_never_panics(at in 8usize..100_000, which in 0usize..8) {
        let (mut bytes, header) = Made::new().bytes();
        let wild = [0, 1, u64::MAX, 1 << 63, 1 << 32, (1 << 32) - 1, i64::MAX as u64, 1 << 20][which];
        let at = 8 + at % (header - 16);
        bytes[at..at + 8].copy_from_slice(&wild.to_le_bytes());
        let _ = read(&bytes);
    }

    /// The same for safetensors, whose header is JSON behind a length.
    #[test]
    fn a_damaged_safetensors_header_never_panics(changes in prop::collection::vec((0usize..100_000, any::<u8>()), 1..6)) {
        thread_local! {
            static TINY: (tempfile::TempDir, Vec<u8>) = {
                let dir = tempfile::tempdir().unwrap();
                crate::model::write_tiny(dir.path(), 1).unwrap();
                let bytes = fs::read(dir.path().join("model.safetensors")).unwrap();
                (dir, bytes)
            };
        }
        TINY.with(|(dir, bytes)| {
            let mut bytes = bytes.clone();
            let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            for (at, byte) in changes {
                bytes[at % header] = byte;
            }
            fs::write(dir.path().join("model.safetensors"), &bytes).unwrap();
            let _ = crate::model::Model::load(dir.path());
        });
    }
}

#[test]
fn a_safetensors_tensor_of_another_shape_is_refused_by_its_name() {
    let dir = tempfile::tempdir().unwrap();
    crate::model::write_tiny(dir.path(), 1).unwrap();
    let path = dir.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let name = "model.layers.0.mlp.up_proj.weight";
    let shape = header[name]["shape"].clone();
    let (n, k) = (shape[0].as_u64().unwrap(), shape[1].as_u64().unwrap());
    for wrong in [
        json!([n * k]),
        json!([k, n]),
        json!([n, k, 1]),
        json!([u64::MAX, 2]),
        json!([0, k]),
    ] {
        let mut header = header.clone();
        header[name]["shape"] = wrong.clone();
        let text = header.to_string();
        let changed = [
            &(text.len() as u64).to_le_bytes()[..],
            text.as_bytes(),
            &bytes[8 + length..],
        ];
        fs::write(&path, changed.concat()).unwrap();
        let said = crate::model::Model::load(dir.path())
            .err()
            .map(|e| e.to_string());
        assert!(said.is_some(), "{wrong}");
        // A size that does not fit the bytes is the file's fault as a whole, found before any tensor is looked at.
        if wrong == json!([n * k]) || wrong == json!([n, k, 1]) {
            assert!(said.unwrap().contains(name), "{wrong}");
        }
    }
}
