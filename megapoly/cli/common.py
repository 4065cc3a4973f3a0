"""What the commands share: settings, options, tables, bars, and files of rows."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from megapoly import __version__

if TYPE_CHECKING:
    from rich.progress import Progress

    from megapoly.data.sidecar import Sidecar

SETTINGS: dict[str, Any] = {"no_args_is_help": True, "rich_markup_mode": "rich", "pretty_exceptions_enable": False}

Prefixes = Annotated[list[Path], typer.Argument(metavar="PREFIX...", help="Path without .bin, .idx, .json.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what exists.")]

# How `data build` and `data merge` put documents together.
Deduplicate = Annotated[
    bool, typer.Option("--deduplicate", help="Keep the first of documents with the same tokens, training ones first.")
]
Shuffle = Annotated[
    int | None, typer.Option(metavar="SEED", help="Shuffle the documents; takes the size of the tokens on disk.")
]
Pack = Annotated[
    int, typer.Option(metavar="LENGTH", help="Best-fit packs of so many tokens, as train.sequence; 0: a stream.")
]
MemoryMb = Annotated[
    int, typer.Option(help="Bound on what the three above hold; 23 bytes a document do without further passes.")
]

# How `generate` and `evaluate` load a model and share it out.
OwnTokenizer = Annotated[
    Path | None, typer.Option(help="SentencePiece model or tokenizer.json.  [default: the model's own]")
]
Dtype = Annotated[
    Literal["fp32", "bf16", "fp16", "fp64"] | None, typer.Option(help="Of the weights.  [default: as stored]")
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: a GPU where there are any.")]
TensorRanks = Annotated[int, typer.Option(min=1, help="Ranks that share every layer, under torchrun.")]
PipelineRanks = Annotated[int, typer.Option(min=1, help="Ranks that share the layers out, under torchrun.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Texts at a time, of each replica of the model.")]

JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the rows to this file.")]


def count(number: int, noun: str) -> str:
    """As in 1 file, 2 files."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def make_table(first: str, *columns: str) -> Table:
    table = Table(first, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def print_whole(table: Table) -> None:
    """Print a table in its own width, even where that is more than the terminal's."""
    console = Console(highlight=False)
    needed = console.measure(table, options=console.options.update(width=1000)).maximum
    Console(highlight=False, width=max(console.width, needed)).print(table)


@contextmanager
def make_bar(name: str, speed: str | None = None) -> Iterator[tuple[Progress, Any]]:
    """A bar of bytes. Of their speed too; or ``speed`` names the field of the task that holds what to show instead."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    shown = f"{{task.fields[{speed}]}}" if speed else TransferSpeedColumn()
    fields: dict[str, Any] = {speed: ""} if speed else {}
    columns = ("{task.description}", BarColumn(), DownloadColumn(), shown, TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield bar, bar.add_task(name, total=None, **fields)


def describe_assembly(made: Sidecar) -> str:
    """What was left out of a dataset and how it was packed, as lines to print; empty where it is a plain stream."""
    lines = []
    if made.duplicates.documents:
        gone = made.duplicates
        lines.append(f"  left out: {gone.documents:,} duplicates with {gone.tokens:,} tokens")
    if made.padding is not None:
        packs, padding = made.tokens // made.pack, made.padding
        lines.append(
            f"  {packs:,} packs of {made.pack:,} tokens, {padding.tokens / made.tokens:.3%} of them padding in"
            f" {padding.documents:,} packs, each a document; {padding.cut:,} documents longer than a pack were cut, and"
            " each piece is one"
        )
    return "\n".join(lines)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    from megapoly.data.files import write_whole

    device = f"{platform.machine()} {platform.system()}"
    versions = {"megapoly": __version__, "python": platform.python_version()}
    write_whole(path, json.dumps({"device": device, "versions": versions, "rows": list(rows)}, indent=1).encode())
