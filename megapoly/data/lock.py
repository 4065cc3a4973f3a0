"""A lock on a folder that ends with the processes that hold it. No torch."""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path

from megapoly.errors import DataError

_ORPHANS_SECONDS = 20.0  # workers end at once after their parent, unless a slow disk holds them


def lock_folder(folder: Path, held: str, advice: str) -> int:
    """Lock a folder that may be made for it, or be removed by who had the lock before; the file ``lock`` in it, open.

    The lock ends when the file is closed by this process and all that were forked from it, however that comes.

    Args:
        held: what is said of another one that holds it.
        advice: what the user can do then.

    Raises:
        DataError: another one holds it.
        OSError: the folder cannot be written.
    """
    deadline = time.monotonic() + _ORPHANS_SECONDS
    while True:
        folder.mkdir(exist_ok=True)
        path = folder / "lock"
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(lock), path.stat()):
                os.ftruncate(lock, 0)
                os.pwrite(lock, json.dumps([os.uname().nodename, os.getpid()]).encode(), 0)
                return lock
            os.close(lock)
        except BlockingIOError:
            owner = os.pread(lock, 1000, 0)
            os.close(lock)
            if _alive(owner) or time.monotonic() > deadline:
                raise DataError(f"{folder}: {held} ({_owner(owner)}); {advice}") from None
            time.sleep(0.05)
        except BaseException:
            os.close(lock)
            raise


def _owner(written: bytes) -> str:
    try:
        node, process = json.loads(written)
    except ValueError:
        return "of an unknown process"
    return f"process {process} on {node}"


def _alive(written: bytes) -> bool:
    """Whether who holds a lock is known to run; its workers may still hold the lock a moment after its death."""
    try:
        node, process = json.loads(written)
    except ValueError:
        return False
    if node != os.uname().nodename:
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
