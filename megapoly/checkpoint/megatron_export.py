"""Opened weights written as the files of Megatron-LM; its formats are in :mod:`megapoly.checkpoint.megatron`."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megapoly.checkpoint.families import Slot
from megapoly.checkpoint.huggingface_tokenizer import kept_files, plain_name
from megapoly.checkpoint.megatron import FILE, ORIGIN, RELEASE, TOKENIZER, TRACKER, rank_folder
from megapoly.checkpoint.megatron_args import check_exportable, to_arguments
from megapoly.checkpoint.megatron_layout import Part, padded_vocabulary, slots
from megapoly.checkpoint.streams import PART, Stream, ahead
from megapoly.checkpoint.torch_writer import NewTensor, write_torch
from megapoly.checkpoint.unfinished import Unfinished
from megapoly.checkpoint.weights import Options, Weights
from megapoly.spec import Box

_VERSION = 3.0  # of Megatron's checkpoints: the order of queries, keys and values is ours
_ZEROS = 1 << 20  # bytes


def export_megatron(
    weights: Weights, unfinished: Unfinished, options: Options, progress: Callable[[int], object]
) -> list[str]:
    """Write what Megatron-LM loads as a release: ``tp`` x ``pp`` files, and the tokenizer's beside them.

    Returns sentences for the user.

    Raises:
        CheckpointError: a model or layout that Megatron has no form for, a tensor that cannot be read, a disk that is
            full.
    """
    model, tp, pp, naming = weights.model, options.tp, options.pp, options.naming
    check_exportable(model, naming, tp, pp)
    dtypes = {name: options.dtype or dtype for name, (_, dtype) in weights.tensors.items()}
    common = max(dtypes.values(), key=lambda dtype: (dtype.itemsize, str(dtype)))
    kind = _tokenizer_type(weights.tokenizer)
    args = to_arguments(model, naming, tp=tp, pp=pp, dtype=common, tokenizer=kind)
    padded, layers = padded_vocabulary(model.vocabulary, tp), model.layers // pp
    seen: set[tuple[str, Box]] = set()
    for stage, rank in itertools.product(range(pp), range(tp)):
        part = Part(tp, rank, stage * layers, (stage + 1) * layers, stage == 0, stage == pp - 1, padded)
        found = [(slot, dtypes[slot.name], (slot.name, slot.box) not in seen) for slot in slots(model, part, naming)]
        seen.update((slot.name, slot.box) for slot, _, _ in found)
        name = f"{RELEASE}/{rank_folder(rank, stage, pp)}/{FILE}"
        if unfinished.done(name) is not None:
            progress(sum(slot.box.size * dtype.itemsize for slot, dtype, new in found if new))
            continue
        counted, copies = Stream(weights, progress), Stream(weights)  # progress is of the model, not of copies
        tensors = {slot.source: _tensor(slot, dtype, counted if new else copies) for slot, dtype, new in found}
        content = {
            "args": args,
            "checkpoint_version": _VERSION,
            "iteration": 0,
            "model": _nested(tensors) if naming == "legacy" else tensors,
        }
        unfinished.finish_file(name, partial(write_torch, value=content))
        weights.release()
    _write_others(weights, unfinished)
    return [
        _advice(options, kind, [unfinished.final / TOKENIZER / plain_name(weights, path) for path in weights.tokenizer])
    ]


def _tensor(slot: Slot, dtype: torch.dtype, stream: Stream) -> NewTensor:
    def parts() -> Iterator[torch.Tensor]:
        made = stream.box(slot.name, slot.box, dtype)
        yield from made if slot.box.size * dtype.itemsize <= PART else ahead(made)
        left = (math.prod(slot.shape) - slot.box.size) * dtype.itemsize  # padding of the vocabulary
        zeros = torch.zeros(min(left, _ZEROS), dtype=torch.uint8)
        for start in range(0, left, _ZEROS):
            yield zeros[: left - start]

    return NewTensor(slot.shape, dtype, parts)


def _nested(tensors: dict[str, NewTensor]) -> dict[str, Any]:
    """As the old language models save: folders of names, in which those of the layers are flat."""
    result: dict[str, Any] = {}
    for name, tensor in tensors.items():
        flat = name.split(".", 2 if name.startswith("language_model.encoder.") else -1)
        tree = result
        for key in flat[:-1]:
            tree = tree.setdefault(key, {})
        tree[flat[-1]] = tensor
    return result


def _write_others(weights: Weights, unfinished: Unfinished) -> None:
    for name, make in kept_files(weights).items():
        unfinished.finish_file(f"{TOKENIZER}/{name}", make)
    kept = {"tokenizer": weights.tokenizer_sha256, "origin": dict(weights.origin)}
    text = json.dumps(kept, indent=1, ensure_ascii=False) + "\n"
    unfinished.finish_file(ORIGIN, lambda path: _write(path, text))
    unfinished.finish_file(TRACKER, lambda path: _write(path, f"{RELEASE}\n"))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _tokenizer_type(files: tuple[Path, ...]) -> str | None:
    """As Megatron-LM calls it; None where it is not known."""
    if any(path.suffix == ".model" for path in files):
        return "SentencePieceTokenizer"
    return "HuggingFaceTokenizer" if files else None


def _model_file(files: list[Path]) -> Path:
    return next((path for path in files if path.suffix == ".model"), files[0].parent)


def _advice(options: Options, kind: str | None, files: list[Path]) -> str:
    known = "" if kind is None else f" --tokenizer-type {kind} --tokenizer-model {_model_file(files)}"
    old = {"legacy": " --use-legacy-models", "core": " --transformer-impl local"}.get(options.naming, "")
    return (
        f"Megatron-LM loads it with --tensor-model-parallel-size {options.tp} --pipeline-model-parallel-size"
        f" {options.pp} --use-checkpoint-args --ckpt-format torch{old}{known}"
    )
