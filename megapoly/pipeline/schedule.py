"""Pipeline schedules as data: built and proved. No torch.

A schedule is one list of actions per pipeline rank. Compute actions run in the order of the list. ``RECV_*`` posts a
receive and goes on; the compute action that uses the message waits for it. ``SEND_*`` hands over the result of its
compute action and goes on; a rank waits for its oldest send only when more than ``Schedule.sends_in_flight`` are under
way, and for all of them at the end. Activations share one communicator of the pipeline, gradients another.

GPipe: Huang et al. 2019, arXiv:1811.06965. 1F1B: Narayanan et al. 2021, arXiv:2104.04473 (PipeDream-Flush).
To add a schedule, write a generator of compute actions and enter it in ``_GENERATORS``.
"""

from __future__ import annotations

import enum
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple


class Kind(str, enum.Enum):
    """What an action does; messages are named by the stage that acts, not by its neighbour."""

    FORWARD = "forward"
    BACKWARD = "backward"
    SEND_FORWARD = "send forward"  # the stage's output, to the next stage
    RECV_FORWARD = "receive forward"  # the stage's input, from the previous stage
    SEND_BACKWARD = "send backward"  # the gradient of the stage's input, to the previous stage
    RECV_BACKWARD = "receive backward"  # the gradient of the stage's output, from the next stage


COMPUTE = (Kind.FORWARD, Kind.BACKWARD)
FORWARDS = (Kind.FORWARD, Kind.SEND_FORWARD, Kind.RECV_FORWARD)
RECEIVE = (Kind.RECV_FORWARD, Kind.RECV_BACKWARD)


class Action(NamedTuple):
    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind.value} of stage {self.stage}, micro-batch {self.microbatch}"


Lists = tuple[tuple[Action, ...], ...]


@dataclass(frozen=True)
class Schedule:
    """Actions of every pipeline rank for one global batch.

    Attributes:
        placement: pipeline rank of every stage. Neighbouring stages of one rank hand over locally, without messages.
        actions: one tuple per pipeline rank, in the order in which the rank runs it.
        trains: whether there are backward actions; all or none.
    """

    name: str
    placement: tuple[int, ...]
    microbatches: int
    actions: Lists
    trains: bool = True

    @property
    def ranks(self) -> int:
        return len(self.actions)

    @property
    def sends_in_flight(self) -> int:
        """Most sends of one rank that are under way at once, before it waits for the oldest."""
        return 2 * len(self.placement)

    def forward_only(self) -> Schedule:
        """The validated schedule of an evaluation: without backward actions and their messages."""
        lists = tuple(tuple(action for action in actions if action.kind in FORWARDS) for actions in self.actions)
        schedule = replace(self, name=f"{self.name}, forward only", actions=lists, trains=False)
        validate(schedule)
        return schedule

    def stages(self, rank: int) -> tuple[int, ...]:
        """Stages of a pipeline rank, ascending."""
        return tuple(stage for stage, at in enumerate(self.placement) if at == rank)

    def message(self, action: Action) -> Action:
        """The receive that a message is known by on both sides: of a receive itself, of a send its counterpart."""
        if action.kind is Kind.SEND_FORWARD:
            return Action(Kind.RECV_FORWARD, action.stage + 1, action.microbatch)
        if action.kind is Kind.SEND_BACKWARD:
            return Action(Kind.RECV_BACKWARD, action.stage - 1, action.microbatch)
        return action

    def route(self, action: Action) -> tuple[int, int]:
        """Pipeline ranks (from, to) of a send or a receive."""
        kind, stage, _ = self.message(action)
        return self.placement[stage - 1 if kind is Kind.RECV_FORWARD else stage + 1], self.placement[stage]


@cache
def build(name: str, pp: int, microbatches: int) -> Schedule:
    """The validated schedule ``name`` of ``pp`` ranks with ``microbatches`` micro-batches; any positive numbers do.

    Names: ``gpipe``, ``1f1b``. Raises ValueError for another name or a number below one.
    """
    if name not in _GENERATORS:
        raise ValueError(f"unknown schedule {name!r}; known: {', '.join(_GENERATORS)}")
    if pp < 1 or microbatches < 1:
        raise ValueError(f"schedule {name} of {pp} ranks and {microbatches} micro-batches; both are at least 1")
    placement, compute = _GENERATORS[name](pp, microbatches)
    schedule = add_communication(Schedule(name, placement, microbatches, compute))
    validate(schedule)
    return schedule


def _gpipe(pp: int, microbatches: int) -> tuple[tuple[int, ...], Lists]:
    """All forwards, then all backwards, both ascending, so that gradients add up in the order of 1F1B."""
    every = range(microbatches)
    return tuple(range(pp)), tuple(
        tuple(Action(kind, stage, i) for kind in COMPUTE for i in every) for stage in range(pp)
    )


def _one_forward_one_backward(pp: int, microbatches: int) -> tuple[tuple[int, ...], Lists]:
    """As many forwards as it takes to reach the last stage, then a forward and a backward in turns."""
    lists = []
    for stage in range(pp):
        warm_up = min(microbatches, pp - 1 - stage)
        forwards = [Action(Kind.FORWARD, stage, i) for i in range(microbatches)]
        backwards = [Action(Kind.BACKWARD, stage, i) for i in range(microbatches)]
        steady = [action for pair in zip(forwards[warm_up:], backwards, strict=False) for action in pair]
        lists.append((*forwards[:warm_up], *steady, *backwards[microbatches - warm_up :]))
    return tuple(range(pp)), tuple(lists)


_GENERATORS: dict[str, Callable[[int, int], tuple[tuple[int, ...], Lists]]] = {
    "gpipe": _gpipe,
    "1f1b": _one_forward_one_backward,
}


def add_communication(schedule: Schedule) -> Schedule:
    """The schedule, given with compute actions only, with sends and receives.

    A send stands right after its compute action. A receive is posted one compute action before the one that uses it,
    so that the message travels meanwhile. Within this, every rank posts the messages of a direction in one order that
    all ranks share, that of their departure when all compute actions take equally long. As whatever a message
    depends on departs before it, the first message in that order is always at the head of both its queues.
    """
    departure = _departures(schedule)
    lists = []
    for compute in schedule.actions:
        position = {action: i for i, action in enumerate(compute)}
        slots: dict[int, list[Action]] = defaultdict(list)  # receives by the index of the compute action that follows
        for direction in RECEIVE:
            posts = [
                (departure[message], message, position[action], message is need)
                for action in compute
                for need in (*_needs(schedule, action), *_sends(schedule, action))
                if (message := schedule.message(need)).kind is direction
            ]
            posts.sort()
            latest, slot = len(compute), {}
            for _, message, index, receive in reversed(posts):
                latest = min(latest, max(0, index - 1) if receive else index)
                slot[message] = latest
            earliest = 0
            for _, message, index, receive in posts:
                if receive:
                    slots[max(slot[message], earliest)].append(message)
                else:
                    earliest = index + 1
        lists.append(
            tuple(each for i, action in enumerate(compute) for each in (*slots[i], action, *_sends(schedule, action)))
        )
    return replace(schedule, actions=tuple(lists))


def _departures(schedule: Schedule) -> dict[Action, tuple[float, int]]:
    """A key for every message that puts them in one order: time of departure, then distance along the pipeline."""
    lists = []
    for compute in schedule.actions:
        receives = [need for action in compute for need in _needs(schedule, action) if need.kind in RECEIVE]
        lists.append((*receives, *(each for action in compute for each in (action, *_sends(schedule, action)))))
    spans = execute(replace(schedule, actions=tuple(lists)), dict.fromkeys(COMPUTE, 1.0), 0.0, queued=False)
    return {
        (message := schedule.message(send)): (stop, message.stage if send.kind is Kind.SEND_FORWARD else -message.stage)
        for each in spans
        for action, _, stop in each
        for send in _sends(schedule, action)
    }


def _sends(schedule: Schedule, action: Action) -> list[Action]:
    """The send, if any, that follows a compute action."""
    placement, (kind, stage, microbatch) = schedule.placement, action
    if kind is Kind.FORWARD and stage + 1 < len(placement) and placement[stage + 1] != placement[stage]:
        return [Action(Kind.SEND_FORWARD, stage, microbatch)]
    if kind is Kind.BACKWARD and stage > 0 and placement[stage - 1] != placement[stage]:
        return [Action(Kind.SEND_BACKWARD, stage, microbatch)]
    return []


def _needs(schedule: Schedule, action: Action) -> list[Action]:
    """Actions of the same rank whose results ``action`` uses."""
    placement, (kind, stage, microbatch) = schedule.placement, action
    if kind is Kind.FORWARD:
        if stage == 0:
            return []
        local = placement[stage - 1] == placement[stage]
        return [Action(Kind.FORWARD, stage - 1, microbatch) if local else Action(Kind.RECV_FORWARD, stage, microbatch)]
    if kind is Kind.BACKWARD:
        forward = Action(Kind.FORWARD, stage, microbatch)
        if stage + 1 == len(placement):
            return [forward]
        local = placement[stage + 1] == placement[stage]
        return [
            forward,
            Action(Kind.BACKWARD, stage + 1, microbatch) if local else Action(Kind.RECV_BACKWARD, stage, microbatch),
        ]
    if kind is Kind.SEND_FORWARD:
        return [Action(Kind.FORWARD, stage, microbatch)]
    if kind is Kind.SEND_BACKWARD:
        return [Action(Kind.BACKWARD, stage, microbatch)]
    return []


def validate(schedule: Schedule) -> None:
    """Prove that a schedule computes every stage and micro-batch once, on the right rank, from data that is there,
    and that it comes to an end.

    The end is proved for two kinds of transport: one where a message needs no more than its two sides (gloo), and NCCL,
    where the sends and receives of one communicator form one queue on each of its ranks, and one starts only when it
    stands at the head of both. Raises ValueError that names rank, index and action.
    """
    if set(schedule.placement) != set(range(schedule.ranks)) or schedule.microbatches < 1:
        raise ValueError(
            f"schedule {schedule.name}: placement {schedule.placement} of {schedule.microbatches} micro-batches on"
            f" {schedule.ranks} ranks; every rank has a stage, and there is a micro-batch"
        )
    for rank, actions in enumerate(schedule.actions):
        _check_contents(schedule, rank, actions)
        _check_order(schedule, rank, actions)
    for queued in (False, True):
        execute(schedule, dict.fromkeys(COMPUTE, 1.0), 0.0, queued=queued)


def _expected(schedule: Schedule, rank: int) -> Iterator[Action]:
    for stage in schedule.stages(rank):
        for microbatch in range(schedule.microbatches):
            for kind in COMPUTE if schedule.trains else (Kind.FORWARD,):
                action = Action(kind, stage, microbatch)
                yield from (need for need in _needs(schedule, action) if need.kind in RECEIVE)
                yield action
                yield from _sends(schedule, action)


def _check_contents(schedule: Schedule, rank: int, actions: tuple[Action, ...]) -> None:
    expected = dict.fromkeys(_expected(schedule, rank))
    for action, count in Counter(actions).items():
        if action in expected and count == 1:
            continue
        where = f"schedule {schedule.name}, rank {rank}, action {actions.index(action)}"
        what = f"stands in the list {count} times" if action in expected else "does not belong on this rank"
        raise ValueError(f"{where}: {action} {what}")
    present = set(actions)
    for action in expected:
        if action not in present:
            raise ValueError(f"schedule {schedule.name}, rank {rank}: {action} is missing")


def _check_order(schedule: Schedule, rank: int, actions: tuple[Action, ...]) -> None:
    done: set[Action] = set()
    for i, action in enumerate(actions):
        for need in _needs(schedule, action):
            if need not in done:
                raise ValueError(f"schedule {schedule.name}, rank {rank}, action {i}: {action} stands before {need}")
        done.add(action)


class Span(NamedTuple):
    """A compute action with the times of its start and stop."""

    action: Action
    start: float
    stop: float


def execute(schedule: Schedule, cost: dict[Kind, float], communication: float, *, queued: bool) -> list[list[Span]]:
    """Compute actions with their times, per rank; ValueError where no rank can go on."""
    run = _Execution(schedule, cost, communication, queued)
    while any([run.advance(rank) for rank in range(schedule.ranks)]):
        pass
    stuck = [rank for rank, actions in enumerate(schedule.actions) if run.at[rank] < len(actions)]
    if not stuck:
        return run.spans
    places = [f"rank {rank} at action {run.at[rank]}, {schedule.actions[rank][run.at[rank]]}" for rank in stuck]
    heads = [
        f"the {'activations' if lane is Kind.RECV_FORWARD else 'gradients'} of rank {rank} wait with {queue[0][0]}"
        for (lane, rank), queue in run.queues.items()
        if queue and queued
    ]
    raise ValueError(f"schedule {schedule.name} deadlocks: {'; '.join(places + heads)}")


class _Execution:
    """A schedule on a clock.

    A message is under way for ``communication`` from the moment when both its sides are posted, if ``queued`` stand at
    the heads of their queues, and the message before it on its route has arrived.
    """

    def __init__(self, schedule: Schedule, cost: dict[Kind, float], communication: float, queued: bool) -> None:
        self.schedule, self.cost, self.communication, self.queued = schedule, cost, communication, queued
        self.spans: list[list[Span]] = [[] for _ in schedule.actions]
        self.clock = [0.0] * schedule.ranks
        self.at = [0] * schedule.ranks
        self.sent: list[deque[Action]] = [deque() for _ in schedule.actions]
        self.arrived: dict[Action, float] = {}
        self.free: dict[tuple[int, int], float] = defaultdict(float)  # by route: when its last message arrived
        # By direction, or by message where there are no queues, and by rank: messages with the times of their posting.
        self.queues: dict[tuple[Kind | Action, int], deque[tuple[Action, float]]] = defaultdict(deque)

    def advance(self, rank: int) -> bool:
        """Run a rank as far as it goes; whether it went on at all."""
        first, actions = self.at[rank], self.schedule.actions[rank]
        while self.at[rank] < len(actions):
            action = actions[self.at[rank]]
            if len(self.sent[rank]) > self.schedule.sends_in_flight:
                if not self._wait(rank, [self.sent[rank][0]]):
                    break
                self.sent[rank].popleft()
            if action.kind in COMPUTE:
                if not self._wait(rank, [need for need in _needs(self.schedule, action) if need.kind in RECEIVE]):
                    break
                start = self.clock[rank]
                self.clock[rank] += self.cost[action.kind]
                self.spans[rank].append(Span(action, start, self.clock[rank]))
            else:
                self._post(rank, action)
            self.at[rank] += 1
        return self.at[rank] > first

    def _wait(self, rank: int, messages: list[Action]) -> bool:
        if not all(message in self.arrived for message in messages):
            return False
        self.clock[rank] = max([self.clock[rank], *(self.arrived[message] for message in messages)])
        return True

    def _post(self, rank: int, action: Action) -> None:
        message = self.schedule.message(action)
        if message is not action:
            self.sent[rank].append(message)
        lane = message.kind if self.queued else message
        self.queues[lane, rank].append((message, self.clock[rank]))
        routes = [self.schedule.route(message)]
        while routes:  # what arrives may free the way for messages behind it, in both queues
            route = routes.pop()
            source, target = (self.queues[lane, end] for end in route)
            if source and target and source[0][0] == target[0][0]:
                (head, posted), (_, awaited) = source.popleft(), target.popleft()
                self.arrived[head] = max(posted, awaited, self.free[route]) + self.communication
                self.free[route] = self.arrived[head]
                routes += [self.schedule.route(queue[0][0]) for queue in (source, target) if queue]
