"""``megapoly tokenizer`` and ``megapoly data``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from megapoly.cli.common import SETTINGS, JsonFile, make_bar, make_table, write_rows
from megapoly.errors import DataError

tokenizer_app = typer.Typer(help="Train a tokenizer, and see how it does on every language.", **SETTINGS)
data_app = typer.Typer(help="Build, look into and verify indexed datasets.", **SETTINGS)

LanguageFiles = Annotated[
    list[str],
    typer.Argument(metavar="LANG=FILE...", help="JSON lines, .jsonl or .jsonl.gz; a language may come again."),
]
TextField = Annotated[str, typer.Option(help="Field of a record that holds the text.")]
Prefixes = Annotated[list[Path], typer.Argument(metavar="PREFIX...", help="Path without .bin, .idx, .json.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what exists.")]


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
    from megapoly.data import tokenizer

    begun = time.monotonic()
    grouped = _language_files(files)
    made = tokenizer.train_tokenizer(
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
    from megapoly.data import tokenizer

    loaded = tokenizer.Tokenizer.load(model)
    with Console(stderr=True).status("") as status:
        rows = tokenizer.report(loaded, _language_files(files), text_field=text_field, progress=status.update)
    table = make_table("language", "documents", "MB", "tokens", "bytes/token", "single bytes")
    for row in rows:
        share = f"{100 * row.byte_share:.2f} %"
        ratio = f"{row.bytes_per_token:.3f}"
        table.add_row(row.language, f"{row.documents:,}", f"{row.bytes / 1e6:.2f}", f"{row.tokens:,}", ratio, share)
    Console().print(table)
    if json_file:
        write_rows(json_file, [{"name": r.language, "value": r.bytes_per_token, "unit": "bytes/token"} for r in rows])


@data_app.command("build")
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


@data_app.command("inspect")
def data_inspect(
    prefixes: Prefixes,
    tokenizer: Annotated[Path | None, typer.Option(help="Check that this tokenizer built them.")] = None,
    document: Annotated[int | None, typer.Option(help="Show this document; as text, with --tokenizer.")] = None,
) -> None:
    """What indexed datasets hold.

    [bold]Example:[/bold] megapoly data inspect data/en data/th --tokenizer poly.model --document 0
    """
    from megapoly.data.indexed import IndexedDataset
    from megapoly.data.tokenizer import Tokenizer, check_matches

    loaded = Tokenizer.load(tokenizer) if tokenizer else None
    table = make_table("dataset", "lang", "documents", "held\nout", "tokens", "held\nout", "MB", "ids", "model")
    shown = []
    for prefix in prefixes:
        dataset = IndexedDataset(prefix)
        if loaded:
            check_matches(loaded, dataset)
        side = dataset.sidecar
        table.add_row(
            prefix.name,
            side.language if side else "?",
            f"{dataset.documents:,}",
            f"{dataset.documents - dataset.train_documents:,}",
            f"{dataset.tokens:,}",
            f"{dataset.tokens - dataset.train_tokens:,}",
            f"{side.bytes / 1e6:.2f}" if side else "?",
            f"{side.tokenizer.vocabulary:,}" if side else dataset.dtype.name,
            side.tokenizer.sha256[:6] if side else "?",
        )
        if document is not None:
            if not 0 <= document < dataset.documents:
                raise DataError(f"{prefix}: document {document} of {dataset.documents}; the first is 0")
            ids = dataset.document(document).tolist()
            shown.append(f"{prefix}, document {document}, {len(ids)} tokens:\n{loaded.decode(ids) if loaded else ids}")
    Console().print(table)
    for text in shown:
        print(text)


@data_app.command("verify")
def data_verify(
    prefixes: Prefixes,
    vocabulary: Annotated[int | None, typer.Option(help="Of datasets without a .json, to check their ids.")] = None,
) -> None:
    """Read every byte of indexed datasets, and say where they are damaged.

    [bold]Example:[/bold] megapoly data verify data/en data/th
    """
    from megapoly.data.verify import verify

    damaged = 0
    for prefix in prefixes:
        with make_bar(prefix.name) as (bar, task):

            def show(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total)

            found = verify(prefix, vocabulary=vocabulary, progress=show)
        print(f"{prefix}: {f'{len(found)} damaged places' if found else 'whole'}")
        for damage in found:
            print(f"  {damage}")
        damaged += bool(found)
    if damaged:
        raise DataError(f"{damaged} of {len(prefixes)} datasets are damaged; build or copy them anew")


def _language_files(arguments: Sequence[str]) -> dict[str, list[Path]]:
    grouped: dict[str, list[Path]] = {}
    for argument in arguments:
        language, separator, path = argument.partition("=")
        if not (language and separator and path):
            raise DataError(f"{argument!r}: expected LANG=FILE, such as th=th.jsonl.gz")
        grouped.setdefault(language, []).append(Path(path))
    return grouped
