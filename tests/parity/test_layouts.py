"""The same loss, gradients and weights under every layout, in float64, against one process."""

from __future__ import annotations

import functools
import random

import numpy as np
import pytest

from tests.parity import cases
from tests.ranks import run_cases, run_ranks

GRADIENTS, WEIGHTS = 1e-10, 1e-9
Combination = tuple[int, int, int, int, str, bool]  # dp, pp, tp, micro-batch, schedule, separate documents


def layouts(size: int) -> list[tuple[int, int, int]]:
    """Every (dp, pp, tp) of ``size`` ranks."""
    sizes = [n for n in (1, 2, 4, 8) if n <= size]
    return [(dp, pp, tp) for dp in sizes for pp in sizes for tp in sizes if dp * pp * tp == size]


def combinations(size: int) -> list[Combination]:
    return [
        (dp, pp, tp, micro, schedule, documents)
        for dp, pp, tp in layouts(size)
        for micro in (1, 2, 4, 8)
        if cases.BATCH % (dp * micro) == 0
        for schedule in ("gpipe", "1f1b")
        for documents in (False, True)
    ]


@functools.cache
def one_process(layers: int, heads: int, documents: bool) -> tuple[list[float], dict[str, np.ndarray]]:
    numbers, gradients = cases.one_pass(0, 1, cases.config(micro_batch=8, dp=1, layers=layers, heads=heads), documents)
    return numbers, cases.reassemble([gradients])


def check(size: int, chosen: list[Combination]) -> None:
    settings = [
        (cases.config(dp=dp, pp=pp, tp=tp, micro_batch=micro, schedule=schedule, bucket_mb=0.05), documents)
        for dp, pp, tp, micro, schedule, documents in chosen
    ]
    for case, results in zip(chosen, run_cases(size, cases.one_pass, settings, timeout=600)):
        numbers, expected = one_process(*_shape(case), case[5])
        for found, _ in results:
            np.testing.assert_allclose(found, numbers, rtol=GRADIENTS)
        cases.assert_close(cases.reassemble(pieces for _, pieces in results), expected, GRADIENTS)


def _shape(case: Combination) -> tuple[int, int]:
    """Layers and heads of the model that ``cases.config`` makes for a layout."""
    model = cases.config(dp=case[0], pp=case[1], tp=case[2]).model
    return model.layers, model.heads


def _by_layout(chosen: list[Combination]) -> dict[tuple[int, int, int], list[Combination]]:
    groups: dict[tuple[int, int, int], list[Combination]] = {}
    for case in chosen:
        groups.setdefault(case[:3], []).append(case)
    return groups


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_gradients_equal_one_process(size: int) -> None:
    """Every layout, each with a seeded sample of micro-batch size, schedule and separated documents."""
    chosen = [
        case
        for layout, group in _by_layout(combinations(size)).items()
        for case in random.Random(str(layout)).sample(group, min(3, len(group)))
    ]
    check(size, chosen)


@pytest.mark.long
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_gradients_equal_one_process_in_all_combinations(size: int) -> None:
    check(size, combinations(size))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_weights_after_twenty_steps_equal_one_process(size: int) -> None:
    """Every layout; schedule and micro-batch size drawn with a seed."""
    chosen = [
        random.Random(str(layout)).choice([case for case in group if not case[5]])
        for layout, group in _by_layout(combinations(size)).items()
    ]
    settings = [
        (cases.config(dp=dp, pp=pp, tp=tp, micro_batch=micro, schedule=schedule, bucket_mb=0.05), 20)
        for dp, pp, tp, micro, schedule, _ in chosen
    ]
    for case, results in zip(chosen, run_cases(size, cases.some_steps, settings, timeout=600)):
        numbers, weights = _twenty_steps(*_shape(case))
        for found, _ in results:
            np.testing.assert_allclose(found, numbers, rtol=WEIGHTS)
        cases.assert_close(cases.reassemble(pieces for _, pieces in results), weights, WEIGHTS)


@functools.cache
def _twenty_steps(layers: int, heads: int) -> tuple[list[float], dict[str, np.ndarray]]:
    numbers, weights = cases.some_steps(0, 1, cases.config(dp=1, micro_batch=8, layers=layers, heads=heads), 20)
    return numbers, cases.reassemble([weights])


def test_grouped_queries_equal_one_process() -> None:
    one = cases.config(dp=1, micro_batch=8, key_value_heads=2)
    numbers, gradients = cases.one_pass(0, 1, one, False)
    settings = cases.config(dp=2, tp=2, micro_batch=2, key_value_heads=2)
    results = run_ranks(4, cases.one_pass, settings, False)
    np.testing.assert_allclose(results[0][0], numbers, rtol=GRADIENTS)
    cases.assert_close(cases.reassemble(p for _, p in results), cases.reassemble([gradients]), GRADIENTS)
