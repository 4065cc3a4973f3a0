"""The journal of a language: what was asked and what came of it, on the disk before it counts. No torch.

    {"kind": "job", ...}                                         what decides the tasks; the first line
    {"kind": "ask", "ticket": 7, "round": 1, "number": 3, "trial": 1, "prompt": SHA-256, "reserved": [900, 3072]}
    {"kind": "answer", "ticket": 7, "text": ..., "finish": "stop", "used": [411, 1822]}
    {"kind": "fault", "ticket": 8, "fault": "429", "what": ..., "billed": false}

A line without its end is of a process that was killed while it wrote, and is removed. A request that was asked with
nothing after it was under way then: it may have been paid for, so its reserve counts as spent, and it is asked again.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from megapoly.errors import ConfigError, DataError
from megapoly.instruct.model import NONE, REFUSED, Answer, Fault, Tokens

LOST = "interrupted"
_NUMBER = re.compile(r"\d+")


class Key(NamedTuple):
    """A request of a language: round 0 translates seeds; of a seed there may be several trials."""

    round: int
    number: int
    trial: int = 1


class Asked(NamedTuple):
    """A request under way."""

    key: Key
    prompt: str
    reserved: Tokens


class Journal:
    """The journal in a file, open for more.

    Args:
        job: what decides the tasks. None reads the file and changes nothing, not even a line without its end.

    Attributes:
        answers: what was written, by request.
        prompts: SHA-256 of the prompt of each that was answered.
        faults: how many, by kind.
        used: tokens of all answers; where the model did not say, their reserves.
        uncertain: reserves of what may have been paid for without an answer.

    Raises:
        ConfigError: the file is another job's.
        DataError: the file is damaged, or cannot be read or written.
    """

    def __init__(self, path: Path, job: dict[str, Any] | None) -> None:
        self.path = path
        self.answers: dict[Key, Answer] = {}
        self.prompts: dict[Key, str] = {}
        self.faults: Counter[str] = Counter()
        self.used = self.uncertain = NONE
        self._under_way: dict[int, Asked] = {}
        self._tickets = 0
        self._file: int | None = None
        try:
            content = path.read_bytes() if job is None or path.exists() else b""
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error
        whole = content[: content.rfind(b"\n") + 1]
        found = self._read(whole)
        self._lose()
        if job is None:
            return
        if found is not None and found != job:
            raise ConfigError(f"{path}: {_difference(found, job)}; change that back, or choose another directory")
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            if len(whole) < len(content):
                os.ftruncate(self._file, len(whole))
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror})") from error
        if found is None:
            self._append({"kind": "job", **job})

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    @property
    def spent(self) -> Tokens:
        """The most that everything up to now can have cost."""
        return self.used.plus(self.uncertain)

    def refused(self) -> tuple[int, str]:
        """Answers that refuse their prompt, and the commonest reason; reasons that differ in numbers are one."""
        reasons = [(answer.finish or "").removeprefix(REFUSED) for answer in self.answers.values() if answer.refused]
        if not reasons:
            return 0, ""
        kinds = [_NUMBER.sub("", reason) for reason in reasons]
        return len(reasons), reasons[kinds.index(Counter(kinds).most_common(1)[0][0])]

    def ask(self, key: Key, prompt: str, reserved: Tokens) -> int:
        """Note that a request is about to be asked; its ticket."""
        ticket = self._tickets
        line = {"round": key.round, "number": key.number, "trial": key.trial, "prompt": prompt, "reserved": reserved}
        self._note({"kind": "ask", "ticket": ticket, **line})
        return ticket

    def settle(self, ticket: int, outcome: Answer | Fault) -> None:
        """Note what came of it."""
        if isinstance(outcome, Answer):
            line: dict[str, Any] = {
                "kind": "answer",
                "text": outcome.text,
                "finish": outcome.finish,
                "used": outcome.used,
            }
        else:
            line = {"kind": "fault", "fault": outcome.kind, "what": outcome.what, "billed": outcome.billed}
        self._note({**line, "ticket": ticket})

    def _note(self, line: dict[str, Any]) -> None:
        self._append(line)
        self._take(line)

    def _append(self, line: dict[str, Any]) -> None:
        assert self._file is not None
        data = (json.dumps(line, ensure_ascii=False) + "\n").encode()
        try:
            while data:
                data = data[os.write(self._file, data) :]
            os.fsync(self._file)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written ({error.strerror}); what it holds is kept") from error

    def _read(self, content: bytes) -> dict[str, Any] | None:
        """Take all lines; the job."""
        job = None
        for number, text in enumerate(content.split(b"\n")[:-1], 1):
            try:
                line = json.loads(text)
                if number == 1:
                    job = {key: value for key, value in line.items() if key != "kind"}
                else:
                    self._take(line)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(
                    f"{self.path}, line {number}: is damaged ({type(error).__name__}: {error}); put back a copy, or"
                    " remove the language's files to begin it anew"
                ) from None
        return job

    def _take(self, line: dict[str, Any]) -> None:
        """Count a line. Lines that were read go the same way as new ones."""
        ticket = line["ticket"]
        if line["kind"] == "ask":
            if ticket != self._tickets:
                raise ValueError(f"ticket {ticket} comes after {self._tickets - 1}")
            key = Key(line["round"], line["number"], line["trial"])
            self._under_way[ticket] = Asked(key, line["prompt"], Tokens(*line["reserved"]))
            self._tickets += 1
            return
        asked = self._under_way.pop(ticket)
        if line["kind"] == "answer":
            if asked.key in self.answers:
                raise ValueError(f"request {tuple(asked.key)} is answered twice")
            used = None if line["used"] is None else Tokens(*line["used"])
            self.answers[asked.key] = Answer(line["text"], line["finish"], used)
            self.prompts[asked.key] = asked.prompt
            self.used = self.used.plus(asked.reserved if used is None else used)
        else:
            self.faults[line["fault"]] += 1
            self.uncertain = self.uncertain.plus(asked.reserved if line["billed"] else NONE)

    def _lose(self) -> None:
        """Count what was under way when its process ended. The tickets of another process find nothing here."""
        for asked in self._under_way.values():
            self.faults[LOST] += 1
            self.uncertain = self.uncertain.plus(asked.reserved)
        self._under_way.clear()


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    key = next(key for key in [*wanted, *found] if found.get(key) != wanted.get(key))
    return f"was begun with {key} {found.get(key)!r}, now {wanted.get(key)!r}"
