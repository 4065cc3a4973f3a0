"""``--profile``: what it takes, and what the traces of a small run hold."""

from __future__ import annotations

import gc
import gzip
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from rich.console import Console

from megapoly import config
from megapoly.comm import Pending
from megapoly.context import ParallelContext
from megapoly.errors import ConfigError
from megapoly.profiling import parse_steps
from megapoly.run import prepare
from megapoly.trainer import train
from tests.ranks import run_ranks
from tests.training.torchrun import command, linux, started


def test_the_steps_of_a_profile() -> None:
    assert parse_steps("steps=20..25") == range(20, 26)
    assert parse_steps("steps=7") == range(7, 8)


@pytest.mark.parametrize("text", ["20..25", "steps=20-25", "steps=25..20", "steps=0..3", "steps=", "step=1..2"])
def test_another_form_is_refused_with_what_is_expected(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{text}': expected steps=FIRST..LAST, .* such as steps=20..25"):
        parse_steps(text)


def profiled(rank: int, size: int, toml: Path, run: Path, steps: range) -> str:
    """Train five steps; what rank 0 printed. When a profile stops, no message is under way: it would break the heap."""
    overrides = [f"train.directory={str(run)!r}", "validation.windows=0", "layout.pp=2"]
    settings = config.load(toml, overrides).on(size)
    context = ParallelContext.create(settings.mesh)
    console = Console(quiet=rank != 0, record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    stop = torch.profiler.profile.stop

    def checked(profile: torch.profiler.profile) -> None:
        assert not any(each._works for each in gc.get_objects() if type(each) is Pending)
        stop(profile)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.profiler.profile, "stop", checked)
        train(prepare(settings, context), console, stop_step=5, profile=steps)
    context.close()
    return console.export_text() if rank == 0 else ""


def names(path: Path) -> Counter[str]:
    """How often the trace holds each of the names that megapoly gives."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return Counter(event["name"] for event in events if event.get("cat") == "user_annotation" and event["ph"] == "X")


def test_the_trace_holds_the_actions_and_collectives_of_its_steps_alone(toml: Path, tmp_path: Path) -> None:
    """dp 2 x pp 2, 4 micro-batches: every action once in each of two steps."""
    run = tmp_path / "run"
    printed = run_ranks(4, profiled, toml, run, range(3, 5))[0]
    files = sorted(path.name for path in (run / "profile").iterdir())
    assert files == [f"rank-{rank}.pt.trace.json.gz" for rank in range(4)]
    for rank in range(4):
        found = names(run / "profile" / files[rank])
        stage = rank // 2
        assert {name: n for name, n in found.items() if name.startswith("Profiler")} == {
            "ProfilerStep#3": 1,
            "ProfilerStep#4": 1,
        }
        assert {name: n for name, n in found.items() if "micro-batch" in name} == {
            f"{kind} of stage {stage}, micro-batch {m}": 2 for kind in ("forward", "backward") for m in range(4)
        }
        other = (rank + 2) % 4
        axes = ("pp", "pp (gradients)") if stage == 0 else ("pp (gradients)", "pp")
        megabytes = 16 * 32 * 8 / 1e6  # [S, B, H] in fp64
        assert found[f"send to rank {other} over {axes[0]}, {megabytes:.3g} MB"] == 8
        assert found[f"wait for receive from rank {other} over {axes[1]}"] == 8
        assert any(name.startswith("reduce-scatter over dp, ") for name in found), found
    assert "profile of steps 3..4 in" in printed
    rows = {tuple(line.split()[:1]): line.split() for line in printed.splitlines() if line.split()}
    assert rows[("forward",)][-1] == rows[("backward",)][-1] == "4"  # calls per step
    assert "reduce-scatter over dp" in printed
    assert "waiting for other ranks, in all" in printed
    assert "self ms/step" in printed
    assert "this start" not in printed


@pytest.mark.parametrize(
    ("steps", "said", "written"),
    [
        (range(4, 9), "of steps 4..8 this start, which trains steps 1 to 5, profiles only 4..5", ["#4", "#5"]),
        (range(6, 9), "of steps 6..8 this start, which trains steps 1 to 5, profiles none", None),
    ],
)
def test_steps_outside_of_the_run_are_said(
    steps: range, said: str, written: list[str] | None, toml: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    printed = run_ranks(2, profiled, toml, run, steps)[0]
    assert said in printed
    if written is None:
        assert not (run / "profile").exists()
    else:
        found = names(run / "profile" / "rank-1.pt.trace.json.gz")
        assert sorted(name for name in found if name.startswith("Profiler")) == [f"ProfilerStep{n}" for n in written]


@linux
@pytest.mark.parametrize(("ranks", "layout"), [(1, "dp=1"), (2, "dp=2"), (2, "pp=2")])
def test_a_run_that_fails_while_it_is_profiled(ranks: int, layout: str, toml: Path, tmp_path: Path) -> None:
    """By an error that all ranks share, with which the process ends as any does."""
    sets = ("optimizer.learning_rate=1e30", "validation.windows=0", f"layout.{layout}", "model.init_std=1e3")
    arguments = [word for value in sets for word in ("--set", value)]
    with started(command(toml, tmp_path / "run", "--profile", "steps=2..9", *arguments, ranks=ranks)) as process:
        out, _ = process.communicate(timeout=90)
    assert "is not finite" in out, out
    codes = set(re.findall(r"exitcode  : (\S+)", out)) - {"-15"}  # torchrun may end a rank before it ends by itself
    assert codes == {"1"}, out
    assert not (tmp_path / "run" / "profile").exists()


@linux
def test_a_rank_with_a_fault_of_the_program_while_it_is_profiled(toml: Path, tmp_path: Path) -> None:
    """It ends with its traceback, and its peer names it: neither by the gathers that are under way."""
    fault = ("1", "optimizer", "3", "fail")
    arguments = command(toml, tmp_path / "run", "--profile", "steps=2..9", ranks=2, fault=fault)
    with started(arguments) as process:
        out, _ = process.communicate(timeout=90)
    assert re.search(r"megapoly: rank 1: Traceback[\s\S]*in fail\n[\s\S]*ValueError: a fault of the program", out), out
    assert "ValueError('a fault of the program')" in out.split("Root Cause")[1], out
    assert set(re.findall(r"exitcode  : (\S+)", out)) - {"-15"} == {"1"}, out


def test_no_steps_no_profile(toml: Path, tmp_path: Path) -> None:
    run_ranks(2, profiled, toml, tmp_path / "run", range(0))
    assert not (tmp_path / "run" / "profile").exists()
