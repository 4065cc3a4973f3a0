"""Debian packages without root: downloaded by apt-get, unpacked by dpkg-deb, kept for the next time."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from megapoly.errors import DataError

_NAME = "package.txt"  # in an unpacked package


def _run(command: Sequence[str], folder: Path) -> str:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise DataError(f"{command[0]} is not here; this example needs Debian or Ubuntu, with apt and dpkg") from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise DataError(f"{' '.join(command)} ended with code {done.returncode}: {said[-1] if said else 'no message'}")
    return done.stdout


class Cache:
    """Unpacked packages under one folder.

    ``offline`` takes what is there and downloads nothing.
    """

    def __init__(self, folder: Path, *, offline: bool = False) -> None:
        self.folder = folder.resolve()
        self.offline = offline
        self.folder.mkdir(parents=True, exist_ok=True)

    def package(self, name: str) -> Path:
        """The folder that the package is unpacked in; of a pattern such as ``wesnoth-1.*-data`` the newest package.

        Raises:
            DataError: the package is not to be had, or apt or dpkg is not here.
        """
        if "*" in name:
            name = self._newest(name)
        final = self.folder / name
        if final.is_dir():
            return final
        if self.offline:
            raise DataError(f"{name}: not in {self.folder}; run without --offline to download it")
        with tempfile.TemporaryDirectory(dir=self.folder) as temporary:
            _run(["apt-get", "download", "-qq", name], Path(temporary))
            found = sorted(Path(temporary).glob("*.deb"))
            if len(found) != 1:
                raise DataError(f"{name}: apt-get downloaded {len(found)} packages, expected one")
            unpacked = Path(temporary) / "unpacked"
            _run(["dpkg-deb", "-x", str(found[0]), str(unpacked)], Path(temporary))
            (unpacked / _NAME).write_text(found[0].name, encoding="utf-8")
            os.replace(unpacked, final)
        return final

    def file_name(self, folder: Path) -> str:
        """The file name of the package that was unpacked in a folder, which has its version."""
        return (folder / _NAME).read_text(encoding="utf-8").strip()

    def _newest(self, pattern: str) -> str:
        names = [path.name for path in self.folder.glob(pattern)]
        if not names and not self.offline:
            listed = _run(["apt-cache", "pkgnames", pattern.partition("*")[0]], self.folder).split()
            names = fnmatch.filter(listed, pattern)
        if not names:
            raise DataError(f"{pattern}: no such package")
        return max(names, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])

    def translations(self, codes: Iterable[str]) -> dict[str, list[Path]]:
        """The files of translated package descriptions by code, such as ``pt_BR``, as apt has them for this system.

        A package index of its own is kept in the cache, since the system's may be without translations.
        """
        final = self.folder / "translations"
        if not final.is_dir():
            if self.offline:
                raise DataError(f"descriptions: not in {self.folder}; run without --offline to download them")
            with tempfile.TemporaryDirectory(dir=self.folder) as temporary:
                lists, cache = Path(temporary) / "lists", Path(temporary) / "cache"
                for folder in (lists / "partial", cache / "archives/partial"):
                    folder.mkdir(parents=True)
                options = {
                    "Dir::State::Lists": lists,
                    "Dir::Cache": cache,
                    "Acquire::Languages": ",".join(sorted(codes)),
                    "Acquire::GzipIndexes": "false",
                    "APT::Update::Post-Invoke-Success::": "",
                    "APT::Update::Post-Invoke::": "",
                    "APT::Sandbox::User": "",
                }
                _run(["apt-get", "update", "-qq", *(f"-o{key}={value}" for key, value in options.items())], lists)
                kept = Path(temporary) / "translations"
                kept.mkdir()
                for path in lists.glob("*_i18n_Translation-*"):
                    (kept / path.name).write_bytes(_plain(path))
                os.replace(kept, final)
        found: dict[str, list[Path]] = {}
        for path in sorted(final.glob("*_i18n_Translation-*")):
            code = path.name.rpartition("Translation-")[2].replace("%5f", "_")
            found.setdefault(code, []).append(path)
        return found


def _plain(path: Path) -> bytes:
    """The file's content; apt's own helper reads what apt has compressed (.lz4 in containers)."""
    if path.suffix not in (".lz4", ".gz", ".xz", ".zst", ".bz2"):
        return path.read_bytes()
    helper = shutil.which("apt-helper", path="/usr/lib/apt")
    if helper is None:
        raise DataError(f"{path.name} is compressed, and /usr/lib/apt/apt-helper, which reads it, is not here")
    return subprocess.run([helper, "cat-file", str(path)], capture_output=True, check=True).stdout
