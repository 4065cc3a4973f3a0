"""Weights in the files of Megatron-LM, one for every rank of tensor and pipeline parallelism, read in pieces.

FOLDER/latest_checkpointed_iteration.txt          the number of an iteration, or "release": weights alone
FOLDER/iter_0001000/mp_rank_TP/model_optim_rng.pt           mp_rank_TP_PP where there is a pipeline
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megapoly.checkpoint import state
from megapoly.checkpoint.accounting import check_tensors, some
from megapoly.checkpoint.families import Slot
from megapoly.checkpoint.huggingface import read_json
from megapoly.checkpoint.megatron_args import Arguments, to_model
from megapoly.checkpoint.megatron_layout import NAMINGS, Part, canonical, is_copy, layer_count, naming_of, slots
from megapoly.checkpoint.pickled import Record, StoredTensor
from megapoly.checkpoint.pieces import check_inside
from megapoly.checkpoint.tensor_files import check_dtype
from megapoly.checkpoint.torch_files import TorchFile
from megapoly.config import Model
from megapoly.errors import CheckpointError
from megapoly.spec import Box, Index, Piece

TRACKER, RELEASE = "latest_checkpointed_iteration.txt", "release"
FILE = "model_optim_rng.pt"
TOKENIZER, ORIGIN = "tokenizer", "megapoly.json"  # what megapoly adds, which Megatron does not look at
_FILES = (FILE, "model_rng.pt")  # the second beside a distributed optimizer, before mid-2023
_RANK = re.compile(r"mp_rank_(\d{2,})(_\d{3,})?(_\d{3,})?")
_ORDERS: dict[float, str] = {0: "kinds", 1: "channels", 2: "groups", 3: "groups"}
_MOST_RANKS = 1 << 16
_DEEPEST = 8  # of the folders of names in a file
_AGAIN = "copy the whole checkpoint again"


@dataclass(frozen=True)
class _Shard:
    """A stage of a rank: its tensors by canonical name."""

    file: TorchFile
    where: str
    tensors: dict[str, StoredTensor]


@dataclass(frozen=True)
class _Source:
    """Where a part of a logical tensor is stored."""

    shard: _Shard
    slot: Slot

    @property
    def tensor(self) -> StoredTensor:
        return self.shard.tensors[self.slot.source]

    def view(self) -> Tensor:
        """In the shape of the slot's box, and longer than it where the vocabulary is padded."""
        return self.shard.file.view(self.tensor).reshape(self.slot.factors).permute(self.slot.order)


class Megatron:
    """The weights of a checkpoint of Megatron; see :class:`megapoly.checkpoint.weights.Weights`.

    What several ranks hold, norms and the like, and a tied output layer's copy of the embedding, is compared when it is
    read.

    Args:
        path: a folder of checkpoints, of which it is the latest, or the folder of an iteration.
        vocabulary: rows of the vocabulary that are no padding, where the files do not tell.

    Attributes:
        pads: whether rows of the vocabulary may be padding, which the files do not tell.

    Raises:
        CheckpointError: a rank's file missing or damaged; a model that is no configuration of our decoder; tensors
            missing, unexpected or misshapen.
    """

    def __init__(self, path: Path, vocabulary: int | None = None) -> None:
        self.path = path
        folder = _iteration(path)
        first = _open(next(iter(_rank_folders(folder))))
        args = _arguments(first)
        tp = args.count("tensor_model_parallel_size", args.count("model_parallel_size", 1))  # the second until 2020
        pp = args.count("pipeline_model_parallel_size", 1)
        files = _open_all(folder, tp, pp, first)
        shards = _shards(files, tp, pp)
        naming = naming_of([name for row in shards for name in row[0].tensors])
        padded = _padded(args, shards[0][0].tensors, naming, tp)
        rows, self.notes = _vocabulary(args, padded, vocabulary)
        self.pads = bool(self.notes)
        self.model = to_model(args, naming, rows)
        sources = _account(path, shards, self.model, naming, padded, _order(first, naming, self.model))
        self._sources: dict[str, list[_Source]] = {}
        for source in sources:
            self._sources.setdefault(source.slot.name, []).append(source)
        self.tensors: Mapping[str, tuple[Index, torch.dtype]] = {
            name: (shape, _dtype(self._sources[name])) for name, shape in state.logical_shapes(self.model).items()
        }
        self._files = [file for row in files for file in row]
        root = path if (path / TRACKER).exists() else path.parent
        self.tokenizer = tuple(sorted((root / TOKENIZER).glob("*"))) if (root / TRACKER).exists() else ()
        origin = root / ORIGIN
        kept = read_json(origin) if (root / TRACKER).exists() and origin.exists() else {}
        self.tokenizer_sha256: str | None = kept.get("tokenizer")
        self.origin: Mapping[str, Any] = kept.get("origin", {})
        self.files = (*(file.path for file in self._files), *self.tokenizer, *([origin] if kept else []))

    def read(self, name: str, piece: Piece, out: Tensor) -> None:
        """Fill ``out`` (1-D, ``piece.size`` elements, any device and floating dtype); reads what it needs only.

        Raises:
            CheckpointError: ranks that have to hold the same hold something else; a storage that is damaged.
        """
        check_inside(name, self.tensors[name][0], piece)
        out = out.detach()
        boxes = list(piece.boxes())
        seen: dict[Box, _Source] = {}
        for source in self._sources[name]:
            box = source.slot.box
            common = [(offset, each, each.overlap(box)) for offset, each in boxes]
            if not any(part for _, _, part in common):
                continue
            view = source.view()
            before = seen.setdefault(box, source)
            earlier = None if before is source else before.view()
            for offset, each, part in common:
                if part is None:
                    continue
                values = view[part.slices(box.start)]
                if earlier is None:
                    out[offset : offset + each.size].view(each.shape)[part.slices(each.start)].copy_(values)
                else:
                    _compare(before, source, earlier[part.slices(box.start)], values)

    def release(self) -> None:
        """Give back the memory that was read through; the next read maps it anew."""
        for file in self._files:
            file.release()


def is_folder(path: Path) -> bool:
    """Whether a path looks like a checkpoint of Megatron, or a folder of them."""
    return (path / TRACKER).is_file() or any(path.glob("mp_rank_*"))


def rank_folder(tp: int, pp: int, stages: int) -> str:
    """The folder of a rank, of so many pipeline stages."""
    return f"mp_rank_{tp:02d}_{pp:03d}" if stages > 1 else f"mp_rank_{tp:02d}"


def _iteration(path: Path) -> Path:
    tracker = path / TRACKER
    if not tracker.is_file():
        return path
    try:
        text = tracker.read_text().strip()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{tracker}: cannot be read ({error}); {_AGAIN}") from error
    if text != RELEASE and not re.fullmatch(r"\d{1,12}", text, re.ASCII):
        raise CheckpointError(
            f"{tracker}: has {text[:40]!r}, expected the number of an iteration or {RELEASE!r}; {_AGAIN}"
        )
    folder = path / (RELEASE if text == RELEASE else f"iter_{int(text):07d}")
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: is missing, and {tracker} names it as the latest; copy it, or give the folder of another"
            " iteration"
        )
    return folder


def _rank_folders(folder: Path) -> list[Path]:
    """At least one."""
    found = sorted(each for each in folder.glob("mp_rank_*") if _RANK.fullmatch(each.name))
    if not found and ((folder / "metadata.json").exists() or (folder / ".metadata").exists()):
        raise CheckpointError(
            f"{folder}: is a distributed checkpoint of Megatron, expected files of ranks, mp_rank_00/{FILE}; have"
            " Megatron-LM load it and save it with --ckpt-format torch"
        )
    if not found:
        raise CheckpointError(f"{folder}: has no files of ranks, mp_rank_00/{FILE}; give the folder that holds them")
    experts = [each.name for each in found if _RANK.fullmatch(each.name)[3]]  # type: ignore[index]
    if experts:
        raise CheckpointError(
            f"{folder}: {some(experts)} are of expert parallelism, and megapoly's decoder has no experts; convert"
            " another model"
        )
    return found


def _open(folder: Path) -> TorchFile:
    for name in _FILES:
        if (folder / name).is_file():
            file = TorchFile(folder / name)
            if not isinstance(file.value, dict):
                raise CheckpointError(f"{file.path}: holds no dictionary, expected what Megatron's training saved")
            return file
    raise CheckpointError(f"{folder / FILE}: is missing; {_AGAIN}")


def _arguments(file: TorchFile) -> Arguments:
    found = file.value.get("args")
    if not isinstance(found, Record) or not found.fields:
        raise CheckpointError(
            f"{file.path}: has no arguments ('args'), from which the model is known; take a file that Megatron's"
            " training saved"
        )
    return Arguments(found.fields, str(file.path))


def _open_all(folder: Path, tp: int, pp: int, first: TorchFile) -> list[list[TorchFile]]:
    """The file of every rank, by pipeline rank and then tensor-parallel rank."""
    if tp * pp > _MOST_RANKS:
        raise CheckpointError(f"{first.path}: its arguments say tp {tp} x pp {pp}, more than {_MOST_RANKS}; {_AGAIN}")
    names = [[rank_folder(t, p, pp) for t in range(tp)] for p in range(pp)]
    wanted = [name for row in names for name in row]
    missing = [f"{name}/{FILE}" for name in wanted if not any((folder / name / each).is_file() for each in _FILES)]
    if missing:
        raise CheckpointError(
            f"{folder}: lacks {len(missing)} of the {len(wanted)} files of tp {tp} x pp {pp}: {some(missing)};"
            " copy them"
        )
    left = [each.name for each in _rank_folders(folder) if each.name not in wanted]
    if left:
        raise CheckpointError(
            f"{folder}: {some(left)} are of another layout than tp {tp} x pp {pp}, which the arguments in"
            f" {first.path.parent.name} say; move away what does not belong to this checkpoint"
        )
    files = [[first if folder / name == first.path.parent else _open(folder / name) for name in row] for row in names]
    for key in ("iteration", "checkpoint_version"):
        for file in (file for row in files for file in row):
            found, expected = (_number(each, key) for each in (file, first))
            if found != expected:
                raise CheckpointError(
                    f"{file.path}: has {key} {found}, and {first.path.parent.name} has {expected}; {_AGAIN}"
                )
    return files


def _number(file: TorchFile, key: str) -> float:
    found = file.value.get(key, 0)
    if not isinstance(found, (int, float)):
        raise CheckpointError(f"{file.path}: {key} is no number; {_AGAIN}")
    return found


def _shards(files: list[list[TorchFile]], tp: int, pp: int) -> list[list[_Shard]]:
    """By stage, in the order of the model, and then tensor-parallel rank; a rank of a pipeline may have several."""
    chunks = [key for key in (f"model{number}" for number in range(1000)) if key in files[0][0].value] or ["model"]
    return [[_shard(files[p][t], chunk) for t in range(tp)] for chunk in chunks for p in range(pp)]


def _shard(file: TorchFile, chunk: str) -> _Shard:
    found: dict[str, StoredTensor] = {}
    todo: list[tuple[str, Any, int]] = [("", file.value.get(chunk), 0)]
    if not isinstance(todo[0][1], dict):
        raise CheckpointError(f"{file.path}: has no {chunk!r}, expected tensors by name; {_AGAIN}")
    while todo:
        prefix, tree, depth = todo.pop()
        for key, value in tree.items():
            if isinstance(value, StoredTensor):
                found[f"{prefix}{key}"] = value
            elif isinstance(value, dict) and depth < _DEEPEST:
                todo.append((f"{prefix}{key}.", value, depth + 1))
    naming = naming_of(list(found))
    tensors: dict[str, StoredTensor] = {}
    where = file.path.parent.name if chunk == "model" else f"{file.path.parent.name} {chunk}"
    for name, tensor in found.items():
        own = canonical(name, naming)
        if own is None:
            continue
        if own in tensors:
            raise CheckpointError(f"{file.path}: {name} is there under two names; {_AGAIN}")
        tensors[own] = tensor
    return _Shard(file, where, tensors)


def _padded(args: Arguments, tensors: dict[str, StoredTensor], naming: str, tp: int) -> int:
    """Rows of the table of the vocabulary, of all ranks."""
    table = tensors.get(f"{NAMINGS[naming].embedding}.weight")
    return args.count("padded_vocab_size", table.shape[0] * tp if table is not None and table.shape else None)


def _vocabulary(args: Arguments, padded: int, given: int | None) -> tuple[int, list[str]]:
    """How many rows are no padding, and sentences about what was assumed."""
    if given is not None:
        if not 0 < given <= padded:
            raise CheckpointError(
                f"{args.where}: its vocabulary has {padded} rows, and {given} were given to be no padding"
            )
        return given, []
    own = args.get("vocab_size")
    if type(own) is int:
        own += args.get("tokenizer_type") == "NullTokenizer"  # which adds the end of a document
        if 0 < own <= padded:
            return own, []
    return padded, [
        f"{args.where}: does not tell the size of the vocabulary; all {padded:,} rows were taken, and those at the end"
        " may be padding: give --vocabulary N, or --tokenizer FILE, to leave them out"
    ]


def _order(file: TorchFile, naming: str, model: Model) -> str:
    """Of the rows of queries, keys and values."""
    if naming != "legacy":
        return "groups"
    version = _number(file, "checkpoint_version")
    order = _ORDERS.get(version)
    if order is None or (order != "groups" and model.groups != model.heads):
        raise CheckpointError(
            f"{file.path}: checkpoint_version is {version}, expected one of {', '.join(map(str, _ORDERS))}, and at"
            " least 2 with grouped queries; let Megatron load and save it"
        )
    return order


def _account(
    path: Path, shards: list[list[_Shard]], model: Model, naming: str, padded: int, order: str
) -> list[_Source]:
    """Every slot with its tensor, once all tensors are accounted for."""
    counts = [layer_count(list(row[0].tensors), naming) for row in shards]
    found = {f"{shard.where}: {name}": each for row in shards for shard in row for name, each in shard.tensors.items()}
    if sum(counts) != model.layers or model.layers > len(found):
        raise CheckpointError(
            f"{path}: its files hold {sum(counts)} layers, and num_layers is {model.layers}; {_AGAIN}"
        )
    expected: dict[str, tuple[_Shard, Slot]] = {}
    for number, row in enumerate(shards):
        begin, end = sum(counts[:number]), sum(counts[: number + 1])
        for rank, shard in enumerate(row):
            part = Part(len(row), rank, begin, end, number == 0, number == len(shards) - 1, padded, order)
            for slot in slots(model, part, naming):
                if slot.source in shard.tensors or part.first or not is_copy(slot, naming):
                    expected[f"{shard.where}: {slot.source}"] = (shard, slot)
    check_tensors(
        path,
        {name: tensor.shape for name, tensor in found.items()},
        {name: slot.shape for name, (_, slot) in expected.items()},
        "its tensors are not those of the model that its arguments describe",
        "Take a checkpoint of a GPT model of Megatron",
    )
    for name, tensor in found.items():
        check_dtype(path, name, tensor.dtype)
    return [_Source(shard, slot) for shard, slot in expected.values()]


def _dtype(sources: list[_Source]) -> torch.dtype:
    first, *others = sources
    for each in others:
        if each.tensor.dtype != first.tensor.dtype:
            raise CheckpointError(
                f"{each.shard.file.path}: {each.slot.source} is {each.tensor.dtype}, and {first.tensor.dtype} in"
                f" {first.shard.where}; {_AGAIN}"
            )
    return first.tensor.dtype


_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def _compare(first: _Source, second: _Source, one: Tensor, other: Tensor) -> None:
    """Refuse copies that are not the same, bit for bit."""
    bits = _BITS[one.dtype.itemsize]
    if torch.equal(one.view(bits), other.view(bits)):
        return
    raise CheckpointError(
        f"{second.shard.file.path}: {second.slot.source} has to be the same as {first.slot.source} in"
        f" {first.shard.where}, and differs by up to {(one.double() - other.double()).abs().max().item():.3g}; take a"
        " checkpoint whose ranks agree"
    )
