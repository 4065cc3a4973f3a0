"""Prompts from a file, and completions as JSON lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
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
        lines = content.decode().splitlines() if path == STDIN else content.decode().split("\n")
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
