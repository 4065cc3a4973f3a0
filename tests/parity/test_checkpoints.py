"""A checkpoint saved under any layout of 8 ranks goes on under any other, in float64: losses, norms and weights.

The variants: every factorisation of 8 ranks into dp x pp x tp, with the optimizer sharded and not, and with every
schedule that gives ranks several stages. All ordered pairs of them in the long run, a sample with a seed in CI.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megapoly.checkpoint import state, store
from megapoly.data.plan import plan_from_config
from tests.parity import cases
from tests.ranks import run_cases

BEFORE, AFTER = 3, 2  # steps
TOLERANCE = 1e-9
Variant = tuple[tuple[str, Any], ...]  # keys of ``cases.config``, with their values
FAMILIES: dict[str, dict[str, Any]] = {"polylm": {}, "llama": {"family": "llama", "heads": 16, "key_value_heads": 8}}


@dataclass(frozen=True)
class _Source:
    identity: str = "none"
    train_tokens: int = 1 << 20
    pack: int = 0


def variants() -> list[Variant]:
    result = []
    for dp, pp, tp in itertools.product((1, 2, 4, 8), repeat=3):
        if dp * pp * tp != 8:
            continue
        schedules = {1: ["1f1b"], 8: ["1f1b"]}.get(pp, ["1f1b", "interleaved", "zero-bubble-v"])
        for schedule, sharded in itertools.product(schedules, [True, False] if dp > 1 else [True]):
            keys = {"dp": dp, "pp": pp, "tp": tp, "schedule": schedule, "shard_optimizer": sharded}
            result.append(tuple({**keys, "bucket_mb": 0.05}.items()))
    return result


def steps(built: Any, first: int, count: int) -> list[float]:
    numbers: list[float] = []
    for step in range(first, first + count):
        result = built.step(cases.mine(cases.global_batch(step), built), rate=0.01 * min(1, step / 3), sources=2)
        numbers += [result.loss, result.gradient_norm]
    return numbers


def train(
    rank: int, size: int, family: str, variant: Variant, load: Path | None, save: Path | None
) -> tuple[list[float], cases.Pieces]:
    """The first steps and a checkpoint in ``save``, or the following steps from the one in ``load``."""
    built = cases.engine(size, cases.config(**dict(variant), **FAMILIES[family]))
    begin = 0
    if load is not None:
        counters = state.load(store.Reader(state.newest(load)), built.config, built.optimizer)
        begin = counters.step
    numbers = steps(built, begin, BEFORE if save is not None else AFTER)
    if save is not None:
        plan = plan_from_config(built.config, {"a": _Source(), "b": _Source()})
        counters = state.Counters(BEFORE, BEFORE * cases.BATCH, BEFORE * cases.BATCH * cases.SEQUENCE)
        state.save(save, built.config, plan, counters, built.optimizer, built.context, tokenizer="none", guards={})
    built.context.close()
    return numbers, cases.pieces(built, "weight")


@functools.cache
def one_process(family: str) -> tuple[list[float], dict[str, np.ndarray]]:
    numbers, weights = cases.some_steps(0, 1, cases.config(dp=1, **FAMILIES[family]), BEFORE + AFTER)
    return numbers, cases.reassemble([weights])


def name(variant: Variant) -> str:
    return "-".join(str(value) for _, value in variant)


def check(family: str, pairs: Iterable[tuple[Variant, Variant]], folder: Path) -> int:
    """Save under the first of each pair, go on under the second, and compare with one process that never stopped."""
    pairs = list(pairs)
    saves = [(family, first, None, folder / name(first)) for first in dict(pairs)]
    goes_on = [(family, second, folder / name(first), None) for first, second in pairs]
    numbers, weights = one_process(family)
    results = run_cases(8, train, [*saves, *goes_on], timeout=7200)
    for (_, second, source, _), ranks in zip(goes_on, results[len(saves) :], strict=True):
        where = f"{source.name} -> {name(second)}"
        for found, _ in ranks:
            np.testing.assert_allclose(found, numbers[2 * BEFORE :], rtol=TOLERANCE, err_msg=where)
        try:
            cases.assert_close(cases.reassemble(held for _, held in ranks), weights, TOLERANCE)
        except AssertionError as error:
            raise AssertionError(where) from error
    return len(goes_on)


def sample() -> list[tuple[Variant, Variant]]:
    """Between sharded and not, both ways, and between one stage of a rank and several, both ways."""

    def several(variant: Variant) -> bool:
        return dict(variant)["schedule"] != "1f1b"

    def sharded(variant: Variant) -> bool:
        return bool(dict(variant)["shard_optimizer"]) and dict(variant)["dp"] > 1

    def plain(variant: Variant) -> bool:
        return not dict(variant)["shard_optimizer"]

    draw = random.Random(5)
    kinds = [(sharded, plain), (plain, sharded), (several, sharded), (plain, several)]
    return [
        (draw.choice([each for each in variants() if first(each)]),
         draw.choice([each for each in variants() if second(each)]))
        for first, second in kinds
    ]  # fmt: skip


def test_a_sample_of_pairs_goes_on(tmp_path: Path) -> None:
    pairs = sample()
    assert len({dict(variant)["dp"] for pair in pairs for variant in pair}) > 1
    assert check("polylm", pairs[:3], tmp_path / "polylm") == 3
    assert check("llama", pairs[3:], tmp_path / "llama") == 1


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_every_variant_goes_on_from_every_other(family: str, tmp_path: Path) -> None:
    """All ordered pairs; of the second family those that keep the schedule and change tp, which splits its groups."""
    pairs = list(itertools.permutations(variants(), 2))
    assert len(pairs) == 32 * 31
    if family != "polylm":
        pairs = [
            (a, b) for a, b in pairs if dict(a)["schedule"] == dict(b)["schedule"] and dict(a)["tp"] != dict(b)["tp"]
        ]
    assert check(family, pairs, tmp_path) == len(pairs)
