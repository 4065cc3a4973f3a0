"""Weights in a folder of Hugging Face: ``config.json`` beside files of tensors, read in pieces.

Families: ``llama`` (SmolLM among them), ``mistral``, ``qwen2``, ``gpt2`` (PolyLM among them) and ``bloom``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megapoly.checkpoint import state
from megapoly.checkpoint.accounting import check_tensors
from megapoly.checkpoint.families import BUFFERS, HEAD, PREFIXES, Slot, slots
from megapoly.checkpoint.huggingface_config import to_model
from megapoly.checkpoint.pieces import check_inside
from megapoly.checkpoint.tensor_files import TensorFiles, check_dtype
from megapoly.data.huggingface_tokenizer import SETTINGS, TEMPLATE, read_settings
from megapoly.errors import CheckpointError
from megapoly.spec import Index, Piece

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
SENTENCEPIECE = "tokenizer.model"
TOKENIZER_SETTINGS = (SETTINGS, "special_tokens_map.json")
TOKENIZER_FILES = (
    "tokenizer.json", SENTENCEPIECE, *TOKENIZER_SETTINGS, "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip


class HuggingFace:
    """The weights of a folder that transformers saved; see :class:`megapoly.checkpoint.weights.Weights`.

    Attributes:
        notes: sentences about what was assumed.

    Raises:
        CheckpointError: a model that is no configuration of our decoder; tensors missing, unexpected or misshapen.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        config = read_json(path / CONFIG)
        self.model, self.notes = to_model(config, str(path / CONFIG))
        self._files = TensorFiles(path)
        found = slots(config["model_type"], self.model)
        self._names = _account(path, self._files, found, PREFIXES[config["model_type"]])
        self._slots: dict[str, list[Slot]] = {}
        for slot in found:
            self._slots.setdefault(slot.name, []).append(slot)
        self.tensors: Mapping[str, tuple[Index, torch.dtype]] = {
            name: (shape, self._dtype(name)) for name, shape in state.logical_shapes(self.model).items()
        }
        self.tokenizer = tuple(path / name for name in TOKENIZER_FILES if (path / name).is_file())
        self.tokenizer_sha256 = sha256(path / SENTENCEPIECE) if path / SENTENCEPIECE in self.tokenizer else None
        self.files = (path / CONFIG, *self._files.files, *self.tokenizer)
        generation = path / GENERATION_CONFIG
        kept = {"config": config, **({"generation_config": read_json(generation)} if generation.exists() else {})}
        template = read_settings(path / SETTINGS).get(TEMPLATE)
        self.origin: Mapping[str, Any] = {"huggingface": kept, **({"template": template} if template else {})}
        if self.model.tied:
            self._check_tied(next(slot.source for slot in found if slot.name == "embedding.weight"))

    def read(self, name: str, piece: Piece, out: Tensor) -> None:
        """Fill ``out`` (1-D, ``piece.size`` elements, any device and floating dtype); reads what it needs only."""
        check_inside(name, self.tensors[name][0], piece)
        out = out.detach()
        for slot in self._slots[name]:
            view = self._files.get(self._names[slot.source]).view(slot.factors).permute(slot.order)
            for offset, box in piece.boxes():
                common = box.overlap(slot.box)
                if common is not None:
                    target = out[offset : offset + box.size].view(box.shape)
                    target[common.slices(box.start)].copy_(view[common.slices(slot.box.start)])

    def release(self) -> None:
        """Give back the memory that was read through; the next read maps it anew."""
        self._files.release()

    def _dtype(self, name: str) -> torch.dtype:
        """The stored one; where parts differ the one that holds them all."""
        dtypes = [self._files.tensors[self._names[slot.source]][1] for slot in self._slots[name]]
        result = dtypes[0]
        for each in dtypes[1:]:
            result = torch.promote_types(result, each)
        return result

    def _check_tied(self, embedding: str) -> None:
        """A stored output weight that is not the embedding would be lost; some rows tell."""
        if HEAD not in self._files.tensors:
            return
        output, rows = self._files.get(HEAD), self._files.get(self._names[embedding])
        at = [0, len(rows) // 2, len(rows) - 1]
        if output.shape != rows.shape or not all(torch.equal(output[i], rows[i]) for i in at):
            raise CheckpointError(
                f"{self.path / CONFIG}: tie_word_embeddings says that the output layer has the weight of the embedding,"
                f" but {HEAD} is another tensor; set tie_word_embeddings to false, or remove {HEAD} from the weights"
            )
        self.release()


def _account(path: Path, files: TensorFiles, found: list[Slot], prefix: str) -> dict[str, str]:
    """Names in the files by the names of the slots, once every tensor is accounted for."""
    expected = {slot.source: slot.shape for slot in found}
    full = {
        name if name in expected else prefix + name if prefix + name in expected else name: name
        for name in files.tensors
    }
    present = {
        name: files.tensors[own][0]
        for name, own in full.items()
        if name in expected or not (BUFFERS.fullmatch(name) or name == HEAD)
    }
    advice = f"Take the {CONFIG} and the weights of one model"
    check_tensors(path, present, expected, f"its weights are not those of its {CONFIG}", advice)
    for name in expected:
        check_dtype(path, name, files.tensors[full[name]][1])
    return {name: full[name] for name in expected}


def read_json(path: Path) -> dict[str, Any]:
    """An object of a JSON file.

    Raises:
        CheckpointError: it cannot be read, or is none.
    """
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); copy it again from its source") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds {type(found).__name__}, expected an object of keys")
    return found


def tokenizer_of(path: Path) -> tuple[Path, ...]:
    """A tokenizer's file, and those beside it that belong to a tokenizer.json; empty where there is none."""
    beside = TOKENIZER_SETTINGS if path.suffix == ".json" else ()
    return tuple(each for each in (path, *map(path.with_name, beside)) if path.is_file() and each.is_file())


def tokenizers_among(files: Sequence[Path]) -> list[Path]:
    """Those of a tokenizer's files that hold it whole; a run's may have any name.

    A ``tokenizer.json`` comes first: models that were given tokens later have them there alone.
    """
    whole = [path for path in files if path.name in TOKENIZER_FILES[:2] or path.name not in TOKENIZER_FILES]
    return sorted(whole, key=lambda path: path.name != "tokenizer.json")


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def is_folder(path: Path) -> bool:
    """Whether a path looks like a folder of Hugging Face; the config.json of a run folder has no model_type.

    Raises:
        CheckpointError: its config.json cannot be read.
    """
    return (path / CONFIG).is_file() and "model_type" in read_json(path / CONFIG)
