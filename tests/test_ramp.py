"""The sizes of global batches against a walk from step to step, and what the config refuses."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megapoly.config import Config, parse
from megapoly.errors import ConfigError
from megapoly.ramp import Batches, build_batches
from tests.parity.cases import SEQUENCE, config


@settings(max_examples=200)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 12), st.integers(1, 3000), st.integers(1, 200))
def test_a_run_is_whole_steps_of_every_size(start: int, increment: int, phases: int, ramp: int, batches: int) -> None:
    whole = start + phases * increment
    total = whole * batches
    built = build_batches(total, whole, start, increment, ramp)
    assert built.sizes == tuple(range(start, whole + 1, increment))
    assert min(built.steps[:-1]) >= 1
    assert built.ramp_samples == sum(size * count for size, count in zip(built.sizes[:-1], built.steps))
    assert built.ramp_samples % whole == 0
    assume(built.ramp_samples < total)
    sample, walk = 0, []
    while sample < total:
        assert built.sample_at(len(walk)) == sample
        walk.append(built.size_at(sample))
        assert {built.size_at(sample + i) for i in (0, walk[-1] // 2, walk[-1] - 1)} == {walk[-1]}
        sample += walk[-1]
    assert sample == total == built.sample_at(len(walk))
    assert built.total_steps == len(walk)
    assert [(size, len(list(rows))) for size, rows in itertools.groupby(walk)] == list(zip(built.sizes, built.steps))


def test_by_hand() -> None:
    # 96 samples for 3 sizes: 32 each. 8 x 4 = 32; 4 x 8 = 64; 3 x 12 = 100, which needs 12 to be 7 batches of 16.
    assert build_batches(320, 16, 4, 4, 96) == Batches((4, 8, 12, 16), (8, 4, 4, 13))
    # 6 samples are 2 steps of 3, and 8 of 3 are the first whole number of batches of 8.
    assert build_batches(80, 8, 3, 5, 6) == Batches((3, 8), (8, 7))
    assert build_batches(80, 8) == Batches((8,), (10,))
    assert build_batches(80, 8).ramp_samples == 0


def test_the_sizes_share_the_ramp_evenly() -> None:
    """PolyLM-13B's batch of 2048 from 64 on, over 200M tokens of 2048."""
    samples = 200_000_000 // 2048
    built = build_batches(152_500 * 2048, 2048, 64, 64, samples)
    assert built.ramp_samples == pytest.approx(samples, rel=0.03)
    for size, count in zip(built.sizes[:-1], built.steps):
        assert size * count == pytest.approx(samples / 31, abs=size)


def ramped(tokens: int = 40 * SEQUENCE, start: int = 2, increment: int = 2, **layout: Any) -> Config:
    tree = config(**layout).document()
    tree["train"]["batch_ramp"] = {"start": start, "increment": increment, "tokens": tokens}
    return parse(tree)


def refused(**changes: Any) -> str:
    with pytest.raises(ConfigError) as error:
        ramped(**changes)
    return str(error.value)


def test_what_the_config_refuses() -> None:
    assert "start 8 is not below train.global_batch 8" in refused(start=8)
    message = refused(increment=4)
    assert "no whole number of increments of 4 leads from 2 to train.global_batch 8" in message
    assert "choose increment from [1, 2, 3, 6]" in message
    assert f"tokens 100 is less than one step of every size takes; set it to {12 * SEQUENCE}" in refused(tokens=100)
    total = config().total_tokens
    assert f"takes {total} tokens" in refused(tokens=total)
    assert f"and the run has {total}; shorten" in refused(tokens=total)
    message = refused(micro_batch=4)
    assert "global batches of 2 samples, which does not divide by layout.micro_batch 4 x dp 1 = 4" in message
    assert "nearest values that fit are start 4 and increment 4" in message
    message = refused(schedule="interleaved", pp=2, virtual_stages=2, start=3, increment=1)
    assert "global batches of 3 samples" in message
    assert "x pp 2 (the interleaved schedule" in message
    assert "start 2 and increment 2" in message
    assert "train.global_batch is the least that does; lower layout.micro_batch, use fewer ranks" in refused(
        micro_batch=8
    )


def test_the_layout_is_checked_when_it_is_settled() -> None:
    settings = ramped()
    assert settings.batches.ramp_samples == 48
    assert settings.on(2).batches.sizes == (2, 4, 6, 8)
    with pytest.raises(ConfigError, match=r"batches of 2 samples, .* dp 4 = 4; .* start 4 and increment 4"):
        settings.on(4)
