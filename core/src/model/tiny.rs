//! A tiny decoder with random weights and a tokenizer of single characters, made by a function: for tests and for hosts' tests.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use serde_json::{json, Value};

use super::{Config, FileDtype, Model, ModelError, ParamId, Weights};
use crate::kernels::Random;

/// Characters that the tiny tokenizer knows, as single tokens. All are printable ASCII, plus the new line.
pub const TINY_CHARS: &str = "\n !\"#$%&'()*+,-./0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\]^_`abcdefghijklmnopqrstuvwxyz{|}~";

/// Writes a Hugging Face folder with a random Llama of 2 layers (d 32, f 64, 2 heads, 1 key/value head) and a ChatML template.
///
/// The tokenizer is byte-level BPE without merges, so every byte of [`TINY_CHARS`] is one token.
pub fn write_tiny(dir: &Path, seed: u64) -> Result<(), ModelError> {
    fs::create_dir_all(dir).map_err(|e| ModelError::io(dir, e))?;
    let special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
    let mut vocab: Vec<String> = special.iter().map(|s| s.to_string()).collect();
    vocab.extend((0u16..=255).map(|b| byte_char(b as u8).to_string()));
    let map: serde_json::Map<String, Value> = vocab
        .iter()
        .enumerate()
        .map(|(i, t)| (t.clone(), json!(i)))
        .collect();
    let added: Vec<Value> = special
        .iter()
        .enumerate()
        .map(|(id, content)| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true})
        })
        .collect();
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": map, "merges": []},
    });
    let template = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";
    let tokenizer_config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "chat_template": template,
        "model_max_length": 2048,
    });
    let write = |name: &str, value: &Value| {
        let text = serde_json::to_string_pretty(value).expect("a JSON value prints");
        super::write_atomically(&dir.join(name), text.as_bytes())
    };
    write("tokenizer.json", &tokenizer)?;
    write("tokenizer_config.json", &tokenizer_config)?;
    write(
        "generation_config.json",
        &json!({"bos_token_id": 0, "eos_token_id": 2}),
    )?;
    let mut raw = Config::llama_json(vocab.len(), 32, 64, 2, 2, 1, 2048, 1e-5, 10_000.0, true);
    raw["bos_token_id"] = json!(0);
    raw["eos_token_id"] = json!(2);
    random_model(&raw, seed, 0.08)?.save(dir, FileDtype::F32)
}

/// A model of this shape with normal weights of deviation `sigma` (norms at 1), for tests.
pub(crate) fn random_model(raw: &Value, seed: u64, sigma: f64) -> Result<Model, ModelError> {
    let config = Config::from_json(raw)?;
    let mut random = Random::new(seed);
    let mut params = BTreeMap::new();
    for id in ParamId::all(&config) {
        let shape = id.shape(&config);
        let n = shape.iter().product();
        let data = (0..n)
            .map(|_| {
                if shape.len() == 1 {
                    1.0 + 0.1 * random.normal() as f32
                } else {
                    (sigma * random.normal()) as f32
                }
            })
            .collect();
        params.insert(id, Arc::new(data));
    }
    Model::new(config, Weights { params })
}

/// [`write_tiny`] with layers that learn, their filters and projections as random as the rest.
#[cfg(test)]
pub(crate) fn write_tiny_learner(
    dir: &Path,
    seed: u64,
    ttt: &crate::ttt::TttConfig,
) -> Result<(), ModelError> {
    write_tiny(dir, seed)?;
    let mut raw = Model::load(dir)?.config.raw;
    let fields = raw.as_object_mut().expect("a config is an object");
    fields.extend(ttt.to_json());
    random_model(&raw, seed, 0.08)?.save(dir, FileDtype::F32)
}

/// GPT-2's map from bytes to printable characters.
fn byte_char(byte: u8) -> char {
    let plain = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if plain(byte) {
        return byte as char;
    }
    let before = (0..byte).filter(|b| !plain(*b)).count() as u32;
    char::from_u32(256 + before).expect("a letter of the Latin Extended block")
}
