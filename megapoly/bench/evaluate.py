"""``megapoly bench evaluate``: records per second beside lm-evaluation-harness's class for transformers. No torch."""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megapoly.bench import report
from megapoly.bench.process import read_lines
from megapoly.bench.race import version
from megapoly.errors import ConfigError

Row = dict[str, Any]
PEER = "lm-eval"
PROGRAM = "megapoly.bench.run_evaluate"
HEADS = ("task", "records/s", f"{PEER} hf", "ratio", "spread", "differ by")


@dataclass(frozen=True)
class Options:
    """A model with random weights in fp32, and what it is asked.

    Attributes:
        data: folder of benchmarks.
        tasks: names, each in all languages of the folder.
        limit: records of each task and language.
        groups: key-value heads of the llama family.
        positions: of the model.
        tokens: most of a generated text.
        batch: requests at a time of the peer, texts at a time of megapoly.
        threads: of the process.
        repeats: turns of each side; the median counts.
    """

    data: str
    tasks: Sequence[str] = ("xnli", "xcopa", "pawsx", "xwinograd")
    limit: int = 8
    family: Literal["llama", "gpt2", "bloom"] = "llama"
    layers: int = 12
    hidden: int = 768
    heads: int = 12
    groups: int = 4
    vocabulary: int = 32000
    positions: int = 512
    tokens: int = 32
    batch: int = 16
    threads: int = 2
    repeats: int = 3


@dataclass(frozen=True)
class Turn:
    """What the process measured for one task in one turn.

    Attributes:
        seconds: of megapoly and of the peer.
        apart: the most by which two likelihoods differ, in nats; of texts the share that are not the same.
    """

    task: str
    records: int
    seconds: tuple[float, float]
    apart: float


def measure(options: Options, progress: Callable[[str], object] = lambda text: None) -> list[Row]:
    """A row for each task.

    Raises:
        ConfigError: a package of the peer is not installed.
        TrainingError: the process that measures did not finish.
    """
    for name in ("lm_eval", "transformers", "accelerate"):
        if version(name) is None:
            raise ConfigError(
                f"bench evaluate compares with lm-eval's class hf, which needs {name}: pip install {name}"
            )
    with tempfile.TemporaryDirectory(prefix="megapoly-bench-") as folder:
        turns = _run(options, Path(folder), progress)
    return [_row(task, [turn for turn in turns if turn.task == task]) for task in options.tasks]


def _run(options: Options, folder: Path, progress: Callable[[str], object]) -> list[Turn]:
    turns: list[Turn] = []
    progress("making the model")
    for line in read_lines(PROGRAM, json.dumps(dataclasses.asdict(options)), folder):
        turns.append(Turn(**line))
        progress(f"{turns[-1].task}: turn {len(turns)} of {options.repeats * len(options.tasks)}")
    return turns


def _row(task: str, turns: Sequence[Turn]) -> Row:
    own, theirs = ([turn.records / turn.seconds[side] for turn in turns] for side in (0, 1))
    ratios = [a / b for a, b in zip(own, theirs)]
    return {
        "name": task,
        "value": statistics.median(own),
        "unit": "records/s",
        "spread": [min(own), max(own)],
        "peer": PEER,
        "peer_value": statistics.median(theirs),
        "peer_spread": [min(theirs), max(theirs)],
        "ratio": statistics.median(ratios),
        "ratio_spread": [min(ratios), max(ratios)],
        "records": turns[0].records,
        "apart": max(turn.apart for turn in turns),
    }


def settings(options: Options) -> dict[str, Any]:
    """Plain values for the report."""
    return {**dataclasses.asdict(options), "data": Path(options.data).name, "tasks": ", ".join(options.tasks)}


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table; see :data:`HEADS`."""
    return (
        row["name"],
        f"{row['value']:,.2f}",
        f"{row['peer_value']:,.2f}",
        f"{row['ratio']:.2f}",
        "-".join(f"{value:.2f}" for value in row["ratio_spread"]),
        f"{row['apart']:.1g}",
    )


def notes(document: dict[str, Any]) -> list[str]:
    """Lines below the table: what ran on what, and what the columns mean."""
    return [
        report.origin(document),
        ", ".join(f"{key} {value}" for key, value in document["settings"].items()),
        "A record is a question with all its options, or a text; a ratio above 1 is better than the peer, and the last"
        " column is the most by which two log-likelihoods differ, in nats, or the share of texts that do.",
    ]


def markdown(document: dict[str, Any]) -> str:
    """A page with the table, for a repository."""
    table: Sequence[str] = report.markdown_table(HEADS, [cells(row) for row in document["rows"]])
    return "\n".join(["# megapoly bench evaluate", "", *(f"- {line}" for line in notes(document)), "", *table]) + "\n"
