"""Contenders that are compared take turns (A B C A B C): what else the machine does meets them alike. No torch."""

from __future__ import annotations

import importlib.metadata
import statistics
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from megapoly.bench.process import Contender, Turn
from megapoly.bench.task import Task
from megapoly.config import Config
from megapoly.errors import TrainingError


@dataclass(frozen=True)
class Entry:
    """A contender to be.

    Attributes:
        program: module that runs as ``python -m``.
        threads: of each rank.
        peer: of whom the race does without where it is not installed, or fails; None is ours.
    """

    program: str
    config: Config
    threads: int
    device: str
    peer: Peer | None = None


@dataclass(frozen=True)
class Peer:
    """A library to compare with: its distribution, and how to get it."""

    program: str
    distribution: str
    install: str

    @property
    def version(self) -> str | None:
        return version(self.distribution)


@dataclass
class Result:
    """A contender's turns of ``steps`` steps, or why there are none.

    Attributes:
        parameters: that all its ranks hold.
        flops: of a step, of a plain matmul only.
        gpu: name of the one that it ran on, or "".
    """

    entry: Entry
    steps: int
    parameters: int = 0
    flops: float = 0.0
    gpu: str = ""
    turns: list[Turn] = field(default_factory=list)
    missing: str = ""

    def per_second(self, work: float) -> list[float]:
        """Of each turn, where a step does ``work``."""
        return [work * self.steps / turn.seconds for turn in self.turns]

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each turn."""
        return self.per_second(self.entry.config.step_tokens)

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)


def race(
    entries: Mapping[str, Entry], *, steps: int, repeats: int, progress: Callable[[str], object]
) -> dict[str, Result]:
    """Start all, warm each up by one step, and let them take ``repeats`` turns of ``steps`` steps.

    Raises:
        TrainingError: a contender that is not a peer did not finish.
    """
    results = {name: Result(entry, steps) for name, entry in entries.items()}
    with tempfile.TemporaryDirectory(prefix="megapoly-bench-") as folder, ExitStack() as stack:
        contenders: dict[str, Contender] = {}
        for name, entry in entries.items():
            if entry.peer is not None and entry.peer.version is None:
                results[name].missing = f"not installed: {entry.peer.install}"
                continue
            task = Task(entry.config.document(), entry.threads, entry.device)
            contenders[name] = stack.enter_context(Contender(name, entry.program, task, Path(folder)))
        for turn in range(repeats + 1):
            for name, contender in list(contenders.items()):
                progress(f"{name}: turn {turn} of {repeats}" if turn else f"{name}: warm-up")
                try:
                    _take(turn, contender, results[name])
                except TrainingError as error:
                    if entries[name].peer is None:
                        raise
                    results[name] = Result(entries[name], steps, missing=f"failed: {str(error).splitlines()[-1]}")
                    del contenders[name]
    return results


def _take(turn: int, contender: Contender, result: Result) -> None:
    if turn:
        result.turns.append(contender.run(result.steps))
    else:
        result.parameters, result.flops, result.gpu = contender.ready()
        contender.run(1)


def version(distribution: str) -> str | None:
    """Of an installed distribution, else None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
