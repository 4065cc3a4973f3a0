"""Prompts from a file, and completions as JSON lines in one."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from megapoly.errors import DataError

if TYPE_CHECKING:
    from megapoly.generate.generator import Completion

STDIN = Path("-")


def read_prompts(path: Path) -> list[str]:
    """One prompt a line: of a ``.jsonl`` file a string, or an object with a string ``prompt``. ``-`` is the input.

    Empty lines of plain text are left out.

    Raises:
        DataError: the file cannot be read, is not UTF-8, has another kind of line, or has no prompt.
    """
    try:
        content = sys.stdin.buffer.read() if path == STDIN else path.read_bytes()
        lines = content.decode("utf-8-sig").split("\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a file with one prompt a line") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
    parts = [(number, line.rstrip("\r")) for number, line in enumerate(lines, 1) if line.strip()]
    prompts = [_from_json(path, *part) if path.suffix == ".jsonl" else part[1] for part in parts]
    if not prompts:
        raise DataError(f"{path}: has no prompt; give one a line")
    return prompts


def _from_json(path: Path, number: int, line: str) -> str:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}: line {number} is not JSON ({error}); write a string or an object a line") from error
    prompt = found.get("prompt") if isinstance(found, dict) else found
    if not isinstance(prompt, str):
        raise DataError(f'{path}: line {number} holds no prompt; expected a string, or {{"prompt": "..."}}')
    return prompt


def to_json_lines(completions: Sequence[Completion]) -> bytes:
    """One object a completion, with its fields."""
    return "".join(json.dumps(asdict(each), ensure_ascii=False) + "\n" for each in completions).encode()


class JsonLines:
    """A file that completions are added to as they come, so that an interruption keeps those that are there.

    Opening it shows that it can be written. What it held is replaced when the first completions come, not before.

    Raises:
        DataError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._made, self._begun = path, not path.exists(), False
        try:
            with suppress(FileExistsError):  # a file where the folder should be, which open tells better
                path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by __exit__
        except OSError as error:
            raise self._refusal(error) from error

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        if self._made and not self._begun:
            self._path.unlink(missing_ok=True)

    def add(self, completions: Sequence[Completion]) -> None:
        try:
            if not self._begun and self._path.is_file():  # no pipe or device
                self._file.truncate(0)
            self._begun = True
            rest = memoryview(to_json_lines(completions))
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise self._refusal(error) from error

    def _refusal(self, error: OSError) -> DataError:
        return DataError(f"{self._path}: cannot be written ({error.strerror}); give a file in a folder that can be")
