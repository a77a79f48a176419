//! Every door through which bytes of others come in, as a function of those bytes: libFuzzer throws at them what it makes up
//! (`tests/fuzz/src/main.rs`), and a test throws again what it found worth keeping (`tests/corpus.rs`). A door panics where a
//! promise is broken; that bytes are refused is no such case.

use std::fs;
use std::path::PathBuf;
use std::sync::OnceLock;

use locum_core::calls::{CallFormat, GrammarOptions};
use locum_core::chat::{Chat, Template, Tokenizer};
use locum_core::formats::{
    export_openai, import, messages_from_steps, piece_from_message, tools_from_json, Taken,
};
use locum_core::model::{read_gguf, write_tiny, Config, Model};
use locum_core::policy::{Policy, RedactInfo, StepInfo};
use locum_core::registry::Registry;
use locum_core::secrets::{clean, find, Detect};
use locum_core::store::json;
use locum_lua::{LuaPolicy, PolicyOptions};
use serde_json::{json, Value};

/// A name and what is done with the bytes.
pub type Door = (&'static str, fn(&[u8]));

pub const DOORS: [Door; 12] = [
    ("step", step),
    ("episodes", episodes),
    ("safetensors", safetensors),
    ("config", config),
    ("tokenizer", tokenizer),
    ("template", template),
    ("gguf", gguf),
    ("tools", tools),
    ("reply", reply),
    ("secrets", secrets),
    ("registry", registry),
    ("policy", policy),
];

/// A tiny model's folder, and what its files held before anybody changed them.
struct Scene {
    dir: PathBuf,
    /// Of the weights: everything behind the header.
    data: Vec<u8>,
    _removed_at_the_end: tempfile::TempDir,
}

fn scene() -> &'static Scene {
    static SCENE: OnceLock<Scene> = OnceLock::new();
    SCENE.get_or_init(|| {
        let owner = tempfile::tempdir().expect("a folder for temporary files");
        let dir = owner.path().join("model");
        write_tiny(&dir, 1).expect("a tiny model is written");
        let whole = fs::read(dir.join("model.safetensors")).expect("its weights");
        let header = u64::from_le_bytes(whole[..8].try_into().expect("eight bytes")) as usize;
        Scene {
            dir,
            data: whole[8 + header..].to_vec(),
            _removed_at_the_end: owner,
        }
    })
}

/// Writes a file of the scene, and gives its path.
fn written(name: &str, bytes: &[u8]) -> PathBuf {
    let path = scene().dir.join(name);
    fs::write(&path, bytes).expect("a temporary file is written");
    path
}

/// One chat message. What is read prints, and reads to the same.
fn step(bytes: &[u8]) {
    let Ok(value) = json::parse(bytes, 64) else {
        return;
    };
    let again = json::parse(json::print(&value).as_bytes(), 64);
    assert_eq!(again.expect("what was printed is read"), value);
    let _ = piece_from_message(&value);
}

/// A file of recorded episodes, in any of the formats. What came in goes out, and comes in again with as many steps.
fn episodes(bytes: &[u8]) {
    let path = written("episodes.jsonl", bytes);
    let mut all = Vec::new();
    let _ = import(&path, None, &mut |episode| {
        all.push(episode);
        Ok(Taken::Stored)
    });
    for episode in all {
        let messages = messages_from_steps(&episode.steps);
        let line = export_openai(&episode, true).line;
        assert!(line.is_object() && messages.len() >= episode.steps.len().min(1));
    }
}

/// The header of a weights file, before weights of the right size.
fn safetensors(bytes: &[u8]) {
    let whole = [bytes, &scene().data].concat();
    written("model.safetensors", &whole);
    let _ = Model::load(&scene().dir);
}

fn config(bytes: &[u8]) {
    if let Ok(raw) = json::parse(bytes, 64) {
        let _ = Config::from_json(&raw);
        written("config.json", bytes);
        let _ = Model::load(&scene().dir);
    }
}

fn tokenizer(bytes: &[u8]) {
    if let Ok(tokenizer) = Tokenizer::from_file(&written("tokenizer.json", bytes)) {
        let ids = tokenizer.encode("a small text, \u{e9}\u{1f600} <|im_end|>", true);
        assert!(ids.iter().all(|id| (*id as usize) < tokenizer.vocab_size()));
        let _ = tokenizer.decode(&ids);
    }
}

/// A chat template, which comes with a model.
fn template(bytes: &[u8]) {
    let source = String::from_utf8_lossy(bytes);
    if let Ok(template) = Template::from_source(&source, "<s>", "</s>") {
        let messages =
            json!([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]);
        let _ = template.render(messages.as_array().expect("a list"), true);
    }
}

fn gguf(bytes: &[u8]) {
    let _ = read_gguf(&written("x.gguf", bytes));
}

fn chat() -> &'static Chat {
    static CHAT: OnceLock<Chat> = OnceLock::new();
    CHAT.get_or_init(Chat::byte_level)
}

/// A list of tools, or one tool's parameters; and the grammar that is made of them.
fn tools(bytes: &[u8]) {
    let Ok(value) = json::parse(bytes, 64) else {
        return;
    };
    let list = match value {
        Value::Array(_) => value,
        parameters => {
            json!([{"type": "function", "function": {"name": "act", "parameters": parameters}}])
        }
    };
    let Ok(format) = tools_from_json(&list).map(|tools| CallFormat::new(&tools)) else {
        return;
    };
    let options = GrammarOptions {
        allow_text: true,
        max_calls: 1,
        require_call: false,
    };
    if let Ok(lark) = format.and_then(|format| format.lark(options)) {
        if let Ok(mut grammar) = chat().grammar(&lark) {
            let _ = grammar.allowed();
        }
    }
}

/// A student's reply. What is read as a call is held against its schema.
fn reply(bytes: &[u8]) {
    static FORMAT: OnceLock<CallFormat> = OnceLock::new();
    let format = FORMAT.get_or_init(|| {
        let parameters = json!({"type": "object", "properties": {
            "to": {"type": "string", "pattern": "^[a-z]+$", "maxLength": 5},
            "n": {"type": "integer", "minimum": 1, "maximum": 9},
            "of": {"enum": ["a", "b"]},
            "l": {"type": "array", "items": {"type": "number"}}}, "required": ["to"]});
        let list =
            json!([{"type": "function", "function": {"name": "act", "parameters": parameters}}]);
        let tools = tools_from_json(&list).expect("a tool");
        CallFormat::new(&tools).expect("a format")
    });
    if let Ok(reply) = format.parse_reply(&String::from_utf8_lossy(bytes)) {
        for call in &reply.calls {
            if format.validate(call).is_ok() {
                assert!(call.arguments["to"].is_string(), "{call:?}");
            }
        }
    }
}

/// Text with secrets. They are found in order, within characters, and are gone at once.
fn secrets(bytes: &[u8]) {
    let mut text = String::from_utf8_lossy(bytes).into_owned();
    let mut end = 0;
    for found in find(&text, Detect::ALL) {
        assert!(found.range.start >= end && found.range.start < found.range.end);
        assert!(text.get(found.range.clone()).is_some());
        end = found.range.end;
    }
    let mut kinds = Vec::new();
    clean(&mut text, Detect::ALL, &mut kinds);
    let once = text.clone();
    clean(&mut text, Detect::ALL, &mut kinds);
    assert_eq!(text, once, "a second call changed something");
}

/// The registry's own files, changed by somebody else: a student's manifest, or by the first byte the pointer to the one that serves.
fn registry(bytes: &[u8]) {
    let Some((which, rest)) = bytes.split_first() else {
        return;
    };
    let store = scene().dir.join("store");
    fs::create_dir_all(&store).expect("a folder");
    let registry = Registry::open(&store).expect("a registry");
    let student = registry.student_dir("0123456789abcdef");
    fs::create_dir_all(&student).expect("a folder");
    let path = match which % 2 {
        0 => student.join("locum.json"),
        _ => student.parent().expect("a folder").join("current.json"),
    };
    fs::write(path, rest).expect("a file");
    let _ = (registry.list_all(), registry.current(), registry.previous());
    let _ = registry.next_version();
    if let Ok((students, _)) = registry.list_all() {
        for manifest in students {
            // There are no weights, so it must be refused.
            assert!(registry.load(manifest.version).is_err());
        }
    }
}

fn policy(bytes: &[u8]) {
    let options = PolicyOptions {
        states: 1,
        selftest: false,
        ..PolicyOptions::default()
    };
    let source = String::from_utf8_lossy(bytes);
    match LuaPolicy::from_source(&source, "fuzz.lua", options) {
        Ok(policy) => {
            policy.decide(&StepInfo::default());
            let _ = policy.redact(&RedactInfo {
                content: "a@b.de 4111 1111 1111 1111".into(),
                ..RedactInfo::default()
            });
        }
        Err(error) => assert!(!error.to_string().contains('\n'), "{error}"),
    }
}
