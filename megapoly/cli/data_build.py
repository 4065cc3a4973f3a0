"""``megapoly data build``."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megapoly.cli.common import Deduplicate, MemoryMb, Pack, Shuffle, describe_assembly, make_bar
from megapoly.cli.inputs import BadPolicy, DocumentUnit

if TYPE_CHECKING:
    from megapoly.data.builder import Options, Progress
    from megapoly.data.sidecar import Sidecar
    from megapoly.data.tokenizer import Tokenizer


def data_build(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="Files, directories or patterns: .jsonl, .txt (also .gz, .zst), .parquet.",
        ),
    ],
    output: Annotated[Path, typer.Option(help="Path of the dataset, without .bin, .idx, .json.")],
    tokenizer: Annotated[Path, typer.Option(help="SentencePiece model or tokenizer.json.")],
    language: Annotated[str, typer.Option(help="Language of the text, such as th; of pairs, such as en-th.")],
    fields: Annotated[
        str,
        typer.Option(
            "--fields",
            "--field",
            help="Field of the text ('text' where not given); of pairs the two: en,th; of instructions"
            " instruction,input,output or two of these; of chats messages.",
        ),
    ] = "",
    document: DocumentUnit = "file",
    on_bad: BadPolicy = "stop",
    pairs: Annotated[bool, typer.Option("--pairs", help="Records are aligned pairs of texts.")] = False,
    templates: Annotated[
        Path | None, typer.Option(help="TOML file of the forms of pairs, in place of the six built in.")
    ] = None,
    instructions: Annotated[
        bool,
        typer.Option("--instructions", help="Records are instructions or chats, of which the answers are learned."),
    ] = False,
    template: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Of instructions: multialpaca, alpaca, chat, or a TOML file.  [default: multialpaca]"
        ),
    ] = None,
    longest: Annotated[
        int,
        typer.Option(min=0, help="Most tokens of an example of instructions; longer ones are left out. 0: a pack's."),
    ] = 0,
    key_field: Annotated[str, typer.Option(help="Field that, where present, decides what is held out.")] = "key",
    validation: Annotated[float, typer.Option(help="Share of the documents held out for validation.")] = 0.001,
    seed: Annotated[int, typer.Option(help="Of the split, the same for every dataset of a run.")] = 1234,
    processes: Annotated[
        int, typer.Option(min=0, help="That encode; 0: one for each core, 1: this process alone.")
    ] = 0,
    threads: Annotated[
        int, typer.Option(min=0, help="For encoding where one process does it alone; 0: one for each core.")
    ] = 0,
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="Build share I of N of the input, for `data merge` to put together.")
    ] = "1/1",
    deduplicate: Deduplicate = False,
    shuffle: Shuffle = None,
    pack: Pack = 0,
    memory_mb: MemoryMb = 1024,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what exists, also another build that was interrupted.")
    ] = False,
) -> None:
    """Encode text into an indexed dataset.

    Interrupted, even killed, the same command goes on where it was, from OUTPUT.build, which takes the size of the
    tokens; the dataset is the same to the byte, with any number of processes. Memory: for this process and each that
    it starts 300 MB and the tokenizer, more where a record is longer than 1 MB; at the end --memory-mb, where
    duplicates are removed, documents shuffled or packs made.

    [bold]Example:[/bold] megapoly data build --tokenizer poly.model --language th --output data/th th.jsonl.gz

    [bold]Example:[/bold] megapoly data build --tokenizer poly.model --language es --output data/ask-es --instructions
    --pack 2048 --shuffle 1 multialpaca.es.jsonl.gz
    """
    from megapoly.data import builder
    from megapoly.data.bilingual import TEMPLATES, load_templates
    from megapoly.data.load_tokenizer import load_tokenizer
    from megapoly.data.skipped import describe_skipped
    from megapoly.data.templates import load_template
    from megapoly.errors import ConfigError

    if template and not instructions:
        raise ConfigError(f"--template {template}: is for instructions; give --instructions too, or leave it out")
    if templates and not pairs:
        raise ConfigError(f"--templates {templates}: is for pairs; give --pairs too, or leave it out")
    options = builder.Options(
        fields=tuple(name.strip() for name in fields.split(",")) if fields else (),
        pairs=pairs,
        templates=load_templates(templates) if templates else TEMPLATES,
        instructions=load_template(template or "multialpaca") if instructions else None,
        longest=longest,
        key_field=key_field,
        document=document,
        bad_records=on_bad,
        validation_fraction=validation,
        seed=seed,
        shard=builder.Shard.parse(shard),
        assembly=builder.Assembly(deduplicate, shuffle, pack, memory_mb),
        processes=processes,
        threads=threads,
        overwrite=overwrite,
    )
    loaded = load_tokenizer(tokenizer)
    if loaded.encoder != "megapoly":
        print(f"{tokenizer}: encoded by {loaded.encoder}, several times slower than by our own encoder")
    if loaded.loses:
        print(
            f"{tokenizer}: characters that it has no token for are left out of the text; give one with bytes, or <unk>"
        )
    made = _build(files, output, loaded, language, options)
    for line in describe_skipped(made.skipped):
        print(line)
    if validation and not made.validation.documents:
        print(f"  none of so few documents is held out at --validation {validation}: this source will not be validated")


def _build(files: list[Path], output: Path, tokenizer: Tokenizer, language: str, options: Options) -> Sidecar:
    """Build with a bar, and tell what came of it."""
    from megapoly.data import builder

    begun = time.monotonic()
    last = builder.Progress()
    with make_bar(output.name, "speed") as (bar, task):

        def show(state: Progress) -> None:
            nonlocal last
            if state.to_assemble:
                shown = f"{output.name}: joining the parts"
                bar.update(task, description=shown, completed=state.assembled, total=state.to_assemble, speed="")
                return
            last = state
            spent = time.monotonic() - begun
            bar.update(task, completed=state.input_read, total=state.input_size, speed=_speed(state, spent))

        try:
            made = builder.build(files, output, tokenizer, language=language, options=options, progress=show)
        except KeyboardInterrupt:
            print("interrupted; the same command goes on with what is whole", file=sys.stderr)
            raise typer.Exit(130) from None
    _report(output, made, last, time.monotonic() - begun)
    return made


def _speed(state: Progress, spent: float) -> str:
    documents, size = state.documents - state.kept_documents, state.bytes - state.kept_bytes
    return f"{documents / spent:,.0f} documents/s, {size / 1e6 / spent:.1f} MB/s of text"


def _report(output: Path, made: Sidecar, state: Progress, spent: float) -> None:
    about = "about " if made.duplicates.documents else ""
    print(
        f"{output}: {made.documents:,} documents ({made.validation.documents:,} held out),"
        f" {about}{made.bytes / 1e6:.2f} MB, {made.tokens:,} tokens, {made.bytes_per_token:.3f} bytes/token,"
        f" {spent:.1f} s, {_speed(state, spent)}"
    )
    if state.kept_bytes:
        print(f"  {state.kept_documents:,} documents of an interrupted build were not encoded again")
    if described := describe_assembly(made):
        print(described)
