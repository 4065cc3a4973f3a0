"""The command: what it prints, writes and measures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megapoly.cli import main
from megapoly.config import load
from megapoly.plan.memory import COMPONENTS, predict

POLYLM = "examples/polylm/1.7b.toml"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit, match="0"):
        main(["plan", "memory", *arguments])
    return capsys.readouterr().out


def test_the_table_and_the_rows_are_the_prediction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = ["--set", "layout.pp=2", "--set", "layout.tp=2", "--set", "layout.micro_batch=1"]
    out = run(capsys, POLYLM, "--ranks", "8", *sets, "--json", str(tmp_path / "rows.json"))
    expected = predict(load(POLYLM, ["layout.pp=2", "layout.tp=2", "layout.micro_batch=1"]).on(8))
    rows = {row["name"]: row["value"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert rows == {
        f"rank {rank}: {name}": getattr(usage, name)
        for rank, usage in enumerate(expected)
        for name in (*COMPONENTS, "total")
    }
    line = next(line for line in out.splitlines() if line.strip().startswith("rank 1 "))
    assert [float(x) for x in line.split()[2:]] == pytest.approx(
        [getattr(expected[1], name) / 1e9 for name in (*COMPONENTS, "total")], abs=0.01
    )
    assert "layers by stage [16, 8]" in out
    assert "optimizer x 12 / dp 2" in out


def test_a_limit_names_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    sets = ["--set", "layout.tp=1", "--set", "layout.micro_batch=4", "--set", "layout.recompute='none'"]
    assert "fits into 140 GB" in run(capsys, POLYLM, *sets, "--limit-gb", "140")
    out = run(capsys, POLYLM, *sets, "--limit-gb", "40")
    assert "does not fit into 40 GB; on 1 ranks would:" in out
    assert "--set layout.micro_batch=" in out
    assert "nor does another layout of 1 ranks; take more" in run(capsys, POLYLM, *sets, "--limit-gb", "20")


def test_a_measured_step_stands_below(toml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is fixed weighs much in so small a model, but not in weights, gradients, optimizer and logits."""
    out = run(capsys, str(toml), "--measure", "--json", str(tmp_path / "rows.json"))
    assert "measured" in out
    for row in json.loads((tmp_path / "rows.json").read_text())["rows"]:
        if row["name"].split(": ")[1] in ("weights", "gradients", "optimizer", "logits"):
            assert row["measured"] == pytest.approx(row["value"], rel=0.1)
            assert row["measured_share"] == pytest.approx(row["measured"] / row["value"])
