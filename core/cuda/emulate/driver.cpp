// A stand-in for libcuda.so.1 and libcublas.so.13 that runs the kernels on the processor, so that tests can run liblocum_cuda.so, as it is,
// where there is no GPU. It knows what core/cuda/src/driver.rs asks for and no more. The numbers are the kernels' own, the speed is not.
//
// LOCUM_EMULATE orders faults: `old` (a card of generation 7.5), `none` (no device), `small` (64 MiB free), `alloc=N` (the N-th allocation
// finds no memory), `launch=N` (the N-th kernel fails, and everything after it).
#include "host.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <map>
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
};
struct Kernel {
  void *at;
  void (*call)(void *, void **);
};

#define K(name) {#name, {(void *)name, Caller<decltype(&name)>::call}}
#define BOTH(name) K(name##_f32), K(name##_bf16)
static const std::map<std::string, Kernel> kernels = {
    BOTH(embed), BOTH(rms_norm), BOTH(rope_split), BOTH(swiglu), BOTH(one_row), BOTH(four_rows), BOTH(convert),
    BOTH(attend_row1), BOTH(attend_row2), BOTH(attend_row4), BOTH(attend_row8), BOTH(attend_join), BOTH(cross_entropy),
    BOTH(swiglu_back), BOTH(head_dots), BOTH(rope_join), BOTH(adamw), BOTH(attend_dq1), BOTH(attend_dq2), BOTH(attend_dq4),
    BOTH(attend_dq8), BOTH(attend_dkv1), BOTH(attend_dkv2), BOTH(attend_dkv4), BOTH(attend_dkv8), K(met_rows), K(filter_chunk),
    K(distance_parts), K(judge_drift), K(begin_again), K(rms_norm_back), K(add_rows), K(add_heads), K(embed_back), K(join_parts),
    K(filter_rows), K(filter_rows_back), K(filter_taps_back),
    K(attend_tile16), K(attend_tile32), K(attend_tile64), K(attend_tile128)};

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
static long allocations, launches;
static bool failed;
static std::map<uintptr_t, std::pair<void *, size_t>> taken;

static const size_t TOTAL = (size_t)4 << 30;
}  // namespace emulated

using namespace emulated;
typedef void *Handle;
enum { ILLEGAL = 719, OUT_OF_MEMORY = 2, NO_DEVICE = 100, INVALID = 1 };

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int cuInit(unsigned) { return ordered("none") ? NO_DEVICE : 0; }
EXPORT int cuDriverGetVersion(int *v) { return *v = 13000, 0; }
EXPORT int cuGetErrorString(int code, const char **text) {
  *text = code == OUT_OF_MEMORY ? "out of memory" : code == NO_DEVICE ? "no CUDA-capable device is detected" : "unspecified launch failure";
  return 0;
}
EXPORT int cuDeviceGetCount(int *n) { return *n = 1, 0; }
EXPORT int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, ordinal == 0 ? 0 : 101; }
EXPORT int cuDeviceGetName(char *name, int room, int) { return snprintf(name, room, "stand-in on the processor"), 0; }
EXPORT int cuDeviceGetAttribute(int *value, int which, int) {
  bool old = ordered("old");
  switch (which) {
    case 16: return *value = 2, 0;
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
EXPORT int cuFuncSetAttribute(Handle, int, int) { return 0; }
EXPORT int cuStreamCreateWithPriority(Handle *stream, unsigned, int) { return *stream = &lock, 0; }
EXPORT int cuStreamDestroy_v2(Handle) { return 0; }
EXPORT int cuStreamSynchronize(Handle) { return failed ? ILLEGAL : 0; }
EXPORT int cuMemPoolCreate(Handle *pool, const void *) { return *pool = &taken, 0; }
EXPORT int cuMemPoolSetAttribute(Handle, int, void *) { return 0; }
EXPORT int cuMemPoolDestroy(Handle) { return 0; }

// Ends at a page that cannot be touched, and is full of NaN, in either format.
EXPORT int cuMemAllocFromPoolAsync(uint64_t *at, size_t bytes, Handle, Handle) {
  std::lock_guard<std::mutex> held(lock);
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
EXPORT int cuMemFreeAsync(uint64_t at, Handle) {
  std::lock_guard<std::mutex> held(lock);
  auto found = taken.find(at);
  if (found == taken.end()) return INVALID;
  munmap(found->second.first, found->second.second);
  taken.erase(found);
  return 0;
}
EXPORT int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t n, Handle) { return memcpy((void *)to, from, n), failed ? ILLEGAL : 0; }
EXPORT int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t n, Handle) { return memcpy(to, (void *)from, n), failed ? ILLEGAL : 0; }
EXPORT int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t n, Handle) { return memmove((void *)to, (void *)from, n), failed ? ILLEGAL : 0; }
EXPORT int cuMemsetD8Async(uint64_t at, unsigned char x, size_t n, Handle) { return memset((void *)at, x, n), failed ? ILLEGAL : 0; }

EXPORT int cuLaunchKernel(Handle function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned bytes,
                          Handle, void **arguments, void **) {
  std::lock_guard<std::mutex> held(lock);
  if (failed || due("launch=", launches)) return failed = true, ILLEGAL;
  if (!gx || !gy || !gz || gy > 65535 || gz > 65535 || !bx || bx > MOST || by != 1 || bz != 1 || bytes > 227 << 10) return INVALID;
  if (!stacks) stacks = (unsigned char *)malloc(MOST * STACK);
  const Kernel &kernel = *(const Kernel *)function;
  body = kernel.call;
  body_kernel = kernel.at;
  body_arguments = arguments;
  std::vector<unsigned char> room(bytes + 16);
  shared = (unsigned char *)(((uintptr_t)room.data() + 15) / 16 * 16);
  gridDim = {gx, gy, gz};
  blockDim = {bx, 1, 1};
  for (unsigned z = 0; z < gz; z++)
    for (unsigned y = 0; y < gy; y++)
      for (unsigned x = 0; x < gx; x++) {
        blockIdx = {x, y, z};
        memset(shared, 0xff, bytes);
        run_block(bx);
      }
  return 0;
}

// cuBLAS: columns first, sums in float.
EXPORT int cublasCreate_v2(Handle *handle) { return *handle = &taken, 0; }
EXPORT int cublasDestroy_v2(Handle) { return 0; }
EXPORT int cublasSetStream_v2(Handle, Handle) { return 0; }
EXPORT int cublasGetVersion_v2(Handle, int *v) { return *v = 130000, 0; }
EXPORT int cublasGemmEx(Handle, int op_a, int op_b, int m, int n, int k, const float *alpha, const void *a, int type_a, int lda, const void *b,
                        int type_b, int ldb, const float *beta, void *c, int type_c, int ldc, int compute, int) {
  bool half_in = type_a == 14, half_out = type_c == 14;
  if (type_a != type_b || (type_a != 0 && !half_in) || (type_c != 0 && !half_out) || compute != 68) return 7;
  if (lda < (op_a ? k : m) || ldb < (op_b ? n : k) || ldc < m || m < 0 || n < 0 || k < 0) return 7;
  // A float product into bf16 is none that cuBLAS has.
  if (!half_in && half_out) return 15;
  auto read = [&](const void *x, size_t i) { return half_in ? widen(((const bf16 *)x)[i]) : ((const float *)x)[i]; };
  for (int j = 0; j < n; j++)
    for (int i = 0; i < m; i++) {
      float sum = 0;
      for (int l = 0; l < k; l++)
        sum += read(a, op_a ? (size_t)i * lda + l : (size_t)l * lda + i) * read(b, op_b ? (size_t)l * ldb + j : (size_t)j * ldb + l);
      size_t at = (size_t)j * ldc + i;
      // With beta 0 what was there is not read.
      float before = *beta == 0 ? 0 : *beta * (half_out ? widen(((bf16 *)c)[at]) : ((float *)c)[at]);
      float now = *alpha * sum + before;
      if (half_out) narrow(now, (bf16 *)c + at);
      else ((float *)c)[at] = now;
    }
  return 0;
}
