"""Commands that have no test file of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megapoly.cli import main


def test_plan_schedule_draws_compares_and_writes_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="0"):
        main(["plan", "schedule", "--pp", "4", "--microbatches", "10", "--json", "rows.json"])
    out = capsys.readouterr().out
    assert "rank 3 | . . . 0 0'--1 1'" in out
    assert "zero-bubble-v    4.8%     4.8%     0.0%              4  31.5       120" in out
    assert "schedule interleaved: 10 micro-batches are not a multiple of 4 pipeline ranks" in out
    assert "Saved schedules-pp4-m10.svg" in out
    assert ElementTree.parse("schedules-pp4-m10.svg").getroot().tag.endswith("svg")
    rows = {row["name"]: row["value"] for row in json.loads(Path("rows.json").read_text())["rows"]}
    assert rows["1f1b: bubble"] == pytest.approx(3 / 13)  # (p - 1) / (m + p - 1)
    assert [rows[f"1f1b, rank {rank}: peak"] for rank in range(4)] == [4, 3, 2, 1]


def test_plan_schedule_takes_its_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["plan", "schedule", "--pp", "2", "--schedule", "interleaved", "--microbatches"]
    options = "--virtual 3 --forward 3 --backward 9 --communication 1 --picture a.svg --json a.json"
    with pytest.raises(SystemExit, match="0"):
        main([*command, "2", *options.split()])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.svg"]
    rows = {row["name"]: row["value"] for row in json.loads(Path("a.json").read_text())["rows"]}
    # Stages take 1 and 3. Micro-batch 0 passes the six and five messages, and turns; then micro-batch 1 turns, and goes
    # back through the six and five messages.
    assert rows["interleaved: time"] == (6 * 1 + 5) + 3 + 1 + (6 * 3 + 5)
    assert "3 stages per rank" in Path("a.svg").read_text()
    capsys.readouterr()
    for options, message in (
        ("3", "3 micro-batches are not a multiple of 2"),
        ("2 --forward -1", "forward takes -1.0, "),
    ):
        with pytest.raises(SystemExit, match="1"):
            main([*command, *options.split()])
        assert message in capsys.readouterr().err


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
