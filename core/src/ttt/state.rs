//! The fast weight of one layer in one sequence: what it is now, what waits for the chunk's edge, and where the sequence stands.

use std::sync::Arc;

use super::rule::{add_outer, add_scaled, distance, down, is_zero, target};
use super::{TttConfig, TttError, TttLayer, TttMode};
use crate::kernels::Pool;

/// The trained down-projection that the sequences of a student begin with (d, f), and its norm, taken once.
#[derive(Clone)]
pub struct StartWeight {
    w: Arc<Vec<f32>>,
    hidden_size: usize,
    norm: f64,
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
        }
    }

    /// (d, f)
    fn shape(&self) -> (usize, usize) {
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

/// The state of one layer in one sequence. All of it is `f32`.
///
/// A clone is a snapshot, and putting it back restores it: matrices are shared until one of the two is written to. The sequence's keys
/// and values must be saved, cut and dropped with it.
///
/// Memory with d 576, f 1536, c 256: 3.5 MB once the first update is made, 2.2 MB for what waits, and another 3.5 MB while work is done
/// ahead. Before the first update the weight is the student's own.
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
    /// What waits, from the chunk's first token on: (n, f) and (n, d). Empty in a chunk that was entered without being read.
    z: Arc<Vec<f32>>,
    u: Arc<Vec<f32>>,
    position: usize,
    drift: f32,
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
            z: Arc::default(),
            u: Arc::default(),
            position: 0,
            drift: 0.0,
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
        4 * (own + more + self.z.capacity() + self.u.capacity())
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
            down(pool, z, &self.w, (d, f), &mut y[from * d..to * d]);
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
    /// If the lengths do not fit or the tokens go past the edge.
    pub fn absorb(
        &mut self,
        pool: Option<&Pool>,
        config: &TttConfig,
        layer: TttLayer,
        z: &[f32],
        u: &[f32],
    ) -> Chunk {
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
        let (mut z, mut u) = (std::mem::take(&mut self.z), std::mem::take(&mut self.u));
        let update = self.learn(pool, config, layer, &z, &u);
        // The next chunk will want the room, unless a snapshot still reads what is in it.
        for (buffer, own) in [(&mut z, &mut self.z), (&mut u, &mut self.u)] {
            if let Some(buffer) = Arc::get_mut(buffer) {
                buffer.clear();
                *own = Arc::new(std::mem::take(buffer));
            }
        }
        Chunk::Learned(update)
    }

    /// Lets `n` tokens pass that are not learned from, for stretches with the updates off. The chunk they fall into is not learned from
    /// at all, for its sum would lack them; the next one is.
    pub fn skip(&mut self, n: usize) {
        if n > 0 {
            self.position += n;
            self.drop_waiting();
        }
    }

    /// Adds the outer products of up to `max_rows` waiting tokens ahead of the edge, so that less is left to do there; returns how many.
    /// A token's target is final once the filter's look-ahead has come. Only rounding depends on it. `lr` must then stay the same
    /// until the edge.
    pub fn work_ahead(
        &mut self,
        pool: Option<&Pool>,
        config: &TttConfig,
        layer: TttLayer,
        max_rows: usize,
    ) -> usize {
        let (d, f) = self.start.shape();
        let final_rows = self.waiting().saturating_sub(config.kernel_size / 2);
        let rows = self.rows_ahead..final_rows.min(self.rows_ahead.saturating_add(max_rows));
        if rows.is_empty() || config.lr == 0.0 {
            return 0;
        }
        let v = target(pool, layer, &self.u, rows.clone(), d);
        if !is_zero(&v) {
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
        self.judge(pool, config)
    }

    /// Back to the trained weight, as at the start of an episode. The position stays, and so does the grid: the rest of an open chunk
    /// is not learned from.
    pub fn reset(&mut self) {
        self.w = self.start.w.clone();
        self.spare = None;
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
            self.ahead = None;
            self.rows_ahead = 0;
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
        if let Some(w) = self.ahead.take() {
            let before = std::mem::replace(&mut self.w, w);
            self.spare = (!Arc::ptr_eq(&before, &self.start.w)).then_some(before);
        }
        let v = target(pool, layer, u, done..config.chunk_len, d);
        // An untrained filter leaves the weight the student's own, not a copy of it.
        if config.lr != 0.0 && !is_zero(&v) {
            let w = Arc::make_mut(&mut self.w);
            add_outer(pool, (&v, &z[done * f..]), config.lr, (d, f), w);
        }
        self.judge(pool, config)
    }

    /// Measures the drift after an update and begins again if it is too large.
    fn judge(&mut self, pool: Option<&Pool>, config: &TttConfig) -> Update {
        let drift = match self.is_start() {
            true => 0.0,
            false => (distance(pool, &self.w, &self.start.w) / self.start.norm) as f32,
        };
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

    fn drop_waiting(&mut self) {
        self.z = Arc::default();
        self.u = Arc::default();
        self.ahead = None;
        self.rows_ahead = 0;
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
