"""Limits: what may be spent in all, and how much may be asked in a minute. No torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from fractions import Fraction
from typing import Protocol

from megapoly.instruct.config import Budget
from megapoly.instruct.model import Tokens

_FRAME = 64  # tokens that a server may put around a prompt
_MINUTE = 60.0


class Sizes(Protocol):
    """What bounds a request; see :class:`megapoly.instruct.model.Model`."""

    @property
    def limit(self) -> int | None: ...
    @property
    def context(self) -> int | None: ...


def reserve(prompt: str, model: Sizes, budget: Budget) -> Tokens:
    """The most tokens that a request can take, so divided that they cost most.

    No tokenizer in use makes more tokens of a text than it has bytes of UTF-8.
    """
    asked = len(prompt.encode()) + _FRAME
    if model.context is None:
        assert model.limit is not None
        return Tokens(asked, model.limit)
    answer = min(model.limit or model.context, model.context)
    if budget.prompt_price > budget.completion_price:
        asked = min(asked, model.context)
        return Tokens(asked, min(answer, model.context - asked))
    return Tokens(min(asked, model.context - answer), answer)


class Account:
    """What is spent of a budget, and what is held back for requests under way.

    Args:
        spent: up to now, in all languages of the folder.
    """

    def __init__(self, budget: Budget, spent: Tokens) -> None:
        self._budget = budget
        self.spent, self._held = spent, Tokens()

    def allows(self, reserved: Tokens) -> bool:
        """Whether one request more cannot exceed the budget, whatever comes of those under way."""
        most, budget = self.spent.plus(self._held).plus(reserved), self._budget
        if budget.tokens is not None and most.total > budget.tokens:
            return False
        return budget.money is None or budget.cost(*most) <= Fraction(str(budget.money))

    def hold(self, reserved: Tokens) -> None:
        self._held = self._held.plus(reserved)

    def settle(self, reserved: Tokens, spent: Tokens) -> None:
        """What was held back has become what was spent."""
        self._held = self._held.minus(reserved)
        self.spent = self.spent.plus(spent)


class Pace:
    """No more than so many requests, and so many tokens as they can take, in any minute.

    Args:
        clock: seconds.
    """

    def __init__(self, requests: int | None, tokens: int | None, clock: Callable[[], float]) -> None:
        self._requests, self._tokens, self._clock = requests, tokens, clock
        self._recent: deque[tuple[float, int]] = deque()
        self._pause = 0.0

    def delay(self, tokens: int) -> float:
        """Seconds until a request that takes so many tokens may be asked. One of more than a minute's goes alone."""
        now = self._clock()
        while self._recent and self._recent[0][0] + _MINUTE <= now:
            self._recent.popleft()
        count, held = len(self._recent), sum(each for _, each in self._recent)
        until = self._pause
        for begun, each in self._recent:
            fits = self._requests is None or count < self._requests
            if fits and (self._tokens is None or held + tokens <= self._tokens):
                break
            until = max(until, begun + _MINUTE)
            count, held = count - 1, held - each
        return max(until - now, 0.0)

    def note(self, tokens: int) -> None:
        """A request is asked now."""
        self._recent.append((self._clock(), tokens))

    def pause(self, seconds: float) -> None:
        """Ask nothing for so long."""
        self._pause = max(self._pause, self._clock() + seconds)
