"""Rank arithmetic of an n-dimensional mesh of processes. No torch, no process groups.

Axes are listed from the slowest- to the fastest-varying: pp, dp, tp. Tensor-parallel neighbours are therefore
adjacent ranks (on one node), pipeline stages are far apart.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

AXES = ("pp", "dp", "tp")


@dataclass(frozen=True)
class Mesh:
    """Sizes of the data-, pipeline- and tensor-parallel axes.

    >>> mesh = Mesh(dp=2, pp=2, tp=2)
    >>> mesh.coordinates(5)
    {'pp': 1, 'dp': 0, 'tp': 1}
    >>> mesh.group(("dp",), 5)
    (5, 7)
    """

    dp: int = 1
    pp: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            if self.size(axis) < 1:
                raise ValueError(f"mesh axis {axis} has size {self.size(axis)}; sizes are at least 1")

    def size(self, axis: str) -> int:
        return int(getattr(self, axis))

    @property
    def world_size(self) -> int:
        return math.prod(self.size(axis) for axis in AXES)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Position of ``rank`` on every axis."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside a mesh of {self.world_size} ranks")
        result: dict[str, int] = {}
        for axis in reversed(AXES):
            rank, result[axis] = divmod(rank, self.size(axis))
        return {axis: result[axis] for axis in AXES}

    def rank(self, **coordinates: int) -> int:
        """Rank at ``coordinates``; axes that are not named are at 0."""
        result = 0
        for axis in AXES:
            at = coordinates.pop(axis, 0)
            if not 0 <= at < self.size(axis):
                raise ValueError(f"coordinate {axis}={at} is outside its axis of size {self.size(axis)}")
            result = result * self.size(axis) + at
        if coordinates:
            raise ValueError(f"unknown mesh axes: {sorted(coordinates)}")
        return result

    def group(self, axes: tuple[str, ...], rank: int) -> tuple[int, ...]:
        """Ranks that differ from ``rank`` on ``axes`` only, ascending, ``rank`` included."""
        unknown = set(axes) - set(AXES)
        if unknown:
            raise ValueError(f"unknown mesh axes: {sorted(unknown)}")
        at = self.coordinates(rank)
        ordered = [axis for axis in AXES if axis in axes]
        spans = [range(self.size(axis)) for axis in ordered]
        return tuple(self.rank(**{**at, **dict(zip(ordered, point))}) for point in itertools.product(*spans))

    def groups(self, axes: tuple[str, ...]) -> list[tuple[int, ...]]:
        """Every group over ``axes``: a partition of all ranks, in the order of their first ranks."""
        return sorted({self.group(axes, rank) for rank in range(self.world_size)})

    def __str__(self) -> str:
        return f"dp {self.dp} x pp {self.pp} x tp {self.tp}"
