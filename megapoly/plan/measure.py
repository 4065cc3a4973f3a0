"""Memory of a real training step of one rank, counted tensor by tensor, on any device.

Every storage that an operation makes is followed until it is freed. It is *logits* if it has the shape of the logits of
a micro-batch, *activations* from when it is saved for the backward pass or outlives the action of the
schedule that made it, else *workspace*: temporaries, and gradients on their way down a stage.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megapoly import comm, launch
from megapoly.config import Config
from megapoly.context import ParallelContext
from megapoly.data.samples import Batch
from megapoly.engine import Engine
from megapoly.plan.activations import Device
from megapoly.plan.memory import Usage

_TRANSIENT = ("activations", "logits", "workspace")


@dataclass
class _Entry:
    size: int
    component: str
    known: bool


class Meter(TorchDispatchMode):
    """Follows the storages that are made while it is entered.

    Args:
        place: changes when an action of the schedule ends.
        known: component of a storage by the shape of the tensor it is made for, whatever becomes of it; or None.

    Attributes:
        peaks: most bytes of each component at once, and of all of them together (``total``).
    """

    def __init__(self, place: Callable[[], str], known: Callable[[torch.Size], str | None]) -> None:
        super().__init__()
        self._place, self._known = place, known
        self._at = ""
        self._alive: dict[int, _Entry] = {}
        self._now = dict.fromkeys((*_TRANSIENT, "total"), 0)
        self.peaks = dict(self._now)
        self._saved = torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach(), lambda x: x)

    def __enter__(self) -> Meter:
        super().__enter__()
        self._saved.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._saved.__exit__(kind, value, traceback)
        super().__exit__(kind, value, traceback)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (place := self._place()) != self._at:
            self._at = place
            for entry in self._alive.values():
                self._keep(entry)
        out = func(*args, **(kwargs or {}))
        before = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                key = x.untyped_storage()._cdata
                if key not in self._alive and key not in before:
                    self._follow(x, key)
        if func is torch.ops.aten.detach.default:
            # What is saved is detached: by the hook above, and by torch's checkpoint when it computes again.
            key = args[0].untyped_storage()._cdata
            if key in self._alive:
                self._keep(self._alive[key])
        return out

    def _follow(self, x: Tensor, key: int) -> None:
        storage = x.untyped_storage()
        known = self._known(x.shape)
        entry = self._alive[key] = _Entry(storage.nbytes(), known or "workspace", known is not None)
        self._count(entry, 1)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self._count(self._alive.pop(key), -1)

    def _keep(self, entry: _Entry) -> None:
        if entry.component == "workspace" and not entry.known:
            self._count(entry, -1)
            entry.component = "activations"
            self._count(entry, 1)

    def _count(self, entry: _Entry, sign: int) -> None:
        for name in (entry.component, "total"):
            self._now[name] += sign * entry.size
            self.peaks[name] = max(self.peaks[name], self._now[name])


def measure(config: Config, context: ParallelContext) -> Usage:
    """Peak memory of this rank in a step on random tokens. Collective.

    The total is counted too; on a GPU it is the allocator's.
    """
    engine = Engine(config, context)
    engine.initialise()
    batches = random_batches(config, context)
    tokens = config.train.sequence * config.layout.micro_batch
    vocabulary = -(-config.model.vocabulary // config.layout.tp)
    # Copies of buckets that are being reduced outlive the last actions, but are no activations.
    copies = {bucket.gradients.shape for bucket in engine.buffers.buckets if bucket.plan.shards > 1}

    def known(shape: torch.Size) -> str | None:
        if shape.numel() == tokens * vocabulary and (shape[-1] == vocabulary or shape == (vocabulary, tokens)):
            return "logits"
        return "workspace" if shape in copies else None

    meter = Meter(lambda: engine.pipeline.place, known)
    gpu = context.device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats(context.device)
    with meter:
        engine.step(batches, rate=0.0)
        engine.buffers.settle()
    static = {
        "weights": [bucket.values for bucket in engine.buffers.buckets],
        "gradients": [bucket.gradients for bucket in engine.buffers.buckets],
        "optimizer": [x for state in engine.optimizer.states for x in state.values()],
    }
    sizes = {name: sum(x.numel() * x.element_size() for x in tensors) for name, tensors in static.items()}
    total = torch.cuda.max_memory_allocated(context.device) if gpu else sum(sizes.values()) + meter.peaks["total"]
    return Usage(**sizes, **{name: meter.peaks[name] for name in _TRANSIENT}, total=total)


def measure_ranks(path: Path, overrides: list[str]) -> tuple[Config, Device, list[Usage]] | None:
    """Config, device and peaks by pipeline rank, the largest over tensor- and data-parallel ranks; of this process
    alone or of all ranks of a torchrun. None on other ranks than the first.
    """
    with launch.joined(path, overrides) as (config, context):
        found = comm.gather_objects((context.pp.rank, measure(config, context)), context.control)
        device: Device = "cuda" if context.device.type == "cuda" else "cpu"
    if found is None:
        return None
    peaks = []
    for rank in range(config.layout.pp):
        mine = [dataclasses.astuple(usage) for at, usage in found if at == rank]
        peaks.append(Usage(*map(max, zip(*mine))))
    return config, device, peaks


def random_batches(config: Config, context: ParallelContext) -> list[Batch]:
    """One step's micro-batches of a rank. Where documents are separated, each window holds two."""
    generator = torch.Generator().manual_seed(config.train.seed + context.dp.rank)
    rows, length = config.layout.micro_batch * config.microbatches, config.train.sequence
    tokens, labels = (torch.randint(0, config.model.vocabulary, (rows, length), generator=generator) for _ in range(2))
    positions = torch.arange(length).expand(rows, length).contiguous()
    cu_seqlens = None
    if config.data.separate_documents:
        half = length // 2
        begins = torch.arange(rows + 1, dtype=torch.int32) * length
        cu_seqlens = torch.stack((begins, begins + half), 1).flatten()[:-1]
        positions = torch.where(positions >= half, positions - half, positions)
    samples = torch.arange(rows) + context.dp.rank * rows
    source = torch.zeros(rows, dtype=torch.int32)
    return Batch(samples, source, tokens, labels, positions, cu_seqlens).split(config.layout.micro_batch)
