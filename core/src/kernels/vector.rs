//! Sums and products of vectors, and how far two are apart.

use super::lanes::{on_lanes, Lanes, OnLanes, LANES};
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

/// `out += x ∘ y`.
///
/// # Panics
/// If the lengths differ.
pub fn add_product(x: &[f32], y: &[f32], out: &mut [f32]) {
    assert_eq!((x.len(), y.len()), (out.len(), out.len()));
    on_lanes(AddProduct { x, y, out });
}

struct AddProduct<'a> {
    x: &'a [f32],
    y: &'a [f32],
    out: &'a mut [f32],
}

impl OnLanes for AddProduct<'_> {
    type Out = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let (x, y) = (self.x.as_chunks::<LANES>(), self.y.as_chunks::<LANES>());
        let (out, rest) = self.out.as_chunks_mut::<LANES>();
        for ((x, y), out) in x.0.iter().zip(y.0).zip(out) {
            // SAFETY: each is sixteen numbers.
            unsafe {
                let product = L::load(x.as_ptr()).mul(L::load(y.as_ptr()));
                L::load(out.as_ptr()).add(product).store(out.as_mut_ptr());
            }
        }
        for ((x, y), out) in x.1.iter().zip(y.1).zip(rest) {
            *out += x * y;
        }
    }
}

/// `Σ (a - b)²`: short sums in `f32`, long ones in `f64`, so that the error stays that of a short sum.
///
/// # Panics
/// If the lengths differ.
pub fn squared_distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let short = |(a, b)| f64::from(on_lanes(Distance { a, b }));
    a.chunks(1024).zip(b.chunks(1024)).map(short).sum()
}

struct Distance<'a> {
    a: &'a [f32],
    b: &'a [f32],
}

impl OnLanes for Distance<'_> {
    type Out = f32;

    #[inline(always)]
    fn run<L: Lanes>(self) -> f32 {
        let mut sums = [L::splat(0.0); 2];
        let (a, b) = (self.a.as_chunks::<LANES>(), self.b.as_chunks::<LANES>());
        for (i, (a, b)) in a.0.iter().zip(b.0).enumerate() {
            // SAFETY: both are sixteen numbers.
            let apart = unsafe { L::load(a.as_ptr()).sub(L::load(b.as_ptr())) };
            sums[i % 2] = apart.mul_add(apart, sums[i % 2]);
        }
        let rest = a.1.iter().zip(b.1).map(|(a, b)| (a - b) * (a - b));
        sums[0].add(sums[1]).sum() + rest.sum::<f32>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Random;

    #[test]
    fn distances_agree_with_the_obvious_sum_in_f64() {
        let mut random = Random::new(3);
        for n in [0, 1, 16, 40, 1024, 5000] {
            let mut numbers = || (0..n).map(|_| random.normal() as f32).collect::<Vec<_>>();
            let (a, b) = (numbers(), numbers());
            let apart = |(a, b): (&f32, &f32)| (f64::from(*a) - f64::from(*b)).powi(2);
            let want: f64 = a.iter().zip(&b).map(apart).sum();
            let got = squared_distance(&a, &b);
            assert!((got - want).abs() <= 1e-6 * want, "{n}: {got} {want}");
        }
        assert!(squared_distance(&[f32::NAN], &[0.0]).is_nan());
    }

    #[test]
    fn products_of_pairs_are_added_wherever_they_stand() {
        for n in [0, 5, 16, 37] {
            let x: Vec<f32> = (0..n).map(|i| i as f32).collect();
            let mut out = vec![0.5; n];
            add_product(&x, &x, &mut out);
            for (i, out) in out.iter().enumerate() {
                assert_eq!(*out, (i * i) as f32 + 0.5);
            }
        }
    }

    #[test]
    fn every_number_is_added_once() {
        let pool = Pool::new(2, 0);
        let x: Vec<f32> = (0..2 * PIECE + 5).map(|i| i as f32).collect();
        let mut y = vec![1.0; x.len()];
        add(&pool, &x, &mut y);
        assert!(x.iter().zip(&y).all(|(x, y)| *y == x + 1.0));
    }
}
