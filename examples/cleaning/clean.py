"""PolyLM's cleaning pipeline (arXiv 2307.06018, section 3.1) on JSON lines, by datatrove: see README.md."""

from __future__ import annotations

import contextlib
import gzip
import inspect
import json
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import steps
import typer
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.hashing import HashConfig
from loguru import logger
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from megapoly.errors import ConfigError, DataError, MegapolyError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RULES = Path(__file__).with_name("rules.toml")
STEPS = ("language", "tidy", "repetition", "quality", "digits", "duplicates")
_CLASSES = {
    "language": steps.LanguageFilter,
    "tidy": steps.Tidy,
    "repetition": GopherRepetitionFilter,
    "quality": GopherQualityFilter,
    "digits": steps.DigitsFilter,
    "duplicates": MinhashConfig,
}

Rules = Mapping[str, Mapping[str, Any]]  # of one language: step -> argument -> value


@dataclass(frozen=True)
class Language:
    """One language's job: its files, its rules, and the folder of the whole run."""

    code: str
    files: tuple[Path, ...]
    rules: Rules
    output: Path

    @property
    def work(self) -> Path:
        return self.output / "work" / self.code


def load_rules(path: Path, languages: Sequence[str]) -> dict[str, Rules]:
    """The rules of each language: those of ``[default]``, with what the language's own section changes.

    Raises:
        ConfigError: a step or an argument that there is not, or a step without rules.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    for section, table in tables.items():
        for step, arguments in table.items():
            if step not in _CLASSES:
                raise ConfigError(f"{path}: [{section}.{step}] is no step; the steps are {', '.join(STEPS)}")
            known = set(inspect.signature(_CLASSES[step]).parameters) - {"exclusion_writer", "language"}
            for name in set(arguments) - known:
                raise ConfigError(f"{path}: {name} in [{section}.{step}] is none of {', '.join(sorted(known))}")
    default = tables.get("default", {})
    if missing := [step for step in STEPS if step not in default]:
        raise ConfigError(f"{path}: [default.{missing[0]}] is missing; every step needs its rules")
    return {
        code: {step: {**default[step], **tables.get(code, {}).get(step, {})} for step in STEPS} for code in languages
    }


def _execute(job: Language, name: str, pipeline: list[Any], tasks: int) -> list[dict[str, Any]]:
    """Run what of a pipeline is not done yet; the statistics of every step, summed over tasks."""
    logs = job.work / "logs" / name
    logs.mkdir(parents=True, exist_ok=True)
    with (logs / "console.log").open("a", encoding="utf-8") as console, contextlib.redirect_stderr(console):
        logger.remove()
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=1, logging_dir=str(logs)).run()
        logger.remove()  # of the console, which ends here
    summed: list[dict[str, Any]] = []
    for rank in range(tasks):
        for i, step in enumerate(json.loads((logs / f"stats/{rank:05d}.json").read_text(encoding="utf-8"))):
            if i == len(summed):
                summed.append({"name": step["name"], "stats": Counter()})
            for key, value in step["stats"].items():
                summed[i]["stats"][key] += value["total"] if isinstance(value, Mapping) else value
    return summed


def _rules_pipeline(job: Language) -> list[Any]:
    rules, words = job.rules, steps.Words(job.code)

    def removed(step: str) -> JsonlWriter:
        return JsonlWriter(str(job.work / "removed" / step), adapter=steps.as_record)

    return [
        steps.Records(list(job.files)),
        steps.Count("input"),
        steps.LanguageFilter(job.code, exclusion_writer=removed("language"), **rules["language"]),
        steps.Count("language"),
        steps.Tidy(**rules["tidy"]),
        steps.Count("tidy"),
        GopherRepetitionFilter(language=words, exclusion_writer=removed("repetition"), **rules["repetition"]),
        steps.Count("repetition"),
        GopherQualityFilter(language=words, exclusion_writer=removed("quality"), **rules["quality"]),
        steps.Count("quality"),
        steps.DigitsFilter(exclusion_writer=removed("digits"), **rules["digits"]),
        steps.Count("digits"),
        JsonlWriter(str(job.work / "ruled")),
    ]


def _read_ruled(job: Language) -> JsonlReader:
    return JsonlReader(str(job.work / "ruled"), glob_pattern="*.jsonl.gz")


def clean(job: Language) -> dict[str, Any]:
    """Clean one language, from where an earlier run stopped; returns its row of the report.

    Texts are compared inside a language, over all its files. ``output/LANG`` appears when the whole of it is done.
    """
    found = _execute(job, "rules", _rules_pipeline(job), len(job.files))
    if not any((job.work / "ruled").glob("*.jsonl.gz")):  # the rules left nothing
        return _row(job.code, found)
    config = MinhashConfig(**job.rules["duplicates"], hash_config=HashConfig(precision=64, hash_fc="sha1"))
    sums = {name: str(job.work / name) for name in ("signatures", "buckets", "duplicates", "cleaned")}
    words, tasks = steps.Words(job.code), len(job.files)
    signature = MinhashDedupSignature(sums["signatures"], config=config, language=words)
    _execute(job, "signatures", [_read_ruled(job), signature], tasks)
    buckets = MinhashDedupBuckets(sums["signatures"], sums["buckets"], config=config)
    _execute(job, "buckets", [buckets], config.num_buckets)
    _execute(job, "clusters", [MinhashDedupCluster(sums["buckets"], sums["duplicates"], config=config)], 1)
    last: list[Any] = [
        _read_ruled(job),
        MinhashDedupFilter(
            sums["duplicates"],
            exclusion_writer=JsonlWriter(str(job.work / "removed" / "duplicates"), adapter=steps.as_record),
        ),
        steps.Count("duplicates"),
        JsonlWriter(sums["cleaned"], adapter=steps.as_record),
    ]
    found += _execute(job, "deduplicated", last, tasks)
    cleaned, final = Path(sums["cleaned"]), job.output / job.code
    if cleaned.is_dir() and not final.exists():
        os.replace(cleaned, final)
    return _row(job.code, found)


def _row(code: str, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    counts = {step["name"].split(": ")[-1]: step["stats"] for step in found if "bytes" in step["stats"]}
    dropped = {name: n for step in found for name, n in step["stats"].items() if name.startswith("dropped_")}
    reasons = {name.removeprefix("dropped_"): n for name, n in dropped.items()}
    row: dict[str, Any] = {"language": code, "reasons": reasons, "steps": {}}
    before = counts["input"]
    for name in ("input", *STEPS):
        now = counts.get(name, before)  # nothing reached the last step
        row[name if name == "input" else "kept"] = {"documents": now["documents"], "bytes": now["bytes"]}
        if name != "input":
            row["steps"][name] = {unit: before[unit] - now[unit] for unit in ("documents", "bytes")}
        before = now
    return row


def check_unchanged(jobs: Sequence[Language], output: Path) -> None:
    """Refuse to go on with other files or rules than the run that began in ``output``; note them if none did.

    Raises:
        ConfigError: naming what is another.
    """
    now = {
        job.code: {"rules": job.rules, "files": [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in job.files]}
        for job in jobs
    }
    now = json.loads(json.dumps(now))
    path = output / "settings.json"
    if path.exists():
        then = json.loads(path.read_text(encoding="utf-8"))
        for code in sorted(now.keys() & then.keys()):
            for what in ("files", "rules"):
                if now[code][what] != then[code][what]:
                    raise ConfigError(f"{output}: was begun with other {what} of {code}; choose another --output")
        now = {**then, **now}
    output.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(now, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(partial, path)


def clean_all(jobs: Sequence[Language], workers: int) -> Iterator[dict[str, Any]]:
    """The rows of all languages, ``workers`` languages at a time."""
    if workers == 1 or len(jobs) == 1:
        yield from map(clean, jobs)
        return
    largest = sorted(jobs, key=lambda job: -sum(f.stat().st_size for f in job.files))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        done = dict(zip([job.code for job in largest], pool.map(clean, largest)))
    yield from (done[job.code] for job in jobs)


def report(rows: Sequence[Mapping[str, Any]], unit: str) -> Table:
    """What each step removed, in ``documents`` or ``bytes`` (shown as MB), with its share of what reached the step."""
    scale, form = (1, ",.0f") if unit == "documents" else (1e6, ".3f")
    title = "documents removed" if unit == "documents" else "MB removed"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("")
    for name in ("input", *STEPS, "kept"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in [*rows, total(rows)]:
        cells, left = [], row["input"][unit]
        for name in STEPS:
            gone = row["steps"][name][unit]
            cells.append(f"{gone / scale:{form}} {gone / left:4.0%}" if gone else "-")
            left -= gone
        share = f" {row['kept'][unit] / row['input'][unit]:4.0%}" if row["input"][unit] else ""
        kept = f"{row['kept'][unit] / scale:{form}}{share}"
        table.add_row(row["language"], f"{row['input'][unit] / scale:{form}}", *cells, kept)
    return table


def total(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The row of all languages."""

    def both(values: Iterable[Mapping[str, int]]) -> dict[str, int]:
        listed = list(values)
        return {unit: sum(value[unit] for value in listed) for unit in ("documents", "bytes")}

    return {
        "language": "all",
        "input": both(row["input"] for row in rows),
        "steps": {name: both(row["steps"][name] for row in rows) for name in STEPS},
        "kept": both(row["kept"] for row in rows),
    }


def samples(job: Language, count: int, characters: int = 160) -> Iterator[str]:
    """The beginnings of ``count`` removed documents for each step and reason."""
    for step in STEPS:
        shown: Counter[str] = Counter()
        for path in sorted((job.work / "removed" / step).glob("*.jsonl.gz")):
            with gzip.open(path, "rt", encoding="utf-8") as file:
                for record in map(json.loads, file):
                    reason = record.get("reason", step)
                    shown[reason] += 1
                    if shown[reason] <= count:
                        yield f"{job.code} {step}/{reason}: {' '.join(record['text'].split())[:characters]}"


def find_jobs(inputs: Sequence[str], rules: Path, output: Path) -> list[Language]:
    """The jobs of inputs such as ``th=th.jsonl.gz``; several of one language are its files.

    Raises:
        ConfigError: an input that is not of this form. DataError: a file that is not there.
    """
    files: dict[str, list[Path]] = {}
    for each in inputs:
        code, separator, path = each.partition("=")
        if not (code and separator and path):
            raise ConfigError(f"{each!r}: expected LANG=FILE, such as th=th.jsonl.gz")
        if not Path(path).is_file():
            raise DataError(f"{path}: no such file; give .jsonl or .jsonl.gz files")
        files.setdefault(code, []).append(Path(path).resolve())
    found = load_rules(rules, list(files))
    return [Language(code, tuple(paths), found[code], output) for code, paths in files.items()]


def main(
    inputs: Annotated[list[str], typer.Argument(metavar="LANG=FILE...", help="JSON lines with a field text.")],
    output: Annotated[Path, typer.Option(help="Folder for LANG/*.jsonl.gz, report.json and what was removed.")],
    rules: Annotated[Path, typer.Option(help="Thresholds, by step and language.")] = RULES,
    workers: Annotated[int, typer.Option(min=1, help="Languages at a time.")] = os.cpu_count() or 1,
    show: Annotated[int, typer.Option(help="Removed documents to print for each step and reason.")] = 0,
) -> None:
    """Clean text as PolyLM did, and print what each step removed. Run again, it goes on where it stopped.

    Example: python examples/cleaning/clean.py --output runs/clean en=en.jsonl.gz th=th.jsonl.gz
    """
    try:
        jobs = find_jobs(inputs, rules, output)
        check_unchanged(jobs, output)
        rows = list(clean_all(jobs, workers))
        partial = output / "report.json.tmp"
        partial.write_text(json.dumps({"rows": rows}, indent=1), encoding="utf-8")
        os.replace(partial, output / "report.json")
        console = Console()
        console = Console(width=max(console.width, 140))  # a row is one line, also in a file
        for unit in ("documents", "bytes"):
            console.print(report(rows, unit))
        for job in jobs if show else ():
            for line in samples(job, show):
                print(line)
    except MegapolyError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    typer.run(main)
