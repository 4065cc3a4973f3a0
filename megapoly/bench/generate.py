"""``megapoly bench generate``: prompts and tokens per second beside transformers, on the same weights. No torch."""

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
PEER = "transformers"
PROGRAM = "megapoly.bench.run_generate"
HEADS = ("name", "tokens/s", "limit", "of limit", PEER, "ratio", "spread")


@dataclass(frozen=True)
class Options:
    """A model with random weights in fp32, and what it generates, greedily.

    Attributes:
        groups: key-value heads of the llama family.
        prompt: tokens of every prompt.
        tokens: that are generated.
        batches: numbers of prompts at a time.
        threads: of the process.
        repeats: turns of each side; the median counts.
    """

    family: Literal["llama", "gpt2", "bloom"] = "llama"
    layers: int = 12
    hidden: int = 768
    heads: int = 12
    groups: int = 4
    vocabulary: int = 32000
    prompt: int = 128
    tokens: int = 64
    batches: Sequence[int] = (1, 8)
    threads: int = 2
    repeats: int = 3


@dataclass(frozen=True)
class Turn:
    """What the process measured for one batch in one turn; seconds, bytes and operations.

    Attributes:
        prefill, steps: seconds to the first token, and from there to the last, of megapoly and of the peer.
        bandwidth: bytes per second, of a product of a matrix with a vector.
        operations: FLOP per second, of a product of matrices.
        step_bytes: weights, keys and values that a step reads.
        prefill_flops: of the products of all prompts.
        same: share of the texts that are the peer's.
    """

    batch: int
    prefill: tuple[float, float]
    steps: tuple[float, float]
    bandwidth: float
    operations: float
    step_bytes: float
    prefill_flops: float
    same: float


def measure(options: Options, progress: Callable[[str], object] = lambda text: None) -> list[Row]:
    """Rows for the prompts and for the tokens after them, of every batch.

    Raises:
        ConfigError: transformers is not installed, or fewer than two tokens, which leave no step to measure.
        TrainingError: the process that measures did not finish.
    """
    if version(PEER) is None:
        raise ConfigError("bench generate compares with transformers, which is not installed: pip install transformers")
    if options.tokens < 2:
        raise ConfigError(f"--tokens {options.tokens} leaves no step to measure; set it to 2 or more")
    with tempfile.TemporaryDirectory(prefix="megapoly-bench-") as folder:
        turns = _run(options, Path(folder), progress)
    rows: list[Row] = []
    for batch in options.batches:
        mine = [turn for turn in turns if turn.batch == batch]
        rows += [_row("prefill", options, mine), _row("decode", options, mine)]
    return rows


def _run(options: Options, folder: Path, progress: Callable[[str], object]) -> list[Turn]:
    turns: list[Turn] = []
    progress("making the model")
    for line in read_lines(PROGRAM, json.dumps(dataclasses.asdict(options)), folder):
        turns.append(Turn(**line))
        progress(f"batch {turns[-1].batch}: turn {len(turns)} of {options.repeats * len(options.batches)}")
    return turns


def _row(name: str, options: Options, turns: Sequence[Turn]) -> Row:
    batch = turns[0].batch
    if name == "prefill":
        tokens = batch * options.prompt
        sides = [[tokens / turn.prefill[side] for turn in turns] for side in (0, 1)]
        limit = statistics.median(tokens * turn.operations / turn.prefill_flops for turn in turns)
    else:
        tokens = batch * (options.tokens - 1)
        sides = [[tokens / turn.steps[side] for turn in turns] for side in (0, 1)]
        limit = statistics.median(batch * turn.bandwidth / turn.step_bytes for turn in turns)
    own, theirs = sides
    value, peer = statistics.median(own), statistics.median(theirs)
    ratios = [a / b for a, b in zip(own, theirs)]
    return {
        "name": f"{name}, batch {batch}",
        "value": value,
        "unit": "tokens/s",
        "spread": [min(own), max(own)],
        "peer": PEER,
        "peer_value": peer,
        "peer_spread": [min(theirs), max(theirs)],
        "ratio": statistics.median(ratios),
        "ratio_spread": [min(ratios), max(ratios)],
        "limit": limit,
        "limit_of": "products of matrices" if name == "prefill" else "reading weights, keys and values",
        "share_of_limit": value / limit,
        "same_texts": min(turn.same for turn in turns),
    }


def settings(options: Options) -> dict[str, Any]:
    """Plain values for the report."""
    return {**dataclasses.asdict(options), "batches": ", ".join(map(str, options.batches))}


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table; see :data:`HEADS`."""
    return (
        row["name"],
        f"{row['value']:,.1f}",
        f"{row['limit']:,.1f}",
        f"{row['share_of_limit']:.0%}",
        f"{row['peer_value']:,.1f}",
        f"{row['ratio']:.2f}",
        "-".join(f"{value:.2f}" for value in row["ratio_spread"]),
    )


def notes(document: dict[str, Any]) -> list[str]:
    """Lines below the table: what ran on what, and what the columns mean."""
    lines = [report.origin(document), ", ".join(f"{key} {value}" for key, value in document["settings"].items())]
    lines.append(
        "The limit of a prefill is what the machine multiplies, that of a decode what it reads, measured in each turn;"
        " a ratio above 1 is better than the peer."
    )
    for row in document["rows"]:
        spread = f"{row['spread'][0]:,.1f} to {row['spread'][1]:,.1f}"
        theirs = f"{row['peer_spread'][0]:,.1f} to {row['peer_spread'][1]:,.1f}"
        same = f"; {row['same_texts']:.0%} of the texts are the same" if row["name"].startswith("decode") else ""
        lines.append(f"{row['name']}: {spread}, {PEER} {theirs} tokens/s{same}")
    return lines


def markdown(document: dict[str, Any]) -> str:
    """A page with the table, for a repository."""
    table: Sequence[str] = report.markdown_table(HEADS, [cells(row) for row in document["rows"]])
    return "\n".join(["# megapoly bench generate", "", *(f"- {line}" for line in notes(document)), "", *table]) + "\n"
