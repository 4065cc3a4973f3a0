"""What is asked of the model, as functions of the seed, the language, the numbers of round and request, and the pool.

The task prompt has the parts of MultiAlpaca's (polylm.md, 5; after Self-Instruct, arXiv 2212.10560, and Alpaca): a
number of diverse tasks, nine rules, a few tasks as examples, and the request for the rest. No torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

from megapoly.instruct.tasks import Seed, Task

Form = Literal["chat", "completions"]

_RULES = (
    "Let every instruction lead with another verb.",
    "Vary how they are put: commands beside questions, plain ones beside elaborate ones.",
    "Mix many kinds of tasks: open questions, classification, extraction, rewriting, summaries, brainstorming, creative"
    " writing, explanation, reasoning, calculation, code.",
    "Words must be enough to carry a task out: the assistant cannot see or make pictures or sound, nor act in the"
    " world, nor remember anything for later.",
    "Write instructions, inputs and outputs in {language}; another language only where a task is about it.",
    "Make an instruction one or two sentences long.",
    "An input holds the particular matter that the instruction is to be applied to. Make it realistic, not a"
    " placeholder, and at most 100 words long.",
    "Where the instruction needs no such matter, as a general question does not, the input is exactly <noinput>.",
    "Make the output a fitting and complete answer to instruction and input, of fewer than 200 words.",
)


def draw(count: int, *key: object) -> int:
    """A number below ``count`` that depends on the key alone; the same with every version of Python."""
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:16], "big") % count


def choose(count: int, wanted: int, *key: object) -> list[int]:
    """So many different numbers below ``count``, or all where there are fewer."""
    numbers: list[int] = []
    free = list(range(count))
    for i in range(min(wanted, count)):
        numbers.append(free.pop(draw(len(free), *key, i)))
    return numbers


def task_prompt(language: str, shown: Sequence[Task], more: int, form: Form) -> str:
    """Ask for ``more`` tasks after those that are shown, numbered on from theirs.

    Args:
        language: its name in English.
        form: ``completions`` ends with the label that the model's text goes on from.
    """
    total = len(shown) + more
    rules = "\n".join(f"{i}. {rule.format(language=language)}" for i, rule in enumerate(_RULES, 1))
    blocks = "\n\n".join(task.block(i) for i, task in enumerate(shown, 1))
    first = len(shown) + 1
    lines = [
        f"Make a list of {total} diverse tasks in {language} for testing an assistant: a language model that reads and"
        " writes text. Each task has an instruction, an input and the output that the assistant should give.",
        f"Rules:\n{rules}",
        f"Here are tasks 1 to {len(shown)}.",
        blocks,
        f"Now write tasks {first} to {total} in the same form, each with its number and the labels Instruction, Input"
        " and Output in English, and nothing else.",
    ]
    if form == "completions":
        lines.append(opening(first))
    return "\n\n".join(lines)


def translation_prompt(source: str, language: str, task: Task, form: Form) -> str:
    """Ask for one task in another language, in the same blocks."""
    lines = [
        f"Translate the following task for an assistant from {source} into {language}. Keep the three labels and"
        " <noinput> as they are, and so code, names and symbols; where instruction or output is about the wording of a"
        " text, see that it holds in the translation. Write the translated task and nothing else.",
        task.block(1),
    ]
    if form == "completions":
        lines += [f"The task in {language}:", opening(1)]
    return "\n\n".join(lines)


def opening(number: int) -> str:
    """With which the text of a model begins that only goes on from a prompt."""
    return f"{number}. Instruction:"


def examples(
    key: Sequence[object], seeds: Sequence[Seed], pool: Sequence[Task], from_seeds: int, from_pool: int
) -> list[Task]:
    """The tasks that a prompt shows: of the pool, in whose place come seeds where it has too few, then of the seeds."""
    made = [pool[i] for i in choose(len(pool), from_pool, *key, "pool")]
    wanted = from_seeds + from_pool - len(made)
    return [*(seeds[i].task for i in choose(len(seeds), wanted, *key, "seeds")), *made]
