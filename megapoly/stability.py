"""What a run does about steps that go wrong: it counts those that were skipped, and finds loss spikes.

Everything is decided from numbers that all ranks share, so all decide alike; the state is in the checkpoints, so a
resumed run decides as one that was never stopped.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megapoly.config import Stability
from megapoly.errors import TrainingError, everywhere


@dataclass(frozen=True)
class Spike:
    """Steps ``first`` to ``last``: their ``losses`` in nats are all far above the ``median`` of those before.

    A skipped step among them has no loss.
    """

    first: int
    last: int
    losses: tuple[float, ...]
    median: float

    def __str__(self) -> str:
        losses = ", ".join(f"{loss:.4f}" for loss in self.losses)
        return (
            f"loss spike in steps {self.first} to {self.last}: {losses}, where the median before was {self.median:.4f}"
        )


class Guards:
    """Sees the outcome of every step.

    Attributes:
        skipped: steps whose loss or gradient was not finite, so far.
    """

    def __init__(self, config: Stability) -> None:
        self.config = config
        self.skipped = 0
        self._in_a_row = 0
        self._stage = ""
        self._losses: deque[float] = deque(maxlen=config.spike_window)
        self._high: list[tuple[int, float]] = []  # steps and losses

    def skip(self, step: int, loss: float, norm: float) -> None:
        """Take note of a step that did not reach the weights, because its loss or gradient norm was not finite.

        Raises:
            TrainingError: under ``stability.nonfinite = "stop"``, or after ``most_skips`` in a row.
        """
        self.skipped += 1
        self._in_a_row += 1
        stop = self.config.nonfinite == "stop"
        if stop or self._in_a_row >= self.config.most_skips:
            skipped = "" if stop else f", in {self._in_a_row} steps in a row (stability.most_skips)"
            hint = ", or set stability.nonfinite to 'skip'" if stop else ""
            raise everywhere(
                TrainingError(
                    f"step {step}: the loss ({loss}) or the gradient norm ({norm}) is not finite{skipped}; the weights"
                    f" keep their last finite values. Lower optimizer.learning_rate, look at the data{hint}"
                )
            )

    def observe(self, step: int, loss: float, stage: str) -> Spike | None:
        """The finite loss of a step; a spike that it completes.

        A loss is high if it is more than ``stability.spike`` above the median of the last ``spike_window`` losses, once
        there are so many; high ones join them when a lower one has shown that they were no spike. Another stage has
        another mixture of languages, and another loss: the median begins anew.
        """
        self._in_a_row = 0
        if self.config.spike is None:
            return None
        if stage != self._stage:
            self._stage, self._high = stage, []
            self._losses.clear()
        if len(self._losses) == self.config.spike_window:
            median = statistics.median(self._losses)
            if loss > median + self.config.spike:
                self._high.append((step, loss))
                if len(self._high) == self.config.spike_steps:
                    return Spike(self._high[0][0], step, tuple(loss for _, loss in self._high), median)
                return None
        self._losses.extend((*(loss for _, loss in self._high), loss))
        self._high = []
        return None

    @property
    def high_since(self) -> int | None:
        """The first of the last steps that were all high, to before which a spike would roll back."""
        return self._high[0][0] if self._high else None

    def state(self) -> dict[str, Any]:
        """Plain values, for a checkpoint; :meth:`restore` takes them."""
        return {
            "skipped": self.skipped,
            "in_a_row": self._in_a_row,
            "stage": self._stage,
            "losses": list(self._losses),
            "high": [list(pair) for pair in self._high],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.skipped, self._in_a_row, self._stage = state["skipped"], state["in_a_row"], state["stage"]
        self._losses.clear()
        self._losses.extend(state["losses"])
        self._high = [(step, loss) for step, loss in state["high"]]


@dataclass(frozen=True)
class Rollback:
    """Where a branch of a run left the one before it: at a checkpoint, after which ``skipped`` samples are left out."""

    step: int
    sample: int
    skipped: int


@dataclass(frozen=True)
class Branch:
    """What a run's checkpoints belong to: 0 is the run as it began, and every rollback begins the next."""

    rollbacks: tuple[Rollback, ...] = ()

    @property
    def number(self) -> int:
        return len(self.rollbacks)

    def after(self, rollback: Rollback) -> Branch:
        return Branch((*self.rollbacks, rollback))

    def state(self) -> list[dict[str, int]]:
        """Plain values, for a checkpoint; :meth:`restored` takes them."""
        return [asdict(rollback) for rollback in self.rollbacks]

    @classmethod
    def restored(cls, state: Sequence[Mapping[str, int]]) -> Branch:
        return cls(tuple(Rollback(**rollback) for rollback in state))
