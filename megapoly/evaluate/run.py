"""One model on tasks: of the benchmark, bits per byte, and any other task of the harness."""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import covariance
from typing import Any

from lm_eval import evaluator
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from megapoly.data.templates import TEMPLATES
from megapoly.errors import ConfigError, DataError
from megapoly.evaluate import metrics
from megapoly.evaluate.benchmarks import BENCHMARKS, BITS, GROUPS, Benchmark, check_languages
from megapoly.evaluate.leader import Leader
from megapoly.evaluate.model import HarnessModel
from megapoly.evaluate.records import fetch_records, find_languages, read_records
from megapoly.evaluate.results import Figure, average
from megapoly.evaluate.tasks import make_bits_task, make_task, tuned_prompt

_SEED = 1234  # of the harness, for which examples a question gets
_BOOTSTRAP = 1000
_SHARES = {"acc", "acc_norm", "acc_mutual_info", "exact_match"}  # of the harness, in [0, 1]; shown of 100


@dataclass(frozen=True)
class Options:
    """What is measured, and how.

    Attributes:
        tasks: names; groups of the harness too.
        languages: of the benchmark's tasks; none: all that the data has.
        data: folder of local files; None fetches them.
        texts: files for bits per byte, by language.
        limit: records of each task and language.
        shots: examples before a question; None: one for texts of base models, else none, and the harness's own.
        tuned: see :func:`megapoly.evaluate.tasks.make_task`.
        most: tokens of a text.
        include: folder with further tasks of the harness.
    """

    tasks: Sequence[str]
    languages: Sequence[str] = ()
    data: Path | None = None
    texts: Mapping[str, Path] = field(default_factory=dict)
    limit: int | None = None
    shots: int | None = None
    tuned: bool = False
    most: int | None = None
    include: Path | None = None


@dataclass(frozen=True)
class Prepared:
    """A task of the harness, and what its figure is called.

    Attributes:
        name: of a task of a group of the harness the group's, and its own is the language.
        groups: of the harness that it was loaded with, by name.
    """

    task: Task
    name: str
    language: str = ""
    metric: str = ""
    split: str = ""
    groups: Mapping[str, Any] = field(default_factory=dict)


def prepare(options: Options) -> list[Prepared]:
    """Read the data of all tasks.

    Raises:
        ConfigError: a task that is not known, or has none of the languages.
        DataError: data that are not there, or are not as they should be.
    """
    with _quiet():
        return list(_prepare(options))


def evaluate(
    leader: Leader, model: str, tasks: Sequence[Prepared], options: Options, told: Callable[[str, float], object]
) -> tuple[list[Figure], list[dict[str, Any]]]:
    """Figures of a model, and what it answered to every question.

    Args:
        model: its name in the figures.

    Raises:
        ConfigError, DataError: a request that does not fit the model.
    """
    # What an evaluation before this one has left is none of this model's.
    for each in tasks:
        each.task.set_fewshot_seed(_SEED)
    template = leader.generator.template or TEMPLATES["multialpaca"]
    own = [each for each in tasks if options.tuned and each.name in BENCHMARKS and not BENCHMARKS[each.name].options]
    for each in own:
        each.task.set_config("doc_to_text", tuned_prompt(BENCHMARKS[each.name], each.language, template))
    forms = {each.task.task_name: template.name for each in own}
    own_form = forms if leader.generator.template is not None else ()
    harness = HarnessModel(leader, options.most, told, own_form)
    groups = {name: group for each in tasks for name, group in each.groups.items()}
    with _quiet():
        found: Any = evaluator.evaluate(
            harness,
            {"tasks": {each.task.task_name: each.task for each in tasks}, "groups": groups},
            limit=options.limit,
            bootstrap_iters=_BOOTSTRAP,
            log_samples=True,
        )
    truncated = Counter(name for name, _ in harness.truncated)
    figures: list[Figure] = []
    samples: list[dict[str, Any]] = []
    for each in tasks:
        name = each.task.task_name
        answered = found["samples"][name]
        if each.metric:
            made = [_own_figure(model, each, answered, found["n-shot"][name], options.tuned)]
        else:
            made = list(_foreign_figures(model, each, found["results"][name], found["n-shot"][name], options.tuned))
        figures += (replace(figure, truncated=truncated[name], template=forms.get(name, "")) for figure in made)
        samples += ({"model": model, "task": name, **sample} for sample in answered)
    figures = _with_covariances(figures, tasks, found["samples"])
    for group in dict.fromkeys(each.name for each in tasks if not each.metric and each.language):
        figures += _of_group([each for each in figures if each.task == group], found["results"].get(group, {}))
    return figures, samples


def _prepare(options: Options) -> Iterator[Prepared]:
    names = list(dict.fromkeys(part for name in options.tasks for part in GROUPS.get(name, [name])))
    foreign = [name for name in names if name not in BENCHMARKS and name != BITS]
    manager = None
    if foreign:  # the harness has thousands of tasks of its own, which take seconds to list
        manager = TaskManager(include_path=options.include, include_defaults=False)
        if not set(foreign) <= set(manager.all_tasks):
            manager = TaskManager(include_path=options.include)
    for name in foreign:
        assert manager
        if name not in manager.all_tasks:
            known = [*BENCHMARKS, *GROUPS, BITS, *manager.all_tasks]
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                f"--tasks: {name!r} is no task{f'; nearest: {near[0]!r}' if near else ''}; --list-tasks shows those of"
                " the benchmark, lm-eval ls tasks all others"
            )
    if BITS in names and not options.texts:
        raise ConfigError(f"--tasks {BITS}: has no text; give --text LANGUAGE=FILE, once for each language")
    if options.texts and BITS not in names:
        raise ConfigError(f"--text: is for the task {BITS}, which is not among --tasks")
    check_languages("--languages", options.languages, [name for name in names if name in BENCHMARKS])
    for name in names:
        if name in BENCHMARKS:
            yield from _own(BENCHMARKS[name], options)
        elif name == BITS:
            for language, path in options.texts.items():
                yield Prepared(make_bits_task(language, path, options.limit), BITS, language, BITS)
        else:
            yield from _load(manager, name, options)


def _own(benchmark: Benchmark, options: Options) -> Iterator[Prepared]:
    wanted = benchmark.chosen(options.languages) if options.languages else None
    if wanted == []:
        raise ConfigError(
            f"--languages {','.join(options.languages)}: {benchmark.name} has none of them; it has"
            f" {', '.join(benchmark.languages)}"
        )
    if wanted is None:
        wanted = list(benchmark.languages) if options.data is None else find_languages(benchmark, options.data)
    shots = options.shots
    if shots is None:
        shots = 0 if options.tuned or benchmark.options else 1
    for language in wanted or benchmark.languages[:1]:  # of which reading says what is missing
        if options.data is None:
            records = fetch_records(benchmark, language)
        else:
            records = read_records(benchmark, language, options.data)
        if benchmark.metric == "bleu":
            metrics.make_bleu(language.split("-")[-1])  # which may not be installed
        task = make_task(benchmark, language, records, shots=shots, tuned=options.tuned)
        yield Prepared(task, benchmark.name, language, benchmark.metric, records.split)


def _load(manager: TaskManager | None, name: str, options: Options) -> Iterator[Prepared]:
    assert manager
    try:
        loaded = manager.load([name])
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise DataError(
            f"--tasks {name}: could not be loaded ({' '.join(str(error).split())[:300]}); look at the connection, or"
            " load it where there is one"
        ) from error
    alone = name in loaded["tasks"]
    for task_name, task in loaded["tasks"].items():
        if options.shots is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=options.shots)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        yield Prepared(task, name, "" if alone else task_name.removeprefix(f"{name}_"), groups=loaded["groups"])


def _own_figure(
    model: str, prepared: Prepared, answered: Sequence[Mapping[str, Any]], shots: int, tuned: bool
) -> Figure:
    values = [sample[prepared.metric] for sample in answered]
    value, error = metrics.summary(prepared.metric, values, prepared.language)
    unit = "bits/byte" if prepared.metric == BITS else "%"
    return Figure(
        model, prepared.name, prepared.language, prepared.metric, value, error, unit, len(values), shots, tuned,
        prepared.split,
    )  # fmt: skip


def _with_covariances(
    figures: Sequence[Figure], tasks: Sequence[Prepared], samples: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[Figure]:
    """The figures, those of translated records with their covariances; languages with other records are others'."""
    scores: dict[tuple[str, str], list[float]] = {}
    alike: dict[tuple[str, tuple[Any, ...]], list[str]] = {}
    for each in tasks:
        if each.name in BENCHMARKS and BENCHMARKS[each.name].translated:
            answered = sorted(samples[each.task.task_name], key=lambda sample: int(sample["doc_id"]))
            scores[each.name, each.language] = [100 * sample[each.metric] for sample in answered]
            records = [sample["doc"] for sample in answered]
            numbers = (doc.get("id", doc.get("idx", i)) for i, doc in enumerate(records))
            alike.setdefault((each.name, (each.split, *numbers)), []).append(each.language)
    shared = {(name, language): group for (name, _), group in alike.items() for language in group}

    def covariances(task: str, language: str) -> dict[str, float]:
        mine = scores.get((task, language), [])
        others = [each for each in shared.get((task, language), []) if each != language and len(mine) > 1]
        return {each: covariance(mine, scores[task, each]) / len(mine) for each in others}

    return [replace(each, covariances=covariances(each.task, each.language)) for each in figures]


def _of_group(figures: Sequence[Figure], results: Mapping[str, Any]) -> Iterator[Figure]:
    """The averages of a group of the harness as that has them, or of all its tasks alike where it has none."""
    for metric in dict.fromkeys(each.metric for each in figures):
        parts = [each for each in figures if each.metric == metric]
        whole = average("average", parts)
        key, _, kind = metric.partition(", ")
        key = f"{key},{kind or 'none'}"
        if key not in results:
            yield whole
            continue
        scale, error = 100 if whole.unit == "%" else 1, results.get(key.replace(",", "_stderr,"))
        known = float(error) * scale if isinstance(error, (int, float)) else None
        yield replace(whole, value=float(results[key]) * scale, error=known)


def _foreign_figures(
    model: str, prepared: Prepared, results: Mapping[str, Any], shots: int, tuned: bool
) -> Iterator[Figure]:
    """Every metric of a task of the harness, as it gives it."""
    for key, value in results.items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = results.get(f"{metric}_stderr,{kind}")
        known = float(error) if isinstance(error, (int, float)) else None
        title = metric if kind == "none" else f"{metric}, {kind}"
        unit, scale = ("%", 100) if metric in _SHARES else ("", 1)
        error = None if known is None else known * scale
        yield Figure(
            model, prepared.name, prepared.language, title, value * scale, error, unit, results["sample_len"], shots,
            tuned,
        )  # fmt: skip


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness tells what it does in bars and warnings for its own command."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
