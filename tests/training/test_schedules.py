"""Whole runs, validation and announcement included, under schedules whose stages are uneven or several on a rank."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from megapoly import config
from megapoly.context import ParallelContext
from megapoly.run import prepare
from megapoly.trainer import train
from tests.corpus import lines
from tests.ranks import run_ranks

LAYOUTS = (
    "layout={pp=2,device='cpu',stage_layers=[0,4]}",
    "layout={pp=2,device='cpu',schedule='zero-bubble-v',stage_layers=[0,2,2,0]}",
    "layout={pp=2,device='cpu',schedule='zero-bubble',recompute='full'}",
    "layout={pp=2,device='cpu',schedule='interleaved',micro_batch=2}",
)


def go(rank: int, size: int, toml: Path, run: Path, layout: str) -> None:
    settings = config.load(toml, [f"train.directory={str(run)!r}", layout]).on(size)
    context = ParallelContext.create(settings.mesh)
    train(prepare(settings, context), Console(quiet=True), stop_step=3)
    context.close()


@pytest.fixture(scope="module")
def alone(toml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    go(0, 1, toml, run, "layout={device='cpu'}")
    return run


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_equals_one_process(toml: Path, tmp_path: Path, alone: Path, layout: str) -> None:
    run_ranks(2, go, toml, tmp_path / "run", layout)
    for kind in ("train", "validation"):
        found, expected = lines(tmp_path / "run", kind), lines(alone, kind)
        assert len(found) == len(expected) > 0
        for mine, other in zip(found, expected):
            assert mine["loss"] == pytest.approx(other["loss"], rel=1e-10)
