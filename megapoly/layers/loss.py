"""Cross-entropy over a vocabulary that is split over tp: no rank ever holds all logits of a token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megapoly import comm
from megapoly.context import Axis
from megapoly.layers.call import Call, GradSink, accumulation_dtype, apply, hand_over
from megapoly_kernels.linear_cross_entropy_chunks import (
    linear_cross_entropy_backward,
    linear_cross_entropy_forward,
    linear_cross_entropy_with_gradients,
)


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


class _OutputCrossEntropy(torch.autograd.Function):
    """Output layer and loss in chunks of tokens: all logits are in memory at no time.

    Where the gradient of the losses is known beforehand, and the sink takes gradients at once, those of input and
    weight are made in the forward pass, each logit once. Else the backward pass makes the logits again.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, where: tuple[int, int], tp: Axis, split: bool,
        loss_gradient: float | None, sink: GradSink | None,
    ) -> Tensor:  # fmt: skip
        ctx.where, ctx.tp, ctx.split, ctx.sink, ctx.weight = where, tp, split, sink, weight
        ctx.known = loss_gradient is not None and sink is not None and not sink.defers
        whole, targets = _tokens(x, tp, split), labels.reshape(-1)
        if not ctx.known:
            losses, stats = linear_cross_entropy_forward(whole, weight, targets, tp.group, *where)
            ctx.save_for_backward(x, targets, stats)
            return losses.view(labels.shape)
        assert sink is not None
        assert loss_gradient is not None
        gradient = torch.full_like(targets, loss_gradient, dtype=accumulation_dtype(x.dtype))
        found: list[Any] = []
        sink.add(
            weight,
            lambda out: found.extend(
                linear_cross_entropy_with_gradients(whole, weight, targets, gradient, where, out, group=tp.group)
            ),
        )
        losses, dx = found
        ctx.save_for_backward(_summed(dx.view(*labels.shape, -1), tp, split))
        return losses.view(labels.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.known:
            return ctx.saved_tensors[0], *(None,) * 7
        x, targets, stats = ctx.saved_tensors
        sink, weight, tp, split, where = ctx.sink, ctx.weight, ctx.tp, ctx.split, ctx.where
        gradient = grads[0].reshape(-1)

        def make(out: Tensor | None, needs_dx: bool = True) -> Tensor | None:
            """The input's gradient; that of the weight is added to ``out``."""
            whole = _tokens(x, tp, split)
            return linear_cross_entropy_backward(gradient, whole, weight, targets, stats, where, out, needs_dx)

        if weight.requires_grad and not (sink and sink.defers):
            found: list[Tensor | None] = []
            d_weight = hand_over(sink, weight, lambda out: found.append(make(out)))
            dx = found[0]
        else:  # what is put off must not hold the input's gradient
            dx, d_weight = make(None), hand_over(sink, weight, lambda out: make(out, needs_dx=False))
        assert dx is not None
        return _summed(dx.view(*grads[0].shape, -1), tp, split), d_weight, *(None,) * 6


def _tokens(x: Tensor, tp: Axis, split: bool) -> Tensor:
    """All tokens of a micro-batch, [S B, H]."""
    return (comm.all_gather(x, tp) if split else x).reshape(-1, x.shape[-1])


def _summed(dx: Tensor, tp: Axis, split: bool) -> Tensor:
    return comm.reduce_scatter(dx, tp) if split else comm.all_reduce(dx, tp)


def output_cross_entropy(x: Tensor, weight: Tensor, start: int, count: int, tp: Axis, call: Call) -> Tensor:
    """Loss of every token, ``[S, B]`` in promote(dtype, fp32), of the output layer's input ``x`` [s, B, H].

    As :func:`megapoly.layers.linear.column_linear` and :func:`cross_entropy` give it, in the memory of a chunk of
    logits. With ``call.loss_gradient`` the backward pass has to be for that gradient of every loss.
    """
    return apply(
        _OutputCrossEntropy, x, weight, call.labels_SB, (start, count), tp, call.sequence_parallel,
        call.loss_gradient, call.sink,
    )  # fmt: skip
