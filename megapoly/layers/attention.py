"""Causal self-attention, split over tp by groups of query heads that share a key and a value.

Shapes: S sequence, s slice of it (see :mod:`megapoly.layers.linear`), B micro-batch, H hidden, G groups of this rank, Q
queries of a group, A = G Q heads of this rank, D head dimension. T keys: those of the sequence, and with a cache those
before it.
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
from megapoly_kernels.attention import attention


class Attention(nn.Module):
    """Queries, keys and values come from one weight ``[groups, Q + 2, D, H]``: a shard is a contiguous slice.

    With ``recompute`` what stands between qkv and output is computed again in the backward pass, not kept.
    """

    def __init__(self, name: str, model: Model, *, output_std: float, place: Place, recompute: bool = False) -> None:
        super().__init__()
        self.name = name
        self.queries, self.head_dim, self.recompute = model.heads // model.groups, model.head_dim, recompute
        self.fp32_softmax, self.backend = model.fp32_softmax, place.kernels.attention
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
        key_BGTD, value_BGTD = (part.squeeze(3).permute(1, 2, 0, 3) for part in parts[1:])
        if call.cache is not None:
            key_BGTD, value_BGTD = call.cache.store(self.name, key_BGTD, value_BGTD)
        drops = self.dropout.rate > 0 and call.samples_B is not None
        explicit = drops or not (self.fp32_softmax or qkv.dtype == accumulation_dtype(qkv.dtype))
        if not explicit and call.scores_BASS is None and call.mask_BSS is None:
            query_BGQSD = parts[0].permute(1, 2, 3, 0, 4)  # a view, which kernels read as it is
            out = attention(
                query_BGQSD, key_BGTD, value_BGTD,
                cu_seqlens=call.cu_seqlens, slopes=call.slopes_A, backend=self.backend,
            )  # fmt: skip
            return out.permute(3, 0, 1, 2, 4).reshape(s, b, -1)
        query_BASD = parts[0].flatten(2, 3).permute(1, 2, 0, 3)
        if explicit:
            out_BASD = self._explicit(query_BASD, key_BGTD, value_BGTD, call)
        elif s == 1 and self.queries > 1:
            out_BASD = self._single(query_BASD, key_BGTD, value_BGTD, call.scores_BASS)
        else:
            mask = call.scores_BASS
            if mask is None and call.mask_BSS is not None:
                mask = call.mask_BSS.unsqueeze(1)
            out_BASD = scaled_dot_product_attention(
                query_BASD, key_BGTD, value_BGTD, attn_mask=mask, enable_gqa=self.queries > 1
            )
        return out_BASD.permute(2, 0, 1, 3).reshape(s, b, -1)

    def _single(self, query_BASD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor, scores: Tensor | None) -> Tensor:
        """For one token: the queries of a group stand like a sequence, so that its keys are not copied for each."""
        b, a = query_BASD.shape[:2]
        if scores is not None and scores.shape[1] > 1:
            scores = scores.reshape(scores.shape[0], -1, self.queries, scores.shape[-1])
        query_BGQD = query_BASD.reshape(b, -1, self.queries, self.head_dim)
        out_BGQD = scaled_dot_product_attention(query_BGQD, key_BGTD, value_BGTD, attn_mask=scores)
        return out_BGQD.reshape(b, a, 1, self.head_dim)

    def _explicit(self, query_BASD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor, call: Call) -> Tensor:
        """With all probabilities in memory: for dropout on them, and for a softmax in the parameters' dtype."""
        dtype = query_BASD.dtype
        wide = accumulation_dtype(dtype) if self.fp32_softmax else dtype  # of the scores and their softmax
        key_BATD, value_BATD = (x.repeat_interleave(self.queries, 1) for x in (key_BGTD, value_BGTD))
        scores_BAST = (query_BASD.to(wide) / math.sqrt(self.head_dim)) @ key_BATD.to(wide).transpose(-1, -2)
        if call.scores_BASS is not None:
            scores_BAST = scores_BAST.add_(call.scores_BASS)
        else:
            s, t = scores_BAST.shape[-2:]
            visible = torch.ones(s, t, dtype=torch.bool, device=scores_BAST.device).tril(t - s)
            visible = visible if call.mask_BSS is None else call.mask_BSS.unsqueeze(1)
            scores_BAST = scores_BAST.masked_fill(~visible, -torch.inf)
        probabilities = scores_BAST.softmax(-1).to(dtype)
        return self.dropout.probabilities(probabilities, call) @ value_BATD


def document_mask(documents_BS: Tensor) -> Tensor:
    """Causal mask ``[B, S, S]`` that also separates documents; ``documents_BS`` numbers the document of each token."""
    same = documents_BS.unsqueeze(2) == documents_BS.unsqueeze(1)
    return same.tril()
