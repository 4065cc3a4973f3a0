"""What is read of answers and of seeds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megapoly.errors import ConfigError, DataError
from megapoly.instruct import prompts
from megapoly.instruct.tasks import Seed, Task, parse, parse_one, read_seeds
from tests.instruct import runs

FIRST = Task("Sort the list.", "3, 1, 2", "1, 2, 3")
SECOND = Task("Say hello.", "", "Hello!\n\nAnd bye.")


def reasons(text: str, cut: bool = False) -> list[str]:
    return [each.reason for each in parse(text, cut)[1]]


def test_what_prompts_show_is_read_back() -> None:
    text = "\n\n".join(task.block(i) for i, task in enumerate((FIRST, SECOND), 4))
    assert parse(text, cut=False) == ([FIRST, SECOND], [])
    assert parse("Sure! Here they are:\n" + text + "\n\n###\n", cut=False) == ([FIRST, SECOND], [])


@pytest.mark.parametrize(
    "text",
    [
        "4. Instruction: Sort the list.\n4. Input: 3, 1, 2\n4. Output: 1, 2, 3",
        "4. Instruction:\nSort the list.\n4. Input:\n3, 1, 2\n4. Output:\n1, 2, 3\n###",
        "4) INSTRUCTION : Sort the list.\r\n4) input：3, 1, 2\r\n4) Output: 1, 2, 3\r\n---",
        "**4. Instruction:** Sort the list.\n**4. Input:** 3, 1, 2\n**4. Output**: 1, 2, 3",
        "### 4. Instruction: Sort the list.\nInput: 3, 1, 2\nOutput: 1, 2, 3",
        "  4. Instruction: Sort the list.\n  Input: 3, 1, 2\n  Output: 1, 2, 3",
    ],
)
def test_forms_in_which_models_write(text: str) -> None:
    assert parse(text, cut=False) == ([FIRST], [])


def test_labels_inside_of_a_text_are_text() -> None:
    task = Task("Write a test case.", "", "Input: 1\nOutput: 2")
    assert parse(task.block(9), cut=False) == ([task], [])


@pytest.mark.parametrize("given", ["<noinput>", "<NoInput>", "<no input>", "noinput", "<noinput>.", "", "  "])
def test_no_input(given: str) -> None:
    assert parse(f"4. Instruction: Go.\n4. Input: {given}\n4. Output: Gone.", cut=False)[0] == [
        Task("Go.", "", "Gone.")
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("4. Instruction: Go.\n4. Output: Gone.", "incomplete"),
        ("4. Instruction: Go.\n4. Input: <noinput>", "incomplete"),
        ("4. Instruction: Go.\n4. Input: <noinput>\n4. Output:  \n", "incomplete"),
        ("4. Instruction:\n4. Input: x\n4. Output: y", "incomplete"),
        ("4. Instruction: Go.\n4. Output: y\n4. Input: x", "incomplete"),
        ("4. Instruction: Go.\n4. Input: x\n4. Output: y\n4. Output: z", "incomplete"),
        ("4. Instruction: Go to https://a.b\n4. Input: x\n4. Output: y", "link"),
        ("4. Instruction: Go.\n4. Input: x\n4. Output: see www.a.b", "link"),
        ("I cannot do that.", "answers without a task"),
        ("", "answers without a task"),
    ],
)
def test_what_is_dropped(text: str, reason: str) -> None:
    assert parse(text, cut=False)[0] == []
    assert reasons(text) == [reason]


def test_the_last_task_of_an_answer_that_was_cut_off_is_dropped() -> None:
    text = f"{FIRST.block(4)}\n{SECOND.block(5)}"
    assert parse(text, cut=True)[0] == [FIRST]
    assert reasons(text, cut=True) == ["cut off"]
    for end in range(len(FIRST.block(4)) + 1, len(text)):
        found = parse(text[:end], cut=True)[0]
        assert found == ([FIRST] if "5. Instruction:" in text[:end] else [])


def test_one_task_for_a_translation() -> None:
    assert parse_one("Here:\n" + FIRST.block(1) + "\n\n" + SECOND.block(2), cut=True) == FIRST
    assert parse_one(FIRST.block(1), cut=True) is None
    assert parse_one("1. Instruction: a\n1. Input: https://a.b\n1. Output: c", cut=False) is not None
    assert parse_one("no", cut=False) is None


def test_seeds_of_both_kinds(tmp_path: Path) -> None:
    path = tmp_path / "seeds.jsonl"
    alpaca = {
        "id": "x",
        "instruction": " a ",
        "instances": [{"input": "", "output": "b"}, {"input": "", "output": "c"}],
    }
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in (alpaca, {"instruction": "d", "input": None, "output": "e"}))
    )
    assert read_seeds(path) == [Seed("x", Task("a", "", "b")), Seed("1", Task("d", "", "e"))]
    path.write_text(json.dumps({"instruction": "a", "input": "", "output": ""}) + "\n")
    with pytest.raises(DataError, match=r"seeds.jsonl, line 1: field 'output' is empty"):
        read_seeds(path)
    path.write_text(json.dumps({"instruction": "a", "input": 3, "output": "b"}) + "\n")
    with pytest.raises(DataError, match="field 'input' holds int"):
        read_seeds(path)
    path.write_text((json.dumps({"id": 1, "instruction": "a", "output": "b"}) + "\n") * 2)
    with pytest.raises(ConfigError, match="two tasks have the id '1'"):
        read_seeds(path)
    path.write_text("")
    with pytest.raises(ConfigError, match="holds no task"):
        read_seeds(path)


@pytest.mark.skipif(not runs.REAL.exists(), reason="the text of development is not beside the checkout")
def test_alpacas_seeds() -> None:
    seeds = read_seeds(runs.REAL / "alpaca_seed_tasks.jsonl.gz")
    assert len(seeds) == 175
    assert all(parse_one(seed.task.block(1), cut=False) == seed.task for seed in seeds)


def test_draws_are_the_same_everywhere_and_even() -> None:
    assert [prompts.draw(1000, 5, "es", i) for i in range(4)] == [22, 948, 117, 228]
    assert sorted(prompts.choose(5, 9, "key")) == [0, 1, 2, 3, 4]
    chosen = [tuple(prompts.choose(4, 2, i)) for i in range(12_000)]
    assert len(set(chosen)) == 12
    assert all(abs(chosen.count(pair) - 1000) < 150 for pair in set(chosen))


def test_a_prompt_shows_two_seeds_and_a_task_of_the_pool() -> None:
    seeds = [Seed(str(i), Task(f"seed {i}", "", "x")) for i in range(9)]
    pool = [Task(f"pool {i}", "", "x") for i in range(9)]
    shown = prompts.examples((1, "es", 2, 3), seeds, pool, 2, 1)
    assert [task.instruction.split()[0] for task in shown] == ["seed", "seed", "pool"]
    first = prompts.examples((1, "es", 1, 3), seeds, [], 2, 1)
    assert len({task.instruction for task in first}) == 3
    assert all(task.instruction.startswith("seed") for task in first)
    text = prompts.task_prompt("Thai", shown, 17, "chat")
    assert "20 diverse tasks in Thai" in text
    assert "write tasks 4 to 20" in text
    assert text.count("\n9. ") == 1  # nine rules
    assert "<noinput>" in text
    assert parse(text, cut=False)[0][:2] == shown[:2]
    assert prompts.task_prompt("Thai", shown, 17, "completions").endswith("\n4. Instruction:")
