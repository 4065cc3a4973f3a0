"""Checkpoints that a thread writes while training goes on: training waits only for a copy in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch

from megapoly.checkpoint.store import Entry
from megapoly.context import Axis

_ALIGNMENT = 64  # bytes


class Writer:
    """One rank's writing thread, of which every rank has one; one checkpoint is written at a time.

    What goes wrong in it is raised by the next :meth:`wait`, which therefore every rank has to call at the same places.

    Attributes:
        axis: over all ranks, for the thread's own messages. Its CPU group serves nothing else.
    """

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._thread: threading.Thread | None = None
        self._path: Path | None = None
        self._error: BaseException | None = None

    def write(self, entries: Iterable[Entry], save: Callable[[list[Entry]], Path]) -> None:
        """Copy ``entries`` into memory, which is kept for the next time, and have a thread ``save`` the copies.

        When this returns, the entries may change.

        Raises:
            CheckpointError: the checkpoint before this one failed; nothing is begun then.
        """
        self.wait()
        copies = self._copy(list(entries))
        # Not a daemon: a run that ends with an error still writes to the end what it has begun.
        self._thread = threading.Thread(target=self._run, args=(save, copies), name="checkpoint")
        self._thread.start()

    def wait(self) -> Path | None:
        """Wait for the checkpoint that is being written; its folder, or None where there was none.

        Raises:
            CheckpointError: it failed, on every rank.
        """
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        path, error = self._path, self._error
        self._path = self._error = None
        if error is not None:
            raise error
        return path

    def _run(self, save: Callable[[list[Entry]], Path], entries: list[Entry]) -> None:
        try:
            self._path = save(entries)
        except BaseException as error:
            self._error = error

    def _copy(self, entries: list[Entry]) -> list[Entry]:
        places, end = [], 0
        for entry in entries:
            places.append(end)
            end += -(-entry.data.nbytes // _ALIGNMENT) * _ALIGNMENT
        gpu = any(entry.data.is_cuda for entry in entries)
        if self._buffer.numel() < end:
            self._buffer = torch.empty(end, dtype=torch.uint8, pin_memory=gpu)
        copies = []
        for entry, place in zip(entries, places):
            data = self._buffer[place : place + entry.data.nbytes].view(entry.data.dtype)
            copies.append(replace(entry, data=data.copy_(entry.data.detach().reshape(-1), non_blocking=True)))
        if gpu:
            torch.cuda.synchronize()
        return copies
