"""``megapoly checkpoint``: what checkpoints hold, whether they are whole, and how two differ."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megapoly.cli.common import SETTINGS, JsonFile, count, make_bar, make_table, print_whole, write_rows
from megapoly.errors import CheckpointError

if TYPE_CHECKING:
    from megapoly.checkpoint.examine import Difference
    from megapoly.checkpoint.store import Reader

checkpoint_app = typer.Typer(help="Look into, verify and compare checkpoints.", **SETTINGS)

CheckpointPath = Annotated[
    Path, typer.Argument(metavar="PATH", help="A checkpoint, or a run folder, of which the newest is taken.")
]
Only = Annotated[str, typer.Option(metavar="PATTERN", help="Tensors whose names match, such as 'weights/*'.")]


@checkpoint_app.command("inspect")
def checkpoint_inspect(
    path: CheckpointPath,
    only: Only = "*",
    norms: Annotated[bool, typer.Option(help="Read the tensors; without, the manifest alone is read.")] = True,
    json_file: JsonFile = None,
) -> None:
    """The model of a checkpoint, as keys of a config, and its tensors: names, shapes, dtypes, norms, largest elements.

    [bold]Example:[/bold] megapoly checkpoint inspect runs/demo --only 'weights/*'
    """
    from megapoly.checkpoint import examine
    from megapoly.checkpoint.state import saved_model
    from megapoly.checkpoint.store import Reader
    from megapoly.checkpoint.weights import find_own

    reader = Reader(find_own(path))
    names = examine.choose(reader, only)
    for line in _about(reader):
        print(line)
    if reader.meta.keys() & {"model", "config"}:
        print("[model]  # of a config that has this model")
        for key, value in saved_model(reader).model_dump(mode="json", exclude_defaults=True).items():
            print(f"{key} = {_toml(value)}")
    table = make_table("tensor", "shape", "dtype", "pieces", *(("norm", "largest", "not finite") if norms else ()))
    rows: list[dict[str, Any]] = []
    elements = 0
    if norms:
        with make_bar(reader.path.name) as (bar, task):
            bar.update(task, total=_bytes(reader, names))
            found = list(examine.contents(reader, names, lambda done: bar.advance(task, done)))
        for each in found:
            elements += each.elements
            values = (f"{each.norm:.6g}", f"{each.largest:.6g}", f"{each.nonfinite:,}" if each.nonfinite else "")
            table.add_row(each.name, _shape(each.shape), each.dtype, str(each.pieces), *values)
            more = {"largest": each.largest, "not_finite": each.nonfinite}
            rows.append(_row(each.name, each.norm, "norm", shape=list(each.shape), dtype=each.dtype, **more))
    else:
        for name in names:
            shape, stored = reader.tensors[name]
            dtype = examine.say_dtype(stored)
            elements += math.prod(shape)
            table.add_row(name, _shape(shape), dtype, str(reader.pieces(name)))
            rows.append(_row(name, math.prod(shape), "elements", shape=list(shape), dtype=dtype))
    print_whole(table)
    print(f"{len(names):,} tensors with {elements:,} elements, {_bytes(reader, names) / 1e6:,.2f} MB")
    if json_file:
        write_rows(json_file, rows)


@checkpoint_app.command("verify")
def checkpoint_verify(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Checkpoints, or run folders: the newest.")],
    json_file: JsonFile = None,
) -> None:
    """Read every byte of checkpoints, and say where they are damaged: file, bytes, tensors.

    [bold]Example:[/bold] megapoly checkpoint verify runs/demo runs/demo/checkpoints/step-00001000
    """
    from megapoly.checkpoint.store import Reader
    from megapoly.checkpoint.weights import find_own

    rows: list[dict[str, Any]] = []
    none = bad = 0
    for path in paths:
        try:
            folder = find_own(path)
        except CheckpointError as error:
            none += 1
            print(error)
            rows.append(_row(str(path), None, "damaged places", problem=str(error)))
            continue
        try:
            reader = Reader(folder)
            with make_bar(path.name) as (bar, task):
                bar.update(task, total=sum(reader.files.values()))
                found = reader.damage(lambda done: bar.advance(task, done))
        except CheckpointError as error:  # the manifest, or a file that is missing or short
            bad += 1
            print(f"{path}: damaged\n  {error}")
            rows.append(_row(str(path), 1, "damaged places", problem=str(error)))
            continue
        bad += bool(found)
        size = sum(reader.files.values()) / 1e6
        print(f"{reader.path}: {count(len(found), 'damaged place') if found else 'whole'}, {size:,.2f} MB")
        for each in found:
            print(f"  {each}")
        places = [{"file": e.file, "start": e.start, "stop": e.stop, "tensors": list(e.tensors)} for e in found]
        rows.append(_row(str(reader.path), len(found), "damaged places", places=places))
    if json_file:
        write_rows(json_file, rows)
    of = f"of {count(len(paths), 'path')}"
    problems = [f"{none} {of} {'holds' if none == 1 else 'hold'} no checkpoint of megapoly"] if none else []
    if bad:
        problems.append(
            f"{bad} {of} {'is' if bad == 1 else 'are'} damaged; move the folder of a run's checkpoint away to use the"
            " one before, and make a converted one again"
        )
    if problems:
        raise CheckpointError("; ".join(problems))


@checkpoint_app.command("diff")
def checkpoint_diff(
    first: CheckpointPath,
    second: CheckpointPath,
    only: Only = "*",
    show_same: Annotated[bool, typer.Option("--all", help="List the tensors that are the same too.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Compare two checkpoints of any layouts tensor by tensor; exit code 1 if they differ.

    The relative difference is the norm of the difference by the norm of the first tensor.

    [bold]Example:[/bold] megapoly checkpoint diff runs/a/checkpoints/step-00001000 runs/b --only 'weights/*'
    """
    from megapoly.checkpoint import examine
    from megapoly.checkpoint.store import Reader
    from megapoly.checkpoint.weights import find_own

    readers = Reader(find_own(first)), Reader(find_own(second))
    for reader in readers:
        print(_about(reader)[0])
    with make_bar("diff") as (bar, task):
        bar.update(task, total=sum(_bytes(reader, list(reader.tensors)) for reader in readers) if only == "*" else None)
        found = list(examine.compare(*readers, only, lambda done: bar.advance(task, done)))
    if not found:
        examine.choose(readers[0], only)  # says what names there are
    table = make_table("tensor", "shape", "dtype", "elements differ", "largest", "relative")
    for each in found:
        if show_same or not each.same:
            table.add_row(each.name, _shape(each.shape), _dtypes(each), *_cells(each))
    if table.row_count:
        print_whole(table)
    different = sum(not each.same for each in found)
    print(
        f"{different:,} of {len(found):,} tensors differ" if different else f"all {len(found):,} tensors are the same"
    )
    if json_file:
        write_rows(json_file, [_difference_row(each) for each in found])
    if different:
        raise typer.Exit(1)


def _about(reader: Reader) -> list[str]:
    meta = reader.meta
    counters = meta.get("counters", {})
    where = ", ".join(f"{name} {counters[name]:,}" for name in ("sample", "tokens") if name in counters)
    size = sum(reader.files.values()) / 1e6
    what = "weights only" if "model" in meta else f"step {reader.step:,}{', ' + where if where else ''}"
    lines = [f"{reader.path}: {what}; {count(len(reader.files), 'file')} of tensors, {size:,.2f} MB"]
    if "layout" in meta:
        lines.append(f"written by {meta['layout']}")
    return lines


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(each)}" for key, each in value.items() if each is not None) + " }"
    return json.dumps(value)


def _bytes(reader: Reader, names: list[str]) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in map(reader.tensors.__getitem__, names))


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _dtypes(found: Difference) -> str:
    return " / ".join(dict.fromkeys(dtype for dtype in found.dtypes if dtype))


def _cells(found: Difference) -> tuple[str, str, str]:
    if found.problem:
        return found.problem, "", ""
    return f"{found.different:,}", f"{found.largest:.6g}", f"{found.relative:.3g}"


def _difference_row(found: Difference) -> dict[str, Any]:
    more = {"shape": list(found.shape), "dtypes": list(found.dtypes), "same": found.same, "problem": found.problem}
    numbers = {"different": found.different, "relative": _number(found.relative)}
    return _row(found.name, _number(found.largest), "largest difference", **numbers, **more)


def _number(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


def _row(name: str, value: float | None, unit: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "value": value, "unit": unit, **more}
