"""``megapoly tokenizer``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from megapoly.cli.common import SETTINGS, JsonFile, Overwrite, make_table, write_rows
from megapoly.errors import DataError

tokenizer_app = typer.Typer(help="Train a tokenizer, and see how it does on every language.", **SETTINGS)

LanguageFiles = Annotated[
    list[str],
    typer.Argument(metavar="LANG=FILE...", help="JSON lines, .jsonl or .jsonl.gz; a language may come again."),
]
TextField = Annotated[str, typer.Option(help="Field of a record that holds the text.")]


@tokenizer_app.command("train")
def tokenizer_train(
    files: LanguageFiles,
    output: Annotated[Path, typer.Option(help="Model file to write.")],
    vocabulary: Annotated[int, typer.Option(help="Number of ids, specials and 256 bytes included.")],
    alpha: Annotated[
        float, typer.Option(help="Languages are seen by their size to this power: 0 alike, 1 as is.")
    ] = 0.3,
    budget_mb: Annotated[float, typer.Option(help="Text to train on, in MB.")] = 200.0,
    text_field: TextField = "text",
    overwrite: Overwrite = False,
) -> None:
    """Train a SentencePiece BPE tokenizer on text in several languages.

    [bold]Example:[/bold] megapoly tokenizer train --output poly.model --vocabulary 16384 en=en.jsonl.gz th=th.jsonl
    """
    from megapoly.data.tokenizer_training import train_tokenizer

    begun = time.monotonic()
    grouped = _language_files(files)
    made = train_tokenizer(
        grouped,
        output,
        vocabulary=vocabulary,
        alpha=alpha,
        budget=int(budget_mb * 1e6),
        text_field=text_field,
        overwrite=overwrite,
    )
    print(f"{output}: {made.vocabulary:,} ids, {len(grouped)} languages, {time.monotonic() - begun:.1f} s")


@tokenizer_app.command("report")
def tokenizer_report(
    model: Annotated[Path, typer.Argument(help="Model file.")],
    files: LanguageFiles,
    text_field: TextField = "text",
    json_file: JsonFile = None,
) -> None:
    """Bytes per token in every language; more is better.

    [bold]Example:[/bold] megapoly tokenizer report poly.model en=en.jsonl.gz th=th.jsonl
    """
    from megapoly.data.tokenizer import Tokenizer
    from megapoly.data.tokenizer_report import report

    loaded = Tokenizer.load(model)
    with Console(stderr=True).status("") as status:
        rows = report(loaded, _language_files(files), text_field=text_field, progress=status.update)
    table = make_table("language", "documents", "MB", "tokens", "bytes/token", "single bytes")
    for row in rows:
        share = f"{100 * row.byte_share:.2f} %"
        ratio = f"{row.bytes_per_token:.3f}"
        table.add_row(row.language, f"{row.documents:,}", f"{row.bytes / 1e6:.2f}", f"{row.tokens:,}", ratio, share)
    Console().print(table)
    if json_file:
        write_rows(json_file, [{"name": r.language, "value": r.bytes_per_token, "unit": "bytes/token"} for r in rows])


def _language_files(arguments: Sequence[str]) -> dict[str, list[Path]]:
    grouped: dict[str, list[Path]] = {}
    for argument in arguments:
        language, separator, path = argument.partition("=")
        if not (language and separator and path):
            raise DataError(f"{argument!r}: expected LANG=FILE, such as th=th.jsonl.gz")
        grouped.setdefault(language, []).append(Path(path))
    return grouped
