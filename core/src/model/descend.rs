//! Chunk-wise dynamic evaluation ([`TttMode::Gradient`](crate::ttt::TttMode)): the step that a sequence takes at the edge of a chunk.
//!
//! ```text
//! loss = −1/(c − 1) Σ log p(tokenᵢ₊₁ | tokens up to i)     over the pairs inside the chunk
//! W ← W − η ∂loss/∂W                                       for the down-projections that learn
//! ```
//!
//! It is truncated at the chunk: keys and values of earlier ones are constants, taken from the cache as they were when they were read,
//! and so is what the layers below the first that learns have made of the chunk. The target of its last token lies behind the edge.

use super::{Grads, LayerParam, Model, PackedRows, ParamId, Sequence, Tape, TrainId};
use crate::kernels::Pool;

impl Model {
    /// Lets the sequence learn from its last chunk, if it has just become full.
    pub(super) fn descend_at_edge(&self, pool: &Pool, sequence: &mut Sequence) {
        let Some(config) = sequence.fast.gradient().cloned() else {
            return;
        };
        let whole = config.chunk_len * self.config.hidden_size;
        if sequence.fast.inputs.len() < whole || sequence.kv.held() < config.chunk_len {
            return;
        }
        let grads = self.chunk_gradients(pool, sequence, config.chunk_len);
        sequence.fast.inputs.clear();
        let fast = &mut sequence.fast;
        for (&layer, weight) in &mut fast.layers {
            let dw = &grads.map[&down(layer)];
            let update = weight.descend(Some(pool), &config, dw);
            fast.updates.push((layer, update));
        }
    }

    /// Gradients of the loss over the last `c` tokens, for the down-projections that learn.
    fn chunk_gradients(&self, pool: &Pool, sequence: &Sequence, c: usize) -> Grads {
        let fast = &sequence.fast;
        let first = fast.layers.keys().next().copied().unwrap_or(0).into();
        let mut plain = self.plain_from(first);
        for (&layer, weight) in &fast.layers {
            let id = ParamId::Layer(layer, LayerParam::Down);
            plain.weights.params.insert(id, weight.shared());
        }
        let sizes = fast
            .layers
            .iter()
            .map(|(&layer, w)| (down(layer), w.weight().len()));
        let mut grads = Grads::new(sizes);
        let (pos, from) = (sequence.kv.held() - c, sequence.ids.len() - c);
        let rows = PackedRows::after(&sequence.kv, pos, c);
        let layers = (first, self.config.num_hidden_layers);
        let (mut x, mut tape) = (fast.inputs.clone(), Tape::default());
        plain.blocks(pool, layers, &rows, None, &mut x, Some(&mut tape));
        let pairs = c - 1;
        let at: Vec<usize> = (0..pairs).collect();
        let asked = (&at[..], &sequence.ids[from + 1..], &vec![1.0; pairs][..]);
        let mut dx = vec![0.0; x.len()];
        let scale = 1.0 / pairs as f32;
        plain.head_loss(pool, &x, asked, Some((scale, &mut dx, &mut grads)));
        plain.blocks_backward(pool, &rows, None, &mut tape, &mut dx, &mut grads);
        grads
    }
}

fn down(layer: u16) -> TrainId {
    TrainId::Full(ParamId::Layer(layer, LayerParam::Down))
}
