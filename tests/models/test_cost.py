"""Counts against the model itself and against the paper; stages against all splits there are."""

from __future__ import annotations

import itertools
import math

import pytest

from megapoly.checkpoint.state import logical_shapes
from megapoly.config import Config, Layout, Model, Train
from megapoly.models import cost
from megapoly.pipeline import schedule

POLYLM_1_7B = Model(layers=24, hidden=2048, heads=16, ffn=8192, vocabulary=256000, positions=2048)
POLYLM_13B = Model(layers=40, hidden=5120, heads=40, ffn=20480, vocabulary=256000, positions=2048)
SMALL = Model(layers=3, hidden=24, heads=4, ffn=52, vocabulary=61, positions=32)
GROUPED = Model(layers=2, hidden=24, heads=4, key_value_heads=2, ffn=50, vocabulary=61, positions=32)
BLOOM = SMALL.model_copy(update={"position": "alibi", "embedding_norm": True})
_ROTARY = {"norm": "rms", "position": "rope", "activation": "swiglu", "biases": False}
LLAMA = GROUPED.model_copy(update={**_ROTARY, "tied": False})
QWEN = GROUPED.model_copy(update={**_ROTARY, "qkv_biases": True})
# The published sizes: LLaMA 2 7B, LLaMA 3.1 8B, Qwen2 0.5B, BLOOM 7.1B.
PUBLISHED = {
    6_738_415_616: Model(
        layers=32, hidden=4096, heads=32, ffn=11008, vocabulary=32000, positions=4096, **_ROTARY, tied=False
    ),
    8_030_261_248: Model(
        layers=32, hidden=4096, heads=32, key_value_heads=8, ffn=14336, vocabulary=128256, positions=131072,
        **_ROTARY, tied=False,
    ),
    494_032_768: Model(
        layers=24, hidden=896, heads=14, key_value_heads=2, ffn=4864, vocabulary=151936, positions=32768,
        **_ROTARY, qkv_biases=True,
    ),
    7_069_016_064: Model(
        layers=30, hidden=4096, heads=32, ffn=16384, vocabulary=250880, positions=2048, position="alibi",
        embedding_norm=True,
    ),
}  # fmt: skip


def config_of(model: Model, sequence: int = 2048, **layout: object) -> Config:
    return Config.model_construct(
        model=model, layout=Layout(**layout), train=Train(directory=".", sequence=sequence, global_batch=8)
    )


@pytest.mark.parametrize("model", [SMALL, GROUPED, BLOOM, LLAMA, QWEN])
def test_parameter_count_is_that_of_the_modules(model: Model) -> None:
    assert cost.parameter_count(model) == sum(math.prod(shape) for shape in logical_shapes(model).values())


@pytest.mark.parametrize("count", PUBLISHED)
def test_published_counts(count: int) -> None:
    assert cost.parameter_count(PUBLISHED[count]) == count


def test_polylm_counts() -> None:
    assert cost.parameter_count(POLYLM_1_7B) == 1_737_084_928
    assert cost.parameter_count(POLYLM_13B) == pytest.approx(13.907e9, rel=1e-4)
    # The paper's 13B at 1170 tokens/s on an A100 of 312 TFLOP/s: 31 % by 6 N alone.
    attention = 12 * 40 * 5120 * 2048
    assert 1170 * (cost.flops_per_token(POLYLM_13B, 2048) - attention) / 312e12 == pytest.approx(0.313, abs=0.002)


def is_vector(name: str) -> bool:
    return name.endswith("bias") or "norm" in name


@pytest.mark.parametrize("model", [SMALL, GROUPED, BLOOM, LLAMA, QWEN, POLYLM_1_7B, POLYLM_13B])
def test_layers_and_output_cost_a_third_of_both_passes(model: Model) -> None:
    """All but biases and norms, which the formula of both passes counts like matrices."""
    sequence = 32
    parts = model.layers * cost.layer_flops(model, sequence) + cost.output_flops(model)
    vectors = sum(math.prod(shape) for name, shape in logical_shapes(model).items() if is_vector(name))
    assert 3 * parts + 6 * vectors == cost.flops_per_token(model, sequence)


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zero-bubble-v"])
@pytest.mark.parametrize("pp", [2, 3])
@pytest.mark.parametrize("vocabulary", [1, 1500, 6000, 60000])
def test_no_split_is_better(name: str, pp: int, vocabulary: int) -> None:
    """Largest rank, then evenness of the ranks, then of the stages: the best of every split of 9 layers."""
    model = Model(layers=9, hidden=240, heads=4, ffn=480, vocabulary=vocabulary, positions=64)
    config = config_of(model, 64, pp=pp, schedule=name)
    stages, rank_of = config.layout.stages, schedule.build(name, pp, 6).placement

    def badness(counts: tuple[int, ...]) -> tuple[int, int, int]:
        costs = cost.stage_flops(model, 64, counts)
        ranks = [0] * pp
        for stage, each in enumerate(costs):
            ranks[rank_of[stage]] += each
        return max(ranks), sum(each**2 for each in ranks), sum(each**2 for each in costs)

    splits = [
        counts
        for counts in itertools.product(range(model.layers + 1), repeat=stages)
        if sum(counts) == model.layers and 0 not in counts[1:-1]
    ]
    spans = cost.stage_layers(config)
    counts = tuple(end - begin for begin, end in spans)
    assert [begin for begin, _ in spans] == [0, *(end for _, end in spans[:-1])]
    assert counts in splits
    assert badness(counts) == min(map(badness, splits))


@pytest.mark.parametrize(
    ("model", "layout", "expected"),
    [
        # The output of a 256K vocabulary weighs as much as 8.9 layers of the 1.7B: it fills a stage of its own.
        (POLYLM_1_7B, {"pp": 1}, [24]),
        (POLYLM_1_7B, {"pp": 2}, [16, 8]),
        (POLYLM_1_7B, {"pp": 4}, [8, 8, 8, 0]),
        (POLYLM_1_7B, {"pp": 8}, [3, 3, 3, 3, 4, 4, 4, 0]),
        (POLYLM_1_7B, {"pp": 4, "schedule": "interleaved"}, [3, 4, 4, 1, 4, 4, 4, 0]),
        (POLYLM_1_7B, {"pp": 4, "schedule": "zero-bubble-v"}, [0, 4, 4, 4, 4, 4, 4, 0]),
        (POLYLM_13B, {"pp": 4}, [11, 11, 11, 7]),  # 3.9 layers
        (POLYLM_13B, {"pp": 8}, [5, 5, 5, 5, 6, 6, 6, 2]),
        (POLYLM_13B, {"pp": 2, "stage_layers": (30, 10)}, [30, 10]),
    ],
)
def test_polylm_stages(model: Model, layout: dict[str, object], expected: list[int]) -> None:
    spans = cost.stage_layers(config_of(model, **layout))
    assert [end - begin for begin, end in spans] == expected
