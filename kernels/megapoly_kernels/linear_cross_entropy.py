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
Memory beyond inputs, results and gradients: :func:`workspace`; at 262,144 entries, 2048 hidden and 8192 tokens 704 MiB
on a GPU and 128 MiB on a CPU, where the weight's gradient goes to a caller's buffer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import custom_op

from megapoly_kernels.cross_entropy import (
    check_labels,
    cross_entropy_reference,
    losses_of,
    may_exponentiate,
    row_statistics,
    write_gradient,
)
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
)

# By elements.
LAUNCH: Table = {
    (80, 2, 1 << 62): Launch({"BLOCK": 4096}, warps=4),
    (80, 4, 1 << 62): Launch({"BLOCK": 2048}, warps=4),
    (80, 8, 1 << 62): Launch({"BLOCK": 1024}, warps=4),
}  # fmt: skip
_LOGITS = {"cuda": 640 << 20, "cpu": 128 << 20}  # bytes of the buffer
_PRODUCT = 64 << 20  # bytes of a product that is added to a wider sum
_ROWS = 4096  # of a chunk at most: products of more rows are no faster
_ALIGN = 16  # elements between rows of the buffer are a multiple of it, so that loads are wide


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


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _kept(x: Tensor) -> torch.dtype:
    """Dtype of the logits in the buffer."""
    return _wide(x) if runs_triton(x) else x.dtype


def chunk_rows(x: Tensor, entries: int) -> int:
    """Tokens of a chunk, for ``x`` and as many entries of the vocabulary."""
    stride = max(cdiv(entries, _ALIGN) * _ALIGN, 1)
    rows = _LOGITS[x.device.type if x.is_cuda else "cpu"] // (stride * _kept(x).itemsize)
    return max(1, min(_ROWS, rows if rows < 128 else rows // 128 * 128))


def workspace(x: Tensor, weight: Tensor) -> int:
    """Bytes at most in use beyond inputs, results and gradients, where a caller's buffer takes the weight's gradient.

    Of few numbers a token and of libraries' own memory apart.
    """
    tokens, (entries, hidden) = x.numel() // max(x.shape[-1], 1), weight.shape
    rows = min(tokens, chunk_rows(x, entries))
    logits = rows * cdiv(entries, _ALIGN) * _ALIGN * _kept(x).itemsize
    if x.dtype == _wide(x):
        return logits
    return logits + max(_PRODUCT, rows * hidden * 4)


class _Chunks:
    """The tokens of a call, chunk by chunk, in one buffer."""

    def __init__(self, x: Tensor, weight: Tensor, labels: Tensor, start: int, count: int) -> None:
        self.x, self.weight, self.labels, self.start, self.count = x, weight, labels, start, count
        self.rows = chunk_rows(x, weight.shape[0])
        self.exponentials = False
        stride = cdiv(weight.shape[0], _ALIGN) * _ALIGN
        self.buffer = x.new_empty(min(self.rows, x.shape[0]), stride, dtype=_kept(x))

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Tokens and their logits [rows, V], which the next chunk overwrites."""
        for first in range(0, self.x.shape[0], self.rows):
            part = slice(first, min(first + self.rows, self.x.shape[0]))
            logits = self.buffer[: part.stop - first, : self.weight.shape[0]]
            _multiply(logits, self.x[part], self.weight.t())
            yield part, logits

    def statistics(self, part: slice, logits: Tensor, exponentiate: bool = False) -> Tensor:
        """Of the chunk; ``exponentiate`` where :meth:`back` is called next."""
        self.exponentials = exponentiate
        return row_statistics(logits, self.labels[part], self.start, self.count, exponentiate)

    def back(
        self, part: slice, logits: Tensor, stats: Tensor, gradient: Tensor, dx: Tensor | None, dweight: Tensor | None
    ) -> None:
        """Overwrite the logits with their gradient; write dx of the chunk, and add to dweight."""
        out = logits
        if logits.dtype != self.x.dtype:
            out = self.buffer.view(self.x.dtype)[: logits.shape[0], : logits.shape[1]]
        labels = self.labels[part]
        write_gradient(out, logits, labels, stats, gradient, self.start, self.count, self.exponentials)
        if dx is not None:
            if out.is_cuda and dx.dtype != _wide(dx):  # a narrow product over the vocabulary may be summed in parts
                dx[part] = torch.mm(out, self.weight, out_dtype=torch.float32)
            else:
                torch.mm(out, self.weight, out=dx[part])
        if dweight is not None:
            _add_product(dweight, out, self.x[part])


def _multiply(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out = a @ b``, ``out`` of a dtype at least as wide."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def _add_product(out: Tensor, dy: Tensor, x: Tensor) -> None:
    """``out += dy.T @ x``, ``out`` of a dtype at least as wide; products of narrow ones are summed in fp32."""
    if out.dtype == x.dtype:
        out.addmm_(dy.t(), x)
        return
    narrow = x.dtype != _wide(x)
    rows = max(1, _PRODUCT // (4 * max(x.shape[1], x.shape[0], 1)))
    for first in range(0, out.shape[0], rows):
        part = dy[:, first : first + rows].t()
        if not dy.is_cuda:
            out[first : first + rows].addmm_(part.to(out.dtype), x.to(out.dtype))
        elif narrow:
            out[first : first + rows].add_(torch.mm(part, x, out_dtype=torch.float32))
        else:
            out[first : first + rows].add_(torch.mm(part, x))


def linear_cross_entropy_forward(
    x: Tensor, weight: Tensor, labels: Tensor, group: dist.ProcessGroup | None, start: int, count: int
) -> tuple[Tensor, Tensor]:
    """Losses [tokens] of ``x`` [tokens, H], and statistics of the whole vocabulary for the backward pass."""
    chunks = _Chunks(x, weight, labels, start, count)
    stats = x.new_empty(3, x.shape[0], dtype=_wide(x))
    for part, logits in chunks:
        stats[:, part] = chunks.statistics(part, logits)
    return losses_of(stats, labels, group), stats


def linear_cross_entropy_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    stats: Tensor,
    where: tuple[int, int],
    dweight: Tensor | None,
    needs_dx: bool = True,
) -> Tensor | None:
    """dx [tokens, H] for the gradient of the losses [tokens]; the weight's gradient is added to ``dweight``.

    ``where`` is start and count. Over a group dx is this rank's part of a sum.
    """
    chunks = _Chunks(x, weight, labels, *where)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_dx else None
    for part, logits in chunks:
        chunks.back(part, logits, stats[:, part], gradient[part], dx, dweight)
    return dx


def linear_cross_entropy_with_gradients(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_gradient: Tensor,
    where: tuple[int, int],
    dweight: Tensor | None,
    needs_dx: bool = True,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Losses [tokens] and dx in one pass, for the gradient ``token_gradient`` [tokens] of every loss.

    As :func:`linear_cross_entropy_forward` and :func:`linear_cross_entropy_backward`, with one product less.
    """
    chunks = _Chunks(x, weight, labels, *where)
    losses = x.new_empty(x.shape[0], dtype=_wide(x))
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_dx else None
    for part, logits in chunks:
        stats = chunks.statistics(part, logits, may_exponentiate(logits, group))
        losses[part] = losses_of(stats, labels[part], group)
        chunks.back(part, logits, stats, token_gradient[part], dx, dweight)
    return losses, dx


def _own(weight: Tensor, given: Tensor | None, needed: bool) -> Tensor | None:
    """Where the weight's gradient is summed."""
    if not needed or given is not None:
        return given if needed else None
    return torch.zeros(weight.shape, dtype=_wide(weight), device=weight.device)


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
    return torch.where(known.any(), torch.where(same, most, torch.nan), 1.0)


@_forward_op.register_fake
def _(x: Tensor, weight: Tensor, labels: Tensor, start: int, count: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(labels.shape, dtype=_wide(x)), x.new_empty(3, labels.numel(), dtype=_wide(x))


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
    losses = x.new_empty(labels.shape, dtype=_wide(x))
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
    wide = _wide(x)
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
