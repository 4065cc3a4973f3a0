"""The main job from end to end, on a CPU: real text in 18 languages to a trained, resumed, evaluated and sampled model.

`make train` runs it. Every step prints the commands that it runs, which can be run by hand from the root of the
repository, and its time. Everything is written to ``runs/demo``; what an earlier demo left there is moved aside.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from corpora import LANGUAGES
from results import PAIRS, History, bits_per_byte_table, continuity, picture
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megapoly import config as configuration
from megapoly.errors import MegapolyError

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path("runs/demo")  # this path and those below are relative to ROOT
CONFIG = FOLDER / "demo.toml"
TOKENIZER = FOLDER / "tokenizer.model"
VOCABULARY = 6144
RANKS = 8
SECOND_LAYOUT = ("layout.dp=4", "layout.pp=1", "layout.tp=2")
HELD_OUT = 0.05
PROMPTS = (
    "The value of the",
    "Möchtest du",
    "Vous pouvez",
    "Выберите",
    "选择",
    "English: Delete the selected entries\nSpanish:",
)


def program(name: str) -> str:
    """A program of the environment that runs this one, as one would type it from ROOT."""
    path = Path(sys.executable).parent / name
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


class Demo:
    """Runs steps in order, prints them, and keeps their times."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.times: list[tuple[str, float]] = []
        self.python = program("python")
        self.torchrun = f"OMP_NUM_THREADS=1 {program('torchrun')} --nproc-per-node {RANKS}"

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        self.console.print()
        self.console.rule(f"{len(self.times) + 1}. {title}", align="left")
        begun = time.monotonic()
        yield
        self.times.append((title, time.monotonic() - begun))
        self.console.print(f"[dim]{self.times[-1][1]:.1f} s[/dim]")

    def command(self, line: str) -> None:
        """Show and run one line of shell; its failure ends the demo.

        Raises:
            SystemExit: with the command's own exit code; the command itself has said why.
        """
        self.console.print(Text(f"$ {line}", style="bold"), soft_wrap=True)
        code = subprocess.run(["bash", "-c", f"set -e; {line}"], cwd=ROOT).returncode
        if code:
            self.console.print(f"[red]the command above ended with code {code}; the demo stops here[/red]")
            raise SystemExit(code)

    def megapoly(self, *arguments: str | Path) -> None:
        self.command(f"{self.python} -m megapoly {shlex.join(str(argument) for argument in arguments)}")

    def time_table(self) -> Table:
        table = Table(title="Time of every step", title_justify="left", show_header=False, show_footer=True)
        total = sum(seconds for _, seconds in self.times)
        table.add_column("", footer="in all")
        table.add_column("", footer=f"{total:.1f} s", justify="right")
        for number, (title, seconds) in enumerate(self.times, start=1):
            table.add_row(f"{number}. {title}", f"{seconds:.1f} s")
        return table


def move_aside(folder: Path) -> Path | None:
    """Rename a folder that exists to the first free ``NAME.1``, ``NAME.2``, ...; returns the new path."""
    if not folder.exists():
        return None
    number = 1
    while (target := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(target)
    return target


def make_data(demo: Demo) -> None:
    with demo.step("Real text in 18 languages, and its pairs with English"):
        demo.command(f"{demo.python} examples/demo/corpora.py --output {FOLDER}/text")

    files = [f"{language}={FOLDER}/text/corpus/{language}.jsonl" for language in LANGUAGES]
    with demo.step("A tokenizer: BPE with byte fallback"):
        demo.megapoly("tokenizer", "train", "--output", TOKENIZER, "--vocabulary", str(VOCABULARY), *files)
        demo.megapoly("tokenizer", "report", "--model", TOKENIZER, *files)

    build = f"{demo.python} -m megapoly data build --tokenizer {TOKENIZER} --validation {HELD_OUT}"
    with demo.step("Indexed datasets: one for each language, one of bilingual documents"):
        demo.command(f"mkdir -p {FOLDER}/data")
        demo.command(
            f"for CODE in {' '.join(LANGUAGES)}; do {build} --language $CODE --output {FOLDER}/data/$CODE"
            f" {FOLDER}/text/corpus/$CODE.jsonl; done"
        )
        demo.command(f"{build} --pairs --language en-xx --output {FOLDER}/data/{PAIRS} {FOLDER}/text/pairs/en-*.jsonl")


def plan_run(demo: Demo) -> configuration.Config:
    with demo.step("The run to come: a curriculum of two stages"):
        demo.command(f"cp examples/demo/{CONFIG.name} {CONFIG}")
        demo.megapoly("data", "plan", CONFIG, "--picture", FOLDER / "plan.png")
        return configuration.load(CONFIG)


def train(demo: Demo, config: configuration.Config) -> None:
    train_command = f"{demo.torchrun} -m megapoly train {CONFIG}"
    with demo.step(f"Training: {RANKS} ranks, {config.mesh}, half of the run"):
        demo.command(f"{train_command} --stop-step {config.total_steps // 2}")
    overrides = " ".join(f"--set {override}" for override in SECOND_LAYOUT)
    with demo.step("Training goes on from the checkpoint under another layout"):
        demo.command(f"{train_command} --resume {overrides}")
        table, sentence = continuity(History.read(FOLDER / "log.jsonl"), config.train.global_batch)
        demo.console.print(table)
        demo.console.print(sentence)


def summarise(demo: Demo, config: configuration.Config) -> None:
    history = History.read(FOLDER / "log.jsonl")
    with demo.step("What the model has learned"):
        demo.console.print(bits_per_byte_table(history))
        picture(history, FOLDER / "result.png")
        demo.console.print(f"picture: {FOLDER}/result.png")
        prompts = [argument for prompt in PROMPTS for argument in ("--prompt", prompt)]
        sampling = ("--tokens", "40", "--temperature", "0.8", "--top-p", "0.9", "--seed", "1")
        demo.megapoly("generate", FOLDER, *prompts, *sampling)
    demo.console.print()
    demo.console.print(demo.time_table())
    demo.console.print()
    demo.console.rule("What next", align="left")
    for what, line in next_steps(demo, config):
        demo.console.print(what)
        demo.console.print(Text(f"  $ {line}", style="bold"), soft_wrap=True)


def next_steps(demo: Demo, config: configuration.Config) -> list[tuple[str, str]]:
    """What a reader may want to do, and the line that does it."""
    longer = [f"--set data.stages.{i}.tokens={10 * stage.tokens}" for i, stage in enumerate(config.data.stages)]
    return [
        ("Curves in TensorBoard:", f"{program('tensorboard')} --logdir {FOLDER}/tensorboard"),
        (
            "More steps, as a new run of ten times the tokens:",
            f"{demo.torchrun} -m megapoly train {CONFIG} --set train.directory=long {' '.join(longer)}",
        ),
        (
            "Your own text, my.jsonl with a field 'text' in each line: a dataset, and a run on it alone:",
            f"{demo.python} -m megapoly data build --tokenizer {TOKENIZER} --language XX --validation {HELD_OUT}"
            f" --output {FOLDER}/data/XX my.jsonl && {demo.torchrun} -m megapoly train {CONFIG}"
            ' --set train.directory=mine --set \'data.sources={XX={path="data/XX",language="XX"}}\''
            f" --set 'data.stages=[{{name=\"mine\",tokens={100 * config.step_tokens},weights={{XX=1.0}}}}]'",
        ),
        (
            "More ranks, on several machines: the same command on each, joined by a rendezvous:",
            f"{demo.torchrun} --nnodes 2 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m megapoly train {CONFIG}"
            " --set train.directory=nodes --set layout.dp=4",
        ),
    ]


def main(arguments: Sequence[str] = tuple(sys.argv[1:])) -> None:
    if arguments:
        raise SystemExit(f"found {' '.join(arguments)}; the demo takes no arguments: edit examples/demo/demo.toml")
    os.chdir(ROOT)
    console = Console(highlight=False)
    demo = Demo(console)
    moved = move_aside(FOLDER)
    if moved:
        console.print(f"{FOLDER} exists: moved to {moved}")
    FOLDER.mkdir(parents=True)
    try:
        make_data(demo)
        config = plan_run(demo)
        train(demo, config)
        summarise(demo, config)
    except MegapolyError as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(
            f"stopped; where training had begun, go on with\n  $ {demo.torchrun} -m megapoly train {CONFIG} --resume"
        ) from None


if __name__ == "__main__":
    main()
