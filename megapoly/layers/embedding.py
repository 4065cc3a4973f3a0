"""Embeddings: the vocabulary split over tp, the positions whole on every rank."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from megapoly import comm
from megapoly.context import ALONE, Axis
from megapoly.layers.call import Call, Place, apply, hand_over, parameter, whole_spec
from megapoly.spec import ParamSpec, shard


class _Lookup(torch.autograd.Function):
    """Rows ``ids - start`` of ``weight``; ids outside its ``count`` rows give zeros. Summed over ``tp``.

    With ``split`` the sum is left in slices of the sequence.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, ids: Tensor, start: int, count: int, tp: Axis, split: bool, sink: Any
    ) -> Tensor:
        local = ids - start
        inside = (local >= 0) & (local < count)
        ctx.weight, ctx.sink, ctx.tp, ctx.split = weight, sink, tp, split
        ctx.save_for_backward(local, inside)
        if tp.size == 1:
            return nn.functional.embedding(local, weight)
        rows = nn.functional.embedding(local * inside, weight) * inside.unsqueeze(-1)
        return comm.reduce_scatter(rows, tp) if split else comm.all_reduce(rows, tp)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        local, inside = ctx.saved_tensors
        # Ids of other ranks add zeros, to rows in turns: on a GPU all of them would else contend for one, and to pick
        # them out would make it wait for their number.
        turns = torch.arange(local.numel(), device=local.device) % ctx.weight.shape[0]
        rows = torch.where(inside.flatten(), local.flatten(), turns)
        gradient = comm.all_gather(grads[0], ctx.tp) if ctx.split else grads[0]
        gradient = (gradient * inside.unsqueeze(-1)).flatten(0, -2)
        d_weight = hand_over(ctx.sink, ctx.weight, lambda out: out.index_add_(0, rows, gradient.to(out.dtype)))
        return d_weight, None, None, None, None, None, None


class VocabularyEmbedding(nn.Module):
    """Weight ``[vocabulary, hidden]``, split along the vocabulary and padded where tp does not divide it.

    Also holds the output layer's weight. Where that is tied to the embedding, and the first and the last stage of a
    pipeline live on two ranks, each holds a copy (``copy`` says which); the gradient of each is a partial sum over the
    axis ``tied``, and the first stage owns it.
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

    def forward(self, tokens_SB: Tensor, call: Call) -> Tensor:
        """``[s, B, hidden]``."""
        split = call.sequence_parallel
        return apply(_Lookup, self.weight, tokens_SB, self.start, self.count, self.tp, split, call.sink)


class PositionEmbedding(nn.Module):
    """Learned positions, ``[positions, hidden]``."""

    def __init__(self, name: str, positions: int, hidden: int, *, std: float, place: Place) -> None:
        super().__init__()
        spec = whole_spec(f"{name}.weight", (positions, hidden), place, decay=True, std=std)
        self.weight, self.tp = parameter(spec, place), place.tp

    def forward(self, positions_SB: Tensor, call: Call) -> Tensor:
        """``[s, B, hidden]``."""
        positions_sB = call.slice(positions_SB, self.tp)
        return apply(_Lookup, self.weight, positions_sB, 0, self.weight.shape[0], ALONE, False, call.sink)
