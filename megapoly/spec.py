"""Where the pieces of a logical tensor live: boxes, flat pieces of boxes, and the spec that a parameter carries.

A *logical* tensor is the unsharded one, with one name and shape under every layout. A *box* is a slice of it. A *piece*
is a range of a box in row-major order: what a rank of a sharded optimizer or a file of a checkpoint holds. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

Index = tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """The half-open slice ``[start, stop)`` of a tensor in every dimension."""

    start: Index
    stop: Index

    @classmethod
    def whole(cls, shape: Index) -> Box:
        return cls((0,) * len(shape), tuple(shape))

    @property
    def shape(self) -> Index:
        return tuple(max(0, b - a) for a, b in zip(self.start, self.stop))

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def overlap(self, other: Box) -> Box | None:
        """The common box, or None where there is none."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        return Box(start, stop) if all(a < b for a, b in zip(start, stop)) else None

    def slices(self, origin: Index) -> tuple[slice, ...]:
        """Indexing of this box inside an array whose first element is at ``origin``."""
        return tuple(slice(a - o, b - o) for a, b, o in zip(self.start, self.stop, origin))


@dataclass(frozen=True)
class Piece:
    """Elements ``[start, stop)`` of ``box`` in row-major order."""

    box: Box
    start: int
    stop: int

    @classmethod
    def of(cls, box: Box) -> Piece:
        return cls(box, 0, box.size)

    @property
    def size(self) -> int:
        return self.stop - self.start

    def boxes(self) -> Iterator[tuple[int, Box]]:
        """At most 2d-1 boxes that tile the piece, each with its offset from the start of the piece.

        The elements of each are contiguous in the piece and stand in the box's own row-major order.
        """
        yield from _tile(self.box.start, self.box.shape, self.start, self.stop, 0)


def _tile(origin: Index, shape: Index, start: int, stop: int, offset: int) -> Iterator[tuple[int, Box]]:
    if start >= stop:
        return
    if not shape:
        yield offset, Box((), ())
        return
    row = math.prod(shape[1:])
    first, last = start // row, (stop - 1) // row
    rest = shape[1:]

    def inside(index: int, a: int, b: int, at: int) -> Iterator[tuple[int, Box]]:
        for o, box in _tile(origin[1:], rest, a, b, at):
            yield o, Box((origin[0] + index, *box.start), (origin[0] + index + 1, *box.stop))

    if first == last and (start % row or stop % row):
        yield from inside(first, start - first * row, stop - first * row, offset)
        return
    whole_from, whole_to = first, last + 1
    if start % row:
        yield from inside(first, start % row, row, offset)
        offset += row - start % row
        whole_from += 1
    if stop % row:
        whole_to -= 1
    if whole_from < whole_to:
        yield offset, Box((origin[0] + whole_from, *origin[1:]),
                          (origin[0] + whole_to, *(o + n for o, n in zip(origin[1:], rest))))  # fmt: skip
        offset += (whole_to - whole_from) * row
    if stop % row:
        yield from inside(last, 0, stop % row, offset)


@dataclass(frozen=True)
class ParamSpec:
    """What every part of megapoly knows of a parameter; the only attribute put on one (``param.spec``).

    Attributes:
        name: logical name, the same under every layout, e.g. ``layers.12.attention.qkv.weight``.
        shape: logical (unsharded, unpadded) shape.
        box: the slice of the logical tensor that this rank holds. May be empty in a padded vocabulary.
        local_shape: shape of the rank's tensor; larger than ``box.shape`` by padding at the end of dimension 0 only.
        partial: axes, beside dp, over which this rank's gradient is a partial sum.
        owner: whether this rank's copy counts in norms and is written to checkpoints. Copies over dp all say True.
        decay: whether weight decay applies.
        mean, std: the initial values are normal with these; std 0 makes them constant.
    """

    name: str
    shape: Index
    box: Box
    local_shape: Index
    partial: tuple[str, ...] = ()
    owner: bool = True
    decay: bool = True
    mean: float = 0.0
    std: float = 0.0


def shard(shape: Index, dim: int, rank: int, size: int, *, pad: bool = False) -> tuple[Box, Index]:
    """Box and padded local shape of shard ``rank`` of ``size`` along ``dim``, which counts from the front.

    A dimension that ``size`` does not divide is refused unless ``pad``.
    """
    if not 0 <= dim < len(shape) or not 0 <= rank < size:
        raise ValueError(f"no shard {rank} of {size} along dimension {dim} of {shape}")
    length = shape[dim]
    if length % size and not pad:
        raise ValueError(f"dimension {dim} of {shape} does not divide by {size}")
    local = -(-length // size)
    whole = Box.whole(shape)
    start = list(whole.start)
    stop = list(whole.stop)
    start[dim] = min(length, rank * local)
    stop[dim] = min(length, (rank + 1) * local)
    return Box(tuple(start), tuple(stop)), (*shape[:dim], local, *shape[dim + 1 :])
