"""Indexed datasets: tokens on disk in Megatron's format, with a sidecar beside it. No torch.

PREFIX.bin holds the tokens of all documents, one after another. PREFIX.idx, little-endian: magic, version 1 (u64),
dtype code (u8), number of sequences n (u64), number of document indices d + 1 (u64), n lengths in tokens (i32), n
pointers in bytes (i64), d + 1 indices (i64): document i is sequences [indices[i], indices[i + 1]). The format is that
of megatron.core.datasets.indexed_dataset. We write one sequence per document and read any number. PREFIX.json, which
only megapoly writes, is a :class:`~megapoly.data.sidecar.Sidecar`. Held-out documents stand at the end of the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import weakref
from bisect import bisect_right
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt

from megapoly.data import _index
from megapoly.data.sidecar import Checksums, Sidecar, has_changed
from megapoly.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}


def dtype_code(vocabulary: int) -> int:
    """Megatron's rule: uint16 (code 8) below 65,500 ids, else int32 (code 4)."""
    return 8 if vocabulary < 65500 else 4


def part(prefix: Path, suffix: str) -> Path:
    """The file of a dataset with a suffix such as ``.bin``."""
    return prefix.with_name(prefix.name + suffix)


class Column:
    """Whole numbers that stand in an open file, read (not mapped) when they are asked for: a number or a slice.

    Indexing raises :class:`DataError` where the file has become shorter.
    """

    def __init__(self, path: Path, descriptor: int, dtype: str, count: int, offset: int) -> None:
        self._path, self._descriptor, self._dtype = path, descriptor, np.dtype(dtype)
        self._count, self.offset, self.itemsize = count, offset, self._dtype.itemsize

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, at: int) -> int: ...

    @overload
    def __getitem__(self, at: slice) -> npt.NDArray[np.int64]: ...

    def __getitem__(self, at: int | slice) -> int | npt.NDArray[np.int64]:
        if isinstance(at, slice):
            start, stop, step = at.indices(self._count)
            return self._read(start, max(start, stop))[::step]
        at = at + self._count if at < 0 else at
        if not 0 <= at < self._count:
            raise IndexError(f"number {at} of {self._count}")
        return int(self._read(at, at + 1)[0])

    def _read(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        size, first = (stop - start) * self.itemsize, self.offset + start * self.itemsize
        try:
            data = b""
            while len(data) < size and (more := os.pread(self._descriptor, size - len(data), first + len(data))):
                data += more
        except OSError as error:
            raise DataError(f"{self._path}: cannot be read at byte {first} ({error.strerror})") from error
        if len(data) < size:
            raise DataError(
                f"{self._path}: ends at byte {first + len(data)}, earlier than when it was opened; build it again"
            )
        return np.frombuffer(data, self._dtype).astype(np.int64)


class IndexedDataset:
    """An indexed dataset, opened for reading; cheap to open whatever its size, and safe to pickle.

    Attributes:
        prefix: the path without ``.bin``, ``.idx``, ``.json``.
        dtype: of the tokens on disk.
        documents, tokens: counts of all.
        train_documents, train_tokens: counts of the first ones, which are not held out.
        sidecar: what PREFIX.json says; None for a foreign dataset, of which nothing is held out.
        pack: where the .bin is a row of packs, their length in tokens; 0 for a stream.
        marked: where ids are marked (:mod:`megapoly.data.instructions`), the vocabulary of the tokenizer: an id from
            there on is that of a token to be learned, and so much more; 0 where ids are tokens, all to be learned.
        reader: what :mod:`megapoly.data.samples` reads batches from; it holds its files open by itself.
        lengths, pointers, document_indices: the columns of the .idx.
        identity: hex hash of the content: from the checksums in the sidecar, else from header, counts and sizes.
    """

    def __init__(self, prefix: str | Path) -> None:
        """Open PREFIX.

        Raises:
            DataError: a file is missing or cut short, is of another format, or does not fit the others.
        """
        self.prefix = Path(prefix)
        self.bin_path, self.idx_path = part(self.prefix, ".bin"), part(self.prefix, ".idx")
        self.sidecar = Sidecar.read(part(self.prefix, ".json"))
        self._descriptor = self._open(self.bin_path)
        weakref.finalize(self, os.close, self._descriptor)
        self._index = self._open(self.idx_path)
        weakref.finalize(self, os.close, self._index)
        self._header = self._read_header()
        self._check_ends()
        self.documents = len(self.document_indices) - 1
        side = self.sidecar
        padding = -1 if side is None or side.padding is None else side.padding.id
        self.marked = 0 if side is None or side.instructions is None else side.tokenizer.vocabulary
        self.reader = _index.Dataset(
            str(self.bin_path), self._descriptor, self._code, self.tokens,
            str(self.idx_path), self._index, len(self.pointers), self.documents, padding, self.marked,
        )  # fmt: skip
        self.pack = 0 if self.sidecar is None else self.sidecar.pack
        self.train_documents, self.train_tokens = self.documents, self.tokens
        if self.sidecar is not None:
            self._check_sidecar(self.sidecar)
            self._check_pack(self.sidecar)
        self.identity = self._identity()

    def gather(self, starts: npt.NDArray[np.int64], length: int, vocabulary: int) -> npt.NDArray[np.int64]:
        """[n, length]: the tokens from each of ``starts`` [n], across documents.

        Raises:
            DataError: a window leaves the file, an id is not in [0, vocabulary), or the file cannot be read.
        """
        starts = np.asarray(starts, np.int64)
        path = str(self.bin_path)
        return _index.gather(path, self._descriptor, self._code, self.tokens, vocabulary, starts, length)

    def boundaries(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """[k], ascending: the first tokens d of documents with start < d < stop. Reads nothing but the .idx.

        Raises:
            DataError: ``start`` is not in the file, or the .idx is damaged there or cannot be read.
        """
        return self.reader.boundaries(start, stop - 1)

    def document(self, i: int) -> npt.NDArray[np.int64]:
        """Tokens of document ``i``, with the one that ends it."""
        ids = self._stored(i)
        return ids % self.marked if self.marked else ids

    def learned(self, i: int) -> npt.NDArray[np.bool_]:
        """Which tokens of document ``i`` are to be learned."""
        return self._stored(i) >= self.marked

    def _stored(self, i: int) -> npt.NDArray[np.int64]:
        if not 0 <= i < self.documents:
            raise IndexError(f"document {i} of {self.documents}")
        first, last = self.document_indices[i : i + 2].tolist()
        start, stop = self.start(i), self.start(i + 1)
        if not 0 <= start <= stop <= self.tokens or self.lengths[first:last].sum() != stop - start:
            raise self.damaged(f"the lengths or pointers of document {i}")
        count = self.sidecar.ids if self.sidecar else np.iinfo(np.int64).max
        return self.gather(np.array([start]), stop - start, count)[0]

    def start(self, i: int) -> int:
        """First token of document ``i``; where ``i`` is the number of documents, the number of tokens."""
        sequence = self.document_indices[i]
        if sequence == len(self.pointers):
            return self.tokens
        if not 0 <= sequence < len(self.pointers):
            raise self.damaged(f"the index of document {i}")
        return self.pointers[sequence] // self.dtype.itemsize

    def document_at(self, token: int) -> int:
        """The document that holds a token."""
        return bisect_right(range(self.documents), token, key=self.start) - 1

    def part(self) -> _index.Part:
        """What :mod:`megapoly.data.merge` reads from; where there is a sidecar, it compares the checksums as it reads.

        Raises:
            DataError: the .idx or the .json is not what its checksums tell.
        """
        sums, crcs = self.sidecar.checksums if self.sidecar else None, list[int]()
        if sums is not None:
            if has_changed(path := part(self.prefix, ".json")):
                raise DataError(
                    f"{path}: the content has changed since it was built (checksum); build or copy the dataset anew"
                )
            crcs = Checksums.split(sums.bin)
            wanted = Checksums.split(sums.idx)
            found, _, _ = _index.scan(str(self.idx_path), self._index, 0, 0, 0, len(wanted))
            if found != wanted:
                raise self.damaged("a block whose checksum differs")
        size = self.tokens * self.dtype.itemsize
        return _index.Part(str(self.bin_path), self._descriptor, size, self._code, crcs)

    def __reduce__(self) -> tuple[type[IndexedDataset], tuple[Path]]:
        return IndexedDataset, (self.prefix,)

    def _open(self, path: Path) -> int:
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error.strerror}); an indexed dataset is {self.prefix}.bin and"
                f" {self.prefix}.idx, and `megapoly data build` writes them"
            ) from error

    def damaged(self, what: str) -> DataError:
        """The error for an .idx that is found to be damaged at ``what``."""
        return DataError(f"{self.idx_path}: is damaged at {what}; `megapoly data verify` finds where")

    def _read_header(self) -> bytes:
        path, size = self.idx_path, os.fstat(self._index).st_size
        header = os.pread(self._index, HEADER.size, 0)
        if len(header) < HEADER.size:
            raise DataError(f"{path}: is cut short: {size} bytes, fewer than its header of {HEADER.size}")
        magic, version, code, sequences, entries = HEADER.unpack(header)
        if magic != MAGIC or version != 1:
            raise DataError(
                f"{path}: begins with {magic!r}, version {version}; an index begins with {MAGIC!r}, version 1"
            )
        if code not in DTYPES:
            raise DataError(f"{path}: dtype code {code} is not of the format, which has {DTYPES}")
        if DTYPES[code].startswith("float"):
            raise DataError(f"{path}: holds {DTYPES[code]} values; token ids are whole numbers")
        expected = HEADER.size + 12 * sequences + 8 * entries
        if expected != size:
            raise DataError(
                f"{path}: is cut short or damaged: {sequences} sequences and {entries} document indices need"
                f" {expected} bytes, and there are {size}"
            )
        self._code: int = code
        self.dtype = np.dtype(DTYPES[code])
        at = HEADER.size
        self.lengths = Column(path, self._index, "<i4", sequences, at)
        self.pointers = Column(path, self._index, "<i8", sequences, at + 4 * sequences)
        self.document_indices = Column(path, self._index, "<i8", entries, at + 12 * sequences)
        return header

    def _check_ends(self) -> None:
        sequences, indices, item = len(self.pointers), self.document_indices, self.dtype.itemsize
        if sequences == 0:
            raise DataError(f"{self.idx_path}: holds no document")
        if len(indices) < 2 or indices[0] != 0 or indices[-1] != sequences:
            raise DataError(
                f"{self.idx_path}: is damaged: its {len(indices)} document indices run from"
                f" {indices[:1].tolist()} to {indices[-1:].tolist()}, and have to from 0 to {sequences}"
            )
        size = os.fstat(self._descriptor).st_size
        end = self.pointers[-1] + self.lengths[-1] * item
        if self.pointers[0] != 0 or self.lengths[-1] < 0 or end != size:
            raise DataError(
                f"{self.bin_path}: has {size} bytes, but by {self.idx_path.name} its tokens run from byte"
                f" {self.pointers[0]} to byte {end}; one of the two is cut short, damaged or of another dataset"
            )
        if size == 0:
            raise DataError(f"{self.bin_path}: holds no token")
        self.tokens = size // item

    def _check_sidecar(self, sidecar: Sidecar) -> None:
        if (sidecar.documents, sidecar.tokens) != (self.documents, self.tokens):
            raise DataError(
                f"{part(self.prefix, '.json')}: is of another build: it tells of {sidecar.documents} documents and"
                f" {sidecar.tokens} tokens, the .idx of {self.documents} and {self.tokens}; build the dataset again"
            )
        most = int(np.iinfo(self.dtype).max)
        if sidecar.ids - 1 > most:
            marked = ", whose ids are marked," if sidecar.instructions else ","
            raise DataError(
                f"{part(self.prefix, '.json')}: tells of a vocabulary of {sidecar.tokenizer.vocabulary}{marked} and ids"
                f" of the .idx's type {self.dtype.name} are at most {most}; one of the two is damaged, build the"
                " dataset again"
            )
        self._check_checksums(sidecar.checksums)
        self.train_documents -= sidecar.validation.documents
        self.train_tokens -= sidecar.validation.tokens
        if self.train_documents < 0 or self.start(self.train_documents) != self.train_tokens:
            raise DataError(
                f"{part(self.prefix, '.json')}: its {sidecar.validation.documents} held-out documents with"
                f" {sidecar.validation.tokens} tokens are not the last ones of the .idx; build the dataset again"
            )

    def _check_pack(self, sidecar: Sidecar) -> None:
        """Training and held-out packs are whole ones."""
        if sidecar.pack and (self.tokens % sidecar.pack or self.train_tokens % sidecar.pack):
            raise DataError(
                f"{part(self.prefix, '.json')}: its {self.train_tokens} training and {sidecar.validation.tokens}"
                f" held-out tokens are not whole packs of {sidecar.pack}; build the dataset again"
            )

    def _check_checksums(self, sums: Checksums) -> None:
        for path, descriptor, digits in (
            (self.bin_path, self._descriptor, sums.bin),
            (self.idx_path, self._index, sums.idx),
        ):
            size = os.fstat(descriptor).st_size
            if sums.block != _index.BLOCK_BYTES or len(digits) != 8 * -(-size // sums.block):
                raise DataError(
                    f"{part(self.prefix, '.json')}: {len(digits) // 8} checksums of blocks of {sums.block} bytes,"
                    f" for the {size} bytes of {path.name}; expected one for every {_index.BLOCK_BYTES} bytes; build"
                    " the dataset again"
                )

    def _identity(self) -> str:
        if self.sidecar is not None:
            kept = self.sidecar.model_dump(include={"tokenizer", "documents", "tokens", "validation", "checksums"})
            content = json.dumps(kept, sort_keys=True).encode()
        else:
            content = self._header + struct.pack("<QQ", os.fstat(self._index).st_size, self.tokens)
        return hashlib.sha256(content).hexdigest()
