//! A student's manifest: where it comes from, what it was trained on, and how it fared.

use std::collections::BTreeSet;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{json, Value};

use super::folder::{read, sha256_hex};
use super::RegistryError;
use crate::limits::MAX_CONFIG_BYTES;
use crate::model::write_atomically;
use crate::view::View;

/// `schema` of the manifests that this code writes and reads.
pub const STUDENT_SCHEMA: &str = "locum-student/1";
const FILE: &str = "locum.json";
/// Hex digits of an id.
const ID_DIGITS: usize = 16;

/// `locum.json` of a student's folder. Digests are SHA-256 in hex.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Manifest {
    pub schema: String,
    /// 1, 2, ... in the order of creation.
    pub version: u64,
    /// The first 16 hex digits of a digest over the weights and all that decides what the student is shown and may do.
    pub id: String,
    /// Id of the student that training started from; `None` is the base.
    pub parent: Option<String>,
    /// Digest of the base's weights.
    pub base: String,
    pub base_name: String,
    pub chat_digest: String,
    pub view: View,
    pub view_digest: String,
    pub dataset_hash: String,
    pub split_hash: String,
    /// Ids of the episodes that it learned from, and of those that were held out to judge it.
    pub episodes: Vec<String>,
    /// Those of them that were erased from the store since: what it learned there is still in its weights.
    pub erased: Vec<String>,
    /// The scope they belong to; empty for episodes without one.
    pub scope: String,
    /// Tools that occur in them.
    pub tool_names: BTreeSet<String>,
    pub job: u64,
    pub method: String,
    pub plan: Value,
    /// Name of the policy that chose the episodes.
    pub policy: String,
    pub trained_tokens: u64,
    pub train_seconds: f64,
    pub curve: Value,
    pub evaluation: Value,
    pub weights_sha256: String,
    pub created_at_ms: u64,
}

impl Manifest {
    /// The id that the contents give. What is only told about the student (times, curve, evaluation) does not enter.
    pub fn content_id(&self) -> String {
        let essentials = json!([
            self.schema,
            self.version,
            self.parent,
            self.base,
            self.chat_digest,
            self.view_digest,
            self.dataset_hash,
            self.split_hash,
            self.tool_names,
            self.method,
            self.weights_sha256,
        ]);
        let mut id = sha256_hex(essentials.to_string().as_bytes());
        id.truncate(ID_DIGITS);
        id
    }

    /// Reads `locum.json` of a folder that is named after the id.
    pub(super) fn read(dir: &Path) -> Result<Manifest, RegistryError> {
        let path = dir.join(FILE);
        let bytes = read(&path, MAX_CONFIG_BYTES)?;
        let manifest: Manifest =
            serde_json::from_slice(&bytes).map_err(|e| RegistryError::file(&path, e))?;
        let differs = |what, expected: &str, found: &str| RegistryError::Differs {
            path: path.clone(),
            what,
            expected: expected.into(),
            found: found.into(),
        };
        if manifest.schema != STUDENT_SCHEMA {
            return Err(differs("schema", STUDENT_SCHEMA, &manifest.schema));
        }
        let name = dir.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        if manifest.id != name {
            return Err(differs("id", name, &manifest.id));
        }
        Ok(manifest)
    }

    pub(super) fn write(&self, dir: &Path) -> Result<(), RegistryError> {
        let path = dir.join(FILE);
        let text = format!("{:#}\n", json!(self));
        // A number that JSON has no form for (NaN) prints as null; better found here than when the student is to serve.
        serde_json::from_str::<Manifest>(&text).map_err(|e| RegistryError::file(&path, e))?;
        Ok(write_atomically(&path, text.as_bytes())?)
    }
}
