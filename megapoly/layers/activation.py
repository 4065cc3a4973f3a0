"""Activations of the feed-forward block, each with its gradient, so that the result need not be kept.

What they are, and how they are computed, is in :mod:`megapoly_kernels.activation`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megapoly.layers.call import apply
from megapoly_kernels.activation import gelu_backward, gelu_forward, swiglu_backward, swiglu_forward


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


ACTIVATIONS = {
    "gelu": Activation(1, gelu_forward, lambda dy, x: gelu_backward(dy, x)[0]),
    "swiglu": Activation(2, swiglu_forward, swiglu_backward),
}
