"""A checkpoint saved under any layout of 8 ranks goes on under any other, in float64: losses, norms and weights.

The variants: every factorisation of 8 ranks into dp x pp x tp, with the optimizer sharded and not, and with every
schedule but gpipe, whose stages are those of 1f1b. All ordered pairs in the long run, a sample with a seed in CI.
The vocabulary is a prime, so that every tp pads it otherwise.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megapoly.checkpoint import state, store
from megapoly.data.plan import plan_from_config
from megapoly.engine import Engine
from tests.parity import cases
from tests.parity.test_layouts import layouts
from tests.ranks import run_cases

BEFORE, AFTER = 3, 2  # steps; after one step the loss has told of the weights, and the weights of all else
TOLERANCE = 1e-9
SCHEDULES = ["1f1b", "interleaved", "zero-bubble", "zero-bubble-v"]
Variant = tuple[tuple[str, Any], ...]  # keys of ``cases.config``, with their values
FAMILIES: dict[str, dict[str, Any]] = {"polylm": {}, "llama": {"family": "llama", "heads": 16, "key_value_heads": 8}}


@dataclass(frozen=True)
class _Source:
    identity: str = "none"
    train_tokens: int = 1 << 20
    pack: int = 0


def variants() -> list[Variant]:
    result = []
    for dp, pp, tp in layouts(8):
        schedules = {1: ["1f1b"], 8: ["1f1b", "zero-bubble"]}.get(pp, SCHEDULES)  # 16 stages are more than the layers
        for schedule, sharded in itertools.product(schedules, [True, False] if dp > 1 else [True]):
            keys = {"dp": dp, "pp": pp, "tp": tp, "schedule": schedule, "shard_optimizer": sharded}
            keys |= {"sequence_parallel": tp == 2, "micro_batch": cases.BATCH // (dp * pp)}  # few messages
            result.append(tuple({**keys, "bucket_mb": 0.05}.items()))
    return result


def steps(built: Any, first: int, count: int) -> list[float]:
    numbers: list[float] = []
    for step in range(first, first + count):
        result = built.step(cases.mine(cases.global_batch(step), built), rate=0.01 * min(1, step / 3), sources=2)
        numbers += [result.loss, result.gradient_norm]
    return numbers


def turn(rank: int, size: int, work: Callable[..., Any], *args: Any) -> Any:
    """``begin`` or ``go_on``, so that the same processes do both."""
    return work(rank, size, *args)


def begin(rank: int, size: int, family: str, variant: Variant, folder: Path) -> None:
    """The first steps, and a checkpoint of them in ``folder``."""
    built = cases.engine(size, cases.config(**dict(variant), **FAMILIES[family]))
    steps(built, 0, BEFORE)
    plan = plan_from_config(built.config, {"a": _Source(), "b": _Source()})
    counters = state.Counters(BEFORE, BEFORE * cases.BATCH, BEFORE * cases.BATCH * cases.SEQUENCE)
    state.save(folder, built.config, plan, counters, built.optimizer, built.context, tokenizer="none", guards={})
    built.context.close()


def go_on(
    rank: int, size: int, family: str, variant: Variant, folders: list[Path], expected: Path, after: int
) -> list[tuple[list[float], float]]:
    """The next steps from the checkpoint in each folder, by one engine; how far the weights are from ``expected``."""
    if rank == 0:
        print(f"{family}, {len(folders)} checkpoints -> {name(variant)}", file=sys.stderr, flush=True)
    built = cases.engine(size, cases.config(**dict(variant), **FAMILIES[family]))
    weights = {key: torch.from_numpy(values) for key, values in np.load(expected).items()}
    results = []
    for folder in folders:
        forget(built)
        counters = state.load(store.Reader(state.newest(folder)), built.config, built.optimizer)
        assert counters == state.Counters(BEFORE, BEFORE * cases.BATCH, BEFORE * cases.BATCH * cases.SEQUENCE)
        numbers, worst = steps(built, BEFORE, after), 0.0
        for key, _, piece, values in cases.pieces(built, "weight"):
            whole = weights[key]
            wanted = whole[piece.box.slices((0,) * whole.ndim)].flatten()[piece.start : piece.stop]
            worst = max(worst, float((torch.from_numpy(values) - wanted).abs().max() / whole.abs().max()))
        results.append((numbers, worst))
    built.context.close()
    return results


def forget(built: Engine) -> None:
    """Nothing that an earlier checkpoint left may be taken for what this one holds."""
    built.buffers.settle()
    for parameter in built.buffers.parameters:
        parameter.detach().fill_(math.nan)
    for part in built.buffers.parts():
        bucket = built.buffers.buckets[part.bucket]
        for flat in (bucket.values[bucket.mine], *built.optimizer.states[part.bucket].values()):
            flat[part.at].fill_(math.nan)
    built.optimizer.steps = -1


@functools.cache
def one_process(family: str, after: int) -> tuple[list[float], dict[str, np.ndarray]]:
    numbers, weights = cases.some_steps(0, 1, cases.config(dp=1, **FAMILIES[family]), BEFORE + after)
    return numbers, cases.reassemble([weights])


def name(variant: Variant) -> str:
    return "-".join(str(value) for _, value in variant)


def check(family: str, pairs: Iterable[tuple[Variant, Variant]], folder: Path, after: int = AFTER) -> int:
    """Save under the first of each pair, go on under the second, and compare with one process that never stopped."""
    pairs = list(pairs)
    froms: dict[Variant, list[Variant]] = {}
    for first, second in pairs:
        froms.setdefault(second, []).append(first)
    folder.mkdir(exist_ok=True)
    numbers, weights = one_process(family, after)
    np.savez(folder / "weights.npz", **weights)
    begins = [(begin, family, first, folder / name(first)) for first in dict(pairs)]
    goes_on = [
        (go_on, family, second, [folder / name(first) for first in firsts], folder / "weights.npz", after)
        for second, firsts in froms.items()
    ]
    outcomes = run_cases(8, turn, [*begins, *goes_on], timeout=7200)[len(begins) :]
    checked = 0
    for (second, firsts), ranks in zip(froms.items(), outcomes, strict=True):
        for results, first in zip(zip(*ranks, strict=True), firsts, strict=True):
            where = f"{name(first)} -> {name(second)}"
            for found, worst in results:
                np.testing.assert_allclose(found, numbers[2 * BEFORE :], rtol=TOLERANCE, err_msg=where)
                assert worst <= TOLERANCE, where
            checked += 1
    return checked


def sample() -> list[tuple[Variant, Variant]]:
    """Between sharded and not, both ways, and between one stage of a rank and several, both ways."""

    def several(variant: Variant) -> bool:
        return dict(variant)["schedule"] in ("interleaved", "zero-bubble-v")

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
    pairs = list(itertools.permutations(variants(), 2))
    assert len(pairs) == 41 * 40
    assert check(family, pairs, tmp_path, after=1) == len(pairs)
