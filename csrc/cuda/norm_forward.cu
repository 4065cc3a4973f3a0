// A block a row. What is normed is kept in shared memory where it fits; otherwise it is read again, from L2 as a rule.
#include "common.cuh"

namespace megapoly {
namespace {

struct Forward {
  NormForward norm;
  bool kept;  // in shared memory
};

template <typename Low, typename High, bool kAligned>
__global__ void __launch_bounds__(kThreads) forward_kernel(Forward given) {
  using A = typename Accumulate<High>::type;
  constexpr int V = 16 / sizeof(Low);
  extern __shared__ uint4 memory[];
  A* parts = reinterpret_cast<A*>(memory);
  High* room = reinterpret_cast<High*>(reinterpret_cast<char*>(memory) + kSumBytes);

  const NormForward& norm = given.norm;
  const int64_t row = blockIdx.x, columns = norm.columns, first = threadIdx.x * V, step = int64_t(blockDim.x) * V;
  const Low* x = norm.x.data ? static_cast<const Low*>(norm.x.data) + row * norm.x.stride : nullptr;
  const High* base = static_cast<const High*>(norm.base.data) + row * norm.base.stride;
  High* h = static_cast<High*>(norm.h) + row * columns;
  Low* y = static_cast<Low*>(norm.y) + row * columns;
  const A* weight = static_cast<const A*>(norm.weight);
  const A* bias = static_cast<const A*>(norm.bias);

  A sum = 0;  // of values; of squares for RMSNorm
  for (int64_t at = first; at < columns; at += step) {
    A values[V];
    load<kAligned>(values, base + at, columns - at);
    if (x) {
      A more[V];
      load<kAligned>(more, x + at, columns - at);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        High rounded;
        narrow(rounded, values[i] + more[i]);
        values[i] = widen(rounded);
      }
      store<kAligned>(h + at, values, columns - at);
    }
    if (given.kept) store<kAligned>(room + at, values, columns - at);
#pragma unroll
    for (int i = 0; i < V; ++i) sum += norm.centred ? values[i] : values[i] * values[i];
  }
  // Every thread reads just what it wrote itself.
  const High* again = given.kept ? room : x ? h : base;
  sum = block_sum(sum, parts);
  A mean = 0;
  if (norm.centred) {
    mean = sum / A(columns);
    sum = 0;
    for (int64_t at = first; at < columns; at += step) {
      A values[V];
      load<kAligned>(values, again + at, columns - at);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const A distance = kAligned || i < columns - at ? values[i] - mean : A(0);
        sum += distance * distance;
      }
    }
    sum = block_sum(sum, parts);
  }
  const A rstd = A(1) / sqrt(sum / A(columns) + A(norm.epsilon));
  if (threadIdx.x == 0) {
    static_cast<A*>(norm.rstd)[row] = rstd;
    if (norm.centred) static_cast<A*>(norm.mean)[row] = mean;
  }
  for (int64_t at = first; at < columns; at += step) {
    A values[V], scale[V], shift[V];
    load<kAligned>(values, again + at, columns - at);
    load<kAligned>(scale, weight + at, columns - at);
    if (bias) load<kAligned>(shift, bias + at, columns - at);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      values[i] = (values[i] - mean) * rstd * scale[i];
      if (bias) values[i] += shift[i];
    }
    store<kAligned>(y + at, values, columns - at);
  }
}

}  // namespace

void norm_forward(const NormForward& norm, cudaStream_t stream) {
  with_dtypes(norm.low, norm.high, [&](auto low, auto high) {
    using Low = typename decltype(low)::type;
    using High = typename decltype(high)::type;
    constexpr int V = 16 / sizeof(Low);
    if (norm.rows == 0 || norm.columns == 0) return;
    const bool wide = norm.columns % V == 0 && aligned(norm.x, sizeof(Low)) && aligned(norm.base, sizeof(High)) &&
                      aligned(norm.weight) && aligned(norm.bias) && aligned(norm.y) && aligned(norm.h);
    const int64_t room = norm.columns * int64_t(sizeof(High));
    const bool kept = kSumBytes + room <= attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    const auto kernel = wide ? forward_kernel<Low, High, true> : forward_kernel<Low, High, false>;
    launch(kernel, dim3(unsigned(norm.rows)), threads_for(norm.columns, V), kSumBytes + (kept ? room : 0), stream,
           Forward{norm, kept});
  });
}

}  // namespace megapoly
