"""Rotary position embedding (Su et al., arXiv 2104.09864): queries and keys turned by angles of their position.

Channel ``i`` of a head of ``D`` is paired with ``i + D / 2``, as in the checkpoints of transformers. Wavelengths,
angles, sines and cosines are fp32 whatever the model's dtype: public models were trained with these roundings.

Shapes: S sequence, B micro-batch, G groups of this rank, N queries, key and value of a group, D head dimension.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megapoly.config import Model, RopeScaling
from megapoly_kernels.rotary import rotary_qkv_forward


class Rotary:
    """The angles of every position. Holds ``frequencies`` [D / 2], in radians per token."""

    def __init__(self, model: Model, device: torch.device) -> None:
        dim = model.head_dim
        frequencies = 1.0 / (model.wavelength_base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
        if model.rope_scaling is not None:
            frequencies = _scaled(frequencies, model.rope_scaling)
        self.frequencies = frequencies.to(device)

    def table(self, positions_SB: Tensor) -> Tensor:
        """Cosines and sines, ``[2, S, B, 1, 1, D / 2]``."""
        angles = positions_SB[..., None, None, None].float() * self.frequencies
        return torch.stack((angles.cos(), angles.sin()))


def _scaled(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """``linear`` divides all by the factor (Chen et al., arXiv 2306.15595). ``llama3`` leaves those with many periods
    in the original positions, divides those with few, and goes from one to the other linearly in their number.
    """
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    assert scaling.original_positions is not None
    low, high = scaling.low, scaling.high
    wavelengths = 2 * math.pi / frequencies
    share = (scaling.original_positions / wavelengths - low) / (high - low)
    between = (1 - share) * frequencies / scaling.factor + share * frequencies
    result = torch.where(wavelengths > scaling.original_positions / low, frequencies / scaling.factor, frequencies)
    inside = (wavelengths >= scaling.original_positions / high) & (wavelengths <= scaling.original_positions / low)
    return torch.where(inside, between, result)


class _Rotate(torch.autograd.Function):
    """Keeps the table alone: the gradient is turned back."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, table: Tensor, per_group: int) -> Tensor:
        ctx.per_group = per_group
        ctx.save_for_backward(table)
        return rotary_qkv_forward(qkv, table, per_group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (table,) = ctx.saved_tensors
        return rotary_qkv_forward(grads[0], table, ctx.per_group, sign=-1), None, None


def rotate(qkv: Tensor, table: Tensor, per_group: int) -> Tensor:
    """``qkv`` [S, B, G N D] with queries and keys turned; a group has N = ``per_group`` heads, the last the value.

    ``table`` is that of :meth:`Rotary.table`. Under inference mode in place: nothing else may need ``qkv`` as it was.
    """
    if torch.is_inference_mode_enabled():
        return rotary_qkv_forward(qkv, table, per_group, in_place=True)
    return _Rotate.apply(qkv, table, per_group)
