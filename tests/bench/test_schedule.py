"""Schedules on ranks that sleep. What is measured depends on the machine: only its bounds and its form are tested."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megapoly.bench import schedule
from megapoly.cli import main
from megapoly.pipeline.comparison import Compared, Refused, compare


def test_ranks_sleep_as_long_as_they_must(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    command = "bench schedule --pp 2 --microbatches 3 --milliseconds 4 --repeats 1 --json"
    with pytest.raises(SystemExit, match="0"):
        main([*command.split(), str(path)])
    rows = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    for name, formula in (("gpipe", 1 / 4), ("1f1b", 1 / 4), ("zero-bubble", 1 / 10), ("zero-bubble-v", 0.5 / 9.5)):
        makespan, bubble = rows[f"{name}: makespan"], rows[f"{name}: bubble"]
        # The simulator's longest path is one of sleeps, which no machine makes shorter.
        assert makespan["peer_value"] == pytest.approx(3 * 3 * 0.004 / (1 - formula))
        assert makespan["value"] >= makespan["peer_value"]
        assert makespan["ratio"] == pytest.approx(makespan["peer_value"] / makespan["value"])
        assert bubble["limit"] == pytest.approx(formula) == bubble["peer_value"]
        assert bubble["value"] == pytest.approx(1 - 3 * 3 * 0.004 / makespan["value"])
        assert bubble["value"] >= bubble["limit"]
    assert rows["interleaved"]["note"].endswith("the nearest that works is 2 or 4")
    assert rows["interleaved"]["note"] in capsys.readouterr().out


def test_a_row_of_the_table() -> None:
    one = next(each for each in compare(2, 4, forward=0.1, backward=0.2) if isinstance(each, Compared))
    measured = schedule.Measured(one, makespan=2.0, step=1.5)
    assert schedule.cells(measured) == ("gpipe", "1,500 ms", "2,000 ms", "0.750", "20.0%", "40.0%", "20.0%", "20.0%")
    assert len(schedule.cells(Refused("interleaved", "why"))) == len(schedule.HEADS)
