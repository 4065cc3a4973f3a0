"""Activations of the feed-forward block: bias + GELU (tanh), and SwiGLU.

Maths: ``gelu(u) = u / 2 (1 + tanh(z)) = u sigmoid(2 z)`` with ``z = sqrt(2 / pi) (u + 0.044715 u^3)`` and
``u = x + bias`` (Hendrycks and Gimpel, arXiv 1606.08415). ``swiglu = silu(gate) up``, where gate and up are the two
halves of the last dimension (Shazeer, arXiv 2002.05202).

Shapes: ``x`` is [..., N], or [..., 2 N] for SwiGLU; ``bias`` is [N]. Any strides; what is not contiguous is copied.
Dtypes: any float; arithmetic is in promote(dtype, fp32), and results are rounded once.
Gradients: of the inputs alone are kept ``x`` and ``bias``. The gradient of the bias is summed in promote(dtype, fp32)
over rows in a fixed order: the same bits every time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from megapoly_kernels.launch import (
    Launch,
    Table,
    Variant,
    architecture,
    cdiv,
    jit,
    on_device,
    runs_triton,
    settings,
    tl,
    wide_dtype,
    widen,
)

# By elements of a row.
LAUNCH: Table = {
    (80, 2, 1 << 30): Launch({"BLOCK": 2048}, warps=4),
    (80, 4, 1 << 30): Launch({"BLOCK": 1024}, warps=4),
    (80, 8, 1 << 30): Launch({"BLOCK": 512}, warps=4),
}  # fmt: skip
LAUNCH_SUM: Table = {
    (80, 2, 1 << 30): Launch({"ROWS": 8, "BLOCK": 256}, warps=4),
    (80, 4, 1 << 30): Launch({"ROWS": 8, "BLOCK": 256}, warps=4),
    (80, 8, 1 << 30): Launch({"ROWS": 8, "BLOCK": 128}, warps=4),
}  # fmt: skip
_GROUPS = 128  # of rows, each of which sums its part of a bias's gradient


def gelu_reference(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """``gelu(x + bias)`` in PyTorch."""
    u = x if bias is None else _wide(x) + _wide(bias)  # torch's own gelu is wide inside
    return torch.nn.functional.gelu(u, approximate="tanh").to(x.dtype)


def swiglu_reference(x: Tensor) -> Tensor:
    """``silu(gate) * up`` of the halves of the last dimension, in PyTorch."""
    gate, up = _wide(x).chunk(2, -1)
    return torch.nn.functional.silu(gate).mul(up).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(wide_dtype(x))


@jit
def _gelu_forward(y_ptr, x_ptr, bias_ptr, columns, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    row = tl.program_id(0).to(tl.int64) * columns
    u = widen(tl.load(x_ptr + row + at, mask=inside, other=0.0))
    if HAS_BIAS:
        u += widen(tl.load(bias_ptr + at, mask=inside, other=0.0))
    z = 0.7978845608028654 * (u + 0.044715 * u * u * u)
    y = u * tl.sigmoid(2 * z)
    tl.store(y_ptr + row + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@jit
def _gelu_backward(
    dx_ptr, sums_ptr, dy_ptr, x_ptr, bias_ptr, rows, columns, per_group,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    if HAS_BIAS:
        bias = widen(tl.load(bias_ptr + at, mask=inside, other=0.0))[None, :]
    first = tl.program_id(0).to(tl.int64) * per_group
    last = tl.minimum(first + per_group, rows)
    total = tl.zeros([ROWS, BLOCK], sums_ptr.dtype.element_ty)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        place = row[:, None] * columns + at[None, :]
        mask = (row < last)[:, None] & inside[None, :]
        u = widen(tl.load(x_ptr + place, mask=mask, other=0.0))
        if HAS_BIAS:
            u += bias
        z = 0.7978845608028654 * (u + 0.044715 * u * u * u)
        s = tl.sigmoid(2 * z)
        slope = s + u * s * (1 - s) * (2 * 0.7978845608028654) * (1 + 3 * 0.044715 * u * u)
        dx = widen(tl.load(dy_ptr + place, mask=mask, other=0.0)) * slope
        tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if HAS_BIAS:
            total += tl.where(mask, dx, 0.0)
    if HAS_BIAS:
        tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * columns + at, tl.sum(total, 0), mask=inside)


@jit
def _swiglu_forward(y_ptr, x_ptr, columns, BLOCK: tl.constexpr):
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    row = tl.program_id(0).to(tl.int64) * columns
    gate = widen(tl.load(x_ptr + 2 * row + at, mask=inside, other=0.0))
    up = widen(tl.load(x_ptr + 2 * row + columns + at, mask=inside, other=0.0))
    tl.store(y_ptr + row + at, (gate * tl.sigmoid(gate) * up).to(y_ptr.dtype.element_ty), mask=inside)


@jit
def _swiglu_backward(dx_ptr, dy_ptr, x_ptr, columns, BLOCK: tl.constexpr):
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    row = tl.program_id(0).to(tl.int64) * columns
    gate = widen(tl.load(x_ptr + 2 * row + at, mask=inside, other=0.0))
    up = widen(tl.load(x_ptr + 2 * row + columns + at, mask=inside, other=0.0))
    dy = widen(tl.load(dy_ptr + row + at, mask=inside, other=0.0))
    s = tl.sigmoid(gate)
    d_gate = dy * up * s * (1 + gate * (1 - s))
    tl.store(dx_ptr + 2 * row + at, d_gate.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dx_ptr + 2 * row + columns + at, (dy * gate * s).to(dx_ptr.dtype.element_ty), mask=inside)


def gelu_forward(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """``gelu(x + bias)``, without a gradient."""
    if not runs_triton(x):
        return gelu_reference(x, bias)
    y = _elementwise(_gelu_forward, x, x.shape[-1], [x, bias], HAS_BIAS=bias is not None)
    return y.view(x.shape)


def gelu_backward(dy: Tensor, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Gradients of ``x`` and of the bias, the second in promote(dtype, fp32)."""
    if not runs_triton(x):
        if bias is None:
            return torch.ops.aten.gelu_backward(dy, x, approximate="tanh"), None
        u = _wide(x) + _wide(bias)
        d_wide = torch.ops.aten.gelu_backward(dy.to(u.dtype), u, approximate="tanh")
        return d_wide.to(x.dtype), d_wide.flatten(0, -2).sum(0)
    x, dy, columns = x.contiguous(), dy.contiguous(), x.shape[-1]
    rows = x.numel() // max(columns, 1)
    chosen = settings(LAUNCH_SUM, architecture(x.device), x.element_size(), columns)
    per_group = max(chosen.constants["ROWS"], cdiv(rows, _GROUPS) if bias is not None else 0)
    groups = cdiv(rows, per_group)
    dx = torch.empty_like(x)
    sums = x.new_empty(groups if bias is not None else 0, columns, dtype=wide_dtype(x))
    if x.numel():
        with on_device(x):
            _gelu_backward[groups, cdiv(columns, chosen.constants["BLOCK"])](
                dx,
                sums,
                dy,
                x,
                None if bias is None else bias.contiguous(),
                rows,
                columns,
                per_group,
                HAS_BIAS=bias is not None,
                **chosen.options,
            )
    return dx, None if bias is None else sums.sum(0)


def swiglu_forward(x: Tensor) -> Tensor:
    """``silu(gate) * up``, without a gradient."""
    if not runs_triton(x):
        return swiglu_reference(x)
    columns = _half(x)
    return _elementwise(_swiglu_forward, x, columns, [x]).view(*x.shape[:-1], columns)


def swiglu_backward(dy: Tensor, x: Tensor) -> Tensor:
    """Gradient of ``x``."""
    if not runs_triton(x):
        wide, d_wide = _wide(x), _wide(dy)
        (gate, up), dx = wide.chunk(2, -1), torch.empty_like(wide)
        d_gate, d_up = dx.chunk(2, -1)
        torch.mul(torch.nn.functional.silu(gate), d_wide, out=d_up)
        d_gate.copy_(torch.ops.aten.silu_backward(d_wide * up, gate))
        return dx.to(x.dtype)
    return _elementwise(_swiglu_backward, x, _half(x), [dy, x], halves=2).view(x.shape)


def _half(x: Tensor) -> int:
    if x.shape[-1] % 2:
        raise ValueError(f"swiglu: the last dimension is {x.shape[-1]}, expected gate and up, an even number")
    return x.shape[-1] // 2


def _elementwise(
    kernel: Any, x: Tensor, columns: int, inputs: list[Tensor | None], halves: int = 1, **constants: Any
) -> Tensor:
    """Run a kernel over the rows of ``inputs``, ``columns`` results (twice, for ``halves``) a row."""
    rows = math.prod(x.shape[:-1])
    out = x.new_empty(rows, columns * halves)
    chosen = settings(LAUNCH, architecture(x.device), x.element_size(), columns)
    if out.numel():
        with on_device(x):
            kernel[rows, cdiv(columns, chosen.constants["BLOCK"])](
                out, *(None if each is None else each.contiguous() for each in inputs), columns,
                **constants, **chosen.options,
            )  # fmt: skip
    return out


@custom_op("megapoly::gelu", mutates_args=())
def _gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    return gelu_forward(x, bias)


@custom_op("megapoly::gelu_backward", mutates_args=())
def _gelu_gradient(dy: Tensor, x: Tensor, bias: Tensor | None) -> list[Tensor]:
    dx, d_bias = gelu_backward(dy, x, bias)
    return [dx] if d_bias is None else [dx, d_bias]


@custom_op("megapoly::swiglu", mutates_args=())
def _swiglu(x: Tensor) -> Tensor:
    return swiglu_forward(x)


@custom_op("megapoly::swiglu_backward", mutates_args=())
def _swiglu_gradient(dy: Tensor, x: Tensor) -> Tensor:
    return swiglu_backward(dy, x)


@_gelu.register_fake
def _(x: Tensor, bias: Tensor | None) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_gelu_gradient.register_fake
def _(dy: Tensor, x: Tensor, bias: Tensor | None) -> list[Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    wide = wide_dtype(x)
    return [dx] if bias is None else [dx, x.new_empty(x.shape[-1], dtype=wide)]


@_swiglu.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@_swiglu_gradient.register_fake
def _(dy: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _gelu_autograd(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, bias = ctx.saved_tensors
    dx, *rest = _gelu_gradient(dy, x, bias)
    return dx, rest[0].to(bias.dtype) if rest else None


def _swiglu_autograd(ctx: Any, dy: Tensor) -> Tensor:
    return _swiglu_gradient(dy, *ctx.saved_tensors)


_gelu.register_autograd(_gelu_autograd, setup_context=_keep)
_swiglu.register_autograd(_swiglu_autograd, setup_context=_keep)


def gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """``gelu(x + bias)``, tanh approximation, in the dtype of ``x``.

    Args:
        x: [..., N], any strides.
        bias: [N].

    Raises:
        ValueError: a bias of another shape.
    """
    if bias is not None and bias.shape != x.shape[-1:]:
        raise ValueError(f"gelu: bias has shape {tuple(bias.shape)}, expected [{x.shape[-1]}], the last dimension of x")
    return _gelu(x, bias)


def swiglu(x: Tensor) -> Tensor:
    """``silu(gate) * up`` [..., N] of ``x`` [..., 2 N], whose last dimension is gate, then up.

    Raises:
        ValueError: an odd last dimension.
    """
    _half(x)
    return _swiglu(x)


def variants(arch: int) -> Iterator[Variant]:
    """What is compiled ahead of time."""
    for itemsize, kind in ((2, "bf16"), (4, "fp32")):
        pointer, chosen, sums = (
            f"*{kind}",
            settings(LAUNCH, arch, itemsize, 8192),
            settings(LAUNCH_SUM, arch, itemsize, 8192),
        )
        for bias in (True, False):
            name = f"{'bias-' * bias}gelu {kind}"
            biased, no_bias = ({"bias_ptr": pointer}, {}) if bias else ({}, {"bias_ptr": None})
            types = {"y_ptr": pointer, "x_ptr": pointer, **biased, "columns": "i32"}
            yield Variant(f"{name} forward", _gelu_forward, types, {"HAS_BIAS": bias, **no_bias}, chosen)
            types = {each: pointer for each in ("dx_ptr", "dy_ptr", "x_ptr")} | biased
            types |= {"sums_ptr": "*fp32", "rows": "i32", "columns": "i32", "per_group": "i32"}
            yield Variant(f"{name} backward", _gelu_backward, types, {"HAS_BIAS": bias, **no_bias}, sums)
        types = {"y_ptr": pointer, "x_ptr": pointer, "columns": "i32"}
        yield Variant(f"swiglu {kind} forward", _swiglu_forward, types, {}, chosen)
        types = {"dx_ptr": pointer, "dy_ptr": pointer, "x_ptr": pointer, "columns": "i32"}
        yield Variant(f"swiglu {kind} backward", _swiglu_backward, types, {}, chosen)
