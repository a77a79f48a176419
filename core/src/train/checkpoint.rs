//! The state of a training on disk: tensors, moments and position in one safetensors file, so that a killed job goes on where it was.

use std::fs;
use std::path::Path;

use safetensors::SafeTensors;

use super::fit::{State, Trainee};
use super::optim::AdamW;
use super::plan::TrainPlan;
use super::TrainError;
use crate::model::{encode, write_atomically, FileDtype, TrainId};

const FILE: &str = "checkpoint.safetensors";

/// Writes the state; a crash leaves the old file or the new one.
pub(super) fn save(
    dir: &Path,
    state: &State,
    trainable: &[(TrainId, usize)],
    trainee: &mut Trainee,
    adam: &AdamW,
) -> Result<(), TrainError> {
    let mut tensors: Vec<(String, Vec<u8>)> = Vec::with_capacity(3 * trainable.len());
    for &(id, _) in trainable {
        let name = id.name();
        trainee.with(id, &mut |w| {
            tensors.push((format!("w.{name}"), encode(w, FileDtype::F32)))
        });
        let (m, v) = &adam.moments[&id];
        tensors.push((format!("m.{name}"), encode(m, FileDtype::F32)));
        tensors.push((format!("v.{name}"), encode(v, FileDtype::F32)));
    }
    let views: Vec<(&str, safetensors::tensor::TensorView)> = tensors
        .iter()
        .map(|(name, bytes)| {
            let shape = vec![bytes.len() / 4];
            let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape, bytes);
            (
                name.as_str(),
                view.expect("bytes match the shape they were made from"),
            )
        })
        .collect();
    let text = serde_json::to_string(&(state, adam.steps)).expect("a state prints");
    let metadata = Some([("state".to_string(), text)].into_iter().collect());
    let path = dir.join(FILE);
    let bad = |why: String| TrainError::Checkpoint {
        path: path.display().to_string(),
        why,
    };
    let bytes = safetensors::serialize(views, metadata).map_err(|e| bad(e.to_string()))?;
    write_atomically(&path, &bytes).map_err(|e| bad(e.to_string()))
}

/// Reads the state back into trainee and optimiser. `None` if there is none, or one of another plan or other data:
/// such a state is of no use and the training starts anew.
pub(super) fn load(
    dir: &Path,
    plan: &TrainPlan,
    data_hash: &str,
    trainee: &mut Trainee,
    adam: &mut AdamW,
) -> Result<Option<State>, TrainError> {
    let path = dir.join(FILE);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => {
            return Err(TrainError::Checkpoint {
                path: path.display().to_string(),
                why: e.to_string(),
            })
        }
    };
    let bad = |why: String| TrainError::Checkpoint {
        path: path.display().to_string(),
        why,
    };
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| bad(e.to_string()))?;
    let text = header
        .metadata()
        .as_ref()
        .and_then(|m| m.get("state"))
        .ok_or_else(|| bad("no state inside".into()))?;
    let (state, steps): (State, u64) =
        serde_json::from_str(text).map_err(|e| bad(e.to_string()))?;
    if state.plan.as_ref() != Some(plan) || state.data != data_hash {
        return Ok(None);
    }
    let file = SafeTensors::deserialize(&bytes).map_err(|e| bad(e.to_string()))?;
    let read = |name: String, to: &mut [f32]| -> Result<(), TrainError> {
        let view = file.tensor(&name).map_err(|e| bad(e.to_string()))?;
        if view.data().len() != 4 * to.len() {
            return Err(bad(format!("{name} has another size")));
        }
        for (to, b) in to.iter_mut().zip(view.data().chunks_exact(4)) {
            *to = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        }
        Ok(())
    };
    let ids: Vec<TrainId> = adam.moments.keys().copied().collect();
    for id in ids {
        let name = id.name();
        let mut result = Ok(());
        trainee.with(id, &mut |w| result = read(format!("w.{name}"), w));
        result?;
        let (m, v) = adam.moments.get_mut(&id).expect("listed above");
        read(format!("m.{name}"), m)?;
        read(format!("v.{name}"), v)?;
    }
    adam.steps = steps;
    Ok(Some(state))
}
