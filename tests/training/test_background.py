"""Runs whose checkpoints are written in the background end up as those whose are not."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from rich.console import Console

from megapoly import config
from megapoly.checkpoint import examine, folders, store
from megapoly.checkpoint.store import Reader
from megapoly.context import ParallelContext
from megapoly.errors import CheckpointError, ConfigError
from megapoly.run import prepare
from megapoly.trainer import train
from tests.corpus import lines
from tests.ranks import run_cases


def go(rank: int, size: int, toml: Path, folder: Path, stop: int, resume: bool, *sets: str) -> None:
    sets = (f"train.directory={str(folder)!r}", "checkpoint.every_steps=3", *sets)
    settings = config.load(toml, sets).on(size)
    context = ParallelContext.create(settings.mesh)
    train(prepare(settings, context, "always" if resume else "never"), Console(quiet=True), stop_step=stop)
    context.close()


def test_the_same_checkpoints_and_a_run_that_goes_on_from_them(toml: Path, tmp_path: Path) -> None:
    layout = ("layout.dp=2", "layout.tp=2", "checkpoint.keep=9")
    cases = []
    for name, more in (("plain", ()), ("background", ("checkpoint.background=true",))):
        cases += [(toml, tmp_path / name, stop, stop == 10, *layout, *more) for stop in (7, 10)]
    run_cases(4, go, cases, timeout=300)
    plain, background = (tmp_path / name / "checkpoints" for name in ("plain", "background"))
    assert folders.steps(background) == folders.steps(plain) == [3, 6, 7, 9, 10]
    assert not list(background.glob(".*"))
    for step in folders.steps(plain):
        readers = [Reader(folders.folder(root, step)) for root in (plain, background)]
        assert all(each.same for each in examine.compare(*readers, "*"))
        assert readers[0].meta["guards"] == readers[1].meta["guards"]
    losses = [[event["loss"] for event in lines(root.parent, "train")] for root in (plain, background)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 10


def test_a_full_disk_ends_the_run_at_the_next_checkpoint(
    toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = store._write_rank

    def full(temporary, rank, entries):  # type: ignore[no-untyped-def]
        if "00000006" in temporary.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(temporary, rank, entries)

    monkeypatch.setattr(store, "_write_rank", full)
    message = "step-00000006: not saved; rank 0: OSError: .* No space left on device"
    for stop, reached in ((20, 9), (6, 6)):
        folder = tmp_path / str(stop)
        with pytest.raises(CheckpointError, match=message):
            go(0, 1, toml, folder, stop, False, "checkpoint.background=true")
        assert lines(folder, "train")[-1]["step"] == reached
        assert folders.steps(folder / "checkpoints") == [3]


def test_those_of_every_so_many_steps_are_kept(toml: Path, tmp_path: Path) -> None:
    go(0, 1, toml, tmp_path / "run", 14, False, "checkpoint.keep=1", "checkpoint.keep_every_steps=6")
    assert folders.steps(tmp_path / "run" / "checkpoints") == [6, 12, 14]
    with pytest.raises(
        ConfigError, match=r"keep_every_steps 7 is not a multiple of checkpoint.every_steps 3, .* set it to 6"
    ):
        go(0, 1, toml, tmp_path / "other", 14, False, "checkpoint.keep_every_steps=7")
