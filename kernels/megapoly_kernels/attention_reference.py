"""Attention by its formulas, with all scores in memory: what :mod:`megapoly_kernels.attention` is compared with, and
what computes it in float64 and where there are no kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megapoly_kernels.attention_tiles import empty_like
from megapoly_kernels.launch import wide_dtype


def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    slopes: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """``out`` and the log-sum-exp, as :func:`megapoly_kernels.attention.attention_with_lse`."""
    queries = by_group(query, key)
    scores = _scores(queries, key, cu_seqlens, slopes, scale_of(scale, query), causal)
    lse = scores.logsumexp(-1)
    out = (scores - lse.unsqueeze(-1)).exp() @ value.to(scores.dtype).unsqueeze(2)
    return out.to(query.dtype).view(query.shape), lse.view(query.shape[:-1])


def attention_reference_backward(
    d_out: Tensor, d_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens: Tensor | None, slopes: Tensor | None, scale: float, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key and value."""
    queries, d_wide = by_group(query, key), _wide(by_group(d_out, key))
    scores = _scores(queries, key, cu_seqlens, slopes, scale, causal)
    p = (scores - lse.view(queries.shape[:-1]).unsqueeze(-1)).exp()
    delta = (d_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    if d_lse is not None:
        delta = delta - d_lse
    ds = scale * p * (d_wide @ _wide(value).unsqueeze(2).mT - delta.view(queries.shape[:-1]).unsqueeze(-1))
    wide = ds @ _wide(key).unsqueeze(2), (ds.mT @ _wide(queries)).sum(2), (p.mT @ d_wide).sum(2)
    grads = [empty_like(x) for x in (query, key, value)]
    for grad, each in zip(grads, wide, strict=True):
        grad.copy_(each.view(grad.shape))
    return grads[0], grads[1], grads[2]


def by_group(query: Tensor, key: Tensor) -> Tensor:
    """[B, G, Q, S, D], a view."""
    return query if query.ndim == 5 else query.unflatten(1, (key.shape[1], query.shape[1] // max(key.shape[1], 1)))


def scale_of(scale: float | None, query: Tensor) -> float:
    return query.shape[-1] ** -0.5 if scale is None else scale


def _wide(x: Tensor) -> Tensor:
    return x.to(wide_dtype(x))


def _scores(
    queries: Tensor, key: Tensor, cu_seqlens: Tensor | None, slopes: Tensor | None, scale: float, causal: bool
) -> Tensor:
    """[B, G, Q, S, T] in promote(dtype, fp32), -inf where nothing is seen."""
    scores = scale * (_wide(queries) @ _wide(key).unsqueeze(2).mT)
    s, t = scores.shape[-2:]
    if slopes is not None:
        scores = scores + biases_of(slopes, s, t, scores.dtype).unflatten(0, queries.shape[1:3])
    visible = visible_keys(queries, t, cu_seqlens, causal)
    return scores if visible is None else scores.masked_fill(~visible, -torch.inf)


def biases_of(slopes: Tensor, s: int, t: int, dtype: torch.dtype) -> Tensor:
    """[A, S, T] of ALiBi."""
    at, keys = torch.arange(t - s, t, device=slopes.device), torch.arange(t, device=slopes.device)
    return slopes.detach().to(dtype)[:, None, None] * -(at.unsqueeze(1) - keys).abs()


def visible_keys(queries: Tensor, t: int, cu_seqlens: Tensor | None, causal: bool) -> Tensor | None:
    """[B or 1, 1, 1, S, T], whether a query sees a key; None where it sees all."""
    b, s, device = queries.shape[0], queries.shape[-2], queries.device
    visible = None
    if cu_seqlens is not None:
        tokens = torch.arange(b * s, dtype=cu_seqlens.dtype, device=device)
        number = torch.searchsorted(cu_seqlens, tokens, right=True).view(b, 1, 1, s)
        visible = number.unsqueeze(-1) == number.unsqueeze(-2)
    if causal and s > 1:
        earlier = torch.ones(s, t, dtype=torch.bool, device=device).tril(t - s)
        visible = earlier.expand(1, 1, 1, s, t) if visible is None else visible & earlier
    return visible
