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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from megapoly.config import Config
from megapoly.data.permutation import derive_key, permute
from megapoly.data.plan_document import checked
from megapoly.data.segments import (
    Int32s,
    Int64s,
    Segment,
    Source,
    Stage,
    check_segments,
    compile_segments,
    counts_in,
    slots_of,
)
from megapoly.errors import DataError

VERSION = 1


class Dataset(Protocol):
    """What a plan needs to know of an indexed dataset."""

    @property
    def identity(self) -> str: ...

    @property
    def train_tokens(self) -> int: ...


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
        check_segments(self.sequence, self.sources, self.segments)

    @classmethod
    def build(cls, stages: Sequence[Stage], sources: Sequence[Source], sequence: int, seed: int) -> Plan:
        """A plan of ``stages``, each (name, samples, weight by source name; the weights sum to 1).

        A source whose share of a block rounds to zero samples gets none: look at ``segments[i].quotas``.

        Raises:
            DataError: an unknown source, weights that do not sum to 1, an empty stage, or a source with a weight but
                not one whole window.
        """
        none = np.zeros(len(sources), np.int64)
        segments = compile_segments(stages, sources, sequence, seed, 0, none)
        return cls(VERSION, seed, sequence, tuple(sources), tuple(segments))

    def extended(self, at_sample: int, stages: Sequence[Stage]) -> Plan:
        """This plan up to ``at_sample``, then ``stages`` in place of the rest; every source goes on where it stood.

        Raises:
            DataError: ``at_sample`` outside the plan, or stages as in :meth:`build`.
        """
        if not 0 <= at_sample <= self.total_samples:
            raise DataError(f"plan: cannot go on from sample {at_sample}; it has samples 0 to {self.total_samples}")
        rest = compile_segments(stages, self.sources, self.sequence, self.seed, at_sample, self.counts_at(at_sample))
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
        later = compile_segments(rest, self.sources, self.sequence, self.seed, at_sample, counts)
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
            by_slot, rank_by_slot = slots_of(self.seed, origin, inside.block, inside.quotas)
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
        return counts_in(self.seed, segment, sample - segment.first_sample)

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
        values = checked(document, cls, "plan")
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
