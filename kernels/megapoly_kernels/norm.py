"""LayerNorm and RMSNorm over the last dimension, with the residual added in the same pass.

Maths: ``h = x + residual``; LayerNorm is ``y = (h - mean) rstd weight + bias`` with ``rstd = 1 / sqrt(variance +
epsilon)`` (Ba et al., arXiv 1607.06450), RMSNorm ``y = h rstd weight`` with ``rstd = 1 / sqrt(mean(h^2) + epsilon)``
(Zhang and Sennrich, arXiv 1910.07467). With ``n = (h - mean) rstd``, or ``h rstd``, and ``g = dy weight`` the gradients
are ``dweight = sum(dy n)``, ``dbias = sum(dy)`` over rows, and of h ``rstd (g - n mean(g n) - mean(g))``, of whose
terms RMSNorm lacks the last, plus the gradient that comes into h from elsewhere.

Shapes: ``x`` and ``residual`` are [..., N], any N, any strides: rows whose elements lie side by side are read where
they are, all else is copied. ``weight`` and ``bias`` are [N]. Statistics are [..., 1].
Dtypes: any floats, also mixed. ``h`` has promote(x, residual) and is rounded before it is normed; ``y`` has the
weight's, so that an fp32 residual stream enters a lower-precision layer here. Arithmetic, statistics and gradients of
weight and bias are in promote(h, weight, fp32).
Gradients: kept are ``h`` (or ``x``), the weight and the statistics. Weight gradients are summed over groups of rows,
then over groups, in a fixed order: the same bits every time on one kind of device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from megapoly_kernels import norm_cuda
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
)

# By elements of a row. The last row of every table is for rows that go in blocks, in two passes.
_ANY = 1 << 30
LAUNCH: Table = {
    **{
        (80, itemsize, block): Launch({"ROWS": rows, "BLOCK": block}, warps=warps)
        for itemsize in (2, 4)
        for rows, block, warps in ((8, 256, 4), (2, 1024, 4), (1, 2048, 4), (1, 4096, 8), (1, 8192, 8), (1, 16384, 16))
    },
    **{
        (80, 8, block): Launch({"ROWS": rows, "BLOCK": block}, warps=warps)
        for rows, block, warps in ((4, 256, 4), (1, 1024, 4), (1, 4096, 8))
    },
    (80, 2, _ANY): Launch({"BLOCK": 8192}, warps=16),
    (80, 4, _ANY): Launch({"BLOCK": 8192}, warps=16),
    (80, 8, _ANY): Launch({"BLOCK": 2048}, warps=8),
}
# AGAIN: the weight is read for every row, where it would take the registers that would spill.
LAUNCH_BACKWARD: Table = {
    **{
        (80, itemsize, block): Launch({"ROWS": rows, "BLOCK": block, "STAGES": stages, "AGAIN": again}, warps=warps)
        for itemsize, rows, block, warps, stages, again in (
            (2, 8, 256, 4, 2, 0), (2, 2, 1024, 4, 2, 0), (2, 1, 2048, 4, 2, 0), (2, 1, 4096, 8, 2, 0),
            (2, 1, 8192, 16, 2, 0),
            (4, 8, 256, 4, 2, 0), (4, 2, 1024, 4, 2, 0), (4, 1, 2048, 8, 2, 0), (4, 1, 4096, 16, 2, 0),
            (4, 1, 8192, 16, 2, 1),
            (8, 2, 256, 4, 1, 0), (8, 1, 1024, 8, 1, 0), (8, 1, 2048, 8, 1, 0),
        )
    },
    (80, 2, _ANY): Launch({"BLOCK": 8192}, warps=16),
    (80, 4, _ANY): Launch({"BLOCK": 8192}, warps=16),
    (80, 8, _ANY): Launch({"BLOCK": 2048}, warps=8),
}  # fmt: skip
# The gradients of weight and bias where a row does not fit: tiles of some rows and columns.
LAUNCH_SUM: Table = {
    (80, 2, _ANY): Launch({"ROWS": 8, "BLOCK": 256}, warps=4),
    (80, 4, _ANY): Launch({"ROWS": 8, "BLOCK": 256}, warps=4),
    (80, 8, _ANY): Launch({"ROWS": 8, "BLOCK": 128}, warps=4),
}


def layer_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, epsilon: float = 1e-5
) -> Any:
    """:func:`layer_norm` in PyTorch."""
    h = x if residual is None else x + residual
    wide = _wide(h, weight)
    b = None if bias is None else bias.to(wide)
    y = torch.nn.functional.layer_norm(h.to(wide), weight.shape, weight.to(wide), b, epsilon).to(weight.dtype)
    return y if residual is None else (y, h)


def rms_norm_reference(x: Tensor, weight: Tensor, residual: Tensor | None = None, epsilon: float = 1e-6) -> Any:
    """:func:`rms_norm` in PyTorch."""
    h = x if residual is None else x + residual
    wide = _wide(h, weight)
    y = torch.nn.functional.rms_norm(h.to(wide), weight.shape, weight.to(wide), epsilon).to(weight.dtype)
    return y if residual is None else (y, h)


def _wide(h: Tensor, weight: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(h.dtype, weight.dtype), torch.float32)


@jit
def _forward(
    y_ptr, h_ptr, mean_ptr, rstd_ptr, x_ptr, residual_ptr, weight_ptr, bias_ptr,
    rows, columns, x_stride, residual_stride,
    CENTRED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, EPSILON: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    wide = rstd_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    mask = (row < rows)[:, None] & inside[None, :]
    place = row[:, None] * columns + at[None, :]
    h = tl.load(x_ptr + row[:, None] * x_stride + at[None, :], mask=mask, other=0.0).to(wide)
    if HAS_RESIDUAL:
        h += tl.load(residual_ptr + row[:, None] * residual_stride + at[None, :], mask=mask, other=0.0).to(wide)
        rounded = h.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + place, rounded, mask=mask)
        h = rounded.to(wide)
    if CENTRED:
        mean = tl.sum(h, 1) / columns
        tl.store(mean_ptr + row, mean, mask=row < rows)
        h = tl.where(mask, h - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(h * h, 1) / columns + EPSILON)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    y = h * rstd[:, None] * tl.load(weight_ptr + at, mask=inside, other=0.0).to(wide)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + at, mask=inside, other=0.0).to(wide)[None, :]
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=mask)


@jit
def _forward_long(
    y_ptr, h_ptr, mean_ptr, rstd_ptr, x_ptr, residual_ptr, weight_ptr, bias_ptr,
    rows, columns, x_stride, residual_stride,
    CENTRED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, EPSILON: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    wide = rstd_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    y_ptr += row * columns
    if HAS_RESIDUAL:
        residual_ptr += row * residual_stride
        h_ptr += row * columns
    mean = tl.full((), 0.0, wide)
    squares = tl.full((), 0.0, wide)  # of distances from the mean
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < columns
        h = tl.load(x_ptr + at, mask=inside, other=0.0).to(wide)
        if HAS_RESIDUAL:
            h += tl.load(residual_ptr + at, mask=inside, other=0.0).to(wide)
            rounded = h.to(h_ptr.dtype.element_ty)
            tl.store(h_ptr + at, rounded, mask=inside)
            h = rounded.to(wide)
        if CENTRED:
            # Means and squares of parts are put together as Chan et al. do (Updating formulae, 1979), which stays exact
            # where the mean is far from zero.
            count = tl.minimum(columns - start, BLOCK)
            part = tl.sum(h, 0) / count
            share = count.to(wide) / (start + count)
            h = tl.where(inside, h - part, 0.0)
            squares += (part - mean) * (part - mean) * share * start
            mean += (part - mean) * share
        squares += tl.sum(h * h, 0)
    rstd = tl.rsqrt(squares / columns + EPSILON)
    tl.store(rstd_ptr + row, rstd)
    if CENTRED:
        tl.store(mean_ptr + row, mean)
    if HAS_RESIDUAL:
        tl.debug_barrier()  # h is read by other threads than those that wrote it
        x_ptr = h_ptr
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < columns
        y = (tl.load(x_ptr + at, mask=inside, other=0.0).to(wide) - mean) * rstd
        y *= tl.load(weight_ptr + at, mask=inside, other=0.0).to(wide)
        if HAS_BIAS:
            y += tl.load(bias_ptr + at, mask=inside, other=0.0).to(wide)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@jit
def _backward(
    dh_ptr, dx_ptr, sums_ptr, dy_ptr, h_ptr, weight_ptr, mean_ptr, rstd_ptr, into_ptr,
    rows, columns, dy_stride, h_stride, into_stride, per_group,
    CENTRED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INTO: tl.constexpr, HAS_DX: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    wide = sums_ptr.dtype.element_ty
    at = tl.arange(0, BLOCK)
    inside = at < columns
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(wide)[None, :]
    d_weight = tl.zeros([ROWS, BLOCK], wide)
    d_bias = tl.zeros([ROWS, BLOCK], wide)
    first = tl.program_id(0).to(tl.int64) * per_group
    last = tl.minimum(first + per_group, rows)
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS).to(tl.int64)  # the interpreter has no width for start
        mask = (row < last)[:, None] & inside[None, :]
        n = tl.load(h_ptr + row[:, None] * h_stride + at[None, :], mask=mask, other=0.0).to(wide)
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + at[None, :], mask=mask, other=0.0).to(wide)
        rstd = tl.load(rstd_ptr + row, mask=row < last, other=0.0)[:, None]
        if CENTRED:
            n -= tl.load(mean_ptr + row, mask=row < last, other=0.0)[:, None]
        n *= rstd
        d_weight += dy * n
        if AGAIN:
            weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(wide)[None, :]
        g = dy * weight
        dh = g - n * (tl.sum(g * n, 1) / columns)[:, None]
        if CENTRED:
            dh -= (tl.sum(g, 1) / columns)[:, None]
        if HAS_BIAS:
            d_bias += dy
        dh *= rstd
        if HAS_INTO:
            dh += tl.load(into_ptr + row[:, None] * into_stride + at[None, :], mask=mask, other=0.0).to(wide)
        place = row[:, None] * columns + at[None, :]
        tl.store(dh_ptr + place, dh.to(dh_ptr.dtype.element_ty), mask=mask)
        if HAS_DX:
            tl.store(dx_ptr + place, dh.to(dx_ptr.dtype.element_ty), mask=mask)
    sums_ptr += tl.program_id(0).to(tl.int64) * columns
    tl.store(sums_ptr + at, tl.sum(d_weight, 0), mask=inside)
    if HAS_BIAS:
        tl.store(sums_ptr + tl.num_programs(0).to(tl.int64) * columns + at, tl.sum(d_bias, 0), mask=inside)


@jit
def _backward_long(
    dh_ptr, dx_ptr, dy_ptr, h_ptr, weight_ptr, mean_ptr, rstd_ptr, into_ptr,
    columns, dy_stride, h_stride, into_stride,
    CENTRED: tl.constexpr, HAS_INTO: tl.constexpr, HAS_DX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    wide = rstd_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    rstd = tl.load(rstd_ptr + row)
    mean = tl.full((), 0.0, wide)
    if CENTRED:
        mean = tl.load(mean_ptr + row)
    h_ptr += row * h_stride
    dy_ptr += row * dy_stride
    along = tl.full((), 0.0, wide)
    level = tl.full((), 0.0, wide)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < columns
        n = (tl.load(h_ptr + at, mask=inside, other=0.0).to(wide) - mean) * rstd
        g = tl.load(dy_ptr + at, mask=inside, other=0.0).to(wide)
        g *= tl.load(weight_ptr + at, mask=inside, other=0.0).to(wide)
        along += tl.sum(g * n, 0)
        if CENTRED:
            level += tl.sum(g, 0)
    along /= columns
    level /= columns
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < columns
        n = (tl.load(h_ptr + at, mask=inside, other=0.0).to(wide) - mean) * rstd
        g = tl.load(dy_ptr + at, mask=inside, other=0.0).to(wide)
        g *= tl.load(weight_ptr + at, mask=inside, other=0.0).to(wide)
        dh = (g - n * along - level) * rstd
        if HAS_INTO:
            dh += tl.load(into_ptr + row * into_stride + at, mask=inside, other=0.0).to(wide)
        tl.store(dh_ptr + row * columns + at, dh.to(dh_ptr.dtype.element_ty), mask=inside)
        if HAS_DX:
            tl.store(dx_ptr + row * columns + at, dh.to(dx_ptr.dtype.element_ty), mask=inside)


@jit
def _weight_long(
    sums_ptr, dy_ptr, h_ptr, mean_ptr, rstd_ptr, rows, columns, dy_stride, h_stride, per_group,
    CENTRED: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    wide = sums_ptr.dtype.element_ty
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    d_weight = tl.zeros([ROWS, BLOCK], wide)
    d_bias = tl.zeros([ROWS, BLOCK], wide)
    first = tl.program_id(0).to(tl.int64) * per_group
    last = tl.minimum(first + per_group, rows)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)  # the interpreter has no width for start
        mask = (row < last)[:, None] & inside[None, :]
        n = tl.load(h_ptr + row[:, None] * h_stride + at[None, :], mask=mask, other=0.0).to(wide)
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + at[None, :], mask=mask, other=0.0).to(wide)
        if CENTRED:
            n -= tl.load(mean_ptr + row, mask=row < last, other=0.0)[:, None]
        d_weight += dy * n * tl.load(rstd_ptr + row, mask=row < last, other=0.0)[:, None]
        if HAS_BIAS:
            d_bias += dy
    sums_ptr += tl.program_id(0).to(tl.int64) * columns
    tl.store(sums_ptr + at, tl.sum(d_weight, 0), mask=inside)
    if HAS_BIAS:
        tl.store(sums_ptr + tl.num_programs(0).to(tl.int64) * columns + at, tl.sum(d_bias, 0), mask=inside)


def layer_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, epsilon: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``y``, ``h`` (which is ``x`` where there is no residual), mean and rstd, without a gradient."""
    if runs_triton(x):
        y, h, mean, rstd = _launch_forward(x, weight, bias, residual, epsilon, True)
        assert mean is not None
        return y, h, mean, rstd
    h = x if residual is None else (x + residual).contiguous()
    wide = _wide(h, weight)
    b = None if bias is None else bias.to(wide)
    y, mean, rstd = torch.native_layer_norm(h.to(wide), weight.shape, weight.to(wide), b, epsilon)
    return y.to(weight.dtype), h, mean, rstd


def layer_norm_backward(
    dy: Tensor,
    h: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dh: Tensor | None = None,
    has_bias: bool = True,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of ``x``, the residual, the weight and the bias, the last two in promote(h, weight, fp32).

    Args:
        dy: gradient of ``y``, any float.
        h, mean, rstd: of :func:`layer_norm_forward`.
        dh: gradient of ``h`` from elsewhere, which is added.
        dtype: of ``x``; h's where not given. Where it is h's, the first two results are one tensor.
    """
    if runs_triton(h):
        return _launch_backward(dy, h, weight, mean, rstd, dh, has_bias, dtype)
    wide = rstd.dtype
    w = weight.to(wide)
    # Of the bias, PyTorch takes the shape alone.
    d_wide, dw, db = torch.ops.aten.native_layer_norm_backward(
        dy.to(wide), h.to(wide), w.shape, mean, rstd, w, w, [True, True, has_bias]
    )
    return *_rounded(d_wide, h, dh, dtype), dw, db if has_bias else None


def rms_norm_forward(
    x: Tensor, weight: Tensor, residual: Tensor | None = None, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """``y``, ``h`` (which is ``x`` where there is no residual) and rstd, without a gradient."""
    if runs_triton(x):
        y, h, _, rstd = _launch_forward(x, weight, None, residual, epsilon, False)
        return y, h, rstd
    h = x if residual is None else (x + residual).contiguous()
    wide = h.contiguous().to(_wide(h, weight))
    rstd = wide.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()
    return (wide * rstd).mul_(weight).to(weight.dtype), h, rstd


def rms_norm_backward(
    dy: Tensor,
    h: Tensor,
    weight: Tensor,
    rstd: Tensor,
    dh: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x``, the residual and the weight; see :func:`layer_norm_backward`."""
    if runs_triton(h):
        return _launch_backward(dy, h, weight, None, rstd, dh, False, dtype)[:3]
    g, normed = dy.contiguous().to(rstd.dtype), h.contiguous().to(rstd.dtype) * rstd
    dw = (g * normed).flatten(0, -2).sum(0)
    g = g * weight
    d_wide = (g - normed * (g * normed).mean(-1, keepdim=True)).mul_(rstd)
    return *_rounded(d_wide, h, dh, dtype), dw


def _rounded(d_wide: Tensor, h: Tensor, dh: Tensor | None, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the residual, each rounded once."""
    if dh is not None:
        d_wide = d_wide + dh
    d_residual = d_wide.to(h.dtype)
    return d_residual if dtype in (None, h.dtype) else d_wide.to(dtype), d_residual


def _rows(x: Tensor) -> Tensor:
    """[rows, N], a view where rows lie at equal distances and their elements side by side."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _step(rows: Tensor | None) -> int:
    return 0 if rows is None else rows.stride(0)


def _launch_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, epsilon: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    wide = _wide(x if residual is None else x.new_empty(0, dtype=torch.promote_types(x.dtype, residual.dtype)), weight)
    y = x.new_empty(x.shape, dtype=weight.dtype)
    h = x if residual is None else x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    rstd = x.new_empty(*x.shape[:-1], 1, dtype=wide)
    mean = torch.empty_like(rstd) if centred else None
    if y.numel():
        x_RN, arch = _rows(x), architecture(x.device)
        residual_RN = None if residual is None else _rows(residual)
        rows, columns = x_RN.shape
        if norm_cuda.takes(norm_cuda.FORWARD, arch, h.element_size(), columns):
            outputs = (y, None if residual is None else h, mean, rstd)
            norm_cuda.forward(x_RN, weight, bias, residual_RN, outputs, epsilon)
            return y, h, mean, rstd
        chosen = settings(LAUNCH, arch, h.element_size(), columns)
        kernel = _forward if "ROWS" in chosen.constants else _forward_long
        with on_device(x):
            kernel[(cdiv(rows, chosen.constants.get("ROWS", 1)),)](
                y, h, mean, rstd, x_RN, residual_RN, weight.contiguous(), None if bias is None else bias.contiguous(),
                rows, columns, _step(x_RN), _step(residual_RN),
                CENTRED=centred, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, EPSILON=epsilon,
                **chosen.options,
            )  # fmt: skip
    return y, h, mean, rstd


def _groups(x: Tensor, rows: int, at_once: int, warps: int) -> tuple[int, int]:
    """Rows of a program that keeps sums, and how many programs: as many as run at a time."""
    together = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    per_group = at_once * cdiv(cdiv(rows, at_once), together * max(1, 16 // warps))
    return per_group, cdiv(rows, per_group)


def _launch_backward(
    dy: Tensor,
    h: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    into: Tensor | None,
    has_bias: bool,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    d_residual = torch.empty_like(h, memory_format=torch.contiguous_format)
    dx = d_residual if dtype in (None, h.dtype) else torch.empty_like(d_residual, dtype=dtype)
    h_RN, dy_RN, into_RN = _rows(h), _rows(dy), None if into is None else _rows(into)
    rows, columns = h_RN.shape
    if not h.numel():
        return dx, d_residual, rstd.new_zeros(columns), rstd.new_zeros(columns) if has_bias else None
    arch = architecture(h.device)
    if norm_cuda.takes(norm_cuda.BACKWARD, arch, h.element_size(), columns):
        inputs = (dy_RN, h_RN, into_RN)
        return dx, d_residual, *norm_cuda.backward(inputs, weight, mean, rstd, (dx, d_residual), has_bias)
    chosen = settings(LAUNCH_BACKWARD, arch, h.element_size(), columns)
    whole = "ROWS" in chosen.constants
    summing = chosen if whole else settings(LAUNCH_SUM, arch, h.element_size(), columns)
    per_group, groups = _groups(h, rows, summing.constants["ROWS"], summing.warps)
    sums = rstd.new_empty(1 + has_bias, groups, columns)
    weight = weight.contiguous()
    flags: dict[str, bool] = {"CENTRED": mean is not None, "HAS_INTO": into is not None, "HAS_DX": dx is not d_residual}
    with on_device(h):
        if whole:
            _backward[(groups,)](
                d_residual, dx, sums, dy_RN, h_RN, weight, mean, rstd, into_RN,
                rows, columns, _step(dy_RN), _step(h_RN), _step(into_RN), per_group,
                HAS_BIAS=has_bias, **flags, **chosen.options,
            )  # fmt: skip
        else:
            _backward_long[(rows,)](
                d_residual, dx, dy_RN, h_RN, weight, mean, rstd, into_RN,
                columns, _step(dy_RN), _step(h_RN), _step(into_RN), **flags, **chosen.options,
            )  # fmt: skip
            _weight_long[groups, cdiv(columns, summing.constants["BLOCK"])](
                sums, dy_RN, h_RN, mean, rstd, rows, columns, _step(dy_RN), _step(h_RN), per_group,
                CENTRED=mean is not None, HAS_BIAS=has_bias, **summing.options,
            )  # fmt: skip
    # Two sums, since results of an operator may not share memory.
    return dx, d_residual, sums[0].sum(0), sums[1].sum(0) if has_bias else None


@custom_op("megapoly::norm", mutates_args=())
def _norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, epsilon: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, h, mean and rstd; h and the mean are empty where there are none."""
    if centred:
        y, h, mean, rstd = layer_norm_forward(x, weight, bias, residual, epsilon)
    else:
        y, h, rstd = rms_norm_forward(x, weight, residual, epsilon)
        mean = rstd.new_empty(0)
    return y, x.new_empty(0) if residual is None else h, mean, rstd


@_norm.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, epsilon: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    h = x.new_empty(0 if residual is None else x.shape, dtype=dtype)
    rstd = x.new_empty(*x.shape[:-1], 1, dtype=_wide(h, weight))
    return x.new_empty(x.shape, dtype=weight.dtype), h, rstd.new_empty(rstd.shape if centred else 0), rstd


@custom_op("megapoly::norm_backward", mutates_args=())
def _norm_gradient(
    dy: Tensor,
    h: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    dh: Tensor | None,
    has_bias: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the residual, x, the weight and the bias; empty is x's that is the residual's, or a bias's."""
    d_bias: Tensor | None = None
    if mean is not None:
        dx, d_residual, d_weight, d_bias = layer_norm_backward(dy, h, weight, mean, rstd, dh, has_bias, dtype)
    else:
        dx, d_residual, d_weight = rms_norm_backward(dy, h, weight, rstd, dh, dtype)
    return (
        d_residual,
        h.new_empty(0, dtype=dtype) if dx is d_residual else dx,
        d_weight,
        rstd.new_empty(0) if d_bias is None else d_bias,
    )


@_norm_gradient.register_fake
def _(
    dy: Tensor,
    h: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    dh: Tensor | None,
    has_bias: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        h.new_empty(h.shape),
        h.new_empty(0 if dtype == h.dtype else h.shape, dtype=dtype),
        rstd.new_empty(weight.shape),
        rstd.new_empty(weight.shape if has_bias else 0),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, residual, _, centred = inputs
    _, h, mean, rstd = output
    ctx.save_for_backward(x if residual is None else h, weight, mean if centred else None, rstd)
    ctx.dtype = x.dtype
    ctx.residual = None if residual is None else residual.dtype
    ctx.bias = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _norm_autograd(ctx: Any, dy: Tensor | None, dh: Tensor | None, *statistics: None) -> tuple[Tensor | None, ...]:
    h, weight, mean, rstd = ctx.saved_tensors
    if dy is None:
        dy = h.new_zeros(h.shape, dtype=weight.dtype)
    dh = None if ctx.residual is None else dh
    d_residual, dx, d_weight, d_bias = _norm_gradient(dy, h, weight, mean, rstd, dh, ctx.bias is not None, ctx.dtype)
    return (
        d_residual if ctx.dtype == h.dtype else dx,
        d_weight.to(weight.dtype),
        None if ctx.bias is None else d_bias.to(ctx.bias),
        None if ctx.residual is None else d_residual.to(ctx.residual),
        None,
        None,
    )


_norm.register_autograd(_norm_autograd, setup_context=_keep)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, epsilon: float = 1e-5
) -> Any:
    """LayerNorm of ``h = x + residual``, or of ``x``, over the last dimension; in the weight's dtype.

    Args:
        x: [..., N], any strides.
        weight, bias: [N].
        residual: as ``x``; may have another dtype, such as fp32.

    Returns:
        ``y``; with a residual ``(y, h)``, h in promote(x, residual).

    Raises:
        ValueError: a shape that does not fit.
    """
    _fits("layer_norm", x, weight, bias, residual)
    y, h, _, _ = _norm(x, weight, bias, residual, epsilon, True)
    return y if residual is None else (y, h)


def rms_norm(x: Tensor, weight: Tensor, residual: Tensor | None = None, epsilon: float = 1e-6) -> Any:
    """RMSNorm of ``h = x + residual``, or of ``x``; otherwise as :func:`layer_norm`."""
    _fits("rms_norm", x, weight, None, residual)
    y, h, _, _ = _norm(x, weight, None, residual, epsilon, False)
    return y if residual is None else (y, h)


def _fits(name: str, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    for what, each in (("weight", weight), ("bias", bias)):
        if each is not None and each.shape != x.shape[-1:]:
            found = f"{what} has shape {tuple(each.shape)}"
            raise ValueError(f"{name}: {found}, expected [{x.shape[-1]}], the last dimension of x")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"{name}: residual has shape {tuple(residual.shape)}, expected {tuple(x.shape)}, as x has")


def variants(arch: int) -> Iterator[Variant]:
    """What is compiled ahead of time."""
    for itemsize, kind, sizes, rms in (
        (2, "bf16", (128, 1024, 2048, 4096, 8192, 16384, 65536), (8192, 65536)),
        (4, "fp32", (4096, 8192, 16384, 65536), (8192,)),
        (8, "fp64", (4096,), ()),
    ):
        for columns in sizes:
            for centred in (True, False) if columns in rms else (True,):
                yield from _variants(arch, itemsize, kind, columns, centred)


def _variants(arch: int, itemsize: int, kind: str, columns: int, centred: bool) -> Iterator[Variant]:
    """With all that a norm may have. The residual of fp32 is of a bf16 stream."""
    name, low = f"{'layer' if centred else 'rms'}-norm {kind} {columns}", "*bf16" if kind == "fp32" else f"*{kind}"
    wide, stream = "*fp64" if kind == "fp64" else "*fp32", f"*{kind}"
    statistics = {"rstd_ptr": wide, **({"mean_ptr": wide} if centred else {})}
    no_mean = {} if centred else {"mean_ptr": None}
    counts = {each: "i32" for each in ("rows", "columns", "x_stride", "residual_stride")}
    bias = {"bias_ptr": low} if centred else {}
    types = {"y_ptr": low, "h_ptr": stream, "x_ptr": low, "residual_ptr": stream, "weight_ptr": low, **bias}
    constants = {"CENTRED": centred, "HAS_BIAS": centred, "HAS_RESIDUAL": True, "EPSILON": 1e-5, **no_mean}
    constants |= {} if centred else {"bias_ptr": None}
    chosen = settings(LAUNCH, arch, itemsize, columns)
    kernel = _forward if "ROWS" in chosen.constants else _forward_long
    yield Variant(f"{name} forward", kernel, {**types, **statistics, **counts}, constants, chosen)

    chosen = settings(LAUNCH_BACKWARD, arch, itemsize, columns)
    if columns == 16384:  # as of 65536
        return
    types = {"dh_ptr": stream, "dx_ptr": low, "dy_ptr": low, "h_ptr": stream, "weight_ptr": low, "into_ptr": stream}
    counts = {each: "i32" for each in ("columns", "dy_stride", "h_stride", "into_stride")}
    constants = {"CENTRED": centred, "HAS_INTO": True, "HAS_DX": kind == "fp32", **no_mean}
    sums = {"sums_ptr": wide, "rows": "i32", "per_group": "i32"}
    odd = frozenset({"per_group"})
    if "ROWS" in chosen.constants:
        all_types = {**types, **statistics, **counts, **sums}
        yield Variant(f"{name} backward", _backward, all_types, {**constants, "HAS_BIAS": centred}, chosen, odd=odd)
        return
    yield Variant(f"{name} backward", _backward_long, {**types, **statistics, **counts}, constants, chosen)
    types = {"dy_ptr": low, "h_ptr": stream, **statistics, **sums}
    types |= {each: "i32" for each in ("columns", "dy_stride", "h_stride")}
    constants = {"CENTRED": centred, "HAS_BIAS": centred, **no_mean}
    chosen = settings(LAUNCH_SUM, arch, itemsize, columns)
    yield Variant(f"{name} backward, weight", _weight_long, types, constants, chosen, odd=odd)
