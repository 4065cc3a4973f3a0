"""Sets of pieces of one tensor: what two have in common, and whether they tile it. No torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from megapoly.errors import CheckpointError
from megapoly.spec import Box, Index, Piece


def check_tiling(name: str, shape: Index, pieces: Sequence[tuple[str, Piece]]) -> None:
    """Check that every element is in exactly one piece: all inside, no overlap, and the sizes add up.

    Args:
        pieces: none of them empty, each with the file that holds it.
    """
    by_box: dict[Box, list[tuple[str, Piece]]] = {}
    for file, piece in pieces:
        check_inside(name, shape, piece)
        by_box.setdefault(piece.box, []).append((file, piece))
    groups = list(by_box.items())
    for i, (box, group) in enumerate(groups):
        group.sort(key=lambda item: item[1].start)
        pairs = list(itertools.pairwise(group))  # ranges of one box
        for other, rest in groups[i + 1 :]:
            if box.overlap(other):
                pairs += [(a, b) for a in group for b in rest]
        for (file_a, a), (file_b, b) in pairs:
            if any(True for _ in overlaps(a, b)):
                raise CheckpointError(f"tensor {name!r}: {say(a)} of {file_a} and {say(b)} of {file_b} overlap")
    found, expected = sum(piece.size for _, piece in pieces), math.prod(shape)
    if found != expected:
        raise CheckpointError(
            f"tensor {name!r} of shape {list(shape)}: {expected - found} of its {expected} elements are in no piece"
        )


def check_inside(name: str, shape: Index, piece: Piece) -> None:
    """Check that a piece lies within its tensor."""
    box = piece.box
    fits = len(box.start) == len(box.stop) == len(shape)
    fits = fits and all(0 <= a <= b <= n for a, b, n in zip(box.start, box.stop, shape, strict=True))
    if not fits or not 0 <= piece.start <= piece.stop <= box.size:
        raise CheckpointError(f"tensor {name!r}: {say(piece)} is outside of shape {list(shape)}")


def say(piece: Piece) -> str:
    box = ", ".join(f"{a}:{b}" for a, b in zip(piece.box.start, piece.box.stop, strict=False))
    return f"elements {piece.start} to {piece.stop} of [{box}]"


def overlaps(a: Piece, b: Piece) -> Iterator[tuple[int, Box, int, Box, Box]]:
    """Common boxes of two pieces: ``(offset in a, box of a, offset in b, box of b, common box)``."""
    if a.box.overlap(b.box) is None or (a.box == b.box and (a.stop <= b.start or b.stop <= a.start)):
        return
    boxes = list(b.boxes())
    for offset_a, box_a in a.boxes():
        for offset_b, box_b in boxes:
            common = box_a.overlap(box_b)
            if common is not None:
                yield offset_a, box_a, offset_b, box_b, common
