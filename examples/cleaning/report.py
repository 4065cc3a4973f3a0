"""What each step removed, as rows and as tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rules import STEPS

from megapoly.cli.common import make_table

UNITS = ("documents", "bytes")


@dataclass(frozen=True)
class Counts:
    """What was left of a file after the steps: ``left[step]`` has documents and bytes, ``left["input"]`` what it had.

    ``reasons[step]`` counts the documents that the step removed, by why.
    """

    language: str
    left: Mapping[str, Counter[str]]
    reasons: Mapping[str, Counter[str]]


def rows(files: Iterable[Counts]) -> list[dict[str, Any]]:
    """A row for each language, and one for all; ``removed`` by step, and by reason where the step has several."""
    left: dict[str, dict[str, Counter[str]]] = {}
    reasons: dict[str, dict[str, Counter[str]]] = {}
    for counts in files:
        for key in (counts.language, "all"):
            for step, found in counts.left.items():
                left.setdefault(key, {}).setdefault(step, Counter()).update(found)
            for step, found in counts.reasons.items():
                reasons.setdefault(key, {}).setdefault(step, Counter()).update(found)
    return [_row(key, left[key], reasons[key]) for key in sorted(left, key=lambda key: (key == "all", key))]


def _row(name: str, left: Mapping[str, Counter[str]], reasons: Mapping[str, Counter[str]]) -> dict[str, Any]:
    removed: dict[str, Any] = {}
    for before, step in zip(("input", *STEPS), STEPS):
        removed[step] = {unit: left[before][unit] - left[step][unit] for unit in UNITS}
        if reasons.get(step):
            removed[step]["reasons"] = dict(sorted(reasons[step].items()))
    ends = {
        name: {unit: left[step][unit] for unit in UNITS} for name, step in (("input", "input"), ("kept", "duplicates"))
    }
    return {"name": name, **ends, "removed": removed}


def show(found: Sequence[Mapping[str, Any]]) -> None:
    """Print a table of documents and one of MB; percentages are of what reached the step, and of the input."""
    console = Console()
    console = Console(width=max(console.width, 120))  # a row is one line, also in a file
    for unit, scale, form in (("documents", 1, ",.0f"), ("bytes", 1e6, ".2f")):
        table = make_table("documents removed" if unit == "documents" else "MB removed", "input", *STEPS, "kept")
        for row in found:
            cells, reached = [], row["input"][unit]
            for step in STEPS:
                gone = row["removed"][step][unit]
                cells.append(_share(gone, reached, scale, form))
                reached -= gone
            total = row["input"][unit]
            table.add_row(row["name"], f"{total / scale:{form}}", *cells, _share(reached, total, scale, form))
        console.print(table)


def _share(part: int, whole: int, scale: float, form: str) -> str:
    return f"{part / scale:{form}} {part / whole:4.0%}" if part else "-"
