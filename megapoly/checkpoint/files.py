"""Files with a CRC-32 per 1 MiB block, and safetensors files among them: written in one stream, read through a map.

A safetensors file is 8 bytes of header length, a JSON header ``{key: {dtype, shape, data_offsets}}``, and the raw
little-endian values (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import math
import mmap
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import torch

from megapoly.data import _index
from megapoly.errors import CheckpointError
from megapoly.spec import Box, Index

BLOCK = 1 << 20
_EARLY = 16 << 20  # bytes
_AHEAD = 16  # blocks
_PORTION = 4  # blocks
_READ_AHEAD = ThreadPoolExecutor(1, "read-ahead")
REMEDY = "move its folder away to use the one before it, or convert again what was converted"
CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in CODES}


def write_tensors(
    path: Path, header: dict[str, Any], tensors: Iterable[torch.Tensor], checksums: bool = True
) -> dict[str, Any]:
    """Write a new safetensors file; ``header`` describes the tensors in their order. Returns its size and checksums.

    ``tensors`` may be parts of those of the header, one after another. Without ``checksums`` there are none.
    """
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with BlockFile(path, checksums) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors:
            for part in tensor.detach().reshape(-1).split(64 * BLOCK):  # a device's tensor comes over in parts
                file.write(_buffer(part.cpu().contiguous().view(torch.uint8)))
    return {"bytes": file.bytes, "crc32": file.crc32}


def begin_writing(file: IO[bytes], begun: int, end: int) -> int:
    """Have the disk begin with bytes [begun, end) of a file, if they are many; returns where those left begin."""
    if end - begun < _EARLY or not hasattr(os, "posix_fadvise"):  # macOS has none
        return begun
    file.flush()
    # Linux begins to write such bytes, and does not wait; only those that are on the disk leave its cache.
    os.posix_fadvise(file.fileno(), begun, end - begun, os.POSIX_FADV_DONTNEED)
    return end


class BlockFile:
    """A new file, written front to back, synced when closed; keeps the CRC-32 of every block.

    The disk begins with what is written long before it is synced, and works while the rest is checksummed.
    """

    def __init__(self, path: Path, checksums: bool = True) -> None:
        self.bytes = 0
        self._checksums = checksums
        self.crc32: list[int] = []
        self._begun = 0
        self._file = open(path, "xb")  # noqa: SIM115 - closed by __exit__

    def __enter__(self) -> BlockFile:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with self._file:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())

    def write(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        while rest:
            if self.bytes % BLOCK == 0 and self._checksums:
                self.crc32.append(0)
            part, rest = rest[: BLOCK - self.bytes % BLOCK], rest[BLOCK - self.bytes % BLOCK :]
            if self._checksums:
                self.crc32[-1] = _index.crc32(part, self.crc32[-1])
            self._file.write(part)
            self.bytes += len(part)
            self._begun = begin_writing(self._file, self._begun, self.bytes)


class TensorFile:
    """A safetensors file, mapped when it is first touched; blocks are checked once."""

    def __init__(self, path: Path, size: int, crc32: Sequence[int]) -> None:
        self.path, self.size = path, size
        self._crc32 = crc32
        self._checked = bytearray(len(crc32))
        self._bytes: torch.Tensor | None = None
        self._header: dict[str, Any] = {}
        self._data = 0

    def check_size(self) -> None:
        try:
            found = self.path.stat().st_size
        except OSError as error:
            raise CheckpointError(f"{self.path}: is missing ({error.strerror}); {REMEDY}") from error
        if found != self.size:
            raise CheckpointError(f"{self.path}: has {found} bytes, {self.size} were written; it is damaged, {REMEDY}")

    def copy(
        self, name: str, key: str, dtype: torch.dtype, place: tuple[int, Box], common: Box, out: torch.Tensor
    ) -> None:
        """Fill ``out`` with ``common``, out of a box that stands ``place[0]`` elements into the tensor ``key``.

        Blocks are checked just before they are copied, so that the processor's caches still hold them.
        """
        self._open(name)
        offset, box = place
        start = self.span(key)[0] + offset * dtype.itemsize
        values = self._map()[start : start + box.size * dtype.itemsize].view(dtype).view(box.shape)
        end = start + _range(box, common, dtype.itemsize)[1]
        for part in _portions(common, box.shape, dtype.itemsize):
            for a, b in _spans(box, part, dtype.itemsize):
                self._check(start + a, start + b, name, end)
            out[part.slices(common.start)].copy_(values[part.slices(box.start)])

    def span(self, key: str) -> tuple[int, int]:
        """Bytes of a tensor in the file, once its header was read."""
        start, stop = self._header[key]["data_offsets"]
        return self._data + start, self._data + stop

    def damaged(self, progress: Callable[[int], object] = lambda done: None) -> list[tuple[int, int]]:
        """Byte ranges of the blocks that are not as written; ``progress`` hears of the bytes of each block."""
        wrong = []
        try:
            with open(self.path, "rb") as file:
                for number, crc32 in enumerate(self._crc32):
                    block = file.read(BLOCK)
                    if _index.crc32(block) != crc32:
                        wrong.append((number * BLOCK, min(self.size, (number + 1) * BLOCK)))
                    progress(len(block))
        except OSError as error:
            raise self._unreadable(error) from error
        return wrong

    def release(self) -> None:
        """Give back the map, and with it the memory that its pages take."""
        self._bytes = None

    def layout(self, tensors: Mapping[str, tuple[Index, torch.dtype]]) -> tuple[int, dict[str, tuple[int, int]]] | None:
        """Where the header ends, and the bytes of each tensor in the file, by the header as it stands, unchecked.

        Args:
            tensors: shapes and dtypes, by key, of just those that were written.

        Returns:
            None where the header is not that of these tensors, one behind the other up to the end of the file.
        """
        raw = self._map()
        data = 8 + int.from_bytes(_buffer(raw[:8]), "little")
        try:
            header = json.loads(bytes(_buffer(raw[8:data]))) if data <= self.size else {}
            header.pop("__metadata__")
            spans, at = {}, data
            for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                shape, dtype = tensors[key]
                spans[key] = at, at + math.prod(shape) * dtype.itemsize
                offsets = [each - data for each in spans[key]]
                if entry != {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": offsets}:
                    return None
                at = spans[key][1]
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
        return (data, spans) if at == self.size and spans.keys() == tensors.keys() else None

    def _open(self, name: str) -> None:
        if self._header:
            return
        self._check(0, 8, name)
        data = 8 + int.from_bytes(_buffer(self._map()[:8]), "little")
        self._check(8, data, name)
        self._header, self._data = json.loads(bytes(_buffer(self._map()[8:data]))), data

    def _map(self) -> torch.Tensor:
        if self._bytes is None:
            try:
                with open(self.path, "rb") as file, warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # torch warns that the map is read-only, as it should be
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                    self._bytes = torch.frombuffer(mapped, dtype=torch.uint8)
            except OSError as error:
                raise self._unreadable(error) from error
        return self._bytes

    def _unreadable(self, error: OSError) -> CheckpointError:
        return CheckpointError(f"{self.path}: cannot be read ({error.strerror})")

    def _crc(self, block: int) -> int:
        return _index.crc32(_buffer(self._map()[block * BLOCK : (block + 1) * BLOCK]))

    def _read_ahead(self, start: int, stop: int) -> None:
        """Have the disk bring the next blocks of a range while the first are checksummed.

        By a thread: the call waits where the disk's queue is full.
        """
        size = min(2 * _AHEAD * BLOCK, stop - start)
        if size > BLOCK and hasattr(os, "posix_fadvise"):  # not on macOS
            _READ_AHEAD.submit(_will_need, self.path, start, size)

    def _check(self, start: int, stop: int, name: str, until: int = 0) -> None:
        """Check the blocks of bytes [start, stop); those up to ``until`` will be asked for next."""
        for block in range(start // BLOCK, -(-stop // BLOCK)):
            if self._checked[block]:
                continue
            if block % _AHEAD == 0 or block == start // BLOCK:
                self._read_ahead(block * BLOCK, max(stop, until))
            found = self._crc(block)
            if found != self._crc32[block]:
                raise CheckpointError(
                    f"{self.path}: bytes {block * BLOCK} to {min(self.size, (block + 1) * BLOCK)}, needed for tensor"
                    f" {name!r}, are damaged (CRC-32 {found:08x}, {self._crc32[block]:08x} was written);"
                    f" {REMEDY}"
                )
            self._checked[block] = 1


def _will_need(path: Path, start: int, size: int) -> None:
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), start, size, os.POSIX_FADV_WILLNEED)


def _portions(part: Box, shape: Index, itemsize: int, dim: int = 0) -> Iterator[Box]:
    """``part`` of a row-major box of ``shape`` in portions that span few blocks, in its order."""
    row = math.prod(shape[dim + 1 :]) * itemsize
    if dim == len(shape) or (part.stop[dim] - part.start[dim]) * row <= _PORTION * BLOCK:
        yield part
        return
    step = max(1, _PORTION * BLOCK // row)
    for first in range(part.start[dim], part.stop[dim], step):
        start = (*part.start[:dim], first, *part.start[dim + 1 :])
        stop = (*part.stop[:dim], min(part.stop[dim], first + step), *part.stop[dim + 1 :])
        yield from _portions(Box(start, stop), shape, itemsize, dim + 1)


def _spans(box: Box, part: Box, itemsize: int, dim: int = 0) -> Iterator[tuple[int, int]]:
    """Byte ranges, inside a row-major ``box``, that reach every block that ``part`` touches, and no other block.

    Rows that start at most one block apart leave no block between them untouched, so they are one range.
    """
    if dim == len(box.shape) or math.prod(box.shape[dim + 1 :]) * itemsize <= BLOCK:
        yield _range(box, part, itemsize)
        return
    for index in range(part.start[dim], part.stop[dim]):
        start = (*part.start[:dim], index, *part.start[dim + 1 :])
        stop = (*part.stop[:dim], index + 1, *part.stop[dim + 1 :])
        yield from _spans(box, Box(start, stop), itemsize, dim + 1)


def _range(box: Box, part: Box, itemsize: int) -> tuple[int, int]:
    """From the first byte to the last of ``part`` inside a row-major ``box``."""
    strides = [math.prod(box.shape[d + 1 :]) * itemsize for d in range(len(box.shape))]
    first = sum((a - o) * s for a, o, s in zip(part.start, box.start, strides, strict=True))
    last = sum((b - 1 - o) * s for b, o, s in zip(part.stop, box.start, strides, strict=True))
    return first, last + itemsize


def _buffer(values: torch.Tensor) -> memoryview:
    """The bytes of a uint8 tensor in host memory, not copied."""
    return values.numpy().data
