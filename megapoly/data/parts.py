"""Datasets that are to become one: what is known of them, and their documents one after another. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megapoly.data import _index
from megapoly.data.indexed import IndexedDataset, part
from megapoly.data.sidecar import Checksums, Sidecar
from megapoly.errors import DataError

Int64s = npt.NDArray[np.int64]

_CHUNK = 1 << 18  # documents looked at together


@dataclass(frozen=True)
class Part:
    """What is known of a part while it is not open. Its sidecar is without the checksums."""

    prefix: Path
    dtype: np.dtype[np.generic]
    documents: int
    tokens: int
    train_documents: int
    train_tokens: int
    pack: int
    sidecar: Sidecar | None

    @classmethod
    def look(cls, prefix: Path) -> Part:
        """Open a dataset for a moment."""
        opened = IndexedDataset(prefix)
        side = opened.sidecar
        if side is not None:
            side = side.model_copy(update={"checksums": Checksums(block=_index.BLOCK_BYTES, bin="", idx="")})
        counts = (opened.documents, opened.tokens, opened.train_documents, opened.train_tokens)
        return cls(prefix, opened.dtype, *counts, opened.pack, side)

    @property
    def held_tokens(self) -> int:
        return self.tokens - self.train_tokens

    @property
    def bytes(self) -> int:
        return self.tokens * self.dtype.itemsize

    def range(self, held: bool) -> tuple[int, int]:
        """The first of the held-out or of the training documents, and the one after the last."""
        return (self.train_documents, self.documents) if held else (0, self.train_documents)

    def open(self) -> tuple[IndexedDataset, _index.Part]:
        """The dataset and its tokens, both as they were when it was looked at."""
        dataset = IndexedDataset(self.prefix)
        seen = (dataset.dtype, dataset.documents, dataset.tokens, dataset.train_documents, dataset.pack)
        if seen != (self.dtype, self.documents, self.tokens, self.train_documents, self.pack):
            raise DataError(f"{self.prefix}: has changed while it was merged; merge again when nothing writes to it")
        return dataset, dataset.part()


def find_parts(names: Sequence[str | Path]) -> list[Path]:
    """Prefixes in the order given, each once; patterns such as ``en-*`` give theirs in the order of their numbers.

    A file of a dataset stands for it, so that a pattern that a shell has expanded to all files is none the worse.

    Raises:
        DataError: a pattern that fits no dataset.
    """
    found: dict[Path, None] = {}
    for name in map(str, names):
        if any(sign in name for sign in "*?[") and not part(Path(name), ".idx").exists():
            folder, pattern = Path(name).parent, Path(name).name
            there = [path.with_suffix("") for path in folder.glob(pattern + ".idx")]
            if not there:
                raise DataError(f"{name}: fits no dataset; a pattern is of names without .bin, .idx, .json")
            found.update(dict.fromkeys(sorted(there, key=_by_number)))
        else:
            path = Path(name)
            own = path.suffix in (".bin", ".idx", ".json") and not part(path, ".idx").exists()
            found[path.with_suffix("") if own else path] = None
    return list(found)


def _by_number(path: Path) -> list[tuple[int, str]]:
    return [(int(word), "") if word.isdigit() else (-1, word) for word in re.split(r"([0-9]+)", str(path))]


def documents(dataset: IndexedDataset, first: int, stop: int) -> Iterator[tuple[int, Int64s]]:
    """Documents [first, stop) of a dataset in chunks: the first token, and the lengths, which may be 0.

    Raises:
        DataError: lengths, pointers and indices do not follow from each other.
    """
    for begin in range(first, stop, _CHUNK):
        end = min(stop, begin + _CHUNK)
        indices = dataset.document_indices[begin : end + 1]
        low, high = int(indices[0]), int(indices[-1])
        if (np.diff(indices) < 0).any() or low < 0 or high > len(dataset.lengths):
            raise dataset.damaged(f"the indices of documents {begin} to {end - 1}")
        lengths, pointers = dataset.lengths[low:high], dataset.pointers[low : high + 1]
        start = dataset.start(begin)
        places = start + np.concatenate([[0], np.cumsum(lengths)])
        if (lengths < 0).any() or (places[: len(pointers)] * dataset.dtype.itemsize != pointers).any():
            raise dataset.damaged(f"the lengths or pointers of documents {begin} to {end - 1}")
        yield start, np.diff(places[indices - low])


def count_documents(part: Part, first: int, stop: int) -> int:
    """How many of documents [first, stop) have a token."""
    dataset = IndexedDataset(part.prefix)
    return sum(int((lengths > 0).sum()) for _, lengths in documents(dataset, first, stop))
