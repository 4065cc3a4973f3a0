// megapoly_kernels._cuda: the norms on tensors of PyTorch. Shapes and dtypes are checked here; see norm.h.
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/extension.h>

#include <optional>

#include "norm.h"

namespace {

using megapoly::Dtype;
using megapoly::Matrix;
using torch::Tensor;
using Optional = std::optional<Tensor>;

Dtype dtype(const Tensor& x) {
  switch (x.scalar_type()) {
    case torch::kFloat16: return Dtype::kFloat16;
    case torch::kBFloat16: return Dtype::kBFloat16;
    case torch::kFloat32: return Dtype::kFloat32;
    case torch::kFloat64: return Dtype::kFloat64;
    default: TORCH_CHECK_VALUE(false, "megapoly_kernels: found a tensor of ", x.scalar_type(), ", expected a float");
  }
}

torch::ScalarType wide(const Tensor& high) {
  return high.scalar_type() == torch::kFloat64 ? torch::kFloat64 : torch::kFloat32;
}

// That `x` is of a type, on the device of `like`, and has its number of elements, or of columns.
void expect(const char* name, const Tensor& x, const Tensor& like, int64_t numel, torch::ScalarType type) {
  TORCH_CHECK_VALUE(x.is_cuda() && x.device() == like.device(), name, " is on ", x.device(), ", expected ", like.device());
  TORCH_CHECK_VALUE(x.numel() == numel, name, " has ", x.numel(), " elements, expected ", numel);
  TORCH_CHECK_VALUE(x.scalar_type() == type, name, " is ", x.scalar_type(), ", expected ", type);
}

void* written(const char* name, const Optional& x, const Tensor& like, int64_t numel, torch::ScalarType type) {
  if (!x) return nullptr;
  expect(name, *x, like, numel, type);
  TORCH_CHECK_VALUE(x->is_contiguous(), name, " is not contiguous, and has to be");
  return x->data_ptr();
}

Matrix matrix(const char* name, const Optional& x, const Tensor& like, torch::ScalarType type) {
  if (!x) return {nullptr, 0};
  expect(name, *x, like, like.numel(), type);
  TORCH_CHECK_VALUE(x->dim() == 2 && x->size(1) == like.size(1) && (x->stride(1) == 1 || x->size(1) == 1), name,
                    " has shape ", x->sizes(), " and strides ", x->strides(),
                    ", expected [rows, columns] with the elements of a row side by side");
  return {x->data_ptr(), x->stride(0)};
}

void norm_forward(const Optional& x, const Tensor& base, const Tensor& weight, const Optional& bias, const Tensor& y,
                  const Optional& h, const Optional& mean, const Tensor& rstd, double epsilon) {
  const auto low = y.scalar_type(), high = base.scalar_type();
  TORCH_CHECK_VALUE(base.dim() == 2, "base has ", base.dim(), " dimensions, expected [rows, columns]");
  TORCH_CHECK_VALUE(x.has_value() == h.has_value(), "x and h are given both, or neither");
  const int64_t rows = base.size(0), columns = base.size(1);
  megapoly::NormForward norm{};
  norm.low = dtype(y), norm.high = dtype(base);
  norm.rows = rows, norm.columns = columns;
  norm.epsilon = epsilon, norm.centred = mean.has_value();
  norm.x = matrix("x", x, base, low), norm.base = matrix("base", base, base, high);
  norm.weight = written("weight", weight, base, columns, wide(base));
  norm.bias = written("bias", bias, base, columns, wide(base));
  norm.y = written("y", y, base, base.numel(), low), norm.h = written("h", h, base, base.numel(), high);
  norm.mean = written("mean", mean, base, rows, wide(base)), norm.rstd = written("rstd", rstd, base, rows, wide(base));
  const c10::cuda::CUDAGuard guard(base.device());
  megapoly::norm_forward(norm, c10::cuda::getCurrentCUDAStream());
}

void norm_backward(const Tensor& dy, const Tensor& h, const Optional& into, const Tensor& weight, const Optional& mean,
                   const Tensor& rstd, const Tensor& dh, const Optional& dx, const Tensor& d_weight,
                   const Optional& d_bias) {
  const auto low = dy.scalar_type(), high = h.scalar_type();
  TORCH_CHECK_VALUE(h.dim() == 2, "h has ", h.dim(), " dimensions, expected [rows, columns]");
  const int64_t rows = h.size(0), columns = h.size(1);
  megapoly::NormBackward norm{};
  norm.low = dtype(dy), norm.high = dtype(h);
  norm.rows = rows, norm.columns = columns;
  norm.dy = matrix("dy", dy, h, low), norm.h = matrix("h", h, h, high), norm.into = matrix("into", into, h, high);
  norm.weight = written("weight", weight, h, columns, wide(h));
  norm.mean = written("mean", mean, h, rows, wide(h)), norm.rstd = written("rstd", rstd, h, rows, wide(h));
  norm.dh = written("dh", dh, h, h.numel(), high), norm.dx = written("dx", dx, h, h.numel(), low);
  norm.d_weight = written("d_weight", d_weight, h, columns, wide(h));
  norm.d_bias = written("d_bias", d_bias, h, columns, wide(h));
  const c10::cuda::CUDAGuard guard(h.device());
  norm.groups = megapoly::norm_backward_groups(norm);
  const Tensor partials = torch::empty({d_bias ? 2 : 1, norm.groups, columns}, rstd.options());
  norm.partials = partials.data_ptr();
  megapoly::norm_backward(norm, c10::cuda::getCurrentCUDAStream());
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("norm_forward", &norm_forward);
  module.def("norm_backward", &norm_backward);
}
