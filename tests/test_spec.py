"""Boxes, pieces and shards, against numpy indexing."""

import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapoly.spec import Box, ParamSpec, Piece, shard

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def boxes(draw, shape):
    spans = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in shape]
    return Box(tuple(a for a, _ in spans), tuple(b for _, b in spans))


def numbered(shape):
    """Every element is its own row-major index."""
    return np.arange(math.prod(shape)).reshape(shape)


def mask(shape, box):
    result = np.zeros(shape, dtype=bool)
    result[tuple(slice(a, b) for a, b in zip(box.start, box.stop, strict=True))] = True
    return result


@given(st.data())
def test_box(data):
    shape = data.draw(shapes)
    box = data.draw(boxes(shape))
    inside = numbered(shape)[mask(shape, box)]
    values = numbered(shape)[box.slices((0,) * len(shape))]
    assert values.shape == box.shape
    assert values.size == box.size
    assert np.array_equal(values.reshape(-1), inside)
    assert np.array_equal(numbered(shape)[Box.whole(shape).slices(Box.whole(shape).start)], numbered(shape))


@given(st.data())
def test_overlap_is_the_common_mask(data):
    shape = data.draw(shapes)
    a, b = data.draw(boxes(shape)), data.draw(boxes(shape))
    common = mask(shape, a) & mask(shape, b)
    overlap = a.overlap(b)
    assert overlap == b.overlap(a)
    if overlap is None:
        assert not common.any()
    else:
        assert overlap.size > 0
        assert np.array_equal(mask(shape, overlap), common)
        inner = numbered(shape)[a.slices((0,) * len(shape))][overlap.slices(a.start)]
        assert np.array_equal(inner.reshape(-1), numbered(shape)[common])


@given(st.data())
def test_boxes_of_a_piece_tile_it_in_order(data):
    shape = data.draw(shapes)
    box = data.draw(boxes(shape))
    start, stop = sorted(data.draw(st.tuples(st.integers(0, box.size), st.integers(0, box.size))))
    piece = Piece(box, start, stop)
    expected = numbered(shape)[mask(shape, box)][start:stop]
    assert piece.size == expected.size
    found = list(piece.boxes())
    assert len(found) <= max(1, 2 * len(shape) - 1)
    at = 0
    for offset, part in found:
        assert offset == at
        assert part.size > 0
        at += part.size
    values = [numbered(shape)[part.slices((0,) * len(shape))].reshape(-1) for _, part in found]
    assert np.array_equal(np.concatenate([np.zeros(0, dtype=int), *values]), expected)


def test_a_piece_of_a_scalar_and_a_whole_box():
    assert list(Piece.of(Box.whole(())).boxes()) == [(0, Box((), ()))]
    whole = Box((2, 1), (4, 9))
    assert Piece.of(whole) == Piece(whole, 0, 16)
    assert list(Piece.of(whole).boxes()) == [(0, whole)]
    assert list(Piece(whole, 8, 8).boxes()) == []


@given(st.data(), st.integers(1, 5))
def test_shards_are_numpy_chunks(data, size):
    """Shard r is the r-th run of ceil(n / size) rows, and the rest is padding."""
    shape = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=3).map(tuple))
    dim = data.draw(st.integers(0, len(shape) - 1))
    even = shape[dim] % size == 0
    if not even:
        with pytest.raises(ValueError, match=f"dimension {dim} of .* does not divide by {size}"):
            shard(shape, dim, 0, size)
    values = np.moveaxis(numbered(shape), dim, 0)
    rows = math.ceil(shape[dim] / size)
    for rank in range(size):
        box, local = shard(shape, dim, rank, size, pad=not even)
        expected = np.moveaxis(values[rank * rows : (rank + 1) * rows], 0, dim)
        assert np.array_equal(numbered(shape)[box.slices((0,) * len(shape))], expected)
        assert local == (*shape[:dim], rows, *shape[dim + 1 :])
        assert all(n <= m for n, m in zip(box.shape, local, strict=True))


@pytest.mark.parametrize(("dim", "rank"), [(-1, 0), (2, 0), (0, 2), (0, -1)])
def test_a_shard_that_does_not_exist(dim, rank):
    with pytest.raises(ValueError, match=rf"no shard {rank} of 2 along dimension {dim} of \(4, 6\)"):
        shard((4, 6), dim, rank, 2)


def test_specs_and_pieces_are_values():
    box = Box.whole((3, 4))
    spec = ParamSpec("norm.weight", (3, 4), box, (3, 4))
    assert spec == ParamSpec("norm.weight", (3, 4), Box((0, 0), (3, 4)), (3, 4))
    assert len({Piece.of(box), Piece(Box.whole((3, 4)), 0, 12)}) == 1
    with pytest.raises(FrozenInstanceError):
        spec.name = "other"
