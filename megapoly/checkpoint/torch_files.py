"""Files of ``torch.save``: opened without trust, with tensors that are views of a map.

Since torch 1.6 a file is a zip archive of uncompressed members::

    NAME/data.pkl      the value; tensors in it name a storage
    NAME/data/KEY      bytes of a storage
    NAME/byteorder     "little"; older files have none

Before it was a row of pickles (a magic number, a version, the machine, the value, the keys of the storages), followed
by every storage as a 64-bit count and its values.
"""

from __future__ import annotations

import io
import mmap
import struct
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from megapoly.checkpoint import pickles
from megapoly.checkpoint.pickled import Storage, StoredTensor
from megapoly.data import _index
from megapoly.errors import CheckpointError

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_ZIP = b"PK\x03\x04"
_LOCAL = 30  # bytes of a member's own header, before its name
_PART = 1 << 20


@dataclass
class _Place:
    """Where the bytes of a storage are. ``crc32`` is None where the file has none, and once it was checked."""

    start: int
    size: int
    crc32: int | None = None


class TorchFile:
    """An opened file. Its pickle was read; a storage is read when values of a tensor are.

    Attributes:
        value: what was saved, see :mod:`megapoly.checkpoint.pickled`.

    Raises:
        CheckpointError: it cannot be read, or is no whole file of torch.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.value: Any = None
        self._places: dict[str, _Place] = {}
        self._bytes: Tensor | None = None
        try:
            with open(path, "rb") as file:
                if file.read(len(_ZIP)) == _ZIP:
                    self._open_zip(file)
                else:
                    self._open_row(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except OSError as error:
            raise self._damaged(error.strerror or error) from error
        except (ValueError, EOFError, struct.error, OverflowError, NotImplementedError, zipfile.BadZipFile) as error:
            raise self._damaged(error) from error

    def view(self, tensor: StoredTensor) -> Tensor:
        """The values of a tensor of this file, read where they are touched.

        Raises:
            CheckpointError: the file has a checksum of the tensor's storage, and that is damaged.
        """
        place = self._places[tensor.storage.key]
        try:
            self._check(tensor.storage.key, place)
            values = self._map()[place.start : place.start + place.size]
        except OSError as error:
            raise self._damaged(error.strerror) from error
        if place.start % tensor.dtype.itemsize:
            values = values.clone()  # old files align nothing
        flat = values.view(tensor.dtype)
        return flat.as_strided(tensor.shape, tensor.stride, flat.storage_offset() + tensor.offset)

    def release(self) -> None:
        """Give back the map, and with it the memory that its pages take; what was checked stays checked."""
        self._bytes = None

    def _open_zip(self, file: IO[bytes]) -> None:
        size = file.seek(0, io.SEEK_END)
        with zipfile.ZipFile(file) as archive:
            members = {member.filename: member for member in archive.infolist()}
        roots = [name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise ValueError("it is a zip archive, but has no data.pkl")
        (root,) = roots

        def read(name: str) -> bytes:
            place = _member(file, members[name], size)
            file.seek(place.start)
            raw = file.read(place.size)
            if place.crc32 is not None and _index.crc32(raw) != place.crc32:
                raise ValueError(f"{name} is not as it was written")
            return raw

        if f"{root}byteorder" in members and read(f"{root}byteorder") != b"little":
            raise ValueError("its values are not little-endian")
        self.value, storages = pickles.load(io.BytesIO(read(f"{root}data.pkl")))
        for key, storage in storages.items():
            name = f"{root}data/{key}"
            if name not in members:
                raise ValueError(f"{name} is missing")
            self._places[key] = _whole(_member(file, members[name], size), storage)

    def _open_row(self, file: mmap.mmap) -> None:
        """Through a map, which does not make room for the lengths that a damaged file names."""
        if pickles.load(file)[0] != _MAGIC:
            raise ValueError("it does not begin as one")
        version, _ = pickles.load(file)
        machine, _ = pickles.load(file)
        if version != _PROTOCOL or not isinstance(machine, dict) or machine.get("little_endian") is not True:
            raise ValueError("it is of another version, or not little-endian")
        self.value, storages = pickles.load(file)
        keys, _ = pickles.load(file)
        if not isinstance(keys, list) or not all(isinstance(key, str) and key in storages for key in keys):
            raise ValueError("its list of storages is damaged")
        at = file.tell()
        for key in keys:
            storage = storages[key]
            (count,) = struct.unpack_from("<q", file, at)
            self._places[key] = _whole(_Place(at + 8, count * storage.dtype.itemsize), storage)
            at += 8 + self._places[key].size
        if at > len(file) or len(self._places) < len(storages):
            raise ValueError(f"it has {len(file)} bytes, and its tensors need {at}")

    def _check(self, key: str, place: _Place) -> None:
        """Through the file, not the map, whose pages would count as memory of this process."""
        if place.crc32 is None:
            return
        found, left = 0, place.size
        with open(self.path, "rb", buffering=0) as file:
            file.seek(place.start)
            while left and (part := file.read(min(left, _PART))):
                found, left = _index.crc32(part, found), left - len(part)
        if found != place.crc32:
            raise self._damaged(
                f"bytes {place.start} to {place.start + place.size}, storage {key}, have the CRC-32 {found:08x}, and"
                f" {place.crc32:08x} was written"
            )
        place.crc32 = None

    def _map(self) -> Tensor:
        if self._bytes is None:
            with open(self.path, "rb") as file, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns that the map is read-only, as it should be
                self._bytes = torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=torch.uint8)
        return self._bytes

    def _damaged(self, reason: object) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: cannot be read as a file of torch.save ({reason}); it may be cut short or damaged: compare"
            " its size with the source's, and copy it again"
        )


def _whole(place: _Place, storage: Storage) -> _Place:
    expected = storage.count * storage.dtype.itemsize
    if place.size != expected:
        raise ValueError(f"storage {storage.key} has {place.size} bytes, expected {expected}")
    return place


def _member(file: IO[bytes], member: zipfile.ZipInfo, size: int) -> _Place:
    """Where the bytes of an uncompressed member are."""
    file.seek(member.header_offset)
    header = file.read(_LOCAL)
    if header[: len(_ZIP)] != _ZIP:
        raise ValueError(f"{member.filename} is not where it is said to be")
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
        raise ValueError(f"{member.filename} is compressed or encrypted, which torch.save does not do")
    start = member.header_offset + _LOCAL + sum(struct.unpack("<HH", header[26:30]))
    if start + member.file_size > size:
        raise ValueError(f"{member.filename} goes beyond the end of the file")
    return _Place(start, member.file_size, member.CRC or None)  # torch can save without checksums: they are then 0
