"""The example that makes an assistant: its teacher, and that its parts fit."""

from __future__ import annotations

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
