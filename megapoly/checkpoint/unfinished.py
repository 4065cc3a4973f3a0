"""A folder that is written file by file and gets its name when it is whole; an interruption keeps the finished files.

FOLDER/.NAME.partial/.journal     the identity of the work, then a line of JSON for every finished file
FOLDER/.NAME.partial/...          finished files; one that is being written has a name that begins with a dot
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from megapoly import __version__
from megapoly.data.files import make_folder, sync_folder
from megapoly.errors import CheckpointError

_JOURNAL = ".journal"
T = TypeVar("T")


class Unfinished:
    """The folder ``final`` while it is written, by one process at a time; a context manager.

    Work that was interrupted goes on where its ``identity`` is the same, else it begins anew.

    Args:
        identity: plain values that all bytes of the result follow from: what is read (:func:`fingerprint`), and the
            options. The version of megapoly is added to them.

    Attributes:
        path: the folder until it is finished, ``.NAME.partial``.
        note: a sentence for the user on what an earlier attempt left; empty where there was none.

    Raises:
        CheckpointError: ``final`` exists, another process writes it, or the disk refuses.
    """

    def __init__(self, final: Path, identity: dict[str, Any]) -> None:
        self.final = Path(os.path.abspath(final))
        self.path = self.final.with_name(f".{self.final.name}.partial")
        self.note = ""
        self._identity = json.loads(json.dumps({"megapoly": __version__, **identity}))
        self._finished: dict[str, Any] = {}
        if self.final.exists():
            raise CheckpointError(f"{final}: exists already; give a new name, or remove it")
        try:
            self._begin()
        except OSError as error:
            files = [each for each in self.final.parents if each.is_file()]
            if files:
                raise CheckpointError(
                    f"{self.final}: cannot be made, since {files[0]} is a file and no folder; give another name, or"
                    " move it away"
                ) from error
            raise CheckpointError(
                f"{self.path}: cannot be written ({error.strerror}); free or choose another disk"
            ) from error

    def done(self, name: str) -> Any | None:
        """The record of a file that is finished, else None: a file whose ``done`` is asked for needs a record."""
        return self._finished.get(name)

    def finish_file(self, name: str, write: Callable[[Path], T]) -> T:
        """Have ``write`` make a file under a temporary name, bring it to the disk and give it its name.

        Args:
            name: relative to the folder; may be in folders of its own.
            write: is given a path that does not exist, and returns a record of plain values, which is kept.

        Raises:
            CheckpointError: it could not be written; what was finished before stays.
        """
        path = self.path / name
        temporary = path.with_name(f".{path.name}.partial")
        try:
            make_folder(path.parent)
            temporary.unlink(missing_ok=True)
            record = write(temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            size = temporary.stat().st_size
            os.replace(temporary, path)
            sync_folder(path.parent)
            self._note({"name": name, "bytes": size, "record": record})
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise CheckpointError(
                f"{path}: could not be written ({error.strerror or error}); {self.final} is not made. Make room"
                f" and give the same command again, which goes on after the {len(self._finished)} finished files, or"
                f" remove {self.path}"
            ) from error
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        self._finished[name] = record
        return record

    def finish(self) -> Path:
        """Give the folder its name; all its files have to be finished.

        Raises:
            CheckpointError: the disk refuses, or there is something of that name by now.
        """
        try:
            self._remove_strangers()
            (self.path / _JOURNAL).unlink()
            for folder in (*(path for path in self.path.rglob("*") if path.is_dir()), self.path):
                sync_folder(folder)
            if self.final.exists():
                raise FileExistsError(0, "something of that name is there by now")
            os.rename(self.path, self.final)
            sync_folder(self.final.parent)
        except OSError as error:
            raise CheckpointError(f"{self.final}: {self.path} could not get this name ({error.strerror})") from error
        self._journal.close()
        return self.final

    def __enter__(self) -> Unfinished:
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.close()

    def _begin(self) -> None:
        make_folder(self.final.parent)
        if self.path.exists():
            self._lock()
            kept = self._read()
            if kept is not None:
                self._finished = kept
                files = "file" if len(kept) == 1 else "files"
                self.note = f"goes on after the {len(kept)} {files} that an interrupted attempt has finished"
                return
            self._journal.close()
            shutil.rmtree(self.path)
        self.path.mkdir()
        self._lock()
        self._note(self._identity)
        sync_folder(self.path)
        sync_folder(self.path.parent)

    def _lock(self) -> None:
        # Unbuffered, since a buffer that a full disk refused would be written, and refused, again by closing it.
        self._journal = open(self.path / _JOURNAL, "a+b", buffering=0)  # noqa: SIM115 - closed by __exit__
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._journal.close()
            raise CheckpointError(f"{self.final}: another process is writing it; wait for it, or end it") from error

    def _read(self) -> dict[str, Any] | None:
        """Records of the finished files, or None, with a note, where the work was another."""
        self._journal.seek(0)
        lines = self._journal.read().splitlines(keepends=True)
        whole = [json.loads(line) for line in lines if line.endswith(b"}\n")]
        if whole[:1] != [self._identity]:
            found = whole[0] if whole else {}
            keys = sorted(
                key for key in found.keys() | self._identity.keys() if found.get(key) != self._identity.get(key)
            )
            self.note = f"discarded an interrupted attempt of other work ({', '.join(keys)})" if whole else ""
            return None
        self._journal.truncate(sum(len(line) for line in lines if line.endswith(b"}\n")))  # a line that a kill cut
        return {
            line["name"]: line["record"]
            for line in whole[1:]
            if (self.path / line["name"]).is_file() and (self.path / line["name"]).stat().st_size == line["bytes"]
        }

    def _note(self, line: Any) -> None:
        rest = memoryview(json.dumps(line, allow_nan=False).encode() + b"\n")
        while rest:
            rest = rest[self._journal.write(rest) or 0 :]
        os.fsync(self._journal.fileno())

    def _remove_strangers(self) -> None:
        """Whatever a killed attempt has left half done."""
        for path in list(self.path.rglob("*")):
            name = path.relative_to(self.path).as_posix()
            if path.is_file() and name not in self._finished and name != _JOURNAL:
                path.unlink()


def copy_of(source: Path) -> Callable[[Path], None]:
    """What makes a file as a copy, for :meth:`Unfinished.finish_file`."""

    def make(target: Path) -> None:
        shutil.copyfile(source, target)

    return make


def fingerprint(files: Iterable[Path]) -> list[Any]:
    """Name, size and time of change of every file: plain values that differ where their bytes were changed."""
    found = ((path, path.stat()) for path in sorted(files))
    return [[path.name, status.st_size, status.st_mtime_ns] for path, status in found]
