"""A trace of some steps by torch.profiler, with schedule actions and collectives by name, and where the time went."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function

from megapoly.context import ParallelContext
from megapoly.data.files import partial
from megapoly.errors import ConfigError, TrainingError

FOLDER = "profile"
_STEP = "ProfilerStep#"  # TensorBoard's plugin finds the steps by this name
_ACTION = re.compile(r"(.+) of stage \d+, micro-batch \d+")
_COLLECTIVE = re.compile(r"(.+?)(?: (?:to|from) rank \d+)? over (\w+)(?:, \S+ MB)?")
_OPERATORS = 8


def parse_steps(text: str) -> range:
    """The steps of ``--profile``: "steps=20..25", both included, or "steps=20".

    Raises:
        ConfigError: another form, or steps that run backwards.
    """
    match = re.fullmatch(r"steps=(\d+)(?:\.\.(\d+))?", text.strip())
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last:
        raise ConfigError(
            f"--profile {text!r}: expected steps=FIRST..LAST, both included and counted from 1, such as steps=20..25,"
            " or one step, such as steps=20"
        )
    return range(first, last + 1)


class Profiler:
    """Profiles the given steps of a run on this rank; a context manager around its loop.

    Writes ``FOLDER/rank-R.pt.trace.json.gz``, whole or not at all, for Perfetto (ui.perfetto.dev) and for TensorBoard's
    profile plugin (torch-tb-profiler). A run that ends between the steps writes what it has; one that fails, nothing.
    Training stands still while it is written and summed up, some 0.1 ms for each event: few steps are enough.

    Args:
        steps: an empty range profiles nothing.
        folder: of the run.
        note: prints on the terminal of rank 0.
        settle: waits for all messages that a step has left under way.
    """

    def __init__(
        self,
        steps: range,
        folder: Path,
        context: ParallelContext,
        note: Callable[[RenderableType], None],
        settle: Callable[[], None],
    ) -> None:
        self._steps, self._context, self._note, self._settle = steps, context, note, settle
        self.path = folder / FOLDER / f"rank-{context.rank}.pt.trace.json.gz"
        self._profile: profile | None = None
        self._done: list[int] = []
        self._seconds = self._waited = 0.0

    def announce(self, first: int, last: int) -> None:
        """Say what of the steps lies outside of ``first`` to ``last``, which this start trains."""
        inside = range(max(first, self._steps.start), min(last + 1, self._steps.stop))
        if not self._steps or len(inside) == len(self._steps):
            return
        self._note(
            f"--profile: of steps {_span(self._steps)} this start, which trains steps {first} to {last}, profiles "
            + (f"only {_span(inside)}" if inside else "none")
        )

    def ends_with(self, step: int) -> bool:
        """Whether the profile is written after this step."""
        return len(self._steps) > 0 and step == self._steps[-1]

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around one step, which is profiled if it is asked for."""
        if number not in self._steps:
            yield
            return
        if self._profile is None:
            self._begin()
        begin, waited = time.perf_counter(), self._waiting()
        with record_function(f"{_STEP}{number}"):
            yield
        self._seconds += time.perf_counter() - begin
        self._waited += self._waiting() - waited
        self._done.append(number)
        if self.ends_with(number):
            self._finish()

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._profile is not None and error is None:
            self._finish()
        elif self._profile is not None and (self._context.mesh.world_size == 1 or getattr(error, "everywhere", False)):
            self._stop(self._profile)  # an interpreter cannot end under a profiler that runs
        # Of other errors messages are under way that may never end, and the launcher ends the process without exit.

    def _begin(self) -> None:
        gpu = self._context.device.type == "cuda"
        self._profile = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])])
        self._profile.start()

    def _finish(self) -> None:
        assert self._profile is not None
        traced, self._profile, self._steps = self._profile, None, range(0)
        if self._context.device.type == "cuda":
            torch.cuda.synchronize(self._context.device)
        self._stop(traced)
        self._write(traced)
        if self._context.rank == 0:
            self._note(f"profile of steps {_span(self._done)} in {self.path.parent}; on rank 0:")
            for table in self._tables(traced.key_averages()):
                self._note(table)

    def _stop(self, traced: profile) -> None:
        self._settle()  # gloo's messages write their end into the events, of which none is there after stop
        traced.stop()

    def _write(self, traced: profile) -> None:
        # torch compresses what is written to a name that ends with .gz.
        temporary = partial(self.path).with_name(f"{partial(self.path).name}.gz")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            traced.export_chrome_trace(str(temporary))
            os.replace(temporary, self.path)
        except OSError as error:
            raise TrainingError(f"{self.path}: the profile cannot be written ({error})") from error
        finally:
            temporary.unlink(missing_ok=True)

    def _waiting(self) -> float:
        return sum(axis.traffic.seconds for axis in self._context.axes())

    def _tables(self, averages: Iterable[Any]) -> Iterator[Table]:
        """Time by kind of action, by collective and axis, and of the operators that took most."""
        gpu = self._context.device.type == "cuda"
        actions, collectives, operators = _sums(averages, gpu)
        if collectives and not gpu:  # the host of a GPU does not wait for what it asks for
            collectives["waiting for other ranks, in all"] = (self._waited, 0)
        most = dict(sorted(operators.items(), key=lambda item: -item[1][0])[:_OPERATORS])
        for title, rows in (("action", actions), ("collective", collectives), ("operator", most)):
            table = Table(title, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
            what = "" if rows is not most else "device " if gpu else "self "
            for column in (f"{what}ms/step", "share", "calls/step"):
                table.add_column(column, justify="right", no_wrap=True)
            steps = len(self._done)
            for name, (seconds, calls) in rows.items():
                share, often = f"{seconds / self._seconds:.1%}", f"{calls / steps:.3g}" if calls else ""
                table.add_row(name, f"{1e3 * seconds / steps:.2f}", share, often)
            if rows:
                yield table


_Rows = dict[str, tuple[float, int]]  # seconds and calls by name


def _sums(averages: Iterable[Any], gpu: bool) -> tuple[_Rows, _Rows, _Rows]:
    """Actions by kind, collectives by axis, and operators, these without what they call."""
    actions, collectives, operators = rows = ({}, {}, {})  # type: tuple[_Rows, _Rows, _Rows]
    for event in averages:
        microseconds, into, name = event.cpu_time_total, operators, event.key
        if match := _ACTION.fullmatch(event.key):
            into, name = actions, match[1]
        elif match := _COLLECTIVE.fullmatch(event.key):
            into, name = collectives, f"{match[1]} over {match[2]}"
        elif event.key.startswith("ProfilerStep"):
            continue
        else:
            microseconds = event.self_device_time_total if gpu else event.self_cpu_time_total
        seconds, calls = into.get(name, (0.0, 0))
        into[name] = (seconds + microseconds / 1e6, calls + event.count)
    return rows


def _span(steps: range | list[int]) -> str:
    return str(steps[0]) if len(steps) == 1 else f"{steps[0]}..{steps[-1]}"
