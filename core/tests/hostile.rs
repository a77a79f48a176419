//! Files and texts made to do harm, thrown at every door that reads some: each gets an error or a sound value, in bounded time, and
//! never a panic. The cases follow from a seed; `LOCUM_FUZZ_CASES` asks for so many times as many, `LOCUM_FUZZ_SEED` for others.

use std::fs;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use locum_core::calls::{CallFormat, GrammarOptions};
use locum_core::chat::{Chat, Tokenizer};
use locum_core::formats::{piece_from_message, steps_from_messages, tools_from_json};
use locum_core::model::{read_gguf, write_tiny, Config, Model};
use locum_core::store::json;
use serde_json::{json, Value};

/// Far above what any case may take on a busy machine.
const SLOW: Duration = Duration::from_secs(20);
/// What breaks parsers.
const NASTY: [&[u8]; 22] = [
    b"\0",
    b"\xff",
    b"\xc3\x28",
    b"\xed\xa0\x80",
    b"\xef\xbb\xbf",
    b"\\ud800",
    b"\\u0000",
    b"-1",
    b"1e999",
    b"NaN",
    b"null",
    b"9223372036854775808",
    b"18446744073709551615",
    b"{\"a\":",
    b"[[[[[[[[",
    b"\"\"",
    b"{}",
    b"[]",
    b"\"\\",
    b"2147483648",
    b"0.0000000000000000000000000000000000000000000001",
    b"true",
];
const NUMBERS: [u64; 8] = [0, 1, 7, u64::MAX, 1 << 31, 1 << 63, 1 << 40, 100_000_001];

/// Numbers that follow from a seed.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() >> 11) as usize % n.max(1)
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }

    /// Some bytes of it changed, cut, doubled, or replaced by what breaks parsers.
    fn mutate(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut out = bytes.to_vec();
        for _ in 0..1 + self.below(4) {
            let at = self.below(out.len() + 1);
            let to = (at + 1 + self.below(16)).min(out.len()).max(at);
            match self.below(6) {
                0 if at < out.len() => out[at] ^= 1 << self.below(8),
                1 => out.truncate(at),
                2 => {
                    let nasty = self.pick(&NASTY);
                    out.splice(at..to, nasty.iter().copied());
                }
                3 => {
                    let piece = out[at..to].repeat(8);
                    out.splice(at..at, piece);
                }
                4 if at + 8 <= out.len() => {
                    let number = self.pick(&NUMBERS);
                    out[at..at + 8].copy_from_slice(&number.to_le_bytes());
                }
                _ => {
                    out.drain(at..to);
                }
            }
        }
        out
    }

    /// Any JSON value of at most this depth.
    fn value(&mut self, depth: usize) -> Value {
        let words = [
            "",
            "object",
            "string",
            "integer",
            "\u{0}",
            "\u{feff}",
            "é\u{200b}",
            "$ref",
            "enum",
        ];
        let names = [
            "type",
            "properties",
            "required",
            "items",
            "enum",
            "const",
            "pattern",
            "anyOf",
            "a",
            "additionalProperties",
            "role",
            "content",
            "tool_calls",
            "function",
            "name",
            "id",
            "arguments",
            "text",
            "$ref",
            "minimum",
            "maxLength",
            "minItems",
        ];
        match self.below(if depth == 0 { 6 } else { 8 }) {
            0 => Value::Null,
            1 => json!(self.below(2) == 0),
            2 => json!(self.next() as i64),
            3 => json!(f64::from_bits(self.next())),
            4 => json!(self.pick(&words)),
            5 => json!("x".repeat(self.below(2000))),
            6 => (0..self.below(5)).map(|_| self.value(depth - 1)).collect(),
            _ => (0..self.below(6))
                .map(|_| (self.pick(&names).to_owned(), self.value(depth - 1)))
                .collect(),
        }
    }
}

fn asked(name: &str, otherwise: usize) -> usize {
    let given = std::env::var(name).ok();
    given.and_then(|n| n.parse().ok()).unwrap_or(otherwise)
}

/// Runs so many cases, times what is asked for, and names the one that panics or takes too long.
fn cases(what: &str, each: usize, mut case: impl FnMut(&mut Dice)) {
    let n = asked("LOCUM_FUZZ_CASES", 1) * each;
    let first = asked("LOCUM_FUZZ_SEED", 1) as u64;
    let mut slowest = Duration::ZERO;
    for i in 0..n as u64 {
        let seed = first.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(i);
        let mut dice = Dice(seed.wrapping_mul(2) | 1);
        for _ in 0..4 {
            dice.next();
        }
        let begin = Instant::now();
        let done = catch_unwind(AssertUnwindSafe(|| case(&mut dice)));
        let took = begin.elapsed();
        assert!(done.is_ok(), "{what}: case {i} of seed {first} panicked");
        assert!(
            took < SLOW,
            "{what}: case {i} of seed {first} took {took:?}"
        );
        slowest = slowest.max(took);
    }
    let slowest = slowest.as_secs_f64() * 1e3;
    println!("{what}: {n} cases, the slowest {slowest:.1} ms");
}

#[test]
fn any_bytes_are_a_step_or_an_error() {
    let call = json!({"id": "c", "type": "function", "function": {"name": "act", "arguments": "{\"a\": [1, 2]}"}});
    let messages = [
        json!({"role": "user", "content": [{"type": "text", "text": "a \u{1F600}"}]}).to_string(),
        json!({"role": "assistant", "content": null, "tool_calls": [call]}).to_string(),
        json!({"role": "tool", "tool_call_id": "c", "content": "done", "name": "act"}).to_string(),
    ];
    cases("step JSON", 4000, |dice| {
        let text = &messages[dice.below(3)];
        let bytes = dice.mutate(text.as_bytes());
        if let Ok(value) = json::parse(&bytes, 64) {
            let _ = piece_from_message(&value);
            // What was read prints, and reads to the same.
            let again = json::parse(json::print(&value).as_bytes(), 64).unwrap();
            assert_eq!(again, value);
        }
    });
    cases("messages of any shape", 4000, |dice| {
        let value = dice.value(4);
        let _ = piece_from_message(&value);
        let _ = steps_from_messages(&[value.clone(), value]);
    });
}

#[test]
fn the_limits_of_step_json_are_the_named_ones() {
    let nested = |n: usize| format!("{}1{}", "[".repeat(n), "]".repeat(n));
    let deepest = (1..200).filter(|n| json::parse(nested(*n).as_bytes(), 64).is_ok());
    assert!((63..=65).contains(&deepest.max().unwrap()));
    let begin = Instant::now();
    assert!(json::parse(nested(1_000_000).as_bytes(), 64).is_err());
    assert!(json::parse("{\"a\":".repeat(1_000_000).as_bytes(), 64).is_err());
    assert!(begin.elapsed() < Duration::from_secs(2));
    for (bytes, why) in [
        (&b"\"\xff\xfe\""[..], "invalid UTF-8"),
        (b"\"\xed\xa0\x80\"", "a surrogate in UTF-8"),
        (b"\"\\ud800\"", "a lone surrogate"),
        (b"\"\\udc00\\ud800\"", "surrogates the wrong way round"),
        (b"\"a\nb\"", "a bare control character"),
        (b"\"\0\"", "a bare NUL"),
        (b"{\"a\":1,}", "a comma too many"),
        (b"1e999", "a number that is none"),
        (b"", "nothing"),
    ] {
        assert!(json::parse(bytes, 64).is_err(), "{why} was read");
    }
    // An escaped NUL is a character like any other in content.
    assert_eq!(json::parse(b"\"\\u0000\"", 64).unwrap(), json!("\0"));
}

#[test]
fn a_changed_weights_file_is_an_error_or_a_model() {
    let dir = tempfile::tempdir().unwrap();
    write_tiny(dir.path(), 1).unwrap();
    let path = dir.path().join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    let header = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize + 8;
    cases("safetensors header", 400, |dice| {
        let mut bytes = dice.mutate(&whole[..header]);
        bytes.extend_from_slice(&whole[header..]);
        fs::write(&path, &bytes).unwrap();
        let _ = Model::load(dir.path());
    });
    cases("safetensors file", 200, |dice| {
        fs::write(&path, dice.mutate(&whole)).unwrap();
        let _ = Model::load(dir.path());
    });
}

/// A tiny model's folder whose weights file is written by parts.
struct Weights {
    dir: tempfile::TempDir,
    whole: Vec<u8>,
    /// Bytes of the header.
    n: usize,
    header: Value,
}

impl Weights {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        write_tiny(dir.path(), 1).unwrap();
        let whole = fs::read(dir.path().join("model.safetensors")).unwrap();
        let n = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
        let header = serde_json::from_slice(&whole[8..8 + n]).unwrap();
        Self {
            dir,
            whole,
            n,
            header,
        }
    }

    fn path(&self) -> std::path::PathBuf {
        self.dir.path().join("model.safetensors")
    }

    fn data(&self) -> &[u8] {
        &self.whole[8 + self.n..]
    }

    fn refused(&self, header: &Value, data: &[u8]) -> String {
        let text = header.to_string();
        let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.extend(text.as_bytes());
        bytes.extend_from_slice(data);
        self.refused_bytes(&bytes)
    }

    fn refused_bytes(&self, bytes: &[u8]) -> String {
        fs::write(self.path(), bytes).unwrap();
        match Model::load(self.dir.path()) {
            Ok(_) => panic!("{} bytes were loaded", bytes.len()),
            Err(error) => {
                let folder = self.dir.path().display().to_string();
                error.to_string().replace(&folder, "…")
            }
        }
    }
}

#[test]
fn overlaps_holes_wild_shapes_and_numbers_that_are_none_are_refused() {
    let weights = Weights::new();
    let name = "model.norm.weight";
    let change = |edit: &dyn Fn(&mut Value)| {
        let mut changed = weights.header.clone();
        edit(&mut changed[name]);
        changed
    };
    let ends = weights.header[name]["data_offsets"].clone();
    let (from, to) = (ends[0].as_u64().unwrap(), ends[1].as_u64().unwrap());
    let big = 1u64 << 32;
    for (what, changed) in [
        (
            "an overlap",
            change(&|t| t["data_offsets"] = json!([from - 16.min(from), to - 16.min(from)])),
        ),
        (
            "a hole",
            change(&|t| t["data_offsets"] = json!([from + 16, to + 16])),
        ),
        (
            "an end before its beginning",
            change(&|t| t["data_offsets"] = json!([to, from])),
        ),
        (
            "a shape of 2^63",
            change(&|t| t["shape"] = json!([1u64 << 63, 2])),
        ),
        (
            "a shape whose product overflows",
            change(&|t| t["shape"] = json!([big, big, big])),
        ),
        ("a negative size", change(&|t| t["shape"] = json!([-1]))),
        ("an unknown type", change(&|t| t["dtype"] = json!("F7"))),
        ("another type", change(&|t| t["dtype"] = json!("I32"))),
    ] {
        let error = weights.refused(&changed, weights.data());
        assert!(!error.is_empty() && error.len() < 2000, "{what}: {error}");
        println!("{what}: {error}");
    }
    let mut missing = weights.header.clone();
    missing.as_object_mut().unwrap().remove(name);
    weights.refused(&missing, weights.data());
    for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut data = weights.data().to_vec();
        data[from as usize..from as usize + 4].copy_from_slice(&odd.to_le_bytes());
        let error = weights.refused(&weights.header, &data);
        assert!(error.contains(name), "{error}");
    }
    let (whole, n) = (&weights.whole, weights.n);
    for cut in [0, 1, 7, 8, 9, n, n + 8, whole.len() / 2, whole.len() - 1] {
        weights.refused_bytes(&whole[..cut]);
    }
    // A header that claims to be larger than memory.
    let mut huge = u64::MAX.to_le_bytes().to_vec();
    huge.extend_from_slice(&whole[8..]);
    weights.refused_bytes(&huge);
    fs::write(weights.path(), whole).unwrap();
    Model::load(weights.dir.path()).unwrap();
}

#[test]
fn a_file_that_shrinks_while_it_is_read_is_an_error_and_no_signal() {
    let weights = Weights::new();
    let (path, whole) = (weights.path(), &weights.whole);
    let stop = AtomicBool::new(false);
    let (mut read, mut refused) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut dice = Dice(5);
            while !stop.load(Ordering::Relaxed) {
                let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
                let _ = file.set_len(dice.below(whole.len()) as u64);
                fs::write(&path, whole).unwrap();
            }
        });
        for _ in 0..300 {
            match Model::load(weights.dir.path()) {
                Ok(_) => read += 1,
                Err(_) => refused += 1,
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    println!("a file that shrinks and grows: {read} times whole, {refused} times refused");
    assert!(refused > 0, "it was never met half written");
}

#[test]
fn any_config_is_a_shape_or_an_error() {
    let dir = tempfile::tempdir().unwrap();
    write_tiny(dir.path(), 1).unwrap();
    let path = dir.path().join("config.json");
    let raw: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let fields: Vec<String> = raw.as_object().unwrap().keys().cloned().collect();
    cases("config.json by field", 4000, |dice| {
        let mut changed = raw.clone();
        for _ in 0..1 + dice.below(3) {
            let field = &fields[dice.below(fields.len())];
            changed[field] = match dice.below(3) {
                0 => dice.value(2),
                1 => json!(dice.pick(&NUMBERS)),
                _ => json!(dice.pick(&[-1.0, 0.5, 1e300, f64::MIN_POSITIVE])),
            };
        }
        let _ = Config::from_json(&changed);
    });
    cases("config.json with its weights", 300, |dice| {
        fs::write(&path, dice.mutate(raw.to_string().as_bytes())).unwrap();
        let _ = Model::load(dir.path());
    });
}

fn uses(tokenizer: &Tokenizer, text: &str) {
    let ids = tokenizer.encode(text, false);
    let _ = tokenizer.decode(&ids);
}

#[test]
fn any_tokenizer_file_is_a_tokenizer_or_an_error() {
    let dir = tempfile::tempdir().unwrap();
    write_tiny(dir.path(), 1).unwrap();
    let path: &Path = &dir.path().join("tokenizer.json");
    let text = fs::read(path).unwrap();
    cases("tokenizer.json as bytes", 200, |dice| {
        fs::write(path, dice.mutate(&text)).unwrap();
        if let Ok(tokenizer) = Tokenizer::from_file(path) {
            uses(&tokenizer, "a small text, é");
        }
    });
    let raw: Value = serde_json::from_slice(&text).unwrap();
    let places = [
        "/model/type",
        "/model/vocab",
        "/model/merges",
        "/model/unk_token",
        "/model/byte_fallback",
        "/pre_tokenizer",
        "/pre_tokenizer/type",
        "/decoder",
        "/normalizer",
        "/added_tokens",
        "/added_tokens/0/id",
        "/added_tokens/0/content",
        "/post_processor",
    ];
    cases("tokenizer.json by field", 600, |dice| {
        let mut changed = raw.clone();
        if let Some(field) = changed.pointer_mut(dice.pick(&places)) {
            *field = match dice.below(3) {
                0 => json!([["a", "b"], ["", ""]]),
                1 => {
                    json!({"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": false})
                }
                _ => dice.value(3),
            };
        }
        if let Ok(tokenizer) = Tokenizer::from_json(changed) {
            uses(&tokenizer, &"a".repeat(2000));
        }
    });
}

#[test]
fn any_bytes_are_a_gguf_file_or_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.gguf");
    fn text(out: &mut Vec<u8>, s: &str) {
        out.extend((s.len() as u64).to_le_bytes());
        out.extend(s.as_bytes());
    }
    // Magic, version, one tensor, two fields; then the fields (a text, and a list of texts) and the tensor.
    let mut whole = b"GGUF".to_vec();
    whole.extend(3u32.to_le_bytes());
    whole.extend(1u64.to_le_bytes());
    whole.extend(2u64.to_le_bytes());
    text(&mut whole, "general.architecture");
    whole.extend(8u32.to_le_bytes());
    text(&mut whole, "llama");
    text(&mut whole, "tokenizer.ggml.tokens");
    for kind in [9u32, 8] {
        whole.extend(kind.to_le_bytes());
    }
    whole.extend(2u64.to_le_bytes());
    text(&mut whole, "a");
    text(&mut whole, "b");
    text(&mut whole, "token_embd.weight");
    whole.extend(2u32.to_le_bytes());
    for size in [32u64, 2] {
        whole.extend(size.to_le_bytes());
    }
    whole.extend(0u32.to_le_bytes());
    whole.extend(0u64.to_le_bytes());
    whole.resize(whole.len().div_ceil(32) * 32 + 256, 0);
    cases("GGUF", 4000, |dice| {
        fs::write(&path, dice.mutate(&whole)).unwrap();
        let _ = read_gguf(&path);
    });
}

#[test]
fn any_tool_is_a_grammar_or_refused() {
    let chat = Chat::byte_level();
    let try_one = |parameters: Value| {
        let options = GrammarOptions {
            allow_text: true,
            max_calls: 1,
            require_call: false,
        };
        let function = json!({"name": "act", "description": "x", "parameters": parameters});
        let tools = json!([{"type": "function", "function": function}]);
        let Ok(tools) = tools_from_json(&tools) else {
            return;
        };
        let Ok(format) = CallFormat::new(&tools) else {
            return;
        };
        if let Ok(lark) = format.lark(options) {
            if let Ok(mut grammar) = chat.grammar(&lark) {
                let _ = grammar.allowed();
            }
        }
    };
    cases("tool schemas of any shape", 400, |dice| {
        try_one(dice.value(5))
    });
    let schema = json!({"type": "object", "properties": {
        "to": {"type": "string", "pattern": "^[a-z]+$", "maxLength": 5},
        "n": {"type": "integer", "minimum": 1, "maximum": 9},
        "of": {"enum": ["a", "b"]},
        "l": {"type": "array", "items": {"type": "number"}}}, "required": ["to"]});
    cases("a tool's schema as bytes", 500, |dice| {
        let bytes = dice.mutate(schema.to_string().as_bytes());
        if let Ok(parameters) = json::parse(&bytes, 64) {
            try_one(parameters);
        }
    });
    let begin = Instant::now();
    for pattern in [
        "(a+)+$",
        "(a|a)*b",
        "^(?=a)b",
        "a{1,100000}",
        "((((((((((a*)*)*)*)*)*)*)*)*)*)*",
        "(a{1,1000}){1,1000}",
        "[",
        "\\",
        "(?<!x)y",
        "\u{0}",
    ] {
        let text = json!({"type": "string", "pattern": pattern});
        try_one(json!({"type": "object", "properties": {"p": text}, "required": ["p"]}));
    }
    assert!(begin.elapsed() < SLOW, "{:?}", begin.elapsed());
    let function = json!({"name": "act", "parameters": schema});
    let tools = json!([{"type": "function", "function": function}]);
    let format = CallFormat::new(&tools_from_json(&tools).unwrap()).unwrap();
    let replies = [
        "act(",
        "act(abc)act(2)",
        "act(\"",
        "",
        "act(abc, 3, a, [1]) trailing",
        "<|im_end|>",
    ];
    cases("replies of a student", 4000, |dice| {
        let text = dice.mutate(dice_text(&replies, dice.0).as_bytes());
        if let Ok(reply) = format.parse_reply(&String::from_utf8_lossy(&text)) {
            // Whatever was read as a call is held against the schema before it leaves.
            for call in &reply.calls {
                let _ = format.validate(call);
            }
        }
    });
}

fn dice_text<'a>(of: &[&'a str], n: u64) -> &'a str {
    of[n as usize % of.len()]
}
