"""``megapoly bench checkpoint``: saving and loading beside torch.distributed.checkpoint and the disk. No torch."""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megapoly.bench import report
from megapoly.config import Model
from megapoly.errors import ConfigError, TrainingError
from megapoly.models.cost import parameter_count

Row = dict[str, Any]
Progress = Callable[[str], object]
PEER = "torch.distributed.checkpoint"
PROGRAM = "megapoly.bench.run_checkpoint"
HEADS = ("name", "unit", "megapoly", "wanted", "DCP", "ratio", "of limit")


@dataclass(frozen=True)
class Options:
    """Sizes of the benchmark.

    Attributes:
        megabytes: of the state, in ``matrices`` of float32.
        ranks: that save, each its rows.
        readers: that load, rows or columns.
        repeats: turns of each side; the median counts.
        folder: on the disk to measure; the system's for temporary files where not given.
    """

    megabytes: int = 2000
    matrices: int = 16
    ranks: int = 4
    readers: int = 2
    repeats: int = 3
    folder: Path | None = None


@dataclass(frozen=True)
class Job:
    """What every rank of a group does: its ``turns``, one after another, with matrices of ``rows`` x ``columns``."""

    folder: str
    store: str
    ranks: int
    matrices: int
    rows: int
    columns: int
    turns: list[str]


@dataclass(frozen=True)
class Figure:
    """A row to be: ``limit`` is the turn of what the machine allows, of which a ``share`` is wanted."""

    name: str
    limit: str | None = None
    share: float | None = None
    milliseconds: bool = False


SAVES = (Figure("save", "disk_write", 0.9), Figure("async_stall", "copy", milliseconds=True))
LOADS = (Figure("load_rows"), Figure("load_columns"), Figure("load_cold", "disk_read", 0.9))
CONVERTS = (Figure("convert", "disk_copy", 0.8),)


def converted_model(layers: int, elements: int) -> Model:
    """A LLaMA of about as many parameters: 10 hidden^2 a layer, and 8 hidden^2 of vocabularies."""
    hidden = max(4, int((elements / (10 * layers + 8)) ** 0.5) // 4 * 4)
    return Model(
        layers=layers, hidden=hidden, heads=hidden // 4, ffn=2 * hidden, vocabulary=4 * hidden, positions=2048,
        norm="rms", position="rope", activation="swiglu", biases=False, tied=False,
    )  # fmt: skip


def measure(options: Options, progress: Progress = lambda text: None) -> list[Row]:
    """The rows save, async_stall, load_rows, load_columns, load_cold, convert.

    Args:
        progress: called with a line of text before every turn.

    Raises:
        ConfigError: a size that cannot be split over the ranks.
        TrainingError: a rank did not finish.
    """
    both = options.ranks * options.readers
    columns = both * max(1, round((options.megabytes * 1e6 / 4 / options.matrices) ** 0.5 / 2 / both))
    rows = both * int(options.megabytes * 1e6 / 4 / options.matrices / columns / both)
    if rows == 0:
        raise ConfigError(f"--megabytes {options.megabytes} is too little for {options.matrices} matrices; raise it")
    result: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="megapoly-bench-", dir=options.folder) as folder:
        for figures, ranks in ((SAVES, options.ranks), (LOADS, options.readers), (CONVERTS, 1)):
            once = [turn for figure in figures for turn in (figure.limit, figure.name, f"peer {figure.name}") if turn]
            store = str(Path(folder) / f"store-{ranks}-{figures[0].name}")
            turns = once * options.repeats
            job = Job(folder, store, ranks, options.matrices, rows, columns, turns)
            seconds = _run(job, Path(folder), progress)
            size = 4.0 * rows * columns * options.matrices
            if figures == CONVERTS:
                size = 4.0 * parameter_count(converted_model(options.matrices, rows * columns * options.matrices))
            result += [_row(figure, seconds, size, ranks) for figure in figures]
    return result


def _run(job: Job, folder: Path, progress: Progress) -> dict[str, list[float]]:
    """Seconds of every turn, by its name."""
    log = folder / "log"
    seconds: dict[str, list[float]] = {turn: [] for turn in job.turns}
    text = json.dumps(dataclasses.asdict(job))
    with log.open("w") as errors:
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", PROGRAM, text, str(rank)], stdout=subprocess.PIPE, stderr=errors, text=True
            )
            for rank in range(job.ranks)
        ]
        try:
            for turn in job.turns:
                progress(f"{turn}, turn {len(seconds[turn]) + 1}")
                pipe = processes[0].stdout
                assert pipe is not None
                line = pipe.readline()
                if not line:
                    break
                seconds[turn].append(json.loads(line)["seconds"])
            codes = [process.wait(60) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
                if process.stdout is not None:
                    process.stdout.close()
    if any(codes):
        raise TrainingError(f"benchmark: a rank failed: {' '.join(log.read_text(errors='replace').split()[-60:])}")
    return seconds


def _row(figure: Figure, seconds: dict[str, list[float]], size: float, ranks: int) -> Row:
    def values(turn: str) -> list[float]:
        return [1e3 * each if figure.milliseconds else size / 1e6 / each for each in seconds[turn]]

    own, theirs = values(figure.name), values(f"peer {figure.name}")
    value, peer = statistics.median(own), statistics.median(theirs)
    row: Row = {
        "name": figure.name,
        "value": value,
        "unit": "ms" if figure.milliseconds else "MB/s",
        "spread": [min(own), max(own)],
        "peer": PEER,
        "peer_value": peer,
        "peer_spread": [min(theirs), max(theirs)],
        "ratio": peer / value if figure.milliseconds else value / peer,
        "ranks": ranks,
        "megabytes": size / 1e6,
        "wanted": None,
    }
    if figure.limit is not None:
        limit = statistics.median(values(figure.limit))
        row["limit"], row["limit_of"] = limit, figure.limit
        row["share_of_limit"] = limit / value if figure.milliseconds else value / limit
        row["wanted"] = limit * (figure.share or 1.0)
    elif not figure.milliseconds:
        row["wanted"] = peer
    return row


def settings(options: Options) -> dict[str, Any]:
    """Plain values for the report. Paths stay out of it."""
    values = dataclasses.asdict(options)
    del values["folder"]
    return values


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table; see :data:`HEADS`."""
    return (
        row["name"],
        row["unit"],
        f"{row['value']:,.0f}",
        f"{'<=' if row['unit'] == 'ms' else '>='} {row['wanted']:,.0f}",
        f"{row['peer_value']:,.0f}",
        f"{row['ratio']:.2f}",
        f"{row['share_of_limit']:.0%}" if "share_of_limit" in row else "",
    )


def notes(document: dict[str, Any]) -> list[str]:
    """Lines below the table: what ran on what, and what the columns mean."""
    lines = [report.origin(document), ", ".join(f"{key} {value}" for key, value in document["settings"].items())]
    lines.append("wanted: a share of the limit, or, where there is none, what DCP does; a ratio above 1 is better")
    for row in document["rows"]:
        spread = f"{row['spread'][0]:,.0f} to {row['spread'][1]:,.0f}"
        theirs = f"{row['peer_spread'][0]:,.0f} to {row['peer_spread'][1]:,.0f}"
        limit = f"; the limit is {row['limit_of']}, {row['limit']:,.0f} {row['unit']}" if "limit" in row else ""
        lines.append(f"{row['name']}: {row['ranks']} ranks; {spread}, DCP {theirs} {row['unit']}{limit}")
    return lines


def markdown(document: dict[str, Any]) -> str:
    """A page with the table, for a repository."""
    table: Sequence[str] = report.markdown_table(HEADS, [cells(row) for row in document["rows"]])
    return "\n".join(["# megapoly bench checkpoint", "", *(f"- {line}" for line in notes(document)), "", *table]) + "\n"
