"""The Triton kernels of attention's backward pass: gradients of the queries, and of keys and values.

Nothing is added atomically: dk and dv go over the query heads of their group one after the other. The dq kernel also
writes ``delta``, sums of ``d_out * out`` less the gradient of the log-sum-exp, which dk and dv need after it. See
:mod:`megapoly_kernels.attention_tiles`.
"""

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

# By head dimension. Queries are tiled by M, keys by N. All of 16 bits compile without spills. In products of fp32 whole
# rows are in registers: dq at 256 spills 4 to 6 KB, and without causality dk and dv at 256 and dq at 128 some bytes.
LAUNCH_DQ: Table = {
    (80, 2, 64): Launch({"BLOCK_M": 128, "BLOCK_N": 32}, warps=8, stages=2),
    (80, 2, 128): Launch({"BLOCK_M": 64, "BLOCK_N": 64}, warps=8, stages=2),
    (80, 2, 256): Launch({"BLOCK_M": 64, "BLOCK_N": 32}, warps=8, stages=1),
    (80, 4, 64): Launch({"BLOCK_M": 32, "BLOCK_N": 32}, warps=8, stages=1),
    (80, 4, 128): Launch({"BLOCK_M": 32, "BLOCK_N": 32}, warps=16, stages=1),
    (80, 4, 256): Launch({"BLOCK_M": 16, "BLOCK_N": 16}, warps=16, stages=1),
    (90, 2, 64): Launch({"BLOCK_M": 128, "BLOCK_N": 128}, warps=8, stages=2),
    (90, 2, 128): Launch({"BLOCK_M": 128, "BLOCK_N": 64}, warps=8, stages=2),
    (90, 2, 256): Launch({"BLOCK_M": 64, "BLOCK_N": 32}, warps=8, stages=2),
    (90, 4, 64): Launch({"BLOCK_M": 32, "BLOCK_N": 32}, warps=8, stages=1),
    (90, 4, 128): Launch({"BLOCK_M": 32, "BLOCK_N": 32}, warps=16, stages=1),
    (90, 4, 256): Launch({"BLOCK_M": 16, "BLOCK_N": 16}, warps=16, stages=1),
}  # fmt: skip
LAUNCH_DKDV: Table = {
    (80, 2, 64): Launch({"BLOCK_M": 32, "BLOCK_N": 64}, warps=8, stages=2),
    (80, 2, 128): Launch({"BLOCK_M": 32, "BLOCK_N": 64}, warps=8, stages=2),
    (80, 2, 256): Launch({"BLOCK_M": 16, "BLOCK_N": 64}, warps=8, stages=1),
    (80, 4, 64): Launch({"BLOCK_M": 32, "BLOCK_N": 32}, warps=8, stages=1),
    (80, 4, 128): Launch({"BLOCK_M": 32, "BLOCK_N": 32}, warps=8, stages=1),
    (80, 4, 256): Launch({"BLOCK_M": 16, "BLOCK_N": 16}, warps=16, stages=1),
    (90, 2, 64): Launch({"BLOCK_M": 64, "BLOCK_N": 128}, warps=8, stages=2),
    (90, 2, 128): Launch({"BLOCK_M": 32, "BLOCK_N": 128}, warps=8, stages=2),
    (90, 2, 256): Launch({"BLOCK_M": 16, "BLOCK_N": 64}, warps=8, stages=2),
    (90, 4, 64): Launch({"BLOCK_M": 32, "BLOCK_N": 32}, warps=8, stages=1),
    (90, 4, 128): Launch({"BLOCK_M": 32, "BLOCK_N": 32}, warps=8, stages=1),
    (90, 4, 256): Launch({"BLOCK_M": 16, "BLOCK_N": 16}, warps=16, stages=1),
}  # fmt: skip


@jit
def _visit_keys_for_dq(
    dq, q, do, lse, delta, k_ptr, v_ptr, k_stride, v_stride, in_k, in_v, column, at, first, last, slope, scale,
    start, stop, T, D: tl.constexpr, CAUSAL: tl.constexpr, ALIBI: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    for begin in range(start, stop, BLOCK_N):
        keys = begin + tl.arange(0, BLOCK_N)
        k = load(k_ptr + tl.cast(begin, tl.int64) * k_stride + in_k, keys < T, column < D, MASKED, D < BLOCK_D)
        v = load(v_ptr + tl.cast(begin, tl.int64) * v_stride + in_v, keys < T, column < D, MASKED, D < BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale - lse[:, None]
        if ALIBI:
            s -= slope * distances(at[:, None], keys[None, :], CAUSAL)
        p = tl.exp2(s)
        if MASKED:
            p = tl.where((keys[None, :] >= first[:, None]) & (keys[None, :] < last[:, None]), p, 0.0)
        ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@jit
def _backward_dq(
    dq_ptr, delta_ptr, do_ptr, d_lse_ptr, o_ptr, lse_ptr, q_ptr, k_ptr, v_ptr, spans_ptr, slopes_ptr,
    scale, queries, S, T, tokens,
    dq_batch, dq_group, dq_query, dq_stride,
    do_batch, do_group, do_query, do_stride,
    o_batch, o_group, o_query, o_stride,
    q_batch, q_group, q_query, q_stride,
    k_batch, k_group, k_stride,
    v_batch, v_group, v_stride,
    D: tl.constexpr, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr, ALIBI: tl.constexpr, HAS_D_LSE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head, row = tl.program_id(1), tl.program_id(2)
    group, query = head // queries, head % queries
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    rows, column = tile + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    at, inside = rows + (T - S), rows < S
    k_ptr = tile_of(k_ptr, row, group, 0, 0, k_batch, k_group, 0, k_stride)
    v_ptr = tile_of(v_ptr, row, group, 0, 0, v_batch, v_group, 0, v_stride)
    in_k = tl.arange(0, BLOCK_N)[:, None] * k_stride + column[None, :]
    in_v = tl.arange(0, BLOCK_N)[:, None] * v_stride + column[None, :]
    in_tile = tl.arange(0, BLOCK_M)[:, None]
    do_ptr = tile_of(do_ptr, row, group, query, tile, do_batch, do_group, do_query, do_stride)
    o_ptr = tile_of(o_ptr, row, group, query, tile, o_batch, o_group, o_query, o_stride)
    q_ptr = tile_of(q_ptr, row, group, query, tile, q_batch, q_group, q_query, q_stride)
    do = load(do_ptr + in_tile * do_stride + column[None, :], inside, column < D, True, D < BLOCK_D)
    o = load(o_ptr + in_tile * o_stride + column[None, :], inside, column < D, True, D < BLOCK_D)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    whole_head = (row * tl.num_programs(1) + head).to(tl.int64) * S
    if HAS_D_LSE:
        delta -= tl.load(d_lse_ptr + whole_head + rows, mask=inside, other=0.0)
    tl.store(delta_ptr + whole_head + rows, delta, mask=inside)
    q = load(q_ptr + in_tile * q_stride + column[None, :], inside, column < D, True, D < BLOCK_D)
    # Rows behind the last have p = exp2(-inf) = 0.
    lse = tl.load(lse_ptr + whole_head + rows, mask=inside, other=float("inf")) * 1.4426950408889634
    slope = 0.0
    scale_2 = scale * 1.4426950408889634
    if ALIBI:
        slope = tl.load(slopes_ptr + head).to(tl.float32) * 1.4426950408889634
    first, last = span(at, row, spans_ptr, tokens, T, DOCUMENTS)
    if CAUSAL:
        last = at + 1
    end = tl.minimum(tl.max(last, 0), T)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    plain = 0
    if DOCUMENTS:
        start = tl.min(first, 0) // BLOCK_N * BLOCK_N
        plain = tl.minimum((tl.max(first, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N, end)
        dq = _visit_keys_for_dq(
            dq, q, do, lse, delta, k_ptr, v_ptr, k_stride, v_stride, in_k, in_v, column, at, first, last, slope,
            scale_2, start, plain, T, D, CAUSAL, ALIBI, True, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    masked = tl.maximum(plain, tl.min(last, 0) // BLOCK_N * BLOCK_N)
    dq = _visit_keys_for_dq(
        dq, q, do, lse, delta, k_ptr, v_ptr, k_stride, v_stride, in_k, in_v, column, at, first, last, slope,
        scale_2, plain, masked, T, D, CAUSAL, ALIBI, False, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    dq = _visit_keys_for_dq(
        dq, q, do, lse, delta, k_ptr, v_ptr, k_stride, v_stride, in_k, in_v, column, at, first, last, slope,
        scale_2, masked, end, T, D, CAUSAL, ALIBI, True, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    dq_ptr = tile_of(dq_ptr, row, group, query, tile, dq_batch, dq_group, dq_query, dq_stride)
    dq = (dq * scale).to(dq_ptr.dtype.element_ty)
    tl.store(dq_ptr + in_tile * dq_stride + column[None, :], dq, mask=inside[:, None] & (column < D)[None, :])


@jit
def _visit_queries(
    dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, q_stride, do_stride, in_q, in_do, column, keys, first, last,
    slope, scale, start, stop, S, T,
    D: tl.constexpr, CAUSAL: tl.constexpr, ALIBI: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    for begin in range(start, stop, BLOCK_M):
        rows = begin + tl.arange(0, BLOCK_M)
        at = rows + (T - S)
        q = load(q_ptr + tl.cast(begin, tl.int64) * q_stride + in_q, rows < S, column < D, True, D < BLOCK_D)
        do = load(do_ptr + tl.cast(begin, tl.int64) * do_stride + in_do, rows < S, column < D, True, D < BLOCK_D)
        lse = tl.load(lse_ptr + rows, mask=rows < S, other=float("inf")) * 1.4426950408889634
        delta = tl.load(delta_ptr + rows, mask=rows < S, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * scale - lse[None, :]
        if ALIBI:
            s -= slope * distances(at[None, :], keys[:, None], CAUSAL)
        p = tl.exp2(s)
        if MASKED:
            p = tl.where((at[None, :] >= first[:, None]) & (at[None, :] < last[:, None]), p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@jit
def _backward_dkdv(
    dk_ptr, dv_ptr, do_ptr, delta_ptr, lse_ptr, q_ptr, k_ptr, v_ptr, spans_ptr, slopes_ptr,
    scale, queries, S, T, tokens,
    dk_batch, dk_group, dk_stride,
    dv_batch, dv_group, dv_stride,
    do_batch, do_group, do_query, do_stride,
    q_batch, q_group, q_query, q_stride,
    k_batch, k_group, k_stride,
    v_batch, v_group, v_stride,
    D: tl.constexpr, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr, ALIBI: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile, group, row = tl.program_id(0) * BLOCK_N, tl.program_id(1), tl.program_id(2)
    keys, column = tile + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    inside, in_tile = keys < T, tl.arange(0, BLOCK_N)[:, None]
    k_ptr = tile_of(k_ptr, row, group, 0, tile, k_batch, k_group, 0, k_stride)
    v_ptr = tile_of(v_ptr, row, group, 0, tile, v_batch, v_group, 0, v_stride)
    k = load(k_ptr + in_tile * k_stride + column[None, :], inside, column < D, True, D < BLOCK_D)
    v = load(v_ptr + in_tile * v_stride + column[None, :], inside, column < D, True, D < BLOCK_D)
    first, last = span(keys, row, spans_ptr, tokens, T, DOCUMENTS)
    if CAUSAL:
        first = keys
    before = T - S  # positions of the queries begin here
    start = 0
    if CAUSAL or DOCUMENTS:
        start = tl.maximum(tl.min(first, 0) - before, 0) // BLOCK_M * BLOCK_M
    end = tl.max(last, 0) - before
    in_q = tl.arange(0, BLOCK_M)[:, None] * q_stride + column[None, :]
    in_do = tl.arange(0, BLOCK_M)[:, None] * do_stride + column[None, :]
    q_ptr = tile_of(q_ptr, row, group, 0, 0, q_batch, q_group, 0, q_stride)
    do_ptr = tile_of(do_ptr, row, group, 0, 0, do_batch, do_group, 0, do_stride)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    slope = 0.0
    scale_2 = scale * 1.4426950408889634
    for query in range(0, queries):
        head = group * queries + query
        whole_head = (row * tl.num_programs(1) * queries + head).to(tl.int64) * S
        if ALIBI:
            slope = tl.load(slopes_ptr + head).to(tl.float32) * 1.4426950408889634
        q_head = q_ptr + tl.cast(query, tl.int64) * q_query
        do_head = do_ptr + tl.cast(query, tl.int64) * do_query
        dk, dv = _visit_queries(
            dk, dv, k, v, q_head, do_head, lse_ptr + whole_head, delta_ptr + whole_head, q_stride, do_stride, in_q,
            in_do, column, keys, first, last, slope, scale_2, start, end, S, T,
            D, CAUSAL, ALIBI, CAUSAL or DOCUMENTS, BLOCK_M, BLOCK_D,
        )  # fmt: skip
    dk_ptr = tile_of(dk_ptr, row, group, 0, tile, dk_batch, dk_group, 0, dk_stride)
    dv_ptr = tile_of(dv_ptr, row, group, 0, tile, dv_batch, dv_group, 0, dv_stride)
    mask = inside[:, None] & (column < D)[None, :]
    tl.store(dk_ptr + in_tile * dk_stride + column[None, :], (dk * scale).to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + in_tile * dv_stride + column[None, :], dv.to(dv_ptr.dtype.element_ty), mask=mask)


def backward(
    d_out: Tensor, d_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens: Tensor | None, slopes: Tensor | None, scale: float, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key and value."""
    b, g, queries, s, d = query.shape
    dq, dk, dv = empty_like(query), empty_like(key), empty_like(value)
    delta, arch = torch.empty_like(lse), architecture(query.device)
    arguments = run_time(query, key, cu_seqlens, slopes, scale)
    constants = constants_of(d, cu_seqlens, slopes, causal)
    with on_device(query):
        if dq.numel():
            chosen = settings(LAUNCH_DQ, arch, query.element_size(), d)
            _backward_dq[cdiv(s, chosen.constants["BLOCK_M"]), g * queries, b](
                dq, delta, d_out, d_lse, out, lse, query, key, value, *arguments,
                *strides(dq, d_out, out, query, key, value),
                **constants, HAS_D_LSE=d_lse is not None, **chosen.options,
            )  # fmt: skip
        if dk.numel():
            chosen = settings(LAUNCH_DKDV, arch, query.element_size(), d)
            _backward_dkdv[cdiv(key.shape[2], chosen.constants["BLOCK_N"]), g, b](
                dk, dv, d_out, delta, lse, query, key, value, *arguments,
                *strides(dk, dv, d_out, query, key, value), **constants, **chosen.options,
            )  # fmt: skip
    return dq, dk, dv


def variants(arch: int) -> Iterator[Variant]:
    """What is compiled ahead of time."""
    kernels = [("dq", _backward_dq, lambda alibi: LAUNCH_DQ), ("dk, dv", _backward_dkdv, lambda alibi: LAUNCH_DKDV)]
    return variants_of(kernels, arch)
