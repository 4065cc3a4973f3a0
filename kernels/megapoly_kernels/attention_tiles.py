"""Triton kernels of :mod:`megapoly_kernels.attention`: forward, gradient of the queries, gradient of keys and values.

A program holds one tile of queries (forward, dq) or of keys (dk and dv), and visits the tiles of the other side that it
has anything to do with. By documents and causality every query sees an interval of keys, and every key is seen by an
interval of queries. So tiles are skipped where nothing is seen, masked at the ends of
intervals, and plain in between. Scores are in units of log 2, for exp2.

Nothing is added atomically: dk and dv go over the query heads of their group one after the other. The dq kernel also
writes ``delta``, sums of ``d_out * out`` less the gradient of the log-sum-exp, which dk and dv need after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megapoly_kernels.launch import Launch, Table, Variant, architecture, cdiv, jit, on_device, settings, tl

# By head dimension. Queries are tiled by M, keys by N. All but dq of fp32 at 256 compile without spills: in products of
# fp32 whole rows are in registers.
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
    (90, 2, 128): Launch({"BLOCK_M": 128, "BLOCK_N": 64}, warps=8, stages=3),
}
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
LAUNCH_DOCUMENTS = Launch({"BLOCK": 256})
LAUNCH_DKDV: Table = {
    (80, 2, 64): Launch({"BLOCK_M": 32, "BLOCK_N": 128}, warps=8, stages=2),
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
def _documents(spans_ptr, cu_ptr, count, steps, tokens, length, BLOCK: tl.constexpr):
    """Of every token of all rows: where in its row its document begins, and where it ends.

    A kernel of its own, as the compiler does not pipeline the loads of a kernel that searches.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low = at * 0
    high = low + count
    for _ in range(steps):
        middle = (low + high) // 2
        before = tl.load(cu_ptr + middle) <= at
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    row = at // length * length
    first = tl.maximum(tl.load(cu_ptr + low) - row, 0)
    last = tl.minimum(tl.load(cu_ptr + low + 1) - row, length)
    tl.store(spans_ptr + at, first, mask=at < tokens)
    tl.store(spans_ptr + tokens + at, last, mask=at < tokens)


@jit
def _span(at, row, spans_ptr, tokens, T, DOCUMENTS: tl.constexpr):
    """The interval [first, last) of positions that ``at`` shares a document with."""
    first = at * 0
    last = first + T
    if DOCUMENTS:
        place = spans_ptr + row * T + tl.minimum(at, T - 1)
        first = tl.load(place)
        last = tl.load(place + tokens)
    return first, last


@jit
def _tile(ptr, row, group, query, tile, by_row, by_group, by_query, by_token):
    """Where a tile of a head begins. Offsets inside of tiles are whatever the strides are, as a rule int32."""
    ptr += tl.cast(row, tl.int64) * by_row + tl.cast(group, tl.int64) * by_group
    return ptr + tl.cast(query, tl.int64) * by_query + tl.cast(tile, tl.int64) * by_token


@jit
def _load(pointers, rows, columns, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr):
    """A tile, with zeros where it ends."""
    if MASK_ROWS and MASK_COLUMNS:
        return tl.load(pointers, mask=rows[:, None] & columns[None, :], other=0.0)
    if MASK_ROWS:
        return tl.load(pointers, mask=rows[:, None], other=0.0)
    if MASK_COLUMNS:
        return tl.load(pointers, mask=columns[None, :], other=0.0)
    return tl.load(pointers)


@jit
def _distance(at, keys, CAUSAL: tl.constexpr):
    distance = at.to(tl.float32) - keys.to(tl.float32)
    return distance if CAUSAL else tl.abs(distance)


@jit
def _visit_keys(
    total, most, sums, q, k_ptr, v_ptr, k_stride, v_stride, in_k, in_v, column, at, first, last, slope, scale,
    start, stop, T, D: tl.constexpr, CAUSAL: tl.constexpr, ALIBI: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    for begin in range(start, stop, BLOCK_N):
        keys = begin + tl.arange(0, BLOCK_N)
        k = _load(k_ptr + tl.cast(begin, tl.int64) * k_stride + in_k, keys < T, column < D, MASKED, D < BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if ALIBI:
            s = s * scale - slope * _distance(at[:, None], keys[None, :], CAUSAL)
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
        v = _load(v_ptr + tl.cast(begin, tl.int64) * v_stride + in_v, keys < T, column < D, MASKED, D < BLOCK_D)
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
    q_ptr = _tile(q_ptr, row, group, query, tile, q_batch, q_group, q_query, q_stride)
    k_ptr = _tile(k_ptr, row, group, 0, 0, k_batch, k_group, 0, k_stride)
    v_ptr = _tile(v_ptr, row, group, 0, 0, v_batch, v_group, 0, v_stride)
    in_q = tl.arange(0, BLOCK_M)[:, None] * q_stride + column[None, :]
    in_k = tl.arange(0, BLOCK_N)[:, None] * k_stride + column[None, :]
    in_v = tl.arange(0, BLOCK_N)[:, None] * v_stride + column[None, :]
    q = _load(q_ptr + in_q, rows < S, column < D, True, D < BLOCK_D)
    slope = 0.0
    scale *= 1.4426950408889634
    if ALIBI:
        slope = tl.load(slopes_ptr + head).to(tl.float32) * 1.4426950408889634
    first, last = _span(at, row, spans_ptr, tokens, T, DOCUMENTS)
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
    o_ptr = _tile(o_ptr, row, group, query, tile, o_batch, o_group, o_query, o_stride)
    in_o = tl.arange(0, BLOCK_M)[:, None] * o_stride + column[None, :]
    o = (total / sums[:, None]).to(o_ptr.dtype.element_ty)
    tl.store(o_ptr + in_o, o, mask=(rows < S)[:, None] & (column < D)[None, :])


@jit
def _visit_keys_for_dq(
    dq, q, do, lse, delta, k_ptr, v_ptr, k_stride, v_stride, in_k, in_v, column, at, first, last, slope, scale,
    start, stop, T, D: tl.constexpr, CAUSAL: tl.constexpr, ALIBI: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    for begin in range(start, stop, BLOCK_N):
        keys = begin + tl.arange(0, BLOCK_N)
        k = _load(k_ptr + tl.cast(begin, tl.int64) * k_stride + in_k, keys < T, column < D, MASKED, D < BLOCK_D)
        v = _load(v_ptr + tl.cast(begin, tl.int64) * v_stride + in_v, keys < T, column < D, MASKED, D < BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale - lse[:, None]
        if ALIBI:
            s -= slope * _distance(at[:, None], keys[None, :], CAUSAL)
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
    k_ptr = _tile(k_ptr, row, group, 0, 0, k_batch, k_group, 0, k_stride)
    v_ptr = _tile(v_ptr, row, group, 0, 0, v_batch, v_group, 0, v_stride)
    in_k = tl.arange(0, BLOCK_N)[:, None] * k_stride + column[None, :]
    in_v = tl.arange(0, BLOCK_N)[:, None] * v_stride + column[None, :]
    in_tile = tl.arange(0, BLOCK_M)[:, None]
    do_ptr = _tile(do_ptr, row, group, query, tile, do_batch, do_group, do_query, do_stride)
    o_ptr = _tile(o_ptr, row, group, query, tile, o_batch, o_group, o_query, o_stride)
    q_ptr = _tile(q_ptr, row, group, query, tile, q_batch, q_group, q_query, q_stride)
    do = _load(do_ptr + in_tile * do_stride + column[None, :], inside, column < D, True, D < BLOCK_D)
    o = _load(o_ptr + in_tile * o_stride + column[None, :], inside, column < D, True, D < BLOCK_D)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    whole_head = (row * tl.num_programs(1) + head).to(tl.int64) * S
    if HAS_D_LSE:
        delta -= tl.load(d_lse_ptr + whole_head + rows, mask=inside, other=0.0)
    tl.store(delta_ptr + whole_head + rows, delta, mask=inside)
    q = _load(q_ptr + in_tile * q_stride + column[None, :], inside, column < D, True, D < BLOCK_D)
    # Rows behind the last have p = exp2(-inf) = 0.
    lse = tl.load(lse_ptr + whole_head + rows, mask=inside, other=float("inf")) * 1.4426950408889634
    slope = 0.0
    scale_2 = scale * 1.4426950408889634
    if ALIBI:
        slope = tl.load(slopes_ptr + head).to(tl.float32) * 1.4426950408889634
    first, last = _span(at, row, spans_ptr, tokens, T, DOCUMENTS)
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
    dq_ptr = _tile(dq_ptr, row, group, query, tile, dq_batch, dq_group, dq_query, dq_stride)
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
        q = _load(q_ptr + tl.cast(begin, tl.int64) * q_stride + in_q, rows < S, column < D, True, D < BLOCK_D)
        do = _load(do_ptr + tl.cast(begin, tl.int64) * do_stride + in_do, rows < S, column < D, True, D < BLOCK_D)
        lse = tl.load(lse_ptr + rows, mask=rows < S, other=float("inf")) * 1.4426950408889634
        delta = tl.load(delta_ptr + rows, mask=rows < S, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * scale - lse[None, :]
        if ALIBI:
            s -= slope * _distance(at[None, :], keys[:, None], CAUSAL)
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
    k_ptr = _tile(k_ptr, row, group, 0, tile, k_batch, k_group, 0, k_stride)
    v_ptr = _tile(v_ptr, row, group, 0, tile, v_batch, v_group, 0, v_stride)
    k = _load(k_ptr + in_tile * k_stride + column[None, :], inside, column < D, True, D < BLOCK_D)
    v = _load(v_ptr + in_tile * v_stride + column[None, :], inside, column < D, True, D < BLOCK_D)
    first, last = _span(keys, row, spans_ptr, tokens, T, DOCUMENTS)
    if CAUSAL:
        first = keys
    before = T - S  # positions of the queries begin here
    start = 0
    if CAUSAL or DOCUMENTS:
        start = tl.maximum(tl.min(first, 0) - before, 0) // BLOCK_M * BLOCK_M
    end = tl.max(last, 0) - before
    in_q = tl.arange(0, BLOCK_M)[:, None] * q_stride + column[None, :]
    in_do = tl.arange(0, BLOCK_M)[:, None] * do_stride + column[None, :]
    q_ptr = _tile(q_ptr, row, group, 0, 0, q_batch, q_group, 0, q_stride)
    do_ptr = _tile(do_ptr, row, group, 0, 0, do_batch, do_group, 0, do_stride)
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
    dk_ptr = _tile(dk_ptr, row, group, 0, tile, dk_batch, dk_group, 0, dk_stride)
    dv_ptr = _tile(dv_ptr, row, group, 0, tile, dv_batch, dv_group, 0, dv_stride)
    mask = inside[:, None] & (column < D)[None, :]
    tl.store(dk_ptr + in_tile * dk_stride + column[None, :], (dk * scale).to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + in_tile * dv_stride + column[None, :], dv.to(dv_ptr.dtype.element_ty), mask=mask)


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
                out, lse, query, key, value, *_run_time(query, key, cu_seqlens, slopes, scale),
                *_strides(out, query, key, value), **_constants(d, cu_seqlens, slopes, causal), **chosen.options,
            )  # fmt: skip
    return out, lse


def backward(
    d_out: Tensor, d_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens: Tensor | None, slopes: Tensor | None, scale: float, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key and value."""
    b, g, queries, s, d = query.shape
    dq, dk, dv = empty_like(query), empty_like(key), empty_like(value)
    delta, arch = torch.empty_like(lse), architecture(query.device)
    run_time = _run_time(query, key, cu_seqlens, slopes, scale)
    constants = _constants(d, cu_seqlens, slopes, causal)
    with on_device(query):
        if dq.numel():
            chosen = settings(LAUNCH_DQ, arch, query.element_size(), d)
            _backward_dq[cdiv(s, chosen.constants["BLOCK_M"]), g * queries, b](
                dq, delta, d_out, d_lse, out, lse, query, key, value, *run_time,
                *_strides(dq, d_out, out, query, key, value),
                **constants, HAS_D_LSE=d_lse is not None, **chosen.options,
            )  # fmt: skip
        if dk.numel():
            chosen = settings(LAUNCH_DKDV, arch, query.element_size(), d)
            _backward_dkdv[cdiv(key.shape[2], chosen.constants["BLOCK_N"]), g, b](
                dk, dv, d_out, delta, lse, query, key, value, *run_time,
                *_strides(dk, dv, d_out, query, key, value), **constants, **chosen.options,
            )  # fmt: skip
    return dq, dk, dv


def empty_like(x: Tensor) -> Tensor:
    """Of the shape [B, ..., S, D], in memory [S, B, ..., D] or [B, S, ..., D], whichever is nearer to that of ``x``.

    So the heads of a token stand together, as the projection behind takes them.
    """
    b, *heads, s, d = x.shape
    if x.stride(-2) >= x.stride(0):
        return x.new_empty(s, b, *heads, d).movedim(0, -2)
    return x.new_empty(b, s, *heads, d).movedim(1, -2)


def _run_time(
    query: Tensor, key: Tensor, cu_seqlens: Tensor | None, slopes: Tensor | None, scale: float
) -> tuple[Any, ...]:
    b, _, queries, s, _ = query.shape
    spans = None if cu_seqlens is None else document_spans(cu_seqlens, b, s)
    return spans, slopes, scale, queries, s, key.shape[2], b * s


def document_spans(cu_seqlens: Tensor, rows: int, length: int) -> Tensor:
    """[2, rows, length] int32: where in its row the document of a token begins, and where it ends."""
    count, tokens = len(cu_seqlens) - 1, rows * length
    spans = torch.empty(2, rows, length, dtype=torch.int32, device=cu_seqlens.device)
    if tokens:
        with on_device(cu_seqlens):
            _documents[(cdiv(tokens, LAUNCH_DOCUMENTS.constants["BLOCK"]),)](
                spans, cu_seqlens.contiguous(), count, count.bit_length(), tokens, length, **LAUNCH_DOCUMENTS.options
            )
    return spans


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:-1]]


def _constants(d: int, cu_seqlens: Tensor | None, slopes: Tensor | None, causal: bool) -> dict[str, int]:
    options = {"CAUSAL": causal, "DOCUMENTS": cu_seqlens is not None, "ALIBI": slopes is not None}
    return {"D": d, "BLOCK_D": max(16, 1 << (d - 1).bit_length()), **options}


# Head dimension, and whether there are documents and ALiBi.
_CASES = (
    (64, True, True), (80, True, False), (128, False, False), (128, True, False), (128, True, True), (256, True, True),
)  # fmt: skip


def variants(arch: int) -> Iterator[Variant]:
    """What is compiled ahead of time."""
    types = {"spans_ptr": "*i32", "cu_ptr": "*i32"} | dict.fromkeys(("count", "steps", "tokens", "length"), "i32")
    yield Variant("attention documents", _documents, types, {}, LAUNCH_DOCUMENTS, wide=False)
    for kind, itemsize in (("bf16", 2), ("fp32", 4)):
        for d, documents, alibi in _CASES if itemsize == 2 else [(64, True, True)]:
            forward_table = LAUNCH_FORWARD_ALIBI if alibi else LAUNCH_FORWARD
            for name, kernel, table in (
                ("forward", _forward, forward_table),
                ("dq", _backward_dq, LAUNCH_DQ),
                ("dk, dv", _backward_dkdv, LAUNCH_DKDV),
            ):  # fmt: skip
                yield variant(name, kernel, kind, d, settings(table, arch, itemsize, d), documents, alibi, True)


def variant(
    name: str, kernel: Any, kind: str, d: int, launch: Launch, documents: bool, alibi: bool, causal: bool
) -> Variant:
    """One of :func:`variants`."""
    types: dict[str, str] = {}
    constants: dict[str, Any] = {"D": d, "BLOCK_D": 1 << (d - 1).bit_length(), "CAUSAL": causal}
    constants |= {"DOCUMENTS": documents, "ALIBI": alibi}
    absent = {"spans_ptr": not documents, "slopes_ptr": not alibi, "d_lse_ptr": not documents}
    narrow = {"spans_ptr": "*i32"} | dict.fromkeys(("lse_ptr", "delta_ptr", "d_lse_ptr", "slopes_ptr"), "*fp32")
    for each in kernel.arg_names:
        if each.endswith("_ptr"):
            if absent.get(each):
                constants[each] = None
            else:
                types[each] = narrow.get(each, f"*{kind}")
        elif each in ("queries", "S", "T", "tokens"):
            types[each] = "i32"
        elif each == "scale":
            types[each] = "fp32"
        elif each not in constants and not each.startswith("BLOCK_") and each != "HAS_D_LSE":
            types[each] = "i64"
    if kernel is _backward_dq:
        constants["HAS_D_LSE"] = documents
    what = f"attention {kind} {d}{' documents' * documents}{' alibi' * alibi}{' full' * (not causal)} {name}"
    odd = frozenset(("queries", "S", "T", "tokens"))
    return Variant(what, kernel, types, constants, launch, wgmma=kind == "bf16", odd=odd)
