"""From sample numbers to tensors: windows of tokens, next-token labels, positions and lengths of documents.

Shapes: B samples, L = ``plan.sequence`` tokens. Window w of a stream covers tokens [w L, w L + L + 1) of its training
part: L inputs, and the same moved by one as labels, of instructions those that are to be learned. Window w of a row of
packs is pack w, tokens [w L, w L + L), whose last label is not counted; nor is a label of the padding that may end it,
which is a document of its own. Document boundaries come from the .idx alone, so a pipeline stage that reads no tokens
needs no .bin.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megapoly.data import _index
from megapoly.data.indexed import IndexedDataset
from megapoly.data.plan import Plan
from megapoly.errors import DataError

NOT_COUNTED = -1


@dataclass(frozen=True)
class Batch:
    """Rows of a global batch, or of a validation set.

    Tokens, labels and positions are of one type, int64 or int32.

    Args:
        samples: [B] int64, sample numbers of the run (of a validation set: window numbers; -1 for a row of padding).
        source: [B] int32, index of the source in ``plan.sources``, of all tokens of a row.
        tokens: [B, L], or None where they were not asked for.
        labels: [B, L], the token after each; ``NOT_COUNTED`` where there is none to learn. None as ``tokens``.
        positions: [B, L], from 0 in every window; where documents are separated, from 0 in every document.
        cu_seqlens: [n + 1] int32, 0 and then where each of the n documents of all rows ends, counted over the B L
            tokens row by row, as attention over sequences of several lengths takes it. What a row holds of a document
            is a document of its own. None unless documents are separated.
    """

    samples: torch.Tensor
    source: torch.Tensor
    tokens: torch.Tensor | None
    labels: torch.Tensor | None
    positions: torch.Tensor
    cu_seqlens: torch.Tensor | None

    @property
    def token_source(self) -> torch.Tensor:
        """[B, L] int32, ``source`` of every token, as a view that takes no memory."""
        return self.source[:, None].expand_as(self.positions)

    @property
    def max_seqlen(self) -> int | None:
        """Tokens of the longest document; None unless documents are separated. Waits for a GPU that the batch is on."""
        return None if self.cu_seqlens is None else int(self.cu_seqlens.diff().max())

    @property
    def documents(self) -> torch.Tensor | None:
        """[B, L] int32, number of the token's document inside the window, from 0; None unless separated."""
        return None if self.cu_seqlens is None else document_numbers(self.cu_seqlens, *self.positions.shape)

    def rows(self, start: int, stop: int) -> Batch:
        """Rows [start, stop), as views but for ``cu_seqlens``."""
        count, length = self.positions.shape
        cut = self.cu_seqlens
        if cut is not None:
            first, last = start * length, min(stop, count) * length
            cut = cut[(cut >= first) & (cut <= last)] - first
        return replace(self._map(lambda column: column[start:stop]), cu_seqlens=cut)

    def to(self, device: torch.device | str) -> Batch:
        """The same on another device."""
        return self._map(lambda column: column.to(device))

    def pinned(self) -> Batch:
        """The same in page-locked memory, from which a GPU copies by itself."""
        return self._map(torch.Tensor.pin_memory)

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


def document_numbers(cu_seqlens: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    """[rows, length] int32: the document of every token, from 0 in every row. Does not wait for a GPU."""
    begins = torch.zeros(rows * length, dtype=torch.int32, device=cu_seqlens.device)
    begins[cu_seqlens[:-1].long()] = 1
    return begins.view(rows, length).cumsum(1, dtype=torch.int32) - 1


def read(
    plan: Plan,
    datasets: Mapping[str, IndexedDataset],
    samples: npt.NDArray[np.int64],
    *,
    vocabulary: int,
    separate_documents: bool,
    with_tokens: bool,
    all_learned: bool = False,
    ids: torch.dtype = torch.int64,
    progress: _index.Progress | None = None,
) -> Batch:
    """The rows of ``samples`` [B], in their order, by one call of C++ for all sources.

    Args:
        datasets: by source name.
        vocabulary: token ids have to be below it.
        separate_documents: positions restart in every document, and no label crosses from one into the next.
        all_learned: tokens of instructions are labels too, not of answers alone.
        ids: torch.int64, or torch.int32, which takes half of the memory.
        progress: tells another thread which source (index in ``plan.sources``) is read, and how many bytes were.

    Raises:
        DataError: a sample outside the plan, a window outside its file, a damaged id or index, packs of another length.
    """
    samples = np.array(samples, dtype=np.int64)
    located = plan.locate(samples)
    sources = [datasets[source.name] for source in plan.sources]
    for name, dataset in zip((source.name for source in plan.sources), sources, strict=True):
        check_pack(name, dataset, plan.sequence, separate_documents)
    starts = located.window * plan.sequence
    packed = np.array([dataset.pack > 0 for dataset in sources])[located.source]
    ends = np.array([dataset.train_tokens for dataset in sources], np.int64)[located.source]
    rows = _Rows(samples.size, plan.sequence, with_tokens, ids, all_learned)
    limits = np.where(packed, starts + plan.sequence, ends)
    cu_seqlens = rows.fill(sources, located.source, starts, limits, vocabulary, separate_documents, progress)
    return rows.batch(samples, located.source, cu_seqlens)


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

    Every held-out token but the first is predicted once, of instructions those of the answers, up to the last window,
    which is padded when it is short, so that a small language validates too. Rows of padding, in which nothing is
    counted, fill the batch up to a multiple of ``rows_multiple`` (micro-batch x data-parallel ranks, for one shape on
    all of them). B is 0 where there is nothing to predict.

    Args:
        source: index in ``plan.sources``.
        part: (i, n) gives the i-th of n equal parts of these rows; n has to divide ``rows_multiple``.
        vocabulary, separate_documents, with_tokens: as of :func:`read`.
    """
    name, length = plan.sources[source].name, plan.sequence
    dataset = datasets[name]
    check_pack(name, dataset, length, separate_documents)
    first, end = dataset.train_tokens, dataset.tokens
    there = (end - first) // length if dataset.pack else max(0, -(-(end - first - 1) // length))
    count = min(windows, there)
    rank, size = part
    rows = -(-count // rows_multiple) * rows_multiple // size
    numbers = np.arange(rank * rows, (rank + 1) * rows, dtype=np.int64)
    numbers[numbers >= count] = -1
    starts = first + length * numbers
    limits = starts + length if dataset.pack else np.full(rows, end)
    filled = _Rows(rows, length, with_tokens, torch.int64)
    which = np.where(numbers < 0, -1, 0).astype(np.int32)
    cu_seqlens = filled.fill([dataset], which, starts, limits, vocabulary, separate_documents, None)
    return filled.batch(numbers, np.full(rows, source, np.int32), cu_seqlens)


def check_pack(name: str, dataset: IndexedDataset, sequence: int, separate_documents: bool) -> None:
    """Refuse packs that do not fit the run.

    Raises:
        DataError: of another length than ``sequence``, or documents that are not separated.
    """
    if not dataset.pack:
        return
    what = f"source {name!r} ({dataset.prefix}) is made of packs of {dataset.pack} tokens"
    if dataset.pack != sequence:
        raise DataError(
            f"{what}, but train.sequence is {sequence}; set it to {dataset.pack}, or build the source again"
        )
    if not separate_documents:
        raise DataError(
            f"{what}, whose documents have nothing to do with each other; set data.separate_documents to true"
        )


class _Rows:
    """The columns of a batch of B rows; with ``all_learned`` all tokens of instructions are labels."""

    def __init__(self, rows: int, length: int, with_tokens: bool, ids: torch.dtype, all_learned: bool = False) -> None:
        self._all = all_learned
        kind = {torch.int64: np.int64, torch.int32: np.int32}[ids]
        # In one piece, for which the system gives large pages: half of the time would go into small ones.
        block = np.empty((3 if with_tokens else 1, rows, length), kind)
        self.positions = block[0]
        self.tokens = block[1] if with_tokens else None
        self.labels = block[2] if with_tokens else None

    def fill(
        self,
        sources: Sequence[IndexedDataset],
        source: npt.NDArray[np.int32],
        starts: npt.NDArray[np.int64],
        limits: npt.NDArray[np.int64],
        vocabulary: int,
        separate: bool,
        progress: _index.Progress | None,
    ) -> npt.NDArray[np.int32] | None:
        """Put the windows from tokens ``starts`` [B] of sources ``source`` [B], and nothing from ``limits`` [B] on."""
        readers = [dataset.reader for dataset in sources]
        return _index.fill(
            readers, source, starts, limits, vocabulary, separate,
            self.tokens, self.labels, self.positions, progress or _index.Progress(), self._all,
        )  # fmt: skip

    def batch(
        self, samples: npt.NDArray[np.int64], source: npt.NDArray[np.int32], cu_seqlens: npt.NDArray[np.int32] | None
    ) -> Batch:
        columns = (self.tokens, self.labels, self.positions, cu_seqlens)
        tokens, labels, positions, ends = (None if c is None else torch.from_numpy(c) for c in columns)
        assert positions is not None
        return Batch(torch.from_numpy(samples), torch.from_numpy(source), tokens, labels, positions, ends)
