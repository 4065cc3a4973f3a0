"""The two-layer feed-forward block, split over tp along its inner dimension."""

from __future__ import annotations

from torch import Tensor, nn

from megapoly.config import Model
from megapoly.layers.activation import ACTIVATIONS
from megapoly.layers.call import Call, Place
from megapoly.layers.linear import ColumnParallelLinear, RowParallelLinear


class FeedForward(nn.Module):
    """``down(activation(up(x)))``: ``up`` is ``[ffn, hidden]``, ``down`` is ``[hidden, ffn]``.

    With SwiGLU ``gate_up`` takes the place of ``up``. It is ``[2, ffn, hidden]``, gate first: a shard is a slice along
    the second dimension, which holds the gates of its own values. With ``recompute`` the result of the activation is
    computed again in the backward pass, not kept.
    """

    def __init__(self, name: str, model: Model, *, output_std: float, place: Place, recompute: bool = False) -> None:
        super().__init__()
        self.recompute, self.activation = recompute, ACTIVATIONS[model.activation]
        gated = model.activation == "swiglu"
        self.up = ColumnParallelLinear(
            f"{name}.gate_up" if gated else f"{name}.up", model.hidden, (2, model.ffn) if gated else (model.ffn,),
            std=model.init_std, place=place, bias=model.biases, split=int(gated),
        )  # fmt: skip
        self.down = RowParallelLinear(
            f"{name}.down", model.ffn, model.hidden, std=output_std, place=place, bias=model.biases
        )

    def forward(self, x_sBH: Tensor, call: Call) -> Tensor:
        inner_SBF = self.up(x_sBH, call)
        if self.recompute:
            return self.down(inner_SBF, call, activation=self.activation)
        return self.down(self.activation(inner_SBF), call)
