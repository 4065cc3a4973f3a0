"""The data plan: which window of which source every sample is, as a closed formula. No torch.

A *source* is one indexed dataset. Its training part is cut into *windows* of ``sequence`` tokens (plus one, the last
label), or is a row of packs of ``sequence`` tokens; one pass over all of them is an *epoch*. A *sample* is one row of a
global batch, numbered from 0 over the whole run. A plan is a list of *segments* of constant weights, and a batch is a
pure function of (plan, sample number):

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
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from itertools import groupby
from typing import Any, Protocol

import numpy as np

from megapoly.config import Config
from megapoly.data import _index
from megapoly.data.curriculum import stages_of
from megapoly.data.permutation import key_text
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
)
from megapoly.errors import ConfigError, DataError

VERSION = 1


class Dataset(Protocol):
    """What a plan needs to know of an indexed dataset."""

    @property
    def identity(self) -> str: ...

    @property
    def train_tokens(self) -> int: ...

    @property
    def pack(self) -> int: ...


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

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

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

    def joined(self, sources: Sequence[Source]) -> Plan:
        """This plan with more sources, of which nothing was trained so far."""
        none = (0,) * len(sources)
        segments = (replace(each, quotas=each.quotas + none, starts=each.starts + none) for each in self.segments)
        return replace(self, sources=(*self.sources, *sources), segments=tuple(segments))

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
        return np.array([source.windows(self.sequence) for source in self.sources], dtype=np.int64)

    @cached_property
    def _firsts(self) -> list[int]:
        return [segment.first_sample for segment in self.segments]

    @cached_property
    def _located(self) -> _index.Plan:
        """The same in C++; it holds a few numbers for every source."""
        return _index.Plan(
            self.total_samples,
            self._firsts,
            [segment.block for segment in self.segments],
            [quota for segment in self.segments for quota in segment.quotas],
            [start for segment in self.segments for start in segment.starts],
            self.windows.tolist(),
            key_text(self.seed, "block"),
            [key_text(self.seed, "epoch", source.name) for source in self.sources],
        )

    def locate(self, samples: Int64s) -> Located:
        """Where ``samples`` [n] come from, by C++ without the GIL and without a table.

        Cheapest in order, at well under a microsecond each; a jump to another place takes up to half a block of steps.
        The same in numpy is :func:`megapoly.data.plan_reference.locate`.

        Raises:
            DataError: a sample outside the plan.
        """
        return Located(*self._located.locate(np.asarray(samples, dtype=np.int64)))

    def counts_at(self, sample: int) -> Int64s:
        """Samples of every source, trained or skipped, before sample number ``sample`` of the plan, or its end."""
        segment = self.segments[-1] if sample == self.total_samples else self.stage_at(sample)
        return counts_in(self.seed, segment, sample - segment.first_sample)

    def stage_at(self, sample: int) -> Segment:
        """The segment that holds ``sample``."""
        if not 0 <= sample < self.total_samples:
            raise DataError(f"plan: sample {sample} is outside its {self.total_samples} samples")
        return self.segments[bisect_right(self._firsts, sample) - 1]

    def stage_bounds(self, sample: int) -> tuple[int, int]:
        """First sample of the stage that holds ``sample``, and the one after its last; it may have several segments."""
        return next((first, end) for _, first, end in self.stages() if first <= sample < end)

    def stages(self) -> list[tuple[str, int, int]]:
        """Every stage in order: name, first sample, and the one after its last. An edit may bring a name back."""
        found = []
        for name, group in groupby(self.segments, key=lambda segment: segment.stage):
            inside = list(group)
            found.append((name, inside[0].first_sample, inside[-1].end))
        return found

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
        ConfigError: a cap on epochs that does not hold.
    """
    sources = _sources(config, datasets, config.data.sources)
    return Plan.build(stages_of(config, sources), sources, config.train.sequence, config.train.seed)


def edited_plan(plan: Plan, at_sample: int, config: Config, datasets: Mapping[str, Dataset]) -> Plan:
    """``plan`` up to ``at_sample``, then what is left of the stages of ``config``, which may have further sources.

    Every source goes on where it stood: nothing is repeated or lost.

    Raises:
        DataError: as :meth:`Plan.extended`.
        ConfigError: stages that end before ``at_sample``, or a cap on epochs that does not hold.
    """
    known = {source.name for source in plan.sources}
    for source in plan.sources:
        given = config.data.sources[source.name].language
        if given != source.language:
            raise ConfigError(
                f"data.sources.{source.name}.language {given!r}: this run has trained it as {source.language!r}; set"
                " it as it was, or give what is new a name of its own"
            )
    plan = plan.joined(_sources(config, datasets, config.data.sources.keys() - known))
    rest = stages_of(config, plan.sources, at_sample, plan.counts_at(at_sample))
    return plan.extended(at_sample, rest)


def _sources(config: Config, datasets: Mapping[str, Dataset], names: Iterable[str]) -> list[Source]:
    found = [(name, config.data.sources[name].language, datasets[name]) for name in sorted(names)]
    return [Source(name, language, d.identity, d.train_tokens, d.pack) for name, language, d in found]


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
                f" add it to data.sources again; the stages to come may leave it out"
            )
        if (found.identity, found.train_tokens) != (source.identity, source.tokens):
            raise DataError(
                f"source {source.name!r} has changed since this run's plan was made: found identity {found.identity}"
                f" with {found.train_tokens} training tokens, expected {source.identity} with {source.tokens};"
                f" give the dataset that the run began with, or start a new run"
            )
