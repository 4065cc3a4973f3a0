"""Causal self-attention, split over tp by groups of query heads that share a key and a value.

Shapes: S sequence, s slice of it (see :mod:`megapoly.layers.linear`), B micro-batch, H hidden, G groups of this rank, Q
queries of a group, A = G Q heads of this rank, D head dimension.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from megapoly.config import Model
from megapoly.layers.call import Call, Place, accumulation_dtype
from megapoly.layers.dropout import Dropout
from megapoly.layers.linear import ColumnParallelLinear, RowParallelLinear
from megapoly.layers.rotary import rotate


class Attention(nn.Module):
    """Queries, keys and values come from one weight ``[groups, Q + 2, D, H]``: a shard is a contiguous slice.

    With ``recompute`` what stands between qkv and output is computed again in the backward pass, not kept.
    """

    def __init__(self, name: str, model: Model, *, output_std: float, place: Place, recompute: bool = False) -> None:
        super().__init__()
        self.queries, self.head_dim, self.recompute = model.heads // model.groups, model.head_dim, recompute
        self.fp32_softmax = model.fp32_softmax
        self.dropout = Dropout(f"{name}.probabilities", model.attention_dropout, place)
        self.qkv = ColumnParallelLinear(
            f"{name}.qkv", model.hidden, (model.groups, self.queries + 2, self.head_dim),
            std=model.init_std, place=place, bias=model.has_qkv_biases,
        )  # fmt: skip
        self.output = RowParallelLinear(
            f"{name}.output", model.hidden, model.hidden, std=output_std, place=place, bias=model.biases
        )

    def forward(self, x_sBH: Tensor, call: Call) -> Tensor:
        qkv = self.qkv(x_sBH, call)
        if call.rotary is not None:
            qkv = rotate(qkv, call.rotary, self.queries + 2)
        if self.recompute and torch.is_grad_enabled():
            heads = checkpoint(self._attend, qkv, call, use_reentrant=False, preserve_rng_state=False)
        else:
            heads = self._attend(qkv, call)
        return self.output(heads, call)

    def _attend(self, qkv: Tensor, call: Call) -> Tensor:
        """``[S, B, G (Q + 2) D]`` -> ``[S, B, A D]``."""
        s, b, _ = qkv.shape
        parts = qkv.view(s, b, -1, self.queries + 2, self.head_dim).split([self.queries, 1, 1], dim=3)
        # A query head h uses the key of group h // Q, which is also torch's order.
        query_BASD, key_BGSD, value_BGSD = (part.flatten(2, 3).permute(1, 2, 0, 3) for part in parts)
        drops = self.dropout.rate > 0 and call.samples_B is not None
        if drops or not (self.fp32_softmax or qkv.dtype == accumulation_dtype(qkv.dtype)):
            out_BASD = self._explicit(query_BASD, key_BGSD, value_BGSD, call)
        else:
            mask = call.scores_BASS
            if mask is None and call.mask_BSS is not None:
                mask = call.mask_BSS.unsqueeze(1)
            out_BASD = scaled_dot_product_attention(
                query_BASD, key_BGSD, value_BGSD, attn_mask=mask, is_causal=mask is None, enable_gqa=self.queries > 1
            )
        return out_BASD.permute(2, 0, 1, 3).reshape(s, b, -1)

    def _explicit(self, query_BASD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor, call: Call) -> Tensor:
        """With all probabilities in memory: for dropout on them, and for a softmax in the parameters' dtype."""
        dtype = query_BASD.dtype
        wide = accumulation_dtype(dtype) if self.fp32_softmax else dtype  # of the scores and their softmax
        key_BASD, value_BASD = (x.repeat_interleave(self.queries, 1) for x in (key_BGSD, value_BGSD))
        scores_BASS = (query_BASD.to(wide) / math.sqrt(self.head_dim)) @ key_BASD.to(wide).transpose(-1, -2)
        if call.scores_BASS is not None:
            scores_BASS = scores_BASS.add_(call.scores_BASS)
        else:
            s = scores_BASS.shape[-1]
            visible = torch.ones(s, s, dtype=torch.bool, device=scores_BASS.device).tril()
            visible = visible if call.mask_BSS is None else call.mask_BSS.unsqueeze(1)
            scores_BASS = scores_BASS.masked_fill(~visible, -torch.inf)
        probabilities = scores_BASS.softmax(-1).to(dtype)
        return self.dropout.probabilities(probabilities, call) @ value_BASD


def document_mask(documents_BS: Tensor) -> Tensor:
    """Causal mask ``[B, S, S]`` that also separates documents; ``documents_BS`` numbers the document of each token."""
    same = documents_BS.unsqueeze(2) == documents_BS.unsqueeze(1)
    return same.tril()
