"""Commands that have no test file of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megapoly.cli import main


def test_plan_schedule_draws_and_writes_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "schedule", "--pp", "4", "--microbatches", "8", "--json", str(tmp_path / "rows.json")]
    with pytest.raises(SystemExit, match="0"):
        main(arguments)
    assert "rank 3 | . . . 0 0'--1 1'" in capsys.readouterr().out
    rows = {row["name"]: row["value"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert rows["bubble"] == pytest.approx(3 / 11)  # (p - 1) / (m + p - 1)
    assert [rows[f"rank {rank}: live activations"] for rank in range(4)] == [4, 3, 2, 1]


def test_an_unknown_schedule_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="1"):
        main(["plan", "schedule", "--pp", "2", "--microbatches", "2", "--schedule", "gpie"])
    assert "unknown schedule 'gpie'; known: gpipe, 1f1b" in capsys.readouterr().err


def test_help_loads_neither_torch_nor_numpy() -> None:
    heavy = {"torch", "numpy", "sentencepiece"}
    code = f"import sys, megapoly.cli; assert not {heavy} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_config_that_only_the_second_machine_lacks_is_said_there(tmp_path: Path) -> None:
    path = tmp_path / "nothing.toml"
    run = subprocess.run(
        [sys.executable, "-m", "megapoly", "train", str(path)],
        capture_output=True,
        text=True,
        env={"RANK": "8", "WORLD_SIZE": "16", "LOCAL_RANK": "0"},
    )
    assert run.returncode == 1
    assert run.stderr == f"megapoly: {path}: cannot be read (No such file or directory); give the path of a TOML file\n"
