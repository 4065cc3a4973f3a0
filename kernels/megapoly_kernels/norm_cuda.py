"""The norms of csrc/cuda/norm.h, and the tables that say where they are taken in place of Triton's.

Shapes and dtypes are those of :mod:`megapoly_kernels.norm`. The kernels take one dtype, or 16 bits with an fp32
residual; other mixtures are converted by PyTorch before and after.
"""

from __future__ import annotations

import torch
from torch import Tensor

INSTALL = "pip install --no-build-isolation . in megapoly's folder, beside a PyTorch with CUDA and its nvcc"

try:
    import megapoly_kernels._cuda as _cuda
except ModuleNotFoundError:
    _cuda = None  # type: ignore[assignment]
except ImportError as error:
    raise ImportError(
        f"megapoly_kernels._cuda was built for another PyTorch than {torch.__version__} ({error}): delete it, or build "
        f"megapoly again with this one: {INSTALL}"
    ) from error

# (architecture, bytes of an element of h, elements): from rows of so many elements on, CUDA is taken where it is built.
# A line stands here for what was measured to be quicker on a GPU. Nothing has been: Triton everywhere.
FORWARD: frozenset[tuple[int, int, int]] = frozenset()
BACKWARD: frozenset[tuple[int, int, int]] = frozenset()
_WITH_FP32 = (torch.float16, torch.bfloat16)


def takes(table: frozenset[tuple[int, int, int]], arch: int, itemsize: int, columns: int) -> bool:
    """Whether a table says CUDA, and it is built."""
    listed = any((arch, itemsize) == row[:2] and columns >= row[2] for row in table)
    return listed and _cuda is not None


def _goes(low: torch.dtype, high: torch.dtype, wide: torch.dtype) -> bool:
    if high == torch.float32 and low in _WITH_FP32:
        return wide == torch.float32
    return low == high and (wide == torch.float64) == (high == torch.float64)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    outputs: tuple[Tensor, Tensor | None, Tensor | None, Tensor],
    epsilon: float,
) -> None:
    """Fill y, h, mean and rstd for rows ``x`` [rows, N] and ``residual``, whose elements lie side by side."""
    y, h, mean, rstd = outputs
    goes = _goes(y.dtype, x.dtype if h is None else h.dtype, rstd.dtype)
    if h is not None and residual is not None and not (goes and x.dtype == y.dtype and residual.dtype == h.dtype):
        torch.add(x, residual, out=h.view(x.shape))
        x, residual, h = h.view(x.shape), None, None
    w = weight.to(rstd.dtype).contiguous()
    b = None if bias is None else bias.to(rstd.dtype).contiguous()
    target = y if goes else torch.empty_like(y, dtype=rstd.dtype)
    base = x if residual is None else residual
    base = base if goes else base.to(rstd.dtype)
    _cuda.norm_forward(None if residual is None else x, base, w, b, target, h, mean, rstd, epsilon)
    if target is not y:
        y.copy_(target)


def backward(
    inputs: tuple[Tensor, Tensor, Tensor | None],
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    outputs: tuple[Tensor, Tensor],
    has_bias: bool,
) -> tuple[Tensor, Tensor | None]:
    """Fill dx and the residual's gradient, of rows dy, h and what comes into h; return those of weight and bias."""
    dy, h, into = inputs
    dx, d_residual = outputs
    columns = h.shape[1]
    d_weight = rstd.new_empty(columns)
    d_bias = rstd.new_empty(columns) if has_bias else None
    goes = _goes(dy.dtype, h.dtype, rstd.dtype)
    high = h.dtype if goes else rstd.dtype
    target = d_residual if goes else torch.empty_like(d_residual, dtype=high)
    fused = goes and dx is not d_residual and dx.dtype == dy.dtype
    _cuda.norm_backward(
        dy if goes else dy.to(high),
        h.to(high),
        None if into is None else into.to(high),
        weight.to(rstd.dtype).contiguous(),
        mean,
        rstd,
        target,
        dx if fused else None,
        d_weight,
        d_bias,
    )
    if target is not d_residual:
        d_residual.copy_(target)
    if dx is not d_residual and not fused:
        dx.copy_(target)
    return d_weight, d_bias
