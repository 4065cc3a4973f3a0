"""Parameters and gradients in flat buckets; the :class:`GradSink` that fills and reduces them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megapoly import comm
from megapoly.context import ParallelContext
from megapoly.errors import TrainingError
from megapoly.optim import layout
from megapoly.spec import ParamSpec


def _spec(parameter: Tensor) -> ParamSpec:
    return parameter.spec  # type: ignore[attr-defined]


@dataclass
class FlatBucket:
    """One bucket: ``values`` holds the parameters, ``gradients`` their sums in promote(parameter dtype, fp32)."""

    plan: layout.Bucket
    values: Tensor
    gradients: Tensor


class Buffers:
    """Owns the storage of ``parameters``: each becomes a view of a flat bucket.

    A global batch begins with :meth:`begin`; layers call :meth:`add`; a bucket whose parameters have all their
    contributions is summed over dp at once, while the backward pass goes on; :meth:`finish` waits for all of them and
    adds up gradients that are partial over further axes.

    Args:
        contributions: every parameter with the number of gradients that one micro-batch brings.
        bucket_mb: size of a bucket of gradients, in MB.
    """

    def __init__(
        self, contributions: Iterable[tuple[nn.Parameter, int]], context: ParallelContext, bucket_mb: float
    ) -> None:
        pairs = list(contributions)
        self.context = context
        self.parameters = [parameter for parameter, _ in pairs]
        self._per_microbatch = [count for _, count in pairs]
        dtype = self.parameters[0].dtype
        wide = torch.promote_types(dtype, torch.float32)
        limit = int(bucket_mb * 1e6 / wide.itemsize)
        self.buckets: list[FlatBucket] = []
        self._gradients: dict[int, Tensor] = {}
        self._bucket_of: dict[int, int] = {}
        for number, plan in enumerate(layout.buckets([_spec(p) for p in self.parameters], limit)):
            bucket = FlatBucket(
                plan,
                torch.zeros(plan.size, dtype=dtype, device=context.device),
                torch.zeros(plan.size, dtype=wide, device=context.device),
            )
            for slot in plan.slots:
                parameter = self.parameters[slot.parameter]
                view = bucket.values[slot.start : slot.stop].view(parameter.shape)
                # What is padding stays zero from here on: nothing is ever read into it, and its gradient is zero.
                inside = _spec(parameter).box.size
                view.view(-1)[:inside] = parameter.detach().view(-1)[:inside]
                parameter.data = view
                self._gradients[id(parameter)] = bucket.gradients[slot.start : slot.stop].view(parameter.shape)
                self._bucket_of[id(parameter)] = number
            self.buckets.append(bucket)
        self._missing: dict[int, int] = {}
        self._open: list[int] = []
        self._launched: list[comm.Pending] = []

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
            self._launched.append(comm.all_reduce_async(bucket.gradients, self.context.dp))

    def finish(self) -> None:
        """Wait until every bucket holds the sum over the global batch."""
        late = [_spec(p).name for p in self.parameters if self._missing[id(p)]]
        if late:
            raise TrainingError(f"no gradient arrived for {', '.join(late[:5])} ({len(late)} parameters)")
        for pending in self._launched:
            pending.wait()
        for bucket in self.buckets:
            for axis in bucket.plan.partial:
                comm.all_reduce(bucket.gradients, getattr(self.context, axis))

    def gradient(self, parameter: Tensor) -> Tensor:
        """The gradient of ``parameter``, a view of its bucket."""
        return self._gradients[id(parameter)]

    def squared_norm(self) -> Tensor:
        """Sum of squares of the gradients that this rank owns, as a float64 scalar tensor."""
        total = torch.zeros((), dtype=torch.float64, device=self.context.device)
        for parameter in self.parameters:
            if _spec(parameter).owner:
                # Summed in float64: a float32 sum over a large tensor is off by a percent, and depends on the layout.
                total += torch.linalg.vector_norm(self._gradients[id(parameter)], dtype=torch.float64).square()
        return total
