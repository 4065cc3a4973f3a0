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


def _added(function: Function, x: Tensor, weight: Tensor, labels: Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.backward(function(x, weight, labels).sum(), inputs=(x, weight))


def cases(bench: Bench) -> Iterator[Case]:
    """Operations are those of three products, 6 H V a token.

    Gradients are returned, or, as in training, added to buffers that are there: memory beyond results is then memory
    beyond inputs, results and gradients.
    """
    theirs = liger("liger_fused_linear_cross_entropy")
    for model in bench.models:
        # On a CPU weights of gigabytes take minutes.
        if model not in SWEEP and (bench.gpu or model.hidden * model.vocabulary < 1 << 29):
            tokens = bench.tokens if bench.gpu else max(1, bench.tokens // 16)
            yield from _cases(bench, model.name, tokens, model.hidden, model.vocabulary, theirs, returned=True)
    if not bench.quick:
        tokens, turns = (8192, None) if bench.gpu else (512, 1)
        yield from _cases(bench, "256K", tokens, 2048, 1 << 18, theirs, turns=turns)


def _cases(
    bench: Bench, name: str, tokens: int, hidden: int, vocabulary: int, theirs: Function | None,
    returned: bool = False, turns: int | None = None,
) -> Iterator[Case]:  # fmt: skip
    x = bench.normal(tokens, hidden).requires_grad_()
    weight = bench.normal(vocabulary, hidden).div_(hidden**0.5).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,), device=bench.device)
    peers: dict[str, Function] = {"eager": eager} | ({"liger": theirs} if bench.gpu and theirs else {})
    operations = 6.0 * tokens * hidden * vocabulary
    shape = f"{name}: {tokens} x {hidden} x {vocabulary}"
    what = "linear + cross-entropy"
    if returned:
        run = _both(linear_cross_entropy, x, weight, labels)
        others = {each: _both(function, x, weight, labels) for each, function in peers.items()}
        yield Case(f"{what}, both passes", shape, x.dtype, operations, run, others, bench.flops)
    x.grad, weight.grad = torch.zeros_like(x), torch.zeros_like(weight)
    buffer = weight.grad if weight.dtype == torch.float32 else torch.zeros_like(weight, dtype=torch.float32)

    def into(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, labels, token_gradient=1.0, weight_gradient=buffer)

    def run() -> None:
        torch.autograd.backward(into(x, weight, labels).sum(), inputs=(x,))

    others = {each: _added(function, x, weight, labels) for each, function in peers.items()}
    yield Case(f"{what}, gradients added", shape, x.dtype, operations, run, others, bench.flops, turns)
