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

    ``states[i]`` belongs to ``buffers.buckets[i]`` and maps ``first``, ``second`` and, with narrow parameters,
    ``master`` to flat tensors of the bucket's size.
    """

    def __init__(self, buffers: Buffers, config: Optimizer) -> None:
        self.buffers, self.config = buffers, config
        self.steps = 0
        self.states: list[dict[str, Tensor]] = []
        for bucket in buffers.buckets:
            state = {"first": torch.zeros_like(bucket.gradients), "second": torch.zeros_like(bucket.gradients)}
            if bucket.values.dtype != bucket.gradients.dtype:
                state["master"] = bucket.values.to(bucket.gradients.dtype)
            self.states.append(state)

    @torch.no_grad()
    def step(self, rate: float, scale: float) -> None:
        """One update with learning rate ``rate`` from the buckets' gradients times ``scale``."""
        self.steps += 1
        config = self.config
        correction1, correction2 = 1 - config.beta1**self.steps, 1 - config.beta2**self.steps
        for bucket, state in zip(self.buffers.buckets, self.states):
            keep = 1 - rate * config.weight_decay if bucket.plan.decay else 1.0
            for weight, gradient, first, second in _chunks(bucket, state):
                gradient.mul_(scale)
                first.lerp_(gradient, 1 - config.beta1)
                second.mul_(config.beta2).addcmul_(gradient, gradient, value=1 - config.beta2)
                denominator = second.div(correction2).sqrt_().add_(config.epsilon)
                weight.mul_(keep).addcdiv_(first, denominator, value=-rate / correction1)
            if "master" in state:
                bucket.values.copy_(state["master"])

    def refresh_master(self) -> None:
        """Take the master weights from the parameters, after these were loaded."""
        for bucket, state in zip(self.buffers.buckets, self.states):
            if "master" in state:
                state["master"].copy_(bucket.values)


def _chunks(bucket: FlatBucket, state: dict[str, Tensor]) -> Iterator[tuple[Tensor, ...]]:
    tensors = (state.get("master", bucket.values), bucket.gradients, state["first"], state["second"])
    chunk = _CHUNK if bucket.values.device.type == "cpu" else bucket.plan.size
    for begin in range(0, bucket.plan.size, chunk):
        yield tuple(tensor[begin : begin + chunk] for tensor in tensors)
