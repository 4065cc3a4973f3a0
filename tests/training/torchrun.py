"""A torchrun as a user starts it, and its ranks."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="finds the ranks in /proc")


def command(
    toml: Path,
    run: Path,
    *arguments: str,
    ranks: int,
    launcher: tuple[str, ...] = ("--standalone",),
    fault: tuple[str, ...] = (),
) -> list[str]:
    """``fault``: rank, point, call and fault of :mod:`tests.training.faults`."""
    module = ("tests.training.faults", *fault) if fault else ("megapoly",)
    return [
        sys.executable, "-m", "torch.distributed.run", *launcher, f"--nproc-per-node={ranks}", "-m", *module,
        "train", str(toml), "--set", f"train.directory={str(run)!r}", *arguments,
    ]  # fmt: skip


@contextmanager
def started(arguments: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A torchrun with one thread per rank, which is gone afterwards with all its ranks."""
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
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
