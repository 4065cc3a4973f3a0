"""AdamW over one layer's parameters in a flat buffer, beside torch.optim.AdamW on the same buffer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from common import Bench, Case

from megapoly_kernels import adamw


def cases(bench: Bench) -> Iterator[Case]:
    """fp32 alone, and bf16 with fp32 masters; the peer updates fp32 and then rounds, as it has no masters."""
    for model in bench.models if bench.gpu else bench.models[:1]:
        length = 4 * model.hidden**2 + (3 if model.gated else 2) * model.hidden * model.ffn
        if not bench.gpu:
            length = min(length, 1 << 14 if bench.quick else 1 << 24)
        for narrow in (False, True):
            yield _case(bench, f"{model.name}: {length / 1e6:.1f} M", length, narrow)


def _case(bench: Bench, shape: str, length: int, narrow: bool) -> Case:
    weights, gradient = (bench.normal(length, dtype=torch.float32) for _ in range(2))
    first, second = torch.zeros_like(weights), torch.zeros_like(weights)
    values = weights.to(torch.bfloat16) if narrow else None
    rate, scale, step = (torch.tensor(each, device=bench.device) for each in (1e-4, 1.0, 10))

    def run() -> None:
        adamw(weights, gradient, first, second, values=values, rate=rate, scale=scale, step=step, weight_decay=0.1)

    def peer(**options: bool) -> object:
        parameter = torch.nn.Parameter(weights.clone())
        parameter.grad = gradient
        optimizer = torch.optim.AdamW([parameter], lr=1e-4, weight_decay=0.1, **options)

        def call() -> None:
            optimizer.step()
            if values is not None:
                values.copy_(parameter.detach())

        return call

    peers = {"torch fused": peer(fused=True), "eager": peer(foreach=False)}
    work = length * (28 + 2 * narrow)  # read: weights, gradient, both moments; written: weights, moments, values
    return Case("adamw, masters" if narrow else "adamw", shape, (values if narrow else weights).dtype, work, run, peers)
