"""The commands of megapoly. Heavy modules are imported inside the commands, so that --help is quick."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from megapoly import __version__
from megapoly.cli.bench import bench_app
from megapoly.cli.checkpoint import checkpoint_app
from megapoly.cli.common import SETTINGS
from megapoly.cli.convert import convert
from megapoly.cli.data import data_app
from megapoly.cli.evaluate import evaluate_models
from megapoly.cli.generate import generate_texts
from megapoly.cli.instruct import instruct_app
from megapoly.cli.plan import plan_app
from megapoly.cli.tokenizer import tokenizer_app
from megapoly.errors import MegapolyError

app = typer.Typer(
    name="megapoly",
    help="Multilingual language models in 3D parallel, from raw text to a trained, sampled, evaluated model.",
    add_completion=False,
    **SETTINGS,
)
for name, part in (
    ("tokenizer", tokenizer_app),
    ("data", data_app),
    ("plan", plan_app),
    ("checkpoint", checkpoint_app),
    ("instruct", instruct_app),
    ("bench", bench_app),
):
    app.add_typer(part, name=name)

app.command("convert")(convert)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; an error for users is one message and exit code 1."""
    try:
        app(args=arguments)
    except MegapolyError as error:
        Console(stderr=True, soft_wrap=True).print(Text(f"error: {error}", style="red"))
        raise SystemExit(1) from None


def _version(wanted: bool) -> None:
    if wanted:
        print(f"megapoly {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command("train")
def train(
    config: Annotated[Path, typer.Argument(help="TOML file of the run.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as layout.tp=2.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest whole checkpoint.")] = False,
    resume_if_any: Annotated[
        bool, typer.Option("--resume-if-any", help="The same, or begin where the run has none: for job queues.")
    ] = False,
    init_from: Annotated[
        Path | None,
        typer.Option(
            help="Begin a new run with the weights, and nothing else, of this run, checkpoint, or folder of Hugging"
            " Face or Megatron."
        ),
    ] = None,
    stop_step: Annotated[int | None, typer.Option(min=1, help="Save and end after this step.")] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            metavar="steps=A..B",
            help="Trace these steps, for Perfetto or TensorBoard. Few are enough: training waits for the files.",
        ),
    ] = None,
) -> None:
    """Train a model, alone or as one rank of a torchrun.

    Ctrl-C or SIGTERM saves a checkpoint and ends. --resume and --init-from take a checkpoint of any layout.

    [bold]Example:[/bold] torchrun --nproc-per-node 8 -m megapoly train run.toml --set layout.tp=2
    """
    from megapoly.launch import Resume, run_training

    how: Resume = "always" if resume else "if-any" if resume_if_any else "never"
    raise typer.Exit(run_training(config, overrides or [], how, stop_step, profile, init_from))


app.command("generate")(generate_texts)
app.command("evaluate")(evaluate_models)
