//! The fast weight of one layer in one sequence: what it is now, what waits for the chunk's edge, and where the sequence stands.

use std::ops::Range;
use std::sync::Arc;

use super::quantised::{first_rows, Terms, BLOCK_ROWS};
use super::rule::{add_outer, add_scaled, change, correct, decay, distance, down, is_zero, target};
use super::{Forgetting, TttConfig, TttError, TttLayer, TttMode};
use crate::kernels::{PackedQ8, Pool, PANEL_ROWS};

/// The trained down-projection that the sequences of a student begin with (d, f), and its norm, taken once.
#[derive(Clone)]
pub struct StartWeight {
    w: Arc<Vec<f32>>,
    hidden_size: usize,
    norm: f64,
    format: FastFormat,
    /// Of the scales of a weight like this one in 8 bits; taken once, because every sequence that learns needs it.
    unit: f32,
}

/// In which numbers a weight that has learned is applied, and its updates are computed. Its sum is `f32` in any.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FastFormat {
    #[default]
    F32,
    /// As the matrices of students of 8 and 4 bits: the weight packed anew at each edge, and the operands of the outer products
    /// quantised in blocks of 32 tokens.
    Q8,
}

impl StartWeight {
    /// # Panics
    /// If `w` is not a matrix of `hidden_size` rows.
    pub fn new(w: Arc<Vec<f32>>, hidden_size: usize) -> Self {
        assert!(
            hidden_size > 0 && !w.is_empty() && w.len().is_multiple_of(hidden_size),
            "a down-projection has {hidden_size} rows"
        );
        let zeros = [0.0; 1024];
        let square = |part: &[f32]| distance(None, part, &zeros[..part.len()]).powi(2);
        let norm = w.chunks(1024).map(square).sum::<f64>().sqrt();
        Self {
            w,
            hidden_size,
            norm,
            format: FastFormat::F32,
            unit: 1.0,
        }
    }

    /// The same, for sequences whose weights are to be kept in another format.
    pub fn in_format(self, format: FastFormat) -> Self {
        let unit = match format {
            FastFormat::F32 => 1.0,
            FastFormat::Q8 => PackedQ8::unit_of(&self.w),
        };
        Self {
            format,
            unit,
            ..self
        }
    }

    /// (d, f), row-major.
    pub(super) fn weight(&self) -> &[f32] {
        &self.w
    }

    /// (d, f)
    pub(super) fn shape(&self) -> (usize, usize) {
        (self.hidden_size, self.w.len() / self.hidden_size)
    }
}

/// What the tokens given to a layer did to its chunk.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Chunk {
    /// It is not full; nothing has changed.
    Waits,
    /// It is full, and the weight was updated.
    Learned(Update),
    /// It is full, and in [`TttMode::Gradient`] the caller may now bring the gradient.
    Due,
}

/// One update of a fast weight, for events and for the plot of its drift.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Update {
    /// Tokens read when it was made: a multiple of the chunk's length.
    pub position: usize,
    /// `‖W − W₀‖ / ‖W₀‖` after it. Not finite if the update was not.
    pub drift: f32,
    /// The drift was past the cap or no number, and the layer has begun again from `W₀`.
    pub tripped: bool,
}

/// The state of one layer in one sequence. All sums in it are `f32`.
///
/// A clone is a snapshot, and putting it back restores it: matrices are shared until one of the two is written to. The sequence's keys
/// and values must be saved, cut and dropped with it.
///
/// Memory with d 576, f 1536, c 256: 3.5 MB once the first update is made, 2.2 MB for what waits, and another 3.5 MB while work is done
/// ahead. Before the first update the weight is the student's own. In [`FastFormat::Q8`] there are 0.9 MB more for the weight in 8 bits and
/// 1.1 MB for the rows of a chunk. A delta rule takes 3.5 MB for as long as a call works ahead or makes an update.
///
/// ```
/// # use std::sync::Arc;
/// # use locum_core::ttt::{FastWeight, StartWeight, TttConfig, TttLayer};
/// let config = TttConfig { chunk_len: 2, kernel_size: 3, proj: false, lr: 1.0, max_drift: None, ..Default::default() };
/// let layer = TttLayer::new(&config, 1, &[0.0, 1.0, 0.0], None)?; // v = u
/// let mut fast = FastWeight::new(&StartWeight::new(Arc::new(vec![2.0]), 1));
/// let mut y = [0.0; 3];
/// let updates = fast.forward(None, &config, layer, &[1.0, 1.0, 1.0], &[0.5, 0.5, 0.5], &mut y);
/// assert_eq!(y, [2.0, 2.0, 3.0]); // the third token meets W = 2 + 0.5 + 0.5
/// assert_eq!((updates.len(), updates[0].drift), (1, 0.5));
/// # Ok::<(), locum_core::ttt::TttError>(())
/// ```
#[derive(Clone)]
pub struct FastWeight {
    start: StartWeight,
    /// (d, f), as applied to this chunk.
    w: Arc<Vec<f32>>,
    /// What `w` will be after the chunk, as far as the first `rows_ahead` of what waits go.
    ahead: Option<Arc<Vec<f32>>>,
    rows_ahead: usize,
    /// The matrix that `ahead` took the place of, whose memory the next one may have: fresh pages cost more than the copy.
    spare: Option<Arc<Vec<f32>>>,
    /// In [`FastFormat::Q8`]: `w` in 8 bits, once it has learned, and the terms of the coming one, of which `rows_ahead` rows are there.
    packed: Option<Arc<PackedQ8>>,
    terms: Option<Box<Terms>>,
    /// What waits, from the chunk's first token on: (n, f) and (n, d). Empty in a chunk that was entered without being read.
    z: Arc<Vec<f32>>,
    u: Arc<Vec<f32>>,
    position: usize,
    drift: f32,
    /// What waits is a whole chunk, whose update was put off.
    due: bool,
}

impl FastWeight {
    /// The state before the first token.
    pub fn new(start: &StartWeight) -> Self {
        Self {
            start: start.clone(),
            w: start.w.clone(),
            ahead: None,
            rows_ahead: 0,
            spare: None,
            packed: None,
            terms: None,
            z: Arc::default(),
            u: Arc::default(),
            position: 0,
            drift: 0.0,
            due: false,
        }
    }

    /// The down-projection (d, f) for the tokens up to the next edge.
    pub fn weight(&self) -> &[f32] {
        &self.w
    }

    /// The same, shared: an update then makes a copy.
    pub fn shared(&self) -> Arc<Vec<f32>> {
        self.w.clone()
    }

    /// Whether that is still the trained weight itself, so that the student's own product, packed or not, gives the plain model's numbers.
    pub fn is_start(&self) -> bool {
        Arc::ptr_eq(&self.w, &self.start.w)
    }

    /// `y = z Wᵀ`, with the weight in its format: z (t, f), y (t, d). The caller has a faster product for the trained one
    /// ([`Self::is_start`]).
    ///
    /// # Panics
    /// If the lengths do not fit.
    pub fn apply(&self, pool: Option<&Pool>, z: &[f32], y: &mut [f32]) {
        let (d, f) = self.start.shape();
        match &self.packed {
            Some(packed) => packed.product(pool, z, z.len() / f, y),
            None => down(pool, z, &self.w, (d, f), y),
        }
    }

    /// Tokens read, whether learned from or not.
    pub fn position(&self) -> usize {
        self.position
    }

    /// `‖W − W₀‖ / ‖W₀‖` after the last update; 0 before the first and after a reset.
    pub fn drift(&self) -> f32 {
        self.drift
    }

    /// Tokens that wait for the edge.
    pub fn waiting(&self) -> usize {
        self.u.len() / self.start.hidden_size
    }

    /// Tokens that [`Self::weight`] still answers: those up to the next edge, at least one.
    pub fn room(&self, config: &TttConfig) -> usize {
        config.chunk_len - self.position % config.chunk_len
    }

    /// Bytes that this sequence holds for itself; what clones share is counted in each.
    pub fn bytes(&self) -> usize {
        let own = if self.is_start() { 0 } else { self.w.len() };
        let more = [&self.ahead, &self.spare].into_iter().flatten();
        let more: usize = more.map(|w| w.len()).sum();
        let packed = self.packed.as_ref().map_or(0, |w| w.bytes());
        let terms = self.terms.as_ref().map_or(0, |terms| terms.bytes());
        4 * (own + more + self.z.capacity() + self.u.capacity()) + packed + terms
    }

    /// Reads any number of tokens: each run up to an edge is answered, then learned from. Shapes: z (t, f), u (t, d), y (t, d), where u is
    /// what [`TttConfig::target`] says. The numbers do not depend on how a sequence is cut into calls, except for rounding. Returns
    /// the updates made.
    ///
    /// # Panics
    /// If the lengths do not fit, or in [`TttMode::Gradient`] if the tokens go past an edge, where the caller has something to do.
    pub fn forward(
        &mut self,
        pool: Option<&Pool>,
        config: &TttConfig,
        layer: TttLayer,
        z: &[f32],
        u: &[f32],
        y: &mut [f32],
    ) -> Vec<Update> {
        let (d, f) = self.start.shape();
        let t = y.len() / d;
        assert_eq!((z.len(), u.len()), (t * f, t * d), "(t, f) and (t, d)");
        let mut updates = Vec::new();
        let mut from = 0;
        while from < t {
            let to = t.min(from + self.room(config));
            let (z, u) = (&z[from * f..to * f], &u[from * d..to * d]);
            self.apply(pool, z, &mut y[from * d..to * d]);
            match self.absorb(pool, config, layer, z, u) {
                Chunk::Learned(update) => updates.push(update),
                Chunk::Waits => {}
                Chunk::Due => assert_eq!(to, t, "tokens past an edge whose gradient is due"),
            }
            from = to;
        }
        updates
    }

    /// Takes in tokens that were answered with [`Self::weight`], at most [`Self::room`] of them, and updates the weight if they fill
    /// the chunk. For callers that compute the product themselves; [`Self::forward`] does both. Shapes: z (n, f), u (n, d).
    ///
    /// # Panics
    /// If the lengths do not fit, the tokens go past the edge, or an update that was put off was not made.
    pub fn absorb(
        &mut self,
        pool: Option<&Pool>,
        config: &TttConfig,
        layer: TttLayer,
        z: &[f32],
        u: &[f32],
    ) -> Chunk {
        match self.take_in(pool, config, layer, z, u) {
            Chunk::Waits => self.settle_as(pool, config, layer),
            chunk => chunk,
        }
    }

    /// [`Self::absorb`], but in [`FastFormat::Q8`] an update of tokens that came in several calls is put off until [`Self::settle`], which must come before
    /// anything else that reads the weight: so that not all layers have to make theirs at one token.
    ///
    /// # Panics
    /// As [`Self::absorb`].
    pub fn take_in(
        &mut self,
        pool: Option<&Pool>,
        config: &TttConfig,
        layer: TttLayer,
        z: &[f32],
        u: &[f32],
    ) -> Chunk {
        assert!(!self.due, "an update that was put off was not made");
        let (d, f) = self.start.shape();
        let (c, n) = (config.chunk_len, u.len() / d);
        assert_eq!((z.len(), u.len()), (n * f, n * d), "(n, f) and (n, d)");
        assert!(
            n <= self.room(config),
            "{n} tokens go past the chunk's edge"
        );
        if n == 0 {
            return Chunk::Waits;
        }
        let reading = config.mode == TttMode::InPlace && self.waiting() == self.position % c;
        self.position += n;
        let full = self.position.is_multiple_of(c);
        if !reading {
            return match config.mode {
                TttMode::Gradient if full => Chunk::Due,
                _ => Chunk::Waits,
            };
        }
        if n == c {
            // A whole chunk in one call, as in prefill, is learned from where it lies.
            return Chunk::Learned(self.learn(pool, config, layer, z, u));
        }
        append(&mut self.z, z, c * f);
        append(&mut self.u, u, c * d);
        if !full {
            return Chunk::Waits;
        }
        self.due = true;
        match self.start.format {
            FastFormat::F32 => self.settle_as(pool, config, layer),
            FastFormat::Q8 => Chunk::Waits,
        }
    }

    fn settle_as(&mut self, pool: Option<&Pool>, config: &TttConfig, layer: TttLayer) -> Chunk {
        let update = self.settle(pool, config, layer);
        update.map_or(Chunk::Waits, Chunk::Learned)
    }

    /// Makes the update that was put off, if there is one.
    pub fn settle(
        &mut self,
        pool: Option<&Pool>,
        config: &TttConfig,
        layer: TttLayer,
    ) -> Option<Update> {
        if !std::mem::take(&mut self.due) {
            return None;
        }
        let (mut z, mut u) = (std::mem::take(&mut self.z), std::mem::take(&mut self.u));
        let update = self.learn(pool, config, layer, &z, &u);
        // The next chunk will want the room, unless a snapshot still reads what is in it.
        for (buffer, own) in [(&mut z, &mut self.z), (&mut u, &mut self.u)] {
            if let Some(buffer) = Arc::get_mut(buffer) {
                buffer.clear();
                *own = Arc::new(std::mem::take(buffer));
            }
        }
        Some(update)
    }

    /// Lets `n` tokens pass that are not learned from, for stretches with the updates off. The chunk they fall into is not learned from
    /// at all, for its sum would lack them; the next one is.
    pub fn skip(&mut self, n: usize) {
        if n > 0 {
            self.position += n;
            self.drop_waiting();
        }
    }

    /// Takes up to `max_rows` waiting tokens into the update ahead of the edge, so that less is left to do there; returns how many.
    /// A token's target is final once the filter's look-ahead has come. Only rounding depends on it, and in [`FastFormat::Q8`] nothing,
    /// where whole blocks of 32 are taken. `lr` must then stay the same until the edge.
    pub fn work_ahead(
        &mut self,
        pool: Option<&Pool>,
        config: &TttConfig,
        layer: TttLayer,
        max_rows: usize,
    ) -> usize {
        let (d, f) = self.start.shape();
        let final_rows = self.waiting().saturating_sub(config.kernel_size / 2);
        let most = final_rows.min(self.rows_ahead.saturating_add(max_rows));
        let most = match self.start.format {
            FastFormat::F32 => most,
            FastFormat::Q8 => most.min(first_rows(config.chunk_len)) / BLOCK_ROWS * BLOCK_ROWS,
        };
        let rows = self.rows_ahead..most;
        if rows.is_empty() || config.lr == 0.0 {
            return 0;
        }
        let v = self.targets(pool, config, layer, (&self.z, &self.u), rows.clone());
        if self.start.format == FastFormat::Q8 {
            let z = self.z.clone();
            self.fill(
                pool,
                config,
                rows.start,
                &v,
                &z[rows.start * f..rows.end * f],
            );
        } else if !is_zero(&v) {
            if let (None, Some(mut spare)) = (&self.ahead, self.spare.take()) {
                if let Some(copy) = Arc::get_mut(&mut spare) {
                    copy.copy_from_slice(&self.w);
                    self.ahead = Some(spare);
                }
            }
            let w = self.ahead.get_or_insert_with(|| self.w.clone());
            let z = &self.z[rows.start * f..rows.end * f];
            add_outer(
                pool,
                (&v, z),
                config.lr,
                (d, f),
                Arc::make_mut(w).as_mut_slice(),
            );
        }
        self.rows_ahead = rows.end;
        rows.len()
    }

    /// In [`FastFormat::Q8`], brings a part of the coming weight to where the tokens that [`Self::work_ahead`] took in leave it, once all
    /// it can take in are there: about a sixteenth of the weight at a call. Nothing depends on it but the time that is left to do.
    pub fn sum_ahead(&mut self, pool: Option<&Pool>, config: &TttConfig) {
        let first = first_rows(config.chunk_len);
        if self.due || self.rows_ahead != first || first == 0 || config.lr == 0.0 {
            return;
        }
        let shape = self.start.shape();
        let Some(terms) = self.terms.as_deref_mut().filter(|terms| terms.any) else {
            return;
        };
        let threads = pool.map_or(1, Pool::threads);
        let turns = shape.0.div_ceil(PANEL_ROWS).div_ceil(16);
        let panels = turns.next_multiple_of(threads);
        let mut spare = || self.spare.take().filter(|w| Arc::strong_count(w) == 1);
        // The first panels to be summed write over whatever the room holds.
        let ahead = self
            .ahead
            .get_or_insert_with(|| spare().unwrap_or_else(|| Arc::new(vec![0.0; self.w.len()])));
        let coming = Arc::make_mut(ahead).as_mut_slice();
        terms.add_first(pool, shape, config.lr, (self.w.as_slice(), coming), panels);
    }

    /// `W ← W − lr · dw`, with the gradient of a loss over the chunk that is just full, in [`TttMode::Gradient`]. Shape: dw (d, f).
    ///
    /// # Panics
    /// If the sequence does not stand at an edge, or the shape does not fit.
    pub fn descend(&mut self, pool: Option<&Pool>, config: &TttConfig, dw: &[f32]) -> Update {
        assert!(
            self.position.is_multiple_of(config.chunk_len),
            "gradients are applied at an edge"
        );
        assert_eq!(dw.len(), self.w.len(), "(d, f)");
        if config.lr != 0.0 && !is_zero(dw) {
            add_scaled(
                pool,
                dw,
                -config.lr,
                Arc::make_mut(&mut self.w).as_mut_slice(),
            );
        }
        if config.lr != 0.0 {
            self.decay(pool, config);
            self.pack(pool);
        }
        self.judge(config, self.distance(pool))
    }

    /// Forgets what was summed ahead of the edge, so that another step size counts for the whole of the open chunk.
    pub fn begin_sum_anew(&mut self) {
        self.forget_ahead();
    }

    /// Back to the trained weight, as at the start of an episode. The position stays, and so does the grid: the rest of an open chunk
    /// is not learned from.
    pub fn reset(&mut self) {
        self.w = self.start.w.clone();
        self.spare = None;
        self.packed = None;
        self.drift = 0.0;
        self.drop_waiting();
    }

    /// Forgets all tokens from `position` on, exactly, if they stand behind the last edge. Further back a clone must be put back.
    ///
    /// # Errors
    /// [`TttError::BehindEdge`]; nothing has then been changed.
    pub fn truncate(&mut self, config: &TttConfig, position: usize) -> Result<(), TttError> {
        if position >= self.position {
            return Ok(());
        }
        let edge = self.position - self.position % config.chunk_len;
        if position < edge {
            let asked = position;
            return Err(TttError::BehindEdge { asked, edge });
        }
        let (d, f) = self.start.shape();
        let rows = self.waiting().min(position - edge);
        for (buffer, len) in [(&mut self.z, rows * f), (&mut self.u, rows * d)] {
            if len < buffer.len() {
                Arc::make_mut(buffer).truncate(len);
            }
        }
        // Targets that looked at a token which is gone were not final after all.
        if self.rows_ahead + config.kernel_size / 2 > rows {
            self.forget_ahead();
        }
        self.position = position;
        Ok(())
    }

    /// Updates the weight from a full chunk: z (c, f), u (c, d).
    fn learn(
        &mut self,
        pool: Option<&Pool>,
        config: &TttConfig,
        layer: TttLayer,
        z: &[f32],
        u: &[f32],
    ) -> Update {
        let (d, f) = self.start.shape();
        let done = std::mem::take(&mut self.rows_ahead);
        let v = match config.lr {
            0.0 => Vec::new(),
            _ => self.targets(pool, config, layer, (z, u), done..config.chunk_len),
        };
        if self.start.format == FastFormat::Q8 && config.lr != 0.0 {
            self.fill(pool, config, done, &v, &z[done * f..]);
            let apart = self.finish(pool, config);
            return self.judge(config, apart);
        }
        if let Some(w) = self.ahead.take() {
            self.replace(w);
        }
        // An untrained filter leaves the weight the student's own, not a copy of it.
        if config.lr != 0.0 && !is_zero(&v) {
            let w = Arc::make_mut(&mut self.w);
            add_outer(pool, (&v, &z[done * f..]), config.lr, (d, f), w);
        }
        if config.lr != 0.0 {
            self.decay(pool, config);
        }
        self.judge(config, self.distance(pool))
    }

    /// The targets of some rows of the open chunk, whose first ones are z (n, f) and u (n, d): what the update adds of each, over η.
    fn targets(
        &self,
        pool: Option<&Pool>,
        config: &TttConfig,
        layer: TttLayer,
        (z, u): (&[f32], &[f32]),
        rows: Range<usize>,
    ) -> Vec<f32> {
        let (d, f) = self.start.shape();
        let mut v = target(pool, layer, u, rows.clone(), d);
        if let (Some(rate), false) = (config.delta_rate(), self.is_start()) {
            let change = change(pool, &self.w, &self.start.w);
            let z = &z[rows.start * f..rows.end * f];
            correct(pool, &change, rate, z, (d, f), &mut v);
        }
        v
    }

    /// What an edge takes from everything that was written so far, in rules that do.
    fn decay(&mut self, pool: Option<&Pool>, config: &TttConfig) {
        let Forgetting::Decay(kept) = config.forgets else {
            return;
        };
        if !self.is_start() {
            let w = Arc::make_mut(&mut self.w).as_mut_slice();
            decay(pool, &self.start.w, kept, w);
        }
    }

    /// Takes rows from row `from` of the chunk on into its terms.
    fn fill(&mut self, pool: Option<&Pool>, config: &TttConfig, from: usize, v: &[f32], z: &[f32]) {
        let shape = self.start.shape();
        let new = || Box::new(Terms::new(shape, config.chunk_len));
        let terms = self.terms.get_or_insert_with(new);
        terms.any |= !is_zero(v);
        terms.fill(pool, from, shape, v, z);
    }

    /// The update of a chunk whose terms are all there; returns the distance from the trained weight.
    fn finish(&mut self, pool: Option<&Pool>, config: &TttConfig) -> f64 {
        let Some(mut terms) = self.terms.take() else {
            unreachable!("a chunk ends without its terms");
        };
        if !terms.any {
            // An untrained filter leaves the weight the student's own, not a copy of it.
            terms.clear();
            self.terms = Some(terms);
            if matches!(config.forgets, Forgetting::Decay(_)) {
                self.decay(pool, config);
                self.pack(pool);
            }
            return self.distance(pool);
        }
        let mut packed = self.room_to_pack();
        let room = Arc::make_mut(&mut packed);
        let coming = match (self.ahead.take(), Arc::get_mut(&mut self.w)) {
            (None, None) => {
                // What is shared is not copied first: each part copies what it goes on with, on its own thread.
                let spare = self.spare.take().filter(|w| Arc::strong_count(w) == 1);
                Some(spare.unwrap_or_else(|| Arc::new(vec![0.0; self.w.len()])))
            }
            (ahead, _) => ahead,
        };
        let apart = match coming {
            Some(mut coming) => {
                let to = Arc::make_mut(&mut coming).as_mut_slice();
                let apart = terms.finish(
                    pool,
                    &self.start,
                    config,
                    (Some(self.w.as_slice()), to),
                    room,
                );
                self.replace(coming);
                apart
            }
            None => {
                let to = Arc::make_mut(&mut self.w).as_mut_slice();
                terms.finish(pool, &self.start, config, (None, to), room)
            }
        };
        self.packed = Some(packed);
        self.terms = Some(terms);
        apart
    }

    /// Puts the coming weight in the place of the present one, whose memory the next may have.
    fn replace(&mut self, coming: Arc<Vec<f32>>) {
        let before = std::mem::replace(&mut self.w, coming);
        self.spare = (!Arc::ptr_eq(&before, &self.start.w)).then_some(before);
    }

    /// Packs the weight as it is, in formats that do.
    fn pack(&mut self, pool: Option<&Pool>) {
        if self.start.format == FastFormat::F32 || self.is_start() {
            return;
        }
        let mut packed = self.room_to_pack();
        let w = Arc::make_mut(&mut self.w).as_mut_slice();
        Arc::make_mut(&mut packed).refill(pool, w, |_, _| 0.0);
        self.packed = Some(packed);
    }

    fn distance(&self, pool: Option<&Pool>) -> f64 {
        match self.is_start() {
            true => 0.0,
            false => distance(pool, &self.w, &self.start.w),
        }
    }

    /// Notes the drift after an update and begins again if it is too large.
    fn judge(&mut self, config: &TttConfig, apart: f64) -> Update {
        let drift = (apart / self.start.norm) as f32;
        let drift = if self.is_start() { 0.0 } else { drift };
        self.drift = drift;
        let tripped = !drift.is_finite() || config.max_drift.is_some_and(|cap| drift > cap);
        if tripped {
            self.reset();
        }
        Update {
            position: self.position,
            drift,
            tripped,
        }
    }

    /// A packed weight to write to: the last one, unless a snapshot still reads it.
    fn room_to_pack(&mut self) -> Arc<PackedQ8> {
        let (d, f) = self.start.shape();
        let last = self.packed.take().filter(|w| Arc::strong_count(w) == 1);
        last.unwrap_or_else(|| Arc::new(PackedQ8::blank(d, f, self.start.unit)))
    }

    fn drop_waiting(&mut self) {
        self.due = false;
        self.z = Arc::default();
        self.u = Arc::default();
        self.forget_ahead();
    }

    fn forget_ahead(&mut self) {
        self.ahead = None;
        self.rows_ahead = 0;
        if let Some(terms) = &mut self.terms {
            terms.clear();
        }
    }

    /// The sum of the updates that tokens read from here on will make, (d, f): z (n, f), u (n, d), of which the last chunk may stay open.
    /// `None` where they change nothing. It does not depend on the weight, so whoever reads what follows can have it before these are
    /// read; see [`Self::later`].
    ///
    /// # Panics
    /// If the lengths do not fit, in [`TttMode::Gradient`], or under a rule that forgets.
    pub fn sum_of(
        &self,
        pool: Option<&Pool>,
        config: &TttConfig,
        layer: TttLayer,
        z: &[f32],
        u: &[f32],
    ) -> Option<Vec<f32>> {
        assert!(
            config.mode == TttMode::InPlace,
            "gradients depend on the weight"
        );
        assert!(
            config.forgets == Forgetting::Nothing,
            "what is forgotten depends on the weight"
        );
        let (d, f) = self.start.shape();
        let (c, n) = (config.chunk_len, u.len() / d);
        assert_eq!((z.len(), u.len()), (n * f, n * d), "(n, f) and (n, d)");
        let mut sum: Option<Vec<f32>> = None;
        let mut terms = None;
        let mut from = 0;
        let mut to = self.room(config);
        while to <= n && config.lr != 0.0 {
            let (mut z, mut u) = (&z[from * f..to * f], &u[from * d..to * d]);
            let waiting;
            if from == 0 && self.waiting() > 0 {
                waiting = ([&self.z[..], z].concat(), [&self.u[..], u].concat());
                (z, u) = (&waiting.0[..], &waiting.1[..]);
            }
            let v = match u.len() == c * d {
                true => target(pool, layer, u, 0..c, d),
                // The chunk was entered without being read.
                false => Vec::new(),
            };
            if !is_zero(&v) {
                let sum = sum.get_or_insert_with(|| vec![0.0; d * f]);
                match self.start.format {
                    FastFormat::F32 => add_outer(pool, (&v, z), config.lr, (d, f), sum),
                    FastFormat::Q8 => {
                        let terms = terms.get_or_insert_with(|| Terms::new((d, f), c));
                        terms.fill(pool, 0, (d, f), &v, z);
                        terms.add_all(pool, (d, f), config.lr, sum);
                    }
                }
            }
            (from, to) = (to, to + c);
        }
        sum
    }

    /// The state `tokens` tokens on, at an edge, after updates that sum to `sums` ([`Self::sum_of`]). Only rounding tells it from the state
    /// of who read them, unless one of the updates was past the cap.
    ///
    /// # Panics
    /// If that is no edge, or a sum has another shape.
    pub fn later(
        &self,
        pool: Option<&Pool>,
        config: &TttConfig,
        tokens: usize,
        sums: &[Arc<Vec<f32>>],
    ) -> Self {
        let mut later = Self::new(&self.start);
        later.position = self.position + tokens;
        assert!(
            later.position.is_multiple_of(config.chunk_len),
            "a state is handed on at an edge"
        );
        later.w = self.w.clone();
        later.packed = self.packed.clone();
        later.drift = self.drift;
        for sum in sums {
            add_scaled(pool, sum, 1.0, Arc::make_mut(&mut later.w).as_mut_slice());
        }
        if !sums.is_empty() {
            later.pack(pool);
            later.drift = (later.distance(pool) / self.start.norm) as f32;
        }
        later
    }
}

/// [`FastWeight::forward`] for sequences side by side, `n` tokens of each, packed in order: z (t, f), u (t, d), y (t, d). Returns the
/// updates with the index of their sequence.
///
/// # Panics
/// As [`FastWeight::forward`].
pub fn forward_rows(
    pool: Option<&Pool>,
    config: &TttConfig,
    layer: TttLayer,
    batch: &mut [(&mut FastWeight, usize)],
    (z, u, y): (&[f32], &[f32], &mut [f32]),
) -> Vec<(usize, Update)> {
    let mut updates = Vec::new();
    let mut from = 0;
    for (i, (fast, n)) in batch.iter_mut().enumerate() {
        let (d, f) = fast.start.shape();
        let to = from + *n;
        let (z, u) = (&z[from * f..to * f], &u[from * d..to * d]);
        let made = fast.forward(pool, config, layer, z, u, &mut y[from * d..to * d]);
        updates.extend(made.into_iter().map(|update| (i, update)));
        from = to;
    }
    updates
}

/// Appends to a buffer that will hold `whole` numbers; one that a snapshot shares is copied first.
fn append(buffer: &mut Arc<Vec<f32>>, new: &[f32], whole: usize) {
    if Arc::get_mut(buffer).is_none() {
        let mut own = Vec::with_capacity(whole);
        own.extend_from_slice(buffer);
        *buffer = Arc::new(own);
    }
    let own = Arc::get_mut(buffer).expect("a copy of its own was made");
    own.reserve_exact(whole.saturating_sub(own.len()));
    own.extend_from_slice(new);
}
