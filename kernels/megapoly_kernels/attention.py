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
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from megapoly_kernels import attention_tiles_backward, attention_tiles_forward
from megapoly_kernels.attention_libraries import by_flash_attn, by_sdpa, flash_attn_library
from megapoly_kernels.attention_reference import attention_reference, attention_reference_backward, by_group, scale_of
from megapoly_kernels.attention_tiles import empty_like
from megapoly_kernels.launch import known_backend, runs_triton, wide_dtype

BACKENDS = ("auto", "triton", "sdpa", "flash_attn")


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
        _dense(by_group(query, key)), _dense(key), _dense(value), cu_seqlens, slopes, scale, causal
    )
    return out.flatten(1, 2) if query.ndim == 4 else out, lse.view(query.shape[:-1])


def attention_backward(
    d_out: Tensor, d_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens: Tensor | None, slopes: Tensor | None, scale: float, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key and value, of those of ``out`` and of the log-sum-exp."""
    if not _by_kernels(query):
        return attention_reference_backward(
            d_out, d_lse, query, key, value, out, lse, cu_seqlens, slopes, scale, causal
        )  # fmt: skip
    dq, dk, dv = attention_tiles_backward.backward(
        _dense(by_group(d_out, key)), None if d_lse is None else d_lse.contiguous(), _dense(by_group(query, key)),
        _dense(key), _dense(value), _dense(by_group(out, key)), lse.contiguous(), cu_seqlens, slopes, scale, causal,
    )  # fmt: skip
    return dq.flatten(1, 2) if query.ndim == 4 else dq, dk, dv


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
        flash_attn_library()
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
    scale = scale_of(scale, query)
    _check(query, key, value, cu_seqlens, slopes, scale, causal)
    backend = resolve(backend, query)
    if backend == "sdpa":
        return by_sdpa(query, key, value, cu_seqlens, slopes, scale, causal)
    if backend == "flash_attn":
        return by_flash_attn(query, key, value, cu_seqlens, slopes, scale, causal)
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
    scale = scale_of(scale, query)
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
