"""Contenders do the same work: equal losses on equal weights step after step, equal parameters, equal FLOPs."""

from __future__ import annotations

import importlib.metadata
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megapoly.bench import run_megapoly
from megapoly.bench.task import Task, make_config
from megapoly.config import Config
from megapoly.context import ParallelContext
from megapoly.engine import Engine
from megapoly.layers.call import spec_of
from megapoly.models.cost import parameter_count
from tests.ranks import run_ranks

CONFIG = make_config(layers=3, hidden=32, heads=4, sequence=24, vocabulary=83, micro_batch=4, global_batch=4)
CPU = torch.device("cpu")
STEPS = 4


def _has(distribution: str) -> bool:
    try:
        return bool(importlib.metadata.version(distribution))
    except importlib.metadata.PackageNotFoundError:
        return False


def logical_weights(config: Config) -> dict[str, Tensor]:
    """By logical name: unlike in every element, so that no wrong order or transposition goes unnoticed."""
    engine = Engine(config, ParallelContext.create(config.mesh))
    generator = torch.Generator().manual_seed(0)
    shapes = {spec_of(p).name: spec_of(p).shape for p in engine.buffers.parameters}
    return {
        name: torch.randn(shape, generator=generator) * 0.2 + name.endswith("norm.weight")
        for name, shape in sorted(shapes.items())
    }


def fill(parameters: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    assert parameters.keys() == values.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name].reshape(parameter.shape))


def by_names(values: dict[str, Tensor], whole: dict[str, str], layer: str, parts: dict[str, str]) -> dict[str, Tensor]:
    """``values`` under a peer's names: ``whole`` and, in layers that are called ``layer``, ``parts``."""
    result = {}
    for name, value in values.items():
        if name.startswith("layers."):
            _, number, part = name.split(".", 2)
            module, kind = part.rsplit(".", 1)
            result[f"{layer}.{number}.{parts[module]}.{kind}"] = value
        else:
            module, kind = name.rsplit(".", 1)
            result[f"{whole[module]}.{kind}"] = value
    return result


def as_transformers(values: dict[str, Tensor]) -> dict[str, Tensor]:
    named = by_names(
        values,
        {"embedding": "transformer.wte", "positions": "transformer.wpe", "final_norm": "transformer.ln_f"},
        "transformer.h",
        {
            "attention_norm": "ln_1", "attention.qkv": "attn.c_attn", "attention.output": "attn.c_proj",
            "feedforward_norm": "ln_2", "feedforward.up": "mlp.c_fc", "feedforward.down": "mlp.c_proj",
        },
    )  # fmt: skip
    for name, value in named.items():
        if "c_attn" in name:  # [heads, 3, D, ...] -> [3, heads, D, ...]
            value = value.transpose(0, 1)
        if ".c_" in name and name.endswith("weight"):  # [inputs, outputs]
            value = value.reshape(-1, value.shape[-1]).t()
        named[name] = value
    return named


def as_megatron(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return by_names(
        values,
        {
            "embedding": "embedding.word_embeddings", "positions": "embedding.position_embeddings",
            "final_norm": "decoder.final_layernorm",
        },
        "decoder.layers",
        {
            "attention_norm": "input_layernorm", "attention.qkv": "self_attention.linear_qkv",
            "attention.output": "self_attention.linear_proj", "feedforward_norm": "pre_mlp_layernorm",
            "feedforward.up": "mlp.linear_fc1", "feedforward.down": "mlp.linear_fc2",
        },
    )  # fmt: skip


def in_place_product(out: Any, left: Any, right: Any, **_: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def onednn_product(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * weight[0]


# FLOPs by shapes of products that torch's counter does not know.
FORMULAS = {torch.ops.aten.addmm_: in_place_product, torch.ops.mkldnn._linear_pointwise: onednn_product}


def measured(rank: int, size: int, name: str) -> dict[str, Any]:
    """Losses of some steps from the same weights, parameters, and FLOPs of the matrix products per token."""
    values = logical_weights(CONFIG)
    if name == "transformers":
        from megapoly.bench import run_transformers

        model = run_transformers.make_model(CONFIG.model)
        fill(dict(model.named_parameters()), as_transformers(values))
        work = run_transformers.make_work(model, CONFIG, CPU)
    elif name == "megatron-core":
        from megapoly.bench import run_megatron

        model = run_megatron.make_model(CONFIG.model, CPU, seed=1)
        fill(dict(model.named_parameters()), as_megatron(values))
        work = run_megatron.make_work(model, CONFIG, CPU)
    else:
        engine = Engine(CONFIG, ParallelContext.create(CONFIG.mesh))
        fill({spec_of(p).name: p for p in engine.buffers.parameters}, values)
        work = run_megapoly.make_work(engine)
    losses = [work.step() for _ in range(STEPS)]
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        work.step()
    counts = {str(op).split(".")[-1]: n for op, n in counter.get_flop_counts()["Global"].items()}
    products = sum(counts.get(op, 0) for op in ("mm", "addmm", "addmm_", "_linear_pointwise"))
    return {"losses": losses, "parameters": work.parameters, "products": products / CONFIG.step_tokens}


@pytest.fixture(scope="module")
def ours() -> dict[str, Any]:
    return run_ranks(1, measured, "megapoly")[0]


def test_megapolys_work_is_the_formulas(ours):
    model = CONFIG.model
    matrices = model.layers * 12 * model.hidden**2 + model.vocabulary * model.hidden
    assert ours["products"] == 6 * matrices
    assert ours["parameters"] == parameter_count(model)
    assert ours["losses"][-1] < ours["losses"][0] - 0.01


@pytest.mark.parametrize("peer", ["transformers", "megatron-core"])
def test_a_peer_does_the_same_work(peer, ours):
    if not _has(peer):
        pytest.skip(f"{peer} is not installed")
    theirs = run_ranks(1, measured, peer)[0]
    assert theirs["parameters"] == ours["parameters"]
    assert theirs["products"] == ours["products"]
    assert theirs["losses"] == pytest.approx(ours["losses"], rel=3e-6)


def test_every_layout_sees_the_same_rows_and_takes_the_same_steps():
    size = {
        "layers": 3,
        "hidden": 32,
        "heads": 4,
        "sequence": 24,
        "vocabulary": 83,
        "micro_batch": 2,
        "global_batch": 8,
    }
    alone = run_ranks(1, losses_of, size)[0]
    assert math.isfinite(alone[-1])
    for axis in ("dp", "tp", "pp"):
        for losses in run_ranks(2, losses_of, size | {axis: 2}):
            assert losses == pytest.approx(alone, rel=3e-6), axis


def losses_of(rank: int, size: int, settings: dict[str, Any]) -> list[float]:
    config = make_config(**settings)
    engine = Engine(config, ParallelContext.create(config.mesh))
    engine.initialise()
    work = run_megapoly.make_work(engine)
    return [work.step() for _ in range(STEPS)]


def test_the_config_survives_its_way_to_a_process():
    task = Task(CONFIG.document(), threads=3, rank=1, store="x")
    assert Task.of(task.text()) == task
    assert Task.of(task.text()).config == CONFIG
