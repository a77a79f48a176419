//! The obvious product, for any processor and as the judge of the fast ones.

use super::{Block, Packed, Tile, BLOCK, PANEL};

/// See [`super::Kernel`]; safe for any processor, and panics rather than read outside its buffers.
pub(super) unsafe fn tile<const BITS: usize>(
    w: &Packed<BITS>,
    panel: usize,
    panels: usize,
    x: &[Block],
    row: usize,
    rows: usize,
    out: &mut Tile,
) {
    for (r, out) in out.iter_mut().enumerate().take(rows) {
        let x = &x[(row + r) * w.blocks..(row + r + 1) * w.blocks];
        for p in 0..panels {
            let out = &mut out[p * PANEL..(p + 1) * PANEL];
            out.fill(0.0);
            for (b, x) in x.iter().enumerate() {
                for (c, out) in out.iter_mut().enumerate() {
                    let mut sum = 0;
                    for i in 0..BLOCK {
                        let code = w.code(panel + p, b, c, i) as i32;
                        let code = if BITS == 8 { code - 128 } else { code };
                        sum += code * x.codes[i / 4][i % 4] as i32;
                    }
                    let (scale, min) = w.scale(panel + p, b, c);
                    *out += (sum as f32 * scale + min * x.sum) * x.scale;
                }
            }
        }
    }
}
