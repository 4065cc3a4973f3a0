"""Kernels beside their peers: rows of ``kernels/bench``, whose run.py is a process of its own. No torch."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megapoly.bench import report
from megapoly.errors import ConfigError, TrainingError

Row = dict[str, Any]
HEADS = ("op", "shape", "dtype", "value", "of limit", "peer", "value", "ratio", "extra MB", "peer's MB")


@dataclass(frozen=True)
class Options:
    """What is measured; ``ops`` are files of ``kernels/bench``, all where empty.

    Attributes:
        quick: small shapes, one model: a trial, not a measurement.
        sweep: hidden sizes, head dimensions and lengths beside the models' shapes.
        device: cpu or cuda; cuda where there is a GPU if None.
        threads: of a CPU; torch's own choice if None.
        seconds: after which no more rows are taken; no limit if None.
    """

    ops: tuple[str, ...] = ()
    quick: bool = False
    sweep: bool = False
    device: str | None = None
    threads: int | None = None
    seconds: int | None = None


def folder() -> Path:
    """Of the benchmarks: ``kernels/bench`` of a checkout, ``megapoly_kernels/bench`` where a wheel is installed.

    Raises:
        ConfigError: neither is there.
    """
    found = importlib.util.find_spec("megapoly_kernels")
    package = Path(found.origin).parent if found and found.origin else Path("megapoly_kernels")
    places = [package.parent / "bench", package / "bench"]
    for place in places:
        if (place / "run.py").is_file():
            return place
    raise ConfigError(
        f"bench kernels: no run.py in {' or '.join(map(str, places))}, expected the benchmarks of kernels there;"
        " install megapoly again, or take a checkout"
    )


def known_ops() -> list[str]:
    """Names of all benchmarks."""
    return sorted({path.stem for path in folder().glob("*.py")} - {"common", "run", "__init__"})


def measure(options: Options) -> Iterator[Row]:
    """Rows as they are measured: limits of the machine, the first of which names its ``device``, then cases by peer.

    Raises:
        ConfigError: an op or a device that is not there.
        TrainingError: the benchmark ended with an error.
    """
    unknown = [op for op in options.ops if op not in known_ops()]
    if unknown:
        raise ConfigError(f"bench kernels {unknown[0]}: unknown; the known ones are {', '.join(known_ops())}")
    command = [sys.executable, str(folder() / "run.py"), "--lines", *options.ops]
    command += [f"--{name}" for name in ("quick", "sweep") if getattr(options, name)]
    for name in ("device", "threads"):
        if (value := getattr(options, name)) is not None:
            command += [f"--{name}", str(value)]
    end = None if options.seconds is None else time.monotonic() + options.seconds
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    yield json.loads(line)
                    if end is not None and time.monotonic() > end:
                        return
                process.wait()
            finally:
                process.kill()  # where the reader has stopped
        errors.seek(0)
        lines = [line.rstrip() for line in errors if line.strip()]
    if process.returncode == 2:  # of argparse
        raise ConfigError(f"bench kernels: {lines[-1].partition('error: ')[2]}")
    if process.returncode:
        raise TrainingError("\n".join([f"bench kernels ended with status {process.returncode}:", *lines[-12:]]))


def settings(options: Options) -> dict[str, Any]:
    """Plain values for the report."""
    values = dataclasses.asdict(options)
    values["ops"] = " ".join(options.ops or known_ops())
    return {name: value for name, value in values.items() if value is not None}


def on_cpu(row: Row) -> bool:
    """Whether the first row of all says that no GPU is used."""
    return bool(row["device"] == "CPU")


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table; see :data:`HEADS`."""
    share, ratio = row["share_of_limit"], row["ratio"]
    return (
        row["name"],
        row["shape"] or "",
        row["dtype"],
        f"{_number(row['value'])} {row['unit']}",
        "" if share is None else f"{share:.0%}",
        row["peer"] or "",
        "failed" if "note" in row else _number(row["peer_value"]),
        "" if ratio is None else f"{ratio:.2f}",
        _megabytes(row["extra_bytes"]),
        _megabytes(row["peer_extra_bytes"]),
    )


def notes(document: dict[str, Any]) -> list[str]:
    """Lines below the table: what ran on what, what the columns are, what failed."""
    lines = [report.origin(document), ", ".join(f"{key} {value}" for key, value in document["settings"].items())]
    if on_cpu(document["rows"][0]):
        lines.append(
            "No GPU was used: these are the CPU's columns, of the PyTorch code that runs there, in fp32 with few tokens"
        )
    lines.append(
        "A ratio above 1 is better than the peer; the limits are the first rows, a copy and a product of matrices;"
        " extra MB is the most memory in use beyond inputs and what a call returns"
    )
    lines += [
        f"{row['name']}, {row['shape']}, {row['peer']}: {row['note']}" for row in document["rows"] if "note" in row
    ]
    return lines


def markdown(document: dict[str, Any]) -> str:
    """A page with the table, for a repository."""
    lines = ["# megapoly bench kernels", "", *(f"- {line}" for line in notes(document)), ""]
    lines += report.markdown_table(HEADS, [cells(row) for row in document["rows"]])
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:,.1f}"
