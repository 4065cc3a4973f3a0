"""From records of instructions or chats to examples, and from examples to ids that say what is learned. No torch.

A record has an instruction, perhaps an input, and an output; or ``messages``, each with a role (system, user,
assistant) and a content: a system message may come first, then user and assistant take turns. What follows the last
answer is left out. Every prompt with its answer is a round.

A prompt is tokenised by itself, as when the model is asked, and so is its answer: no token reaches from one into the
other. As one text both have the same ids wherever no token goes over the break between them, as in templates that end
with a single line break.

**Marked ids**: where the vocabulary has V ids, an id below V is of a token that is given, and id + V of one that is to
be learned: an answer, and the ``</s>`` that ends it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from megapoly.data.records import Record
from megapoly.data.templates import Template
from megapoly.data.tokenizer import Ids, Lengths, Tokenizer

FIELDS = ("instruction", "input", "output")
MESSAGES = "messages"
_ROLES = ("system", "user", "assistant")


class Example(NamedTuple):
    """Rounds of prompt and answer.

    Attributes:
        bytes: of UTF-8 text.
        key: the first instruction, which decides what is held out.
        record: that it comes from, without its values.
    """

    rounds: tuple[tuple[str, str], ...]
    bytes: int
    key: str
    record: Record


def to_example(record: Record, template: Template, fields: Sequence[str] = ()) -> Example:
    """The example of a record.

    Args:
        fields: where the record has other names than :data:`FIELDS`: the instruction's and the output's, or all three;
            or one, that of the messages. Without them, messages are what a record has that holds no instruction.

    Raises:
        BadRecord: a field is missing, empty or no text, or the messages are no chat.
    """
    if len(fields) == 1 or (not fields and FIELDS[0] not in record.values and MESSAGES in record.values):
        rounds, key = _chat(record, template, fields[0] if fields else MESSAGES)
    else:
        names = (fields[0], "", fields[1]) if len(fields) == 2 else tuple(fields) or FIELDS
        instruction, answer = record.text(names[0]), record.text(names[2])
        given = record.values.get(names[1])
        if given is not None and not isinstance(given, str):
            raise record.error(f"field {names[1]!r} holds {type(given).__name__}, not text", "no text")
        key = instruction.strip()
        rounds = [(template.turn(instruction, given), answer.strip())]
    try:
        size = sum(len("".join(each).encode()) for each in rounds)
    except UnicodeEncodeError as error:
        what = f"holds half a surrogate pair, which is not text: {error}"
        raise record.error(what, "half a surrogate pair") from error
    return Example(tuple(rounds), size, key, Record(record.path, record.line, {}, record.unit, record.base))


def _chat(record: Record, template: Template, field: str) -> tuple[list[tuple[str, str]], str]:
    """The rounds of messages, and the first turn of the user."""
    messages = record.values.get(field)
    if not isinstance(messages, list):
        what = f"has no list of messages in {field!r} among {sorted(record.values)}"
        raise record.error(f"{what}; give messages, or instruction and output, or name the fields", "no chat")
    turns = [_turn(record, number, message) for number, message in enumerate(messages)]
    system = turns.pop(0)[1] if turns and turns[0][0] == "system" else None
    rounds: list[tuple[str, str]] = []
    for number, (role, _) in enumerate(turns):
        expected = _ROLES[1 + number % 2]
        if role != expected:
            what = f"message {number + (system is not None)} of {field!r} is of {role}, and {expected}'s turn"
            raise record.error(f"{what}: after a system message user and assistant take turns", "no chat")
    for (_, question), (_, answer) in zip(turns[::2], turns[1::2]):
        rounds.append((template.turn(question, system=None if rounds else system), answer.strip()))
    if not rounds:
        raise record.error(f"{field!r} has no answer: no message is of assistant", "no answer")
    return rounds, turns[0][1].strip()


def _turn(record: Record, number: int, message: Any) -> tuple[str, str]:
    """Role and content of a message."""
    if not isinstance(message, Mapping) or message.get("role") not in _ROLES:
        what = f"message {number} is {message!r:.80}"
        raise record.error(f"{what}; a message has a role, of {', '.join(_ROLES)}, and a content", "no chat")
    content = message.get("content")
    if not isinstance(content, str):
        found = "null" if content is None else type(content).__name__
        raise record.error(f"message {number}, of {message['role']}, holds {found}, not text", "no text")
    if (not content or content.isspace()) and message["role"] != "system":
        raise record.error(f"message {number}, of {message['role']}, is empty; remove such records, or skip", "empty")
    return message["role"], content


def encode(tokenizer: Tokenizer, examples: Sequence[Example], threads: int) -> tuple[Ids, Lengths]:
    """Marked ids of all examples one after another, and [n] how many each has."""
    rounds = [each for example in examples for each in example.rounds]
    begins = np.cumsum([0, *(len(example.rounds) for example in examples[:-1])])
    firsts = np.isin(np.arange(len(rounds)), begins)
    learned = np.int32(tokenizer.vocabulary)
    answers, sizes = tokenizer.encode_after([answer for _, answer in rounds], threads)
    ids, lengths = _side_by_side(
        tokenizer.encode_prompts([prompt for prompt, _ in rounds], firsts.tolist(), threads),
        (answers + learned, sizes),
        (np.full(len(rounds), tokenizer.eod + learned, np.int32), np.ones(len(rounds), np.int64)),
    )
    return ids, np.add.reduceat(lengths, begins)


def _side_by_side(*columns: tuple[Ids, Lengths]) -> tuple[Ids, Lengths]:
    """Texts in columns, row by row: of each the ids of all rows, and [rows] how many each has."""
    lengths = np.stack([own for _, own in columns], axis=1)
    starts = np.cumsum(lengths).reshape(lengths.shape) - lengths
    joined = np.empty(int(lengths.sum()), np.int32)
    for (ids, own), begin in zip(columns, starts.T):
        joined[np.arange(len(ids)) + np.repeat(begin - np.cumsum(own) + own, own)] = ids
    return joined, lengths.sum(axis=1)
