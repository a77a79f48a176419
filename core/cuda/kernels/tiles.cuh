// Tiles of 64 rows on the tensor cores, a warp for 16 of them: what attention and its backward pass share.
#pragma once
#include "common.cuh"

// Names a span and the first of its rows.
struct Tile {
  int span, first;
};

// Rows in shared memory are odd multiples of 16 bytes apart, so that neighbours do not share a bank: of E numbers, and of 64 scores in
// float and in bf16.
template <int E> struct Pitch {
  static const int rows = E + 8, sums = E + 4;
};
const int PITCH_SCORES = 64 + 4, PITCH_WEIGHTS = 64 + 8;

// Sixty-four rows of x, `stride` numbers apart, of which there are n; zeros for the others.
template <int E> static __device__ __forceinline__ void load_tile(const bf16 *x, size_t stride, int n, bf16 *to) {
  for (int i = threadIdx.x; i < 64 * (E / 8); i += 128) {
    int r = i / (E / 8), c = i % (E / 8) * 8;
    uint4 part = {0, 0, 0, 0};
    if (r < n) part = *(const uint4 *)(x + r * stride + c);
    *(uint4 *)(to + r * Pitch<E>::rows + c) = part;
  }
}

// scores (16, 64) = a (16, E) bT of b (64, E).
template <int E> static __device__ __forceinline__ void tile_scores(const bf16 *a, const bf16 *b, float *scores) {
  using namespace nvcuda;
  for (int n = 0; n < 4; n++) {
    wmma::fragment<wmma::accumulator, 16, 16, 16, float> s;
    wmma::fill_fragment(s, 0.0f);
#pragma unroll
    for (int k = 0; k < E / 16; k++) {
      wmma::fragment<wmma::matrix_a, 16, 16, 16, bf16, wmma::row_major> x;
      wmma::fragment<wmma::matrix_b, 16, 16, 16, bf16, wmma::col_major> y;
      wmma::load_matrix_sync(x, a + k * 16, Pitch<E>::rows);
      wmma::load_matrix_sync(y, b + n * 16 * Pitch<E>::rows + k * 16, Pitch<E>::rows);
      wmma::mma_sync(s, x, y, s);
    }
    wmma::store_matrix_sync(scores + n * 16, s, PITCH_SCORES, wmma::mem_row_major);
  }
}

// A warp's sums (16, E), which stay in its registers.
template <int E> struct TileSums {
  nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, float> part[E / 16];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < E / 16; n++) nvcuda::wmma::fill_fragment(part[n], 0.0f);
  }

  // += weights (16, 64) b (64, E)
  __device__ __forceinline__ void add(const bf16 *weights, const bf16 *b) {
    using namespace nvcuda;
#pragma unroll
    for (int k = 0; k < 4; k++) {
      wmma::fragment<wmma::matrix_a, 16, 16, 16, bf16, wmma::row_major> x;
      wmma::load_matrix_sync(x, weights + k * 16, PITCH_WEIGHTS);
#pragma unroll
      for (int n = 0; n < E / 16; n++) {
        wmma::fragment<wmma::matrix_b, 16, 16, 16, bf16, wmma::row_major> y;
        wmma::load_matrix_sync(y, b + k * 16 * Pitch<E>::rows + n * 16, Pitch<E>::rows);
        wmma::mma_sync(part[n], x, y, part[n]);
      }
    }
  }

  // The first n rows to x, `stride` numbers apart, by way of a place of 16 rows in shared memory.
  __device__ __forceinline__ void store(float *place, float *x, size_t stride, int n) {
    using namespace nvcuda;
    const int pitch = Pitch<E>::sums;
#pragma unroll
    for (int i = 0; i < E / 16; i++) wmma::store_matrix_sync(place + i * 16, part[i], pitch, wmma::mem_row_major);
    __syncwarp();
    for (int i = threadIdx.x % 32; i < 16 * E; i += 32)
      if (i / E < n) x[i / E * stride + i % E] = place[i / E * pitch + i % E];
    __syncwarp();
  }
};
