"""Benchmarks of kernels: their rows, on a CPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "kernels" / "bench"
KEYS = {
    "name", "value", "unit", "peer", "peer_value", "ratio", "limit", "share_of_limit", "shape", "dtype", "peak_bytes",
    "extra_bytes", "peer_peak_bytes", "peer_extra_bytes",
}  # fmt: skip


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FOLDER / "run.py"), "--device", "cpu", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_rows_of_a_quick_run(tmp_path: Path) -> None:
    done = run("--quick", "adamw", "rotary", "dropout", "activation", "--lines", "--json", str(tmp_path / "rows.json"))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert json.loads((tmp_path / "rows.json").read_text())["rows"] == rows
    assert all(row.keys() >= KEYS for row in rows)
    assert not [row for row in rows if "note" in row]
    copy, matmul, *measured = rows
    assert (copy["name"], matmul["name"]) == ("copy", "matmul")
    assert {"adamw", "adamw, masters", "rotary backward", "dropout + add forward", "bias-gelu backward"} <= {
        row["name"] for row in measured
    }
    for row in measured:
        assert row["limit"] == copy["value"]
        assert abs(row["share_of_limit"] - row["value"] / row["limit"]) < 1e-9
        assert row["peer"] is None or abs(row["ratio"] - row["value"] / row["peer_value"]) < 1e-9


def test_every_file_is_an_op_and_others_are_refused() -> None:
    done = run("nothing")
    assert done.returncode == 2
    assert "unknown: nothing" in done.stderr
    listed = done.stderr.split("there are ")[1].split()
    files = {path.stem for path in FOLDER.glob("*.py")} - {"common", "run"}
    assert {name.rstrip(",") for name in listed} == files


def test_memory_is_what_tensors_hold_at_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("common", FOLDER / "common.py")
    common = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "common", common)  # where dataclasses look for it
    spec.loader.exec_module(common)
    bench = common.Bench(torch.device("cpu"))
    x = torch.zeros(1 << 16)
    size, slack = x.nbytes, 1 << 10  # torch wraps numbers into small tensors

    def three_at_once() -> tuple[torch.Tensor, torch.Tensor]:
        a = x + 1
        b = torch.cat((a, a))
        del a
        return b, b[:100]  # of one storage

    for function, peak, extra in (
        (three_at_once, 3, 1), (lambda: None, 0, 0), (lambda: (x + 1).add_(1), 1, 0),
        (lambda: float((x + 1).sum()), 1, 1), (lambda: x.add_(1), 0, 0),
    ):  # fmt: skip
        found = common.memory(bench, function)
        assert peak * size <= found[0] <= peak * size + slack
        assert extra * size <= found[1] <= extra * size + slack
    assert capfd.readouterr().err == ""
