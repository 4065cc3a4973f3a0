"""One indexed dataset of several, in constant memory. No torch.

The training documents of all parts in order come first, then the held-out documents of all parts. So the contiguous
shards of a build merge into what one build gives, byte for byte, and merging is associative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

import megapoly
from megapoly.data import _index
from megapoly.data.indexed import DTYPES, IndexedDataset
from megapoly.data.naming import NewDataset, new_dataset
from megapoly.data.sidecar import Checksums, Sidecar, TokenizerMark, Validation
from megapoly.errors import ConfigError, DataError

Int64s = npt.NDArray[np.int64]

_CHUNK = 1 << 18  # documents looked at together


@dataclass(frozen=True)
class Assembly:
    """How the documents of several datasets become one.

    Attributes:
        deduplicate: keep the first of documents with the same tokens.
        shuffle: seed of a keyed shuffle of the documents; None keeps their order.
        pack: length of best-fit packs in tokens; 0 keeps the stream.
        memory_mb: bound in MB on what shuffle, removal of duplicates and packing hold.
    """

    deduplicate: bool = False
    shuffle: int | None = None
    pack: int = 0
    memory_mb: int = 1024

    def __post_init__(self) -> None:
        if self.deduplicate or self.shuffle is not None or self.pack:
            raise ConfigError("only plain concatenation yet")


_PLAIN = Assembly()


def merge(
    parts: Sequence[str | Path],
    prefix: str | Path,
    assembly: Assembly = _PLAIN,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Sidecar:
    """Write PREFIX.bin, .idx and .json from datasets of one tokenizer, language and split.

    Documents of several sequences, as other tools write them, become one sequence each, and those without a token are
    left out.

    Args:
        parts: the datasets, in order: of all a .json is there, or of none.
        progress: hears of the bytes done and of all bytes to do.

    Returns:
        What the .json says. Of parts without a .json none is written, and the language and the tokenizer are empty.

    Raises:
        DataError: parts that do not go together, a damaged part, or a dataset at PREFIX already. Nothing is
            left behind.
    """
    found = [_Part.look(Path(each)) for each in parts]
    _check_alike(found)
    with new_dataset(Path(prefix), overwrite=overwrite) as new:
        sidecar = _write(found, new, _Progress(progress, sum(each.bytes for each in found)))
        new.name(sidecar if found[0].sidecar else None)
    return sidecar


@dataclass(frozen=True)
class _Part:
    """What is known of a part while it is not open. Its sidecar is without the checksums."""

    prefix: Path
    dtype: np.dtype[np.generic]
    documents: int
    tokens: int
    train_documents: int
    pack: int
    sidecar: Sidecar | None

    @classmethod
    def look(cls, prefix: Path) -> _Part:
        opened = IndexedDataset(prefix)
        side = opened.sidecar
        if side is not None:
            side = side.model_copy(update={"checksums": Checksums(block=_index.BLOCK_BYTES, bin="", idx="")})
        return cls(
            prefix, opened.dtype, opened.documents, opened.tokens, opened.train_documents, opened.pack, side
        )  # fmt: skip

    @property
    def bytes(self) -> int:
        return self.tokens * self.dtype.itemsize

    def open(self) -> tuple[IndexedDataset, _index.Part]:
        """The dataset and its tokens, both as they were when it was looked at."""
        dataset = IndexedDataset(self.prefix)
        seen = (dataset.dtype, dataset.documents, dataset.tokens, dataset.train_documents, dataset.pack)
        if seen != (self.dtype, self.documents, self.tokens, self.train_documents, self.pack):
            raise DataError(f"{self.prefix}: has changed while it was merged; merge again when nothing writes to it")
        return dataset, dataset.part()


def _check_alike(parts: Sequence[_Part]) -> None:
    """Refuse parts that do not make one dataset."""
    if not parts:
        raise DataError("no dataset to merge; give the paths of some, without .bin, .idx, .json")
    seen: dict[Path, Path] = {}
    for each in parts:
        real = each.prefix.resolve()
        if real in seen:
            raise DataError(f"{each.prefix}: is given twice, also as {seen[real]}; give every dataset once")
        seen[real] = each.prefix
    first = parts[0]
    for each in parts[1:]:
        for what, one, other, then in _compared(first, each):
            if one != other:
                raise DataError(f"{each.prefix}: has {what} {other}, but {first.prefix} has {one}; {then}")


def _compared(first: _Part, each: _Part) -> Iterator[tuple[str, object, object, str]]:
    """What two parts have to have in common: its name, that of the one and of the other, and what to do."""
    a, b = first.sidecar, each.sidecar
    missing = "parts with a .json and without do not go together: build the latter again"
    yield ".json", "one" if a else "none", "one" if b else "none", missing
    if a is not None and b is not None:
        yield "language", a.language, b.language, "merge datasets of one language"
        again = "build all with one tokenizer"
        yield "a tokenizer of SHA-256", a.tokenizer.sha256, b.tokenizer.sha256, again
        yield "a vocabulary of", a.tokenizer.vocabulary, b.tokenizer.vocabulary, again
        again = "build all with the same --validation and --seed"
        yield "a validation fraction of", a.validation.fraction, b.validation.fraction, again
        yield "a validation seed of", a.validation.seed, b.validation.seed, again
        yield "packs of", a.pack, b.pack, "merge packs of one length, or streams (0)"
    yield "tokens of type", first.dtype.name, each.dtype.name, "build all with one tool and tokenizer"


class _Progress:
    def __init__(self, show: Callable[[int, int], None], total: int) -> None:
        self._show, self._done, self._total = show, 0, total

    def add(self, count: int) -> None:
        self._done += count
        self._show(self._done, self._total)


def _documents(dataset: IndexedDataset, first: int, stop: int) -> Iterator[tuple[int, Int64s]]:
    """Documents [first, stop) in chunks: the first token, and the lengths, which may be 0.

    Raises:
        DataError: lengths, pointers and indices do not follow from each other.
    """
    for begin in range(first, stop, _CHUNK):
        end = min(stop, begin + _CHUNK)
        indices = dataset.document_indices[begin : end + 1]
        low, high = int(indices[0]), int(indices[-1])
        if (np.diff(indices) < 0).any() or low < 0 or high > len(dataset.lengths):
            raise dataset.damaged(f"the indices of documents {begin} to {end - 1}")
        lengths, pointers = dataset.lengths[low:high], dataset.pointers[low : high + 1]
        start = dataset.start(begin)
        places = start + np.concatenate([[0], np.cumsum(lengths)])
        if (lengths < 0).any() or (places[: len(pointers)] * dataset.dtype.itemsize != pointers).any():
            raise dataset.damaged(f"the lengths or pointers of documents {begin} to {end - 1}")
        yield start, np.diff(places[indices - low])


def _write(parts: Sequence[_Part], new: NewDataset, progress: _Progress) -> Sidecar:
    first = parts[0]
    code = next(code for code, name in DTYPES.items() if first.dtype == name)
    writer = _index.Writer(new.bin, new.idx, code, first.sidecar.tokenizer.vocabulary if first.sidecar else 1)
    for held in (False, True):
        for each in parts:
            begin, end = (each.train_documents, each.documents) if held else (0, each.train_documents)
            if begin == end:
                continue
            dataset, tokens = each.open()
            for at, lengths in _documents(dataset, begin, end):
                tokens.hand_on(at, lengths, None, writer)
                progress.add(int(lengths.sum()) * first.dtype.itemsize)
    return _sidecar(parts, *writer.finish())


def _sidecar(parts: Sequence[_Part], documents: int, tokens: int, bin_crcs: list[int], idx_crcs: list[int]) -> Sidecar:
    """What the .json will say."""
    first = parts[0].sidecar
    if first is None:
        first = Sidecar(
            language="",
            tokenizer=TokenizerMark(sha256="", vocabulary=0),
            documents=0,
            tokens=0,
            bytes=0,
            validation=Validation(fraction=0, seed=0, documents=0, tokens=0, bytes=0),
            checksums=Checksums(block=_index.BLOCK_BYTES, bin="", idx=""),
            tool="",
        )
    sides = [each.sidecar for each in parts if each.sidecar]
    held = {name: sum(getattr(side.validation, name) for side in sides) for name in ("documents", "tokens", "bytes")}
    return first.model_copy(
        update={
            "documents": documents,
            "tokens": tokens,
            "bytes": sum(side.bytes for side in sides),
            "validation": first.validation.model_copy(update=held),
            "checksums": Checksums(
                block=_index.BLOCK_BYTES, bin=Checksums.join(bin_crcs), idx=Checksums.join(idx_crcs)
            ),
            "tool": f"megapoly {megapoly.__version__}",
        }
    )
