"""From any format of weights to any other, tensor by tensor; an interruption is gone on from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from megapoly.checkpoint import weights as formats
from megapoly.checkpoint.accounting import check_tensors
from megapoly.checkpoint.export import export_huggingface, export_native
from megapoly.checkpoint.huggingface import tokenizer_of
from megapoly.checkpoint.megatron import Megatron
from megapoly.checkpoint.megatron_export import export_megatron
from megapoly.checkpoint.unfinished import Unfinished, fingerprint
from megapoly.checkpoint.weights import Options, Weights
from megapoly.data.load_tokenizer import load_tokenizer
from megapoly.errors import CheckpointError

Format = Literal["megapoly", "huggingface", "megatron"]
Export = Callable[[Weights, Unfinished, Options, Callable[[int], object]], list[str]]
EXPORTS: dict[Format, Export] = {
    "megapoly": export_native, "huggingface": export_huggingface, "megatron": export_megatron,
}  # fmt: skip


@dataclass(frozen=True)
class Converted:
    """What a conversion has written.

    Attributes:
        tensors: of the model, logical ones.
        bytes: of all files.
    """

    path: Path
    format: Format
    tensors: int
    files: int
    bytes: int


def natural_format(weights: Weights) -> Format:
    """What weights are converted to where nothing else is asked for: ours to Hugging Face, others to ours."""
    return "huggingface" if isinstance(weights, formats.Native) else "megapoly"


def size(weights: Weights, options: Options) -> int:
    """Bytes of the tensors that a conversion writes."""
    return sum(math.prod(shape) * (options.dtype or dtype).itemsize for shape, dtype in weights.tensors.values())


def open_source(path: Path, vocabulary: int | None = None, tokenizer: Path | None = None) -> Weights:
    """Open what is to be converted, with this tokenizer in place of its own, where one is given.

    Args:
        vocabulary: see :func:`megapoly.checkpoint.weights.open_weights`. Where it is not given, and the files do not
            tell, it is that of the tokenizer.

    Raises:
        CheckpointError, DataError: see :func:`megapoly.checkpoint.weights.open_weights`, :func:`use_tokenizer`.
    """
    weights = formats.open_weights(path, vocabulary)
    if tokenizer is None:
        return weights
    if isinstance(weights, Megatron) and weights.pads:
        weights = formats.open_weights(path, load_tokenizer(tokenizer, ends=False).vocabulary)
    use_tokenizer(weights, tokenizer)
    return weights


def use_tokenizer(weights: Weights, path: Path) -> None:
    """Have the conversion take this tokenizer, where the weights' own is not there or has moved.

    Raises:
        DataError: it is none, or not the one that they were trained with.
        CheckpointError: it has more tokens than the model has rows.
    """
    tokenizer = load_tokenizer(path, ends=False)
    formats.check_tokenizer(weights, tokenizer)
    if tokenizer.vocabulary > weights.model.vocabulary:
        raise CheckpointError(
            f"{path}: has {tokenizer.vocabulary} tokens, and the vocabulary of {weights.path} has"
            f" {weights.model.vocabulary}; give the tokenizer of this model"
        )
    weights.tokenizer, weights.tokenizer_sha256 = tokenizer_of(path), tokenizer.sha256


def convert(
    weights: Weights,
    target: Path,
    to: Format,
    options: Options,
    tell: Callable[[str], object] = lambda sentence: None,
    progress: Callable[[int], object] = lambda done: None,
) -> Converted:
    """Write opened weights to ``target`` in another format, dtype or layout.

    Every tensor is accounted for, in what is read and in what was written, before ``target`` has its name.

    Args:
        tell: hears sentences for the user.
        progress: hears of the bytes of each part of a tensor; :func:`size` in all.

    Raises:
        CheckpointError: ``target`` exists, the format has no form of this model, a disk is full.
    """
    identity = {"to": to, "options": options.document(), "source": fingerprint(weights.files)}
    for note in weights.notes:
        tell(note)
    with Unfinished(target, identity) as unfinished:
        if unfinished.note:
            tell(f"{target}: {unfinished.note}")
        for note in EXPORTS[to](weights, unfinished, options, progress):
            tell(note)
        _account(weights, formats.open_weights(unfinished.path), options.dtype)
        final = unfinished.finish()
    files = [path for path in final.rglob("*") if path.is_file()]
    return Converted(final, to, len(weights.tensors), len(files), sum(path.stat().st_size for path in files))


def _account(source: Weights, written: Weights, dtype: torch.dtype | None) -> None:
    """Check that what was written holds the tensors of the source, in the dtype that was asked for."""
    found = {name: shape for name, (shape, _) in written.tensors.items()}
    expected = {name: shape for name, (shape, _) in source.tensors.items()}
    check_tensors(written.path, found, expected, f"does not hold what {source.path} holds", "Report this")
    for name, (_, stored) in source.tensors.items():
        if written.tensors[name][1] != (dtype or stored):
            raise CheckpointError(f"{written.path}: tensor {name} is {written.tensors[name][1]}; report this")
