"""What a layer needs beside its input, for one micro-batch. Legend of shapes: S sequence, B micro-batch, H hidden."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from megapoly.context import ALONE, Axis
from megapoly.spec import ParamSpec


class GradSink(Protocol):
    """Takes weight gradients in place of ``parameter.grad``."""

    def add(self, parameter: Tensor, accumulate: Callable[[Tensor], object]) -> None:
        """Call ``accumulate(buffer)``, now or later; it adds the gradient to ``buffer``, of the parameter's shape.

        The buffer's dtype is promote(parameter dtype, fp32).
        """


@dataclass(frozen=True)
class Call:
    """One micro-batch.

    Attributes:
        positions_SB: position of every token, in its document or in the window; int64.
        mask_BSS: True where a query (second dimension) sees a key; None is the causal mask.
        tokens_SB: on the first stage.
        labels_SB: on the last stage, -1 where a token is not counted; None asks for logits.
        sink: where weight gradients go; None leaves them to autograd.
    """

    positions_SB: Tensor
    mask_BSS: Tensor | None = None
    tokens_SB: Tensor | None = None
    labels_SB: Tensor | None = None
    sink: GradSink | None = None


@dataclass(frozen=True)
class Place:
    """Where a layer's parameters live."""

    tp: Axis = ALONE
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums over many values of ``dtype`` are held in this one."""
    return torch.promote_types(dtype, torch.float32)


def parameter(spec: ParamSpec, place: Place) -> nn.Parameter:
    """An unfilled parameter of ``spec.local_shape`` that carries its spec."""
    result = nn.Parameter(torch.empty(spec.local_shape, dtype=place.dtype, device=place.device))
    result.spec = spec  # type: ignore[attr-defined]
    return result


def spec_of(tensor: Tensor) -> ParamSpec:
    return tensor.spec  # type: ignore[attr-defined]


def hand_over(sink: GradSink | None, target: Tensor | None, accumulate: Callable[[Tensor], object]) -> Tensor | None:
    """Give a weight's gradient to ``sink``, or return it for autograd where there is none."""
    if target is None or not target.requires_grad:
        return None
    if sink is not None:
        sink.add(target, accumulate)
        return None
    gradient = torch.zeros_like(target)
    accumulate(gradient)
    return gradient
