"""The two-layer feed-forward block with a tanh GELU, split over tp along its inner dimension."""

from __future__ import annotations

from torch import Tensor, nn

from megapoly.config import Model
from megapoly.layers.call import GradSink, Place
from megapoly.layers.linear import ColumnParallelLinear, RowParallelLinear


class FeedForward(nn.Module):
    """``down(gelu(up(x)))``: ``up`` is ``[ffn, hidden]``, ``down`` is ``[hidden, ffn]``."""

    def __init__(self, name: str, model: Model, *, output_std: float, place: Place) -> None:
        super().__init__()
        self.up = ColumnParallelLinear(f"{name}.up", model.hidden, (model.ffn,), std=model.init_std, place=place)
        self.down = RowParallelLinear(f"{name}.down", model.ffn, model.hidden, std=output_std, place=place)

    def forward(self, x: Tensor, sink: GradSink | None = None) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x, sink), approximate="tanh"), sink)
