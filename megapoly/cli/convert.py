"""``megapoly convert``: weights from one format to another."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from megapoly.cli.common import count, make_bar
from megapoly.errors import ConfigError

if TYPE_CHECKING:
    from megapoly.checkpoint.convert import Converted

_UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="A run folder, a checkpoint, or a folder of Hugging Face or Megatron.")
    ],
    target: Annotated[Path, typer.Argument(metavar="DST", help="A new folder.")],
    to: Annotated[
        Literal["megapoly", "huggingface", "megatron"] | None,
        typer.Option(help="Format of DST.  [default: huggingface from megapoly's own, else megapoly]"),
    ] = None,
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32", "fp64"] | None, typer.Option(help="Of all tensors.  [default: as they are]")
    ] = None,
    tp: Annotated[int | None, typer.Option(min=1, help="Megatron: tensor-parallel ranks.  [default: 1]")] = None,
    pp: Annotated[int | None, typer.Option(min=1, help="Megatron: pipeline stages.  [default: 1]")] = None,
    naming: Annotated[
        Literal["core", "core-te", "legacy"] | None,
        typer.Option(
            help="Megatron: names of the tensors, as megatron-core's with its own layers or TransformerEngine's,"
            " or of Megatron-LM before it.  [default: core]"
        ),
    ] = None,
    vocabulary: Annotated[
        int | None, typer.Option(min=1, help="From Megatron: rows of its vocabulary that are no padding.")
    ] = None,
    shard_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="From which on another file begins; not of Megatron.  [default: 5GB]"),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Afterwards load both and compare their logits for random tokens; also with"
            " transformers' own where a side is Hugging Face's. Needs memory for a model in float32.",
        ),
    ] = False,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="SentencePiece model or tokenizer.json to write, in place of the one that SRC has."),
    ] = None,
) -> None:
    """Convert the weights of a model from one format to another.

    Streams tensor by tensor. Interrupted, the same command goes on after the files that are finished.

    [bold]Example:[/bold] megapoly convert runs/demo hf/demo --dtype bf16 --verify
    """  # fmt: skip
    from megapoly.checkpoint import convert as conversion
    from megapoly.checkpoint.megatron import Megatron
    from megapoly.checkpoint.weights import Options
    from megapoly.engine import DTYPES

    weights = conversion.open_source(source, vocabulary, tokenizer)
    form = to or conversion.natural_format(weights)
    of_layout, of_shards = {"--tp": tp, "--pp": pp, "--naming": naming}, {"--shard-size": shard_size}
    _refuse(of_shards if form == "megatron" else of_layout, form)
    size = _bytes(shard_size or "5GB")
    options = Options(DTYPES[dtype] if dtype else None, size, tp or 1, pp or 1, naming or "core")
    begin = time.perf_counter()
    with make_bar(target.name) as (bar, task):
        bar.update(task, total=conversion.size(weights, options))
        try:
            done = conversion.convert(
                weights,
                target,
                form,
                options,
                tell=bar.console.print if bar.console.is_terminal else print,
                progress=lambda size: bar.advance(task, size),
            )
        except KeyboardInterrupt:
            print("interrupted; the same command goes on after the finished files", file=sys.stderr)
            raise typer.Exit(130) from None
    seconds = time.perf_counter() - begin
    if verify:
        _verify(source, target, weights.model.vocabulary if isinstance(weights, Megatron) else None)
    print(
        f"{target}: {done.format}, {count(done.tensors, 'tensor')} in {count(done.files, 'file')},"
        f" {done.bytes / 1e6:,.2f} MB in {seconds:.1f} s ({done.bytes / 1e6 / seconds:,.0f} MB/s). {_next(done)}"
    )


def _refuse(given: Mapping[str, object], form: str) -> None:
    """Options that the format has nothing for are refused, not ignored."""
    for name, value in given.items():
        if value is not None:
            raise ConfigError(
                f"{name} {value}: files of {form} have nothing for it; leave it out, or give --to"
                f" {'huggingface or megapoly' if form == 'megatron' else 'megatron'}"
            )


def _verify(source: Path, target: Path, vocabulary: int | None) -> None:
    from megapoly.checkpoint.verification import verify

    for each in verify(source, target, print, vocabulary):
        within = "are equal" if not each.difference else f"differ by {each.difference:.2g} of the largest"
        bound = "" if not each.bound else f" (allowed {each.bound:.2g})"
        print(f"verified {each.what}: the logits of {each.inputs} random tokens {within}{bound}")


def _next(done: Converted) -> str:
    if done.format == "huggingface":
        return f"Next: AutoModelForCausalLM.from_pretrained({str(done.path)!r}), or megapoly generate {done.path}"
    if done.format == "megatron":
        return f"Next: megapoly convert {done.path} DST gives it back, in any layout"
    return f"Next: megapoly train CONFIG --init-from {done.path}, or megapoly generate {done.path}"


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = _UNITS.get(match[2].upper() or "B") if match else None
    size = int(float(match[1]) * unit) if match and unit else 0
    if size < 1:
        raise ConfigError(f"--shard-size {text!r}: expected a size such as 5GB, 500MB or 2GiB")
    return size
