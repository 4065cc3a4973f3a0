"""Records of JSON lines, read in constant memory; files that are written whole or not at all. No torch."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megapoly.errors import DataError


@dataclass(frozen=True)
class Record:
    """One line of a corpus: a JSON object, and where it stands."""

    path: Path
    line: int
    values: dict[str, Any]

    def text(self, field: str) -> str:
        """The text of a field: not empty, and writable as UTF-8.

        Raises:
            DataError: naming the file, the line and what was found.
        """
        if field not in self.values:
            raise self.error(f"has no field {field!r}, only {sorted(self.values)}; name the field that holds the text")
        value = self.values[field]
        if not isinstance(value, str):
            raise self.error(f"field {field!r} holds {type(value).__name__}, not text")
        if not value.strip():
            raise self.error(f"field {field!r} is empty; remove such records")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise self.error(f"field {field!r} holds half a surrogate pair, which is not text: {error}") from error
        return value

    def error(self, what: str) -> DataError:
        return DataError(f"{self.path}, line {self.line}: {what}")


class JsonLines:
    """The records of a ``.jsonl`` or ``.jsonl.gz`` file, one JSON object a line.

    Iterating raises :class:`DataError` with file and line at a line that is not a JSON object, and where a compressed
    file ends early. ``position`` is the number of bytes of the file that have been read, of ``size``.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.position = 0
        try:
            self.size = self.path.stat().st_size
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); give a .jsonl or .jsonl.gz file") from error

    def __iter__(self) -> Iterator[Record]:
        number = 0
        try:
            with open(self.path, "rb") as raw:
                for number, line in enumerate(_lines(raw, self.path), 1):
                    self.position = raw.tell()
                    yield self._record(number, line)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{self.path}, after line {number}: cannot be read ({error}); get the file anew") from error

    def _record(self, number: int, line: bytes) -> Record:
        try:
            values = json.loads(line)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.path}, line {number}: is not UTF-8, at byte {error.start} of it; convert the file to UTF-8"
            ) from error
        except ValueError as error:
            found = f"is not JSON ({error})" if line.strip() else "is blank"
            raise DataError(f"{self.path}, line {number}: {found}; expected one object a line") from error
        if not isinstance(values, dict):
            raise DataError(
                f"{self.path}, line {number}: is a JSON {type(values).__name__}; expected one object a line"
            )
        return Record(self.path, number, values)


def _lines(raw: IO[bytes], path: Path) -> Iterator[bytes]:
    if path.suffix == ".gz":
        with gzip.open(raw) as lines:
            yield from lines
    else:
        yield from iter(raw.readline, b"")


def partial(path: Path) -> Path:
    """The temporary name of a file that is being written, in the same folder."""
    return path.with_name(path.name + ".partial")


@contextmanager
def temporaries(*paths: Path) -> Iterator[None]:
    """At the end, however it comes, remove what still has its temporary name."""
    try:
        yield
    finally:
        for path in paths:
            partial(path).unlink(missing_ok=True)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and bring it to the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file under a temporary name and rename it: ``path`` is the old file or the whole new one.

    Raises:
        DataError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporaries(path):
            write_synced(partial(path), data)
            os.replace(partial(path), path)
        sync_folder(path.parent)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error})") from error
