"""Back ends of :mod:`megapoly_kernels.attention`: PyTorch's own function, and the package flash-attn."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megapoly_kernels.attention_reference import biases_of, by_group, visible_keys
from megapoly_kernels.launch import wide_dtype


def by_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    causal: bool,
) -> Tensor:
    """By PyTorch's own attention, which is quick on a CPU too."""
    queries = by_group(query, key)
    b, g, q, s, d = queries.shape
    t = key.shape[2]
    mask: Tensor | None = None
    whole = causal and s == t and cu_seqlens is None and slopes is None
    if not whole:
        mask = visible_keys(queries, t, cu_seqlens, causal)
        if slopes is not None:
            biases = biases_of(slopes, s, t, wide_dtype(query)).view(1, g, q, s, t)
            mask = biases if mask is None else biases.masked_fill(~mask, -torch.inf)
        if mask is not None:
            mask = mask.flatten(1, 2)
            mask = mask if mask.dtype == torch.bool else mask.to(query.dtype)
    if s == 1 and q > 1:  # the queries of a group stand like a sequence, so that its keys are not copied for each
        if mask is not None and mask.shape[1] > 1:
            mask = mask.reshape(-1, g, q, t)
        out = scaled_dot_product_attention(queries.reshape(b, g, q, d), key, value, attn_mask=mask, scale=scale)
    else:
        # Not the symbols that a compiler would make of them.
        plain, grouped = (True if each else False for each in (whole and s > 1, q > 1))  # noqa: SIM210
        out = scaled_dot_product_attention(
            queries.flatten(1, 2), key, value, attn_mask=mask, is_causal=plain, scale=scale, enable_gqa=grouped
        )
    return out.reshape(query.shape)


@cache
def flash_attn_library() -> Any:
    try:
        import flash_attn
    except ImportError as error:
        raise ImportError(
            "attention: the back end flash_attn is not installed: pip install flash-attn --no-build-isolation"
        ) from error
    return flash_attn


def by_flash_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    causal: bool,
) -> Tensor:
    """By the package flash-attn, which takes [B, S, A, D], and of documents all tokens as one sequence."""
    library = flash_attn_library()
    q, k, v = (x.transpose(1, 2) for x in (by_group(query, key).flatten(1, 2), key, value))
    given: dict[str, Any] = {"softmax_scale": scale, "causal": causal, "deterministic": True}
    given["alibi_slopes"] = None if slopes is None else slopes.float()
    if cu_seqlens is None:
        out = library.flash_attn_func(q, k, v, **given)
    else:
        length = query.shape[-2]  # no document is longer
        flat = library.flash_attn_varlen_func(
            *(x.flatten(0, 1) for x in (q, k, v)), cu_seqlens, cu_seqlens, length, length, **given
        )
        out = flat.unflatten(0, (-1, length))
    return out.transpose(1, 2).reshape(query.shape)
