"""Benchmarks of kernels: ``python kernels/bench/run.py [OP ...]``. Prints a table, or, with --lines, rows as JSON.

On a machine without a GPU the CPU's columns alone: references in fp32 with few tokens, beside PyTorch eager.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import KEYS, SCALES, Bench, Row, limits, rows

OPS = (
    "activation", "norm", "attention", "cross_entropy", "linear_cross_entropy", "rotary", "dropout", "adamw",
)  # fmt: skip
HEADS = ("op", "shape", "dtype", "value", "of limit", "peer", "peer's", "ratio", "extra MB", "peer's")
_WIDTHS = (36, 44, 9, 16, 9, 12, 12, 6, 9, 9)


def measure(bench: Bench, ops: Sequence[str]) -> Iterator[Row]:
    """The machine's limits, and then a row for every case and peer."""
    machine = limits(bench)
    name = device_name(bench.device)
    for what, value, unit, kind in (
        ("copy", machine.copy, "GB/s", torch.float32), ("matmul", machine.matmul, bench.flops, bench.dtype),
    ):  # fmt: skip
        row = dict.fromkeys(KEYS) | {"name": what, "value": value / SCALES[unit], "unit": unit, "device": name}
        yield row | {"dtype": str(kind).removeprefix("torch.")}
    for op in ops:
        for case in importlib.import_module(op).cases(bench):
            yield from ({"op": op, **row} for row in rows(bench, case, machine))


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table; see :data:`HEADS`."""

    def number(value: float | None, text: str) -> str:
        return "" if value is None else format(value, text)

    extra, theirs = row["extra_bytes"], row["peer_extra_bytes"]
    return (
        row["name"], row["shape"] or "", row["dtype"], f"{row['value']:,.4g} {row['unit']}",
        number(row["share_of_limit"], ".0%"), row["peer"] or "", number(row["peer_value"], ",.4g"),
        number(row["ratio"], ".2f") or ("failed" if "note" in row else ""), number(extra and extra / 1e6, ",.1f"),
        number(theirs and theirs / 1e6, ",.1f"),
    )  # fmt: skip


def _line(texts: Sequence[str]) -> str:
    return " ".join(text.ljust(width) for text, width in zip(texts, _WIDTHS)).rstrip()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def document(bench: Bench, found: Sequence[Row]) -> dict[str, Any]:
    versions = {"torch": torch.__version__, "python": sys.version.split()[0]}
    return {"device": device_name(bench.device), "versions": versions, "rows": list(found)}


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, as training does: else what a CPU takes for new pages is measured above all."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(OPS)}; all where none is given")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is a GPU, otherwise cpu")
    parser.add_argument("--quick", action="store_true", help="small shapes, one model: a trial, not a measurement")
    parser.add_argument("--sweep", action="store_true", help="hidden sizes and head dimensions beside the models'")
    parser.add_argument("--threads", type=int, help="of a CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="for device, versions and rows")
    parser.add_argument("--lines", action="store_true", help="print every row as a line of JSON, and no table")
    given = parser.parse_args()
    unknown = sorted(set(given.ops) - set(OPS))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(OPS)}")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU on this machine; leave it out to measure on the CPU")
    if given.threads:
        torch.set_num_threads(given.threads)
    keep_freed_memory()
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
