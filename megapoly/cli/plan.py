"""``megapoly plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from megapoly.cli.common import SETTINGS, JsonFile, make_table, write_rows
from megapoly.errors import ConfigError

plan_app = typer.Typer(help="See what a run would do, before it runs.", **SETTINGS)


@plan_app.command("schedule")
def plan_schedule(
    pp: Annotated[int, typer.Option(min=1, help="Pipeline ranks.")],
    microbatches: Annotated[int, typer.Option(min=1, help="Micro-batches of one rank in a step.")],
    schedule: Annotated[str, typer.Option(help="gpipe, 1f1b, interleaved, zero-bubble or zero-bubble-v.")] = "1f1b",
    virtual: Annotated[int | None, typer.Option(min=2, help="Stages per rank of interleaved.  [default: 2]")] = None,
    forward: Annotated[float, typer.Option(help="Time of a forward pass through the stages of a rank.")] = 1.0,
    backward: Annotated[float, typer.Option(help="Time of the backward pass; where split, of both halves.")] = 2.0,
    communication: Annotated[float, typer.Option(help="Time of a message.")] = 0.0,
    picture: Annotated[
        Path | None, typer.Option(help="SVG file to write.  [default: schedules-ppPP-mMICROBATCHES.svg, here]")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Draw a pipeline schedule, and compare all: who does what when, bubbles, live activations.

    [bold]Example:[/bold] megapoly plan schedule --pp 4 --microbatches 16 --schedule 1f1b
    """
    from megapoly.data.files import write_whole
    from megapoly.pipeline import comparison
    from megapoly.pipeline.generators import GENERATORS
    from megapoly.pipeline.picture import draw
    from megapoly.pipeline.timeline import render

    if picture is not None and picture.suffix != ".svg":
        raise ConfigError(f"--picture {picture}: the picture is an SVG file; give it a name that ends with .svg")
    if schedule not in GENERATORS:
        raise ConfigError(f"unknown schedule {schedule!r}; known: {', '.join(GENERATORS)}")
    try:
        compared = comparison.compare(pp, microbatches, virtual, forward, backward, communication)
        chosen = comparison.pick(compared, schedule)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    console = Console(highlight=False, soft_wrap=True)
    print(render(chosen.timeline, console.width if console.is_terminal else None))
    table = make_table(*comparison.HEADS)
    for each in compared:
        table.add_row(*comparison.cells(each))
    console.print(table)
    for reason in [each.reason for each in compared if isinstance(each, comparison.Refused)]:
        console.print(reason)
    drawn = [each.timeline for each in compared if isinstance(each, comparison.Compared)]
    path = picture or Path(f"schedules-pp{pp}-m{microbatches}.svg")
    write_whole(path, draw(drawn).encode())
    console.print(f"Saved {path}: these schedules on one axis of time.")
    if json_file:
        write_rows(json_file, comparison.rows(chosen, compared))


@plan_app.command("memory")
def plan_memory(
    config: Annotated[Path, typer.Argument(help="TOML file of the run.")],
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Of the run; where not given, the fewest. --measure takes torchrun's.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as layout.tp=2.")
    ] = None,
    limit_gb: Annotated[
        float | None, typer.Option(min=0.0, help="Memory of a device: does it fit, or which layouts would?")
    ] = None,
    measured: Annotated[
        bool, typer.Option("--measure", help="Also run a step on random tokens here, and count.")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Peak memory of every pipeline rank, by component, and what would make it fit.

    Of GPUs, unless layout.device is cpu or --measure finds none. Tensor- and data-parallel ranks are alike.

    [bold]Example:[/bold] megapoly plan memory run.toml --ranks 32 --set layout.pp=4 --limit-gb 80
    """
    from megapoly import config as configuration
    from megapoly.plan import fit, memory, report

    found = None
    if measured:
        from megapoly.plan.measure import measure_ranks

        outcome = measure_ranks(config, overrides or [])
        if outcome is None:
            return
        settled, device, found = outcome
    else:
        loaded = configuration.load(config, overrides or [])
        layout = loaded.layout
        settled = loaded.on(ranks or layout.pp * layout.tp * (layout.dp or 1))
        device = "cpu" if layout.device == "cpu" else "cuda"
    predicted = memory.predict(settled, device)
    fits = []
    if limit_gb is not None and max(usage.total for usage in predicted) > limit_gb * 1e9:
        fits = fit.nearest(settled, settled.mesh.world_size, limit_gb * 1e9, device)
    table = make_table(f"peak {report.unit(predicted).name}", *report.COLUMNS)
    for row in report.cells(predicted, found):
        table.add_row(*row)
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    for line in report.notes(settled, predicted, limit_gb, fits):
        console.print(line)
    if json_file:
        write_rows(json_file, report.rows(predicted, found))
