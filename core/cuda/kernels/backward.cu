// Backward passes, cross-entropy and AdamW. Sums over rows are made in a fixed order, so that a resumed training repeats itself.
#include "tiles.cuh"

// Softmax, loss and its gradient of a row of logits (n, v): nll and whether the label is the likeliest; where `grad` is given,
// grad = weight * scale * (p - onehot). Grid (n), 256 threads.
template <class T>
static __device__ void cross_entropy(const float *logits, const unsigned *labels, const float *weights, float scale, float *nll, int *hits,
                              T *grad, int v) {
  __shared__ float scratch[32];
  size_t row = blockIdx.x;
  const float *from = logits + row * v;
  float most = -INF, sum = 0;
  for (int i = threadIdx.x; i < v; i += blockDim.x) most = fmaxf(most, from[i]);
  most = block_max(most, scratch);
  for (int i = threadIdx.x; i < v; i += blockDim.x) sum += expf(from[i] - most);
  sum = block_sum(sum, scratch);
  // Of several equally likely tokens the first is the one that would be said.
  int label = labels[row];
  float before = -INF;
  for (int i = threadIdx.x; i < label; i += blockDim.x) before = fmaxf(before, from[i]);
  before = block_max(before, scratch);
  if (threadIdx.x == 0) {
    nll[row] = most + logf(sum) - from[label];
    hits[row] = from[label] >= most && before < most;
  }
  if (!grad) return;
  float factor = weights[row] * scale;
  for (int i = threadIdx.x; i < v; i += blockDim.x) narrow(factor * (expf(from[i] - most) / sum - (i == label)), grad + row * v + i);
}

// dx (rows of it) += d(rms_norm); terms (n, d), where given, get each row's share of the weight's gradient. Grid (n).
extern "C" __global__ void rms_norm_back(const float *x, const float *w, const int *rows, const float *dy, float *dx, float *terms, int d,
                                         float eps) {
  __shared__ float scratch[32];
  size_t at = blockIdx.x, row = rows ? (size_t)rows[at] : at;
  const float *from = x + row * d, *dout = dy + at * d;
  float squares = 0, along = 0;
  for (int i = threadIdx.x; i < d; i += blockDim.x) {
    squares += from[i] * from[i];
    along += from[i] * w[i] * dout[i];
  }
  squares = block_sum(squares, scratch);
  along = block_sum(along, scratch);
  float r = rsqrtf(squares / d + eps), pull = along * r * r * r / d;
  for (int i = threadIdx.x; i < d; i += blockDim.x) {
    dx[row * d + i] += dout[i] * w[i] * r - from[i] * pull;
    if (terms) terms[at * d + i] = dout[i] * from[i] * r;
  }
}

// out (d) += the sum of the rows of x (n, d). Grid (ceil(d / 32)), 256 threads: 32 columns by 8 strands.
extern "C" __global__ void __launch_bounds__(256) add_rows(const float *x, float *out, int n, int d) {
  __shared__ float parts[8][32];
  int lane = threadIdx.x % 32, strand = threadIdx.x / 32, column = blockIdx.x * 32 + lane;
  float sum = 0;
  if (column < d)
    for (int r = strand; r < n; r += 8) sum += x[(size_t)r * d + column];
  parts[strand][lane] = sum;
  __syncthreads();
  if (strand != 0 || column >= d) return;
  for (int s = 1; s < 8; s++) sum += parts[s][lane];
  out[column] += sum;
}

// d[gate | up] (t, 2f) from dact (t, f). Grid (t).
template <class T> static __device__ void swiglu_back(const T *gate_up, const T *dact, T *dgate_up, int f) {
  size_t row = blockIdx.x;
  for (int i = threadIdx.x; i < f; i += blockDim.x) {
    size_t at = row * 2 * f + i;
    float gate = widen(gate_up[at]), up = widen(gate_up[at + f]), dy = widen(dact[row * f + i]);
    float s = 1 / (1 + expf(-gate));
    narrow(dy * up * s * (1 + gate * (1 - s)), dgate_up + at);
    narrow(dy * gate * s, dgate_up + at + f);
  }
}

// sums (t, h) = dout . out of each head. Grid (t, ceil(h / 4)), 128 threads.
template <class T> static __device__ void head_dots(const T *out, const T *dout, float *sums, int h, int e) {
  size_t row = blockIdx.x;
  int head = blockIdx.y * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (head >= h) return;
  size_t at = (row * h + head) * e;
  float sum = 0;
  for (int i = lane; i < e; i += 32) sum += widen(out[at + i]) * widen(dout[at + i]);
  sum = warp_sum(sum);
  if (lane == 0) sums[row * h + head] = sum;
}

// dq (t, h, e) of rows `rows[n]`, or of all, of whole sequences from position 0; keys and values as their spans say.
// Grid (n, h), 128 threads. C: ceil(e / 32).
template <class T, int C>
static __device__ void attend_dq(const T *q, const T *dout, const float *lse, const float *dots, const int *rows, const int *span_of,
                          const Span *spans, float *dq, int h, int g, int e, float scale) {
  __shared__ float query[C * 32], grad[C * 32];
  __shared__ float parts[4][C * 32];
  size_t row = rows ? rows[blockIdx.x] : blockIdx.x;
  int head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Span span = spans[span_of[row]];
  int n = (int)(row - span.row) + 1;
  const T *keys = keys_of<T>(span, 0) + (head / (h / g)) * e, *values = values_of<T>(span, 0) + (head / (h / g)) * e;
  size_t stride = (size_t)g * e, at = row * h + head;
  for (int i = threadIdx.x; i < C * 32; i += blockDim.x) {
    query[i] = i < e ? widen(q[at * e + i]) : 0;
    grad[i] = i < e ? widen(dout[at * e + i]) : 0;
  }
  __syncthreads();
  float mix[C];
#pragma unroll
  for (int c = 0; c < C; c++) mix[c] = 0;
  for (int from = warp * 32; from < n; from += 128) {
    int key = from + lane;
    float ds = 0;
    if (key < n) {
      const T *k = keys + key * stride, *v = values + key * stride;
      float score = 0, dp = 0;
      for (int i = 0; i < e; i++) {
        score += query[i] * widen(k[i]);
        dp += grad[i] * widen(v[i]);
      }
      ds = expf(score * scale - lse[at]) * (dp - dots[at]) * scale;
    }
    int here = n - from < 32 ? n - from : 32;
    for (int j = 0; j < here; j++) {
      float weight = __shfl_sync(0xffffffffu, ds, j);
      const T *k = keys + (from + j) * stride;
#pragma unroll
      for (int c = 0; c < C; c++)
        if (c * 32 + lane < e) mix[c] += weight * widen(k[c * 32 + lane]);
    }
  }
#pragma unroll
  for (int c = 0; c < C; c++) parts[warp][c * 32 + lane] = mix[c];
  __syncthreads();
  for (int i = threadIdx.x; i < e; i += blockDim.x) dq[at * e + i] = parts[0][i] + parts[1][i] + parts[2][i] + parts[3][i];
}

// dk, dv (t, g, e) of rows `rows[n]`, or of all: the key in it against all later queries of its sequence, of every head that reads it.
// Grid (n, g), 128 threads.
template <class T, int C>
static __device__ void attend_dkv(const T *q, const T *dout, const float *lse, const float *dots, const int *rows, const int *span_of,
                           const Span *spans, float *dk, float *dv, int h, int g, int e, float scale) {
  __shared__ float key[C * 32], value[C * 32];
  __shared__ float parts[4][2][C * 32];
  size_t row = rows ? rows[blockIdx.x] : blockIdx.x;
  int group = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Span span = spans[span_of[row]];
  int own = (int)(row - span.row);
  size_t at = ((size_t)own * g + group) * e;
  for (int i = threadIdx.x; i < C * 32; i += blockDim.x) {
    key[i] = i < e ? widen(keys_of<T>(span, 0)[at + i]) : 0;
    value[i] = i < e ? widen(values_of<T>(span, 0)[at + i]) : 0;
  }
  __syncthreads();
  float sum_k[C], sum_v[C];
#pragma unroll
  for (int c = 0; c < C; c++) sum_k[c] = sum_v[c] = 0;
  for (int head = group * (h / g); head < (group + 1) * (h / g); head++) {
    for (int from = own + warp * 32; from < span.len; from += 128) {
      int query = from + lane;
      float p = 0, ds = 0;
      if (query < span.len) {
        size_t r = ((size_t)span.row + query) * h + head;
        const T *qr = q + r * e, *dr = dout + r * e;
        float score = 0, dp = 0;
        for (int i = 0; i < e; i++) {
          score += widen(qr[i]) * key[i];
          dp += widen(dr[i]) * value[i];
        }
        p = expf(score * scale - lse[r]);
        ds = p * (dp - dots[r]) * scale;
      }
      int here = span.len - from < 32 ? span.len - from : 32;
      for (int j = 0; j < here; j++) {
        float pj = __shfl_sync(0xffffffffu, p, j), dsj = __shfl_sync(0xffffffffu, ds, j);
        size_t r = (((size_t)span.row + from + j) * h + head) * e;
#pragma unroll
        for (int c = 0; c < C; c++) {
          if (c * 32 + lane < e) {
            sum_k[c] += dsj * widen(q[r + c * 32 + lane]);
            sum_v[c] += pj * widen(dout[r + c * 32 + lane]);
          }
        }
      }
    }
  }
#pragma unroll
  for (int c = 0; c < C; c++) {
    parts[warp][0][c * 32 + lane] = sum_k[c];
    parts[warp][1][c * 32 + lane] = sum_v[c];
  }
  __syncthreads();
  size_t to = (row * g + group) * e;
  for (int i = threadIdx.x; i < e; i += blockDim.x) {
    dk[to + i] = parts[0][0][i] + parts[1][0][i] + parts[2][0][i] + parts[3][0][i];
    dv[to + i] = parts[0][1][i] + parts[1][1][i] + parts[2][1][i] + parts[3][1][i];
  }
}

// The same in tiles of 64 queries, on the tensor cores: what is multiplied is rounded to bf16, sums are float.
// Grid (tiles, h), 128 threads, shared memory as `attention.rs` has it.
template <int E>
static __device__ void attend_dq_tile(const bf16 *q, const bf16 *dout, const float *lse, const float *dots, const Span *spans,
                               const Tile *tiles, float *dq, int h, int g, float scale) {
  const int LE = Pitch<E>::rows, LS = PITCH_SCORES, LP = PITCH_WEIGHTS;
  DYNAMIC_SHARED(shared);
  bf16 *sq = (bf16 *)shared, *sg = sq + 64 * LE, *sk = sg + 64 * LE, *sv = sk + 64 * LE;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float *scores = (float *)(sv + 64 * LE);
  bf16 *weights = (bf16 *)(scores + 4 * 2 * 16 * LS) + warp * 16 * LP;
  scores += warp * 2 * 16 * LS;
  const Tile tile = tiles[blockIdx.x];
  const Span span = spans[tile.span];
  int head = blockIdx.y, n = min(span.len - tile.first, 64);
  const bf16 *keys = keys_of<bf16>(span, 0) + (head / (h / g)) * E, *values = values_of<bf16>(span, 0) + (head / (h / g)) * E;
  size_t stride = (size_t)g * E, first = ((size_t)span.row + tile.first) * h + head;
  load_tile<E>(q + first * E, (size_t)h * E, n, sq);
  load_tile<E>(dout + first * E, (size_t)h * E, n, sg);
  // Two lanes a row.
  int mine = warp * 16 + lane / 2, side = lane % 2;
  float top = mine < n ? lse[first + (size_t)mine * h] : 0, dot = mine < n ? dots[first + (size_t)mine * h] : 0;
  TileSums<E> sums;
  sums.clear();
  for (int from = 0; from < tile.first + n; from += 64) {
    __syncthreads();
    load_tile<E>(keys + from * stride, stride, tile.first + n - from, sk);
    load_tile<E>(values + from * stride, stride, tile.first + n - from, sv);
    __syncthreads();
    tile_scores<E>(sq + warp * 16 * LE, sk, scores);
    tile_scores<E>(sg + warp * 16 * LE, sv, scores + 16 * LS);
    __syncwarp();
    for (int i = 0; i < 32; i++) {
      const float *s = scores + lane / 2 * LS + side * 32 + i;
      bool seen = mine < n && from + side * 32 + i <= tile.first + mine;
      narrow(seen ? expf(s[0] * scale - top) * (s[16 * LS] - dot) * scale : 0, weights + lane / 2 * LP + side * 32 + i);
    }
    __syncwarp();
    sums.add(weights, sk);
  }
  // Queries and their gradients are no longer read.
  __syncthreads();
  float *place = (float *)shared + warp * 16 * Pitch<E>::sums;
  sums.store(place, dq + (first + (size_t)warp * 16 * h) * E, (size_t)h * E, n - warp * 16);
}

// dk and dv of tiles of 64 keys. Grid (tiles, g), 128 threads.
template <int E>
static __device__ void attend_dkv_tile(const bf16 *q, const bf16 *dout, const float *lse, const float *dots, const Span *spans,
                                const Tile *tiles, float *dk, float *dv, int h, int g, float scale) {
  const int LE = Pitch<E>::rows, LS = PITCH_SCORES, LP = PITCH_WEIGHTS;
  DYNAMIC_SHARED(shared);
  bf16 *sq = (bf16 *)shared, *sg = sq + 64 * LE, *sk = sg + 64 * LE, *sv = sk + 64 * LE;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = blockIdx.y;
  float *tops = (float *)(sv + 64 * LE), *drops = tops + 64, *scores = drops + 64;
  bf16 *weights = (bf16 *)(scores + 4 * 2 * 16 * LS) + warp * 2 * 16 * LP;
  scores += warp * 2 * 16 * LS;
  const Tile tile = tiles[blockIdx.x];
  const Span span = spans[tile.span];
  int n = min(span.len - tile.first, 64);
  size_t stride = (size_t)g * E, at = (size_t)tile.first * stride + group * E;
  load_tile<E>(keys_of<bf16>(span, 0) + at, stride, n, sk);
  load_tile<E>(values_of<bf16>(span, 0) + at, stride, n, sv);
  int mine = warp * 16 + lane / 2, side = lane % 2;
  TileSums<E> sums_k, sums_v;
  sums_k.clear();
  sums_v.clear();
  for (int head = group * (h / g); head < (group + 1) * (h / g); head++) {
    for (int from = tile.first; from < span.len; from += 64) {
      size_t first = ((size_t)span.row + from) * h + head;
      int there = min(span.len - from, 64);
      __syncthreads();
      load_tile<E>(q + first * E, (size_t)h * E, there, sq);
      load_tile<E>(dout + first * E, (size_t)h * E, there, sg);
      for (int i = threadIdx.x; i < there; i += 128) {
        tops[i] = lse[first + (size_t)i * h];
        drops[i] = dots[first + (size_t)i * h];
      }
      __syncthreads();
      tile_scores<E>(sk + warp * 16 * LE, sq, scores);
      tile_scores<E>(sv + warp * 16 * LE, sg, scores + 16 * LS);
      __syncwarp();
      for (int i = 0; i < 32; i++) {
        int query = side * 32 + i;
        const float *s = scores + lane / 2 * LS + query;
        bool seen = query < there && from + query >= tile.first + mine;
        float p = seen ? expf(s[0] * scale - tops[query]) : 0;
        narrow(p, weights + lane / 2 * LP + query);
        narrow(seen ? p * (s[16 * LS] - drops[query]) * scale : 0, weights + (16 + lane / 2) * LP + query);
      }
      __syncwarp();
      sums_v.add(weights, sg);
      sums_k.add(weights + 16 * LP, sq);
    }
  }
  __syncthreads();
  float *place = (float *)shared + warp * 16 * Pitch<E>::sums;
  size_t to = ((size_t)span.row + tile.first + warp * 16) * stride + group * E;
  sums_k.store(place, dk + to, stride, n - warp * 16);
  sums_v.store(place, dv + to, stride, n - warp * 16);
}

// Backward of rope_split: dq (t, h, e), dk and dv (t, g, e) -> dqkv (t, (h + 2g) e). With norms, qkv is what they read, and
// terms (t, h + g, e), where given, get each head's share of their weights' gradient. Grid (t, ceil((h + 2g) / 4)), 128 threads.
template <class T>
static __device__ void rope_join(const T *qkv, const unsigned *positions, const float *cos, const float *sin, const float *q_norm,
                          const float *k_norm, const float *dq, const float *dk, const float *dv, T *dqkv, float *terms, int h, int g, int e,
                          float eps) {
  size_t row = blockIdx.x;
  int head = blockIdx.y * 4 + threadIdx.x / 32, lane = threadIdx.x % 32, half = e / 2;
  if (head >= h + 2 * g) return;
  size_t at = (row * (h + 2 * g) + head) * e;
  if (head >= h + g) {
    const float *from = dv + (row * g + (head - h - g)) * e;
    for (int i = lane; i < e; i += 32) narrow(from[i], dqkv + at + i);
    return;
  }
  const float *from = head < h ? dq + (row * h + head) * e : dk + (row * g + (head - h)) * e;
  const float *w = head < h ? q_norm : k_norm;
  const float *c = cos + (size_t)positions[row] * half, *s = sin + (size_t)positions[row] * half;
  float squares = 0, along = 0;
  if (w) {
    for (int i = lane; i < half; i += 32) {
      float a = from[i] * c[i] + from[i + half] * s[i], b = from[i + half] * c[i] - from[i] * s[i];
      float x = widen(qkv[at + i]), y = widen(qkv[at + i + half]);
      squares += x * x + y * y;
      along += x * w[i] * a + y * w[i + half] * b;
    }
    squares = warp_sum(squares);
    along = warp_sum(along);
  }
  float r = w ? rsqrtf(squares / e + eps) : 1, pull = along * r * r * r / e;
  for (int i = lane; i < half; i += 32) {
    float a = from[i] * c[i] + from[i + half] * s[i], b = from[i + half] * c[i] - from[i] * s[i];
    if (w) {
      float x = widen(qkv[at + i]), y = widen(qkv[at + i + half]);
      if (terms) {
        size_t term = (row * (h + g) + head) * e;
        terms[term + i] = a * x * r;
        terms[term + i + half] = b * y * r;
      }
      a = a * w[i] * r - x * pull;
      b = b * w[i + half] * r - y * pull;
    }
    narrow(a, dqkv + at + i);
    narrow(b, dqkv + at + i + half);
  }
}

// dw (e) += of terms (t, heads, e), heads first..first + n. One block a column of 32, as add_rows.
extern "C" __global__ void __launch_bounds__(256) add_heads(const float *terms, float *out, int t, int heads, int first, int n, int e) {
  __shared__ float parts[8][32];
  int lane = threadIdx.x % 32, strand = threadIdx.x / 32, column = blockIdx.x * 32 + lane;
  float sum = 0;
  if (column < e)
    for (int r = strand; r < t * n; r += 8) sum += terms[((size_t)(r / n) * heads + first + r % n) * e + column];
  parts[strand][lane] = sum;
  __syncthreads();
  if (strand != 0 || column >= e) return;
  for (int s = 1; s < 8; s++) sum += parts[s][lane];
  out[column] += sum;
}

// dtable row of each token that occurs += its rows of dx (t, d). Tokens are listed once, with where their rows begin in `rows`.
// Grid (tokens).
extern "C" __global__ void embed_back(const unsigned *tokens, const int *begins, const int *rows, const float *dx, float *dtable, int d) {
  float *to = dtable + (size_t)tokens[blockIdx.x] * d;
  for (int i = threadIdx.x; i < d; i += blockDim.x) {
    float sum = 0;
    for (int r = begins[blockIdx.x]; r < begins[blockIdx.x + 1]; r++) sum += dx[(size_t)rows[r] * d + i];
    to[i] += sum;
  }
}

// sum[0] = the parts' sum. One thread.
extern "C" __global__ void join_parts(const double *parts, int n, double *sum) {
  double all = 0;
  for (int i = 0; i < n; i++) all += parts[i];
  *sum = all;
}

// AdamW (arXiv:1711.05101, algorithm 2), betas 0.9 and 0.95, epsilon 1e-8. `copy`, where given, gets the new weight in its format.
// Grid (ceil(n / 256)), 256 threads.
template <class T>
static __device__ void adamw(float *w, float *m, float *v, const float *grad, T *copy, u64 n, float scale, float rate, float decay, float root) {
  u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float g = grad[i] * scale;
  m[i] = 0.9f * m[i] + (float)(1.0 - 0.9) * g;
  v[i] = 0.95f * v[i] + (float)(1.0 - 0.95) * g * g;
  w[i] = w[i] * decay - rate * m[i] / (sqrtf(v[i]) / root + 1e-8f);
  if (copy) narrow(w[i], copy + i);
}

#define BACKWARD(T, name) \
  extern "C" __global__ void cross_entropy_##name(const float *logits, const unsigned *labels, const float *weights, float scale, \
                                                  float *nll, int *hits, T *grad, int v) { \
    cross_entropy<T>(logits, labels, weights, scale, nll, hits, grad, v); \
  } \
  extern "C" __global__ void swiglu_back_##name(const T *gate_up, const T *dact, T *dgate_up, int f) { \
    swiglu_back<T>(gate_up, dact, dgate_up, f); \
  } \
  extern "C" __global__ void head_dots_##name(const T *out, const T *dout, float *sums, int h, int e) { head_dots<T>(out, dout, sums, h, e); } \
  extern "C" __global__ void rope_join_##name(const T *qkv, const unsigned *positions, const float *cos, const float *sin, const float *q_norm, \
                                              const float *k_norm, const float *dq, const float *dk, const float *dv, T *dqkv, float *terms, \
                                              int h, int g, int e, float eps) { \
    rope_join<T>(qkv, positions, cos, sin, q_norm, k_norm, dq, dk, dv, dqkv, terms, h, g, e, eps); \
  } \
  extern "C" __global__ void adamw_##name(float *w, float *m, float *v, const float *grad, T *copy, u64 n, float scale, float rate, \
                                          float decay, float root) { \
    adamw<T>(w, m, v, grad, copy, n, scale, rate, decay, root); \
  }
BACKWARD(float, f32)
BACKWARD(bf16, bf16)

#define ATTEND_BACK(T, name, C) \
  extern "C" __global__ void __launch_bounds__(128) \
      attend_dq##C##_##name(const T *q, const T *dout, const float *lse, const float *dots, const int *rows, const int *span_of, \
                            const Span *spans, float *dq, int h, int g, int e, float scale) { \
    attend_dq<T, C>(q, dout, lse, dots, rows, span_of, spans, dq, h, g, e, scale); \
  } \
  extern "C" __global__ void __launch_bounds__(128) \
      attend_dkv##C##_##name(const T *q, const T *dout, const float *lse, const float *dots, const int *rows, const int *span_of, \
                             const Span *spans, float *dk, float *dv, int h, int g, int e, float scale) { \
    attend_dkv<T, C>(q, dout, lse, dots, rows, span_of, spans, dk, dv, h, g, e, scale); \
  }
ATTEND_BACK(float, f32, 1)
ATTEND_BACK(float, f32, 2)
ATTEND_BACK(float, f32, 4)
ATTEND_BACK(float, f32, 8)
ATTEND_BACK(bf16, bf16, 1)
ATTEND_BACK(bf16, bf16, 2)
ATTEND_BACK(bf16, bf16, 4)
ATTEND_BACK(bf16, bf16, 8)

#define ATTEND_BACK_TILE(E) \
  extern "C" __global__ void __launch_bounds__(128) \
      attend_dq_tile##E(const bf16 *q, const bf16 *dout, const float *lse, const float *dots, const Span *spans, const Tile *tiles, \
                        float *dq, int h, int g, float scale) { \
    attend_dq_tile<E>(q, dout, lse, dots, spans, tiles, dq, h, g, scale); \
  } \
  extern "C" __global__ void __launch_bounds__(128) \
      attend_dkv_tile##E(const bf16 *q, const bf16 *dout, const float *lse, const float *dots, const Span *spans, const Tile *tiles, \
                         float *dk, float *dv, int h, int g, float scale) { \
    attend_dkv_tile<E>(q, dout, lse, dots, spans, tiles, dk, dv, h, g, scale); \
  }
ATTEND_BACK_TILE(16)
ATTEND_BACK_TILE(32)
ATTEND_BACK_TILE(64)
ATTEND_BACK_TILE(128)
