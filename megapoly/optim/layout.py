"""How parameters are laid out in flat buckets. No torch.

Buckets are launched in order, so they stand in the order in which a backward pass finishes them: last parameter first.
Parameters that share treatment share a bucket: weight decay or none, the axes over which a gradient is partial (a tied
weight has a bucket of its own, with the same ranges on both of its stages), and whether this rank owns them. A sharded
optimizer cuts every bucket into equal shards, one for each dp rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megapoly.spec import ParamSpec

_ALIGN = 64  # elements; every parameter begins on a cache line


@dataclass(frozen=True)
class Slot:
    """Elements ``[start, stop)`` of a bucket: parameter number ``parameter``, in row-major order."""

    parameter: int
    start: int
    stop: int


@dataclass(frozen=True)
class Bucket:
    """``size`` elements, which ``shards`` divides; padding after every slot is zero."""

    slots: tuple[Slot, ...]
    size: int
    decay: bool
    partial: tuple[str, ...]
    owner: bool = True
    shards: int = 1

    def shard(self, number: int) -> slice:
        """Elements of shard ``number``."""
        length = self.size // self.shards
        return slice(number * length, (number + 1) * length)


def buckets(specs: Sequence[ParamSpec], limit: int, shards: int = 1) -> list[Bucket]:
    """Buckets of at most ``limit`` elements (a larger parameter has its own), in the order of their launch."""
    result: list[Bucket] = []
    kinds: dict[tuple[bool, tuple[str, ...], bool], list[int]] = {}
    for number in reversed(range(len(specs))):
        spec = specs[number]
        kinds.setdefault((spec.decay, spec.partial, spec.owner), []).append(number)
    unit = _ALIGN * shards
    for kind, numbers in sorted(kinds.items(), key=lambda item: (bool(item[0][1]), not item[0][0])):
        for slots in _fill([(number, math.prod(specs[number].local_shape)) for number in numbers], limit):
            result.append(Bucket(slots, -(-slots[-1].stop // unit) * unit, *kind, shards))
    return result


def _fill(sizes: Sequence[tuple[int, int]], limit: int) -> Iterator[tuple[Slot, ...]]:
    """Slots of parameters (number, elements), bucket by bucket."""
    slots: list[Slot] = []
    for number, size in sizes:
        start = -(-slots[-1].stop // _ALIGN) * _ALIGN if slots else 0
        if slots and start + size > limit:
            yield tuple(slots)
            slots, start = [], 0
        slots.append(Slot(number, start, start + size))
    yield tuple(slots)
