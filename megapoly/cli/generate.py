"""``megapoly generate``."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megapoly.cli.common import BatchSize, Device, Dtype, OwnTokenizer, PipelineRanks, TensorRanks
from megapoly.errors import ConfigError

if TYPE_CHECKING:
    from megapoly.context import ParallelContext
    from megapoly.data.templates import Template
    from megapoly.generate import Completion, Generator, Sampling
    from megapoly.generate.prompts import JsonLines

_ROUND = 8  # batches of each replica after which the texts are shown
_STDOUT = Path("-")


def generate_texts(
    model: Annotated[
        Path,
        typer.Argument(help="A run folder, a checkpoint, or a folder of Hugging Face or Megatron.", metavar="MODEL"),
    ],
    prompts: Annotated[
        list[str] | None, typer.Option("--prompt", help="Text to continue; may be given several times.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--prompts", help='File with one a line, of .jsonl a string or {"prompt": ...}; - is the input.'),
    ] = None,
    instruction: Annotated[
        str | None, typer.Option(help="Ask a tuned model this, in the form that it was tuned on; shows the answer.")
    ] = None,
    given: Annotated[str | None, typer.Option("--input", help="What the instruction is about.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Prompts are questions to a tuned model, put in its form too.")
    ] = False,
    tokens: Annotated[int, typer.Option(help="Most tokens of a text.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from so many of the likeliest tokens; 0: from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens that together reach this.")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1, tokens that came before lose.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends a text; several times.")] = None,
    samples: Annotated[int, typer.Option(help="Texts for each prompt.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the sampling: the same text under every layout.")] = 0,
    tokenizer: OwnTokenizer = None,
    dtype: Dtype = None,
    device: Device = "auto",
    tp: TensorRanks = 1,
    pp: PipelineRanks = 1,
    batch: BatchSize = 16,
    jsonl: Annotated[
        Path | None,
        typer.Option(
            help="Write the texts here as they come, an object a line; replaces a file that exists, when the first are"
            " there. - is the output."
        ),
    ] = None,
) -> None:
    """Continue texts with a trained model, alone or as one rank of a torchrun.

    One text is shown as it comes, several when they are there, in their order. A prompt and its text together have at
    most the model's positions. Ranks beyond tp x pp share the prompts.

    [bold]Example:[/bold] megapoly generate runs/demo --prompt "Die Sprache" --tokens 40 --temperature 0.8 --top-p 0.9

    [bold]Example:[/bold] megapoly generate runs/tuned --instruction "Traduce al inglés." --input "Buenos días"
    """
    from megapoly.engine import DTYPES
    from megapoly.generate import Generator, Question, Sampling
    from megapoly.launch import run_meshed
    from megapoly.run import agree

    def work(context: ParallelContext) -> None:
        sampling = agree(
            context,
            lambda: Sampling(tokens, temperature, top_k, top_p, repetition_penalty, tuple(stop or ()), samples, seed),
        )
        asks = instruction is not None
        texts = _agreed_prompts(prompts or [], file, context, least=not asks)
        with agree(context, lambda: _output(jsonl, context)) as output:
            chosen = None if dtype is None else DTYPES[dtype]
            generator = agree(context, lambda: Generator.open(model, tokenizer, chosen, context=context, batch=batch))
            if asks or chat:
                form = agree(context, lambda: _template(generator, model))
                texts = [Question(form.turn(text)) for text in texts] if chat else texts
                texts += [Question(form.turn(instruction, given))] if instruction is not None else []
            _Printer(context, jsonl, output, answers=asks or chat).run(generator, texts, sampling)

    if given is not None and instruction is None:
        raise ConfigError("--input is what an instruction is about; give --instruction too")
    raise typer.Exit(run_meshed(tp, pp, device, work))


def _template(generator: Generator, model: Path) -> Template:
    if generator.template is None:
        raise ConfigError(
            f"{model}: was not tuned on instructions by megapoly, so that it is not known how to ask it; write the"
            " whole prompt with --prompt"
        )
    return generator.template


def _agreed_prompts(given: list[str], file: Path | None, context: ParallelContext, least: bool) -> list[str]:
    """Prompts of the first rank, which alone has the input, on all; at ``least`` one."""
    from megapoly import comm
    from megapoly.generate.prompts import read_prompts
    from megapoly.run import agree

    def read() -> list[str]:
        if least and not given and file is None:
            raise ConfigError("nothing to continue: give --prompt TEXT, --prompts FILE or --instruction TEXT")
        return [*given, *(read_prompts(file) if file is not None and context.rank == 0 else ())]

    found: list[str] = comm.broadcast_object(agree(context, read), context.control)
    return found


def _output(jsonl: Path | None, context: ParallelContext) -> AbstractContextManager[JsonLines | None]:
    """The file of the first rank, which finds out that it cannot be written before there are any texts."""
    from megapoly.generate.prompts import JsonLines

    return nullcontext() if context.rank > 0 or jsonl in (None, _STDOUT) else JsonLines(jsonl)


class _Printer:
    """Shows the texts on the first rank; of ``answers`` a single one without its prompt."""

    def __init__(self, context: ParallelContext, jsonl: Path | None, output: JsonLines | None, answers: bool) -> None:
        self._first, self._output, self._answers = context.rank == 0, output, answers
        self._replicas = context.dp.size
        self._streams, self._json = jsonl is None, jsonl == _STDOUT

    def run(self, generator: Generator, prompts: Sequence[str], sampling: Sampling) -> None:
        if self._first:
            sys.stderr.write("".join(f"megapoly: {note}\n" for note in generator.notes))
        begin = time.perf_counter()
        if len(prompts) == sampling.samples == 1 and self._streams:
            self._stream(generator, prompts[0], sampling)
            return
        step = _ROUND * generator.batch * self._replicas
        texts = tokens = 0
        for at in range(0, len(prompts), step):
            part = generator.generate(prompts[at : at + step], sampling, first=at)
            self._show(part)
            texts += len(part)
            tokens += sum(len(each.tokens) for each in part)
        seconds = time.perf_counter() - begin
        if self._first:
            sys.stderr.write(
                f"{texts} texts, {tokens} tokens in {seconds:.1f} s: {tokens / max(seconds, 1e-9):.1f} tokens/s\n"
            )

    def _stream(self, generator: Generator, prompt: str, sampling: Sampling) -> None:
        parts = generator.stream(prompt, sampling)  # which may refuse the prompt
        self._write("" if self._answers else f"{prompt}|")
        for part in parts:
            self._write(part)
        self._write("\n")

    def _show(self, part: Sequence[Completion]) -> None:
        from megapoly.generate.prompts import to_json_lines

        if self._output is not None:
            self._output.add(part)
        if self._json:
            self._write(to_json_lines(part).decode())
        else:
            self._write("".join(f"{each.prompt}|{each.text}\n" for each in part))

    def _write(self, text: str) -> None:
        if self._first:
            sys.stdout.write(text)
            sys.stdout.flush()
