"""The weights of a model as logical tensors, whatever format they are stored in.

A format is a class with the members of :class:`Weights`; :func:`open_weights` finds out which one a path holds. Whoever
needs weights, a new run, ``generate`` or ``convert``, reads the pieces that it needs and knows of no format.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megapoly.checkpoint import folders, huggingface, megatron, state
from megapoly.checkpoint.accounting import check_tensors
from megapoly.checkpoint.huggingface import HuggingFace
from megapoly.checkpoint.megatron import Megatron
from megapoly.checkpoint.store import Reader
from megapoly.config import Config, Model
from megapoly.data.templates import Template
from megapoly.data.tokenizer import Tokenizer
from megapoly.errors import CheckpointError
from megapoly.layers.call import spec_of
from megapoly.optim.adam import AdamW
from megapoly.spec import Index, Piece

TOKENIZER = "tokenizer"  # folder of a tokenizer's files, in a converted checkpoint


class Weights(Protocol):
    """Opened weights. Opening accounts for every tensor of the files, and reads headers only.

    Attributes:
        path: what was opened, for messages.
        model: the decoder that they are of.
        tensors: shape and stored dtype by logical name, in the order of the model: just those of ``model``.
        notes: sentences for the user about what was assumed.
        tokenizer: the tokenizer's files, ``tokenizer.model`` or the like; empty where the format holds none.
        tokenizer_sha256: of the tokenizer that they were trained with; None where it is not known.
        files: all that is read, for :func:`megapoly.checkpoint.unfinished.fingerprint`.
        origin: plain values that no format but the one of their key needs, and that conversions hand on:
            ``{"huggingface": {"config": ..., "generation_config": ...}}``; and ``template``, see :func:`template_of`.
    """

    path: Path
    model: Model
    tensors: Mapping[str, tuple[Index, torch.dtype]]
    notes: list[str]
    tokenizer: tuple[Path, ...]
    tokenizer_sha256: str | None
    files: tuple[Path, ...]
    origin: Mapping[str, Any]

    def read(self, name: str, piece: Piece, out: Tensor) -> None:
        """Fill ``out`` (1-D, ``piece.size`` elements, any device and floating dtype); reads what it needs only."""

    def release(self) -> None:
        """Give back the memory that was read through; the next read maps it anew."""


@dataclass(frozen=True)
class Options:
    """How a format is to be written; the command refuses what a format has nothing for.

    Attributes:
        dtype: of all tensors; None keeps each one's.
        shard_bytes: size of a file from which on another one begins.
        tp, pp: the layout, for formats that have one.
        naming: of Megatron's tensors: ``core`` is of megatron-core with its own layers, ``core-te`` with those of
            TransformerEngine, ``legacy`` of Megatron-LM before.
    """

    dtype: torch.dtype | None = None
    shard_bytes: int = 5_000_000_000
    tp: int = 1
    pp: int = 1
    naming: str = "core"

    def document(self) -> dict[str, Any]:
        """Plain values, for the identity of a conversion."""
        return {**asdict(self), "dtype": None if self.dtype is None else str(self.dtype)}


class Native:
    """The weights of a checkpoint of megapoly, or of a run's newest; of a run, or converted: weights alone.

    Where the checkpoint has master weights, its weights are those, rounded; another dtype is filled from these.
    """

    def __init__(self, path: Path) -> None:
        self._reader = Reader(state.find(path))
        meta = self._reader.meta
        self.path, self.model = self._reader.path, state.saved_model(self._reader)
        shapes = state.logical_shapes(self.model)
        for kind in (state.WEIGHTS, state.MASTER):
            if kind == state.WEIGHTS or any(name.startswith(f"{kind}/") for name in self._reader.tensors):
                self._reader.expect({f"{kind}/{name}": shape for name, shape in shapes.items()}, f"{kind}/")
        self.tensors: Mapping[str, tuple[Index, torch.dtype]] = {
            name: self._reader.tensors[f"{state.WEIGHTS}/{name}"] for name in shapes
        }
        self.notes: list[str] = []
        self.tokenizer = self._tokenizer()
        self.tokenizer_sha256: str | None = meta.get("tokenizer")
        self.files: tuple[Path, ...] = (self.path / folders.MANIFEST, *self.tokenizer)  # it has the others' checksums
        own = {} if meta.get("template") is None else {"template": meta["template"]}  # of a run
        self.origin: Mapping[str, Any] = {**meta.get("origin", {}), **own}

    def read(self, name: str, piece: Piece, out: Tensor) -> None:
        masters = out.dtype != self.tensors[name][1] and f"{state.MASTER}/{name}" in self._reader.tensors
        self._reader.read(f"{state.MASTER if masters else state.WEIGHTS}/{name}", piece, out)

    def release(self) -> None:
        self._reader.release()

    def _tokenizer(self) -> tuple[Path, ...]:
        if "config" in self._reader.meta:
            path = Path(self._reader.meta["config"]["data"]["tokenizer"])
            if not path.is_file():
                self.notes.append(f"{path}: the run's tokenizer is not there any more; --tokenizer says where it is")
            return huggingface.tokenizer_of(path)
        hashes: Mapping[str, str] = self._reader.meta.get("tokenizer_files", {})
        paths = {self.path / TOKENIZER / name: digest for name, digest in hashes.items()}
        for path, digest in paths.items():
            if not path.is_file() or huggingface.sha256(path) != digest:
                raise CheckpointError(
                    f"{path}: is {'not the file that was written' if path.is_file() else 'missing'}; make the"
                    " checkpoint again with megapoly convert"
                )
        return tuple(paths)


def find(path: Path) -> Path:
    """The folder that :func:`open_weights` opens for ``path``: of a run the newest checkpoint, else the path itself.

    Raises:
        CheckpointError: there are no weights.
    """
    return path if format_of(path) is not Native else state.find(path)


def find_own(path: Path) -> Path:
    """The folder of the checkpoint of megapoly that a path holds; see :func:`megapoly.checkpoint.state.find`.

    Raises:
        CheckpointError: there is none, perhaps since the weights are of another format.
    """
    kind = format_of(path)
    if kind is not Native:
        raise CheckpointError(
            f"{path}: is no checkpoint of megapoly but a folder of"
            f" {'Megatron' if kind is Megatron else 'Hugging Face'}; convert it first: megapoly convert {path} DST"
        )
    return state.find(path)


def open_weights(path: Path, vocabulary: int | None = None) -> Weights:
    """The weights at ``path``: a run folder, a folder of checkpoints, a checkpoint, or one of Hugging Face or Megatron.

    Args:
        vocabulary: its true size, for files of Megatron that hold a padded one.

    Raises:
        CheckpointError: there are none, or they are damaged, or not all of the model is there.
    """
    kind = format_of(path)
    if kind is Megatron:
        return Megatron(path, vocabulary)
    if vocabulary is not None:
        raise CheckpointError(
            f"{path}: is not of Megatron, whose files alone may not tell the size {vocabulary} of a vocabulary; leave"
            " --vocabulary out"
        )
    return kind(path)


def format_of(path: Path) -> type[HuggingFace] | type[Megatron] | type[Native]:
    """The format of the weights that a path holds, as its files have it; none of them is opened.

    Raises:
        CheckpointError: the path does not exist, or is nothing of the kind; a ``config.json`` that is not JSON.
    """
    if not os.path.lexists(path):
        raise CheckpointError(f"{path}: does not exist; check the path")
    if (path / folders.MANIFEST).exists() or (path / folders.CHECKPOINTS).is_dir() or folders.steps(path):
        return Native
    if huggingface.is_folder(path):
        return HuggingFace
    if megatron.is_folder(path):
        return Megatron
    raise CheckpointError(
        f"{path}: {'holds no weights' if path.is_dir() else 'is no folder'}; expected a run of megapoly (with"
        f" {folders.CHECKPOINTS}) or a whole checkpoint (with {folders.MANIFEST}), a folder of Hugging Face (with a"
        f" {huggingface.CONFIG} that has a model_type), or one of Megatron (with {megatron.TRACKER} or mp_rank_*)"
    )


def fill(weights: Weights, parameters: Iterable[nn.Parameter]) -> None:
    """Fill parameters with their boxes of the logical tensors, in their own dtype; padding becomes zero."""
    for parameter in parameters:
        state.fill(parameter, weights.read)


def load_initial(weights: Weights, config: Config, optimizer: AdamW) -> None:
    """Fill the weights alone, for a new run: of any layout, any precision, any format.

    Raises:
        CheckpointError: tensors that are missing, unexpected, misshapen, damaged, or not finite in the run's precision.
    """
    found = {name: shape for name, (shape, _) in weights.tensors.items()}
    advice = "Use the model that it was saved with, or another checkpoint"
    check_tensors(weights.path, found, state.logical_shapes(config.model), "a checkpoint of another model", advice)
    optimizer.buffers.settle()
    for parameter in optimizer.buffers.parameters:
        fill(weights, [parameter])
        if not parameter.isfinite().all():
            raise CheckpointError(
                f"{weights.path}: tensor {spec_of(parameter).name} has elements that are not finite in"
                f" {parameter.dtype}; take another checkpoint, or another train.precision"
            )
        weights.release()
    for kind, part, flat in state.held(optimizer):
        if kind == state.MASTER:
            weights.read(part.spec.name, part.piece, flat)
    weights.release()


def template_of(weights: Weights) -> Template | None:
    """How the model is asked, where megapoly has trained it on instructions.

    Raises:
        CheckpointError: it has a template that this version does not understand.
    """
    return state.read_template(weights.path, weights.origin)


def check_tokenizer(weights: Weights, tokenizer: Tokenizer) -> bool:
    """Refuse another tokenizer than the one that the weights were trained with.

    Returns:
        Whether it is known to be that one. Where it is not, the weights tell of none, or of one of the other kind.

    Raises:
        DataError: the hashes differ.
    """
    own = {path.suffix: huggingface.sha256(path) for path in huggingface.tokenizers_among(weights.tokenizer)}
    trained = weights.tokenizer_sha256
    if trained is None or trained in own.values():  # else a run's, whose file has moved or changed
        trained = own.get(tokenizer.path.suffix)
    if trained is not None:
        state.refuse_tokenizer(weights.path, trained, tokenizer)
    return trained is not None
