"""From a base model to an assistant in three languages that is measured: ``python examples/polyglot-assistant/run.py``.

The base model is the demo's (`make train`), or the run folder that is given. A teacher on this machine (teacher.py)
stands for a large model: self-instruct has it translate seeds and write tasks, the base model is tuned on what is kept,
and both are evaluated on tasks that were not trained. All is written to ``runs/assistant``.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from phrases import FACTS
from rich.console import Console
from rich.text import Text
from teacher import Teacher, instruction

from megapoly import config

ROOT = Path(__file__).resolve().parents[2]
HERE = Path("examples/polyglot-assistant")  # this path and those below are relative to ROOT
BASE = Path("runs/demo")
FOLDER = Path("runs/assistant")
LANGUAGES = {"de": "German", "es": "Spanish", "ja": "Japanese"}
HELD_OUT = 4  # of so many tasks one is for the evaluation

console = Console(highlight=False)


def megapoly(*arguments: str | Path) -> None:
    """Show and run a command of megapoly; its failure ends the example, and it has said why itself."""
    line = shlex.join(str(argument) for argument in arguments)
    console.print(Text(f"\n$ megapoly {line}", style="bold"), soft_wrap=True)
    begun = time.monotonic()
    code = subprocess.run([sys.executable, "-m", "megapoly", *map(str, arguments)]).returncode
    if code:
        raise SystemExit(code)
    console.print(f"[dim]{time.monotonic() - begun:.1f} s[/dim]")


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: Sequence[object]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_seeds() -> None:
    """Tasks that a person wrote, in English."""
    facts = list(FACTS["English"].items())
    write(FOLDER / "seeds.jsonl", [
        {"id": f"seed_{i}", "instruction": instruction("English", thing, i % 4, i % 3), "input": "", "output": fact}
        for i, (thing, fact) in enumerate(facts)
    ])  # fmt: skip


def split(code: str) -> None:
    """What self-instruct kept, into tasks to train on and questions, each with three answers to other tasks."""
    tasks = read(FOLDER / f"instruct/tasks.{code}.jsonl")
    pick = random.Random(code)
    pick.shuffle(tasks)
    count = len(tasks) // HELD_OUT
    write(FOLDER / f"train.{code}.jsonl", tasks[count:])
    answers = list(FACTS[LANGUAGES[code]].values())
    questions = []
    for task in tasks[:count]:
        choices = [task["output"], *pick.sample([each for each in answers if each != task["output"]], 3)]
        pick.shuffle(choices)
        questions.append({**task, "choices": choices, "answer": choices.index(task["output"])})
    write(FOLDER / f"test.{code}.jsonl", questions)
    write(FOLDER / f"text.{code}.jsonl", [{"text": f"{each['instruction']}\n\n{each['output']}"} for each in questions])


def main(arguments: Sequence[str] = tuple(sys.argv[1:])) -> None:
    if len(arguments) > 1:
        raise SystemExit("usage: run.py [RUN FOLDER OF THE BASE MODEL]")
    base = Path(os.path.relpath(arguments[0], ROOT)) if arguments else BASE
    os.chdir(ROOT)
    if not (base / "config.json").exists():
        raise SystemExit(f"{base}: there is no run; `make train` makes {BASE}, or give the folder of another such run")
    trained = json.loads((base / "config.json").read_text(encoding="utf-8"))
    if trained["model"] != config.load(HERE / "tune.toml").model.model_dump(mode="json"):
        raise SystemExit(f"{base}: has another model than {HERE}/tune.toml; set its [model] to that of the run")
    if FOLDER.exists():
        raise SystemExit(f"{FOLDER} is there already; move it away to begin anew")
    (FOLDER / "data").mkdir(parents=True)
    begun = time.monotonic()

    console.rule("1. Self-instruct", align="left")
    write_seeds()
    shutil.copy(HERE / "instruct.toml", FOLDER / "instruct.toml")
    with Teacher() as teacher:
        megapoly("instruct", "generate", FOLDER / "instruct.toml", "--set", f"endpoint.base_url={teacher.url}")
    megapoly("instruct", "report", FOLDER / "instruct")

    console.rule("2. Tuning", align="left")
    shutil.copy(trained["data"]["tokenizer"], FOLDER / "tokenizer.model")
    shutil.copy(HERE / "tune.toml", FOLDER / "tune.toml")
    for code in LANGUAGES:
        split(code)
        build = ("data", "build", "--instructions", "--template", "multialpaca", "--validation", "0.1", "--pack", "128")
        where = ("--output", FOLDER / f"data/{code}", FOLDER / f"train.{code}.jsonl")
        megapoly(*build, "--tokenizer", FOLDER / "tokenizer.model", "--language", code, *where)
    megapoly("train", FOLDER / "tune.toml", "--init-from", base)

    console.rule("3. Evaluation, before and after", align="left")
    texts = [part for code in LANGUAGES for part in ("--text", f"{code}={FOLDER}/text.{code}.jsonl")]
    tasks = ("--tasks", "bits_per_byte,assistant", "--include-path", HERE / "tasks", *texts)
    results = ("--markdown", FOLDER / "result.md", "--json", FOLDER / "result.json", "--picture", FOLDER / "result.png")
    megapoly("evaluate", base, FOLDER / "tuned", *tasks, *results)
    for code in LANGUAGES:
        megapoly("generate", FOLDER / "tuned", "--instruction", read(FOLDER / f"test.{code}.jsonl")[0]["instruction"])
    megapoly("convert", FOLDER / "tuned", FOLDER / "huggingface")
    console.print(
        f"\nin all {time.monotonic() - begun:.0f} s; table and picture: {FOLDER}/result.md, {FOLDER}/result.png"
    )


if __name__ == "__main__":
    main()
