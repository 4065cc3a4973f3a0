"""What the demo shows of a run, from its ``log.jsonl``: tables and a picture."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure
from rich.table import Table

from megapoly.errors import TrainingError

PAIRS = "pairs"  # the bilingual source
Event = dict[str, Any]
_AROUND = 10  # steps before and after the change of layout whose losses are compared


@dataclass(frozen=True)
class History:
    """The events of a run, by kind, in order."""

    starts: list[Event]
    steps: list[Event]
    validations: list[Event]

    @classmethod
    def read(cls, path: Path) -> History:
        events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return cls(*([event for event in events if event["kind"] == kind] for kind in ("start", "train", "validation")))

    def validation(self, at: str) -> dict[str, float]:
        """Bits per byte by source of the newest validation ``at`` before, between or after the stages.

        Raises:
            TrainingError: there is none.
        """
        found = [event["bits_per_byte"] for event in self.validations if event["at"] == at]
        if not found:
            raise TrainingError(f"the run's log has no validation {at!r}; has training come to its end?")
        values: dict[str, float] = found[-1]
        return values


def continuity(history: History, global_batch: int) -> tuple[Table, str]:
    """The steps around the change of layout, and a sentence on them.

    Raises:
        TrainingError: the run did not go on at the sample after the last one trained.
    """
    resumed = history.starts[-1]
    before = [step for step in history.steps if step["step"] <= resumed["step"]][-_AROUND:]
    after = [step for step in history.steps if step["step"] > resumed["step"]][:_AROUND]
    table = Table(title="The change of layout", title_justify="left")
    for column in ("step", "layout", "samples", "loss"):
        table.add_column(column, justify="right" if column != "layout" else "left")
    for step in (*before[-3:], *after[:3]):
        samples = f"{step['sample'] - global_batch:,} to {step['sample'] - 1:,}"
        table.add_row(str(step["step"]), step["layout"], samples, f"{step['loss']:.4f}")
    if not before or not after or after[0]["sample"] - global_batch != before[-1]["sample"]:
        raise TrainingError(
            f"resumed at sample {after[0]['sample'] - global_batch if after else None}, but the run had trained up to"
            f" {before[-1]['sample'] if before else None}: samples are repeated or lost"
        )
    means = [sum(step["loss"] for step in part) / len(part) for part in (before, after)]
    return table, (
        f"No sample repeated, none lost. Mean loss of the last {len(before)} steps before: {means[0]:.3f};"
        f" of the first {len(after)} after: {means[1]:.3f}."
    )


def bits_per_byte_table(history: History) -> Table:
    """Held-out bits per byte by source, before, between and after the stages."""
    columns = [history.validation(at) for at in ("before", "between", "after")]
    table = Table(title="Bits per byte of held-out text (less is better)", title_justify="left")
    for column in ("", "before", "after stage 1", "after stage 2", "won in stage 2"):
        table.add_column(column, justify="right" if column else "left")
    for name in columns[0]:
        values = [column[name] for column in columns]
        table.add_row(name, *(f"{value:.3f}" for value in values), f"{values[1] - values[2]:+.3f}")
    return table


def picture(history: History, output: Path) -> None:
    """Loss over tokens, share of each source over tokens, and bits per byte before and after: one PNG."""
    figure = Figure(figsize=(10, 12), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1)
    tokens = [step["tokens"] / 1e6 for step in history.steps]
    top.plot(tokens, [step["loss"] for step in history.steps], linewidth=0.8, color="tab:blue")
    top.set(ylabel="training loss (nats per token)", title="One run, two stages, two layouts")
    _mark_changes(top, history.steps)
    _shares(middle, history.steps)
    _bars(bottom, history)
    for axes in (top, middle):
        axes.set(xlabel="trained tokens (millions)", xlim=(0, tokens[-1]))
    temporary = output.with_name(f".{output.name}")
    figure.savefig(temporary, dpi=110, format="png")
    os.replace(temporary, output)


def _mark_changes(axes: Any, steps: Sequence[Event]) -> None:
    """A vertical line and a label, in a margin above the curve, where the stage or the layout becomes another."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.2 * (high - low))
    for key, style, height in (("stage", "--", 0.93), ("layout", ":", 0.86)):
        label = {"transform": axes.get_xaxis_transform(), "fontsize": "small"}
        axes.text(0.0, height, f" {steps[0][key]}", **label)
        for previous, step in itertools.pairwise(steps):
            if step[key] != previous[key]:
                at = previous["tokens"] / 1e6
                axes.axvline(at, linestyle=style, color="black", linewidth=0.8)
                axes.text(at, height, f" {step[key]}", **label)


def _shares(axes: Any, steps: Sequence[Event], groups: int = 40) -> None:
    """What was trained, not what was planned: tokens by source in some ``groups`` parts of the run, stacked."""
    last = {"en": -1, PAIRS: 1}
    names = sorted({name for step in steps for name in step["sources"]}, key=lambda name: (last.get(name, 0), name))
    size = max(1, len(steps) // groups)
    stages = [list(stage) for _, stage in itertools.groupby(steps, key=lambda step: step["stage"])]
    parts = [stage[i : i + size] for stage in stages for i in range(0, len(stage), size)]
    edges, rows = [0.0], []
    for part in parts:
        counts = [sum(step["sources"].get(name, {"tokens": 0})["tokens"] for step in part) for name in names]
        rows.append([100 * count / sum(counts) for count in counts])
        edges.append(part[-1]["tokens"] / 1e6)
    grey = {"en": "lightgrey", PAIRS: "dimgrey"}
    colors = [grey.get(name) or colormaps["tab20"](i % 20) for i, name in enumerate(names)]
    at = [value for edge in itertools.pairwise(edges) for value in edge]
    stacked = [[row[i] for row in rows for _ in range(2)] for i in range(len(names))]
    axes.stackplot(at, stacked, labels=names, colors=colors, linewidth=0)
    axes.set(ylabel="share of trained tokens (%)", ylim=(0, 100))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small", reverse=True)


def _bars(axes: Any, history: History) -> None:
    first = history.validation("before")
    for offset, at, label, color in (
        (-0.3, "before", "before", "lightgrey"),
        (0.0, "between", "after stage 1", "tab:orange"),
        (0.3, "after", "after stage 2", "tab:green"),
    ):
        values = history.validation(at)
        axes.bar(
            [i + offset for i in range(len(first))], [values[name] for name in first], 0.3, label=label, color=color
        )
    axes.set(ylabel="bits per byte, held-out text", xticks=range(len(first)), xticklabels=list(first))
    axes.set(ylim=(0, 1.15 * max(first.values())), xlim=(-0.6, len(first) - 0.4))
    axes.legend(loc="upper right", ncols=3, fontsize="small")
