"""A tiny model in float64, its batches, and the gathering of what the ranks of a layout hold into logical tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from megapoly.config import Config, parse
from megapoly.context import ParallelContext
from megapoly.data.samples import Batch
from megapoly.engine import Engine
from megapoly.layers.call import spec_of
from megapoly.spec import Piece

SEQUENCE, BATCH, VOCABULARY = 16, 8, 53  # a prime: no tp divides it, and tp 8 leaves a rank with padding only


MODEL = ("layers", "heads", "key_value_heads", "dropout", "attention_dropout", "family")
LLAMA = {
    "norm": "rms", "position": "rope", "activation": "swiglu", "biases": False, "tied": False, "positions": 64,
    "rope_scaling": {"kind": "llama3", "factor": 4.0, "original_positions": 16},
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "polylm": {},
    "llama": LLAMA,
    "qwen": {**LLAMA, "tied": True, "qkv_biases": True},
    "bloom": {"position": "alibi", "embedding_norm": True},
}


def config(**layout: Any) -> Config:
    """A run of two sources; keys of ``MODEL`` go to the model, the rest to the layout. ``family`` is of FAMILIES."""
    step = SEQUENCE * BATCH
    heads = layout.get("heads", 8)
    model = {key: layout.pop(key) for key in MODEL if key in layout}
    model |= FAMILIES[model.pop("family", "polylm")]
    return parse(
        {
            "model": {
                "layers": 9, "hidden": 32, "heads": heads, "ffn": 56, "vocabulary": VOCABULARY, "positions": 16,
                "init_std": 0.2, **model,
            },
            "layout": layout,
            "data": {
                "tokenizer": "none",
                "sources": {"a": {"path": "a", "language": "en"}, "b": {"path": "b", "language": "de"}},
                "stages": [{"name": "only", "tokens": 100 * step, "weights": {"a": 0.5, "b": 0.5}}],
            },
            "train": {"directory": "none", "sequence": SEQUENCE, "global_batch": BATCH, "precision": "fp64", "seed": 7},
            "optimizer": {"learning_rate": 0.01, "warmup_tokens": 3 * step, "weight_decay": 0.1, "clip": 0.5},
        }
    )  # fmt: skip


def global_batch(step: int, *, documents: bool = False) -> Batch:
    """Rows with uncounted labels, unevenly over the samples."""
    random = np.random.default_rng(step)
    tokens = torch.from_numpy(random.integers(0, VOCABULARY, (BATCH, SEQUENCE)))
    labels = torch.from_numpy(random.integers(0, VOCABULARY, (BATCH, SEQUENCE)))
    labels[0, :13] = -1
    labels[3] = -1
    numbers = torch.from_numpy(np.sort(random.integers(0, 4, (BATCH, SEQUENCE)), axis=1).astype(np.int32))
    starts = torch.cat((torch.ones(BATCH, 1, dtype=torch.bool), numbers[:, 1:] != numbers[:, :-1]), 1)
    steps = torch.arange(SEQUENCE).expand(BATCH, SEQUENCE)
    positions = steps - torch.where(starts, steps, 0).cummax(1).values if documents else steps.clone()
    source = torch.arange(BATCH, dtype=torch.int32) % 2
    ends = torch.cat((starts.flatten().nonzero().flatten(), torch.tensor([starts.numel()]))).to(torch.int32)
    return Batch(torch.arange(BATCH), source, tokens, labels, positions, ends if documents else None)


def mine(batch: Batch, engine: Engine) -> list[Batch]:
    dp, part = engine.context.dp, BATCH // engine.context.dp.size
    return batch.rows(dp.rank * part, (dp.rank + 1) * part).split(engine.config.layout.micro_batch)


def engine(size: int, settings: Config) -> Engine:
    settings = settings.on(size)
    built = Engine(settings, ParallelContext.create(settings.mesh))
    built.initialise()
    return built


Pieces = list[tuple[str, tuple[int, ...], Piece, np.ndarray]]


def pieces(built: Engine, of: str) -> Pieces:
    """What this rank holds of every tensor, tied copies too: all of its weights, the gradients of its shards."""
    built.buffers.settle()
    result: Pieces = []
    if of == "weight":
        for parameter in built.buffers.parameters:
            spec, values = spec_of(parameter), parameter.detach().flatten()
            assert not values[spec.box.size :].any(), f"padding of {spec.name} is not zero"
            result.append((spec.name, spec.shape, Piece.of(spec.box), values[: spec.box.size].numpy().copy()))
        return result
    for part in built.buffers.parts():
        bucket = built.buffers.buckets[part.bucket]
        values = bucket.gradients[bucket.mine][part.at]
        result.append((part.spec.name, part.spec.shape, part.piece, values.numpy().copy()))
    return result


def reassemble(ranks: Iterable[Pieces]) -> dict[str, np.ndarray]:
    """Logical tensors; copies of an element on several ranks have to be equal."""
    logical: dict[str, np.ndarray] = {}
    for rank in ranks:
        for name, shape, piece, values in rank:
            target = logical.setdefault(name, np.full(shape, np.nan)).reshape(-1)
            box = tuple(slice(a, b) for a, b in zip(piece.box.start, piece.box.stop))
            at = np.arange(target.size).reshape(shape)[box].reshape(-1)[piece.start : piece.stop]
            known = ~np.isnan(target[at])
            np.testing.assert_allclose(values[known], target[at[known]], rtol=1e-12, atol=1e-13, err_msg=name)
            target[at] = values
    assert not any(np.isnan(value).any() for value in logical.values()), "an element that no rank holds"
    return logical


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    """Relative to the largest value of each tensor."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(np.abs(value).max(), 1e-3)
        worst = np.abs(found[name] - value).max() / scale
        assert worst <= tolerance, f"{name}: differs by {worst:.2e} of its largest value"


def one_pass(rank: int, size: int, settings: Config, documents: bool) -> tuple[list[float], Pieces]:
    """Squared norms of gradients and parameters, loss sums and counted tokens; gradients."""
    built = engine(size, settings)
    head, sums = built.gradients(mine(global_batch(0, documents=documents), built), sources=2)
    built.context.close()
    return [float(head[0]), float(head[2]), *sums.flatten().tolist()], pieces(built, "gradient")


def some_steps(rank: int, size: int, settings: Config, steps: int) -> tuple[list[float], Pieces]:
    """Losses and gradient norms of ``steps`` optimizer steps; weights after them."""
    built = engine(size, settings)
    numbers: list[float] = []
    for step in range(steps):
        result = built.step(mine(global_batch(step), built), rate=0.01 * min(1, step / 3), sources=2)
        numbers += [result.loss, result.gradient_norm]
    built.context.close()
    return numbers, pieces(built, "weight")
