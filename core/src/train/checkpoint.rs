//! The state of a training on disk, so that a killed job goes on where it was: tensors, moments and position in one safetensors
//! file, and beside it the weights of the best evaluation where an early stop may want them back.

use std::fs;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};

use super::fit::{Snapshot, State, Trainee};
use super::optim::AdamW;
use super::plan::TrainPlan;
use super::TrainError;
use crate::model::{encode, write_atomically, FileDtype, TrainId};

const FILE: &str = "checkpoint.safetensors";
const BEST_PREFIX: &str = "best-";
const BEST_SUFFIX: &str = ".safetensors";

/// Writes the state; a crash leaves the old one or the new one. `best` are the weights after [`State::best_step`] steps.
pub(super) fn save(
    dir: &Path,
    state: &State,
    trainable: &[(TrainId, usize)],
    trainee: &mut Trainee,
    adam: &AdamW,
    best: Option<&Snapshot>,
) -> Result<(), TrainError> {
    // Under a name of its own and before the state that points at it: the old state keeps its own file until then.
    let best_path = state.best_step.map(|step| best_path(dir, step));
    if let (Some(path), Some(best)) = (&best_path, best) {
        if !path.exists() {
            let tensors = best
                .iter()
                .map(|(id, data)| (format!("w.{}", id.name()), encode(data, FileDtype::F32)));
            write(path, tensors.collect(), None)?;
        }
    }
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
    let text = serde_json::to_string(&(state, adam.steps)).expect("a state prints");
    write(&dir.join(FILE), tensors, Some(text))?;
    remove_best(dir, best_path.as_deref());
    Ok(())
}

/// What [`load`] found.
pub(super) struct Loaded {
    pub state: State,
    /// The weights of the best evaluation, if the state has one to go back to.
    pub best: Option<Snapshot>,
}

/// Reads the state back into trainee and optimiser. `None` if there is none, or one of a plan that cannot go on as this or of other data:
/// such a state is of no use and the training starts anew.
pub(super) fn load(
    dir: &Path,
    plan: &TrainPlan,
    data_hash: &str,
    trainee: &mut Trainee,
    adam: &mut AdamW,
) -> Result<Option<Loaded>, TrainError> {
    let path = dir.join(FILE);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            remove_best(dir, None);
            return Ok(None);
        }
        Err(e) => return Err(bad(&path, e)),
    };
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| bad(&path, e))?;
    let text = header
        .metadata()
        .as_ref()
        .and_then(|m| m.get("state"))
        .ok_or_else(|| bad(&path, "no state inside"))?;
    let (mut state, steps): (State, u64) = serde_json::from_str(text).map_err(|e| bad(&path, e))?;
    let goes_on = state.plan.as_ref().is_some_and(|was| was.goes_on_as(plan));
    if !goes_on || state.data != data_hash {
        remove_best(dir, None);
        return Ok(None);
    }
    state.plan = Some(plan.clone());
    let file = SafeTensors::deserialize(&bytes).map_err(|e| bad(&path, e))?;
    let ids: Vec<TrainId> = adam.moments.keys().copied().collect();
    let mut sizes = Vec::with_capacity(ids.len());
    for id in ids {
        let name = id.name();
        let mut result = Ok(());
        trainee.with(id, &mut |w| {
            sizes.push((id, w.len()));
            result = read(&path, &file, &format!("w.{name}"), w)
        });
        result?;
        let (m, v) = adam.moments.get_mut(&id).expect("listed above");
        read(&path, &file, &format!("m.{name}"), m)?;
        read(&path, &file, &format!("v.{name}"), v)?;
    }
    adam.steps = steps;
    let best_path = state.best_step.map(|step| best_path(dir, step));
    // A file that the state does not point at was written just before a kill: the weights that follow may be others.
    remove_best(dir, best_path.as_deref());
    let best = match best_path {
        Some(path) => Some(load_best(&path, &sizes)?),
        None => None,
    };
    Ok(Some(Loaded { state, best }))
}

/// Removes the state from a folder, if there is one.
pub fn forget(dir: &Path) {
    let _ = fs::remove_file(dir.join(FILE));
    remove_best(dir, None);
}

fn load_best(path: &Path, sizes: &[(TrainId, usize)]) -> Result<Snapshot, TrainError> {
    let bytes = fs::read(path).map_err(|e| bad(path, e))?;
    let file = SafeTensors::deserialize(&bytes).map_err(|e| bad(path, e))?;
    sizes
        .iter()
        .map(|&(id, len)| {
            let mut data = vec![0.0; len];
            read(path, &file, &format!("w.{}", id.name()), &mut data)?;
            Ok((id, data))
        })
        .collect()
}

fn best_path(dir: &Path, step: u64) -> PathBuf {
    dir.join(format!("{BEST_PREFIX}{step}{BEST_SUFFIX}"))
}

/// Removes the weights of evaluations that are no longer the best. What cannot be removed only takes room.
fn remove_best(dir: &Path, keep: Option<&Path>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let ours = name.starts_with(BEST_PREFIX) && name.ends_with(BEST_SUFFIX);
        if ours && Some(entry.path().as_path()) != keep {
            let _ = fs::remove_file(entry.path());
        }
    }
}

fn write(
    path: &Path,
    tensors: Vec<(String, Vec<u8>)>,
    state: Option<String>,
) -> Result<(), TrainError> {
    let views: Vec<(&str, safetensors::tensor::TensorView)> = tensors
        .iter()
        .map(|(name, bytes)| {
            let shape = vec![bytes.len() / 4];
            let view = safetensors::tensor::TensorView::new(Dtype::F32, shape, bytes);
            (
                name.as_str(),
                view.expect("bytes match the shape they were made from"),
            )
        })
        .collect();
    let metadata = state.map(|text| [("state".to_string(), text)].into_iter().collect());
    let bytes = safetensors::serialize(views, metadata).map_err(|e| bad(path, e))?;
    write_atomically(path, &bytes).map_err(|e| bad(path, e))
}

fn read(path: &Path, file: &SafeTensors, name: &str, to: &mut [f32]) -> Result<(), TrainError> {
    let view = file.tensor(name).map_err(|e| bad(path, e))?;
    if view.data().len() != 4 * to.len() {
        return Err(bad(path, format!("{name} has another size")));
    }
    for (to, b) in to.iter_mut().zip(view.data().chunks_exact(4)) {
        *to = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
    }
    Ok(())
}

fn bad(path: &Path, why: impl ToString) -> TrainError {
    TrainError::Checkpoint {
        path: path.display().to_string(),
        why: why.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_of_a_state_come_back_bit_for_bit() {
        // Each of these is read back one bit off by a reader that takes the nearest float only nearly.
        for number in [0.10957860598549463, 0.18816853578224801, 0.9899951327998887] {
            let state = State {
                seconds: number,
                best: Some(number),
                ..State::default()
            };
            let text = serde_json::to_string(&state).unwrap();
            let back: State = serde_json::from_str(&text).unwrap();
            assert_eq!(back, state, "{text}");
        }
    }
}
