"""The picture of a data plan: shares of languages over the run, and epochs of every source. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING

from megapoly.charts.figure import new_figure, palette
from megapoly.data.plan import Plan
from megapoly.mixture import non_english_part
from megapoly.plan.curriculum import outlook, shares_over_time

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_curriculum(plan: Plan, caps: Mapping[str, float | None]) -> Figure:
    """Above, who has which share after how many tokens; below, how often each source is read, in parts by stage.

    Languages stand in the order of their tokens, English at the bottom; a line parts it from what is not English.
    """
    found = outlook(plan)
    tokens, shares = shares_over_time(plan)
    names = [use.name for use in found.languages]
    names.sort(key=non_english_part)
    figure = new_figure(max(8.0, 3.0 + 0.35 * len(found.sources)), 8.0)
    above, below = figure.subplots(2, 1, height_ratios=(3, 2))
    scale, unit = next(
        ((size, name) for size, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")) if tokens[-1] >= size), (1.0, "")
    )
    edges = [token / scale for token in tokens]
    colors = palette(len(names))
    above.stackplot(
        [edge for pair in pairwise(edges) for edge in pair],
        [[share for share in shares[name] for _ in range(2)] for name in names],
        labels=names,
        colors=colors,
        linewidth=0,
    )
    english = [
        sum((1 - non_english_part(name)) * row[i] for name, row in shares.items()) for i in range(len(edges) - 1)
    ]
    above.stairs(english, edges, baseline=None, color="black", linewidth=1.2, label="English, code,\nhalf of pairs")
    for name, first, end in plan.stages():
        left, right = first * plan.sequence / scale, end * plan.sequence / scale
        above.axvline(left, color="0.3", linewidth=0.6)
        above.annotate(
            name, ((left + right) / 2, 1.0), ha="center", va="bottom", xytext=(0, 2), textcoords="offset points"
        )
    above.set_xlim(0, edges[-1])
    above.set_ylim(0, 1)
    above.set_xlabel(f"tokens trained{f', {unit}' if unit else ''}")
    above.set_ylabel("share of the samples")
    above.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize="small", reverse=True)

    places = range(len(found.sources))
    bottom = [0.0] * len(found.sources)
    for i, stage in enumerate(found.stages):
        heights = [use.epochs[i] for use in found.sources]
        below.bar(places, heights, bottom=bottom, label=stage, color=f"C{i % 10}")
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    capped = [(place, caps.get(use.name)) for place, use in zip(places, found.sources, strict=True)]
    marks = [(place, cap) for place, cap in capped if cap is not None]
    if marks:
        below.scatter(*zip(*marks, strict=True), marker="_", s=200, color="black", label="cap", zorder=3)
    below.set_xticks(places, [use.name for use in found.sources], rotation=45 if len(places) > 12 else 0)
    below.set_ylabel("epochs")
    below.grid(axis="y", color="0.9")
    below.set_axisbelow(True)
    below.spines[["top", "right"]].set_visible(False)
    below.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize="small")
    return figure
