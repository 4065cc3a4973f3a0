"""Dropout as a function of (seed, sample, site, token, channel): the same under every layout, and when computed again.

A *site* is the name of the place in the model. The counter of the element in ``channel`` of ``row`` is
``row * ceil(channels / 4) + channel // 4`` in the stream of its sample; the word is number ``channel % 4`` of its four.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megapoly import rng
from megapoly.layers.call import Call, Place
from megapoly_kernels.dropout import dropout, dropout_add
from megapoly_kernels.launch import runs_triton


class _Masked(torch.autograd.Function):
    """``residual + x * keep / (1 - rate)``; keeps one byte an element for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, keep: Tensor, rate: float) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.dtype, ctx.scale = x.dtype, 1.0 / (1.0 - rate)
        dropped = (x * keep).mul_(ctx.scale)
        if residual is None:
            return dropped
        return dropped.add_(residual) if residual.dtype == x.dtype else residual + dropped

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (keep,) = ctx.saved_tensors
        dx = (grads[0].to(ctx.dtype) * keep).mul_(ctx.scale)
        return dx, grads[0] if ctx.needs_input_grad[1] else None, None, None


class Dropout:
    """Dropout of ``rate`` at ``site``. Does nothing in a call without sample numbers."""

    def __init__(self, site: str, rate: float, place: Place) -> None:
        self.rate, self.tp = rate, place.tp
        self.key = rng.key(place.seed, "dropout", site)

    def hidden(self, x_sBH: Tensor, call: Call, residual_sBH: Tensor | None = None) -> Tensor:
        """Of the residual stream, or of a slice of its sequence; added to ``residual_sBH`` in the same pass."""
        if not self.rate or call.samples_B is None:
            return x_sBH if residual_sBH is None else residual_sBH + x_sBH
        tokens_S = torch.arange(call.positions_SB.shape[0], device=x_sBH.device)
        samples, tokens = call.samples_B.unsqueeze(0), call.slice(tokens_S, self.tp).unsqueeze(1)
        if not runs_triton(x_sBH):
            return self._drop(x_sBH, residual_sBH, samples, tokens)
        if residual_sBH is None:
            return dropout(x_sBH, self.key, self.rate, samples, tokens)
        return dropout_add(x_sBH, residual_sBH, self.key, self.rate, samples, tokens)

    def probabilities(self, p_BASS: Tensor, call: Call) -> Tensor:
        """Of the attention of this rank's A heads over S keys; a row is a head and a query."""
        if not self.rate or call.samples_B is None:
            return p_BASS
        _, heads, queries, _ = p_BASS.shape
        first = self.tp.rank * heads * queries
        rows_AS = torch.arange(first, first + heads * queries, device=p_BASS.device).view(heads, queries)
        return self._drop(p_BASS, None, call.samples_B.view(-1, 1, 1), rows_AS)

    def _drop(self, x: Tensor, residual: Tensor | None, samples: Tensor, rows: Tensor) -> Tensor:
        """With a mask that is kept, since a CPU takes long to make it again.

        ``samples`` and ``rows`` broadcast to the shape of ``x`` without its last dimension.
        """
        return _Masked.apply(x, residual, rng.keep(self.key, self.rate, samples, rows, x.shape[-1]), self.rate)
