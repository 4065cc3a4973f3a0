// LayerNorm and RMSNorm on a GPU, for callers in plain C++. The maths is in kernels/megapoly_kernels/norm.py.
//
// Of two dtypes, `low` is that of y, dy, x and dx, `high` that of h and its gradient. Statistics, weight, bias and their
// gradients are in float, or in double where `high` is. Matrices are [rows, columns]; of those that are read, rows are
// `stride` elements apart, and elements of a row side by side. What is written is contiguous. Null: not there.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace megapoly {

enum class Dtype { kFloat16, kBFloat16, kFloat32, kFloat64 };

struct Matrix {
  const void* data;
  int64_t stride;
};

struct NormForward {
  Dtype low, high;
  int64_t rows, columns;
  double epsilon;
  bool centred;  // LayerNorm
  Matrix x;      // low; null where there is no residual
  Matrix base;   // high: the residual, or what is normed where there is none
  const void* weight;
  const void* bias;
  void* y;
  void* h;     // null where there is no residual
  void* mean;  // null for RMSNorm
  void* rstd;
};

struct NormBackward {
  Dtype low, high;
  int64_t rows, columns;
  int64_t groups;  // of norm_backward_groups
  Matrix dy;       // low
  Matrix h;        // high
  Matrix into;     // high: gradient of h from elsewhere
  const void* weight;
  const void* mean;  // null for RMSNorm
  const void* rstd;
  void* dh;        // high
  void* dx;        // low; null where it is dh
  void* partials;  // [1 or 2, groups, columns]: room for sums of the gradients of weight and bias
  void* d_weight;
  void* d_bias;  // null where there is no bias
};

// Dtypes are equal, or `low` has 16 bits and `high` is kFloat32; others throw std::invalid_argument. What CUDA reports
// throws std::runtime_error. The current device is used.
void norm_forward(const NormForward& norm, cudaStream_t stream);
int64_t norm_backward_groups(const NormBackward& norm);
void norm_backward(const NormBackward& norm, cudaStream_t stream);

}  // namespace megapoly
