//! A chat as files: the Hugging Face folder, and the metadata of a GGUF file.

use std::collections::HashMap;
use std::fs;
use std::io::{Read, Write};
use std::path::Path;

use candle_core::quantized::gguf_file;
use serde_json::{json, Map, Value};

use super::{Chat, ChatError, Template, Tokenizer};
use crate::limits::MAX_CONFIG_BYTES;

impl Chat {
    /// Opens a Hugging Face folder: `tokenizer.json`, the template of `chat_template.jinja` or `tokenizer_config.json`, and
    /// the end tokens of `generation_config.json` if there is one.
    ///
    /// # Errors
    /// A file that is missing, too large or malformed, by its path; a tokenizer or template that is not supported.
    pub fn load(dir: &Path) -> Result<Chat, ChatError> {
        let tokenizer = Tokenizer::from_file(&dir.join("tokenizer.json"))?;
        let config_path = dir.join("tokenizer_config.json");
        let config = read_object(&config_path)?.unwrap_or_default();
        let special = read_object(&dir.join("special_tokens_map.json"))?.unwrap_or_default();
        let token = |key: &str| -> String {
            let text = |map: &Map<String, Value>| {
                let value = map.get(key)?;
                value
                    .as_str()
                    .or_else(|| value.get("content")?.as_str())
                    .map(str::to_string)
            };
            text(&config).or_else(|| text(&special)).unwrap_or_default()
        };
        let jinja_path = dir.join("chat_template.jinja");
        let source = match fs::exists(&jinja_path).unwrap_or(false) {
            true => String::from_utf8(read(&jinja_path, MAX_CONFIG_BYTES)?).map_err(|e| {
                ChatError::BadFile {
                    path: jinja_path,
                    problem: e.to_string(),
                }
            })?,
            false => template_of(&config).ok_or_else(|| {
                ChatError::Template(format!(
                    "{} has no chat_template and there is no chat_template.jinja beside it",
                    config_path.display()
                ))
            })?,
        };
        let mut eos: Vec<u32> = Vec::new();
        if let Some(generation) = read_object(&dir.join("generation_config.json"))? {
            match generation.get("eos_token_id") {
                Some(Value::Array(ids)) => {
                    eos.extend(ids.iter().filter_map(Value::as_u64).map(|id| id as u32))
                }
                Some(id) => eos.extend(id.as_u64().map(|id| id as u32)),
                None => {}
            }
        }
        eos.extend(tokenizer.special_id(&token("eos_token")));
        let template = Template::from_source(&source, &token("bos_token"), &token("eos_token"))?;
        let mut chat = Chat::new(tokenizer, template, &eos)?;
        chat.config.extend(config);
        Ok(chat)
    }

    /// Rebuilds tokenizer and template from a GGUF file's metadata.
    ///
    /// # Errors
    /// As [`Tokenizer::from_gguf`]; [`ChatError::Template`] if the file has no template.
    pub fn from_gguf(metadata: &HashMap<String, gguf_file::Value>) -> Result<Chat, ChatError> {
        let tokenizer = Tokenizer::from_gguf(metadata)?;
        let id = |key: &str| {
            metadata
                .get(key)
                .and_then(|v| v.to_u32().ok())
                .filter(|id| (*id as usize) < tokenizer.vocab_size())
        };
        let name = |id: Option<u32>| id.map(|id| tokenizer.decode(&[id])).unwrap_or_default();
        let bos = name(id("tokenizer.ggml.bos_token_id"));
        let eos_id = id("tokenizer.ggml.eos_token_id");
        let eos = name(eos_id);
        let pad = name(id("tokenizer.ggml.padding_token_id"));
        let unknown = name(id("tokenizer.ggml.unknown_token_id"));
        let Some(source) = metadata
            .get("tokenizer.chat_template")
            .and_then(|v| v.to_string().ok())
        else {
            return Err(ChatError::Template(
                "the GGUF file has no tokenizer.chat_template".into(),
            ));
        };
        let template = Template::from_source(source, &bos, &eos)?;
        let eos_ids: Vec<u32> = eos_id.into_iter().collect();
        let mut chat = Chat::new(tokenizer, template, &eos_ids)?;
        for (key, token) in [("pad_token", pad), ("unk_token", unknown)] {
            if !token.is_empty() {
                chat.config.insert(key.into(), token.into());
            }
        }
        Ok(chat)
    }

    /// Writes `tokenizer.json`, `tokenizer_config.json` (with the template), `special_tokens_map.json` and
    /// `generation_config.json` into `dir`, which must exist: a folder that transformers' `AutoTokenizer` opens.
    ///
    /// # Errors
    /// [`ChatError::File`].
    pub fn save(&self, dir: &Path) -> Result<(), ChatError> {
        self.tokenizer.save(dir)?;
        let mut config = self.config.clone();
        config.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
        config.insert("chat_template".into(), self.template.source().into());
        config.insert("clean_up_tokenization_spaces".into(), false.into());
        config
            .entry("model_max_length")
            .or_insert_with(|| crate::limits::MAX_PROMPT_TOKENS.into());
        // Names of tokenizer classes' own files and code do not apply to the class named above.
        for key in ["auto_map", "vocab_file", "merges_file", "tokenizer_file"] {
            config.remove(key);
        }
        let mut special = Map::new();
        let mut generation = Map::new();
        for key in ["bos_token", "eos_token", "pad_token", "unk_token"] {
            let Some(value) = config.get(key).filter(|v| !v.is_null()) else {
                continue;
            };
            special.insert(key.into(), value.clone());
            let name = value
                .as_str()
                .or_else(|| value.get("content")?.as_str())
                .unwrap_or("");
            if let Some(id) = self
                .tokenizer
                .special_id(name)
                .filter(|_| key != "unk_token")
            {
                generation.insert(format!("{key}_id"), id.into());
            }
        }
        let eos = if self.eos_ids.len() == 1 {
            json!(self.eos_ids[0])
        } else {
            json!(self.eos_ids)
        };
        generation.insert("eos_token_id".into(), eos);
        for (name, object) in [
            ("tokenizer_config.json", config),
            ("special_tokens_map.json", special),
            ("generation_config.json", generation),
        ] {
            let text = format!("{:#}\n", Value::Object(object));
            write(&dir.join(name), text.as_bytes())?;
        }
        Ok(())
    }
}

/// The template of `tokenizer_config.json`: a text, or the one named `default` of a list.
fn template_of(config: &Map<String, Value>) -> Option<String> {
    match config.get("chat_template")? {
        Value::String(source) => Some(source.clone()),
        Value::Array(list) => list
            .iter()
            .find(|t| t.get("name").and_then(Value::as_str) == Some("default"))
            .and_then(|t| t.get("template")?.as_str().map(str::to_string)),
        _ => None,
    }
}

/// A JSON object, or `None` if the file does not exist.
fn read_object(path: &Path) -> Result<Option<Map<String, Value>>, ChatError> {
    let bytes = match read(path, MAX_CONFIG_BYTES) {
        Err(ChatError::File { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            return Ok(None)
        }
        other => other?,
    };
    let bad = |problem: String| ChatError::BadFile {
        path: path.into(),
        problem,
    };
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|e| bad(e.to_string()))
}

/// Reads a whole file that must not be larger than `limit`.
pub(super) fn read(path: &Path, limit: u64) -> Result<Vec<u8>, ChatError> {
    let fail = |source| ChatError::File {
        path: path.into(),
        source,
    };
    let file = fs::File::open(path).map_err(fail)?;
    let found = file.metadata().map_err(fail)?.len();
    if found > limit {
        return Err(ChatError::TooLarge {
            path: path.into(),
            found,
            limit,
        });
    }
    let mut bytes = Vec::with_capacity(found as usize);
    // The file may grow while it is read, and a pipe has no length.
    file.take(limit + 1).read_to_end(&mut bytes).map_err(fail)?;
    if bytes.len() as u64 > limit {
        return Err(ChatError::TooLarge {
            path: path.into(),
            found: bytes.len() as u64,
            limit,
        });
    }
    Ok(bytes)
}

/// Writes a temporary sibling, syncs it and renames it, so that a reader never sees half a file.
pub(super) fn write(path: &Path, bytes: &[u8]) -> Result<(), ChatError> {
    let fail = |source| ChatError::File {
        path: path.into(),
        source,
    };
    let temporary = path.with_extension("partial");
    let mut new = fs::OpenOptions::new();
    new.write(true).create(true).truncate(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut new, 0o600);
    let mut file = new.open(&temporary).map_err(fail)?;
    file.write_all(bytes)
        .and_then(|()| file.sync_all())
        .map_err(fail)?;
    fs::rename(&temporary, path).map_err(fail)
}
