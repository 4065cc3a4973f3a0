"""Dropout + add from counters, beside PyTorch's dropout, which keeps a mask."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from common import Bench, Case, passes, peers_of
from torch import Tensor

from megapoly_kernels import dropout_add

RATE = 0.1


def eager(x: Tensor, residual: Tensor) -> Tensor:
    return residual + torch.nn.functional.dropout(x, RATE)


def cases(bench: Bench) -> Iterator[Case]:
    """Traffic is 3 N forward and 2 N backward a token."""
    for model in bench.models:
        s, b = bench.sequence, bench.batch
        x, residual = (bench.normal(s, b, model.hidden).requires_grad_() for _ in range(2))
        samples = torch.arange(b, device=bench.device).unsqueeze(0)
        tokens = torch.arange(s, device=bench.device).unsqueeze(1)

        def run(x: Tensor, residual: Tensor, samples: Tensor = samples, tokens: Tensor = tokens) -> Tensor:
            return dropout_add(x, residual, 5, RATE, samples, tokens)

        size = x.numel() * x.element_size()
        shape = f"{model.name}: {s} x {b} x {model.hidden}"
        peers = peers_of(bench, eager)
        yield from passes(bench, "dropout + add", shape, run, peers, [x, residual], (3 * size, 2 * size))
