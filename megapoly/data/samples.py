"""From sample numbers to tensors: windows of tokens, next-token labels, positions and documents.

Shapes: B samples, L = ``plan.sequence`` tokens. Window w of a source covers tokens [w L, w L + L + 1) of its training
part: L inputs, and the same moved by one as labels. Document boundaries come from the .idx alone, so a pipeline stage
that reads no tokens needs no .bin.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megapoly.data.indexed import IndexedDataset
from megapoly.data.plan import Plan

NOT_COUNTED = -1


@dataclass(frozen=True)
class Batch:
    """Rows of a global batch, or of a validation set.

    Args:
        samples: [B] int64, sample numbers of the run (of a validation set: window numbers; -1 for a row of padding).
        source: [B] int32, index of the source in ``plan.sources``.
        tokens: [B, L] int64, or None where they were not asked for.
        labels: [B, L] int64, the token after each; ``NOT_COUNTED`` where there is none to learn. None as ``tokens``.
        positions: [B, L] int64, from 0 in every window; where documents are separated, from 0 in every document.
        documents: [B, L] int32, number of the token's document inside the window, from 0; None unless separated.
    """

    samples: torch.Tensor
    source: torch.Tensor
    tokens: torch.Tensor | None
    labels: torch.Tensor | None
    positions: torch.Tensor
    documents: torch.Tensor | None

    def rows(self, start: int, stop: int) -> Batch:
        """Rows [start, stop), as views."""
        return self._map(lambda column: column[start:stop])

    def to(self, device: torch.device | str) -> Batch:
        """The same on another device."""
        return self._map(lambda column: column.to(device))

    def split(self, size: int) -> list[Batch]:
        """Micro-batches of ``size`` rows; B has to be a multiple of it."""
        total = len(self.samples)
        if total % size:
            raise ValueError(f"{total} rows do not divide into micro-batches of {size}")
        return [self.rows(start, start + size) for start in range(0, total, size)]

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {name: None if old is None else change(old) for name, old in columns.items()}
        return Batch(**changed)


def read(
    plan: Plan,
    datasets: Mapping[str, IndexedDataset],
    samples: npt.NDArray[np.int64],
    *,
    vocabulary: int,
    separate_documents: bool,
    with_tokens: bool,
) -> Batch:
    """The rows of ``samples`` [B], in their order.

    Args:
        datasets: by source name.
        vocabulary: token ids have to be below it.
        separate_documents: positions restart in every document, and no label crosses from one into the next.

    Raises:
        DataError: a sample outside the plan, a window outside its file, a damaged id.
    """
    samples = np.array(samples, dtype=np.int64)
    located = plan.locate(samples)
    rows = _Rows(samples.size, plan.sequence, with_tokens, separate_documents)
    for source in np.unique(located.source):
        chosen = np.flatnonzero(located.source == source)
        dataset = datasets[plan.sources[source].name]
        rows.fill(dataset, chosen, located.window[chosen] * plan.sequence, dataset.train_tokens, vocabulary)
    return rows.batch(samples, located.source)


def validation(
    plan: Plan,
    datasets: Mapping[str, IndexedDataset],
    source: int,
    *,
    windows: int,
    rows_multiple: int,
    part: tuple[int, int] = (0, 1),
    vocabulary: int,
    separate_documents: bool,
    with_tokens: bool,
) -> Batch:
    """The held-out documents of one source, as consecutive windows, at most ``windows`` of them.

    Every held-out token but the first is predicted once, up to the last window, which is padded when it is short, so
    that a small language validates too. Rows of padding, in which nothing is counted, fill the batch up to a multiple
    of ``rows_multiple`` (micro-batch x data-parallel ranks, for one shape on all of them). B is 0 where there is
    nothing to predict.

    Args:
        source: index in ``plan.sources``.
        part: (i, n) gives the i-th of n equal parts of these rows; n has to divide ``rows_multiple``.
        vocabulary, separate_documents, with_tokens: as of :func:`read`.
    """
    dataset = datasets[plan.sources[source].name]
    length, first, end = plan.sequence, dataset.train_tokens, dataset.tokens
    count = min(windows, max(0, -(-(end - first - 1) // length)))
    rank, size = part
    rows = -(-count // rows_multiple) * rows_multiple // size
    numbers = np.arange(rank * rows, (rank + 1) * rows, dtype=np.int64)
    numbers[numbers >= count] = -1
    starts = first + length * numbers[numbers >= 0]
    filled = _Rows(rows, length, with_tokens, separate_documents)
    filled.fill(dataset, np.arange(starts.size), starts, end, vocabulary)
    return filled.batch(numbers, np.full(rows, source, np.int32))


class _Rows:
    """The columns of a batch of B rows, at first all padding."""

    def __init__(self, rows: int, length: int, with_tokens: bool, separate_documents: bool) -> None:
        self.tokens = np.zeros((rows, length), np.int64) if with_tokens else None
        self.labels = np.full((rows, length), NOT_COUNTED, np.int64) if with_tokens else None
        self.positions = np.empty((rows, length), np.int64)
        self.documents = np.zeros((rows, length), np.int32) if separate_documents else None
        self._padding = np.ones(rows, bool)

    def fill(
        self,
        dataset: IndexedDataset,
        rows: npt.NDArray[np.intp],
        starts: npt.NDArray[np.int64],
        limit: int,
        vocabulary: int,
    ) -> None:
        """Put the windows from tokens ``starts`` [n] into ``rows`` [n]; nothing from token ``limit`` on."""
        self._padding[rows] = False
        columns = (self.tokens, self.labels, self.positions, self.documents)
        dataset.fill(rows.astype(np.int64), starts, limit, vocabulary, columns)

    def batch(self, samples: npt.NDArray[np.int64], source: npt.NDArray[np.int32]) -> Batch:
        self.positions[self._padding] = np.arange(self.positions.shape[1])
        columns = (self.tokens, self.labels, self.positions, self.documents)
        tokens, labels, positions, documents = (None if c is None else torch.from_numpy(c) for c in columns)
        assert positions is not None
        return Batch(torch.from_numpy(samples), torch.from_numpy(source), tokens, labels, positions, documents)
