"""Embeddings: the vocabulary split over tp, the positions whole on every rank."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from megapoly import comm
from megapoly.context import ALONE, Axis
from megapoly.layers.call import GradSink, Place, hand_over, parameter
from megapoly.layers.linear import whole_spec
from megapoly.spec import ParamSpec, shard


class _Lookup(torch.autograd.Function):
    """Rows ``ids - start`` of ``weight``; ids outside its ``count`` rows give zeros. Summed over ``tp``."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, start: int, count: int, tp: Axis, sink: Any) -> Tensor:
        local = ids - start
        inside = (local >= 0) & (local < count)
        ctx.weight, ctx.sink = weight, sink
        ctx.save_for_backward(local, inside)
        if tp.size == 1:
            return nn.functional.embedding(local, weight)
        rows = nn.functional.embedding(local * inside, weight) * inside.unsqueeze(-1)
        return comm.all_reduce(rows, tp)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        local, inside = ctx.saved_tensors
        # Rows of other ranks add zeros to row 0: picking them out would make a GPU wait for their number.
        rows = (local * inside).flatten()
        gradient = (grads[0] * inside.unsqueeze(-1)).flatten(0, -2)
        d_weight = hand_over(ctx.sink, ctx.weight, lambda out: out.index_add_(0, rows, gradient.to(out.dtype)))
        return d_weight, None, None, None, None, None


class VocabularyEmbedding(nn.Module):
    """Weight ``[vocabulary, hidden]``, split along the vocabulary and padded where tp does not divide it.

    Also the output layer's weight where it is tied. On a pipeline of several stages the first and the last hold a copy;
    the gradient of each is a partial sum over the axis ``tied``, and the first stage owns it.
    """

    def __init__(
        self,
        name: str,
        vocabulary: int,
        hidden: int,
        *,
        std: float,
        copy: str | None,
        place: Place,
    ) -> None:
        super().__init__()
        self.tp = place.tp
        shape = (vocabulary, hidden)
        box, local = shard(shape, 0, place.tp.rank, place.tp.size, pad=True)
        spec = ParamSpec(f"{name}.weight", shape, box, local, std=std)
        if copy is not None:
            spec = replace(spec, partial=("tied",), owner=copy == "first")
        self.weight = parameter(spec, place)
        self.start, self.count = box.start[0], box.shape[0]

    def forward(self, tokens_SB: Tensor, sink: GradSink | None = None) -> Tensor:
        return _Lookup.apply(self.weight, tokens_SB, self.start, self.count, self.tp, sink)


class PositionEmbedding(nn.Module):
    """Learned positions, ``[positions, hidden]``."""

    def __init__(self, name: str, positions: int, hidden: int, *, std: float, place: Place) -> None:
        super().__init__()
        spec = whole_spec(f"{name}.weight", (positions, hidden), place.tp, decay=True, std=std)
        self.weight = parameter(spec, place)

    def forward(self, positions_SB: Tensor, sink: GradSink | None = None) -> Tensor:
        return _Lookup.apply(self.weight, positions_SB, 0, self.weight.shape[0], ALONE, sink)
