"""The data plan's formula in numpy: what csrc/index/plan.cpp is tested against, bit for bit. No torch.

Here a block is laid out in full; there it is walked.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from megapoly.data.permutation import derive_key, permute
from megapoly.data.plan import Located, Plan
from megapoly.data.segments import Segment

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]


def locate(plan: Plan, samples: Int64s) -> Located:
    """What :meth:`Plan.locate` returns for ``samples`` [n] of the plan."""
    samples = np.asarray(samples, dtype=np.int64)
    columns = zip(*((s.first_sample, s.block, s.quotas, s.starts) for s in plan.segments), strict=True)
    first, block, quotas, starts = (np.array(column, dtype=np.int64) for column in columns)
    segment = np.searchsorted(first, samples, side="right") - 1
    offset = samples - first[segment]
    number, slot = offset // block[segment], offset % block[segment]
    source, rank = np.empty(samples.shape, np.int32), np.empty(samples.shape, np.int64)
    for origin, rows in _groups(samples - slot):
        inside = plan.segments[segment[rows[0]]]
        by_slot, rank_by_slot = slots_of(plan.seed, origin, inside.block, inside.quotas)
        source[rows], rank[rows] = by_slot[slot[rows]], rank_by_slot[slot[rows]]
    count = starts[segment, source] + number * quotas[segment, source] + rank
    windows = plan.windows[source]
    epoch = count // windows
    pairs, pair = np.unique(np.stack([source, epoch]), axis=1, return_inverse=True)
    keys = [derive_key(plan.seed, "epoch", plan.sources[s].name, e) for s, e in pairs.T.tolist()]
    window = permute(np.array(keys, np.uint64)[pair.reshape(-1)], count % windows, windows)
    return Located(source, window, epoch, count)


def counts_in(seed: int, segment: Segment, samples: int) -> Int64s:
    """What :func:`megapoly.data.segments.counts_in` returns."""
    number, rest = divmod(samples, segment.block)
    counts = np.array(segment.starts, np.int64) + number * np.array(segment.quotas, np.int64)
    source, _ = slots_of(seed, segment.first_sample + number * segment.block, segment.block, segment.quotas)
    return counts + np.bincount(source[:rest], minlength=counts.size)


@lru_cache(maxsize=4)
def slots_of(seed: int, origin: int, block: int, quotas: tuple[int, ...]) -> tuple[Int32s, Int32s]:
    """For every slot of the block whose first sample is ``origin``: its source, and how many earlier slots share it."""
    place = permute(derive_key(seed, "block", origin), np.arange(block), block)
    bounds = np.cumsum(quotas)
    source = np.searchsorted(bounds, place, side="right").astype(np.int32)
    order = np.argsort(source, kind="stable")
    rank = np.empty(block, np.int32)
    rank[order] = np.arange(block) - np.repeat(bounds - quotas, quotas)
    return source, rank


def _groups(values: Int64s) -> list[tuple[int, Int64s]]:
    """Distinct values, each with the places where it stands."""
    order = np.argsort(values, kind="stable")
    cuts = np.flatnonzero(np.diff(values[order])) + 1
    return [(int(values[rows[0]]), rows) for rows in np.split(order, cuts) if rows.size]
