"""Collectives and transfers over an :class:`Axis`.

The only module that calls torch's collectives. On an axis of one rank every function is the identity. Calls, bytes and
waiting time are counted in ``axis.traffic``. A peer that is gone is a :class:`PeerLost`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megapoly.context import Axis
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
    """A collective or transfer under way; :meth:`wait` returns its tensor."""

    def __init__(self, tensor: Tensor, work: Any, axis: Axis, what: str) -> None:
        self._tensor, self._work, self._axis, self._what = tensor, work, axis, what

    def wait(self) -> Tensor:
        if self._work is not None:
            with _counted(self._axis, self._what):
                self._work.wait()
            self._work = None
        return self._tensor


@contextmanager
def _counted(axis: Axis, what: str, calls: int = 0, payload: int = 0) -> Iterator[None]:
    begin = time.perf_counter()
    try:
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
    work = None
    if axis.group is not None:
        with _counted(axis, "all-reduce", 1, _bytes(x)):
            work = dist.all_reduce(x, group=axis.group, async_op=True)
    return Pending(x, work, axis, "all-reduce")


def send(x: Tensor, axis: Axis, to: int) -> Pending:
    """Start sending ``x`` to position ``to`` of ``axis``. ``x`` must not change before :meth:`Pending.wait`."""
    with _counted(axis, f"send to rank {axis.ranks[to]}", 1, _bytes(x)):
        work = dist.isend(x, dst=axis.ranks[to], group=axis.group)
    return Pending(x, work, axis, f"send to rank {axis.ranks[to]}")


def receive(x: Tensor, axis: Axis, source: int) -> Pending:
    """Start receiving into ``x`` from position ``source`` of ``axis``."""
    with _counted(axis, f"receive from rank {axis.ranks[source]}", 1):
        work = dist.irecv(x, src=axis.ranks[source], group=axis.group)
    return Pending(x, work, axis, f"receive from rank {axis.ranks[source]}")


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
