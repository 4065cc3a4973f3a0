"""All schedules side by side, and what the literature says of them. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megapoly.pipeline.actions import SEND
from megapoly.pipeline.generators import GENERATORS
from megapoly.pipeline.schedule import build
from megapoly.pipeline.timeline import Timeline, simulate

HEADS = ("schedule", "bubble", "formula", "without\nbarrier", "peak\nmicro-batches", "time", "messages")


@dataclass(frozen=True)
class Compared:
    """A simulated schedule.

    Attributes:
        formula: its bubble by :func:`closed_formula`.
    """

    name: str
    timeline: Timeline
    formula: float | None

    @property
    def messages(self) -> int:
        """Sends of all ranks in one step."""
        return sum(action.kind in SEND for actions in self.timeline.schedule.actions for action in actions)


@dataclass(frozen=True)
class Refused:
    """A schedule that there is none of with the numbers asked for."""

    name: str
    reason: str


def compare(
    pp: int,
    microbatches: int,
    virtual: int | None = None,
    forward: float = 1.0,
    backward: float = 2.0,
    communication: float = 0.0,
) -> list[Compared | Refused]:
    """Every known schedule with the same model, ranks and micro-batches.

    Args:
        virtual: stages per rank of ``interleaved``; 2 where not given.
        forward: time of a forward of one micro-batch through all stages of one rank.
        backward: of the backward; split in halves where the schedule splits it.
        communication: time of a message.

    Raises ValueError for times that cannot be.
    """
    compared: list[Compared | Refused] = []
    half = backward / 2
    for name in GENERATORS:
        try:
            schedule = build(name, pp, microbatches, virtual if name == "interleaved" else None)
        except ValueError as error:
            compared.append(Refused(name, str(error)))
            continue
        stages = len(schedule.placement) // pp
        timeline = simulate(schedule, forward / stages, backward / stages, communication)
        formula = closed_formula(name, pp, microbatches, stages, forward, half, half)
        compared.append(Compared(name, timeline, formula))
    return compared


def pick(compared: Sequence[Compared | Refused], name: str) -> Compared:
    """The schedule of a known name. Raises ValueError, with the reason, where it was refused."""
    chosen = next(each for each in compared if each.name == name)
    if isinstance(chosen, Refused):
        raise ValueError(chosen.reason)
    return chosen


def closed_formula(
    name: str, pp: int, microbatches: int, virtual: int, forward: float, backward_input: float, backward_weight: float
) -> float | None:
    """The bubble of a schedule with messages that take no time and the barrier of the optimizer step.

    Times are those of all stages of a rank. A rank's idle time is ``pp - 1`` forwards and backwards under gpipe and
    1f1b, and a ``virtual``-th of that under interleaved (Narayanan et al. 2021, section 2.2). Under zero-bubble it is
    ``(pp - 1) (forward + backward_input - backward_weight)`` (Qi et al. 2023, table 2), from ``pp`` micro-batches on
    and where neither of the others is shorter than backward_weight. Under zero-bubble-v a rank has no gap between its
    first action and its last (the same, section 6), from 2 pp - 1 micro-batches on and where all three take equally
    long; what is left is that each begins one stage's forward after the rank before it.

    Returns None where none of these holds.
    """
    total = forward + backward_input + backward_weight
    if name in ("gpipe", "1f1b"):
        idle = (pp - 1) * total
    elif name == "interleaved":
        idle = (pp - 1) * total / virtual
    elif name == "zero-bubble" and microbatches >= pp and min(forward, backward_input) >= backward_weight:
        idle = (pp - 1) * (forward + backward_input - backward_weight)
    elif name == "zero-bubble-v" and microbatches >= 2 * pp - 1 and forward == backward_input == backward_weight:
        idle = (pp - 1) * forward / virtual
    else:
        return None
    return idle / (microbatches * total + idle)


def cells(each: Compared | Refused) -> tuple[str, ...]:
    """A row of a table; see ``HEADS``."""
    if isinstance(each, Refused):
        return (each.name, *["-"] * (len(HEADS) - 1))
    timeline = each.timeline
    return (
        each.name,
        f"{timeline.bubble:.1%}",
        "-" if each.formula is None else f"{each.formula:.1%}",
        f"{timeline.bubble_without_barrier:.1%}",
        f"{timeline.peak:.4g}",
        f"{timeline.makespan:g}",
        f"{each.messages:,}",
    )


def rows(chosen: Compared, compared: Sequence[Compared | Refused]) -> list[dict[str, Any]]:
    """Rows for ``--json``: the ranks of ``chosen``, then every schedule; a closed formula is a row's limit."""
    share, alive = "share of the time", "micro-batches"
    made: list[dict[str, Any]] = []
    timeline = chosen.timeline
    virtual = len(timeline.schedule.placement) // timeline.schedule.ranks
    for rank, (bubble, peak) in enumerate(zip(timeline.bubbles, timeline.peaks, strict=True)):
        made.append({"name": f"{chosen.name}, rank {rank}: bubble", "value": bubble, "unit": share})
        made.append({"name": f"{chosen.name}, rank {rank}: peak", "value": peak / virtual, "unit": alive})
    for each in compared:
        if isinstance(each, Refused):
            made.append({"name": each.name, "value": None, "note": each.reason})
            continue
        timeline = each.timeline
        made += [
            {"name": f"{each.name}: bubble", "value": timeline.bubble, "unit": share, "limit": each.formula},
            {"name": f"{each.name}: without barrier", "value": timeline.bubble_without_barrier, "unit": share},
            {"name": f"{each.name}: peak", "value": timeline.peak, "unit": alive},
            {"name": f"{each.name}: time", "value": timeline.makespan, "unit": "as of --forward and --backward"},
            {"name": f"{each.name}: messages", "value": each.messages, "unit": "messages"},
        ]
    return made
