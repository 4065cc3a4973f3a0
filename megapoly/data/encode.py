"""From chunks of the input to an indexed dataset, in constant memory. No torch.

A document is encoded, and ended by ``</s>`` or what the tokenizer has for it; of instructions the ids are marked.
Held-out documents wait in a file without a name and are appended at the end.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import numpy as np

import megapoly
from megapoly.data import _index, instructions
from megapoly.data.documents import Document, Options, to_document
from megapoly.data.files import write_whole
from megapoly.data.indexed import dtype_code, part
from megapoly.data.naming import NewDataset, new_dataset
from megapoly.data.readers import BadRecord, BadRecords, Chunk, parse
from megapoly.data.records import TOO_LONG
from megapoly.data.sidecar import Checksums, Sidecar, Validation
from megapoly.data.skipped import skipped_of
from megapoly.data.tokenizer import Ids, Lengths, Tokenizer

_BATCH_BYTES = 4 << 20  # of text encoded together


@dataclass(frozen=True)
class Encoder:
    """How chunks become documents of ids.

    Attributes:
        threads: for encoding; the next batch is read beside it. None: all is done on the caller's thread.
    """

    tokenizer: Tokenizer
    language: str
    options: Options
    threads: int | None = None

    def write(self, chunks: Sequence[Chunk], prefix: Path, progress: Callable[[int, int], None]) -> Sidecar:
        """Write PREFIX.bin, .idx and .json, in place of those that are there.

        Where no document comes of the chunks there is a .json only.

        Args:
            progress: hears of the documents and the bytes of text of every batch.

        Raises:
            DataError: a bad record, where that is the policy, or a file that cannot be read or written. Nothing
                is left behind.
        """
        bad = BadRecords(self.options.bad_records)
        with new_dataset(prefix, overwrite=True) as new:
            sidecar = self._write(chunks, new, bad, progress)
            if sidecar.documents:
                new.name(sidecar)
        if not sidecar.documents:
            write_whole(part(prefix, ".json"), sidecar.text().encode())
        return sidecar

    def _write(
        self, chunks: Sequence[Chunk], new: NewDataset, bad: BadRecords, progress: Callable[[int, int], None]
    ) -> Sidecar:
        vocabulary = self.tokenizer.vocabulary
        count = vocabulary * (2 if self.options.instructions else 1)
        writer = _index.Writer(new.bin, new.idx, dtype_code(count), count)
        trained, held_back = _Tally(), _Tally()
        folder = new.prefix.parent
        with tempfile.TemporaryFile(dir=folder) as waiting, tempfile.TemporaryFile(dir=folder) as counts:
            spool = _Spool(waiting, counts)
            for batch, ids, lengths in self._encoded(self._batches(chunks, bad)):
                read = len(batch), sum(document.bytes for document in batch)
                if self.options.most_tokens:
                    batch, ids, lengths = _without_long(batch, ids, lengths, self.options.most_tokens, bad)
                held = np.array([document.held_out for document in batch], np.bool_)
                sizes = np.array([document.bytes for document in batch], np.int64)
                for sink, tally, chosen in ((writer, trained, ~held), (spool, held_back, held)):
                    if chosen.any():
                        tally.documents += int(chosen.sum())
                        tally.bytes += int(sizes[chosen].sum())
                        tally.tokens += int(lengths[chosen].sum())
                        sink.append(ids if chosen.all() else ids[np.repeat(chosen, lengths)], lengths[chosen])
                progress(*read)
            spool.drain(writer)
        documents, tokens, bin_crcs, idx_crcs = writer.finish()
        options = self.options
        return Sidecar(
            language=self.language,
            tokenizer=self.tokenizer.mark,
            documents=documents,
            tokens=tokens,
            bytes=trained.bytes + held_back.bytes,
            templates=options.templates if options.pairs else (),
            instructions=options.instructions,
            skipped=skipped_of(bad),
            validation=Validation(fraction=options.validation_fraction, seed=options.seed, **asdict(held_back)),
            checksums=Checksums(block=_index.BLOCK_BYTES, bin=Checksums.join(bin_crcs), idx=Checksums.join(idx_crcs)),
            tool=f"megapoly {megapoly.__version__}",
        )

    def _batches(self, chunks: Sequence[Chunk], bad: BadRecords) -> Iterator[list[Document]]:
        batch: list[Document] = []
        held = 0
        for record in (record for chunk in chunks for record in parse(chunk)):
            try:
                if isinstance(record, BadRecord):
                    raise record
                document = to_document(record, self.options)
            except BadRecord as error:
                bad.add(error)
                continue
            batch.append(document)
            held += document.bytes
            if held >= _BATCH_BYTES:
                yield batch
                batch, held = [], 0
        if batch:
            yield batch

    def _encoded(self, batches: Iterator[list[Document]]) -> Iterator[tuple[list[Document], Ids, Lengths]]:
        """Batches with their ids and lengths, ends included."""
        if self.threads is None:
            for batch in batches:
                yield batch, *self._encode(batch, 1)
            return
        with ThreadPoolExecutor(1) as pool:
            waiting: list[Document] = []
            pending = None
            for batch in batches:
                submitted = pool.submit(self._encode, batch, self.threads)
                if pending is not None:
                    yield waiting, *pending.result()
                waiting, pending = batch, submitted
            if pending is not None:
                yield waiting, *pending.result()

    def _encode(self, batch: list[Document], threads: int) -> tuple[Ids, Lengths]:
        examples = [document.example for document in batch if document.example is not None]
        if examples:
            return instructions.encode(self.tokenizer, examples, threads)
        ids, lengths = self.tokenizer.encode_flat([document.text for document in batch], threads)
        return _framed(ids, lengths, self.tokenizer.begin, self.tokenizer.eod)


@dataclass
class _Tally:
    documents: int = 0
    bytes: int = 0
    tokens: int = 0


def _framed(ids: Ids, lengths: Lengths, begin: Sequence[int], eod: int) -> tuple[Ids, Lengths]:
    """The same documents, each begun by ``begin`` and ended by ``eod``."""
    lengths = lengths + len(begin) + 1
    ends = np.cumsum(lengths)
    framed = np.empty(len(ids) + len(lengths) * (len(begin) + 1), np.int32)
    inner = np.ones(len(framed), np.bool_)
    for offset, token in enumerate((eod, *reversed(begin))):
        places = ends - 1 if offset == 0 else ends - lengths + len(begin) - offset
        inner[places] = False
        framed[places] = token
    framed[inner] = ids
    return framed, lengths


def _without_long(
    batch: list[Document], ids: Ids, lengths: Lengths, most: int, bad: BadRecords
) -> tuple[list[Document], Ids, Lengths]:
    """The same without the examples of more than ``most`` tokens, which are counted."""
    keep = lengths <= most
    if keep.all():
        return batch, ids, lengths
    for number in np.flatnonzero(~keep):
        example = batch[number].example
        assert example is not None
        bad.leave_out(example.record.error(f"has {lengths[number]:,} tokens, and {most:,} are the most", TOO_LONG))
    kept = [document for document, fits in zip(batch, keep) if fits]
    return kept, ids[np.repeat(keep, lengths)], lengths[keep]


class _Spool:
    """Documents that wait in two files for those before them."""

    def __init__(self, ids: IO[bytes], lengths: IO[bytes]) -> None:
        self._ids, self._lengths = ids, lengths

    def append(self, ids: Ids, lengths: Lengths) -> None:
        self._ids.write(ids.tobytes())
        self._lengths.write(lengths.tobytes())

    def drain(self, writer: _index.Writer) -> None:
        """Hand everything to ``writer``, one document at a time."""
        self._ids.seek(0)
        self._lengths.seek(0)
        while entry := self._lengths.read(8):
            length = np.frombuffer(entry, np.int64)
            writer.append(np.frombuffer(self._ids.read(4 * int(length[0])), np.int32), length)
