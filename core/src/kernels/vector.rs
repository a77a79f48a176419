//! Sums of long vectors over the pool.

use super::pool::{Pool, SharedMut};

/// Numbers that a part takes: half a megabyte of each operand.
const PIECE: usize = 1 << 17;

/// `y += x`.
///
/// # Panics
/// If the lengths differ.
pub fn add(pool: &Pool, x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len());
    let y = SharedMut::new(y);
    pool.run(x.len().div_ceil(PIECE), |part| {
        let x = &x[part * PIECE..((part + 1) * PIECE).min(x.len())];
        // SAFETY: pieces do not overlap.
        let y = unsafe { y.slice(part * PIECE, x.len()) };
        for (y, x) in y.iter_mut().zip(x) {
            *y += x;
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_is_added_once() {
        let pool = Pool::new(2, 0);
        let x: Vec<f32> = (0..2 * PIECE + 5).map(|i| i as f32).collect();
        let mut y = vec![1.0; x.len()];
        add(&pool, &x, &mut y);
        assert!(x.iter().zip(&y).all(|(x, y)| *y == x + 1.0));
    }
}
