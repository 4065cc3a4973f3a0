"""Causal self-attention, split over tp by groups of query heads that share a key and a value.

Shapes: S sequence, B micro-batch, H hidden, G groups of this rank, Q queries of a group, D head dimension.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from megapoly.config import Model
from megapoly.layers.call import Call, Place
from megapoly.layers.linear import ColumnParallelLinear, RowParallelLinear


class Attention(nn.Module):
    """Queries, keys and values come from one weight ``[groups, Q + 2, D, H]``: a shard is a contiguous slice."""

    def __init__(self, name: str, model: Model, *, output_std: float, place: Place) -> None:
        super().__init__()
        self.queries, self.head_dim = model.heads // model.groups, model.head_dim
        self.qkv = ColumnParallelLinear(
            f"{name}.qkv", model.hidden, (model.groups, self.queries + 2, self.head_dim),
            std=model.init_std, place=place,
        )  # fmt: skip
        self.output = RowParallelLinear(f"{name}.output", model.hidden, model.hidden, std=output_std, place=place)

    def forward(self, x_SBH: Tensor, call: Call) -> Tensor:
        s, b, _ = x_SBH.shape
        qkv = self.qkv(x_SBH, call.sink).view(s, b, -1, self.queries + 2, self.head_dim)
        query, key, value = qkv.split([self.queries, 1, 1], dim=3)
        # [B, heads of this rank, S, D]; a query head h uses the key of group h // Q, which is also torch's order.
        query_BHSD, key_BGSD, value_BGSD = (part.flatten(2, 3).permute(1, 2, 0, 3) for part in (query, key, value))
        mask = None if call.mask_BSS is None else call.mask_BSS.unsqueeze(1)
        out_BHSD = scaled_dot_product_attention(
            query_BHSD, key_BGSD, value_BGSD, attn_mask=mask, is_causal=mask is None, enable_gqa=self.queries > 1
        )
        return self.output(out_BHSD.permute(2, 0, 1, 3).reshape(s, b, -1), call.sink)


def document_mask(documents_BS: Tensor) -> Tensor:
    """Causal mask ``[B, S, S]`` that also separates documents; ``documents_BS`` numbers the document of each token."""
    same = documents_BS.unsqueeze(2) == documents_BS.unsqueeze(1)
    return same.tril()
