"""Opened weights written as a folder of Hugging Face, or as a checkpoint of megapoly that holds weights only."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megapoly.checkpoint import folders, state, store
from megapoly.checkpoint.examine import say_dtype
from megapoly.checkpoint.families import Slot, slots
from megapoly.checkpoint.files import CODES, write_tensors
from megapoly.checkpoint.huggingface import CONFIG, GENERATION_CONFIG, sha256
from megapoly.checkpoint.huggingface_config import to_config
from megapoly.checkpoint.huggingface_tokenizer import end_ids, kept_files, tokenizer_files
from megapoly.checkpoint.streams import Stream, ahead
from megapoly.checkpoint.tensor_files import INDEX
from megapoly.checkpoint.unfinished import Unfinished
from megapoly.checkpoint.weights import TOKENIZER, Options, Weights
from megapoly.spec import Box, Index

Progress = Callable[[int], object]


@dataclass(frozen=True)
class _Stored:
    """A tensor of a file that is to be: its key and shape there, its dtype, and where its elements come from."""

    key: str
    shape: Index
    dtype: torch.dtype
    parts: Callable[[Stream], Iterator[torch.Tensor]]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def export_huggingface(weights: Weights, unfinished: Unfinished, options: Options, progress: Progress) -> list[str]:
    """Write what transformers loads: shards of safetensors with their index, config.json, the tokenizer's files.

    Returns sentences about what could not be written as it should be.

    Raises:
        CheckpointError: a model that no family represents, a tensor that cannot be read, a disk that is full.
    """
    origin = weights.origin.get("huggingface", {})
    dtypes = {name: options.dtype or dtype for name, (_, dtype) in weights.tensors.items()}
    common = max(dtypes.values(), key=lambda dtype: (dtype.itemsize, str(dtype)))
    config = to_config(weights.model, origin.get("config"), say_dtype(common), end_ids(weights))
    stored = [_of_slot(slot, dtypes[slot.name]) for slot in slots(config["model_type"], weights.model)]
    shards = _shards(stored, options.shard_bytes)
    names = _names("model{}.safetensors", len(shards))
    for name, shard in zip(names, shards, strict=True):
        _write(unfinished, name, shard, weights, progress, checksums=False)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(each.bytes for each in stored)},
            "weight_map": {each.key: name for name, shard in zip(names, shards, strict=True) for each in shard},
        }
        _write_json(unfinished, f"model.safetensors{INDEX}", index)
    files, notes = tokenizer_files(weights)
    if config["model_type"] == "qwen2" and "huggingface" not in weights.origin and files:
        notes.append(
            "transformers 5 splits text by Qwen's rule for every model of this kind, whatever its tokenizer.json says:"
            " load that with PreTrainedTokenizerFast.from_pretrained, not AutoTokenizer; --verify compares the two"
        )
    for name, make in files.items():
        unfinished.finish_file(name, make)
    ends = {key: config[key] for key in ("bos_token_id", "eos_token_id") if config.get(key) is not None}
    _write_json(unfinished, GENERATION_CONFIG, origin.get("generation_config") or ends)
    _write_json(unfinished, CONFIG, config)
    return notes


def export_native(weights: Weights, unfinished: Unfinished, options: Options, progress: Progress) -> list[str]:
    """Write a checkpoint of megapoly that holds weights, tokenizer and model only. Returns no sentences.

    Raises:
        CheckpointError: a tensor that cannot be read, a disk that is full.
    """
    stored = [_of_tensor(name, shape, options.dtype or dtype) for name, (shape, dtype) in weights.tensors.items()]
    shards = _shards(stored, options.shard_bytes)
    rows, files = [], {}
    for name, shard in zip(_names("weights{}.safetensors", len(shards)), shards, strict=True):
        files[name] = _write(unfinished, name, shard, weights, progress, checksums=True)
        for each in shard:
            place = {"start": [0] * len(each.shape), "stop": list(each.shape), "range": [0, math.prod(each.shape)]}
            piece = {"file": name, "key": each.key, **place}
            rows.append({"name": each.key, "shape": list(each.shape), "dtype": say_dtype(each.dtype), "piece": piece})
    digests = {}
    for name, make in kept_files(weights).items():
        unfinished.finish_file(f"{TOKENIZER}/{name}", make)
        digests[name] = sha256(unfinished.path / TOKENIZER / name)
    meta = {
        "model": weights.model.model_dump(mode="json"),
        "tokenizer": weights.tokenizer_sha256,
        "tokenizer_files": digests,
        "origin": dict(weights.origin),
    }
    reports = [{"rows": rows, "files": files}]
    unfinished.finish_file(folders.MANIFEST, lambda path: store.write_manifest(path, 0, meta, reports))
    return []


def _of_slot(slot: Slot, dtype: torch.dtype) -> _Stored:
    return _Stored(slot.source, slot.shape, dtype, lambda stream: stream.slot(slot, dtype))


def _of_tensor(name: str, shape: Index, dtype: torch.dtype) -> _Stored:
    box = Box.whole(shape)
    return _Stored(f"{state.WEIGHTS}/{name}", shape, dtype, lambda stream: stream.box(name, box, dtype))


def _shards(stored: Sequence[_Stored], most: int) -> list[list[_Stored]]:
    """In their order; a new one begins where the next tensor would pass ``most`` bytes."""
    result: list[list[_Stored]] = [[]]
    size = 0
    for each in stored:
        if result[-1] and size + each.bytes > most:
            result.append([])
            size = 0
        result[-1].append(each)
        size += each.bytes
    return result


def _names(pattern: str, count: int) -> list[str]:
    if count == 1:
        return [pattern.format("")]
    return [pattern.format(f"-{number:05d}-of-{count:05d}") for number in range(1, count + 1)]


def _write(
    unfinished: Unfinished,
    name: str,
    shard: Sequence[_Stored],
    weights: Weights,
    progress: Progress,
    *,
    checksums: bool,
) -> dict[str, Any]:
    """A file of tensors, unless it is finished; its size and checksums."""
    ordered = sorted(shard, key=lambda each: -each.dtype.itemsize)  # every tensor aligned to its own size
    finished = unfinished.done(name)
    if finished is not None:
        progress(sum(each.bytes for each in ordered))
        return dict(finished)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for each in ordered:
        offsets = [at, at + each.bytes]
        header[each.key] = {"dtype": CODES[each.dtype], "shape": list(each.shape), "data_offsets": offsets}
        at = offsets[1]

    def parts() -> Iterator[torch.Tensor]:
        stream = Stream(weights, progress)
        for each in ordered:
            yield from each.parts(stream)

    record: dict[str, Any] = unfinished.finish_file(
        name, lambda path: write_tensors(path, header, ahead(parts()), checksums)
    )
    weights.release()
    return record


def _write_json(unfinished: Unfinished, name: str, values: dict[str, Any]) -> None:
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    unfinished.finish_file(name, lambda path: path.write_text(text, encoding="utf-8"))
