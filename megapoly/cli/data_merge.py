"""``megapoly data merge``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from megapoly.cli.common import Deduplicate, MemoryMb, Overwrite, Pack, Shuffle, describe_assembly, make_bar


def data_merge(
    parts: Annotated[
        list[str], typer.Argument(metavar="PART...", help="Datasets in order, without .bin, .idx, .json; or a pattern.")
    ],
    output: Annotated[Path, typer.Option(help="Path of the dataset, without .bin, .idx, .json.")],
    deduplicate: Deduplicate = False,
    shuffle: Shuffle = None,
    pack: Pack = 0,
    memory_mb: MemoryMb = 1024,
    overwrite: Overwrite = False,
) -> None:
    """Make one indexed dataset of several: the shards of a job array, or those of another tool.

    The training documents of all parts come first, in order, then the held-out ones. Duplicates are removed before the
    shuffle, and packs are made last.

    [bold]Example:[/bold] megapoly data merge --output data/th --deduplicate --shuffle 1 "shards/th-*"
    """
    from megapoly.data.merge import Assembly, merge
    from megapoly.data.parts import find_parts

    prefixes = find_parts(parts)
    assembly = Assembly(deduplicate, shuffle, pack, memory_mb)
    begun = time.monotonic()
    with make_bar(output.name) as (bar, task):

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        made = merge(prefixes, output, assembly, overwrite=overwrite, progress=show)
    spent = time.monotonic() - begun
    size = output.with_name(output.name + ".bin").stat().st_size
    print(
        f"{output}: {len(prefixes):,} parts, {made.documents:,} documents ({made.validation.documents:,} held out),"
        f" {made.tokens:,} tokens, {size / 1e6:.2f} MB, {spent:.1f} s, {size / 1e6 / spent:.0f} MB/s"
    )
    if described := describe_assembly(made):
        print(described)
