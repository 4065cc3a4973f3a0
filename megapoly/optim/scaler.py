"""Dynamic loss scaling (Micikevicius et al., Mixed Precision Training, arXiv 1710.03740, section 3.2).

fp16 loses what is below 6e-8, which many gradients of activations are. The backward pass therefore starts from a
gradient of the loss times ``scale``, which is taken out again with the clip factor. The scale is as large as the range
of fp16 allows: it grows until a gradient overflows; that step is skipped, and the scale halved.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

START = 2.0**16
FACTOR = 2.0
GOOD_STEPS = 2000  # without an overflow, before the scale grows: the paper's example
LEAST = 1.0  # overflow without any scaling is not the scale's fault


@dataclass
class LossScaler:
    """A function of the outcomes of the steps alone, so the same on every rank.

    Attributes:
        scale: of the next step.
        good: steps without an overflow since the scale last changed.
        overflows: steps skipped so far.
    """

    scale: float = START
    good: int = 0
    overflows: int = 0

    @property
    def can_shrink(self) -> bool:
        return self.scale > LEAST

    def update(self, overflow: bool) -> None:
        """The outcome of a step that ran under ``scale``."""
        self.good = 0 if overflow else self.good + 1
        self.overflows += overflow
        if overflow:
            self.scale = max(LEAST, self.scale / FACTOR)
        elif self.good == GOOD_STEPS:
            self.scale, self.good = self.scale * FACTOR, 0

    def state(self) -> dict[str, float]:
        """Plain values, for a checkpoint; :meth:`restore` takes them."""
        return asdict(self)

    def restore(self, state: dict[str, float]) -> None:
        self.scale, self.good, self.overflows = float(state["scale"]), int(state["good"]), int(state["overflows"])
