"""A thread beside the training that notices a rank without progress and a peer that is gone.

No collective would end then, so the ranks talk over the process group's store: a rank that has not moved for a while
opens a round, every rank that lives says where it stands, and the lowest of them names those that did not. What is
polled is one key of rounds and one of losses, whatever the number of ranks.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch.distributed as dist

from megapoly.comm import PeerLost
from megapoly.mesh import Mesh

GRACE = 10.0  # seconds that a rank has to fail by itself once a peer is lost
_BEFORE_TIMEOUT = 0.9  # share of the timeout after which the ranks say again where they stand: NCCL ends them without


class Standing(NamedTuple):
    """Where a rank stands.

    Attributes:
        step: steps done; None while the run starts up.
        doing: in words that go on from "the rank was".
        moves: any number that changes as the rank gets on.
    """

    step: int | None = None
    doing: str = "starting up"
    moves: int = 0


class Watchdog:
    """Watches this rank and its peers while its block runs. It never raises; without a store it goes on alone.

    Args:
        store: of the process group, for this thread alone (a clone).
        patience: seconds without progress before the ranks say where they stand, once for a hang and again shortly
            before ``timeout``. A run that starts up, or is in its first two steps, has half of ``timeout`` at least.
        timeout: seconds after which a collective fails.
        say: prints a line.
        end: ends this process at once with an error of this text; called ``GRACE`` seconds after a peer was lost, where
            the main thread has not ended by itself.
    """

    def __init__(
        self,
        store: dist.Store,
        mesh: Mesh,
        rank: int,
        *,
        patience: float,
        timeout: float,
        say: Callable[[str], None],
        end: Callable[[str], None],
    ) -> None:
        self._store, self._mesh, self._rank, self._say, self._end = store, mesh, rank, say, end
        late = _BEFORE_TIMEOUT * timeout
        self._alarms_at = (min(patience, late), late)
        self._first_alarms_at = (min(max(patience, timeout / 2), late), late)
        self._interval = min(1.0, patience / 4)
        self._where: Callable[[], Standing] = Standing
        self._last, self._since = Standing(), time.monotonic()
        self._first_step: int | None = None
        self._settled = False  # two steps are done
        self._alarms = 0  # raised or answered for the present stand-still
        self._round = 0
        self._tally_at: float | None = None
        self._ends_at: float | None = None
        self._neighbours: dict[int, int] = {}
        self._machine = _machine()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="megapoly-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        entry = f"{self._rank} {os.getpid()};"
        self._store.append(f"machine/{self._machine}", entry)  # type: ignore[attr-defined]  # not in torch's stubs
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(timeout=5.0)
        with suppress(RuntimeError):
            self._store.set(f"ended/{self._rank}", "")
        if error is not None and not isinstance(error, PeerLost):
            self._tell_lost(f"rank {self._rank} has ended with an error")

    def watch(self, where: Callable[[], Standing]) -> None:
        """From now on ``where()``, called in the thread, says where this rank stands."""
        self._where = where

    def standing(self) -> str:
        """This rank's place in the mesh, and where it stands."""
        return f"{name(self._mesh, self._rank)} was {self._where().doing}"

    def lost(self, wait: float = 0.0) -> str:
        """Who made a collective of this rank fail, such as "rank 2 is gone"; empty where that stays unknown.

        For the main thread, after the block. A connection may break before its process has left the table, so this
        waits for so many seconds. Peers that still wait for this rank then end too.
        """
        until = time.monotonic() + wait
        while not (text := self._find_lost()) and time.monotonic() < until:
            time.sleep(0.05)
        with suppress(RuntimeError):
            self._store.set("given up", f"rank {self._rank} has given up waiting")
        return text or self._heard("silent")

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            now = time.monotonic()
            self._leave_if_alone(now)
            with suppress(RuntimeError):  # a store may go with the rank that kept it
                self._look(now)

    def _leave_if_alone(self, now: float) -> None:
        cause = self._find_lost() or self._heard("given up")
        if cause and self._ends_at is None:
            self._ends_at = now + GRACE
        if cause and self._ends_at is not None and now >= self._ends_at:
            self._end(f"{cause}; {self.standing()}")

    def _look(self, now: float) -> None:
        standing = self._where()
        if standing != self._last:
            self._last, self._since, self._alarms = standing, now, 0
        if standing.step is not None:
            self._first_step = standing.step if self._first_step is None else self._first_step
            self._settled |= standing.step >= self._first_step + 2
        still = now - self._since
        if self._due(still) > self._alarms:
            self._store.set(f"round/{self._round + 1}", str(self._rank))
        if self._store.check([f"round/{self._round + 1}"]):
            self._round += 1
            # Who has stood still nearly as long need not raise the same alarm a moment later.
            self._alarms = self._due(still + self._alarms_at[0] / 2)
            self._say(f"{name(self._mesh, self._rank)} has not moved for {still:.1f} s: {standing.doing}")
            self._store.set(f"round/{self._round}/{self._rank}", "")
            self._tally_at = now + 5 * self._interval
        if self._tally_at is not None and now >= self._tally_at:
            self._tally_at = None
            self._tally()

    def _due(self, still: float) -> int:
        """Alarms that a stand-still of so many seconds calls for."""
        return sum(still >= at for at in (self._alarms_at if self._settled else self._first_alarms_at))

    def _tally(self) -> None:
        """The lowest rank that answered names those that did not."""

        def answered(rank: int) -> bool:
            return self._store.check([f"round/{self._round}/{rank}"])

        if any(answered(rank) for rank in range(self._rank)):
            return
        silent = [rank for rank in range(self._rank + 1, self._mesh.world_size) if not answered(rank)]
        silent = [*range(self._rank), *silent]
        if silent:
            names = ", ".join(name(self._mesh, rank) for rank in silent)
            self._say(f"no answer from {names}: stopped, gone, or cut off")
            self._store.set("silent", f"no answer from {names}")

    def _find_lost(self) -> str:
        """Which peer is lost: a neighbour on this machine, or as others have told; empty where none is."""
        if text := self._heard("lost"):
            return text
        if not self._settled and (entries := self._heard(f"machine/{self._machine}")):
            pairs = (entry.split() for entry in entries.rstrip(";").split(";"))
            self._neighbours = {int(rank): int(pid) for rank, pid in pairs}
        gone = [rank for rank, pid in sorted(self._neighbours.items()) if _is_gone(pid)]
        killed = [str(rank) for rank in gone if not self._ended(rank)]
        return self._tell_lost(f"rank {', '.join(killed)} is gone") if killed else ""

    def _tell_lost(self, text: str) -> str:
        """Tell all what is lost, if it is the first that is told; what was first."""
        with suppress(RuntimeError):
            return self._store.compare_set("lost", "", text).decode()
        return text

    def _ended(self, rank: int) -> bool:
        """Whether a rank has left by itself."""
        with suppress(RuntimeError):
            return self._store.check([f"ended/{rank}"])
        return False

    def _heard(self, key: str) -> str:
        with suppress(RuntimeError):
            if self._store.check([key]):
                return self._store.get(key).decode()
        return ""


def name(mesh: Mesh, rank: int) -> str:
    """A rank with its place, such as "rank 3 (dp 1, pp 0, tp 1)"."""
    at = mesh.coordinates(rank)
    return f"rank {rank} (dp {at['dp']}, pp {at['pp']}, tp {at['tp']})"


def _machine() -> str:
    """Names what process ids count in: two containers of one host have each their own."""
    with suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        # A killed process stays in the table until its parent has asked for its end.
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[-1].split()[0] == "Z"
    except ProcessLookupError:
        return True
    except OSError:  # no /proc
        return False
