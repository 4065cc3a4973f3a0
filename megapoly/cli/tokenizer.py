"""``megapoly tokenizer``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from megapoly.cli.common import SETTINGS, Overwrite
from megapoly.cli.inputs import BadPolicy, DocumentUnit, LanguageFiles, TextField, language_files, print_skipped
from megapoly.cli.tokenizer_report import tokenizer_check, tokenizer_report

tokenizer_app = typer.Typer(help="Train a tokenizer, and see how it does on every language.", **SETTINGS)

tokenizer_app.command("report")(tokenizer_report)
tokenizer_app.command("check")(tokenizer_check)


@tokenizer_app.command("train")
def tokenizer_train(
    files: LanguageFiles,
    output: Annotated[Path, typer.Option(help="Model file to write.")],
    vocabulary: Annotated[int, typer.Option(help="Number of ids, specials and 256 bytes included.")],
    alpha: Annotated[
        float, typer.Option(help="Languages are seen by their size to this power: 0 alike, 1 as is.")
    ] = 0.3,
    budget_mb: Annotated[float, typer.Option(min=0.001, help="Text to train on, in MB.")] = 200.0,
    text_field: TextField = "text",
    document: DocumentUnit = "file",
    on_bad: BadPolicy = "stop",
    overwrite: Overwrite = False,
) -> None:
    """Train a SentencePiece BPE tokenizer on text in several languages.

    [bold]Example:[/bold] megapoly tokenizer train --output poly.model --vocabulary 16384 en=en.jsonl.gz th=th.jsonl
    """
    from megapoly.data.readers import BadRecords
    from megapoly.data.tokenizer_training import train_tokenizer

    begun = time.monotonic()
    bad = BadRecords(on_bad)
    grouped = language_files(files)
    made = train_tokenizer(
        grouped,
        output,
        vocabulary=vocabulary,
        alpha=alpha,
        budget=int(budget_mb * 1e6),
        text_field=text_field,
        document=document,
        bad=bad,
        overwrite=overwrite,
    )
    print_skipped(bad)
    print(f"{output}: {made.vocabulary:,} ids, {len(grouped)} languages, {time.monotonic() - begun:.1f} s")
