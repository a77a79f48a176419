//! What the machine could do at best: bytes read and operations a second, measured in the process that measures a model.

use std::hint::black_box;
use std::time::Instant;

use locum_core::kernels::features;
use locum_core::model::WeightFormat;
use serde::Serialize;

/// Bytes that are streamed; far more than the caches that one processor has to itself.
const STREAM_BYTES: usize = 1 << 30;
/// Times each limit is measured; the best one counts, for a limit is what nothing disturbed.
const TRIES: usize = 3;
/// Turns of the innermost loops of arithmetic, about 20 ms each.
const TURNS: usize = 4_000_000;

/// Rates of all the threads together. `None`: the processor does not have it, or was told to do without.
#[derive(Clone, Copy, Serialize)]
pub struct Limits {
    pub read_gb_s: f64,
    /// Multiplications and additions of `f32`, with the widest FMA.
    pub f32_gflop_s: Option<f64>,
    /// The same with VDPBF16PS.
    pub bf16_gflop_s: Option<f64>,
    /// The same of 8-bit integers, with VPDPBUSD of 512 bits.
    pub int8_gop_s: Option<f64>,
}

impl Limits {
    /// Takes about two seconds and a GiB, so peaks of memory are to be read before.
    pub fn measure(threads: usize) -> Self {
        let f = features();
        let rate = |there: bool, ops_a_turn: usize, body: fn(usize)| {
            there.then(|| {
                let seconds = best(threads, |_| body(TURNS));
                (threads * TURNS * ops_a_turn) as f64 / seconds / 1e9
            })
        };
        #[cfg(target_arch = "x86_64")]
        let (f32_gflop_s, bf16_gflop_s, int8_gop_s) = {
            // SAFETY: each loop runs only if the feature it needs was detected, by the first argument beside it.
            let (fma512, fma256, dpbf16, dpbusd) = (
                |n| unsafe { x86::fma512(n) },
                |n| unsafe { x86::fma256(n) },
                |n| unsafe { x86::dpbf16(n) },
                |n| unsafe { x86::dpbusd(n) },
            );
            let chains = x86::CHAINS;
            (
                rate(f.avx512, chains * 32, fma512)
                    .or_else(|| rate(f.avx2_fma, chains * 16, fma256)),
                rate(f.avx512_bf16, chains * 64, dpbf16),
                rate(f.avx512_vnni, chains * 128, dpbusd),
            )
        };
        #[cfg(not(target_arch = "x86_64"))]
        let (f32_gflop_s, bf16_gflop_s, int8_gop_s) = {
            let _ = (f, rate(false, 0, |_| ()));
            (None, None, None)
        };
        Self {
            read_gb_s: read_gb_s(threads),
            f32_gflop_s,
            bf16_gflop_s,
            int8_gop_s,
        }
    }

    /// The limit of products with weights in this format, in 10^9 multiplications and additions a second.
    pub fn arithmetic(&self, format: WeightFormat) -> Option<f64> {
        match format {
            WeightFormat::F32 => self.f32_gflop_s,
            WeightFormat::Bf16 if features().avx512_bf16_full_rate => self.bf16_gflop_s,
            WeightFormat::Bf16 => self.f32_gflop_s,
            WeightFormat::Q8 | WeightFormat::Q4 => self.int8_gop_s,
        }
    }
}

/// Seconds of the best of a few times that all threads take for the body.
fn best(threads: usize, body: impl Fn(usize) + Sync) -> f64 {
    let once = || {
        let began = Instant::now();
        std::thread::scope(|scope| {
            for thread in 0..threads {
                let body = &body;
                scope.spawn(move || body(thread));
            }
        });
        began.elapsed().as_secs_f64()
    };
    (0..TRIES).map(|_| once()).fold(f64::INFINITY, f64::min)
}

fn read_gb_s(threads: usize) -> f64 {
    // Written once, so that every page is one of its own and not the system's page of zeros.
    let words: Vec<u64> = (0..STREAM_BYTES as u64 / 8).collect();
    let share = words.len().div_ceil(threads);
    let seconds = best(threads, |thread| {
        let part = words.chunks(share).nth(thread).unwrap_or(&[]);
        black_box(sum(part));
    });
    STREAM_BYTES as f64 / seconds / 1e9
}

fn sum(words: &[u64]) -> u64 {
    let mut sums = [0u64; 32];
    for line in words.chunks_exact(32) {
        for (sum, word) in sums.iter_mut().zip(line) {
            *sum = sum.wrapping_add(*word);
        }
    }
    sums.iter().fold(0, |a, b| a.wrapping_add(*b))
}

/// Loops whose sums stay in registers, in more chains than an instruction takes cycles.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    pub const CHAINS: usize = 12;

    #[target_feature(enable = "avx512f")]
    pub unsafe fn fma512(turns: usize) {
        let (x, y) = (_mm512_set1_ps(black_box(0.5)), _mm512_set1_ps(1.0));
        let mut sums = [y; CHAINS];
        for _ in 0..turns {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, x, y);
            }
        }
        black_box(sums);
    }

    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn fma256(turns: usize) {
        let (x, y) = (_mm256_set1_ps(black_box(0.5)), _mm256_set1_ps(1.0));
        let mut sums = [y; CHAINS];
        for _ in 0..turns {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, x, y);
            }
        }
        black_box(sums);
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub unsafe fn dpbf16(turns: usize) {
        let y = _mm512_set1_ps(black_box(1.0));
        let x = _mm512_cvtne2ps_pbh(y, y);
        let mut sums = [y; CHAINS];
        for _ in 0..turns {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, x, x);
            }
        }
        black_box(sums);
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub unsafe fn dpbusd(turns: usize) {
        let x = _mm512_set1_epi32(black_box(0x0101_0101));
        let mut sums = [x; CHAINS];
        for _ in 0..turns {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, x, x);
            }
        }
        black_box(sums);
    }
}
