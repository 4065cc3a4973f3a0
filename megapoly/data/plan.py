"""The data plan: which window of which source every sample is, as a closed formula. No torch.

A *source* is one indexed dataset. Its training part is cut into *windows* of ``sequence`` tokens (plus one, the last
label); one pass over all of them is an *epoch*. A *sample* is one row of a global batch, numbered from 0 over the whole
run. A plan is a list of *segments* of constant weights, and a batch is a pure function of (plan, sample number):

    sample -> segment -> block of the segment -> slot of the block, through a keyed permutation -> source
           -> count: how many samples the source had before = start + block number * quota + rank inside the block
           -> epoch and place = divmod(count, windows) -> window, through a keyed permutation of the epoch

A block gives every source a whole number of its slots, its quota. So over any stretch of n samples inside a segment

    |count of a source - n * quota / block|  <=  2 * quota * (block - quota) / block  <=  block / 2
    |quota / block - weight|                 <   1 / block

(at the borders of blocks the first difference is zero; inside one, a prefix is off by at most quota * (block - quota) /
block, when all of a source's slots come first or last). Counts run 0, 1, 2, ... for every source, over all segments;
where data was skipped (:meth:`Plan.skipping`), they jump at the beginning of a segment.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megapoly.config import Config
from megapoly.data.permutation import derive_key, permute
from megapoly.errors import DataError

VERSION = 1
BLOCK = 1 << 16
LIMIT = 1 << 62

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]
Stage = tuple[str, int, Mapping[str, float]]


class Dataset(Protocol):
    """What a plan needs to know of an indexed dataset."""

    @property
    def identity(self) -> str: ...

    @property
    def train_tokens(self) -> int: ...


@dataclass(frozen=True)
class Source:
    """One dataset of a plan: ``tokens`` of its training part, and the ``identity`` of its content."""

    name: str
    language: str
    identity: str
    tokens: int


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


@dataclass(frozen=True)
class Located:
    """Where n samples come from: index of the source in the plan, window in it, epoch of it, samples of it before."""

    source: Int32s
    window: Int64s
    epoch: Int64s
    count: Int64s


@dataclass(frozen=True)
class Plan:
    """What is trained, in which order.

    Immutable; edits of a running job make a new plan: :meth:`extended`, :meth:`skipping`.
    """

    version: int
    seed: int
    sequence: int
    sources: tuple[Source, ...]
    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        _check(self)

    @classmethod
    def build(cls, stages: Sequence[Stage], sources: Sequence[Source], sequence: int, seed: int) -> Plan:
        """A plan of ``stages``, each (name, samples, weight by source name; the weights sum to 1).

        A source whose share of a block rounds to zero samples gets none: look at ``segments[i].quotas``.

        Raises:
            DataError: an unknown source, weights that do not sum to 1, an empty stage, or a source with a weight but
                not one whole window.
        """
        none = np.zeros(len(sources), np.int64)
        segments = _compile(stages, sources, sequence, seed, 0, none)
        return cls(VERSION, seed, sequence, tuple(sources), tuple(segments))

    def extended(self, at_sample: int, stages: Sequence[Stage]) -> Plan:
        """This plan up to ``at_sample``, then ``stages`` in place of the rest; every source goes on where it stood.

        Raises:
            DataError: ``at_sample`` outside the plan, or stages as in :meth:`build`.
        """
        if not 0 <= at_sample <= self.total_samples:
            raise DataError(f"plan: cannot go on from sample {at_sample}; it has samples 0 to {self.total_samples}")
        rest = _compile(stages, self.sources, self.sequence, self.seed, at_sample, self.counts_at(at_sample))
        return replace(self, segments=(*self._before(at_sample), *rest))

    def skipping(self, at_sample: int, samples: int) -> Plan:
        """This plan up to ``at_sample``, then its rest with other data: as if ``samples`` had gone by already.

        A new segment begins at ``at_sample``. Every source goes on where it would have stood ``samples`` later, so no
        window of the skipped samples comes again in its epoch. The stages keep their lengths and weights, and the plan
        its total.

        Raises:
            DataError: the skipped samples are not inside the plan.
        """
        if not 0 <= at_sample < at_sample + samples <= self.total_samples:
            raise DataError(
                f"plan: cannot skip {samples} samples from sample {at_sample}; it has {self.total_samples} samples"
            )
        rest = [
            (segment.stage, segment.end - max(at_sample, segment.first_sample), self._weights(segment))
            for segment in self.segments
            if segment.end > at_sample
        ]
        counts = self.counts_at(at_sample + samples)
        later = _compile(rest, self.sources, self.sequence, self.seed, at_sample, counts)
        return replace(self, segments=(*self._before(at_sample), *later))

    def _before(self, sample: int) -> list[Segment]:
        kept = [segment for segment in self.segments if segment.first_sample < sample]
        if kept:
            kept[-1] = replace(kept[-1], samples=min(sample, kept[-1].end) - kept[-1].first_sample)
        return kept

    def _weights(self, segment: Segment) -> dict[str, float]:
        return {source.name: quota / segment.block for source, quota in zip(self.sources, segment.quotas, strict=True)}

    @property
    def total_samples(self) -> int:
        return self.segments[-1].end

    @cached_property
    def windows(self) -> Int64s:
        """Windows of an epoch, by source."""
        return np.array([max(0, source.tokens - 1) // self.sequence for source in self.sources], dtype=np.int64)

    @cached_property
    def _table(self) -> tuple[Int64s, Int64s, Int64s, Int64s]:
        """By segment: first samples [g], blocks [g], quotas [g, sources], starts [g, sources]."""
        columns = zip(*((s.first_sample, s.block, s.quotas, s.starts) for s in self.segments), strict=True)
        first, block, quotas, starts = (np.array(column, dtype=np.int64) for column in columns)
        return first, block, quotas, starts

    def locate(self, samples: Int64s) -> Located:
        """Where ``samples`` [n] (any order; cheapest where they lie in few blocks) come from.

        Raises:
            DataError: a sample outside the plan.
        """
        samples = np.asarray(samples, dtype=np.int64)
        if samples.size and not 0 <= samples.min() <= samples.max() < self.total_samples:
            raise DataError(
                f"plan: samples {samples.min()} to {samples.max()} were asked for, but it ends after"
                f" {self.total_samples} samples; train for fewer tokens or add a stage"
            )
        first, block, quotas, starts = self._table
        segment = np.searchsorted(first, samples, side="right") - 1
        offset = samples - first[segment]
        number, slot = offset // block[segment], offset % block[segment]
        source, rank = np.empty(samples.shape, np.int32), np.empty(samples.shape, np.int64)
        for origin, rows in _groups(samples - slot):
            inside = self.segments[segment[rows[0]]]
            by_slot, rank_by_slot = _slots(self.seed, origin, inside.block, inside.quotas)
            source[rows], rank[rows] = by_slot[slot[rows]], rank_by_slot[slot[rows]]
        count = starts[segment, source] + number * quotas[segment, source] + rank
        windows = self.windows[source]
        epoch = count // windows
        pairs, pair = np.unique(np.stack([source, epoch]), axis=1, return_inverse=True)
        keys = [derive_key(self.seed, "epoch", self.sources[s].name, e) for s, e in pairs.T.tolist()]
        window = permute(np.array(keys, np.uint64)[pair.reshape(-1)], count % windows, windows)
        return Located(source, window, epoch, count)

    def counts_at(self, sample: int) -> Int64s:
        """Samples of every source, trained or skipped, before sample number ``sample`` of the plan, or its end."""
        segment = self.segments[-1] if sample == self.total_samples else self.stage_at(sample)
        return _counts_in(self.seed, segment, sample - segment.first_sample)

    def stage_at(self, sample: int) -> Segment:
        """The segment that holds ``sample``."""
        if not 0 <= sample < self.total_samples:
            raise DataError(f"plan: sample {sample} is outside its {self.total_samples} samples")
        return self.segments[int(np.searchsorted(self._table[0], sample, side="right")) - 1]

    def stage_bounds(self, sample: int) -> tuple[int, int]:
        """First sample of the stage that holds ``sample``, and the one after its last; it may have several segments."""
        name = self.stage_at(sample).stage
        inside = [segment for segment in self.segments if segment.stage == name]
        return inside[0].first_sample, inside[-1].end

    def epochs(self) -> dict[str, float]:
        """Passes over every source in the whole plan, skipped ones too, by name; 0 where a source is not used."""
        counts = self.counts_at(self.total_samples).tolist()
        used = zip(self.sources, counts, self.windows.tolist(), strict=True)
        return {source.name: count / windows if count else 0.0 for source, count, windows in used}

    def to_document(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        document: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return document

    @classmethod
    def from_document(cls, document: Any) -> Plan:
        """The plan of :meth:`to_document`.

        Raises:
            DataError: a missing, unknown or wrong value.
        """
        values = _checked(document, cls, "plan")
        if values["version"] != VERSION:
            raise DataError(f"plan: version {values['version']}; this megapoly reads version {VERSION}")
        return cls(**values)


def plan_from_config(config: Config, datasets: Mapping[str, Dataset]) -> Plan:
    """The plan of a new run. Sources are in alphabetical order, so that their order in the file changes nothing.

    Raises:
        DataError: as :meth:`Plan.build`.
    """
    sources = [
        Source(name, config.data.sources[name].language, datasets[name].identity, datasets[name].train_tokens)
        for name in sorted(config.data.sources)
    ]
    sequence = config.train.sequence
    stages = [(stage.name, stage.tokens // sequence, stage.weights) for stage in config.data.stages]
    return Plan.build(stages, sources, sequence, config.train.seed)


def check_datasets(plan: Plan, datasets: Mapping[str, Dataset]) -> None:
    """Refuse to go on with ``datasets`` (by source name) that are not those that the plan was made for.

    Raises:
        DataError: a missing or changed dataset, by its source.
    """
    for source in plan.sources:
        found = datasets.get(source.name)
        if found is None:
            raise DataError(
                f"source {source.name!r} is in the plan of this run but is not among {sorted(datasets)};"
                f" add it to data.sources again"
            )
        if (found.identity, found.train_tokens) != (source.identity, source.tokens):
            raise DataError(
                f"source {source.name!r} has changed since this run's plan was made: found identity {found.identity}"
                f" with {found.train_tokens} training tokens, expected {source.identity} with {source.tokens};"
                f" give the dataset that the run began with, or start a new run"
            )


def _groups(values: Int64s) -> list[tuple[int, Int64s]]:
    """Distinct values, each with the places where it stands."""
    order = np.argsort(values, kind="stable")
    cuts = np.flatnonzero(np.diff(values[order])) + 1
    return [(int(values[rows[0]]), rows) for rows in np.split(order, cuts) if rows.size]


@lru_cache(maxsize=4)
def _slots(seed: int, origin: int, block: int, quotas: tuple[int, ...]) -> tuple[Int32s, Int32s]:
    """For every slot of the block whose first sample is ``origin``: its source, and how many earlier slots share it.

    At most half a megabyte; a few are kept, since neighbouring samples share a block.
    """
    place = permute(derive_key(seed, "block", origin), np.arange(block), block)
    bounds = np.cumsum(quotas)
    source = np.searchsorted(bounds, place, side="right").astype(np.int32)
    order = np.argsort(source, kind="stable")
    rank = np.empty(block, np.int32)
    rank[order] = np.arange(block) - np.repeat(bounds - quotas, quotas)
    return source, rank


def _counts_in(seed: int, segment: Segment, samples: int) -> Int64s:
    """Samples of every source before the plan reaches ``samples`` samples into ``segment``."""
    number, rest = divmod(samples, segment.block)
    counts = np.array(segment.starts, np.int64) + number * np.array(segment.quotas, np.int64)
    if rest:
        source, _ = _slots(seed, segment.first_sample + number * segment.block, segment.block, segment.quotas)
        counts += np.bincount(source[:rest], minlength=counts.size)
    return counts


def _compile(
    stages: Sequence[Stage], sources: Sequence[Source], sequence: int, seed: int, first: int, counts: Int64s
) -> list[Segment]:
    """Segments of ``stages`` from sample ``first`` on, where the sources have had ``counts`` samples."""
    segments = []
    for name, samples, weights in stages:
        block, quotas = _quotas(name, samples, weights, sources, sequence)
        skipped = int(counts.sum()) - first
        segment = Segment(first, samples, name, block, quotas, tuple(counts.tolist()), skipped)
        segments.append(segment)
        counts, first = _counts_in(seed, segment, samples), segment.end
    return segments


def _quotas(
    name: str, samples: int, weights: Mapping[str, float], sources: Sequence[Source], sequence: int
) -> tuple[int, tuple[int, ...]]:
    """Length of the blocks of a stage, and the quota of every source in one by largest remainder."""
    unknown = sorted(set(weights) - {source.name for source in sources})
    if unknown:
        raise DataError(f"stage {name!r}: weights of unknown sources {unknown}; known: {[s.name for s in sources]}")
    total = math.fsum(weights.values())
    if not all(0 <= weight <= 1 for weight in weights.values()) or abs(total - 1) > 1e-6:
        raise DataError(f"stage {name!r}: weights have to be in [0, 1] and sum to 1; found {dict(weights)}")
    if not 1 <= samples <= LIMIT:
        raise DataError(f"stage {name!r}: {samples} samples; expected 1 to 2^62")
    for source in sources:
        if weights.get(source.name, 0) > 0 and source.tokens <= sequence:
            raise DataError(
                f"stage {name!r}: source {source.name!r} has a weight of {weights[source.name]:g} but no whole window:"
                f" {source.tokens} training tokens, and a window needs {sequence} + 1; add text, shorten train.sequence"
                f" to at most {max(0, source.tokens - 1)}, or remove its weight"
            )
    blocks = -(-samples // BLOCK)
    block = -(-samples // blocks)
    whole = sum(map(Fraction, weights.values()))
    exact = [block * Fraction(weights.get(source.name, 0)) / whole for source in sources]
    quotas = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (quotas[i] - exact[i], i))
    for i in by_remainder[: block - sum(quotas)]:
        quotas[i] += 1
    return block, tuple(quotas)


def _check(plan: Plan) -> None:
    names = [source.name for source in plan.sources]
    if not names or len(set(names)) < len(names) or not plan.segments:
        raise DataError(f"plan: expected distinct sources and at least one stage; found {names}, {plan.segments}")
    sizes = [plan.sequence, *(source.tokens + 1 for source in plan.sources)]
    if min(sizes) < 1 or max(sizes) > LIMIT:
        raise DataError(f"plan: expected a sequence of at least 1 and tokens of at least 0; found {sizes}")
    end = skipped = 0
    for i, segment in enumerate(plan.segments):
        where, quotas, starts = f"plan: segment {i} ({segment.stage})", segment.quotas, segment.starts
        if segment.first_sample != end or segment.samples < 1 or segment.end > LIMIT:
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
        empty = [
            name for name, quota, windows in zip(names, quotas, plan.windows, strict=True) if quota and not windows
        ]
        if empty:
            raise DataError(f"{where}: sources {empty} are used but have no window of {plan.sequence} + 1 tokens")
        end = segment.end


def _checked(document: Any, kind: type, where: str) -> dict[str, Any]:
    """Values of a dataclass from JSON: every field without a default there, no other than its fields, each of its type.

    A field with a default is one that came later: older documents have none.
    """
    expected = {field.name: field.type for field in fields(kind)}
    later = {field.name for field in fields(kind) if field.default is not MISSING}
    if not isinstance(document, Mapping) or not expected.keys() - later <= document.keys() <= expected.keys():
        found = sorted(document) if isinstance(document, Mapping) else type(document).__name__
        raise DataError(f"{where}: found {found}, expected the keys {sorted(expected)}")
    return {key: _value(document[key], str(expected[key]), f"{where}.{key}") for key in expected if key in document}


def _value(value: Any, kind: str, where: str) -> Any:
    if kind in ("int", "str"):
        if type(value).__name__ != kind:
            raise DataError(f"{where}: found {value!r}, expected {kind}")
        return value
    if not isinstance(value, list):
        raise DataError(f"{where}: found {type(value).__name__}, expected a list")
    item = kind.removeprefix("tuple[").removesuffix(", ...]")
    records = {"Source": Source, "Segment": Segment}
    if item not in records:
        return tuple(_value(entry, item, f"{where}.{i}") for i, entry in enumerate(value))
    record = records[item]
    return tuple(record(**_checked(entry, record, f"{where}.{i}")) for i, entry in enumerate(value))
