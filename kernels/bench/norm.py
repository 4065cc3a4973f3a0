"""LayerNorm and RMSNorm, with and without the residual, beside PyTorch and Liger."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from common import Bench, Case, liger, passes, peers_of
from torch import Tensor

from megapoly_kernels import layer_norm, rms_norm


def eager_layer(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
    h = x if residual is None else x + residual
    return torch.nn.functional.layer_norm(h, weight.shape, weight, bias, 1e-5)


def eager_rms(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    h = x if residual is None else x + residual
    return torch.nn.functional.rms_norm(h, weight.shape, weight, 1e-6)


def cases(bench: Bench) -> Iterator[Case]:
    """Traffic is 2 N forward, 4 N with a residual; 3 N backward (of ``y`` alone)."""
    theirs = {"layer": liger("liger_layer_norm"), "rms": liger("liger_rms_norm")}
    for model in bench.models:
        n = model.hidden
        x, residual = (bench.normal(bench.tokens, n).requires_grad_() for _ in range(2))
        weight, bias = (bench.normal(n).requires_grad_() for _ in range(2))
        size, shape = x.numel() * x.element_size(), f"{model.name}: {bench.tokens} x {n}"
        if model.gated:
            rms = theirs["rms"] and (lambda x, weight: theirs["rms"](x, weight, 1e-6))
            own, eager, inputs, peer = rms_norm, eager_rms, [x, weight], rms
        else:
            layer = theirs["layer"] and (lambda x, weight, bias: theirs["layer"](x, weight, bias, 1e-5))
            own, eager, inputs, peer = layer_norm, eager_layer, [x, weight, bias], layer
        name = "rms norm" if model.gated else "layer norm"
        yield from passes(bench, name, shape, own, peers_of(bench, eager, peer), inputs, (2 * size, 3 * size))
        added = [*inputs, residual]
        yield from passes(
            bench, f"{name} + residual", shape, own, peers_of(bench, eager), added, (4 * size, 3 * size)
        )  # fmt: skip
