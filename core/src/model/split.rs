//! One long prompt read by several workers at once: context parallelism.
//!
//! A prompt is read in waves, and each worker takes a span of a wave's tokens through all layers. In a layer it needs two things of the
//! workers before it, and of nobody else: the keys and values of their tokens, and the sum of what their tokens make a layer learn,
//! which depends on no weight (In-Place TTT, arXiv:2604.06169, section 3.3) and so can be sent before it is known what it is added to.
//! (A rule that forgets is not such a sum: it is read by one worker.)
//! A worker here is a pool of threads and keys are sent by writing them where all read them; one with a memory of its own would be sent
//! the rows instead.

use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use super::serve::{shared, Stretch};
use super::{Config, FastWeights, Model, ModelError, Sequence};
use crate::kernels::Pool;
use crate::threads::SignalsBlocked;
use crate::ttt::{FastWeight, Forgetting, TttConfig, TttLayer};

/// Tokens of a worker in a wave, about: enough for tiles of its own, few enough for activations of some 20 MB.
const SPAN_ROWS: usize = 1024;
/// Multiplications of products that take as long as one of attention, which is always in `f32`.
const PRODUCT_SPEED: usize = 2;

impl Model {
    /// [`Model::step`] for one sequence, its tokens read by one worker for each of `pools`. Only rounding tells the results from each
    /// other, with an end at a chunk's edge or not, and whatever was read before. Memory does not grow with the prompt, but for the
    /// result (t, d) and the cache.
    ///
    /// A drift past its cap is met as by `step`: the wave in which it happens is read again by one worker.
    ///
    /// # Errors
    /// As [`Model::step`]; nothing has then been changed.
    ///
    /// # Panics
    /// Without a pool.
    pub fn prefill_split(
        &self,
        pools: &[Pool],
        sequence: &mut Sequence,
        ids: &[u32],
    ) -> Result<Vec<f32>, ModelError> {
        assert!(!pools.is_empty(), "a prompt needs somebody to read it");
        let from = sequence.kv.len();
        self.check_room(from + ids.len())?;
        let mut x = self.embed(ids)?;
        sequence.kv.reserve(from + ids.len());
        let learning = sequence.fast.config.clone();
        let d = self.config.hidden_size;
        for wave in waves(
            &self.config,
            learning.as_deref(),
            pools.len(),
            from,
            ids.len(),
        ) {
            let rows = wave.start - from..wave.end - from;
            let (ids, x) = (&ids[rows.clone()], &mut x[rows.start * d..rows.end * d]);
            let spans = spans(&self.config, learning.as_deref(), pools.len(), wave);
            // A cache that has forgotten its beginning and learning that is switched off are not worth workers of their own, a gradient
            // is there only behind its chunk, and where a rule forgets, sums of what chunks add are not all it does.
            let odd = sequence.kv.held() < sequence.kv.len()
                || sequence.fast.off
                || sequence.fast.gradient().is_some()
                || learning
                    .as_ref()
                    .is_some_and(|ttt| ttt.forgets != Forgetting::Nothing);
            if odd || spans.len() < 2 || !self.read_wave(pools, sequence, ids, x, &spans) {
                let alone = self.step(&pools[0], &mut [(sequence, ids)])?;
                x.copy_from_slice(&alone);
            }
        }
        Ok(x)
    }

    /// Reads a wave whose embeddings are in `x`; false, and the sequence as it was, if a layer began again in it, for later spans were
    /// then computed from a weight that never was.
    fn read_wave(
        &self,
        pools: &[Pool],
        sequence: &mut Sequence,
        ids: &[u32],
        x: &mut [f32],
        spans: &[Range<usize>],
    ) -> bool {
        let d = self.config.hidden_size;
        self.settle(&pools[0], &mut sequence.fast);
        let exchange = Exchange::new(spans.len());
        let mut fasts: Vec<FastWeights> = spans
            .iter()
            .map(|_| FastWeights {
                updates: Vec::new(),
                ..sequence.fast.clone()
            })
            .collect();
        let caches = shared(&mut sequence.kv);
        let mut rest = x;
        let mut jobs = Vec::new();
        for (worker, (span, fast)) in spans.iter().zip(&mut fasts).enumerate() {
            let (x, after) = std::mem::take(&mut rest).split_at_mut(span.len() * d);
            rest = after;
            let link = Link {
                exchange: &exchange,
                worker,
            };
            jobs.push((span.start, x, fast, link));
        }
        let read =
            |pool: &Pool, (pos, x, fast, link): (usize, &mut [f32], &mut FastWeights, Link)| {
                let _broken = BreakOnPanic(link.exchange);
                let layers = &caches;
                self.step_stretch(pool, Stretch { pos, x, layers }, fast, link);
            };
        std::thread::scope(|scope| {
            let mut jobs = jobs.into_iter().zip(pools);
            let first = jobs.next();
            let read = &read;
            for (job, pool) in jobs {
                let _signals = SignalsBlocked::new();
                scope.spawn(move || read(pool, job));
            }
            if let Some((job, pool)) = first {
                read(pool, job);
            }
        });
        let mut updates: Vec<_> = fasts.iter_mut().flat_map(|f| f.updates.drain(..)).collect();
        if updates.iter().any(|(_, update)| update.tripped) {
            return false;
        }
        // As `step` would have made them.
        updates.sort_by_key(|(layer, update)| (*layer, update.position));
        if let Some(last) = fasts.pop() {
            sequence.fast.layers = last.layers;
        }
        sequence.fast.updates.extend(updates);
        sequence.kv.advance(ids.len());
        sequence.ids.extend_from_slice(ids);
        true
    }

    /// Makes the updates that were put off, once for all workers.
    fn settle(&self, pool: &Pool, fast: &mut FastWeights) {
        let FastWeights {
            layers, updates, ..
        } = fast;
        for (layer, weight) in layers {
            let trained = self.ttt_layer(usize::from(*layer));
            if let Some((config, trained)) = self.config.ttt.as_ref().zip(trained) {
                let update = weight.settle(Some(pool), config, trained);
                updates.extend(update.map(|update| (*layer, update)));
            }
        }
    }
}

/// Positions at multiples of which spans may begin: no two workers write to one block of keys, or have a part of one chunk.
fn unit(config: &Config, learning: Option<&TttConfig>) -> usize {
    let block = config.attention_shape().keys().whole_blocks(1);
    let chunk = learning.map_or(1, |ttt| ttt.chunk_len);
    let (mut a, mut b) = (block, chunk);
    while b > 0 {
        (a, b) = (b, a % b);
    }
    block / a * chunk
}

/// Cuts `len` positions from `from` on into waves of about equal length.
fn waves(
    config: &Config,
    learning: Option<&TttConfig>,
    workers: usize,
    from: usize,
    len: usize,
) -> Vec<Range<usize>> {
    let unit = unit(config, learning);
    let count = len.div_ceil(workers * SPAN_ROWS.max(unit)).max(1);
    let cuts = (1..count).map(|i| (from + len * i / count) / unit * unit);
    ranges(from, cuts, from + len)
}

/// Cuts a wave into spans of about equal work, at most one a worker: a token's work grows with the tokens before it.
fn spans(
    config: &Config,
    learning: Option<&TttConfig>,
    workers: usize,
    wave: Range<usize>,
) -> Vec<Range<usize>> {
    let unit = unit(config, learning);
    let (d, f) = (config.hidden_size, config.intermediate_size);
    let products = d * (2 * config.q_size() + 2 * config.kv_size() + 3 * f);
    // The products of a token take as long as attention to so many.
    let keys = products / PRODUCT_SPEED / (2 * config.q_size());
    let work = |to: usize| {
        let (from, to) = (wave.start as f64, to as f64);
        (to - from) * (keys as f64 + (from + to) / 2.0)
    };
    let all = work(wave.end);
    let edges = (wave.start / unit + 1..)
        .map(|i| i * unit)
        .take_while(|at| *at < wave.end);
    let edges: Vec<usize> = edges.collect();
    let cuts = (1..workers).filter_map(|i| {
        let share = all * i as f64 / workers as f64;
        let off = |at: &usize| (work(*at) - share).abs();
        let nearest = |a: &&usize, b: &&usize| off(a).total_cmp(&off(b));
        edges.iter().min_by(nearest).copied()
    });
    ranges(wave.start, cuts, wave.end)
}

/// The ranges between rising cuts, those that are empty left out.
fn ranges(from: usize, cuts: impl Iterator<Item = usize>, to: usize) -> Vec<Range<usize>> {
    let mut at = from;
    let cuts = cuts.chain([to]);
    let parts = cuts.filter_map(|cut| {
        let part = at..cut.max(at);
        at = part.end;
        (!part.is_empty()).then_some(part)
    });
    parts.collect()
}

/// What workers have sent in a wave.
struct Exchange {
    sent: Mutex<Sent>,
    changed: Condvar,
}

/// A layer and what a chunk's tokens made it learn, if it learns.
type LayerSum = (usize, Option<Arc<Vec<f32>>>);

#[derive(Default)]
struct Sent {
    /// Of each worker, how many layers' keys and values are there.
    keys: Vec<usize>,
    /// Of each worker, layer by layer, what its tokens made the layer learn.
    sums: Vec<Vec<LayerSum>>,
    broken: bool,
}

impl Exchange {
    fn new(workers: usize) -> Self {
        Self {
            sent: Mutex::new(Sent {
                keys: vec![0; workers],
                sums: vec![Vec::new(); workers],
                broken: false,
            }),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Sent> {
        self.sent.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn send(&self, put: impl FnOnce(&mut Sent)) {
        put(&mut self.lock());
        self.changed.notify_all();
    }

    /// Waits until `there` gives something.
    fn wait<T>(&self, there: impl Fn(&Sent) -> Option<T>) -> T {
        let mut sent = self.lock();
        loop {
            assert!(!sent.broken, "another worker of this prompt panicked");
            if let Some(found) = there(&sent) {
                return found;
            }
            sent = self.changed.wait(sent).unwrap_or_else(|e| e.into_inner());
        }
    }
}

/// Wakes those who would wait for a worker that panics.
struct BreakOnPanic<'a>(&'a Exchange);

impl Drop for BreakOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.send(|sent| sent.broken = true);
        }
    }
}

/// A worker's place among the others.
pub(super) struct Link<'a> {
    exchange: &'a Exchange,
    worker: usize,
}

impl Link<'_> {
    /// Says that the keys and values of this worker's tokens in `layer` are written.
    pub fn send_keys(&self, layer: usize) {
        self.exchange
            .send(|sent| sent.keys[self.worker] = layer + 1);
    }

    /// Waits for those of the workers before.
    pub fn await_keys(&self, layer: usize) {
        self.exchange.wait(|sent| {
            let written = sent.keys[..self.worker].iter().all(|done| *done > layer);
            written.then_some(())
        });
    }

    /// Sends what this worker's tokens make a layer learn, and brings `weight`, as it was at the wave's first token, to the worker's
    /// first, which stands at `pos`. Shapes: z (n, f), u (n, d).
    pub fn hand_on(
        &self,
        pool: &Pool,
        (config, trained): (&TttConfig, TttLayer),
        layer: usize,
        pos: usize,
        weight: &mut FastWeight,
        (z, u): (&[f32], &[f32]),
    ) {
        let before = pos - weight.position();
        let last = self.worker + 1 == self.exchange.lock().keys.len();
        if !last {
            let sum = match before {
                0 => weight.sum_of(Some(pool), config, trained, z, u),
                _ => {
                    let here = weight.later(Some(pool), config, before, &[]);
                    here.sum_of(Some(pool), config, trained, z, u)
                }
            };
            let sum = sum.map(Arc::new);
            self.exchange
                .send(|sent| sent.sums[self.worker].push((layer, sum)));
        }
        if before == 0 {
            return;
        }
        let sums: Vec<Arc<Vec<f32>>> = (0..self.worker)
            .filter_map(|worker| {
                self.exchange.wait(|sent| {
                    let mut sums = sent.sums[worker].iter();
                    sums.find(|(of, _)| *of == layer)
                        .map(|(_, sum)| sum.clone())
                })
            })
            .collect();
        *weight = weight.later(Some(pool), config, before, &sums);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Random;
    use crate::model::serve_tests::learner;
    use crate::model::WeightFormat;
    use crate::ttt::TttTarget;

    fn student(target: TttTarget) -> Model {
        learner(16, target)
    }

    fn text(len: usize) -> Vec<u32> {
        let mut random = Random::new(9);
        (0..len).map(|_| 3 + random.below(200) as u32).collect()
    }

    #[track_caller]
    fn close(what: &str, got: &[f32], want: &[f32], tolerance: f32) {
        assert_eq!(got.len(), want.len(), "{what}");
        let size = want.iter().fold(1e-3f32, |m, x| m.max(x.abs()));
        for (i, (got, want)) in got.iter().zip(want).enumerate() {
            let near = (got - want).abs() <= tolerance * size;
            assert!(near, "{what}[{i}]: {got} instead of {want}, largest {size}");
        }
    }

    /// The same text after the same past, at once and split: outputs, states, and what is read next.
    fn check(model: &Model, workers: usize, past: usize, len: usize, learning: bool, off: f32) {
        let what = format!("{workers} workers, {len} after {past}, learning {learning}");
        let pool = Pool::new(2, 0);
        let pools: Vec<Pool> = (0..workers).map(|i| Pool::new(1 + i % 2, 0)).collect();
        let ids = text(past + len + 3);
        let (before, rest) = ids.split_at(past);
        let (new, next) = rest.split_at(len);
        let mut whole = model.sequence(8, learning);
        if past > 0 {
            model.step(&pool, &mut [(&mut whole, before)]).unwrap();
        }
        let mut split = whole.clone();
        let want = model.step(&pool, &mut [(&mut whole, new)]).unwrap();
        let got = model.prefill_split(&pools, &mut split, new).unwrap();
        close(&what, &got, &want, off);
        assert_eq!((split.kv.len(), &split.ids), (past + len, &whole.ids));
        for (layer, fast) in &whole.fast.layers {
            let other = &split.fast.layers[layer];
            assert_eq!(
                (other.position(), other.waiting(), other.is_start()),
                (fast.position(), fast.waiting(), fast.is_start()),
                "{what}"
            );
            close(&what, other.weight(), fast.weight(), off);
            assert!((other.drift() - fast.drift()).abs() <= off * fast.drift().max(1e-3));
        }
        let made = |sequence: &Sequence| -> Vec<(u16, usize, bool)> {
            let mut all: Vec<_> = sequence
                .fast
                .updates
                .iter()
                .map(|(layer, u)| (*layer, u.position, u.tripped))
                .collect();
            all.sort_unstable();
            all
        };
        assert_eq!(made(&split), made(&whole), "{what}");
        let want = model.step(&pool, &mut [(&mut whole, next)]).unwrap();
        let got = model.step(&pool, &mut [(&mut split, next)]).unwrap();
        close(&what, &got, &want, off);
    }

    #[test]
    fn a_split_prompt_equals_the_whole_one_for_any_length_past_and_number_of_workers() {
        let model = student(TttTarget::HiddenStates);
        for (format, off) in [(WeightFormat::F32, 2e-4), (WeightFormat::Q8, 3e-2)] {
            let model = model.clone().packed(format);
            for workers in 1..=4 {
                for len in [1, 15, 16, 17, 47, 48, 49, 130] {
                    for past in [0, 5, 16, 39] {
                        check(&model, workers, past, len, true, off);
                    }
                }
                check(&model, workers, 21, 130, false, off);
            }
        }
    }

    #[test]
    fn a_split_prompt_of_several_waves_and_one_whose_targets_are_embeddings_equal_the_whole_one() {
        let embeddings = student(TttTarget::InputEmbed);
        check(&embeddings, 3, 7, 120, true, 2e-4);
        // Rules that forget are read by one worker.
        for forgets in [Forgetting::Decay(0.7), Forgetting::Delta(1.0)] {
            let mut model = student(TttTarget::HiddenStates);
            model.config.ttt.as_mut().unwrap().forgets = forgets;
            check(&model, 3, 7, 120, true, 1e-5);
        }
        let mut model = student(TttTarget::HiddenStates);
        // Less to add up: errors of rounding grow with the text.
        model.config.ttt.as_mut().unwrap().lr = 0.02;
        let model = model.with_positions(4 * SPAN_ROWS);
        check(&model, 2, 3, 2 * 2 * SPAN_ROWS - 600, true, 1e-3);
        assert_eq!(waves(&model.config, None, 2, 3, 4096).len(), 2);
    }

    #[test]
    fn a_layer_that_begins_again_inside_a_wave_does_so_in_a_split_prompt_too() {
        let mut model = student(TttTarget::HiddenStates);
        let ids = text(96);
        let pool = Pool::new(1, 0);
        let mut free = model.sequence(8, true);
        model.step(&pool, &mut [(&mut free, &ids)]).unwrap();
        let drifts: Vec<f32> = free.fast.updates.iter().map(|(_, u)| u.drift).collect();
        // Past the third of six edges.
        let cap = (drifts[2] + drifts[3]) / 2.0;
        model.config.ttt.as_mut().unwrap().max_drift = Some(cap);
        let mut whole = model.sequence(8, true);
        let want = model.step(&pool, &mut [(&mut whole, &ids)]).unwrap();
        assert!(whole.fast.updates.iter().any(|(_, u)| u.tripped));
        for workers in 2..=3 {
            let pools: Vec<Pool> = (0..workers).map(|_| Pool::new(1, 0)).collect();
            let mut split = model.sequence(8, true);
            let got = model.prefill_split(&pools, &mut split, &ids).unwrap();
            // Read again as a whole, by a pool of as many threads.
            assert_eq!(got, want);
            assert_eq!(split.fast.updates, whole.fast.updates);
        }
    }

    #[test]
    fn spans_share_out_the_work_at_edges_and_leave_nothing_out() {
        let mut config = student(TttTarget::HiddenStates).config;
        config.num_attention_heads = 64;
        let ttt = TttConfig {
            chunk_len: 24,
            ..TttConfig::default()
        };
        assert_eq!(unit(&config, Some(&ttt)), 48);
        for (workers, wave) in [(1, 0..7), (3, 5..1000), (4, 4000..9000), (2, 47..50)] {
            let spans = spans(&config, Some(&ttt), workers, wave.clone());
            assert!(spans.len() <= workers);
            assert_eq!(
                (spans[0].start, spans[spans.len() - 1].end),
                (wave.start, wave.end)
            );
            for pair in spans.windows(2) {
                assert_eq!(pair[0].end, pair[1].start);
                assert!(pair[1].start.is_multiple_of(48));
            }
        }
        // With nothing but attention the first half of the work is the first 0.7 of a text.
        config.hidden_size = 1;
        let halves = spans(&config, None, 2, 0..10_000);
        assert!((6_900..7_200).contains(&halves[1].start), "{halves:?}");
    }

    #[test]
    fn a_split_prompt_that_cannot_be_read_changes_nothing() {
        let model = student(TttTarget::HiddenStates);
        let pools = [Pool::new(1, 0), Pool::new(1, 0)];
        let mut sequence = model.sequence(8, true);
        let mut ids = text(100);
        ids[77] = u32::MAX;
        let refused = model.prefill_split(&pools, &mut sequence, &ids);
        assert!(matches!(refused, Err(ModelError::Token { .. })));
        let long = text(model.max_positions() + 1);
        let refused = model.prefill_split(&pools, &mut sequence, &long);
        assert!(matches!(refused, Err(ModelError::TooLong { .. })));
        assert!(sequence.ids.is_empty() && sequence.kv.is_empty());
    }
}
