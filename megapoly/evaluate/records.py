"""The records of a benchmark: from a folder of files, or from where they are published."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megapoly.data import compression
from megapoly.data.readers import BadRecord, open_reader
from megapoly.errors import ConfigError, DataError
from megapoly.evaluate.benchmarks import Benchmark

WINOGRAD = "xwinograd"  # which has one file for all languages
_SUFFIXES = ("", ".gz", ".zst")


@dataclass(frozen=True)
class Records:
    """What one language is measured by.

    Attributes:
        examples: records that examples are of; ``docs`` themselves where there are no others.
        split: name of that of ``docs``.
    """

    docs: list[dict[str, Any]]
    examples: list[dict[str, Any]]
    split: str


def find_languages(benchmark: Benchmark, folder: Path) -> list[str]:
    """Languages that a folder has."""
    found = []
    for language in benchmark.languages:
        names = [benchmark.file.format(split=split, language=language) for split in benchmark.splits]
        path = next((path for name in names if (path := _find(folder, name))), None)
        if path and (benchmark.name != WINOGRAD or any(_winograd(path, language))):
            found.append(language)
    return found


def read_records(benchmark: Benchmark, language: str, folder: Path) -> Records:
    """The records of a language in a folder of benchmarks.

    Raises:
        DataError: the folder or the file is missing, or a record is not as it should be.
    """
    names = [benchmark.file.format(split=split, language=language) for split in benchmark.splits]
    found = [(split, path) for split, name in zip(benchmark.splits, names) if (path := _find(folder, name))]
    if not found:
        what = "does not exist" if not folder.is_dir() else f"has no {' or '.join(names)}, also with .gz or .zst"
        raise DataError(f"--data {folder}: {what}, for {benchmark.name} in {language}; give the folder that holds it")
    read = [list(_checked(benchmark, language, path)) for _, path in found[:2]]
    if not read[0]:
        raise DataError(f"{found[0][1]}: has no record of {language}")
    return Records(read[0], read[-1] or read[0], found[0][0])


def fetch_records(benchmark: Benchmark, language: str) -> Records:
    """The same from Hugging Face's hub, or translations from sacrebleu.

    Raises:
        ConfigError: the package for it is not installed.
        DataError: they are not published, or could not be fetched.
    """
    try:
        if benchmark.is_translation:
            docs = _fetch_translations(benchmark.name, language)
            return Records(docs, docs, "test")
        if benchmark.hub is None:
            raise DataError(
                f"{benchmark.name}: is not on the hub; give --data FOLDER with"
                f" {benchmark.file.format(language='LANG')}"
                ', of objects {"source": ..., "target": ...}'
            )
        docs, examples = (_fetch(benchmark, language, split) for split in benchmark.hub.splits)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{benchmark.name} in {language}: could not be fetched ({' '.join(str(error).split())[:300]}); give --data"
            " FOLDER with local files, or look at the connection"
        ) from error
    return Records(docs, examples, benchmark.hub.splits[0])


def _fetch(benchmark: Benchmark, language: str, split: str) -> list[dict[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ConfigError("benchmarks from the hub need datasets: pip install 'megapoly[eval]', or --data") from error
    assert benchmark.hub
    found = load_dataset(benchmark.hub.path, benchmark.hub.subset(language), split=split)
    converted = (benchmark.hub.convert(dict(doc), language) for doc in found)
    return [doc for doc in converted if doc is not None]


def _fetch_translations(name: str, direction: str) -> list[dict[str, Any]]:
    try:
        import sacrebleu
    except ImportError as error:
        raise ConfigError(f"{name} needs sacrebleu: pip install 'megapoly[eval]'") from error
    sides = (sacrebleu.get_source_file(name, direction), sacrebleu.get_reference_files(name, direction)[0])
    lines = [Path(path).read_text(encoding="utf-8").splitlines() for path in sides]
    return [{"source": source, "target": target} for source, target in zip(*lines, strict=True)]


def _find(folder: Path, name: str) -> Path | None:
    return next((path for suffix in _SUFFIXES if (path := folder / f"{name}{suffix}").is_file()), None)


def _checked(benchmark: Benchmark, language: str, path: Path) -> Iterator[dict[str, Any]]:
    records = _winograd(path, language) if benchmark.name == WINOGRAD else _lines(path)
    for number, doc in records:
        for field, kind in benchmark.fields.items():
            if not isinstance(doc.get(field), kind):
                raise DataError(
                    f"{path}, line {number}: field {field!r} holds {doc.get(field)!r}; expected {kind.__name__}"
                )
        try:
            options = benchmark.options(doc, language) if benchmark.options else benchmark.targets(doc)
            answer = benchmark.answer(doc) if benchmark.options else 0
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}, line {number}: is no record of {benchmark.name} ({error})") from error
        if not 0 <= answer < len(options):
            raise DataError(f"{path}, line {number}: answer {answer} is none of the {len(options)}")
        yield doc


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for record in open_reader(path):
        if isinstance(record, BadRecord):
            raise record
        yield record.line, record.values


def _winograd(path: Path, language: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Of the table of Tikhonov and Ryabinin (arXiv 2106.12066): a sentence with ``_`` for a pronoun, and two names."""
    name = "jp" if language == "ja" else language
    try:
        with open(path, "rb", buffering=0) as raw:
            suffix = compression.compression(path)
            content = (compression.open_stream(raw, suffix) if suffix else raw).read()
        lines = io.StringIO(content.decode()).read().split("\n")
    except (OSError, UnicodeDecodeError, *compression.ERRORS) as error:
        raise DataError(f"{path}: cannot be read ({error}); get the file anew") from error
    for number, line in enumerate(lines, 1):
        cells = line.split("\t")
        if cells[0] != name:
            continue
        try:
            _, _, _, sentence, tokens, pronoun, candidates = cells
            begin, end = _place(sentence, json.loads(tokens), *json.loads(pronoun)[1])
            (one, _, _, first), (other, _, _, second) = json.loads(candidates)
        except (ValueError, TypeError) as error:
            raise DataError(f"{path}, line {number}: is no row of XWinograd ({error})") from error
        blank = f"{sentence[:begin]}_{sentence[end:]}"
        yield number, {"sentence": blank, "option1": one, "option2": other, "label": [first, second].index(True)}


def _place(sentence: str, tokens: list[str], first: int, stop: int) -> tuple[int, int]:
    """Where tokens stand in a sentence; its quotation marks were changed when it was cut into tokens."""
    at, begin = 0, 0
    for i, token in enumerate(tokens[:stop]):
        written = next((form for form in (token, '"') if sentence.find(form, at) >= 0), None)
        if written is None:
            raise ValueError(f"token {token!r} is not in the sentence")
        at = sentence.index(written, at)
        begin = at if i == first else begin
        at += len(written)
    return begin, at
