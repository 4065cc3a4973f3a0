"""Pipeline schedules as data: built and proved. No torch.

A schedule is one list of actions per pipeline rank. Compute actions run in the order of the list. ``RECV_*`` posts a
receive and goes on; the compute action that uses the message waits for it. ``SEND_*`` hands over the result of its
compute action and goes on; a rank waits for its oldest send only when more than ``Schedule.sends_in_flight`` are under
way, and for all of them at the end. Activations share one communicator of the pipeline, gradients another.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import NamedTuple

from megapoly.pipeline.actions import COMPUTE, RECEIVE, Action, Kind, Schedule
from megapoly.pipeline.generators import GENERATORS, Generator


@cache
def build(name: str, pp: int, microbatches: int, virtual: int | None = None) -> Schedule:
    """The validated schedule of a training step.

    Args:
        name: ``gpipe``, ``1f1b``, ``interleaved``, ``zero-bubble`` or ``zero-bubble-v``.
        pp: pipeline ranks.
        microbatches: of one rank in a step; of ``interleaved`` a multiple of ``pp``, else any number.
        virtual: stages per rank; where not given, 2 of ``interleaved`` and ``zero-bubble-v``, 1 of the others.

    Raises ValueError, which says what would work, for what there is no schedule of.
    """
    generator, virtual = _generator(name, pp, microbatches, virtual)
    if generator.grouped and microbatches % pp:
        whole = microbatches - microbatches % pp
        nearest = " or ".join(str(each) for each in (whole, whole + pp) if each)
        raise ValueError(
            f"schedule {name}: {microbatches} micro-batches are not a multiple of {pp} pipeline ranks; the nearest"
            f" that works is {nearest}"
        )
    compute = generator.lists(pp, microbatches, virtual)
    schedule = add_communication(Schedule(name, generator.placement(pp, virtual), microbatches, compute))
    validate(schedule)
    return schedule


@cache
def build_forward(name: str, pp: int, microbatches: int, virtual: int | None = None) -> Schedule:
    """The validated schedule of an evaluation: the forward passes of ``build``, of any number of micro-batches."""
    generator, virtual = _generator(name, pp, microbatches, virtual)
    whole = -(-microbatches // pp) * pp if generator.grouped else microbatches
    lists = tuple(
        tuple(action for action in actions if action.kind is Kind.FORWARD and action.microbatch < microbatches)
        for actions in generator.lists(pp, whole, virtual)
    )
    placement = generator.placement(pp, virtual)
    schedule = add_communication(Schedule(f"{name}, forward only", placement, microbatches, lists, trains=False))
    validate(schedule)
    return schedule


def _generator(name: str, pp: int, microbatches: int, virtual: int | None) -> tuple[Generator, int]:
    """The generator of a name and the stages per rank; ValueError where it cannot be."""
    if name not in GENERATORS:
        raise ValueError(f"unknown schedule {name!r}; known: {', '.join(GENERATORS)}")
    if pp < 1 or microbatches < 1:
        raise ValueError(f"schedule {name} of {pp} ranks and {microbatches} micro-batches; both are at least 1")
    possible = GENERATORS[name].virtual
    if virtual is not None and virtual not in possible:
        nearest = min(max(virtual, possible[0]), possible[-1])
        raise ValueError(f"schedule {name} with {virtual} stages per rank; the nearest that works is {nearest}")
    return GENERATORS[name], possible[0] if virtual is None else virtual


def add_communication(schedule: Schedule) -> Schedule:
    """The schedule, given with compute actions only, with sends and receives.

    A send stands right after its compute action. A receive is posted one compute action before the one that uses it,
    so that the message travels meanwhile; that of a gradient never before the rank's first forward, which the gradient
    depends on: where posting blocks, neither would ever come. Within this, every rank posts the messages of a direction
    in one order that all ranks share, that of their departure when all compute actions take equally long. As whatever a
    message depends on departs before it, the first message in that order is always at the head of both its queues.
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
                for need in (*schedule.needs(action), *schedule.sends(action))
                if (message := schedule.message(need)).kind is direction
            ]
            posts.sort()
            latest, slot = len(compute), {}
            for _, message, index, receive in reversed(posts):
                latest = min(latest, max(direction is Kind.RECV_BACKWARD, index - 1) if receive else index)
                slot[message] = latest
            earliest = 0
            for _, message, index, receive in posts:
                if receive:
                    slots[max(slot[message], earliest)].append(message)
                else:
                    earliest = index + 1
        lists.append(
            tuple(each for i, action in enumerate(compute) for each in (*slots[i], action, *schedule.sends(action)))
        )
    return replace(schedule, actions=tuple(lists))


def _departures(schedule: Schedule) -> dict[Action, tuple[float, int]]:
    """A key for every message that puts them in one order: time of departure, then distance along the pipeline."""
    lists = []
    for compute in schedule.actions:
        receives = [need for action in compute for need in schedule.needs(action) if need.kind in RECEIVE]
        lists.append((*receives, *(each for action in compute for each in (action, *schedule.sends(action)))))
    spans = execute(replace(schedule, actions=tuple(lists)), _equal, 0.0, queued=False)
    return {
        (message := schedule.message(send)): (stop, message.stage if send.kind is Kind.SEND_FORWARD else -message.stage)
        for each in spans
        for action, _, stop in each
        for send in schedule.sends(action)
    }


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
        execute(schedule, _equal, 0.0, queued=queued)


def _expected(schedule: Schedule, rank: int) -> Iterator[Action]:
    for stage in schedule.stages(rank):
        for microbatch in range(schedule.microbatches):
            for kind in schedule.kinds:
                action = Action(kind, stage, microbatch)
                yield from (need for need in schedule.needs(action) if need.kind in RECEIVE)
                yield action
                yield from schedule.sends(action)


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
        for need in schedule.needs(action):
            if need not in done:
                raise ValueError(f"schedule {schedule.name}, rank {rank}, action {i}: {action} stands before {need}")
        done.add(action)


Cost = Callable[[Action], float]


def _equal(action: Action) -> float:
    return 1.0


class Span(NamedTuple):
    """A compute action with the times of its start and stop."""

    action: Action
    start: float
    stop: float


def execute(schedule: Schedule, cost: Cost, communication: float, *, queued: bool) -> list[list[Span]]:
    """Compute actions with their times, per rank; ValueError where no rank can go on.

    Args:
        cost: time of a compute action.
        communication: time of a message.
        queued: whether messages wait in the queues of NCCL (see ``validate``).
    """
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

    def __init__(self, schedule: Schedule, cost: Cost, communication: float, queued: bool) -> None:
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
                if not self._wait(rank, [need for need in self.schedule.needs(action) if need.kind in RECEIVE]):
                    break
                start = self.clock[rank]
                self.clock[rank] += self.cost(action)
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
