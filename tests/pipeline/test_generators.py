"""The named schedules: complete, in order, refused with the nearest that works."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapoly.pipeline.actions import COMPUTE, RECEIVE, Action, Kind
from megapoly.pipeline.schedule import build, build_forward
from megapoly.pipeline.timeline import simulate
from tests.pipeline.cases import NAMES, schedules

F, B = Kind.FORWARD, Kind.BACKWARD
BI, BW = Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT

ranks = st.integers(1, 9)
microbatches = st.integers(1, 24)


@given(schedules(most=7))
def test_every_stage_runs_every_micro_batch_once_and_in_ascending_order(schedule):
    kinds = {F, BI, BW} if schedule.name.startswith("zero-bubble") else {F, B}
    found = {}  # micro-batches in the order in which a stage takes them, so that gradients add up in one order
    for rank, actions in enumerate(schedule.actions):
        for kind, stage, microbatch in actions:
            if kind in COMPUTE:
                assert schedule.placement[stage] == rank
                found.setdefault((kind, stage), []).append(microbatch)
    everything = list(range(schedule.microbatches))
    assert found == {(kind, stage): everything for kind in kinds for stage in range(len(schedule.placement))}


@given(schedules(most=7))
def test_every_hand_over_between_ranks_is_one_message_each_way(schedule):
    placement = schedule.placement
    crossings = [s for s in range(len(placement) - 1) if placement[s] != placement[s + 1]]
    sends = Counter({(Kind.SEND_FORWARD, s): schedule.microbatches for s in crossings})
    sends.update({(Kind.SEND_BACKWARD, s + 1): schedule.microbatches for s in crossings})
    receives = Counter({(Kind.RECV_FORWARD, s + 1): schedule.microbatches for s in crossings})
    receives.update({(Kind.RECV_BACKWARD, s): schedule.microbatches for s in crossings})
    messages = [action for actions in schedule.actions for action in actions if action.kind not in COMPUTE]
    assert Counter(action[:2] for action in messages) == sends + receives


def test_where_the_stages_stand():
    assert build("1f1b", 3, 3).placement == build("zero-bubble", 3, 3).placement == (0, 1, 2)
    assert build("interleaved", 3, 3).placement == (0, 1, 2, 0, 1, 2)
    assert build("interleaved", 2, 2, 4).placement == (0, 1, 0, 1, 0, 1, 0, 1)
    assert build("zero-bubble-v", 3, 3).placement == (0, 1, 2, 2, 1, 0)


def test_interleaved_is_the_order_of_the_paper():
    # Narayanan et al. 2021, figure 4, with two ranks: 4 and 2 forwards before the first that has a backward after it.
    first = "F0.0 F0.1 F2.0 F2.1 F0.2 B2.0 F0.3 B2.1 F2.2 B0.0 F2.3 B0.1 B2.2 B2.3 B0.2 B0.3"
    second = "F1.0 F1.1 F3.0 B3.0 F3.1 B3.1 F1.2 B1.0 F1.3 B1.1 F3.2 B3.2 F3.3 B3.3 B1.2 B1.3"
    assert [in_short(actions) for actions in build("interleaved", 2, 4).actions] == [first, second]


def test_zero_bubble_is_the_order_of_the_paper():
    # Qi et al. 2023, figure 2 (ZB-H1), with three ranks.
    assert [in_short(actions) for actions in build("zero-bubble", 3, 4).actions] == [
        "F0.0 F0.1 F0.2 I0.0 W0.0 F0.3 I0.1 W0.1 I0.2 W0.2 I0.3 W0.3",
        "F1.0 F1.1 I1.0 F1.2 I1.1 W1.0 F1.3 I1.2 W1.1 I1.3 W1.2 W1.3",
        "F2.0 I2.0 F2.1 I2.1 F2.2 I2.2 W2.0 F2.3 I2.3 W2.1 W2.2 W2.3",
    ]


def in_short(actions) -> str:
    return " ".join(
        f"{'FBIW'[COMPUTE.index(kind)]}{stage}.{microbatch}" for kind, stage, microbatch in actions if kind in COMPUTE
    )


@given(st.integers(1, 6), st.integers(1, 16))
@settings(max_examples=40)
def test_zero_bubble_v_is_that_of_pytorch(p, m):
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    kinds = {"FORWARD": F, "BACKWARD_INPUT": BI, "BACKWARD_WEIGHT": BW}
    torchs = object.__new__(schedules.ScheduleZBVZeroBubble)
    torchs.pp_group_size, torchs.num_stages, torchs._n_microbatches = p, 2 * p, m
    for rank, actions in enumerate(build("zero-bubble-v", p, m).actions):
        expected = [
            Action(kinds[each.computation_type.name], each.stage_index, each.microbatch_index)
            for each in torchs._calculate_single_rank_operations(rank)
            if each is not None
        ]
        assert [action for action in actions if action.kind in COMPUTE] == expected


@given(schedules(most=5), st.sampled_from([0.0, 0.1, 0.7]))
@settings(max_examples=40)
def test_receives_cost_no_more_than_if_all_were_posted_at_the_start(schedule, communication):
    early = (sorted(actions, key=lambda action: action.kind not in RECEIVE) for actions in schedule.actions)
    other = dataclasses.replace(schedule, actions=tuple(map(tuple, early)))
    makespans = [simulate(each, 1.0, 2.0, communication).makespan for each in (schedule, other)]
    assert makespans[0] == pytest.approx(makespans[1])


@given(st.sampled_from(NAMES), st.integers(1, 6), st.integers(1, 15))
def test_forward_passes_alone_of_any_number_of_micro_batches(name, p, m):
    schedule = build_forward(name, p, m)
    assert schedule.placement == build(name, p, p).placement
    stages = len(schedule.placement)
    found = sorted(action for actions in schedule.actions for action in actions if action.kind in COMPUTE)
    assert found == [Action(F, stage, i) for stage in range(stages) for i in range(m)]
    kinds = {action.kind for actions in schedule.actions for action in actions}
    assert kinds <= {F, Kind.SEND_FORWARD, Kind.RECV_FORWARD}
    if name == "zero-bubble-v":  # the last micro-batch leaves the last rank when it has no other, and has to go back
        assert simulate(schedule).makespan == 2 * m + 2 * (p - 1)
    elif m % p == 0:  # no rank has a gap once it has begun
        assert simulate(schedule).makespan == m * stages // p + p - 1


def test_what_cannot_be_built_is_refused_with_the_nearest_that_works():
    with pytest.raises(ValueError, match="unknown schedule 'zigzag'; known: gpipe, 1f1b, interleaved, zero-bubble, z"):
        build("zigzag", 2, 2)
    for p, m in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="both are at least 1"):
            build("1f1b", p, m)
        with pytest.raises(ValueError, match="both are at least 1"):
            build_forward("1f1b", p, m)
    with pytest.raises(ValueError, match=r"10 micro-batches are not a multiple of 4 .* that works is 8 or 12$"):
        build("interleaved", 4, 10)
    with pytest.raises(ValueError, match=r"3 micro-batches are not a multiple of 4 .* that works is 4$"):
        build("interleaved", 4, 3)
    for name, virtual, nearest in (("1f1b", 2, 1), ("interleaved", 1, 2), ("zero-bubble-v", 3, 2), ("gpipe", 0, 1)):
        with pytest.raises(ValueError, match=f"{name} with {virtual} stages per rank; the nearest .* is {nearest}$"):
            build(name, 4, 8, virtual)
        assert build(name, 4, 8, nearest) == build(name, 4, 8)
