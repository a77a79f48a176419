//! Keeps models: the bases that students start from, the students themselves, and which of them serves.
//!
//! In the store's folder: `base/NAME/` and `students/ID/` are Hugging Face folders with a manifest of ours beside
//! (`locum-base.json`, `locum.json`); `base/default` names a base; `current.json` names the student that serves. A folder is
//! written under a temporary name, synced and renamed, so that it is there whole or not at all.
//!
//! Several processes may open one store; each change is made under a lock that its process cannot leave behind.

mod base;
mod check;
mod current;
mod folder;
mod manifest;
#[cfg(test)]
mod tests;

use std::fs;
use std::path::{Path, PathBuf};

use crate::chat::{Chat, ChatError};
use crate::model::{FileDtype, Lora, Model, ModelError};
use folder::{lock, sweep, weights_digest, Temporary};

pub use base::{import_base, list_bases, set_default_base, BaseSummary};
pub use check::{check, CheckedModels};
pub use manifest::{Manifest, STUDENT_SCHEMA};

const BASES: &str = "base";
const STUDENTS: &str = "students";

/// Why a model cannot be kept, found or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegistryError {
    #[error("{path}: {source}")]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{path} is not what it should be: {why}")]
    File { path: PathBuf, why: String },
    #[error("{path} has {found} bytes, {limit} are allowed")]
    TooLarge {
        path: PathBuf,
        found: u64,
        limit: u64,
    },
    #[error("{name:?} cannot be a base's name: {why}")]
    Name { name: String, why: &'static str },
    #[error("no base is named {name:?} in {dir}")]
    NoBase { name: String, dir: PathBuf },
    /// Another model has the name already.
    #[error("{dir} holds another base already: weights and chat {found}, those to be imported are {new}; give another name")]
    BaseTaken {
        dir: PathBuf,
        found: String,
        new: String,
    },
    #[error("there is no student of version {version} in {dir}")]
    NoStudent { version: u64, dir: PathBuf },
    #[error("version {version} is student {id} already")]
    VersionTaken { version: u64, id: String },
    /// What is there is not what the manifest says.
    #[error("{path}: the {what} should be {expected}, found {found}")]
    Differs {
        path: PathBuf,
        what: &'static str,
        expected: String,
        found: String,
    },
    /// The tokenizer has tokens that the model has no row for.
    #[error("the tokenizer has {tokens} tokens, the model's vocabulary only {vocab_size}")]
    Vocabulary { tokens: usize, vocab_size: usize },
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Chat(#[from] ChatError),
}

impl RegistryError {
    fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io {
            path: path.into(),
            source,
        }
    }

    fn file(path: &Path, why: impl ToString) -> Self {
        Self::File {
            path: path.into(),
            why: why.to_string(),
        }
    }
}

/// A folder that should be a student, and what is wrong with it.
pub type Damaged = (PathBuf, RegistryError);

/// The models of one store. Holds no open file; every call reads what is on disk now.
#[derive(Clone, Debug)]
pub struct Registry {
    dir: PathBuf,
}

impl Registry {
    /// Looks at a store's folder and removes what writers that are gone left half-written. Creates nothing.
    ///
    /// # Errors
    /// [`RegistryError::Io`] if `store_dir` is no folder.
    pub fn open(store_dir: &Path) -> Result<Registry, RegistryError> {
        fs::read_dir(store_dir).map_err(|e| RegistryError::io(store_dir, e))?;
        for name in [BASES, STUDENTS] {
            sweep(&store_dir.join(name));
        }
        Ok(Registry {
            dir: store_dir.into(),
        })
    }

    /// Where the base called `name` lies, or the default one; `None` if the store has none such.
    ///
    /// # Errors
    /// A name that cannot be one, or a default that names a base that is gone.
    pub fn base_dir(&self, name: Option<&str>) -> Result<Option<PathBuf>, RegistryError> {
        base::dir(&self.dir, name)
    }

    /// Reads a base: one of this store, or any Hugging Face folder. Returns the SHA-256 (hex) of its weights too.
    ///
    /// # Errors
    /// [`RegistryError::Differs`] if an imported base is no longer what was imported; else as [`Model::load`] and
    /// [`Chat::load`].
    pub fn load_base(&self, dir: &Path) -> Result<(Model, Chat, String), RegistryError> {
        base::load(dir)
    }

    /// Writes a student and returns its manifest with schema, digests and id filled in. A `version` of 0 takes the next
    /// free one, a `created_at_ms` of 0 the time.
    ///
    /// Weights are written as bf16: what is not rounded ([`Model::round_to_bf16`]) comes back rounded. `lora` goes into
    /// `adapter/` as PEFT reads it; `model` is the merged one.
    ///
    /// # Errors
    /// [`RegistryError::VersionTaken`]; [`RegistryError::Differs`] if the manifest names another chat or view than those
    /// given; a disk that is full. Nothing is left of a student that could not be saved.
    pub fn save(
        &self,
        model: &Model,
        lora: Option<&Lora>,
        chat: &Chat,
        mut manifest: Manifest,
    ) -> Result<Manifest, RegistryError> {
        let students = self.dir.join(STUDENTS);
        check_vocabulary(model, chat)?;
        manifest.schema = STUDENT_SCHEMA.into();
        let digests = [
            (
                "view digest",
                &mut manifest.view_digest,
                manifest.view.digest(),
            ),
            ("chat digest", &mut manifest.chat_digest, chat.digest()),
        ];
        for (what, named, found) in digests {
            if !named.is_empty() && *named != found {
                return Err(RegistryError::Differs {
                    path: students,
                    what,
                    expected: named.clone(),
                    found,
                });
            }
            *named = found;
        }
        let temporary = Temporary::new(&students)?;
        let dir = temporary.path();
        model.save(dir, FileDtype::Bf16)?;
        chat.save(dir)?;
        check_chat(dir, &Chat::load(dir)?, &manifest.chat_digest)?;
        if let Some(lora) = lora {
            let adapter = dir.join("adapter");
            fs::create_dir(&adapter).map_err(|e| RegistryError::io(&adapter, e))?;
            lora.save(&adapter, &model.config, &manifest.base_name)?;
        }
        manifest.weights_sha256 = weights_digest(dir)?;
        if manifest.created_at_ms == 0 {
            manifest.created_at_ms = now_ms();
        }
        // Version and place are taken together, or two savers would take the same.
        let _held = lock(&students)?;
        if manifest.version == 0 {
            manifest.version = self.next_version()?;
        }
        if let Some(other) = self
            .list()?
            .into_iter()
            .find(|m| m.version == manifest.version)
        {
            return Err(RegistryError::VersionTaken {
                version: other.version,
                id: other.id,
            });
        }
        manifest.id = manifest.content_id();
        manifest.write(dir)?;
        temporary.publish(&self.student_dir(&manifest.id))?;
        Ok(manifest)
    }

    /// The students by version. A folder whose manifest cannot be read is left out and named in the log.
    pub fn list(&self) -> Result<Vec<Manifest>, RegistryError> {
        let (students, damaged) = self.list_all()?;
        for (path, why) in damaged {
            tracing::warn!(path = %path.display(), %why, "a student's folder is damaged and left out");
        }
        Ok(students)
    }

    /// The students by version, and the folders that are none with what is wrong with each.
    pub fn list_all(&self) -> Result<(Vec<Manifest>, Vec<Damaged>), RegistryError> {
        let (mut students, mut damaged) = (Vec::new(), Vec::new());
        for path in folder::children(&self.dir.join(STUDENTS))? {
            match Manifest::read(&path) {
                Ok(manifest) => students.push(manifest),
                Err(why) => damaged.push((path, why)),
            }
        }
        students.sort_by_key(|m| (m.version, m.created_at_ms));
        Ok((students, damaged))
    }

    /// Reads a student whole.
    ///
    /// # Errors
    /// [`RegistryError::NoStudent`]; [`RegistryError::Differs`] says which of view, chat, weights and id is not the one of
    /// the manifest; else as [`Model::load`] and [`Chat::load`].
    pub fn load(&self, version: u64) -> Result<(Manifest, Model, Chat), RegistryError> {
        let manifest = self.find(version)?;
        let chat = self.verify(&manifest)?;
        let model = Model::load(&self.student_dir(&manifest.id))?;
        check_vocabulary(&model, &chat)?;
        Ok((manifest, model, chat))
    }

    /// Compares a student's files with its manifest, and gives its chat.
    fn verify(&self, manifest: &Manifest) -> Result<Chat, RegistryError> {
        let dir = self.student_dir(&manifest.id);
        let same = |what, expected: &str, found: String| match found == expected {
            true => Ok(()),
            false => Err(RegistryError::Differs {
                path: dir.clone(),
                what,
                expected: expected.into(),
                found,
            }),
        };
        same("view digest", &manifest.view_digest, manifest.view.digest())?;
        same(
            "SHA-256 of the weights",
            &manifest.weights_sha256,
            weights_digest(&dir)?,
        )?;
        same("id", &manifest.id, manifest.content_id())?;
        let chat = Chat::load(&dir)?;
        check_chat(&dir, &chat, &manifest.chat_digest)?;
        Ok(chat)
    }

    /// One more than any version that is there or served once.
    pub fn next_version(&self) -> Result<u64, RegistryError> {
        let listed = self.list()?.last().map_or(0, |m| m.version);
        Ok(listed.max(current::highest(&self.dir)?) + 1)
    }

    /// The version that serves; `None` while no student does.
    ///
    /// # Errors
    /// A `current.json` that cannot be read: to serve nobody is then the caller's decision.
    pub fn current(&self) -> Result<Option<u64>, RegistryError> {
        current::get(&self.dir)
    }

    /// Lets a student serve, durably. One that served before is gone back to, and those after it are forgotten as rollback
    /// targets; `None` forgets all of them.
    ///
    /// # Errors
    /// [`RegistryError::NoStudent`].
    pub fn set_current(&self, version: Option<u64>) -> Result<(), RegistryError> {
        let student = version.map(|v| self.find(v)).transpose()?;
        current::set(&self.dir, student.as_ref())
    }

    /// The version to go back to: the last that served before the current one and is still there.
    pub fn previous(&self) -> Result<Option<u64>, RegistryError> {
        let students = self.list()?;
        let there = |v: &u64| students.iter().any(|m| m.version == *v);
        Ok(current::history(&self.dir)?.into_iter().rev().find(there))
    }

    /// Notes that episodes a student learned from were erased. Its id stays: the weights are what they were.
    ///
    /// # Errors
    /// [`RegistryError::NoStudent`]; a disk that refuses.
    pub fn mark_erased(&self, version: u64, episodes: &[String]) -> Result<(), RegistryError> {
        let _held = lock(&self.dir.join(STUDENTS))?;
        let mut manifest = self.find(version)?;
        let dir = self.student_dir(&manifest.id);
        for id in episodes {
            if !manifest.erased.contains(id) {
                manifest.erased.push(id.clone());
            }
        }
        manifest.write(&dir)
    }

    /// Bytes that a student's files take; 0 if there is no such student.
    pub fn bytes(&self, version: u64) -> u64 {
        self.find(version)
            .map_or(0, |m| folder::bytes(&self.student_dir(&m.id)))
    }

    /// Where the student with this id lies, or would lie.
    pub fn student_dir(&self, id: &str) -> PathBuf {
        self.dir.join(STUDENTS).join(id)
    }

    fn find(&self, version: u64) -> Result<Manifest, RegistryError> {
        let gone = || RegistryError::NoStudent {
            version,
            dir: self.dir.join(STUDENTS),
        };
        self.list()?
            .into_iter()
            .find(|m| m.version == version)
            .ok_or_else(gone)
    }
}

fn check_vocabulary(model: &Model, chat: &Chat) -> Result<(), RegistryError> {
    let (tokens, vocab_size) = (chat.tokenizer.vocab_size(), model.config.vocab_size);
    match tokens <= vocab_size {
        true => Ok(()),
        false => Err(RegistryError::Vocabulary { tokens, vocab_size }),
    }
}

fn check_chat(dir: &Path, chat: &Chat, expected: &str) -> Result<(), RegistryError> {
    let found = chat.digest();
    match found == expected {
        true => Ok(()),
        false => Err(RegistryError::Differs {
            path: dir.into(),
            what: "digest of tokenizer and chat template",
            expected: expected.into(),
            found,
        }),
    }
}

fn now_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |t| t.as_millis() as u64)
}
