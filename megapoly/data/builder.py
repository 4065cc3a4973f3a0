"""From JSON lines to an indexed dataset, in constant memory. No torch.

A record is encoded and ended by ``</s>``. Whether it is held out for validation is a keyed hash of what it says and of
nothing else, so that the same text falls on the same side in every dataset of a seed, and the two sides of a pair do.
Held-out documents wait in a file without a name and are appended at the end. The files get their names when all are
whole; the .idx, without which nothing can open a dataset, comes last.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

import megapoly
from megapoly.data import _index, bilingual
from megapoly.data.indexed import dtype_code
from megapoly.data.naming import NewDataset, new_dataset
from megapoly.data.readers import BadRecord, Reader, Record, open_reader
from megapoly.data.sidecar import Checksums, Sidecar, TokenizerMark, Validation
from megapoly.data.tokenizer import Tokenizer
from megapoly.errors import ConfigError, DataError

_BATCH_BYTES = 4 << 20  # of text encoded together


@dataclass(frozen=True)
class Options:
    """How records are read and split.

    Attributes:
        fields: the field of the text, or the two fields of a pair, named by their language codes. Where none is given:
            ``text``, or the two fields of the record that are named by language codes.
        pairs: records are pairs, written as :mod:`megapoly.data.bilingual` says.
        key_field: the field that decides, where a record has it, what is held out; else the text does, of a pair the
            English text (its first, where none is English).
        validation_fraction: share of the documents to hold out.
        seed: of the split and of the forms of pairs.
        threads: for encoding; 0 is one for each core.
        overwrite: replace a dataset that exists.
    """

    fields: tuple[str, ...] = ()
    pairs: bool = False
    key_field: str = "key"
    validation_fraction: float = 0.001
    seed: int = 1234
    threads: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.fields and len(self.fields) != 1 + self.pairs:
            expected = "a pair has two" if self.pairs else "a text has one; for pairs of two, set pairs"
            raise ConfigError(f"fields {self.fields}: {expected}")
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(f"validation_fraction {self.validation_fraction} is not in [0, 1), such as 0.001")
        if not 0 <= self.seed < 2**64:
            raise ConfigError(f"seed {self.seed} is not in [0, 2^64)")


_DEFAULTS = Options()


@dataclass(frozen=True)
class Progress:
    """How far a build is: documents and bytes of text so far; bytes of the input files, read and in all."""

    documents: int
    bytes: int
    input_read: int
    input_size: int


@dataclass(frozen=True)
class _Document:
    text: str
    held_out: bool

    @property
    def bytes(self) -> int:
        return len(self.text.encode())


@dataclass
class _Tally:
    documents: int = 0
    bytes: int = 0
    tokens: int = 0


def held_out(key: str, seed: int, fraction: float) -> bool:
    """Whether a document with this key is held out: blake2b(key, seed) as a number in [0, 1) is below ``fraction``."""
    digest = blake2b(key.encode(), digest_size=8, key=seed.to_bytes(8, "little"), person=b"validation").digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def build(
    inputs: Sequence[Path],
    prefix: str | Path,
    tokenizer: Tokenizer,
    *,
    language: str,
    options: Options = _DEFAULTS,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> Sidecar:
    """Encode .jsonl or .jsonl.gz files into PREFIX.bin, .idx and .json.

    Raises:
        DataError: a bad line (named with its file), no document, no document left for training, a dataset at PREFIX
            already, or files that cannot be read or written. Nothing is left behind.
    """
    with new_dataset(Path(prefix), overwrite=options.overwrite) as new:
        sidecar = _write(inputs, new, tokenizer, language, options, progress)
        new.name(sidecar)
    return sidecar


def _write(
    inputs: Sequence[Path],
    new: NewDataset,
    tokenizer: Tokenizer,
    language: str,
    options: Options,
    progress: Callable[[Progress], None],
) -> Sidecar:
    """Write the .bin and the .idx under their temporary names; what the sidecar will say."""
    files = [open_reader(path) for path in inputs]
    writer = _index.Writer(new.bin, new.idx, dtype_code(tokenizer.vocabulary), tokenizer.vocabulary)
    trained, held_back = _Tally(), _Tally()
    folder = new.prefix.parent
    with tempfile.TemporaryFile(dir=folder) as waiting, tempfile.TemporaryFile(dir=folder) as counts:
        spool = _Spool(waiting, counts)
        for batch, (ids, lengths) in _encoded(files, tokenizer, options):
            held = np.array([document.held_out for document in batch])
            sizes = np.array([document.bytes for document in batch])
            for sink, tally, chosen in ((writer, trained, ~held), (spool, held_back, held)):
                tally.documents += int(chosen.sum())
                tally.bytes += int(sizes[chosen].sum())
                tally.tokens += int(lengths[chosen].sum())
                sink.append(ids if chosen.all() else ids[np.repeat(chosen, lengths)], lengths[chosen])
            read, size = sum(file.position for file in files), sum(file.size for file in files)
            progress(Progress(trained.documents + held_back.documents, trained.bytes + held_back.bytes, read, size))
        if not trained.documents:
            raise _no_document(inputs, language, held_back.documents, options)
        spool.drain(writer)
    documents, tokens, bin_crcs, idx_crcs = writer.finish()
    return Sidecar(
        language=language,
        tokenizer=TokenizerMark(sha256=tokenizer.sha256, vocabulary=tokenizer.vocabulary),
        documents=documents,
        tokens=tokens,
        bytes=trained.bytes + held_back.bytes,
        validation=Validation(fraction=options.validation_fraction, seed=options.seed, **asdict(held_back)),
        checksums=Checksums(block=_index.BLOCK_BYTES, bin=Checksums.join(bin_crcs), idx=Checksums.join(idx_crcs)),
        tool=f"megapoly {megapoly.__version__}",
    )


def _no_document(inputs: Sequence[Path], language: str, held: int, options: Options) -> DataError:
    if not held:
        return DataError(f"no document for {language!r} in {[str(path) for path in inputs]}")
    return DataError(
        f"all {held} documents for {language!r} are held out by validation_fraction {options.validation_fraction};"
        " lower it, or give more documents"
    )


def _encoded(
    files: Sequence[Reader], tokenizer: Tokenizer, options: Options
) -> Iterator[tuple[list[_Document], tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]]]:
    """Batches with their ids and lengths, ends included; the next batch is read while one is encoded."""

    def encode(texts: list[str]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        return _with_ends(*tokenizer.encode_flat(texts, options.threads), tokenizer.eod)

    with ThreadPoolExecutor(1) as pool:
        waiting: list[_Document] = []
        pending = None
        for batch in _batches(files, options):
            submitted = pool.submit(encode, [document.text for document in batch])
            if pending is not None:
                yield waiting, pending.result()
            waiting, pending = batch, submitted
        if pending is not None:
            yield waiting, pending.result()


def _with_ends(
    ids: npt.NDArray[np.int32], lengths: npt.NDArray[np.int64], eod: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """The same documents, each ended by ``eod``."""
    return np.insert(ids, np.cumsum(lengths), eod), lengths + 1


def _batches(files: Sequence[Reader], options: Options) -> Iterator[list[_Document]]:
    batch: list[_Document] = []
    held = 0
    for record in (record for file in files for record in file):
        if isinstance(record, BadRecord):
            raise record
        batch.append(_document(record, options))
        held += batch[-1].bytes
        if held >= _BATCH_BYTES:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _document(record: Record, options: Options) -> _Document:
    if options.pairs:
        first, second = options.fields or bilingual.pair_fields(record)
        texts = (record.text(first), record.text(second))
        text = bilingual.render((first, second), texts, options.seed)
        key = texts[1] if second == "en" else texts[0]
    else:
        key = text = record.text(*(options.fields or ("text",)))
    if options.key_field in record.values:
        key = record.text(options.key_field)
    return _Document(text, held_out(key, options.seed, options.validation_fraction))


class _Spool:
    """Documents that wait in two files for those before them."""

    def __init__(self, ids: IO[bytes], lengths: IO[bytes]) -> None:
        self._ids, self._lengths = ids, lengths

    def append(self, ids: npt.NDArray[np.int32], lengths: npt.NDArray[np.int64]) -> None:
        self._ids.write(ids.tobytes())
        self._lengths.write(lengths.tobytes())

    def drain(self, writer: _index.Writer) -> None:
        """Hand everything to ``writer``, one document at a time."""
        self._ids.seek(0)
        self._lengths.seek(0)
        while entry := self._lengths.read(8):
            length = np.frombuffer(entry, np.int64)
            writer.append(np.frombuffer(self._ids.read(4 * int(length[0])), np.int32), length)
