//! The blocks of a matrix product with AVX-512, whatever numbers it multiplies: how operands are packed, cut and shared out.
//!
//! The right operand is packed into a buffer that all threads read, and so is the left one unless it can be read as it stands. Each part
//! then multiplies a range of rows by a range of columns, one tile after the other.
//!
//! A word is one `f32`, or two bf16 with the even k in the low half. A lane is a row of the left operand or a column of the right one.
//! Packed operands hold, for each word index, the words of neighbouring lanes side by side: `MR` or fewer rows on the left, [`NR`]
//! columns on the right.

use std::arch::x86_64::*;
use std::cell::RefCell;

use super::bf16::Line;
use super::matmul::{Mat, MatMut};
use super::pool::{Pool, SharedMut};

/// Rows in the tallest tile: 14 rows of two registers are 28 accumulators, which leaves room for two loads and a broadcast.
pub(super) const MR: usize = 14;
/// Columns in a tile and in a packed panel: two registers of 16 sums.
pub(super) const NR: usize = 32;

/// Most words along k in one pass: a panel of rows takes 32 KiB of a first-level cache.
const WORDS_A_BLOCK: usize = 576;
/// Right panels that a part goes through for each of its panels of rows: 8 of 576 words are 576 KiB of a second-level cache.
const STRIPES: usize = 8;
/// Most words of a packed operand: 16 MiB. A larger one is packed and multiplied in several goes.
const PACKED_WORDS: usize = 4 << 20;
/// Parts a thread, so that one which the host has taken away does not hold up the others for long.
const PARTS_PER_THREAD: usize = 4;
/// Multiplications that a part does at most, roughly: some 2 ms. A pool's gate is looked at between parts.
const PART_AT_MOST: usize = 1 << 27;
/// Below this many multiplications a second thread costs more than it brings.
const THREADS_FROM: usize = 1 << 17;
/// Fewest panels that one part of the packing takes: where lanes are the contiguous axis, neighbouring panels share cache lines and
/// pages of the source.
const PANELS_PER_PART: usize = 2;

/// Multiplies `words` words of a packed left panel by those of a packed right panel.
pub(super) type Multiply = unsafe fn(words: usize, a: *const u32, b: *const u32, tile: &Tile);
/// The same for rows that stand in memory `stride` numbers apart.
pub(super) type MultiplyRows =
    unsafe fn(words: usize, a: (*const f32, usize), b: *const u32, tile: &Tile);

/// What is multiplied: how numbers become words, and what multiplies a tile of them.
pub(super) trait Numbers {
    /// Numbers along k in a word.
    const PER_WORD: usize;
    /// `MULTIPLY[r - 1]` is for left panels of `r` lanes.
    const MULTIPLY: [Multiply; MR];
    /// The same for rows contiguous along k, read as they stand, if these numbers can be.
    const MULTIPLY_ROWS: Option<[MultiplyRows; MR]>;

    /// # Safety
    /// The processor has what these numbers need; every address that [`Packing`] describes can be read or written.
    unsafe fn pack(job: &Packing);
}

/// Where the numbers to pack stand, and where the words go.
///
/// Lane `l`, index `i` is read at `src + l * lane_stride + i * k_stride`, one of the strides being 1. Panels of `width` lanes are written
/// one after the other to `dst`, each as `[words][width]`; the last is filled up with zero lanes, and the last word with a zero.
pub(super) struct Packing {
    pub src: *const f32,
    pub lane_stride: usize,
    pub k_stride: usize,
    pub lanes: usize,
    pub k: usize,
    /// Numbers along k in a word.
    pub per_word: usize,
    pub dst: *mut u32,
    /// At most 16, or [`NR`].
    pub width: usize,
}

impl Packing {
    /// Words of a lane.
    pub fn words(&self) -> usize {
        self.k.div_ceil(self.per_word)
    }

    /// Lanes that are handled together: a register full of words, or a narrower panel.
    pub fn group(&self) -> usize {
        self.width.min(16)
    }

    /// Groups in all panels, those of nothing but filling too.
    pub fn groups(&self) -> usize {
        self.lanes.div_ceil(self.width) * (self.width / self.group())
    }

    /// Lanes of a group that are not filling.
    pub fn lanes_of(&self, group: usize) -> usize {
        self.group()
            .min(self.lanes.saturating_sub(group * self.group()))
    }

    /// Where the first words of a group go.
    pub fn dst_of(&self, group: usize) -> *mut u32 {
        let lane = group * self.group();
        let (panel, within) = (lane / self.width, lane % self.width);
        self.dst
            .wrapping_add(panel * self.words() * self.width + within)
    }
}

pub(super) fn low_bits(n: usize) -> __mmask16 {
    if n >= 16 {
        !0
    } else {
        (1u16 << n) - 1
    }
}

/// Transposes 16 x 16 words in place.
#[target_feature(enable = "avx512f")]
pub(super) fn transpose(r: &mut [__m512i; 16]) {
    let mut t = *r;
    for i in 0..8 {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for i in 0..4 {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    // Now r[4 q + c] holds, in its four 128-bit parts s, column 4 s + c of rows 4 q .. 4 q + 4: parts and q change places.
    for c in 0..4 {
        let low01 = _mm512_shuffle_i32x4::<0x88>(r[c], r[4 + c]);
        let high01 = _mm512_shuffle_i32x4::<0xdd>(r[c], r[4 + c]);
        let low23 = _mm512_shuffle_i32x4::<0x88>(r[8 + c], r[12 + c]);
        let high23 = _mm512_shuffle_i32x4::<0xdd>(r[8 + c], r[12 + c]);
        t[c] = _mm512_shuffle_i32x4::<0x88>(low01, low23);
        t[8 + c] = _mm512_shuffle_i32x4::<0xdd>(low01, low23);
        t[4 + c] = _mm512_shuffle_i32x4::<0x88>(high01, high23);
        t[12 + c] = _mm512_shuffle_i32x4::<0xdd>(high01, high23);
    }
    *r = t;
}

/// A tile of the result: where it stands, and how much of it lies inside the matrix.
pub(super) struct Tile {
    pub out: *mut f32,
    pub stride: usize,
    pub rows: usize,
    pub cols: usize,
    pub scale: f32,
    pub accumulate: bool,
}

/// Writes, or adds, `scale` times the sums of a tile.
///
/// # Safety
/// The processor has AVX512F; the tile's rows and columns, at most `R` and [`NR`], are writable and nobody else's.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn write_tile<const R: usize>(sums: &[[__m512; 2]; R], tile: &Tile) {
    let scale = _mm512_set1_ps(tile.scale);
    let masks = [low_bits(tile.cols), low_bits(tile.cols.saturating_sub(16))];
    for (r, sums) in sums.iter().enumerate() {
        if r < tile.rows {
            for (half, mask) in masks.into_iter().enumerate() {
                // SAFETY: r < rows, and the mask stays within the columns that the caller gave us.
                unsafe {
                    let at = tile.out.add(r * tile.stride).wrapping_add(16 * half);
                    let sum = if tile.accumulate {
                        _mm512_fmadd_ps(sums[half], scale, _mm512_maskz_loadu_ps(mask, at))
                    } else {
                        _mm512_mul_ps(sums[half], scale)
                    };
                    _mm512_mask_storeu_ps(at, mask, sum);
                }
            }
        }
    }
}

thread_local! {
    static LEFT: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
    static RIGHT: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

/// The buffer's first `words` words; what they hold is left over from earlier use.
fn at_least(buffer: &mut Vec<Line>, words: usize) -> &mut [u32] {
    let lines = words.div_ceil(16);
    if buffer.len() < lines {
        buffer.resize(lines, Line::ZERO);
    }
    &mut Line::words_mut(buffer)[..words]
}

/// The right operand.
#[derive(Clone, Copy)]
pub(super) enum Right<'a> {
    /// Packed when it is needed.
    Strided(Mat<'a>),
    /// Panels of `NR` columns and all of k: `[n / 32][words][32]`.
    Packed(&'a [u32]),
}

/// `out = scale · a b`, or `out += scale · a b` if `accumulate`, in these numbers.
///
/// # Safety
/// The processor has what the numbers need; the shapes fit, a packed operand's too.
pub(super) unsafe fn product<N: Numbers>(
    pool: Option<&Pool>,
    a: Mat,
    b: Right,
    scale: f32,
    accumulate: bool,
    out: MatMut,
) {
    let (m, k, n) = (a.rows, a.cols, out.cols);
    if m == 0 || n == 0 || k == 0 {
        if !accumulate && n > 0 {
            let rows = out.data.chunks_mut(out.stride).take(m);
            rows.for_each(|row| row[..n].fill(0.0));
        }
        return;
    }
    let left_stands = a.col_stride == 1 && N::MULTIPLY_ROWS.is_some();
    let cut = |side: usize, k: usize, step: usize| {
        let most = PACKED_WORDS * N::PER_WORD / k;
        side.min((most / step * step).max(step))
    };
    let (ks, cols) = match b {
        Right::Packed(_) => (k, n),
        Right::Strided(_) => {
            let ks = cut(k, n.min(1024), 1024);
            (ks, cut(n, ks, NR))
        }
    };
    let ks = if left_stands {
        ks
    } else {
        cut(ks, m.min(1024), 1024)
    };
    let rows = if left_stands { m } else { cut(m, ks, MR) };
    for row in (0..m).step_by(rows) {
        for col in (0..n).step_by(cols) {
            for k0 in (0..k).step_by(ks) {
                let go = Go {
                    a,
                    b,
                    left_stands,
                    rows: (row, rows.min(m - row)),
                    ks: (k0, ks.min(k - k0)),
                    cols: (col, cols.min(n - col)),
                    scale,
                    accumulate: accumulate || k0 > 0,
                };
                let at = &mut out.data[row * out.stride + col..];
                // SAFETY: the caller's promise.
                unsafe { go.run::<N>(pool, MatMut::strided(at, go.rows.1, go.cols.1, out.stride)) }
            }
        }
    }
}

/// A piece of a product whose operands are packed at once: first and number of rows, numbers along k, and columns.
struct Go<'a> {
    a: Mat<'a>,
    b: Right<'a>,
    left_stands: bool,
    rows: (usize, usize),
    ks: (usize, usize),
    cols: (usize, usize),
    scale: f32,
    accumulate: bool,
}

impl Go<'_> {
    /// # Safety
    /// As [`product`].
    unsafe fn run<N: Numbers>(&self, pool: Option<&Pool>, out: MatMut) {
        let (a, b) = (&self.a, &self.b);
        let (row0, m) = self.rows;
        let (k_first, k) = self.ks;
        let (col0, n) = self.cols;
        let per_word = N::PER_WORD;
        // Panels of equal height waste fewer rows than full ones and a rest: 48 rows are 4 x 12, not 3 x 14 + 6.
        let height = m.div_ceil(m.div_ceil(MR));
        let panels = m.div_ceil(height);
        let stripes = n.div_ceil(NR);
        // One row panel reads each right panel once, so there is no cache to keep it in, and a packed one is best read straight on.
        let blocks = match b {
            Right::Packed(_) if panels == 1 => 1,
            _ => k.div_ceil(per_word).div_ceil(WORDS_A_BLOCK),
        };
        let block = k.div_ceil(blocks).next_multiple_of(per_word);
        let threads = match pool {
            Some(pool) if m * n * k >= THREADS_FROM => pool.threads(),
            _ => 1,
        };
        let parts = match threads {
            1 => 1,
            _ => (PARTS_PER_THREAD * threads).max(m * n * k / PART_AT_MOST),
        };
        let each = |parts: usize, run: &(dyn Fn(usize) + Sync)| match pool {
            Some(pool) if threads > 1 && parts > 1 => pool.run(parts, run),
            _ => (0..parts).for_each(run),
        };
        // Packs some panels of `width` lanes, block by block along k; in each block panel after panel of [words][width].
        let pack = |mat: Mat, width: usize, lanes: usize, dst: &SharedMut<u32>| {
            let all = lanes.div_ceil(width);
            let at_once = all.div_ceil(parts).max(PANELS_PER_PART);
            each(all.div_ceil(at_once), &|part: usize| {
                let lane = part * at_once * width;
                for k0 in (0..k).step_by(block) {
                    let len = block.min(k - k0);
                    let to = panel_at::<N>(k0, len, part * at_once, all, width);
                    // SAFETY: the matrix lies inside its buffer as its constructor checked; this part's panels are its own, and
                    // inside the buffer; the features are the caller's promise.
                    unsafe {
                        N::pack(&Packing {
                            src: mat
                                .data
                                .as_ptr()
                                .add(lane * mat.row_stride + k0 * mat.col_stride),
                            lane_stride: mat.row_stride,
                            k_stride: mat.col_stride,
                            lanes: (at_once * width).min(lanes - lane),
                            k: len,
                            per_word,
                            dst: dst.as_ptr().wrapping_add(to),
                            width,
                        })
                    }
                }
            })
        };
        let words = k.div_ceil(per_word);
        LEFT.with_borrow_mut(|left| {
            RIGHT.with_borrow_mut(|right| {
                let left_words = if self.left_stands {
                    0
                } else {
                    panels * height * words
                };
                let left = SharedMut::new(at_least(left, left_words));
                if !self.left_stands {
                    pack(part_of(a, row0, k_first), height, m, &left);
                }
                let right_words = match b {
                    Right::Packed(_) => 0,
                    Right::Strided(_) => stripes * NR * words,
                };
                let right = SharedMut::new(at_least(right, right_words));
                if let Right::Strided(b) = b {
                    pack(part_of(&b.t(), col0, k_first), NR, n, &right);
                }
                // Rows are cut first: parts that share rows read them again.
                let row_parts = parts.min(panels);
                let panels_a_part = panels.div_ceil(row_parts);
                let row_parts = panels.div_ceil(panels_a_part);
                let stripes_a_part = stripes.div_ceil(parts.div_ceil(row_parts).min(stripes));
                let col_parts = stripes.div_ceil(stripes_a_part);
                let stride = out.stride;
                let out = SharedMut::new(out.data);
                each(row_parts * col_parts, &|part: usize| {
                    let (row_part, col_part) = (part % row_parts, part / row_parts);
                    let first_panel = row_part * panels_a_part;
                    let my_panels = first_panel..(first_panel + panels_a_part).min(panels);
                    let first_stripe = col_part * stripes_a_part;
                    let end_stripe = (first_stripe + stripes_a_part).min(stripes);
                    for k0 in (0..k).step_by(block) {
                        let len = block.min(k - k0);
                        let words = len.div_ceil(per_word);
                        for stripe0 in (first_stripe..end_stripe).step_by(STRIPES) {
                            for panel in my_panels.clone() {
                                let row = panel * height;
                                for stripe in stripe0..(stripe0 + STRIPES).min(end_stripe) {
                                    let col = stripe * NR;
                                    let tile = Tile {
                                        out: out.as_ptr().wrapping_add(row * stride + col),
                                        stride,
                                        rows: height.min(m - row),
                                        cols: NR.min(n - col),
                                        scale: self.scale,
                                        accumulate: self.accumulate || k0 > 0,
                                    };
                                    let right = match b {
                                        Right::Packed(all) => {
                                            let step = a.cols.div_ceil(per_word) * NR;
                                            let at = (k_first + k0) / per_word * NR;
                                            all[(col0 / NR + stripe) * step + at..].as_ptr()
                                        }
                                        Right::Strided(_) => {
                                            let at = panel_at::<N>(k0, len, stripe, stripes, NR);
                                            right.as_ptr().wrapping_add(at).cast_const()
                                        }
                                    };
                                    // SAFETY: both panels hold `words` words, rows that stand in memory `len` numbers; parts write
                                    // to tiles of their own, inside `out` as its constructor checked; the features are the
                                    // caller's promise.
                                    unsafe {
                                        if let (true, Some(multiply)) =
                                            (self.left_stands, N::MULTIPLY_ROWS)
                                        {
                                            let at = (row0 + row) * a.row_stride + k_first + k0;
                                            let rows = (a.data.as_ptr().add(at), a.row_stride);
                                            multiply[tile.rows - 1](words, rows, right, &tile)
                                        } else {
                                            let at = panel_at::<N>(k0, len, panel, panels, height);
                                            let left = left.as_ptr().wrapping_add(at);
                                            N::MULTIPLY[height - 1](words, left, right, &tile)
                                        }
                                    }
                                }
                            }
                        }
                    }
                })
            })
        })
    }
}

/// Where in a packed operand of `panels` panels a panel's block of `len` numbers from `k0` on begins.
fn panel_at<N: Numbers>(k0: usize, len: usize, panel: usize, panels: usize, width: usize) -> usize {
    k0 / N::PER_WORD * panels * width + panel * len.div_ceil(N::PER_WORD) * width
}

/// The matrix from a row and a column on.
fn part_of<'a>(mat: &Mat<'a>, row: usize, col: usize) -> Mat<'a> {
    Mat {
        data: &mat.data[row * mat.row_stride + col * mat.col_stride..],
        rows: mat.rows - row,
        cols: mat.cols - col,
        ..*mat
    }
}
