"""Bias + GELU and SwiGLU beside PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

from common import Bench, Case, liger, passes, peers_of
from torch import Tensor
from torch.nn.functional import gelu as torch_gelu
from torch.nn.functional import silu

from megapoly_kernels import gelu, swiglu


def eager_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return torch_gelu(x + bias, approximate="tanh")


def eager_swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return silu(gate) * up


def cases(bench: Bench) -> Iterator[Case]:
    """Traffic of bias-GELU is 2 N forward and 3 N backward a token; of SwiGLU 3 N and 5 N."""
    swiglu_of_liger = liger("liger_swiglu")
    for model in bench.models:
        size = bench.tokens * model.ffn * bench.dtype.itemsize
        shape = f"{model.name}: {bench.tokens} x {model.ffn}"
        if model.gated:
            x = bench.normal(bench.tokens, 2 * model.ffn).requires_grad_()
            theirs = swiglu_of_liger and (lambda x: swiglu_of_liger(*(each.contiguous() for each in x.chunk(2, -1))))
            yield from passes(
                bench, "swiglu", shape, swiglu, peers_of(bench, eager_swiglu, theirs), [x], (3 * size, 5 * size)
            )
        else:
            inputs = [bench.normal(bench.tokens, model.ffn).requires_grad_(), bench.normal(model.ffn).requires_grad_()]
            yield from passes(
                bench, "bias-gelu", shape, gelu, peers_of(bench, eager_gelu), inputs, (2 * size, 3 * size)
            )
