"""From text to an indexed dataset: by several processes, in bounded memory, whatever interrupts it. No torch.

The input is cut into pieces (:mod:`megapoly.data.pieces`). Each becomes a dataset of its own in the folder PREFIX.build
(:mod:`megapoly.data.work`), whole or not at all, by a worker process (:mod:`megapoly.data.worker`); then all become the
dataset at PREFIX (:mod:`megapoly.data.merge`), and the folder goes. So its bytes depend on the input and the options
alone, not on processes, threads or interruptions.

**Memory**: every process holds the tokenizer, a piece of 32 MiB of a compressed input, once or twice, and what a batch
of 4 MiB of text becomes: 300 MB at most besides the tokenizer, of records of up to 1 MB; the longest record that is
read, of 128 MiB, needs ten times its size. Of a Parquet file it is 256 rows, and the columns of a row group as they are
compressed. What ``assembly`` needs has a bound of its own. **Disk**: the tokens twice, the second time in the work
folder, and what :class:`~megapoly.data.merge.Assembly` says besides.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from megapoly.data.bilingual import fields_of
from megapoly.data.documents import Options, Shard, held_out
from megapoly.data.encode import Encoder
from megapoly.data.indexed import part
from megapoly.data.merge import Assembly, merge
from megapoly.data.naming import new_dataset
from megapoly.data.pieces import Piece, Span, cut, divide, most_pieces
from megapoly.data.readers import expand
from megapoly.data.sidecar import Sidecar
from megapoly.data.skipped import join_skipped
from megapoly.data.tokenizer import Tokenizer
from megapoly.data.work import Job, Work
from megapoly.data.worker import Done, Setup, Workers
from megapoly.errors import DataError

__all__ = ["Assembly", "Options", "Progress", "Shard", "build", "held_out"]

_DEFAULTS = Options()


@dataclass(frozen=True)
class Progress:
    """How far a build is.

    Attributes:
        documents, bytes: of text, that have been encoded, those of interrupted runs too.
        kept_documents, kept_bytes: those of interrupted runs among them.
        input_read, input_size: bytes of the input files, in all the shard's share.
        assembled, to_assemble: bytes that are put together when all is encoded; 0 before that.
    """

    documents: int = 0
    bytes: int = 0
    kept_documents: int = 0
    kept_bytes: int = 0
    input_read: int = 0
    input_size: int = 0
    assembled: int = 0
    to_assemble: int = 0


Show = Callable[[Progress], None]


def build(
    inputs: Sequence[Path | str],
    prefix: str | Path,
    tokenizer: Tokenizer,
    *,
    language: str,
    options: Options = _DEFAULTS,
    progress: Show = lambda progress: None,
) -> Sidecar:
    """Encode text into PREFIX.bin, .idx and .json.

    What an interrupted build of the same files, tokenizer and options has left in PREFIX.build is not done again.

    Args:
        inputs: files, directories and patterns, as :func:`megapoly.data.readers.expand` takes them.

    Raises:
        DataError: a bad record (named with its file and line), no document, no document left for training, a dataset
            at PREFIX already, another build in PREFIX.build, files that cannot be read or written or change meanwhile,
            or a worker that was killed. No file gets its name in PREFIX; parts that are whole stay in PREFIX.build.
    """
    prefix = Path(prefix)
    _check_outside(prefix, inputs)
    if options.pairs and not options.fields:
        options = replace(options, fields=fields_of(language))
    files = expand(inputs)
    job = Job.of(files, tokenizer, language, options, prefix)
    spans = divide(files, options.input, options.shard)
    with Work.open(prefix, job, options.assembly, overwrite=options.overwrite) as work:
        if not work.finished:
            tally = _Tally(sum(span.size for span in spans), progress)
            _Encoding(work, tokenizer, language, options, tally).run(spans)
            if changed := job.difference(Job.of(files, tokenizer, language, options, prefix)):
                raise DataError(f"{prefix}: {changed}, which has changed while it was read; build with --overwrite")
            _assemble(work, options, inputs, tally)
        sidecar = Sidecar.read(part(prefix, ".json"))
        assert sidecar is not None
        work.remove()
    return sidecar


def _check_outside(prefix: Path, inputs: Sequence[Path | str]) -> None:
    """Refuse to write where text is read from: it would be taken for text the next time."""
    for given in map(Path, inputs):
        if given.is_dir() and given.resolve() in prefix.resolve().parents:
            raise DataError(f"{prefix}: lies in {given}, all of which is read; choose another place for the dataset")


class _Tally:
    """Adds up what is done, and shows it."""

    def __init__(self, input_size: int, show: Show) -> None:
        self._size, self._show = input_size, show
        self._documents = self._bytes = self._kept_documents = self._kept_bytes = self._read = 0
        self._pieces: dict[int, int] = {}  # bytes of text so far of those that are not whole

    def keep(self, side: Sidecar) -> None:
        """Count what a part of an interrupted run holds."""
        self._documents += side.documents
        self._bytes += side.bytes
        self._kept_documents += side.documents
        self._kept_bytes += side.bytes

    def read(self, size: int) -> None:
        """Count bytes of the input whose documents are counted already."""
        self._read += size
        self._tell()

    def piece(self, piece: Piece, done: Done) -> None:
        """Count what a piece has become since the last time."""
        self._documents += done.documents
        self._bytes += done.bytes
        before = self._pieces.pop(piece.number, 0)
        if done.whole:
            self._read += piece.read - _share(piece, before)
        else:
            self._pieces[piece.number] = before + done.bytes
            self._read += _share(piece, before + done.bytes) - _share(piece, before)
        self._tell()

    def assembled(self, done: int, total: int) -> None:
        self._tell(done, total)

    def _tell(self, assembled: int = 0, to_assemble: int = 0) -> None:
        kept = (self._kept_documents, self._kept_bytes)
        read = (self._read, self._size)
        self._show(Progress(self._documents, self._bytes, *kept, *read, assembled, to_assemble))


def _share(piece: Piece, text: int) -> int:
    """About how many bytes of the input so many bytes of text of a piece were."""
    return piece.read * min(text, piece.size) // max(piece.size, 1)


class _Encoding:
    """The pieces that are not whole yet, on their way to be."""

    def __init__(self, work: Work, tokenizer: Tokenizer, language: str, options: Options, tally: _Tally) -> None:
        self._work, self._tokenizer, self._language = work, tokenizer, language
        self._options, self._tally = options, tally

    def run(self, spans: Sequence[Span]) -> None:
        """Make all parts."""
        todo = self._missing(spans)
        ahead = list(islice(todo, 2))
        single = len(ahead) < 2
        todo = _handed_over(ahead, todo)
        processes = min(self._options.processes or _cores(), most_pieces(spans))
        if processes == 1 or single:
            self._alone(todo)
            return
        setup = Setup(self._tokenizer.path, self._tokenizer.sha256, self._language, self._options)
        with Workers(processes, setup, (self._work.lock,)) as workers:
            workers.run(todo, lambda piece: self._work.part(piece.number), self._tally.piece)

    def _missing(self, spans: Sequence[Span]) -> Iterator[Piece]:
        """The pieces of which there is no whole part."""
        whole = self._work.whole()
        for number in whole:
            self._tally.keep(self._work.sidecar(number))
        first, span = self._work.start(whole)
        if span:
            self._tally.read(sum(each.size for each in spans[:span]))
        for piece in cut(spans, self._options.input, first, span):
            if piece.span is not None:
                self._work.begins(piece.number, piece.span)
            if piece.number in whole:
                self._tally.read(piece.read)
            else:
                yield piece

    def _alone(self, pieces: Iterator[Piece]) -> None:
        encoder = Encoder(self._tokenizer, self._language, self._options, self._options.threads or _cores())
        for piece in pieces:

            def tell(documents: int, size: int, piece: Piece = piece) -> None:
                self._tally.piece(piece, Done(documents, size, False))

            encoder.write(piece.chunks, self._work.part(piece.number), tell)
            self._tally.piece(piece, Done(0, 0, True))
            piece = piece.without_text()  # before the next one takes as much


def _handed_over(ahead: list[Piece], todo: Iterator[Piece]) -> Iterator[Piece]:
    """All of both; what has been given is not held."""
    while ahead:
        yield ahead.pop(0)
    yield from todo


def _assemble(work: Work, options: Options, inputs: Sequence[Path | str], tally: _Tally) -> None:
    """Make the dataset of all parts; of a single one by giving it its name."""
    sides = [work.sidecar(number) for number in sorted(work.whole())]
    filled = [number for number, side in enumerate(sides) if side.documents]
    held = sum(side.validation.documents for side in sides)
    if not filled or held == sum(side.documents for side in sides):
        work.remove()
        raise _no_document(inputs, sides, held, options)
    skipped = join_skipped(side.skipped for side in sides)
    work.assembling(options.assembly)
    if len(filled) > 1 or options.assembly.changes:
        parts = [work.part(number) for number in filled]
        try:
            merge(parts, work.prefix, options.assembly, overwrite=True, skipped=skipped, progress=tally.assembled)
        except DataError as error:
            if str(work.folder) in str(error):
                raise DataError(f"{error}; it is a part of this build: remove {work.folder} to begin anew") from error
            raise
        return
    with new_dataset(work.prefix, overwrite=True) as new:
        work.hand_over(filled[0], new)
        new.name(sides[filled[0]].model_copy(update={"skipped": skipped}))


def _no_document(inputs: Sequence[Path | str], sides: Sequence[Sidecar], held: int, options: Options) -> DataError:
    skipped = sum(each.records for side in sides for each in side.skipped)
    if not held:
        found = f"no document in {[str(path) for path in inputs]}"
        return DataError(f"{found}; {f'all {skipped} records are bad' if skipped else 'give files that hold text'}")
    return DataError(
        f"all {held} documents of {[str(path) for path in inputs]} are held out by validation_fraction"
        f" {options.validation_fraction}; lower it, or give more documents"
    )


def _cores() -> int:
    """Those that this process may use, where the system says so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
