"""What the Triton kernels of attention share: tiles, documents, and how they are started.

A program holds one tile of queries (forward, dq) or of keys (dk and dv), and visits the tiles of the other side that it
has anything to do with. By documents and causality every query sees an interval of keys, and every key is seen by an
interval of queries. So tiles are skipped where nothing is seen, masked at the ends of intervals, and plain in between.
Scores are in units of log 2, for exp2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megapoly_kernels.launch import Launch, Table, Variant, cdiv, jit, on_device, settings, tl

LAUNCH_DOCUMENTS = Launch({"BLOCK": 256})


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
def span(at, row, spans_ptr, tokens, T, DOCUMENTS: tl.constexpr):
    """The interval [first, last) of positions that ``at`` shares a document with."""
    first = at * 0
    last = first + T
    if DOCUMENTS:
        place = spans_ptr + row * T + tl.minimum(at, T - 1)
        first = tl.load(place)
        last = tl.load(place + tokens)
    return first, last


@jit
def tile_of(ptr, row, group, query, tile, by_row, by_group, by_query, by_token):
    """Where a tile of a head begins. Offsets inside of tiles are whatever the strides are, as a rule int32."""
    ptr += tl.cast(row, tl.int64) * by_row + tl.cast(group, tl.int64) * by_group
    return ptr + tl.cast(query, tl.int64) * by_query + tl.cast(tile, tl.int64) * by_token


@jit
def load(pointers, rows, columns, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr):
    """A tile, with zeros where it ends."""
    if MASK_ROWS and MASK_COLUMNS:
        return tl.load(pointers, mask=rows[:, None] & columns[None, :], other=0.0)
    if MASK_ROWS:
        return tl.load(pointers, mask=rows[:, None], other=0.0)
    if MASK_COLUMNS:
        return tl.load(pointers, mask=columns[None, :], other=0.0)
    return tl.load(pointers)


@jit
def distances(at, keys, CAUSAL: tl.constexpr):
    distance = at.to(tl.float32) - keys.to(tl.float32)
    return distance if CAUSAL else tl.abs(distance)


def empty_like(x: Tensor) -> Tensor:
    """Of the shape [B, ..., S, D], in memory [S, B, ..., D] or [B, S, ..., D], whichever is nearer to that of ``x``.

    So the heads of a token stand together, as the projection behind takes them.
    """
    b, *heads, s, d = x.shape
    if x.stride(-2) >= x.stride(0):
        return x.new_empty(s, b, *heads, d).movedim(0, -2)
    return x.new_empty(b, s, *heads, d).movedim(1, -2)


def run_time(
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


def strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:-1]]


def constants_of(d: int, cu_seqlens: Tensor | None, slopes: Tensor | None, causal: bool) -> dict[str, int]:
    options = {"CAUSAL": causal, "DOCUMENTS": cu_seqlens is not None, "ALIBI": slopes is not None}
    return {"D": d, "BLOCK_D": max(16, 1 << (d - 1).bit_length()), **options}


# Head dimension, and whether there are documents and ALiBi, and whether it is causal. Of fp32 what does not spill.
CASES = {
    "bf16": (
        (64, True, True, True), (80, True, False, True), (96, True, True, True), (128, False, False, True),
        (128, True, False, True), (128, True, True, True), (128, False, False, False), (256, True, True, True),
    ),
    "fp16": ((128, True, True, True),),
    "fp32": ((64, True, True, True), (128, True, True, True)),
}  # fmt: skip


def variants(arch: int) -> Iterator[Variant]:
    """What is compiled ahead of time of this file."""
    types = {"spans_ptr": "*i32", "cu_ptr": "*i32"} | dict.fromkeys(("count", "steps", "tokens", "length"), "i32")
    yield Variant("attention documents", _documents, types, {}, LAUNCH_DOCUMENTS, wide=False)


def variants_of(kernels: Sequence[tuple[str, Any, Callable[[bool], Table]]], arch: int) -> Iterator[Variant]:
    """Of kernels, each with its name and its launch table, with ALiBi and without."""
    for kind, cases in CASES.items():
        for d, documents, alibi, causal in cases:
            for name, kernel, table in kernels:
                chosen = settings(table(alibi), arch, 4 if kind == "fp32" else 2, d)
                yield variant(name, kernel, kind, d, chosen, documents, alibi, causal)


def variant(
    name: str, kernel: Any, kind: str, d: int, launch: Launch, documents: bool, alibi: bool, causal: bool
) -> Variant:
    """One of :func:`variants_of`."""
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
    if "HAS_D_LSE" in kernel.arg_names:
        constants["HAS_D_LSE"] = documents
    what = f"attention {kind} {d}{' documents' * documents}{' alibi' * alibi}{' full' * (not causal)} {name}"
    odd = frozenset(("queries", "S", "T", "tokens"))
    return Variant(what, kernel, types, constants, launch, wgmma=kind != "fp32", odd=odd)
