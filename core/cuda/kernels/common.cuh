// What all kernels share: numbers in two formats, sums over a warp and a block, and where a sequence's rows stand.
//
// Shape letters as in core/src/model: t rows, d hidden, f MLP width, h query heads, g key/value heads, e head_dim, v vocabulary,
// c chunk. T is the format of matrices and activations: bf16 in service, float where tests compare with the processor.
// The same sources compile for the host against emulate/host.h, which tests run where there is no GPU.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <mma.h>
typedef __nv_bfloat16 bf16;
static __device__ __forceinline__ float widen(bf16 x) { return __bfloat162float(x); }
static __device__ __forceinline__ void narrow(float x, bf16 *out) { *out = __float2bfloat16_rn(x); }
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#else
#include "../emulate/host.h"
#endif

static __device__ __forceinline__ float widen(float x) { return x; }
static __device__ __forceinline__ void narrow(float x, float *out) { *out = x; }

typedef unsigned long long u64;

// New rows of one sequence. Keys of layer l stand at `base + l * layer_stride`, (positions, g, e), values `v_offset` bytes behind them.
// A row whose `span_of` is negative is nobody's.
struct Span {
  u64 base, layer_stride, v_offset;
  int row, len, pos, unused;
};

template <class T> static __device__ __forceinline__ T *keys_of(const Span &span, int layer) {
  return (T *)(span.base + span.layer_stride * (u64)layer);
}
template <class T> static __device__ __forceinline__ T *values_of(const Span &span, int layer) {
  return (T *)(span.base + span.layer_stride * (u64)layer + span.v_offset);
}

static __device__ __forceinline__ float warp_sum(float x) {
  for (int o = 16; o > 0; o /= 2) x += __shfl_xor_sync(0xffffffffu, x, o);
  return x;
}
static __device__ __forceinline__ float warp_max(float x) {
  for (int o = 16; o > 0; o /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, o));
  return x;
}

// Sum over a block of whole warps, the same in every thread. `scratch`: 32 numbers of shared memory.
static __device__ __forceinline__ float block_sum(float x, float *scratch) {
  int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[warp] = x;
  __syncthreads();
  float all = 0;
  for (int i = 0; i < warps; i++) all += scratch[i];
  return all;
}
static __device__ __forceinline__ float block_max(float x, float *scratch) {
  int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  x = warp_max(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[warp] = x;
  __syncthreads();
  float all = scratch[0];
  for (int i = 1; i < warps; i++) all = fmaxf(all, scratch[i]);
  return all;
}

// Adds the products of at most R rows x (n, k) with a row w (k) to `acc`, as far as they are this lane's.
template <class T, int R> static __device__ __forceinline__ void row_sums(const T *x, const T *w, int n, int k, float *acc) {
  int lane = threadIdx.x % 32;
  // Sixteen bytes at a time where rows begin at such.
  const int wide = 16 / sizeof(T);
  int whole = k % wide == 0 ? k : 0;
  for (int i = lane * wide; i < whole; i += 32 * wide) {
    alignas(16) T part[16 / sizeof(T)];
    *(uint4 *)part = *(const uint4 *)(w + i);
#pragma unroll
    for (int r = 0; r < R; r++) {
      if (r < n) {
        alignas(16) T mine[16 / sizeof(T)];
        *(uint4 *)mine = *(const uint4 *)(x + (size_t)r * k + i);
#pragma unroll
        for (int j = 0; j < wide; j++) acc[r] += widen(part[j]) * widen(mine[j]);
      }
    }
  }
  for (int i = whole + lane; i < k; i += 32) {
#pragma unroll
    for (int r = 0; r < R; r++)
      if (r < n) acc[r] += widen(w[i]) * widen(x[(size_t)r * k + i]);
  }
}

#define INF __int_as_float(0x7f800000)
