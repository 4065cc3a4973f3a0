"""Activations of the feed-forward block, each with its gradient, so that the result need not be kept.

``gelu`` is the tanh approximation (Hendrycks and Gimpel, arXiv 1606.08415). ``swiglu`` is ``silu(gate) * up`` (Shazeer,
arXiv 2002.05202), where gate and up are the two halves of the last dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from megapoly.layers.call import apply


@dataclass(frozen=True)
class Activation:
    """A function of the last dimension.

    Attributes:
        inputs: how many values one result is made of.
        forward: ``x`` [..., inputs x n] -> [..., n].
        backward: gradient of the result and ``x`` -> gradient of ``x``.
    """

    inputs: int
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """With a gradient; keeps ``x`` for it and nothing else."""
        return apply(_Apply, x, self)


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: Activation) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(x)
        return activation.forward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return ctx.activation.backward(grads[0], x), None


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return silu(gate).mul_(up)


def _swiglu_backward(dy: Tensor, x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    dx = torch.empty_like(x)
    d_gate, d_up = dx.chunk(2, -1)
    torch.mul(silu(gate), dy, out=d_up)
    d_gate.copy_(torch.ops.aten.silu_backward(dy * up, gate))
    return dx


ACTIVATIONS = {
    "gelu": Activation(
        1,
        lambda x: gelu(x, approximate="tanh"),
        lambda dy, x: torch.ops.aten.gelu_backward(dy, x, approximate="tanh"),
    ),
    "swiglu": Activation(2, _swiglu, _swiglu_backward),
}
