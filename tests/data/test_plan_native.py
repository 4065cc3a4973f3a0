"""The data plan in C++ against its formula in numpy, bit for bit, and its keys against the standard library."""

from __future__ import annotations

import hashlib
import json
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapoly.data import _index, plan_reference
from megapoly.data.permutation import derive_key, key_text, permute
from megapoly.data.plan import Plan
from megapoly.data.segments import BLOCK, Source, counts_in
from megapoly.errors import DataError

FIELDS = ("source", "window", "epoch", "count")
HUGE = 10**12


def assert_same(plan, samples):
    samples = np.asarray(samples, np.int64)
    found, expected = plan.locate(samples), plan_reference.locate(plan, samples)
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(found, field), getattr(expected, field), err_msg=field)
        assert getattr(found, field).dtype == getattr(expected, field).dtype


@st.composite
def plans(draw, longest=3 * BLOCK):
    count = draw(st.integers(1, 6))
    sources = [
        Source(f"s{i}-ไทย", "th", str(i), draw(st.integers(5, 10**4)), draw(st.sampled_from([0, 4])))
        for i in range(count)
    ]
    stages = []
    for number in range(draw(st.integers(1, 3))):
        shares = draw(st.lists(st.integers(0, 50), min_size=count, max_size=count).filter(any))
        weights = {source.name: share / sum(shares) for source, share in zip(sources, shares, strict=True)}
        stages.append((f"stage {number}", draw(st.integers(1, longest)), weights))
    plan = Plan.build(stages, sources, 4, draw(st.integers(0, 2**64 - 1)))
    if draw(st.booleans()) and plan.total_samples > 1:
        at = draw(st.integers(0, plan.total_samples - 2))
        plan = plan.skipping(at, draw(st.integers(1, plan.total_samples - at - 1)))
    return plan


# ------------------------------------------------------------------------------------------------ keys, permutations


@pytest.mark.parametrize("length", [0, 1, 7, 127, 128, 129, 255, 256, 257, 1000])
def test_keys_are_blake2b(length):
    text = "".join(chr(33 + i % 90) for i in range(length))
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"megapoly").digest()
    assert _index.key_of(text) == int.from_bytes(digest, "little")


@given(st.integers(0, 2**64 - 1), st.text(), st.integers(0, 2**62))
def test_key_text_and_a_number_make_the_derived_key(seed, name, number):
    assert _index.key_of(f"{key_text(seed, 'epoch', name)}{number}]") == derive_key(seed, "epoch", name, number)
    assert json.loads(f"{key_text(seed, 'epoch', name)}{number}]") == [seed, "epoch", name, number]


@given(st.integers(0, 2**64 - 1), st.integers(1, 2**62), st.data())
def test_permutation(key, n, data):
    index = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=20)), np.int64)
    image = _index.permute(key, index, n)
    np.testing.assert_array_equal(image, permute(key, index, n))
    np.testing.assert_array_equal(_index.permute(key, image, n, inverse=True), index)


@pytest.mark.parametrize("n", [1, 2, 3, 63, 64, 65, 4095, 4096, 4097])
def test_permutation_of_a_whole_range(n):
    image = _index.permute(5, np.arange(n), n)
    np.testing.assert_array_equal(np.sort(image), np.arange(n))
    np.testing.assert_array_equal(image, permute(5, np.arange(n), n))


@pytest.mark.parametrize(("index", "size"), [([3], 3), ([-1], 3), ([0], 0), ([0], 2**62 + 1)])
def test_permutation_refuses_what_is_outside(index, size):
    with pytest.raises(ValueError, match="permut"):
        _index.permute(1, np.array(index), size)


# ------------------------------------------------------------------------------------------------ plans


@settings(max_examples=60)
@given(plans(), st.data())
def test_any_samples_in_any_order(plan, data):
    draws = st.lists(st.integers(0, plan.total_samples - 1), max_size=40)
    assert_same(plan, data.draw(draws))
    assert_same(plan, sorted(data.draw(draws)))


@settings(max_examples=40)
@given(plans(longest=300))
def test_every_sample_of_small_plans(plan):
    assert_same(plan, np.arange(plan.total_samples))
    assert_same(plan, np.arange(plan.total_samples)[::-1])


@settings(max_examples=40)
@given(plans(), st.data())
def test_counts_at_any_sample(plan, data):
    segment = data.draw(st.sampled_from(plan.segments))
    inside = data.draw(st.integers(0, segment.samples))
    np.testing.assert_array_equal(
        counts_in(plan.seed, segment, inside), plan_reference.counts_in(plan.seed, segment, inside)
    )


@pytest.mark.parametrize("total", [2**31 + 5, HUGE, 2**55])
def test_far_samples_of_a_long_plan(total):
    names = [f"s{i}" for i in range(18)]
    sources = [Source(name, "en", name, 4 * 10 ** (3 + i // 2) + 1) for i, name in enumerate(names)]
    weights = {name: (i + 1) / 171 for i, name in enumerate(names)}
    plan = Plan.build([("a", total // 3, weights), ("b", total - total // 3, weights)], sources, 4, 7)
    rng = np.random.default_rng(1)
    assert_same(plan, rng.integers(0, total, 12))
    assert_same(plan, [0, 1, BLOCK - 1, BLOCK, total // 3 - 1, total // 3, total - 2, total - 1])
    assert_same(plan, np.arange(total - 1000, total))


def test_threads_share_a_plan():
    sources = [Source(name, "en", name, 401) for name in "ab"]
    plan = Plan.build([("s", 5 * BLOCK, {"a": 0.3, "b": 0.7})], sources, 4, 1)
    parts = [np.random.default_rng(i).integers(0, plan.total_samples, 200) for i in range(4)]
    expected = [plan_reference.locate(plan, part).count for part in parts]
    found = [None] * len(parts)

    def work(i):
        for _ in range(3):
            found[i] = plan.locate(parts[i]).count

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("samples", [[-1], [10], [3, 10, 4], [2**62]])
def test_a_sample_outside_is_named(samples):
    plan = Plan.build([("s", 10, {"a": 1.0})], [Source("a", "en", "a", 9)], 4, 1)
    with pytest.raises(DataError, match="ends after 10 samples"):
        plan.locate(np.array(samples))


def test_the_constructor_refuses_what_is_no_plan():
    good = dict(samples=4, first=[0], block=[4], quotas=[4], starts=[0], windows=[2], block_text="b", epoch_texts=["e"])
    assert _index.Plan(**good).locate(np.arange(4))[3].tolist() == [0, 1, 2, 3]
    wrong = [
        {"samples": 0}, {"first": [1]}, {"first": []}, {"block": [0]}, {"block": [5]}, {"quotas": [-1]},
        {"quotas": [5]}, {"starts": [-1]}, {"starts": [2**62]}, {"windows": [0]}, {"windows": []}, {"epoch_texts": []},
        {"samples": 2**62 + 1}, {"first": [0, 4], "block": [4, 4], "quotas": [4, 4], "starts": [0, 4]},
    ]  # fmt: skip
    for change in wrong:
        with pytest.raises(ValueError, match="no plan"):
            _index.Plan(**(good | change))
