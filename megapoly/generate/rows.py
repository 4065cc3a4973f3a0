"""The loop of generation: rows that grow together, a token each in every step, and leave when they end."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from megapoly.errors import TrainingError, everywhere
from megapoly.generate.replica import Replica, log_probabilities
from megapoly.generate.sampling import Draws, Sampling, choose
from megapoly.generate.text import Decodes, GrowingText


class Row:
    """One text that is being generated.

    Args:
        limit: the most tokens of prompt and text.
        index, sample: numbers of the prompt and of the text, which its draws depend on.

    Attributes:
        finish_reason: empty while it goes on.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        tokenizer: Decodes,
        ends: frozenset[int],
        sampling: Sampling,
        *,
        limit: int,
        index: int = 0,
        sample: int = 0,
    ) -> None:
        self.prompt, self.index, self.sample = list(prompt), index, sample
        self.most = min(sampling.tokens, limit - len(self.prompt))
        self.tokens: list[int] = []
        self.log_probabilities: list[float] = []
        self.finish_reason: Literal["", "eod", "stop", "length"] = ""
        self._ends, self._draws = ends, Draws(sampling.seed, index, sample)
        self._growing = GrowingText(tokenizer, self.prompt, sampling.stop)

    @property
    def text(self) -> str:
        return self._growing.text

    @property
    def uniform(self) -> float:
        """The number in (0, 1) that decides on the next token."""
        return self._draws[len(self.tokens)]

    def add(self, token: int, log_probability: float) -> str:
        """What a token adds to the text."""
        self.tokens.append(token)
        self.log_probabilities.append(log_probability)
        if token in self._ends:
            self.finish_reason = "eod"
            added = self._growing.finish()
        else:
            added = self._growing.add(token)
            if not self._growing.stopped and len(self.tokens) == self.most:
                self.finish_reason = "length"
                added += self._growing.finish()
        if self._growing.stopped:
            self.finish_reason = "stop"
        return added


@torch.inference_mode()
def grow(replica: Replica, rows: Sequence[Row], sampling: Sampling, vocabulary: int) -> Iterator[list[str]]:
    """Generate all rows to their ends; after each step, what it added to the rows that were left.

    All ranks of the replica run this with the same rows. The last stage chooses, and the others are told.

    Args:
        vocabulary: ids that may be drawn: the model's may have more than the tokenizer.

    Raises:
        TrainingError: logits that are not finite.
    """
    alive = list(rows)
    room = max(row.most for row in alive) - 1  # the last token of a text is not read
    cache, logits = replica.prefill([row.prompt for row in alive], room)
    chooser = _Chooser(alive, sampling, vocabulary, replica.context.device)
    while True:
        chosen = replica.agree(None if logits is None else chooser.choose(logits, alive), (2, len(alive))).tolist()
        if not all(map(math.isfinite, chosen[1])):
            raise everywhere(
                TrainingError(
                    f"the model's logits in {replica.dtype} are no numbers, so that no token can be chosen; try another"
                    " dtype (--dtype fp32), or an earlier checkpoint"
                )
            )
        added = [row.add(int(token), value) for row, token, value in zip(alive, *chosen)]
        order = _without_ended(alive)
        ended = len(order) < len(alive)
        alive = [alive[i] for i in order]
        yield added
        if not alive:
            return
        if ended:
            cache.keep(order)
            chooser.keep(order)
        logits = replica.step(cache, [row.tokens[-1] for row in alive])


def _without_ended(rows: Sequence[Row]) -> list[int]:
    """The rows that go on: those that stand behind them take the places of the ones that ended."""
    going = [i for i, row in enumerate(rows) if not row.finish_reason]
    count = len(going)
    behind = [i for i in going if i >= count]
    return [i if not rows[i].finish_reason else behind.pop() for i in range(count)]


class _Chooser:
    """Chooses the next token of every row. Remembers which tokens a row has had, where they are penalised."""

    def __init__(self, rows: Sequence[Row], sampling: Sampling, vocabulary: int, device: torch.device) -> None:
        self._sampling, self._vocabulary = sampling, vocabulary
        self._seen_BV: Tensor | None = None
        if sampling.repetition_penalty != 1:
            self._seen_BV = torch.zeros(len(rows), vocabulary, dtype=torch.bool, device=device)
            for seen_V, row in zip(self._seen_BV, rows):
                seen_V[[i for i in row.prompt if i < vocabulary]] = True

    def choose(self, logits_BV: Tensor, rows: Sequence[Row]) -> Tensor:
        """``[2, B]``, float64: ids, and their log-probabilities."""
        logits_BV = logits_BV[:, : self._vocabulary]
        drawn = self._sampling.temperature > 0
        uniforms_B = torch.tensor([row.uniform for row in rows] if drawn else [], dtype=torch.float64)
        ids_B = choose(logits_BV, self._sampling, self._seen_BV, uniforms_B)
        if self._seen_BV is not None:
            self._seen_BV.scatter_(1, ids_B.unsqueeze(1), True)
        return torch.stack((ids_B.double(), log_probabilities(logits_BV, ids_B)))

    def keep(self, order: Sequence[int]) -> None:
        if self._seen_BV is not None:
            self._seen_BV = self._seen_BV[list(order)]
