// Runs the kernels of csrc/cuda on a CPU, built by a C++ compiler with CUDA's headers alone: a block after another, its
// threads as coroutines that go on together from one __syncthreads or shuffle to the next. It ends the process where
// threads of a block wait at different things, or shared memory is written beyond what was asked for.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define MEGAPOLY_EMULATE
#undef __launch_bounds__
#define __launch_bounds__(threads)
#define threadIdx emulated_thread
#define blockIdx emulated_block
#define blockDim emulated_threads
#define gridDim emulated_blocks

static dim3 threadIdx, blockIdx, blockDim, gridDim;
static int64_t shared_limit = 232448;
static bool backwards = false;  // the order of the threads, in which races show

namespace megapoly {
namespace {
alignas(16) uint4 memory[1 << 15];
}
}  // namespace megapoly

namespace {

enum Stop { kEnd, kBarrier, kShuffle };

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  Stop stop;
  unsigned shuffles;
  double slots[2];
};

std::vector<Fiber> fibers;
ucontext_t scheduler;
unsigned current;
void (*body)();

[[noreturn]] void give_up(const char* why) {
  std::fprintf(stderr, "cuda_emulator: %s\n", why);
  std::abort();
}

void enter() {
  body();
  fibers[current].stop = kEnd;
}

void wait_at(Stop stop) {
  Fiber& fiber = fibers[current];
  fiber.stop = stop;
  swapcontext(&fiber.context, &scheduler);
}

void run_block(unsigned threads) {
  if (fibers.size() < threads) fibers.resize(threads);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.stack.resize(1 << 15);
    fiber.shuffles = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, enter, 0);
  }
  do {
    for (unsigned i = 0; i < threads; ++i) {
      current = backwards ? threads - 1 - i : i;
      threadIdx = dim3(current, 0, 0);
      swapcontext(&scheduler, &fibers[current].context);
      if (i && fibers[current].stop != fibers[backwards ? threads - 1 : 0].stop) give_up("threads of a block part ways");
    }
  } while (fibers[0].stop != kEnd);
}

}  // namespace

static void __syncthreads() { wait_at(kBarrier); }

template <typename T>
static T __shfl_xor_sync(unsigned, T value, int lane) {
  // Two slots in turn: a slow thread still reads the one while a quick thread writes the other.
  const unsigned self = current, slot = fibers[self].shuffles++ % 2;
  fibers[self].slots[slot] = double(value);
  wait_at(kShuffle);
  return T(fibers[self ^ unsigned(lane)].slots[slot]);
}

extern "C" {
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return ""; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrMultiProcessorCount ? 2 : int(shared_limit);
  return cudaSuccess;
}
}

namespace megapoly {

template <typename Arguments>
void launch(void (*kernel)(Arguments), dim3 blocks, int threads, int64_t shared, cudaStream_t, Arguments given) {
  static void (*start)(Arguments);
  static Arguments arguments;
  if (threads > 1024 || shared > shared_limit || shared > int64_t(sizeof memory) - 4096) give_up("a block is too large");
  start = kernel, arguments = given;
  body = [] { start(arguments); };
  gridDim = blocks, blockDim = dim3(threads);
  for (unsigned y = 0; y < blocks.y; ++y) {
    for (unsigned x = 0; x < blocks.x; ++x) {
      std::memset(memory, 0xff, shared + 4096);  // NaN
      blockIdx = dim3(x, y);
      run_block(threads);
      for (int64_t i = shared; i < shared + 4096; ++i) {
        if (reinterpret_cast<unsigned char*>(memory)[i] != 0xff) give_up("shared memory is written beyond its end");
      }
    }
  }
}

}  // namespace megapoly

#include "norm_backward.cu"
#include "norm_forward.cu"

extern "C" {

void emulate(int64_t limit, int64_t order) { shared_limit = limit, backwards = order; }

// dtypes, rows, columns, then the members of the structs.
void emulate_forward(const int64_t* a, double epsilon) {
  using megapoly::Dtype;
  auto at = [&](int i) { return reinterpret_cast<void*>(a[i]); };
  megapoly::norm_forward({Dtype(a[0]), Dtype(a[1]), a[2], a[3], epsilon, a[12] != 0, {at(4), a[5]}, {at(6), a[7]}, at(8),
                          at(9), at(10), at(11), at(12), at(13)},
                         nullptr);
}

void emulate_backward(const int64_t* a) {
  using megapoly::Dtype;
  auto at = [&](int i) { return reinterpret_cast<void*>(a[i]); };
  megapoly::NormBackward norm{Dtype(a[0]), Dtype(a[1]), a[2],   a[3],   0,      {at(4), a[5]}, {at(6), a[7]}, {at(8), a[9]},
                              at(10),      at(11),      at(12), at(13), at(14), nullptr,       at(15),        at(16)};
  norm.groups = megapoly::norm_backward_groups(norm);
  std::vector<double> partials(2 * norm.groups * norm.columns, NAN);
  norm.partials = partials.data();
  megapoly::norm_backward(norm, nullptr);
}
}
