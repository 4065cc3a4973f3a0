"""The size of every global batch of a run: constant, or growing at the beginning. No torch.

A ramp has the sizes start, start + increment, ... below the global batch, each for an equal share of the ramp's samples
as nearly as whole steps allow: the i-th of n sizes is used to the first step boundary at or after (i + 1) / n of the
ramp, and once at least. A run is a whole number of global batches, and what follows the ramp has to be one too. So the
fewest further steps that bring the ramp to a multiple of the global batch join the steps of their sizes. There always
are some: all that the sizes add up to modulo the global batch is a finite group, in which every sum has an inverse.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache


@dataclass(frozen=True)
class Batches:
    """The global batches of a run: ``steps[i]`` in a row of ``sizes[i]`` samples; the last size is the usual one."""

    sizes: tuple[int, ...]
    steps: tuple[int, ...]

    @property
    def total_steps(self) -> int:
        return sum(self.steps)

    @property
    def ramp_samples(self) -> int:
        """Samples before the first batch of the usual size."""
        return self._samples[-2] if len(self.sizes) > 1 else 0

    @cached_property
    def _samples(self) -> tuple[int, ...]:
        """Sample after the last of every size."""
        return tuple(itertools.accumulate(size * count for size, count in zip(self.sizes, self.steps)))

    def size_at(self, sample: int) -> int:
        """Samples of the global batch that begins at ``sample``."""
        return self.sizes[min(bisect_right(self._samples, sample), len(self.sizes) - 1)]

    def sample_at(self, step: int) -> int:
        """Samples of the first ``step`` global batches."""
        samples = 0
        for size, count in zip(self.sizes, self.steps):
            samples += size * min(step, count)
            step -= min(step, count)
        return samples


@lru_cache(maxsize=64)
def build_batches(total: int, global_batch: int, start: int = 0, increment: int = 0, ramp: int = 0) -> Batches:
    """The batches of a run of ``total`` samples, a multiple of ``global_batch``.

    Args:
        start, increment: sizes of the ramp, below ``global_batch``, which is a whole number of increments above start.
        ramp: samples over which the sizes are spread; 0 where every batch has the usual size. The run may prove too
            short for it: ``ramp_samples`` is then more than ``total``, and there is no step of the usual size.
    """
    if not ramp:
        return Batches((global_batch,), (total // global_batch,))
    sizes = range(start, global_batch, increment)
    steps: list[int] = []
    done = 0
    for number, size in enumerate(sizes):
        until = -(-(number + 1) * ramp // len(sizes))
        steps.append(max(1, -(-(until - done) // size)))
        done += size * steps[-1]
    for number in _completion(sizes, done, global_batch):
        steps[number] += 1
        done += sizes[number]
    return Batches((*sizes, global_batch), (*steps, max(0, total - done) // global_batch))


def _completion(sizes: Sequence[int], done: int, whole: int) -> list[int]:
    """Indices of the fewest ``sizes`` that with ``done`` add up to a multiple of ``whole``: a breadth-first search."""
    unit = math.gcd(whole, *sizes)
    modulus, moves = whole // unit, [size // unit % (whole // unit) for size in sizes]
    origin = done // unit % modulus
    came: dict[int, tuple[int, int]] = {origin: (origin, -1)}
    front = [origin]
    while 0 not in came:
        reached = []
        for at, (number, move) in itertools.product(front, enumerate(moves)):
            to = (at + move) % modulus
            if to not in came:
                came[to] = (at, number)
                reached.append(to)
                if to == 0:
                    break
        front = reached
    found = []
    at = 0
    while at != origin:
        at, number = came[at]
        found.append(number)
    return found
