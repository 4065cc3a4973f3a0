"""Parameters and gradients in flat buckets; the :class:`GradSink` that fills and reduces them.

With a sharded optimizer (ZeRO-1: Rajbhandari et al., arXiv 1910.02054) a full bucket is reduce-scattered, so that each
dp rank has the sum of its shard only. After the update the shards of the parameters are gathered, last bucket first,
and the forward pass of a module waits for its own buckets alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megapoly import comm
from megapoly.context import ParallelContext
from megapoly.errors import TrainingError
from megapoly.optim import layout
from megapoly.spec import ParamSpec, Piece

_ROW = 4096  # elements that are summed in fp32


def _spec(parameter: Tensor) -> ParamSpec:
    return parameter.spec  # type: ignore[attr-defined]


@dataclass
class FlatBucket:
    """One bucket: ``values`` holds the parameters, ``gradients`` their sums in promote(parameter dtype, fp32).

    ``mine`` is the range that this rank updates: its shard, or the whole bucket. After the reduction the gradients of
    this range alone are sums over the global batch.
    """

    plan: layout.Bucket
    values: Tensor
    gradients: Tensor
    mine: slice


class Part(NamedTuple):
    """Elements ``piece`` of a logical parameter, at ``at`` in a bucket's range ``mine``. Padding is in no part."""

    bucket: int
    parameter: nn.Parameter
    spec: ParamSpec
    piece: Piece
    at: slice


class Buffers:
    """Owns the storage of ``parameters``: each becomes a view of a flat bucket.

    A global batch begins with :meth:`begin`; layers call :meth:`add`; a bucket whose parameters have all their
    contributions is summed over dp at once, while the backward pass goes on; :meth:`finish` waits for all of them and
    adds up gradients that are partial over further axes.

    Args:
        contributions: every parameter with the number of gradients that one micro-batch brings.
        bucket_mb: size of a bucket of gradients, in MB.
        shard: whether each dp rank updates its shard of every bucket only.
    """

    defers = False

    def __init__(
        self,
        contributions: Iterable[tuple[nn.Parameter, int]],
        context: ParallelContext,
        bucket_mb: float,
        shard: bool = False,
    ) -> None:
        pairs = list(contributions)
        self.context = context
        self.sharded = shard and context.dp.size > 1
        self.parameters = [parameter for parameter, _ in pairs]
        self._per_microbatch = [count for _, count in pairs]
        dtype = self.parameters[0].dtype
        wide = torch.promote_types(dtype, torch.float32)
        limit = int(bucket_mb * 1e6 / wide.itemsize)
        self.buckets: list[FlatBucket] = []
        self._gradients: dict[int, Tensor] = {}
        self._bucket_of: dict[int, int] = {}
        shards = context.dp.size if self.sharded else 1
        for number, plan in enumerate(layout.buckets([_spec(p) for p in self.parameters], limit, shards)):
            bucket = FlatBucket(
                plan,
                torch.zeros(plan.size, dtype=dtype, device=context.device),
                torch.zeros(plan.size, dtype=wide, device=context.device),
                plan.shard(context.dp.rank if self.sharded else 0),
            )
            for slot in plan.slots:
                parameter = self.parameters[slot.parameter]
                view = bucket.values[slot.start : slot.stop].view(parameter.shape)
                inside = _spec(parameter).box.size
                view.view(-1)[:inside] = parameter.detach().view(-1)[:inside]
                parameter.data = view
                self._gradients[id(parameter)] = bucket.gradients[slot.start : slot.stop].view(parameter.shape)
                self._bucket_of[id(parameter)] = number
            self.buckets.append(bucket)
        self._missing: dict[int, int] = {}
        self._open: list[int] = []
        self._launched: list[comm.Pending] = []
        self._gathering: dict[int, comm.Pending] = {}  # by bucket
        self._needed: dict[int, tuple[int, ...]] = {}  # buckets by module

    def begin(self, microbatches: int) -> None:
        """Zero the gradients and expect ``microbatches`` backward passes."""
        for bucket in self.buckets:
            bucket.gradients.zero_()
        self._missing = {id(p): n * microbatches for p, n in zip(self.parameters, self._per_microbatch)}
        self._open = [len(bucket.plan.slots) for bucket in self.buckets]
        self._launched = []

    def add(self, parameter: Tensor, accumulate: Callable[[Tensor], object]) -> None:
        """Add one contribution; see :class:`megapoly.layers.call.GradSink`."""
        key = id(parameter)
        if self._missing.get(key, 0) <= 0:
            raise TrainingError(
                f"{_spec(parameter).name}: more gradients arrived than the schedule has micro-batches for"
            )
        accumulate(self._gradients[key])
        self._missing[key] -= 1
        if self._missing[key] == 0:
            self._open[self._bucket_of[key]] -= 1
            self._launch_ready()

    def _launch_ready(self) -> None:
        # In order, whatever the order of arrival: every rank of dp then issues the same sequence of collectives.
        while len(self._launched) < len(self.buckets) and self._open[len(self._launched)] == 0:
            bucket = self.buckets[len(self._launched)]
            if self.sharded:
                mine = bucket.gradients[bucket.mine]
                self._launched.append(comm.reduce_scatter_async(bucket.gradients, self.context.dp, mine))
            else:
                self._launched.append(comm.all_reduce_async(bucket.gradients, self.context.dp))

    def finish(self) -> None:
        """Wait until every bucket holds, in this rank's range, the sum over the global batch."""
        late = [_spec(p).name for p in self.parameters if self._missing[id(p)]]
        if late:
            raise TrainingError(f"no gradient arrived for {', '.join(late[:5])} ({len(late)} parameters)")
        for pending in self._launched:
            pending.wait()
        self._launched = []
        for bucket in self.buckets:
            for axis in bucket.plan.partial:
                comm.all_reduce(bucket.gradients[bucket.mine], getattr(self.context, axis))

    def gather(self, number: int) -> None:
        """Start gathering the parameters of a bucket, after every dp rank has updated its own range of it."""
        bucket = self.buckets[number]
        if self.sharded:
            mine = bucket.values[bucket.mine]
            self._gathering[number] = comm.all_gather_async(mine, self.context.dp, bucket.values)

    def before_forward(self, module: nn.Module) -> None:
        """Wait until the parameters of ``module`` are whole."""
        if not self._gathering:
            return
        if id(module) not in self._needed:
            self._needed[id(module)] = tuple({self._bucket_of[id(p)] for p in module.parameters()})
        for number in self._needed[id(module)]:
            if number in self._gathering:
                self._gathering.pop(number).wait()

    def settle(self) -> None:
        """Wait until all parameters are whole."""
        while self._gathering:
            self._gathering.popitem()[1].wait()

    def parts(self) -> Iterator[Part]:
        """What of every parameter lies in this rank's range."""
        for number, bucket in enumerate(self.buckets):
            for slot in bucket.plan.slots:
                parameter = self.parameters[slot.parameter]
                spec = _spec(parameter)
                # Padding stands at the end of dimension 0, so the box is a prefix of the local tensor.
                start = max(slot.start, bucket.mine.start)
                stop = min(slot.start + spec.box.size, bucket.mine.stop)
                if start < stop:
                    piece = Piece(spec.box, start - slot.start, stop - slot.start)
                    at = slice(start - bucket.mine.start, stop - bucket.mine.start)
                    yield Part(number, parameter, spec, piece, at)

    def statistics(self) -> Tensor:
        """Of the elements that this rank owns: squared norm of the gradients, how many of them are zero, and squared
        norm of the parameters. Float64, on the device; what dp ranks hold alike counts on the first."""
        totals = torch.zeros(3, dtype=torch.float64, device=self.context.device)
        if self.context.dp.rank > 0 and not self.sharded:
            return totals
        padding = [bucket.mine.stop - bucket.mine.start for bucket in self.buckets]
        for part in self.parts():
            padding[part.bucket] -= part.piece.size
        for bucket, empty in zip(self.buckets, padding):
            if bucket.plan.owner:  # padding is zero
                gradients, values = bucket.gradients[bucket.mine], bucket.values[bucket.mine]
                zeros = gradients.numel() - torch.count_nonzero(gradients) - empty
                totals += torch.stack((_squared(gradients), zeros.double(), _squared(values)))
        return totals


def _squared(x: Tensor) -> Tensor:
    """Sum of squares in float64: one float32 sum over a large tensor is off by a percent, and depends on the layout.

    So rows are summed by themselves, in promote(dtype, fp32): a conversion of all of it would be a copy.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = x[: x.numel() // _ROW * _ROW].view(-1, _ROW)
    norms = (torch.linalg.vector_norm(rows, dim=1, dtype=wide), torch.linalg.vector_norm(x[rows.numel() :], dtype=wide))
    return sum((norm.double().square().sum() for norm in norms), torch.zeros((), dtype=torch.float64, device=x.device))
