"""Cross-entropy of logits, beside PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from common import SWEEP, Bench, Case, passes, peers_of
from torch import Tensor

from megapoly_kernels import cross_entropy


def cases(bench: Bench) -> Iterator[Case]:
    """Traffic is V a token forward and 2 V backward."""
    tokens = bench.tokens // 2 if bench.gpu else max(1, bench.tokens // 16)
    done: set[int] = set()
    for model in bench.models:
        if model in SWEEP or model.vocabulary in done:
            continue
        done.add(model.vocabulary)
        logits = bench.normal(tokens, model.vocabulary).requires_grad_()
        labels = torch.randint(model.vocabulary, (tokens,), device=bench.device)

        def run(logits: Tensor, labels: Tensor = labels) -> Tensor:
            return cross_entropy(logits, labels)

        def eager(logits: Tensor, labels: Tensor = labels) -> Tensor:
            return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")

        size = logits.numel() * logits.element_size()
        shape = f"{model.name}: {tokens} x {model.vocabulary}"
        yield from passes(bench, "cross-entropy", shape, run, peers_of(bench, eager), [logits], (size, 2 * size))
