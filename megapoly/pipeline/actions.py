"""What a pipeline schedule is made of: actions, their order of need, and where they run. No torch."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple


class Kind(str, enum.Enum):
    """What an action does; messages are named by the stage that acts, not by its neighbour."""

    FORWARD = "forward"
    BACKWARD = "backward"
    BACKWARD_INPUT = "backward input"  # the gradient of the stage's input alone
    BACKWARD_WEIGHT = "backward weight"  # the gradients of the weights, which a backward input has put off
    SEND_FORWARD = "send forward"  # the stage's output, to the next stage
    RECV_FORWARD = "receive forward"  # the stage's input, from the previous stage
    SEND_BACKWARD = "send backward"  # the gradient of the stage's input, to the previous stage
    RECV_BACKWARD = "receive backward"  # the gradient of the stage's output, from the next stage


COMPUTE = (Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)
SPLIT = (Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)
RECEIVE = (Kind.RECV_FORWARD, Kind.RECV_BACKWARD)
SEND = (Kind.SEND_FORWARD, Kind.SEND_BACKWARD)


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

    @cached_property
    def splits(self) -> bool:
        """Whether backward passes come in two parts, of the input and of the weights; all or none."""
        return any(action.kind in SPLIT for actions in self.actions for action in actions)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The compute kinds that every stage runs once for every micro-batch."""
        return (Kind.FORWARD, *((SPLIT if self.splits else (Kind.BACKWARD,)) if self.trains else ()))

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

    def sends(self, action: Action) -> list[Action]:
        """The send, if any, that follows a compute action."""
        kind, stage, microbatch = action
        if kind is Kind.FORWARD and stage + 1 < len(self.placement) and not self._local(stage):
            return [Action(Kind.SEND_FORWARD, stage, microbatch)]
        if kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT) and stage > 0 and not self._local(stage - 1):
            return [Action(Kind.SEND_BACKWARD, stage, microbatch)]
        return []

    def needs(self, action: Action) -> list[Action]:
        """Actions of the same rank whose results ``action`` uses."""
        kind, stage, microbatch = action
        gradient = Kind.BACKWARD_INPUT if self.splits else Kind.BACKWARD  # the kind that makes a gradient to hand on
        if kind is Kind.FORWARD:
            if stage == 0:
                return []
            local = self._local(stage - 1)
            return [Action(kind, stage - 1, microbatch) if local else Action(Kind.RECV_FORWARD, stage, microbatch)]
        if kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT):
            forward = Action(Kind.FORWARD, stage, microbatch)
            if stage + 1 == len(self.placement):
                return [forward]
            local = self._local(stage)
            below = Action(gradient, stage + 1, microbatch) if local else Action(Kind.RECV_BACKWARD, stage, microbatch)
            return [forward, below]
        if kind is Kind.BACKWARD_WEIGHT:
            return [Action(Kind.BACKWARD_INPUT, stage, microbatch)]
        if kind is Kind.SEND_FORWARD:
            return [Action(Kind.FORWARD, stage, microbatch)]
        if kind is Kind.SEND_BACKWARD:
            return [Action(gradient, stage, microbatch)]
        return []

    def _local(self, stage: int) -> bool:
        """Whether a stage and the next stand on one rank."""
        return self.placement[stage] == self.placement[stage + 1]
