// As many blocks as run at a time, each with every so-manyth row. A thread owns columns, whose sums of the gradients of
// weight and bias it keeps in shared memory, or in the block's partials where those do not fit; then the partials are
// summed. No atomics: the same bits every time.
#include "common.cuh"

namespace megapoly {
namespace {

struct Backward {
  NormBackward norm;
  bool summed;  // in shared memory
  bool kept;    // dy and h, in shared memory
};

// Adds products of two vectors to sums.
template <bool kAligned, int V, typename A>
__device__ __forceinline__ void add(A* sums, const A (&values)[V], int64_t count) {
  A total[V];
  load<kAligned>(total, sums, count);
#pragma unroll
  for (int i = 0; i < V; ++i) total[i] += values[i];
  store<kAligned>(sums, total, count);
}

template <typename Low, typename High, bool kAligned>
__global__ void __launch_bounds__(kThreads) backward_kernel(Backward given) {
  using A = typename Accumulate<High>::type;
  constexpr int V = 16 / sizeof(Low);
  extern __shared__ uint4 memory[];
  const NormBackward& norm = given.norm;
  const int64_t columns = norm.columns, padded = (columns + V - 1) / V * V;
  const int64_t first = threadIdx.x * V, step = int64_t(blockDim.x) * V;
  A* parts = reinterpret_cast<A*>(memory);
  char* room = reinterpret_cast<char*>(memory) + kSumBytes;
  A* partial = static_cast<A*>(norm.partials) + blockIdx.x * columns;
  A* d_weight = partial;
  A* d_bias = partial + norm.groups * columns;
  if (given.summed) {
    d_weight = reinterpret_cast<A*>(room);
    room += padded * sizeof(A);
    if (norm.d_bias) {
      d_bias = reinterpret_cast<A*>(room);
      room += padded * sizeof(A);
    }
  }
  High* kept_h = reinterpret_cast<High*>(room);
  Low* kept_dy = reinterpret_cast<Low*>(room + padded * sizeof(High));

  const A* weight = static_cast<const A*>(norm.weight);
  const A zeros[V] = {};
  for (int64_t at = first; at < columns; at += step) {
    store<kAligned>(d_weight + at, zeros, columns - at);
    if (norm.d_bias) store<kAligned>(d_bias + at, zeros, columns - at);
  }
  for (int64_t row = blockIdx.x; row < norm.rows; row += gridDim.x) {
    const Low* dy_row = static_cast<const Low*>(norm.dy.data) + row * norm.dy.stride;
    const High* h_row = static_cast<const High*>(norm.h.data) + row * norm.h.stride;
    const A mean = norm.mean ? static_cast<const A*>(norm.mean)[row] : A(0);
    const A rstd = static_cast<const A*>(norm.rstd)[row];
    A along = 0, level = 0;
    for (int64_t at = first; at < columns; at += step) {
      A dy[V], h[V], scale[V];
      load<kAligned>(dy, dy_row + at, columns - at);
      load<kAligned>(h, h_row + at, columns - at);
      load<kAligned>(scale, weight + at, columns - at);
      if (given.kept) {
        store<kAligned>(kept_dy + at, dy, columns - at);
        store<kAligned>(kept_h + at, h, columns - at);
      }
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const A slope = dy[i] * scale[i];
        along += slope * (h[i] - mean) * rstd;
        level += slope;
      }
    }
    along = block_sum(along, parts) / A(columns);
    level = norm.mean ? block_sum(level, parts) / A(columns) : A(0);
    if (given.kept) dy_row = kept_dy, h_row = kept_h;  // of which every thread reads just what it wrote
    for (int64_t at = first; at < columns; at += step) {
      A dy[V], n[V], values[V];
      load<kAligned>(dy, dy_row + at, columns - at);
      load<kAligned>(n, h_row + at, columns - at);
      load<kAligned>(values, weight + at, columns - at);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        n[i] = (n[i] - mean) * rstd;
        values[i] = (dy[i] * values[i] - n[i] * along - level) * rstd;
        n[i] *= dy[i];
      }
      add<kAligned>(d_weight + at, n, columns - at);
      if (norm.d_bias) add<kAligned>(d_bias + at, dy, columns - at);
      if (norm.into.data) {
        load<kAligned>(n, static_cast<const High*>(norm.into.data) + row * norm.into.stride + at, columns - at);
#pragma unroll
        for (int i = 0; i < V; ++i) values[i] += n[i];
      }
      store<kAligned>(static_cast<High*>(norm.dh) + row * columns + at, values, columns - at);
      if (norm.dx) store<kAligned>(static_cast<Low*>(norm.dx) + row * columns + at, values, columns - at);
    }
  }
  if (given.summed) {
    for (int64_t at = first; at < columns; at += step) {
      A total[V];
      load<kAligned>(total, d_weight + at, columns - at);
      store<kAligned>(partial + at, total, columns - at);
      if (norm.d_bias) {
        load<kAligned>(total, d_bias + at, columns - at);
        store<kAligned>(partial + norm.groups * columns + at, total, columns - at);
      }
    }
  }
}

// A thread a column; the second row of blocks sums the gradient of the bias.
template <typename A>
__global__ void __launch_bounds__(kThreads) sum_kernel(NormBackward norm) {
  const int64_t column = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (column >= norm.columns) return;
  const A* partials = static_cast<const A*>(norm.partials) + blockIdx.y * norm.groups * norm.columns + column;
  A total = 0;
  for (int64_t group = 0; group < norm.groups; ++group) total += partials[group * norm.columns];
  static_cast<A*>(blockIdx.y ? norm.d_bias : norm.d_weight)[column] = total;
}

struct Plan {
  int64_t shared;
  bool summed, kept;
};

template <typename Low, typename High>
Plan plan(const NormBackward& norm) {
  constexpr int V = 16 / sizeof(Low);
  const int64_t most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin), padded = (norm.columns + V - 1) / V * V;
  const int64_t sums = padded * int64_t(sizeof(typename Accumulate<High>::type)) * (norm.d_bias ? 2 : 1);
  const int64_t room = padded * int64_t(sizeof(Low) + sizeof(High));
  Plan found{kSumBytes, kSumBytes + sums <= most, false};
  if (found.summed) found.shared += sums;
  found.kept = found.shared + room <= most;
  if (found.kept) found.shared += room;
  return found;
}

}  // namespace

int64_t norm_backward_groups(const NormBackward& norm) {
  int64_t groups = 0;
  with_dtypes(norm.low, norm.high, [&](auto low, auto high) {
    const Plan plan_ = plan<typename decltype(low)::type, typename decltype(high)::type>(norm);
    const int64_t shared = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    const int64_t together = 2 * (plan_.shared + 1024) <= shared ? 2 : 1;  // CUDA itself takes 1 KiB a block
    const int64_t most = together * attribute(cudaDevAttrMultiProcessorCount);
    groups = norm.rows < most ? norm.rows : most;
  });
  return groups;
}

void norm_backward(const NormBackward& norm, cudaStream_t stream) {
  with_dtypes(norm.low, norm.high, [&](auto low, auto high) {
    using Low = typename decltype(low)::type;
    using High = typename decltype(high)::type;
    using A = typename Accumulate<High>::type;
    constexpr int V = 16 / sizeof(Low);
    if (norm.columns == 0) return;
    const bool wide = norm.columns % V == 0 && aligned(norm.dy, sizeof(Low)) && aligned(norm.h, sizeof(High)) &&
                      aligned(norm.into, sizeof(High)) && aligned(norm.weight) && aligned(norm.dh) && aligned(norm.dx) &&
                      aligned(norm.partials);
    if (norm.rows > 0) {
      const Plan found = plan<Low, High>(norm);
      const auto kernel = wide ? backward_kernel<Low, High, true> : backward_kernel<Low, High, false>;
      launch(kernel, dim3(unsigned(norm.groups)), threads_for(norm.columns, V), found.shared, stream,
             Backward{norm, found.summed, found.kept});
    }
    const unsigned blocks = unsigned((norm.columns + 127) / 128);
    launch(sum_kernel<A>, dim3(blocks, norm.d_bias ? 2 : 1), 128, 0, stream, norm);
  });
}

}  // namespace megapoly
