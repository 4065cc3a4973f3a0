"""Files that ``torch.load`` reads, written in one stream, tensors of any size in little memory.

The format is in :mod:`megapoly.checkpoint.torch_files`. The bytes follow from the value alone, with every release of
torch; members have CRC-32s, and storages begin at multiples of 64 bytes, as torch's own do.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from megapoly.checkpoint.files import begin_writing
from megapoly.spec import Index

_PROTOCOL = 2  # torch's own
_ROOT = "archive"
_ALIGNMENT = 64
_LOCAL, _ZIP64 = 30, 20  # bytes of a member's own header, but its name, and of what a large one has more
_LARGE = 1 << 30
_PART = 1 << 20
_CLASSES = {
    torch.float64: torch.DoubleStorage, torch.float32: torch.FloatStorage, torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class NewTensor:
    """A tensor of a file that is to be.

    Attributes:
        parts: gives its elements flat, one part after another; a part is good until the next one is asked for.
    """

    shape: Index
    dtype: torch.dtype
    parts: Callable[[], Iterable[Tensor]]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class _Storage:
    tensor: NewTensor


class _Pickler(pickle.Pickler):
    """Pickles a :class:`NewTensor` as torch does a tensor, and keeps them in the order of their storages."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, _PROTOCOL)
        self.tensors: list[NewTensor] = []

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, NewTensor):
            return NotImplemented
        strides = tuple(math.prod(value.shape[dim + 1 :]) for dim in range(len(value.shape)))
        args: tuple[Any, ...] = (_Storage(value), 0, value.shape, strides, False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, args  # the name is the format's

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        tensor = value.tensor
        self.tensors.append(tensor)
        return "storage", _CLASSES[tensor.dtype], str(len(self.tensors) - 1), "cpu", math.prod(tensor.shape)


def write_torch(path: Path, value: Any) -> int:
    """Write a new file that holds ``value``; a :class:`NewTensor` in it is a tensor there. Returns its bytes."""
    text = io.BytesIO()
    pickler = _Pickler(text)
    pickler.dump(value)
    with open(path, "xb") as file, zipfile.ZipFile(file, "w") as archive:
        writer = _Writer(file, archive)
        writer.add("data.pkl", text.tell(), [text.getbuffer()])
        writer.add("byteorder", 6, [memoryview(b"little")])
        for number, tensor in enumerate(pickler.tensors):
            parts = (part.contiguous().view(torch.uint8).numpy().data for part in tensor.parts())
            writer.add(f"data/{number}", tensor.bytes, parts)
        writer.add("version", 2, [memoryview(b"3\n")])
    return path.stat().st_size


class _Writer:
    """Adds members to an archive; the disk begins with what is written while the rest is made."""

    def __init__(self, file: IO[bytes], archive: zipfile.ZipFile) -> None:
        self._file, self._archive, self._begun = file, archive, 0

    def add(self, name: str, size: int, parts: Iterable[memoryview]) -> None:
        member = zipfile.ZipInfo(f"{_ROOT}/{name}")  # of 1980, so that the bytes of the file follow from its value
        large = size >= _LARGE
        member.file_size = size
        start = self._archive.start_dir + _LOCAL + len(member.filename) + (_ZIP64 if large else 0) + 4
        padding = -start % _ALIGNMENT
        member.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
        written = 0
        with self._archive.open(member, "w", force_zip64=large) as file:
            for part in parts:
                for at in range(0, len(part), _PART):
                    file.write(part[at : at + _PART])
                written += len(part)
                self._begun = begin_writing(self._file, self._begun, self._file.tell())
        if written != size:
            raise ValueError(f"{name}: {written} bytes for {size}")
