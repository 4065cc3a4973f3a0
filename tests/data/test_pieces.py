"""The input in pieces: nothing lost, nothing twice, always the same; shares of shards and where a build goes on."""

from __future__ import annotations

import gzip
import random

import pytest

from megapoly.data import pieces
from megapoly.data.documents import Shard
from megapoly.data.pieces import cut, divide
from megapoly.data.readers import Input, parse

LINES = Input("line")


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Lines of many lengths in plain and compressed files, small and large, one without any; and all lines."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 4000)
    draw, paths, lines = random.Random(0), [], []
    for number, count in enumerate([3, 200, 1, 0, 250, 2, 90, 4]):
        own = [f"{number} {i} {'x' * draw.choice([0, 5, 40, 300])}" for i in range(count)]
        content = "".join(f"{line}\n" for line in own).encode()
        paths.append(tmp_path / f"{number}.txt{'.gz' if number in (1, 5) else ''}")
        paths[-1].write_bytes(gzip.compress(content) if number in (1, 5) else content)
        lines += own
    return paths, lines


def texts(made):
    return [record.values["text"] for piece in made for chunk in piece.chunks for record in parse(chunk)]


def test_pieces_are_the_whole_in_order(files):
    paths, lines = files
    made = list(cut(divide(paths, LINES, Shard()), LINES))
    assert texts(made) == lines
    assert [piece.number for piece in made] == list(range(len(made)))
    assert sum(piece.read for piece in made) == sum(path.stat().st_size for path in paths)
    assert all(piece.size < 8500 for piece in made)
    assert sum(piece.size < 4000 for piece in made) <= 4  # at most the last of each of three large files, and of all
    assert any(len({chunk.path for chunk in piece.chunks}) > 1 for piece in made)
    assert made == list(cut(divide(paths, LINES, Shard()), LINES))


def test_going_on_at_a_span(files):
    """From every piece that begins where a file does come the same pieces as from the first."""
    paths, _ = files
    spans = divide(paths, LINES, Shard())
    made = list(cut(spans, LINES))
    begins = [piece for piece in made if piece.span is not None]
    assert {piece.span for piece in begins} == {0, 2, 5, 7}  # the first, and those after the large ones
    for piece in begins:
        assert piece.chunks[0].path == paths[piece.span]
        assert list(cut(spans, LINES, piece.number, piece.span)) == made[piece.number :]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 11])
def test_shards_are_the_whole_in_order(files, count):
    paths, lines = files
    shares = [divide(paths, LINES, Shard(i, count)) for i in range(1, count + 1)]
    assert all(shares)
    assert [text for spans in shares for text in texts(cut(spans, LINES))] == lines
    sizes = [sum(span.size for span in spans) for spans in shares]
    total = sum(path.stat().st_size for path in paths)
    assert sum(sizes) == total
    if count < 8:  # of nearly the same size: a border is moved by one chunk at most
        assert max(sizes) - min(sizes) < 2 * 4500


def test_what_a_piece_is_called(files):
    paths, _ = files
    made = list(cut(divide(paths, LINES, Shard()), LINES))
    assert str(made[0]) == f"{paths[0]} to {paths[1]}"
    plain = next(piece for piece in made if len(piece.chunks) == 1 and piece.chunks[0].start)
    assert str(plain) == f"{plain.chunks[0].path}, from byte {plain.chunks[0].start} on"
    packed = next(piece for piece in made[1:] if len(piece.chunks) == 1 and piece.chunks[0].data)
    first = lines_before(packed.chunks[0]) + 1
    assert str(packed) == f"{paths[1]}, from record {first} on"
    assert str(packed.without_text()) == str(packed)
    assert packed.without_text().chunks[0].data is None


def lines_before(chunk):
    """Lines of a compressed file before those of a chunk."""
    content = gzip.decompress(chunk.path.read_bytes())
    return content[: content.index(chunk.data)].count(b"\n")
