"""The data plan against plain-Python walks, integer arithmetic and the statistics of random permutations."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import subprocess
import sys
from collections import Counter
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapoly.data import segments as segments_module
from megapoly.data.permutation import derive_key, permute
from megapoly.data.plan import Plan, check_datasets, plan_from_config
from megapoly.data.segments import BLOCK, Segment, Source
from megapoly.errors import DataError
from tests.data.small import FakeDataset, make_config

SEQUENCE = 4
few = settings(max_examples=40)


# ------------------------------------------------------------------------------------------------ permutations


def feistel(key: int, x: int, n: int) -> int:
    """The construction of permute's docstring once more, in Python's integers."""
    ones = (1 << 64) - 1

    def mix(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & ones
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & ones
        return z ^ (z >> 31)

    half = max(3, ((n - 1).bit_length() + 1) // 2)
    while True:
        left, right = x >> half, x % (1 << half)
        for i in range(1, 9):
            left, right = right, left ^ (mix(right ^ mix((key + i * 0x9E3779B97F4A7C15) & ones)) % (1 << half))
        x = (left << half) | right
        if x < n:
            return x


@given(st.integers(0, 2**64 - 1), st.integers(1, 5000))
def test_permutation_is_a_bijection_with_an_inverse(key, n):
    index = np.arange(n)
    image = permute(key, index, n)
    assert image.dtype == np.int64
    np.testing.assert_array_equal(np.sort(image), index)
    np.testing.assert_array_equal(permute(key, image, n, inverse=True), index)


@given(st.integers(0, 2**64 - 1), st.integers(1, 2**62), st.data())
def test_permutation_of_any_size_against_integers(key, n, data):
    index = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=8))
    image = permute(key, np.array(index), n)
    assert image.tolist() == [feistel(key, x, n) for x in index]
    assert permute(key, image, n, inverse=True).tolist() == index


@pytest.mark.parametrize("n", [2**k + d for k in (2, 6, 7, 8, 16, 48, 61) for d in (-1, 0, 1)])
def test_permutation_around_powers_of_two(n):
    index = np.unique(np.linspace(0, n - 1, 50).astype(np.int64).clip(0, n - 1))
    image = permute(7, index, n)
    assert 0 <= image.min() <= image.max() < n
    assert image.tolist() == [feistel(7, x, n) for x in index.tolist()]


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(1, 10**12)), min_size=1, max_size=20), st.data())
def test_a_key_and_a_size_per_index(pairs, data):
    index = [data.draw(st.integers(0, n - 1)) for _, n in pairs]
    keys, sizes = np.array([key for key, _ in pairs], dtype=np.uint64), np.array([n for _, n in pairs])
    together = permute(keys, np.array(index), sizes)
    assert together.tolist() == [feistel(key, x, n) for x, (key, n) in zip(index, pairs, strict=True)]


@pytest.mark.parametrize("n", [3, 4, 5, 6])
def test_all_permutations_are_as_likely(n):
    keys = np.arange(100 * math.factorial(n)).astype(np.uint64)
    images = permute(np.repeat(keys, n), np.tile(np.arange(n), keys.size), n).reshape(-1, n)
    seen = Counter(map(tuple, images.tolist()))
    cases = math.factorial(n)
    chi = sum((seen[order] - 100) ** 2 / 100 for order in itertools.permutations(range(n)))
    assert abs(chi - (cases - 1)) < 5 * math.sqrt(2 * (cases - 1))


@pytest.mark.parametrize("n", [64, 100, 1000, 65536])
def test_images_and_their_steps_are_uniform(n):
    """Chi-square over 16 equal ranges: of single images, and of the differences of neighbours."""
    keys = np.arange(8000).astype(np.uint64)
    images = permute(np.repeat(keys, 4), np.tile(np.arange(4), keys.size), n).reshape(-1, 4)
    steps = (np.diff(images, axis=1) % n).ravel() - 1
    for values, size in [(images[:, 0], n), (images[:, 3], n), (steps, n - 1)]:
        expected = np.bincount(np.arange(size) * 16 // size) / size * values.size
        chi = np.sum((np.bincount(values * 16 // size, minlength=16) - expected) ** 2 / expected)
        assert abs(chi - 15) < 5 * math.sqrt(30)


def test_keys_differ_with_every_part():
    parts = [(1, "epoch", "en", 1), (2, "epoch", "en", 1), (1, "block", "en", 1), (1, "epoch", "e", "n1")]
    parts += [(1, "epoch", "en", 2), (1, "epoch", "en1"), (1, "epoch", "en", "1")]
    keys = [derive_key(*part) for part in parts]
    assert len(set(keys)) == len(parts)
    assert all(0 <= key < 2**64 for key in keys)


# ------------------------------------------------------------------------------------------------ plans


def source(name: str, windows: int, extra: int = 0) -> Source:
    return Source(name, name[:2], f"hash-{name}", windows * SEQUENCE + 1 + extra)


@st.composite
def weights_of(draw, names):
    raw = draw(st.lists(st.integers(0, 50), min_size=len(names), max_size=len(names)).filter(any))
    return {name: value / sum(raw) for name, value in zip(names, raw, strict=True)}


@st.composite
def stages_of(draw, names, most=3):
    count = draw(st.integers(1, most))
    return [(f"stage {i}", draw(st.integers(1, 60)), draw(weights_of(names))) for i in range(count)]


@st.composite
def plans(draw):
    """Small plans whose segments have many blocks: blocks are made short."""
    count = draw(st.integers(1, 5))
    sources = [source(f"s{i}", draw(st.integers(1, 12)), draw(st.integers(0, SEQUENCE - 1))) for i in range(count)]
    stages = draw(stages_of([s.name for s in sources]))
    with mock.patch.object(segments_module, "BLOCK", draw(st.sampled_from([7, 32]))):
        return Plan.build(stages, sources, sequence=SEQUENCE, seed=draw(st.integers(0, 2**63)))


def everything(plan):
    return plan.locate(np.arange(plan.total_samples))


def check_walk(plan):
    """One sample after the other: counts are 0, 1, 2, ... for each source, and each epoch has each window once."""
    located = everything(plan)
    used: Counter[int] = Counter()
    epochs: dict[tuple[int, int], list[int]] = {}
    columns = (located.source, located.window, located.epoch, located.count)
    for s, window, epoch, count in zip(*(column.tolist() for column in columns), strict=True):
        assert count == used[s]
        assert epoch == used[s] // plan.windows[s]
        used[s] += 1
        epochs.setdefault((s, epoch), []).append(window)
    for (s, epoch), windows in epochs.items():
        assert len(set(windows)) == len(windows)
        assert set(windows) <= set(range(plan.windows[s]))
        if epoch < used[s] // plan.windows[s]:
            assert sorted(windows) == list(range(plan.windows[s]))
    return used


@few
@given(plans())
def test_every_window_once_per_epoch_and_counts_without_gap(plan):
    used = check_walk(plan)
    assert plan.counts_at(plan.total_samples).tolist() == [used[s] for s in range(len(plan.sources))]


@few
@given(plans(), st.randoms(use_true_random=False))
def test_any_order_of_asking_gives_the_same(plan, random):
    located = everything(plan)
    samples = random.choices(range(plan.total_samples), k=40)
    asked = plan.locate(np.array(samples))
    for field in dataclasses.fields(asked):
        np.testing.assert_array_equal(getattr(asked, field.name), getattr(located, field.name)[samples])
    assert [asked.source.dtype, asked.window.dtype, asked.epoch.dtype, asked.count.dtype] == ["i4", "i8", "i8", "i8"]


@few
@given(plans())
def test_counts_and_stages_at_every_sample(plan):
    located = everything(plan)
    for sample in (*range(0, plan.total_samples, 3), plan.total_samples):
        expected = np.bincount(located.source[:sample], minlength=len(plan.sources))
        np.testing.assert_array_equal(plan.counts_at(sample), expected)
    starts = [0, *itertools.accumulate(segment.samples for segment in plan.segments)]
    for segment, start, end in zip(plan.segments, starts, starts[1:], strict=False):
        assert plan.stage_at(start) is plan.stage_at(end - 1) is segment


@few
@given(plans())
def test_shares_hold_over_every_stretch(plan):
    """The two bounds of the module's docstring, over every [a, b) inside every segment."""
    located = everything(plan)
    for segment in plan.segments:
        inside = located.source[segment.first_sample : segment.first_sample + segment.samples]
        for i, quota in enumerate(segment.quotas):
            prefix = np.concatenate([[0], np.cumsum(inside == i)])
            drift = prefix * segment.block - np.arange(prefix.size) * quota  # times block, to stay in whole numbers
            assert drift.max() - drift.min() <= 2 * quota * (segment.block - quota)
            assert not drift[:: segment.block].any()


@given(st.integers(1, 3 * BLOCK), st.integers(1, 40).flatmap(lambda n: weights_of([f"s{i}" for i in range(n)])))
@settings(max_examples=30)
def test_quotas_are_the_weights_rounded(samples, weights):
    sources = [source(name, 3) for name in weights]
    (segment,) = Plan.build([("only", samples, weights)], sources, SEQUENCE, 1).segments
    blocks = math.ceil(samples / BLOCK)
    assert segment.block == math.ceil(samples / blocks) <= BLOCK
    assert sum(segment.quotas) == segment.block
    for quota, weight in zip(segment.quotas, weights.values(), strict=True):
        assert abs(quota - weight * segment.block) < 1 + 1e-9
        assert weight > 0 or quota == 0


def test_quotas_by_largest_remainder_by_hand():
    sources = [source(name, 3) for name in "abc"]
    weights = {"a": 0.25, "b": 0.35, "c": 0.4}  # of 10: 2.5, 3.5, 4: one slot is left, the first of the equals has it
    (segment,) = Plan.build([("only", 10, weights)], sources, SEQUENCE, 1).segments
    assert segment.quotas == (3, 3, 4) or segment.quotas == (2, 4, 4)
    (segment,) = Plan.build([("only", 10, {"a": 0.26, "b": 0.33, "c": 0.41})], sources, SEQUENCE, 1).segments
    assert segment.quotas == (3, 3, 4)


@few
@given(plans(), st.data())
def test_an_edit_repeats_and_loses_nothing(plan, data):
    cut = data.draw(st.integers(0, plan.total_samples))
    stages = data.draw(stages_of([s.name for s in plan.sources]))
    edited = plan.extended(cut, stages)
    check_walk(edited)
    assert edited.total_samples == cut + sum(samples for _, samples, _ in stages)
    assert [segment.stage for segment in edited.segments][-len(stages) :] == [name for name, _, _ in stages]
    before, after = plan.locate(np.arange(cut)), edited.locate(np.arange(cut))
    for field in dataclasses.fields(before):
        np.testing.assert_array_equal(getattr(before, field.name), getattr(after, field.name))
    again = data.draw(st.integers(0, edited.total_samples))
    check_walk(edited.extended(again, data.draw(stages_of([s.name for s in plan.sources]))))


def rows(located):
    """(source, epoch, window) of every sample."""
    return list(zip(*(getattr(located, name).tolist() for name in ("source", "epoch", "window")), strict=True))


@few
@given(plans(), st.data())
def test_skipped_data_does_not_come_again(plan, data):
    """Skips one after the other, also from before an earlier one: what was skipped stays unread, nothing else does."""
    total = plan.total_samples
    lengths = {segment.stage: segment.samples for segment in plan.segments}
    for _ in range(2):
        at = data.draw(st.integers(0, total - 1))
        count = data.draw(st.integers(1, total - at))
        skipping = plan.skipping(at, count)
        assert rows(skipping.locate(np.arange(at))) == rows(plan.locate(np.arange(at)))
        left_out = rows(plan.locate(np.arange(at, at + count)))
        seen = rows(everything(skipping))
        assert len(set(seen)) == len(seen) == total
        assert not set(left_out) & set(seen)
        position = plan.counts_at(at + count)
        np.testing.assert_array_equal(skipping.counts_at(at), position)
        after = skipping.locate(np.arange(at, total))
        for i, first in enumerate(position.tolist()):
            counts = after.count[after.source == i].tolist()
            assert counts == list(range(first, first + len(counts)))
        by_stage: Counter[str] = Counter()
        for segment in skipping.segments:
            by_stage[segment.stage] += segment.samples
        assert by_stage == lengths
        assert skipping.segments[-1].skipped == position.sum() - at
        assert Plan.from_document(json.loads(json.dumps(skipping.to_document()))) == skipping
        plan = skipping


def test_the_rest_after_a_skip_keeps_its_shares():
    weights = {"x": 0.25, "y": 0.75}
    plan = Plan.build([("a", 40, weights), ("b", 60, HALF)], [source("x", 99), source("y", 99)], SEQUENCE, 1)
    skipping = plan.skipping(8, 12)
    first, rest, last = skipping.segments
    assert first == dataclasses.replace(plan.segments[0], samples=8)
    assert (rest.first_sample, rest.samples, rest.stage, rest.block, rest.quotas) == (8, 32, "a", 32, (8, 24))
    assert (rest.starts, rest.skipped) == (tuple(plan.counts_at(20).tolist()), 12)
    assert (last.first_sample, last.samples, last.stage, last.quotas, last.skipped) == (40, 60, "b", (30, 30), 12)
    for at, count in [(8, 0), (-1, 5), (90, 11), (100, 1)]:
        with pytest.raises(DataError, match=f"cannot skip {count} samples from sample {at}; it has 100"):
            plan.skipping(at, count)


@given(plans())
def test_plan_survives_json(plan):
    document = json.loads(json.dumps(plan.to_document()))
    assert Plan.from_document(document) == plan
    for segment in document["segments"]:  # of the time when nothing was skipped
        del segment["skipped"]
    assert Plan.from_document(document) == plan


def test_seek_far_into_a_long_run():
    sources = [source(f"s{i}", 10**6 + i) for i in range(30)]
    weights = {s.name: 1 / 30 for s in sources}
    plan = Plan.build([("a", 10**12 - 12345, weights), ("b", 10**12, weights)], sources, SEQUENCE, seed=3)
    samples = np.arange(10**12 - 20_000, 10**12 + 20_000)  # over the border of the stages
    located = plan.locate(samples)
    counts = plan.counts_at(10**12 - 20_000)
    assert counts.sum() == 10**12 - 20_000
    assert abs(counts / counts.sum() - 1 / 30).max() < 1 / BLOCK
    for i in range(len(sources)):
        mine = located.source == i
        assert located.count[mine].tolist() == list(range(counts[i], counts[i] + mine.sum()))
        places = located.count[mine] % plan.windows[i]
        epochs = located.epoch[mine].tolist()
        assert epochs == (located.count[mine] // plan.windows[i]).tolist()
        assert located.window[mine].tolist()[:50] == [
            feistel(derive_key(3, "epoch", f"s{i}", epoch), place, int(plan.windows[i]))
            for place, epoch in zip(places.tolist()[:50], epochs, strict=False)
        ]


def test_seeds_blocks_and_epochs_are_shuffled_apart():
    def order(seed):
        return everything(
            Plan.build([("a", 2 * BLOCK, {"x": 0.5, "y": 0.5})], [source("x", 500), source("y", 500)], 4, seed)
        )

    one, other = order(1), order(2)
    assert np.mean(one.source == other.source) == pytest.approx(0.5, abs=0.01)
    assert np.mean(one.source[:BLOCK] == one.source[BLOCK:]) == pytest.approx(0.5, abs=0.01)
    x, y = (one.window[one.source == i] for i in (0, 1))
    assert np.mean(x[:500] == x[500:1000]) < 0.02
    assert np.mean(x[:500] == y[:500]) < 0.02


# ------------------------------------------------------------------------------------------------ errors and set-up

HALF = {"x": 0.5, "y": 0.5}


@pytest.mark.parametrize(
    ("stages", "tokens", "message"),
    [
        ([("a", 10, HALF)], 4, r"stage 'a': source 'y' has a weight of 0.5 .* 4 training tokens.* 4 \+ 1.* at most 3"),
        ([("a", 10, {"x": 0.5, "z": 0.5})], 50, r"unknown sources \['z'\]"),
        ([("a", 10, {"x": 0.5})], 50, "sum to 1"),
        ([("a", 10, {"x": 1.5, "y": -0.5})], 50, "sum to 1"),
        ([("a", 10, {"x": math.nan, "y": 1.0})], 50, "sum to 1"),
        ([("a", 0, HALF)], 50, "stage 'a': 0 samples"),
        ([("a", 2**62 + 1, HALF)], 50, "expected 1 to 2"),
        ([], 50, "at least one stage"),
    ],
)
def test_plans_that_cannot_be(stages, tokens, message):
    with pytest.raises(DataError, match=message):
        Plan.build(stages, [source("x", 9), Source("y", "y", "h", tokens)], SEQUENCE, 1)


def test_a_source_without_windows_may_rest():
    plan = Plan.build([("a", 10, {"x": 1.0, "y": 0.0})], [source("x", 9), Source("y", "y", "h", 4)], SEQUENCE, 1)
    assert set(everything(plan).source.tolist()) == {0}


@pytest.mark.parametrize("samples", [[-1], [10], [0, 10**12]])
def test_samples_outside_the_plan(samples):
    plan = Plan.build([("a", 10, {"x": 1.0})], [source("x", 9)], SEQUENCE, 1)
    with pytest.raises(DataError, match="10 samples"):
        plan.locate(np.array(samples))
    with pytest.raises(DataError, match="10 samples"):
        plan.stage_at(samples[-1])
    with pytest.raises(DataError, match="sample 11"):
        plan.extended(11, [("b", 5, {"x": 1.0})])


DOCUMENT_FAULTS = {
    "version": ("plan: version 2; .* reads version 1", {"version": 2}),
    "extra": ("expected the keys", {"more": 1}),
    "boolean": ("plan.seed: found True, expected int", {"seed": True}),
    "fraction": ("plan.sequence: found 4.0, expected int", {"sequence": 4.0}),
    "zero sequence": ("sequence of at least 1", {"sequence": 0}),
    "too long a sequence": ("no window", {"sequence": 400}),
    "no list": ("plan.sources: found dict, expected a list", {"sources": {}}),
    "no sources": ("distinct sources", {"sources": []}),
    "no segments": ("at least one stage", {"segments": []}),
}


@pytest.mark.parametrize("fault", DOCUMENT_FAULTS)
def test_documents_that_are_damaged(fault):
    message, change = DOCUMENT_FAULTS[fault]
    plan = Plan.build([("a", 10, HALF), ("b", 20, HALF)], [source("x", 9), source("y", 9)], SEQUENCE, 1)
    with pytest.raises(DataError, match=message):
        Plan.from_document({**plan.to_document(), **change})
    with pytest.raises(DataError, match="found NoneType, expected the keys"):
        Plan.from_document(None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first_sample": 11}, r"segment 1 \(b\): starts at sample 11"),
        ({"samples": 0}, r"segment 1 \(b\)"),
        ({"quotas": [10, 11]}, "sum of quotas 21"),
        ({"quotas": [30, -10]}, "at least 0"),
        ({"starts": [5, 6]}, "sum of starts 11"),
        ({"skipped": 1}, r"sum of starts 10; .* 10 samples before it \+ 1 skipped"),
        ({"skipped": -1}, "-1 samples skipped, fewer than the 0 before it"),
        ({"starts": [10]}, "each of 2 sources"),
        ({"block": 10**9, "quotas": [10**9, 0]}, "at most 65536"),
        ({"starts": [5, "5"]}, r"plan.segments.1.starts.1: found '5', expected int"),
    ],
)
def test_segments_that_are_damaged(change, message):
    plan = Plan.build([("a", 10, HALF), ("b", 20, HALF)], [source("x", 9), source("y", 9)], SEQUENCE, 1)
    document = plan.to_document()
    document["segments"][1].update(change)
    with pytest.raises(DataError, match=message):
        Plan.from_document(document)


def test_segments_keep_their_block_when_they_are_cut():
    plan = Plan.build([("a", 10, HALF)], [source("x", 9), source("y", 9)], SEQUENCE, 1)
    first, second = plan.extended(3, [("b", 4, {"x": 1.0})]).segments
    assert first == Segment(0, 3, "a", 10, (5, 5), (0, 0))
    assert second == Segment(3, 4, "b", 4, (4, 0), tuple(plan.counts_at(3).tolist()))


def test_changed_datasets_are_refused():
    plan = Plan.build([("a", 10, HALF)], [source("x", 9), source("y", 9)], SEQUENCE, 1)
    same = {name: FakeDataset([[1] * 37], identity=f"hash-{name}") for name in "xy"}
    check_datasets(plan, same)
    with pytest.raises(DataError, match=r"source 'y' has changed .* other"):
        check_datasets(plan, {**same, "y": FakeDataset([[1] * 37], identity="other")})
    with pytest.raises(DataError, match=r"source 'y' has changed .* 36 training tokens"):
        check_datasets(plan, {**same, "y": FakeDataset([[1] * 36], identity="hash-y")})
    with pytest.raises(DataError, match="source 'y' is in the plan"):
        check_datasets(plan, {"x": same["x"]})


def test_plan_of_a_config():
    datasets = {"en": FakeDataset([[1] * 60, [2] * 41], 1, "e"), "fr": FakeDataset([[1] * 90], 0, "f")}
    plan = plan_from_config(make_config(), datasets)
    assert plan.sources == (Source("en", "en", "e", 60), Source("fr", "fr", "f", 90))
    assert plan.windows.tolist() == [59 // 8, 89 // 8]
    assert [(s.stage, s.samples, s.quotas) for s in plan.segments] == [("one", 40, (30, 10)), ("two", 20, (5, 15))]
    assert plan.sequence == 8
    assert plan.seed == make_config().train.seed


def test_plan_needs_no_torch():
    code = "import sys, megapoly.data.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
