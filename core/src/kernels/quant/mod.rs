//! Weights of 8 and 4 bits for serving, multiplied as integers: packed once, read once per product.
//!
//! A weight (n, k) is cut into panels of [`PANEL`] rows (columns of the product) and blocks of [`BLOCK`] along k. Within a block
//! each row has its own scale, and the codes stand in the order in which VPDPBUSD wants them: four consecutive k of one row side by
//! side, then the next row, sixteen rows a cache line. The rows of `x` are quantised per block too, to signed bytes, so a block's
//! product is a sum of integers, exact on every path, and the paths differ in the rounding of the sum over blocks alone.

mod activations;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod outer;
mod pack;
mod scalar;
#[cfg(test)]
mod tests;

use super::panels::share_out;
use super::pool::{Pool, SharedMut};
use super::simd::features;
use activations::Block;
use half::f16;
use std::cell::RefCell;

pub use outer::{OuterQ8, PANEL_ROWS};

/// Weights that share a scale, along k.
pub const BLOCK: usize = 32;
/// Rows of the weight (columns of the product) that stand together.
pub const PANEL: usize = 16;

/// Rows of `x` that the widest kernel takes at a time.
const MAX_ROWS: usize = 12;
/// Panels that a kernel takes at a time.
const MAX_PANELS: usize = 2;
/// Below this a second thread costs more than it brings: bytes of weights to read, and sixteen multiplications count as one. About
/// 10 µs, for a step of a model keeps the pool's threads looking ([`Pool::attentive`]).
const MIN_SHARED_WORK: usize = 1 << 17;

/// 1.5 · 2^23. An integer below 2^22 in size that is added to the bits of this number is also added to its value, so sums that start
/// here are already `f32` when they end: no conversion, and subtracting `MAGIC` inside a fused multiply-add is exact.
const MAGIC: f32 = 12_582_912.0;

/// One cache line of codes.
#[derive(Clone, Copy, PartialEq)]
#[repr(C, align(64))]
struct CodeLine([u8; 64]);

/// One cache line of scales.
#[derive(Clone, Copy, PartialEq)]
#[repr(C, align(64))]
struct ScaleLine([f16; 32]);

/// The product of a few rows and one or two panels, a row of `x` in each row.
type Tile = [[f32; MAX_PANELS * PANEL]; MAX_ROWS];

/// Multiplies rows `row..row + rows` by panels `panel..panel + panels` (one or two) into the corner of the tile.
type Kernel<const BITS: usize> =
    unsafe fn(&Packed<BITS>, usize, usize, &[Block], usize, usize, &mut Tile);

/// A weight of `BITS` bits an element, 8 or 4: see [`PackedQ8`] and [`PackedQ4`].
#[derive(Clone, PartialEq)]
pub struct Packed<const BITS: usize> {
    n: usize,
    k: usize,
    /// Blocks along k, the last one filled up with zeros.
    blocks: usize,
    /// Scales are stored divided by this power of two, which keeps them in the range of `f16` whatever the size of the weights.
    unit: f32,
    codes: Vec<CodeLine>,
    scales: Vec<ScaleLine>,
}

/// A weight of 8 bits: `w = scale · (code - 128)`, one `f16` scale a block, 8.5 bits an element.
///
/// On normally distributed weights and inputs the relative RMS error of the product is below 1 %.
pub type PackedQ8 = Packed<8>;

/// A weight of 4 bits: `w = scale · code + min`, two `f16` a block, 5 bits an element, as in a GGUF Q4_1 file.
///
/// A block that already lies on such a grid keeps its codes, so a Q4_1 file loses nothing but `f32` rounding. On normally
/// distributed weights the relative RMS error is 8 % (a scale without a minimum, as in Q4_0: 9 %).
pub type PackedQ4 = Packed<4>;

/// The instructions a product is computed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QuantPath {
    /// 512 bits, VPDPBUSD.
    Avx512Vnni,
    /// 256 bits, VPDPBUSD.
    AvxVnni,
    /// 256 bits, VPMADDUBSW with the signs moved so that 16 bits always suffice.
    Avx2,
    /// Any processor.
    Scalar,
}

impl QuantPath {
    /// The paths this processor can take, the fastest first.
    pub fn available() -> impl Iterator<Item = QuantPath> {
        let f = features();
        [
            (QuantPath::Avx512Vnni, f.avx512 && f.avx512_vnni),
            (QuantPath::AvxVnni, f.avx2_fma && f.f16c && f.avx_vnni),
            (QuantPath::Avx2, f.avx2_fma && f.f16c),
            (QuantPath::Scalar, true),
        ]
        .into_iter()
        .filter(|(_, there)| *there)
        .map(|(path, _)| path)
    }

    /// The fastest path this processor can take.
    pub fn best() -> Self {
        Self::available().next().unwrap_or(QuantPath::Scalar)
    }

    /// The kernel for `t` rows, and how many rows and panels it takes at a time.
    fn kernel<const BITS: usize>(self, t: usize) -> (Kernel<BITS>, usize, usize) {
        match self {
            // A few rows share one stream of weights, and computing hides behind it; many share the weights that are in the cache.
            #[cfg(target_arch = "x86_64")]
            QuantPath::Avx512Vnni if t <= MAX_ROWS => (avx512::tile::<BITS>, MAX_ROWS, 1),
            #[cfg(target_arch = "x86_64")]
            QuantPath::Avx512Vnni => (avx512::tile::<BITS>, MAX_ROWS / 2, 2),
            #[cfg(target_arch = "x86_64")]
            QuantPath::AvxVnni => (avx2::tile_vnni::<BITS>, avx2::ROWS_VNNI, 1),
            #[cfg(target_arch = "x86_64")]
            QuantPath::Avx2 => (avx2::tile::<BITS>, avx2::ROWS, 1),
            _ => (scalar::tile::<BITS>, 1, 1),
        }
    }
}

thread_local! {
    /// The quantised `x` of the product that this thread is computing; kept for the next one.
    static ROWS: RefCell<Vec<Block>> = const { RefCell::new(Vec::new()) };
}

impl<const BITS: usize> Packed<BITS> {
    /// `y = x wᵀ`: x (t, k), y (t, n), both dense, any t. Costs one pass over the weight for a few rows.
    ///
    /// `x` is quantised to 8 bits in blocks of 32, once per call, in a buffer of the calling thread; values below 1e-30 of a block
    /// whose largest is below that count as zero. A row that holds a NaN or an infinity comes out as NaN, the other rows untouched.
    ///
    /// # Panics
    /// If `x` or `y` has the wrong length.
    pub fn product(&self, pool: Option<&Pool>, x: &[f32], t: usize, y: &mut [f32]) {
        Self::products(&[self], pool, x, t, &mut [y])
    }

    /// [`Self::product`] of the same rows by several weights of the same k: the rows are quantised once, the columns shared out
    /// together.
    ///
    /// # Panics
    /// If the weights differ in k, there are not as many outputs, or one has the wrong length.
    pub fn products(
        weights: &[&Self],
        pool: Option<&Pool>,
        x: &[f32],
        t: usize,
        ys: &mut [&mut [f32]],
    ) {
        Self::products_on(QuantPath::best(), weights, pool, x, t, ys)
    }

    /// [`Self::product`] on a path of the caller's choice.
    ///
    /// # Panics
    /// If `x` or `y` has the wrong length, or the processor cannot take that path.
    pub fn product_on(
        &self,
        path: QuantPath,
        pool: Option<&Pool>,
        x: &[f32],
        t: usize,
        y: &mut [f32],
    ) {
        Self::products_on(path, &[self], pool, x, t, &mut [y])
    }

    fn products_on(
        path: QuantPath,
        weights: &[&Self],
        pool: Option<&Pool>,
        x: &[f32],
        t: usize,
        ys: &mut [&mut [f32]],
    ) {
        assert_eq!(weights.len(), ys.len(), "weights and outputs");
        for (w, y) in weights.iter().zip(ys.iter()) {
            assert!(
                x.len() == t * w.k && y.len() == t * w.n,
                "x of {} and y of {} for ({t}, {}) x ({}, {})ᵀ",
                x.len(),
                y.len(),
                w.k,
                w.n,
                w.k
            );
        }
        assert!(
            QuantPath::available().any(|there| there == path),
            "this processor has no {path:?}"
        );
        let Some(first) = weights.first().filter(|_| t > 0) else {
            return;
        };
        let work: usize = weights.iter().map(|w| w.bytes() + t * w.n * w.k / 16).sum();
        let pool = pool.filter(|p| p.threads() > 1 && work >= MIN_SHARED_WORK);
        let mut rows = ROWS.take();
        activations::quantise(path, pool, x, t, first.k, &mut rows);
        Self::products_of_blocks(path, weights, pool, &rows, t, ys);
        ROWS.replace(rows);
    }

    fn products_of_blocks(
        path: QuantPath,
        weights: &[&Self],
        pool: Option<&Pool>,
        rows: &[Block],
        t: usize,
        ys: &mut [&mut [f32]],
    ) {
        assert!(weights.iter().all(|w| rows.len() >= t * w.blocks));
        let (kernel, max_rows, max_panels) = path.kernel::<BITS>(t);
        // Rows are shared out evenly: seven are 4 + 3, not 6 + 1.
        let tiles = t.div_ceil(max_rows);
        let outs: Vec<SharedMut<f32>> = ys.iter_mut().map(|y| SharedMut::new(y)).collect();
        let counts = weights.iter().map(|w| w.panels());
        share_out(pool, counts, max_panels, |part| {
            let (w, out) = (weights[part.weight], &outs[part.weight]);
            let mut tile: Tile = [[0.0; MAX_PANELS * PANEL]; MAX_ROWS];
            let end = part.panels.end;
            for panel in part.panels.step_by(max_panels) {
                let count = max_panels.min(end - panel);
                let col = panel * PANEL;
                let cols = (count * PANEL).min(w.n - col);
                for i in 0..tiles {
                    let (row, end) = (t * i / tiles, t * (i + 1) / tiles);
                    // SAFETY: the processor has the path, which `products_on` asserted; `end - row <= max_rows` by the choice of
                    // `tiles`; `rows` holds `t` rows of `blocks` blocks, asserted above; the panels exist.
                    unsafe { kernel(w, panel, count, rows, row, end - row, &mut tile) };
                    for (from, r) in tile.iter().zip(row..end) {
                        // SAFETY: the columns of these panels belong to this part alone.
                        let to = unsafe { out.slice(r * w.n + col, cols) };
                        for (to, from) in to.iter_mut().zip(from) {
                            *to = from * w.unit;
                        }
                    }
                }
            }
        });
    }
}
