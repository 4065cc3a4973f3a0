"""The input of a build in pieces, each of which becomes one part. No torch.

Pieces depend on the files and on nothing else: not on the number of processes, nor on what was built before. Small
files are put together in one piece; a large one is cut where a record ends, and a piece ends where it does, so that
what is interrupted goes on at the file after it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from megapoly.data.compression import compression
from megapoly.data.documents import Shard
from megapoly.data.readers import Chunk, Input, open_reader
from megapoly.errors import DataError

PIECE_BYTES = 32 << 20  # of the input, without compression


@dataclass(frozen=True)
class Span:
    """Chunks ``first`` to before ``stop`` of a file, of ``size`` bytes there; all of the rest without a ``stop``."""

    path: Path
    size: int
    first: int = 0
    stop: int | None = None

    def chunks(self, given: Input) -> Iterator[tuple[Chunk, int]]:
        """The chunks, each with the bytes that it takes in the file."""
        return islice(_measured(self.path, given), self.first, self.stop)


@dataclass(frozen=True)
class Piece:
    """What becomes one part.

    Attributes:
        number: counted from 0.
        span: where it begins, if that is at the begin of a span: the number of that.
        read: bytes that it takes in the files.
        size: bytes without compression, as far as they are known.
    """

    number: int
    span: int | None
    chunks: tuple[Chunk, ...]
    read: int
    size: int

    def __str__(self) -> str:
        first, last = self.chunks[0], self.chunks[-1]
        if first.path != last.path:
            return f"{first.path} to {last.path}"
        at = f"byte {first.start}" if first.start and first.first == 1 else f"record {first.first}"
        return f"{first.path}, from {at} on"

    def without_text(self) -> Piece:
        """What is to be known of a piece that has been handed on."""
        return replace(self, chunks=tuple(replace(chunk, data=None) for chunk in self.chunks))


def cut(spans: Sequence[Span], given: Input, number: int = 0, span: int = 0) -> Iterator[Piece]:
    """The pieces from ``number`` on, which begins where span ``span`` does.

    Raises:
        DataError: a file cannot be read or is damaged.
    """
    held: list[Chunk] = []
    begin: int | None = None
    read = size = 0
    for i in range(span, len(spans)):
        large = False
        for k, (chunk, taken) in enumerate(spans[i].chunks(given)):
            if not held:
                begin = None if k else i
            held.append(chunk)
            read += taken
            size += taken if chunk.data is None else len(chunk.data)
            if size >= PIECE_BYTES:
                yield Piece(number, begin, tuple(held), read, size)
                held, read, size, number, large = [], 0, 0, number + 1, True
        if held and large:
            yield Piece(number, begin, tuple(held), read, size)
            held, read, size, number = [], 0, 0, number + 1
    if held:
        yield Piece(number, begin, tuple(held), read, size)


def most_pieces(spans: Sequence[Span]) -> int:
    """About how many pieces there may be, at most: text is seldom compressed to less than an eighth."""
    size = sum(span.size * (8 if compression(span.path) else 1) for span in spans)
    return size // PIECE_BYTES + 1


def divide(files: Sequence[Path], given: Input, shard: Shard) -> list[Span]:
    """The share of a shard: a row of chunks of about the same number of bytes on disk, at least one.

    A compressed file is not divided, so that no job has to decompress the share of another. Other files are, at the
    same places as in :func:`cut`.

    Raises:
        DataError: there are fewer files and chunks than shards, or a file cannot be read.
    """
    units: list[Span] = []
    for path in files:
        if shard.count == 1 or compression(path):
            units.append(Span(path, open_reader(path, given).size))
        else:
            sizes = [taken for _, taken in _measured(path, given)]
            units += [Span(path, size, i, i + 1) for i, size in enumerate(sizes)]
    if shard.count == 1:
        return units
    if len(units) < shard.count:
        raise DataError(
            f"shard {shard}: the input has {len(units)} files and chunks, of which every shard takes at least one; a"
            f" compressed file is one, of another every {PIECE_BYTES >> 20} MB are; build at most {len(units)} shards"
        )
    first, stop = _share([span.size for span in units], shard)
    return _joined(units[first:stop])


def _share(weights: Sequence[int], shard: Shard) -> tuple[int, int]:
    """The first unit of a shard and the one after its last, where every shard has one."""
    before = [0]
    for weight in weights:
        before.append(before[-1] + weight)
    bounds = [0]
    for i in range(1, shard.count + 1):
        wanted = bisect_left(before, before[-1] * i // shard.count)
        bounds.append(min(max(wanted, bounds[-1] + 1), len(weights) - shard.count + i))
    return bounds[shard.number - 1], bounds[shard.number]


def _joined(spans: Sequence[Span]) -> list[Span]:
    """The same with neighbouring chunks of a file in one span."""
    joined: list[Span] = []
    for span in spans:
        if joined and span.stop is not None and (joined[-1].path, joined[-1].stop) == (span.path, span.first):
            last = joined.pop()
            joined.append(Span(span.path, last.size + span.size, last.first, span.stop))
        else:
            joined.append(span)
    return joined


def _measured(path: Path, given: Input) -> Iterator[tuple[Chunk, int]]:
    """The chunks of a file, each with the bytes that it takes there, which the reader tells when it goes on."""
    reader = open_reader(path, given)
    done, last = 0, None
    for chunk in reader.chunks(PIECE_BYTES):
        if last is not None:
            yield last, reader.position - done
        done, last = reader.position, chunk
    if last is not None:
        yield last, reader.size - done
