"""How parameters are laid out in flat buckets. No torch.

Buckets are launched in order, so they stand in the order in which a backward pass finishes them: last parameter first.
Parameters that share treatment share a bucket: weight decay or none, and the axes over which a gradient is partial (a
tied weight has a bucket of its own, with the same ranges on both of its stages).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    slots: tuple[Slot, ...]
    size: int
    decay: bool
    partial: tuple[str, ...]


def buckets(specs: Sequence[ParamSpec], limit: int) -> list[Bucket]:
    """Buckets of at most ``limit`` elements (a larger parameter has its own), in the order of their launch."""
    result: list[Bucket] = []
    kinds: dict[tuple[bool, tuple[str, ...]], list[int]] = {}
    for number in reversed(range(len(specs))):
        kinds.setdefault((specs[number].decay, specs[number].partial), []).append(number)
    for (decay, partial), numbers in sorted(kinds.items(), key=lambda item: (bool(item[0][1]), not item[0][0])):
        slots: list[Slot] = []
        end = 0
        for number in numbers:
            size = math.prod(specs[number].local_shape)
            if slots and end + size > limit:
                result.append(Bucket(tuple(slots), end, decay, partial))
                slots, end = [], 0
            slots.append(Slot(number, end, end + size))
            end += -(-size // _ALIGN) * _ALIGN
        result.append(Bucket(tuple(slots), end, decay, partial))
    return result
