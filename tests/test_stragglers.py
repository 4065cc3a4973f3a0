"""The straggler report: its arithmetic, and a rank that is slowed down."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megapoly import config
from megapoly.context import ParallelContext
from megapoly.engine import Engine
from megapoly.mesh import Mesh
from megapoly.run import prepare
from megapoly.stragglers import NOTABLE, RankTime, summarise
from megapoly.trainer import train
from tests.corpus import lines
from tests.ranks import run_ranks


def test_the_report_of_known_times() -> None:
    """pp 2 x dp 2: ranks 0 and 1 hold stages 0 and 3, ranks 2 and 3 stages 1 and 2."""
    times = [
        RankTime({0: 1.0, 3: 2.0}, 0.5),
        RankTime({0: 1.2, 3: 2.2}, 0.5),
        RankTime({1: 1.5, 2: 1.5}, 0.4),
        RankTime({1: 1.5, 2: 4.0}, 1.5),
    ]
    report = summarise(times, Mesh(dp=2, pp=2), step=200, steps=100)
    assert (report.rank, report.dp, report.pp, report.tp, report.stage) == (3, 1, 1, 0, 2)
    assert report.rank_seconds == pytest.approx([3.5, 3.9, 3.4, 7.0])
    assert report.median == pytest.approx(3.7)
    assert report.over_median == pytest.approx(7.0 / 3.7)
    assert report.stage_seconds == pytest.approx([1.1, 1.5, 2.75, 2.1])
    assert report.slowest_stage == 2
    assert str(report) == (
        "slowest of the last 100 steps: rank 3 (dp 1, pp 1, tp 0), computing for 7.00 s, 1.89 x the median, most of it"
        " in stage 2; slowest stage: 2"
    )


def slowed(rank: int, size: int, toml: Path, run: Path) -> str:
    """Train with rank 1 sleeping in its optimizer; what was printed."""
    pp_tp = ["layout.pp=2", "layout.tp=2", "validation.windows=0", "log.stragglers_every=3"]
    settings = config.load(toml, [f"train.directory={str(run)!r}", *pp_tp]).on(size)
    context = ParallelContext.create(settings.mesh)
    console = Console(quiet=rank != 0, record=True, width=400, file=open("/dev/null", "w"))  # noqa: SIM115
    prepared = prepare(settings, context)
    if rank == 1:
        slow_down(prepared.engine)
    train(prepared, console, stop_step=7)
    context.close()
    return console.export_text() if rank == 0 else ""


def slow_down(engine: Engine) -> None:
    step = engine.optimizer.step

    def slow(*args: Any) -> None:
        time.sleep(0.5)
        step(*args)

    engine.optimizer.step = slow  # type: ignore[method-assign]


def test_a_slow_rank_is_named(toml: Path, tmp_path: Path) -> None:
    printed = run_ranks(4, slowed, toml, tmp_path / "run")[0]
    events = lines(tmp_path / "run", "stragglers")
    assert [(event["step"], event["steps"]) for event in events] == [(3, 3), (6, 3)]
    last = events[1]  # the first has what each rank does once
    assert (last["rank"], last["dp"], last["pp"], last["tp"], last["stage"]) == (1, 0, 0, 1, 0)
    assert last["seconds"] == last["rank_seconds"][1] > 1.5  # it slept for so long
    assert last["over_median"] == pytest.approx(last["seconds"] / last["median"])
    assert last["over_median"] >= NOTABLE
    assert len(last["rank_seconds"]) == 4
    assert len(last["stage_seconds"]) == 2
    assert "slowest of the last 3 steps: rank 1 (dp 0, pp 0, tp 1), computing for" in printed


def test_one_rank_has_nobody_to_be_compared_with(toml: Path, tmp_path: Path) -> None:
    overrides = [f"train.directory={str(tmp_path / 'run')!r}", "validation.windows=0", "log.stragglers_every=1"]
    settings = config.load(toml, overrides).on(1)
    train(prepare(settings, ParallelContext.create()), Console(quiet=True), stop_step=2)
    assert lines(tmp_path / "run", "stragglers") == []
