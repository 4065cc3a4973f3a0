"""The loss in chunks of tokens, under layouts and schedules, against one process that holds all logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megapoly.models import decoder
from tests.parity import cases
from tests.ranks import run_ranks

STEPS = 3
LAYOUTS: dict[int, list[dict[str, Any]]] = {
    1: [{}, {"family": "llama"}],
    2: [
        {"tp": 2},
        {"tp": 2, "sequence_parallel": False, "micro_batch": 4},
        {"pp": 2, "schedule": "zero-bubble", "micro_batch": 2},
    ],
    4: [{"pp": 2, "tp": 2, "schedule": "zero-bubble-v", "family": "llama"}, {"dp": 2, "tp": 2, "micro_batch": 2}],
}


def in_chunks(rank: int, size: int, given: list[dict[str, Any]]) -> list[Any]:
    decoder.in_chunks = lambda *sizes: True
    return [cases.some_steps(rank, size, cases.config(**dict(each)), STEPS) for each in given]


@pytest.mark.parametrize("size", LAYOUTS)
def test_steps_equal_those_with_all_logits(size: int) -> None:
    ranks = run_ranks(size, in_chunks, LAYOUTS[size], timeout=200)
    for number, given in enumerate(LAYOUTS[size]):
        model = {key: value for key, value in given.items() if key in cases.MODEL}
        expected, weights = cases.some_steps(0, 1, cases.config(dp=1, **model), STEPS)
        whole = cases.reassemble([weights])
        for found, _ in (each[number] for each in ranks):
            np.testing.assert_allclose(found, expected, rtol=1e-9, err_msg=str(given))
        for name, values in cases.reassemble([each[number][1] for each in ranks]).items():
            error = np.abs(values - whole[name]).max() / np.abs(whole[name]).max()
            assert error <= 1e-9, f"{given}: {name} {error}"
