"""Schedules drawn by hypothesis, and edits of their lists."""

from __future__ import annotations

import dataclasses

from hypothesis import strategies as st

from megapoly.pipeline.actions import Schedule
from megapoly.pipeline.generators import GENERATORS
from megapoly.pipeline.schedule import build

NAMES = tuple(GENERATORS)


@st.composite
def schedules(draw, names=NAMES, most=6) -> Schedule:
    """Any schedule of up to ``most`` ranks that there is."""
    name, p = draw(st.sampled_from(names)), draw(st.integers(1, most))
    if name == "interleaved":
        return build(name, p, p * draw(st.integers(1, 4)), draw(st.integers(2, 4)))
    return build(name, p, draw(st.integers(1, 3 * most)))


def edited(schedule: Schedule, rank: int, edit) -> Schedule:
    """The schedule, after ``edit`` has changed the list of a rank."""
    actions = list(schedule.actions[rank])
    edit(actions)
    lists = (*schedule.actions[:rank], tuple(actions), *schedule.actions[rank + 1 :])
    return dataclasses.replace(schedule, actions=lists)
