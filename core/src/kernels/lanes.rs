//! Sixteen `f32` side by side as a type, so that a kernel is written once and compiled for each kind of register.

use super::simd::features;

/// Numbers in a [`Lanes`].
pub(super) const LANES: usize = 16;

/// Sixteen numbers: one register of 512 bits, two of 256, or an array. Kernels over them are entered through [`on_lanes`] alone, which
/// has seen that the processor has the instructions; that is what makes the safe methods safe.
pub(super) trait Lanes: Copy {
    /// Sums a kernel can keep in registers, with room left for what it reads.
    const SUMS: usize;

    fn splat(x: f32) -> Self;
    /// # Safety
    /// Sixteen numbers can be read there.
    unsafe fn load(from: *const f32) -> Self;
    /// # Safety
    /// Sixteen numbers can be written there.
    unsafe fn store(self, to: *mut f32);
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    fn div(self, other: Self) -> Self;
    /// `self · a + b`, rounded once where the processor can.
    fn mul_add(self, a: Self, b: Self) -> Self;
    /// The larger of each two; `other`'s where one is NaN.
    fn max(self, other: Self) -> Self;
    /// The smaller of each two; `other`'s where one is NaN.
    fn min(self, other: Self) -> Self;
    /// 2 to the power of each, for whole numbers within -127..=127; the lowest gives 0.
    fn pow2(self) -> Self;
    fn sum(self) -> f32;
    fn largest(self) -> f32;
    /// Sixteen pairs of bf16: the lower half of each word, and the upper one.
    ///
    /// # Safety
    /// Sixteen words can be read there.
    unsafe fn widen(from: *const u32) -> (Self, Self);

    /// The first `n < 16` numbers, zeros behind them.
    ///
    /// # Safety
    /// `n` numbers can be read there.
    #[inline(always)]
    unsafe fn load_first(from: *const f32, n: usize) -> Self {
        let mut whole = [0.0; LANES];
        // SAFETY: the caller's promise; the array is long enough.
        unsafe {
            std::ptr::copy_nonoverlapping(from, whole.as_mut_ptr(), n.min(LANES));
            Self::load(whole.as_ptr())
        }
    }

    /// # Safety
    /// `n` numbers can be written there.
    #[inline(always)]
    unsafe fn store_first(self, to: *mut f32, n: usize) {
        let mut whole = [0.0; LANES];
        // SAFETY: the caller's promise; the array is long enough.
        unsafe {
            self.store(whole.as_mut_ptr());
            std::ptr::copy_nonoverlapping(whole.as_ptr(), to, n.min(LANES));
        }
    }

    /// e to the power of each, within 2 units in the last place; 0 below -88, 2.4e38 above 88.37, NaN of NaN.
    ///
    /// Cephes' `expf`: the power of two taken out, a polynomial of degree 7 for what is left.
    #[inline(always)]
    fn exp(self) -> Self {
        let x = Self::splat(88.37).min(Self::splat(-88.0).max(self));
        // Adding 1.5 · 2^23 rounds to the nearest whole number.
        let round = Self::splat(12_582_912.0);
        let n = x
            .mul_add(Self::splat(std::f32::consts::LOG2_E), round)
            .sub(round);
        let r = n.mul_add(Self::splat(-0.693_359_4), x);
        let r = n.mul_add(Self::splat(2.121_944_4e-4), r);
        let mut p = Self::splat(1.987_569_1e-4);
        for c in [
            1.398_2e-3,
            8.333_452e-3,
            4.166_579_6e-2,
            1.666_666_5e-1,
            0.5,
        ] {
            p = p.mul_add(r, Self::splat(c));
        }
        let one = Self::splat(1.0);
        p.mul_add(r.mul(r), r.add(one)).mul(n.pow2())
    }

    /// `x / (1 + e^-x)`.
    #[inline(always)]
    fn silu(self) -> Self {
        let zero = Self::splat(0.0);
        self.div(Self::splat(1.0).add(zero.sub(self).exp()))
    }
}

/// A computation over lanes of any kind. `run` must be `#[inline(always)]`, and so must what it calls in its loops.
pub(super) trait OnLanes {
    type Out;
    fn run<L: Lanes>(self) -> Self::Out;
}

/// Runs it on the widest registers of this processor.
#[inline]
pub(super) fn on_lanes<K: OnLanes>(kernel: K) -> K::Out {
    match Kind::best() {
        // SAFETY: `best` has seen the features.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512 => unsafe { x86::on_avx512(kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2 => unsafe { x86::on_avx2(kernel) },
        _ => kernel.run::<Plain>(),
    }
}

/// Kinds of registers there are lanes for, the widest first.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
enum Kind {
    Avx512,
    Avx2,
    Plain,
}

impl Kind {
    #[inline]
    fn best() -> Self {
        let features = features();
        let best = match () {
            _ if features.avx512 && features.avx2_fma => Self::Avx512,
            _ if features.avx2_fma => Self::Avx2,
            _ => Self::Plain,
        };
        #[cfg(test)]
        if let Some(asked) = FORCED.get() {
            return if asked > best { asked } else { best };
        }
        best
    }
}

/// The registers that kernels over lanes use on this processor, as reports call them.
pub fn widest_lanes() -> &'static str {
    match Kind::best() {
        Kind::Avx512 => "AVX-512",
        Kind::Avx2 => "AVX2",
        Kind::Plain => "no vector instructions",
    }
}

#[cfg(test)]
thread_local! {
    static FORCED: std::cell::Cell<Option<Kind>> = const { std::cell::Cell::new(None) };
}

/// Calls `body` with this thread's kernels on each kind of lanes that this processor has, for tests.
#[cfg(test)]
pub(super) fn on_each_kind_of_lanes(mut body: impl FnMut()) {
    FORCED.set(None);
    let best = Kind::best();
    for kind in [Kind::Avx512, Kind::Avx2, Kind::Plain] {
        if kind >= best {
            FORCED.set(Some(kind));
            body();
            FORCED.set(None);
        }
    }
}

/// What every processor has. Without a fused multiplication, which would be a function call here.
#[derive(Clone, Copy)]
pub(super) struct Plain([f32; LANES]);

impl Plain {
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        let mut out = self.0;
        for (out, other) in out.iter_mut().zip(other.0) {
            *out = f(*out, other);
        }
        Self(out)
    }
}

impl Lanes for Plain {
    const SUMS: usize = 2;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        Self([x; LANES])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's promise.
        Self(unsafe { from.cast::<[f32; LANES]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }

    #[inline(always)]
    fn div(self, other: Self) -> Self {
        self.zip(other, |a, b| a / b)
    }

    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        self.mul(a).add(b)
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        self.zip(other, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    fn pow2(self) -> Self {
        Self(
            self.0
                .map(|n| f32::from_bits(((n as i32 + 127) << 23) as u32)),
        )
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        self.0.iter().sum()
    }

    #[inline(always)]
    fn largest(self) -> f32 {
        self.0.iter().copied().fold(f32::NEG_INFINITY, f32::max)
    }

    #[inline(always)]
    unsafe fn widen(from: *const u32) -> (Self, Self) {
        // SAFETY: the caller's promise.
        let words = unsafe { from.cast::<[u32; LANES]>().read_unaligned() };
        let low = words.map(|word| f32::from_bits(word << 16));
        (
            Self(low),
            Self(words.map(|word| f32::from_bits(word & 0xffff_0000))),
        )
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Lanes, OnLanes};
    use std::arch::x86_64::*;

    /// # Safety
    /// The processor has AVX-512 F, AVX2 and FMA.
    #[target_feature(enable = "avx512f,avx2,fma")]
    pub(super) unsafe fn on_avx512<K: OnLanes>(kernel: K) -> K::Out {
        kernel.run::<Avx512>()
    }

    /// # Safety
    /// The processor has AVX2 and FMA.
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn on_avx2<K: OnLanes>(kernel: K) -> K::Out {
        kernel.run::<Avx2>()
    }

    #[derive(Clone, Copy)]
    pub(super) struct Avx512(__m512);

    // SAFETY of every `unsafe` in it: kernels over these lanes are entered through `on_avx512` alone; addresses are the callers' promise.
    impl Lanes for Avx512 {
        const SUMS: usize = 24;

        #[inline(always)]
        fn splat(x: f32) -> Self {
            Self(unsafe { _mm512_set1_ps(x) })
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            Self(unsafe { _mm512_loadu_ps(from) })
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { _mm512_storeu_ps(to, self.0) }
        }

        #[inline(always)]
        unsafe fn load_first(from: *const f32, n: usize) -> Self {
            let mask = (1u32 << n.min(16)) - 1;
            Self(unsafe { _mm512_maskz_loadu_ps(mask as __mmask16, from) })
        }

        #[inline(always)]
        unsafe fn store_first(self, to: *mut f32, n: usize) {
            let mask = (1u32 << n.min(16)) - 1;
            unsafe { _mm512_mask_storeu_ps(to, mask as __mmask16, self.0) }
        }

        #[inline(always)]
        fn add(self, other: Self) -> Self {
            Self(unsafe { _mm512_add_ps(self.0, other.0) })
        }

        #[inline(always)]
        fn sub(self, other: Self) -> Self {
            Self(unsafe { _mm512_sub_ps(self.0, other.0) })
        }

        #[inline(always)]
        fn mul(self, other: Self) -> Self {
            Self(unsafe { _mm512_mul_ps(self.0, other.0) })
        }

        #[inline(always)]
        fn div(self, other: Self) -> Self {
            Self(unsafe { _mm512_div_ps(self.0, other.0) })
        }

        #[inline(always)]
        fn mul_add(self, a: Self, b: Self) -> Self {
            Self(unsafe { _mm512_fmadd_ps(self.0, a.0, b.0) })
        }

        #[inline(always)]
        fn max(self, other: Self) -> Self {
            Self(unsafe { _mm512_max_ps(self.0, other.0) })
        }

        #[inline(always)]
        fn min(self, other: Self) -> Self {
            Self(unsafe { _mm512_min_ps(self.0, other.0) })
        }

        #[inline(always)]
        fn pow2(self) -> Self {
            unsafe {
                let n = _mm512_add_epi32(_mm512_cvtps_epi32(self.0), _mm512_set1_epi32(127));
                Self(_mm512_castsi512_ps(_mm512_slli_epi32::<23>(n)))
            }
        }

        #[inline(always)]
        fn sum(self) -> f32 {
            unsafe { _mm512_reduce_add_ps(self.0) }
        }

        #[inline(always)]
        fn largest(self) -> f32 {
            unsafe { _mm512_reduce_max_ps(self.0) }
        }

        #[inline(always)]
        unsafe fn widen(from: *const u32) -> (Self, Self) {
            unsafe {
                let words = _mm512_loadu_si512(from.cast());
                let low = _mm512_slli_epi32::<16>(words);
                let high = _mm512_and_si512(words, _mm512_set1_epi32(-65536));
                (
                    Self(_mm512_castsi512_ps(low)),
                    Self(_mm512_castsi512_ps(high)),
                )
            }
        }
    }

    #[derive(Clone, Copy)]
    pub(super) struct Avx2(__m256, __m256);

    // SAFETY: as above, with `on_avx2`.
    impl Lanes for Avx2 {
        const SUMS: usize = 6;

        #[inline(always)]
        fn splat(x: f32) -> Self {
            let half = unsafe { _mm256_set1_ps(x) };
            Self(half, half)
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { Self(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe {
                _mm256_storeu_ps(to, self.0);
                _mm256_storeu_ps(to.add(8), self.1);
            }
        }

        #[inline(always)]
        fn add(self, other: Self) -> Self {
            unsafe {
                Self(
                    _mm256_add_ps(self.0, other.0),
                    _mm256_add_ps(self.1, other.1),
                )
            }
        }

        #[inline(always)]
        fn sub(self, other: Self) -> Self {
            unsafe {
                Self(
                    _mm256_sub_ps(self.0, other.0),
                    _mm256_sub_ps(self.1, other.1),
                )
            }
        }

        #[inline(always)]
        fn mul(self, other: Self) -> Self {
            unsafe {
                Self(
                    _mm256_mul_ps(self.0, other.0),
                    _mm256_mul_ps(self.1, other.1),
                )
            }
        }

        #[inline(always)]
        fn div(self, other: Self) -> Self {
            unsafe {
                Self(
                    _mm256_div_ps(self.0, other.0),
                    _mm256_div_ps(self.1, other.1),
                )
            }
        }

        #[inline(always)]
        fn mul_add(self, a: Self, b: Self) -> Self {
            unsafe {
                Self(
                    _mm256_fmadd_ps(self.0, a.0, b.0),
                    _mm256_fmadd_ps(self.1, a.1, b.1),
                )
            }
        }

        #[inline(always)]
        fn max(self, other: Self) -> Self {
            unsafe {
                Self(
                    _mm256_max_ps(self.0, other.0),
                    _mm256_max_ps(self.1, other.1),
                )
            }
        }

        #[inline(always)]
        fn min(self, other: Self) -> Self {
            unsafe {
                Self(
                    _mm256_min_ps(self.0, other.0),
                    _mm256_min_ps(self.1, other.1),
                )
            }
        }

        #[inline(always)]
        fn pow2(self) -> Self {
            #[inline(always)]
            fn half(x: __m256) -> __m256 {
                unsafe {
                    let n = _mm256_add_epi32(_mm256_cvtps_epi32(x), _mm256_set1_epi32(127));
                    _mm256_castsi256_ps(_mm256_slli_epi32::<23>(n))
                }
            }
            Self(half(self.0), half(self.1))
        }

        #[inline(always)]
        fn sum(self) -> f32 {
            let mut out = [0.0; 8];
            unsafe { _mm256_storeu_ps(out.as_mut_ptr(), _mm256_add_ps(self.0, self.1)) };
            (out[0] + out[4]) + (out[1] + out[5]) + ((out[2] + out[6]) + (out[3] + out[7]))
        }

        #[inline(always)]
        fn largest(self) -> f32 {
            let mut out = [0.0; 8];
            unsafe { _mm256_storeu_ps(out.as_mut_ptr(), _mm256_max_ps(self.0, self.1)) };
            out.into_iter().fold(f32::NEG_INFINITY, f32::max)
        }

        #[inline(always)]
        unsafe fn widen(from: *const u32) -> (Self, Self) {
            unsafe {
                let half = |at: *const u32| {
                    let words = _mm256_loadu_si256(at.cast());
                    let low = _mm256_slli_epi32::<16>(words);
                    let high = _mm256_and_si256(words, _mm256_set1_epi32(-65536));
                    (_mm256_castsi256_ps(low), _mm256_castsi256_ps(high))
                };
                let (a, b) = (half(from), half(from.add(8)));
                (Self(a.0, b.0), Self(a.1, b.1))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a kernel gives on each kind of lanes.
    fn on_all_lanes<K: OnLanes + Clone>(kernel: K) -> Vec<K::Out> {
        let mut out = Vec::new();
        on_each_kind_of_lanes(|| out.push(on_lanes(kernel.clone())));
        out
    }

    #[derive(Clone)]
    struct Exp<'a>(&'a [f32]);

    impl OnLanes for Exp<'_> {
        type Out = Vec<f32>;

        #[inline(always)]
        fn run<L: Lanes>(self) -> Vec<f32> {
            let mut out = self.0.to_vec();
            let (whole, rest) = out.as_chunks_mut::<LANES>();
            for x in whole {
                // SAFETY: sixteen numbers.
                unsafe { L::load(x.as_ptr()).exp().store(x.as_mut_ptr()) };
            }
            // SAFETY: as many as there are.
            unsafe {
                let last = L::load_first(rest.as_ptr(), rest.len());
                last.exp().store_first(rest.as_mut_ptr(), rest.len());
            }
            out
        }
    }

    #[test]
    fn every_kind_of_lanes_has_the_same_exponential_within_two_ulps() {
        let x: Vec<f32> = (0..200_003)
            .map(|i| (i as f32 - 100_000.0) * 8.7e-4)
            .chain([0.0, -0.0, 1e-30, -88.1, -1e30, f32::NEG_INFINITY])
            .collect();
        for got in on_all_lanes(Exp(&x)) {
            for (x, got) in x.iter().zip(&got) {
                let want = (*x as f64).exp();
                if *x < -87.3 {
                    assert!(*got >= 0.0 && *got < 2e-38, "{x}: {got}");
                } else {
                    let ulp = (want as f32).to_bits().abs_diff(got.to_bits());
                    assert!(ulp <= 2, "{x}: {got}, not {want}");
                }
            }
        }
        for got in on_all_lanes(Exp(&[f32::NAN, 1e9, 3.0])) {
            assert!(
                got[0].is_nan() && got[1] > 2e38 && got[1].is_finite(),
                "{got:?}"
            );
        }
    }

    #[derive(Clone)]
    struct Arithmetic;

    impl OnLanes for Arithmetic {
        type Out = Vec<f32>;

        #[inline(always)]
        fn run<L: Lanes>(self) -> Vec<f32> {
            let a: Vec<f32> = (0..16).map(|i| i as f32 - 6.5).collect();
            let b: Vec<f32> = (0..16).map(|i| 4.0 - 0.5 * i as f32).collect();
            // SAFETY: sixteen numbers each.
            let (a, b) = unsafe { (L::load(a.as_ptr()), L::load(b.as_ptr())) };
            let mut out = vec![a.sum(), b.largest(), a.mul(b).sum()];
            for v in [
                a.add(b),
                a.sub(b),
                a.div(L::splat(4.0)),
                a.mul_add(b, L::splat(2.0)),
                a.max(b),
                a.min(b),
                L::splat(-126.0).max(a.sub(L::splat(0.5))).pow2(),
            ] {
                let at = out.len();
                out.resize(at + 16, 0.0);
                // SAFETY: sixteen numbers.
                unsafe { v.store(out[at..].as_mut_ptr()) };
            }
            out
        }
    }

    #[test]
    fn every_kind_of_lanes_has_the_same_arithmetic() {
        let all = on_all_lanes(Arithmetic);
        assert_eq!(all.last().unwrap()[..3], [16.0, 4.0, -166.0]);
        for other in &all[1..] {
            assert_eq!(all[0], *other);
        }
    }
}
