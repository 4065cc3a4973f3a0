"""Every pipeline schedule on CPU ranks, beside its simulation: stages that sleep, so that all actions cost the same.

What is measured is the engine's own :class:`~megapoly.pipeline.runtime.Pipeline` with gloo, messages of one number and
stages whose passes sleep: the order of the actions and what the runtime adds to them, and nothing of a model.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.autograd.function import once_differentiable

from megapoly import comm
from megapoly.context import ParallelContext
from megapoly.mesh import Mesh
from megapoly.pipeline.comparison import Compared, Refused, compare
from megapoly.pipeline.runtime import Pipeline
from megapoly.pipeline.schedule import build

HEADS = ("schedule", "simulated", "measured", "ratio", "bubble", "measured", "without\nbarrier", "measured")
_ROW = 2  # steps in a row without a barrier, after a first


@dataclass(frozen=True)
class Measured:
    """Seconds of one schedule.

    Attributes:
        compared: its simulation, in seconds.
        makespan: of a step between two barriers.
        step: of one more step in a row without barriers.
    """

    compared: Compared
    makespan: float
    step: float

    @property
    def ratio(self) -> float:
        """Simulated by measured makespan."""
        return self.compared.timeline.makespan / self.makespan

    @property
    def bubble(self) -> float:
        return self._idle(self.makespan)

    @property
    def bubble_without_barrier(self) -> float:
        return self._idle(self.step)

    def _idle(self, seconds: float) -> float:
        """Share of a time in which a rank does none of what it has to."""
        return 1 - statistics.mean(self.compared.timeline.busy) / seconds


def measure(
    pp: int, microbatches: int, virtual: int | None = None, seconds: float = 0.03, repeats: int = 3
) -> list[Measured | Refused]:
    """Every schedule on ``pp`` processes.

    Args:
        virtual: stages per rank of interleaved.
        seconds: of a forward through all stages of a rank, and of either half of the backward.
        repeats: of steps with a barrier after each, and of rows of steps without.
    """
    compared = compare(pp, microbatches, virtual, seconds, 2 * seconds)
    jobs = [
        (each.name, microbatches, len(each.timeline.schedule.placement) // pp, seconds, repeats)
        for each in compared
        if isinstance(each, Compared)
    ]
    with tempfile.TemporaryDirectory(prefix="megapoly-") as folder:
        mp.spawn(_rank, (pp, folder, jobs), nprocs=pp)
        found = iter(json.loads((Path(folder) / "found.json").read_text()))
    return [each if isinstance(each, Refused) else Measured(each, *next(found)) for each in compared]


def _rank(rank: int, pp: int, folder: str, jobs: list[tuple[Any, ...]]) -> None:
    torch.set_num_threads(1)
    if pp > 1:
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", pp), rank=rank, world_size=pp)
    context = ParallelContext.create(Mesh(pp=pp))
    found = [_measure_one(context, *job) for job in jobs]
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    context.close()
    if pp > 1:
        dist.destroy_process_group()


def _measure_one(
    context: ParallelContext, name: str, microbatches: int, virtual: int, seconds: float, repeats: int
) -> tuple[float, float]:
    """Makespan and time of one more step, in seconds."""
    schedule = build(name, context.pp.size, microbatches, virtual)
    stages = {stage: _Sleeper(seconds / virtual) for stage in schedule.stages(context.pp.rank)}

    def put_off(together: bool) -> tuple[bool, Callable[[], None]]:
        return False, lambda: time.sleep(seconds / virtual)

    pipeline = Pipeline(stages, context, lambda _: (1,), torch.float32, put_off)

    def timed(steps: int) -> float:
        comm.barrier(context.control)
        begin = time.perf_counter()
        for _ in range(steps):
            pipeline.run(schedule, [True] * microbatches, loss_gradient=1.0)
        comm.barrier(context.control)
        return time.perf_counter() - begin

    timed(1)  # connects the ranks
    # The least, as what else the machine does only adds to it.
    makespan, row = (min(timed(steps) for _ in range(repeats)) for steps in (1, 1 + _ROW))
    return makespan, (row - makespan) / _ROW


class _Sleeper:
    """A stage whose forward sleeps, and its backward twice as long, or as long where the other half is put off."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.leaf = torch.zeros(1, requires_grad=True)

    def __call__(self, x: Tensor | None, together: bool) -> Tensor:
        return _Sleep.apply(self.leaf if x is None else x, self.seconds, self.seconds * (1 + together))


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.backward = backward
        time.sleep(forward)
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.backward)
        return gradient, None, None


def cells(each: Measured | Refused) -> tuple[str, ...]:
    """A row of a table; see ``HEADS``. Times in milliseconds."""
    if isinstance(each, Refused):
        return (each.name, *["-"] * (len(HEADS) - 1))
    timeline = each.compared.timeline
    return (
        each.compared.name,
        f"{1e3 * timeline.makespan:,.0f} ms",
        f"{1e3 * each.makespan:,.0f} ms",
        f"{each.ratio:.3f}",
        f"{timeline.bubble:.1%}",
        f"{each.bubble:.1%}",
        f"{timeline.bubble_without_barrier:.1%}",
        f"{each.bubble_without_barrier:.1%}",
    )


def rows(measured: list[Measured | Refused]) -> list[dict[str, Any]]:
    """Rows for ``--json``: the simulator is the peer, the closed formula of a bubble its limit."""
    made: list[dict[str, Any]] = []
    for each in measured:
        if isinstance(each, Refused):
            made.append({"name": each.name, "value": None, "note": each.reason})
            continue
        name, timeline = each.compared.name, each.compared.timeline
        share = {"unit": "share of the time", "peer": "simulator"}
        made += [
            {
                "name": f"{name}: makespan",
                "value": each.makespan,
                "unit": "s",
                "peer": "simulator",
                "peer_value": timeline.makespan,
                "ratio": each.ratio,
            },
            {
                "name": f"{name}: bubble",
                "value": each.bubble,
                **share,
                "peer_value": timeline.bubble,
                "limit": each.compared.formula,
            },
            {
                "name": f"{name}: without barrier",
                "value": each.bubble_without_barrier,
                **share,
                "peer_value": timeline.bubble_without_barrier,
            },
        ]
    return made
