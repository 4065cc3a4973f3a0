"""Benchmarks of kernels: ``python kernels/bench/run.py [OP ...]``. Prints a table, or, with --lines, rows as JSON.

On a machine without a GPU the CPU's columns alone: references in fp32 with few tokens, beside PyTorch eager.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import Bench, Row, limits, rows

OPS = (
    "activation", "norm", "attention", "cross_entropy", "linear_cross_entropy", "rotary", "dropout", "adamw",
)  # fmt: skip
HEADS = ("op", "shape", "dtype", "value", "of limit", "peer", "peer's", "ratio", "peak MB")
_WIDTHS = (36, 44, 9, 16, 9, 12, 12, 6, 9)


def measure(bench: Bench, ops: Sequence[str]) -> Iterator[Row]:
    """The machine's limits, and then a row for every case and peer."""
    machine = limits(bench)
    empty = dict.fromkeys(("peer", "peer_value", "ratio", "limit", "share_of_limit", "shape", "peak_bytes"))
    kind = str(bench.dtype).removeprefix("torch.")
    yield {"name": "copy", "value": machine.copy / 1e9, "unit": "GB/s", **empty, "dtype": "float32"}
    yield {"name": "matmul", "value": machine.matmul / 1e12, "unit": "TFLOP/s", **empty, "dtype": kind}
    for op in ops:
        for case in importlib.import_module(op).cases(bench):
            yield from rows(bench, case, machine)


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table; see :data:`HEADS`."""

    def number(value: float | None, text: str) -> str:
        return "" if value is None else format(value, text)

    peak = row["peak_bytes"]
    return (
        row["name"], row["shape"] or "", row["dtype"], f"{row['value']:,.4g} {row['unit']}",
        number(row["share_of_limit"], ".0%"), row["peer"] or "", number(row["peer_value"], ",.4g"),
        number(row["ratio"], ".2f") or ("failed" if "note" in row else ""), number(peak and peak / 1e6, ",.1f"),
    )  # fmt: skip


def _line(texts: Sequence[str]) -> str:
    return " ".join(text.ljust(width) for text, width in zip(texts, _WIDTHS)).rstrip()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def document(bench: Bench, found: Sequence[Row]) -> dict[str, Any]:
    versions = {"torch": torch.__version__, "python": sys.version.split()[0]}
    return {"device": device_name(bench.device), "versions": versions, "rows": list(found)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(OPS)}; all where none is given")
    parser.add_argument("--device", help="cuda where there is a GPU, otherwise cpu")
    parser.add_argument("--quick", action="store_true", help="small shapes, one model: a trial, not a measurement")
    parser.add_argument("--sweep", action="store_true", help="hidden sizes and head dimensions beside the models'")
    parser.add_argument("--threads", type=int, help="of a CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="for device, versions and rows")
    parser.add_argument("--lines", action="store_true", help="print every row as a line of JSON, and no table")
    given = parser.parse_args()
    unknown = sorted(set(given.ops) - set(OPS))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(OPS)}")
    if given.threads:
        torch.set_num_threads(given.threads)
    bench = Bench(
        torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu")), given.quick, given.sweep
    )
    if not given.lines:
        print(device_name(bench.device) + ("" if bench.gpu else ": no GPU is used, so these are the references' times"))
        print(_line(HEADS))
    found = []
    for row in measure(bench, given.ops or OPS):
        found.append(row)
        print(json.dumps(row) if given.lines else _line(cells(row)), flush=True)
    for row in found:
        if "note" in row and not given.lines:
            print(f"{row['name']}, {row['shape']}, {row['peer']}: {row['note']}")
    if given.json:
        given.json.write_text(json.dumps(document(bench, found), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
