// The block around attention: embeddings, RMSNorm, rotary positions into the cache, SwiGLU, and products of few rows.
#include "common.cuh"

// x (t, d) = rows of the table (v, d). Grid (t).
template <class T> static __device__ void embed(const T *table, const unsigned *ids, float *x, int d) {
  size_t row = blockIdx.x;
  const T *from = table + (size_t)ids[row] * d;
  for (int i = threadIdx.x; i < d; i += blockDim.x) x[row * d + i] = widen(from[i]);
}

// out (n, d) = x / sqrt(mean(x^2) + eps) * w, of the rows `rows` of x, or of all. `plain`, where given, gets it in float too. Grid (n).
template <class T>
static __device__ void rms_norm(const float *x, const float *w, const int *rows, T *out, float *plain, int d, float eps) {
  __shared__ float scratch[32];
  size_t at = blockIdx.x;
  const float *from = x + (rows ? (size_t)rows[at] : at) * d;
  float sum = 0;
  for (int i = threadIdx.x; i < d; i += blockDim.x) sum += from[i] * from[i];
  float r = rsqrtf(block_sum(sum, scratch) / d + eps);
  for (int i = threadIdx.x; i < d; i += blockDim.x) {
    float y = from[i] * r * w[i];
    narrow(y, out + at * d + i);
    if (plain) plain[at * d + i] = y;
  }
}

// One warp a head: norms (Qwen3) and rotates queries and keys, and puts keys and values where their sequence keeps them.
// Of a row that is nobody's, nothing. qkv (t, (h + 2g) e) -> q (t, h, e), keys, values. Grid (t, ceil((h + 2g) / 4)), 128 threads.
template <class T>
static __device__ void rope_split(const T *qkv, const unsigned *positions, const float *cos, const float *sin, const float *q_norm,
                           const float *k_norm, const int *span_of, const Span *spans, int layer, T *q, int h, int g, int e, float eps) {
  size_t row = blockIdx.x;
  int head = blockIdx.y * 4 + threadIdx.x / 32, lane = threadIdx.x % 32, half = e / 2;
  if (head >= h + 2 * g || span_of[row] < 0) return;
  const Span span = spans[span_of[row]];
  size_t pos = span.pos + (row - span.row);
  const T *from = qkv + (row * (h + 2 * g) + head) * e;
  if (head >= h + g) {
    T *to = values_of<T>(span, layer) + (pos * g + (head - h - g)) * e;
    for (int i = lane; i < e; i += 32) to[i] = from[i];
    return;
  }
  const float *w = head < h ? q_norm : k_norm;
  float r = 1;
  if (w) {
    float sum = 0;
    for (int i = lane; i < e; i += 32) sum += widen(from[i]) * widen(from[i]);
    r = rsqrtf(warp_sum(sum) / e + eps);
  }
  T *to = head < h ? q + (row * h + head) * e : keys_of<T>(span, layer) + (pos * g + (head - h)) * e;
  const float *c = cos + (size_t)positions[row] * half, *s = sin + (size_t)positions[row] * half;
  for (int i = lane; i < half; i += 32) {
    float a = widen(from[i]), b = widen(from[i + half]);
    if (w) {
      a *= r * w[i];
      b *= r * w[i + half];
    }
    narrow(a * c[i] - b * s[i], to + i);
    narrow(b * c[i] + a * s[i], to + i + half);
  }
}

// act (t, f) = silu(gate) * up of rows [gate | up] (t, 2f). `plain`, where given, gets it in float too. Grid (t).
template <class T> static __device__ void swiglu(const T *gate_up, T *act, float *plain, int f) {
  size_t row = blockIdx.x;
  for (int i = threadIdx.x; i < f; i += blockDim.x) {
    float gate = widen(gate_up[row * 2 * f + i]), up = widen(gate_up[row * 2 * f + f + i]);
    float y = gate / (1 + expf(-gate)) * up;
    narrow(y, act + row * f + i);
    if (plain) plain[row * f + i] = y;
  }
}

// y (n, out) = x (n, k) wT for at most R rows, a warp a column. Where `sums` is given it is added to it, elsewhere put into `y`.
// Grid (ceil(out / 4)), 128 threads.
template <class T, int R>
static __device__ void few_rows(const T *x, const T *w, T *y, float *sums, int add, int n, int k, int out) {
  int column = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (column >= out) return;
  float acc[R];
#pragma unroll
  for (int r = 0; r < R; r++) acc[r] = 0;
  row_sums<T, R>(x, w + (size_t)column * k, n, k, acc);
#pragma unroll
  for (int r = 0; r < R; r++) {
    float sum = warp_sum(acc[r]);
    if (lane != 0 || r >= n) continue;
    size_t at = (size_t)r * out + column;
    if (sums) sums[at] = add ? sums[at] + sum : sum;
    else narrow(sum, y + at);
  }
}

// The norms of n rows x (n, d), for all threads of a block. `plain`, where given, gets them in float too, from one block.
template <class T>
static __device__ void norm_few(const float *x, const float *w, T *out, float *plain, int n, int d, float eps) {
  __shared__ float scratch[32];
  for (int r = 0; r < n; r++) {
    const float *from = x + (size_t)r * d;
    float sum = 0;
    for (int i = threadIdx.x; i < d; i += blockDim.x) sum += from[i] * from[i];
    float by = rsqrtf(block_sum(sum, scratch) / d + eps);
    for (int i = threadIdx.x; i < d; i += blockDim.x) {
      float y = from[i] * by * w[i];
      narrow(y, out + (size_t)r * d + i);
      if (plain && blockIdx.x == 0) plain[(size_t)r * d + i] = y;
    }
  }
  __syncthreads();
}

// y (n, out) = norm(x) (n, d) wT for at most R rows: every block makes the norms anew, which is sooner done than a kernel begun.
// Grid (ceil(out / 4)), 128 threads, shared memory for n rows of T.
template <class T, int R>
static __device__ void normed_rows(const float *x, const float *norm, const T *w, T *y, int n, int d, int out, float eps) {
  DYNAMIC_SHARED(shared);
  norm_few<T>(x, norm, (T *)shared, 0, n, d, eps);
  int column = blockIdx.x * 4 + threadIdx.x / 32;
  if (column >= out) return;
  float acc[R];
#pragma unroll
  for (int r = 0; r < R; r++) acc[r] = 0;
  row_sums<T, R>((const T *)shared, w + (size_t)column * d, n, d, acc);
#pragma unroll
  for (int r = 0; r < R; r++) {
    float sum = warp_sum(acc[r]);
    if (threadIdx.x % 32 == 0 && r < n) narrow(sum, y + (size_t)r * out + column);
  }
}

// act (n, f) = silu(gate) * up of [gate | up] = norm(x) wT, w (2f, d), likewise. `u` and `z`, where given, get the norms and act in float.
// Grid (ceil(f / 4)), 128 threads, shared memory as above.
template <class T, int R>
static __device__ void gated_rows(const float *x, const float *norm, const T *w, T *act, float *u, float *z, int n, int d, int f,
                           float eps) {
  DYNAMIC_SHARED(shared);
  norm_few<T>(x, norm, (T *)shared, u, n, d, eps);
  int column = blockIdx.x * 4 + threadIdx.x / 32;
  if (column >= f) return;
  float gates[R], ups[R];
#pragma unroll
  for (int r = 0; r < R; r++) gates[r] = ups[r] = 0;
  row_sums<T, R>((const T *)shared, w + (size_t)column * d, n, d, gates);
  row_sums<T, R>((const T *)shared, w + (size_t)(f + column) * d, n, d, ups);
#pragma unroll
  for (int r = 0; r < R; r++) {
    float gate = warp_sum(gates[r]), up = warp_sum(ups[r]);
    if (threadIdx.x % 32 != 0 || r >= n) continue;
    float y = gate / (1 + expf(-gate)) * up;
    narrow(y, act + (size_t)r * f + column);
    if (z) z[(size_t)r * f + column] = y;
  }
}

// out = x in another format. Grid (ceil(n / 256)), 256 threads.
template <class T> static __device__ void convert(const float *x, T *out, u64 n) {
  u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) narrow(x[i], out + i);
}

#define FORWARD_FEW(T, name, count, R) \
  extern "C" __global__ void __launch_bounds__(128) \
      normed_##count##_##name(const float *x, const float *norm, const T *w, T *y, int n, int d, int out, float eps) { \
    normed_rows<T, R>(x, norm, w, y, n, d, out, eps); \
  } \
  extern "C" __global__ void __launch_bounds__(128) gated_##count##_##name( \
      const float *x, const float *norm, const T *w, T *act, float *u, float *z, int n, int d, int f, float eps) { \
    gated_rows<T, R>(x, norm, w, act, u, z, n, d, f, eps); \
  }

#define FORWARD(T, name) \
  extern "C" __global__ void embed_##name(const T *table, const unsigned *ids, float *x, int d) { embed<T>(table, ids, x, d); } \
  extern "C" __global__ void rms_norm_##name(const float *x, const float *w, const int *rows, T *out, float *plain, int d, float eps) { \
    rms_norm<T>(x, w, rows, out, plain, d, eps); \
  } \
  extern "C" __global__ void __launch_bounds__(128) rope_split_##name( \
      const T *qkv, const unsigned *positions, const float *cos, const float *sin, const float *q_norm, const float *k_norm, \
      const int *span_of, const Span *spans, int layer, T *q, int h, int g, int e, float eps) { \
    rope_split<T>(qkv, positions, cos, sin, q_norm, k_norm, span_of, spans, layer, q, h, g, e, eps); \
  } \
  extern "C" __global__ void swiglu_##name(const T *gate_up, T *act, float *plain, int f) { swiglu<T>(gate_up, act, plain, f); } \
  extern "C" __global__ void __launch_bounds__(128) \
      one_row_##name(const T *x, const T *w, T *y, float *sums, int add, int n, int k, int out) { \
    few_rows<T, 1>(x, w, y, sums, add, n, k, out); \
  } \
  extern "C" __global__ void __launch_bounds__(128) \
      four_rows_##name(const T *x, const T *w, T *y, float *sums, int add, int n, int k, int out) { \
    few_rows<T, 4>(x, w, y, sums, add, n, k, out); \
  } \
  FORWARD_FEW(T, name, one, 1) \
  FORWARD_FEW(T, name, four, 4) \
  extern "C" __global__ void convert_##name(const float *x, T *out, u64 n) { convert<T>(x, out, n); }

FORWARD(float, f32)
FORWARD(bf16, bf16)
