"""``megapoly tokenizer report`` and ``check``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from megapoly.cli.common import JsonFile, make_table, write_rows
from megapoly.cli.inputs import BadPolicy, DocumentUnit, LanguageFiles, TextField, language_files, print_skipped
from megapoly.errors import DataError

if TYPE_CHECKING:
    from megapoly.data.tokenizer_report import Report


def tokenizer_report(
    files: LanguageFiles,
    models: Annotated[
        list[Path],
        typer.Option("--model", help="SentencePiece model or tokenizer.json; may be given several times."),
    ],
    baseline: Annotated[
        int, typer.Option(min=1, help="Number of the --model that picture and file compare the others with.")
    ] = 1,
    text_field: TextField = "text",
    document: DocumentUnit = "file",
    on_bad: BadPolicy = "stop",
    picture: Annotated[Path | None, typer.Option(help="Also draw it: .svg, .png or .pdf.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Bytes per token and tokens per sentence in every language, tokenizers side by side. The best are marked *.

    Sentences end at line ends and at full stops, question and exclamation marks. Over translations of one text, such
    as th=en-th.jsonl with --text-field th, the costs of languages compare too.

    [bold]Example:[/bold] megapoly tokenizer report --model poly.model --model gpt2/tokenizer.json en=en.jsonl th=th/
    """
    from megapoly.charts.figure import check_picture, save_figure
    from megapoly.charts.tokenizers import draw_report
    from megapoly.data.readers import BadRecords
    from megapoly.data.tokenizer_report import names_of, open_tokenizer, report

    if baseline > len(models):
        raise DataError(f"--baseline {baseline}: there are {len(models)} tokenizers; give the number of one of them")
    if picture:
        check_picture(picture)
    bad = BadRecords(on_bad)
    grouped = language_files(files)
    opened = {name: open_tokenizer(path) for name, path in zip(names_of(models), models)}
    if len(opened) < len(models):
        raise DataError("a tokenizer is named twice; name it once")
    with Console(stderr=True).status("") as status:
        made = report(opened, grouped, text_field=text_field, document=document, bad=bad, progress=status.update)
    _print_tables(made)
    print_skipped(bad)
    if picture:
        save_figure(draw_report(made, baseline - 1), picture)
        print(f"Saved {picture}")
    if json_file:
        write_rows(json_file, _rows(made, baseline - 1))


def _print_tables(made: Report) -> None:
    console = Console()
    table = make_table("language", "documents", "sentences", "MB")
    for row in made.rows:
        table.add_row(row.language, f"{row.documents:,}", f"{row.sentences:,}", f"{row.bytes / 1e6:.2f}")
    console.print(table)
    names = [f"{name}\n{size:,}" for name, size in zip(made.tokenizers, made.vocabularies)]
    for title, values, means, best, digits in (
        ("bytes per token", [r.bytes_per_token for r in made.rows], made.mean_bytes_per_token(), max, 3),
        ("tokens per sentence", [r.tokens_per_sentence for r in made.rows], made.mean_tokens_per_sentence(), min, 1),
    ):
        table = make_table(title, *names)
        for label, shown in [*zip((row.language for row in made.rows), values), ("mean", means)]:
            marks = ["*" if len(shown) > 1 and value == best(shown) else " " for value in shown]
            table.add_row(label, *(f"{value:.{digits}f}{mark}" for value, mark in zip(shown, marks)))
        console.print(table)


def _rows(made: Report, baseline: int) -> list[dict[str, Any]]:
    """Every tokenizer beside the baseline, which stands beside itself; a ratio above 1 is better than it."""
    rows: list[dict[str, Any]] = []
    counted = [(row.language, row.bytes_per_token, row.tokens_per_sentence) for row in made.rows]
    counted.append(("mean", made.mean_bytes_per_token(), made.mean_tokens_per_sentence()))
    for i, name in enumerate(made.tokenizers):
        for language, compression, costs in counted:
            for what, unit, values in (
                ("bytes per token", "bytes/token", compression),
                ("tokens per sentence", "tokens/sentence", costs),
            ):
                value, peer = values[i], values[baseline]
                rows.append(
                    {
                        "name": f"{name}, {language}: {what}",
                        "value": value,
                        "unit": unit,
                        "peer": made.tokenizers[baseline],
                        "peer_value": peer,
                        "ratio": value / peer if values is compression else peer / value,
                    }
                )
    return rows


def tokenizer_check(
    model: Annotated[Path, typer.Argument(help="SentencePiece model.")],
    files: LanguageFiles,
    text_field: TextField = "text",
    document: DocumentUnit = "file",
    on_bad: BadPolicy = "stop",
    json_file: JsonFile = None,
) -> None:
    """Encode your text by our encoder and by SentencePiece, compare every id, and show both speeds on one thread.

    [bold]Example:[/bold] megapoly tokenizer check poly.model en=en.jsonl.gz th=th.jsonl.gz
    """
    from megapoly.data.readers import BadRecords
    from megapoly.data.sentencepiece_tokenizer import SentencePieceTokenizer
    from megapoly.data.tokenizer_check import check

    bad = BadRecords(on_bad)
    loaded = SentencePieceTokenizer(model)
    grouped = language_files(files)
    with Console(stderr=True).status("") as status:
        rows = check(loaded, grouped, text_field=text_field, document=document, bad=bad, progress=status.update)
    table = make_table("language", "documents", "MB", "tokens", "different", "MB/s", "library", "ratio")
    for row in rows:
        table.add_row(
            row.language, f"{row.documents:,}", f"{row.bytes / 1e6:.2f}", f"{row.tokens:,}", f"{row.different:,}",
            f"{row.speed:.1f}", f"{row.library_speed:.1f}", f"{row.speed / row.library_speed:.1f}",
        )  # fmt: skip
    Console().print(table)
    print_skipped(bad)
    if json_file:
        write_rows(
            json_file,
            [
                {
                    "name": f"{row.language}: encode",
                    "value": row.speed,
                    "unit": "MB/s",
                    "peer": "sentencepiece",
                    "peer_value": row.library_speed,
                    "ratio": row.speed / row.library_speed,
                    "documents": row.documents,
                    "tokens": row.tokens,
                    "different": row.different,
                }
                for row in rows
            ],
        )
    _refuse_differences(model, [row.first for row in rows if row.first], sum(row.different for row in rows))
    documents, tokens = sum(row.documents for row in rows), sum(row.tokens for row in rows)
    print(f"{model}: the same ids as SentencePiece's in all {documents:,} documents, {tokens:,} tokens")


def _refuse_differences(model: Path, first: Sequence[str], different: int) -> None:
    if first:
        raise DataError(
            f"{model}: our encoder gives other ids than SentencePiece in {different:,} documents, first in {first[0]};"
            " this is a bug of megapoly: report it with the model and that document"
        )
