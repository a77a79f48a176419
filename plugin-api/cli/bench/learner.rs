//! A student whose layers learn while they read, made from any model: what `ttt` and `split` time.

use std::sync::Arc;

use locum_core::kernels::Random;
use locum_core::model::{LayerParam, Model, ParamId, Sequence};
use locum_core::ttt::{Forgetting, TttConfig, TttStart};

use crate::fail::Fail;

/// Every so many layers one learns, as published.
const EVERY: usize = 6;
/// Deviation of the numbers of the filter and of the projection: small, and not zero.
const DEVIATION: f64 = 0.02;

/// The model with learning layers that were never trained, but do write: what they write is noise, and costs as much as sense.
pub fn student(model: Model, forgets: Forgetting) -> Result<Model, Fail> {
    let layers = (0..model.config.num_hidden_layers).step_by(EVERY);
    let config = TttConfig {
        layers: layers.map(|layer| layer as u16).collect(),
        // A trip would take the student back to where it costs nothing.
        max_drift: None,
        forgets,
        ..TttConfig::default()
    };
    let mut random = Random::new(11);
    let mut student = model.with_ttt(config.clone(), TttStart::Published, &mut random)?;
    for layer in config.layers {
        for which in [LayerParam::TttConv, LayerParam::TttProj] {
            let id = ParamId::Layer(layer, which);
            let n: usize = id.shape(&student.config).iter().product();
            let noise = (0..n).map(|_| (DEVIATION * random.normal()) as f32);
            let noise = Arc::new(noise.collect());
            student.weights.params.insert(id, noise);
        }
    }
    Ok(student)
}

/// Fails if nothing was learned or something was forgotten again: the times would then be those of another computation.
pub fn must_have_learned(sequence: &Sequence, tokens: usize) -> Result<(), Fail> {
    let chunk = TttConfig::default().chunk_len;
    let updates = &sequence.fast.updates;
    let expected = tokens / chunk * sequence.fast.layers.len();
    let real = updates.iter().filter(|(_, u)| u.drift > 0.0 && !u.tripped);
    match real.count() {
        made if made == expected && made > 0 => Ok(()),
        made => Err(Fail::Missing {
            what: format!("{made} updates were made where {expected} were to be timed"),
            next: "Read at least one chunk of 256 tokens.",
        }),
    }
}
