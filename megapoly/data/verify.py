"""Reads every byte of an indexed dataset and locates what is damaged. No torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from megapoly.data import _index
from megapoly.data._index import BLOCK_BYTES
from megapoly.data.indexed import DTYPES, Column, IndexedDataset, part
from megapoly.data.sidecar import Checksums, has_changed
from megapoly.errors import DataError

_CHUNK = 1 << 20  # entries of the .idx looked at together
_BLOCKS = 16  # read by a thread at a time
_CHANGED = "the content has changed since it was built (checksum)"


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
    threads: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Damage]:
    """Check every pointer, index, checksum and token of a dataset; no damage is an empty list.

    A place is reported once: where a checksum tells that blocks have changed, what is seen to be wrong inside them
    (an id, a pointer) is told with them.

    Args:
        prefix: the dataset.
        vocabulary: of a foreign dataset, whose ids are else only checked not to be negative.
        threads: that read; 0 is one for each core.
        progress: hears of the bytes read and of all bytes.

    Raises:
        DataError: the dataset cannot be opened at all, or not be read.
    """
    dataset = IndexedDataset(prefix)
    sums = dataset.sidecar.checksums if dataset.sidecar else None
    limit = dataset.sidecar.ids if dataset.sidecar else vocabulary
    columns = dataset.document_indices
    sizes = (columns.offset + len(columns) * columns.itemsize, dataset.tokens * dataset.dtype.itemsize)
    code = next(code for code, name in DTYPES.items() if dataset.dtype == name)
    with ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
        scan = _Scan(pool, lambda done: progress(done, sum(sizes)))
        changed, _ = scan(dataset.idx_path, sizes[0], sums.idx if sums else None, 0, None)
        in_index = _told_with(changed, list(_index_damage(dataset)))
        changed, wrong = scan(dataset.bin_path, sizes[1], sums.bin if sums else None, code, limit)
    in_tokens = _told_with(changed, [[_wrong_id(dataset, at, found, limit)] for at, found in wrong])
    # Where the index is damaged, it cannot be asked for documents.
    in_tokens = in_tokens if in_index else [_with_documents(dataset, damage) for damage in in_tokens]
    return _sidecar_damage(dataset) + in_index + in_tokens


class _Scan:
    """Reads files in blocks, on several threads; ``progress`` hears of the bytes of all files so far."""

    def __init__(self, pool: ThreadPoolExecutor, progress: Callable[[int], None]) -> None:
        self._pool, self._progress, self._done = pool, progress, 0

    def __call__(
        self, path: Path, size: int, digits: str | None, code: int, limit: int | None
    ) -> tuple[list[Damage], list[tuple[int, int]]]:
        """Changed blocks, neighbours joined; and of each block the first token outside the vocabulary, with its id.

        Of the first ``size`` bytes, which were there when the dataset was opened.
        """
        wanted = Checksums.split(digits) if digits is not None else None
        below = np.iinfo(np.int64).max if limit is None else limit
        blocks = -(-size // BLOCK_BYTES)
        changed: list[Damage] = []
        wrong: list[tuple[int, int]] = []
        with _opened(path) as file:
            if os.fstat(file.fileno()).st_size != size:
                raise DataError(f"{path}: had {size} bytes when it was opened, and has other ones now; verify it again")
            firsts = range(0, blocks, _BLOCKS)
            parts = self._pool.map(
                lambda first: _index.scan(str(path), file.fileno(), code, below, first, _BLOCKS), firsts
            )
            for first, (crcs, at, ids) in zip(firsts, parts, strict=True):
                if first + len(crcs) < min(first + _BLOCKS, blocks):
                    raise DataError(f"{path}: became shorter than its {size} bytes while it was read; verify it again")
                for number, crc in enumerate(crcs, first):
                    if wanted is not None and crc != wanted[number]:
                        _add_block(changed, path, number * BLOCK_BYTES, min(size, (number + 1) * BLOCK_BYTES))
                wrong += [(token, found) for token, found in zip(at, ids) if token >= 0]
                self._progress(self._done + min(size, (first + _BLOCKS) * BLOCK_BYTES))
        self._done += size
        return changed, wrong


def _opened(path: Path) -> IO[bytes]:
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read any more ({error.strerror}); verify it again") from error


def _add_block(changed: list[Damage], path: Path, start: int, stop: int) -> None:
    if changed and changed[-1].stop == start:
        changed[-1] = replace(changed[-1], stop=stop)
    else:
        changed.append(Damage(path, start, stop, _CHANGED))


def _told_with(changed: list[Damage], seen: list[list[Damage]]) -> list[Damage]:
    """Both, in the order of the file; what was seen inside of changed blocks is told with those.

    What was seen is a list of the places, likeliest first, of which one is wrong.
    """
    result = list(changed)
    for places in seen:
        inside = [
            (i, place)
            for place in places
            for i, blocks in enumerate(changed)
            if blocks.start < place.stop and place.start < blocks.stop
        ]
        if inside:
            i, place = inside[0]
            detail = f"bytes {place.start} to {place.stop - 1}: {place.what}"
            result[i] = replace(result[i], what=f"{result[i].what}; {detail}")
        else:
            result.append(places[0])
    return sorted(result, key=lambda damage: damage.start)


def _sidecar_damage(dataset: IndexedDataset) -> list[Damage]:
    path = part(dataset.prefix, ".json")
    if dataset.sidecar is None or not has_changed(path):
        return []
    return [Damage(path, 0, path.stat().st_size, _CHANGED)]


def _index_damage(dataset: IndexedDataset) -> Iterator[list[Damage]]:
    """Where the first wrong length or pointer may be, and the first wrong index; opening has checked those of 0."""
    lengths, pointers, indices = dataset.lengths, dataset.pointers, dataset.document_indices
    size = dataset.dtype.itemsize

    def negative(a: int, b: int) -> npt.NDArray[np.bool_]:
        return lengths[a:b] < 0

    def apart(a: int, b: int) -> npt.NDArray[np.bool_]:
        return np.diff(pointers[a - 1 : b]) != lengths[a - 1 : b - 1] * size

    def backwards(a: int, b: int) -> npt.NDArray[np.bool_]:
        return np.diff(indices[a - 1 : b]) < 0

    def place(column: Column, number: int, what: str) -> Damage:
        start = column.offset + number * column.itemsize
        return Damage(dataset.idx_path, start, start + column.itemsize, what)

    at = _first(negative, 0, len(lengths))
    if at is not None:  # and so the pointer after it does not fit
        yield [place(lengths, at, f"negative length of sequence {at}")]
    elif (at := _first(apart, 1, len(pointers))) is not None:
        what = f"pointer that does not follow from the lengths, of sequence {at}"
        before = f"length or pointer that the next pointer does not follow from, of sequence {at - 1}"
        yield [place(pointers, at, what), place(pointers, at - 1, before), place(lengths, at - 1, before)]
    if (at := _first(backwards, 1, len(indices))) is not None:
        what = "document index that runs backwards, of document"
        yield [place(indices, at, f"{what} {at}"), place(indices, at - 1, f"{what} {at - 1}")]


def _first(wrong: Callable[[int, int], npt.NDArray[np.bool_]], start: int, stop: int) -> int | None:
    """The first number in [start, stop) that ``wrong`` says yes to, of chunks [a, b)."""
    for a in range(start, stop, _CHUNK):
        bad = np.flatnonzero(wrong(a, min(stop, a + _CHUNK)))
        if len(bad):
            return a + int(bad[0])
    return None


def _wrong_id(dataset: IndexedDataset, token: int, found: int, vocabulary: int | None) -> Damage:
    item = dataset.dtype.itemsize
    what = f"token {token} has id {found}, outside the vocabulary" + (f" of {vocabulary}" if vocabulary else "")
    return Damage(dataset.bin_path, token * item, (token + 1) * item, what)


def _with_documents(dataset: IndexedDataset, damage: Damage) -> Damage:
    item = dataset.dtype.itemsize
    first, last = dataset.document_at(damage.start // item), dataset.document_at((damage.stop - 1) // item)
    return replace(damage, documents=(first, last))
