"""LayerNorm and RMSNorm, whose weight gradients go to a sink; the mathematics is in :mod:`megapoly_kernels.norm`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megapoly.config import Model
from megapoly.layers.call import Call, Place, apply, hand_over, parameter, whole_spec
from megapoly_kernels.norm import layer_norm_backward, layer_norm_forward, rms_norm_backward, rms_norm_forward


class _LayerNorm(torch.autograd.Function):
    """With a residual the results are the norm of the sum, and the sum."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, norm: LayerNorm, sink: Any
    ) -> Any:
        y, h, mean, rstd = layer_norm_forward(x, weight, bias, residual, norm.epsilon, norm.backend)
        ctx.sink, ctx.weight, ctx.bias, ctx.dtype, ctx.backend = sink, weight, bias, x.dtype, norm.backend
        ctx.save_for_backward(h, mean, rstd)
        return y if residual is None else (y, h)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dh: Tensor | None = None) -> tuple[Tensor | None, ...]:
        h, mean, rstd = ctx.saved_tensors
        dx, d_residual, dw, db = layer_norm_backward(
            dy, h, ctx.weight, mean, rstd, dh, dtype=ctx.dtype, backend=ctx.backend
        )
        d_weight = hand_over(ctx.sink, ctx.weight, lambda out: out.add_(dw))
        d_bias = hand_over(ctx.sink, ctx.bias, lambda out: out.add_(db))  # type: ignore[arg-type]
        return dx, d_residual if ctx.needs_input_grad[1] else None, d_weight, d_bias, None, None


class _RMSNorm(torch.autograd.Function):
    """As :class:`_LayerNorm`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, norm: RMSNorm, sink: Any) -> Any:
        y, h, rstd = rms_norm_forward(x, weight, residual, norm.epsilon, norm.backend)
        ctx.sink, ctx.weight, ctx.dtype, ctx.backend = sink, weight, x.dtype, norm.backend
        ctx.save_for_backward(h, rstd)
        return y if residual is None else (y, h)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dh: Tensor | None = None) -> tuple[Tensor | None, ...]:
        h, rstd = ctx.saved_tensors
        dx, d_residual, dw = rms_norm_backward(dy, h, ctx.weight, rstd, dh, ctx.dtype, ctx.backend)
        d_weight = hand_over(ctx.sink, ctx.weight, lambda out: out.add_(dw))
        return dx, d_residual if ctx.needs_input_grad[1] else None, d_weight, None, None


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + epsilon) * weight`` over the last dimension (Zhang and Sennrich, arXiv 1910.07467).

    Dtypes as in :class:`LayerNorm`.
    """

    def __init__(self, name: str, hidden: int, *, epsilon: float, place: Place) -> None:
        super().__init__()
        self.epsilon, self.backend = epsilon, place.kernels.norm
        self.weight = parameter(whole_spec(f"{name}.weight", (hidden,), place, decay=False, mean=1.0), place)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        return apply(_RMSNorm, x, None, self.weight, self, call.sink)

    def add(self, x: Tensor, residual: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """The norm of ``x + residual``, and that sum."""
        return apply(_RMSNorm, x, residual, self.weight, self, call.sink)


class LayerNorm(nn.Module):
    """``(x - mean) / sqrt(variance + epsilon) * weight + bias`` over the last dimension (Ba et al., arXiv 1607.06450).

    Statistics in promote(x dtype, fp32). The result has the weight's dtype, so an fp32 residual stream enters a
    lower-precision layer here.
    """

    def __init__(self, name: str, hidden: int, *, epsilon: float, place: Place) -> None:
        super().__init__()
        self.epsilon, self.backend = epsilon, place.kernels.norm
        self.weight = parameter(whole_spec(f"{name}.weight", (hidden,), place, decay=False, mean=1.0), place)
        self.bias = parameter(whole_spec(f"{name}.bias", (hidden,), place, decay=False), place)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        return apply(_LayerNorm, x, None, self.weight, self.bias, self, call.sink)

    def add(self, x: Tensor, residual: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """The norm of ``x + residual``, and that sum."""
        return apply(_LayerNorm, x, residual, self.weight, self.bias, self, call.sink)


def make_norm(name: str, model: Model, place: Place) -> LayerNorm | RMSNorm:
    """The model's kind of norm over its hidden size."""
    kind = RMSNorm if model.norm == "rms" else LayerNorm
    return kind(name, model.hidden, epsilon=model.norm_epsilon, place=place)
