"""Options of the commands that read text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from megapoly.errors import DataError

if TYPE_CHECKING:
    from megapoly.data.readers import BadRecords

LanguageFiles = Annotated[
    list[str],
    typer.Argument(
        metavar="LANG=FILE...",
        help="Files, directories or patterns: .jsonl, .txt (also .gz, .zst), .parquet; a language may come again.",
    ),
]
TextField = Annotated[str, typer.Option(help="Field of a record that holds the text.")]
DocumentUnit = Annotated[
    Literal["file", "line", "paragraph"], typer.Option("--document", help="What is a document of a .txt file.")
]
BadPolicy = Annotated[
    Literal["stop", "skip"], typer.Option("--on-bad", help="At a bad record stop, or skip and count it.")
]


def language_files(arguments: Sequence[str]) -> dict[str, list[Path]]:
    """Paths by language, in the order of the languages' first."""
    grouped: dict[str, list[Path]] = {}
    for argument in arguments:
        language, separator, path = argument.partition("=")
        if not (language and separator and path):
            raise DataError(f"{argument!r}: expected LANG=FILE, such as th=th.jsonl.gz")
        grouped.setdefault(language, []).append(Path(path))
    return grouped


def print_skipped(bad: BadRecords) -> None:
    for line in bad.report():
        print(line)
