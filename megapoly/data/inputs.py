"""Which files hold text: by their suffixes, named, matched by patterns or below directories. No torch."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from megapoly.data import compression
from megapoly.errors import DataError

JSON, TEXT, PARQUET = (".jsonl", ".json", ".ndjson"), (".txt",), (".parquet",)
KNOWN = "*.jsonl, *.json, *.ndjson (an object a line) and *.txt, each also with .gz or .zst, and *.parquet"


def format_of(path: Path) -> tuple[str, ...] | None:
    """JSON, TEXT or PARQUET; None of another suffix."""
    name = path.with_suffix("") if compression.compression(path) else path
    kinds = (JSON, TEXT) if name != path else (JSON, TEXT, PARQUET)
    return next((kind for kind in kinds if name.suffix in kind), None)


def expand(inputs: Sequence[Path | str]) -> list[Path]:
    """The files that are named, are matched by a pattern such as ``text/**/th-*.jsonl.gz``, or lie below a directory.

    Inputs keep their order; what one of them stands for is sorted by path. Names that begin with a dot are left out
    of directories.

    Raises:
        DataError: an input stands for nothing, a file is of no known format, or comes twice.
    """
    files: list[Path] = []
    for given in inputs:
        path = Path(given)
        if path.exists() or not glob.has_magic(str(given)):
            found = [path]
        else:
            found = [Path(name) for name in glob.glob(str(given), recursive=True)]
        found = [file for match in found for file in (_below(match) if match.is_dir() else [match])]
        if not found:
            raise DataError(f"{given}: no file; expected {KNOWN}")
        for file in sorted(set(found), key=lambda file: file.parts):
            if format_of(file) is None:
                hint = (
                    "" if file == path else f"; to leave it out, name the others by a pattern such as '{given}/*.jsonl'"
                )
                raise DataError(f"{file}: is of no known format; expected {KNOWN}{hint}")
            files.append(file)
    seen: set[Path] = set()
    for file in files:
        absolute = Path(os.path.abspath(file))
        if absolute in seen:
            raise DataError(f"{file}: is named twice, and its text would be read twice; name it once")
        seen.add(absolute)
    return files


def _below(folder: Path) -> list[Path]:
    """The files below a directory; directories that are linked into it are read, once."""
    files: list[Path] = []
    visited: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        folders[:] = [] if real in visited else sorted(name for name in folders if not name.startswith("."))
        if real not in visited:
            files += [Path(root, name) for name in names if not name.startswith(".")]
        visited.add(real)
    return files
