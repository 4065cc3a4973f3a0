"""Requests under way: how many at a time, which again and when, within budget and pace. No torch.

One thread decides and writes the journal; the model's own only wait for answers. A request is in the journal, and its
reserve held, before it is asked; what came of it is in the journal before it counts.
"""

from __future__ import annotations

import hashlib
import heapq
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple

from megapoly.errors import ConfigError, MegapolyError, TrainingError
from megapoly.instruct.config import Budget
from megapoly.instruct.journal import Journal, Key
from megapoly.instruct.limits import Account, Pace, reserve
from megapoly.instruct.model import Answer, Fault, Model, Tokens

_POLL = 0.25  # seconds after which a wish to stop is seen
_LONGEST_BACKOFF = 60.0


class Request(NamedTuple):
    """A prompt to be answered. ``number`` is its own in the language."""

    key: Key
    number: int
    prompt: str


class _Flight(NamedTuple):
    request: Request
    reserved: Tokens
    faults: int


class _Again(NamedTuple):
    """A request after a fault, and when it is due."""

    due: float
    request: Request
    faults: int


class Asker:
    """Asks a model.

    Args:
        retries: of a request, before the run ends.
        backoff: seconds before the first of them, where the server names none.
        stopping: whether no further request is to be asked.

    Attributes:
        ended: why :meth:`answers` ended before all were there: ``stopped``, ``budget``; None where they are.
    """

    def __init__(
        self,
        model: Model,
        budget: Budget,
        account: Account,
        pace: Pace,
        retries: int = 0,
        backoff: float = 0.0,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self.model, self.account = model, account
        self._budget, self._pace, self._retries, self._backoff = budget, pace, retries, backoff
        self._stopping = stopping
        self.ended: Literal["stopped", "budget"] | None = None

    def answers(self, requests: Iterable[Request], journal: Journal) -> Iterator[tuple[Key, Answer]]:
        """Those of requests that the journal has none of, as they come, each in the journal by then.

        Raises:
            ConfigError: the model refuses; with what it says. Answers to what was under way have been kept.
            TrainingError: a request had more faults in a row than there are retries.
            DataError: the journal cannot be written.
        """
        fresh = deque(requests)
        again: list[_Again] = []  # a heap
        flying: dict[int, _Flight] = {}
        failure: MegapolyError | None = None
        while fresh or again or flying:
            pause = 0.0
            while pause == 0 and failure is None and not self._stopping():
                pause = self._launch(fresh, again, flying, journal)
            if not flying:
                if failure or self.ended or self._stopping():
                    break
                time.sleep(pause)
            for ticket, outcome in self.model.wait(pause or _POLL) if flying else ():
                flight = flying.pop(ticket)
                self._settle(ticket, flight, outcome, journal)
                if isinstance(outcome, Answer):
                    yield flight.request.key, outcome
                elif outcome.fatal or flight.faults >= self._retries:
                    failure = failure or _failure(journal, flight, outcome)
                else:
                    due = time.monotonic() + self._wait(flight.faults, outcome)
                    heapq.heappush(again, _Again(due, flight.request, flight.faults + 1))
        if failure:
            raise failure
        if (fresh or again) and self.ended is None:
            self.ended = "stopped"

    def _launch(
        self, fresh: deque[Request], again: list[_Again], flying: dict[int, _Flight], journal: Journal
    ) -> float:
        """Ask one request, if any may be asked now; else the seconds to wait for one, at most :data:`_POLL`.

        One that is to be asked again keeps its place among those under way: where a server is down, no others come up.
        """
        now = time.monotonic()
        due = bool(again) and again[0].due <= now
        if len(flying) >= self.model.concurrency or not (due or fresh):
            return min(_POLL, again[0].due - now) if again and not due else _POLL
        if not due and len(flying) + len(again) >= self.model.concurrency:
            return min(_POLL, again[0].due - now)
        request = again[0].request if due else fresh[0]
        reserved = reserve(request.prompt, self.model, self._budget)
        if not self.account.allows(reserved):
            self.ended = "budget"  # unless those under way take less than was held back for them
            return _POLL
        self.ended = None
        delay = self._pace.delay(reserved.total)
        if delay > 0:
            return min(_POLL, delay)
        faults = heapq.heappop(again).faults if due else 0
        if not due:
            fresh.popleft()
        flying[self._start(request, reserved, journal)] = _Flight(request, reserved, faults)
        return 0.0

    def _start(self, request: Request, reserved: Tokens, journal: Journal) -> int:
        ticket = journal.ask(request.key, sha256(request.prompt), reserved)
        self.account.hold(reserved)
        self._pace.note(reserved.total)
        self.model.start(ticket, request.number, request.prompt)
        return ticket

    def _settle(self, ticket: int, flight: _Flight, outcome: Answer | Fault, journal: Journal) -> None:
        before = journal.spent
        journal.settle(ticket, outcome)
        self.account.settle(flight.reserved, journal.spent.minus(before))

    def _wait(self, faults: int, fault: Fault) -> float:
        """Seconds until a request is asked again."""
        if fault.retry_after is not None:
            self._pace.pause(fault.retry_after)
            return fault.retry_after
        longest = min(self._backoff * 2**faults, _LONGEST_BACKOFF)
        return longest * random.uniform(0.5, 1.0)  # so that requests that failed together come apart


def sha256(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()


def _failure(journal: Journal, flight: _Flight, fault: Fault) -> MegapolyError:
    if fault.fatal:
        return ConfigError(f"the model refuses: {fault.what}; mend the config, and run the same command again to go on")
    round_, number, _ = flight.request.key
    return TrainingError(
        f"request {number} of round {round_} failed {flight.faults + 1} times, at last: {fault.what}; what was answered"
        f" is kept in {journal.path}: run the same command again to go on"
    )
