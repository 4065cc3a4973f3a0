"""The pipeline schedules by name: which rank holds which stage, and what it computes in which order. No torch.

- ``gpipe``: Huang et al. 2019, arXiv:1811.06965.
- ``1f1b`` (PipeDream-Flush) and ``interleaved``: Narayanan et al. 2021, arXiv:2104.04473.
- ``zero-bubble`` (ZB-H1) and ``zero-bubble-v`` (ZB-V): Qi et al. 2023, arXiv:2401.10241.

To add a schedule, write a function that lists one rank's compute actions, and enter it in ``GENERATORS``. Messages are
added and all is proved in ``schedule.build``. Every stage takes its micro-batches in ascending order, in each kind of
action, so that gradients add up in one order under every schedule.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from megapoly.pipeline.actions import Action, Kind, Lists

_F, _B, _I, _W = Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT


@dataclass(frozen=True)
class Generator:
    """How a schedule is made.

    Attributes:
        compute: compute actions of a rank, given rank, ranks, micro-batches and stages per rank.
        virtual: possible numbers of stages per rank, the least first.
        grouped: whether micro-batches come in groups of as many as there are ranks.
        folds: whether the stages come back on the ranks in a V, rather than start over in a loop.
    """

    compute: Callable[[int, int, int, int], Iterable[Action]]
    virtual: range = range(1, 2)
    grouped: bool = False
    folds: bool = False

    def placement(self, pp: int, virtual: int) -> tuple[int, ...]:
        """Rank of every stage."""
        return (*range(pp), *reversed(range(pp))) if self.folds else (*range(pp),) * virtual

    def lists(self, pp: int, microbatches: int, virtual: int) -> Lists:
        """Compute actions of every rank."""
        return tuple(tuple(self.compute(rank, pp, microbatches, virtual)) for rank in range(pp))


def _gpipe(rank: int, pp: int, microbatches: int, virtual: int) -> Iterable[Action]:
    """All forwards, then all backwards, both ascending."""
    return [*_ascending(_F, rank, microbatches), *_ascending(_B, rank, microbatches)]


def _one_forward_one_backward(rank: int, pp: int, microbatches: int, virtual: int) -> Iterable[Action]:
    """As many forwards as it takes to reach the last stage, then a forward and a backward in turns."""
    return _in_turns(_ascending(_F, rank, microbatches), _ascending(_B, rank, microbatches), warm_up=pp - 1 - rank)


def _interleaved(rank: int, pp: int, microbatches: int, virtual: int) -> Iterable[Action]:
    """1F1B over groups of ``pp`` micro-batches, each of which passes through one of the rank's stages after another."""
    stages = range(rank, pp * virtual, pp)

    def grouped(kind: Kind, order: Iterable[int]) -> list[Action]:
        firsts, order = range(0, microbatches, pp), tuple(order)
        return [Action(kind, stage, first + i) for first in firsts for stage in order for i in range(pp)]

    warm_up = 2 * (pp - 1 - rank) + (virtual - 1) * pp
    return _in_turns(grouped(_F, stages), grouped(_B, reversed(stages)), warm_up=warm_up)


def _zero_bubble(rank: int, pp: int, microbatches: int, virtual: int) -> Iterable[Action]:
    """1F1B, where a rank falls behind with its weight parts by as many as it holds fewer activations than rank 0.

    So no rank holds more than rank 0 does under 1F1B, and the gradients of inputs reach rank 0 that much earlier.
    """
    parts = (_ascending(kind, rank, microbatches) for kind in (_F, _I, _W))
    return _in_turns(*parts, warm_up=pp - 1 - rank, behind=rank)


def _zero_bubble_v(rank: int, pp: int, microbatches: int, virtual: int) -> Iterable[Action]:
    """Down the ranks and back: the rank with the first stage has the last too, and starts backwards at once.

    The lists fit one another, without a gap, where the three kinds of actions take equally long. They need 2 pp - 1
    micro-batches; of fewer, they are those of 2 pp - 1 without the rest.
    """
    down, up = rank, 2 * pp - 1 - rank
    number, left = max(microbatches, 2 * pp - 1), pp - rank
    steps = [(_F, down)] * (2 * left - 1)
    steps += [(_F, up), (_F, down)] * rank
    steps += [(_F, up), (_I, up), (_W, up)] * left
    steps += [(_F, down), (_I, down), (_W, down), (_F, up), (_I, up), (_W, up)] * (number - pp)
    steps += [(_I, down), (_I, up)] * rank
    steps += [(_I, down), (_W, down)] * left
    steps += [(_W, up)] * rank + [(_W, down)] * rank
    count: Counter[tuple[Kind, int]] = Counter()
    for step in steps:
        if count[step] < microbatches:
            yield Action(*step, count[step])
        count[step] += 1


def _ascending(kind: Kind, stage: int, microbatches: int) -> list[Action]:
    return [Action(kind, stage, microbatch) for microbatch in range(microbatches)]


def _in_turns(
    forwards: Sequence[Action],
    backwards: Sequence[Action],
    weights: Sequence[Action] = (),
    *,
    warm_up: int,
    behind: int = 0,
) -> Iterable[Action]:
    """Forwards alone to warm up, then each kind in turns; weight parts begin ``behind`` backwards late."""
    yield from forwards[:warm_up]
    for i in range(len(backwards) + behind):
        yield from forwards[warm_up + i : warm_up + i + 1]
        yield from backwards[i : i + 1]
        yield from weights[max(i - behind, 0) : max(i - behind + 1, 0)]


GENERATORS = {
    "gpipe": Generator(_gpipe),
    "1f1b": Generator(_one_forward_one_backward),
    "interleaved": Generator(_interleaved, virtual=range(2, sys.maxsize), grouped=True),
    "zero-bubble": Generator(_zero_bubble),
    "zero-bubble-v": Generator(_zero_bubble_v, virtual=range(2, 3), folds=True),
}
