"""What a benchmark ran on, and its rows as JSON and as a Markdown table. No torch."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megapoly import __version__
from megapoly.bench.race import version
from megapoly.data.files import write_whole

Row = dict[str, Any]
HEADS = ("name", "tokens/s", "of limit", "peer", "tokens/s", "ratio", "spread")


def make_report(rows: Sequence[Row], device: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The ``--json`` document: device, versions, settings, date, commit where this is a checkout, rows."""
    versions = {name: version(name) for name in ("torch", "transformers", "megatron-core")}
    return {
        "device": device,
        "versions": {"megapoly": __version__, "python": platform.python_version(), **versions},
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "settings": settings,
        "rows": list(rows),
    }


def cpu_name() -> str:
    """Model and number of the cores that this process may use."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        cores = os.cpu_count() or 1
    name = platform.processor() or platform.machine()
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        name = found[1].strip() if found else name
    except OSError:
        pass
    return f"{name}, {cores} cores"


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table; see :data:`HEADS`. The limit's value is what it allows."""
    limit = "tokens_per_second" in row
    value = row["tokens_per_second"] if limit else row["value"]
    off = (row["spread"][1] - row["spread"][0]) / 2 / row["value"]
    return (
        row["name"],
        f"{value:,.0f} ±{off:.0%}",
        "" if limit else f"{row['share_of_limit']:.0%}",
        row.get("peer") or "",
        "" if row.get("peer_value") is None else f"{row['peer_value']:,.0f}",
        "" if row.get("ratio") is None else f"{row['ratio']:.2f}",
        "" if row.get("ratio") is None else "-".join(f"{value:.2f}" for value in row["ratio_spread"]),
    )


def origin(document: dict[str, Any]) -> str:
    """On what it ran, with which versions, when."""
    versions = ", ".join(f"{name} {number}" for name, number in document["versions"].items() if number)
    where = [document["device"], versions, document["date"], *filter(None, [document["commit"]])]
    return "; ".join(where)


def notes(document: dict[str, Any]) -> list[str]:
    """Lines below the table: what ran, on what, what is missing, and whether the machine was busy."""
    rows, settings = document["rows"], document["settings"]
    lines = [origin(document), ", ".join(f"{key} {value}" for key, value in settings.items())]
    described = set()
    for row in rows:
        if "tokens_per_second" in row:
            lines.append(
                f"{row['name']}: {row['value']:,.0f} GFLOP/s, at which the products of a step would make"
                f" {row['tokens_per_second']:,.0f} tokens/s"
            )
            if row["processor_share"] < 0.9:
                lines.append(
                    f"The machine was busy: {row['name']} got {row['processor_share']:.0%} of its threads' time."
                    " Run this again when nothing else runs."
                )
        elif row["name"] not in described:
            described.add(row["name"])
            lines.append(f"{row['name']}: {row['work']}")
            if "tflops" in row:
                mfu = f", MFU {row['mfu']:.1%}" if "mfu" in row else ""
                lines.append(
                    f"{row['name']}: {row['tflops']:,.1f} TFLOP/s a GPU{mfu}; at most {row['peak_bytes'] / 1e9:,.1f} GB"
                )
        if "note" in row:
            lines.append(f"{row['name']}, {row['peer']}: {row['note']}")
    return lines


def markdown(document: dict[str, Any]) -> str:
    """A page with the table, for a repository."""
    lines = ["# megapoly bench step", "", *(f"- {line}" for line in notes(document)), ""]
    lines += markdown_table(HEADS, [cells(row) for row in document["rows"]])
    return "\n".join(lines) + "\n"


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [_line(heads), _line(("---", *("---:" for _ in heads[1:]))), *(_line(row) for row in rows)]


def save(document: dict[str, Any], folder: Path, name: str, page: str) -> Path:
    """Write ``NAME-DEVICE-DATE.json`` and, with the Markdown ``page``, ``.md`` into ``folder``; the path of the latter.

    Raises:
        DataError: a file cannot be written.
    """
    device = re.sub(r"[^a-z0-9]+", "-", document["device"].lower()).strip("-")
    path = folder / f"{name}-{device}-{document['date']}.md"
    write_json(document, path.with_suffix(".json"))
    write_whole(path, page.encode())
    return path


def write_json(document: dict[str, Any], path: Path) -> None:
    write_whole(path, (json.dumps(document, indent=1) + "\n").encode())


def _line(texts: Sequence[str]) -> str:
    return "| " + " | ".join(texts) + " |"


def _commit() -> str | None:
    """Of the checkout that this file is in, with ``-dirty`` where files differ from it."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
