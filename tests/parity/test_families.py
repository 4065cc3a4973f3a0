"""LLaMA, Qwen2 and BLOOM under the layouts and options of 1, 2 and 4 ranks against one process, in float64.

The matrix is that of test_layouts.py. LLaMA has rotary angles with scaling, SwiGLU, RMSNorm, grouped queries, no biases
and an output weight of its own; Qwen2 biases of qkv and a tied one; BLOOM linear biases and a norm on the embeddings.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.parity import cases
from tests.parity.test_layouts import OPTIONS, Shape, check, combinations, layouts, one_process

SIZES = (1, 2, 4)
SHAPES: dict[str, Shape] = {
    "llama": (("family", "llama"), ("heads", 8), ("key_value_heads", 4)),
    "qwen": (("family", "qwen"), ("heads", 4), ("key_value_heads", 4)),
    "bloom": (("family", "bloom"), ("heads", 8)),
}
# The parts of Qwen2 that are not LLaMA's differ under two ranks already.
SAMPLED = (("llama", 1), ("llama", 2), ("llama", 4), ("qwen", 2), ("bloom", 2), ("bloom", 4))


def sample(family: str, size: int) -> list[dict[str, Any]]:
    """One combination of every layout, drawn with a seed; few micro-batches, since these are many messages."""
    chosen = []
    for layout in layouts(size):
        group = [
            case
            for case in combinations(size)
            if (case["dp"], case["pp"], case["tp"]) == layout and cases.BATCH // (case["dp"] * case["micro_batch"]) <= 4
        ]
        chosen.append(random.Random(f"0 {family} {layout}").choice(group))
    return chosen


@pytest.mark.parametrize(("family", "size"), SAMPLED)
def test_gradients_equal_one_process(family: str, size: int) -> None:
    check(size, sample(family, size), SHAPES[family])


@pytest.mark.long
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", SHAPES)
def test_gradients_equal_one_process_in_all_combinations(family: str, size: int) -> None:
    check(size, list(combinations(size)), SHAPES[family])


def test_the_sample_has_every_value_of_every_option() -> None:
    chosen = [case for family, size in SAMPLED for case in sample(family, size)]
    for key, values in OPTIONS.items():
        assert key == "micro_batch" or set(values) == {case[key] for case in chosen}, key


def test_families_differ() -> None:
    """Each has its own parts, by name, and its own loss."""
    losses = {family: one_process(shape, False)[0][2] for family, shape in SHAPES.items()}
    assert len({round(loss, 6) for loss in losses.values()}) == len(SHAPES)
    names = {family: one_process(shape, False)[1].keys() for family, shape in SHAPES.items()}
    assert {"output.weight", "layers.0.feedforward.gate_up.weight"} <= names["llama"]
    assert not any(name.endswith("bias") for name in names["llama"])
    assert {name.split(".", 2)[2] for name in names["qwen"] if name.endswith("bias")} == {"attention.qkv.bias"}
    assert "embedding_norm.bias" in names["bloom"]
    assert not any("positions" in name for each in names.values() for name in each)
