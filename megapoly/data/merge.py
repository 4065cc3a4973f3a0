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
from megapoly.data.parts import Int64s, Part, count_documents, documents
from megapoly.data.permutation import derive_key
from megapoly.data.sidecar import Checksums, Duplicates, Padding, Sidecar, Skipped, TokenizerMark, Validation
from megapoly.data.skipped import join_skipped
from megapoly.errors import ConfigError, DataError

_PACKING_MB = 256  # that packing holds at most
_LONGEST_PACK = 1 << 22


@dataclass(frozen=True)
class Assembly:
    """How the documents of several datasets become one: duplicates go, then the rest is shuffled, then packed.

    None of it depends on how the documents are cut into parts, nor on the memory. All three are done for the training
    documents and for the held-out ones by themselves; but a held-out document goes too where a training one has its
    tokens.

    Duplicates are found by a hash of 127 bits, in a table of 23 bytes for each document, beside a bit for each; what
    does not fit into ``memory_mb`` is done in several passes over the hashes, which wait in a file without a name, 16
    bytes a document. The shuffle distributes documents to buckets in another such file, as large as the tokens and 16
    bytes a document, unless they fit into three quarters of the memory; 1 GB is enough for 4 TB, and four times as much
    for every doubling. Packs are formed of 2^25 tokens at a time, or 2^21 documents where those are less, for which 256
    MB of the memory are set aside.

    Attributes:
        deduplicate: keep the first of documents with the same tokens.
        shuffle: seed of a keyed shuffle of the documents; None keeps their order.
        pack: length of best-fit packs in tokens; 0 keeps the stream.
        memory_mb: bound in MB (2^20 bytes) on what all this holds.
    """

    deduplicate: bool = False
    shuffle: int | None = None
    pack: int = 0
    memory_mb: int = 1024

    def __post_init__(self) -> None:
        if self.shuffle is not None and not 0 <= self.shuffle < 2**64:
            raise ConfigError(f"shuffle {self.shuffle} is not a seed in [0, 2^64)")
        if self.pack and not 2 <= self.pack <= _LONGEST_PACK:
            raise ConfigError(f"pack {self.pack} is not 0, nor from 2 to {_LONGEST_PACK} tokens")
        least = 1 + (_PACKING_MB if self.pack else 0)
        if self.memory_mb < least:
            raise ConfigError(f"memory_mb {self.memory_mb} is too small; at least {least} are needed")

    @property
    def changes(self) -> bool:
        """Whether the documents are more than put one after another."""
        return self.deduplicate or self.shuffle is not None or self.pack > 0

    @property
    def memory(self) -> int:
        """Bytes for the shuffle and, before it, for the removal of duplicates."""
        return (self.memory_mb - (_PACKING_MB if self.pack else 0)) << 20


_PLAIN = Assembly()


def merge(
    parts: Sequence[str | Path],
    prefix: str | Path,
    assembly: Assembly = _PLAIN,
    *,
    overwrite: bool = False,
    skipped: Sequence[Skipped] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Sidecar:
    """Write PREFIX.bin, .idx and .json from datasets of one tokenizer, language and split.

    Documents of several sequences, as other tools write them, become one sequence each, and those without a token are
    left out.

    Args:
        parts: the datasets, in order: of all a .json is there, or of none.
        skipped: the bad records that were left out of all; those of the parts where it is not given.
        progress: hears of the bytes done and of all bytes to do.

    Returns:
        What the .json says. Of parts without a .json none is written, and the language and the tokenizer are empty.

    Raises:
        DataError: parts that do not go together, a damaged part, or a dataset at PREFIX already. Nothing is
            left behind.
    """
    found = [Part.look(Path(each)) for each in parts]
    _check_alike(found)
    _check_assembly(found, assembly)
    if Path(prefix).resolve() in {each.prefix.resolve() for each in found}:
        raise DataError(f"{prefix}: is one of the parts, and cannot be the result too; choose another name")
    passes = 1 + assembly.deduplicate + (assembly.shuffle is not None)
    shown = _Progress(progress, passes * sum(each.bytes for each in found))
    with new_dataset(Path(prefix), overwrite=overwrite) as new:
        sidecar = _Assembler(found, new, assembly, shown).run()
        if skipped is not None:
            sidecar = sidecar.model_copy(update={"skipped": tuple(skipped)})
        new.name(sidecar if found[0].sidecar else None)
    return sidecar


def _check_alike(parts: Sequence[Part]) -> None:
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


def _compared(first: Part, each: Part) -> Iterator[tuple[str, object, object, str]]:
    """What two parts have to have in common: its name, that of the one and of the other, and what to do."""
    a, b = first.sidecar, each.sidecar
    missing = "parts with a .json and without do not go together: build the latter again"
    yield ".json", "one" if a else "none", "one" if b else "none", missing
    if a is not None and b is not None:
        yield "language", a.language, b.language, "merge datasets of one language"
        again = "build all with one tokenizer"
        yield "a tokenizer of SHA-256", a.tokenizer.sha256, b.tokenizer.sha256, again
        yield "a vocabulary of", a.tokenizer.vocabulary, b.tokenizer.vocabulary, again
        yield "as end of documents the id", a.tokenizer.eod, b.tokenizer.eod, again
        yield "as begin of documents the ids", a.tokenizer.begin, b.tokenizer.begin, again
        yield "as template of instructions", a.instructions, b.instructions, "build all with one --template"
        again = "build all with the same --validation and --seed"
        yield "a validation fraction of", a.validation.fraction, b.validation.fraction, again
        yield "a validation seed of", a.validation.seed, b.validation.seed, again
        yield "packs of", a.pack, b.pack, "merge packs of one length, or streams (0)"
        ends = [each.padding.id if each.padding else None for each in (a, b)]
        yield "padding of id", ends[0], ends[1], "pack all with one tool"
    yield "tokens of type", first.dtype.name, each.dtype.name, "build all with one tool and tokenizer"


def _check_assembly(parts: Sequence[Part], assembly: Assembly) -> None:
    first = parts[0]
    if first.pack and assembly.changes:
        raise DataError(
            f"{first.prefix}: is made of packs of {first.pack} tokens, which can only be put one after another; remove"
            " duplicates, shuffle and pack the streams that they were made of"
        )
    if assembly.pack and first.sidecar is None:
        raise DataError(
            f"{first.prefix}: has no .json, which tells of packs; build it with `megapoly data build` to pack it"
        )


class _Progress:
    def __init__(self, show: Callable[[int, int], None], total: int) -> None:
        self._show, self._done, self._total = show, 0, total

    def add(self, count: int) -> None:
        self._done += count
        self._show(self._done, self._total)

    def end(self) -> None:
        """Of duplicates less was done than there seemed to be to do."""
        self.add(self._total - self._done)


class _Assembler:
    """One merge, under temporary names."""

    def __init__(self, parts: Sequence[Part], new: NewDataset, assembly: Assembly, progress: _Progress) -> None:
        self._parts, self._new, self._assembly, self._progress = parts, new, assembly, progress
        first = parts[0]
        self._item = first.dtype.itemsize
        code = next(code for code, name in DTYPES.items() if first.dtype == name)
        self._writer = _index.Writer(new.bin, new.idx, code, first.sidecar.ids if first.sidecar else 1)
        self._end = _end(first) if assembly.pack else 0
        self._packer = _index.Packer(self._writer, assembly.pack, self._end) if assembly.pack else None
        self._seen: _index.Duplicates | None = None
        self._compared = 0  # documents of all that were compared, as far as they have been handed on
        self._removed = Duplicates()

    def run(self) -> Sidecar:
        if self._assembly.deduplicate:
            self._compare()
        self._hand_on(held=False)
        documents, tokens, removed = self._writer.documents, self._writer.tokens, self._removed
        self._hand_on(held=True)
        self._progress.end()
        held_removed = self._removed.tokens - removed.tokens
        text = _text_bytes(self._parts, held=False, removed=removed.tokens)
        held_text = _text_bytes(self._parts, held=True, removed=held_removed)
        all_documents, all_tokens, bin_crcs, idx_crcs = self._writer.finish()
        side = self._parts[0].sidecar or _EMPTY
        held = {"documents": all_documents - documents, "tokens": all_tokens - tokens, "bytes": held_text}
        return side.model_copy(
            update={
                "documents": all_documents,
                "tokens": all_tokens,
                "bytes": text + held_text,
                "pack": self._assembly.pack or side.pack,
                "padding": self._padding(),
                "skipped": join_skipped(s.skipped for s in _sidecars(self._parts)),
                "duplicates": _sum([self._removed, *(s.duplicates for s in _sidecars(self._parts))]),
                "validation": side.validation.model_copy(update=held),
                "checksums": Checksums(
                    block=_index.BLOCK_BYTES, bin=Checksums.join(bin_crcs), idx=Checksums.join(idx_crcs)
                ),
                "tool": f"megapoly {megapoly.__version__}",
            }
        )

    def _walk(self, *, held: bool) -> Iterator[tuple[_index.Part, int, Int64s]]:
        """The documents of one side of all parts in chunks: the tokens of the part, the first one's place, lengths."""
        for each in self._parts:
            first, stop = each.range(held)
            if first < stop:
                dataset, tokens = each.open()
                for start, lengths in documents(dataset, first, stop):
                    yield tokens, start, lengths
                    self._progress.add(int(lengths.sum()) * self._item)

    def _compare(self) -> None:
        self._seen = _index.Duplicates(self._new.bin)
        for held in (False, True):
            for tokens, start, lengths in self._walk(held=held):
                tokens.hand_on(start, lengths, None, self._seen)
        self._seen.find(self._assembly.memory)

    def _hand_on(self, *, held: bool) -> None:
        """Write the documents of one side."""
        to = self._packer or self._writer
        count = self._count(held=held) if self._assembly.shuffle is not None else 0
        reorder = self._reorder(count, held=held) if count else None
        done = 0
        for tokens, start, lengths in self._walk(held=held):
            keep = self._keep(lengths)
            number = int(keep.sum())
            if reorder is not None:
                reorder.expect(_index.permute(self._key(held=held), np.arange(done, done + number), count))
            tokens.hand_on(start, lengths, keep, reorder or to)
            done += number
        if reorder is not None:
            for bucket in range(reorder.buckets):
                self._progress.add(reorder.drain(bucket, to))
        if self._packer is not None:
            self._packer.flush()

    def _count(self, *, held: bool) -> int:
        """Documents of one side that will be written."""
        ranges = [(each, *each.range(held)) for each in self._parts]
        present = sum(
            stop - first if each.sidecar else count_documents(each, first, stop) for each, first, stop in ranges
        )
        return self._seen.count_kept(self._compared, present) if self._seen is not None else present

    def _reorder(self, count: int, *, held: bool) -> _index.Reorder:
        size = sum(each.held_tokens if held else each.train_tokens for each in self._parts) * self._item
        bits = self._seen.documents // 8 if self._seen is not None else 0
        return _index.Reorder(self._new.bin, count, size, self._item, self._assembly.memory - bits)

    def _key(self, *, held: bool) -> int:
        assert self._assembly.shuffle is not None
        return derive_key(self._assembly.shuffle, "documents", "held out" if held else "training")

    def _keep(self, lengths: Int64s) -> npt.NDArray[np.uint8]:
        """[n]: 1 for the documents that are written; the others are counted."""
        keep = (lengths > 0).astype(np.uint8)
        side, pack = self._parts[0].sidecar, self._assembly.pack
        if pack and side is not None and side.instructions and int(lengths.max()) > pack:
            raise DataError(
                f"{self._new.prefix}: an example has {int(lengths.max())} tokens, more than a pack of {pack}, and cut"
                f" it would have an answer without its end; build the parts with --longest {pack}"
            )
        if self._seen is None:
            return keep
        there = np.flatnonzero(keep)
        keep[there] = self._seen.kept(self._compared, len(there))
        self._compared += len(there)
        gone = lengths[there][keep[there] == 0]
        removed = Duplicates(documents=len(gone), tokens=int(gone.sum()))
        self._removed = _sum([self._removed, removed])
        return keep

    def _padding(self) -> Padding | None:
        if self._packer is not None:
            packer = self._packer
            return Padding(id=self._end, documents=packer.padded, tokens=packer.padding_tokens, cut=packer.cut)
        paddings = [side.padding for side in _sidecars(self._parts) if side.padding is not None]
        if not paddings:
            return None
        sums = {name: sum(getattr(each, name) for each in paddings) for name in ("documents", "tokens", "cut")}
        return Padding(id=paddings[0].id, **sums)


_EMPTY = Sidecar(
    language="",
    tokenizer=TokenizerMark(sha256="", vocabulary=0),
    documents=0,
    tokens=0,
    bytes=0,
    validation=Validation(fraction=0, seed=0, documents=0, tokens=0, bytes=0),
    checksums=Checksums(block=_index.BLOCK_BYTES, bin="", idx=""),
    tool="",
)


def _sidecars(parts: Sequence[Part]) -> list[Sidecar]:
    return [each.sidecar for each in parts if each.sidecar is not None]


def _sum(duplicates: Sequence[Duplicates]) -> Duplicates:
    return Duplicates(
        documents=sum(each.documents for each in duplicates), tokens=sum(each.tokens for each in duplicates)
    )


def _text_bytes(parts: Sequence[Part], *, held: bool, removed: int) -> int:
    """Bytes of text of one side, of which ``removed`` tokens were left out."""
    size = sum(side.validation.bytes if held else side.bytes - side.validation.bytes for side in _sidecars(parts))
    tokens = sum(each.held_tokens if held else each.train_tokens for each in parts)
    return size if not removed else round(size * (tokens - removed) / tokens)


def _end(part: Part) -> int:
    """The token that ends the first document."""
    dataset = IndexedDataset(part.prefix)
    return int(dataset.gather(np.array([dataset.start(1) - 1]), 1, part.sidecar.ids if part.sidecar else 0)[0, 0])
