"""``megapoly data build``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from megapoly.cli.common import Overwrite, make_bar


def data_build(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="JSON lines, .jsonl or .jsonl.gz.")],
    output: Annotated[Path, typer.Option(help="Path of the dataset, without .bin, .idx, .json.")],
    tokenizer: Annotated[Path, typer.Option(help="Model file of the tokenizer.")],
    language: Annotated[str, typer.Option(help="Language of the text, such as th; of pairs, such as en-th.")],
    pairs: Annotated[bool, typer.Option("--pairs", help="Records are aligned pairs of texts.")] = False,
    fields: Annotated[
        str, typer.Option(help="Field of the text ('text' where not given), or, of pairs, the two, such as en,th.")
    ] = "",
    key_field: Annotated[str, typer.Option(help="Field that, where present, decides what is held out.")] = "key",
    validation: Annotated[float, typer.Option(help="Share of the documents held out for validation.")] = 0.001,
    seed: Annotated[int, typer.Option(help="Of the split, the same for every dataset of a run.")] = 1234,
    threads: Annotated[int, typer.Option(min=0, help="For encoding; 0 is one for each core.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Encode JSON lines into an indexed dataset.

    [bold]Example:[/bold] megapoly data build --tokenizer poly.model --language th --output data/th th.jsonl.gz
    """
    from megapoly.data import builder
    from megapoly.data.tokenizer import Tokenizer

    loaded = Tokenizer.load(tokenizer)
    names = tuple(name.strip() for name in fields.split(",")) if fields else ()
    options = builder.Options(names, pairs, key_field, validation, seed, threads, overwrite)
    begun = time.monotonic()
    with make_bar(output.name) as (bar, task):

        def show(state: builder.Progress) -> None:
            bar.update(task, completed=state.input_read, total=state.input_size)

        made = builder.build(files, output, loaded, language=language, options=options, progress=show)
    spent = time.monotonic() - begun
    print(
        f"{output}: {made.documents:,} documents ({made.validation.documents:,} held out), {made.bytes / 1e6:.2f} MB,"
        f" {made.tokens:,} tokens, {made.bytes / made.tokens:.3f} bytes/token, {spent:.1f} s,"
        f" {made.bytes / 1e6 / spent:.1f} MB/s"
    )
    if validation and not made.validation.documents:
        print(f"  none of so few documents is held out at --validation {validation}: this source will not be validated")
