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
    length = plan.sequence
    starts = located.window * length
    windows = np.empty((samples.size, length + 1), np.int64) if with_tokens else None
    flags = np.zeros((samples.size, length + 1), bool) if separate_documents else None
    for source in np.unique(located.source):
        rows = np.flatnonzero(located.source == source)
        dataset = datasets[plan.sources[source].name]
        if windows is not None:
            windows[rows] = dataset.gather(starts[rows], length + 1, vocabulary)
        if flags is not None:
            _mark(flags, rows, dataset, starts[rows])
    return _batch(samples, located.source, windows, flags, length)


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
    full = int(np.sum(starts + length + 1 <= end))
    tokens = None
    if with_tokens:
        tokens = np.full((rows, length + 1), NOT_COUNTED, np.int64)
        if full:
            tokens[:full] = dataset.gather(starts[:full], length + 1, vocabulary)
        if full < starts.size:
            rest = end - int(starts[full])
            tokens[full : starts.size, :rest] = dataset.gather(starts[full:], rest, vocabulary)
    flags = None
    if separate_documents:
        flags = np.zeros((rows, length + 1), bool)
        _mark(flags, np.arange(starts.size), dataset, starts)
    return _batch(numbers, np.full(rows, source, np.int32), tokens, flags, length)


def _mark(
    flags: npt.NDArray[np.bool_],
    rows: npt.NDArray[np.intp],
    dataset: IndexedDataset,
    starts: npt.NDArray[np.int64],
) -> None:
    """Set ``flags[row, i]`` where token ``start + i`` of the row's window begins a document."""
    for row, start in zip(rows.tolist(), starts.tolist(), strict=True):
        boundaries = dataset.boundaries(start, start + flags.shape[1])
        flags[row, boundaries - start] = True


def _batch(
    samples: npt.NDArray[np.int64],
    source: npt.NDArray[np.int32],
    windows: npt.NDArray[np.int64] | None,
    flags: npt.NDArray[np.bool_] | None,
    length: int,
) -> Batch:
    """Tensors from windows [B, L + 1] of tokens (``NOT_COUNTED`` in padding) and of document starts."""
    steps = np.arange(length, dtype=np.int64)
    positions, documents = np.tile(steps, (samples.size, 1)), None
    if flags is not None:
        inside = flags[:, :length]
        positions -= np.maximum.accumulate(np.where(inside, steps, 0), axis=1)
        documents = torch.from_numpy(np.cumsum(inside, axis=1, dtype=np.int32))
    tokens = labels = None
    if windows is not None:
        tokens = torch.from_numpy(np.maximum(windows[:, :length], 0))
        labels_there = windows[:, 1:].copy()
        if flags is not None:
            labels_there[flags[:, 1:]] = NOT_COUNTED
        labels = torch.from_numpy(labels_there)
    return Batch(
        samples=torch.from_numpy(samples),
        source=torch.from_numpy(source),
        tokens=tokens,
        labels=labels,
        positions=torch.from_numpy(positions),
        documents=documents,
    )
