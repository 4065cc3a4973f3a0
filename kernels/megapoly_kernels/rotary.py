"""Rotary position embedding: pairs of channels of queries and keys turned by angles of their position.

Maths (Su et al., arXiv 2104.09864): channel ``i`` of a head of ``D`` is paired with ``i + D / 2``, and
``(x, y) -> (x cos - y sin, y cos + x sin)``. The gradient is turned the other way, by the same kernel.

Shapes: ``qkv`` [S, B, G N D], where each of G groups has N heads, of which the last is the value and is copied, with a
table [2, S, B, 1, 1, D / 2] of cosines and sines; or ``x`` [..., heads, D] with cosines and sines [..., D / 2].
Any strides; channels that are not next to each other are copied first.
Dtypes: any float; tables are fp32 or wider; arithmetic is in promote(dtype, fp32), and results are rounded once.
Gradients: the table alone is kept, and gets none.
"""

from __future__ import annotations

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
    two_leads,
    wide_dtype,
    widen,
)

# By half of a head's channels; HEADS of a token are one program's.
LAUNCH: Table = {
    (80, 2, 32): Launch({"HEADS": 32}, warps=4),
    (80, 2, 64): Launch({"HEADS": 16}, warps=4),
    (80, 2, 128): Launch({"HEADS": 8}, warps=4),
    (80, 2, 512): Launch({"HEADS": 2}, warps=4),
    (80, 4, 32): Launch({"HEADS": 16}, warps=4),
    (80, 4, 64): Launch({"HEADS": 8}, warps=4),
    (80, 4, 128): Launch({"HEADS": 4}, warps=4),
    (80, 4, 512): Launch({"HEADS": 1}, warps=4),
    (80, 8, 512): Launch({"HEADS": 1}, warps=4),
}
_ALL = 1 << 30  # heads of a group where none is a value


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor, per_group: int = _ALL, sign: int = 1) -> Tensor:
    """Heads of ``x`` [R, Q, heads, D] turned by angles of ``cos`` and ``sin`` [R, Q, D / 2], in PyTorch.

    Where heads come in groups, the last of each is copied. ``sign`` -1 turns back.
    """
    result = x.clone(memory_format=torch.contiguous_format)
    _turn_reference(result, cos, sin, per_group, sign)
    return result


def _turn_reference(x: Tensor, cos: Tensor, sin: Tensor, per_group: int, sign: int) -> None:
    rows, columns, heads, dim = x.shape
    grouped = heads >= per_group
    groups = heads // per_group if grouped else 1
    pairs = x.view(rows, columns, groups, heads // max(groups, 1), 2, dim // 2)
    if grouped:
        pairs = pairs[:, :, :, :-1]
    wide = wide_dtype(x)
    cos, sin = (table[:, :, None, None].to(wide) for table in (cos, sin))
    a, b = (pairs[..., i, :].to(wide) for i in range(2))
    turned_a, turned_b = a * cos - b * (sin * sign), b * cos + a * (sin * sign)
    pairs[..., 0, :] = turned_a
    pairs[..., 1, :] = turned_b


@jit
def _rotary(
    out_ptr, x_ptr, cos_ptr, sin_ptr, columns, heads, per_group,
    out_row, out_column, out_head, x_row, x_column, x_head, cos_row, cos_column, sin_row, sin_column,
    SIGN: tl.constexpr, IN_PLACE: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row, column = token // columns, token % columns
    channel = tl.arange(0, BLOCK)
    there = channel < HALF
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_value = (head % per_group == per_group - 1)[:, None]
    inside = (head < heads)[:, None] & there[None, :]
    if IN_PLACE:
        inside &= is_value == 0
    cos = widen(tl.load(cos_ptr + row * cos_row + column * cos_column + channel, mask=there, other=0.0))
    sin = widen(tl.load(sin_ptr + row * sin_row + column * sin_column + channel, mask=there, other=0.0)) * SIGN
    at = x_ptr + row * x_row + column * x_column + head.to(tl.int64)[:, None] * x_head + channel[None, :]
    a = tl.load(at, mask=inside, other=0.0)
    b = tl.load(at + HALF, mask=inside, other=0.0)
    wide_a, wide_b = widen(a), widen(b)
    wide: tl.constexpr = wide_a.dtype
    cos, sin = cos.to(wide)[None, :], sin.to(wide)[None, :]
    kind: tl.constexpr = out_ptr.dtype.element_ty
    turned_a = tl.where(is_value, a, (wide_a * cos - wide_b * sin).to(kind))
    turned_b = tl.where(is_value, b, (wide_b * cos + wide_a * sin).to(kind))
    to = out_ptr + row * out_row + column * out_column + head.to(tl.int64)[:, None] * out_head + channel[None, :]
    tl.store(to, turned_a, mask=inside)
    tl.store(to + HALF, turned_b, mask=inside)


def rotary_forward(
    x: Tensor, cos: Tensor, sin: Tensor, per_group: int = _ALL, sign: int = 1, in_place: bool = False
) -> Tensor:
    """Like :func:`rotary_reference`, without a gradient.

    Args:
        in_place: write over ``x``, whose channels have to be next to each other, and return it: nothing is allocated,
            and values are not even read. It is for the inside of an autograd function, where nothing else needs ``x``.
    """
    if in_place and x.stride(-1) != 1:
        raise ValueError(f"rotary: channels have stride {x.stride(-1)}, expected 1 for the result to be in place")
    if not runs_triton(x):
        if not in_place:
            return rotary_reference(x, cos, sin, per_group, sign)
        _turn_reference(x, cos, sin, per_group, sign)
        return x
    x, cos, sin = (each if each.stride(-1) == 1 else each.contiguous() for each in (x, cos, sin))
    rows, columns, heads, dim = x.shape
    out = x if in_place else x.new_empty(x.shape)
    chosen = settings(LAUNCH, architecture(x.device), x.element_size(), dim // 2)
    if out.numel():
        with on_device(x):
            _rotary[rows * columns, cdiv(heads, chosen.constants["HEADS"])](
                out, x, cos, sin, columns, heads, per_group,
                *out.stride()[:3], *x.stride()[:3], *cos.stride()[:2], *sin.stride()[:2],
                SIGN=sign, IN_PLACE=in_place, **_block(dim // 2), **chosen.options,
            )  # fmt: skip
    return out


def _block(half: int) -> dict[str, int]:
    return {"HALF": half, "BLOCK": 1 << (half - 1).bit_length()}


@custom_op("megapoly::rotary", mutates_args=())
def _rotary_op(x: Tensor, cos: Tensor, sin: Tensor, per_group: int, sign: int) -> Tensor:
    return rotary_forward(x, cos, sin, per_group, sign)


@_rotary_op.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, per_group: int, sign: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, cos, sin, ctx.per_group, ctx.sign = inputs
    ctx.save_for_backward(cos, sin)


def _autograd(ctx: Any, d_turned: Tensor) -> tuple[Tensor | None, ...]:
    return _rotary_op(d_turned, *ctx.saved_tensors, ctx.per_group, -ctx.sign), None, None, None, None


_rotary_op.register_autograd(_autograd, setup_context=_keep)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """All heads of ``x`` turned, in its dtype.

    Args:
        x: [..., heads, D], D even, any strides.
        cos, sin: of the angles, [..., D / 2]; dimensions before the last broadcast to those of ``x`` before the heads.

    Raises:
        ValueError: shapes that do not fit; tables narrower than fp32, or that need a gradient.
    """
    if x.ndim < 2 or not x.shape[-1] or x.shape[-1] % 2:
        raise ValueError(f"rotary: x has shape {list(x.shape)}, expected [..., heads, D] with an even D")
    lead, half = x.shape[:-2], x.shape[-1] // 2
    tables = []
    for name, table in (("cos", cos), ("sin", sin)):
        _check_table(name, table)
        if table.shape[-1] != half or table.ndim - 1 > len(lead) or not _broadcasts(table.shape[:-1], lead):
            raise ValueError(
                f"rotary: {name} has shape {list(table.shape)}, which does not broadcast to {[*lead, half]}, that of x"
                " without its heads, and half of its channels"
            )
        tables.append(two_leads(table.expand(*lead, half), len(lead)))
    return _rotary_op(two_leads(x, len(lead)), *tables, _ALL, 1).view(x.shape)


def rotary_qkv(qkv: Tensor, table: Tensor, per_group: int, sign: int = 1) -> Tensor:
    """``qkv`` with its queries and keys turned, in its dtype.

    Args:
        qkv: [S, B, G N D], any strides: G groups of N = ``per_group`` heads, of which the last is the value.
        table: cosines and sines, [2, S, B, 1, 1, D / 2]; S and B may be 1.
        sign: -1 turns back.

    Raises:
        ValueError: shapes that do not fit; a table narrower than fp32, or that needs a gradient; another sign.
    """
    x, cos, sin = _split(qkv, table, per_group, sign)
    return _rotary_op(x, cos, sin, per_group, sign).view(qkv.shape)


def rotary_qkv_forward(
    qkv: Tensor, table: Tensor, per_group: int, sign: int = 1, in_place: bool = False
) -> Tensor:  # fmt: skip
    """Like :func:`rotary_qkv`, without a gradient; see :func:`rotary_forward` for ``in_place``."""
    x, cos, sin = _split(qkv, table, per_group, sign)
    turned = rotary_forward(x, cos, sin, per_group, sign, in_place)
    return qkv if in_place else turned.view(qkv.shape)


def _split(qkv: Tensor, table: Tensor, per_group: int, sign: int) -> tuple[Tensor, Tensor, Tensor]:
    """Heads [S, B, G N, D], cosines and sines [S, B, D / 2]: views."""
    _check_table("table", table)
    s, b, width = qkv.shape
    half = table.shape[-1]
    if table.shape[0] != 2 or table.shape[3:-1] != (1, 1) or not _broadcasts(table.shape[1:3], (s, b)):
        raise ValueError(f"rotary: table has shape {list(table.shape)}, expected [2, {s}, {b}, 1, 1, D / 2]")
    if per_group < 2 or not half or width % (per_group * 2 * half):
        raise ValueError(
            f"rotary: qkv has {width} channels, expected whole groups of {per_group} heads (at least 2) of {2 * half}"
        )
    if sign not in (1, -1):
        raise ValueError(f"rotary: sign is {sign}, expected 1, or -1 to turn back")
    cos, sin = (each[:, :, 0, 0].expand(s, b, half) for each in table)
    return qkv.unflatten(-1, (-1, 2 * half)), cos, sin


def _check_table(name: str, table: Tensor) -> None:
    if table.dtype not in (torch.float32, torch.float64) or table.requires_grad:
        found = "needs a gradient" if table.requires_grad else f"is {table.dtype}"
        raise ValueError(f"rotary: {name} {found}, expected float32 or float64 without a gradient")


def _broadcasts(shape: torch.Size, to: tuple[int, ...] | torch.Size) -> bool:
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(to)))


def variants(arch: int) -> Iterator[Variant]:
    """What is compiled ahead of time."""
    strides = [f"{tensor}_{of}" for tensor in ("out", "x") for of in ("row", "column", "head")]
    strides += [f"{tensor}_{of}" for tensor in ("cos", "sin") for of in ("row", "column")]
    for itemsize, kind in ((2, "bf16"), (4, "fp32")):
        types = {"out_ptr": f"*{kind}", "x_ptr": f"*{kind}", "cos_ptr": "*fp32", "sin_ptr": "*fp32"}
        types |= {each: "i32" for each in ("columns", "heads", "per_group", *strides)}
        odd = frozenset({"columns", "per_group"})
        for half in (32, 40, 64, 128) if itemsize == 2 else (64, 128):
            chosen = settings(LAUNCH, arch, itemsize, half)
            for in_place in (False, True):
                name = f"rotary {kind} head {2 * half}{' in place' * in_place}"
                constants = {"SIGN": 1, "IN_PLACE": in_place, **_block(half)}
                yield Variant(name, _rotary, types, constants, chosen, odd=odd)
