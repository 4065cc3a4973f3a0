"""Reads every byte of an indexed dataset and locates what is damaged. No torch."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megapoly.data._index import BLOCK_BYTES
from megapoly.data.indexed import HEADER, IndexedDataset
from megapoly.data.sidecar import Checksums
from megapoly.errors import DataError

_CHUNK = 1 << 20  # entries of the .idx looked at together


@dataclass(frozen=True)
class Damage:
    """What is wrong with bytes [start, stop) of a file; the first and last document there, where that can be told."""

    path: Path
    start: int
    stop: int
    what: str
    documents: tuple[int, int] | None = None

    def __str__(self) -> str:
        where = f"{self.path}, bytes {self.start} to {self.stop - 1}"
        if self.documents:
            where += f", documents {self.documents[0]} to {self.documents[1]}"
        return f"{where}: {self.what}"


def verify(
    prefix: str | Path,
    *,
    vocabulary: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Damage]:
    """Check every pointer, index, checksum and token of a dataset; no damage is an empty list.

    Args:
        prefix: the dataset.
        vocabulary: of a foreign dataset, whose ids are else only checked not to be negative.
        progress: hears of the bytes read and of all bytes.

    Raises:
        DataError: the dataset cannot be opened at all.
    """
    dataset = IndexedDataset(prefix)
    sums = dataset.sidecar.checksums if dataset.sidecar else None
    if sums is not None and sums.block != BLOCK_BYTES:
        raise DataError(f"{prefix}.json: checksums of blocks of {sums.block} bytes; expected {BLOCK_BYTES}")
    limit = dataset.sidecar.tokenizer.vocabulary if dataset.sidecar else vocabulary
    total = dataset.idx_path.stat().st_size + dataset.bin_path.stat().st_size
    found: list[Damage] = []
    done = 0
    for start, block in _blocks(dataset.idx_path, sums.idx if sums else None, found):
        done = start + len(block)
        progress(done, total)
    index_damage = list(_index_damage(dataset))
    for start, block in _blocks(dataset.bin_path, sums.bin if sums else None, found):
        if wrong := _wrong_id(dataset, start, block, limit):
            found.append(wrong)
        progress(done + start + len(block), total)
    found += index_damage
    return found if index_damage else [_with_documents(dataset, damage) for damage in found]


def _blocks(path: Path, digits: str | None, found: list[Damage]) -> Iterator[tuple[int, bytes]]:
    """The file in blocks with their offsets; appends what the checksums tell, neighbouring blocks joined."""
    sums = Checksums.split(digits) if digits is not None else None
    size, number = path.stat().st_size, 0
    blocks = -(-size // BLOCK_BYTES)
    if sums is not None and len(sums) != blocks:
        found.append(Damage(path, 0, size, f"there are {blocks} blocks, and checksums for {len(sums)}"))
        sums = None
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            start = number * BLOCK_BYTES
            if sums is not None and zlib.crc32(block) != sums[number]:
                wrong = Damage(path, start, start + len(block), "the content has changed since it was built (checksum)")
                if found and (found[-1].path, found[-1].stop, found[-1].what) == (path, start, wrong.what):
                    found[-1] = replace(found[-1], stop=wrong.stop)
                else:
                    found.append(wrong)
            yield start, block
            number += 1


def _index_damage(dataset: IndexedDataset) -> Iterator[Damage]:
    """The first wrong length, pointer and document index. Pointer 0 and index 0 were checked on opening."""
    lengths, pointers, indices, size = (
        dataset.lengths,
        dataset.pointers,
        dataset.document_indices,
        dataset.dtype.itemsize,
    )

    def negative_length(a: int, b: int) -> npt.NDArray[np.bool_]:
        return lengths[a:b] < 0

    def wrong_pointer(a: int, b: int) -> npt.NDArray[np.bool_]:
        return pointers[a:b] != pointers[a - 1 : b - 1] + lengths[a - 1 : b - 1].astype(np.int64) * size

    def backwards(a: int, b: int) -> npt.NDArray[np.bool_]:
        return indices[a:b] < indices[a - 1 : b - 1]

    at = HEADER.size
    for table, first, wrong, what in (
        (lengths, 0, negative_length, "a negative length of sequence"),
        (pointers, 1, wrong_pointer, "a pointer that does not follow from the lengths, of sequence"),
        (indices, 1, backwards, "a document index that runs backwards, of document"),
    ):
        number = _first(wrong, first, len(table))
        if number is not None:
            start = at + number * table.itemsize
            yield Damage(dataset.idx_path, start, start + table.itemsize, f"{what} {number}")
        at += table.nbytes


def _first(wrong: Callable[[int, int], npt.NDArray[np.bool_]], start: int, stop: int) -> int | None:
    """The first number in [start, stop) that ``wrong`` says yes to, of chunks [a, b)."""
    for a in range(start, stop, _CHUNK):
        bad = np.flatnonzero(wrong(a, min(stop, a + _CHUNK)))
        if len(bad):
            return a + int(bad[0])
    return None


def _wrong_id(dataset: IndexedDataset, start: int, block: bytes, vocabulary: int | None) -> Damage | None:
    """The first id of a block that is outside the vocabulary."""
    item = dataset.dtype.itemsize
    ids = np.frombuffer(block, dataset.dtype)
    limit = np.iinfo(np.int64).max if vocabulary is None else vocabulary - 1
    if ids.min() >= 0 and ids.max() <= limit:
        return None
    number = int(np.flatnonzero((ids < 0) | (ids > limit))[0])
    at = start + number * item
    what = f"token {at // item} has id {ids[number]}, outside the vocabulary"
    return Damage(dataset.bin_path, at, at + item, what + (f" of {vocabulary}" if vocabulary else ""))


def _with_documents(dataset: IndexedDataset, damage: Damage) -> Damage:
    if damage.path != dataset.bin_path:
        return damage
    item = dataset.dtype.itemsize
    first, last = dataset.document_at(damage.start // item), dataset.document_at((damage.stop - 1) // item)
    return replace(damage, documents=(first, last))
