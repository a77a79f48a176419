//! Bases: models brought in from GGUF files and Hugging Face folders.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::folder::{self, lock, read, sweep, weights_digest, Temporary};
use super::{check_chat, check_vocabulary, now_ms, RegistryError, BASES};
use crate::chat::Chat;
use crate::limits::{MAX_CONFIG_BYTES, MAX_MODEL_BYTES};
use crate::model::{
    read_config, read_gguf, write_atomically, FileDtype, Model, ModelError, ParamId,
};

const SCHEMA: &str = "locum-base/1";
const FILE: &str = "locum-base.json";
const DEFAULT: &str = "default";
/// Longest name of a base, in bytes; it is a folder's name.
const MAX_NAME: usize = 128;

/// `locum-base.json`. Digests are SHA-256 in hex.
#[derive(Debug, Serialize, Deserialize)]
struct Imported {
    schema: String,
    /// Name of the file or folder that it came from.
    source: String,
    weights_sha256: String,
    chat_digest: String,
    imported_at_ms: u64,
}

/// A base, for lists.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseSummary {
    pub name: String,
    /// As in `config.json`: `LlamaForCausalLM`.
    pub architecture: String,
    pub num_hidden_layers: usize,
    pub parameters: u64,
    /// Of all its files.
    pub bytes: u64,
    /// Students start here.
    pub default: bool,
}

/// Brings a model into the store as `base/NAME`: a GGUF file, or a Hugging Face folder, of a Llama- or Qwen3-type decoder.
/// Weights are rounded to bf16. The first base becomes the default. One that is there already is not written again.
///
/// `name` is made from the source's name if it is not given. Takes memory for all weights as `f32`.
///
/// # Errors
/// Whatever keeps the model from being run says so: not a GGUF file, another architecture, tokenizer or template, a damaged
/// tensor. [`RegistryError::BaseTaken`] if another model has the name. Nothing is left in the store then.
pub fn import_base(
    store_dir: &Path,
    source: &Path,
    name: Option<&str>,
) -> Result<BaseSummary, RegistryError> {
    let name = match name {
        Some(name) => name.to_string(),
        None => name_of(source),
    };
    check_name(&name)?;
    let data = fs::metadata(source).map_err(|e| RegistryError::io(source, e))?;
    let found = if data.is_dir() {
        folder::bytes(source)
    } else {
        data.len()
    };
    if found > MAX_MODEL_BYTES {
        return Err(RegistryError::TooLarge {
            path: source.into(),
            found,
            limit: MAX_MODEL_BYTES,
        });
    }
    let (mut model, chat) = if data.is_dir() {
        (Model::load(source)?, Chat::load(source)?)
    } else {
        let gguf = read_gguf(source).map_err(|error| in_file(source, error))?;
        (
            Model::new(gguf.config, gguf.weights)?,
            Chat::from_gguf(&gguf.metadata)?,
        )
    };
    check_vocabulary(&model, &chat)?;
    model.round_to_bf16();

    let bases = store_dir.join(BASES);
    sweep(&bases);
    let temporary = Temporary::new(&bases)?;
    let dir = temporary.path();
    model.save(dir, FileDtype::Bf16)?;
    drop(model);
    chat.save(dir)?;
    let imported = Imported {
        schema: SCHEMA.into(),
        source: source
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned(),
        weights_sha256: weights_digest(dir)?,
        chat_digest: chat.digest(),
        imported_at_ms: now_ms(),
    };
    // What was written must be what was read, or the base could not be loaded tomorrow.
    read_config(dir)?;
    check_chat(dir, &Chat::load(dir)?, &imported.chat_digest)?;
    write_atomically(
        &dir.join(FILE),
        format!("{:#}\n", json!(imported)).as_bytes(),
    )?;

    let to = bases.join(&name);
    let held = lock(&bases)?;
    if to.exists() {
        let there = read_imported(&to)?;
        let both = |i: &Imported| format!("{} {}", i.weights_sha256, i.chat_digest);
        if there.as_ref().map(both) != Some(both(&imported)) {
            let found = there
                .as_ref()
                .map_or_else(|| "of unknown origin".into(), both);
            return Err(RegistryError::BaseTaken {
                dir: to,
                found,
                new: both(&imported),
            });
        }
    } else {
        temporary.publish(&to)?;
    }
    if default_name(store_dir)?.is_none_or(|n| !bases.join(n).is_dir()) {
        write_default(store_dir, &name)?;
    }
    drop(held);
    summary(store_dir, &to)
}

/// What is wrong with a GGUF file, by the file's name and in one line: candle puts a backtrace behind it if one is asked for.
fn in_file(source: &Path, error: ModelError) -> RegistryError {
    let (ModelError::File { why, .. } | ModelError::Tensor { why, .. }) = &error else {
        return error.into();
    };
    let why = why.lines().next().unwrap_or_default().trim_end();
    let why = match &error {
        ModelError::Tensor { name, .. } => format!("tensor {name}: {why}"),
        _ => why.to_string(),
    };
    RegistryError::file(source, why)
}

/// The bases of a store by name; none if it has no such folder. One that cannot be read is left out and named in the log.
pub fn list_bases(store_dir: &Path) -> Result<Vec<BaseSummary>, RegistryError> {
    let mut found = Vec::new();
    for path in folder::children(&store_dir.join(BASES))? {
        match summary(store_dir, &path) {
            Ok(base) => found.push(base),
            Err(why) => {
                tracing::warn!(path = %path.display(), %why, "a base's folder is damaged and left out")
            }
        }
    }
    Ok(found)
}

/// Lets new students start from this base.
///
/// # Errors
/// [`RegistryError::NoBase`].
pub fn set_default_base(store_dir: &Path, name: &str) -> Result<(), RegistryError> {
    match dir(store_dir, Some(name))? {
        Some(_) => write_default(store_dir, name),
        None => Err(RegistryError::NoBase {
            name: name.into(),
            dir: store_dir.join(BASES),
        }),
    }
}

pub(super) fn dir(store_dir: &Path, name: Option<&str>) -> Result<Option<PathBuf>, RegistryError> {
    let bases = store_dir.join(BASES);
    if let Some(name) = name {
        check_name(name)?;
        return Ok(Some(bases.join(name)).filter(|d| d.is_dir()));
    }
    match default_name(store_dir)? {
        Some(name) => match bases.join(&name) {
            path if path.is_dir() => Ok(Some(path)),
            _ => Err(RegistryError::NoBase { name, dir: bases }),
        },
        // An import that was stopped between its last two writes left the only base without the mark.
        None => Ok(Some(folder::children(&bases)?)
            .filter(|all| all.len() == 1)
            .and_then(|mut all| all.pop())),
    }
}

pub(super) fn load(dir: &Path) -> Result<(Model, Chat, String), RegistryError> {
    let (chat, digest) = verify(dir)?;
    let model = Model::load(dir)?;
    check_vocabulary(&model, &chat)?;
    Ok((model, chat, digest))
}

/// Compares a base with what was imported, and gives its chat and the SHA-256 of its weights.
pub(super) fn verify(dir: &Path) -> Result<(Chat, String), RegistryError> {
    let digest = weights_digest(dir)?;
    let chat = Chat::load(dir)?;
    if let Some(imported) = read_imported(dir)? {
        if imported.weights_sha256 != digest {
            let what = "SHA-256 of the weights";
            return Err(RegistryError::Differs {
                path: dir.into(),
                what,
                expected: imported.weights_sha256,
                found: digest,
            });
        }
        check_chat(dir, &chat, &imported.chat_digest)?;
    }
    Ok((chat, digest))
}

fn summary(store_dir: &Path, dir: &Path) -> Result<BaseSummary, RegistryError> {
    let config = read_config(dir)?;
    let name = dir
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let named = config.raw["architectures"][0].as_str().map(str::to_string);
    Ok(BaseSummary {
        default: self::dir(store_dir, None).ok().flatten().as_deref() == Some(dir),
        architecture: named.unwrap_or_else(|| format!("{:?}", config.architecture)),
        num_hidden_layers: config.num_hidden_layers,
        parameters: ParamId::all(&config)
            .iter()
            .map(|id| id.shape(&config).iter().product::<usize>() as u64)
            .sum(),
        bytes: folder::bytes(dir),
        name,
    })
}

/// `None` for a Hugging Face folder that was not imported.
fn read_imported(dir: &Path) -> Result<Option<Imported>, RegistryError> {
    let path = dir.join(FILE);
    match optional(read(&path, MAX_CONFIG_BYTES))? {
        Some(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|e| RegistryError::file(&path, e)),
        None => Ok(None),
    }
}

fn default_name(store_dir: &Path) -> Result<Option<String>, RegistryError> {
    let path = store_dir.join(BASES).join(DEFAULT);
    let Some(bytes) = optional(read(&path, MAX_NAME as u64 + 2))? else {
        return Ok(None);
    };
    let name = String::from_utf8_lossy(&bytes).trim().to_string();
    check_name(&name)?;
    Ok(Some(name))
}

fn write_default(store_dir: &Path, name: &str) -> Result<(), RegistryError> {
    let path = store_dir.join(BASES).join(DEFAULT);
    Ok(write_atomically(&path, format!("{name}\n").as_bytes())?)
}

fn optional(read: Result<Vec<u8>, RegistryError>) -> Result<Option<Vec<u8>>, RegistryError> {
    match read {
        Err(RegistryError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            Ok(None)
        }
        other => other.map(Some),
    }
}

/// `SmolLM2-135M-Instruct.Q4_1` of `dir/SmolLM2-135M-Instruct.Q4_1.gguf`; what a name may not hold becomes `-`.
fn name_of(source: &Path) -> String {
    // `.` and `..` have a name only once they are resolved.
    let whole = source.canonicalize().unwrap_or_else(|_| source.into());
    let name = whole
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let name = name.strip_suffix(".gguf").unwrap_or(&name);
    let plain: String = name
        .chars()
        .map(|c| if allowed(c) { c } else { '-' })
        .take(MAX_NAME)
        .collect();
    plain.trim_start_matches('.').to_string()
}

fn allowed(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-')
}

fn check_name(name: &str) -> Result<(), RegistryError> {
    let why = if name.is_empty() || name.len() > MAX_NAME {
        "1 to 128 characters are expected"
    } else if name.starts_with('.') || !name.chars().all(allowed) {
        "letters, digits, '.', '_' and '-' are expected, and no '.' at the beginning"
    } else if name.eq_ignore_ascii_case(DEFAULT) || name.eq_ignore_ascii_case("default.tmp") {
        "the mark of the default base has this name"
    } else {
        return Ok(());
    };
    Err(RegistryError::Name {
        name: name.into(),
        why,
    })
}
