"""Pictures of kernels' benchmarks: bars over models' shapes, curves over sizes, memory. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megapoly.charts.figure import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

OWN = "megapoly"
_COLORS = ("#1f4e9c", "#f28e2b", "#76b7b2", "#b07aa1", "#9c755f", "#bab0ac")  # ours is the darkest
_PASSES = ("forward", "backward")
_BAR, _GAP, _CURVES = 0.16, 0.12, 2.6  # inches of a bar, of what parts groups of bars, and of a panel of curves
_SWEEP = re.compile(r"(?:(?P<series>.+), )?(?P<axis>hidden|sequence) (?P<size>\d+)")
_AXES = {"hidden": "hidden size", "sequence": "sequence length"}


@dataclass
class _Panel:
    """One of the axes.

    Attributes:
        values: by group (a label of bars, or a size of curves), and then by contender.
        limits: what the machine does, in the panel's unit; none for memory.
        curve: name of the axis of sizes; "" for bars.
    """

    title: str
    unit: str
    values: dict[Any, dict[str, float]]
    limit: float | None = None
    curve: str = ""

    @property
    def contenders(self) -> list[str]:
        return list(dict.fromkeys(name for group in self.values.values() for name in group))

    @property
    def inches(self) -> float:
        if self.curve:
            return _CURVES
        return len(self.values) * (len(self.contenders) * _BAR + _GAP) + 0.9


def draw_kernels(rows: Sequence[Row], device: str) -> Figure:
    """A panel for every pass of an op, and one for memory where an op's tokens meet a large vocabulary.

    Bars by shape, the machine's limit as a dashed line; curves over sizes for what was swept.

    Args:
        rows: of ``kernels/bench``; those without an ``op``, the limits, are not drawn.
        device: for the title.
    """
    panels = _panels([row for row in rows if row.get("op")])
    heights = [panel.inches for panel in panels]
    figure = new_figure(9.0, sum(heights) + 0.7)
    contenders = list(dict.fromkeys(name for panel in panels for name in panel.contenders))
    colors = {name: _COLORS[i % len(_COLORS)] for i, name in enumerate(contenders)}
    found: dict[str, Any] = {}
    for axes, panel in zip(figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0], panels):
        (_draw_curves if panel.curve else _draw_bars)(axes, panel, colors)
        axes.set_title(panel.title, loc="left", fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        found |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.suptitle(device, fontsize="small", color="0.4")
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=6, frameon=False, fontsize="small")
    return figure


def _panels(rows: Sequence[Row]) -> list[_Panel]:
    panels: dict[tuple[str, ...], _Panel] = {}
    memory: dict[str, _Panel] = {}
    for row in rows:
        label, _, dims = row["shape"].partition(": ")
        swept = _SWEEP.fullmatch(label)
        words = row["name"].split(" ")
        base, kind = (" ".join(words[:-1]), words[-1]) if words[-1] in _PASSES else (row["name"], "")
        group: Any
        if swept:
            series = f", {swept['series']}" if swept["series"] else ""
            key, group = (row["name"], series), int(swept["size"])
            title, curve = row["name"] + series, _AXES[swept["axis"]]
        else:
            key, curve = (row["op"], kind or base), ""
            title, group = f"{row['op'].replace('_', ' ')}, {kind}" if kind else base, f"{base}\n{label}: {dims}"
        title += f", {row['dtype']}"
        panel = panels.setdefault(key, _Panel(title, row["unit"], {}, row["limit"], curve))
        panel.values.setdefault(group, {OWN: row["value"]})
        if row["peer_value"] is not None:
            panel.values[group][row["peer"]] = row["peer_value"]
        if row["op"] == "linear_cross_entropy" and not swept:
            title = "memory beyond inputs and results (less is better)"
            panel = memory.setdefault(row["op"], _Panel(title, "MB", {}))
            panel.values.setdefault(group, {OWN: row["extra_bytes"] / 1e6})
            if row["peer_extra_bytes"] is not None:
                panel.values[group][row["peer"]] = row["peer_extra_bytes"] / 1e6
    found = [*panels.values(), *memory.values()]
    for panel in found:
        if not panel.curve:  # ops one after the other, each over all models
            order = list(dict.fromkeys(label.split("\n")[0] for label in panel.values))
            panel.values = dict(sorted(panel.values.items(), key=lambda item: order.index(item[0].split("\n")[0])))
    return found


def _draw_bars(axes: Axes, panel: _Panel, colors: Mapping[str, Any]) -> None:
    names, widest = panel.contenders, max(max(group.values()) for group in panel.values.values())
    step = 1 / (len(names) + _GAP / _BAR)
    for i, name in enumerate(names):
        places = [place + (i - (len(names) - 1) / 2) * step for place in range(len(panel.values))]
        widths = [group.get(name, 0.0) for group in panel.values.values()]
        bars = axes.barh(places, widths, step, label=name, color=colors[name])
        texts = [_number(width) if width else "" for width in widths]
        clear = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # of the limit's line
        axes.bar_label(bars, texts, padding=2, fontsize=6, bbox=clear, zorder=3)
    bases = {label.split("\n")[0] for label in panel.values}
    labels = [label if len(bases) > 1 else label.split("\n")[1] for label in panel.values]
    axes.set_yticks(range(len(panel.values)), labels, fontsize="x-small")
    axes.set_ylim(len(panel.values) - 0.5, -0.5)
    axes.set_xlabel(panel.unit, fontsize="small")
    axes.grid(axis="x", color="0.9")
    if panel.limit is not None:
        axes.axvline(panel.limit, color="0.2", linestyle="--", linewidth=1, label="measured limit")
    axes.set_xlim(0, 1.1 * max(widest, panel.limit or 0.0))
    axes.tick_params(labelsize="x-small")


def _draw_curves(axes: Axes, panel: _Panel, colors: Mapping[str, Any]) -> None:
    sizes = sorted(panel.values)
    for name in panel.contenders:
        points = [(size, panel.values[size][name]) for size in sizes if name in panel.values[size]]
        axes.plot(*zip(*points), marker="o", markersize=4, label=name, color=colors[name])
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel(panel.curve, fontsize="small")
    axes.set_ylabel(panel.unit, fontsize="small")
    if panel.limit is not None:
        axes.axhline(panel.limit, color="0.2", linestyle="--", linewidth=1, label="measured limit")
    axes.set_ylim(0, None)
    axes.grid(color="0.9")
    axes.tick_params(labelsize="x-small")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
