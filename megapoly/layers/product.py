"""Matrix products of the linear layers, by whatever is fastest for the tensors' device and dtype.

On a CPU, torch multiplies fp32 with MKL, which reaches half of what oneDNN does on an AMD processor. oneDNN comes with
torch, but torch offers it for fp32 as an operator of its compiler only. ``megapoly bench step`` measures both. A few
rows, tokens that are generated, are MKL's, which reads the weights at up to twice oneDNN's speed where they come first.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_FEW = 8  # rows


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """``a @ b.T + bias``: ``a`` [..., k], ``b`` [n, k], ``bias`` [n] -> [..., n], in their dtype."""
    if _ONEDNN and a.is_cpu and a.dtype == torch.float32:
        rows = a.numel() // a.shape[-1]
        if rows > _FEW:
            return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
        if rows > 1:
            few = torch.mm(b, a.reshape(rows, -1).t()).t().contiguous().view(*a.shape[:-1], -1)
            return few if bias is None else few.add_(bias)
    return torch.nn.functional.linear(a, b, bias)


def add_product(out: Tensor, dy: Tensor, x: Tensor) -> None:
    """``out += dy.T @ x`` without rounding the product to a dtype narrower than that of ``out``.

    ``dy`` [tokens, n], ``x`` [tokens, k], ``out`` [n, k].
    """
    if dy.is_cuda and out.dtype != dy.dtype:
        out.add_(torch.mm(dy.t(), x, out_dtype=out.dtype))
    elif _ONEDNN and out.is_cpu and out.dtype == torch.float32:
        dy, x = dy.to(out.dtype), x.to(out.dtype)
        if dy.shape[1] <= x.shape[1]:  # oneDNN copies a transposed first factor: the smaller one
            out.add_(product(dy.t(), x.t()))
        else:
            out.add_(product(x.t(), dy.t()).t())
    else:
        out.addmm_(dy.t().to(out.dtype), x.to(out.dtype))
