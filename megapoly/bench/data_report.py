"""The rows of ``megapoly bench data`` for people. No torch."""

from __future__ import annotations

import dataclasses
from typing import Any

from megapoly.bench import report
from megapoly.bench.data import Options

Row = dict[str, Any]
HEADS = ("name", "unit", "megapoly", "wanted", "megatron-core", "ratio", "of limit")


def settings(options: Options) -> dict[str, Any]:
    """Plain values for the report. Paths stay out of it."""
    values = dataclasses.asdict(options)
    del values["folder"]
    values["text"] = len(options.text) or "generated"
    values["tokenizer"] = options.tokenizer.name if options.tokenizer else "trained here"
    return values


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table; see :data:`HEADS`."""
    wanted = "" if row["wanted"] is None else ("<= " if row["unit"] in ("s", "ms") else ">= ") + number(row["wanted"])
    return (
        row["name"],
        row["unit"],
        number(row["value"]),
        wanted,
        number(row["peer_value"]),
        number(row["ratio"]),
        f"{row['share_of_limit']:.0%}" if "share_of_limit" in row else "",
    )


def number(value: float | None) -> str:
    """With three digits at least; nothing for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def notes(document: dict[str, Any]) -> list[str]:
    """Lines below the table: what ran on what, the figures that have no column, what is missing."""
    values = ", ".join(f"{key} {value}" for key, value in document["settings"].items())
    lines = [report.origin(document), values]
    for row in document["rows"]:
        found = []
        if row["memory_mib"] is not None:
            wanted = "" if row["wanted_memory_mib"] is None else f", {row['wanted_memory_mib']} wanted at most"
            theirs = "" if row["peer_memory_mib"] is None else f"; {row['peer']}'s by {number(row['peer_memory_mib'])}"
            found.append(f"the memory of the process grows by {number(row['memory_mib'])} MiB{wanted}{theirs}")
        if "peer_disk_mb" in row:
            found.append(f"{row['peer']} leaves a cache of {number(row['peer_disk_mb'])} MB, megapoly none")
        if "value_1e12" in row:
            memory = "" if row["memory_1e12"] is None else f" and {number(row['memory_1e12'])} MiB"
            found.append(f"10^12 samples take {number(row['value_1e12'])} ms{memory}")
        if "times_slower" in row:
            found.append(f"{row['times_slower']:.2f} times slower than samples; wanted 1.3 at most")
        if "value_two_cores" in row:
            wanted = row["wanted_two_cores"]
            found.append(f"{number(row['value_two_cores'])} MB/s on two cores; wanted {wanted}")
        if "limit" in row:
            found.append(f"the limit is {row['limit_of']}, {number(row['limit'])} {row['unit']}")
        if "note" in row:
            found.append(row["note"])
        lines += [f"{row['name']}: {'; '.join(found)}"] if found else []
    return lines


def markdown(document: dict[str, Any]) -> str:
    """A page with the table, for a repository."""
    lines = ["# megapoly bench data", "", *(f"- {line}" for line in notes(document)), ""]
    lines += report.markdown_table(HEADS, [cells(row) for row in document["rows"]])
    return "\n".join(lines) + "\n"
