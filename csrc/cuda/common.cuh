// What the kernels share: 16 bytes a load, sums over a block, starting a kernel.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "norm.h"

namespace megapoly {

template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void narrow(float& to, float x) { to = x; }
__device__ __forceinline__ void narrow(double& to, double x) { to = x; }
__device__ __forceinline__ void narrow(__half& to, float x) { to = __float2half_rn(x); }
__device__ __forceinline__ void narrow(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }

// V elements, in loads of 16 bytes where `kAligned`; otherwise the first `count` of them, and zeros.
template <bool kAligned, int V, typename T, typename A>
__device__ __forceinline__ void load(A (&out)[V], const T* from, int64_t count) {
  if constexpr (kAligned) {
    constexpr int kPart = 16 / sizeof(T);
    static_assert(V % kPart == 0);
#pragma unroll
    for (int i = 0; i < V; i += kPart) {
      const uint4 raw = *reinterpret_cast<const uint4*>(from + i);
      T part[kPart];
      memcpy(part, &raw, 16);
#pragma unroll
      for (int j = 0; j < kPart; ++j) out[i + j] = widen(part[j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) out[i] = i < count ? widen(from[i]) : A(0);
  }
}

template <bool kAligned, int V, typename T, typename A>
__device__ __forceinline__ void store(T* to, const A (&values)[V], int64_t count) {
  if constexpr (kAligned) {
    constexpr int kPart = 16 / sizeof(T);
#pragma unroll
    for (int i = 0; i < V; i += kPart) {
      T part[kPart];
#pragma unroll
      for (int j = 0; j < kPart; ++j) narrow(part[j], values[i + j]);
      uint4 raw;
      memcpy(&raw, part, 16);
      *reinterpret_cast<uint4*>(to + i) = raw;
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (i < count) narrow(to[i], values[i]);
    }
  }
}

template <typename A>
__device__ __forceinline__ A warp_sum(A value) {
#pragma unroll
  for (int lane = 16; lane; lane /= 2) value += __shfl_xor_sync(0xffffffffu, value, lane);
  return value;
}

constexpr int kSumBytes = 32 * sizeof(double);  // of shared memory that block_sum needs

// Sum over a block of whole warps, in every thread, in a fixed order.
template <typename A>
__device__ __forceinline__ A block_sum(A value, A* parts) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  value = warp_sum(value);
  __syncthreads();  // the sum before this one has been read
  if (lane == 0) parts[warp] = value;
  __syncthreads();
  return warp_sum(lane < int(blockDim.x / 32) ? parts[lane] : A(0));
}

inline void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("megapoly_kernels: CUDA: ") + cudaGetErrorString(status));
}

inline int64_t attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

#ifndef MEGAPOLY_EMULATE  // tests run kernels on a CPU, with a `launch` of their own
template <typename Arguments>
void launch(void (*kernel)(Arguments), dim3 blocks, int threads, int64_t shared, cudaStream_t stream, Arguments given) {
  const void* function = reinterpret_cast<const void*>(kernel);
  check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
  void* arguments[] = {&given};
  check(cudaLaunchKernel(function, blocks, dim3(threads), arguments, size_t(shared), stream));
}
#endif

template <typename T>
struct Type {
  using type = T;
};

// Calls `f(Type<Low>, Type<High>)`.
template <typename F>
void with_dtypes(Dtype low, Dtype high, F f) {
  if (low == Dtype::kFloat32 && high == low) return f(Type<float>(), Type<float>());
  if (low == Dtype::kFloat64 && high == low) return f(Type<double>(), Type<double>());
  if (low == Dtype::kFloat16 && high == low) return f(Type<__half>(), Type<__half>());
  if (low == Dtype::kBFloat16 && high == low) return f(Type<__nv_bfloat16>(), Type<__nv_bfloat16>());
  if (low == Dtype::kFloat16 && high == Dtype::kFloat32) return f(Type<__half>(), Type<float>());
  if (low == Dtype::kBFloat16 && high == Dtype::kFloat32) return f(Type<__nv_bfloat16>(), Type<float>());
  throw std::invalid_argument(
      "megapoly_kernels: norms in CUDA want one dtype, or 16 bits with float32 for the residual; convert the tensors");
}

// Whether rows may be read 16 bytes at a time: V elements are the smallest whole number of them in every dtype here.
inline bool aligned(const Matrix& matrix, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0 && matrix.stride * bytes % 16 == 0;
}
inline bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

constexpr int kThreads = 512;

inline int threads_for(int64_t columns, int vector) {
  const int64_t warps = (columns + 32 * vector - 1) / (32 * vector);
  return int(warps < 1 ? 32 : 32 * (warps < kThreads / 32 ? warps : kThreads / 32));
}

}  // namespace megapoly
