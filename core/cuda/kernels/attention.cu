// Causal grouped-query attention. Two forms: one query row at a time, for any head_dim and for few rows behind a long cache, whose keys
// are then split over blocks; and tiles of 64 queries on the tensor cores.
#include "tiles.cuh"

// A running softmax over keys: largest score, sum, and the mix of values.
template <int C> struct Running {
  float most, sum, mix[C];
};

// Keys of one block where a long cache is split.
const int SPLIT_KEYS = 256;

// Joins the parts of a row and head.
template <class T> static __device__ void attend_join(const volatile float *parts, T *out, int splits, int e) {
  float most = -INF, sum = 0;
  for (int s = 0; s < splits; s++) most = fmaxf(most, parts[s * (e + 2) + e]);
  for (int s = 0; s < splits; s++) {
    const volatile float *end = parts + s * (e + 2) + e;
    if (end[1] > 0) sum += end[1] * expf(end[0] - most);
  }
  for (int i = threadIdx.x; i < e; i += blockDim.x) {
    float mix = 0;
    for (int s = 0; s < splits; s++) {
      const volatile float *part = parts + s * (e + 2);
      if (part[e + 1] > 0) mix += part[i] * expf(part[e] - most);
    }
    narrow(mix / sum, out + i);
  }
}

// Row `rows[n]` or n of the queries, head blockIdx.y, its keys split over up to gridDim.z blocks of four warps: over as many as its own
// length is worth, so that what comes out does not depend on the rows beside it, and the grid not on any length. C: ceil(e / 32).
// out (t, h, e), and lse (t, h) where given and gridDim.z is 1. The block that ends last joins parts (n, h, gridDim.z, e + 2), and leaves
// `arrived` (n, h) at zero, as it was. A row of no span is nobody's. Grid (n, h, splits), 128 threads.
template <class T, int C>
static __device__ void attend_row(const T *q, const int *rows, const int *span_of, const Span *spans, int layer, T *out, float *lse,
                           float *parts, int *arrived, int h, int g, int e, float scale) {
  __shared__ float query[C * 32];
  __shared__ float mixes[4][C * 32];
  __shared__ float ends[4][2];
  __shared__ int before;
  int row = rows ? rows[blockIdx.x] : (int)blockIdx.x, head = blockIdx.y, split = blockIdx.z;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (span_of[row] < 0) return;
  const Span span = spans[span_of[row]];
  int n = span.pos + row - span.row + 1, splits = min((n + SPLIT_KEYS - 1) / SPLIT_KEYS, (int)gridDim.z);
  if (split >= splits) return;
  const T *keys = keys_of<T>(span, layer) + (head / (h / g)) * e, *values = values_of<T>(span, layer) + (head / (h / g)) * e;
  size_t stride = (size_t)g * e;
  for (int i = threadIdx.x; i < C * 32; i += blockDim.x) query[i] = i < e ? widen(q[((size_t)row * h + head) * e + i]) * scale : 0;
  __syncthreads();
  Running<C> seen;
  seen.most = -INF;
  seen.sum = 0;
#pragma unroll
  for (int c = 0; c < C; c++) seen.mix[c] = 0;
  for (int from = (split * 4 + warp) * 32; from < n; from += splits * 128) {
    int key = from + lane;
    float score = -INF;
    if (key < n) {
      const T *k = keys + key * stride;
      score = 0;
      for (int i = 0; i < e; i++) score += query[i] * widen(k[i]);
    }
    float most = fmaxf(seen.most, warp_max(score));
    float p = key < n ? expf(score - most) : 0, keep = expf(seen.most - most);
    seen.most = most;
    seen.sum = seen.sum * keep + warp_sum(p);
#pragma unroll
    for (int c = 0; c < C; c++) seen.mix[c] *= keep;
    int here = n - from < 32 ? n - from : 32;
    for (int j = 0; j < here; j++) {
      float weight = __shfl_sync(0xffffffffu, p, j);
      const T *v = values + (from + j) * stride;
#pragma unroll
      for (int c = 0; c < C; c++)
        if (c * 32 + lane < e) seen.mix[c] += weight * widen(v[c * 32 + lane]);
    }
  }
#pragma unroll
  for (int c = 0; c < C; c++) mixes[warp][c * 32 + lane] = seen.mix[c];
  if (lane == 0) {
    ends[warp][0] = seen.most;
    ends[warp][1] = seen.sum;
  }
  __syncthreads();
  float most = -INF, sum = 0;
  for (int w = 0; w < 4; w++) most = fmaxf(most, ends[w][0]);
  // A block whose share has no key has seen nothing.
  float factor[4];
#pragma unroll
  for (int w = 0; w < 4; w++) {
    factor[w] = ends[w][1] > 0 ? expf(ends[w][0] - most) : 0;
    sum += ends[w][1] * factor[w];
  }
  int at = blockIdx.x * h + head;
  out += ((size_t)row * h + head) * e;
  parts += (size_t)at * gridDim.z * (e + 2);
  float *mine = parts + split * (e + 2);
  for (int i = threadIdx.x; i < e; i += blockDim.x) {
    float mix = 0;
#pragma unroll
    for (int w = 0; w < 4; w++) mix += mixes[w][i] * factor[w];
    if (splits == 1) narrow(mix / sum, out + i);
    else mine[i] = mix;
  }
  if (threadIdx.x == 0 && splits == 1 && lse) lse[(size_t)row * h + head] = most + logf(sum);
  if (splits == 1) return;
  if (threadIdx.x == 0) {
    mine[e] = most;
    mine[e + 1] = sum;
  }
  // Whoever sees that all others have arrived sees what they wrote before.
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) before = atomicAdd(arrived + at, 1);
  __syncthreads();
  if (before != splits - 1) return;
  __threadfence();
  attend_join<T>(parts, out, splits, e);
  if (threadIdx.x == 0) arrived[at] = 0;
}

// 64 queries of one span and head against all keys before them, on tensor cores.
// out (t, h, e), lse (t, h) where given. Grid (tiles, h), 128 threads, shared memory as `attention.rs` has it.
template <int E>
static __device__ void attend_tile(const bf16 *q, const Span *spans, const Tile *tiles, int layer, bf16 *out, float *lse, int h, int g,
                            float scale) {
  using namespace nvcuda;
  const int LE = Pitch<E>::rows, LS = PITCH_SCORES, LP = PITCH_WEIGHTS, LO = Pitch<E>::sums;
  DYNAMIC_SHARED(shared);
  bf16 *sq = (bf16 *)shared, *sk = sq + 64 * LE, *sv = sk + 64 * LE;
  float *so = (float *)(sv + 64 * LE);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float *ss = so + 64 * LO + warp * 16 * LS;
  bf16 *sp = (bf16 *)(so + 64 * LO + 4 * 16 * LS) + warp * 16 * LP;
  const Tile tile = tiles[blockIdx.x];
  const Span span = spans[tile.span];
  int head = blockIdx.y, rows = span.len - tile.first < 64 ? span.len - tile.first : 64;
  const bf16 *keys = keys_of<bf16>(span, layer) + (head / (h / g)) * E, *values = values_of<bf16>(span, layer) + (head / (h / g)) * E;
  size_t stride = (size_t)g * E, first = (size_t)span.row + tile.first;
  load_tile<E>(q + (first * h + head) * E, (size_t)h * E, rows, sq);
  for (int i = threadIdx.x; i < 64 * E; i += 128) so[i / E * LO + i % E] = 0;
  // Two lanes a row: largest score so far, sum so far, position.
  int mine = warp * 16 + lane / 2, side = lane % 2;
  float most = -INF, sum = 0;
  int last = span.pos + tile.first + mine, end = span.pos + tile.first + rows;
  for (int from = 0; from < end; from += 64) {
    __syncthreads();
    load_tile<E>(keys + from * stride, stride, end - from, sk);
    load_tile<E>(values + from * stride, stride, end - from, sv);
    __syncthreads();
    tile_scores<E>(sq + warp * 16 * LE, sk, ss);
    __syncwarp();
    float *scores = ss + (lane / 2) * LS + side * 32;
    float here = -INF;
    for (int i = 0; i < 32; i++) {
      bool seen = from + side * 32 + i <= last;
      float score = seen ? scores[i] * scale : -INF;
      scores[i] = score;
      here = fmaxf(here, score);
    }
    here = fmaxf(here, __shfl_xor_sync(0xffffffffu, here, 1));
    // The first tile holds key 0, which every row sees, so this is never -inf.
    float now = fmaxf(most, here), keep = expf(most - now), add = 0;
    bf16 *weights = sp + (lane / 2) * LP + side * 32;
    for (int i = 0; i < 32; i++) {
      float p = expf(scores[i] - now);
      add += p;
      narrow(p, weights + i);
    }
    sum = sum * keep + add + __shfl_xor_sync(0xffffffffu, add, 1);
    most = now;
    for (int i = 0; i < E / 2; i++) so[mine * LO + side * (E / 2) + i] *= keep;
    __syncwarp();
    for (int n = 0; n < E / 16; n++) {
      wmma::fragment<wmma::accumulator, 16, 16, 16, float> o;
      wmma::load_matrix_sync(o, so + warp * 16 * LO + n * 16, LO, wmma::mem_row_major);
#pragma unroll
      for (int k = 0; k < 4; k++) {
        wmma::fragment<wmma::matrix_a, 16, 16, 16, bf16, wmma::row_major> a;
        wmma::fragment<wmma::matrix_b, 16, 16, 16, bf16, wmma::row_major> b;
        wmma::load_matrix_sync(a, sp + k * 16, LP);
        wmma::load_matrix_sync(b, sv + k * 16 * LE + n * 16, LE);
        wmma::mma_sync(o, a, b, o);
      }
      wmma::store_matrix_sync(so + warp * 16 * LO + n * 16, o, LO, wmma::mem_row_major);
    }
    __syncwarp();
  }
  if (mine >= rows) return;
  for (int i = 0; i < E / 2; i++) {
    int c = side * (E / 2) + i;
    narrow(so[mine * LO + c] / sum, out + ((first + mine) * h + head) * E + c);
  }
  if (lse && side == 0) lse[(first + mine) * h + head] = most + logf(sum);
}

#define ATTEND_ROW(T, name, C) \
  extern "C" __global__ void __launch_bounds__(128) \
      attend_row##C##_##name(const T *q, const int *rows, const int *span_of, const Span *spans, int layer, T *out, float *lse, \
                             float *parts, int *arrived, int h, int g, int e, float scale) { \
    attend_row<T, C>(q, rows, span_of, spans, layer, out, lse, parts, arrived, h, g, e, scale); \
  }
ATTEND_ROW(float, f32, 1)
ATTEND_ROW(float, f32, 2)
ATTEND_ROW(float, f32, 4)
ATTEND_ROW(float, f32, 8)
ATTEND_ROW(bf16, bf16, 1)
ATTEND_ROW(bf16, bf16, 2)
ATTEND_ROW(bf16, bf16, 4)
ATTEND_ROW(bf16, bf16, 8)

#define ATTEND_TILE(E) \
  extern "C" __global__ void __launch_bounds__(128) \
      attend_tile##E(const bf16 *q, const Span *spans, const Tile *tiles, int layer, bf16 *out, float *lse, int h, int g, float scale) { \
    attend_tile<E>(q, spans, tiles, layer, out, lse, h, g, scale); \
  }
ATTEND_TILE(16)
ATTEND_TILE(32)
ATTEND_TILE(64)
ATTEND_TILE(128)
