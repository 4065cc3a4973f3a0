"""A run that stops and goes on under another layout is the same run as one that never stopped."""

from __future__ import annotations

import itertools
import random
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from megapoly import comm, config
from megapoly.context import ParallelContext
from megapoly.run import prepare
from megapoly.trainer import train
from tests.corpus import lines
from tests.ranks import run_cases

LAYOUTS = [(dp, pp, tp) for dp in (1, 2, 4) for pp in (1, 2, 4) for tp in (1, 2, 4) if dp * pp * tp == 4]
Layout = tuple[int, int, int]


def go(size: int, toml: Path, run: Path, layout: Layout, resume: bool, stop_step: int | None, *extra: str) -> None:
    dp, pp, tp = layout
    sets = [f"layout.dp={dp}", f"layout.pp={pp}", f"layout.tp={tp}", f"train.directory={str(run)!r}", *extra]
    settings = config.load(toml, sets).on(size)
    context = ParallelContext.create(settings.mesh)
    train(prepare(settings, context, "always" if resume else "never"), Console(quiet=True), stop_step=stop_step)
    context.close()


def part(rank: int, size: int, toml: Path, origin: Path | None, run: Path, layout: Layout, stop: int | None) -> None:
    """Train in ``run``; with ``origin``, go on from a copy of that run. Memory that nothing filled is NaN."""
    torch.use_deterministic_algorithms(True)
    if origin is not None:
        context = ParallelContext.create(config.load(toml).on(size).mesh)
        if rank == 0:
            shutil.copytree(origin, run)
        comm.barrier(context.control)
        context.close()
    go(size, toml, run, layout, origin is not None, stop)


def check(toml: Path, folder: Path, pairs: list[tuple[Layout, Layout]]) -> None:
    """10 steps under one layout and 10 under another, against 20 in one process; a stage boundary lies between."""
    go(1, toml, folder / "whole", (1, 1, 1), False, None)
    whole = {event["step"]: event for event in lines(folder / "whole", "train")}
    assert sorted(whole) == list(range(1, 21))
    assert [event["at"] for event in lines(folder / "whole", "validation")] == ["before", "between", "after"]

    def name(layout: Layout) -> str:
        return "-".join(map(str, layout))

    firsts = [(toml, None, folder / name(layout), layout, 10) for layout in dict(pairs)]
    seconds = [(toml, folder / name(a), folder / f"{name(a)}--{name(b)}", b, None) for a, b in pairs]
    run_cases(4, part, [*firsts, *seconds], timeout=600)
    for _, _, run, _, _ in seconds:
        assert [event["step"] for event in lines(run, "train")] == list(range(1, 21))
        for event in lines(run, "train"):
            other = whole[event["step"]]
            assert event["loss"] == pytest.approx(other["loss"], rel=1e-9), run.name
            assert event["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-9)
            for key in ("sample", "tokens", "stage", "learning_rate"):
                assert event[key] == other[key]
            for source, values in event["sources"].items():  # the same samples: their losses by source are the same
                assert values["tokens"] == other["sources"][source]["tokens"]
                assert values["loss"] == pytest.approx(other["sources"][source]["loss"], rel=1e-9)
        for event, other in zip(lines(run, "validation"), lines(folder / "whole", "validation"), strict=True):
            assert event["at"] == other["at"]
            assert event["bits_per_byte"] == pytest.approx(other["bits_per_byte"], rel=1e-9)


PAIRS = list(itertools.permutations(LAYOUTS, 2))


def test_a_run_goes_on_under_another_layout(toml: Path, tmp_path: Path) -> None:
    """Three pairs that have all six layouts of four ranks."""
    order = random.Random(0).sample(LAYOUTS, len(LAYOUTS))
    check(toml, tmp_path, list(zip(order[:3], order[3:])))


@pytest.mark.long
def test_every_layout_goes_on_from_every_other(toml: Path, tmp_path: Path) -> None:
    assert len(PAIRS) == 30
    check(toml, tmp_path, PAIRS)


def test_checkpoints_are_kept_and_a_finished_run_stays_as_it_is(toml: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    go(1, toml, run, (1, 1, 1), False, 9, "checkpoint.every_steps=2", "checkpoint.keep=3")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step-00000006",
        "step-00000008",
        "step-00000009",
    ]
    go(1, toml, run, (1, 1, 1), True, None, "checkpoint.every_steps=2", "checkpoint.keep=3")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    go(1, toml, run, (1, 1, 1), True, None)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")} == before
    assert [event["step"] for event in lines(run, "train")] == list(range(1, 21))
