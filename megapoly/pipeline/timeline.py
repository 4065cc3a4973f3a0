"""Schedules simulated and drawn. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from megapoly.pipeline.schedule import Kind, Schedule, Span, execute


@dataclass(frozen=True)
class Timeline:
    """A simulated schedule: its compute actions with times, one tuple per pipeline rank."""

    schedule: Schedule
    spans: tuple[tuple[Span, ...], ...]

    @cached_property
    def makespan(self) -> float:
        """Time from the first start to the last stop."""
        return max(span.stop for spans in self.spans for span in spans)

    @cached_property
    def bubbles(self) -> tuple[float, ...]:
        """Idle share of the makespan, per rank."""
        busy = [sum(span.stop - span.start for span in spans) for spans in self.spans]
        return tuple(max(0.0, (self.makespan - each) / self.makespan) for each in busy)

    @property
    def bubble(self) -> float:
        """Idle share of the makespan over all ranks."""
        return sum(self.bubbles) / len(self.bubbles)

    @cached_property
    def peaks(self) -> tuple[int, ...]:
        """Most activations alive at once per rank: forwards that are done and whose backward is not."""
        result = []
        for spans in self.spans:
            alive, peak = 0, 0
            for span in spans:
                alive += 1 if span.action.kind is Kind.FORWARD else -1
                peak = max(peak, alive)
            result.append(peak)
        return tuple(result)


def simulate(schedule: Schedule, forward: float = 1.0, backward: float = 2.0, communication: float = 0.0) -> Timeline:
    """Times of a schedule, given the times of a forward, of a backward and of one message.

    Messages travel beside the computation, one after another on each route.
    """
    if forward <= 0 or backward <= 0 or communication < 0:
        raise ValueError(f"costs forward {forward}, backward {backward}, communication {communication}")
    spans = execute(schedule, {Kind.FORWARD: forward, Kind.BACKWARD: backward}, communication, queued=False)
    return Timeline(schedule, tuple(map(tuple, spans)))


def render(drawn: Schedule | Timeline) -> str:
    """Text with one row per rank and time to the right; a schedule is drawn with all compute actions equally long.

    ``3`` is the forward of micro-batch 3, ``3'`` its backward, ``-`` continues either, ``.`` is idle. Where ranks hold
    several stages, a letter tells which of the rank's stages. A row ends with the rank's idle share and its peak
    number of live activations.
    """
    timeline = drawn if isinstance(drawn, Timeline) else simulate(drawn, backward=1.0)
    schedule = timeline.schedule
    several = len(schedule.placement) > schedule.ranks
    width = len(str(schedule.microbatches - 1)) + 1 + several
    unit = min(span.stop - span.start for spans in timeline.spans for span in spans)
    columns = _column(timeline.makespan, unit)
    label = len(str(schedule.ranks - 1))
    rows = [
        f"{schedule.name}: {schedule.ranks} ranks, {schedule.microbatches} micro-batches,"
        f" bubble {timeline.bubble:.1%}   (3 forward, 3' backward, . idle)"
    ]
    for rank, spans in enumerate(timeline.spans):
        stages = schedule.stages(rank)
        cells = ["." + " " * (width - 1)] * columns
        for (kind, stage, microbatch), start, stop in spans:
            first, last = _column(start, unit), _column(stop, unit)
            letter = chr(ord("a") + stages.index(stage)) if several else ""
            text = f"{microbatch}{letter}" + ("'" if kind is Kind.BACKWARD else "")
            bar = text.ljust((last - first) * width, "-" if last - first > 1 else " ")
            cells[first:last] = [bar, *[""] * (last - first - 1)]
        tail = f"bubble {timeline.bubbles[rank]:.1%}, peak {timeline.peaks[rank]}"
        rows.append(f"rank {rank:>{label}} | {''.join(cells)}| {tail}")
    return "\n".join(rows)


def _column(time: float, unit: float) -> int:
    return math.floor(time / unit + 0.5)
