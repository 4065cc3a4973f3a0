"""``megapoly data``: look into and verify indexed datasets; building and merging have files of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from megapoly.cli.common import SETTINGS, make_bar, make_table
from megapoly.cli.data_build import data_build
from megapoly.cli.data_merge import data_merge
from megapoly.cli.data_plan import data_plan
from megapoly.errors import DataError

data_app = typer.Typer(
    help="Build, merge, look into and verify indexed datasets, and plan what a run reads.", **SETTINGS
)

Prefixes = Annotated[list[Path], typer.Argument(metavar="PREFIX...", help="Path without .bin, .idx, .json.")]

data_app.command("build")(data_build)
data_app.command("merge")(data_merge)
data_app.command("plan")(data_plan)


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
