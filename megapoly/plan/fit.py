"""The layouts nearest to a config's that fit into a given memory, found by trying them. No torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from megapoly.config import Config, parse
from megapoly.errors import ConfigError
from megapoly.plan.activations import Device
from megapoly.plan.memory import predict

_RECOMPUTE = {"none": 0.0, "selective": 1.0, "full": 3.0}  # what it costs, as steps away
_FURTHEST = 8  # steps in one direction


class Fit(NamedTuple):
    """A layout that fits: keys of ``layout`` with their new values, and the largest peak of its ranks in bytes."""

    changes: dict[str, Any]
    peak: int


def nearest(config: Config, ranks: int, limit: float, device: Device, most: int = 3) -> list[Fit]:
    """Layouts of the same run on the same ranks whose every rank stays within ``limit`` bytes, nearest first.

    Recomputation, micro-batch (halved), tp and pp change, and the optimizer is sharded. A step is a doubling or a
    halving, or one kind of recomputation further; tp and pp count double, because they bring communication. What only
    goes further in the direction of a layout that fits already is left out.
    """
    found: list[tuple[tuple[float, ...], Fit]] = []
    for steps, changes in sorted(_candidates(config, ranks), key=lambda each: sum(map(abs, each[0]))):
        if any(_beyond(steps, nearer) for nearer, _ in found):
            continue
        tree = config.document()
        tree["layout"] |= {"dp": None, **changes}
        try:
            peak = max(usage.total for usage in predict(parse(tree).on(ranks), device))
        except (ConfigError, ValueError):  # no such layout, or no such schedule
            continue
        if peak <= limit:
            found.append((steps, Fit(changes, peak)))
            if len(found) == most:
                break
    return [fit for _, fit in found]


def _beyond(steps: tuple[float, ...], nearer: tuple[float, ...]) -> bool:
    return all(abs(a) >= abs(b) and a * b >= 0 for a, b in zip(steps, nearer) if b)


def _candidates(config: Config, ranks: int) -> Iterator[tuple[tuple[float, ...], dict[str, Any]]]:
    """Steps away from the config's layout, by direction, and the keys that change."""
    layout = config.layout
    sizes = [n for n in range(1, ranks + 1) if ranks % n == 0]
    batches = [n for n in range(1, layout.micro_batch + 1) if layout.micro_batch % n == 0]
    shard = (True,) if layout.shard_optimizer else (False, True)
    for tp, pp, recompute, batch, sharded in itertools.product(sizes, sizes, _RECOMPUTE, batches, shard):
        steps = (
            2 * math.log2(tp / layout.tp),
            2 * math.log2(pp / layout.pp),
            _RECOMPUTE[recompute] - _RECOMPUTE[layout.recompute],
            math.log2(layout.micro_batch / batch),
            float(sharded != layout.shard_optimizer),
        )
        if ranks % (tp * pp) or max(map(abs, steps)) > _FURTHEST:
            continue
        wanted = {"tp": tp, "pp": pp, "recompute": recompute, "micro_batch": batch, "shard_optimizer": sharded}
        changes = {key: value for key, value in wanted.items() if value != getattr(layout, key)}
        if pp != layout.pp and layout.stage_layers is not None:
            changes["stage_layers"] = None
        if recompute != "full" and layout.recompute_every > 1:
            changes["recompute_every"] = 1
        if pp == 1 and layout.schedule not in ("gpipe", "1f1b"):
            changes |= {"schedule": "1f1b", "virtual_stages": None}
        yield steps, changes
