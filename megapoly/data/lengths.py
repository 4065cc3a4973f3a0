"""How long the documents of an indexed dataset are, from its .idx alone. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from megapoly.data.indexed import IndexedDataset
from megapoly.data.parts import documents

_BINS = 64  # for any length of 64 bits


@dataclass
class Lengths:
    """Lengths of documents in tokens, the one that ends each included.

    Attributes:
        documents: [64] how many are in a bin: number 0 is of those without a token, i of those with 2^(i - 1) tokens to
            2^i - 1.
        tokens: [64] how many tokens these have.
        shortest, longest: the extremes, and ``longest_document`` the number of the first of the longest.
    """

    documents: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(_BINS, np.int64))
    tokens: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(_BINS, np.int64))
    shortest: int = 0
    longest: int = 0
    longest_document: int = 0

    def add(self, first: int, lengths: npt.NDArray[np.int64]) -> None:
        """Count documents ``first``, ``first`` + 1 and so on, which follow those counted before."""
        if not len(lengths):
            return
        # Of a whole number n, 0 < n < 2^53, frexp gives the i with 2^(i - 1) <= n < 2^i, and of 0 it gives 0.
        bins = np.frexp(lengths.astype(np.float64))[1]
        seen = int(self.documents.sum())
        self.documents += np.bincount(bins, minlength=_BINS)
        np.add.at(self.tokens, bins, lengths)
        shortest, at = int(lengths.min()), int(lengths.argmax())
        self.shortest = min(self.shortest, shortest) if seen else shortest
        if not seen or int(lengths[at]) > self.longest:
            self.longest, self.longest_document = int(lengths[at]), first + at

    def bins(self) -> list[tuple[int, int, int, int]]:
        """Least and greatest length, documents and tokens of every bin from the first that holds one to the last."""
        there = np.flatnonzero(self.documents)
        if not len(there):
            return []
        return [
            (1 << i >> 1, (1 << i) - 1, int(self.documents[i]), int(self.tokens[i]))
            for i in range(int(there[0]), int(there[-1]) + 1)
        ]


def count_lengths(dataset: IndexedDataset, first: int = 0, stop: int | None = None) -> Lengths:
    """Lengths of documents [first, stop), of all where no ``stop`` is given; in constant memory.

    Raises:
        DataError: the .idx is damaged, or cannot be read.
    """
    counted = Lengths()
    for _, lengths in documents(dataset, first, dataset.documents if stop is None else stop):
        counted.add(first, lengths)
        first += len(lengths)
    return counted
