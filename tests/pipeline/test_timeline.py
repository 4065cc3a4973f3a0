"""Simulated times against closed formulas and longest paths; text against hand-drawn pictures."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapoly.pipeline.actions import Action, Kind, Schedule
from megapoly.pipeline.schedule import add_communication, build, build_forward, validate
from megapoly.pipeline.timeline import Timeline, render, simulate
from tests.pipeline.cases import schedules

F, B = Kind.FORWARD, Kind.BACKWARD

ranks = st.integers(1, 9)
microbatches = st.integers(1, 24)
costs = st.sampled_from([(1.0, 1.0), (1.0, 2.0), (3.0, 1.0), (0.7, 1.9)])


@given(st.sampled_from(("gpipe", "1f1b")), ranks, microbatches, costs)
def test_bubble_is_the_closed_formula(name, p, m, cost):
    timeline = simulate(build(name, p, m), forward=cost[0], backward=cost[1])
    assert timeline.makespan == pytest.approx((m + p - 1) * sum(cost))
    assert timeline.bubble == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)
    assert timeline.bubbles == pytest.approx([(p - 1) / (m + p - 1)] * p, abs=1e-12)
    # Rank 0 has the first action and the last, so that no barrier is missed.
    assert timeline.bubble_without_barrier == pytest.approx(timeline.bubble, abs=1e-12)


@given(st.integers(1, 6), st.integers(1, 4), st.integers(2, 4), costs)
@settings(max_examples=50)
def test_bubble_of_interleaved_is_the_closed_formula(p, groups, v, cost):
    m = groups * p
    timeline = simulate(build("interleaved", p, m, v), forward=cost[0], backward=cost[1])
    assert timeline.makespan == pytest.approx((v * m + p - 1) * sum(cost))
    assert timeline.bubble == pytest.approx((p - 1) / (v * m + p - 1), abs=1e-12)
    assert timeline.bubble_without_barrier == pytest.approx(timeline.bubble, abs=1e-12)


@given(ranks, microbatches, st.sampled_from([(1.0, 1.0, 1.0), (1.0, 1.5, 1.0), (1.0, 0.6, 0.9), (3.0, 2.0, 4.0)]))
def test_bubble_of_zero_bubble_is_the_closed_formula_and_below_1f1b(p, m, parts):
    forward, inputs, weights = parts
    timeline = simulate(build("zero-bubble", p, m), forward, inputs + weights, backward_weight=weights)
    if m >= p:
        # The paper's (p - 1) (forward + inputs - weights), unless weights take longer than the others.
        idle = (p - 1) * (forward + inputs - min(parts))
        assert timeline.makespan == pytest.approx(m * sum(parts) + idle)
        assert timeline.bubbles == pytest.approx([idle / (m * sum(parts) + idle)] * p, abs=1e-12)
    other = simulate(build("1f1b", p, m), forward, inputs + weights)
    if p > 1:
        assert timeline.bubble < other.bubble
        assert timeline.bubble_without_barrier < other.bubble_without_barrier


@given(st.integers(1, 6), st.integers(1, 16))
def test_zero_bubble_v_has_none_but_that_ranks_begin_one_after_another(p, m):
    timeline = simulate(build("zero-bubble-v", p, m), 1.0, 2.0)
    if m >= 2 * p - 1:
        assert timeline.makespan == 6 * m + p - 1
        assert timeline.bubble_without_barrier == pytest.approx(0, abs=1e-12)
        for rank, spans in enumerate(timeline.spans):
            assert (spans[0].start, spans[-1].stop) == (rank, rank + 6 * m)
    elif p > 1:
        other = simulate(build("1f1b", p, m), 2.0, 4.0)
        assert timeline.bubble < other.bubble
        assert timeline.bubble_without_barrier < other.bubble_without_barrier


@given(st.integers(1, 6), st.integers(1, 16), st.integers(2, 4))
@settings(max_examples=50)
def test_peak_activations(p, m, v):
    assert simulate(build("gpipe", p, m)).peaks == (m,) * p
    assert simulate(build("1f1b", p, m)).peaks == tuple(min(m, p - rank) for rank in range(p))
    assert simulate(build("zero-bubble", p, m)).peaks == (min(m, p),) * p
    groups = -(-m // p)
    interleaved = simulate(build("interleaved", p, groups * p, v))
    expected = tuple(min(v * groups * p, (p - 1 - rank) * 2 + (v - 1) * p + 1) for rank in range(p))
    assert interleaved.peaks == expected
    assert interleaved.peak == max(expected) / v  # in micro-batches of a whole rank
    zbv = simulate(build("zero-bubble-v", p, m))
    assert zbv.peak == min(m, p)  # of both stages, so as much as 1f1b
    assert simulate(build("1f1b", p, m)).peak == min(m, p)


@given(schedules(most=4), st.data())
@settings(max_examples=60)
def test_spans_are_the_longest_paths_of_uneven_stages(schedule, data):
    stages = len(schedule.placement)
    one = st.lists(st.sampled_from([0.5, 1.0, 1.75, 3.0]), min_size=stages, max_size=stages)
    forward, inputs, weights = (data.draw(one) for _ in range(3))
    backward = [sum(parts) for parts in zip(inputs, weights, strict=True)]
    cost = {F: forward, B: backward, Kind.BACKWARD_INPUT: inputs, Kind.BACKWARD_WEIGHT: weights}
    timeline = simulate(schedule, forward, backward, backward_weight=weights)

    order = [[span.action for span in spans] for spans in timeline.spans]
    before = {action: previous for actions in order for previous, action in itertools.pairwise(actions)}
    stops: dict[Action, float] = {}

    def stop(action: Action) -> float:
        kind, stage, microbatch = action
        if action not in stops:
            waits = [before[action]] if action in before else []
            waits += [Action(F, stage - 1, microbatch)] if kind is F and stage else []
            gradient = kind in (B, Kind.BACKWARD_INPUT) and stage + 1 < stages
            waits += [Action(kind, stage + 1, microbatch)] if gradient else []
            stops[action] = max(map(stop, waits), default=0.0) + cost[kind][stage]
        return stops[action]

    for spans in timeline.spans:
        for span in spans:
            assert span.stop == pytest.approx(stop(span.action))
            assert span.stop - span.start == pytest.approx(cost[span.action.kind][span.action.stage])
    rows = [steps_in_a_row(timeline, steps).makespan for steps in (8, 9)]
    assert timeline.step == pytest.approx(rows[1] - rows[0])


def steps_in_a_row(timeline: Timeline, steps: int) -> Timeline:
    """The timeline of a schedule that is as many copies of another, with micro-batches of their own."""
    schedule, m = timeline.schedule, timeline.schedule.microbatches
    lists = tuple(
        tuple(Action(kind, stage, i + copy * m) for copy in range(steps) for kind, stage, i in actions)
        for actions in schedule.actions
    )
    longer = Schedule(f"{schedule.name}, {steps} times", schedule.placement, steps * m, lists)
    validate(longer)
    return Timeline(longer, timeline.times, timeline.communication)


def test_forward_passes_in_a_row_hide_the_bubble_of_a_step():
    timeline = simulate(build_forward("1f1b", 3, 4))
    assert (timeline.makespan, timeline.step) == (4 + 3 - 1, 4)
    assert (timeline.bubble, timeline.bubble_without_barrier) == (pytest.approx(2 / 6), 0)


def test_the_slowest_stage_sets_the_pace():
    # Rank 1 is busy without a gap, after the first forward of rank 0 and before its last backward.
    timeline = simulate(build("1f1b", 2, 5), forward=[1.0, 3.0], backward=[2.0, 6.0])
    assert timeline.makespan == 1 + 5 * 9 + 2
    assert timeline.busy == (5 * 3, 5 * 9)


def test_communication_that_hides_behind_computation_delays_only_the_first_and_last():
    # Forwards reach rank 1 one message later, and it is never idle until its last backward; then one more message.
    assert simulate(build("gpipe", 2, 4), 1.0, 2.0, communication=0.5).makespan == (4 + 1) * 3.0 + 2 * 0.5
    # A message as long as four forwards: the four messages of the forwards follow one another on their route.
    timeline = simulate(build("gpipe", 2, 4), 1.0, 1.0, communication=4.0)
    assert [span.start for span in timeline.spans[1][:4]] == [5.0, 9.0, 13.0, 17.0]


def test_what_cannot_be_timed_is_refused():
    schedule = build("zero-bubble", 2, 2)
    for name, bad in (
        ("forward", 0.0),
        ("forward", math.nan),
        ("backward", [1.0, -1.0]),
        ("communication", -1.0),
        ("communication", math.inf),
        ("backward_weight", 0.0),
    ):
        with pytest.raises(ValueError, match=f"{name} takes .*above 0 and finite|{name} takes .*at least 0 and finite"):
            simulate(schedule, **{name: bad})
    with pytest.raises(ValueError, match=r"backward_weight 2.0 is a part of backward 2.0, and less than it"):
        simulate(schedule, backward_weight=2.0)
    with pytest.raises(ValueError, match="3 times of 2 stages"):
        simulate(schedule, forward=[1.0] * 3)


def test_render_is_the_picture_of_the_papers():
    assert render(build("gpipe", 2, 4)).splitlines() == [
        "gpipe: 2 ranks, 4 micro-batches, bubble 20.0%   (3 forward, 3' backward, . idle)",
        "rank 0 | 0 1 2 3 . . 0'1'2'3'| bubble 20.0%, peak 4",
        "rank 1 | . 0 1 2 3 0'1'2'3'. | bubble 20.0%, peak 4",
    ]
    assert render(simulate(build("1f1b", 2, 4))).splitlines() == [
        "1f1b: 2 ranks, 4 micro-batches, bubble 20.0%   (3 forward, 3' backward, . idle)",
        "rank 0 | 0 1 . . 0'--2 1'--3 2'--. 3'--| bubble 20.0%, peak 2",
        "rank 1 | . 0 0'--1 1'--2 2'--3 3'--. . | bubble 20.0%, peak 1",
    ]
    assert render(build("zero-bubble", 2, 4)).splitlines() == [
        "zero-bubble: 2 ranks, 4 micro-batches, bubble 7.7%"
        "   (3 forward, 3' backward of the input, 3\" of the weights, . idle)",
        "rank 0 | 0 1 . 0'0\"2 1'1\"3 2'2\"3'3\"| bubble 7.7%, peak 2",
        "rank 1 | . 0 0'1 1'0\"2 2'1\"3 3'2\"3\"| bubble 7.7%, peak 2",
    ]
    assert render(build("zero-bubble-v", 2, 3)).splitlines()[1:] == [
        "rank 0 | 0a 1a 2a 0b 0b'0b\"1b 1b'1b\"0a'0a\"2b 2b'2b\"1a'1a\"2a'2a\".  | bubble 5.3%, peak 2",
        "rank 1 | .  0a 0b 1a 1b 0b'0b\"2a 0a'0a\"2b 1b'1b\"1a'2b'2a'1a\"2b\"2a\"| bubble 5.3%, peak 2",
    ]


def test_render_tells_the_stages_of_a_rank_apart():
    compute = (
        (Action(F, 0, 0), Action(F, 2, 0), Action(B, 2, 0), Action(B, 0, 0)),
        (Action(F, 1, 0), Action(F, 3, 0), Action(B, 3, 0), Action(B, 1, 0)),
    )
    schedule = add_communication(Schedule("loop", (0, 1, 0, 1), 1, compute))
    validate(schedule)
    assert render(schedule).splitlines()[1:] == [
        "rank 0 | 0a .  0b .  .  0b'.  0a'| bubble 50.0%, peak 1",
        "rank 1 | .  0a .  0b 0b'.  0a'.  | bubble 50.0%, peak 1",
    ]


def test_rows_that_are_too_long_go_on_below():
    whole = render(build("1f1b", 2, 4))
    assert render(build("1f1b", 2, 4), columns=len(whole.splitlines()[1])) == whole
    assert render(build("1f1b", 2, 4), columns=43).splitlines()[1:] == [
        "rank 0 | 0 1 . 0'2 1'",
        "rank 1 | . 0 0'1 1'2 ",
        "",
        "rank 0 | 3 2'. 3'| bubble 20.0%, peak 2",
        "rank 1 | 2'3 3'. | bubble 20.0%, peak 1",
    ]
