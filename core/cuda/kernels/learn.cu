// Layers that learn while they are read: the product by a sequence's own weight, the filter, the drift and its cap. All in float.
#include "common.cuh"

// A row of the batch and the weight (d, f) that it meets.
struct Met {
  u64 weight;
  int row, unused;
};

// This lane's part of W z for one output.
static __device__ __forceinline__ float own_sum(const float *w, const float *z, int f) {
  float sum = 0;
  for (int i = threadIdx.x % 32; i < f; i += 32) sum += w[i] * z[i];
  return sum;
}

// x (t, d) row += W z row, a warp an output. Grid (rows, ceil(d / 4)), 128 threads.
extern "C" __global__ void __launch_bounds__(128) met_rows(const Met *met, const float *z, float *x, int d, int f) {
  const Met mine = met[blockIdx.x];
  int column = blockIdx.y * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (column >= d) return;
  float sum = warp_sum(own_sum((const float *)mine.weight + (size_t)column * f, z + (size_t)mine.row * f, f));
  if (lane == 0) x[(size_t)mine.row * d + column] += sum;
}

// The same where all that changes from step to step lies in memory: the weight that a row meets, 0 for the trained one, and where its
// z (f) and u (d) wait for the edge, 0 for nowhere.
struct Meets {
  u64 weight, z, u;
};

// x (t, d) row += W z row, or the trained weight's `down` (d, f) act, a warp an output; and what waits is put where it waits.
// Grid (t, ceil(d / 4)), 128 threads.
template <class T>
static __device__ void meet_rows(const Meets *meets, const T *down, const T *act, const float *z, const float *u, float *x, int d, int f) {
  const Meets mine = meets[blockIdx.x];
  size_t row = blockIdx.x;
  int column = blockIdx.y * 4 + threadIdx.x / 32, lane = threadIdx.x % 32, step = gridDim.y * blockDim.x;
  if (mine.z) {
    for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < f; i += step) ((float *)mine.z)[i] = z[row * f + i];
    for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < d; i += step) ((float *)mine.u)[i] = u[row * d + i];
  }
  if (column >= d) return;
  float sum = 0;
  if (mine.weight) sum = own_sum((const float *)mine.weight + (size_t)column * f, z + row * f, f);
  else row_sums<T, 1>(act + row * f, down + (size_t)column * f, 1, f, &sum);
  sum = warp_sum(sum);
  if (lane == 0) x[row * d + column] += sum;
}
#define MEET_ROWS(T, name) \
  extern "C" __global__ void __launch_bounds__(128) \
      meet_rows_##name(const Meets *meets, const T *down, const T *act, const float *z, const float *u, float *x, int d, int f) { \
    meet_rows<T>(meets, down, act, z, u, x, d, f); \
  }
MEET_ROWS(float, f32)
MEET_ROWS(bf16, bf16)

// out (c, d): each channel's filter of k taps over a chunk u (c, d), with zeros around it; taps (d, k). Grid (c).
extern "C" __global__ void filter_chunk(const float *u, const float *taps, float *out, int c, int d, int k) {
  int row = blockIdx.x;
  for (int i = threadIdx.x; i < d; i += blockDim.x) {
    float sum = 0;
    for (int tap = 0; tap < k; tap++) {
      int from = row + tap - k / 2;
      if (from >= 0 && from < c) sum += taps[i * k + tap] * u[(size_t)from * d + i];
    }
    out[(size_t)row * d + i] = sum;
  }
}

// sums[block] = part of |w - start|^2. Each thread's few terms in float, the rest in double. 256 threads.
extern "C" __global__ void distance_parts(const float *w, const float *start, u64 n, double *sums) {
  __shared__ double scratch[256];
  u64 step = (u64)gridDim.x * blockDim.x;
  double sum = 0;
  for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) {
    float apart = w[i] - (start ? start[i] : 0);
    sum += (double)apart * apart;
  }
  scratch[threadIdx.x] = sum;
  __syncthreads();
  for (unsigned half = 128; half > 0; half /= 2) {
    if (threadIdx.x < half) scratch[threadIdx.x] += scratch[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) sums[blockIdx.x] = scratch[0];
}

// drift = sqrt(sum of the parts) / norm; flag = whether it is past the cap or no number. One thread.
extern "C" __global__ void judge_drift(const double *sums, int parts, double norm, float cap, float *drift, int *flag) {
  double all = 0;
  for (int i = 0; i < parts; i++) all += sums[i];
  float apart = (float)(sqrt(all) / norm);
  *drift = apart;
  *flag = !(apart <= cap) || isinf(apart);
}

// w = start where the flag is up. Grid (ceil(n / 256)), 256 threads.
extern "C" __global__ void begin_again(float *w, const float *start, u64 n, const int *flag) {
  u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  if (*flag && i < n) w[i] = start[i];
}

// What a weight has learned: out = w - start. Grid (ceil(n / 256)), 256 threads.
extern "C" __global__ void learned_change(const float *w, const float *start, float *out, u64 n) {
  u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = w[i] - start[i];
}

// w = start + kept (w - start). Grid (ceil(n / 256)), 256 threads.
extern "C" __global__ void decay_weight(float *w, const float *start, float kept, u64 n) {
  u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) w[i] = start[i] + kept * (w[i] - start[i]);
}

// rate / |z|^2 of a row of f numbers, the same in every thread; 0 where that is no number.
static __device__ __forceinline__ float kappa_of(const float *z, int f, float rate, float *scratch, float *square) {
  float sum = 0;
  for (int i = threadIdx.x; i < f; i += blockDim.x) sum += z[i] * z[i];
  *square = block_sum(sum, scratch);
  float kappa = rate / *square;
  return isinf(kappa) || isnan(kappa) ? 0 : kappa;
}

// The delta rule's part of targets: v (n, d) -= rate / |z|^2 answered (n, d), by rows z (n, f). Grid (n).
extern "C" __global__ void correct_rows(float *v, const float *answered, const float *z, float rate, int d, int f) {
  __shared__ float scratch[32];
  size_t row = blockIdx.x;
  float square, kappa = kappa_of(z + row * f, f, rate, scratch, &square);
  for (int i = threadIdx.x; i < d; i += blockDim.x) v[row * d + i] -= kappa * answered[row * d + i];
}

// What follows trains: rows of all sequences at once.

// Backward of correct_rows for dv (n, d): answered (n, d) becomes its own gradient r = -kappa dv, and dz (n, f) takes what passes through
// |z|^2. Grid (n).
extern "C" __global__ void correct_rows_back(const float *dv, float *answered, const float *z, float *dz, float rate, int d, int f) {
  __shared__ float scratch[32];
  size_t row = blockIdx.x;
  float square, kappa = kappa_of(z + row * f, f, rate, scratch, &square), share = 0;
  for (int i = threadIdx.x; i < d; i += blockDim.x) {
    float r = -kappa * dv[row * d + i];
    share += r * answered[row * d + i];
    answered[row * d + i] = r;
  }
  share = block_sum(share, scratch);
  if (kappa == 0) return;
  for (int i = threadIdx.x; i < f; i += blockDim.x) dz[row * f + i] -= 2 * share / square * z[row * f + i];
}

// The chunk of a row: its first row and how many it has; none where no later chunk reads what it writes.
struct Chunk {
  int first, rows;
};

// out (t, d): each channel's filter of k taps over u (t, d), with zeros around each chunk; taps (d, k). Grid (t).
extern "C" __global__ void filter_rows(const float *u, const float *taps, const Chunk *chunks, float *out, int d, int k) {
  int row = blockIdx.x;
  const Chunk chunk = chunks[row];
  for (int i = threadIdx.x; i < d; i += blockDim.x) {
    float sum = 0;
    for (int tap = 0; tap < k; tap++) {
      int from = row + tap - k / 2;
      if (from >= chunk.first && from < chunk.first + chunk.rows) sum += taps[i * k + tap] * u[(size_t)from * d + i];
    }
    out[(size_t)row * d + i] = sum;
  }
}

// du (t, d) += what the filter passes back of dout (t, d). Grid (t).
extern "C" __global__ void filter_rows_back(const float *dout, const float *taps, const Chunk *chunks, float *du, int d, int k) {
  int row = blockIdx.x;
  const Chunk chunk = chunks[row];
  for (int i = threadIdx.x; i < d; i += blockDim.x) {
    float sum = 0;
    for (int tap = 0; tap < k; tap++) {
      int to = row - tap + k / 2;
      if (to >= chunk.first && to < chunk.first + chunk.rows) sum += taps[i * k + tap] * dout[(size_t)to * d + i];
    }
    du[(size_t)row * d + i] += sum;
  }
}

// dtaps (d, k) += the sum over rows of dout (t, d) times what lay under each tap, u (t, d). Grid (ceil(d / 32), k), 256 threads: 32
// channels by 8 strands, as add_rows.
extern "C" __global__ void __launch_bounds__(256) filter_taps_back(const float *u, const float *dout, const Chunk *chunks, float *dtaps,
                                                                  int t, int d, int k) {
  __shared__ float parts[8][32];
  int lane = threadIdx.x % 32, strand = threadIdx.x / 32, channel = blockIdx.x * 32 + lane, tap = blockIdx.y;
  float sum = 0;
  if (channel < d)
    for (int row = strand; row < t; row += 8) {
      const Chunk chunk = chunks[row];
      int from = row + tap - k / 2;
      if (from >= chunk.first && from < chunk.first + chunk.rows) sum += dout[(size_t)row * d + channel] * u[(size_t)from * d + channel];
    }
  parts[strand][lane] = sum;
  __syncthreads();
  if (strand != 0 || channel >= d) return;
  for (int s = 1; s < 8; s++) sum += parts[s][lane];
  dtaps[channel * k + tap] += sum;
}
