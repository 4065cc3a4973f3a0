"""``megapoly generate``."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from megapoly.errors import ConfigError, MegapolyError

if TYPE_CHECKING:
    from megapoly.context import ParallelContext
    from megapoly.generate import Completion, Generator, Sampling

_ROUND = 8  # batches of each replica after which the texts are shown


def generate_texts(
    model: Annotated[
        Path, typer.Argument(help="Run folder, one of its checkpoints, or a folder of Hugging Face.", metavar="MODEL")
    ],
    prompts: Annotated[
        list[str] | None, typer.Option("--prompt", help="Text to continue; may be given several times.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--prompts", help='File with one a line, of .jsonl a string or {"prompt": ...}; - is the input.'),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Most tokens of a text.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from so many of the likeliest tokens; 0: from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens that together reach this.")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1, tokens that came before lose.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends a text; several times.")] = None,
    samples: Annotated[int, typer.Option(help="Texts for each prompt.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the sampling: the same text under every layout.")] = 0,
    tokenizer: Annotated[
        Path | None, typer.Option(help="SentencePiece model or tokenizer.json.  [default: the model's own]")
    ] = None,
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16", "fp64"] | None, typer.Option(help="Of the weights.  [default: as stored]")
    ] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: a GPU where there are any.")] = "auto",
    tp: Annotated[int, typer.Option(min=1, help="Ranks that share every layer, under torchrun.")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="Ranks that share the layers out, under torchrun.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Texts at a time, of each replica of the model.")] = 16,
    jsonl: Annotated[Path | None, typer.Option(help="Write all texts here, an object a line; - is the output.")] = None,
) -> None:
    """Continue texts with a trained model, alone or as one rank of a torchrun.

    One text is shown as it comes, several when they are there, in their order. A prompt and its text together have at
    most the model's positions. Ranks beyond tp x pp share the prompts.

    [bold]Example:[/bold] megapoly generate runs/demo --prompt "Die Sprache" --tokens 40 --temperature 0.8 --top-p 0.9
    """
    from megapoly.engine import DTYPES
    from megapoly.generate import Generator, Sampling
    from megapoly.launch import run_meshed

    sampling = Sampling(tokens, temperature, top_k, top_p, repetition_penalty, tuple(stop or ()), samples, seed)
    if not prompts and file is None:
        raise ConfigError("nothing to continue: give --prompt TEXT or --prompts FILE")

    def work(context: ParallelContext) -> None:
        texts = _agreed_prompts(prompts or [], file, context)
        chosen = None if dtype is None else DTYPES[dtype]
        generator = Generator.open(model, tokenizer, chosen, context=context, batch=batch)
        _Printer(context, jsonl).run(generator, texts, sampling)

    raise typer.Exit(run_meshed(tp, pp, device, work))


def _agreed_prompts(given: list[str], file: Path | None, context: ParallelContext) -> list[str]:
    """Prompts of the first rank, which alone has the input, on all."""
    from megapoly import comm
    from megapoly.errors import everywhere
    from megapoly.generate.prompts import read_prompts

    found: list[str] | MegapolyError = given
    if context.rank == 0 and file is not None:
        try:
            found = [*given, *read_prompts(file)]
        except MegapolyError as error:
            found = error
    found = comm.broadcast_object(found, context.control)
    if isinstance(found, MegapolyError):
        raise everywhere(found)
    return found


class _Printer:
    """Shows the texts on the first rank."""

    def __init__(self, context: ParallelContext, jsonl: Path | None) -> None:
        self._first, self._jsonl = context.rank == 0, jsonl
        self._replicas = context.dp.size
        self._shown = jsonl != Path("-")

    def run(self, generator: Generator, prompts: Sequence[str], sampling: Sampling) -> None:
        begin = time.perf_counter()
        if len(prompts) == sampling.samples == 1 and self._jsonl is None:
            self._stream(generator, prompts[0], sampling)
            return
        step = _ROUND * generator.batch * self._replicas
        found: list[Completion] = []
        for at in range(0, len(prompts), step):
            part = generator.generate(prompts[at : at + step], sampling, first=at)
            found += part
            for each in part if self._shown else ():
                self._write(f"{each.prompt}|{each.text}\n")
        self._finish(found, time.perf_counter() - begin)

    def _stream(self, generator: Generator, prompt: str, sampling: Sampling) -> None:
        self._write(f"{prompt}|")
        for part in generator.stream(prompt, sampling):
            self._write(part)
        self._write("\n")

    def _finish(self, found: Sequence[Completion], seconds: float) -> None:
        from megapoly.data.files import write_whole
        from megapoly.generate.prompts import to_json_lines

        if not self._first:
            return
        if self._jsonl is not None:
            lines = to_json_lines(found)
            if self._shown:
                write_whole(self._jsonl, lines)
            else:
                sys.stdout.write(lines.decode())
        tokens = sum(len(each.tokens) for each in found)
        sys.stderr.write(
            f"{len(found)} texts, {tokens} tokens in {seconds:.1f} s: {tokens / max(seconds, 1e-9):.1f} tokens/s\n"
        )

    def _write(self, text: str) -> None:
        if self._first:
            sys.stdout.write(text)
            sys.stdout.flush()
