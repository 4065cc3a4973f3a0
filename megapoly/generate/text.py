"""A text that grows token by token: what can be shown of it, and where a stop string ends it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_CONTEXT = 8  # tokens before those of a text that are decoded with its first
_BROKEN = "\ufffd"  # what stands for bytes that are no character, or not yet


class Decodes(Protocol):
    def decode(self, ids: Sequence[int]) -> str: ...


class GrowingText:
    """The text of the tokens after a prompt.

    A token is decoded together with those before it, since the space before a word and the bytes of a character stand
    in several. Bytes wait for the rest of their character, and what may begin a stop string for what comes after it.

    Attributes:
        text: what is settled so far.
        stopped: whether a stop string came, of which ``text`` has nothing.
    """

    def __init__(self, tokenizer: Decodes, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids = list(prompt[-_CONTEXT:])
        self._begin, self._read = 0, len(self._ids)
        self._known = tokenizer.decode(self._ids) if self._ids else ""
        self._waiting = ""
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """What ``token`` adds to :attr:`text`."""
        self._ids.append(token)
        decoded = self._tokenizer.decode(self._ids[self._begin :])
        if decoded.endswith(_BROKEN) or len(decoded) <= len(self._known):
            return ""
        return self._settle(self._take(decoded))

    def finish(self) -> str:
        """What is left, when no token comes any more: bytes that are no character are shown as such."""
        decoded = self._tokenizer.decode(self._ids[self._begin :])
        added = self._settle(self._take(decoded) if len(decoded) > len(self._known) else "")
        if self.stopped:
            return added
        rest, self._waiting = self._waiting, ""
        self.text += rest
        return added + rest

    def _take(self, decoded: str) -> str:
        """The new part of what was decoded; the next token is decoded after the tokens of this part."""
        new = decoded[len(self._known) :]
        self._begin, self._read = self._read, len(self._ids)
        self._known = self._tokenizer.decode(self._ids[self._begin :])
        return new

    def _settle(self, new: str) -> str:
        """Add what cannot be part of a stop string any more."""
        if self.stopped:
            return ""
        pending = self._waiting + new
        ends = [at for at in (pending.find(stop) for stop in self._stop) if at >= 0]
        if ends:
            self.stopped, self._waiting = True, ""
            settled = pending[: min(ends)]
        else:
            kept = max((_overlap(pending, stop) for stop in self._stop), default=0)
            settled, self._waiting = pending[: len(pending) - kept], pending[len(pending) - kept :]
        self.text += settled
        return settled


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` with which ``stop`` begins."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
