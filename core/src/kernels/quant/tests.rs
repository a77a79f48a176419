use super::*;
use crate::kernels::Random;

const SIZES: [usize; 12] = [1, 2, 3, 15, 17, 31, 33, 63, 65, 100, 130, 576];

fn normal(len: usize, seed: u64, size: f32) -> Vec<f32> {
    let mut random = Random::new(seed);
    (0..len).map(|_| random.normal() as f32 * size).collect()
}

/// Weights `scale · code + min` as a Q4_1 file holds them: `f16` scale and minimum for 32 weights along k, codes 0..=15.
fn q4_1_grid(n: usize, k: usize, seed: u64) -> Vec<f32> {
    let mut random = Random::new(seed);
    let mut w = Vec::with_capacity(n * k);
    for _ in 0..n {
        for start in (0..k).step_by(BLOCK) {
            let scale = f16::from_f64(0.002 + 0.02 * random.unit()).to_f32();
            let min = f16::from_f64(-0.3 * random.unit()).to_f32();
            let len = BLOCK.min(k - start);
            w.extend((0..len).map(|_| random.below(16) as f32 * scale + min));
        }
    }
    w
}

/// x (t, k) · wᵀ in `f64`.
fn exact(x: &[f32], w: &[f32], t: usize, n: usize, k: usize) -> Vec<f64> {
    let mut y = vec![0.0; t * n];
    for i in 0..t {
        for j in 0..n {
            let (x, w) = (&x[i * k..(i + 1) * k], &w[j * k..(j + 1) * k]);
            y[i * n + j] = x.iter().zip(w).map(|(x, w)| *x as f64 * *w as f64).sum();
        }
    }
    y
}

/// Relative RMS difference.
fn distance(got: &[f32], want: &[f64]) -> f64 {
    let pairs = || got.iter().map(|g| *g as f64).zip(want);
    let error = pairs().map(|(g, w)| (g - w) * (g - w)).sum::<f64>();
    (error
        / want
            .iter()
            .map(|w| w * w)
            .sum::<f64>()
            .max(f64::MIN_POSITIVE))
    .sqrt()
}

fn as_f64(v: &[f32]) -> Vec<f64> {
    v.iter().map(|v| *v as f64).collect()
}

/// Every path, with and without a pool, against the scalar one.
fn check_paths<const BITS: usize>(pool: &Pool, t: usize, n: usize, k: usize) {
    let (x, w) = (normal(t * k, 1, 1.0), normal(n * k, 2, 0.05));
    let packed = Packed::<BITS>::new(&w, n, k);
    let mut want = vec![f32::NAN; t * n];
    packed.product_on(QuantPath::Scalar, None, &x, t, &mut want);
    let size = want.iter().fold(0f32, |top, v| top.max(v.abs()));
    for path in QuantPath::available() {
        for pool in [None, Some(pool)] {
            let mut got = vec![f32::NAN; t * n];
            packed.product_on(path, pool, &x, t, &mut got);
            for (i, (g, w)) in got.iter().zip(&want).enumerate() {
                assert!(
                    (g - w).abs() <= 1e-5 * size,
                    "{BITS} bits, {path:?}, ({t}, {k}) x ({n}, {k}), element {i}: {g} {w}"
                );
            }
        }
    }
}

#[test]
fn every_path_agrees_with_the_scalar_one_over_odd_shapes() {
    let pool = Pool::new(2, 0);
    for (i, n) in SIZES.into_iter().enumerate() {
        for (j, k) in SIZES.into_iter().enumerate() {
            // Each t meets each n and each k, though not each pair of them.
            let t = SIZES[(i + j) % SIZES.len()];
            check_paths::<8>(&pool, t, n, k);
            check_paths::<4>(&pool, t, n, k);
        }
    }
    // Enough work for the second thread.
    check_paths::<8>(&pool, 31, 576, 576);
    check_paths::<4>(&pool, 31, 570, 576);
    // The tiles of each number of rows.
    for t in 1..=26 {
        check_paths::<8>(&pool, t, 33, 65);
        check_paths::<4>(&pool, t, 48, 64);
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(200))]
    #[test]
    fn every_path_agrees_with_the_scalar_one_for_any_shape(t in 1usize..40, n in 1usize..140, k in 1usize..300, threads in 1usize..4) {
        let pool = Pool::new(threads, 0);
        check_paths::<8>(&pool, t, n, k);
        check_paths::<4>(&pool, t, n, k);
    }
}

/// All codes at their ends, where 16 bits would saturate.
fn check_extremes<const BITS: usize>(x: &[f32], w: &[f32], n: usize, k: usize) {
    let packed = Packed::<BITS>::new(w, n, k);
    let t = x.len() / k;
    for path in QuantPath::available() {
        let mut got = vec![0.0; t * n];
        packed.product_on(path, None, x, t, &mut got);
        let error = distance(&got, &exact(x, w, t, n, k));
        assert!(error < 1e-3, "{BITS} bits, {path:?}: {error}");
    }
}

#[test]
fn the_largest_codes_of_either_sign_do_not_saturate() {
    let k = 96;
    let w: Vec<f32> = [1.0, -1.0].iter().flat_map(|v| vec![*v; k]).collect();
    let x: Vec<f32> = [3.0, -3.0].iter().flat_map(|v| vec![*v; k]).collect();
    check_extremes::<8>(&x, &w, 2, k);
    check_extremes::<4>(&x, &w, 2, k);
    let turns = |i: usize| if i.is_multiple_of(2) { 1.0 } else { -1.0 };
    let w: Vec<f32> = (0..k).map(turns).collect();
    check_extremes::<8>(&w, &w, 1, k);
    check_extremes::<4>(&w, &w, 1, k);
}

#[test]
fn eight_bits_err_by_less_than_one_percent() {
    let (t, n, k) = (9, 130, 576);
    let (x, w) = (normal(t * k, 3, 2.0), normal(n * k, 4, 0.05));
    let packed = PackedQ8::new(&w, n, k);
    let mut y = vec![0.0; t * n];
    packed.product(None, &x, t, &mut y);
    let error = distance(&y, &exact(&x, &w, t, n, k));
    assert!(error < 0.01, "{error}");
    let weights = distance(&packed.unpack(), &as_f64(&w));
    assert!(weights < 0.006, "{weights}");
}

#[test]
fn four_bits_err_by_eight_percent_on_normal_weights_which_is_less_than_without_a_minimum() {
    let (n, k) = (64, 576);
    let w = normal(n * k, 5, 0.05);
    let error = distance(&PackedQ4::new(&w, n, k).unpack(), &as_f64(&w));
    // Q4_0: the element of largest size becomes -8 steps.
    let mut symmetric = w.clone();
    for block in symmetric.chunks_mut(BLOCK) {
        let top = block
            .iter()
            .fold(0f32, |a, b| if b.abs() > a.abs() { *b } else { a });
        let scale = top / -8.0;
        for v in block {
            *v = (*v / scale).round().clamp(-8.0, 7.0) * scale;
        }
    }
    let without = distance(&symmetric, &as_f64(&w));
    assert!(error < 0.085 && error < without, "{error} {without}");
}

#[test]
fn weights_of_a_q4_1_file_come_back_nearly_unchanged() {
    for (n, k) in [(512, 576), (17, 100)] {
        let w = q4_1_grid(n, k, 6);
        let back = PackedQ4::new(&w, n, k).unpack();
        for (w, back) in w.chunks(k).zip(back.chunks(k)) {
            for (w, back) in w.chunks(BLOCK).zip(back.chunks(BLOCK)) {
                let low = w.iter().fold(f32::INFINITY, |a, b| a.min(*b));
                let high = w.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
                // A few weights may fit a finer grid that begins where `f16` holds nothing exactly.
                let rounding = if w.len() < BLOCK {
                    low.abs() / 2048.0
                } else {
                    0.0
                };
                for (w, back) in w.iter().zip(back) {
                    let error = (w - back).abs();
                    assert!(error <= 1e-4 * (high - low) + rounding, "{w} {back}");
                }
            }
        }
    }
}

#[test]
fn the_product_is_that_of_the_unpacked_weight_but_for_the_rounding_of_x() {
    let (t, n, k) = (7, 50, 200);
    let (x, w) = (normal(t * k, 7, 1.0), q4_1_grid(n, k, 8));
    let packed = PackedQ4::new(&w, n, k);
    let mut y = vec![0.0; t * n];
    packed.product(None, &x, t, &mut y);
    let error = distance(&y, &exact(&x, &packed.unpack(), t, n, k));
    assert!(error < 0.01, "{error}");
    let mut row = vec![0.0; k];
    packed.row(49, &mut row);
    assert_eq!(row, packed.unpack()[49 * k..]);
}

#[test]
fn zeros_and_equal_numbers_are_exact_and_nothing_is_an_empty_product() {
    let (n, k) = (5, 70);
    for value in [0.0, 0.5, -3.0] {
        let w = vec![value; n * k];
        assert_eq!(PackedQ4::new(&w, n, k).unpack(), w);
        let eight = PackedQ8::new(&w, n, k).unpack();
        assert!(eight
            .iter()
            .all(|v| (v - value).abs() <= 1e-3 * value.abs()));
        for path in QuantPath::available() {
            let mut y = vec![f32::NAN; n];
            PackedQ4::new(&w, n, k).product_on(path, None, &vec![0.0; k], 1, &mut y);
            assert_eq!(y, vec![0.0; n]);
            PackedQ4::new(&w, n, k).product_on(path, None, &vec![1.0; k], 1, &mut y);
            let want = value * k as f32;
            assert!(
                y.iter().all(|y| (y - want).abs() <= 1e-4 * want.abs()),
                "{path:?} {y:?}"
            );
        }
    }
    PackedQ8::new(&[], 0, k).product(None, &vec![1.0; k], 1, &mut []);
    PackedQ8::new(&vec![1.0; k], 1, k).product(None, &[], 0, &mut []);
    let mut y = [1.0; 3];
    PackedQ4::new(&[], 3, 0).product(None, &[], 1, &mut y);
    assert_eq!(y, [0.0; 3]);
}

#[test]
fn huge_and_tiny_numbers_keep_their_relative_precision() {
    let (t, n, k) = (3, 20, 64);
    for (x_size, w_size) in [
        (1e30, 1e4),
        (1.0, 1e30),
        (1e-12, 1e-12),
        (1e-3, 1e-6),
        (1e6, 1e9),
    ] {
        let (x, w) = (normal(t * k, 9, x_size), normal(n * k, 10, w_size));
        for path in QuantPath::available() {
            let mut y = vec![0.0; t * n];
            PackedQ8::new(&w, n, k).product_on(path, None, &x, t, &mut y);
            let error = distance(&y, &exact(&x, &w, t, n, k));
            assert!(error < 0.015, "{path:?}, {x_size} {w_size}: {error}");
        }
    }
}

fn check_nan<const BITS: usize>(bad: f32) {
    let (t, n, k) = (8, 33, 70);
    let (mut x, w) = (normal(t * k, 11, 1.0), normal(n * k, 12, 0.05));
    let packed = Packed::<BITS>::new(&w, n, k);
    for path in QuantPath::available() {
        let (mut want, mut got) = (vec![0.0; t * n], vec![0.0; t * n]);
        x[3 * k + 69] = 1.0;
        packed.product_on(path, None, &x, t, &mut want);
        x[3 * k + 69] = bad;
        packed.product_on(path, None, &x, t, &mut got);
        want[3 * n..4 * n].fill(f32::NAN);
        let same = |(a, b): (&f32, &f32)| a == b || a.is_nan() && b.is_nan();
        assert!(
            got.iter().zip(&want).all(same),
            "{BITS} bits, {path:?}, {bad}"
        );
    }
}

#[test]
fn a_nan_or_an_infinity_in_x_makes_its_row_nan_and_touches_no_other() {
    for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        check_nan::<8>(bad);
        check_nan::<4>(bad);
    }
}

#[test]
fn a_nan_in_the_weight_makes_its_column_nan_and_touches_no_other() {
    let (n, k) = (20, 40);
    let mut w = normal(n * k, 13, 1.0);
    w[7 * k + 35] = f32::NAN;
    for path in QuantPath::available() {
        for y in [product::<8>(path, &w, n, k), product::<4>(path, &w, n, k)] {
            let nan: Vec<bool> = y.iter().map(|v| v.is_nan()).collect();
            assert_eq!(nan, (0..n).map(|j| j == 7).collect::<Vec<_>>());
        }
    }
}

fn product<const BITS: usize>(path: QuantPath, w: &[f32], n: usize, k: usize) -> Vec<f32> {
    let mut y = vec![0.0; n];
    Packed::<BITS>::new(w, n, k).product_on(path, None, &vec![1.0; k], 1, &mut y);
    y
}
