"""The two-layer feed-forward block with a tanh GELU, split over tp along its inner dimension."""

from __future__ import annotations

from torch import Tensor, nn

from megapoly.config import Model
from megapoly.layers.call import Call, Place
from megapoly.layers.linear import ColumnParallelLinear, RowParallelLinear


class FeedForward(nn.Module):
    """``down(gelu(up(x)))``: ``up`` is ``[ffn, hidden]``, ``down`` is ``[hidden, ffn]``.

    With ``recompute`` the result of the GELU is computed again in the backward pass, not kept.
    """

    def __init__(self, name: str, model: Model, *, output_std: float, place: Place, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.up = ColumnParallelLinear(f"{name}.up", model.hidden, (model.ffn,), std=model.init_std, place=place)
        self.down = RowParallelLinear(f"{name}.down", model.ffn, model.hidden, std=output_std, place=place)

    def forward(self, x_sBH: Tensor, call: Call) -> Tensor:
        inner_SBF = self.up(x_sBH, call)
        if self.recompute:
            return self.down(inner_SBF, call, activation=True)
        return self.down(nn.functional.gelu(inner_SBF, approximate="tanh"), call)
