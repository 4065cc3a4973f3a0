"""A run's state as logical tensors: weights, optimizer and counters, written and read by any layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megapoly import comm
from megapoly.checkpoint import store
from megapoly.config import Config, Model
from megapoly.context import ParallelContext
from megapoly.data.plan import Plan
from megapoly.errors import CheckpointError, ConfigError
from megapoly.layers.call import Place, spec_of
from megapoly.models.decoder import DecoderStage
from megapoly.optim.adam import AdamW
from megapoly.spec import ParamSpec, Piece

WEIGHTS = "weights"
_SHARED_SIZE = 1 << 18  # elements from which on a tensor is shared out over dp


@dataclass(frozen=True)
class Counters:
    """Where a run stands; none of these is derived from another."""

    step: int = 0
    sample: int = 0
    tokens: int = 0


def logical_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Every logical parameter of the model with its shape."""
    stage = DecoderStage(model, place=Place(device=torch.device("meta")))
    return {spec_of(parameter).name: spec_of(parameter).shape for parameter in stage.parameters()}


def save(
    root: Path,
    config: Config,
    plan: Plan,
    counters: Counters,
    optimizer: AdamW,
    context: ParallelContext,
    *,
    tokenizer: str,
) -> Path:
    """Write a checkpoint together with all ranks and return its folder.

    Every owner's tensors are shared out over dp, so that all ranks write. ``tokenizer`` is its SHA-256.

    Raises:
        CheckpointError: on every rank, if any could not write; see :func:`megapoly.checkpoint.store.save`.
    """
    control = context.control
    meta = {
        "config": config.document(),
        "identity": config.identity(),
        "plan": plan.to_document(),
        "counters": asdict(counters),
        "optimizer_steps": optimizer.steps,
        "tokenizer": tokenizer,
        "layout": str(context.mesh),
    }
    return store.save(
        root,
        counters.step,
        _entries(optimizer, context),
        meta,
        rank=control.rank,
        size=control.size,
        gather=lambda value: comm.gather_objects(value, control),
        broadcast=lambda value: comm.broadcast_object(value, control),
        keep=config.checkpoint.keep,
    )


def load(reader: store.Reader, config: Config, optimizer: AdamW) -> Counters:
    """Fill weights and optimizer from a checkpoint of the same logical run, whatever its layout.

    Raises:
        ConfigError: the checkpoint's run is another one; lists every key that differs.
        CheckpointError: tensors that are missing, unexpected, misshapen or damaged.
    """
    check_identity(reader, config)
    kinds = {WEIGHTS, *(f"adam.{kind}" for kind in optimizer.states[0])}
    shapes = logical_shapes(config.model)
    reader.expect({f"{kind}/{name}": shape for kind in sorted(kinds) for name, shape in shapes.items()})
    for kind, spec, flat in _flat_tensors(optimizer):
        reader.read(f"{kind}/{spec.name}", Piece.of(spec.box), flat)
    optimizer.steps = reader.meta["optimizer_steps"]
    return Counters(**reader.meta["counters"])


def load_weights(reader: store.Reader, stage: DecoderStage) -> None:
    """Fill just the weights of ``stage``. Any layout, any precision."""
    for parameter in stage.parameters():
        spec = spec_of(parameter)
        with torch.no_grad():
            parameter.zero_()
            reader.read(f"{WEIGHTS}/{spec.name}", Piece.of(spec.box), parameter.detach().view(-1)[: spec.box.size])


def check_identity(reader: store.Reader, config: Config) -> None:
    """Refuse to go on with a checkpoint whose logical run differs from ``config``."""
    lines = differences(reader.meta["identity"], config.identity(), "the run", "the config")
    if lines:
        raise ConfigError(
            f"{reader.path}: belongs to a run with another config; differing keys:\n" + "\n".join(lines) +
            "\nSet these keys as they were, or give the new run a train.directory of its own"
        )  # fmt: skip


def differences(found: Any, wanted: Any, has: str, other: str) -> list[str]:
    """A line for every key that differs between two trees: ``has`` holds ``found``, ``other`` holds ``wanted``."""
    a, b = _flatten(found), _flatten(wanted)
    return [
        f"  {key}: {has} has {a.get(key, 'nothing')}, {other} has {b.get(key, 'nothing')}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key)
    ]


def newest(path: Path) -> Path:
    """The newest whole checkpoint in a folder of them, or the folder itself where it is one."""
    return path if (path / "manifest.json").exists() else store.newest(path)


def saved_config(reader: store.Reader) -> Config:
    """The config that a checkpoint was made with."""
    try:
        return Config.model_validate(reader.meta["config"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{reader.path}: holds no config that this version understands: {error}") from error


def _flat_tensors(optimizer: AdamW) -> Iterator[tuple[str, ParamSpec, Tensor]]:
    """Kind, spec and the elements of this rank's box, for every tensor of the state."""
    buffers = optimizer.buffers
    for bucket, state in zip(buffers.buckets, optimizer.states):
        flats = {WEIGHTS: bucket.values, **{f"adam.{kind}": tensor for kind, tensor in state.items()}}
        for slot in bucket.plan.slots:
            spec = spec_of(buffers.parameters[slot.parameter])
            for kind, flat in flats.items():
                # Padding stands at the end of dimension 0, so the box is a prefix of the local tensor.
                yield kind, spec, flat[slot.start : slot.start + spec.box.size]


def _entries(optimizer: AdamW, context: ParallelContext) -> Iterator[store.Entry]:
    dp = context.dp
    for number, (kind, spec, flat) in enumerate(_flat_tensors(optimizer)):
        if not spec.owner:
            continue
        size = spec.box.size
        if size >= _SHARED_SIZE:
            begin, end = size * dp.rank // dp.size, size * (dp.rank + 1) // dp.size
        elif number % dp.size == dp.rank:  # a small one is one rank's, which keeps the manifest short
            begin, end = 0, size
        else:
            continue
        yield store.Entry(f"{kind}/{spec.name}", spec.shape, Piece(spec.box, begin, end), flat[begin:end])


def _flatten(tree: Any, path: str = "") -> dict[str, Any]:
    if isinstance(tree, Mapping):
        items: Any = tree.items()
    elif isinstance(tree, list):
        items = enumerate(tree)
    else:
        return {path: tree}
    result: dict[str, Any] = {}
    for key, value in items:
        result.update(_flatten(value, f"{path}.{key}" if path else str(key)))
    return result
