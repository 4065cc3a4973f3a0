"""Schedules against closed formulas, hand-drawn pictures, and lists that are broken on purpose."""

from __future__ import annotations

import dataclasses
import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapoly.pipeline.schedule import (
    Action,
    Kind,
    Schedule,
    add_communication,
    build,
    validate,
)
from megapoly.pipeline.timeline import render, simulate

NAMES = ("gpipe", "1f1b")
F, B = Kind.FORWARD, Kind.BACKWARD

names = st.sampled_from(NAMES)
ranks = st.integers(1, 9)
microbatches = st.integers(1, 24)
costs = st.sampled_from([(1.0, 1.0), (1.0, 2.0), (3.0, 1.0), (0.7, 1.9)])


@given(names, ranks, microbatches, costs)
def test_bubble_is_the_closed_formula(name, p, m, cost):
    timeline = simulate(build(name, p, m), forward=cost[0], backward=cost[1])
    assert timeline.makespan == pytest.approx((m + p - 1) * sum(cost))
    assert timeline.bubble == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)
    assert timeline.bubbles == pytest.approx([(p - 1) / (m + p - 1)] * p, abs=1e-12)


@given(ranks, microbatches)
def test_peak_activations(p, m):
    assert simulate(build("gpipe", p, m)).peaks == (m,) * p
    assert simulate(build("1f1b", p, m)).peaks == tuple(min(m, p - rank) for rank in range(p))


@given(names, ranks, microbatches)
def test_every_action_once(name, p, m):
    schedule = build(name, p, m)
    for rank, actions in enumerate(schedule.actions):
        assert {action.stage for action in actions} == {rank} == set(schedule.stages(rank))
        kinds = {Kind.FORWARD, Kind.BACKWARD}
        kinds |= {Kind.RECV_FORWARD, Kind.SEND_BACKWARD} if rank > 0 else set()
        kinds |= {Kind.SEND_FORWARD, Kind.RECV_BACKWARD} if rank < p - 1 else set()
        assert sorted(map(str, actions)) == sorted(str(Action(kind, rank, i)) for kind in kinds for i in range(m))
        for kind in (F, B):  # ascending, so that gradients add up in one order under every schedule
            assert [action.microbatch for action in actions if action.kind is kind] == list(range(m))


@given(names, st.integers(2, 9), microbatches)
def test_receives_are_posted_a_compute_action_ahead_unless_the_rank_idles_anyway(name, p, m):
    schedule = build(name, p, m)
    for actions, spans in zip(schedule.actions, simulate(schedule, 1.0, 1.0).spans, strict=True):
        order = [span.action for span in spans]
        for i, action in enumerate(actions):
            if action.kind in (Kind.RECV_FORWARD, Kind.RECV_BACKWARD):
                user = order.index(Action(F if action.kind is Kind.RECV_FORWARD else B, *action[1:]))
                between = [each for each in actions[i : actions.index(order[user])] if each.kind in (F, B)]
                idles = user == 0 or spans[user].start > spans[user - 1].stop
                assert 1 <= len(between) <= 2 or (not between and idles)


def test_communication_that_hides_behind_computation_delays_only_the_first_and_last():
    # Forwards reach rank 1 one message later, and it is never idle until its last backward; then one more message.
    assert simulate(build("gpipe", 2, 4), 1.0, 2.0, communication=0.5).makespan == (4 + 1) * 3.0 + 2 * 0.5
    # A message as long as four forwards: the four messages of the forwards follow one another on their route.
    timeline = simulate(build("gpipe", 2, 4), 1.0, 1.0, communication=4.0)
    assert [span.start for span in timeline.spans[1][:4]] == [5.0, 9.0, 13.0, 17.0]


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


def test_render_tells_the_stages_of_a_rank_apart():
    compute = (
        (Action(F, 0, 0), Action(F, 2, 0), Action(B, 2, 0), Action(B, 0, 0)),
        (Action(F, 1, 0), Action(F, 3, 0), Action(B, 3, 0), Action(B, 1, 0)),
    )
    schedule = add_communication(Schedule("loop", (0, 1, 0, 1), 1, compute))
    validate(schedule)
    assert render(schedule).splitlines()[1:] == [
        "rank 0 | 0a .  0b .  .  0b'.  0a'| bubble 50.0%, peak 2",
        "rank 1 | .  0a .  0b 0b'.  0a'.  | bubble 50.0%, peak 2",
    ]


@given(st.sampled_from([(0, 1, 0, 1), (0, 1, 1, 0), (0, 0, 1, 1), (0, 1, 2, 2, 1, 0), (1, 0)]), st.integers(1, 8))
def test_any_placement_gets_communication_that_ends(placement, m):
    def compute(rank):
        stages = [stage for stage, at in enumerate(placement) if at == rank]
        forwards = [Action(F, stage, i) for stage in stages for i in range(m)]
        return (*forwards, *(Action(B, stage, i) for stage in reversed(stages) for i in range(m)))

    lists = tuple(compute(rank) for rank in range(max(placement) + 1))
    schedule = add_communication(Schedule("all forwards first", placement, m, lists))
    validate(schedule)
    crossings = sum(a != b for a, b in itertools.pairwise(placement))
    sends = [action for actions in schedule.actions for action in actions if action.kind.value.startswith("send")]
    assert len(sends) == 2 * crossings * m
    assert all(schedule.route(send) == schedule.route(schedule.message(send)) for send in sends)


def test_a_route_runs_from_the_sender_to_the_receiver():
    schedule = build("1f1b", 3, 2)
    assert schedule.route(Action(Kind.SEND_FORWARD, 0, 1)) == (0, 1)
    assert schedule.route(Action(Kind.RECV_FORWARD, 1, 1)) == (0, 1)
    assert schedule.route(Action(Kind.SEND_BACKWARD, 2, 0)) == (2, 1)
    assert schedule.route(Action(Kind.RECV_BACKWARD, 1, 0)) == (2, 1)


def edited(schedule: Schedule, rank: int, edit) -> Schedule:
    actions = list(schedule.actions[rank])
    edit(actions)
    return dataclasses.replace(
        schedule, actions=(*schedule.actions[:rank], tuple(actions), *schedule.actions[rank + 1 :])
    )


def swap(a: Action, b: Action):
    def edit(actions):
        i, j = actions.index(a), actions.index(b)
        actions[i], actions[j] = b, a

    return edit


def refused(schedule: Schedule, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        validate(schedule)


def test_a_missing_action_is_refused():
    schedule = build("1f1b", 2, 3)
    for action in (Action(B, 0, 2), Action(F, 0, 0), Action(Kind.SEND_FORWARD, 0, 1), Action(Kind.RECV_BACKWARD, 0, 1)):
        refused(
            edited(schedule, 0, lambda actions, action=action: actions.remove(action)), f"rank 0: {action} is missing"
        )


def test_a_repeated_action_is_refused():
    schedule = edited(build("1f1b", 2, 3), 1, lambda actions: actions.append(Action(B, 1, 0)))
    refused(schedule, "rank 1, action 3: backward of stage 1, micro-batch 0 stands in the list 2 times")


def test_an_action_of_another_rank_or_micro_batch_is_refused():
    for action in (Action(F, 1, 0), Action(F, 0, 3), Action(Kind.SEND_BACKWARD, 0, 0), Action(Kind.RECV_FORWARD, 0, 0)):
        schedule = edited(build("gpipe", 2, 3), 0, lambda actions, action=action: actions.insert(0, action))
        refused(schedule, f"rank 0, action 0: {action} does not belong on this rank")


def test_data_that_is_not_there_yet_is_refused():
    schedule = build("gpipe", 2, 2)
    early = edited(schedule, 1, swap(Action(F, 1, 1), Action(B, 1, 1)))
    refused(early, "backward of stage 1, micro-batch 1 stands before forward of stage 1, micro-batch 1")
    late = edited(schedule, 1, swap(Action(Kind.RECV_FORWARD, 1, 0), Action(F, 1, 0)))
    refused(late, "forward of stage 1, micro-batch 0 stands before receive forward of stage 1, micro-batch 0")
    unsent = edited(schedule, 0, swap(Action(Kind.SEND_FORWARD, 0, 0), Action(F, 0, 0)))
    refused(unsent, "send forward of stage 0, micro-batch 0 stands before forward of stage 0, micro-batch 0")


def test_ranks_that_wait_for_each_other_are_refused():
    # Rank 0 wants its first gradient before it sends the second activation; rank 1 wants both activations first.
    schedule = build("gpipe", 2, 2)
    compute = [Action(F, 0, 0), Action(B, 0, 0), Action(F, 0, 1), Action(B, 0, 1)]
    receives = [Action(Kind.RECV_BACKWARD, 0, 0), Action(Kind.RECV_BACKWARD, 0, 1)]
    sends = [Action(Kind.SEND_FORWARD, 0, 0), Action(Kind.SEND_FORWARD, 0, 1)]
    first_rank = (*receives, compute[0], sends[0], *compute[1:3], sends[1], compute[3])
    places = (
        "deadlocks: rank 0 at action 4, backward of stage 0, micro-batch 0;"
        " rank 1 at action 3, forward of stage 1, micro-batch 1"
    )
    refused(dataclasses.replace(schedule, actions=(first_rank, schedule.actions[1])), places)
    second_rank = tuple(action for action in schedule.actions[1] if action.kind in (F, B))
    with pytest.raises(ValueError, match="mixed deadlocks: rank 0 at"):
        add_communication(Schedule("mixed", (0, 1), 2, (tuple(compute), second_rank)))


def test_more_sends_under_way_than_a_rank_may_have_are_refused():
    # Stages 0 and 2 on rank 0: it runs every micro-batch through stage 0 before it looks at stage 2's first input.
    m = 20
    compute = (
        (
            *(Action(F, stage, i) for stage in (0, 2) for i in range(m)),
            *(Action(B, s, i) for s in (2, 0) for i in range(m)),
        ),
        tuple(Action(kind, 1, i) for kind in (F, B) for i in range(m)),
    )
    schedule = add_communication(Schedule("loop", (0, 1, 0), m, compute))
    validate(schedule)
    assert schedule.sends_in_flight == 6 < m

    def post_late(actions):
        for i in range(m):
            receive = Action(Kind.RECV_FORWARD, 2, i)
            actions.remove(receive)
            actions.insert(actions.index(Action(F, 2, i)), receive)

    # Rank 1 waits after 7 unreceived sends, its ninth input not yet posted; rank 0 so after 7 more sends, its 15th.
    refused(
        edited(schedule, 0, post_late),
        "rank 0 at action 30, forward of stage 0, micro-batch 15; rank 1 at action 22, receive forward of stage 1",
    )


def test_a_forward_only_schedule_has_no_backward_and_is_as_long_as_its_forwards():
    schedule = build("gpipe", 3, 4).forward_only()
    assert {action.kind for actions in schedule.actions for action in actions} == {
        Kind.FORWARD,
        Kind.SEND_FORWARD,
        Kind.RECV_FORWARD,
    }
    assert simulate(schedule).makespan == 4 + 3 - 1
    refused(edited(schedule, 1, lambda actions: actions.remove(Action(F, 1, 3))), "micro-batch 3 is missing")
    refused(
        dataclasses.replace(build("gpipe", 3, 4), trains=False), "backward of stage 0, micro-batch 0 does not belong"
    )
    refused(dataclasses.replace(schedule, trains=True), "receive backward of stage 0, micro-batch 0 is missing")


def test_receives_out_of_the_order_of_the_sends_are_refused():
    # Every message finds its receiver by name; in the queue of one communicator none does.
    first, second = Action(Kind.RECV_FORWARD, 1, 0), Action(Kind.RECV_FORWARD, 1, 1)
    schedule = edited(build("gpipe", 2, 2), 1, swap(first, second))
    refused(
        schedule,
        "; the activations of rank 0 wait with receive forward of stage 1, micro-batch 0;"
        " the activations of rank 1 wait with receive forward of stage 1, micro-batch 1",
    )


@pytest.mark.parametrize("placement", [(), (0, 2), (0, 0), (0, -1)])
def test_a_placement_that_leaves_a_rank_out_is_refused(placement):
    refused(dataclasses.replace(build("gpipe", 2, 2), placement=placement), "every rank has a stage")


def test_what_cannot_be_built_or_timed_is_refused():
    with pytest.raises(ValueError, match="unknown schedule 'zigzag'; known: gpipe, 1f1b"):
        build("zigzag", 2, 2)
    for p, m in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="both are at least 1"):
            build("1f1b", p, m)
    with pytest.raises(ValueError, match="costs"):
        simulate(build("1f1b", 2, 2), forward=0.0)
