"""The parent's end of a contender's processes. No torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import IO, Any

from megapoly.bench.task import Task
from megapoly.errors import TrainingError


@dataclass(frozen=True)
class Turn:
    """Some steps of a contender: seconds of its slowest rank, processor seconds of all ranks, last loss.

    ``peak_bytes`` is the most memory of a GPU that a rank has had in use, 0 on a CPU.
    """

    seconds: float
    cpu_seconds: float
    loss: float
    peak_bytes: int = 0


class Contender:
    """Starts one process for each rank of ``task.config``; a context manager, which ends them.

    Args:
        program: module that runs as ``python -m``.
        folder: for the ranks' log and meeting place.
    """

    def __init__(self, name: str, program: str, task: Task, folder: Path) -> None:
        self.name, self._log = name, folder / f"{name}.log"
        self.threads = task.threads * task.config.mesh.world_size
        self.processes: list[subprocess.Popen[str]] = []
        with self._log.open("w") as log:
            for rank in range(task.config.mesh.world_size):
                mine = replace(task, rank=rank, store=str(folder / f"{name}.store"))
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", program, mine.text()],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        text=True,
                    )
                )

    def ready(self) -> tuple[int, float, str]:
        """Wait until the model is built: parameters of all ranks, FLOPs of a step where known, name of the GPU."""
        answers = self._answers()
        return sum(answer["parameters"] for answer in answers), answers[0]["flops"], answers[0]["gpu"]

    def run(self, steps: int) -> Turn:
        """Take ``steps`` training steps.

        Raises:
            TrainingError: a process ended; the message holds the end of what it printed.
        """
        for process in self.processes:
            try:
                _pipe(process.stdin).write(f"{steps}\n")
                _pipe(process.stdin).flush()
            except BrokenPipeError:
                raise self._lost() from None
        answers = self._answers()
        return Turn(
            max(answer["seconds"] for answer in answers),
            sum(answer["cpu_seconds"] for answer in answers),
            answers[0]["loss"],
            max(answer["peak_bytes"] for answer in answers),
        )

    def _answers(self) -> list[dict[str, Any]]:
        """One line of each rank, in the order of the ranks."""
        ends = {_pipe(process.stdout).fileno(): rank for rank, process in enumerate(self.processes)}
        found: dict[int, dict[str, Any]] = {}
        while ends:
            for end in wait(list(ends)):  # of all at once: a rank that has ended leaves the others waiting for it
                assert isinstance(end, int)
                rank = ends.pop(end)
                line = _pipe(self.processes[rank].stdout).readline()
                if not line:
                    raise self._lost()
                found[rank] = json.loads(line)
        return [found[rank] for rank in sorted(found)]

    def _lost(self) -> TrainingError:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return TrainingError(f"benchmark: {self.name} ended before its measurement:\n" + "\n".join(lines[-12:]))

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            for end in (process.stdin, process.stdout):
                with suppress(BrokenPipeError):  # the process has ended before
                    _pipe(end).close()
        for process in self.processes:
            try:
                process.wait(0 if any(error) else 20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def read_lines(program: str, options: str, folder: Path) -> Iterator[dict[str, Any]]:
    """What ``python -m program options folder`` prints, as it comes: an object of JSON a line.

    Raises:
        TrainingError: it failed; the message holds the end of what it said.
    """
    log = folder / "log"
    command = [sys.executable, "-m", program, options, str(folder)]
    with (
        log.open("w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        yield from map(json.loads, _pipe(process.stdout))
    if process.returncode:
        raise TrainingError(f"benchmark: its process failed: {' '.join(log.read_text(errors='replace').split()[-60:])}")


def _pipe(end: IO[str] | None) -> IO[str]:
    assert end is not None
    return end
