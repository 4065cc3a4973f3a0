"""Records of text, bad ones, and what becomes of those. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from megapoly.errors import DataError

Policy = Literal["stop", "skip"]
TOO_LONG = "more tokens than an example may have"  # the kind of those that are left out, though nothing is wrong


class BadRecord(DataError):
    """A record that cannot be used, of a file that goes on after it.

    Its message names the file and the line. Of a file that is read in pieces the line is counted when it is asked for.

    Attributes:
        kind: what is wrong, the same words for all of a kind, by which they are counted.
    """

    def __init__(self, path: Path, line: int, unit: str, base: int, kind: str, what: str) -> None:
        super().__init__(path, line, unit, base, kind, what)
        self.path, self.line, self.unit, self.base, self.kind, self.what = path, line, unit, base, kind, what

    def __str__(self) -> str:
        try:
            before = _newlines(self.path, self.base)
        except OSError:
            return f"{self.path}, line {self.line} from byte {self.base} on: {self.what}"
        return f"{self.path}, {self.unit} {before + self.line}: {self.what}"


class Record(NamedTuple):
    """What is read of a corpus at a time: a line's JSON object, a row of a table, a piece of plain text.

    Attributes:
        line: its number, counted from 1 at byte ``base`` of the file.
        values: its fields.
        unit: what ``line`` counts, "line" or "row".
    """

    path: Path
    line: int
    values: dict[str, Any]
    unit: str = "line"
    base: int = 0

    def text(self, field: str) -> str:
        """The text of a field: not empty, and writable as UTF-8.

        Raises:
            BadRecord: naming the file, the line and what was found.
        """
        if field not in self.values:
            known = sorted(self.values)
            raise self.error(f"has no field {field!r}, only {known}; name the field that holds the text", "no field")
        value = self.values[field]
        if not isinstance(value, str):
            found = "null" if value is None else type(value).__name__
            raise self.error(f"field {field!r} holds {found}, not text", "no text")
        if not value or value.isspace():
            raise self.error(f"field {field!r} is empty; remove such records, or skip them", "empty")
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                what = f"field {field!r} holds half a surrogate pair, which is not text: {error}"
                raise self.error(what, "half a surrogate pair") from error
        return value

    def error(self, what: str, kind: str = "unusable") -> BadRecord:
        return BadRecord(self.path, self.line, self.unit, self.base, kind, what)


class BadRecords:
    """What becomes of bad records: the first stops the reading, or all are counted and skipped, the first few kept.

    Attributes:
        counts: how many were skipped, by kind.
        first: the first few of every kind.
    """

    def __init__(self, policy: Policy = "stop", keep: int = 3) -> None:
        self._policy, self._keep = policy, keep
        self.counts: Counter[str] = Counter()
        self.first: dict[str, list[BadRecord]] = {}

    def add(self, bad: BadRecord) -> None:
        """Raise it, or count it."""
        if self._policy == "stop":
            raise bad
        self.leave_out(bad)

    def leave_out(self, record: BadRecord) -> None:
        """Count one that is not bad but cannot be taken, whatever the policy."""
        self.counts[record.kind] += 1
        kept = self.first.setdefault(record.kind, [])
        if len(kept) < self._keep:
            kept.append(record)

    def merge(self, later: BadRecords) -> None:
        """Count what was skipped in a part of the input that comes after this one's."""
        self.counts += later.counts
        for kind, found in later.first.items():
            kept = self.first.setdefault(kind, [])
            kept += found[: self._keep - len(kept)]

    def report(self) -> list[str]:
        """Lines for people: every kind with its count, and the first few of it; none where nothing was skipped."""
        lines = []
        for kind, count in self.counts.most_common():
            lines.append(f"skipped {count:,} {'' if kind == TOO_LONG else 'bad '}records: {kind}")
            lines += [f"  {bad}" for bad in self.first[kind]]
            if count > len(self.first[kind]):
                lines.append("  ...")
        return lines


def texts(records: Iterable[Record | BadRecord], field: str, bad: BadRecords) -> Iterator[str]:
    """The texts of a field; what is bad goes to ``bad``.

    Raises:
        BadRecord: the first bad record, where that is the policy.
    """
    for record in records:
        if isinstance(record, BadRecord):
            bad.add(record)
            continue
        try:
            text = record.text(field)
        except BadRecord as error:
            bad.add(error)
            continue
        yield text


def _newlines(path: Path, stop: int) -> int:
    """How many lines of a file end before byte ``stop``."""
    count = done = 0
    if stop:
        with open(path, "rb") as file:
            while done < stop and (block := file.read(min(1 << 20, stop - done))):
                count += block.count(b"\n")
                done += len(block)
    return count
