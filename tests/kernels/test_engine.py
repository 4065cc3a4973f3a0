"""A training step whose every op is a Triton kernel, run by the interpreter, against the step by the references."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megapoly.engine import Engine
from tests.kernels.rule import GPU, kernels, needs_triton
from tests.parity import cases

pytestmark = [needs_triton, pytest.mark.skipif(GPU, reason="the interpreter is for machines without a GPU")]
CASES: dict[str, dict[str, Any]] = {
    "polylm": {"dropout": 0.1},
    "llama": {"family": "llama", "heads": 4, "key_value_heads": 2},
    "bloom": {"family": "bloom", "heads": 4},
}


def steps(family: str, precision: str, documents: bool) -> tuple[list[float], list[torch.Tensor]]:
    settings = cases.config(layers=1, micro_batch=8, **CASES[family])
    train = settings.train.model_copy(update={"precision": precision})
    built: Engine = cases.engine(1, settings.model_copy(update={"train": train}))
    result = built.step(cases.mine(cases.global_batch(0, documents=documents), built), rate=0.01, sources=2)
    return [result.loss, result.gradient_norm], [bucket.values.clone() for bucket in built.buffers.buckets]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp64", 1e-12), ("fp32", 3e-5)])
@pytest.mark.parametrize("family", CASES)
def test_a_step_by_kernels_is_that_by_references(family: str, precision: str, tolerance: float) -> None:
    """In fp32 with documents, which the attention's kernel keeps apart; in float64 attention has no kernel."""
    documents = precision == "fp32"
    numbers, weights = steps(family, precision, documents)
    with kernels():
        by_kernels, their_weights = steps(family, precision, documents)
    assert by_kernels == pytest.approx(numbers, rel=tolerance)
    for mine, theirs in zip(weights, their_weights, strict=True):
        assert float((mine - theirs).abs().max()) <= 100 * tolerance * float(mine.abs().max())
