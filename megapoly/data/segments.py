"""Segments of a data plan: whole-number quotas from weights, and counts of samples by source. No torch.

See :mod:`megapoly.data.plan` for what a block, a slot and a count are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from megapoly.data import _index
from megapoly.data.permutation import derive_key
from megapoly.errors import DataError

BLOCK = 1 << 16
LIMIT = 1 << 62

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]
Stage = tuple[str, int, Mapping[str, float]]


@dataclass(frozen=True)
class Source:
    """One dataset of a plan: ``tokens`` of its training part, and the ``identity`` of its content.

    ``pack`` is the length of its packs, 0 for a stream.
    """

    name: str
    language: str
    identity: str
    tokens: int
    pack: int = 0

    def windows(self, sequence: int) -> int:
        """Of an epoch. A window of a stream has one token more, its last label; a pack ends with its last token."""
        return (self.tokens if self.pack else max(0, self.tokens - 1)) // sequence


@dataclass(frozen=True)
class Segment:
    """``samples`` samples from ``first_sample`` on, with constant weights.

    Every ``block`` samples in a row hold ``quotas[i]`` of source i; the last block may be cut short. ``starts[i]`` is
    the number of samples that source i had before this segment, ``skipped`` how many of them, over all sources, were
    skipped and not trained.
    """

    first_sample: int
    samples: int
    stage: str
    block: int
    quotas: tuple[int, ...]
    starts: tuple[int, ...]
    skipped: int = 0

    @property
    def end(self) -> int:
        return self.first_sample + self.samples


def counts_in(seed: int, segment: Segment, samples: int) -> Int64s:
    """Samples of every source before the plan reaches ``samples`` samples into ``segment``."""
    number, rest = divmod(samples, segment.block)
    counts = np.array(segment.starts, np.int64) + number * np.array(segment.quotas, np.int64)
    if rest:
        key = derive_key(seed, "block", segment.first_sample + number * segment.block)
        counts += _index.counts_in_block(key, segment.quotas, segment.block, rest)
    return counts


def compile_segments(
    stages: Sequence[Stage], sources: Sequence[Source], sequence: int, seed: int, first: int, counts: Int64s
) -> list[Segment]:
    """Segments of ``stages`` from sample ``first`` on, where the sources have had ``counts`` samples.

    Of stages of one name in a row, the later make up for what the whole numbers of the earlier left over or took.
    """
    segments: list[Segment] = []
    owed = [Fraction(0)] * len(sources)
    for name, samples, weights in stages:
        if segments and segments[-1].stage != name:
            owed = [Fraction(0)] * len(sources)
        block, quotas = quotas_of(name, samples, weights, sources, sequence, owed)
        skipped = int(counts.sum()) - first
        segment = Segment(first, samples, name, block, quotas, tuple(counts.tolist()), skipped)
        segments.append(segment)
        counts, first = counts_in(seed, segment, samples), segment.end
    return segments


def quotas_of(
    name: str,
    samples: int,
    weights: Mapping[str, float],
    sources: Sequence[Source],
    sequence: int,
    owed: list[Fraction],
) -> tuple[int, tuple[int, ...]]:
    """Length of the blocks of a stage, and the quota of every source in one by largest remainder.

    Args:
        owed: samples that every source is to have, in all blocks, beyond what its weight gives; changed to what is
            owed after this stage.
    """
    unknown = sorted(set(weights) - {source.name for source in sources})
    if unknown:
        raise DataError(f"stage {name!r}: weights of unknown sources {unknown}; known: {[s.name for s in sources]}")
    if not all(0 <= weight <= 1 for weight in weights.values()) or abs(math.fsum(weights.values()) - 1) > 1e-6:
        raise DataError(f"stage {name!r}: weights have to be in [0, 1] and sum to 1; found {dict(weights)}")
    if not 1 <= samples <= LIMIT:
        raise DataError(f"stage {name!r}: {samples} samples; expected 1 to 2^62")
    for source in sources:
        if weights.get(source.name, 0) > 0 and not source.windows(sequence):
            raise DataError(
                f"stage {name!r}: source {source.name!r} has a weight of {weights[source.name]:g} but no whole window:"
                f" {source.tokens} training tokens, and a window needs {sequence} + 1; add text, shorten train.sequence"
                f" to at most {max(0, source.tokens - 1)}, or remove its weight"
            )
    blocks = -(-samples // BLOCK)
    block = -(-samples // blocks)
    whole = sum(map(Fraction, weights.values()))
    exact = [
        block * Fraction(weights.get(source.name, 0)) / whole + more / blocks
        for source, more in zip(sources, owed, strict=True)
    ]
    quotas = [max(0, int(share)) for share in exact]
    while missing := block - sum(quotas):
        one = 1 if missing > 0 else -1
        order = sorted(range(len(exact)), key=lambda i: (one * (quotas[i] - exact[i]), i))
        for i in [i for i in order if quotas[i] + one >= 0][: abs(missing)]:
            quotas[i] += one
    owed[:] = [blocks * (share - quota) for share, quota in zip(exact, quotas, strict=True)]
    return block, tuple(quotas)


def check_segments(sequence: int, sources: Sequence[Source], segments: Sequence[Segment]) -> None:
    """Refuse what is no plan.

    Raises:
        DataError: a source or a segment with a number that cannot be, by its place.
    """
    names = [source.name for source in sources]
    if not names or len(set(names)) < len(names) or not segments:
        raise DataError(f"plan: expected distinct sources and at least one stage; found {names}, {segments}")
    sizes = [sequence, *(source.tokens + 1 for source in sources), *(source.pack + 1 for source in sources)]
    if min(sizes) < 1 or max(sizes) > LIMIT:
        raise DataError(f"plan: expected a sequence of at least 1, tokens and packs of at least 0; found {sizes}")
    end = skipped = 0
    for i, segment in enumerate(segments):
        where, quotas, starts = f"plan: segment {i} ({segment.stage})", segment.quotas, segment.starts
        if segment.first_sample != end or segment.samples < 1 or segment.end + segment.skipped > LIMIT:
            raise DataError(f"{where}: starts at sample {segment.first_sample} with {segment.samples}; expected {end}")
        if not len(quotas) == len(starts) == len(names) or min(*quotas, *starts) < 0:
            raise DataError(f"{where}: expected a quota and a start of at least 0 for each of {len(names)} sources")
        if segment.skipped < skipped:
            raise DataError(f"{where}: {segment.skipped} samples skipped, fewer than the {skipped} before it")
        skipped = segment.skipped
        if sum(quotas) != segment.block or not 1 <= segment.block <= BLOCK or sum(starts) != end + skipped:
            raise DataError(
                f"{where}: block {segment.block}, sum of quotas {sum(quotas)}, sum of starts {sum(starts)}; expected a"
                f" block of at most {BLOCK}, the same, and {end} samples before it + {skipped} skipped"
            )
        empty = [s.name for s, quota in zip(sources, quotas, strict=True) if quota and not s.windows(sequence)]
        if empty:
            raise DataError(f"{where}: sources {empty} are used but have no window of {sequence} + 1 tokens")
        end = segment.end
