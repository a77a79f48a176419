//! How much memory a training takes, told before it begins, and what of the activations it can afford to keep.

use super::plan::{Method, TrainPlan};
use super::TrainError;
use crate::limits::DEFAULT_TRAIN_BYTES;
use crate::model::{Architecture, Config, ParamId, HEAD_ROWS};

/// Bytes of a training by what they are for. The process itself and the episodes it trains on come on top.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Memory {
    /// The model in `f32`, and an adapter.
    pub weights: u64,
    /// Of the tensors that move: gradients, two moments, and copies of the best ones where an early stop may go back to them.
    pub training: u64,
    /// What one step needs whatever is kept: the gradients that flow, one block's activations, logits, packed operands.
    pub working: u64,
    /// Outputs of frozen blocks that are kept from step to step.
    pub cache: u64,
    /// Blocks that train, and what is kept of each: its input alone, or all that its backward pass reads.
    pub blocks: u64,
    pub input: u64,
    pub tape: u64,
}

impl Memory {
    /// The estimate for steps of `rows` tokens, none longer than `longest` in one sequence, over samples of `tokens` in all.
    ///
    /// Samples that share their beginnings have fewer rows than this counts, and less to keep; keys and values that stand side by side
    /// for each of them take no more than the rows that they save.
    ///
    /// With d, q, g, f, v the widths of a row of hidden states, queries, keys, the MLP and the vocabulary, a block's tape has
    /// 4 d + 2 q + 2 g + 3 f numbers a row, and its backward pass 3 f + 4 d + 2 q + 2 g of its own.
    pub fn of(
        plan: &TrainPlan,
        config: &Config,
        rows: usize,
        longest: usize,
        tokens: usize,
    ) -> Self {
        let c = config;
        let (d, f, v) = (c.hidden_size, c.intermediate_size, c.vocab_size);
        let (q, g) = (c.q_size(), c.kv_size());
        let numbers = |n: usize| 4 * n as u64;
        let sizes = ParamId::all(c).into_iter();
        let weights: usize = sizes.map(|id| id.shape(c).iter().product::<usize>()).sum();
        let moving: usize = plan.trainable(c).iter().map(|(_, n)| n).sum();
        let adapter = match plan.method {
            // With it, one merged matrix at a time.
            Method::Lora { .. } => moving + d * f.max(q),
            Method::Upper { .. } | Method::Full => 0,
        };
        let first = plan.first_block(c);
        let raw = if c.architecture == Architecture::Qwen3 {
            q + g
        } else {
            0
        };
        let tape = rows * (4 * d + 2 * q + 2 * g + raw + 3 * f);
        let backward = rows * (3 * f + 4 * d + 2 * q + 2 * g);
        let head = HEAD_ROWS.min(rows) * (v + 4 * d);
        let attention = 16 * 4 * 64 * longest;
        Self {
            weights: numbers(weights + adapter),
            training: numbers(moving * if plan.patience > 0 { 4 } else { 3 }),
            working: numbers(tape + backward.max(head) + attention) + PACKED_BYTES,
            cache: match first {
                0 => 0,
                _ => (2 * d * tokens).min(plan.cache_bytes + plan.cache_bytes / 4) as u64,
            },
            blocks: (c.num_hidden_layers - first) as u64,
            input: numbers(rows * d),
            tape: numbers(tape),
        }
    }

    /// The least that the training can do with: only the blocks' inputs are kept.
    pub fn least(&self) -> u64 {
        self.weights + self.training + self.working + self.cache + self.blocks * self.input
    }

    /// What keeps every block's activations.
    pub fn most(&self) -> u64 {
        self.least() + self.blocks.saturating_sub(1) * (self.tape - self.input)
    }

    /// Of how many blocks only the input is kept, so that the whole stays below the plan's limit: as few as possible, for the others
    /// need not be computed again.
    ///
    /// # Errors
    /// [`TrainError::Memory`] if even the least is too much.
    pub fn inputs_only(&self, limit: u64) -> Result<usize, TrainError> {
        let limit = match limit {
            0 => DEFAULT_TRAIN_BYTES,
            limit => limit,
        };
        let room = limit.checked_sub(self.least()).ok_or(TrainError::Memory {
            needed: self.least(),
            limit,
        })?;
        // One block's tape is in `working`.
        let whole = 1 + room / (self.tape - self.input).max(1);
        Ok(self.blocks.saturating_sub(whole) as usize)
    }
}

/// Both operands of a product, packed.
const PACKED_BYTES: u64 = 32 << 20;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Pool;
    use crate::model::{write_tiny, Model};
    use crate::train::{fit, Flow, Sample};

    /// Weights and losses after three steps under a limit of so many bytes.
    fn trained(method: Method, memory_bytes: u64) -> Result<(Vec<u32>, Vec<u64>), TrainError> {
        let dir = tempfile::tempdir().unwrap();
        write_tiny(dir.path(), 3).unwrap();
        let model = Model::load(dir.path()).unwrap();
        let plan = TrainPlan {
            method,
            memory_bytes,
            ..plan()
        };
        let pool = Pool::new(2, 0);
        let mut losses = Vec::new();
        let trained = fit(&pool, model, &samples(), &[], "x", &plan, None, &mut |p| {
            losses.push(p.loss.to_bits());
            Flow::Go
        })?;
        let params = trained.model.weights.params.values();
        let bits = params.flat_map(|p| p.iter().map(|x| x.to_bits())).collect();
        Ok((bits, losses))
    }

    fn plan() -> TrainPlan {
        TrainPlan {
            tokens: 3 * 96,
            batch_tokens: 96,
            evaluations: 0,
            ..TrainPlan::default()
        }
    }

    fn samples() -> Vec<Sample> {
        (0..6)
            .map(|i| Sample {
                ids: (0..48).map(|j| 3 + (i * 13 + j * 7) % 50).collect(),
                target_start: 8,
                weight: 1.0,
                ..Sample::default()
            })
            .collect()
    }

    fn estimate(method: Method) -> Memory {
        let dir = tempfile::tempdir().unwrap();
        write_tiny(dir.path(), 3).unwrap();
        let config = Model::load(dir.path()).unwrap().config;
        Memory::of(&TrainPlan { method, ..plan() }, &config, 96, 48, 6 * 48)
    }

    const METHODS: [Method; 3] = [
        Method::Full,
        Method::Upper { layers: 2 },
        Method::Lora {
            rank: 2,
            alpha: 4.0,
        },
    ];

    #[test]
    fn what_is_computed_again_gives_the_same_bits() {
        for method in METHODS {
            let memory = estimate(method);
            assert_eq!(memory.inputs_only(0).unwrap(), 0);
            let again = memory.inputs_only(memory.least()).unwrap();
            assert_eq!(again as u64, memory.blocks - 1, "{method:?}");
            assert!(again > 0);
            let whole = trained(method, 0).unwrap();
            assert!(
                whole == trained(method, memory.least()).unwrap(),
                "{method:?}"
            );
        }
    }

    #[test]
    fn a_training_that_cannot_fit_is_refused_with_what_it_would_need() {
        for method in METHODS {
            let least = estimate(method).least();
            match trained(method, least - 1) {
                Err(error @ TrainError::Memory { needed, limit }) => {
                    assert_eq!((needed, limit), (least, least - 1));
                    assert!(error.to_string().contains("memory_mib"), "{error}");
                }
                _ => panic!("{method:?} was not refused"),
            }
        }
    }

    #[test]
    fn more_memory_means_fewer_blocks_computed_again() {
        let memory = estimate(Method::Full);
        let mut before = usize::MAX;
        let (least, most) = (memory.least(), memory.most());
        for limit in [least, (least + most) / 2, most] {
            let again = memory.inputs_only(limit).unwrap();
            assert!(again <= before);
            before = again;
        }
        assert_eq!(before, 0);
    }
}
