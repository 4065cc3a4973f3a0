"""What a folder of self-instruct holds, by language. No torch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydantic

from megapoly.data.files import write_whole
from megapoly.errors import DataError
from megapoly.instruct import tasks
from megapoly.instruct.config import Config
from megapoly.instruct.journal import LOST, Journal
from megapoly.instruct.model import NONE, Tokens
from megapoly.instruct.rounds import file_of
from megapoly.instruct.words import load_words

CONFIG = "config.json"  # of the newest run
_BY_TASK = (tasks.SIMILAR, tasks.REPEATED_INPUT, tasks.LINK, tasks.INCOMPLETE, tasks.CUT_OFF, tasks.NO_WORDS)
_BY_ANSWER = (tasks.NOTHING, "refused prompts")


@dataclass
class Standing:
    """Of one language. Tasks are those of the rounds that are whole.

    Attributes:
        wanted: requests of all rounds.
        answered: of these.
        translations: answered requests for seeds.
        refused: answers of either that refuse their prompt.
        refusal: the commonest reason; empty where none is refused.
        faults: by kind; those of killed processes are ``interrupted``.
        spent: the most that all can have taken; ``uncertain`` of it may have been for nothing.
        dropped: by reason.
        first_words: different first words of instructions, which in many languages are verbs.
        lengths: mean words of instructions, inputs (where there are any) and outputs.
    """

    language: str
    wanted: int
    answered: int = 0
    translations: int = 0
    refused: int = 0
    refusal: str = ""
    faults: Counter[str] = field(default_factory=Counter)
    spent: Tokens = NONE
    uncertain: Tokens = NONE
    seeds: int = 0
    kept: int = 0
    with_input: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    first_words: int = 0
    lengths: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def proposed(self) -> int:
        """Tasks in the answers, whole or not."""
        return self.kept + sum(self.dropped[reason] for reason in _BY_TASK)

    def row(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "language": self.language,
            "requests": self.wanted,
            "answered": self.answered,
            "translations": self.translations,
            "refused": self.refused,
            "refusal": self.refusal,
            "faults": dict(self.faults),
            "prompt_tokens": self.spent.prompt,
            "completion_tokens": self.spent.completion,
            "uncertain_tokens": self.uncertain.total,
            "seeds": self.seeds,
            "proposed": self.proposed,
            "kept": self.kept,
            "with_input": self.with_input,
            "dropped": dict(self.dropped),
            "first_words": self.first_words,
            "mean_words": dict(zip(("instruction", "input", "output"), self.lengths)),
        }


def note_config(config: Config) -> None:
    """Keep the config of a run for its report."""
    write_whole(config.directory / CONFIG, (config.model_dump_json(indent=1) + "\n").encode())


def read_folder(directory: Path) -> tuple[Config, list[Standing]]:
    """Its config and how each language stands; nothing is changed, and a run may go on meanwhile.

    Raises:
        DataError: it is no such folder, or a file is damaged.
    """
    path = directory / CONFIG
    try:
        config = Config.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); give the directory of `megapoly instruct generate`"
        ) from error
    except pydantic.ValidationError as error:
        raise DataError(f"{path}: is damaged, or of another version: {error.errors()[0]['msg']}") from error
    codes = sorted(found.name.split(".")[1] for found in directory.glob("requests.*.jsonl"))
    return config, [_standing(directory, config, code) for code in codes]


def spent(directory: Path) -> Tokens:
    """The most that all journals of a folder can have taken."""
    total = Tokens()
    for path in sorted(directory.glob("requests.*.jsonl")):
        total = total.plus(Journal(path, None).spent)
    return total


def _standing(directory: Path, config: Config, code: str) -> Standing:
    journal = Journal(file_of(directory, "requests", code), None)
    standing = Standing(code, config.requests(), faults=journal.faults)
    standing.spent, standing.uncertain = journal.spent, journal.uncertain
    standing.answered = sum(key.round > 0 for key in journal.answers)
    standing.translations = len(journal.answers) - standing.answered
    standing.refused, standing.refusal = journal.refused()
    standing.seeds = sum(1 for _ in _rows(file_of(directory, "seeds", code)))
    for row in _rows(file_of(directory, "dropped", code)):
        standing.dropped[row["reason"]] += 1
    words = load_words(code)
    first: set[str] = set()
    lengths = [0, 0, 0]
    for row in _rows(file_of(directory, "tasks", code)):
        cut = [words(row[name]) for name in ("instruction", "input", "output")]
        first.update(cut[0][:1])
        lengths = [total + len(each) for total, each in zip(lengths, cut)]
        standing.kept += 1
        standing.with_input += bool(row["input"])
    standing.first_words = len(first)
    kept, given = max(standing.kept, 1), max(standing.with_input, 1)
    standing.lengths = (lengths[0] / kept, lengths[1] / given, lengths[2] / kept)
    return standing


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except ValueError as error:
            what = f"{path}, line {number}: is damaged ({error})"
            raise DataError(f"{what}; `megapoly instruct generate` makes it anew") from None


def tables(config: Config, standings: Sequence[Standing]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Heads and rows of three tables, by title."""
    reasons = [reason for reason in _BY_TASK if any(each.dropped[reason] for each in standings)]
    answers = [reason for reason in _BY_ANSWER if any(each.dropped[reason] for each in standings)]
    kinds = sorted({kind for each in standings for kind in each.faults}, key=lambda kind: (kind == LOST, kind))
    refused = any(each.refused for each in standings)
    made = [
        [each.language, f"{each.seeds:,}", f"{each.proposed:,}", f"{each.kept:,}", _share(each.kept, each.proposed)]
        + [f"{each.dropped[reason]:,}" for reason in [*reasons, *answers]]
        for each in standings
    ]
    asked = [
        [each.language, f"{each.answered:,} of {each.wanted:,}", f"{each.translations:,}"]
        + [f"{each.refused:,}"] * refused
        + [f"{each.faults[kind]:,}" for kind in kinds]
        + [f"{each.spent.prompt:,}", f"{each.spent.completion:,}", f"{each.uncertain.total:,}"]
        + [f"{float(config.budget.cost(*each.spent)):,.2f}"] * config.budget.priced
        for each in standings
    ]
    texts = [
        [
            each.language,
            _share(each.with_input, each.kept),
            f"{each.first_words:,}",
            *map("{:.1f}".format, each.lengths),
        ]
        for each in standings
    ]
    tokens = ["prompt tokens", "answer tokens", "uncertain", *["cost"] * config.budget.priced]
    return {
        "tasks": (["tasks", "seeds", "proposed", "kept", "", *reasons, *answers], made),
        "requests": (["requests", "answered", "translations", *["refused"] * refused, *kinds, *tokens], asked),
        "texts": (["texts", "with input", "first words", "words/instruction", "words/input", "words/output"], texts),
    }


def budget_line(config: Config, spent: Tokens) -> str:
    """What is spent against the budget."""
    budget = config.budget
    parts = [f"spent at most {spent.total:,}" + (f" of {budget.tokens:,}" if budget.tokens else "") + " tokens"]
    if budget.priced:
        cost = f"{float(budget.cost(*spent)):,.2f}"
        parts.append(cost + (f" of {budget.money:,.2f}" if budget.money else ""))
    return ", ".join(parts)


def total(standings: Iterable[Standing]) -> Tokens:
    whole = Tokens()
    for each in standings:
        whole = whole.plus(each.spent)
    return whole


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else ""
