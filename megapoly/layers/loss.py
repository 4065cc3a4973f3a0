"""Cross-entropy over a vocabulary that is split over tp: no rank ever holds all logits of a token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megapoly import comm
from megapoly.context import Axis
from megapoly.layers.call import accumulation_dtype


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, start: int, count: int, tp: Axis) -> Tensor:
        wide = logits.detach().to(accumulation_dtype(logits.dtype))
        wide[..., count:] = -torch.inf  # padding of the vocabulary
        top = comm.all_reduce(wide.amax(-1), tp, "max")
        wide.sub_(top.unsqueeze(-1))
        local = labels - start
        inside = (local >= 0) & (local < count)
        local = local * inside
        target = wide.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill(~inside, 0.0)
        total, target = comm.all_reduce(torch.stack((wide.exp_().sum(-1), target)), tp)
        counted = labels >= 0
        ctx.save_for_backward(wide.div_(total.unsqueeze(-1)), local, inside, counted)
        ctx.dtype = logits.dtype
        return (total.log() - target) * counted

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        probabilities, local, inside, counted = ctx.saved_tensors
        hit = inside.to(probabilities.dtype).unsqueeze(-1)
        # In place: with a large vocabulary this is the largest tensor of the step. The backward pass runs once.
        gradient = probabilities.scatter_add_(-1, local.unsqueeze(-1), -hit)
        return gradient.mul_((grads[0] * counted).unsqueeze(-1)).to(ctx.dtype), None, None, None, None


def cross_entropy(logits: Tensor, labels: Tensor, start: int, count: int, tp: Axis) -> Tensor:
    """Loss of every token, in promote(logits dtype, fp32).

    Args:
        logits: ``[..., local vocabulary]``: this rank's entries ``start`` to ``start + count``, then padding.
            Overwritten where they are of the wide dtype already: with a large vocabulary a copy is the step's largest
            tensor, and nothing else needs them.
        labels: ``[...]`` int64 in the whole vocabulary; -1 is not counted and has loss 0.
    """
    return _CrossEntropy.apply(logits, labels, start, count, tp)
