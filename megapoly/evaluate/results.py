"""Figures of models on tasks: rows in files, their averages, and tables. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from megapoly.bench.report import markdown_table
from megapoly.errors import ConfigError, DataError
from megapoly.evaluate.benchmarks import BENCHMARKS, BITS

COVERED = "covered"
_TITLES = {
    "acc": "accuracy",
    "acc_norm": "accuracy",
    "f1": "F1",
    "bleu": "BLEU",
    "rouge": "ROUGE",
    BITS: "bits per byte",
}


@dataclass(frozen=True)
class Figure:
    """One number of one model.

    Attributes:
        name: task and language.
        language: of the task, or what it is an average of; of a group of the harness its task, of a single one empty.
        error: standard error; None where it is not known.
        samples: records that it is of.
        shots: examples before each question.
        tuned: whether it was asked as a tuned model.
        split: of the data.
        parts: languages of an average.
        truncated: records of which the beginning was left out, since the model has too few positions.
        template: of the question of a tuned model, where it is asked for a text.
        covariances: with the figures of other languages, where those are of the same records, translated.
    """

    model: str
    task: str
    language: str
    metric: str
    value: float
    error: float | None
    unit: str = "%"
    samples: int = 0
    shots: int = 0
    tuned: bool = False
    split: str = ""
    parts: tuple[str, ...] = ()
    truncated: int = 0
    template: str = ""
    covariances: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return "/".join(filter(None, (self.task, self.language)))

    def row(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}


def averages(figures: Sequence[Figure], covered: Sequence[str] = ()) -> list[Figure]:
    """Means over the languages of each task and model, and over those of them in ``covered`` where it is given."""
    found: list[Figure] = []
    for model, task in dict.fromkeys((each.model, each.task) for each in figures):
        mine = {each.language: each for each in figures if (each.model, each.task) == (model, task)}
        benchmark = BENCHMARKS.get(task)
        if benchmark is None and task != BITS:
            continue
        languages = list(mine)
        kinds = benchmark.averages(languages) if benchmark else {"average": languages}
        if covered and not (benchmark and benchmark.is_translation):
            kinds[COVERED] = [each for each in languages if each in covered]
        for name, part in kinds.items():
            if part:
                found.append(average(name, [mine[each] for each in part]))
    return found


def without_averages(figures: Sequence[Figure]) -> list[Figure]:
    """Those that :func:`averages` has not made; what a group of the harness has as a whole stays."""
    return [each for each in figures if not each.parts or (each.task not in BENCHMARKS and each.task != BITS)]


def average(name: str, parts: Sequence[Figure]) -> Figure:
    """The mean of figures of one task, each with the same weight. Its error counts their covariances."""
    errors = [each.error for each in parts]
    known = [error for error in errors if error is not None]
    shared = sum(each.covariances.get(other.language, 0.0) for each in parts for other in parts)
    variance = max(0.0, sum(each * each for each in known) + shared)
    error = math.sqrt(variance) / len(parts) if len(known) == len(parts) else None
    first, value = parts[0], sum(each.value for each in parts) / len(parts)
    return Figure(
        first.model, first.task, name, first.metric, value, error, first.unit, sum(each.samples for each in parts),
        first.shots, first.tuned, "", tuple(each.language for each in parts), sum(each.truncated for each in parts),
        first.template,
    )  # fmt: skip


def read_figures(path: Path) -> list[Figure]:
    """The figures in a file of ``--json``.

    Raises:
        DataError: it cannot be read, or is no such file.
    """
    try:
        rows = json.loads(path.read_bytes())["rows"]
        known = {field.name for field in fields(Figure)}
        figures = [Figure(**{key: value for key, value in row.items() if key in known}) for row in rows]
        return [Figure(**{**vars(each), "parts": tuple(each.parts)}) for each in figures]
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); give a file of megapoly evaluate --json"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: is no file of megapoly evaluate --json ({error!r})") from error


def tell_apart(names: Sequence[str]) -> list[str]:
    """Short names of paths: their last parts, as many as it takes to tell them apart."""
    parts = [Path(name).parts for name in names]
    for count in range(1, max(map(len, parts), default=1) + 1):
        short = ["/".join(each[-count:]) for each in parts]
        if len(set(short)) == len(set(names)):
            return short
    return list(names)


@dataclass(frozen=True)
class Table:
    """A table as texts: heads, and rows by task; an empty row stands between tasks."""

    heads: list[str]
    rows: list[list[str]]


def table(figures: Sequence[Figure]) -> Table:
    """Languages and averages of each task, with a column for each model."""
    models = list(dict.fromkeys(each.model for each in figures))
    at = {(each.model, each.task, each.metric, each.language): each for each in figures}
    rows: list[list[str]] = []
    for task, metric in dict.fromkeys((each.task, each.metric) for each in figures):
        mine = [each for each in figures if (each.task, each.metric) == (task, metric)]
        if rows and (len({each.language for each in mine}) > 1 or rows[-1][1]):
            rows.append([""] * (3 + len(models)))
        title = f"{task}, {title_of(metric, figures)}"
        for language in _ordered(mine):
            cells = [_cell(at.get((model, task, metric, language))) for model in models]
            samples = max(each.samples for each in mine if each.language == language)
            rows.append([title, language, f"{samples:,}", *cells])
            title = ""
    return Table(["task", "language", "records", *models], rows)


def title_of(metric: str, figures: Sequence[Figure]) -> str:
    """What a metric is called; the name of the harness where a task among ``figures`` has two that are called alike."""
    metrics: dict[str, set[str]] = {}
    for each in figures:
        metrics.setdefault(each.task, set()).add(each.metric)
    title = _TITLES.get(metric, metric)
    alike = (each for each in metrics.values() if metric in each)
    return metric if any(_TITLES.get(other) == title for each in alike for other in each - {metric}) else title


def chance_of(task: str) -> float | None:
    """What guessing gets, of 100."""
    return BENCHMARKS[task].chance if task in BENCHMARKS else None


def markdown(figures: Sequence[Figure], notes: Iterable[str]) -> str:
    """A page with the table."""
    made = table(figures)
    rows = [row for row in made.rows if any(row)]
    lines = ["# megapoly evaluate", "", *(f"- {note}" for note in notes), "", *markdown_table(made.heads, rows)]
    return "\n".join(lines) + "\n"


def notes(figures: Sequence[Figure]) -> list[str]:
    """What the table shows."""
    lines = [
        "± is a standard error; averages are over the languages, each with the same weight. Where the records of"
        " several are the same, translated (xnli, pawsx, xcopa), the ± of their average counts that; else languages are"
        " taken as independent."
    ]
    if any(each.parts for each in without_averages(figures)):
        lines.append(
            "The average of a group of lm-eval is the group's own, where it has one of this metric; else all its tasks"
            " weigh alike."
        )
    if any(each.task == BITS for each in figures):
        lines.append("Of bits per byte less is better, of all others more.")
    for task in dict.fromkeys(each.task for each in figures):
        asked: dict[str, dict[str, None]] = {}  # languages by how they are asked, in their order
        for each in figures:
            if each.task == task and not each.parts:
                asked.setdefault(_asked(each), {})[each.language] = None
        chance = chance_of(task)
        for how, languages in asked.items():
            where = f" in {', '.join(languages)}" if len(asked) > 1 else ""
            lines.append(f"{task}{where}: {how}" + ("" if chance is None else f"; chance gets {chance:.1f}"))
    cut = {(each.model, each.name): each for each in figures if each.truncated and not each.parts}
    for each in cut.values():
        lines.append(
            f"{each.name}: {each.truncated:,} of {each.samples:,} records are longer than the positions of"
            f" {each.model}; their beginning was left out, so do not compare them"
        )
    return lines


def check_unique(figures: Sequence[Figure]) -> None:
    """Refuse two figures of one model for the same.

    Raises:
        ConfigError: naming them.
    """
    seen: set[tuple[str, ...]] = set()
    for each in figures:
        key = (each.model, each.task, each.metric, each.language)
        if key in seen:
            raise ConfigError(f"{each.model}: has {each.name} twice; give every model and file once")
        seen.add(key)


def _asked(figure: Figure) -> str:
    shots = f"{figure.shots} example{'' if figure.shots == 1 else 's'}" if figure.shots else "no example"
    form = f" in the form of {figure.template} ({figure.model})" if figure.template else ""
    return f"{figure.split or 'text'}, {shots}{', as a tuned model' if figure.tuned else ''}{form}"


def _ordered(figures: Sequence[Figure]) -> list[str]:
    """Languages, then averages."""
    return list(dict.fromkeys(each.language for each in sorted(figures, key=lambda each: bool(each.parts))))


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    places = 3 if figure.unit != "%" else 1
    error = "" if figure.error is None else f" ± {figure.error:.{places}f}"
    return f"{figure.value:.{places}f}{error}"
