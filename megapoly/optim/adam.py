"""AdamW over flat buckets (Loshchilov & Hutter, arXiv 1711.05101)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megapoly.config import Optimizer
from megapoly.optim.buffers import Buffers, FlatBucket

_CHUNK = 1 << 16  # elements; the working set of a chunk stays in a core's cache


class AdamW:
    """Moments and, where parameters are narrower than fp32, master weights, in promote(parameter dtype, fp32).

    ``states[i]`` belongs to the range of ``buffers.buckets[i]`` that this rank updates, and maps ``first``, ``second``
    and, with narrow parameters, ``master`` to flat tensors of its size.
    """

    def __init__(self, buffers: Buffers, config: Optimizer) -> None:
        self.buffers, self.config = buffers, config
        self.steps = 0
        self.states: list[dict[str, Tensor]] = []
        for bucket in buffers.buckets:
            mine = bucket.gradients[bucket.mine]
            state = {"first": torch.zeros_like(mine), "second": torch.zeros_like(mine)}
            if bucket.values.dtype != mine.dtype:
                state["master"] = bucket.values[bucket.mine].to(mine.dtype)
            self.states.append(state)

    @torch.no_grad()
    def step(self, rate: float, scale: float) -> None:
        """One update with learning rate ``rate`` from the buckets' gradients times ``scale``.

        A sharded bucket is gathered as soon as it is updated: the next forward pass begins with the last bucket.
        """
        self.steps += 1
        config = self.config
        correction1, correction2 = 1 - config.beta1**self.steps, 1 - config.beta2**self.steps
        for number in reversed(range(len(self.states))):
            bucket, state = self.buffers.buckets[number], self.states[number]
            keep = 1 - rate * config.weight_decay if bucket.plan.decay else 1.0
            for weight, gradient, first, second in _chunks(bucket, state):
                gradient.mul_(scale)
                first.lerp_(gradient, 1 - config.beta1)
                second.mul_(config.beta2).addcmul_(gradient, gradient, value=1 - config.beta2)
                denominator = second.div(correction2).sqrt_().add_(config.epsilon)
                weight.mul_(keep).addcdiv_(first, denominator, value=-rate / correction1)
            if "master" in state:
                bucket.values[bucket.mine].copy_(state["master"])
            self.buffers.gather(number)

    def refresh_master(self) -> None:
        """Take the master weights from the parameters, after these were filled."""
        for bucket, state in zip(self.buffers.buckets, self.states):
            if "master" in state:
                state["master"].copy_(bucket.values[bucket.mine])


def _chunks(bucket: FlatBucket, state: dict[str, Tensor]) -> Iterator[tuple[Tensor, ...]]:
    weights = state["master"] if "master" in state else bucket.values[bucket.mine]
    tensors = (weights, bucket.gradients[bucket.mine], state["first"], state["second"])
    chunk = _CHUNK if weights.is_cpu else max(1, weights.numel())
    for begin in range(0, weights.numel(), chunk):
        yield tuple(tensor[begin : begin + chunk] for tensor in tensors)
