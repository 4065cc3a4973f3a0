"""What writes the tasks, and what comes of asking it. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

WHOLE = ("stop", "eod")  # finish reasons of answers that were not cut off
REFUSED = "refused: "  # begins the finish reason of a prompt that the model does not take, as one that is too long


class Tokens(NamedTuple):
    """Of prompts and of answers."""

    prompt: int = 0
    completion: int = 0

    @property
    def total(self) -> int:
        return self.prompt + self.completion

    def plus(self, other: Tokens) -> Tokens:
        return Tokens(self.prompt + other.prompt, self.completion + other.completion)

    def minus(self, other: Tokens) -> Tokens:
        return Tokens(self.prompt - other.prompt, self.completion - other.completion)


NONE = Tokens()


@dataclass(frozen=True)
class Answer:
    """What the model wrote.

    Attributes:
        finish: why it ended; None where that is not known.
        used: None where the model does not say.
    """

    text: str
    finish: str | None
    used: Tokens | None

    @property
    def cut(self) -> bool:
        """Whether it ended before the model was done, or may have."""
        return self.finish not in WHOLE

    @property
    def refused(self) -> bool:
        return (self.finish or "").startswith(REFUSED)


@dataclass(frozen=True)
class Fault:
    """Why there is no answer.

    Attributes:
        kind: by which faults are counted.
        what: for people.
        billed: whether it may have cost something.
        fatal: asking again is no use.
        retry_after: seconds until which the server wants no request.
    """

    kind: str
    what: str
    billed: bool
    fatal: bool = False
    retry_after: float | None = None


class Model(Protocol):
    """A model that several prompts can be given to at a time."""

    @property
    def concurrency(self) -> int:
        """Prompts at a time."""

    @property
    def limit(self) -> int | None:
        """Most tokens of an answer; None: what the context leaves."""

    @property
    def context(self) -> int | None:
        """Most tokens of prompt and answer."""

    def start(self, ticket: int, number: int, prompt: str) -> None:
        """Give it a prompt. ``number`` is the request's in its language, the same when it is asked again."""

    def wait(self, seconds: float) -> list[tuple[int, Answer | Fault]]:
        """Tickets with what came of them, at least one unless that takes longer than ``seconds``."""
