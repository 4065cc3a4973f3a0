"""``megapoly bench``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import typer
from rich.console import Console

from megapoly.cli.common import SETTINGS, JsonFile, make_table, print_whole, write_rows
from megapoly.cli.inputs import LanguageFiles, language_files
from megapoly.errors import ConfigError

Save = Annotated[Path | None, typer.Option(help="Folder for the report, as JSON and as a Markdown table.")]

bench_app = typer.Typer(help="Measure speed on this machine, against peers.", **SETTINGS)


@bench_app.command("schedule")
def bench_schedule(
    pp: Annotated[int, typer.Option(min=1, help="Pipeline ranks, a process each.")],
    microbatches: Annotated[int, typer.Option(min=1, help="Micro-batches of one rank in a step.")],
    virtual: Annotated[int | None, typer.Option(min=2, help="Stages per rank of interleaved.  [default: 2]")] = None,
    milliseconds: Annotated[float, typer.Option(min=0.1, help="Of a forward, and of either half of a backward.")] = 30,
    repeats: Annotated[int, typer.Option(min=1, help="Of every measurement; the least counts.")] = 3,
    json_file: JsonFile = None,
) -> None:
    """Every pipeline schedule on CPU ranks whose passes sleep, beside its simulation.

    [bold]Example:[/bold] megapoly bench schedule --pp 4 --microbatches 8
    """
    from megapoly.bench import schedule

    with Console(stderr=True).status(f"{pp} ranks sleep"):
        measured = schedule.measure(pp, microbatches, virtual, milliseconds / 1e3, repeats)
    table = make_table(*schedule.HEADS)
    for each in measured:
        table.add_row(*schedule.cells(each))
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    for reason in [each.reason for each in measured if isinstance(each, schedule.Refused)]:
        console.print(reason)
    if json_file:
        write_rows(json_file, schedule.rows(measured))


@bench_app.command("step")
def bench_step(
    against: Annotated[str, typer.Option(help="Peers: transformers, megatron; '' for none.")] = "transformers,megatron",
    layouts: Annotated[
        str, typer.Option(help="dp, tp or pp with a number of ranks, each against one process; '' for none.")
    ] = "dp2,tp2,pp2",
    layers: Annotated[int, typer.Option(min=1)] = 12,
    hidden: Annotated[int, typer.Option(min=1)] = 512,
    heads: Annotated[int, typer.Option(min=1)] = 8,
    sequence: Annotated[int, typer.Option(min=1)] = 512,
    vocabulary: Annotated[int, typer.Option(min=1)] = 32000,
    micro_batch: Annotated[int, typer.Option(min=1)] = 4,
    threads: Annotated[int, typer.Option(min=1, help="Of one process; ranks share them.")] = 2,
    device: Annotated[str, typer.Option(help="cpu, in fp32, or cuda, in bf16, with a GPU for each rank.")] = "cpu",
    steps: Annotated[int, typer.Option(min=1, help="Of one turn.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each contender.")] = 3,
    json_file: JsonFile = None,
    save: Save = None,
) -> None:
    """Tokens per second of a training step (forward, backward, clipping, AdamW), against peers in the same run.

    Peers and layouts take turns; a value is the median, a ratio above 1 is better than the peer.

    [bold]Example:[/bold] megapoly bench step --against transformers,megatron --layouts dp2,tp2,pp2
    """
    from megapoly.bench import report, step

    options = step.Options(
        layers=layers,
        hidden=hidden,
        heads=heads,
        sequence=sequence,
        vocabulary=vocabulary,
        micro_batch=micro_batch,
        threads=threads,
        device=device,
        steps=steps,
        repeats=repeats,
    )
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError("--device cuda: torch finds no GPU on this machine; leave it out to measure on the CPU")
    with Console(stderr=True).status("") as status:
        rows, gpu = step.measure(options, _names(against), _names(layouts), status.update)
    document = report.make_report(rows, gpu or report.cpu_name(), dataclasses.asdict(options))
    _tell(document, "step", report, json_file, save)


@bench_app.command("data")
def bench_data(
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, one turn: a trial, not a measurement.")] = False,
    text: Annotated[
        list[Path] | None, typer.Option(help=".jsonl or .jsonl.gz to encode; several times.  [default: generated]")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="SentencePiece model to encode with.  [default: a small one is trained]")
    ] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Turns of a side.  [default: 3; quick: 1]")] = None,
    folder: Annotated[Path | None, typer.Option(help="For files of a GB or two.  [default: the system's]")] = None,
    json_file: JsonFile = None,
    save: Save = None,
) -> None:
    """The data engine beside megatron-core in the same run: start-up, mixture, samples, files, encoding.

    Every turn is a process of its own on one core; a value is the median, a ratio above 1 is better than the peer.

    [bold]Example:[/bold] megapoly bench data --text data/en.jsonl.gz --tokenizer poly.model --json data.json
    """
    from megapoly.bench import data, data_report, report

    chosen = (data.QUICK if quick else {}) | ({} if repeats is None else {"repeats": repeats})
    options = data.Options(**chosen, text=tuple(text or ()), tokenizer=tokenizer, folder=folder)
    with Console(stderr=True).status("") as status:
        rows = data.measure(options, status.update)
    document = report.make_report(rows, report.cpu_name(), data_report.settings(options))
    _tell(document, "data", data_report, json_file, save)


@bench_app.command("checkpoint")
def bench_checkpoint(
    megabytes: Annotated[int, typer.Option(min=1, help="Of the state that is saved.")] = 2000,
    ranks: Annotated[int, typer.Option(min=1, help="That save.")] = 4,
    readers: Annotated[int, typer.Option(min=1, help="That load, each its rows or its columns.")] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of a side; the median counts.")] = 3,
    folder: Annotated[Path | None, typer.Option(help="On the disk to measure.  [default: the system's]")] = None,
    json_file: JsonFile = None,
    save: Save = None,
) -> None:
    """Saving and loading beside torch.distributed.checkpoint, the plain disk and a plain copy, in turns.

    [bold]Example:[/bold] megapoly bench checkpoint --folder runs --json checkpoint.json
    """
    from megapoly.bench import checkpoint, report

    options = checkpoint.Options(megabytes, ranks=ranks, readers=readers, repeats=repeats, folder=folder)
    with Console(stderr=True).status("") as status:
        rows = checkpoint.measure(options, status.update)
    document = report.make_report(rows, report.cpu_name(), checkpoint.settings(options))
    _tell(document, "checkpoint", checkpoint, json_file, save)


@bench_app.command("generate")
def bench_generate(
    family: Annotated[
        Literal["llama", "gpt2", "bloom"], typer.Option(help="Of the model, which has random weights.")
    ] = "llama",
    layers: Annotated[int, typer.Option(min=1)] = 12,
    hidden: Annotated[int, typer.Option(min=1)] = 768,
    heads: Annotated[int, typer.Option(min=1)] = 12,
    groups: Annotated[int, typer.Option(min=1, help="Key-value heads of llama.")] = 4,
    vocabulary: Annotated[int, typer.Option(min=1)] = 32000,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of every prompt.")] = 128,
    tokens: Annotated[int, typer.Option(min=2, help="That are generated.")] = 64,
    batches: Annotated[str, typer.Option(help="Numbers of prompts at a time.")] = "1,8",
    threads: Annotated[int, typer.Option(min=1)] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each side; the median counts.")] = 3,
    json_file: JsonFile = None,
    save: Save = None,
) -> None:
    """Greedy texts on the CPU in fp32 beside transformers' generate, and beside what the machine reads and multiplies.

    [bold]Example:[/bold] megapoly bench generate --batches 1,8 --json generate.json
    """
    from megapoly.bench import generate, report

    sizes = [int(name) if name.isdigit() else 0 for name in _names(batches)]
    if not sizes or not all(sizes):
        raise ConfigError(f"--batches {batches!r}: expected numbers with commas between them, such as 1,8")
    options = generate.Options(
        family, layers, hidden, heads, groups, vocabulary, prompt, tokens, sizes, threads, repeats
    )  # fmt: skip
    with Console(stderr=True).status("") as status:
        rows = generate.measure(options, status.update)
    document = report.make_report(rows, report.cpu_name(), generate.settings(options))
    _tell(document, "generate", generate, json_file, save)


@bench_app.command("kernels")
def bench_kernels(
    ops: Annotated[
        list[str] | None, typer.Argument(metavar="[OP]...", help="Such as norm or attention.  [default: all]")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small shapes, one model: a trial, not a measurement.")
    ] = False,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Also hidden sizes, head dimensions and lengths, drawn as curves.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.  [default: cuda where there is a GPU]")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of a CPU.  [default: torch's]")] = None,
    seconds: Annotated[int | None, typer.Option(min=1, help="End after so long, with the rows that are there.")] = None,
    picture: Annotated[
        Path | None,
        typer.Option(help="A file for one picture of all (.svg, .png, .pdf), or a folder, one for each op."),
    ] = None,
    json_file: JsonFile = None,
    save: Save = None,
) -> None:
    """The fused kernels beside PyTorch and others, by model: time, share of the machine's limit, memory.

    Without a GPU it measures what runs on the CPU. Contenders take turns; a value is the median, a ratio above 1 is
    better than the peer. --save also writes a picture for each op.

    [bold]Example:[/bold] megapoly bench kernels norm attention --picture kernels.svg
    """
    from megapoly.bench import kernels, report
    from megapoly.charts.figure import check_picture

    if picture is not None and picture.suffix:
        check_picture(picture)
    options = kernels.Options(tuple(ops or ()), quick, sweep, device, threads, seconds)
    rows: list[dict[str, Any]] = []
    with Console(stderr=True).status("limits of the machine") as status:
        for row in kernels.measure(options):
            rows.append(row)
            where = ", on the CPU, as no GPU is used" if kernels.on_cpu(rows[0]) else ""
            status.update(f"{len(rows)} rows{where}; {row['name']} {row['shape'] or ''}")
    name = report.cpu_name() if kernels.on_cpu(rows[0]) else rows[0]["device"]
    document = report.make_report(rows, name, kernels.settings(options))
    saved = _tell(document, "kernels", kernels, json_file, save)
    if saved:
        _draw_ops(document, saved.parent, f"{saved.stem}-", ".svg")
    if picture is not None and picture.suffix:
        _draw(rows, name, picture)
    elif picture is not None:
        _draw_ops(document, picture, "", ".svg")


def _draw_ops(document: dict[str, Any], folder: Path, before: str, suffix: str) -> None:
    """A picture for every op."""
    for op in dict.fromkeys(row["op"] for row in document["rows"] if "op" in row):
        rows = [row for row in document["rows"] if row.get("op") == op]
        _draw(rows, document["device"], folder / f"{before}{op.replace('_', '-')}{suffix}")


def _draw(rows: list[dict[str, Any]], device: str, path: Path) -> None:
    from megapoly.charts.figure import save_figure
    from megapoly.charts.kernels import draw_kernels

    save_figure(draw_kernels(rows, device), path)
    print(path)


@bench_app.command("rouge")
def bench_rouge(
    inputs: LanguageFiles,
    tasks: Annotated[int, typer.Option(min=1, help="Candidates; what the files lack is made of their words.")] = 15000,
    repeats: Annotated[int, typer.Option(min=1, help="Turns; the median counts.")] = 3,
    json_file: JsonFile = None,
    save: Save = None,
) -> None:
    """The similarity filter of instruct: a whole language's instructions into a growing pool, beside rouge-score.

    [bold]Example:[/bold] megapoly bench rouge es=multialpaca.es.jsonl.gz ja=multialpaca.ja.jsonl.gz
    """
    from megapoly.bench import report, rouge

    options = rouge.Options(language_files(inputs), tasks, repeats)
    with Console(stderr=True).status("") as status:
        rows = rouge.measure(options, status.update)
    document = report.make_report(rows, report.cpu_name(), rouge.settings(options))
    _tell(document, "rouge", rouge, json_file, save)


@bench_app.command("evaluate")
def bench_evaluate(
    data: Annotated[Path, typer.Option(help="Folder with xnli/, xcopa/ ...")],
    tasks: Annotated[str, typer.Option(help="Of the benchmark.")] = "xnli,xcopa,pawsx,xwinograd",
    limit: Annotated[int, typer.Option(min=1, help="Records of each task and language.")] = 8,
    family: Annotated[
        Literal["llama", "gpt2", "bloom"], typer.Option(help="Of the model, which has random weights.")
    ] = "llama",
    layers: Annotated[int, typer.Option(min=1)] = 12,
    hidden: Annotated[int, typer.Option(min=1)] = 768,
    heads: Annotated[int, typer.Option(min=1)] = 12,
    groups: Annotated[int, typer.Option(min=1, help="Key-value heads of llama.")] = 4,
    vocabulary: Annotated[int, typer.Option(min=300)] = 32000,
    positions: Annotated[int, typer.Option(min=64)] = 512,
    tokens: Annotated[int, typer.Option(min=1, help="Most of a generated text.")] = 32,
    batch: Annotated[int, typer.Option(min=1, help="Requests of the peer and texts at a time.")] = 16,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each side; the median counts.")] = 3,
    json_file: JsonFile = None,
    save: Save = None,
) -> None:
    """Records of benchmarks on the CPU in fp32 beside lm-evaluation-harness's class for transformers, in turns.

    [bold]Example:[/bold] megapoly bench evaluate --data benchmarks --tasks xnli,xcopa --json evaluate.json
    """
    from megapoly.bench import evaluate, report

    if not data.is_dir():
        raise ConfigError(f"--data {data}: is no folder; give one with xnli/, xcopa/ and so on")
    options = evaluate.Options(
        str(data.resolve()), _names(tasks), limit, family, layers, hidden, heads, groups, vocabulary, positions, tokens,
        batch, threads, repeats,
    )  # fmt: skip
    with Console(stderr=True).status("") as status:
        rows = evaluate.measure(options, status.update)
    document = report.make_report(rows, report.cpu_name(), evaluate.settings(options))
    _tell(document, "evaluate", evaluate, json_file, save)


class _Style(Protocol):
    """A module that shows the rows of one benchmark."""

    @property
    def HEADS(self) -> tuple[str, ...]: ...
    def cells(self, row: dict[str, Any], /) -> tuple[str, ...]: ...
    def notes(self, document: dict[str, Any], /) -> list[str]: ...
    def markdown(self, document: dict[str, Any], /) -> str: ...


def _tell(document: dict[str, Any], name: str, style: _Style, json_file: Path | None, save: Path | None) -> Path | None:
    """Print a report, and write it where that is wanted; the saved page."""
    from megapoly.bench import report

    table = make_table(*style.HEADS)
    for row in document["rows"]:
        table.add_row(*style.cells(row))
    print_whole(table)
    console = Console(highlight=False, soft_wrap=True)
    for line in style.notes(document):
        console.print(line)
    if json_file:
        report.write_json(document, json_file)
    saved = report.save(document, save, name, style.markdown(document)) if save else None
    if saved:
        print(saved)
    return saved


def _names(text: str) -> list[str]:
    """Of a comma-separated list, each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
