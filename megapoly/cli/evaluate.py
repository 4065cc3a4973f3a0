"""``megapoly evaluate``."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from megapoly.cli.common import (
    BatchSize,
    Device,
    Dtype,
    JsonFile,
    OwnTokenizer,
    PipelineRanks,
    TensorRanks,
    make_table,
    print_whole,
    write_rows,
)
from megapoly.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch

    from megapoly.context import ParallelContext
    from megapoly.evaluate.leader import Leader
    from megapoly.evaluate.results import Figure
    from megapoly.evaluate.run import Options


def evaluate_models(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="Run folders, checkpoints, folders of Hugging Face or Megatron, NAME=PATH to name one; or .json files"
            " of evaluations before.",
            metavar="MODEL...",
        ),
    ] = None,
    tasks: Annotated[str, typer.Option(help="Names with commas between them; also any task of lm-eval.")] = "",
    languages: Annotated[
        str, typer.Option(help="Of the benchmark's tasks, such as th,zh.  [default: all that the data has]")
    ] = "",
    data: Annotated[
        Path | None, typer.Option(help="Folder with xnli/, xcopa/ ...  [default: fetched from the hub]")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(metavar="LANGUAGE=FILE", help="Of bits_per_byte; once for each language.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Records of each task and language, for a trial.")] = None,
    tuned: Annotated[bool, typer.Option("--tuned", help="No examples, and texts until the model ends them.")] = False,
    few_shot: Annotated[
        int | None, typer.Option(min=0, help="Examples.  [default: one for texts of base models, else none]")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Of a generated text.  [default: 256]")] = None,
    covered: Annotated[str, typer.Option(help="Languages of an average of their own.")] = "",
    compare: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Figures of an earlier --json beside these; several times."),
    ] = None,
    list_tasks: Annotated[bool, typer.Option("--list-tasks", help="Show the benchmark's tasks and end.")] = False,
    include_path: Annotated[Path | None, typer.Option(help="Folder with further tasks, YAML of lm-eval.")] = None,
    tokenizer: OwnTokenizer = None,
    dtype: Dtype = None,
    device: Device = "auto",
    tp: TensorRanks = 1,
    pp: PipelineRanks = 1,
    batch: BatchSize = 16,
    json_file: JsonFile = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the table to this file.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Also draw it: .svg, .png or .pdf.")] = None,
    samples: Annotated[
        Path | None, typer.Option(help="Write every question with its answer to this .jsonl file.")
    ] = None,
) -> None:
    """Measure models on PolyLM's benchmark, beside each other, alone or as one rank of a torchrun.

    Sentences are scored and texts generated as lm-evaluation-harness does it, and ranks beyond tp x pp share the work.

    [bold]Example:[/bold] megapoly evaluate runs/demo hf/polylm --tasks xnli,xcopa --languages th,zh --data benchmarks
    """
    from megapoly.charts.figure import check_picture
    from megapoly.launch import run_meshed

    if list_tasks:
        _list_tasks()
        return
    if picture is not None:
        check_picture(picture)
    saved = [*(compare or []), *(Path(each) for each in models or [] if each.endswith(".json"))]
    measured = [each for each in models or [] if not each.endswith(".json")]
    report = _Report(saved, _names(covered), json_file, markdown, picture, samples)
    if not measured:
        read = report.check()
        if not saved:
            raise ConfigError("nothing to evaluate: give a MODEL and --tasks, or .json files of evaluations before")
        report.check_covered(figure.language for figure in read)
        report.show([])
        return

    def work(context: ParallelContext) -> None:
        from megapoly.engine import DTYPES
        from megapoly.run import agree

        asked = _Asked(tasks, languages, data, text or [], limit, tuned, few_shot, max_tokens, include_path)
        named = agree(context, lambda: _named(measured))
        evaluation = agree(context, lambda: _Evaluation(asked, report, named) if context.rank == 0 else None)
        loading = (tokenizer, None if dtype is None else DTYPES[dtype], batch)
        for name, path in named.items():
            _measure(context, path, name, loading, evaluation)
        if evaluation is not None:
            report.show(evaluation.figures, evaluation.answers)

    raise typer.Exit(run_meshed(tp, pp, device, work))


def _measure(
    context: ParallelContext,
    path: Path,
    name: str,
    loading: tuple[Path | None, torch.dtype | None, int],
    evaluation: _Evaluation | None,
) -> None:
    from megapoly.evaluate.leader import lead
    from megapoly.generate import Generator
    from megapoly.run import agree

    tokenizer, dtype, batch = loading
    generator = agree(context, lambda: Generator.open(path, tokenizer, dtype, context=context, batch=batch))
    if context.rank == 0:
        sys.stderr.write("".join(f"megapoly: {note}\n" for note in generator.notes))
    lead(context, generator, lambda leader: evaluation.run(leader, name) if evaluation else None)


@dataclass(frozen=True)
class _Asked:
    """What the command line says of the tasks."""

    tasks: str
    languages: str
    data: Path | None
    text: Sequence[str]
    limit: int | None
    tuned: bool
    few_shot: int | None
    max_tokens: int | None
    include: Path | None

    def options(self) -> Options:
        from megapoly.evaluate.run import Options

        if not _names(self.tasks):
            raise ConfigError("--tasks: nothing is asked for; give names such as xnli,xcopa, which --list-tasks shows")
        texts = {}
        for each in self.text:
            language, _, path = each.partition("=")
            if not language or not path or language in texts:
                raise ConfigError(f"--text {each!r}: expected LANGUAGE=FILE, once for each language")
            texts[language] = Path(path)
        if self.data is not None and not self.data.is_dir():
            raise ConfigError(f"--data {self.data}: is no folder; give one with xnli/, xcopa/ and so on")
        if self.include is not None and not self.include.is_dir():
            raise ConfigError(f"--include-path {self.include}: is no folder; give one with YAML files of lm-eval")
        return Options(
            _names(self.tasks), _names(self.languages), self.data, texts, self.limit, self.few_shot, self.tuned,
            self.max_tokens, self.include,
        )  # fmt: skip


class _Evaluation:
    """The tasks, whose data are read once, and what the models have got; on the first rank.

    All that can be seen to fail does so before a model is measured.

    Raises:
        ConfigError, DataError: as :func:`megapoly.evaluate.run.prepare`, or lm-eval is not installed.
    """

    def __init__(self, asked: _Asked, report: _Report, names: Iterable[str]) -> None:
        read = report.check()
        try:
            import lm_eval  # noqa: F401 - the next import needs it
        except ImportError as error:
            raise ConfigError("evaluate needs lm-eval: pip install 'megapoly[eval]'") from error
        from megapoly.evaluate.benchmarks import BENCHMARKS
        from megapoly.evaluate.run import prepare

        self._options = asked.options()
        self._tasks = prepare(self._options)
        self._report = report
        others = dict.fromkeys(each.name for each in self._tasks if each.name not in BENCHMARKS)
        if self._options.languages and others:
            said = "is of the benchmark's tasks; measured in all that they have:"
            sys.stderr.write(f"megapoly: --languages {said} {', '.join(others)}\n")
        report.check_covered([*(each.language for each in self._tasks), *(figure.language for figure in read)])
        planned = {(name, each.name, each.language) for name in names for each in self._tasks}
        for figure in read:
            if (figure.model, figure.task, figure.language) in planned:
                raise ConfigError(
                    f"{figure.model}: has {figure.name} in a file of before, too; give the model another name:"
                    " NAME=PATH"
                )
        self.figures: list[Figure] = []
        self.answers: list[dict[str, Any]] = []

    def run(self, leader: Leader, name: str) -> None:
        from megapoly.evaluate.run import evaluate

        begin = time.perf_counter()
        console = Console(stderr=True)
        with console.status(f"{name}: reading the tasks") as status:
            figures, answers = evaluate(
                leader, name, self._tasks, self._options,
                lambda what, share: status.update(f"{name}: {what}, {share:.0%}"),
            )  # fmt: skip
        seconds = time.perf_counter() - begin
        console.print(f"{name}: {len(answers):,} records in {seconds:.1f} s, {len(answers) / seconds:.1f} a second")
        self.figures += figures
        self.answers += answers
        self._report.save(self.figures, self.answers)  # of what is done, should the next model fail


@dataclass(frozen=True)
class _Report:
    """Where figures go."""

    saved: Sequence[Path]
    covered: Sequence[str]
    json: Path | None
    markdown: Path | None
    picture: Path | None
    samples: Path | None

    def check(self) -> list[Figure]:
        """The figures of before; and whether the files can be written.

        Raises:
            DataError: a file cannot be read or written.
            ConfigError: two figures, or two files, for the same.
        """
        from megapoly.evaluate import results

        read = [each for path in self.saved for each in results.without_averages(results.read_figures(path))]
        results.check_unique(read)
        written = [path for path in (self.json, self.markdown, self.picture, self.samples) if path]
        for path in written:
            if written.count(path) > 1:
                raise ConfigError(f"{path}: is to be written twice; give every file a name of its own")
            above = next(each for each in path.absolute().parents if each.exists())
            if path.is_dir() or not above.is_dir() or not os.access(above, os.W_OK):
                raise DataError(f"{path}: cannot be written; give a file in a folder that can")
        return read

    def check_covered(self, languages: Iterable[str]) -> None:
        """Refuse languages for an average that nothing is in.

        Raises:
            ConfigError: naming one, and those that there are.
        """
        there = sorted({each for each in languages if each})
        for language in self.covered:
            if language not in there:
                raise ConfigError(
                    f"--covered {language}: nothing here is in it; there are {', '.join(there) or 'none'}"
                )

    def save(self, measured: Sequence[Figure], answers: Sequence[dict[str, Any]]) -> list[Figure]:
        """Write the figures and answers as files of JSON, and give all figures with their averages."""
        from megapoly.data.files import write_whole
        from megapoly.evaluate import results

        read = [each for path in self.saved for each in results.without_averages(results.read_figures(path))]
        figures = [*measured, *read]
        results.check_unique(figures)
        figures += results.averages(figures, self.covered)
        if self.json:
            write_rows(self.json, [figure.row() for figure in figures])
        if self.samples:
            lines = (json.dumps(each, ensure_ascii=False, default=str) + "\n" for each in answers)
            write_whole(self.samples, "".join(lines).encode())
        return figures

    def show(self, measured: Sequence[Figure], answers: Sequence[dict[str, Any]] = ()) -> None:
        from megapoly.charts.evaluation import draw_evaluation
        from megapoly.charts.figure import save_figure
        from megapoly.data.files import write_whole
        from megapoly.evaluate import results

        figures = self.save(measured, answers)
        made = results.table(figures)
        table = make_table(*made.heads)
        for row in made.rows:
            table.add_row(*row)
        print_whole(table)
        notes = results.notes(figures)
        for note in notes:
            Console(highlight=False, soft_wrap=True).print(note)
        if self.markdown:
            write_whole(self.markdown, results.markdown(figures, notes).encode())
        if self.picture:
            save_figure(draw_evaluation(figures), self.picture)


def _list_tasks() -> None:
    from megapoly.evaluate.benchmarks import BENCHMARKS, BITS

    table = make_table("task", "languages")
    table.columns[1].justify, table.columns[1].no_wrap = "left", False
    table.add_column("what")
    for name, each in BENCHMARKS.items():
        table.add_row(name, " ".join(each.languages), each.about)
    table.add_row(BITS, "any", "bits per byte of the texts of --text LANGUAGE=FILE")
    Console(highlight=False).print(table)
    print("mtg is all mtg_ tasks. Any other task of lm-eval works, too: lm-eval ls tasks")


def _named(given: Sequence[str]) -> dict[str, Path]:
    """Models by their names in tables: NAME of NAME=PATH, else the last parts of the path.

    Raises:
        CheckpointError: there are no weights.
        ConfigError: a model or name that is given twice.
    """
    from megapoly.checkpoint.weights import find
    from megapoly.evaluate.results import tell_apart

    parted = [("", each) if Path(each).exists() else each.rpartition("=")[::2] for each in given]
    paths = [Path(path) for _, path in parted]
    found = [find(path).resolve() for path in paths]
    for path, whole in zip(paths, found):
        if found.count(whole) > 1:
            raise ConfigError(f"{path}: is given twice; give every model once")
    short = tell_apart([str(path.resolve()) for path in paths])
    names = [name or own for (name, _), own in zip(parted, short)]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{name}: is the name of two models; give one another name: NAME=PATH")
    return dict(zip(names, paths))


def _names(text: str) -> list[str]:
    """Of a comma-separated list, each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
