"""A run's state as logical tensors: weights, optimizer and counters, written and read by any layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megapoly import comm
from megapoly.checkpoint import folders, store
from megapoly.checkpoint.background import Writer
from megapoly.config import Config, Model
from megapoly.context import ParallelContext
from megapoly.data.plan import Plan
from megapoly.data.templates import Template
from megapoly.data.tokenizer import Tokenizer
from megapoly.errors import CheckpointError, ConfigError, DataError
from megapoly.layers.call import Place, spec_of
from megapoly.models.decoder import DecoderStage
from megapoly.optim.adam import AdamW
from megapoly.optim.buffers import Part
from megapoly.spec import Piece

WEIGHTS, MASTER = "weights", "adam.master"
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
    guards: Mapping[str, Any],
    template: Template | None = None,
    keep_before: int | None = None,
    writer: Writer | None = None,
) -> Path:
    """Write a checkpoint together with all ranks and return its folder.

    With a ``writer`` it is only copied when this returns, and an error is raised by :meth:`Writer.wait`.

    All ranks write: what is not sharded over dp is shared out. ``tokenizer`` is its SHA-256, ``template`` that of
    the instructions it is trained on. ``guards``, plain values
    that decide about skipped steps and rollbacks, are kept as they are, in ``meta["guards"]``. Beside
    ``checkpoint.keep`` of them, the newest from before the step ``keep_before`` stays.

    Raises:
        CheckpointError: on every rank, if any could not write; see :func:`megapoly.checkpoint.store.save`.
    """
    optimizer.buffers.settle()  # so that nothing is under way when a run ends here
    meta = {
        "config": config.document(),
        "plan": plan.to_document(),
        "counters": asdict(counters),
        "optimizer_steps": optimizer.steps,
        "tokenizer": tokenizer,
        "template": None if template is None else template.model_dump(),
        "guards": guards,
        "layout": str(context.mesh),
    }
    axis = context.control if writer is None else writer.axis

    def write(entries: Iterable[store.Entry]) -> Path:
        return store.save(
            root,
            counters.step,
            entries,
            meta,
            rank=axis.rank,
            size=axis.size,
            gather=lambda value: comm.gather_objects(value, axis),
            broadcast=lambda value: comm.broadcast_object(value, axis),
            keep=folders.Keep(config.checkpoint.keep, keep_before, config.checkpoint.keep_every_steps),
        )

    if writer is None:
        return write(_entries(optimizer, context))
    writer.write(_entries(optimizer, context), write)
    return folders.folder(root, counters.step)


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
    optimizer.buffers.settle()
    for kind, part, flat in held(optimizer):
        if kind != WEIGHTS:
            reader.read(f"{kind}/{part.spec.name}", part.piece, flat)
    for parameter in optimizer.buffers.parameters:
        fill(parameter, lambda name, piece, out: reader.read(f"{WEIGHTS}/{name}", piece, out))
    optimizer.steps = reader.meta["optimizer_steps"]
    return Counters(**reader.meta["counters"])


def model_differences(model: Model, config: Config) -> list[str]:
    """Keys in which a checkpoint's model differs from that of ``config``, a line for each.

    A key that is not given counts as what it stands for.
    """
    found, wanted = ({"model": _resolved(each)} for each in (model, config.model))
    return differences(found, wanted, "the checkpoint", "the config")


def _resolved(model: Model) -> dict[str, Any]:
    document = model.model_dump(mode="json")
    document |= {"key_value_heads": model.groups, "qkv_biases": model.has_qkv_biases}
    if model.position == "rope":
        document["rope_base"] = model.wavelength_base
    if model.rope_scaling is not None:
        factors = {"low_frequency_factor": model.rope_scaling.low, "high_frequency_factor": model.rope_scaling.high}
        document["rope_scaling"] |= factors
    return document


def fill(parameter: Tensor, read: Callable[[str, Piece, Tensor], None]) -> None:
    """Have ``read`` fill a parameter with its box of the logical tensor; padding becomes zero."""
    spec = spec_of(parameter)
    with torch.no_grad():
        parameter.zero_()
        read(spec.name, Piece.of(spec.box), parameter.detach().view(-1)[: spec.box.size])


def check_identity(reader: store.Reader, config: Config) -> None:
    """Refuse to go on with a checkpoint whose logical run differs from ``config``."""
    # Read from the config, not as saved: a key that came later than the checkpoint has its default.
    lines = differences(saved_config(reader).identity(), config.identity(), "the run", "the config")
    if lines:
        raise ConfigError(
            f"{reader.path}: belongs to a run with another config; differing keys:\n" + "\n".join(lines) +
            "\nSet these keys as they were, or give the new run a train.directory of its own"
        )  # fmt: skip


def curriculum_edits(reader: store.Reader, config: Config) -> list[str]:
    """What ``config`` mixes otherwise than the run of a checkpoint did so far, a line for every key."""
    return differences(saved_config(reader).curriculum(), config.curriculum(), "the run", "the config")


def check_tokenizer(reader: store.Reader, tokenizer: Tokenizer) -> None:
    """Refuse another tokenizer than the one that the weights were trained with.

    Raises:
        DataError: the hashes differ.
    """
    refuse_tokenizer(reader.path, reader.meta["tokenizer"], tokenizer)


def refuse_tokenizer(path: Path, trained: str, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer whose SHA-256 is not ``trained``, that of the weights at ``path``.

    Raises:
        DataError: the hashes differ.
    """
    if tokenizer.sha256 != trained:
        raise DataError(
            f"{tokenizer.path}: is not the tokenizer that {path} was trained with (SHA-256"
            f" {tokenizer.sha256[:12]}, expected {trained[:12]}); give that one, in the config as data.tokenizer or"
            " with --tokenizer"
        )


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
    return path if (path / folders.MANIFEST).exists() else folders.newest(path)


def find(path: Path) -> Path:
    """The newest whole checkpoint of a run folder or of a folder of checkpoints, or the folder itself where it is one.

    Raises:
        CheckpointError: there is none.
    """
    checkpoints = path / folders.CHECKPOINTS
    return newest(checkpoints if checkpoints.is_dir() else path)


def saved_config(reader: store.Reader) -> Config:
    """The config that a checkpoint was made with.

    Raises:
        CheckpointError: it holds weights only, or a config of another version.
    """
    if "config" not in reader.meta and "model" in reader.meta:
        raise CheckpointError(
            f"{reader.path}: holds weights only, and no run to go on with; begin a new run with them: --init-from"
        )
    try:
        return Config.model_validate(reader.meta["config"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{reader.path}: holds no config that this version understands: {error}") from error


def saved_model(reader: store.Reader) -> Model:
    """The model of a checkpoint of a run, or of one that holds weights only; whatever else the run's config says."""
    meta = reader.meta
    try:
        return Model.model_validate(meta["model"] if "model" in meta else meta["config"]["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{reader.path}: holds no model that this version understands: {error}") from error


def read_template(path: Path, kept: Mapping[str, Any]) -> Template | None:
    """The ``template`` among the values that weights at ``path`` keep: how a model is asked that was tuned.

    Raises:
        CheckpointError: this version does not understand it.
    """
    found = kept.get("template")
    try:
        return None if found is None else Template.model_validate(found)
    except ValueError as error:
        raise CheckpointError(f"{path}: holds no template that this version understands: {error}") from error


def held(optimizer: AdamW) -> Iterator[tuple[str, Part, Tensor]]:
    """Kind, part and elements, for all that this rank's ranges of the buckets hold of the state."""
    buffers = optimizer.buffers
    for part in buffers.parts():
        bucket = buffers.buckets[part.bucket]
        flats = {WEIGHTS: bucket.values[bucket.mine]}
        flats |= {f"adam.{kind}": tensor for kind, tensor in optimizer.states[part.bucket].items()}
        for kind, flat in flats.items():
            yield kind, part, flat[part.at]


def _entries(optimizer: AdamW, context: ParallelContext) -> Iterator[store.Entry]:
    dp = context.dp
    for number, (kind, part, flat) in enumerate(held(optimizer)):
        spec, piece = part.spec, part.piece
        if not spec.owner:
            continue
        begin, end = 0, piece.size
        if not optimizer.buffers.sharded:
            if piece.size >= _SHARED_SIZE:
                begin, end = piece.size * dp.rank // dp.size, piece.size * (dp.rank + 1) // dp.size
            elif number % dp.size != dp.rank:  # a small one is one rank's, which keeps the manifest short
                continue
        stored = Piece(piece.box, piece.start + begin, piece.start + end)
        yield store.Entry(f"{kind}/{spec.name}", spec.shape, stored, flat[begin:end])


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
