// A stand-in for libcuda.so.1 and libcublas.so.13 that runs the kernels on the processor, so that tests can run liblocum_cuda.so, as it is,
// where there is no GPU. It knows what core/cuda/src/driver.rs asks for and no more. The numbers are the kernels' own, the speed is not.
//
// LOCUM_EMULATE orders faults: `old` (a card of generation 7.5), `none` (no device), `small` (64 MiB free), `narrow` (no more shared memory
// than all have), `alloc=N` (the N-th allocation finds no memory), `launch=N` (the N-th kernel fails, and everything after it), `capture`
// (none is begun), `broken` (what is captured is told to be no use), `instantiate=N` (the N-th graph does not get ready),
// `graph-memory=N` (for the N-th there is no memory).
//
// A capture is as strict as the driver's: while it lasts nothing is done on its stream, a kernel's arguments are taken as they are then,
// and whatever would wait, allocate, free or copy to or from the host's ordinary memory is an error and ends it.
#include "host.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "../kernels/all.cu"

Index threadIdx, blockIdx, blockDim, gridDim;

// Threads of a block.
namespace emulated {
unsigned char *shared;

enum State { READY, AT_WARP, AT_BLOCK, DONE };
static const size_t STACK = 128 << 10, MOST = 1024;
struct Fiber {
  void *sp;
  State state;
  unsigned exchanges;
};
static Fiber fibers[MOST];
static unsigned char *stacks;
static void *scheduler;
static unsigned current;
static float slots[2][MOST];
static void (*body)(void *, void **);
static void *body_kernel;
static void **body_arguments;

[[noreturn]] static void die(const char *why) {
  fprintf(stderr, "emulated kernel: %s (block %u,%u,%u thread %u)\n", why, blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x);
  abort();
}

#if !defined(__x86_64__)
#error "the stand-in switches stacks by hand, for x86-64"
#endif
// Puts this stack's registers and place aside, and goes on where another was left.
extern "C" void emulated_switch(void **save, void *load);
asm(".text\n.globl emulated_switch\n.hidden emulated_switch\nemulated_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");

static void leave(State state) {
  Fiber &fiber = fibers[current];
  fiber.state = state;
  emulated_switch(&fiber.sp, scheduler);
}

static void begin() {
  body(body_kernel, body_arguments);
  leave(DONE);
}

void wait_for_warp() { leave(AT_WARP); }
void wait_for_block() { leave(AT_BLOCK); }

float exchange(float mine, int lane) {
  unsigned self = current, turn = fibers[self].exchanges++ % 2;
  if (lane < 0 || lane > 31) die("a shuffle with no such lane");
  slots[turn][self] = mine;
  leave(AT_WARP);
  return slots[turn][self / 32 * 32 + lane];
}

static void run_block(unsigned threads) {
  for (unsigned i = 0; i < threads; i++) {
    void **top = (void **)(stacks + (i + 1) * STACK) - 2;
    *top = (void *)begin;
    fibers[i] = Fiber{top - 6, READY, 0};
  }
  for (;;) {
    bool any = false, all_done = true, all_block = true;
    for (unsigned i = 0; i < threads; i++) {
      if (fibers[i].state != READY) continue;
      any = true;
      current = i;
      threadIdx.x = i;
      emulated_switch(&scheduler, fibers[i].sp);
    }
    for (unsigned warp = 0; warp < threads; warp += 32) {
      bool all = true, some = false;
      for (unsigned i = warp; i < warp + 32 && i < threads; i++) {
        bool here = fibers[i].state == AT_WARP;
        all &= here;
        some |= here;
        all_done &= fibers[i].state == DONE;
        all_block &= fibers[i].state == AT_BLOCK;
      }
      if (some && !all && !any) die("a warp does not meet at its barrier");
      if (all && warp + 32 > threads) die("a shuffle in a warp that is not whole");
      for (unsigned i = warp; all && i < warp + 32; i++) fibers[i].state = READY;
      all_block &= !all;
      any |= all;
    }
    if (all_done) return;
    if (all_block)
      for (unsigned i = 0; i < threads; i++) fibers[i].state = READY;
    else if (!any) die("threads do not meet at a barrier");
  }
}

template <class F> struct Caller;
template <class... A> struct Caller<void (*)(A...)> {
  template <size_t... I> static void with(void *kernel, void **arguments, std::index_sequence<I...>) {
    ((void (*)(A...))kernel)(*(A *)arguments[I]...);
  }
  static void call(void *kernel, void **arguments) { with(kernel, arguments, std::index_sequence_for<A...>()); }
  // The arguments' values, one after another.
  static std::vector<std::vector<unsigned char>> keep(void **arguments) {
    std::vector<std::vector<unsigned char>> kept;
    size_t i = 0;
    for (size_t size : {sizeof(A)...}) {
      unsigned char *from = (unsigned char *)arguments[i++];
      kept.emplace_back(from, from + size);
    }
    return kept;
  }
};
struct Kernel {
  void *at;
  void (*call)(void *, void **);
  std::vector<std::vector<unsigned char>> (*keep)(void **);
};

#define K(name) {#name, {(void *)name, Caller<decltype(&name)>::call, Caller<decltype(&name)>::keep}}
#define BOTH(name) K(name##_f32), K(name##_bf16)
#define TILES(name) K(name##16), K(name##32), K(name##64), K(name##128)
static const std::map<std::string, Kernel> kernels = {
    BOTH(embed), BOTH(rms_norm), BOTH(rope_split), BOTH(swiglu), BOTH(one_row), BOTH(four_rows), BOTH(convert),
    BOTH(attend_row1), BOTH(attend_row2), BOTH(attend_row4), BOTH(attend_row8), BOTH(meet_rows), BOTH(normed_one), BOTH(normed_four),
    BOTH(gated_one), BOTH(gated_four), BOTH(cross_entropy),
    BOTH(swiglu_back), BOTH(head_dots), BOTH(rope_join), BOTH(adamw), BOTH(attend_dq1), BOTH(attend_dq2), BOTH(attend_dq4),
    BOTH(attend_dq8), BOTH(attend_dkv1), BOTH(attend_dkv2), BOTH(attend_dkv4), BOTH(attend_dkv8), K(met_rows), K(filter_chunk),
    K(distance_parts), K(judge_drift), K(begin_again), K(learned_change), K(decay_weight), K(correct_rows), K(correct_rows_back),
    K(rms_norm_back), K(add_rows), K(add_heads), K(embed_back), K(join_parts),
    K(filter_rows), K(filter_rows_back), K(filter_taps_back),
    TILES(attend_tile), TILES(attend_dq_tile), TILES(attend_dkv_tile)};

// Faults and memory.
static std::mutex lock;
static bool ordered(const char *what) {
  const char *order = getenv("LOCUM_EMULATE");
  return order && strcmp(order, what) == 0;
}
static bool due(const char *what, long &count) {
  const char *order = getenv("LOCUM_EMULATE");
  size_t n = strlen(what);
  count++;
  return order && strncmp(order, what, n) == 0 && atol(order + n) == count;
}
static long allocations, launches, instances, graph_memories;
static bool failed;
// Calls of the driver and of cuBLAS, kernels of both started one by one, and graphs started.
static unsigned long calls, started, replayed;
static std::map<uintptr_t, std::pair<void *, size_t>> taken;

static const size_t TOTAL = (size_t)4 << 30;

enum { INVALID = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, ILLEGAL = 719, UNSUPPORTED = 801, CAPTURING = 900, SPOILED = 901 };

// Work in the order in which it was queued; `recording` while it is captured.
typedef std::vector<std::function<int()>> Work;
struct Stream {
  Work *recording = nullptr;
  bool broken = false;
};
// Does work, or records it while a capture lasts.
static int queue(void *handle, std::function<int()> work) {
  Stream *stream = (Stream *)handle;
  if (!stream->recording) return work();
  if (stream->broken) return SPOILED;
  return stream->recording->push_back(std::move(work)), 0;
}
// Does what a capture cannot hold, and which therefore spoils it.
static int at_once(void *handle, std::function<int()> work) {
  Stream *stream = (Stream *)handle;
  if (!stream->recording) return work();
  stream->broken = true;
  return CAPTURING;
}
struct Blas {
  void *stream = nullptr, *workspace = nullptr;
};
}  // namespace emulated

using namespace emulated;
typedef void *Handle;

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int cuInit(unsigned) { return ordered("none") ? NO_DEVICE : 0; }
EXPORT int cuDriverGetVersion(int *v) { return *v = 13000, 0; }
EXPORT int cuGetErrorString(int code, const char **text) {
  static const std::map<int, const char *> texts = {
      {OUT_OF_MEMORY, "out of memory"},
      {NO_DEVICE, "no CUDA-capable device is detected"},
      {UNSUPPORTED, "operation not supported"},
      {CAPTURING, "operation not permitted when stream is capturing"},
      {SPOILED, "operation failed due to a previous error during capture"}};
  auto found = texts.find(code);
  *text = found == texts.end() ? "unspecified launch failure" : found->second;
  return 0;
}
EXPORT int cuDeviceGetCount(int *n) { return *n = 1, 0; }
EXPORT int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, ordinal == 0 ? 0 : 101; }
EXPORT int cuDeviceGetName(char *name, int room, int) { return snprintf(name, room, "stand-in on the processor"), 0; }
EXPORT int cuDeviceGetAttribute(int *value, int which, int) {
  bool old = ordered("old");
  switch (which) {
    case 16: return *value = 16, 0;
    case 75: return *value = old ? 7 : 9, 0;
    case 76: return *value = old ? 5 : 0, 0;
    case 115: return *value = 1, 0;
    default: return INVALID;
  }
}
EXPORT int cuDeviceTotalMem_v2(size_t *bytes, int) { return *bytes = TOTAL, 0; }
EXPORT int cuDevicePrimaryCtxRetain(Handle *context, int) { return *context = &taken, 0; }
EXPORT int cuDevicePrimaryCtxRelease_v2(int) { return 0; }
EXPORT int cuCtxPushCurrent_v2(Handle) { return 0; }
EXPORT int cuCtxPopCurrent_v2(Handle *) { return 0; }
EXPORT int cuCtxGetStreamPriorityRange(int *least, int *greatest) { return *least = 0, *greatest = -5, 0; }
EXPORT int cuMemGetInfo_v2(size_t *free, size_t *total) { return *free = ordered("small") ? 64 << 20 : TOTAL, *total = TOTAL, 0; }
EXPORT int cuModuleLoadData(Handle *module, const void *) { return *module = &taken, 0; }
EXPORT int cuModuleUnload(Handle) { return 0; }
EXPORT int cuModuleGetFunction(Handle *function, Handle, const char *name) {
  auto found = kernels.find(name);
  if (found == kernels.end()) return 500;
  *function = (Handle)&found->second;
  return 0;
}
EXPORT int cuFuncSetAttribute(Handle, int, int) { return ordered("narrow") ? INVALID : 0; }
EXPORT int cuStreamCreateWithPriority(Handle *stream, unsigned, int) { return *stream = new Stream, 0; }
EXPORT int cuStreamDestroy_v2(Handle stream) { return delete (Stream *)stream, 0; }
EXPORT int cuStreamSynchronize(Handle stream) {
  std::lock_guard<std::mutex> held(lock);
  calls++;
  return at_once(stream, [] { return failed ? ILLEGAL : 0; });
}

EXPORT int cuStreamBeginCapture_v2(Handle handle, int mode) {
  std::lock_guard<std::mutex> held(lock);
  calls++;
  Stream *stream = (Stream *)handle;
  // Any other mode gets in the way of a host that allocates meanwhile.
  if (mode != 1 || stream->recording) return INVALID;
  if (failed) return ILLEGAL;
  if (ordered("capture")) return CAPTURING;
  stream->recording = new Work;
  stream->broken = ordered("broken");
  return 0;
}
EXPORT int cuStreamEndCapture(Handle handle, Handle *graph) {
  std::lock_guard<std::mutex> held(lock);
  calls++;
  Stream *stream = (Stream *)handle;
  if (!stream->recording) return INVALID;
  *graph = stream->recording;
  stream->recording = nullptr;
  if (!stream->broken) return 0;
  delete (Work *)*graph;
  *graph = nullptr;
  return SPOILED;
}
EXPORT int cuGraphDestroy(Handle graph) { return calls++, delete (Work *)graph, 0; }
EXPORT int cuGraphInstantiateWithFlags(Handle *replay, Handle graph, unsigned long long) {
  std::lock_guard<std::mutex> held(lock);
  calls++;
  if (due("graph-memory=", graph_memories)) return OUT_OF_MEMORY;
  if (due("instantiate=", instances)) return UNSUPPORTED;
  return *replay = new Work(*(Work *)graph), 0;
}
EXPORT int cuGraphLaunch(Handle replay, Handle stream) {
  std::lock_guard<std::mutex> held(lock);
  calls++;
  if (failed) return ILLEGAL;
  if (((Stream *)stream)->recording) return INVALID;
  replayed++;
  // What a kernel comes to is told by whoever waits for it.
  for (auto &work : *(Work *)replay) work();
  return 0;
}
EXPORT int cuGraphExecDestroy(Handle replay) { return delete (Work *)replay, 0; }

// For tests: calls, kernels started one by one, graphs started.
EXPORT void emulated_counts(unsigned long *out) {
  std::lock_guard<std::mutex> held(lock);
  out[0] = calls, out[1] = started, out[2] = replayed;
}
EXPORT int cuMemPoolCreate(Handle *pool, const void *) { return *pool = &taken, 0; }
EXPORT int cuMemPoolSetAttribute(Handle, int, void *) { return 0; }
EXPORT int cuMemPoolDestroy(Handle) { return 0; }

// Ends at a page that cannot be touched, and is full of NaN, in either format.
static int allocate(uint64_t *at, size_t bytes) {
  if (due("alloc=", allocations)) return OUT_OF_MEMORY;
  size_t page = sysconf(_SC_PAGESIZE), room = (bytes + 15) / 16 * 16, whole = (room + page - 1) / page * page;
  unsigned char *mapped = (unsigned char *)mmap(nullptr, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return OUT_OF_MEMORY;
  mprotect(mapped + whole, page, PROT_NONE);
  memset(mapped, 0xff, whole);
  *at = (uint64_t)(mapped + whole - room);
  taken[*at] = {mapped, whole + page};
  return 0;
}
EXPORT int cuMemAllocFromPoolAsync(uint64_t *at, size_t bytes, Handle, Handle stream) {
  std::lock_guard<std::mutex> held(lock);
  calls++;
  return at_once(stream, [=] { return allocate(at, bytes); });
}
EXPORT int cuMemFreeAsync(uint64_t at, Handle stream) {
  std::lock_guard<std::mutex> held(lock);
  calls++;
  return at_once(stream, [=] {
    auto found = taken.find(at);
    if (found == taken.end()) return (int)INVALID;
    munmap(found->second.first, found->second.second);
    taken.erase(found);
    return 0;
  });
}
EXPORT int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t n, Handle stream) {
  std::lock_guard<std::mutex> held(lock);
  calls++;
  return at_once(stream, [=] { return memcpy((void *)to, from, n), failed ? ILLEGAL : 0; });
}
EXPORT int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t n, Handle stream) {
  std::lock_guard<std::mutex> held(lock);
  calls++;
  return at_once(stream, [=] { return memcpy(to, (void *)from, n), failed ? ILLEGAL : 0; });
}
EXPORT int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t n, Handle stream) {
  std::lock_guard<std::mutex> held(lock);
  calls++;
  return queue(stream, [=] { return memmove((void *)to, (void *)from, n), failed ? ILLEGAL : 0; });
}
EXPORT int cuMemsetD8Async(uint64_t at, unsigned char x, size_t n, Handle stream) {
  std::lock_guard<std::mutex> held(lock);
  calls++;
  return queue(stream, [=] { return memset((void *)at, x, n), failed ? ILLEGAL : 0; });
}

static int run_grid(const Kernel &kernel, Index grid, unsigned threads, unsigned bytes, void **arguments) {
  if (failed || due("launch=", launches)) return failed = true, ILLEGAL;
  if (!stacks) stacks = (unsigned char *)malloc(MOST * STACK);
  body = kernel.call;
  body_kernel = kernel.at;
  body_arguments = arguments;
  std::vector<unsigned char> room(bytes + 16);
  shared = (unsigned char *)(((uintptr_t)room.data() + 15) / 16 * 16);
  gridDim = grid;
  blockDim = {threads, 1, 1};
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) {
        blockIdx = {x, y, z};
        memset(shared, 0xff, bytes);
        run_block(threads);
      }
  return 0;
}

EXPORT int cuLaunchKernel(Handle function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned bytes,
                          Handle stream, void **arguments, void **) {
  std::lock_guard<std::mutex> held(lock);
  calls++;
  if (!gx || !gy || !gz || gy > 65535 || gz > 65535 || !bx || bx > MOST || by != 1 || bz != 1 || bytes > 227 << 10) return INVALID;
  const Kernel &kernel = *(const Kernel *)function;
  Index grid = {gx, gy, gz};
  if (!((Stream *)stream)->recording) return started++, run_grid(kernel, grid, bx, bytes, arguments);
  auto kept = std::make_shared<std::vector<std::vector<unsigned char>>>(kernel.keep(arguments));
  return queue(stream, [=, &kernel] {
    std::vector<void *> values;
    for (auto &value : *kept) values.push_back(value.data());
    return run_grid(kernel, grid, bx, bytes, values.data());
  });
}

// cuBLAS: columns first, sums in float.
EXPORT int cublasCreate_v2(Handle *handle) { return *handle = new Blas, 0; }
EXPORT int cublasDestroy_v2(Handle handle) { return delete (Blas *)handle, 0; }
// Takes the workspace away, as cuBLAS' own does.
EXPORT int cublasSetStream_v2(Handle handle, Handle stream) { return *(Blas *)handle = {stream, nullptr}, 0; }
EXPORT int cublasSetWorkspace_v2(Handle handle, Handle at, size_t bytes) {
  std::lock_guard<std::mutex> held(lock);
  auto found = taken.find((uint64_t)at);
  if (found == taken.end() || (uint64_t)at % 256 || bytes > found->second.second) return 7;
  return ((Blas *)handle)->workspace = at, 0;
}
EXPORT int cublasGetVersion_v2(Handle, int *v) { return *v = 130000, 0; }
static int product(int op_a, int op_b, int m, int n, int k, float alpha, const void *a, int type_a, int lda, const void *b, int ldb,
                   float beta, void *c, int type_c, int ldc) {
  bool half_in = type_a == 14, half_out = type_c == 14;
  auto read = [&](const void *x, size_t i) { return half_in ? widen(((const bf16 *)x)[i]) : ((const float *)x)[i]; };
  for (int j = 0; j < n; j++)
    for (int i = 0; i < m; i++) {
      float sum = 0;
      for (int l = 0; l < k; l++)
        sum += read(a, op_a ? (size_t)i * lda + l : (size_t)l * lda + i) * read(b, op_b ? (size_t)l * ldb + j : (size_t)j * ldb + l);
      size_t at = (size_t)j * ldc + i;
      // With beta 0 what was there is not read.
      float before = beta == 0 ? 0 : beta * (half_out ? widen(((bf16 *)c)[at]) : ((float *)c)[at]);
      float now = alpha * sum + before;
      if (half_out) narrow(now, (bf16 *)c + at);
      else ((float *)c)[at] = now;
    }
  return 0;
}
EXPORT int cublasGemmEx(Handle handle, int op_a, int op_b, int m, int n, int k, const float *alpha, const void *a, int type_a, int lda,
                        const void *b, int type_b, int ldb, const float *beta, void *c, int type_c, int ldc, int compute, int) {
  bool half_in = type_a == 14, half_out = type_c == 14;
  if (type_a != type_b || (type_a != 0 && !half_in) || (type_c != 0 && !half_out) || compute != 68) return 7;
  if (lda < (op_a ? k : m) || ldb < (op_b ? n : k) || ldc < m || m < 0 || n < 0 || k < 0) return 7;
  // A float product into bf16 is none that cuBLAS has.
  if (!half_in && half_out) return 15;
  // Products take no part in the order of kernels, so that two threads may make them at once.
  Blas *blas = (Blas *)handle;
  float by = *alpha, keep = *beta;
  std::unique_lock<std::mutex> held(lock);
  calls++;
  Stream *stream = (Stream *)blas->stream;
  auto work = [=] { return product(op_a, op_b, m, n, k, by, a, type_a, lda, b, ldb, keep, c, type_c, ldc); };
  if (stream->recording) {
    // Without a workspace of the caller's it would allocate one here.
    if (!blas->workspace) stream->broken = true;
    return queue(stream, [=] { return failed ? ILLEGAL : work(); }) ? 13 : 0;
  }
  started++;
  held.unlock();
  return work();
}
