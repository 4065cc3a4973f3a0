"""Predicted memory against a measured step, by component, and against closed formulas for the large models."""

from __future__ import annotations

from typing import Any

import pytest

from megapoly.config import Config, load
from megapoly.context import ParallelContext
from megapoly.models.cost import parameter_count, stage_layers
from megapoly.pipeline.schedule import build
from megapoly.plan.activations import CHUNK_BYTES, PRODUCT_BYTES, UPDATED, Live, StageMemory
from megapoly.plan.measure import measure
from megapoly.plan.memory import COMPONENTS, Usage, predict, walk
from megapoly_kernels.adamw import _CHUNK
from megapoly_kernels.linear_cross_entropy_chunks import _LOGITS, _PRODUCT
from tests.plan.cases import config
from tests.ranks import run_cases

KINDS = ("forward", "backward", "backward input", "backward weight")
CASES: dict[int, list[dict[str, Any]]] = {
    1: [
        {},
        {"recompute": "selective", "precision": "bf16", "micro_batch": 2},
        {"recompute": "full", "recompute_every": 2, "fp32_residual": False, "precision": "bf16"},
        {"dropout": 0.1, "key_value_heads": 2, "micro_batch": 2, "recompute": "full"},
        {"attention_dropout": 0.1, "documents": True, "precision": "fp64"},
        {"fp32_softmax": False, "precision": "bf16", "documents": True},
        {"family": "llama", "key_value_heads": 2},
        {"family": "qwen", "precision": "bf16", "recompute": "selective", "documents": True},
        {"family": "bloom", "micro_batch": 2},
        {"family": "bloom", "precision": "bf16", "recompute": "full", "documents": True, "micro_batch": 2},
        {"family": "bloom", "attention_dropout": 0.1, "dropout": 0.1},
        {"vocabulary": 120_000, "micro_batch": 4},
    ],
    2: [
        {"pp": 2, "schedule": "1f1b", "dropout": 0.1},
        {"pp": 2, "schedule": "gpipe", "recompute": "selective"},
        {"pp": 2, "schedule": "interleaved", "recompute": "full"},
        {"pp": 2, "schedule": "zero-bubble", "precision": "bf16"},
        {"pp": 2, "schedule": "zero-bubble-v", "recompute": "full"},
        {"tp": 2, "precision": "bf16"},
        {"tp": 2, "sequence_parallel": False, "micro_batch": 2},
        {"dp": 2, "precision": "bf16"},
        {"dp": 2, "shard_optimizer": False, "recompute": "selective"},
        {"pp": 2, "family": "llama", "schedule": "zero-bubble"},
        {"pp": 2, "family": "bloom", "schedule": "interleaved"},
        {"tp": 2, "family": "llama", "precision": "bf16"},
        {"pp": 2, "schedule": "zero-bubble", "vocabulary": 120_000, "micro_batch": 4, "stage_layers": [2, 2]},
    ],
    4: [
        {"pp": 2, "tp": 2, "schedule": "zero-bubble", "recompute": "selective", "dropout": 0.1},
        {"pp": 2, "dp": 2, "schedule": "interleaved", "precision": "bf16", "documents": True},
        {"pp": 4, "schedule": "1f1b", "stage_layers": [1, 1, 2, 0], "global_batch": 6},
    ],
}


def step(rank: int, size: int, settings: Config) -> tuple[int, Usage]:
    context = ParallelContext.create(settings.mesh)
    usage = measure(settings, context)
    context.close()
    return context.pp.rank, usage


@pytest.mark.parametrize("size", CASES)
def test_a_measured_step_is_as_predicted(size: int) -> None:
    settings = [config(**case).on(size) for case in CASES[size]]
    for case, each, ranks in zip(CASES[size], settings, run_cases(size, step, [(each,) for each in settings])):
        predicted = predict(each, "cpu")
        for at, found in ranks:
            for name in {*COMPONENTS, "total"} - {"workspace"}:
                expected = getattr(predicted[at], name)
                assert getattr(found, name) == pytest.approx(expected, rel=0.1), f"{case}, rank {at}: {name}"


@pytest.mark.parametrize("family", ["polylm", "bloom"])
def test_a_gpu_has_no_masks_and_biases(family: str) -> None:
    """The attention's kernel finds documents by their ends; with dropout on its probabilities it is not there."""

    def activations(documents: bool, **more: Any) -> int:
        settings = config(family=family, documents=documents, precision="bf16", **more).on(1)
        return predict(settings, "cuda")[0].activations

    assert activations(True) == activations(False)
    assert activations(True, attention_dropout=0.1) > activations(False)


def test_chunks_are_those_of_the_kernels() -> None:
    for device, most in CHUNK_BYTES.items():
        assert _LOGITS[device] == most
    assert _PRODUCT == PRODUCT_BYTES
    assert _CHUNK == UPDATED


def polylm(name: str, ranks: int, *overrides: str) -> Config:
    return load(f"examples/polylm/{name}.toml", overrides).on(ranks)


def test_state_of_one_rank_is_eighteen_bytes_a_parameter() -> None:
    settings = polylm("1.7b", 1, "layout.tp=1", "layout.micro_batch=1")
    (usage,) = predict(settings)
    count = parameter_count(settings.model)
    assert (usage.weights, usage.gradients, usage.optimizer) == (2 * count, 4 * count, 12 * count)


@pytest.mark.parametrize("shard", [True, False])
def test_optimizer_state_is_shared_by_dp(shard: bool) -> None:
    """Rajbhandari et al., figure 1: with K = 12 a parameter, K / dp of it remains."""
    alone, shared = (
        predict(polylm("13b", 8 * dp, f"layout.shard_optimizer={str(shard).lower()}"))[0] for dp in (1, 16)
    )
    assert shared.optimizer == alone.optimizer // (16 if shard else 1)
    assert (shared.weights, shared.gradients) == (alone.weights, alone.gradients)


def test_a_layer_keeps_what_the_literature_says() -> None:
    """Korthikanti et al. (arXiv 2205.05198), equations 2 and 4, for a residual stream in the parameters' dtype.

    34 s b h bytes of a layer under tp = 1 without the attention's core, of which dropout masks are 2, which
    are made again here. The results of the two blocks are not kept, and flash attention keeps its output, which is the
    input of the output layer.
    """
    sets = ["layout.tp=1", "layout.micro_batch=1", "model.fp32_residual=false", "model.dropout=0.1"]
    sets.append("layout.recompute='none'")
    sbh = 2048 * 2048
    by_layers = [predict(polylm("1.7b", 1, *sets, f"model.layers={layers}"))[0].activations for layers in (2, 12)]
    a_layer = (by_layers[1] - by_layers[0]) / 10
    statistics = 2 * 2 * 4 * 2048 + 16 * 4 * 2048  # of two norms, and the log-sum-exp of 16 heads
    assert a_layer - statistics == 32 * sbh


def test_gpipe_keeps_every_micro_batch_and_1f1b_as_many_as_stages_follow() -> None:
    nothing = {kind: [] for kind in KINDS}
    stages = {i: StageMemory(Live(1000), Live(), nothing) for i in range(4)}
    for name, expected in (("gpipe", [16, 16, 16, 16]), ("1f1b", [4, 3, 2, 1])):
        schedule = build(name, 4, 16)
        peaks = [max(live.activations for live in walk(schedule, rank, stages, 0)) for rank in range(4)]
        assert peaks == [1000 * n for n in expected]


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zero-bubble", "zero-bubble-v"])
def test_peaks_stop_growing_with_micro_batches(schedule: str) -> None:
    """More than a few micro-batches are not walked through: twice as many give the same."""
    sets = ["layout.tp=1", "layout.pp=4", "layout.micro_batch=1", f"layout.schedule={schedule!r}"]
    few, many = (predict(polylm("1.7b", 4, *sets, f"train.global_batch={n}"), "cpu") for n in (16, 512))
    losses = (512 - 16) * 2048 * 4  # every token's loss stays until the end, where the last stage is
    for rank, (a, b) in enumerate(zip(few, many)):
        last = rank == (0 if schedule == "zero-bubble-v" else 3)
        assert b.activations - a.activations == (losses if last else 0)


def test_every_layer_is_somewhere() -> None:
    settings = polylm("13b", 32, "layout.pp=4")
    ends = [(b, e) for b, e in stage_layers(settings)]
    assert (ends[0][0], ends[-1][1]) == (0, 40)
    # Matrices are split over tp; norms, positions and biases of row-parallel layers are whole on its 8 ranks.
    whole = 40 * 6 * 5120 + 2048 * 5120 + 2 * 5120
    copy = 256000 * 5120  # of the tied embedding, on the last stage
    count = parameter_count(settings.model) + copy + 7 * whole
    assert sum(usage.weights for usage in predict(settings)) * 8 == pytest.approx(2 * count, rel=1e-9)
