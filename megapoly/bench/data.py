"""The data engine beside megatron-core: start-up, mixture, samples, files, encoding. No torch.

Every measurement is a process of its own on one core, ours and the peer's in turns; a value is the median of the turns.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megapoly.bench import data_input
from megapoly.bench.data_job import Measured, ask
from megapoly.bench.race import version
from megapoly.errors import TrainingError

Progress = Callable[[str], object]
Row = dict[str, Any]

OWN, PEER, LIMIT = (f"megapoly.bench.run_data_{name}" for name in ("megapoly", "megatron", "limit"))
PEER_NAME, INSTALL = "megatron-core", "pip install --no-deps megatron-core==0.15.3"
HUGE = 10**12  # samples of the second mixture
_COPIES = 8  # of the generated text, for two cores


@dataclass(frozen=True)
class Options:
    """Sizes of the measurement.

    Attributes:
        documents: of the index that start-up opens and that is finalised.
        mean: tokens of a document.
        mixture_samples, sources: of the mixture.
        stream_tokens: of the dataset that samples are read from; it should fit the memory.
        write_tokens: to write.
        text_bytes: of generated text, where ``text`` is empty.
        vocabulary: of the random tokens; below 65,500 they take two bytes.
        text: .jsonl or .jsonl.gz files to encode, in the field ``text``.
        tokenizer: a SentencePiece model; None trains a small one.
        seconds: that samples are read for, in a turn.
        repeats: turns.
        folder: for the files, some GB; None is the system's.
    """

    documents: int = 5_000_000
    mean: int = 600
    sequence: int = 2048
    epochs: int = 3
    mixture_samples: int = 100_000_000
    sources: int = 18
    stream_tokens: int = 200_000_000
    write_tokens: int = 200_000_000
    text_bytes: int = 20_000_000
    vocabulary: int = 50_000
    text: tuple[Path, ...] = ()
    tokenizer: Path | None = None
    seconds: float = 3.0
    repeats: int = 3
    folder: Path | None = None


QUICK: dict[str, Any] = {
    "documents": 20_000, "mixture_samples": 100_000, "stream_tokens": 2_000_000, "write_tokens": 1_000_000,
    "text_bytes": 300_000, "seconds": 0.1, "repeats": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """A row to be: the same job of both sides, and what is wanted of it.

    Attributes:
        unit: of the value, which is ``scale`` times the seconds where ``lower`` is better, else times the rate.
        wanted: the value to reach.
        memory: MiB that it may take, where that is a question.
        limit: what the machine allows, by name and value.
    """

    name: str
    job: str
    parameters: Mapping[str, Any]
    unit: str
    scale: float
    wanted: float | None
    lower: bool = False
    memory: float | None = None
    limit: tuple[str, float] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def value(self, measured: Measured) -> float:
        return self.scale * (measured.seconds if self.lower else measured.rate)


def measure(options: Options, progress: Progress = lambda text: None) -> list[Row]:
    """The rows startup, mixture, samples, samples_documents, index, write, encode.

    Args:
        progress: called with a line of text before every turn.

    Raises:
        DataError: a file with text that cannot be read.
        TrainingError: megapoly did not finish.
    """
    rows = []
    for make in (_startup, _mixture, _samples, _files, _encode):
        with tempfile.TemporaryDirectory(prefix="megapoly-bench-", dir=options.folder) as folder:
            progress(f"{make.__name__.strip('_')}: making its input")
            rows += [_row(figure, options.repeats, progress) for figure in make(options, Path(folder), progress)]
    by_name = {row["name"]: row for row in rows}
    plain, separated = by_name["samples"], by_name["samples_documents"]
    separated["times_slower"] = plain["value"] / separated["value"]
    return rows


def _startup(options: Options, folder: Path, progress: Progress) -> list[Figure]:
    prefix = folder / "startup"
    tokens = data_input.write_index_only(prefix, options.documents, options.mean, options.vocabulary)
    parameters = {"prefix": prefix, "sequence": options.sequence, "epochs": options.epochs}
    extra = {"documents": options.documents, "tokens": tokens, "epochs": options.epochs}
    return [Figure("startup", "startup", parameters, "ms", 1e3, 50, lower=True, memory=5, extra=extra)]


def _mixture(options: Options, folder: Path, progress: Progress) -> list[Figure]:
    parameters = {"sources": options.sources, "count": options.mixture_samples, "sequence": options.sequence}
    progress(f"mixture of {HUGE:.0e} samples")
    huge = _turns(OWN, "mixture", parameters | {"count": HUGE}, options.repeats)
    extra = {
        "samples": options.mixture_samples,
        "sources": options.sources,
        "value_1e12": 1e3 * statistics.median(turn.seconds for turn in huge),
        "memory_1e12": _memory(huge),
    }
    return [Figure("mixture", "mixture", parameters, "ms", 1e3, 10, lower=True, memory=1, extra=extra)]


def _samples(options: Options, folder: Path, progress: Progress) -> list[Figure]:
    prefix = folder / "samples"
    data_input.write_stream(prefix, options.stream_tokens, options.mean, options.vocabulary)
    common = {"prefix": prefix, "sequence": options.sequence, "seconds": options.seconds}
    progress("samples: plain copies")
    copies = _turns(LIMIT, "copy", common | {"item": 2 if options.vocabulary < 65500 else 4}, options.repeats)
    limit = ("plain copies", statistics.median(turn.rate for turn in copies))
    common["vocabulary"] = options.vocabulary
    extra = {"sequence": options.sequence}
    return [
        Figure(name, "samples", common | {"separate": separate}, "samples/s", 1, wanted, limit=limit, extra=extra)
        for name, separate, wanted in (("samples", False, 60_000), ("samples_documents", True, 60_000 / 1.3))
    ]


def _files(options: Options, folder: Path, progress: Progress) -> list[Figure]:
    common = {"prefix": folder / "written", "vocabulary": options.vocabulary}
    item = 2 if options.vocabulary < 65500 else 4
    progress("write: plain bytes")
    size = options.write_tokens * item
    plain = _turns(LIMIT, "disk", {"path": folder / "plain", "size": size, "item": item}, options.repeats)
    limit = ("plain bytes to the disk", statistics.median(turn.rate for turn in plain) / 1e6)
    index = common | {"documents": options.documents}
    write = common | {"tokens": options.write_tokens, "mean": options.mean}
    extra = {"documents": options.documents}
    return [
        Figure("index", "index", index, "s", 1, 0.5, lower=True, extra=extra),
        Figure("write", "write", write, "M tokens/s", 1e-6, None, limit=limit, extra={"tokens": options.write_tokens}),
    ]


def _encode(options: Options, folder: Path, progress: Progress) -> list[Figure]:
    texts, model = options.text, options.tokenizer
    if not texts:
        texts = (folder / "text.jsonl",)
        data_input.write_text(texts[0], options.text_bytes)
    if model is None:
        model = folder / "bench.model"
        few = min(options.text_bytes, 2_000_000)
        data_input.train_tokenizer(model, data_input.generated_text(few), 8000 if few > 1_000_000 else 6500)
    parameters = {"prefix": folder / "encoded", "texts": [str(Path(path).absolute()) for path in texts]}
    parameters |= {"tokenizer": Path(model).absolute(), "threads": 1}
    progress("encode: two cores")
    more = parameters | {"threads": 2}
    if not options.text:  # of which two processes have enough to do
        more["texts"] = [str(shutil.copy(texts[0], folder / f"text-{i}.jsonl")) for i in range(_COPIES)]
    two = _turns(OWN, "encode", more, options.repeats, cores=2)
    extra = {
        "text": "given files" if options.text else "generated",
        "bytes_two_cores": int(two[0].work),
        "value_two_cores": statistics.median(turn.rate for turn in two) / 1e6,
        "wanted_two_cores": 36,
    }
    return [Figure("encode", "encode", parameters, "MB/s", 1e-6, 20, extra=extra)]


def _turns(program: str, job: str, parameters: Mapping[str, Any], repeats: int, cores: int = 1) -> list[Measured]:
    return [ask(program, job, parameters, cores) for _ in range(repeats)]


def _row(figure: Figure, repeats: int, progress: Progress) -> Row:
    own, theirs, note = [], [], ""
    if version(PEER_NAME) is None:
        note = f"{PEER_NAME} is not installed: {INSTALL}"
    for turn in range(repeats):
        progress(f"{figure.name}: megapoly, turn {turn + 1} of {repeats}")
        own.append(ask(OWN, figure.job, figure.parameters))
        if note:
            continue
        progress(f"{figure.name}: {PEER_NAME}, turn {turn + 1} of {repeats}")
        try:
            theirs.append(ask(PEER, figure.job, figure.parameters))
        except TrainingError as error:
            note = str(error)
    values = [figure.value(turn) for turn in own]
    row: Row = {
        "name": figure.name,
        "value": statistics.median(values),
        "unit": figure.unit,
        "spread": [min(values), max(values)],
        "wanted": figure.wanted,
        "peer": PEER_NAME,
        "peer_value": None,
        "ratio": None,
        **figure.extra,
    }
    if figure.limit:
        row["limit_of"], row["limit"] = figure.limit
        row["share_of_limit"] = row["value"] / row["limit"]
    row |= {"memory_mib": _memory(own), "wanted_memory_mib": figure.memory, "peer_memory_mib": _memory(theirs)}
    if theirs:
        peer_values = [figure.value(turn) for turn in theirs]
        row["peer_value"], row["peer_spread"] = statistics.median(peer_values), [min(peer_values), max(peer_values)]
        better = row["peer_value"] / row["value"] if figure.lower else row["value"] / row["peer_value"]
        row["ratio"] = better
        if theirs[0].disk:
            row["peer_disk_mb"] = theirs[0].disk / 1e6
    if note:
        row["note"] = note
    return row


def _memory(turns: Sequence[Measured]) -> float | None:
    """The most of any turn."""
    known = [turn.memory for turn in turns if turn.memory is not None]
    return max(known, default=None)
