"""Tasks: instruction, input and output; read from seeds, and from what a model wrote. No torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megapoly.data.inputs import expand
from megapoly.data.readers import open_reader
from megapoly.data.records import BadRecord, Record
from megapoly.data.templates import NO_INPUT
from megapoly.errors import ConfigError

# Why a task that a model wrote is dropped.
CUT_OFF, INCOMPLETE, LINK, NO_WORDS = "cut off", "incomplete", "link", "no words"
SIMILAR, REPEATED_INPUT = "similar", "repeated input"
NOTHING = "answers without a task"  # counted by answer

_LABEL = r"^[ \t]*(?:#{1,6}[ \t]*)?(?:\*\*)?%s(%s)[ \t]*(?:\*\*)?[ \t]*[:：](?:\*\*)?"
_BEGIN = re.compile(_LABEL % (r"(\d{1,4})[.)][ \t]*", "instruction"), re.IGNORECASE | re.MULTILINE)
_NUMBERED = re.compile(_LABEL % (r"(\d{1,4})[.)][ \t]*", "input|output"), re.IGNORECASE | re.MULTILINE)
_PLAIN = re.compile(_LABEL % ("()", "input|output"), re.IGNORECASE | re.MULTILINE)
_NO_INPUT = re.compile(r"<?\s*no[ _-]?input\s*>?[.。]?", re.IGNORECASE)
_RULER = re.compile(r"(?:\n\s*(?:#{3,}|-{3,}|\*{3,}))+\Z")
_LINK = re.compile(r"https?://|\bwww\.", re.IGNORECASE)


@dataclass(frozen=True)
class Task:
    """A task. An empty ``input`` is none."""

    instruction: str
    input: str
    output: str

    def block(self, number: int) -> str:
        """The task as prompts show it."""
        parts = (("Instruction", self.instruction), ("Input", self.input or NO_INPUT), ("Output", self.output))
        return "\n".join(f"{number}. {label}: {text}" for label, text in parts)


@dataclass(frozen=True)
class Seed:
    """A task that people wrote, with the name by which it may be left out."""

    id: str
    task: Task


@dataclass(frozen=True)
class Dropped:
    """A task, or what should have been one, and why it is none of ours."""

    reason: str
    text: str


def parse(text: str, cut: bool) -> tuple[list[Task], list[Dropped]]:
    """Tasks of an answer in blocks ``N. Instruction:``, ``N. Input:``, ``N. Output:``, each on a line's beginning.

    Labels may be in bold or headings, and Input and Output without their number where the Instruction has it. What
    stands before the first block is passed over. A block has all three in this order, and a text for instruction and
    output. Rulers between the blocks go.

    Args:
        cut: the answer ended before the model was done: its last block is dropped.
    """
    begins = list(_BEGIN.finditer(text))
    tasks, dropped = [], []
    for i, begin in enumerate(begins):
        last = i + 1 == len(begins)
        end = len(text) if last else begins[i + 1].start()
        block = text[begin.start() : end].strip()
        if last and cut:
            dropped.append(Dropped(CUT_OFF, block))
            continue
        task = _fields(text[begin.end() : end], begin[1])
        if task is None:
            dropped.append(Dropped(INCOMPLETE, block))
        elif any(map(_LINK.search, (task.instruction, task.input, task.output))):
            dropped.append(Dropped(LINK, block))
        else:
            tasks.append(task)
    if not begins:
        dropped.append(Dropped(NOTHING, text))
    return tasks, dropped


def parse_one(text: str, cut: bool) -> Task | None:
    """The first task of an answer that was to have one. Links may stand in it."""
    begins = list(_BEGIN.finditer(text))
    if not begins or (cut and len(begins) == 1):
        return None
    end = begins[1].start() if len(begins) > 1 else len(text)
    return _fields(text[begins[0].end() : end], begins[0][1])


def begins(text: str) -> bool:
    """Whether a text begins with a task's label."""
    return _BEGIN.match(text.lstrip()) is not None


def _fields(block: str, number: str) -> Task | None:
    """A task from what follows ``N. Instruction:``; None unless there is one input, then one output."""
    labels = [label for label in _NUMBERED.finditer(block) if label[1] == number] or list(_PLAIN.finditer(block))
    if [label[2].lower() for label in labels] != ["input", "output"]:
        return None
    given, answer = labels
    instruction, output = block[: given.start()].strip(), _RULER.sub("", block[answer.end() :].strip()).strip()
    if not instruction or not output:
        return None
    text = block[given.end() : answer.start()].strip()
    return Task(instruction, "" if _NO_INPUT.fullmatch(text) else text, output)


def read_seeds(path: Path) -> list[Seed]:
    """Tasks of a file of JSON lines, also .gz and .zst: ``instruction``, ``input``, ``output``, or as Alpaca's seeds
    have it, the latter two in the first of ``instances``; with an ``id``, else their number counted from 0.

    Raises:
        DataError: the file cannot be read, or holds no tasks; with the line.
        ConfigError: two tasks have one id.
    """
    seeds: dict[str, Seed] = {}
    for file in expand([path]):
        for record in open_reader(file):
            if isinstance(record, BadRecord):
                raise record
            seed = _seed(record, len(seeds))
            if seed.id in seeds:
                raise ConfigError(f"{file}: two tasks have the id {seed.id!r}; give each its own")
            seeds[seed.id] = seed
    if not seeds:
        raise ConfigError(f"{path}: holds no task; expected objects with instruction, input and output")
    return list(seeds.values())


def _seed(record: Record, number: int) -> Seed:
    values = record.values
    instances = values.get("instances")
    if isinstance(instances, list) and instances and isinstance(instances[0], dict):
        record = record._replace(values={**values, **instances[0]})
    given = record.values.get("input")
    if given is not None and not isinstance(given, str):
        raise record.error(f"field 'input' holds {type(given).__name__}, not text", "no text")
    given = (given or "").strip()
    task = Task(
        record.text("instruction").strip(),
        "" if _NO_INPUT.fullmatch(given) else given,
        record.text("output").strip(),
    )
    return Seed(str(values.get("id", number)), task)


def digest(seeds: Sequence[Seed]) -> str:
    """SHA-256 of all that they say."""
    return hashlib.sha256(to_lines(map(asdict, seeds))).hexdigest()


def to_lines(rows: Iterable[dict[str, Any]]) -> bytes:
    """JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
