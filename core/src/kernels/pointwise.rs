//! RMSNorm, rotary embedding, SwiGLU: row by row, split over the pool, each with its backward pass.

use super::lanes::{on_lanes, Lanes, OnLanes, LANES};
use super::pool::{Pool, SharedMut};
use super::simd;

/// Rows a thread takes at a time.
fn rows_per_part(pool: Option<&Pool>, rows: usize, width: usize) -> usize {
    match pool {
        Some(pool) if rows * width >= 1 << 14 => rows.div_ceil(pool.threads()),
        _ => rows.max(1),
    }
}

fn by_rows(pool: Option<&Pool>, rows: usize, width: usize, body: impl Fn(usize, usize) + Sync) {
    let piece = rows_per_part(pool, rows, width);
    let parts = rows.div_ceil(piece);
    let run = |part: usize| body(part * piece, ((part + 1) * piece).min(rows));
    match pool {
        Some(pool) if parts > 1 => pool.run(parts, run),
        _ => (0..parts).for_each(run),
    }
}

/// `x += y`.
pub fn add_in_place(x: &mut [f32], y: &[f32]) {
    assert_eq!(x.len(), y.len());
    on_lanes(Add { x, y })
}

struct Add<'a> {
    x: &'a mut [f32],
    y: &'a [f32],
}

impl OnLanes for Add<'_> {
    type Out = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        // Simple enough for the compiler to find the registers by itself, once it is compiled for them.
        for (x, y) in self.x.iter_mut().zip(self.y) {
            *x += y;
        }
    }
}

/// `out = x / √(mean(x²) + eps) · w` per row (RMSNorm, arXiv:1910.07467, eq. 4). Shapes: x, out (t, d); w (d).
pub fn rms_norm(pool: Option<&Pool>, x: &[f32], w: &[f32], eps: f32, out: &mut [f32]) {
    let d = w.len();
    let rows = x.len() / d;
    let shared = SharedMut::new(out);
    by_rows(pool, rows, d, |start, end| {
        // SAFETY: these rows belong to this part alone.
        let out = unsafe { shared.slice(start * d, (end - start) * d) };
        let x = &x[start * d..end * d];
        on_lanes(RmsNorm { x, w, eps, out });
    });
}

struct RmsNorm<'a> {
    x: &'a [f32],
    w: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl OnLanes for RmsNorm<'_> {
    type Out = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let d = self.w.len();
        for (x, out) in self.x.chunks_exact(d).zip(self.out.chunks_exact_mut(d)) {
            let scale = 1.0 / (simd::dot(x, x) / d as f32 + self.eps).sqrt();
            for ((o, x), w) in out.iter_mut().zip(x).zip(self.w) {
                *o = x * scale * w;
            }
        }
    }
}

/// Backward of [`rms_norm`]: adds to `dx`, and to `dw` where given. Shapes: x, dy, dx (t, d); w, dw (d).
///
/// With `r = 1/√(mean(x²) + eps)` and `n = x r`: `dx = r (dy∘w − n · mean(dy∘w∘n))`, `dw = Σ_t dy∘n`.
pub fn rms_norm_backward(
    pool: Option<&Pool>,
    x: &[f32],
    w: &[f32],
    eps: f32,
    dy: &[f32],
    dx: &mut [f32],
    dw: Option<&mut [f32]>,
) {
    let d = w.len();
    let rows = x.len() / d;
    let shared = SharedMut::new(dx);
    by_rows(pool, rows, d, |start, end| {
        for r in start..end {
            let (x, dy) = (&x[r * d..(r + 1) * d], &dy[r * d..(r + 1) * d]);
            let scale = 1.0 / (simd::dot(x, x) / d as f32 + eps).sqrt();
            let mut mean = 0.0;
            for ((x, dy), w) in x.iter().zip(dy).zip(w) {
                mean += dy * w * x;
            }
            let mean = mean * scale * scale / d as f32;
            // SAFETY: row r belongs to this part alone.
            let dx = unsafe { shared.slice(r * d, d) };
            for (((dx, x), dy), w) in dx.iter_mut().zip(x).zip(dy).zip(w) {
                *dx += scale * (dy * w - x * mean);
            }
        }
    });
    if let Some(dw) = dw {
        for r in 0..rows {
            let (x, dy) = (&x[r * d..(r + 1) * d], &dy[r * d..(r + 1) * d]);
            let scale = 1.0 / (simd::dot(x, x) / d as f32 + eps).sqrt();
            for ((dw, x), dy) in dw.iter_mut().zip(x).zip(dy) {
                *dw += dy * x * scale;
            }
        }
    }
}

/// Cosines and sines of the rotary embedding (RoFormer, arXiv:2104.09864), half-split as in Hugging Face checkpoints.
#[derive(Clone)]
pub struct RopeTable {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RopeTable {
    /// Positions `0..max_positions`; `inv_freq` (e / 2) in radians a position.
    pub fn new(inv_freq: &[f64], max_positions: usize) -> Self {
        let half = inv_freq.len();
        let mut cos = Vec::with_capacity(max_positions * half);
        let mut sin = Vec::with_capacity(max_positions * half);
        for pos in 0..max_positions {
            for f in inv_freq {
                // The product is rounded to f32 first, as transformers does, so that long positions agree with it.
                let angle = (pos as f32 * *f as f32) as f64;
                cos.push(angle.cos() as f32);
                sin.push(angle.sin() as f32);
            }
        }
        Self { half, cos, sin }
    }

    /// Cosines and sines, (positions, e / 2) each.
    pub fn angles(&self) -> (&[f32], &[f32]) {
        (&self.cos, &self.sin)
    }

    /// Positions in the table.
    pub fn len(&self) -> usize {
        self.cos.len() / self.half
    }

    /// True if the table has no position.
    pub fn is_empty(&self) -> bool {
        self.cos.is_empty()
    }
}

/// Rotates each head of each row to its position, in place. Shapes: x (t, heads, e); positions (t).
///
/// # Panics
/// If a position is outside the table.
pub fn rope(
    pool: Option<&Pool>,
    table: &RopeTable,
    x: &mut [f32],
    heads: usize,
    positions: &[u32],
) {
    rotate(pool, table, x, heads, positions, 1.0)
}

/// Backward of [`rope`], in place: the rotation the other way round.
pub fn rope_backward(
    pool: Option<&Pool>,
    table: &RopeTable,
    dx: &mut [f32],
    heads: usize,
    positions: &[u32],
) {
    rotate(pool, table, dx, heads, positions, -1.0)
}

fn rotate(
    pool: Option<&Pool>,
    table: &RopeTable,
    x: &mut [f32],
    heads: usize,
    positions: &[u32],
    sign: f32,
) {
    let (half, e) = (table.half, 2 * table.half);
    let rows = positions.len();
    assert_eq!(x.len(), rows * heads * e);
    let shared = SharedMut::new(x);
    by_rows(pool, rows, heads * e, |start, end| {
        for (r, &position) in (start..end).zip(&positions[start..end]) {
            let at = position as usize * half;
            let (cos, sin) = (&table.cos[at..at + half], &table.sin[at..at + half]);
            // SAFETY: row r belongs to this part alone.
            let row = unsafe { shared.slice(r * heads * e, heads * e) };
            on_lanes(Rotate {
                row,
                cos,
                sin,
                sign,
            });
        }
    });
}

struct Rotate<'a> {
    row: &'a mut [f32],
    cos: &'a [f32],
    sin: &'a [f32],
    sign: f32,
}

impl OnLanes for Rotate<'_> {
    type Out = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let half = self.cos.len();
        let angles = || self.cos.iter().zip(&self.sin[..half]);
        for head in self.row.chunks_exact_mut(2 * half) {
            let (a, b) = head.split_at_mut(half);
            for ((a, b), (cos, sin)) in a.iter_mut().zip(b).zip(angles()) {
                let (x, y) = (*a, *b);
                *a = x * cos - self.sign * y * sin;
                *b = y * cos + self.sign * x * sin;
            }
        }
    }
}

/// `out = silu(gate) ∘ up` (GLU variants, arXiv:2002.05202, eq. 6 with SiLU). Shapes: all (t, f).
pub fn swiglu(pool: Option<&Pool>, gate: &[f32], up: &[f32], width: usize, out: &mut [f32]) {
    let rows = gate.len() / width;
    let shared = SharedMut::new(out);
    by_rows(pool, rows, width, |start, end| {
        let (from, len) = (start * width, (end - start) * width);
        // SAFETY: these rows belong to this part alone.
        let out = unsafe { shared.slice(from, len) };
        let (gate, up) = (gate[from..from + len].as_ptr(), &up[from..from + len]);
        let out = out.as_mut_ptr();
        on_lanes(SwiGlu { gate, up, out });
    });
}

/// `gate = silu(gate) ∘ up`, on the calling thread.
///
/// # Panics
/// If the lengths differ.
pub fn swiglu_in_place(gate: &mut [f32], up: &[f32]) {
    assert_eq!(gate.len(), up.len());
    let (gate, out) = (gate.as_ptr(), gate.as_mut_ptr());
    on_lanes(SwiGlu { gate, up, out })
}

struct SwiGlu<'a> {
    /// As many numbers as `up`, maybe the same as `out`.
    gate: *const f32,
    up: &'a [f32],
    out: *mut f32,
}

impl OnLanes for SwiGlu<'_> {
    type Out = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let n = self.up.len();
        let whole = n / LANES * LANES;
        // SAFETY: all three hold `n` numbers; where `gate` is `out`, each is read before it is written.
        unsafe {
            for i in (0..whole).step_by(LANES) {
                let up = L::load(self.up.as_ptr().add(i));
                let product = L::load(self.gate.add(i)).silu().mul(up);
                product.store(self.out.add(i));
            }
            let rest = n - whole;
            if rest > 0 {
                let gate = L::load_first(self.gate.add(whole), rest);
                let up = L::load_first(self.up.as_ptr().add(whole), rest);
                gate.silu().mul(up).store_first(self.out.add(whole), rest);
            }
        }
    }
}

/// Backward of [`swiglu`]: from `dh` to `dgate`, `dup` (overwritten). Shapes: all (t, f).
pub fn swiglu_backward(
    pool: Option<&Pool>,
    (gate, up, dh): (&[f32], &[f32], &[f32]),
    width: usize,
    dgate: &mut [f32],
    dup: &mut [f32],
) {
    let rows = gate.len() / width;
    let (dgate, dup) = (SharedMut::new(dgate), SharedMut::new(dup));
    by_rows(pool, rows, width, |start, end| {
        let (from, len) = (start * width, (end - start) * width);
        // SAFETY: these rows belong to this part alone.
        let (dgate, dup) = unsafe { (dgate.slice(from, len), dup.slice(from, len)) };
        on_lanes(SwiGluBackward {
            gate: &gate[from..from + len],
            up: &up[from..from + len],
            dh: &dh[from..from + len],
            dgate,
            dup,
        });
    });
}

struct SwiGluBackward<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    dh: &'a [f32],
    dgate: &'a mut [f32],
    dup: &'a mut [f32],
}

impl OnLanes for SwiGluBackward<'_> {
    type Out = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let n = self.gate.len();
        assert!(
            [
                self.up.len(),
                self.dh.len(),
                self.dgate.len(),
                self.dup.len()
            ] == [n; 4]
        );
        let one = L::splat(1.0);
        for i in (0..n).step_by(LANES) {
            let count = LANES.min(n - i);
            // SAFETY: all five hold `n` numbers, and `count` of them from `i` on.
            unsafe {
                let load = |from: &[f32]| L::load_first(from.as_ptr().add(i), count);
                let (g, u, dh) = (load(self.gate), load(self.up), load(self.dh));
                let sigmoid = one.div(one.add(L::splat(0.0).sub(g).exp()));
                let silu = g.mul(sigmoid);
                let slope = silu.mul_add(one.sub(sigmoid), sigmoid);
                dh.mul(silu)
                    .store_first(self.dup.as_mut_ptr().add(i), count);
                let dgate = dh.mul(u).mul(slope);
                dgate.store_first(self.dgate.as_mut_ptr().add(i), count);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::lanes::on_each_kind_of_lanes;
    use super::*;

    fn numbers(n: usize, seed: usize) -> Vec<f32> {
        (0..n)
            .map(|i| (((i + seed) * 7919 % 1009) as f32 - 504.0) / 252.0)
            .collect()
    }

    fn check_gradient(x: &[f32], got: &[f32], f: impl Fn(&[f32]) -> f64) {
        for at in (0..x.len()).step_by(7) {
            let moved = |by: f32| {
                let mut x = x.to_vec();
                x[at] += by;
                f(&x)
            };
            let want = ((moved(1e-2) - moved(-1e-2)) / 2e-2) as f32;
            assert!(
                (got[at] - want).abs() < 5e-3 + 1e-2 * want.abs(),
                "{at}: {} {want}",
                got[at]
            );
        }
    }

    fn weigh(y: &[f32], dy: &[f32]) -> f64 {
        y.iter().zip(dy).map(|(a, b)| *a as f64 * *b as f64).sum()
    }

    #[test]
    fn the_gradients_of_rms_norm_agree_with_finite_differences() {
        let (x, w, dy) = (numbers(33, 1), numbers(11, 2), numbers(33, 3));
        let forward = |x: &[f32], w: &[f32]| {
            let mut out = vec![0.0; 33];
            rms_norm(None, x, w, 1e-5, &mut out);
            out
        };
        let (mut dx, mut dw) = (vec![0.0; 33], vec![0.0; 11]);
        rms_norm_backward(None, &x, &w, 1e-5, &dy, &mut dx, Some(&mut dw));
        check_gradient(&x, &dx, |x| weigh(&forward(x, &w), &dy));
        check_gradient(&w, &dw, |w| weigh(&forward(&x, w), &dy));
    }

    #[test]
    fn the_gradients_of_swiglu_and_rope_agree_with_finite_differences() {
        let (gate, up, dy) = (numbers(30, 1), numbers(30, 2), numbers(30, 3));
        let forward = |g: &[f32], u: &[f32]| {
            let mut out = vec![0.0; 30];
            swiglu(None, g, u, 10, &mut out);
            out
        };
        let (mut dg, mut du) = (vec![0.0; 30], vec![0.0; 30]);
        swiglu_backward(None, (&gate, &up, &dy), 10, &mut dg, &mut du);
        check_gradient(&gate, &dg, |g| weigh(&forward(g, &up), &dy));
        check_gradient(&up, &du, |u| weigh(&forward(&gate, u), &dy));

        let table = RopeTable::new(&[1.0, 0.1], 16);
        let (x, dy, positions) = (numbers(24, 4), numbers(24, 5), [3, 9, 15]);
        let mut dx = dy.clone();
        rope_backward(None, &table, &mut dx, 2, &positions);
        check_gradient(&x, &dx, |x| {
            let mut y = x.to_vec();
            rope(None, &table, &mut y, 2, &positions);
            weigh(&y, &dy)
        });
    }

    #[test]
    fn every_kind_of_lanes_agrees_with_the_definitions_over_odd_widths() {
        on_each_kind_of_lanes(|| {
            for width in [1, 2, 15, 16, 17, 33, 100, 576] {
                let (gate, up, w) = (
                    numbers(3 * width, 1),
                    numbers(3 * width, 2),
                    numbers(width, 3),
                );
                let mut out = vec![0.0; 3 * width];
                swiglu(None, &gate, &up, width, &mut out);
                for ((got, g), u) in out.iter().zip(&gate).zip(&up) {
                    let want = *g as f64 / (1.0 + (-*g as f64).exp()) * *u as f64;
                    assert!(
                        (*got as f64 - want).abs() < 2e-6,
                        "{width}: {got}, not {want}"
                    );
                }
                let mut gated = gate.clone();
                swiglu_in_place(&mut gated, &up);
                assert_eq!(gated, out);
                rms_norm(None, &gate, &w, 1e-5, &mut out);
                for (got, x) in out.chunks(width).zip(gate.chunks(width)) {
                    let mean = x.iter().map(|x| (*x as f64).powi(2)).sum::<f64>() / width as f64;
                    let scale = 1.0 / (mean + 1e-5).sqrt();
                    for ((got, x), w) in got.iter().zip(x).zip(&w) {
                        let want = *x as f64 * scale * *w as f64;
                        assert!(
                            (*got as f64 - want).abs() < 1e-5,
                            "{width}: {got}, not {want}"
                        );
                    }
                }
                let mut sum = gate.clone();
                add_in_place(&mut sum, &up);
                assert!(sum
                    .iter()
                    .zip(&gate)
                    .zip(&up)
                    .all(|((s, g), u)| *s == g + u));
            }
        });
    }
}
