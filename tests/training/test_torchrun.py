"""The command as users run it: several processes under torchrun, on one machine and on two agents."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from megapoly.checkpoint import folders
from tests.corpus import lines
from tests.training.torchrun import command, linux, read_until, started

LONG = ["--set", "data.stages.0.tokens=12800000"]


@linux
def test_sigterm_saves_and_resume_goes_on(toml: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with started(command(toml, run, *LONG, ranks=2)) as process:
        read_until(process, "step     3/")
        process.terminate()
        rest, _ = process.communicate(timeout=60)
    assert "asked to stop" in rest
    (step,) = folders.steps(run / "checkpoints")
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
