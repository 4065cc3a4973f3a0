"""Who is slow: every rank's own computing time, without its waiting for others, gathered once in an interval."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from megapoly import comm
from megapoly.context import ParallelContext
from megapoly.mesh import Mesh
from megapoly.pipeline.runtime import Pipeline

NOTABLE = 1.1  # times the median from which on the slowest rank is worth a line on the terminal


@dataclass(frozen=True)
class RankTime:
    """One rank's computing time in an interval, in seconds: forward and backward by stage, and the rest."""

    stages: dict[int, float]
    rest: float

    @property
    def seconds(self) -> float:
        return sum(self.stages.values()) + self.rest


@dataclass(frozen=True)
class Report:
    """The slowest rank and the slowest stage of an interval.

    Attributes:
        step: the last of the interval's ``steps``.
        rank, dp, pp, tp: the slowest rank and its place in the mesh.
        stage: the stage of this rank that took it most time.
        seconds, median: its computing time, and the median over all ranks.
        slowest_stage: by the median over the ranks that hold it.
        stage_seconds: these medians, by stage.
        rank_seconds: by rank.
    """

    step: int
    steps: int
    rank: int
    dp: int
    pp: int
    tp: int
    stage: int
    seconds: float
    median: float
    slowest_stage: int
    stage_seconds: list[float]
    rank_seconds: list[float]

    @property
    def over_median(self) -> float:
        return self.seconds / self.median if self.median else 1.0

    def __str__(self) -> str:
        return (
            f"slowest of the last {self.steps} steps: rank {self.rank} (dp {self.dp}, pp {self.pp}, tp {self.tp}),"
            f" computing for {self.seconds:.2f} s, {self.over_median:.2f} x the median, most of it in stage"
            f" {self.stage}; slowest stage: {self.slowest_stage}"
        )


def summarise(times: Sequence[RankTime], mesh: Mesh, step: int, steps: int) -> Report:
    """The report of all ranks' ``times``, by rank, in an interval of ``steps`` that ended with ``step``."""
    seconds = [time.seconds for time in times]
    by_stage: dict[int, list[float]] = {}
    for time in times:
        for stage, value in time.stages.items():
            by_stage.setdefault(stage, []).append(value)
    medians = [statistics.median(by_stage[stage]) for stage in sorted(by_stage)]
    slowest = max(range(len(times)), key=seconds.__getitem__)
    mine = times[slowest].stages
    return Report(
        step=step,
        steps=steps,
        rank=slowest,
        **mesh.coordinates(slowest),
        stage=max(mine, key=mine.__getitem__),
        seconds=seconds[slowest],
        median=statistics.median(seconds),
        slowest_stage=max(range(len(medians)), key=medians.__getitem__),
        stage_seconds=medians,
        rank_seconds=seconds,
    )


class Stragglers:
    """Adds up this rank's computing time, and compares the ranks every ``every`` steps."""

    def __init__(self, every: int, context: ParallelContext, pipeline: Pipeline) -> None:
        self._every, self._context, self._pipeline = every, context, pipeline
        self._rest, self._steps = 0.0, 0

    def step(self, step: int, rest: float) -> Report | None:
        """After a step that took ``rest`` seconds outside of its pipeline. A report on rank 0 at the interval's end.

        Collective at the end of an interval. There is none of a single rank.
        """
        self._rest, self._steps = self._rest + rest, self._steps + 1
        if step % self._every or self._context.mesh.world_size == 1:
            return None
        mine, steps = RankTime(dict(self._pipeline.busy), self._rest), self._steps
        self._pipeline.reset_busy()
        self._rest, self._steps = 0.0, 0
        times = comm.gather_objects(mine, self._context.control)
        return None if times is None else summarise(times, self._context.mesh, step, steps)
