"""``megapoly data plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from megapoly.cli.common import JsonFile, make_table, print_whole, write_rows


def data_plan(
    config: Annotated[Path, typer.Argument(help="TOML file of the run.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as data.max_epochs=4.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Of the run as it would go on from its newest checkpoint.")
    ] = False,
    picture: Annotated[Path | None, typer.Option(help=".svg, .png or .pdf to draw the plan to.")] = None,
    json_file: JsonFile = None,
) -> None:
    """What a run will train on: tokens and epochs by source, language and stage, before it trains.

    Reads the datasets' headers only.

    [bold]Example:[/bold] megapoly data plan run.toml --picture plan.svg
    """
    from megapoly import config as configuration
    from megapoly.charts.curriculum import draw_curriculum
    from megapoly.charts.figure import check_picture, save_figure
    from megapoly.plan import curriculum
    from megapoly.run import open_data, plan_of_run, unchecked

    if picture:
        check_picture(picture)
    loaded, _, datasets, lengths = open_data(configuration.load(config, overrides or []))
    plan, notes = plan_of_run(loaded, datasets, resume=resume)
    found = curriculum.outlook(plan)
    caps = {
        name: loaded.data.max_epochs if source.max_epochs is None else source.max_epochs
        for name, source in loaded.data.sources.items()
    }
    console = Console(highlight=False, soft_wrap=True)
    for note in [*lengths, *notes, *unchecked(datasets)]:
        console.print(note)
    for by in ("source", "language"):
        heads, rows = curriculum.cells(found, by, caps)
        table = make_table(*heads)
        for row in rows:
            table.add_row(*row)
        print_whole(table)
    console.print(
        f"{plan.total_samples:,} samples of {plan.sequence:,} tokens, {curriculum.short(sum(found.totals))} in all, in"
        f" {loaded.total_steps:,} steps; {len(plan.segments)} segments of constant weights"
    )
    if picture:
        save_figure(draw_curriculum(plan, caps), picture)
        console.print(f"Saved {picture}: shares of the languages over the run, and epochs of the sources.")
    if json_file:
        write_rows(json_file, curriculum.rows(found))
