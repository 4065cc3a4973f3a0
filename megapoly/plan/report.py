"""What ``megapoly plan memory`` shows and writes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from megapoly.config import Config
from megapoly.models.cost import stage_layers
from megapoly.plan.activations import PARAMETER_BYTES
from megapoly.plan.fit import Fit
from megapoly.plan.memory import COMPONENTS, Usage, optimizer_bytes

COLUMNS = (*COMPONENTS, "total")


class Unit(NamedTuple):
    name: str
    size: float

    def __call__(self, size: float) -> str:
        return f"{size / self.size:.2f}"


def unit(predicted: Sequence[Usage]) -> Unit:
    """GB, or MB for small models."""
    return Unit("GB", 1e9) if max(usage.total for usage in predicted) >= 1e9 else Unit("MB", 1e6)


def cells(predicted: Sequence[Usage], measured: Sequence[Usage] | None) -> Iterator[list[str]]:
    """Rows of a table: pipeline rank, then :data:`COLUMNS`; measured values and their share of the predicted below."""
    show = unit(predicted)
    for rank, usage in enumerate(predicted):
        yield [f"rank {rank}", *(show(getattr(usage, name)) for name in COLUMNS)]
        if measured is not None:
            found = measured[rank]
            yield ["measured", *(show(getattr(found, name)) for name in COLUMNS)]
            ratios = ((getattr(found, name), getattr(usage, name)) for name in COLUMNS)
            yield ["ratio", *(f"{a / b:.3f}" if b else "" for a, b in ratios)]


def notes(config: Config, predicted: Sequence[Usage], limit_gb: float | None, fits: Sequence[Fit]) -> list[str]:
    """Where the layers are, how the state comes about, what is largest, and whether it fits or what would."""
    layout, mesh, show = config.layout, config.mesh, unit(predicted)
    counts = [end - begin for begin, end in stage_layers(config)]
    worst = max(range(len(predicted)), key=lambda rank: predicted[rank].total)
    usage = predicted[worst]
    largest = max(COMPONENTS, key=lambda name: getattr(usage, name))
    parameter, state = PARAMETER_BYTES[config.train.precision], optimizer_bytes(config)
    shards = f" / dp {mesh.dp}" if layout.shard_optimizer and mesh.dp > 1 else ""
    lines = [
        f"{mesh}, {config.microbatches} micro-batches of {layout.micro_batch} x {config.train.sequence} tokens,"
        f" {layout.schedule}, layers by stage {counts}",
        f"rank {worst}: {usage.weights / parameter / 1e6:.1f} M parameters; weights x {parameter} bytes, gradients"
        f" x {max(4, parameter)}, optimizer x {state}{shards} = {show(usage.optimizer)} {show.name}",
        f"largest: {largest}, {show(getattr(usage, largest))} of {show(usage.total)} {show.name}",
    ]
    if limit_gb is None:
        return lines
    if usage.total <= limit_gb * 1e9:
        return [*lines, f"fits into {limit_gb:g} GB"]
    lines.append(f"does not fit into {limit_gb:g} GB" + (f"; on {mesh.world_size} ranks would:" if fits else ""))
    lines += [f"  {show(fit.peak)} {show.name}: {_overrides(fit)}" for fit in fits]
    return lines if fits else [*lines, f"  nor does another layout of {mesh.world_size} ranks; take more"]


def rows(predicted: Sequence[Usage], measured: Sequence[Usage] | None) -> list[dict[str, Any]]:
    """For ``--json``: a row for each rank and component, with what was measured and its share of the predicted."""
    result: list[dict[str, Any]] = []
    for rank, usage in enumerate(predicted):
        for name in COLUMNS:
            value = getattr(usage, name)
            row: dict[str, Any] = {"name": f"rank {rank}: {name}", "value": value, "unit": "bytes"}
            if measured is not None:
                found = getattr(measured[rank], name)
                row |= {"measured": found, "measured_share": found / value if value else None}
            result.append(row)
    return result


def _overrides(fit: Fit) -> str:
    given = {key: value for key, value in fit.changes.items() if value is not None}
    sets = [f"--set layout.{key}={json.dumps(value)}" for key, value in given.items()]
    return " ".join([*sets, *(f"(without layout.{key})" for key in fit.changes.keys() - given.keys())])
