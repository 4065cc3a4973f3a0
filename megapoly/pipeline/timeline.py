"""Schedules simulated and drawn as text. No torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from megapoly.pipeline.actions import Action, Kind, Schedule
from megapoly.pipeline.schedule import Span, execute

Times = float | Sequence[float]  # of every stage alike, or by stage
_MARKS = {Kind.FORWARD: "", Kind.BACKWARD: "'", Kind.BACKWARD_INPUT: "'", Kind.BACKWARD_WEIGHT: '"'}
_STEPS = 3  # of as many in a row without a barrier, the last takes as long as any further one


@dataclass(frozen=True)
class Timeline:
    """A schedule on a clock.

    Attributes:
        times: of each kind of compute action, by stage.
        communication: time of a message.
    """

    schedule: Schedule
    times: Mapping[Kind, Sequence[float]]
    communication: float

    @cached_property
    def spans(self) -> tuple[tuple[Span, ...], ...]:
        """Compute actions with their times, one tuple per pipeline rank."""
        return self._run(self.schedule)

    def _run(self, schedule: Schedule) -> tuple[tuple[Span, ...], ...]:
        def cost(action: Action) -> float:
            return self.times[action.kind][action.stage]

        return tuple(map(tuple, execute(schedule, cost, self.communication, queued=False)))

    @cached_property
    def makespan(self) -> float:
        """Time from the first start to the last stop."""
        return max(span.stop for spans in self.spans for span in spans)

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """Time of computing, per rank."""
        return tuple(sum(span.stop - span.start for span in spans) for spans in self.spans)

    @cached_property
    def bubbles(self) -> tuple[float, ...]:
        """Idle share of the makespan, per rank."""
        return tuple(max(0.0, 1 - busy / self.makespan) for busy in self.busy)

    @property
    def bubble(self) -> float:
        """Idle share of the makespan over all ranks: of a step that ends with a barrier, such as that of a norm."""
        return sum(self.bubbles) / len(self.bubbles)

    @cached_property
    def step(self) -> float:
        """Time of one more step in a row of steps, where a rank begins the next as soon as it is through with one."""
        each = self.schedule.microbatches
        lists = tuple(
            tuple(
                action._replace(microbatch=action.microbatch + first)
                for first in range(0, _STEPS * each, each)
                for action in actions
            )
            for actions in self.schedule.actions
        )
        spans = self._run(replace(self.schedule, microbatches=_STEPS * each, actions=lists))
        ends = [0.0] * _STEPS
        for span in itertools.chain(*spans):
            step = span.action.microbatch // each
            ends[step] = max(ends[step], span.stop)
        return ends[-1] - ends[-2]

    @property
    def bubble_without_barrier(self) -> float:
        """Idle share of such a ``step`` over all ranks."""
        return max(0.0, 1 - sum(self.busy) / len(self.busy) / self.step)

    @cached_property
    def peaks(self) -> tuple[int, ...]:
        """Most activations alive at once, per rank, each of one stage and micro-batch.

        One is alive from its forward to the end of its backward; of a split one, of the part of the weights.
        """
        result = []
        for spans in self.spans:
            alive, peak = 0, 0
            for span in spans:
                alive += span.action.kind is Kind.FORWARD
                peak = max(peak, alive)
                alive -= span.action.kind in (Kind.BACKWARD, Kind.BACKWARD_WEIGHT)
            result.append(peak)
        return tuple(result)

    @property
    def peak(self) -> float:
        """The largest of ``peaks``, in micro-batches of all stages of a rank."""
        return max(self.peaks) * self.schedule.ranks / len(self.schedule.placement)


def simulate(
    schedule: Schedule,
    forward: Times = 1.0,
    backward: Times = 2.0,
    communication: float = 0.0,
    backward_weight: Times | None = None,
) -> Timeline:
    """Times of a schedule.

    Messages travel beside the computation, one after another on each route.

    Args:
        forward: time of a forward of one stage: one number, or one for each stage.
        backward: of a backward, of both parts together.
        communication: of a message.
        backward_weight: of the part of the weights, where backwards are split; half of ``backward`` where not given.

    Raises ValueError for times that are not positive, and for a weight part that leaves none for the input part.
    """
    stages = len(schedule.placement)
    forwards, backwards = _by_stage(forward, stages), _by_stage(backward, stages)
    weights = [each / 2 for each in backwards] if backward_weight is None else _by_stage(backward_weight, stages)
    for name, each in (("forward", forwards), ("backward", backwards), ("backward_weight", weights)):
        if not all(0 < time < math.inf for time in each):
            raise ValueError(f"{name} takes {', '.join(map(str, each))}: a time of computing is above 0 and finite")
    if not 0 <= communication < math.inf:
        raise ValueError(f"communication takes {communication}: the time of a message is at least 0 and finite")
    if any(weight >= whole for weight, whole in zip(weights, backwards, strict=True)):
        raise ValueError(f"backward_weight {backward_weight} is a part of backward {backward}, and less than it")
    inputs = [whole - weight for whole, weight in zip(backwards, weights, strict=True)]
    times = {
        Kind.FORWARD: forwards,
        Kind.BACKWARD: backwards,
        Kind.BACKWARD_INPUT: inputs,
        Kind.BACKWARD_WEIGHT: weights,
    }
    return Timeline(schedule, times, communication)


def _by_stage(times: Times, stages: int) -> Sequence[float]:
    if not isinstance(times, Sequence):
        return [times] * stages
    if len(times) != stages:
        raise ValueError(f"{len(times)} times of {stages} stages")
    return times


def render(drawn: Schedule | Timeline, columns: int | None = None) -> str:
    """Text with one row per rank and time to the right; a schedule is drawn with all compute actions equally long.

    ``3`` is the forward of micro-batch 3, ``3'`` its backward, or where it is split the part of the input, ``3"`` the
    part of the weights, ``-`` continues any, ``.`` is idle. Where ranks hold several stages, a letter tells which of
    the rank's stages. A row ends with the rank's idle share and its most live activations, in micro-batches of all its
    stages. Rows of more than ``columns`` characters go on in a block below.
    """
    timeline = drawn if isinstance(drawn, Timeline) else simulate(drawn, backward=2.0 if drawn.splits else 1.0)
    schedule = timeline.schedule
    virtual = len(schedule.placement) // schedule.ranks
    width = len(str(schedule.microbatches - 1)) + 1 + (virtual > 1)
    backward = "3' backward of the input, 3\" of the weights" if schedule.splits else "3' backward"
    head = (
        f"{schedule.name}: {schedule.ranks} ranks, {schedule.microbatches} micro-batches,"
        f" bubble {timeline.bubble:.1%}   (3 forward, {backward}, . idle)"
    )
    labels = [f"rank {rank:>{len(str(schedule.ranks - 1))}} | " for rank in range(schedule.ranks)]
    rows = [_row(timeline, rank, width) for rank in range(schedule.ranks)]
    tails = [
        f"| bubble {bubble:.1%}, peak {peak / virtual:.4g}"
        for bubble, peak in zip(timeline.bubbles, timeline.peaks, strict=True)
    ]
    room = len(rows[0])
    if columns is not None:
        room = min(room, max(columns - len(labels[0]) - max(map(len, tails)), width) // width * width)
    blocks = [
        "\n".join(
            f"{label}{row[start : start + room]}{tail if start + room >= len(row) else ''}"
            for label, row, tail in zip(labels, rows, tails, strict=True)
        )
        for start in range(0, len(rows[0]), room)
    ]
    return f"{head}\n" + "\n\n".join(blocks)


def _row(timeline: Timeline, rank: int, width: int) -> str:
    """The actions of a rank, where the shortest of any rank takes ``width`` characters."""
    unit = min(span.stop - span.start for spans in timeline.spans for span in spans)
    stages = timeline.schedule.stages(rank)
    cells = ["." + " " * (width - 1)] * _column(timeline.makespan, unit)
    for (kind, stage, microbatch), start, stop in timeline.spans[rank]:
        first, last = _column(start, unit), _column(stop, unit)
        letter = chr(ord("a") + stages.index(stage)) if len(stages) > 1 else ""
        text = f"{microbatch}{letter}{_MARKS[kind]}"
        bar = text.ljust((last - first) * width, "-" if last - first > 1 else " ")
        cells[first:last] = [bar, *[""] * (last - first - 1)]
    return "".join(cells)


def _column(time: float, unit: float) -> int:
    return math.floor(time / unit + 0.5)
