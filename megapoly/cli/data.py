"""``megapoly data``: verify indexed datasets; the other commands have files of their own."""

from __future__ import annotations

from typing import Annotated

import typer

from megapoly.cli.common import SETTINGS, Prefixes, count, make_bar
from megapoly.cli.data_build import data_build
from megapoly.cli.data_inspect import data_head, data_inspect
from megapoly.cli.data_merge import data_merge
from megapoly.cli.data_plan import data_plan
from megapoly.errors import DataError

data_app = typer.Typer(
    help="Build, merge, look into and verify indexed datasets, and plan what a run reads.", **SETTINGS
)

data_app.command("build")(data_build)
data_app.command("merge")(data_merge)
data_app.command("plan")(data_plan)
data_app.command("inspect")(data_inspect)
data_app.command("head")(data_head)


@data_app.command("verify")
def data_verify(
    prefixes: Prefixes,
    vocabulary: Annotated[int | None, typer.Option(help="Of datasets without a .json, to check their ids.")] = None,
) -> None:
    """Read every byte of indexed datasets, and say where they are damaged.

    [bold]Example:[/bold] megapoly data verify data/en data/th
    """
    from megapoly.data.indexed import part
    from megapoly.data.verify import verify

    damaged = 0
    for prefix in prefixes:
        with make_bar(prefix.name) as (bar, task):

            def show(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total)

            found = verify(prefix, vocabulary=vocabulary, progress=show)
        unsure = "" if part(prefix, ".json").exists() else "; without a .json no checksum tells of changed bytes"
        print(f"{prefix}: {count(len(found), 'damaged place') if found else 'whole'}{unsure}")
        for damage in found:
            print(f"  {damage}")
        damaged += bool(found)
    if damaged:
        raise DataError(f"{damaged} of {len(prefixes)} datasets are damaged; build or copy them anew")
