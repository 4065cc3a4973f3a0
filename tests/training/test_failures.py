"""Ranks that are killed, stopped or stuck: the rest end and name them, and a restart goes on as if nothing had been."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from tests.corpus import lines
from tests.training.torchrun import alive, children, command, linux, read_until, started

LONG = ["--set", "data.stages.0.tokens=12800000"]
QUIET = ["--set", "validation.windows=0"]
LIMIT = 30.0  # seconds in which the rest end
POINTS = ("rendezvous", "groups", "loading", "validation", "reading", "forward", "optimizer", "save")


def sets(layout: str) -> list[str]:
    """Overrides of a layout such as "dp 2 x tp 2"."""
    sizes = dict(part.split() for part in layout.split(" x "))
    return [word for axis, size in sizes.items() for word in ("--set", f"layout.{axis}={size}")]


@linux
def test_a_killed_rank_ends_the_others_and_is_named(toml: Path, tmp_path: Path) -> None:
    with started(command(toml, tmp_path / "run", *LONG, *sets("pp 2 x tp 2"), ranks=4)) as process:
        read_until(process, "step     2/")
        workers = children(process.pid)
        assert sorted(workers) == [0, 1, 2, 3]
        os.kill(workers[2], signal.SIGKILL)
        rest, _ = process.communicate(timeout=LIMIT)
        assert process.returncode != 0
        assert not any(alive(pid) for pid in workers.values())
    assert re.search(r"rank\s*:\s*2 \(local_rank: 2\)", rest), rest
    assert "SIGKILL" in rest or "exitcode  : -9" in rest
    # Each survivor says in one line whom it lost and where it was; no traceback is needed to understand it.
    for rank in (0, 1, 3):
        place = rf"rank {rank} \(dp 0, pp {rank // 2}, tp {rank % 2}\) was at step \d+, training: action \d+ of \d+: "
        assert re.search(rf"megapoly: rank {rank}: .* over [\w ()]+ failed: rank 2 is gone; {place}", rest), rest
    assert "trainer.py" not in rest


def check_kill(toml: Path, run: Path, layout: str, rank: int, point: str, at: int = 1) -> str:
    """Kill ``rank`` at a point of its work; the output of torchrun."""
    ranks = 8 if layout.count("2") == 3 else 4 if layout.count("2") == 2 else 2
    saving = ["--set", "checkpoint.every_steps=2"]
    fault = (str(rank), point, str(at), "kill")
    with started(command(toml, run, *LONG, *saving, *sets(layout), ranks=ranks, fault=fault)) as process:
        out, _ = process.communicate(timeout=60 + LIMIT)
        assert process.returncode != 0, out
    assert re.search(rf"rank\s*:\s*{rank} \(local_rank: {rank}\)", out.split("Root Cause")[1]), out
    named = set(re.findall(r"failed: (rank .* is gone)", out))
    assert named == {f"rank {rank} is gone"} or (not named and point in ("rendezvous", "groups")), out
    assert not re.search(r"Traceback.*megapoly/", out, re.DOTALL), out
    return out


@linux
def test_a_rank_that_is_killed_as_the_run_starts_up(toml: Path, tmp_path: Path) -> None:
    """The others wait inside of the store, where no handler of SIGTERM would run."""
    out = check_kill(toml, tmp_path / "run", "dp 2", 1, "rendezvous")
    assert "exitcode  : -15" in out  # at once, and not after the 30 s that torchrun gives a rank


@pytest.mark.long
@linux
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize(("layout", "rank"), [("dp 2", 1), ("tp 2", 1), ("pp 2", 1), ("dp 2 x tp 2", 0)])
def test_any_rank_killed_at_any_moment(layout: str, rank: int, point: str, toml: Path, tmp_path: Path) -> None:
    at = {"forward": 100, "reading": 9, "optimizer": 7, "save": 2, "validation": 2}.get(point, 1)
    out = check_kill(toml, tmp_path / "run", layout, rank, point, at)
    doing = {"validation": "validating after step 0", "save": "saving the checkpoint of step 4"}.get(point, "")
    assert f"was {doing}" in out or not doing, out


@linux
def test_torchrun_restarts_from_the_last_whole_checkpoint(toml: Path, tmp_path: Path) -> None:
    """A rank is killed while it saves step 8: the run goes on from step 4, with the losses of an undisturbed one."""
    few = ["--set", "checkpoint.every_steps=4", *sets("tp 2")]
    launcher = ("--standalone", "--max-restarts=1")
    fault = ("1", "save", "2", "kill")
    with started(command(toml, tmp_path / "killed", *few, ranks=2, launcher=launcher, fault=fault)) as process:
        out, _ = process.communicate(timeout=90)
        assert process.returncode == 0, out
    assert "rank 1 is gone; rank 0 (dp 0, pp 0, tp 0) was saving the checkpoint of step 8" in out
    assert "goes on from step-00000004" in out, out
    with started(command(toml, tmp_path / "whole", *few, ranks=2)) as process:
        process.communicate(timeout=60)
    killed, whole = (lines(tmp_path / name, "train") for name in ("killed", "whole"))
    assert [event["step"] for event in killed] == list(range(1, 21))  # what the killed rank undid stands elsewhere
    assert [event["loss"] for event in killed] == pytest.approx([event["loss"] for event in whole], rel=1e-12)
    assert [len(log.read_text().splitlines()) for log in (tmp_path / "killed").glob("log.left-at-4.jsonl")] == [4]


@linux
def test_a_stopped_rank_is_named_and_the_others_say_where_they_are(toml: Path, tmp_path: Path) -> None:
    """At micro-batch 3 of step 6 on the second stage."""
    short = ["--set", "log.hang_seconds=1.5", "--set", "layout.timeout_seconds=10", "--set", "layout.pp=2"]
    fault = ("1", "forward", str(5 * 8 + 4), "stop")
    arguments = command(toml, tmp_path / "run", *LONG, *QUIET, *short, ranks=2, fault=fault)
    with started(arguments) as process:
        seen = read_until(process, "has not moved")
        seen += read_until(process, "no answer")
        os.kill(children(process.pid)[1], signal.SIGKILL)  # torchrun would give a stopped rank 30 s more
        rest, _ = process.communicate(timeout=60)
    assert "no answer from rank 1 (dp 0, pp 1, tp 0)" in seen
    place = r"at step 6, training: action \d+ of \d+: backward of stage 0, micro-batch \d"
    (line,) = [line for line in seen.splitlines() if "has not moved" in line]
    assert re.search(rf"rank 0 \(dp 0, pp 0, tp 0\) has not moved for \d+\.\d s: {place}", line), seen
    assert re.search(rf"failed: rank 1 is gone; rank 0 \(dp 0, pp 0, tp 0\) was {place}", rest), rest


@linux
def test_a_rank_stuck_in_its_reading_ends_with_the_timeout(toml: Path, tmp_path: Path) -> None:
    short = ["--set", "log.hang_seconds=1", "--set", "layout.timeout_seconds=4"]
    arguments = command(toml, tmp_path / "run", *LONG, *QUIET, *short, ranks=2, fault=("1", "reading", "6", "sleep"))
    with started(arguments) as process:
        out = read_until(process, "gone or hangs")
        os.kill(children(process.pid)[1], signal.SIGKILL)  # its watchdog would end it 10 s later
        process.communicate(timeout=60)
    for rank, place in ((0, "training"), (1, "reading data")):
        who = rf"rank {rank} \(dp {rank}, pp 0, tp 0\)"
        assert len(re.findall(rf"megapoly: {who} has not moved for \d+\.\d s: at step 6, {place}", out)) in (1, 2), out
    error = r"megapoly: rank 0: .* over dp failed: one of ranks 0, 1 is gone or hangs .*tim(ed |e)out.*"
    assert re.search(rf"{error}; rank 0 \(dp 0, pp 0, tp 0\) was at step 6, training", out, re.I), out
