"""The norms' kernels in Triton: a row is read once where it fits in registers, and in blocks, twice, where it does not.

Maths, shapes and dtypes are those of :mod:`megapoly_kernels.norm`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megapoly_kernels.launch import (
    Launch,
    Table,
    Variant,
    architecture,
    cdiv,
    jit,
    on_device,
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
        for rows, block, warps in ((4, 256, 4), (2, 1024, 4), (1, 4096, 8))
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


def _step(rows: Tensor | None) -> int:
    return 0 if rows is None else rows.stride(0)


def _groups(x: Tensor, rows: int, at_once: int, warps: int) -> tuple[int, int]:
    """Rows of a program that keeps sums, and how many programs: as many as run at a time."""
    together = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    per_group = at_once * cdiv(cdiv(rows, at_once), together * max(1, 16 // warps))
    return per_group, cdiv(rows, per_group)


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
    rows, columns = x.shape
    chosen = settings(LAUNCH, architecture(x.device), (x if h is None else h).element_size(), columns)
    kernel = _forward if "ROWS" in chosen.constants else _forward_long
    with on_device(x):
        kernel[(cdiv(rows, chosen.constants.get("ROWS", 1)),)](
            y, h, mean, rstd, x, residual, weight.contiguous(), None if bias is None else bias.contiguous(),
            rows, columns, _step(x), _step(residual),
            CENTRED=mean is not None, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, EPSILON=epsilon,
            **chosen.options,
        )  # fmt: skip


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
    rows, columns = h.shape
    arch = architecture(h.device)
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
                d_residual, dx, sums, dy, h, weight, mean, rstd, into,
                rows, columns, _step(dy), _step(h), _step(into), per_group,
                HAS_BIAS=has_bias, **flags, **chosen.options,
            )  # fmt: skip
        else:
            _backward_long[(rows,)](
                d_residual, dx, dy, h, weight, mean, rstd, into,
                columns, _step(dy), _step(h), _step(into), **flags, **chosen.options,
            )  # fmt: skip
            _weight_long[groups, cdiv(columns, summing.constants["BLOCK"])](
                sums, dy, h, mean, rstd, rows, columns, _step(dy), _step(h), per_group,
                CENTRED=mean is not None, HAS_BIAS=has_bias, **summing.options,
            )  # fmt: skip
    # Two sums, since results of an operator may not share memory.
    return sums[0].sum(0), sums[1].sum(0) if has_bias else None


def variants(arch: int) -> Iterator[Variant]:
    """What is compiled ahead of time."""
    for itemsize, kind, sizes, rms in (
        (2, "bf16", (128, 1024, 2048, 4096, 8192, 16384, 65536), (8192, 65536)),
        (4, "fp32", (128, 1024, 2048, 4096, 8192, 16384, 65536), (8192,)),
        (8, "fp64", (128, 1024, 2048, 4096, 65536), ()),
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
