"""Messages that a schedule gets, and lists that are broken on purpose."""

from __future__ import annotations

import dataclasses
import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapoly.pipeline.actions import Action, Kind, Schedule
from megapoly.pipeline.schedule import add_communication, build, build_forward, execute, validate
from megapoly.pipeline.timeline import simulate
from tests.pipeline.cases import edited, schedules

NAMES = ("gpipe", "1f1b")
F, B = Kind.FORWARD, Kind.BACKWARD
BI, BW = Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT

names = st.sampled_from(NAMES)
ranks = st.integers(1, 9)
microbatches = st.integers(1, 24)


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


@given(names, st.integers(2, 9), microbatches)
def test_no_gradient_is_awaited_before_the_first_forward(name, p, m):
    """The first message of two ranks may block both: NCCL then connects them."""
    for actions in build(name, p, m).actions:
        kinds = [action.kind for action in actions]
        if Kind.RECV_BACKWARD in kinds:
            assert kinds.index(Kind.FORWARD) < kinds.index(Kind.RECV_BACKWARD)


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


def test_receives_out_of_order_of_several_stages_are_refused_for_their_queue_alone():
    # Rank 0 waits for the activations of stage 2 in the wrong order: gloo finds them by name, NCCL by their place.
    first, second = Action(Kind.RECV_FORWARD, 2, 0), Action(Kind.RECV_FORWARD, 2, 1)
    schedule = edited(build("interleaved", 2, 2), 0, swap(first, second))
    execute(schedule, lambda action: 1.0, 0.0, queued=False)
    refused(schedule, f"the activations of rank 0 wait with {second}; the activations of rank 1 wait with {first}")


def test_parts_of_a_backward_out_of_order_are_refused():
    schedule = build("zero-bubble", 2, 2)
    early = edited(schedule, 0, swap(Action(BI, 0, 1), Action(BW, 0, 1)))
    refused(early, "backward weight of stage 0, micro-batch 1 stands before backward input of stage 0, micro-batch 1")
    late = edited(schedule, 1, swap(Action(BI, 1, 0), Action(Kind.SEND_BACKWARD, 1, 0)))
    refused(late, "send backward of stage 1, micro-batch 0 stands before backward input of stage 1, micro-batch 0")
    local = edited(build("zero-bubble-v", 2, 3), 1, swap(Action(BI, 1, 0), Action(BI, 2, 0)))
    refused(local, "backward input of stage 1, micro-batch 0 stands before backward input of stage 2, micro-batch 0")


def test_a_backward_among_split_ones_is_refused():
    schedule = build("zero-bubble", 2, 2)
    whole = edited(schedule, 0, lambda actions: actions.__setitem__(actions.index(Action(BI, 0, 0)), Action(B, 0, 0)))
    refused(whole, "backward of stage 0, micro-batch 0 does not belong on this rank")
    refused(edited(schedule, 1, lambda actions: actions.remove(Action(BW, 1, 1))), f"{Action(BW, 1, 1)} is missing")


def test_ranks_that_wait_for_each_other_over_two_stages_each_are_refused():
    # Rank 0 wants micro-batch 0 back from rank 1 before it forwards micro-batch 1; rank 1 wants both first.
    compute = (
        tuple(Action(F, stage, i) for i in range(2) for stage in (0, 3)),
        tuple(Action(F, stage, i) for stage in (1, 2) for i in range(2)),
    )
    with pytest.raises(ValueError, match=r"v deadlocks: rank 0 at .*, forward of stage 3, micro-batch 0; rank 1 at"):
        add_communication(Schedule("v", (0, 1, 1, 0), 2, compute, trains=False))


@given(schedules(most=4), st.data())
def test_any_list_with_one_action_lost_doubled_or_too_early_is_refused(schedule, data):
    rank = data.draw(st.integers(0, schedule.ranks - 1))
    actions = schedule.actions[rank]
    action = data.draw(st.sampled_from(actions))
    refused(edited(schedule, rank, lambda each: each.remove(action)), f"rank {rank}: {action} is missing")
    doubled = edited(schedule, rank, lambda each: each.append(action))
    refused(doubled, f"rank {rank}, action {actions.index(action)}: {action} stands in the list 2 times")
    for need in schedule.needs(action):
        assert need in actions

        def early(each, need=need):
            each.remove(action)
            each.insert(each.index(need), action)

        with pytest.raises(ValueError, match="stands before"):
            validate(edited(schedule, rank, early))


def test_a_list_of_forward_passes_is_not_one_of_a_training_step():
    schedule = build_forward("gpipe", 3, 4)
    assert schedule.kinds == (F,)
    refused(edited(schedule, 1, lambda actions: actions.remove(Action(F, 1, 3))), "micro-batch 3 is missing")
    refused(
        dataclasses.replace(build("gpipe", 3, 4), trains=False), "backward of stage 0, micro-batch 0 does not belong"
    )
    refused(dataclasses.replace(schedule, trains=True), "receive backward of stage 0, micro-batch 0 is missing")
