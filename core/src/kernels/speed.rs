//! What this machine can do at best, to hold measured kernels against.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use super::pool::Pool;

/// Sums in flight: an FMA takes 4 cycles and two begin in each, so 8 would do where nothing disturbs.
const SUMS: usize = 12;
/// FMAs on each sum in a part: some 2 ms.
const ROUNDS: usize = 1 << 20;

/// Multiplications and additions a second that all threads of `pool` together reach in registers, in `f32` and with the widest vectors
/// there are: the best of several tries, for others may be using the machine.
pub fn f32_limit(pool: &Pool) -> f64 {
    let (lanes, part) = part();
    let sink = AtomicU32::new(0);
    let parts = 4 * pool.threads();
    (0..8)
        .map(|_| {
            let began = Instant::now();
            pool.run(parts, |i| {
                // SAFETY: `part` chose what the processor has.
                let x = unsafe { part(1.0 + i as f32) };
                sink.fetch_xor(x.to_bits(), Ordering::Relaxed);
            });
            (2 * parts * SUMS * lanes * ROUNDS) as f64 / began.elapsed().as_secs_f64()
        })
        .fold(0.0, f64::max)
}

#[cfg(target_arch = "x86_64")]
fn part() -> (usize, unsafe fn(f32) -> f32) {
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx512f")]
    unsafe fn avx512(seed: f32) -> f32 {
        let seed = std::hint::black_box(seed);
        let (by, plus) = (_mm512_set1_ps(0.999), _mm512_set1_ps(0.001));
        let mut sums = [_mm512_set1_ps(seed); SUMS];
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, by, plus);
            }
        }
        sums.into_iter().map(|s| _mm512_reduce_add_ps(s)).sum()
    }
    #[target_feature(enable = "avx2,fma")]
    unsafe fn avx2(seed: f32) -> f32 {
        let (by, plus) = (_mm256_set1_ps(0.999), _mm256_set1_ps(0.001));
        let mut sums = [_mm256_set1_ps(seed); SUMS];
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, by, plus);
            }
        }
        sums.into_iter().map(|s| _mm256_cvtss_f32(s)).sum()
    }
    let f = super::simd::features();
    match (f.avx512, f.avx2_fma) {
        (true, _) => (16, avx512),
        (false, true) => (8, avx2),
        (false, false) => (1, plain),
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn part() -> (usize, unsafe fn(f32) -> f32) {
    (1, plain)
}

fn plain(seed: f32) -> f32 {
    let mut sums = [seed; SUMS];
    for _ in 0..ROUNDS {
        sums.iter_mut().for_each(|x| *x = *x * 0.999 + 0.001);
    }
    sums.iter().sum()
}
