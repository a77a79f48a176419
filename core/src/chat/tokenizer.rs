//! The tokenizer: byte-level BPE of the GPT-2, Llama-3 and Qwen2 families, from `tokenizer.json` or rebuilt from a GGUF file.

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::Path;

use candle_core::quantized::gguf_file;
use serde_json::{json, Map, Value};
use sha2::{Digest, Sha256};

use super::{files, hex, ChatError};
use crate::limits::MAX_CONFIG_BYTES;

/// Splitting rule of GPT-2; SmolLM2 splits digits before it.
const GPT2_SPLIT: &str =
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// Splitting rule of Llama 3: digits in groups of up to three.
const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Splitting rule of Qwen 2 and 3: digits one by one.
const QWEN2_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// GGUF's kinds of tokens.
const TYPE_CONTROL: u32 = 3;
const TYPE_USER_DEFINED: u32 = 4;

/// A byte-level BPE tokenizer. Every text can be encoded, and decoding gives it back: after NFC where the tokenizer normalises,
/// and without the bytes that its vocabulary lacks. Immutable and shared between threads.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Special tokens, the longest first.
    specials: Vec<(String, u32)>,
    /// Bytes of every token; a special token's are its name.
    bytes: Vec<Vec<u8>>,
    is_special: Vec<bool>,
    digest: String,
}

/// The tokens of texts that came before. Of one episode each step shows what the last one showed and a little more, so with a
/// memo its steps together cost about what its last one costs. It holds what the texts say: it goes with its episode.
#[derive(Default)]
pub struct Memo(RefCell<HashMap<String, Vec<u32>>>);

impl Memo {
    pub(super) fn with<T>(
        &self,
        tokenizer: &Tokenizer,
        text: &str,
        read: impl FnOnce(&[u32]) -> T,
    ) -> T {
        let mut known = self.0.borrow_mut();
        if !known.contains_key(text) {
            known.insert(text.to_owned(), tokenizer.encode_plain(text));
        }
        read(&known[text])
    }
}

impl Tokenizer {
    /// Opens a `tokenizer.json`.
    ///
    /// # Errors
    /// [`ChatError::TooLarge`], [`ChatError::BadFile`], and [`ChatError::Tokenizer`] for a kind of tokenizer that is not
    /// byte-level BPE of a known family.
    pub fn from_file(path: &Path) -> Result<Tokenizer, ChatError> {
        let bytes = files::read(path, MAX_CONFIG_BYTES)?;
        let value: Value = serde_json::from_slice(&bytes).map_err(|e| ChatError::BadFile {
            path: path.into(),
            problem: e.to_string(),
        })?;
        Self::from_json(value)
    }

    /// Builds a tokenizer from the parsed content of a `tokenizer.json`.
    ///
    /// # Errors
    /// [`ChatError::Tokenizer`], with what was found.
    pub fn from_json(mut value: Value) -> Result<Tokenizer, ChatError> {
        check_kind(&value)?;
        // Cutting and filling up are the caller's business; a file saved with them on would cut long prompts silently.
        for key in ["truncation", "padding"] {
            if let Some(field) = value.get_mut(key) {
                *field = Value::Null;
            }
        }
        let mut inner = tokenizers::Tokenizer::from_bytes(value.to_string())
            .map_err(|e| refuse(e.to_string()))?;
        // Special tokens are found by this type, and only where they are asked for.
        inner.set_encode_special_tokens(true);
        Self::new(inner)
    }

    /// Rebuilds a tokenizer from a GGUF file's metadata: `tokenizer.ggml.model = gpt2` with `pre = smollm`, `qwen2` or
    /// `llama-bpe`. The ids are those of llama.cpp (`tests/fixtures/tokenizer`).
    ///
    /// # Errors
    /// [`ChatError::Tokenizer`] naming the model, the splitting rule or the key that was found or missing.
    pub fn from_gguf(metadata: &HashMap<String, gguf_file::Value>) -> Result<Tokenizer, ChatError> {
        let text = |key: &str| {
            metadata
                .get(key)
                .and_then(|v| v.to_string().ok())
                .map(String::as_str)
        };
        let model = text("tokenizer.ggml.model")
            .ok_or_else(|| refuse("the GGUF file has no tokenizer.ggml.model"))?;
        if model != "gpt2" {
            return Err(refuse(format!(
                "tokenizer.ggml.model is {model:?}, only \"gpt2\" (byte-level BPE) is known"
            )));
        }
        let pre = text("tokenizer.ggml.pre").unwrap_or("default");
        let split = |pattern: &str| json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false });
        let byte_level = |use_regex: bool| json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex });
        let sequence = |list: Value| json!({ "type": "Sequence", "pretokenizers": list });
        let (pre_tokenizer, normalizer, ignore_merges) = match pre {
            "smollm" => {
                let digits = json!({ "type": "Digits", "individual_digits": true });
                (sequence(json!([digits, byte_level(true)])), Value::Null, false)
            }
            "qwen2" => (sequence(json!([split(QWEN2_SPLIT), byte_level(false)])), json!({ "type": "NFC" }), false),
            "llama-bpe" => (sequence(json!([split(LLAMA3_SPLIT), byte_level(false)])), Value::Null, true),
            _ => return Err(refuse(format!("tokenizer.ggml.pre is {pre:?}, only \"smollm\", \"qwen2\" and \"llama-bpe\" are known"))),
        };
        let strings = |key: &str| -> Result<Vec<&str>, ChatError> {
            let list = metadata.get(key).and_then(|v| v.to_vec().ok());
            let list = list.ok_or_else(|| refuse(format!("the GGUF file has no list {key}")))?;
            list.iter()
                .map(|v| v.to_string().map(String::as_str))
                .collect::<Result<_, _>>()
                .map_err(|_| refuse(format!("{key} holds something that is no text")))
        };
        let tokens = strings("tokenizer.ggml.tokens")?;
        let merges = strings("tokenizer.ggml.merges")?;
        let types: Vec<u32> = match metadata.get("tokenizer.ggml.token_type").and_then(|v| v.to_vec().ok()) {
            Some(types) => types.iter().map(|t| t.to_u32().or_else(|_| t.to_i32().map(|t| t as u32)).unwrap_or(0)).collect(),
            None => return Err(refuse("the GGUF file has no list tokenizer.ggml.token_type, so special tokens cannot be told")),
        };
        if types.len() != tokens.len() {
            return Err(refuse(format!(
                "{} tokens, but {} token types",
                tokens.len(),
                types.len()
            )));
        }
        let vocab: Map<String, Value> = tokens
            .iter()
            .enumerate()
            .map(|(id, t)| (t.to_string(), json!(id)))
            .collect();
        let added: Vec<Value> = (0..tokens.len())
            .filter(|id| matches!(types[*id], TYPE_CONTROL | TYPE_USER_DEFINED))
            .map(|id| {
                json!({
                    "id": id, "content": tokens[id], "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": types[id] == TYPE_CONTROL
                })
            })
            .collect();
        let merges: Vec<Value> = merges
            .iter()
            .map(|m| json!(m.split_once(' ').map(|(a, b)| [a, b])))
            .collect();
        Self::from_json(json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
            "normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "post_processor": null,
            "decoder": byte_level(true),
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                "ignore_merges": ignore_merges, "vocab": vocab, "merges": merges
            }
        }))
    }

    /// Bytes as tokens, then `<|im_end|>`, `<|im_start|>` and `<|endoftext|>`.
    pub(super) fn byte_level() -> Tokenizer {
        let mut vocab: Map<String, Value> = byte_of_char()
            .into_iter()
            .map(|(c, byte)| (c.to_string(), json!(byte)))
            .collect();
        let mut added = Vec::new();
        for (id, name) in (256..).zip(["<|im_end|>", "<|im_start|>", "<|endoftext|>"]) {
            vocab.insert(name.into(), json!(id));
            added.push(json!({
                "id": id, "content": name, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true
            }));
        }
        let byte_level = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
        Self::from_json(json!({
            "version": "1.0", "added_tokens": added, "pre_tokenizer": byte_level, "decoder": byte_level,
            "model": { "type": "BPE", "vocab": vocab, "merges": [] }
        }))
        .expect("the byte alphabet is a tokenizer")
    }

    fn new(inner: tokenizers::Tokenizer) -> Result<Tokenizer, ChatError> {
        let added = inner.get_added_tokens_decoder();
        let vocab = inner.get_vocab(true);
        let size = vocab.values().max().map_or(0, |id| *id as usize + 1);
        let mut bytes = vec![Vec::new(); size];
        let mut is_special = vec![false; size];
        let mut specials = Vec::new();
        let of_char = byte_of_char();
        for (token, id) in &vocab {
            let at = *id as usize;
            match added.get(id) {
                Some(added) => {
                    if added.special && (added.lstrip || added.rstrip || added.single_word) {
                        return Err(refuse(format!("special token {token:?} takes in white space or wants to be a word of its own")));
                    }
                    if added.special && !token.is_empty() {
                        specials.push((token.clone(), *id));
                    }
                    is_special[at] = added.special;
                    bytes[at] = token.clone().into_bytes();
                }
                None => {
                    let decoded: Option<Vec<u8>> =
                        token.chars().map(|c| of_char.get(&c).copied()).collect();
                    bytes[at] = decoded.ok_or_else(|| {
                        refuse(format!(
                            "token {id} ({token:?}) is not written in the byte-level alphabet"
                        ))
                    })?;
                }
            }
        }
        let single: std::collections::HashSet<u8> = (0..size)
            .filter(|i| !is_special[*i] && bytes[*i].len() == 1)
            .map(|i| bytes[i][0])
            .collect();
        // Some vocabularies lack rare bytes (SmolLM2's has no token for most control characters); as in llama.cpp and
        // transformers, those are then left out of what is encoded. Plain text must be there.
        let plain = (b' '..=b'~').chain([b'\n']);
        if let Some(missing) = plain.into_iter().find(|b| !single.contains(b)) {
            return Err(refuse(format!(
                "byte {missing:#04x} has no token, so plain text could not be encoded"
            )));
        }
        specials.sort_by(|a, b| b.0.len().cmp(&a.0.len()).then(a.cmp(b)));
        let text = inner.to_string(false).map_err(|e| refuse(e.to_string()))?;
        let digest = hex(&Sha256::digest(text.as_bytes()));
        Ok(Tokenizer {
            inner,
            specials,
            bytes,
            is_special,
            digest,
        })
    }

    /// Tokens of `text`. With `special`, text that spells a special token becomes that token; without, it stays text.
    pub fn encode(&self, text: &str, special: bool) -> Vec<u32> {
        if !special {
            return self.encode_plain(text);
        }
        self.encode_guarded(text, &Guard::none(), &Memo::default())
    }

    /// Like `encode(text, true)`, with what `guard` hid put back as text.
    pub(super) fn encode_guarded(&self, text: &str, guard: &Guard, memo: &Memo) -> Vec<u32> {
        let mut ids = Vec::new();
        for piece in self.pieces(text) {
            match piece {
                Piece::Special(id, _) => ids.push(id),
                Piece::Text(text, _) => {
                    memo.with(self, &guard.restore(text), |known| ids.extend(known))
                }
            }
        }
        ids
    }

    /// Like [`Tokenizer::encode_guarded`], each token with the byte of `text` where it begins.
    pub(super) fn encode_offsets(&self, text: &str, guard: &Guard) -> Vec<(u32, usize)> {
        let mut out = Vec::new();
        for piece in self.pieces(text) {
            match piece {
                Piece::Special(id, at) => out.push((id, at)),
                Piece::Text(hidden, at) => {
                    let plain = guard.restore(hidden);
                    let encoding = self
                        .inner
                        .encode(plain.as_ref(), false)
                        .expect("byte-level BPE encodes every text");
                    // A hidden character and what it stands for differ in length, so offsets are translated.
                    let back = guard.offsets(hidden);
                    out.extend(
                        encoding
                            .get_ids()
                            .iter()
                            .zip(encoding.get_offsets())
                            .map(|(id, (start, _))| (*id, at + back(*start))),
                    );
                }
            }
        }
        out
    }

    fn encode_plain(&self, text: &str) -> Vec<u32> {
        if text.is_empty() {
            return Vec::new();
        }
        self.inner
            .encode_fast(text, false)
            .expect("byte-level BPE encodes every text")
            .get_ids()
            .to_vec()
    }

    fn pieces<'a>(&self, text: &'a str) -> Vec<Piece<'a>> {
        let mut pieces = Vec::new();
        let (mut from, mut at) = (0, 0);
        while at < text.len() {
            match self
                .specials
                .iter()
                .find(|(name, _)| text[at..].starts_with(name.as_str()))
            {
                Some((name, id)) => {
                    if from < at {
                        pieces.push(Piece::Text(&text[from..at], from));
                    }
                    pieces.push(Piece::Special(*id, at));
                    at += name.len();
                    from = at;
                }
                None => at += text[at..].chars().next().map_or(1, char::len_utf8),
            }
        }
        if from < text.len() {
            pieces.push(Piece::Text(&text[from..], from));
        }
        pieces
    }

    /// The text of tokens, special tokens by their names; bytes that are no UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        let bytes: Vec<u8> = ids
            .iter()
            .flat_map(|id| self.bytes_of(*id))
            .copied()
            .collect();
        String::from_utf8(bytes)
            .unwrap_or_else(|e| String::from_utf8_lossy(e.as_bytes()).into_owned())
    }

    /// The token's bytes (a special token's name); empty for an id that has no token.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        self.bytes_of(id).to_vec()
    }

    pub(super) fn bytes_of(&self, id: u32) -> &[u8] {
        self.bytes.get(id as usize).map_or(&[], Vec::as_slice)
    }

    pub fn is_special(&self, id: u32) -> bool {
        self.is_special.get(id as usize).copied().unwrap_or(false)
    }

    /// The id of a special token by its name.
    pub fn special_id(&self, name: &str) -> Option<u32> {
        self.specials
            .iter()
            .find(|(n, _)| n == name)
            .map(|(_, id)| *id)
    }

    /// The special token that `text` begins with.
    pub(super) fn special_at(&self, text: &str) -> Option<u32> {
        self.specials
            .iter()
            .find(|(name, _)| text.starts_with(name.as_str()))
            .map(|(_, id)| *id)
    }

    /// One more than the largest token id. A model's embedding may have more rows; those are never tokens.
    pub fn vocab_size(&self) -> usize {
        self.bytes.len()
    }

    /// SHA-256 (hex) of everything that decides the ids.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// Writes `tokenizer.json` into `dir`.
    ///
    /// # Errors
    /// [`ChatError::File`].
    pub fn save(&self, dir: &Path) -> Result<(), ChatError> {
        let text = self
            .inner
            .to_string(false)
            .map_err(|e| refuse(e.to_string()))?;
        files::write(&dir.join("tokenizer.json"), text.as_bytes())
    }
}

enum Piece<'a> {
    Special(u32, usize),
    Text(&'a str, usize),
}

fn refuse(problem: impl Into<String>) -> ChatError {
    ChatError::Tokenizer(problem.into())
}

/// Byte-level BPE writes bytes as printable characters; this is the way back.
fn byte_of_char() -> HashMap<char, u8> {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut shifted = 0;
    (0..=255u8)
        .map(|b| {
            if printable(b) {
                return (char::from(b), b);
            }
            shifted += 1;
            (
                char::from_u32(255 + shifted).expect("256 to 323 are characters"),
                b,
            )
        })
        .collect()
}

/// Refuses what is not known to be tokenised right.
fn check_kind(value: &Value) -> Result<(), ChatError> {
    let kind = |v: &Value| {
        v.get("type")
            .and_then(Value::as_str)
            .unwrap_or("none")
            .to_string()
    };
    let model = value.get("model").unwrap_or(&Value::Null);
    // Files of before the type was written have a BPE's fields instead.
    let is_bpe = model
        .get("type")
        .map_or(model.get("merges").is_some(), |t| t == "BPE");
    if !is_bpe {
        return Err(refuse(format!(
            "model {:?} found, only BPE is known",
            kind(model)
        )));
    }
    for (field, fine) in [
        ("byte_fallback", json!(false)),
        ("dropout", json!(0.0)),
        ("continuing_subword_prefix", json!("")),
        ("end_of_word_suffix", json!("")),
    ] {
        match model.get(field) {
            None | Some(Value::Null) => {}
            Some(found) if *found == fine => {}
            Some(found) => {
                return Err(refuse(format!(
                    "model.{field} is {found}, which is not known to be tokenised right"
                )))
            }
        }
    }
    let members = |v: Option<&Value>, list: &str| -> Vec<Value> {
        match v {
            None | Some(Value::Null) => Vec::new(),
            Some(v) if v.get("type").is_some_and(|t| t == "Sequence") => v
                .get(list)
                .and_then(Value::as_array)
                .cloned()
                .unwrap_or_default(),
            Some(v) => vec![v.clone()],
        }
    };
    for normalizer in members(value.get("normalizer"), "normalizers") {
        if kind(&normalizer) != "NFC" {
            return Err(refuse(format!(
                "normalizer {:?} found, only NFC is known",
                kind(&normalizer)
            )));
        }
    }
    let pre = members(value.get("pre_tokenizer"), "pretokenizers");
    for (i, step) in pre.iter().enumerate() {
        match kind(step).as_str() {
            "ByteLevel" if step.get("add_prefix_space") == Some(&json!(true)) => {
                return Err(refuse("the pre-tokenizer puts a space before the text"))
            }
            "ByteLevel" if i + 1 == pre.len() => {}
            "Digits" => {}
            "Split" => {
                let pattern = step
                    .pointer("/pattern/Regex")
                    .and_then(Value::as_str)
                    .unwrap_or("");
                if ![GPT2_SPLIT, LLAMA3_SPLIT, QWEN2_SPLIT].contains(&pattern) {
                    return Err(refuse(format!("the pre-tokenizer splits by {pattern:?}, only the patterns of GPT-2, Llama 3 and Qwen 2 are known")));
                }
            }
            other => {
                return Err(refuse(format!(
                "pre-tokenizer {other:?} found, only Digits, Split and a last ByteLevel are known"
            )))
            }
        }
    }
    if pre.last().map(kind).as_deref() != Some("ByteLevel") {
        return Err(refuse("the pre-tokenizer does not end with ByteLevel"));
    }
    let decoder = members(value.get("decoder"), "decoders");
    if !decoder.iter().all(|d| kind(d) == "ByteLevel") || decoder.is_empty() {
        let found: Vec<String> = decoder.iter().map(kind).collect();
        return Err(refuse(format!(
            "decoder {found:?} found, only ByteLevel is known"
        )));
    }
    Ok(())
}

/// Keeps text that spells a special token text while a template runs: the first character of each such spelling is swapped
/// for a private one that occurs nowhere else, and put back when the pieces between the template's own special tokens are encoded.
pub(super) struct Guard {
    names: Vec<String>,
    /// Private character and what it stands for.
    swaps: Vec<(char, char)>,
}

impl Guard {
    pub fn none() -> Self {
        Self {
            names: Vec::new(),
            swaps: Vec::new(),
        }
    }

    pub fn new(tokenizer: &Tokenizer, texts: &[&str]) -> Self {
        let names: Vec<String> = tokenizer
            .specials
            .iter()
            .filter(|(name, _)| texts.iter().any(|t| t.contains(name.as_str())))
            .map(|(name, _)| name.clone())
            .collect();
        let mut free = ('\u{E000}'..='\u{F8FF}').filter(|c| !texts.iter().any(|t| t.contains(*c)));
        let mut swaps: Vec<(char, char)> = Vec::new();
        for first in names.iter().filter_map(|n| n.chars().next()) {
            if !swaps.iter().any(|(_, c)| *c == first) {
                // 6,400 private characters cannot all occur in one prompt by accident; on purpose, the spelling stays.
                if let Some(private) = free.next() {
                    swaps.push((private, first));
                }
            }
        }
        Self { names, swaps }
    }

    pub fn hide(&self, text: &str) -> String {
        let mut text = text.to_string();
        for name in &self.names {
            let first = name.chars().next();
            if let Some((private, _)) = self.swaps.iter().find(|(_, c)| Some(*c) == first) {
                let rest: String = name.chars().skip(1).collect();
                text = text.replace(name.as_str(), &format!("{private}{rest}"));
            }
        }
        text
    }

    /// Hides in every string of a message.
    pub fn hide_in(&self, value: &Value) -> Value {
        if self.swaps.is_empty() {
            return value.clone();
        }
        match value {
            Value::String(text) => Value::String(self.hide(text)),
            Value::Array(list) => list.iter().map(|v| self.hide_in(v)).collect(),
            Value::Object(map) => Value::Object(
                map.iter()
                    .map(|(k, v)| (self.hide(k), self.hide_in(v)))
                    .collect(),
            ),
            other => other.clone(),
        }
    }

    fn restore<'a>(&self, text: &'a str) -> std::borrow::Cow<'a, str> {
        if self.swaps.is_empty() {
            return text.into();
        }
        text.chars()
            .map(|c| {
                self.swaps
                    .iter()
                    .find(|(p, _)| *p == c)
                    .map_or(c, |(_, first)| *first)
            })
            .collect::<String>()
            .into()
    }

    /// From a byte of the restored text to the same place in the hidden one.
    fn offsets<'a>(&'a self, hidden: &'a str) -> impl Fn(usize) -> usize + 'a {
        move |wanted| {
            if self.swaps.is_empty() {
                return wanted;
            }
            let (mut plain, mut at) = (0, 0);
            for c in hidden.chars() {
                if plain >= wanted {
                    break;
                }
                plain += self
                    .swaps
                    .iter()
                    .find(|(p, _)| *p == c)
                    .map_or(c, |(_, first)| *first)
                    .len_utf8();
                at += c.len_utf8();
            }
            at
        }
    }
}

/// Every string in a JSON value, keys included.
pub(super) fn strings<'a>(value: &'a Value, out: &mut Vec<&'a str>) {
    match value {
        Value::String(text) => out.push(text),
        Value::Array(list) => list.iter().for_each(|v| strings(v, out)),
        Value::Object(map) => map.iter().for_each(|(k, v)| {
            out.push(k);
            strings(v, out);
        }),
        _ => {}
    }
}
