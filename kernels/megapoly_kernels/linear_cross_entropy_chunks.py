"""Linear + cross-entropy chunk by chunk, without autograd; :mod:`megapoly_kernels.linear_cross_entropy` says how."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megapoly_kernels.cross_entropy import losses_of, may_exponentiate, row_statistics, write_gradient
from megapoly_kernels.launch import cdiv, runs_triton, wide_dtype

_LOGITS = {"cuda": 640 << 20, "cpu": 128 << 20}  # bytes of the buffer
_PRODUCT = 64 << 20  # bytes of a product that is added to a wider sum
_ROWS = 4096  # of a chunk at most: products of more rows are no faster
_ALIGN = 16  # elements between rows of the buffer are a multiple of it, so that loads are wide


def _kept(x: Tensor) -> torch.dtype:
    """Dtype of the logits in the buffer."""
    return wide_dtype(x) if runs_triton(x) else x.dtype


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
    if x.dtype == wide_dtype(x):
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
            if out.is_cuda and dx.dtype != wide_dtype(dx):  # a narrow product of long rows may be summed in parts
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
    narrow = x.dtype != wide_dtype(x)
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
    stats = x.new_empty(3, x.shape[0], dtype=wide_dtype(x))
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
    losses = x.new_empty(x.shape[0], dtype=wide_dtype(x))
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_dx else None
    for part, logits in chunks:
        stats = chunks.statistics(part, logits, may_exponentiate(logits, group))
        losses[part] = losses_of(stats, labels[part], group)
        chunks.back(part, logits, stats, token_gradient[part], dx, dweight)
    return losses, dx
