"""Files that are written whole or not at all. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megapoly.errors import DataError


def partial(path: Path) -> Path:
    """The temporary name of a file that is being written, in the same folder."""
    return path.with_name(path.name + ".partial")


@contextmanager
def temporaries(*paths: Path) -> Iterator[None]:
    """At the end, however it comes, remove what still has its temporary name."""
    try:
        yield
    finally:
        for path in paths:
            partial(path).unlink(missing_ok=True)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and bring it to the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder, and those that it is in, where they are missing, and bring their names to the disk."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in missing:
        sync_folder(each.parent)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file under a temporary name and rename it: ``path`` is the old file or the whole new one.

    Raises:
        DataError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporaries(path):
            write_synced(partial(path), data)
            os.replace(partial(path), path)
        sync_folder(path.parent)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error})") from error
