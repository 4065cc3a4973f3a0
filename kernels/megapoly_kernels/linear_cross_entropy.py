"""Cross-entropy of ``x @ weight.T`` that never holds the logits of all tokens, also over a split vocabulary.

Maths: ``logits = x weight^T``; losses and their gradient as in ``cross_entropy.py``; ``dx = dlogits weight`` and
``dweight = dlogits^T x``. Tokens are taken in chunks, whose number of rows a budget of bytes sets that does not grow
with the tokens; all chunks use one buffer, in which the gradient takes the place of the logits. Exact: no gradient is
filtered. What Liger Kernel (arXiv 2410.10989) does, with a budget and sums in fp32.

Two modes. Where the gradient of every loss is known beforehand (``token_gradient``), the forward pass computes dx and
dweight too: three matrix products. Where it is not, the backward pass computes the logits again: four.

Shapes: ``x`` is [..., H], ``weight`` [V, H], the entries ``start`` to ``start + count`` of the whole vocabulary, then
padding; ``labels`` [...] int64, negative ones not counted. Over a group every rank has all tokens and as many rows of
the weight, and dx is a part of a sum.
Dtypes: any float. On a GPU logits of fp16 and bf16 are kept in fp32, their gradients in the narrow dtype, in the same
memory; all products are summed in fp32. On a CPU, where torch multiplies these to no wider a dtype, logits are
rounded. dweight is summed over chunks in promote(dtype, fp32), or in a caller's buffer.
Memory beyond inputs, results and gradients: ``workspace`` of ``linear_cross_entropy_chunks.py``; at 262,144 entries,
2048 hidden and 8192 tokens 704 MiB on a GPU and 128 MiB on a CPU, where a caller's buffer takes the weight's gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import custom_op

from megapoly_kernels.cross_entropy import check_labels, cross_entropy_reference
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
)
from megapoly_kernels.linear_cross_entropy_chunks import (
    linear_cross_entropy_backward,
    linear_cross_entropy_forward,
    linear_cross_entropy_with_gradients,
)

# By elements.
LAUNCH: Table = {
    (80, 2, 1 << 62): Launch({"BLOCK": 4096}, warps=4),
    (80, 4, 1 << 62): Launch({"BLOCK": 2048}, warps=4),
    (80, 8, 1 << 62): Launch({"BLOCK": 1024}, warps=4),
}  # fmt: skip


def linear_cross_entropy_reference(
    x: Tensor, weight: Tensor, labels: Tensor, start: int = 0, count: int | None = None
) -> Tensor:
    """Losses [...] in PyTorch, with all logits."""
    return cross_entropy_reference(torch.nn.functional.linear(x, weight), labels, start, count)


@jit
def _scale(x_ptr, factor_ptr, size, BLOCK: tl.constexpr):
    """Multiply by a number on the device, or do nothing where it is 1: the host need not know."""
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < size)
        tl.store(x_ptr + at, (x * factor).to(x_ptr.dtype.element_ty), mask=at < size)


def _own(weight: Tensor, given: Tensor | None, needed: bool) -> Tensor | None:
    """Where the weight's gradient is summed."""
    if not needed or given is not None:
        return given if needed else None
    return torch.zeros(weight.shape, dtype=wide_dtype(weight), device=weight.device)


def _some(like: Tensor, dx: Tensor | None, dweight: Tensor | None) -> tuple[Tensor, Tensor]:
    """An operator gives tensors: empty ones stand for None."""
    return like.new_empty(0) if dx is None else dx, like.new_empty(0) if dweight is None else dweight


def _fused(
    x: Tensor, weight: Tensor, labels: Tensor, token_gradient: Tensor, start: int, count: int,
    buffer: Tensor | None, needs_dx: bool, needs_dweight: bool, group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    own = _own(weight, buffer, needs_dweight)
    where = (start, count)
    losses, dx = linear_cross_entropy_with_gradients(x, weight, labels, token_gradient, where, own, needs_dx, group)
    return losses, *_some(x, dx, None if buffer is not None or own is None else own.to(weight.dtype))


@custom_op("megapoly::linear_cross_entropy", mutates_args=())
def _forward_op(x: Tensor, weight: Tensor, labels: Tensor, start: int, count: int) -> tuple[Tensor, Tensor]:
    return linear_cross_entropy_forward(x, weight, labels, None, start, count)


@custom_op("megapoly::linear_cross_entropy_backward", mutates_args=("buffer",))
def _backward_op(
    gradient: Tensor, x: Tensor, weight: Tensor, labels: Tensor, stats: Tensor, start: int, count: int,
    buffer: Tensor | None, needs_dx: bool, needs_dweight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    own = _own(weight, buffer, needs_dweight)
    dx = linear_cross_entropy_backward(gradient, x, weight, labels, stats, (start, count), own, needs_dx)
    return _some(x, dx, None if buffer is not None or own is None else own.to(weight.dtype))


@custom_op("megapoly::linear_cross_entropy_fused", mutates_args=("buffer",))
def _fused_op(
    x: Tensor, weight: Tensor, labels: Tensor, token_gradient: Tensor, start: int, count: int,
    buffer: Tensor | None, needs_dx: bool, needs_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _fused(x, weight, labels, token_gradient, start, count, buffer, needs_dx, needs_dweight)


@custom_op("megapoly::linear_cross_entropy_rescale", mutates_args=("dx", "dweight"))
def _rescale_op(
    dx: Tensor, dweight: Tensor, upstream: Tensor, token_gradient: Tensor, labels: Tensor, buffered: bool
) -> None:
    """Scale gradients that are there by upstream / token_gradient, which has to be the same for all tokens."""
    factor = _factor(upstream, token_gradient, labels)
    if not dx.is_cuda:
        value = float(factor)
        if value != value or (buffered and value != 1.0):
            raise ValueError(
                "linear_cross_entropy: the losses' gradient is not token_gradient"
                f"{'' if buffered else ' times one number'}, for which the forward pass computed the gradients; "
                "give what will come, or no token_gradient"
            )
    elif buffered:
        factor = torch.where(factor == 1.0, factor, torch.nan)
    for each in (dx, dweight):
        if runs_triton(each) and each.numel():
            chosen = settings(LAUNCH, architecture(each.device), each.element_size(), each.numel())
            with on_device(each):
                _scale[cdiv(each.numel(), chosen.constants["BLOCK"]),](each, factor, each.numel(), **chosen.options)
        elif not runs_triton(each) and value != 1.0:
            each.mul_(value)


def _factor(upstream: Tensor, token_gradient: Tensor, labels: Tensor) -> Tensor:
    """The one number that ``upstream`` is of ``token_gradient``, or NaN. It stays on the device."""
    counted = labels >= 0
    known = counted & (token_gradient != 0.0)
    ratio = upstream / token_gradient
    least = torch.where(known, ratio, torch.inf).amin() if len(ratio) else ratio.new_tensor(torch.inf)
    most = torch.where(known, ratio, -torch.inf).amax() if len(ratio) else -least
    same = (most - least <= 8 * torch.finfo(ratio.dtype).eps * most.abs()) & (
        ~(counted & ~known & (upstream != 0.0)).any()
    )
    lost = (counted & (upstream != 0.0)).any()  # nothing is known, and something comes
    return torch.where(known.any(), torch.where(same, most, torch.nan), torch.where(lost, torch.nan, 1.0))


@_forward_op.register_fake
def _(x: Tensor, weight: Tensor, labels: Tensor, start: int, count: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(labels.shape, dtype=wide_dtype(x)), x.new_empty(3, labels.numel(), dtype=wide_dtype(x))


@_backward_op.register_fake
def _(
    gradient: Tensor, x: Tensor, weight: Tensor, labels: Tensor, stats: Tensor, start: int, count: int,
    buffer: Tensor | None, needs_dx: bool, needs_dweight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    own = weight.new_empty(weight.shape) if needs_dweight and buffer is None else None
    return _some(x, x.new_empty(x.shape) if needs_dx else None, own)


@_fused_op.register_fake
def _(
    x: Tensor, weight: Tensor, labels: Tensor, token_gradient: Tensor, start: int, count: int,
    buffer: Tensor | None, needs_dx: bool, needs_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    own = weight.new_empty(weight.shape) if needs_dweight and buffer is None else None
    losses = x.new_empty(labels.shape, dtype=wide_dtype(x))
    return losses, *_some(x, x.new_empty(x.shape) if needs_dx else None, own)


@_rescale_op.register_fake
def _(
    dx: Tensor, dweight: Tensor, upstream: Tensor, token_gradient: Tensor, labels: Tensor, buffered: bool
) -> None: ...


class _General(torch.autograd.Function):
    """``reduce`` is the group that sums dx, or None."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, buffer: Tensor | None, start: int, count: int,
        group: dist.ProcessGroup | None, reduce: dist.ProcessGroup | None,
    ) -> Tensor:  # fmt: skip
        ctx.start, ctx.count, ctx.buffer, ctx.reduce = start, count, buffer, reduce
        if group is None:
            losses, stats = _forward_op(x, weight, labels, start, count)
        else:
            losses, stats = linear_cross_entropy_forward(x, weight, labels, group, start, count)
        ctx.save_for_backward(x, weight, labels, stats)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, labels, stats = ctx.saved_tensors
        needs_dx, needs_dweight = ctx.needs_input_grad[:2]
        with torch.autocast(x.device.type, enabled=False):
            dx, dweight = _backward_op(
                gradients[0], x, weight, labels, stats, ctx.start, ctx.count, ctx.buffer, needs_dx, needs_dweight
            )
        if ctx.reduce is not None and needs_dx:
            dist.all_reduce(dx, group=ctx.reduce)
        own = needs_dweight and ctx.buffer is None
        return dx if needs_dx else None, dweight if own else None, None, None, None, None, None, None


class _Known(torch.autograd.Function):
    """Of known gradients of the losses."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, token_gradient: Tensor, buffer: Tensor | None, start: int,
        count: int, group: dist.ProcessGroup | None, reduce: dist.ProcessGroup | None,
    ) -> Tensor:  # fmt: skip
        needs = ctx.needs_input_grad[:2]
        if group is None:
            losses, dx, dweight = _fused_op(x, weight, labels, token_gradient, start, count, buffer, needs[0], needs[1])
        else:
            arguments = (x, weight, labels, token_gradient, start, count, buffer, needs[0], needs[1])
            losses, dx, dweight = _fused(*arguments, group)
        if reduce is not None and needs[0]:
            dist.all_reduce(dx, group=reduce)
        ctx.buffered = buffer is not None and needs[1]
        ctx.save_for_backward(dx, dweight, token_gradient, labels)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight, token_gradient, labels = ctx.saved_tensors
        needs_dx, needs_dweight = ctx.needs_input_grad[:2]
        _rescale_op(dx, dweight, gradients[0], token_gradient, labels, ctx.buffered)
        own = needs_dweight and not ctx.buffered
        return dx if needs_dx else None, dweight if own else None, None, None, None, None, None, None, None


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    start: int = 0,
    count: int | None = None,
    token_gradient: Tensor | float | None = None,
    weight_gradient: Tensor | None = None,
    reduce_dx: bool = False,
) -> Tensor:
    """Cross-entropy of ``x @ weight.T`` for every token, [...] in promote(dtype, fp32), in little memory.

    Args:
        x: [..., H]. Under autocast ``x`` and ``weight`` are cast, as for ``torch.nn.functional.linear``.
        weight: [V, H], of the same dtype; rows from ``count`` on are padding. Of as many rows on all ranks of a group.
        labels: [...] int64 in the whole vocabulary; negative ones are not counted and have loss 0. One that no rank
            has gives an infinite loss.
        group: over which the vocabulary is split; every rank has all tokens. Not compiled: ``torch.compile`` breaks
            its graph here.
        start: first entry of this rank in the whole vocabulary.
        count: rows of this rank that are not padding; all where None.
        token_gradient: the gradient that losses will get, a number or [...]: the forward pass then computes the
            gradients, for which the backward pass need not compute the logits again. The backward pass takes it times
            any one number, or exactly it with ``weight_gradient``; of another gradient a CPU raises ValueError, and
            on a GPU, for which nothing waits, dx is NaN. One backward pass is possible.
        weight_gradient: [V, H] of at least promote(dtype, fp32), to which the weight's gradient is added in place of
            being returned: in the backward pass, or with ``token_gradient`` in the forward pass.
        reduce_dx: sum dx over the group. It is this rank's part of the sum otherwise.

    Raises:
        ValueError: shapes, dtypes, start or count that do not fit.
    """
    if x.shape[-1:] != weight.shape[1:] or weight.dim() != 2:
        raise ValueError(
            f"linear_cross_entropy: x is {tuple(x.shape)} and weight {tuple(weight.shape)}, expected [..., H] and "
            "[vocabulary of this rank, H]"
        )
    count = check_labels("linear_cross_entropy", x.shape[:-1], labels, start, count, weight.shape[0])
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x, weight = x.to(torch.get_autocast_dtype(kind)), weight.to(torch.get_autocast_dtype(kind))
    if x.dtype != weight.dtype:
        raise ValueError(f"linear_cross_entropy: x is {x.dtype} and weight {weight.dtype}, expected one dtype")
    wide = wide_dtype(x)
    if weight_gradient is not None and (
        weight_gradient.shape != weight.shape
        or torch.promote_types(weight_gradient.dtype, wide) != weight_gradient.dtype
    ):
        raise ValueError(
            f"linear_cross_entropy: weight_gradient is {tuple(weight_gradient.shape)} {weight_gradient.dtype}, "
            f"expected {tuple(weight.shape)} of {wide} or wider, to which the gradient is added"
        )
    if weight.stride(1) != 1 and weight.stride(0) != 1:
        weight = weight.contiguous()
    needed = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    given = None
    if token_gradient is not None and needed:
        known = token_gradient
        known = known.detach().to(wide) if isinstance(known, Tensor) else x.new_full((), known, dtype=wide)
        given = known.expand(labels.shape).reshape(-1)
    arguments = (x.reshape(labels.numel(), x.shape[-1]), weight, labels.reshape(-1))
    with torch.autocast(kind, enabled=False):
        call = _call if group is None else uncompiled(_call)
        losses = call(*arguments, given, weight_gradient, (start, count), group, group if reduce_dx else None)
    return losses.view(labels.shape)


def _call(
    x: Tensor, weight: Tensor, labels: Tensor, given: Tensor | None, buffer: Tensor | None, where: tuple[int, int],
    group: dist.ProcessGroup | None, reduce: dist.ProcessGroup | None,
) -> Tensor:  # fmt: skip
    if given is None:
        return _General.apply(x, weight, labels, buffer, *where, group, reduce)
    return _Known.apply(x, weight, labels, given, buffer, *where, group, reduce)


def variants(arch: int) -> Iterator[Variant]:
    """What is compiled ahead of time; ``cross_entropy.py`` has the kernels of the logits."""
    for kind, itemsize in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
        types = {"x_ptr": f"*{kind}", "factor_ptr": "*fp32", "size": "i32"}
        chosen = settings(LAUNCH, arch, itemsize, 1 << 30)
        yield Variant(f"linear cross-entropy scale {kind}", _scale, types, {}, chosen)
