//! Dot product and friends on `f32`, with AVX-512, AVX2+FMA and scalar forms chosen once at run time.

use std::sync::OnceLock;

/// What the processor offers, as far as Locum's kernels care.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Features {
    pub avx2_fma: bool,
    pub f16c: bool,
    pub avx_vnni: bool,
    pub avx512: bool,
    pub avx512_vnni: bool,
    /// Together with AVX512F and AVX512BW, which the kernels that multiply bf16 use too.
    pub avx512_bf16: bool,
    /// VDPBF16PS starts as often as an FMA of the same width, so that bf16 products run at twice the rate of `f32` ones. So on AMD since
    /// Zen 4 (Zen 5, one thread: 528 against 265 GFLOP/s); on Intel it starts at a quarter of the FMA's rate (Emerald Rapids: 86 against 176).
    pub avx512_bf16_full_rate: bool,
}

/// A processor to be taken for, so that the paths of older ones can be measured on a newer one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    Scalar,
    /// AVX2, FMA and F16C.
    Avx2,
    /// Everything there is.
    Avx512,
}

static FEATURES: OnceLock<Features> = OnceLock::new();

/// The processor's features, read once.
pub fn features() -> Features {
    *FEATURES.get_or_init(detected)
}

/// Hides from every kernel what goes beyond `isa`, for the rest of the process. Products that `gemm` computes are its own choice.
///
/// # Errors
/// The features were read before, so that kernels may have been chosen by them already.
pub fn limit_features(isa: Isa) -> Result<Features, &'static str> {
    FEATURES
        .set(detected().within(isa))
        .map_err(|_| "the kernels have been chosen already")?;
    Ok(features())
}

impl Features {
    fn within(self, isa: Isa) -> Self {
        let wide = isa == Isa::Avx512;
        let narrow = isa != Isa::Scalar;
        Self {
            avx2_fma: self.avx2_fma && narrow,
            f16c: self.f16c && narrow,
            // VPDPBUSD of 256 bits came after AVX-512.
            avx_vnni: self.avx_vnni && wide,
            avx512: self.avx512 && wide,
            avx512_vnni: self.avx512_vnni && wide,
            avx512_bf16: self.avx512_bf16 && wide,
            avx512_bf16_full_rate: self.avx512_bf16_full_rate && wide,
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn detected() -> Features {
    let avx512_bf16 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512bf16");
    let vendor = std::arch::x86_64::__cpuid(0);
    let amd = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes)
        == [*b"Auth", *b"enti", *b"cAMD"];
    Features {
        avx2_fma: is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
        f16c: is_x86_feature_detected!("f16c"),
        avx_vnni: is_x86_feature_detected!("avxvnni"),
        avx512: is_x86_feature_detected!("avx512f"),
        avx512_vnni: is_x86_feature_detected!("avx512vnni"),
        avx512_bf16,
        avx512_bf16_full_rate: avx512_bf16 && amd,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detected() -> Features {
    Features {
        avx2_fma: false,
        f16c: false,
        avx_vnni: false,
        avx512: false,
        avx512_vnni: false,
        avx512_bf16: false,
        avx512_bf16_full_rate: false,
    }
}

/// `Σ a[i] b[i]`.
///
/// # Panics
/// If the lengths differ.
#[inline]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    #[cfg(target_arch = "x86_64")]
    {
        let f = features();
        if f.avx512 {
            // SAFETY: the feature was detected; the lengths are equal.
            return unsafe { dot_avx512(a, b) };
        }
        if f.avx2_fma {
            // SAFETY: the features were detected; the lengths are equal.
            return unsafe { dot_avx2(a, b) };
        }
    }
    dot_scalar(a, b)
}

/// `y[i] += alpha x[i]`.
///
/// # Panics
/// If the lengths differ.
#[inline]
pub fn axpy(alpha: f32, x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len());
    for (y, x) in y.iter_mut().zip(x) {
        *y += alpha * x;
    }
}

pub(super) fn dot_scalar(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn dot_avx512(a: &[f32], b: &[f32]) -> f32 {
    use std::arch::x86_64::*;
    let n = a.len();
    let (pa, pb) = (a.as_ptr(), b.as_ptr());
    let mut acc = [_mm512_setzero_ps(); 4];
    let mut i = 0;
    // SAFETY: every load is within `n` elements, masked at the end.
    unsafe {
        while i + 64 <= n {
            for (j, acc) in acc.iter_mut().enumerate() {
                let at = i + 16 * j;
                *acc = _mm512_fmadd_ps(
                    _mm512_loadu_ps(pa.add(at)),
                    _mm512_loadu_ps(pb.add(at)),
                    *acc,
                );
            }
            i += 64;
        }
        while i < n {
            let left = n - i;
            let mask: __mmask16 = if left >= 16 { !0 } else { (1u16 << left) - 1 };
            acc[0] = _mm512_fmadd_ps(
                _mm512_maskz_loadu_ps(mask, pa.add(i)),
                _mm512_maskz_loadu_ps(mask, pb.add(i)),
                acc[0],
            );
            i += 16;
        }
    }
    let sum = _mm512_add_ps(_mm512_add_ps(acc[0], acc[1]), _mm512_add_ps(acc[2], acc[3]));
    _mm512_reduce_add_ps(sum)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn dot_avx2(a: &[f32], b: &[f32]) -> f32 {
    use std::arch::x86_64::*;
    let n = a.len();
    let (pa, pb) = (a.as_ptr(), b.as_ptr());
    let mut acc = [_mm256_setzero_ps(); 4];
    let mut i = 0;
    let mut out = [0f32; 8];
    // SAFETY: every load is within `n` elements.
    unsafe {
        while i + 32 <= n {
            for (j, acc) in acc.iter_mut().enumerate() {
                let at = i + 8 * j;
                *acc = _mm256_fmadd_ps(
                    _mm256_loadu_ps(pa.add(at)),
                    _mm256_loadu_ps(pb.add(at)),
                    *acc,
                );
            }
            i += 32;
        }
        let sum = _mm256_add_ps(_mm256_add_ps(acc[0], acc[1]), _mm256_add_ps(acc[2], acc[3]));
        _mm256_storeu_ps(out.as_mut_ptr(), sum);
    }
    out.iter().sum::<f32>() + dot_scalar(&a[i..], &b[i..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_limited_before_they_are_read_or_not_at_all() {
        let all = features();
        assert!(limit_features(Isa::Scalar).is_err(), "somebody has them");
        assert_eq!(features(), all);
        assert_eq!(all.within(Isa::Avx512), all);
        let narrow = all.within(Isa::Avx2);
        assert_eq!((narrow.avx2_fma, narrow.f16c), (all.avx2_fma, all.f16c));
        assert!(!narrow.avx512 && !narrow.avx512_vnni && !narrow.avx_vnni);
        let none = all.within(Isa::Scalar);
        assert!(!none.avx2_fma && !none.f16c && !none.avx512_bf16);
    }

    #[test]
    fn every_dot_product_agrees_with_the_scalar_one() {
        for n in [
            0, 1, 7, 15, 16, 17, 31, 33, 63, 64, 65, 100, 576, 1536, 1537,
        ] {
            let a: Vec<f32> = (0..n)
                .map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0)
                .collect();
            let b: Vec<f32> = (0..n)
                .map(|i| ((i * 53 % 97) as f32 - 48.0) / 48.0)
                .collect();
            let want = a
                .iter()
                .zip(&b)
                .map(|(x, y)| *x as f64 * *y as f64)
                .sum::<f64>() as f32;
            let close = |got: f32| {
                assert!(
                    (got - want).abs() <= 1e-4 * (1.0 + want.abs()),
                    "{n}: {got} {want}"
                )
            };
            close(dot(&a, &b));
            close(dot_scalar(&a, &b));
            #[cfg(target_arch = "x86_64")]
            if features().avx2_fma {
                // SAFETY: the features were detected in the line above; the lengths are equal.
                close(unsafe { dot_avx2(&a, &b) });
            }
        }
    }
}
