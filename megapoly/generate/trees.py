"""Rows of tokens that begin alike as one sequence, in which what they share stands once.

Options of a question begin with the question, and questions with the same examples. A pass over a tree computes every
such beginning once: a token sees those that it comes after in its row, and stands at its place there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_LEAST = 1 / 4  # of a row that it shares with the one before it, so that they stand together
_SMALL = 512  # tokens of a tree from which on it is at most twice as long as its first row: attention is over all


@dataclass(frozen=True)
class Segment:
    """Tokens ``[start, stop)`` of a tree that one row has added, and those before them in the row."""

    start: int
    stop: int
    before: list[int]


class PrefixTree:
    """One sequence of several rows.

    Attributes:
        tokens, positions: of the sequence: ids, and each one's place in its rows.
        labels: what is asked for: the id after the token at a place; value: the number of the question.
        rows: of every row its number, and the questions that its scored tokens are, in their order.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.labels: dict[tuple[int, int], int] = {}
        self.rows: list[tuple[int, list[int]]] = []
        self._segments: list[Segment] = []
        self._last: Sequence[int] = ()
        self._path: list[int] = []

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        """Whether every token sees all before it."""
        return all(segment.before == list(range(segment.start)) for segment in self._segments)

    def takes(self, row: Sequence[int]) -> bool:
        """Whether a row shares enough with the last one, and leaves the tree small enough."""
        shared = _shared(self._last, row[:-1])
        most = max(_SMALL, 2 * self._segments[0].stop)
        return shared >= _LEAST * (len(row) - 1) and len(self) + len(row) - 1 - shared <= most

    def add(self, number: int, row: Sequence[int], count: int) -> None:
        """Add a row, whose last ``count`` tokens are scored; the last one of all is not read."""
        inputs = row[:-1]
        shared = _shared(self._last, inputs)
        before, start = self._path[:shared], len(self)
        if shared < len(inputs):
            self.tokens += inputs[shared:]
            self.positions += range(shared, len(inputs))
            self._segments.append(Segment(start, len(self), before))
        self._last, self._path = inputs, [*before, *range(start, len(self))]
        scored = range(len(row) - count, len(row))
        self.rows.append(
            (number, [self.labels.setdefault((self._path[i - 1], row[i]), len(self.labels)) for i in scored])
        )

    def mask(self, length: int) -> npt.NDArray[np.bool_]:
        """Which tokens each one sees, ``[length, length]``; those that fill up see themselves."""
        seen = np.eye(length, dtype=bool)
        for each in self._segments:
            seen[each.start : each.stop, each.before] = True
            seen[each.start : each.stop, each.start : each.stop] = np.tri(each.stop - each.start, dtype=bool)
        return seen


def plant(rows: Sequence[Sequence[int]], counts: Sequence[int]) -> list[PrefixTree]:
    """Trees that hold all rows, of each of which the last ``counts`` tokens are scored."""
    trees: list[PrefixTree] = []
    for i in sorted(range(len(rows)), key=lambda i: list(rows[i])):
        if not trees or not trees[-1].takes(rows[i]):
            trees.append(PrefixTree())
        trees[-1].add(i, rows[i], counts[i])
    return trees


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two rows have in common at their beginnings."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
