"""One measurement of the data engine or of a peer, in a process of its own. No torch.

``python -m PROGRAM JOB CORES PARAMETERS`` runs the function JOB of a program on so many cores, with its parameters,
which are JSON, and prints the :class:`Measured` that it returns as the last line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megapoly.errors import TrainingError


@dataclass
class Measured:
    """Seconds that ``work`` units took, and by how many MiB the process grew beyond the files that it maps, at most.

    ``memory`` is None where the system does not tell. ``disk`` is the bytes of a cache that the job left.
    """

    work: float = 1.0
    seconds: float = 0.0
    memory: float | None = None
    disk: int = 0

    @property
    def rate(self) -> float:
        return self.work / self.seconds


@contextmanager
def watch(work: float = 1.0) -> Iterator[Measured]:
    """Time and memory of the block."""
    result = Measured(work)
    stop, before = threading.Event(), _anonymous()
    most = [before or 0.0]

    def look() -> None:
        while not stop.wait(0.002):
            most[0] = max(most[0], _anonymous() or 0.0)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    start = time.perf_counter()
    yield result
    result.seconds = time.perf_counter() - start
    after = _anonymous()
    stop.set()
    watcher.join()
    if before is not None and after is not None:
        result.memory = max(most[0], after) - before


def repeated(batch: Callable[[int], int], seconds: float) -> Measured:
    """``batch(i)`` for i = 0, 1, ... until ``seconds`` have gone by; it returns its units of work. One goes ahead."""
    batch(0)
    done, number, start = 0, 1, time.perf_counter()
    while (gone := time.perf_counter() - start) < seconds or number == 1:
        done += batch(number)
        number += 1
    return Measured(done, gone if number > 2 else time.perf_counter() - start)


def serve(jobs: Mapping[str, Callable[..., Measured]]) -> None:
    """The process's end."""
    name, cores, parameters = sys.argv[1:]
    if hasattr(os, "sched_setaffinity"):  # not on macOS
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(cores)])
    print(json.dumps(asdict(jobs[name](**json.loads(parameters)))))


def ask(program: str, job: str, parameters: Mapping[str, Any], cores: int = 1) -> Measured:
    """The parent's end.

    Raises:
        TrainingError: the process failed; with the end of what it wrote.
    """
    command = [sys.executable, "-m", program, job, str(cores), json.dumps(parameters, default=str)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    if done.returncode:
        raise TrainingError(f"{program} {job} failed: {' '.join(done.stderr.split()[-60:])}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def _anonymous() -> float | None:
    """MiB of memory of this process that is no file's."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) / 1024 for line in file if line.startswith("RssAnon"))
    except (OSError, StopIteration):
        return None
