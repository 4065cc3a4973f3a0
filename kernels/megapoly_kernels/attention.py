"""Attention that never holds its probabilities: causal or not, with grouped queries, documents and ALiBi.

Maths: ``out_i = sum_j p_ij v_j`` with ``p_ij = exp(s_ij - lse_i)``, ``s_ij = scale q_i k_j - slope |i - j|`` and
``lse_i = log sum_j exp(s_ij)``, over the keys j that query i sees: all, those up to its own position, or of those the
ones of its own document. Backward: ``dv_j = sum_i p_ij dout_i``, ``ds_ij = p_ij (dout_i v_j - delta_i)``,
``dq_i = scale sum_j ds_ij k_j``, ``dk_j = scale sum_i ds_ij q_i`` with ``delta_i = out_i dout_i - dlse_i`` (Dao,
arXiv 2307.08691; ALiBi: Press et al., arXiv 2108.12409).

Shapes: query [B, A, S, D], or [B, G, Q, S, D]; key and value [B, G, T, D]; A = G Q, and head h has the keys of group
h // Q. Queries are the last S of T positions. Any strides, without a copy where D has stride 1: views of one packed
[S, B, G, Q + 2, D] as well. D up to 256 on GPUs; what is no power of two is padded inside.
Dtypes: any float. Products are of the inputs' dtype (fp32 exactly, without TF32), sums and softmax in
promote(dtype, fp32); float64 is for the references. Under autocast inputs become what it says, as for PyTorch's own.
Gradients: of the inputs, the results and the log-sum-exp are kept. No atomics: the same bits every time.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn.functional import scaled_dot_product_attention

from megapoly_kernels import attention_tiles_backward, attention_tiles_forward
from megapoly_kernels.attention_tiles import empty_like
from megapoly_kernels.launch import known_backend, runs_triton, wide_dtype

BACKENDS = ("auto", "triton", "sdpa", "flash_attn")


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
    """``out`` and the log-sum-exp, as :func:`attention_with_lse`, with all scores in memory."""
    queries = _grouped(query, key)
    scores = _scores(queries, key, cu_seqlens, slopes, _scale(scale, query), causal)
    lse = scores.logsumexp(-1)
    out = (scores - lse.unsqueeze(-1)).exp() @ value.to(scores.dtype).unsqueeze(2)
    return out.to(query.dtype).view(query.shape), lse.view(query.shape[:-1])


def _grouped(query: Tensor, key: Tensor) -> Tensor:
    """[B, G, Q, S, D], a view."""
    return query if query.ndim == 5 else query.unflatten(1, (key.shape[1], query.shape[1] // max(key.shape[1], 1)))


def _scale(scale: float | None, query: Tensor) -> float:
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
        scores = scores + _biases(slopes, s, t, scores.dtype).unflatten(0, queries.shape[1:3])
    visible = _visible(queries, t, cu_seqlens, causal)
    return scores if visible is None else scores.masked_fill(~visible, -torch.inf)


def _biases(slopes: Tensor, s: int, t: int, dtype: torch.dtype) -> Tensor:
    """[A, S, T] of ALiBi."""
    at, keys = torch.arange(t - s, t, device=slopes.device), torch.arange(t, device=slopes.device)
    return slopes.detach().to(dtype)[:, None, None] * -(at.unsqueeze(1) - keys).abs()


def _visible(queries: Tensor, t: int, cu_seqlens: Tensor | None, causal: bool) -> Tensor | None:
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


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    causal: bool,
) -> Tensor:
    """By PyTorch's own attention, which is quick on a CPU too."""
    queries = _grouped(query, key)
    b, g, q, s, d = queries.shape
    t = key.shape[2]
    mask: Tensor | None = None
    whole = causal and s == t and cu_seqlens is None and slopes is None
    if not whole:
        mask = _visible(queries, t, cu_seqlens, causal)
        if slopes is not None:
            biases = _biases(slopes, s, t, wide_dtype(query)).view(1, g, q, s, t)
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
def _flash_attn() -> Any:
    try:
        import flash_attn
    except ImportError as error:
        raise ImportError(
            "attention: the back end flash_attn is not installed: pip install flash-attn --no-build-isolation"
        ) from error
    return flash_attn


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    causal: bool,
) -> Tensor:
    """By the package flash-attn, which takes [B, S, A, D], and of documents all tokens as one sequence."""
    library = _flash_attn()
    q, k, v = (x.transpose(1, 2) for x in (_grouped(query, key).flatten(1, 2), key, value))
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


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """``out`` and the log-sum-exp [.., S] in promote(dtype, fp32), without a gradient."""
    if not _by_kernels(query):
        out, lse = attention_reference(
            query, key, value, cu_seqlens=cu_seqlens, slopes=slopes, scale=scale, causal=causal
        )
        return empty_like(query).copy_(out), lse
    out, lse = attention_tiles_forward.forward(
        _dense(_grouped(query, key)), _dense(key), _dense(value), cu_seqlens, slopes, scale, causal
    )
    return out.flatten(1, 2) if query.ndim == 4 else out, lse.view(query.shape[:-1])


def attention_backward(
    d_out: Tensor, d_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens: Tensor | None, slopes: Tensor | None, scale: float, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key and value, of those of ``out`` and of the log-sum-exp."""
    if not _by_kernels(query):
        return _backward_reference(
            d_out, d_lse, query, key, value, out, lse, cu_seqlens, slopes, scale, causal
        )  # fmt: skip
    dq, dk, dv = attention_tiles_backward.backward(
        _dense(_grouped(d_out, key)), None if d_lse is None else d_lse.contiguous(), _dense(_grouped(query, key)),
        _dense(key), _dense(value), _dense(_grouped(out, key)), lse.contiguous(), cu_seqlens, slopes, scale, causal,
    )  # fmt: skip
    return dq.flatten(1, 2) if query.ndim == 4 else dq, dk, dv


def _backward_reference(
    d_out: Tensor, d_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens: Tensor | None, slopes: Tensor | None, scale: float, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    queries, d_wide = _grouped(query, key), _wide(_grouped(d_out, key))
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


def _by_kernels(query: Tensor) -> bool:
    """Not float64. What is compiled does not ask for :func:`megapoly_kernels.launch.interpreted`."""
    if query.dtype == torch.float64:
        return False
    return query.is_cuda if torch.compiler.is_compiling() else runs_triton(query)


def _dense(x: Tensor) -> Tensor:
    """Offsets inside of a tile, of 128 tokens at most, have to fit in 31 bits."""
    return x if x.stride(-1) == 1 and x.stride(-2) < 1 << 24 else x.contiguous()


@custom_op("megapoly::attention", mutates_args=())
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    return attention_forward(query, key, value, cu_seqlens, slopes, scale, causal)


@custom_op("megapoly::attention_backward", mutates_args=())
def _attention_gradient(
    d_out: Tensor, d_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens: Tensor | None, slopes: Tensor | None, scale: float, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return attention_backward(d_out, d_lse, query, key, value, out, lse, cu_seqlens, slopes, scale, causal)


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    lse = query.new_empty(query.shape[:-1], dtype=wide_dtype(query))
    return empty_like(query), lse


@_attention_gradient.register_fake
def _(d_out: Tensor, d_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Any:
    return tuple(empty_like(x) for x in (query, key, value))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])
    ctx.set_materialize_grads(False)


def _attention_autograd(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, out, *rest = ctx.saved_tensors
    if d_out is None:
        d_out = torch.zeros_like(out)
    grads = _attention_gradient(d_out, d_lse, query, key, value, out, *rest, ctx.scale, ctx.causal)
    return *grads, None, None, None, None


_attention.register_autograd(_attention_autograd, setup_context=_keep)


def resolve(backend: str, query: Tensor) -> str:
    """What computes attention on the device and in the dtype of ``query``: ``triton``, ``sdpa`` or ``flash_attn``.

    Raises:
        ValueError: no such back end, or one that is not for this device or dtype.
        ImportError: a back end that is not installed.
    """
    known_backend("attention", backend, BACKENDS)
    if backend == "auto":
        return "triton" if _by_kernels(query) else "sdpa"
    if backend == "triton" and not _by_kernels(query):
        raise ValueError(
            f"attention: the back end triton is for GPUs and no float64, got {query.dtype} on {query.device}; "
            "choose auto or sdpa"
        )
    if backend == "flash_attn":
        _flash_attn()
    return backend


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    slopes: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Attention, in the shape and dtype of ``query``; in memory the heads of a token stand together.

    Args:
        query: [B, A, S, D] or [B, G, Q, S, D].
        key, value: [B, G, T, D]; query head h has those of group ``h // Q``.
        cu_seqlens: [n + 1] int32, 0 and then where each of n documents ends, counted over the B S tokens row by row, up
            to B S. No query sees another document. A document may be empty; none goes over the end of a row. The
            numbers are checked on a CPU alone.
        slopes: [A] of ALiBi; ``slope * distance`` is taken from the scores. They have no gradient.
        scale: of the scores, ``D ** -0.5`` where not given.
        causal: query i sees keys up to T - S + i.
        backend: ``triton``; ``sdpa``, PyTorch's own, and ``flash_attn``, the package. ``auto`` is Triton on a GPU and
            PyTorch's own elsewhere and for float64.

    Raises:
        ValueError: shapes, dtypes or options that do not fit.
        ImportError: a back end that is not installed.
    """
    query, key, value = _autocast(query, key, value)
    scale = _scale(scale, query)
    _check(query, key, value, cu_seqlens, slopes, scale, causal)
    backend = resolve(backend, query)
    if backend == "sdpa":
        return _sdpa(query, key, value, cu_seqlens, slopes, scale, causal)
    if backend == "flash_attn":
        return _flash(query, key, value, cu_seqlens, slopes, scale, causal)
    out: Tensor = _attention(query, key, value, cu_seqlens, slopes, scale, causal)[0]
    return out


def attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    slopes: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """:func:`attention`, and the natural log of the sums of exponentials of a query's scores.

    The second has the shape of ``query`` less its last dimension, in promote(dtype, fp32). Both have gradients. On a
    CPU all scores are held in memory.
    """
    query, key, value = _autocast(query, key, value)
    scale = _scale(scale, query)
    _check(query, key, value, cu_seqlens, slopes, scale, causal)
    out, lse = _attention(query, key, value, cu_seqlens, slopes, scale, causal)
    return out, lse


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or tensors[0].dtype == torch.float64:
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) for x in tensors)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    causal: bool,
) -> None:
    shape = tuple(query.shape)
    if query.ndim not in (4, 5) or key.ndim != 4:
        raise ValueError(
            f"attention: query has shape {shape} and key {tuple(key.shape)}, expected [B, A, S, D] (or "
            "[B, G, Q, S, D]) and [B, G, T, D]"
        )
    b, g, t, d = key.shape
    if value.shape != key.shape or query.shape[0] != b or query.shape[-1] != d:
        raise ValueError(
            f"attention: query has shape {shape}, key {tuple(key.shape)} and value {tuple(value.shape)}, expected "
            "one B, one D, and as many keys as values"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"attention: query is {query.dtype}, key {key.dtype} and value {value.dtype}, expected one dtype"
        )
    heads, s = query.shape[1:-2].numel(), query.shape[-2]
    if (query.shape[1] != g) if query.ndim == 5 else (g == 0 or heads % g):
        raise ValueError(
            f"attention: {heads} query heads, shape {shape}, do not divide into {g} groups of key and value"
        )
    if t < (s if causal else 1):
        raise ValueError(f"attention: {s} queries and {t} keys, expected {'no fewer keys' if causal else 'a key'}")
    if cu_seqlens is not None and (
        cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32 or len(cu_seqlens) < 2 or s != t
    ):
        raise ValueError(
            f"attention: cu_seqlens has shape {tuple(cu_seqlens.shape)} of {cu_seqlens.dtype}, expected "
            f"[documents + 1] of torch.int32, and as many queries ({s}) as keys ({t})"
        )
    if cu_seqlens is not None and not cu_seqlens.is_cuda and not torch.compiler.is_compiling():
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != b * s or any(end < begin for begin, end in pairwise(ends)):
            raise ValueError(
                f"attention: cu_seqlens goes from {ends[0]} to {ends[-1]}, expected from 0 to {b * s}, the number of"
                " tokens, and never less than before"
            )
    if slopes is not None and slopes.shape != (heads,):
        raise ValueError(f"attention: slopes have shape {tuple(slopes.shape)}, expected [{heads}], one for every head")
    if not 0 < scale < math.inf:
        raise ValueError(f"attention: scale is {scale}, expected a positive number")
