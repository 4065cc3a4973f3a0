"""Collectives and transfers over an :class:`Axis`.

The only module that calls torch's collectives. On an axis of one rank every function is the identity. Calls, bytes and
waiting time are counted in ``axis.traffic``, and a trace of torch.profiler shows each by name. A peer that is gone is a
:class:`PeerLost`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from megapoly.context import ALONE, Axis
from megapoly.errors import TrainingError

# What gloo says, in a plain RuntimeError, when a peer is gone.
_LOST = re.compile(r"gloo|connection|closed|timed out|timeout|broken pipe", re.IGNORECASE)
_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


class PeerLost(TrainingError):
    """A collective that did not end because a rank is gone or hangs.

    Attributes:
        ranks: those that took part.
    """

    def __init__(self, what: str, axis: Axis, cause: Exception) -> None:
        self.what, self.ranks = f"{what} over {axis.name}", axis.ranks
        peers = ", ".join(map(str, axis.ranks))
        super().__init__(f"{self.what} failed: one of ranks {peers} is gone or hangs ({_short(str(cause))})")


def _short(text: str) -> str:
    """What a back end says, without the places in its source."""
    return re.sub(r"\[/\S*\]\s*", "", text.splitlines()[0])[:80]


class Pending:
    """A collective or transfer under way; :meth:`wait` returns its tensor.

    Args:
        works: of the back end, in the order in which they are waited for.
        finish: run once, after the works, to complete ``tensor``.
    """

    def __init__(
        self,
        tensor: Tensor,
        works: Sequence[Any] = (),
        axis: Axis = ALONE,
        what: str = "",
        finish: Callable[[], object] | None = None,
    ) -> None:
        self._tensor, self._works, self._axis, self._what, self._finish = tensor, works, axis, what, finish

    def wait(self) -> Tensor:
        if self._works:
            with _counted(self._axis, self._what, waits=True):
                for work in self._works:
                    work.wait()
                if self._finish is not None:
                    self._finish()
            self._works, self._finish = (), None
        return self._tensor


def named(name: Callable[[], str]) -> AbstractContextManager[object]:
    """A span of the trace, where a profiler runs; without one even an unused span costs microseconds."""
    return record_function(name()) if torch.autograd._profiler_enabled() else nullcontext()


def _span(what: str, axis: Axis, payload: int) -> str:
    size = f", {payload / 1e6:.3g} MB" if payload else ""
    return f"{what} over {axis.name}{size}"


@contextmanager
def _counted(axis: Axis, what: str, calls: int = 0, payload: int = 0, waits: bool = False) -> Iterator[None]:
    begin = time.perf_counter()
    try:
        with named(lambda: f"wait for {what} over {axis.name}" if waits else _span(what, axis, payload)):
            yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not _LOST.search(str(error)):
            raise
        raise PeerLost(what, axis, error) from error
    finally:
        traffic = axis.traffic
        traffic.calls += calls
        traffic.bytes += payload
        traffic.seconds += time.perf_counter() - begin


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def all_reduce(x: Tensor, axis: Axis, op: str = "sum") -> Tensor:
    """Reduce ``x`` over ``axis`` in place and return it."""
    if axis.group is not None:
        with _counted(axis, "all-reduce", 1, _bytes(x)):
            dist.all_reduce(x, _OPS[op], group=axis.group)
    return x


def all_reduce_async(x: Tensor, axis: Axis) -> Pending:
    """Start a sum over ``axis`` in place; the result is valid after :meth:`Pending.wait`."""
    if axis.group is None:
        return Pending(x)
    with _counted(axis, "all-reduce", 1, _bytes(x)):
        work = dist.all_reduce(x, group=axis.group, async_op=True)
    return Pending(x, [work], axis, "all-reduce")


def all_gather(x: Tensor, axis: Axis) -> Tensor:
    """Every rank's ``x`` [n, ...], one after another: [size x n, ...]."""
    return all_gather_async(x, axis).wait()


def all_gather_async(x: Tensor, axis: Axis, out: Tensor | None = None) -> Pending:
    """Start :func:`all_gather`, into ``out`` where given; ``x`` may be this rank's part of it."""
    if axis.group is None:
        return Pending(x)
    x = x.contiguous()
    if out is None:
        out = x.new_empty(axis.size * x.shape[0], *x.shape[1:])
    with _counted(axis, "all-gather", 1, _bytes(x)):
        if not x.is_cpu:
            works = [dist.all_gather_into_tensor(out, x, group=axis.group, async_op=True)]
            return Pending(out, works, axis, "all-gather")
        # gloo's own takes three times as long as these messages.
        parts = out.view(axis.size, *x.shape)
        others = [(axis.rank + i) % axis.size for i in range(1, axis.size)]
        works = [dist.isend(x, axis.ranks[to], group=axis.group) for to in others]
        works += [dist.irecv(parts[source], axis.ranks[source], group=axis.group) for source in reversed(others)]
        if parts[axis.rank].data_ptr() != x.data_ptr():
            parts[axis.rank].copy_(x)
    return Pending(out, works, axis, "all-gather")


def reduce_scatter(x: Tensor, axis: Axis) -> Tensor:
    """Of the sum over ``axis`` of ``x`` [size x n, ...] this rank's part, [n, ...]."""
    return reduce_scatter_async(x, axis).wait()


def reduce_scatter_async(x: Tensor, axis: Axis, out: Tensor | None = None) -> Pending:
    """Start :func:`reduce_scatter`, into ``out`` where given, which may be this rank's part of ``x``.

    ``x`` must not change before :meth:`Pending.wait`.
    """
    if axis.group is None:
        return Pending(x)
    x = x.contiguous()
    if out is None:
        out = x.new_empty(x.shape[0] // axis.size, *x.shape[1:])
    with _counted(axis, "reduce-scatter", 1, _bytes(x)):
        if not x.is_cpu:
            work = dist.reduce_scatter_tensor(out, x, group=axis.group, async_op=True)
            return Pending(out, [work], axis, "reduce-scatter")
        # gloo's own is an all-reduce; and this adds up in the order of the ranks, whatever their number.
        parts = torch.empty_like(x)
        work = dist.all_to_all_single(parts, x, group=axis.group, async_op=True)
    target, summands = out, parts.view(axis.size, *out.shape)
    return Pending(out, [work], axis, "reduce-scatter", lambda: torch.sum(summands, 0, out=target))


def send(x: Tensor, axis: Axis, to: int) -> Pending:
    """Start sending ``x`` to position ``to`` of ``axis``. ``x`` must not change before :meth:`Pending.wait`."""
    what = f"send to rank {axis.ranks[to]}"
    with _counted(axis, what, 1, _bytes(x)):
        work = dist.isend(x, dst=axis.ranks[to], group=axis.group)
    return Pending(x, [work], axis, what)


def receive(x: Tensor, axis: Axis, source: int) -> Pending:
    """Start receiving into ``x`` from position ``source`` of ``axis``."""
    what = f"receive from rank {axis.ranks[source]}"
    with _counted(axis, what, 1):
        work = dist.irecv(x, src=axis.ranks[source], group=axis.group)
    return Pending(x, [work], axis, what)


def connect(axis: Axis, device: torch.device) -> None:
    """Exchange a number with both neighbours in the ring of ``axis``. Collective.

    NCCL connects two ranks at their first message, which blocks both: that would come in an order of the schedule's,
    and here it comes in one that cannot deadlock.
    """
    ring = [(i, (i + 1) % axis.size) for i in range(axis.size if axis.size > 2 else axis.size - 1)]
    for edge in ring:
        for source, target in (edge, edge[::-1]):
            number = torch.zeros(1, device=device)
            if axis.rank == source:
                send(number, axis, target).wait()
            elif axis.rank == target:
                receive(number, axis, source).wait()


def barrier(axis: Axis) -> None:
    """Wait for every rank of ``axis``, a CPU group."""
    all_reduce(torch.zeros(1), axis)


def gather_objects(value: Any, axis: Axis) -> list[Any] | None:
    """Every rank's picklable ``value`` on position 0 of ``axis``, a CPU group; None elsewhere."""
    if axis.group is None:
        return [value]
    values: list[Any] | None = [None] * axis.size if axis.rank == 0 else None
    with _counted(axis, "gather", 1):
        dist.gather_object(value, values, dst=axis.ranks[0], group=axis.group)
    return values


def broadcast_object(value: Any, axis: Axis, source: int = 0) -> Any:
    """The picklable ``value`` of position ``source`` of ``axis``, a CPU group, on all ranks."""
    if axis.group is None:
        return value
    holder = [value]
    with _counted(axis, "broadcast", 1):
        dist.broadcast_object_list(holder, src=axis.ranks[source], group=axis.group)
    return holder[0]
