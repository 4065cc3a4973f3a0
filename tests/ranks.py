"""Runs a function of a test module in several processes that form a gloo process group.

A *forkserver* that has torch loaded forks each rank, so that eight ranks start in a fraction of a second. Nothing is
preloaded that runs a parallel op on import: the thread pool of the server would be missing in its children, which hang.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
# pytest, because a child imports the main script, and the others because most tests import them.
# torch itself imports torch._dynamo and sympy, seconds of work, in the first backward pass and recomputation.
_CONTEXT.set_forkserver_preload(
    ["torch", "torch.distributed", "torch._dynamo", "numpy.random", "pytest", "hypothesis", "pydantic"]
)
_GRACE = 0.3  # seconds after a first failure in which others are heard, so that a killed rank is named before its peers


class RankError(AssertionError):
    """A rank failed, died or did not end; the message names it and holds its traceback or stack."""


def run_ranks(size: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """Results of ``function(rank, size, *args)`` for every rank, run in ``size`` processes with gloo initialised.

    ``function`` stands at the top of a module; arguments and results travel by pickle. Each rank has one thread.
    The first failure ends all ranks, and no process is left behind. Raises :class:`RankError`; a run longer than
    ``timeout`` seconds names the ranks that were still at work, with their stacks.
    """
    payload = pickle.dumps((function, args))  # by plain pickle: tensors go by value, not by a shared file descriptor
    ranks: list[_Rank] = []
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        try:
            for rank in range(size):
                ranks.append(_Rank(rank, size, Path(folder), timeout, payload))
            return _collect(ranks, time.monotonic() + timeout, timeout)
        finally:
            for each in ranks:
                each.end()


def run_cases(
    size: int, function: Callable[..., Any], cases: Iterable[tuple[Any, ...]], timeout: float = 120.0
) -> list[list[Any]]:
    """``run_ranks`` of ``function(rank, size, *case)`` for every case, one after another in the same processes.

    Returns the results per case, each a list over ranks. A failure names its case.
    """
    per_rank = run_ranks(size, _each_case, function, list(cases), timeout=timeout)
    return [list(results) for results in zip(*per_rank, strict=True)]


def _each_case(rank: int, size: int, function: Callable[..., Any], cases: list[tuple[Any, ...]]) -> list[Any]:
    results = []
    for case in cases:
        try:
            results.append(function(rank, size, *case))
        except Exception as error:
            raise AssertionError(f"in case {case!r}") from error
    return results


class _Rank:
    """The parent's end of one process. ``result`` or ``failure`` is set once it is known."""

    def __init__(self, rank: int, size: int, folder: Path, timeout: float, payload: bytes) -> None:
        self.rank = rank
        self.stacks = folder / f"stacks-{rank}"
        self.connection, theirs = _CONTEXT.Pipe()
        self.process: BaseProcess = _CONTEXT.Process(
            target=_child, args=(rank, size, str(folder), timeout, payload, theirs), daemon=True
        )
        self.process.start()
        theirs.close()
        self.done = False
        self.result: Any = None
        self.failure = ""
        self.failed_at = 0.0

    def hear(self) -> None:
        """Take what the process has sent, or note that it died."""
        try:
            ok, self.failed_at, message = pickle.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            self.process.join(_GRACE)
            code = self.process.exitcode
            how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
            self.failure = f"rank {self.rank} died without an exception: {how}"
        else:
            if ok:
                self.result = message
            else:
                self.failure = f"rank {self.rank} failed:\n{message}"
        self.done = True

    def stack(self) -> str:
        """Stacks of all threads of a process that still runs."""
        if self.process.is_alive() and self.stacks.exists():
            os.kill(self.process.pid or 0, signal.SIGUSR1)
            until = time.monotonic() + 10
            # It is written frame by frame: the last one is where the main thread, the oldest, began.
            while not self.stacks.read_text().endswith("in <module>\n") and time.monotonic() < until:
                time.sleep(0.02)
            return f"rank {self.rank} still ran:\n{self.stacks.read_text()}"
        return f"rank {self.rank} was still starting"

    def end(self) -> None:
        self.connection.close()
        if not self.done or self.failure:
            self.process.kill()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.process.close()


def _collect(ranks: list[_Rank], deadline: float, timeout: float) -> list[Any]:
    waiting = {each.connection: each for each in ranks}
    while waiting:
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            stacks = "\n".join(each.stack() for each in waiting.values())
            names = ", ".join(str(each.rank) for each in waiting.values())
            raise RankError(f"no result within {timeout:g} s from ranks {names}\n{stacks}")
        for connection in ready:
            waiting.pop(connection).hear()  # type: ignore[call-overload]
        if any(each.failure for each in ranks):
            deadline = min(deadline, time.monotonic() + _GRACE)
            while ready := wait(list(waiting), max(0.0, deadline - time.monotonic())):
                for connection in ready:
                    waiting.pop(connection).hear()  # type: ignore[call-overload]
            _fail(ranks)
    return [each.result for each in ranks]


def _fail(ranks: list[_Rank]) -> None:
    """Raise the failure that came first; a rank that died is the cause of its peers' exceptions, and comes before."""
    failed = sorted((each for each in ranks if each.failure), key=lambda each: each.failed_at)
    others = ", ".join(str(each.rank) for each in failed[1:])
    raise RankError(failed[0].failure + (f"\nranks {others} failed after it" if others else ""))


def _child(rank: int, size: int, folder: str, timeout: float, payload: bytes, connection: Connection) -> None:
    with open(Path(folder) / f"stacks-{rank}", "w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks)
        watcher = threading.Thread(target=_end_with_the_parent, args=(connection,), daemon=True)
        watcher.start()
        try:
            torch.set_num_threads(1)
            store = dist.FileStore(str(Path(folder) / "store"), size)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
            function, args = pickle.loads(payload)
            message = pickle.dumps((True, 0.0, function(rank, size, *args)))
        except BaseException:
            message = pickle.dumps((False, time.monotonic(), traceback.format_exc()))
        connection.send_bytes(message)
        # The process lives on until the parent lets go: were it to end now, its peers could fail for that reason.
        watcher.join()


def _end_with_the_parent(connection: Connection) -> None:
    """End this process, whatever it is doing, when the parent closes its end or dies."""
    try:
        connection.recv_bytes()
    except (EOFError, OSError):
        os._exit(0)
