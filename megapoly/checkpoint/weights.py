"""The weights of a model as logical tensors, whatever format they are stored in.

A format is a class with the members of :class:`Weights`; :func:`open_weights` finds out which one a path holds. Whoever
needs weights, a new run, ``generate`` or ``convert``, reads the pieces that it needs and knows of no format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megapoly.checkpoint import folders, state
from megapoly.checkpoint.store import Reader
from megapoly.config import Model
from megapoly.spec import Index, Piece


class Weights(Protocol):
    """Opened weights. Opening accounts for every tensor of the files, and reads headers only.

    Attributes:
        path: what was opened, for messages.
        model: the decoder that they are of.
        tensors: shape and stored dtype by logical name, in the order of the model: just those of ``model``.
        tokenizer: the tokenizer's files, ``tokenizer.model`` or the like; empty where the format holds none.
        files: all that is read, for :func:`megapoly.checkpoint.unfinished.fingerprint`.
        origin: plain values that no format but the one of their key needs, and that conversions hand on:
            ``{"huggingface": {"config": ..., "generation_config": ...}}``.
    """

    path: Path
    model: Model
    tensors: Mapping[str, tuple[Index, torch.dtype]]
    tokenizer: tuple[Path, ...]
    files: tuple[Path, ...]
    origin: Mapping[str, Any]

    def read(self, name: str, piece: Piece, out: Tensor) -> None:
        """Fill ``out`` (1-D, ``piece.size`` elements, any device and floating dtype); reads what it needs only."""

    def release(self) -> None:
        """Give back the memory that was read through; the next read maps it anew."""


@dataclass(frozen=True)
class Options:
    """How a format is to be written; a format ignores what it has not.

    Attributes:
        dtype: of all tensors; None keeps each one's.
        shard_bytes: size of a file from which on another one begins.
        tp, pp: the layout, for formats that have one.
    """

    dtype: torch.dtype | None = None
    shard_bytes: int = 5_000_000_000
    tp: int = 1
    pp: int = 1

    def document(self) -> dict[str, Any]:
        """Plain values, for the identity of a conversion."""
        return {**asdict(self), "dtype": None if self.dtype is None else str(self.dtype)}


class Native:
    """The weights of a checkpoint of megapoly, or of a run's newest.

    Where the checkpoint has master weights, its weights are those, rounded; a wider dtype is filled with these.
    """

    def __init__(self, path: Path) -> None:
        self._reader = Reader(state.find(path))
        config = state.saved_config(self._reader)
        self.path, self.model = self._reader.path, config.model
        shapes = state.logical_shapes(self.model)
        self._reader.expect({f"{state.WEIGHTS}/{name}": shape for name, shape in shapes.items()}, f"{state.WEIGHTS}/")
        self.tensors: Mapping[str, tuple[Index, torch.dtype]] = {
            name: self._reader.tensors[f"{state.WEIGHTS}/{name}"] for name in shapes
        }
        tokenizer = config.data.tokenizer
        self.tokenizer: tuple[Path, ...] = (tokenizer,) if tokenizer.exists() else ()
        self.files: tuple[Path, ...] = (self.path / folders.MANIFEST,)  # it has the checksums of the others
        self.origin: Mapping[str, Any] = self._reader.meta.get("origin", {})

    def read(self, name: str, piece: Piece, out: Tensor) -> None:
        stored = self.tensors[name][1]
        masters = out.dtype.itemsize > stored.itemsize and f"{state.MASTER}/{name}" in self._reader.tensors
        self._reader.read(f"{state.MASTER if masters else state.WEIGHTS}/{name}", piece, out)

    def release(self) -> None:
        self._reader.release()


def open_weights(path: Path) -> Weights:
    """The weights at ``path``: a run folder, a folder of checkpoints, or a checkpoint.

    Raises:
        CheckpointError: there are none, or they are damaged, or not all of the model is there.
    """
    return Native(path)
