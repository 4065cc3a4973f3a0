"""AdamW over flat buckets (Loshchilov & Hutter, arXiv 1711.05101)."""

from __future__ import annotations

import torch
from torch import Tensor

from megapoly.config import Optimizer
from megapoly.optim.buffers import Buffers
from megapoly_kernels.adamw import adamw_update


class AdamW:
    """Moments and, where parameters are narrower than fp32, master weights, in promote(parameter dtype, fp32).

    ``states[i]`` belongs to the range of ``buffers.buckets[i]`` that this rank updates, and maps ``first``, ``second``
    and, with narrow parameters, ``master`` to flat tensors of its size.
    """

    def __init__(self, buffers: Buffers, config: Optimizer, backend: str = "auto") -> None:
        self.buffers, self.config, self.backend = buffers, config, backend
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
        device = self.buffers.buckets[0].values.device
        numbers = torch.tensor([rate, scale, self.steps], dtype=torch.float64, device=device)
        now = (numbers[0], numbers[1], numbers[2])
        for number in reversed(range(len(self.states))):
            bucket, state = self.buffers.buckets[number], self.states[number]
            values = bucket.values[bucket.mine]
            master = state.get("master")
            adamw_update(
                values if master is None else master, bucket.gradients[bucket.mine], (state["first"], state["second"]),
                None if master is None else values, now,
                config.beta1, config.beta2, config.epsilon, config.weight_decay if bucket.plan.decay else 0.0,
                self.backend,
            )  # fmt: skip
            self.buffers.gather(number)

    def refresh_master(self) -> None:
        """Take the master weights from the parameters, after these were filled."""
        for bucket, state in zip(self.buffers.buckets, self.states):
            if "master" in state:
                state["master"].copy_(bucket.values[bucket.mine])
