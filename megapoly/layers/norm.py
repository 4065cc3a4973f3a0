"""LayerNorm and RMSNorm, whose weight gradients go to a sink."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megapoly.config import Model
from megapoly.layers.call import Call, Place, accumulation_dtype, apply, hand_over, parameter, whole_spec


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, sink: Any) -> Tensor:
        wide = accumulation_dtype(x.dtype)
        w, b = weight.to(wide), bias.to(wide)
        y, mean, scale = torch.native_layer_norm(x.to(wide), w.shape, w, b, epsilon)
        ctx.sink, ctx.weight, ctx.bias = sink, weight, bias
        ctx.save_for_backward(x, mean, scale)
        return y.to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, scale = ctx.saved_tensors
        wide = accumulation_dtype(x.dtype)
        weight, bias = ctx.weight, ctx.bias
        dx, dw, db = torch.ops.aten.native_layer_norm_backward(
            grads[0].to(wide), x.to(wide), weight.shape, mean, scale, weight.to(wide), bias.to(wide), [True] * 3
        )
        d_weight = hand_over(ctx.sink, weight, lambda out: out.add_(dw))
        d_bias = hand_over(ctx.sink, bias, lambda out: out.add_(db))
        return dx.to(x.dtype), d_weight, d_bias, None, None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, sink: Any) -> Tensor:
        wide = x.to(accumulation_dtype(x.dtype))
        scale = wide.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        ctx.sink, ctx.weight = sink, weight
        ctx.save_for_backward(x, scale)
        return (wide * scale).mul_(weight).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        weight, wide = ctx.weight, scale.dtype
        dy, normed = grads[0].to(wide), x.to(wide) * scale
        dw = (dy * normed).flatten(0, -2).sum(0)
        d_weight = hand_over(ctx.sink, weight, lambda out: out.add_(dw))
        dy = dy * weight
        dx = (dy - normed * (dy * normed).mean(-1, keepdim=True)).mul_(scale)
        return dx.to(x.dtype), d_weight, None, None


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + epsilon) * weight`` over the last dimension (Zhang and Sennrich, arXiv 1910.07467).

    Dtypes as in :class:`LayerNorm`.
    """

    def __init__(self, name: str, hidden: int, *, epsilon: float, place: Place) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = parameter(whole_spec(f"{name}.weight", (hidden,), place, decay=False, mean=1.0), place)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        return apply(_RMSNorm, x, self.weight, self.epsilon, call.sink)


class LayerNorm(nn.Module):
    """``(x - mean) / sqrt(variance + epsilon) * weight + bias`` over the last dimension (Ba et al., arXiv 1607.06450).

    Statistics in promote(x dtype, fp32). The result has the weight's dtype, so an fp32 residual stream enters a
    lower-precision layer here.
    """

    def __init__(self, name: str, hidden: int, *, epsilon: float, place: Place) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = parameter(whole_spec(f"{name}.weight", (hidden,), place, decay=False, mean=1.0), place)
        self.bias = parameter(whole_spec(f"{name}.bias", (hidden,), place, decay=False), place)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        return apply(_LayerNorm, x, self.weight, self.bias, self.epsilon, call.sink)


def make_norm(name: str, model: Model, place: Place) -> LayerNorm | RMSNorm:
    """The model's kind of norm over its hidden size."""
    kind = RMSNorm if model.norm == "rms" else LayerNorm
    return kind(name, model.hidden, epsilon=model.norm_epsilon, place=place)
