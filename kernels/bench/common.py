"""What all benchmarks of kernels share: shapes of public models, limits of the machine, timing, rows.

A case is one pass of one op at one shape. It and its peers take turns, and medians count. What a row's value is a
share of, a copy or a product of matrices, is measured first, on the same device, in the same process.
"""

from __future__ import annotations

import importlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

Row = dict[str, Any]
Function = Callable[..., Any]
KEYS = (
    "name", "value", "unit", "peer", "peer_value", "ratio", "limit", "share_of_limit", "shape", "dtype", "peak_bytes",
    "extra_bytes", "peer_peak_bytes", "peer_extra_bytes",
)  # fmt: skip
SCALES = {"GB/s": 1e9, "GFLOP/s": 1e9, "TFLOP/s": 1e12}


@dataclass(frozen=True)
class Model:
    """Sizes of a public model; ``gated``: SwiGLU, RMSNorm and rotary positions; ``alibi``: positions of BLOOM."""

    name: str
    hidden: int
    heads: int
    ffn: int
    vocabulary: int
    gated: bool = False
    alibi: bool = False

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


MODELS = (
    Model("PolyLM-1.7B", 2048, 16, 8192, 256_000),
    Model("PolyLM-13B", 5120, 40, 20480, 256_000),
    Model("LLaMA-7B", 4096, 32, 11008, 32_000, gated=True),
    Model("BLOOM-7B1", 4096, 32, 16384, 250_880, alibi=True),
)
_HIDDEN = (1024, 2048, 4096, 8192, 16384)
SWEEP = tuple(Model(f"hidden {hidden}", hidden, hidden // 128, 4 * hidden, 32_000) for hidden in _HIDDEN)


@dataclass(frozen=True)
class Bench:
    """On what and how large: a GPU in bf16 with whole shapes, or a CPU in fp32 with few tokens.

    Attributes:
        quick: of every op the first model alone, with fewer tokens and turns: a trial, not a measurement.
        sweep: hidden sizes beside those of the models.
    """

    device: torch.device
    quick: bool = False
    sweep: bool = False

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.gpu else torch.float32

    @property
    def models(self) -> Sequence[Model]:
        return MODELS[:1] if self.quick else MODELS + (SWEEP if self.sweep else ())

    @property
    def batch(self) -> int:
        return 4 if self.gpu and not self.quick else 1

    @property
    def sequence(self) -> int:
        if self.gpu:
            return 512 if self.quick else 2048
        return 16 if self.quick else 512

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence

    @property
    def flops(self) -> str:
        """Unit of operations a second."""
        return "TFLOP/s" if self.gpu else "GFLOP/s"

    @property
    def repeats(self) -> int:
        return 3 if self.quick else 20 if self.gpu else 7

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=dtype or self.dtype)


@dataclass(frozen=True)
class Case:
    """One pass at one shape.

    Attributes:
        work: bytes that have to be read and written, or operations, by ``unit``.
        peers: other ways to the same result, by name.
        turns: in place of the benchmark's, for what takes seconds.
    """

    name: str
    shape: str
    dtype: torch.dtype
    work: float
    run: Callable[[], Any]
    peers: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    unit: str = "GB/s"
    turns: int | None = None


@dataclass(frozen=True)
class Limits:
    """What the machine does: bytes copied (read and written) and operations of a product of matrices, a second."""

    copy: float
    matmul: float

    def of(self, unit: str) -> float:
        return self.copy if unit == "GB/s" else self.matmul


def limits(bench: Bench) -> Limits:
    """Measured with ``copy_`` and with a product of square matrices in the dtype of the benchmark."""
    megabytes, side = (1024, 8192) if bench.gpu else (16, 256) if bench.quick else (256, 1024)
    a = torch.ones(megabytes << 18, dtype=torch.float32, device=bench.device)
    b = torch.empty_like(a)
    (copy,) = seconds(bench, [lambda: b.copy_(a)])
    x, y = bench.normal(side, side), bench.normal(side, side)
    (matmul,) = seconds(bench, [lambda: x @ y])
    return Limits(2.0 * a.numel() * 4 / copy, 2.0 * side**3 / matmul)


def seconds(bench: Bench, functions: Sequence[Callable[[], Any]], turns: int | None = None) -> list[float]:
    """Medians of functions that take turns, each after two calls that do not count, or as many as there are turns.

    On a GPU between events, after its cache was overwritten.
    """
    turns = turns or bench.repeats
    for function in functions:
        for _ in range(min(2, turns)):
            function()
    found: list[list[float]] = [[] for _ in functions]
    flush = torch.empty(256 << 18, dtype=torch.int32, device=bench.device) if bench.gpu else None
    for _ in range(turns):
        for own, function in zip(found, functions):
            own.append(_on_gpu(function, flush) if flush is not None else _on_cpu(function))
    return [statistics.median(own) for own in found]


def _on_gpu(function: Callable[[], Any], flush: Tensor) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def _on_cpu(function: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def memory(bench: Bench, function: Callable[[], Any]) -> tuple[int, int]:
    """Most bytes that a call has in use beyond what was there before, and the part of them that is not its results.

    Those of tensors, whatever made them: on a GPU the allocator's count, on a CPU that of torch's profiler, which
    follows every allocation. What libraries like oneDNN take from elsewhere is not in it.
    """
    if bench.gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = function()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with _without_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            results = function()
        events = [each for each in found.profiler.kineto_results.events() if each.name() == "[memory]"]
        peak = now = 0
        for each in sorted(events, key=lambda each: each.start_ns()):
            now += each.nbytes()
            peak = max(peak, now)
    storages = [each.untyped_storage() for each in tree_leaves(results) if isinstance(each, Tensor)]
    return peak, max(0, peak - sum({each.data_ptr(): each.nbytes() for each in storages}.values()))


@contextmanager
def _without_stderr() -> Iterator[None]:
    """The profiler of torch 2.13 writes a line there when it starts and one when it stops."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def rows(bench: Bench, case: Case, machine: Limits) -> Iterator[Row]:
    """A row for every peer, or one without a peer. A peer that fails is a row with its ``note``."""
    peers, notes, memories = dict(case.peers), {}, {}
    for name, function in case.peers.items():
        try:
            function()  # what the first call keeps is not of a call: moments, what a backward pass needs, workspaces
            memories[name] = memory(bench, function)
        # What foreign libraries raise for a case or a device that they do not have.
        except (RuntimeError, ImportError, TypeError, ValueError) as error:
            del peers[name]
            notes[name] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    case.run()
    peak, extra = memory(bench, case.run)
    own, *theirs = seconds(bench, [case.run, *peers.values()], case.turns)
    scale = case.work / SCALES[case.unit]
    limit = machine.of(case.unit) / SCALES[case.unit]
    row: Row = dict.fromkeys(KEYS) | {
        "name": case.name,
        "value": scale / own,
        "unit": case.unit,
        "limit": limit,
        "share_of_limit": scale / own / limit,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "peak_bytes": peak,
        "extra_bytes": extra,
    }
    for name, time_of in zip(peers, theirs):
        peak, extra = memories[name]
        peer = {"peer": name, "peer_value": scale / time_of, "peer_peak_bytes": peak, "peer_extra_bytes": extra}
        yield {**row, **peer, "ratio": time_of / own}
    for name, note in notes.items():
        yield {**row, "peer": name, "note": note}
    if not case.peers:
        yield row


def passes(
    bench: Bench, name: str, shape: str, run: Function, peers: Mapping[str, Function], inputs: Sequence[Tensor],
    work: tuple[float, float], unit: str = "GB/s",
) -> Iterator[Case]:  # fmt: skip
    """The forward and the backward pass of functions of ``inputs``; ``work`` is of the two.

    The backward pass gives gradients of all inputs that need one.
    """
    dtype = inputs[0].dtype

    def forward(function: Function) -> Callable[[], Any]:
        def call() -> Any:
            with torch.no_grad():
                return function(*inputs)

        return call

    def backward(function: Function) -> Callable[[], Any]:
        kept: list[Any] = []

        def call() -> Any:
            if not kept:  # the forward pass, in the first call, which is not measured
                y = function(*inputs)
                y = y[0] if isinstance(y, tuple) else y
                kept.extend((y, torch.ones_like(y)))
            return torch.autograd.grad(kept[0], wanted, kept[1], retain_graph=True)

        return call

    wanted = [each for each in inputs if each.requires_grad]
    forwards, backwards = ({n: make(f) for n, f in peers.items()} for make in (forward, backward))
    yield Case(f"{name} forward", shape, dtype, work[0], forward(run), forwards, unit)
    yield Case(f"{name} backward", shape, dtype, work[1], backward(run), backwards, unit)


def peers_of(bench: Bench, eager: Function, liger: Function | None = None) -> dict[str, Function]:
    """PyTorch eager; on a GPU also torch.compile, and Liger where it is installed."""
    found = {"eager": eager}
    if bench.gpu:
        found["compile"] = torch.compile(eager)
        if liger is not None:
            found["liger"] = liger
    return found


def liger(name: str) -> Function | None:
    """A function of Liger's functional interface, or None where it is not installed."""
    try:
        return getattr(importlib.import_module("liger_kernel.transformers.functional"), name, None)
    except ImportError:
        return None
