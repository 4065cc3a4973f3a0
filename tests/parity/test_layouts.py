"""The same loss, gradients and weights under every layout and option, in float64, against one process.

The matrix: every factorisation of 1, 2, 4 and 8 ranks into dp x pp x tp, with every combination of micro-batch size,
schedule, sequence parallelism, sharded optimizer and recomputation that it allows; dropout, uneven stages and separated
documents are drawn with a seed in each. CI runs a sample in which every value of every option comes with every layout.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.parity import cases
from tests.ranks import run_cases

GRADIENTS, WEIGHTS, STEPS = 1e-10, 1e-9, 10
SIZES = (1, 2, 4, 8)
Shape = tuple[tuple[str, Any], ...]  # of a model: keys of cases.config, with their values

# Values of every option; layouts restrict some of them.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "micro_batch": (1, 2, 4, 8),
    "schedule": ("gpipe", "1f1b", "interleaved", "zero-bubble", "zero-bubble-v"),
    "sequence_parallel": (True, False),
    "shard_optimizer": (True, False),
    "recompute": (("none", 1), ("selective", 1), ("full", 1), ("full", 3)),
    "dropout": (0.0, 0.2),
    "stage_layers": ("balanced", "uneven"),
    "documents": (False, True),
}


DRAWN = ("dropout", "stage_layers", "documents")


def layouts(size: int) -> list[tuple[int, int, int]]:
    """Every (dp, pp, tp) of ``size`` ranks."""
    return [(dp, pp, tp) for dp in SIZES for pp in SIZES for tp in SIZES if dp * pp * tp == size]


def allowed(dp: int, pp: int, tp: int) -> dict[str, tuple[Any, ...]]:
    """The options that mean something under a layout."""
    most = cases.BATCH // dp
    schedules = OPTIONS["schedule"] if pp > 1 else ("1f1b",)
    if pp == 8:  # 16 stages are more than the layers
        schedules = tuple(name for name in schedules if name not in ("interleaved", "zero-bubble-v"))
    return {
        **OPTIONS,
        "micro_batch": tuple(n for n in OPTIONS["micro_batch"] if n <= most),
        "schedule": schedules,
        "sequence_parallel": OPTIONS["sequence_parallel"] if tp > 1 else (True,),
        "shard_optimizer": OPTIONS["shard_optimizer"] if dp > 1 else (True,),
        "stage_layers": OPTIONS["stage_layers"] if pp > 1 else ("balanced",),
    }


def combinations(size: int) -> Iterator[dict[str, Any]]:
    for dp, pp, tp in layouts(size):
        options = allowed(dp, pp, tp)
        drawn = {key: options.pop(key) for key in DRAWN}
        for values in itertools.product(*options.values()):
            case = {"dp": dp, "pp": pp, "tp": tp, **dict(zip(options, values))}
            pick = random.Random(str(case))
            case |= {key: pick.choice(choices) for key, choices in drawn.items()}
            microbatches = cases.BATCH // (dp * case["micro_batch"])
            if case["schedule"] != "interleaved" or microbatches % pp == 0:
                yield case


def sample(size: int) -> list[dict[str, Any]]:
    """A few of the combinations of every layout, drawn with a seed, that together have every value of every option."""
    chosen = []
    for layout in layouts(size):
        group = [case for case in combinations(size) if (case["dp"], case["pp"], case["tp"]) == layout]
        random.Random(str(layout)).shuffle(group)
        wanted = {(key, case[key]) for case in group for key in OPTIONS}
        while wanted:
            best = max(group, key=lambda case: len(wanted & set(case.items())))
            wanted -= set(best.items())
            chosen.append(best)
    return chosen


def settings(case: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Keys of ``cases.config`` and whether documents are separated."""
    keys = dict(case)
    keys["recompute"], keys["recompute_every"] = keys["recompute"]
    keys["attention_dropout"] = keys["dropout"] / 2
    stages = keys["pp"] * (2 if keys["schedule"] in ("interleaved", "zero-bubble-v") else 1)
    keys["layers"] = layers = 9 if stages == 8 else 5  # one more than the most stages: balanced ones are unequal, too
    if keys.pop("stage_layers") == "uneven":  # the ends hold as little as may be, the first but one the rest
        rest = layers - stages + 3
        keys["stage_layers"] = (layers - 1, 1) if stages == 2 else (0, rest, *(1,) * (stages - 3), 0)
    documents = keys.pop("documents")
    return {**keys, "bucket_mb": 0.05}, documents


def shape_of(keys: dict[str, Any]) -> Shape:
    """What of the keys of ``cases.config`` is the model's."""
    return tuple((key, keys[key]) for key in cases.MODEL if key in keys)


@functools.cache
def one_process(shape: Shape, documents: bool) -> tuple[list[float], dict[str, np.ndarray]]:
    numbers, gradients = cases.one_pass(0, 1, cases.config(dp=1, micro_batch=8, **dict(shape)), documents)
    return numbers, cases.reassemble([gradients])


def check(size: int, chosen: list[dict[str, Any]], shape: Shape = ()) -> None:
    """Every combination gives what one process does; ``shape`` has further keys of ``cases.config``."""
    keys = [({**keys, **dict(shape)}, documents) for keys, documents in map(settings, chosen)]
    runs = [(cases.config(**each), documents) for each, documents in keys]
    for case, (each, documents), results in zip(chosen, keys, run_cases(size, cases.one_pass, runs, timeout=3000)):
        numbers, expected = one_process(shape_of(each), documents)
        for found, _ in results:
            np.testing.assert_allclose(found, numbers, rtol=GRADIENTS, err_msg=str(case))
        try:
            cases.assert_close(cases.reassemble(pieces for _, pieces in results), expected, GRADIENTS)
        except AssertionError as error:
            raise AssertionError(f"in {case}") from error


@pytest.mark.parametrize("size", SIZES)
def test_gradients_equal_one_process(size: int) -> None:
    check(size, sample(size))


@pytest.mark.long
@pytest.mark.parametrize("size", SIZES)
def test_gradients_equal_one_process_in_all_combinations(size: int) -> None:
    check(size, list(combinations(size)))


@pytest.mark.parametrize("size", SIZES)
def test_weights_after_ten_steps_equal_one_process(size: int) -> None:
    """Of the ten layouts of 8 ranks the one that splits all three axes."""
    check_ten_steps(size, [(2, 2, 2)] if size == 8 else layouts(size))


@pytest.mark.long
def test_weights_after_ten_steps_equal_one_process_under_all_layouts_of_8() -> None:
    check_ten_steps(8, layouts(8))


def check_ten_steps(size: int, layouts: list[tuple[int, int, int]]) -> None:
    """The other options are drawn with a seed."""
    chosen = []
    for layout in layouts:
        group = [
            case
            for case in combinations(size)
            if (case["dp"], case["pp"], case["tp"]) == layout
            and not case["documents"]
            and cases.BATCH // (case["dp"] * case["micro_batch"]) <= 4  # few messages: these are many steps
        ]
        chosen.append(random.Random(f"steps {layout}").choice(group))
    keys = [keys for keys, _ in map(settings, chosen)]
    runs = [(cases.config(**each), STEPS) for each in keys]
    for case, each, results in zip(chosen, keys, run_cases(size, cases.some_steps, runs, timeout=600)):
        numbers, weights = ten_steps(shape_of(each))
        for found, _ in results:
            np.testing.assert_allclose(found, numbers, rtol=WEIGHTS, err_msg=str(case))
        cases.assert_close(cases.reassemble(pieces for _, pieces in results), weights, WEIGHTS)


@functools.cache
def ten_steps(shape: Shape) -> tuple[list[float], dict[str, np.ndarray]]:
    numbers, weights = cases.some_steps(0, 1, cases.config(dp=1, micro_batch=8, **dict(shape)), STEPS)
    return numbers, cases.reassemble([weights])


def test_grouped_queries_equal_one_process() -> None:
    for dropout in (0.0, 0.1):  # the fused attention, and the one that drops probabilities
        keys = {"heads": 4, "key_value_heads": 2, "attention_dropout": dropout}
        numbers, gradients = cases.one_pass(0, 1, cases.config(dp=1, micro_batch=8, **keys), False)
        layout = cases.config(dp=2, tp=2, micro_batch=2, **keys)
        (results,) = run_cases(4, cases.one_pass, [(layout, False)])
        np.testing.assert_allclose(results[0][0], numbers, rtol=GRADIENTS)
        cases.assert_close(cases.reassemble(p for _, p in results), cases.reassemble([gradients]), GRADIENTS)


def test_the_matrix_has_the_size_that_the_readme_states() -> None:
    assert sum(len(sample(size)) for size in SIZES) == 89
    assert sum(1 for size in SIZES for _ in combinations(size)) == 1444
