"""The Triton kernel of attention's forward pass; see :mod:`megapoly_kernels.attention_tiles`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megapoly_kernels.attention_tiles import (
    constants_of,
    distances,
    empty_like,
    load,
    run_time,
    span,
    strides,
    tile_of,
    variants_of,
)
from megapoly_kernels.launch import Launch, Table, Variant, architecture, cdiv, jit, on_device, settings, tl

# By head dimension. Queries are tiled by M, keys by N.
LAUNCH_FORWARD: Table = {
    (80, 2, 64): Launch({"BLOCK_M": 128, "BLOCK_N": 64}, warps=8, stages=3),
    (80, 2, 128): Launch({"BLOCK_M": 128, "BLOCK_N": 32}, warps=8, stages=3),
    (80, 2, 256): Launch({"BLOCK_M": 64, "BLOCK_N": 64}, warps=8, stages=2),
    (80, 4, 64): Launch({"BLOCK_M": 32, "BLOCK_N": 32}, warps=8, stages=1),
    (80, 4, 128): Launch({"BLOCK_M": 32, "BLOCK_N": 32}, warps=8, stages=1),
    (80, 4, 256): Launch({"BLOCK_M": 32, "BLOCK_N": 32}, warps=16, stages=1),
    (90, 2, 64): Launch({"BLOCK_M": 128, "BLOCK_N": 128}, warps=8, stages=3),
    (90, 2, 128): Launch({"BLOCK_M": 128, "BLOCK_N": 128}, warps=8, stages=2),
    (90, 2, 256): Launch({"BLOCK_M": 128, "BLOCK_N": 32}, warps=8, stages=2),
    (90, 4, 64): Launch({"BLOCK_M": 32, "BLOCK_N": 32}, warps=8, stages=1),
    (90, 4, 128): Launch({"BLOCK_M": 32, "BLOCK_N": 32}, warps=8, stages=1),
    (90, 4, 256): Launch({"BLOCK_M": 32, "BLOCK_N": 32}, warps=16, stages=1),
}  # fmt: skip
# With ALiBi, which takes registers.
LAUNCH_FORWARD_ALIBI: Table = {
    **LAUNCH_FORWARD,
    (80, 2, 256): Launch({"BLOCK_M": 64, "BLOCK_N": 64}, warps=8, stages=1),
    (90, 2, 128): Launch({"BLOCK_M": 128, "BLOCK_N": 64}, warps=8, stages=3),
}


@jit
def _visit_keys(
    total, most, sums, q, k_ptr, v_ptr, k_stride, v_stride, in_k, in_v, column, at, first, last, slope, scale,
    start, stop, T, D: tl.constexpr, CAUSAL: tl.constexpr, ALIBI: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    for begin in range(start, stop, BLOCK_N):
        keys = begin + tl.arange(0, BLOCK_N)
        k = load(k_ptr + tl.cast(begin, tl.int64) * k_stride + in_k, keys < T, column < D, MASKED, D < BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if ALIBI:
            s = s * scale - slope * distances(at[:, None], keys[None, :], CAUSAL)
        if MASKED:  # ``most`` begins finite, so that a row of a tile may be masked as a whole.
            s = tl.where((keys[None, :] >= first[:, None]) & (keys[None, :] < last[:, None]), s, float("-inf"))
        if ALIBI:
            now = tl.maximum(most, tl.max(s, 1))
            p = tl.exp2(s - now[:, None])
        else:
            now = tl.maximum(most, tl.max(s, 1) * scale)
            p = tl.exp2(s * scale - now[:, None])
        shrink = tl.exp2(most - now)
        sums = sums * shrink + tl.sum(p, 1)
        v = load(v_ptr + tl.cast(begin, tl.int64) * v_stride + in_v, keys < T, column < D, MASKED, D < BLOCK_D)
        total = tl.dot(p.to(v.dtype), v, total * shrink[:, None], input_precision="ieee")
        most = now
    return total, most, sums


@jit
def _forward(
    o_ptr, lse_ptr, q_ptr, k_ptr, v_ptr, spans_ptr, slopes_ptr, scale, queries, S, T, tokens,
    o_batch, o_group, o_query, o_stride,
    q_batch, q_group, q_query, q_stride,
    k_batch, k_group, k_stride,
    v_batch, v_group, v_stride,
    D: tl.constexpr, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr, ALIBI: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head, row = tl.program_id(1), tl.program_id(2)
    group, query = head // queries, head % queries
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # the longest first
    rows, column = tile + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    at = rows + (T - S)
    q_ptr = tile_of(q_ptr, row, group, query, tile, q_batch, q_group, q_query, q_stride)
    k_ptr = tile_of(k_ptr, row, group, 0, 0, k_batch, k_group, 0, k_stride)
    v_ptr = tile_of(v_ptr, row, group, 0, 0, v_batch, v_group, 0, v_stride)
    in_q = tl.arange(0, BLOCK_M)[:, None] * q_stride + column[None, :]
    in_k = tl.arange(0, BLOCK_N)[:, None] * k_stride + column[None, :]
    in_v = tl.arange(0, BLOCK_N)[:, None] * v_stride + column[None, :]
    q = load(q_ptr + in_q, rows < S, column < D, True, D < BLOCK_D)
    slope = 0.0
    scale *= 1.4426950408889634
    if ALIBI:
        slope = tl.load(slopes_ptr + head).to(tl.float32) * 1.4426950408889634
    first, last = span(at, row, spans_ptr, tokens, T, DOCUMENTS)
    if CAUSAL:
        last = at + 1
    end = tl.minimum(tl.max(last, 0), T)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    most = tl.full([BLOCK_M], -1e30, tl.float32)
    sums = tl.zeros([BLOCK_M], tl.float32)
    plain = 0
    if DOCUMENTS:
        start = tl.min(first, 0) // BLOCK_N * BLOCK_N
        plain = tl.minimum((tl.max(first, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N, end)
        total, most, sums = _visit_keys(
            total, most, sums, q, k_ptr, v_ptr, k_stride, v_stride, in_k, in_v, column, at, first, last, slope, scale,
            start, plain, T, D, CAUSAL, ALIBI, True, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    masked = tl.maximum(plain, tl.min(last, 0) // BLOCK_N * BLOCK_N)
    total, most, sums = _visit_keys(
        total, most, sums, q, k_ptr, v_ptr, k_stride, v_stride, in_k, in_v, column, at, first, last, slope, scale,
        plain, masked, T, D, CAUSAL, ALIBI, False, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    total, most, sums = _visit_keys(
        total, most, sums, q, k_ptr, v_ptr, k_stride, v_stride, in_k, in_v, column, at, first, last, slope, scale,
        masked, end, T, D, CAUSAL, ALIBI, True, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    lse = (most + tl.log2(sums)) * 0.6931471805599453
    whole_head = (row * tl.num_programs(1) + head).to(tl.int64)
    tl.store(lse_ptr + whole_head * S + rows, lse, mask=rows < S)
    o_ptr = tile_of(o_ptr, row, group, query, tile, o_batch, o_group, o_query, o_stride)
    in_o = tl.arange(0, BLOCK_M)[:, None] * o_stride + column[None, :]
    o = (total / sums[:, None]).to(o_ptr.dtype.element_ty)
    tl.store(o_ptr + in_o, o, mask=(rows < S)[:, None] & (column < D)[None, :])


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """``out`` [B, G, Q, S, D], see :func:`empty_like`, and the log-sum-exp [B, G, Q, S] in fp32."""
    b, g, queries, s, d = query.shape
    out, lse = empty_like(query), query.new_empty(b, g, queries, s, dtype=torch.float32)
    table = LAUNCH_FORWARD if slopes is None else LAUNCH_FORWARD_ALIBI
    chosen = settings(table, architecture(query.device), query.element_size(), d)
    if out.numel():
        with on_device(query):
            _forward[cdiv(s, chosen.constants["BLOCK_M"]), g * queries, b](
                out, lse, query, key, value, *run_time(query, key, cu_seqlens, slopes, scale),
                *strides(out, query, key, value), **constants_of(d, cu_seqlens, slopes, causal), **chosen.options,
            )  # fmt: skip
    return out, lse


def variants(arch: int) -> Iterator[Variant]:
    """What is compiled ahead of time."""
    kernels = [("forward", _forward, lambda alibi: LAUNCH_FORWARD_ALIBI if alibi else LAUNCH_FORWARD)]
    return variants_of(kernels, arch)
