"""Linear + cross-entropy, forward and backward, beside PyTorch and Liger: time, and memory above all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import SWEEP, Bench, Case, Function, liger
from torch import Tensor

from megapoly_kernels import linear_cross_entropy


def eager(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(torch.nn.functional.linear(x, weight).float(), labels, reduction="none")


def _both(function: Function, x: Tensor, weight: Tensor, labels: Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(function(x, weight, labels).sum(), (x, weight))


def cases(bench: Bench) -> Iterator[Case]:
    """Operations are those of three products, 6 H V a token."""
    tokens = bench.tokens if bench.gpu else bench.tokens // 4
    theirs = liger("liger_fused_linear_cross_entropy")
    for model in bench.models:
        if model in SWEEP:
            continue
        x = bench.normal(tokens, model.hidden).requires_grad_()
        weight = (bench.normal(model.vocabulary, model.hidden) / model.hidden**0.5).requires_grad_()
        labels = torch.randint(model.vocabulary, (tokens,), device=bench.device)
        peers = {"eager": _both(eager, x, weight, labels)}
        if bench.gpu and theirs is not None:
            peers["liger"] = _both(theirs, x, weight, labels)
        operations = 6.0 * tokens * model.hidden * model.vocabulary
        shape = f"{model.name}: {tokens} x {model.hidden} x {model.vocabulary}"
        run = _both(linear_cross_entropy, x, weight, labels)
        yield Case("linear + cross-entropy, both passes", shape, x.dtype, operations, run, peers, "TFLOP/s")
