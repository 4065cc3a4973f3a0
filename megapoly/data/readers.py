"""Text in files: JSON lines, Parquet, plain text. Streamed in constant memory, whole or in pieces. No torch.

A reader cuts its file into chunks that end where a record does, which costs little, and :func:`parse` makes records of
a chunk, which is the work and may be done elsewhere. Reading a file is parsing its chunks in order.

JSON is read by orjson. A line that it refuses is read again by Python's own module, so that what is no error there
(NaN, numbers of any size, half a surrogate pair in a field that nobody asks for) is none here. Of a key that comes
twice the last counts. Text is UTF-8, to the byte; a byte-order mark at a file's begin is not part of it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

import orjson

from megapoly.data import compression, parquet
from megapoly.data.inputs import JSON, KNOWN, PARQUET, TEXT, expand, format_of
from megapoly.data.records import BadRecord, BadRecords, Policy, Record, texts
from megapoly.errors import DataError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = [
    "RECORD_BYTES",
    "BadRecord",
    "BadRecords",
    "Chunk",
    "Document",
    "Input",
    "Policy",
    "Reader",
    "Record",
    "expand",
    "open_reader",
    "parse",
    "read_texts",
    "texts",
]

Document = Literal["file", "line", "paragraph"]

RECORD_BYTES = 128 << 20  # of the longest record that is read; some ten times as much is needed to read it
_CHUNK = 1 << 20
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Input:
    """How files are read.

    Attributes:
        document: what is a document of a .txt file: all of it, a line, or a paragraph, which ends at blank lines. It
            becomes the field ``text``, without the line end at its end.
        fields: the columns of a .parquet file that are needed; none: all.
    """

    document: Document = "file"
    fields: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chunk:
    """A part of a file that begins and ends where a record does.

    Attributes:
        first: number of its first line or row, counted from 1; 1 at byte ``start`` where a plain file is cut.
        start, stop: bytes of a plain file, or row groups.
        data: the lines themselves, of a compressed file.
        too_long: there is one record, and it is longer than :data:`RECORD_BYTES`.
    """

    path: Path
    input: Input
    first: int = 1
    start: int = 0
    stop: int = 0
    data: bytes | None = field(default=None, repr=False)
    too_long: bool = False


def open_reader(path: Path | str, given: Input = Input()) -> Reader:
    """The reader of a file, by its suffix.

    Raises:
        DataError: the file cannot be read, or is of no known format.
    """
    return Reader(Path(path), given)


class Reader:
    """The records of a file.

    Iterating gives the good ones and the bad ones, and raises :class:`DataError` where the file itself is damaged.

    Attributes:
        size: bytes of the file.
        position: how many of them have been read.
    """

    def __init__(self, path: Path, given: Input) -> None:
        self.path, self.position, self._input = path, 0, given
        try:
            self.size = path.stat().st_size
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); give {KNOWN}") from error
        if format_of(path) is None:
            raise DataError(f"{path}: is of no known format; expected {KNOWN}")
        if not self.size and compression.compression(path):
            raise DataError(
                f"{path}: has no bytes, which is no compressed file, not even of nothing; get the file anew"
            )

    def __iter__(self) -> Iterator[Record | BadRecord]:
        for chunk in self.chunks(_CHUNK):
            yield from parse(chunk)

    def chunks(self, size: int) -> Iterator[Chunk]:
        """Pieces of about ``size`` bytes of text, the same every time: of a plain file or a table without reading it.

        Raises:
            DataError: the file is damaged.
        """
        suffix = compression.compression(self.path)
        kind = format_of(self.path)
        if kind is PARQUET:
            cut = list(parquet.row_groups(self.path, size, self._input.fields))
            for start, stop, row in cut:
                yield Chunk(self.path, self._input, row, start, stop)
                self.position = self.size * stop // cut[-1][1]
        elif kind is TEXT and self._input.document == "file":
            yield Chunk(self.path, self._input, stop=self.size)
        else:
            with _reading(self.path) as raw:
                yield from self._compressed(raw, suffix, size) if suffix else self._plain(raw, size)
        self.position = self.size

    def _plain(self, file: io.FileIO, size: int) -> Iterator[Chunk]:
        raw: IO[bytes] = io.BufferedReader(file)
        start = 0
        while start < self.size:
            stop = self._border(raw, start + max(size, 1))
            yield Chunk(self.path, self._input, 1, start, stop)
            self.position = start = stop

    def _border(self, raw: IO[bytes], after: int) -> int:
        """Where the line or paragraph ends that holds the byte before ``after``."""
        if after >= self.size:
            return self.size
        paragraphs = _by_paragraph(self.path, self._input)
        raw.seek(after - 1)
        blank = False  # of the first line only the end is seen
        while piece := raw.readline(_CHUNK):
            blank = blank and not piece.strip()
            if piece.endswith(b"\n"):
                if blank or not paragraphs:
                    break
                blank = True
        return min(raw.tell(), self.size)

    def _compressed(self, raw: io.FileIO, suffix: str, size: int) -> Iterator[Chunk]:
        pieces: list[bytes] = []
        held, first, number = 0, 1, 0
        try:
            lines = _lines(compression.open_stream(raw, suffix))
            for number, piece in _pieces(lines, _by_paragraph(self.path, self._input)):
                if not pieces:
                    first = number
                if piece is not None:
                    pieces.append(piece)
                    held += len(piece)
                if pieces and (held >= size or piece is None):
                    yield Chunk(self.path, self._input, first, data=b"".join(pieces))
                    pieces, held = [], 0
                    self.position = raw.tell()
                if piece is None:
                    yield Chunk(self.path, self._input, number, too_long=True)
        except compression.ERRORS as error:
            where = f", after line {number}" if number else ""
            raise DataError(f"{self.path}{where}: cannot be read ({error}); get the file anew") from error
        if pieces:
            yield Chunk(self.path, self._input, first, data=b"".join(pieces))


def parse(chunk: Chunk) -> Iterator[Record | BadRecord]:
    """The records of a chunk, in order.

    Raises:
        DataError: the file is damaged, or is not what it was when it was cut.
    """
    kind = format_of(chunk.path)
    if chunk.too_long:
        yield _too_long(chunk, chunk.first)
    elif kind is PARQUET:
        yield from parquet.rows(chunk.path, chunk.start, chunk.stop, chunk.first, chunk.input.fields)
    elif kind is TEXT and chunk.input.document == "file":
        yield _text_file(chunk)
    else:
        make = _from_json if kind is JSON else _from_text
        for number, piece in _chunk_pieces(chunk):
            if piece is None:
                yield _too_long(chunk, number)
                continue
            if number == 1 and not chunk.start:
                piece = piece.removeprefix(_BOM)
            if (record := make(chunk, number, piece)) is not None:
                yield record


def read_texts(inputs: Sequence[Path | str], field: str, bad: BadRecords, document: Document = "file") -> Iterator[str]:
    """The texts of a field in all files of ``inputs``, which :func:`expand` explains; what is bad goes to ``bad``."""
    for path in expand(inputs):
        yield from texts(open_reader(path, Input(document, (field,))), field, bad)


def _by_paragraph(path: Path, given: Input) -> bool:
    return format_of(path) is TEXT and given.document == "paragraph"


@contextmanager
def _reading(path: Path) -> Iterator[io.FileIO]:
    try:
        with open(path, "rb", buffering=0) as file:
            yield file
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); get the file anew") from error


def _lines(stream: IO[bytes]) -> Iterator[bytes | None]:
    """Lines with their ends; nothing for one that is too long, which is passed over."""
    while line := stream.readline(RECORD_BYTES + 1):
        if len(line) <= RECORD_BYTES:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(_CHUNK)
        yield None


def _pieces(lines: Iterator[bytes | None], paragraphs: bool) -> Iterator[tuple[int, bytes | None]]:
    """Lines with their numbers; or paragraphs with those of their first lines, each with the blank line that ends it.

    Further blank lines are pieces of their own. A piece that is too long is nothing.
    """
    if not paragraphs:
        yield from enumerate(lines, 1)
        return
    held: list[bytes] = []
    size, first, number = 0, 1, 0
    for number, line in enumerate(lines, 1):
        size += RECORD_BYTES + 1 if line is None else len(line)
        if line is not None and size <= RECORD_BYTES:
            held.append(line)
        else:
            held = []
        if line is not None and not line.strip():
            yield first, b"".join(held) if size <= RECORD_BYTES else None
            held, size, first = [], 0, number + 1
    if size:
        yield first, b"".join(held) if size <= RECORD_BYTES else None


def _chunk_pieces(chunk: Chunk) -> Iterator[tuple[int, bytes | None]]:
    """The pieces of a chunk, numbered from its first."""
    paragraphs = _by_paragraph(chunk.path, chunk.input)
    if chunk.data is not None:
        for number, piece in _pieces(_lines(io.BytesIO(chunk.data)), paragraphs):
            yield chunk.first - 1 + number, piece
        return
    with _reading(chunk.path) as file:
        yield from _pieces(_lines(io.BufferedReader(_Window(file, chunk.start, chunk.stop), _CHUNK)), paragraphs)


class _Window(io.RawIOBase):
    """Bytes of a file from ``start`` to before ``stop``."""

    def __init__(self, file: io.FileIO, start: int, stop: int) -> None:
        file.seek(start)
        self._file, self._left = file, stop - start

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        target = memoryview(buffer)[: self._left]
        count = self._file.readinto(target)
        if target and not count:
            raise OSError("it has become shorter while it was read")
        self._left -= count
        return count


def _too_long(chunk: Chunk, number: int) -> BadRecord:
    what = f"is longer than {RECORD_BYTES >> 20} MiB, which is the most that is read; split it"
    return _bad(chunk, number, "too long", what)


def _from_json(chunk: Chunk, number: int, line: bytes) -> Record | BadRecord:
    try:
        values = orjson.loads(line)
    except orjson.JSONDecodeError:
        try:
            values = json.loads(line.decode().rstrip())
        except UnicodeDecodeError as error:
            return _not_utf8(chunk, number, error)
        except (ValueError, RecursionError) as error:
            if not line.strip():
                return _bad(chunk, number, "blank", "is blank; expected one object a line")
            found: object = error
            if isinstance(error, json.JSONDecodeError):
                found = f"{error.msg.removesuffix(' at')} at character {error.pos + 1}"
            return _bad(chunk, number, "not JSON", f"is not JSON ({found}); expected one object a line")
    if type(values) is not dict:
        what = f"is a JSON {type(values).__name__}; expected one object a line"
        return _bad(chunk, number, "not an object", what)
    return Record(chunk.path, number, values, "line", chunk.start)


def _from_text(chunk: Chunk, number: int, piece: bytes) -> Record | BadRecord | None:
    """A line, or a paragraph; nothing of a blank line between paragraphs."""
    paragraph = chunk.input.document == "paragraph"
    if not piece.strip():
        return None if paragraph else _bad(chunk, number, "blank", "is blank; expected a document a line")
    body = _unended(piece)
    if paragraph and not (head_tail := body.rpartition(b"\n"))[2].strip():
        body = head_tail[0].removesuffix(b"\r")
    return _text(chunk, number, body)


def _text_file(chunk: Chunk) -> Record | BadRecord:
    with _reading(chunk.path) as raw:
        stream = compression.open_stream(raw, compression.compression(chunk.path))
        try:
            body = stream.read(RECORD_BYTES + 1)
        except compression.ERRORS as error:
            raise DataError(f"{chunk.path}: cannot be read ({error}); get the file anew") from error
    if len(body) > RECORD_BYTES:
        return _too_long(chunk, 1)
    return _text(chunk, 1, _unended(body.removeprefix(_BOM)))


def _text(chunk: Chunk, number: int, body: bytes) -> Record | BadRecord:
    try:
        return Record(chunk.path, number, {"text": body.decode()}, "line", chunk.start)
    except UnicodeDecodeError as error:
        return _not_utf8(chunk, number, error)


def _unended(body: bytes) -> bytes:
    return body[:-1].removesuffix(b"\r") if body.endswith(b"\n") else body


def _not_utf8(chunk: Chunk, number: int, error: UnicodeDecodeError) -> BadRecord:
    what = f"is not UTF-8, at byte {error.start} of it; convert the file to UTF-8"
    return _bad(chunk, number, "not UTF-8", what)


def _bad(chunk: Chunk, number: int, kind: str, what: str) -> BadRecord:
    return BadRecord(chunk.path, number, "line", chunk.start, kind, what)
