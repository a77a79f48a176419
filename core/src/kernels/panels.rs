//! How products by packed weights are shared out: whole panels of columns, of one weight or of several that multiply the same rows.

use std::ops::Range;

use super::pool::Pool;

/// Parts of a product for each thread, so that a thread the host has taken away does not hold up the others.
const PARTS_PER_THREAD: usize = 4;

/// Panels of one weight that one thread takes.
pub(super) struct Part {
    pub weight: usize,
    pub panels: Range<usize>,
}

/// Calls `run` for all panels of all weights, `counts` panels each, on the threads of `pool`; parts begin at multiples of `step`.
pub(super) fn share_out(
    pool: Option<&Pool>,
    counts: impl Iterator<Item = usize> + Clone,
    step: usize,
    run: impl Fn(Part) + Sync,
) {
    let Some(pool) = pool.filter(|p| p.threads() > 1) else {
        for (weight, count) in counts.enumerate() {
            run(Part {
                weight,
                panels: 0..count,
            });
        }
        return;
    };
    let all: usize = counts.clone().sum();
    let piece = all
        .div_ceil(pool.threads() * PARTS_PER_THREAD)
        .next_multiple_of(step)
        .max(1);
    let mut parts = Vec::new();
    for (weight, count) in counts.enumerate() {
        let starts = (0..count).step_by(piece);
        parts.extend(starts.map(|start| (weight, start..count.min(start + piece))));
    }
    pool.run(parts.len(), |i| {
        let (weight, panels) = parts[i].clone();
        run(Part { weight, panels });
    });
}
