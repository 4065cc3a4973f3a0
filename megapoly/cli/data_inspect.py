"""``megapoly data inspect`` and ``head``: what indexed datasets hold."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from megapoly.cli.common import JsonFile, Prefixes, describe_assembly, make_table, print_whole, write_rows
from megapoly.errors import DataError

if TYPE_CHECKING:
    from megapoly.data.indexed import IndexedDataset
    from megapoly.data.lengths import Lengths
    from megapoly.data.tokenizer import Tokenizer

_BAR = 16  # characters for all documents, or all tokens
_EIGHTHS = " ▏▎▍▌▋▊▉"

TokenizerFile = Annotated[
    Path | None, typer.Option("--tokenizer", help="The tokenizer that built them; shows text instead of ids.")
]


def data_inspect(
    prefixes: Prefixes,
    tokenizer: TokenizerFile = None,
    document: Annotated[
        list[int] | None, typer.Option(help="Show this document, of which the first is 0; may be given several times.")
    ] = None,
    documents: Annotated[str | None, typer.Option(metavar="A..B", help="Show documents A to B.")] = None,
    lengths: Annotated[bool, typer.Option(help="Count the lengths of documents, which reads the whole .idx.")] = True,
    json_file: JsonFile = None,
) -> None:
    """What indexed datasets hold: counts, how long documents are, and documents themselves.

    [bold]Example:[/bold] megapoly data inspect data/en data/th --tokenizer poly.model --document 0 --documents 90..92
    """
    from megapoly.data.indexed import IndexedDataset
    from megapoly.data.lengths import count_lengths

    loaded = _load(tokenizer)
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    for dataset in datasets:
        _check_tokenizer(dataset, loaded)
    chosen = [_chosen(dataset, document or [], documents) for dataset in datasets]
    _print_counts(datasets)
    rows: list[dict[str, Any]] = []
    for dataset, numbers in zip(datasets, chosen):
        rows += _count_rows(dataset)
        if lengths:
            with Console(stderr=True).status(f"reading {dataset.idx_path}"):
                counted = count_lengths(dataset)
            _print_lengths(dataset, counted)
            rows += _length_rows(dataset, counted)
        for line in _notes(dataset):
            print(line)
        for number in numbers:
            _print_document(dataset, number, loaded)
    if json_file:
        write_rows(json_file, rows)


def data_head(
    prefix: Annotated[Path, typer.Argument(help="Path without .bin, .idx, .json.")],
    number: Annotated[int, typer.Option("--number", "-n", min=1, help="Of documents.")] = 10,
    tokenizer: TokenizerFile = None,
) -> None:
    """The first documents of an indexed dataset: as text, or their ids where no tokenizer is given.

    [bold]Example:[/bold] megapoly data head data/en -n 3 --tokenizer poly.model
    """
    from megapoly.data.indexed import IndexedDataset

    loaded = _load(tokenizer)
    dataset = IndexedDataset(prefix)
    _check_tokenizer(dataset, loaded)
    for each in range(min(number, dataset.documents)):
        _print_document(dataset, each, loaded)


def _load(path: Path | None) -> Tokenizer | None:
    from megapoly.data.load_tokenizer import load_tokenizer

    return load_tokenizer(path) if path else None


def _check_tokenizer(dataset: IndexedDataset, loaded: Tokenizer | None) -> None:
    from megapoly.data.tokenizer import check_matches

    if loaded is not None:
        check_matches(loaded, dataset)


def _chosen(dataset: IndexedDataset, single: Sequence[int], span: str | None) -> list[int]:
    """Numbers of the documents to show."""
    numbers = list(single)
    if span is not None:
        found = re.fullmatch(r"([0-9]+)\.\.([0-9]+)", span)
        if found is None or int(found[1]) > int(found[2]):
            raise DataError(f"--documents {span}: expected A..B, such as 10..19")
        numbers += range(int(found[1]), min(int(found[2]), dataset.documents) + 1)
    for number in numbers:
        if not 0 <= number < dataset.documents:
            raise DataError(f"{dataset.prefix}: document {number} of {dataset.documents:,}; the first is 0")
    return numbers


def _print_counts(datasets: Sequence[IndexedDataset]) -> None:
    table = make_table(
        "dataset", "lang", "documents", "held\nout", "tokens", "held\nout", "MB", "bytes/\ntoken", "ids", "model"
    )
    for dataset in datasets:
        side = dataset.sidecar
        table.add_row(
            dataset.prefix.name,
            side.language if side else "?",
            f"{dataset.documents:,}",
            f"{dataset.documents - dataset.train_documents:,}",
            f"{dataset.tokens:,}",
            f"{dataset.tokens - dataset.train_tokens:,}",
            f"{side.bytes / 1e6:.2f}" if side else "?",
            f"{side.bytes_per_token:.3f}" if side else "?",
            f"{side.tokenizer.vocabulary:,}" if side else dataset.dtype.name,
            side.tokenizer.sha256[:6] if side else "?",
        )
    print_whole(table)


def _print_lengths(dataset: IndexedDataset, counted: Lengths) -> None:
    table = make_table("length", "documents", "share", "", "tokens", "share", "")
    for column in (3, 6):
        table.columns[column].justify = "left"
    for least, _, documents, tokens in counted.bins():
        shares = documents / dataset.documents, tokens / dataset.tokens
        table.add_row(
            f"{least:,}+", f"{documents:,}", f"{shares[0]:.1%}", _bar(shares[0]),
            f"{tokens:,}", f"{shares[1]:.1%}", _bar(shares[1]),
        )  # fmt: skip
    print(f"{dataset.prefix}: documents by their length, each line from so many tokens on to below twice as many")
    print_whole(table)
    print(
        f"  from {counted.shortest:,} to {counted.longest:,} tokens (document {counted.longest_document}),"
        f" {dataset.tokens / dataset.documents:,.1f} in the mean"
    )


def _bar(share: float) -> str:
    eighths = round(share * _BAR * 8)
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).ljust(_BAR)


def _notes(dataset: IndexedDataset) -> list[str]:
    """What is held out, and how the dataset was made."""
    from megapoly.data.indexed import part
    from megapoly.data.sidecar import has_changed

    side, path = dataset.sidecar, part(dataset.prefix, ".json")
    if side is None:
        return [f"  {path} is not there: nothing is known to be held out, nor of the text"]
    held = side.validation
    lines = [
        f"  held out: the last {held.documents:,} documents with {held.tokens:,} tokens,"
        f" {held.documents / dataset.documents:.3%} of all; asked for were {held.fraction:.3%}, by seed {held.seed}"
    ]
    if side.templates:
        lines.append(f"  pairs, written by {len(set(side.templates))} templates")
    if side.instructions:
        lines.append(f"  instructions and answers, of which the answers are learned; template {side.instructions.name}")
    if made := describe_assembly(side):
        lines.append(made)
    if has_changed(path):
        lines.append(f"  {path} has changed since the dataset was built (checksum): what it tells may be wrong")
    return lines


def _print_document(dataset: IndexedDataset, number: int, loaded: Tokenizer | None) -> None:
    ids = dataset.document(number).tolist()
    held = ", held out" if number >= dataset.train_documents else ""
    print(f"{dataset.prefix}, document {number}, {len(ids):,} tokens{held}:")
    if not dataset.marked:
        print(loaded.decode(ids) if loaded else ids)
        return
    learned = dataset.learned(number).tolist()
    for part, group in groupby(zip(learned, ids), key=lambda each: each[0]):
        tokens = [token for _, token in group]
        print(f"{'learned:' if part else 'given:'} {repr(loaded.decode(tokens)) if loaded else tokens}")


def _row(dataset: IndexedDataset, what: str, value: float, unit: str, **more: int) -> dict[str, Any]:
    return {"name": f"{dataset.prefix}: {what}", "value": value, "unit": unit, **more}


def _count_rows(dataset: IndexedDataset) -> list[dict[str, Any]]:
    rows = [
        _row(dataset, "documents", dataset.documents, "documents"),
        _row(dataset, "documents held out", dataset.documents - dataset.train_documents, "documents"),
        _row(dataset, "tokens", dataset.tokens, "tokens"),
        _row(dataset, "tokens held out", dataset.tokens - dataset.train_tokens, "tokens"),
    ]
    if (side := dataset.sidecar) is not None:
        rows.append(_row(dataset, "text", side.bytes, "bytes"))
        rows.append(_row(dataset, "bytes per token", side.bytes_per_token, "bytes/token"))
    return rows


def _length_rows(dataset: IndexedDataset, counted: Lengths) -> list[dict[str, Any]]:
    return [
        _row(dataset, "shortest document", counted.shortest, "tokens"),
        _row(dataset, "mean document", dataset.tokens / dataset.documents, "tokens"),
        _row(dataset, "longest document", counted.longest, "tokens", document=counted.longest_document),
        *(
            _row(dataset, f"documents of {least} to {most} tokens", documents, "documents", tokens=tokens)
            for least, most, documents, tokens in counted.bins()
        ),
    ]
