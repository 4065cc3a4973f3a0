"""Processes that encode pieces. No torch.

A worker is a new interpreter, which talks over a socket: so it starts quickly, needs no guard in the caller's script,
and its end, whatever its cause, ends the conversation. The other way round it ends at once when its parent does. It is
in a session of its own, so that Ctrl-C reaches the parent only.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from megapoly.data.documents import Options
from megapoly.data.encode import Encoder
from megapoly.data.load_tokenizer import load_tokenizer
from megapoly.data.pieces import Piece
from megapoly.errors import DataError, MegapolyError

# Modules are found where the parent finds them; numpy's library of matrices and that of tokenizers would start
# a thread for every core.
_START = """
import os, sys
os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path[:] = sys.argv[2:]
from megapoly.data import worker
worker.main(int(sys.argv[1]))
"""


@dataclass(frozen=True)
class Setup:
    """What every worker is told first."""

    model: Path
    sha256: str
    language: str
    options: Options


@dataclass(frozen=True)
class Done:
    """A message of a worker: what it has encoded since the last one, and whether its piece is whole."""

    documents: int
    bytes: int
    whole: bool


class Workers:
    """A row of worker processes, which end with the context.

    Args:
        count: how many.
        keep: descriptors that they inherit.
    """

    def __init__(self, count: int, setup: Setup, keep: tuple[int, ...]) -> None:
        self._count, self._setup, self._keep = count, setup, keep
        self._processes: dict[Connection, subprocess.Popen[bytes]] = {}
        self._busy: dict[Connection, Piece] = {}

    def __enter__(self) -> Workers:
        try:
            for _ in range(self._count):  # at once: an interpreter takes a while to begin
                self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.kill()
        for connection, process in self._processes.items():
            process.wait()
            connection.close()

    def run(
        self, pieces: Iterator[Piece], where: Callable[[Piece], Path], progress: Callable[[Piece, Done], None]
    ) -> None:
        """Encode all pieces, each into a dataset at ``where`` it belongs.

        Not more than one piece for each worker is taken from ``pieces``, and one more.

        Raises:
            MegapolyError: that of a worker; a DataError where one was killed.
        """
        coming = next(pieces, None)
        while coming is not None or self._busy:
            idle = next((each for each in self._processes if each not in self._busy), None)
            if coming is not None and idle is not None:
                self._busy[idle] = coming.without_text()
                self._send(idle, (where(coming), coming))
                coming = next(pieces, None)
            # What has been said meanwhile is heard; it is waited for where nothing else is to be done.
            able = coming is not None and len(self._busy) < self._count
            for ready in wait(list(self._busy), timeout=0 if able else None):
                assert isinstance(ready, Connection)
                self._hear(ready, progress)

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", _START, str(theirs.fileno()), *sys.path],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), *self._keep),
                start_new_session=True,
            )
            connection = Connection(ours.detach())
        self._processes[connection] = process
        self._send(connection, self._setup)

    def _send(self, connection: Connection, message: object) -> None:
        try:
            connection.send(message)
        except OSError as error:
            raise self._dead(connection) from error

    def _hear(self, connection: Connection, progress: Callable[[Piece, Done], None]) -> None:
        try:
            message = connection.recv()
        except (EOFError, OSError) as error:
            raise self._dead(connection) from error
        if isinstance(message, MegapolyError):
            raise message
        if not isinstance(message, Done):
            raise RuntimeError(f"a worker failed:\n{message}")
        piece = self._busy[connection]
        if message.whole:
            del self._busy[connection]
        progress(piece, message)

    def _dead(self, connection: Connection) -> DataError:
        process = self._processes[connection]
        code = process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        if code == errno.ENOMEM:
            how = "ran out of memory"
        hint = "; the machine may be out of memory, of which fewer --processes need less"
        piece = self._busy.get(connection)
        return DataError(
            f"{piece or 'the next piece'}: worker process {process.pid}, which was to encode this, {how}"
            f"{hint if code in (-signal.SIGKILL, errno.ENOMEM) else ''}; the same command goes on from what is whole"
        )


def main(descriptor: int) -> None:
    """Encode what comes until the parent ends; what fails is told to it."""
    connection = Connection(descriptor)
    _end_with_parent(descriptor)
    try:
        _serve(connection)
    except MemoryError:
        sys.exit(errno.ENOMEM)
    except MegapolyError as error:
        _tell(connection, error)
    except Exception:  # whatever it is: the parent raises it, and this process ends
        _tell(connection, traceback.format_exc())


def _serve(connection: Connection) -> None:
    setup: Setup = _hear(connection)
    tokenizer = load_tokenizer(setup.model)
    if tokenizer.sha256 != setup.sha256:
        raise DataError(f"{setup.model}: has changed since the build began; give the file that it began with")
    encoder = Encoder(tokenizer, setup.language, setup.options)
    while True:
        prefix, piece = _hear(connection)
        encoder.write(piece.chunks, prefix, lambda documents, size: _tell(connection, Done(documents, size, False)))
        del piece  # before the next one takes as much
        _tell(connection, Done(0, 0, True))


def _hear(connection: Connection) -> Any:
    try:
        return connection.recv()
    except (EOFError, OSError):
        sys.exit(1)  # the parent is gone


def _tell(connection: Connection, message: object) -> None:
    try:
        connection.send(message)
    except OSError:
        sys.exit(1)


def _end_with_parent(descriptor: int) -> None:
    """End this process, in the middle of a piece too, when nobody holds the other end of the socket any more."""
    ended = select.poll()
    ended.register(descriptor, 0)  # of what is always told: that the other end is closed

    def watch() -> None:
        ended.poll()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
