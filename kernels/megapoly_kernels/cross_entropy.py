"""Cross-entropy of logits, also of a vocabulary that is split over the ranks of a process group.

Maths: ``loss = log sum_v exp(x_v - top) + top - x_label`` with ``top = max_v x_v``, and
``dx_v = g (exp(x_v - top) / total - [v = label])``, where ``total`` is that sum. One pass over the logits finds top and
total together (Milakov and Gimelshein, arXiv 1805.02867). Over a group (Shoeybi et al., arXiv 1909.08053) two
all-reduces of a few numbers a token combine them: the largest top and target, then the sums, rescaled.

Shapes: ``logits`` is [..., V], V entries of this rank: ``start`` to ``start + count`` of the whole vocabulary, then
padding, which is never read. ``labels`` is [...] int64 in the whole vocabulary; a negative one is not counted: its loss
and gradient are 0. A label that no rank has gives an infinite loss. -inf logits are entries of probability 0.
Dtypes: any float; losses and arithmetic are in promote(dtype, fp32), and the gradient is rounded once: the entry of the
label is ``g (p - 1)`` before that, not a rounded ``g p`` that is read again.
Memory: no copy of the logits. The gradient may take their place.
Rows may be any distance apart; logits whose last dimension is not contiguous are copied.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
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
    uncompiled,
    wide_dtype,
    widen,
)

# By entries of a row.
LAUNCH: Table = {
    (80, 2, 4096): Launch({"BLOCK": 1024}, warps=4),
    (80, 2, 1 << 30): Launch({"BLOCK": 4096}, warps=8),
    (80, 4, 4096): Launch({"BLOCK": 1024}, warps=4),
    (80, 4, 1 << 30): Launch({"BLOCK": 4096}, warps=8),
    (80, 8, 4096): Launch({"BLOCK": 512}, warps=4),
    (80, 8, 1 << 30): Launch({"BLOCK": 2048}, warps=8),
}  # fmt: skip
_SPAN = 8  # blocks of a row that one program gives gradients for
_CACHED = 1 << 18  # logits that the reference works on at a time: what it makes of them stays in a core's cache


def cross_entropy_reference(logits: Tensor, labels: Tensor, start: int = 0, count: int | None = None) -> Tensor:
    """Losses [...] in PyTorch, of a vocabulary of which ``logits`` has all; in as much memory as it takes."""
    wide = logits[..., :count].to(wide_dtype(logits))
    local = labels - start
    inside = (local >= 0) & (local < wide.shape[-1])
    target = torch.log_softmax(wide, -1).gather(-1, (local * inside).unsqueeze(-1)).squeeze(-1)
    return torch.where(labels < 0, 0.0, torch.where(inside, -target, torch.inf))


@jit
def _fold(x, top, sums):
    """Take a block into the running maximum and the sums, which are of exp(x - top), one a lane."""
    most = tl.maximum(top, tl.max(x, 0))
    shift = tl.where(most == -float("inf"), 0.0, most)
    return most, sums * tl.exp(top - shift) + tl.exp(x - shift)


@jit
def _statistics(stats_ptr, logits_ptr, labels_ptr, rows, stride, start, count, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    label = tl.load(labels_ptr + row)
    at = tl.arange(0, BLOCK)
    top = tl.full([], -float("inf"), stats_ptr.dtype.element_ty)
    sums = tl.zeros([BLOCK], stats_ptr.dtype.element_ty)
    last = tl.where(label < 0, 0, count)
    whole = last // BLOCK * BLOCK
    for first in range(0, whole, BLOCK):  # with no mask, which would make loads narrow
        top, sums = _fold(widen(tl.load(logits_ptr + first + at)), top, sums)
    if whole < last:
        x = tl.load(logits_ptr + whole + at, mask=whole + at < last, other=-float("inf"))
        top, sums = _fold(widen(x), top, sums)
    local = label - start
    target = tl.load(logits_ptr + local, mask=(local >= 0) & (local < last), other=-float("inf"))
    tl.store(stats_ptr + row, top)
    tl.store(stats_ptr + row + rows, widen(target))
    tl.store(stats_ptr + row + rows + rows, tl.sum(sums, 0))


@jit
def _slope(x, at, top, scale, local, g):
    return tl.exp(x - top) * scale - tl.where(at == local, g, 0.0)


@jit
def _gradient(
    out_ptr, logits_ptr, labels_ptr, stats_ptr, g_ptr, rows, stride, out_stride, start, count, columns, span,
    NARROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``NARROWS``: the gradient, of a narrower dtype, takes the place of the logits' first part.

    One program has the whole row then: what it writes lies before what it has yet to read.
    """
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * span
    logits_ptr += row * stride
    out_ptr += row * out_stride
    label = tl.load(labels_ptr + row)
    counted = label >= 0
    local = label - start
    last = tl.minimum(begin + span, tl.where(counted, count, 0))
    last = tl.maximum(begin, last)
    at = tl.arange(0, BLOCK)
    kind = out_ptr.dtype.element_ty
    top = tl.load(stats_ptr + row)
    g = tl.load(g_ptr + row)
    scale = g / tl.load(stats_ptr + row + rows + rows)
    whole = begin + (last - begin) // BLOCK * BLOCK
    for first in range(begin, whole, BLOCK):
        x = widen(tl.load(logits_ptr + first + at))
        if NARROWS:
            tl.debug_barrier()
        tl.store(out_ptr + first + at, _slope(x, first + at, top, scale, local, g).to(kind))
    end = tl.minimum(begin + span, columns)
    for first in range(whole, end, BLOCK):  # the last entries, and zeros
        x = widen(tl.load(logits_ptr + first + at, mask=first + at < last, other=0.0))
        if NARROWS:
            tl.debug_barrier()
        dx = tl.where(first + at < last, _slope(x, first + at, top, scale, local, g), 0.0)
        tl.store(out_ptr + first + at, dx.to(kind), mask=first + at < end)


def _blocks(logits: Tensor) -> Iterator[slice]:
    """Rows that the reference works on together."""
    rows = max(1, _CACHED * torch.get_num_threads() // max(logits.shape[1], 1))
    return (slice(first, first + rows) for first in range(0, logits.shape[0], rows))


def may_exponentiate(logits: Tensor, group: dist.ProcessGroup | None) -> bool:
    """Whether the reference can put exponentials in the place of logits, so that they are computed once."""
    return group is None and not runs_triton(logits) and logits.dtype == wide_dtype(logits)


def row_statistics(logits: Tensor, labels: Tensor, start: int, count: int, exponentiate: bool = False) -> Tensor:
    """Of this rank's entries: largest logit, target (or -inf) and sum of exp(x - largest), [3, rows].

    Args:
        logits: [rows, V], the last dimension contiguous. ``labels`` [rows].
        exponentiate: leave exp(x - largest) in the place of the logits, for :func:`write_gradient`; only where
            :func:`may_exponentiate`.
    """
    rows = logits.shape[0]
    stats = logits.new_empty(3, rows, dtype=wide_dtype(logits))
    if runs_triton(logits):
        if rows:
            chosen = settings(LAUNCH, architecture(logits.device), logits.element_size(), count)
            with on_device(logits):
                _statistics[rows,](
                    stats, logits, labels.contiguous(), rows, logits.stride(0), start, count, **chosen.options
                )
        return stats
    local = labels - start
    inside = (local >= 0) & (local < count)
    if not count:
        stats[:2], stats[2] = -torch.inf, 0.0
        return stats
    target = logits.gather(1, (local * inside).unsqueeze(1)).squeeze(1)
    stats[1] = torch.where(inside, target.to(stats.dtype), -torch.inf)
    for part in _blocks(logits):
        x = logits[part, :count].to(stats.dtype)
        top = torch.amax(x, -1, out=stats[0, part])
        shift = top.masked_fill(top == -torch.inf, 0.0).unsqueeze(-1)
        shifted = x.sub_(shift) if exponentiate else x - shift
        torch.sum(shifted.exp_(), -1, out=stats[2, part])
    return stats


def losses_of(stats: Tensor, labels: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Losses [rows]. Over a group, ``stats`` become those of the whole vocabulary, by two all-reduces."""
    if group is not None:
        own = stats[0].clone()
        dist.all_reduce(stats[:2], dist.ReduceOp.MAX, group=group)
        stats[2] *= torch.where(own == -torch.inf, 0.0, torch.exp(own - stats[0]))
        dist.all_reduce(stats[2], group=group)
    top, target, total = stats
    return torch.where(labels < 0, 0.0, total.log() + (top - target))


def write_gradient(
    out: Tensor, logits: Tensor, labels: Tensor, stats: Tensor, gradient: Tensor, start: int, count: int,
    exponentials: bool = False,
) -> None:  # fmt: skip
    """Write the gradient of this rank's logits [rows, V], 0 for padding, to ``out``.

    Args:
        out: [rows, V]; the logits themselves, other memory, or, for Triton, the same memory in a narrower dtype, every
            row from where the logits' begins.
        stats: of the whole vocabulary. ``gradient`` [rows] of the losses.
        exponentials: ``logits`` are what :func:`row_statistics` left in their place.
    """
    rows, columns = logits.shape
    gradient, stats = gradient.to(stats.dtype), stats.contiguous()
    if runs_triton(logits):
        if out.numel():
            chosen = settings(LAUNCH, architecture(logits.device), logits.element_size(), columns)
            narrows = out.dtype != logits.dtype and out.data_ptr() == logits.data_ptr()
            block = chosen.constants["BLOCK"]
            span = cdiv(columns, block) * block if narrows else _SPAN * block
            with on_device(logits):
                _gradient[rows, cdiv(columns, span)](
                    out, logits, labels.contiguous(), stats, gradient.contiguous(), rows, logits.stride(0),
                    out.stride(0), start, count, columns, span, NARROWS=narrows, **chosen.options,
                )  # fmt: skip
        return
    local = labels - start
    inside = (local >= 0) & (local < count)
    local, hit = (local * inside).unsqueeze(1), (inside * gradient).unsqueeze(1)
    top, scale = stats[0].unsqueeze(1), (gradient / stats[2]).unsqueeze(1)
    for part in _blocks(logits):
        if count:
            target = out[part, :count]
            dx = target if target.dtype == stats.dtype else torch.empty_like(target, dtype=stats.dtype)
            if exponentials:
                torch.mul(logits[part, :count], scale[part], out=dx)
            else:
                torch.sub(logits[part, :count].to(stats.dtype), top[part], out=dx).exp_().mul_(scale[part])
            dx.scatter_add_(1, local[part], -hit[part])
            if dx is not target:
                target.copy_(dx)
    out[:, count:] = 0.0
    out.index_fill_(0, (labels < 0).nonzero().squeeze(1), 0.0)


def _matrix(logits: Tensor) -> Tensor:
    rows = logits.reshape(math.prod(logits.shape[:-1]), logits.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] < 2 else rows.contiguous()


def cross_entropy_forward(
    logits: Tensor, labels: Tensor, group: dist.ProcessGroup | None, start: int, count: int, exponentiate: bool = False
) -> tuple[Tensor, Tensor]:
    """Losses [...], and statistics of the whole vocabulary for :func:`cross_entropy_backward`; without a gradient."""
    rows = labels.reshape(-1)
    stats = row_statistics(_matrix(logits), rows, start, count, exponentiate)
    return losses_of(stats, rows, group).view(labels.shape), stats


def cross_entropy_backward(
    gradient: Tensor, logits: Tensor, labels: Tensor, stats: Tensor, start: int, count: int, inplace: bool = False,
    exponentials: bool = False,
) -> Tensor:  # fmt: skip
    """Gradient of the logits for that of the losses [...]; over the logits, where ``inplace`` and they are rows."""
    matrix = _matrix(logits)
    out = matrix if inplace else torch.empty_like(matrix, memory_format=torch.contiguous_format)
    write_gradient(out, matrix, labels.reshape(-1), stats, gradient.reshape(-1), start, count, exponentials)
    return out.view(logits.shape)


@custom_op("megapoly::cross_entropy", mutates_args=())
def _forward(logits: Tensor, labels: Tensor, start: int, count: int) -> tuple[Tensor, Tensor]:
    return cross_entropy_forward(logits, labels, None, start, count)


@custom_op("megapoly::cross_entropy_backward", mutates_args=())
def _backward(gradient: Tensor, logits: Tensor, labels: Tensor, stats: Tensor, start: int, count: int) -> Tensor:
    return cross_entropy_backward(gradient, logits, labels, stats, start, count)


@_forward.register_fake
def _(logits: Tensor, labels: Tensor, start: int, count: int) -> tuple[Tensor, Tensor]:
    wide = wide_dtype(logits)
    return logits.new_empty(labels.shape, dtype=wide), logits.new_empty(3, labels.numel(), dtype=wide)


@_backward.register_fake
def _(gradient: Tensor, logits: Tensor, labels: Tensor, stats: Tensor, start: int, count: int) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, group: dist.ProcessGroup | None, start: int, count: int, inplace: bool
    ) -> Tensor:
        ctx.start, ctx.count, ctx.inplace = start, count, inplace
        # Not where the rows would be copied: the logits themselves would stay as they are.
        ctx.exponentials = (
            inplace and may_exponentiate(logits, group) and _matrix(logits).data_ptr() == logits.data_ptr()
        )
        if group is None and not ctx.exponentials:
            losses, stats = _forward(logits, labels, start, count)
        else:
            losses, stats = cross_entropy_forward(logits, labels, group, start, count, ctx.exponentials)
        ctx.save_for_backward(logits, labels, stats)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, stats = ctx.saved_tensors
        if ctx.inplace:
            alias = logits.data  # with a version of its own, since autograd would take dx for an outdated view
            arguments = (gradients[0], alias, labels, stats, ctx.start, ctx.count)
            dx = cross_entropy_backward(*arguments, True, ctx.exponentials)
            torch.autograd.graph.increment_version(logits)  # so that a second backward pass is refused
        else:
            dx = _backward(gradients[0], logits, labels, stats, ctx.start, ctx.count)
        return dx, None, None, None, None, None


def check_labels(name: str, shape: torch.Size, labels: Tensor, start: int, count: int | None, columns: int) -> int:
    """``count``, by default all columns.

    Raises:
        ValueError: labels of another shape than ``shape`` or dtype, or entries that are not there.
    """
    if labels.shape != shape or labels.dtype != torch.int64:
        raise ValueError(
            f"{name}: labels are {tuple(labels.shape)} {labels.dtype}, expected {tuple(shape)} torch.int64, one a token"
        )
    count = columns if count is None else count
    if start < 0 or not 0 <= count <= columns:
        raise ValueError(
            f"{name}: start {start} and count {count}, expected the first entry of this rank, from 0 on, and how many "
            f"of its {columns} entries are not padding"
        )
    return count


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    start: int = 0,
    count: int | None = None,
    inplace: bool = False,
) -> Tensor:
    """Loss of every token, [...] in promote(logits dtype, fp32).

    Args:
        logits: [..., V], any float. Entries from ``count`` on are padding, as if -inf.
        labels: [...] int64 in the whole vocabulary; negative ones are not counted and have loss 0. One that no rank
            has gives an infinite loss.
        group: over which the vocabulary is split; all of its ranks call this with the same labels. Not compiled:
            ``torch.compile`` breaks its graph here.
        start: first entry of this rank in the whole vocabulary.
        count: entries of this rank that are not padding; all where None.
        inplace: overwrite the logits, which nothing else may need then: the backward pass by their gradient, on a CPU
            the forward pass too, by exponentials. Under ``torch.compile`` that is the compiler's to decide.

    Raises:
        ValueError: labels of another shape or dtype, or a start or count that cannot be.
    """
    count = check_labels("cross_entropy", logits.shape[:-1], labels, start, count, logits.shape[-1])
    if group is not None:
        return uncompiled(_CrossEntropy.apply)(logits, labels, group, start, count, inplace)
    inplace = inplace and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return _CrossEntropy.apply(logits, labels, None, start, count, inplace)


def variants(arch: int) -> Iterator[Variant]:
    """What is compiled ahead of time."""
    stats = {"stats_ptr": "*fp32", "labels_ptr": "*i64"}
    sizes = {"rows": "i32", "stride": "i32", "start": "i32", "count": "i32"}
    odd = frozenset({"rows", "start", "count", "columns"})
    for kind, itemsize, outs in (("bf16", 2, ("bf16",)), ("fp16", 2, ("fp16",)), ("fp32", 4, ("fp32", "bf16", "fp16"))):
        for size in (4096, 262_144):
            chosen = settings(LAUNCH, arch, itemsize, size)
            types = {**stats, "logits_ptr": f"*{kind}", **sizes}
            yield Variant(f"cross-entropy statistics {kind} {size}", _statistics, types, {}, chosen, odd=odd)
            types = {**types, "g_ptr": "*fp32", "out_stride": "i32", "columns": "i32", "span": "i32"}
            for out in outs:
                name = f"cross-entropy gradient {kind} to {out} {size}"
                constants = {"NARROWS": out != kind}
                yield Variant(name, _gradient, {**types, "out_ptr": f"*{out}"}, constants, chosen, odd=odd)
