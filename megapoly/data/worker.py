"""Processes that encode pieces. No torch.

A worker is a new interpreter, ``python -m megapoly.data.worker``, which talks over a socket: so it starts quickly, needs
no guard in the caller's script, and its end, whatever its cause, ends the conversation. The other way round it ends at
once when its parent does. It is in a session of its own, so that Ctrl-C reaches the parent only.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

from megapoly.data.documents import Options
from megapoly.data.encode import Encoder
from megapoly.data.pieces import Piece
from megapoly.data.tokenizer import Tokenizer
from megapoly.errors import DataError, MegapolyError


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
            idle = [connection for connection in self._processes if connection not in self._busy]
            if coming is not None and (idle or len(self._processes) < self._count):
                connection = idle[0] if idle else self._start()
                self._busy[connection] = coming
                self._send(connection, (where(coming), coming))
                coming = next(pieces, None)
                # What has been said meanwhile is heard at once, and nothing is waited for.
            able = coming is not None and len(self._busy) < self._count
            for ready in wait(list(self._busy), timeout=0 if able else None):
                assert isinstance(ready, Connection)
                self._hear(ready, progress)

    def _start(self) -> Connection:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            arguments = [sys.executable, "-m", "megapoly.data.worker", str(theirs.fileno())]
            # The parent may have found its modules where an interpreter alone does not look.
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
            process = subprocess.Popen(
                arguments,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), *self._keep),
                start_new_session=True,
            )
            connection = Connection(ours.detach())
        self._processes[connection] = process
        self._send(connection, self._setup)
        return connection

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
        out = "; the machine may be out of memory, which fewer processes need less of" if code == -9 else ""
        piece = self._busy.get(connection)
        return DataError(f"{piece or 'a worker'}: worker process {process.pid}, which encoded this, {how}{out}")


def serve(connection: Connection) -> None:
    """Encode what comes until the parent ends."""
    setup: Setup = connection.recv()
    tokenizer = Tokenizer.load(setup.model)
    if tokenizer.sha256 != setup.sha256:
        raise DataError(f"{setup.model}: has changed since the build began; give the file that it began with")
    encoder = Encoder(tokenizer, setup.language, setup.options)
    while True:
        prefix, piece = connection.recv()
        made = encoder.write(piece.chunks, prefix, lambda documents, size: connection.send(Done(documents, size, False)))
        del piece, made  # before the next one takes as much
        connection.send(Done(0, 0, True))


def _end_with(parent: int) -> None:
    """End this process when the last other process that holds the other end of a pipe has ended."""

    def watch() -> None:
        os.read(parent, 1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(descriptor: int) -> None:
    connection = Connection(descriptor)
    try:
        serve(connection)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        sys.exit(1)  # the parent is gone
    except MegapolyError as error:
        connection.send(error)
    except Exception:
        connection.send(traceback.format_exc())


if __name__ == "__main__":
    main(int(sys.argv[1]))
