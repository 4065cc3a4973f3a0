"""The command as users run it: several processes under torchrun, on one machine and on two agents."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megapoly.checkpoint import store
from tests.corpus import lines

LONG = ["--set", "data.stages.0.tokens=12800000"]


def command(
    toml: Path, run: Path, *arguments: str, ranks: int, launcher: tuple[str, ...] = ("--standalone",)
) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", *launcher, f"--nproc-per-node={ranks}", "-m", "megapoly",
        "train", str(toml), "--set", f"train.directory={str(run)!r}", *arguments,
    ]  # fmt: skip


@contextmanager
def started(arguments: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A torchrun with one thread per rank, which is gone afterwards with all its ranks."""
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:  # a torchrun that is killed leaves its ranks behind, in sessions of their own
            for pid in (*children(process.pid).values(), process.pid):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def read_until(process: subprocess.Popen[str], text: str) -> str:
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"{text!r} never came:\n{seen}")


def children(pid: int) -> dict[int, int]:
    """Process ids of the workers under a torchrun, by their rank."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = re.search(r"^PPid:\s+(\d+)", (entry / "status").read_text(), re.M)
                variables = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            ranks = [int(v[5:]) for v in variables if v.startswith(b"RANK=")]
            if parent and int(parent[1]) == pid and ranks:
                found[ranks[0]] = int(entry.name)
    return found


def alive(pid: int) -> bool:
    try:
        return "Z" not in (Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="finds the ranks in /proc")


@linux
def test_a_killed_rank_ends_the_others_and_is_named(toml: Path, tmp_path: Path) -> None:
    sets = [*LONG, "--set", "layout.pp=2", "--set", "layout.tp=2"]
    with started(command(toml, tmp_path / "run", *sets, ranks=4)) as process:
        read_until(process, "step     2/")
        workers = children(process.pid)
        assert sorted(workers) == [0, 1, 2, 3]
        os.kill(workers[2], signal.SIGKILL)
        rest, _ = process.communicate(timeout=60)
        assert process.returncode != 0
        assert not any(alive(pid) for pid in workers.values())
    assert re.search(r"rank\s*:\s*2 \(local_rank: 2\)", rest), rest
    assert "SIGKILL" in rest or "exitcode  : -9" in rest
    # A survivor says in one line whom it lost; no traceback is needed to understand it.
    assert re.search(r"megapoly: rank \d: .* over .* failed: rank 2 is gone", rest), rest
    assert "trainer.py" not in rest


@linux
def test_torchrun_restarts_from_the_last_checkpoint(toml: Path, tmp_path: Path) -> None:
    """The losses of a run whose rank was killed are those of an undisturbed one."""
    sets = ["--set", "checkpoint.every_steps=4", "--set", "layout.tp=2"]
    launcher = ("--standalone", "--max-restarts=1")
    with started(command(toml, tmp_path / "killed", *sets, ranks=2, launcher=launcher)) as process:
        read_until(process, "step     6/")
        os.kill(children(process.pid)[1], signal.SIGKILL)
        rest, _ = process.communicate(timeout=90)
        assert process.returncode == 0, rest
    assert re.search(r"goes on from step-0000000(4|8)", rest), rest
    with started(command(toml, tmp_path / "whole", *sets, ranks=2)) as process:
        process.communicate(timeout=60)
    killed, whole = (lines(tmp_path / name, "train") for name in ("killed", "whole"))
    assert [event["step"] for event in killed] == list(range(1, 21))  # what the killed rank undid stands elsewhere
    assert [event["loss"] for event in killed] == pytest.approx([event["loss"] for event in whole], rel=1e-12)
    assert list((tmp_path / "killed").glob("log.left-at-*.jsonl"))


@linux
def test_sigterm_saves_and_resume_goes_on(toml: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with started(command(toml, run, *LONG, ranks=2)) as process:
        read_until(process, "step     3/")
        process.terminate()
        rest, _ = process.communicate(timeout=60)
    assert "asked to stop" in rest
    (step,) = store.steps(run / "checkpoints")
    assert step >= 3
    with started(command(toml, run, *LONG, "--resume", "--stop-step", str(step + 2), ranks=1)) as process:
        rest, _ = process.communicate(timeout=60)
        assert process.returncode == 0, rest
    assert [event["step"] for event in lines(run, "train")] == list(range(1, step + 3))


def test_two_agents_joined_by_a_rendezvous_train_one_model(toml: Path, tmp_path: Path) -> None:
    with started(command(toml, tmp_path / "one", "--stop-step", "3", ranks=1)) as process:
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0, out
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    rendezvous = ("--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=test")
    sets = ["--stop-step", "3", "--set", "layout.pp=2", "--set", "layout.tp=2"]
    agent = command(toml, tmp_path / "two", *sets, ranks=2, launcher=rendezvous)
    with started(agent) as first, started(agent) as second:
        outputs = [process.communicate(timeout=90)[0] for process in (first, second)]
        assert (first.returncode, second.returncode) == (0, 0), outputs
    one, two = ([event["loss"] for event in lines(tmp_path / name, "train")] for name in ("one", "two"))
    assert len(one) == 3
    assert two == pytest.approx(one, rel=1e-9)


def test_a_wrong_number_of_ranks_is_said_once(toml: Path, tmp_path: Path) -> None:
    with started(command(toml, tmp_path / "run", "--set", "layout.tp=4", ranks=2)) as process:
        out, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    message = "layout: 2 ranks were started, which pp 1 x tp 4 = 4 does not divide"
    assert out.count(f"megapoly: {message}") <= 1, out
    assert message in out.split("Root Cause")[1], out  # torchrun repeats it at the end of its own report
    assert "config.py" not in out
