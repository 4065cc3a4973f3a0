"""PolyLM's cleaning pipeline (arXiv 2307.06018, section 3.1) by datatrove: see README.md."""

from __future__ import annotations

import contextlib
import functools
import io
import multiprocessing
import os
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import report
import rules
import steps
import typer
from datatrove.pipeline.dedup import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.hashing import HashConfig
from loguru import logger
from rich.console import Console
from rich.progress import track

from megapoly.cli.common import write_rows
from megapoly.cli.inputs import language_files
from megapoly.data.readers import expand, open_reader
from megapoly.errors import DataError, MegapolyError


@dataclass(frozen=True)
class Language:
    """One language's job. ``folder`` is where the run writes until it is done."""

    code: str
    files: tuple[Path, ...]
    rules: rules.Rules
    folder: Path

    def work(self, name: str) -> str:
        return str(self.folder / "work" / self.code / name)

    def removed(self, step: str) -> JsonlWriter:
        return JsonlWriter(str(self.folder / "output/removed" / step / self.code), adapter=steps.as_record)

    @property
    def minhash(self) -> MinhashConfig:
        return MinhashConfig(**self.rules["duplicates"], hash_config=HashConfig(precision=64, hash_fc="sha1"))


@dataclass(frozen=True)
class Part:
    """One file of a language: the unit of work. Everything made of it is named after its ``number``."""

    language: Language
    number: int

    @property
    def path(self) -> Path:
        return self.language.files[self.number]


def run(pipeline: Sequence[Any], task: int = 0, tasks: int = 1) -> None:
    """Pull the documents through the steps, as datatrove's executors do."""
    logger.disable("datatrove")
    data = None
    for step in pipeline:
        data = step(data, task, tasks)
    deque(data or (), maxlen=0)


def apply_rules(part: Part) -> report.Counts:
    """All steps that look at one document at a time. Signatures for the last step are made of what is left."""
    language, words = part.language, steps.Words(part.language.code)
    thresholds, removed = language.rules, language.removed
    filters = {
        "language": steps.LanguageFilter(language.code, exclusion_writer=removed("language"), **thresholds["language"]),
        "tidy": steps.Tidy(**thresholds["tidy"]),
        "repetition": GopherRepetitionFilter(
            language=words, exclusion_writer=removed("repetition"), **thresholds["repetition"]
        ),
        "quality": GopherQualityFilter(language=words, exclusion_writer=removed("quality"), **thresholds["quality"]),
        "digits": steps.DigitsFilter(exclusion_writer=removed("digits"), **thresholds["digits"]),
    }
    left: dict[str, Counter[str]] = {name: Counter() for name in ("input", *filters)}
    pipeline: list[Any] = [steps.Records(part.path), steps.Count(left["input"])]
    for name, step in filters.items():
        pipeline += [step, steps.Count(left[name])]
    pipeline += [
        JsonlWriter(language.work("ruled"), adapter=steps.as_record),
        MinhashDedupSignature(language.work("signatures"), config=language.minhash, language=words),
    ]
    run(pipeline, part.number)
    return report.Counts(language.code, left, {name: steps.reasons(step) for name, step in filters.items()})


def find_duplicates(language: Language) -> None:
    """Which documents of a language to remove: all but one of those that MinHash takes for near-duplicates."""
    config = language.minhash
    for bucket in range(config.num_buckets):
        run(
            [MinhashDedupBuckets(language.work("signatures"), language.work("pairs"), config=config)],
            bucket,
            config.num_buckets,
        )
    with contextlib.redirect_stderr(io.StringIO()):  # it draws a bar of its own
        run([MinhashDedupCluster(language.work("pairs"), language.work("duplicates"), config=config)])


def drop_duplicates(part: Part) -> report.Counts:
    language, left = part.language, Counter[str]()
    ruled = Path(language.work("ruled")) / f"{part.number:05}.jsonl.gz"
    if ruled.exists():  # else the rules left nothing of the file
        pipeline = [
            steps.Records(ruled),
            MinhashDedupFilter(language.work("duplicates"), exclusion_writer=language.removed("duplicates")),
            steps.Count(left),
            JsonlWriter(str(language.folder / "output" / language.code), adapter=steps.as_record),
        ]
        run(pipeline, part.number)
    return report.Counts(language.code, {"duplicates": left}, {})


@contextlib.contextmanager
def mapper(workers: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """``map`` itself, or one over several processes."""
    if workers == 1:
        yield map
    else:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            yield pool.map


def clean(languages: Sequence[Language], workers: int) -> Iterator[report.Counts]:
    """Clean all files, ``workers`` at a time; yields what was left of each file after the steps.

    Near-duplicates are sought inside a language, over all its files.
    """
    parts = [Part(language, number) for language in languages for number in range(len(language.files))]
    parts.sort(key=lambda part: -part.path.stat().st_size)
    bar = functools.partial(track, console=Console(stderr=True), transient=True)
    with mapper(workers) as apply:
        yield from bar(apply(apply_rules, parts), "rules", len(parts))
        deque(bar(apply(find_duplicates, languages), "near-duplicates", len(languages)), maxlen=0)
        yield from bar(apply(drop_duplicates, parts), "writing", len(parts))


def find_languages(inputs: Sequence[str], thresholds: Path, folder: Path) -> list[Language]:
    """The languages of inputs such as ``th=th.jsonl.gz``, with their files and rules.

    Raises:
        DataError: an input of another form, a file that cannot be read.
        ConfigError: a language that is not known, or unsound rules.
    """
    files = {code: expand(paths) for code, paths in language_files(inputs).items()}
    for path in expand([path for paths in files.values() for path in paths]):
        open_reader(path)
    found = rules.load(thresholds, list(files))
    return [Language(code, tuple(paths), found[code], folder) for code, paths in files.items()]


def main(
    inputs: Annotated[list[str], typer.Argument(metavar="LANG=FILE...", help="Records with a field text.")],
    output: Annotated[Path, typer.Option(help="Folder to write: LANG/*.jsonl.gz, report.json, removed/STEP/LANG/.")],
    thresholds: Annotated[Path, typer.Option("--rules", help="Thresholds, by language and step.")] = rules.FILE,
    workers: Annotated[int, typer.Option(min=1, help="Files at a time.")] = os.cpu_count() or 1,
) -> None:
    """Clean text as PolyLM did, and print what each step removed, by language.

    Example: python examples/cleaning/clean.py --output runs/clean en=en.jsonl.gz th=th.jsonl.gz
    """
    try:
        if output.exists():
            raise DataError(f"{output}: exists already; remove it, or choose another --output")
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{output.name}.", dir=output.parent) as folder:
            languages = find_languages(inputs, thresholds, Path(folder))
            rows = report.rows(clean(languages, workers))
            write_rows(Path(folder) / "output/report.json", rows)
            os.replace(Path(folder) / "output", output)
        report.show(rows)
    except MegapolyError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    typer.run(main)
