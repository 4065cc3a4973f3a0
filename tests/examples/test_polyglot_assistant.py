"""The example that makes an assistant: its teacher, and that its parts fit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("openai", reason="needs the packages of self-instruct: pip install -e '.[instruct]'")
pytest.importorskip("icu4py", reason="needs the packages of self-instruct: pip install -e '.[instruct]'")

import teacher
from phrases import BEGINNINGS, ENDS, FACTS

from megapoly import config as configuration
from megapoly.instruct.config import load
from megapoly.instruct.prompts import task_prompt, translation_prompt
from megapoly.instruct.tasks import INCOMPLETE, LINK, Task, parse

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_every_language_says_as_much() -> None:
    assert len({len(facts) for facts in FACTS.values()}) == 1
    for language in ("German", "Spanish", "Japanese"):
        assert len(BEGINNINGS[language]) == 12
        assert len(ENDS[language]) == 10
        assert len(set(FACTS[language].values())) == len(FACTS[language])


@pytest.mark.parametrize("language", ["German", "Spanish", "Japanese"])
def test_the_teacher_translates_seeds_and_writes_tasks(language: str) -> None:
    for number, (thing, fact) in enumerate(FACTS["English"].items()):
        seed = Task(teacher.instruction("English", thing, number % 4, number % 3), "", fact)
        answered = teacher.answer(translation_prompt("English", language, seed, "chat"))
        (task,), dropped = parse(answered, False)
        assert task.output == list(FACTS[language].values())[number]
        assert not dropped
    prompt = task_prompt(language, [task] * 3, 17, "chat")
    tasks, dropped = parse(teacher.answer(prompt), False)
    assert len(tasks) + len(dropped) == 17
    assert len(tasks) > 12
    assert {each.output for each in tasks} <= set(FACTS[language].values())
    assert {each.reason for each in dropped} <= {INCOMPLETE, LINK}
    assert teacher.answer(prompt) == teacher.answer(prompt)


def test_another_question_is_refused() -> None:
    with pytest.raises(ValueError, match="writes and translates tasks only"):
        teacher.answer("How are you?")


def test_the_model_is_the_demo_s() -> None:
    tuned, demo = (configuration.load(EXAMPLES / name) for name in ("polyglot-assistant/tune.toml", "demo/demo.toml"))
    assert tuned.model == demo.model
    assert tuned.data.sources.keys() == load(EXAMPLES / "polyglot-assistant/instruct.toml").languages.keys()


def test_tasks_read_what_the_example_writes() -> None:
    for language in load(EXAMPLES / "polyglot-assistant/instruct.toml").languages:
        text = (EXAMPLES / f"polyglot-assistant/tasks/assistant_{language}.yaml").read_text()
        assert f"task: assistant_{language}\n" in text
        assert f"runs/assistant/test.{language}.jsonl" in text


@pytest.mark.long
def test_all_of_it(tmp_path: Path) -> None:
    """From a smaller base model, in a copy of the example: the tuned one is the better by text and by answers."""
    transformers = pytest.importorskip("transformers", reason="loads what the example hands on")
    here = tmp_path / "examples" / "polyglot-assistant"
    shutil.copytree(EXAMPLES / "polyglot-assistant", here)
    small = {"layers": 2, "hidden": 96, "heads": 4, "ffn": 256, "vocabulary": 1024}
    lines = (here / "tune.toml").read_text().splitlines()
    keys = {line.partition(" = ")[0]: line for line in lines}
    tune = "\n".join(lines)
    for key, value in small.items():
        tune = tune.replace(keys[key], f"{key} = {value}")
    (here / "tune.toml").write_text(tune)
    base = tmp_path / "base"
    base.mkdir()

    def run(*command: str | Path) -> str:
        done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, cwd=base)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    files = []
    for code, language in (("de", "German"), ("es", "Spanish"), ("ja", "Japanese")):
        rows = [{"text": f"{thing}: {fact}"} for thing, fact in FACTS[language].items() for _ in range(40)]
        (base / f"{code}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files.append(f"{code}={code}.jsonl")
    run("-m", "megapoly", "tokenizer", "train", "--output", "tokenizer.model", "--vocabulary", "1024", *files)
    for code in ("de", "es", "ja"):
        build = ("data", "build", "--tokenizer", "tokenizer.model", "--language", code, "--output", f"data/{code}")
        run("-m", "megapoly", *build, f"{code}.jsonl")
    mixed = "tokens = 20_480\nweights = { de = 0.5, es = 0.25, ja = 0.25 }"
    (base / "base.toml").write_text(tune.replace('"tuned"', '"run"').replace("epochs = 16", mixed))
    run("-m", "megapoly", "train", "base.toml")

    said = run(here / "run.py", base / "run")
    folder = tmp_path / "runs" / "assistant"
    assert "$ megapoly evaluate" in said
    assert "table and picture: runs/assistant/result.md" in said
    rows = json.loads((folder / "result.json").read_text())["rows"]
    assert {row["name"] for row in rows} == {
        f"{task}/{each}" for task in ("bits_per_byte", "assistant") for each in ("de", "es", "ja", "average")
    }
    values = {(row["name"], row["model"].split("/")[-1]): row["value"] for row in rows}
    assert values["bits_per_byte/average", "tuned"] < 0.95 * values["bits_per_byte/average", "run"]
    assert values["assistant/average", "tuned"] > values["assistant/average", "run"] + 10
    assert (folder / "result.png").read_bytes().startswith(b"\x89PNG")
    assert "| assistant, accuracy |" in (folder / "result.md").read_text()
    peer = transformers.AutoTokenizer.from_pretrained(folder / "huggingface")
    assert peer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x\n\n"
