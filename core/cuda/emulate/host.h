// CUDA's words for a C++ compiler: blocks one after another, a block's threads as fibers that change at barriers and shuffles.
//
// It is strict where hardware is forgiving or silent: a shuffle or barrier that a thread has left out ends the program, memory is full
// of NaN until it is written, and allocations end at a page that cannot be touched (driver.cpp).
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(threads)

struct Index {
  unsigned x, y, z;
};
extern Index threadIdx, blockIdx, blockDim, gridDim;

struct uint4 {
  unsigned x, y, z, w;
};

namespace emulated {
extern unsigned char *shared;
void wait_for_warp();
void wait_for_block();
float exchange(float mine, int lane);
}  // namespace emulated

#define DYNAMIC_SHARED(name) unsigned char *name = emulated::shared

static inline void __syncthreads() { emulated::wait_for_block(); }
static inline void __syncwarp() { emulated::wait_for_warp(); }
static inline int min(int a, int b) { return a < b ? a : b; }
// Blocks run one after another.
static inline void __threadfence() {}
static inline int atomicAdd(int *at, int x) {
  int before = *at;
  *at = before + x;
  return before;
}
static inline float __shfl_sync(unsigned, float x, int lane) { return emulated::exchange(x, lane); }
static inline float __shfl_xor_sync(unsigned, float x, int mask) { return emulated::exchange(x, (int)(threadIdx.x % 32) ^ mask); }
static inline float __int_as_float(int bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
static inline float rsqrtf(float x) { return 1 / sqrtf(x); }

struct bf16 {
  uint16_t bits;
};
static inline float widen(bf16 x) { return __int_as_float((int)((uint32_t)x.bits << 16)); }
// To the nearest, of two equally near ones the even.
static inline void narrow(float x, bf16 *out) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  out->bits = x != x ? 0x7fff : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Matrices of 16 by 16 on tensor cores. The first lane does the work; what the others hold is as opaque as on hardware.
namespace nvcuda {
namespace wmma {
struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };

template <class Use, int M, int N, int K, class T, class Layout = void> struct fragment {
  float x[256];
};
template <class L> struct is_columns {
  static const bool value = false;
};
template <> struct is_columns<col_major> {
  static const bool value = true;
};
static inline bool first_lane() { return threadIdx.x % 32 == 0; }

template <class F> static inline void fill_fragment(F &f, float x) {
  for (int i = 0; i < 256; i++) f.x[i] = x;
}
template <class Use, class T, class L>
static inline void load_matrix_sync(fragment<Use, 16, 16, 16, T, L> &f, const T *from, unsigned ld) {
  if (!first_lane()) return;
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) f.x[i * 16 + j] = widen(is_columns<L>::value ? from[j * ld + i] : from[i * ld + j]);
}
static inline void load_matrix_sync(fragment<accumulator, 16, 16, 16, float> &f, const float *from, unsigned ld, layout_t) {
  if (!first_lane()) return;
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) f.x[i * 16 + j] = from[i * ld + j];
}
template <class A, class B, class C> static inline void mma_sync(C &d, const A &a, const B &b, const C &c) {
  if (!first_lane()) return;
  C sum = c;
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++)
      for (int k = 0; k < 16; k++) sum.x[i * 16 + j] += a.x[i * 16 + k] * b.x[k * 16 + j];
  d = sum;
}
static inline void store_matrix_sync(float *to, const fragment<accumulator, 16, 16, 16, float> &f, unsigned ld, layout_t) {
  if (!first_lane()) return;
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) to[i * ld + j] = f.x[i * 16 + j];
}
}  // namespace wmma
}  // namespace nvcuda
